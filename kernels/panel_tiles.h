// One panel of weights times up to 32 rows, by AMX's tiles: bfloat16, or int8 for up to 16 rows.
//
// What it is not: needed; panel.h does the same by vectors. tiles.h has the instructions, and products.h and many_rows.h,
// which share panels out, are what to read next.
#pragma once
#include "panel.h"
#include "tiles.h"

namespace {

// Whether tiles multiply so many rows in int8. Fewer, vectors are as fast; more become bfloat16.
inline bool bytes_by_tiles(int64_t rows) {
#ifdef TILES
  return rows > ROWS<int8_t> && rows <= TILE && Tiles::given();
#else
  return false;
#endif
}

#ifdef TILES
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
    if (from.unit == 0) ask_beside<W, 1>(g, from.group);
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

}  // namespace
