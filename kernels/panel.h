// How packed weights lie, what they mean, and one panel of them times up to 12 rows, or by tiles 16 or 32: the loops in which all of
// linear.cpp's time goes. What it is not: threads, many rows, operators; those are in linear.cpp.
//
// The layout. 32 outputs make a panel, K inputs long. Inputs come in units of 8, four pairs (2j, 2j+1) each. A pair
// of 16 outputs is one 64-byte vector of bfloat16 pairs, the operand of AVX-512's dot product of pairs, so that no
// sum ever runs across a vector:
//     bfloat16   [panel][unit][half][pair][16 outputs][2]       512 bytes a unit
//     int8       [panel][unit][half][2 quads][16 outputs][4]    256 bytes a unit: a byte less 128 is the value
//     int4       [panel][unit][half][16 outputs][2]             128 bytes a unit: 16-bit lanes, a nibble a pair
// A quad is four inputs, 0 4 1 5 or 2 6 3 7 of a unit: the operand of the dot product of bytes, which int4's low and
// high nibbles are as they lie. For it, x in bfloat16 is rounded to int8, 32 inputs by a scale of their own; what is lost is
// measured in the README.
// A weight is (value + offset) * scale, where value is the int8, or the nibble less 8. Scales and offsets are
// [panel][group][32]. But of 4 bits each group begins with a head of 64 bytes: 32 + 16 bytes of scales, in two parts the 12 bits
// by which a bfloat16's are more than the weight's `least`, and 16 of offsets -7 ... 8. That is one stream, which the processor
// itself reads ahead a seventh faster than three. Scales of another kind are beside it; with offsets that do not fit there are
// no heads. (Floats of 4 bits have no offsets.)
// x comes as blocks of up to 12 rows (4 where int8 and int4 become floats on the way), [K / 2][rows][2]: one stream too.
//
// Where the instruction set lacks that dot product (or x is float32), the same loops run on floats, 16 at a time, in
// the compiler's portable vectors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "tiles.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 32, UNIT = 8;
// Rows of x that are multiplied at once: 12 rows x 2 halves make 24 sums in 32 registers; of bytes, 32 rows are four even
// blocks.
template <class X> constexpr int ROWS = std::is_same_v<X, float> ? 4 : std::is_same_v<X, int8_t> ? 8 : 12;
constexpr int64_t BLOCK = 32;                   // inputs of x that share a scale
constexpr int64_t HEAD = 64;                    // bytes of a group's scales and offsets, where they lie before its weights

// Bytes that are asked for before they are needed, as measured; 0: the processor's own reading ahead is as good, of few bytes
// for much arithmetic. The second cache is asked: the first has few requests open at a time, and what floods it holds up what is
// multiplied now. The more is multiplied, the farther ahead is better; but a page ahead is worse than either side of it.
constexpr int64_t FAR = 4096;
#ifdef TILES                                    // Intel's: a page ahead is best, and SOON before it is needed the first cache is asked too
template <class W, int R> constexpr int64_t AHEAD = FAR;
template <class W, int R> constexpr int64_t SOON = W::HALF < 256 ? FAR * 3 / 8 : R > 2 && R < 7 ? 0 : FAR / 2;
constexpr int MOST_AT_ONCE = 8;                 // rows of int8 that meet both halves of a panel of 4 bits at once
#else
template <class W, int R> constexpr int64_t AHEAD =
    W::HALF == 64 ? (R > 1 ? FAR * 3 / 2 : 0) :
    W::HALF == 128 ? (R > 4 ? FAR * 3 / 2 : R > 1 ? 0 : FAR / 2) :
    R > 4 ? FAR * 3 / 2 : R > 2 ? FAR / 4 : FAR / 2;
template <class W, int R> constexpr int64_t SOON = 0;
constexpr int MOST_AT_ONCE = 5;
#endif
inline __attribute__((always_inline)) void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }      // else optimized away

// A line that far behind p.
template <class W, int R> inline __attribute__((always_inline)) void ask_line(const uint8_t* p) {
  if (AHEAD<W, R>) fetch(p + AHEAD<W, R>);
  if (SOON<W, R>) __builtin_prefetch(p + SOON<W, R>);
}
template <class W, int R> inline __attribute__((always_inline)) void ask_unit(const uint8_t* unit) {
#pragma GCC unroll 8
  for (int line = 0; line < 2 * W::HALF; line += 64) ask_line<W, R>(unit + line);
}

