// softmax(q @ k.T * scale) @ v on a CPU: for few queries, a step of one token or the few that speculation verifies; and for
// prompts, where the processor multiplies bfloat16.
//
// What it is: each head of keys and values is read once, front to back, for all the queries that share it, and no
// further than the last slot that one of them may see. A query's sums do not depend on the other queries of the call,
// so that a token gets the same bits alone and among others. Prompts are bound by arithmetic: their keys and values are laid
// out as weights are, and many queries multiply a block of them. What it is not: all there is where a processor has tiles;
// attention_tiles.h is both in one. The plain form is `attend` in model.py.
#include <ATen/Parallel.h>
#include <torch/csrc/stable/library.h>          // parsed in a quarter of torch/library.h's time
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention_tiles.h"
#include "calls.h"
#include "vectors.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t FEW = 15;         // queries a row, as in model.py: more are a prompt
constexpr int64_t BLOCK = 256;      // slots looked at for one query after the other: 32 KB of keys of 64 bfloat16

// One key/value head and the queries that share it. Query r stands at time r % T.
template <class X> struct Head {
  const X *k, *v, *next_k;          // of slot 0; the next slot is a stride on. next_k: the next head's, or its own
  int64_t k_stride, v_stride, E, T;
  const bool* mask;                 // [T] rows, a stride apart
  int64_t mask_stride;
  float scale, cap;
  bool near;                        // its keys and values are few enough to stay in the second cache
};

// Queries as they are multiplied: bfloat16 pairs where there is an instruction for them, else floats.
#ifdef BFLOAT16_DOT
template <class X> using Query = X;
inline __m512i load32(const at::BFloat16* p, bool half) {
  return half ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p)) : _mm512_loadu_si512(p);
}
#else
template <class X> using Query = float;
#endif

// Ask for n numbers that are wanted soon: a head is too short for the processor to see by itself where reading goes on.
template <class X> inline void fetch(const X* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(X)) __builtin_prefetch(p + i);
}

// dots [j] += lane by lane products of a query and key j, LANES keys.
template <class X> void multiply(const Query<X>* q, const X* const* keys, int64_t E, floats* dots) {
#ifdef BFLOAT16_DOT
  if constexpr (std::is_same_v<X, at::BFloat16>) {
    for (int64_t e = 0; e < E; e += 32) {
      const __m512i pairs = load32(q + e, e + 16 == E);
      for (int j = 0; j < LANES; j++)
        dots[j] = (floats)_mm512_dpbf16_ps((__m512)dots[j], (__m512bh)load32(keys[j] + e, e + 16 == E), (__m512bh)pairs);
    }
    return;
  }
#endif
  for (int64_t e = 0; e < E; e += 16) {
    const floats x = load16(q + e);
    for (int j = 0; j < LANES; j++) dots[j] += load16(keys[j] + e) * x;
  }
}

// scores [s] of slots first ... last for query r of R, scaled and masked; a whole vector at a time.
template <class X>
void score(const Head<X>& h, const Query<X>* q, int64_t r, int64_t R, int64_t first, int64_t last, float* scores) {
  const bool* visible = h.mask + r % h.T * h.mask_stride;
  for (int64_t s = first; s < last; s += LANES) {
    for (int64_t j = s + r; h.near && j < std::min(s + LANES, last); j += R) fetch(h.v + j * h.v_stride, h.E);
    const X* keys[LANES];
    for (int j = 0; j < LANES; j++) keys[j] = h.k + std::min(s + j, last - 1) * h.k_stride;
    floats dots[LANES] = {};
    multiply<X>(q, keys, h.E, dots);
    floats y = fold(dots, [](floats a, floats b) { return a + b; }) * h.scale;
    if (h.cap) y = soft_cap(y, h.cap);
    bytes shown = {};
    std::memcpy(&shown, visible + s, std::min<int64_t>(LANES, last - s));
    y = to_int(shown) ? y : -std::numeric_limits<float>::infinity();
    write(scores + s, y);
  }
}

