// One panel of weights times up to 12 rows, by vectors: the loops in which most of linear.cpp's time goes.
//
// What it is not: threads, many rows, operators; those are in products.h and linear.cpp. weights.h has the layout, and
// panel_tiles.h, which does the same by tiles, is what to read next.
//
// x comes as blocks of up to 12 rows (4 where int8 and int4 become floats on the way), [K / 2][rows][2]: one stream too.
//
// Where the instruction set lacks the dot product of pairs (or x is float32), the same loops run on floats, 16 at a time, in
// the compiler's portable vectors.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "tiles.h"                              // whether there are some
#include "weights.h"

namespace {

// Rows of x that are multiplied at once: 12 rows x 2 halves make 24 sums in 32 registers; of bytes, 32 rows are four even
// blocks.
template <class X> constexpr int ROWS = std::is_same_v<X, float> ? 4 : std::is_same_v<X, int8_t> ? 8 : 12;

// Bytes that are asked for before they are needed, as measured; 0: the processor's own reading ahead is as good, of few bytes
// for much arithmetic. The second cache is asked: the first has few requests open at a time, and what floods it holds up what is
// multiplied now. The more is multiplied, the farther ahead is better; but a page ahead is worse than either side of it.
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

// For what lies beside group i's weights.
template <class W, int R> inline __attribute__((always_inline)) void ask_beside(const Groups& g, int64_t i) {
  if (g.heads) ask_line<W, R>(g.heads + i * g.stride);
  if (g.scale16) fetch(g.scale16 + (i + g.ahead) * PANEL);
  if (g.offset) fetch(g.offset + (i + g.ahead) * PANEL);
}

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
    ask_beside<W, R>(g, i);
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
      if (first == 0) ask_beside<W, R>(g, i);
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