// ---- weights: pair j of a unit, for 16 outputs --------------------------------------------------------------------

struct Pair { floats even, odd; };

// Where weights are unpacked for many rows: `high(w, j)` of 16-bit lanes w, widened, of which each has a number of pair j, is that
// number as a float, but by MORE[j] too high: its bits are put among those of a power of two, and where it lies decides which.

struct Bfloat16 {
  static constexpr int HALF = 256;              // bytes of a unit of 16 outputs
  static inline Pair pair(const uint8_t* p, int j) {
    words w = read<words>(p + 64 * j);
    return {(floats)(w << 16), (floats)(w & 0xffff0000u)};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) { return (__m512bh)_mm512_loadu_si512(p + 64 * j); }
#endif
};

struct Int8 {
  static constexpr int HALF = 128, BIAS = 128;  // BIAS: what the quads' unsigned bytes are too large by
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p + 64 * (j & 1)) >> (j & 2 ? 8 : 0);
#ifdef BFLOAT16_DOT                              // 2^23 and more: a byte is a float's last one
    const auto value = [](words w) { return (floats)((w & 255u) | 0x4b000000u) - (0x1p23f + 128); };
#else
    const auto value = [](words w) { return __builtin_convertvector((ints)(w & 255u) - 128, floats); };
#endif
    return {value(w), value(w >> 16)};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {      // an int8 is exact in bfloat16: the float's upper half
    const Pair f = pair(p, j);
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32((__m512i)f.even, 16), (__m512i)f.odd);
  }
#endif
  static constexpr float MORE[4] = {0x1p23f + 128, 0x1p23f + 128, 0x1p15f + 128, 0x1p15f + 128};
  static inline floats high(words w, int j) { return (floats)(j < 2 ? (w & 0xffu) | 0x4b000000u : (w & 0xff00u) | 0x47000000u); }
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) { return _mm512_loadu_si512(p + 64 * q); }
#endif
};

struct Int4 {
  static constexpr int HALF = 64, BIAS = 8;
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p);
#ifdef BFLOAT16_DOT                              // by a table: its index is the lower 4 bits
    const floats table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const auto value = [&](words w) { return (floats)_mm512_permutexvar_ps((__m512i)w, (__m512)table); };
#else
    const auto value = [](words w) { return __builtin_convertvector((ints)(w & 15u) - 8, floats); };
#endif
    return {value(w >> (4 * j)), value(w >> (16 + 4 * j))};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {      // a table of -8 ... 7, twice: the index has 5 bits
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
        0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040,
        0x4080, 0x40A0, 0x40C0, 0x40E0};
    __m512i nibbles = _mm512_srli_epi16(_mm512_loadu_si512(p), 4 * j);
    return (__m512bh)_mm512_permutexvar_epi16(nibbles, _mm512_load_si512(TABLE));
  }
#endif
  static constexpr float MORE[4] = {0x1p15f + 8, 0x1p11f + 8, 0x1p15f + 8, 0x1p11f + 8};
  static inline floats high(words w, int j) {
    w = j < 2 ? w << 8 : w;
    return (floats)(j % 2 ? (w & 0xf000u) | 0x45000000u : (w & 0xf00u) | 0x47000000u);
  }
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) {
    const __m512i w = _mm512_loadu_si512(p);
#ifdef __GFNI__                                  // bits 4 to 7 of each byte, in one instruction
    if (q) return _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(0x1020408000000000), 0);
#endif
    return _mm512_and_si512(q ? _mm512_srli_epi16(w, 4) : w, _mm512_set1_epi8(15));
  }
#endif
};

