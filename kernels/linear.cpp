// y = x @ w.T for weights in bfloat16, int8 or int4, on a CPU.
//
// What it is: one matrix product whose weights are read once, in the order they lie in memory, and turned into
// numbers on the way; 1 to 32 rows at a time run at the speed of memory, more at the speed of arithmetic. What it
// is not: a layer, a quantizer or a file format; those are in quantize.py, and `pack` in cpu.py lays out the weights. Read
// panel.h first: the layout, and the loops in which all the time goes; here is what shares them out, and the operators.
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "calls.h"
#include "panel.h"
#include "team.h"

namespace {

#ifdef BFLOAT16_ONLY                            // half of all this, in half the time: a model of plain weights needs no more
constexpr bool QUANTIZED = false;
#else
constexpr bool QUANTIZED = true;
#endif
constexpr int64_t FP4 = 40;                     // `bits` of 4-bit floats
constexpr int64_t DIRECT = 32;                  // up to so many rows of x not rounded unpack weights as they go, more do it once
constexpr int64_t MANY = 512;                   // rows that all weights meet before the next: more would not stay in the caches
constexpr int64_t TOGETHER = 8;                 // panels that tiles multiply at once, piece by piece
constexpr int64_t FEW_BYTES = 1 << 19;          // of rows that stay in the second cache anyway: panels go one by one
constexpr int64_t MOST_TILED = 1 << 23;         // inputs of rows that are laid out as tiles at once
constexpr int64_t NEAR = 1024;                  // bytes that unpacking asks for before it needs them
constexpr int64_t DEPTH = 1024;                 // inputs of a panel unpacked at a time: 64 KB

// ---- products ------------------------------------------------------------------------------------------------------

#ifdef BFLOAT16_DOT
// Numbers of outputs 0 to 7, or of 8 to 15 (`part` 1), each twice.
inline floats twice(floats v, int part) {
  const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (floats)_mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(8 * part)), (__m512)v);
}

// Units of a panel as bfloat16, scaled: what the dequantized weight would be. plain: of bfloat16 and int8, without scales.
template <class W, bool plain = false>
void unpack(int64_t first, int64_t units, const Groups& g, at::BFloat16* out) {
  constexpr int LINES = W::HALF / 64;
  for (int64_t u = first, last; u < first + units; u = last) {
    const int64_t i = u / g.units;
    last = std::min((i + 1) * g.units, first + units);
    floats scale[2][2] = {}, offset[2][2] = {};
#pragma GCC unroll 4
    for (int at = 0; at < 4 && !plain; at++) {
      scale[at / 2][at % 2] = twice(g.scales(i, at / 2), at % 2);
      if (W::HALF == 64 || g.offsets()) offset[at / 2][at % 2] = twice(__builtin_convertvector(g.offsets(i, at / 2), floats), at % 2);
    }
    const auto all = [&](auto exact) {
      const uint8_t* unit = g.unit<W>(u);
      for (int64_t n = u; n < last; n++) {
#pragma GCC unroll 8
        for (int line = 0; line < 2 * LINES; line++) __builtin_prefetch(unit + NEAR + 64 * line);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, unit += W::HALF) {
          words w[LINES][2];
          for (int at = 0; at < 2 * LINES && !plain; at++) w[at / 2][at % 2] = (words)_mm512_cvtepu16_epi32(read<__m256i>(unit + 32 * at));
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++, out += 32) {
            if constexpr (plain) {
              _mm512_storeu_si512(out, (__m512i)W::packed(unit, j));
            } else {
              const auto scaled = [&](int part) {
                const floats v = W::high(w[j % LINES][part], j), by = scale[half][part], less = W::MORE[j] - offset[half][part];
                return exact ? _mm512_fmsub_ps((__m512)v, (__m512)by, (__m512)(less * by)) : (__m512)((v - less) * by);
              };
              _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(scaled(1), scaled(0)));
            }
          }
        }
      }
    };
    // scales of bfloat16 times so short numbers are exact, before and after what is too much comes off
    W::HALF == 64 && !g.scale ? all(std::true_type()) : all(std::false_type());
  }
}
#endif

// Rows x [M, K], in one piece, and a weight: y [M, N] = x @ w.T.
struct Job {
  Matrix matrix;
  const void* x;
  int64_t M;
  void* y;
};

struct Product : Job {
  int64_t N, K, block;                // block: rows of x laid out together; the last one has the rest
  const void* arranged;               // x in its blocks
  int64_t group;                      // 0: no scales
  Groups groups;                      // the first panel
  std::vector<float> x_sum;           // as x: blocks of [groups][rows]
  const Rounding* rounding;           // the same, [K / BLOCK][rows]
  at::Tensor kept;                    // what `arranged` points to, where that is not bytes
};

// Whether many rows meet weights that were unpacked for all of them.
template <class X> constexpr bool unpacks_once(int64_t M, bool scaled) {
  return M > DIRECT && scaled && std::is_same_v<X, at::BFloat16>;
}

// Whether tiles multiply so many rows in int8. Fewer, vectors are as fast; more become bfloat16.
bool bytes_by_tiles(int64_t rows) {
#ifdef TILES
  return rows > ROWS<int8_t> && rows <= TILE && Tiles::given();
#else
  return false;
#endif
}

// The rows of a block at most. Fewer where int8 and int4 become floats on the way: that form is rare, and each number of rows
// takes time to build.
template <class W, class X> constexpr int most_rows(bool once) {
  return once || std::is_same_v<W, Bfloat16> || std::is_same_v<X, int8_t> ? ROWS<X> : std::min(ROWS<X>, 4);
}