// scores [n], n whole vectors -> their exponentials, less the largest; returns 1 / their sum.
inline float soften(float* scores, int64_t n) {
  floats most = read<floats>(scores), total = {};
  for (int64_t s = LANES; s < n; s += LANES) {
    const floats x = read<floats>(scores + s);
    most = x > most ? x : most;
  }
  float highest = most[0];
  for (int j = 1; j < LANES; j++) highest = std::max(highest, most[j]);
  for (int64_t s = 0; s < n; s += LANES) {
    floats p = read<floats>(scores + s);
    p = p < -std::numeric_limits<float>::max() ? floats{} : exponential(p - highest);     // masked: nothing at all
    write(scores + s, p);
    total += p;
  }
  return 1 / sum(total);
}

// y [R][E] += sum over slots of p [R][s] v [s], from e on, N vectors wide.
template <class X, int R, int N>
void weigh(const Head<X>& h, const float* p, int64_t room, int64_t first, int64_t last, int64_t e, float* y) {
  floats total[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) total[r][i] = read<floats>(y + r * h.E + e + 16 * i);
  for (int64_t s = first; s < last; s++) {
    if (h.near) fetch(h.next_k + s * h.k_stride + e, 16 * N);
    for (int i = 0; i < N; i++) {
      const floats v = load16(h.v + s * h.v_stride + e + 16 * i);
      for (int r = 0; r < R; r++) total[r][i] += v * p[r * room + s];
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) write(y + r * h.E + e + 16 * i, total[r][i]);
}

template <class X, int R>
void weigh_all(const Head<X>& h, const float* p, int64_t room, int64_t first, int64_t last, float* y) {
  int64_t e = 0;
  for (; e + 64 <= h.E; e += 64) weigh<X, R, 4>(h, p, room, first, last, e, y);
  for (; e < h.E; e += 16) weigh<X, R, 1>(h, p, room, first, last, e, y);
}

// y [R][E] of queries q [R][E] over slots first ... last; scores: R rows of `room` floats.
template <class X>
void attend_head(const Head<X>& h, const Query<X>* q, int64_t R, int64_t first, int64_t last, float* scores,
                 int64_t room, float* y) {
  for (int64_t at = first; at < last; at += BLOCK)
    for (int64_t r = 0; r < R; r++)
      score(h, q + r * h.E, r, R, at, std::min(at + BLOCK, last), scores + r * room);
  for (int64_t r = 0; r < R; r++) {
    float* p = scores + r * room;
    const float share = soften(p + first, (last - first + 15) / LANES * LANES);
    for (int64_t s = first; s < last; s++) p[s] *= share;
  }
  std::fill_n(y, R * h.E, 0.0f);
  for (int64_t at = first; at < last; at += BLOCK) {
    const int64_t end = std::min(at + BLOCK, last);
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) weigh_all<X, 4>(h, scores + r * room, room, at, end, y + r * h.E);
    for (; r < R; r++) weigh_all<X, 1>(h, scores + r * room, room, at, end, y + r * h.E);
  }
}

template <class X> void attend_all(const Attention& a, Team* team) {
  const int64_t H = a.H, T = a.T, E = a.E, R = H / a.K * T, room = (a.S + 31) / LANES * LANES;
  const X *q = (const X*)a.q, *k = (const X*)a.k, *v = (const X*)a.v;
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, a.S * R * E));                 // as in linear.cpp
  share(team, a.B * a.K, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scores, y;
    thread_local std::vector<Query<X>> queries;
    scores.resize(R * room), y.resize(R * E), queries.resize(R * E);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / a.K, kv = i % a.K;
      const auto head_of = [&](int64_t r) { return kv * (H / a.K) + r / T; };
      const auto keys = [&](int64_t i) { return k + i / a.K * a.k_strides[0] + i % a.K * a.k_strides[1]; };
      const auto [first, last] = seen(a.mask + b * a.mask_strides[0], a.mask_strides[1], T, a.S);
      const Head<X> h{keys(i), v + b * a.v_strides[0] + kv * a.v_strides[1], keys(std::min(i + 1, a.B * a.K - 1)),
                      a.k_strides[2], a.v_strides[2], E, T, a.mask + b * a.mask_strides[0], a.mask_strides[1],
                      float(a.scale), float(a.cap), (last - first) * E * int64_t(sizeof(X)) <= 1 << 18};
      for (int64_t r = 0; r < R; r++)
        std::copy_n(q + b * a.q_strides[0] + head_of(r) * a.q_strides[1] + r % T * a.q_strides[2], E, queries.data() + r * E);
      attend_head(h, queries.data(), R, first, last, scores.data(), room, y.data());
      for (int64_t r = 0; r < R; r++)
        std::copy_n(y.data() + r * E, E, (X*)a.out + ((b * T + r % T) * H + head_of(r)) * E);
    }
  });
}