// Floats of 4 bits: sign, two bits of exponent, one of mantissa; twice their value, which is a whole number.
struct Fp4 {
  static constexpr int HALF = 64, BIAS = 12;
  static inline floats value(words w) {         // of the lower 4 bits
    static constexpr float TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#ifdef BFLOAT16_DOT
    return (floats)_mm512_permutexvar_ps((__m512i)w, _mm512_loadu_ps(TABLE));
#else
    floats f;
    for (int i = 0; i < 16; i++) f[i] = TABLE[w[i] & 15];
    return f;
#endif
  }
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p);
    return {value(w >> (4 * j)), value(w >> (16 + 4 * j))};
  }
  static constexpr float MORE[4] = {};
  static inline floats high(words w, int j) { return value(w >> (4 * j)); }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, 0x0000, 0xBF80, 0xC000, 0xC040, 0xC080, 0xC0C0,
        0xC100, 0xC140, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, 0x0000, 0xBF80, 0xC000, 0xC040,
        0xC080, 0xC0C0, 0xC100, 0xC140};
    __m512i nibbles = _mm512_srli_epi16(_mm512_loadu_si512(p), 4 * j);
    return (__m512bh)_mm512_permutexvar_epi16(nibbles, _mm512_load_si512(TABLE));
  }
#endif
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, Int4::quad(p, q));
  }
#endif
};

// ---- the inner loop -----------------------------------------------------------------------------------------------

// Sums of one group of one panel, for R rows: from [R][32] or offset * (sum of x), on top of nothing.
// C: independent chains, so that few rows do not wait for the multiplier's latency.
template <class W, class X, int R, int C>
inline void dot_units(floats (&sum)[C][R][2], const uint8_t* w, const X* x, int64_t units) {
  for (int64_t u = 0; u < units; u++, w += 2 * W::HALF, x += UNIT * R) {
    ask_unit<W, R>(w);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
#ifdef BFLOAT16_DOT
      if constexpr (std::is_same_v<X, at::BFloat16>) {
        const __m512bh low = W::packed(w, j), high = W::packed(w + W::HALF, j);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const __m512bh both = (__m512bh)_mm512_set1_epi32(read<int32_t>(x + (j * R + r) * 2));
          sum[j % C][r][0] = (floats)_mm512_dpbf16_ps((__m512)sum[j % C][r][0], low, both);
          sum[j % C][r][1] = (floats)_mm512_dpbf16_ps((__m512)sum[j % C][r][1], high, both);
        }
        continue;
      }
#endif
      for (int half = 0; half < 2; half++) {
        const Pair f = W::pair(w + half * W::HALF, j);
        for (int r = 0; r < R; r++) {
          const X* pair = x + (j * R + r) * 2;
          sum[j % C][r][half] += f.even * float(pair[0]) + f.odd * float(pair[1]);
        }
      }
    }
  }
}

// Of a block of x as int8: what they were divided by, and what their sum of products starts from, since weights' bytes are
// too large; where weights have offsets, the sum of x itself, its lower 16 bits.
struct Rounding { float scale; int32_t start; };

// A panel: its weights, and what they are multiplied with: heads, or [groups][32] each scales in bfloat16 or float (null: 1)
// and offsets (null: 0). With x's sums by group and, of bytes, how its blocks were rounded, [groups or blocks][rows].
struct alignas(64) Groups {
  int64_t count, units, all;          // groups, units in each, units in all of them: the last may be shorter
  const uint8_t* w;                   // the first group's
  int64_t stride, nbytes;             // from one group's weights to the next one's, or from head to head; a panel's
  const uint8_t* heads;               // the first one, or null
  const Rounding* rounding;
  uint32_t least;                     // the smallest scale of a head, as a float's bits
  const at::BFloat16* scale16;
  const float* scale;
  const int8_t* offset;
  const float* x_sum;
  int64_t ahead;                      // groups that lie as far ahead as the weights that are asked for

  // To the next panel. What that takes is at hand, in the first cache, through which all that is multiplied passes: had it to
  // be fetched, behind the weights that are under way, nothing would be read meanwhile. (A twentieth of int4's time.)
  inline void next(int64_t n = 1) {
    w += n * nbytes;
    if (heads) heads += n * nbytes;
    if (scale16) scale16 += n * count * PANEL;
    if (scale) scale += n * count * PANEL;
    if (offset) offset += n * count * PANEL;
  }
  // Unit u's weights.
  template <class W> inline const uint8_t* unit(int64_t u) const { return w + u / units * stride + u % units * 2 * W::HALF; }
  inline floats scales(int64_t i, int half) const {
    const int64_t at = i * PANEL + half * 16;
    if (scale16) return load16(scale16 + at);
    if (scale) return read<floats>(scale + at);
    if (!heads) return floats{} + 1.0f;
    const uint8_t* head = heads + i * stride;
    const words low = load_bytes(head + 16 * half) << 16, high = load_bytes(head + 32) << (half ? 20 : 24) & 0xf000000u;
    return (floats)((low | high) + least);
  }
  inline bool offsets() const { return heads || offset; }
  inline ints offsets(int64_t i, int half) const {
    if (!heads) return to_int(read<bytes>(offset + i * PANEL + half * 16));
    return (ints)(load_bytes(heads + i * stride + 48) >> 4 * half & 15u) - 7;
  }
  // For what lies beside the weights.
  template <class W, int R> inline __attribute__((always_inline)) void ask(int64_t i) const {
    if (heads) ask_line<W, R>(heads + i * stride);
    if (scale16) fetch(scale16 + (i + ahead) * PANEL);
    if (offset) fetch(offset + (i + ahead) * PANEL);
  }
};