// Scratch of one thread, y's panel [M][32] among it.
struct Scratch {
  Lines<float> y, scale;
  Lines<at::BFloat16> weights;
};

// A weight's first panel.
template <class W> Groups first_panel(const Matrix& m) {
  const int64_t units = (m.K + UNIT - 1) / UNIT, group = m.scales && m.group ? m.group / UNIT : units;
  const int64_t count = (units + group - 1) / group, head = m.least < 0 ? 0 : HEAD, stride = group * 2 * W::HALF + head;
  const uint8_t* w = (const uint8_t*)m.w;
  return {.count = count, .units = group, .all = units, .w = w + head, .stride = stride,
          .nbytes = units * 2 * W::HALF + count * head, .heads = head ? w : nullptr, .least = uint32_t(m.least) << 16,
          .scale16 = m.scale_type == (int64_t)at::kBFloat16 ? (const at::BFloat16*)m.scales : nullptr,
          .scale = m.scale_type == (int64_t)at::kFloat ? (const float*)m.scales : nullptr, .offset = (const int8_t*)m.offsets,
          .ahead = std::max<int64_t>(1, FAR / stride)};
}

// Where scales are 16-bit floats of the other kind: those of a panel, as 32-bit ones, the i-th of n panels' in `room`.
inline void widen_scales(const Matrix& m, int64_t panel, Groups& g, Lines<float>& room, int64_t i = 0, int64_t n = 1) {
  if (!m.scales || m.scale_type != (int64_t)at::kHalf) return;
  const int64_t each = g.count * PANEL;
  room.resize(n * each);
  g.scale = std::copy_n((const at::Half*)m.scales + panel * each, each, room.data() + i * each) - each;
}

template <class W, class X>
void panel(const Product& p, Groups& g, Scratch& s) {
  const X* x = (const X*)p.arranged;
  using Rows = std::make_integer_sequence<int, most_rows<W, X>(false)>;
  const int64_t units = p.K / UNIT;
  const bool once = unpacks_once<X>(p.M, p.group);
  const int64_t depth = once || p.M > DIRECT ? std::min(DEPTH / UNIT, units) : units;
  for (int64_t first = 0; first < units; first += p.group && !once ? units : depth) {
    const int64_t n = p.group && !once ? units : std::min(depth, units - first);
#ifdef BFLOAT16_DOT
    if constexpr (std::is_same_v<X, at::BFloat16> && !std::is_same_v<W, Bfloat16>)
      if (once) {
        s.weights.resize(depth * UNIT * PANEL);
        unpack<W>(first, n, g, s.weights.data());
      }
#endif
    for (int64_t m = 0; m < p.M; m += p.block) {
      const int64_t rows = std::min(p.block, p.M - m);
      const X* xs = x + m * p.K + first * UNIT * rows;
      float* y = s.y.data() + m * PANEL;
      if (once || !p.group) {
        const Groups plain{1, n, n, once ? (const uint8_t*)s.weights.data() : g.w + first * 2 * W::HALF};
        if constexpr (std::is_same_v<X, at::BFloat16>)
          if (once) {
            multiply_rows<Bfloat16, X>(rows, std::make_integer_sequence<int, most_rows<W, X>(true)>(), xs, plain, y, first > 0);
            continue;
          }
        multiply_rows<W, X>(rows, Rows(), xs, plain, y, first > 0);
      } else {
        g.x_sum = p.x_sum.data() + m * g.count;
        g.rounding = p.rounding + m * ((p.K + BLOCK - 1) / BLOCK);
#ifdef TILES
        if constexpr (std::is_same_v<X, int8_t>)
          if (bytes_by_tiles(rows)) {
            g.units == BLOCK / UNIT ? multiply_bytes_by_tiles<W, true>(xs, rows, g, y) : multiply_bytes_by_tiles<W, false>(xs, rows, g, y);
            continue;
          }
#endif
        multiply_rows<W, X>(rows, Rows(), xs, g, y, false);
      }
    }
  }
}

// n of a panel's 32 sums to y, rounded. far: past the caches; who did that says `all_stored` before others read it.
template <class Y> inline void store(const float* sums, int64_t n, Y* y, bool far) {
#ifdef BFLOAT16_DOT
  if (std::is_same_v<Y, at::BFloat16> && n == PANEL) {
    const auto row = _mm512_cvtne2ps_pbh((__m512)read<floats>(sums + 16), (__m512)read<floats>(sums));
#ifdef TILES
    if (far && (uintptr_t)y % 64 == 0) return _mm512_stream_si512((__m512i*)y, (__m512i)row);
#endif
    return write(y, row);
  }
#endif
  std::copy_n(sums, n, y);
}
inline void all_stored() {
#ifdef TILES
  _mm_sfence();
#endif
}
// Whether y lies in memory by the time that it is written, weights having been read meanwhile. Intel's processors wait for what was
// in each line: a twelfth of the time of 4 rows of int4.
inline bool far_away(const Groups& g, int64_t panels) { return g.nbytes * panels > 1 << 21; }

