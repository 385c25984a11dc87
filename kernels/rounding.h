// Activations rounded to int8, 32 of them by a scale of their own: what the dot product of bytes takes.
//
// What it is not: weights' rounding, which is quantize.py's. products.h is what to read next.
#pragma once
#include <algorithm>
#include <vector>

#include "panel_tiles.h"
#include "team.h"

namespace {

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

}  // namespace