// y [R][32] (+)= x [K / 2][R][2] times a panel.
template <class W, class X, int R>
void multiply(const X* x, const Groups& g, float* y, bool add) {
  constexpr int C = R <= 9 ? 2 : 1;      // the same for one row and for what speculation verifies: they get the same bits
  floats total[R][2] = {};
  if (add)
    for (int r = 0; r < R; r++)
      for (int half = 0; half < 2; half++) total[r][half] = read<floats>(y + r * PANEL + half * 16);
  const uint8_t* w = g.w;
  for (int64_t i = 0; i < g.count; i++, w += g.stride, x += g.units * UNIT * R) {
    const int64_t units = std::min(g.units, g.all - i * g.units);
    floats sum[C][R][2] = {};
    if (g.offsets())
      for (int half = 0; half < 2; half++) {
        const floats offset = __builtin_convertvector(g.offsets(i, half), floats);
        for (int r = 0; r < R; r++) sum[0][r][half] = offset * g.x_sum[i * R + r];
      }
    g.ask<W, R>(i);
    dot_units<W, X, R, C>(sum, w, x, units);
    for (int half = 0; half < 2; half++) {
      const floats scale = g.scales(i, half);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        floats s = sum[0][r][half];
        for (int c = 1; c < C; c++) s += sum[c][r][half];
        total[r][half] += s * scale;
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int half = 0; half < 2; half++) write(y + r * PANEL + half * 16, total[r][half]);
}

#ifdef BYTE_DOT
// The same for x in int8, [K / 4][R][4]: whole numbers within a block, x's scale when it ends, the weights' when a group does.
// What the bytes are too large by, less the offset, times the sum of x is what a block's sum starts from: zeros give exactly zero.
// Both halves of the panel at once; or with many groups and rows one after the other, so that every sum stays in a register, where
// that is worth more than x's numbers that are loaded twice then.
template <class W, int R>
void multiply_bytes(const int8_t* x, const Groups& g, float* y) {
  constexpr bool FOUR = W::HALF == 64;          // bits, which always have offsets
  constexpr int H = FOUR && R > MOST_AT_ONCE ? 1 : 2;
#pragma GCC unroll 2
  for (int first = 0; first < 2; first += H) {
    const int8_t* in = x;
    const Rounding* rounding = g.rounding;
    __m512 total[R][H] = {};
    for (int64_t i = 0; i < g.count; i++) {
      __m512 sum[R][H] = {};
      const uint8_t* unit = g.w + i * g.stride + first * W::HALF;
      __m512i plus[H] = {};                     // what is added to the bytes
      for (int h = 0; h < H && g.offsets(); h++) plus[h] = (__m512i)(g.offsets(i, first + h) - W::BIAS);
      if (first == 0) g.ask<W, R>(i);
      const auto block = [&](auto units, auto offsets) {
        __m512i dot[R][H];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const __m512i start = _mm512_set1_epi32(rounding[r].start);
          for (int h = 0; h < H; h++)           // a product of 16-bit halves, start's upper one being zero
            dot[r][h] = offsets ? _mm512_dpwssd_epi32(_mm512_setzero_si512(), plus[h], start) : start;
        }
#pragma GCC unroll 4
        for (int n = 0; n < units; n++, unit += 2 * W::HALF, in += UNIT * R) {
          if (first == 0) ask_unit<W, R>(unit);
#pragma GCC unroll 2
          for (int q = 0; q < 2; q++) {
            __m512i values[H];
            for (int h = 0; h < H; h++) values[h] = W::quad(unit + h * W::HALF, q);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
              const __m512i four = _mm512_set1_epi32(read<int32_t>(in + (q * R + r) * 4));
              for (int h = 0; h < H; h++) dot[r][h] = _mm512_dpbusd_epi32(dot[r][h], values[h], four);
            }
          }
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
          for (int h = 0; h < H; h++)
            sum[r][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][h]), _mm512_set1_ps(rounding[r].scale), sum[r][h]);
        rounding += R;
      };
      const int64_t units = std::min(g.units, g.all - i * g.units);
      const auto blocks = [&](auto offsets) {
        constexpr int64_t whole = BLOCK / UNIT;
        for (int64_t u = 0; u + whole <= units; u += whole) block(std::integral_constant<int, whole>(), offsets);
        if (units % whole) block(units % whole, offsets);
      };
      FOUR || g.offset ? blocks(std::true_type()) : blocks(std::bool_constant<FOUR>());
      for (int h = 0; h < H; h++) {
        const __m512 scale = (__m512)g.scales(i, first + h);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) total[r][h] = _mm512_fmadd_ps(sum[r][h], scale, total[r][h]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < H; h++) _mm512_storeu_ps(y + r * PANEL + (first + h) * 16, total[r][h]);
  }
}
#endif