// Several products of one shape, but for their rows; the threads share all their panels.
template <class W, class X, class Y>
void run(const std::vector<Product>& products, Team* team) {
  int64_t rows = 0;
  for (const Product& p : products) rows = std::max(rows, p.M);
  const int64_t K = products[0].K, panels = (products[0].N + PANEL - 1) / PANEL;
  // a thread is worth waking for 64 K multiplications
  const int64_t grain = std::max<int64_t>(1, 65536 / (K * PANEL * std::min<int64_t>(rows, 8)));
  share(team, panels * products.size(), grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch s;
    s.y.resize(rows * PANEL);
    for (int64_t i = begin; i < end;) {
      const Product& p = products[i / panels];
      const int64_t index = i % panels, last = std::min(panels, index + end - i);
#ifdef TILES
      std::optional<Tiles> shapes;
      if (std::is_same_v<X, int8_t> && bytes_by_tiles(p.M)) shapes.emplace(p.M, true);
#endif
      Groups g = p.groups;
      const bool far = far_away(g, panels);
      g.next(index);
      for (int64_t at = index; at < last; at++, i++, g.next()) {
        const int64_t first = at * PANEL, n = std::min<int64_t>(PANEL, p.N - first);
        widen_scales(p.matrix, at, g, s.scale);
        panel<W, X>(p, g, s);
        for (int64_t m = 0; m < p.M; m++) store(s.y.data() + m * PANEL, n, (Y*)p.y + m * p.N + first, far);
      }
    }
    all_stored();
  });
}

// x [M, K] -> blocks of [K / 2][rows][2].
template <class X> at::Tensor arrange(const X* x, int64_t M, int64_t K, int64_t block, Team* team) {
  const at::Tensor out = at::empty({M * K}, at::dtype<X>());
  using Two = std::conditional_t<sizeof(X) == 2, uint32_t, uint64_t>;
  const Two* in = (const Two*)x;
  Two* to = (Two*)out.data_ptr();
  share(team, (M + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * block; m < std::min(M, end * block); m += block) {
      const int64_t rows = std::min(block, M - m);
      for (int64_t k = 0; k < K / 2; k++)
        for (int64_t r = 0; r < rows; r++) to[m * K / 2 + k * rows + r] = in[(m + r) * K / 2 + k];
    }
  });
  return out;
}

// x [M, K] -> for offsets, its sums by group, blocks of [groups][rows].
template <class X> std::vector<float> group_sums(const X* x, int64_t M, int64_t K, int64_t group, int64_t block, Team* team) {
  const int64_t G = (K + group - 1) / group;
  std::vector<float> out(M * G);
  share(team, M, std::max<int64_t>(1, 65536 / K), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      const int64_t first = m / block * block, rows = std::min(block, M - first);
      const X* in = x + m * K;
      for (int64_t g = 0; g < G; g++) {
        floats total = {};
        int64_t k = g * group;
        const int64_t last = std::min(k + group, K);
        for (; k + 16 <= last; k += 16) total += load16(in + k);
        float& y = out[first * G + g * rows + m - first] = sum(total);
        for (; k < last; k++) y += float(in[k]);
      }
    }
  });
  return out;
}

#ifdef BYTE_DOT
// n inputs of one of `rows`, at most 16 blocks -> int8 in the order of quads, and how each block was rounded. From one quad to the
// next it is `stride` of them, 1 or `rows`.
void round_blocks(const at::BFloat16* x, int64_t n, int64_t rows, int64_t stride, int32_t excess, int32_t* quads, Rounding* rounding) {
  alignas(64) at::BFloat16 padded[LANES * BLOCK];
  if (n < LANES * BLOCK) {
    std::fill(std::copy_n(x, n, padded), padded + LANES * BLOCK, at::BFloat16(0));
    x = padded;
  }
  // compared as whole numbers, of which NaN's is the largest: it is not lost
  const auto larger = [](floats a, floats b) { return (floats)_mm512_max_epi32((__m512i)a, (__m512i)b); };
  const auto size = [&](int64_t i) { return (floats)_mm512_abs_ps((__m512)load16(x + i)); };
  floats v[LANES];
  for (int j = 0; j < LANES; j++) v[j] = larger(size(j * BLOCK), size(j * BLOCK + LANES));
  const floats most = fold(v, larger), scale = most * (1 / 127.0f), inverse = most > 0 ? 127 / most : 0;
  for (int i = 0; i < 2 * LANES; i++) {         // two vectors a block
    const __m512i whole = _mm512_cvtps_epi32((__m512)(load16(x + i * LANES) * inverse[i / 2]));
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m128i four = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(whole), order);
    v[i / 2] = (i % 2 ? v[i / 2] : floats{}) + (floats)_mm512_cvtepi32_ps(whole);
    alignas(16) int32_t quad[4];
    write(quad, four);
    for (int q = 0; q < 4 && i * LANES + 4 * q < n; q++) quads[i / 2 * 8 * rows + (i % 2 * 4 + q) * stride] = quad[q];
  }
  const ints sums = __builtin_convertvector(fold(v, [](floats a, floats b) { return a + b; }), ints);
  const ints start = excess ? sums * -excess : sums & 0xffff;
  for (int j = 0; j * BLOCK < n; j++) rounding[j * rows] = {scale[j], start[j]};
}

// Room for rows in int8, of the thread that called. It stays, for to ask for memory takes as long as to round a row. And it is
// taken in turns: to write where another processor's cache still has what was there before takes as long again.
struct Room {
  static constexpr int64_t AROUND = 1 << 18;
  std::vector<int32_t> all;
  int64_t next = 0;

  int32_t* take(int64_t n) {
    const int64_t least = std::max(n, AROUND);
    if (int64_t(all.size()) > 8 * least) std::vector<int32_t>().swap(all);           // a prompt's
    if (int64_t(all.size()) < least) all.resize(least);
    if (next + n > int64_t(all.size())) next = 0;
    next += n;
    return all.data() + next - n;
  }
};