// ---- prompts --------------------------------------------------------------------------------------------------------

bool takes_prompts() {
#ifdef BFLOAT16_DOT
  return true;
#else
  return false;
#endif
}

#ifdef BFLOAT16_DOT
using at::BFloat16;

constexpr int ROWS = 12;            // queries multiplied at once: 12 x 2 halves of a panel make 24 sums in 32 registers
constexpr int64_t PANEL = 32;       // outputs that lie together
constexpr int64_t TOGETHER = 256;   // queries, over heads, that use a block of keys once it is laid out
constexpr int64_t WIDEST = BLOCK;   // of heads: so queries lie as far apart as their rows of probabilities, one for each slot

using Keys = Head<BFloat16>;

// y [ROWS], `stride` apart, (+)= x [ROWS][2 * pairs], BLOCK apart, times a panel [pairs][32][2]. A constant distance is
// an instruction's; a variable one takes registers.
void product(const BFloat16* x, const BFloat16* panel, int64_t pairs, float* y, int64_t stride, bool add) {
  floats sum[ROWS][2] = {};
  for (int r = 0; add && r < ROWS; r++)
    for (int half = 0; half < 2; half++) sum[r][half] = read<floats>(y + r * stride + half * 16);
  for (int64_t j = 0; j < pairs; j++, panel += 2 * PANEL, x += 2) {
    const __m512bh low = (__m512bh)_mm512_loadu_si512(panel), high = (__m512bh)_mm512_loadu_si512(panel + PANEL);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(read<int32_t>(x + r * BLOCK));
      sum[r][0] = (floats)_mm512_dpbf16_ps((__m512)sum[r][0], low, both);
      sum[r][1] = (floats)_mm512_dpbf16_ps((__m512)sum[r][1], high, both);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int half = 0; half < 2; half++) write(y + r * stride + half * 16, sum[r][half]);
}

// A head's width as panels have it.
inline int64_t padded(int64_t E) { return (E + PANEL - 1) / PANEL * PANEL; }

// A block of keys and values as panels, and a tile's scores and probabilities. Slots from S on count as zeros, and what pads E.
struct Laid {
  Lines<BFloat16> k, v, p;          // [BLOCK / 32][E / 2][32][2], [E / 32][BLOCK / 2][32][2], [ROWS][BLOCK], E padded
  Lines<float> scores;              // [ROWS][BLOCK]

  void lay(const Keys& h, int64_t at, int64_t S) {
    static const BFloat16 none[WIDEST] = {};
    const int64_t E = padded(h.E);
    k.resize(BLOCK * E), v.resize(BLOCK * E), p.resize(BLOCK * ROWS), scores.resize(ROWS * BLOCK);
    for (int64_t s = 0; s < BLOCK; s++) {
      const BFloat16* key = at + s < S ? h.k + (at + s) * h.k_stride : none;
      BFloat16* to = k.data() + s / PANEL * PANEL * E + s % PANEL * 2;
      for (int64_t j = 0; j < E / 2; j++) write(to + j * 2 * PANEL, j < h.E / 2 ? read<uint32_t>(key + 2 * j) : 0u);
    }
    for (int64_t s = 0; s < BLOCK; s += 2)
      for (int64_t e = 0; e < E; e += 16) {
        const auto half = [&](int64_t i) {
          return __builtin_convertvector(read<halves>(at + i < S && e < h.E ? h.v + (at + i) * h.v_stride + e : none), words);
        };
        write(v.data() + (e / PANEL * BLOCK + s) * PANEL + e % PANEL * 2, half(s) | half(s + 1) << 16);
      }
  }
};