#ifdef TILES
// ---- by tiles -----------------------------------------------------------------------------------------------------

// A tile of weights is 16 pairs of inputs, and any 16 will do, as long as x has the same ones: the j-th pairs of 16 units
// in a row, which lie 512 bytes apart, so that panels serve as they are. 128 inputs, a span, make four such tiles.
constexpr int64_t SPAN = TILE * UNIT;
constexpr int64_t PIECE = 2;                    // spans of a panel that all rows meet while it is in the first cache: 16 KB

// What is to be read next, asked for meanwhile: so many lines with each tile.
struct Ahead {
  const uint8_t* at;
  int64_t lines;
  inline void ask() {
    for (int64_t i = 0; i < lines; i++, at += 64) fetch(at);
  }
};

// y [rows][32] (+)= x [spans][4][rows][16 pairs][2] times spans of a panel of bfloat16. both: there are more than 16 rows. direct: the
// panel comes from memory, through the second cache and the first, whose distances were measured (a fifth of 16 rows' time).
template <bool both, bool direct>
void multiply_spans(const at::BFloat16* x, int64_t rows, const uint8_t* w, int64_t spans, float* y, bool add, Ahead next_x, Ahead next_w) {
  begin_sums<both>(y, PANEL, add);
  const char *tiles = (const char*)x, *panel = (const char*)w, *far = panel + 2 * FAR;
  for (int64_t i = 0; i < spans; i++, panel += TILE * 2 * Bfloat16::HALF)
    for (int64_t j = 0; j < 4; j++, tiles += rows * 64) {
      if (!direct) next_x.ask(), next_w.ask();
      add_products<both>(tiles, 64, panel + 64 * j, 2 * Bfloat16::HALF, Bfloat16::HALF, [&] {
#pragma GCC unroll 1                            // a loop stays where it is: the compiler moves single ones together
        for (int line = 0; line < TILE * 2 * Bfloat16::HALF / 64 / 4 / MEANWHILE && direct; line++, far += 64)
          fetch(far), __builtin_prefetch(far - FAR / 2);
      });
    }
  end_sums<both>(y, PANEL);
}

// A block of 32 inputs: the how manieth, its group, and the first of its units there.
struct Place {
  int64_t block = 0, group = 0, unit = 0;
  inline void next(const Groups& g) {
    block++, unit += BLOCK / UNIT;
    if (unit >= g.units) unit = 0, group++;
  }
};