// x [M, K] -> blocks of [K / 4][rows][4] in int8, for tiles [K / 32][rows][32], and how they were rounded.
void round_rows(const at::BFloat16* x, int64_t M, int64_t K, int64_t block, int32_t excess, int32_t* quads, Rounding* rounding, Team* team) {
  const int64_t count = (K + BLOCK - 1) / BLOCK, step = LANES * BLOCK, steps = (K + step - 1) / step;
  if (M == 1) {                       // what lies far away is asked for at once, not line by line
    for (int64_t k = 0; k < K; k += 64) __builtin_prefetch((int8_t*)quads + k, 1);
    for (int64_t i = 0; i < count; i += 64 / sizeof(Rounding)) __builtin_prefetch(rounding + i, 1);
  }
  // one row is this thread's: meanwhile the others ask for their weights
  share(team, M * steps, M > 1 ? 2 : steps, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t m = i / steps, k = i % steps * step;
      const int64_t first = m / block * block, rows = std::min(block, M - first), r = m - first;
      const bool tiles = bytes_by_tiles(rows);
      round_blocks(x + m * K + k, std::min(step, K - k), rows, tiles ? 1 : rows, excess,
                   quads + first * K / 4 + k / 4 * rows + (tiles ? 8 * r : r), rounding + first * count + k / BLOCK * rows + r);
    }
  });
}
#endif

// Values [N, K] as the layout has them, into out: N a multiple of 32, K of 8. heads: before each group of so many units.
void pack(const at::Tensor& values, at::Tensor out, int64_t bits, int64_t group, const std::optional<at::Tensor>& heads) {
  const int64_t N = values.size(0), K = values.size(1), units = K / UNIT, nbytes = 16 * bits;    // of a unit of 16 outputs
  const int64_t count = heads ? heads->size(1) : 0, each = heads && group ? group / UNIT : units;
  const uint8_t* from = (const uint8_t*)values.const_data_ptr();
  uint8_t* to = (uint8_t*)out.data_ptr();
  const auto put = [&](int64_t n, int64_t u) {                                       // a unit of one output
    const int64_t o = n % 16;
    const uint8_t* in = from + (n * K + u * UNIT) * (bits == 16 ? 2 : 1);
    uint8_t* unit = to + n / PANEL * (units * 2 * nbytes + count * HEAD) + (heads ? u / each + 1 : 0) * HEAD
                    + (u * 2 + n % PANEL / 16) * nbytes;
    if (bits == 16)
      for (int j = 0; j < 4; j++) std::memcpy(unit + (j * 16 + o) * 4, in + j * 4, 4);
    if (bits == 8)
      for (int q = 0; q < 2; q++)
        for (int i = 0; i < 4; i++) unit[(q * 16 + o) * 4 + i] = in[2 * q + i % 2 * 4 + i / 2] ^ 128;
    if (bits == 4)
      for (int e = 0; e < 2; e++)
        write<uint16_t>(unit + (o * 2 + e) * 2, in[e] | in[2 + e] << 4 | in[4 + e] << 8 | in[6 + e] << 12);
  };
  constexpr int64_t SOME = 64;        // units: enough of a row that the processor reads ahead, and what they become is cached
  at::parallel_for(0, N / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * PANEL; first < end * PANEL; first += PANEL)
      for (int64_t at = 0; at < units; at += SOME)
        for (int64_t n = first; n < first + PANEL; n++)
          for (int64_t u = at; u < std::min(at + SOME, units); u++) put(n, u);
    for (int64_t i = begin * count; i < end * count; i++)
      std::memcpy(to + i / count * units * 2 * nbytes + i * HEAD + i % count * each * 2 * nbytes,
                  (const uint8_t*)heads->const_data_ptr() + i * HEAD, HEAD);
  });
}

// ---- many rows, by tiles --------------------------------------------------------------------------------------------

#ifdef TILES
// A row x [K] as a tile's of `rows`: [pieces, `stride` apart][PIECE spans][4][rows][16 pairs][2], zeros behind it.
void lay_row(const at::BFloat16* x, int64_t K, int64_t rows, int64_t stride, at::BFloat16* tiles) {
  const auto pick = [](__m512i a, __m512i b, int j) {               // pairs j, j + 4 ... of both, then j + 1, j + 5 ...
    const __m512i index = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    return _mm512_permutex2var_epi32(a, _mm512_add_epi32(index, _mm512_set1_epi32(j)), b);
  };
  alignas(64) at::BFloat16 padded[SPAN] = {};
  for (int64_t k = 0; k < K; k += SPAN) {
    const at::BFloat16* const from = K - k < SPAN ? (std::copy_n(x + k, K - k, padded), padded) : x + k;
    at::BFloat16* const to = tiles + k / SPAN / PIECE * stride + k / SPAN % PIECE * SPAN * rows;
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(from + 32 * i);
    for (int j = 0; j < 4; j += 2) {
      const __m512i low = pick(v[0], v[1], j), high = pick(v[2], v[3], j);
      _mm512_storeu_si512(to + j * rows * 32, _mm512_shuffle_i64x2(low, high, 0x44));
      _mm512_storeu_si512(to + (j + 1) * rows * 32, _mm512_shuffle_i64x2(low, high, 0xee));
    }
  }
}

// Rows of x that tiles multiply, in even blocks of at most 32.
struct Tiled : Job {
  int64_t blocks, rows, pieces;
  at::BFloat16* room;                 // [pieces][blocks][of a piece and a block]; rows that are not there are undefined