// Of the queries of one tile: their largest score yet, the sum of exponentials relative to it, and so weighted values.
struct alignas(64) Tile {
  BFloat16 q[ROWS][WIDEST];         // E of each are used, padded
  float most[ROWS], total[ROWS];
  Lines<float> y;                   // [ROWS][E], padded
  const bool* mask[ROWS];           // null: there is no such query
  int64_t first, last;              // slots that at least one of them sees
};

// Scores of row r in slots `begin` ... `end` of the block, whole vectors -> probabilities, relative to the largest score yet
// (Milakov and Gimelshein 2018): what was added up before shrinks by as much as that has grown.
void soften_row(const Keys& h, Tile& t, int r, int64_t at, int64_t begin, int64_t end, int64_t S, Laid& block) {
  float* scores = block.scores.data() + r * BLOCK;
  floats most = floats{} + t.most[r], total = {};
  for (int64_t s = begin; s < end; s += LANES) {
    bytes shown = {};
    if (at + s + LANES <= S) shown = read<bytes>(t.mask[r] + at + s);
    else if (at + s < S) std::memcpy(&shown, t.mask[r] + at + s, S - at - s);
    floats x = read<floats>(scores + s) * h.scale;
    if (h.cap) x = soft_cap(x, h.cap);
    x = to_int(shown) ? x : -std::numeric_limits<float>::infinity();
    most = x > most ? x : most;
    write(scores + s, x);
  }
  const float highest = _mm512_reduce_max_ps((__m512)most), lowest = -std::numeric_limits<float>::max();
  const float shrink = t.most[r] < lowest ? 0 : std::exp(t.most[r] - highest);
  for (int64_t s = begin; s < end; s += LANES) {
    floats x = read<floats>(scores + s);
    x = x < lowest ? floats{} : exponential(x - highest);
    total += x;
    write(block.p.data() + r * BLOCK + s, _mm512_cvtneps_pbh((__m512)x));
  }
  t.total[r] = t.total[r] * shrink + sum(total), t.most[r] = highest;
  float* const y = t.y.data() + r * padded(h.E);
  for (int64_t e = 0; shrink != 1 && e < h.E; e += LANES) write(y + e, read<floats>(y + e) * shrink);
}

// A tile meets the block of slots from `at` on.
void meet(const Keys& h, Tile& t, int64_t at, int64_t S, Laid& block) {
  const int64_t begin = std::max<int64_t>(0, t.first - at) / PANEL * PANEL, end = std::min(BLOCK, (t.last - at + PANEL - 1) / PANEL * PANEL);
  const int64_t E = padded(h.E);
  if (begin >= end) return;
  for (int64_t s = begin; s < end; s += PANEL)
    product(t.q[0], block.k.data() + s * E, E / 2, block.scores.data() + s, BLOCK, false);
  for (int r = 0; r < ROWS && t.mask[r]; r++) soften_row(h, t, r, at, begin, end, S, block);
  for (int64_t e = 0; e < E; e += PANEL)
    product(block.p.data() + begin, block.v.data() + (e * BLOCK) + begin * PANEL, (end - begin) / 2, t.y.data() + e, E, true);
}