// Rows of x in int8, at most 16, as [blocks][rows][32] in the order of quads, times a panel: what multiply_bytes makes of each of
// them, to the bit. ONE: a group is a block. While tiles multiply a block, the next one's quads are unpacked and the last one's sums added.
template <class W, bool ONE>
void multiply_bytes_by_tiles(const int8_t* x, int64_t rows, const Groups& g, float* y) {
  constexpr int64_t UNITS = BLOCK / UNIT;
  const int64_t blocks = (g.all + UNITS - 1) / UNITS;
  alignas(64) uint8_t weights[2][2][TILE * 32];
  alignas(64) int32_t dots[2][2][TILE][LANES];
  alignas(64) float sums[TILE][PANEL] = {};     // of a group of several blocks
  std::fill_n(y, rows * PANEL, 0.0f);
  Place from, to;                               // what is unpacked next, and added next
  const auto unpack = [&](uint8_t (&out)[2][TILE * 32]) {
    const int64_t units = std::min({UNITS, g.units - from.unit, g.all - from.group * g.units - from.unit});
    const uint8_t* unit = g.w + from.group * g.stride + from.unit * 2 * W::HALF;
    if (from.unit == 0) g.template ask<W, 1>(from.group);
    for (int64_t u = 0; u < units; u++) {
      ask_unit<W, 1>(unit);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++, unit += W::HALF)
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) _mm512_store_si512(out[half] + (2 * u + q) * 64, W::quad(unit, q));
    }
    for (int half = 0; half < 2 && units < UNITS; half++) std::fill(out[half] + units * 128, out[half] + UNITS * 128, 0);
    from.next(g);
  };
  const auto add = [&](const int32_t (&dots)[2][TILE][LANES]) {
    const Rounding* const rounding = g.rounding + to.block * rows;
    const int64_t group = to.group;
    to.next(g);
    const bool ends = ONE || to.group != group || to.block == blocks;
    __m512 scale[2] = {};
    __m512i plus[2] = {};
    for (int h = 0; h < 2; h++) {
      if (ends) scale[h] = (__m512)g.scales(group, h);
      if (g.offsets()) plus[h] = (__m512i)(g.offsets(group, h) - W::BIAS);
    }
    const auto rows_with = [&](auto offsets) {
      for (int64_t r = 0; r < rows; r++) {
        const __m512i start = _mm512_set1_epi32(rounding[r].start);
        float* const total = ONE ? y + r * PANEL : sums[r];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          const __m512i found = _mm512_load_si512(dots[h][r]);
          const __m512 dot = _mm512_cvtepi32_ps(offsets ? _mm512_dpwssd_epi32(found, plus[h], start) : _mm512_add_epi32(found, start));
          const __m512 by = _mm512_set1_ps(rounding[r].scale), so_far = _mm512_load_ps(total + 16 * h);
          _mm512_store_ps(total + 16 * h, ONE ? _mm512_fmadd_ps(_mm512_mul_ps(dot, by), scale[h], so_far) :
                                                _mm512_fmadd_ps(dot, by, so_far));
        }
      }
    };
    W::HALF == 64 || g.offset ? rows_with(std::true_type()) : rows_with(std::bool_constant<W::HALF == 64>());
    for (int64_t r = 0; r < rows && ends && !ONE; r++)
      for (int h = 0; h < 2; h++) {
        float* const total = y + r * PANEL + 16 * h;
        _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(sums[r] + 16 * h), scale[h], _mm512_load_ps(total)));
        _mm512_store_ps(sums[r] + 16 * h, __m512{});
      }
  };
  const auto step = [&](auto even, int64_t b) {
    constexpr bool EVEN = decltype(even)::value;
    if (b + 1 < blocks) unpack(weights[EVEN]);
    if (b < blocks) begin_dots<EVEN>(x + b * BLOCK * rows, weights[!EVEN]);
    if (b > 0 && b <= blocks) end_dots<!EVEN>(dots[EVEN]);
    if (b > 1 && b - 2 < blocks) add(dots[!EVEN]);
  };
  unpack(weights[0]);
  for (int64_t b = 0; b < blocks + 2; b += 2) step(std::true_type(), b), step(std::false_type(), b + 1);
}
#endif

template <class W, class X, int... R>
void multiply_rows(int rows, std::integer_sequence<int, R...>, const X* x, const Groups& g, float* y, bool add) {
  const auto with = [&](auto count) {
    constexpr int N = decltype(count)::value;
#ifdef BYTE_DOT
    if constexpr (std::is_same_v<X, int8_t>) return multiply_bytes<W, N>(x, g, y);
    else
#endif
    return multiply<W, X, N>(x, g, y, add);
  };
  ((rows == R + 1 ? with(std::integral_constant<int, R + 1>()) : void()), ...);
}

}  // namespace