  explicit Tiled(const Job& job) : Job(job) {
    blocks = (M + TWO_TILES - 1) / TWO_TILES, rows = (M + blocks - 1) / blocks;
    pieces = (matrix.K + PIECE * SPAN - 1) / (PIECE * SPAN);
  }
  void lay(at::BFloat16* here, Team* team) {
    room = here;
    share(team, M, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        lay_row((const at::BFloat16*)x + r * matrix.K, matrix.K, rows, blocks * each(), tiles(0, r / rows) + r % rows * 32);
    });
  }
  int64_t each() const { return PIECE * SPAN * rows; }
  at::BFloat16* tiles(int64_t piece, int64_t block) const { return room + (piece * blocks + block) * each(); }
};

// A piece of a panel in bfloat16: where it lies, or else made in `made`. plain: unscaled.
template <class W> const uint8_t* piece_of(const Groups& g, int64_t piece, bool plain, at::BFloat16* made) {
  constexpr int64_t UNITS = PIECE * TILE;
  const int64_t first = piece * UNITS, n = std::min(UNITS, g.all - first);
  if (std::is_same_v<W, Bfloat16> && n % TILE == 0) return g.unit<W>(first);
  if constexpr (W::HALF == Int4::HALF) unpack<W>(first, n, g, made);
  else if (plain) unpack<W, true>(first, n, g, made);
  else if constexpr (W::HALF == Int8::HALF) unpack<W>(first, n, g, made);
  std::fill(made + n * UNIT * PANEL, made + UNITS * UNIT * PANEL, at::BFloat16(0));
  return (const uint8_t*)made;
}

// Sums of n panels from `first` on, [n][blocks * rows][32], scaled and rounded to y.
void store_panels(const Tiled& p, int64_t first, int64_t n, const Groups* g, bool plain, float* sums) {
  const bool far = p.blocks == 1 && far_away(g[0], p.matrix.N / PANEL);
  for (int64_t r = 0; r < p.M; r++)
    for (int64_t i = 0; i < n; i++) {
      float* const y = sums + (i * p.blocks * p.rows + r) * PANEL;
      for (int at = 0; at < PANEL && plain; at += 16) write(y + at, read<floats>(y + at) * g[i].scales(0, at / 16));
      const int64_t column = (first + i) * PANEL;
      store(y, std::min<int64_t>(PANEL, p.matrix.N - column), (at::BFloat16*)p.y + r * p.matrix.N + column, far);
    }
}

// n panels from `first` on times all rows. A piece of a panel stays in the first cache while all rows meet it; and the rows' inputs
// that it needs in the second one, while the panels' pieces do. What comes next is asked for.
template <class W> void multiply_panels(const Tiled& p, int64_t first, int64_t n, Scratch& s) {
  constexpr int64_t UNITS = PIECE * TILE, STEPS = 4 * PIECE;            // of a piece: units, and tiles one behind another
  const int64_t spans = (p.matrix.K + SPAN - 1) / SPAN, steps = p.blocks * STEPS;
  const bool direct = std::is_same_v<W, Bfloat16> && p.blocks == 1;
  const int64_t lines = (UNITS * 2 * W::HALF / 64 + steps - 1) / steps, x_lines = n > 1 ? p.each() * 2 / 64 / (n * STEPS) : 0;
  Groups g[TOGETHER] = {};
  const Groups start = first_panel<W>(p.matrix);
  const int64_t each = p.blocks * p.rows * PANEL;
  const bool plain = std::is_same_v<W, Bfloat16> || (std::is_same_v<W, Int8> && start.count == 1 && !start.offsets());
  s.y.resize(std::max<size_t>(s.y.size(), n * each)), s.weights.resize(UNITS * UNIT * PANEL);
  for (int64_t i = 0; i < n; i++) {
    g[i] = start, g[i].next(first + i);
    widen_scales(p.matrix, first + i, g[i], s.scale, i, n);
  }
  for (int64_t at = 0; at < p.pieces; at++)
    for (int64_t i = 0; i < n; i++) {
      const uint8_t* const panel = piece_of<W>(g[i], at, plain, s.weights.data());
      const uint8_t* const next = i + 1 < n ? g[i + 1].template unit<W>(at * UNITS) :
                                  at + 1 < p.pieces ? g[0].template unit<W>((at + 1) * UNITS) : g[i].w + g[i].nbytes;
      for (int64_t b = 0; b < p.blocks; b++) {
        const Ahead next_w{next + b * lines * STEPS * 64, lines};
        const Ahead next_x{(const uint8_t*)p.tiles((at + 1) % p.pieces, b) + i * x_lines * STEPS * 64, x_lines};
        (p.rows > TILE ? direct ? multiply_spans<true, true> : multiply_spans<true, false> :
                         direct ? multiply_spans<false, true> : multiply_spans<false, false>)(
            p.tiles(at, b), p.rows, panel, std::min(PIECE, spans - at * PIECE),
            s.y.data() + i * each + b * p.rows * PANEL, at > 0, next_x, next_w);
      }
    }
  store_panels(p, first, n, g, plain, s.y.data());
}

// Room for rows as tiles, of the thread that called. It stays: to get its pages anew takes as long as to fill them.
at::BFloat16* tiles_room(int64_t n) {
  thread_local Lines<at::BFloat16> room;
  const int64_t has = room.size();
  if (has < n || has > 8 * std::max(n, MOST_TILED)) Lines<at::BFloat16>().swap(room), room.resize(n);
  return room.data();
}