void attend_prompts(const Attention& a, Team* team) {
  const int64_t H = a.H, T = a.T, E = a.E, G = H / a.K, some = std::max<int64_t>(1, TOGETHER / G), parts = (T + some - 1) / some;
  const BFloat16 *q = (const BFloat16*)a.q, *k = (const BFloat16*)a.k, *v = (const BFloat16*)a.v;
  share(team, a.B * a.K * parts, 1, [&](int64_t begin, int64_t end) {
    thread_local Laid block;
    thread_local std::vector<Tile> tiles;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / (a.K * parts), kv = i / parts % a.K, from = i % parts * some, n = std::min(some, T - from) * G;
      const bool* mask = a.mask + b * a.mask_strides[0];
      const Keys h{k + b * a.k_strides[0] + kv * a.k_strides[1], v + b * a.v_strides[0] + kv * a.v_strides[1], nullptr,
                             a.k_strides[2], a.v_strides[2], E, T, mask, a.mask_strides[1], float(a.scale), float(a.cap), false};
      const auto time_of = [&](int64_t r) { return from + r / G; };                  // a tile's rows see about the same slots
      tiles.resize((n + ROWS - 1) / ROWS);
      int64_t first = a.S, last = 0;
      std::pair<int64_t, int64_t> range;
      for (int64_t r = 0; r < int64_t(tiles.size()) * ROWS; r++) {
        Tile& t = tiles[r / ROWS];
        const int row = r % ROWS;
        if (row == 0) t.y.assign(padded(E) * ROWS, 0), t.first = a.S, t.last = 0;
        t.mask[row] = r < n ? mask + time_of(r) * a.mask_strides[1] : nullptr;
        t.most[row] = -std::numeric_limits<float>::infinity(), t.total[row] = 0;
        if (r >= n) { std::fill_n(t.q[row], padded(E), BFloat16(0)); continue; }
        const BFloat16* query = q + b * a.q_strides[0] + (kv * G + r % G) * a.q_strides[1] + time_of(r) * a.q_strides[2];
        std::fill(std::copy_n(query, E, t.q[row]), t.q[row] + padded(E), BFloat16(0));
        if (r % G == 0) range = seen(t.mask[row], 0, 1, a.S);
        t.first = std::min(t.first, range.first), t.last = std::max(t.last, range.second);
        first = std::min(first, t.first), last = std::max(last, t.last);
      }
      for (int64_t at = first / BLOCK * BLOCK; at < last; at += BLOCK) {
        block.lay(h, at, a.S);
        for (Tile& t : tiles) meet(h, t, at, a.S, block);
      }
      for (int64_t r = 0; r < n; r++) {
        const Tile& t = tiles[r / ROWS];
        BFloat16* out = (BFloat16*)a.out + ((b * T + time_of(r)) * H + kv * G + r % G) * E;
        for (int64_t e = 0; e < E; e++) out[e] = t.y[r % ROWS * padded(E) + e] / t.total[r % ROWS];
      }
    }
  });
}
#endif

// One way or another; prompts: E up to 256. By tiles where several heads share keys, however many queries there are: they get the same
// bits. One query for each head's keys is faster by vectors.
void attend_bfloat16(const Attention& a, Team* team) {
  if (a.B * a.T == 0) return;
#ifdef TILES
  if (Tiles::given() && a.E <= AttentionByTiles::WIDEST && (a.H > a.K || a.T > FEW)) return AttentionByTiles::all(a, team);
#endif
#ifdef BFLOAT16_DOT
  if (a.T > FEW && a.E <= WIDEST) return attend_prompts(a, team);
#endif
  attend_all<at::BFloat16>(a, team);
}

// q [B, H, T, E]; k, v [B, K, S, E] of the same dtype, float32 or bfloat16; mask bool [B, 1, T, S], true: visible
// -> q's shape, in memory [B, T, H, E]. E is a multiple of 16; every query sees a slot. cap 0: no soft cap of the
// scores.
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& visible, double scale, double cap) {
  const auto rows = [](const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); };
  const Tensor q = rows(query), k = rows(key), v = rows(value), mask = rows(visible);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3);
  const int64_t sizes[] = {B, H, T, E}, strides[] = {T * H * E, E, H * E, 1};
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &type));
  AtenTensorHandle made;            // torch::stable::empty would look its operator up by name at every call
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made));
  const Tensor out(made);
  Attention a{q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), mask.const_data_ptr<bool>(), out.mutable_data_ptr(),
              B, H, T, E, k.size(1), k.size(2), scale, cap};
  for (int i = 0; i < 3; i++) a.q_strides[i] = q.stride(i), a.k_strides[i] = k.stride(i), a.v_strides[i] = v.stride(i);
  a.mask_strides[0] = mask.stride(0), a.mask_strides[1] = mask.stride(2);
  if (type == aoti_torch_dtype_bfloat16()) attend_bfloat16(a, nullptr); else attend_all<float>(a, nullptr);
  return out;
}

int64_t address() { return (int64_t)(Attend*)&attend_bfloat16; }                      // for step.cpp

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_attention
#endif

STABLE_TORCH_LIBRARY(LIBRARY, m) {
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float cap) -> Tensor");
  m.def("address() -> int");
  m.def("takes_prompts() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("address", TORCH_BOX(&address));
  m.impl("takes_prompts", TORCH_BOX(&takes_prompts));
}