// Jobs in bfloat16 whose matrices have one shape.
template <class W> void multiply_by_tiles(const std::vector<Job>& jobs, Team* team) {
  std::vector<Tiled> products(jobs.begin(), jobs.end());
  int64_t n = 0;
  for (const Tiled& p : products) n += p.pieces * p.blocks * p.each();
  if (n > MOST_TILED && jobs.size() > 1) {        // halves: the room stays small
    const auto half = jobs.begin() + jobs.size() / 2;
    multiply_by_tiles<W>({jobs.begin(), half}, team);
    return multiply_by_tiles<W>({half, jobs.end()}, team);
  }
  at::BFloat16* room = tiles_room(n);
  for (Tiled& p : products) p.lay(room, team), room += p.pieces * p.blocks * p.each();
  // as many panels together as all threads have a part of
  const int64_t panels = (jobs[0].matrix.N + PANEL - 1) / PANEL, threads = team ? team->size() : at::get_num_threads();
  const int64_t turns = (panels + threads * TOGETHER - 1) / (threads * TOGETHER);
  const int64_t some = (panels + threads * turns - 1) / (threads * turns), parts = (panels + some - 1) / some;
  share(team, parts * products.size(), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch s;
    for (int64_t i = begin; i < end; i++) {
      const Tiled& p = products[i / parts];
      const Tiles tiles(p.rows);
      const int64_t first = i % parts * some, last = std::min(first + some, panels);
      const int64_t n = p.M * p.matrix.K * 2 > FEW_BYTES ? some : 1;
      for (int64_t at = first; at < last; at += n) multiply_panels<W>(p, at, std::min(n, last - at), s);
    }
    all_stored();
  });
}
#endif

// Jobs whose matrices have one shape; x and y of `type`.
template <class W, class X> void multiply_as(const std::vector<Job>& jobs, at::ScalarType type, Team* team) {
  std::vector<Product> products;
#ifdef BYTE_DOT
  thread_local Room room;
  const int64_t K = jobs[0].matrix.K, blocks_of_row = (K + BLOCK - 1) / BLOCK, quads_of_row = blocks_of_row * (BLOCK / 4);
  const int64_t row = quads_of_row + blocks_of_row * int64_t(sizeof(Rounding) / 4);
  int64_t rows = 0;
  for (const Job& job : jobs) rows += job.M;
  int32_t* rounded = std::is_same_v<X, int8_t> ? room.take(rows * row) : nullptr;
#endif
  for (const Job& job : jobs) {
    const Matrix& m = job.matrix;
    const bool tiles = std::is_same_v<X, int8_t> && bytes_by_tiles(job.M);
    const int64_t M = job.M, most = tiles ? M : most_rows<W, X>(unpacks_once<X>(M, m.scales));
    const int64_t blocks = (M + most - 1) / most, block = (M + blocks - 1) / blocks;             // even ones
    const int64_t group = m.group ? m.group : m.K;                                                 // 0 with scales: the row
    Product p{job, m.N, m.K, block, job.x, m.scales ? group : 0, first_panel<W>(m)};
#ifdef BYTE_DOT
    if constexpr (std::is_same_v<X, int8_t>) {
      const int32_t excess = p.groups.offsets() ? 0 : W::BIAS;
      Rounding* const rounding = (Rounding*)(rounded + M * quads_of_row);
      round_rows((const at::BFloat16*)job.x, M, K, block, excess, rounded, rounding, team);
      p.arranged = rounded, p.rounding = rounding, rounded += M * row;
    } else
#endif
    {
      const auto dtype = c10::CppTypeToScalarType<X>::value;
      if (type != dtype) p.kept = at::from_blob((void*)job.x, {M, m.K}, type).to(dtype);
      const X* x = (const X*)(p.kept.defined() ? p.kept.data_ptr() : job.x);
      if (p.groups.offsets()) p.x_sum = group_sums(x, M, m.K, p.group, block, team);
      if (M > 1) p.kept = arrange(x, M, m.K, block, team);
    }
    if (p.kept.defined()) p.arranged = p.kept.data_ptr();
    products.push_back(std::move(p));
  }
  if (type == at::kBFloat16) run<W, X, at::BFloat16>(products, team);
  else if (type == at::kHalf) run<W, X, at::Half>(products, team);
  else run<W, X, float>(products, team);
}

bool rounded_activations = true;

// Whether they are now: not where there is no instruction for it.
bool round_activations(bool wanted) {
  rounded_activations = wanted;
#ifdef BYTE_DOT
  return wanted;
#else
  return false;
#endif
}

// Whether tiles multiply so many rows, of bfloat16, as they are. Fewer get the bits that one row gets, or become bytes.
bool by_tiles(int64_t rows, int64_t bits) {
#ifdef TILES
  return rows > (bits == 16 || !rounded_activations ? 9 : TILE) && Tiles::given();
#else
  return false;
#endif
}

// f(W()) for the kind of weights.
template <class F> void by_kind(int64_t bits, F f) {
  if (bits == 16) f(Bfloat16());
  if constexpr (QUANTIZED) {
    if (bits == 8) f(Int8());
    if (bits == 4) f(Int4());
    if (bits == FP4) f(Fp4());
  }
}

void multiply_all(const std::vector<Job>& given, at::ScalarType type, Team* team = nullptr) {
  const int64_t bits = given[0].matrix.bits, nbytes = c10::elementSize(type);
  std::vector<Job> jobs, tiled;
  for (const Job& job : given)
    for (int64_t m = 0; m < job.M; m += MANY) {
      const Matrix& w = job.matrix;
      const int64_t rows = std::min(MANY, job.M - m);
      (type == at::kBFloat16 && by_tiles(job.M, bits) ? tiled : jobs).push_back(
          {w, (const char*)job.x + m * w.K * nbytes, rows, (char*)job.y + m * w.N * nbytes});
    }
#ifdef TILES
  if (tiled.size()) by_kind(bits, [&](auto w) { multiply_by_tiles<decltype(w)>(tiled, team); });
#endif
  if (jobs.empty()) return;
#if defined(BYTE_DOT) && !defined(BFLOAT16_ONLY)
  if (type == at::kBFloat16 && bits != 16 && rounded_activations && jobs[0].matrix.group % BLOCK == 0) {
    if (bits == 8) multiply_as<Int8, int8_t>(jobs, type, team);
    if (bits == 4) multiply_as<Int4, int8_t>(jobs, type, team);
    if (bits == FP4) multiply_as<Fp4, int8_t>(jobs, type, team);
    return;
  }
#endif
#ifdef BFLOAT16_DOT
  if (type == at::kBFloat16) return by_kind(bits, [&](auto w) { multiply_as<decltype(w), at::BFloat16>(jobs, type, team); });
#endif
  by_kind(bits, [&](auto w) { multiply_as<decltype(w), float>(jobs, type, team); });
}

using Optional = std::optional<at::Tensor>;

Matrix matrix(const at::Tensor& w, const Optional& scales, const Optional& offsets, int64_t N, int64_t bits, int64_t group) {
  const int64_t panels = (N + PANEL - 1) / PANEL, nbytes = w.nbytes() / panels, input = PANEL * (bits == FP4 ? 4 : bits) / 8;
  const bool headed = (bits == 4 || bits == FP4) && !offsets;
  int64_t K = nbytes / input;
  if (headed) {                                       // whole groups, and what is left
    const int64_t each = group ? group * input + HEAD : nbytes, rest = nbytes % each;
    K = group ? nbytes / each * group + (rest ? (rest - HEAD) / input : 0) : (nbytes - HEAD) / input;
  }
  const int64_t kind = scales ? (int64_t)scales->scalar_type() : 0;
  const int64_t least = !headed ? -1 : kind == (int64_t)at::kInt ? *(const int32_t*)scales->const_data_ptr() : 0;
  return {N, K, bits, group, w.const_data_ptr(), scales ? scales->const_data_ptr() : nullptr, kind,
          offsets ? offsets->const_data_ptr() : nullptr, least};
}

// x [M, K or what was padded to K], in one piece.
at::Tensor whole(const at::Tensor& x, int64_t K) {
  return x.size(1) == K ? x.contiguous() : at::constant_pad_nd(x, {0, K - x.size(1)});
}

// x [..., K], w packed for `bits` 16, 8, 4 or FP4; scales and offsets [panels * groups * 32] or none -> [..., N] in x's dtype.
at::Tensor linear(const at::Tensor& input, const at::Tensor& w, const Optional& scales, const Optional& offsets, int64_t N,
                  int64_t bits, int64_t group) {
  auto sizes = input.sizes().vec();
  const Matrix m = matrix(w, scales, offsets, N, bits, group);
  const at::Tensor x = whole(input.reshape({-1, sizes.back()}), m.K);
  sizes.back() = N;
  const at::Tensor y = at::empty(sizes, x.options());
  if (x.size(0)) multiply_all({{m, x.const_data_ptr(), x.size(0), y.data_ptr()}}, x.scalar_type());
  return y;
}

// The same for step.cpp, which is another library and calls this by its address.
void multiply_matrix(const Matrix& m, const at::BFloat16* x, int64_t rows, at::BFloat16* y, Team* team) {
  RECORD_FUNCTION("linear", std::array<c10::IValue, 0>());    // what a profiler shows within a step
  if (rows) multiply_all({{m, x, rows, y}}, at::kBFloat16, team);
}

template <class W> void look_up_as(const Matrix& m, int64_t row, at::BFloat16* y) {
  thread_local Scratch s;
  const int64_t half = row % PANEL / 16, o = row % 16;
  Groups g = first_panel<W>(m);
  g.next(row / PANEL);
  widen_scales(m, row / PANEL, g, s.scale);
  for (int64_t u = 0; u < g.all; u++) {
    const int64_t i = u / g.units;
    const float scale = g.scales(i, half)[o], offset = g.offsets() ? g.offsets(i, half)[o] : 0;
    for (int j = 0; j < 4; j++) {
      const Pair f = W::pair(g.unit<W>(u) + half * W::HALF, j);
      y[u * UNIT + 2 * j] = (f.even[o] + offset) * scale, y[u * UNIT + 2 * j + 1] = (f.odd[o] + offset) * scale;
    }
  }
}

// Row `row` of a packed weight, a token's embedding -> y [K], K a multiple of 8. Also for step.cpp.
void look_up(const Matrix& m, int64_t row, at::BFloat16* y) {
  if (m.bits == 16) return look_up_as<Bfloat16>(m, row, y);
  if constexpr (QUANTIZED) {
    if (m.bits == 8) return look_up_as<Int8>(m, row, y);
    if (m.bits == 4) return look_up_as<Int4>(m, row, y);
    look_up_as<Fp4>(m, row, y);
  }
}

// Where the weights begin that thread `part` of `parts` reads first. Also for step.cpp.
const char* begin_of(const Matrix& m, int64_t part, int64_t parts) {
  const auto begin = [&](const Groups& g) {
    return (const char*)(g.heads ? g.heads : g.w) + (m.N + PANEL - 1) / PANEL * part / parts * g.nbytes;
  };
  if (m.bits == 16) return begin(first_panel<Bfloat16>(m));
  if (m.bits == 8) return begin(first_panel<Int8>(m));
  return begin(first_panel<Int4>(m));
}

const Products PRODUCTS{multiply_matrix, look_up, begin_of};

// ---- a mixture of experts -----------------------------------------------------------------------------------------

// All experts' weights of one kind, packed, one behind another: w [X, bytes], scales and offsets [X, n] or none.
struct Stack {
  at::Tensor w;
  Optional scales, offsets, bias;
  int64_t N, bits, group;

  // x [n, K], its first counts[0] rows for expert chosen[0], and so on -> [n, N]
  at::Tensor multiply(const at::Tensor& x, const std::vector<int64_t>& chosen, const std::vector<int64_t>& counts) const {
    const auto of = [](const Optional& t, int64_t e) { return t ? Optional(t->select(0, e)) : std::nullopt; };
    at::Tensor y = at::empty({x.size(0), N}, x.options());
    std::vector<Job> jobs;
    const int64_t width = matrix(w.select(0, 0), std::nullopt, of(offsets, 0), N, bits, group).K;
    const at::Tensor rows = whole(x, width);
    for (size_t i = 0, at = 0; i < chosen.size(); at += counts[i++]) {
      const int64_t e = chosen[i];
      jobs.push_back({matrix(w.select(0, e), of(scales, e), of(offsets, e), N, bits, group),
                      (const char*)rows.const_data_ptr() + at * width * x.element_size(), counts[i],
                      (char*)y.data_ptr() + at * N * x.element_size()});
    }
    multiply_all(jobs, x.scalar_type());
    for (size_t i = 0, at = 0; bias && i < chosen.size(); at += counts[i++]) y.narrow(0, at, counts[i]).add_(bias->select(0, chosen[i]));
    return y;
  }
};

// h [n, 2F], gate | up -> [n, F]: model.ACTIVATIONS' silu and silu_clamped.
at::Tensor gated(const at::Tensor& h, bool clamped) {
  const int64_t F = h.size(1) / 2;
  at::Tensor gate = h.narrow(1, 0, F), up = h.narrow(1, F, F);
  if (!clamped) return at::silu(gate).mul_(up);
  gate = gate.clamp_max(7);
  return gate.mul(1.702).sigmoid_().mul_(gate).mul_(up.clamp(-7, 7).add_(1));
}

// What each token's experts make of it: x [T, D], ids [T, A] -> [T, A, D]; zeros for an id of -1. An expert that is wanted
// runs once, on all rows that want it.
at::Tensor experts(const at::Tensor& input, const at::Tensor& ids, at::TensorList w,
                   const c10::List<std::optional<at::Tensor>>& more, at::IntArrayRef sizes, bool clamped) {
  const at::Tensor x = input.contiguous(), all = ids.contiguous();
  const Stack up{w[0], more[0], more[1], more[2], sizes[0], sizes[1], sizes[2]};
  const Stack down{w[1], more[3], more[4], more[5], sizes[3], sizes[4], sizes[5]};
  const int64_t T = x.size(0), D = x.size(1), A = all.size(1), nbytes = D * x.element_size();
  const int64_t* id = all.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> places(w[0].size(0));       // where each expert is wanted, of T * A places
  at::Tensor out = at::empty({T, A, D}, x.options());
  char* y = (char*)out.data_ptr();
  for (int64_t i = 0; i < T * A; i++)
    if (id[i] >= 0) places[id[i]].push_back(i);
    else std::memset(y + i * nbytes, 0, nbytes);
  std::vector<int64_t> order, chosen, counts;
  for (size_t e = 0; e < places.size(); e++)
    if (!places[e].empty()) {
      order.insert(order.end(), places[e].begin(), places[e].end());
      chosen.push_back(e), counts.push_back(places[e].size());
    }
  if (order.empty()) return out;
  at::Tensor rows = at::empty({(int64_t)order.size(), D}, x.options());
  for (size_t i = 0; i < order.size(); i++)
    std::memcpy((char*)rows.data_ptr() + i * nbytes, (const char*)x.const_data_ptr() + order[i] / A * nbytes, nbytes);
  const at::Tensor made = down.multiply(gated(up.multiply(rows, chosen, counts), clamped), chosen, counts);
  for (size_t i = 0; i < order.size(); i++)
    std::memcpy(y + order[i] * nbytes, (const char*)made.const_data_ptr() + i * nbytes, nbytes);
  return out;
}

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_kernels
#endif

TORCH_LIBRARY(LIBRARY, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? scales, Tensor? offsets, int N, int bits, int group) -> Tensor");
  m.def("pack(Tensor values, Tensor(a!) out, int bits, int group, Tensor? heads) -> ()", &pack);
  m.def("round_activations(bool wanted) -> bool", &round_activations);
  m.def("by_tiles(int rows, int bits) -> bool", &by_tiles);
  m.def("address() -> int", +[] { return (int64_t)&PRODUCTS; });
  m.def("experts(Tensor x, Tensor ids, Tensor[] w, Tensor?[] more, int[] sizes, bool clamped) -> Tensor");
}

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("linear", &linear);
  m.impl("experts", &experts);
}
