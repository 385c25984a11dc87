// What step.cpp has linear.cpp and attention.cpp do within a step. They are libraries of their own, so that they build at
// the same time; it gets the addresses of these functions. And `seen`, which both ways of attention ask of a mask.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "team.h"
#include "vectors.h"

// A packed weight, as `pack` in cpu.py lays it out. Fields of 8 bytes, which cpu_block.py writes one behind another.
struct Matrix {
  int64_t N, K, bits, group;
  const void *w, *scales;
  int64_t scale_type;                 // at::ScalarType
  const void* offsets;
  int64_t least;                      // of scales that lie in heads, see weights.h: bits of a bfloat16; -1: there are no heads
  const at::BFloat16* bias;
};

// y [rows, N] = x [rows, K] @ w.T, without the bias
using Multiply = void(const Matrix& m, const at::BFloat16* x, int64_t rows, at::BFloat16* y, Team* team);
// y [K] = row `row` of w
using LookUp = void(const Matrix& m, int64_t row, at::BFloat16* y);
// Where what thread `part` of `parts` reads first begins in w
using BeginOf = const char*(const Matrix& m, int64_t part, int64_t parts);
struct Products { Multiply* multiply; LookUp* look_up; BeginOf* begin_of; };

// softmax(q @ k.T * scale) @ v, of one dtype (step.cpp's: bfloat16), with rows of E in one piece.
struct Attention {
  const void *q, *k, *v;              // [B, H, T, E], and [B, K, S, E]
  const bool* mask;                   // [B, T, S], true: visible
  void* out;                          // [B, T, H, E]
  int64_t B, H, T, E, K, S;
  double scale, cap;                  // cap 0: no soft cap of the scores
  int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[2];
};
using Attend = void(const Attention& a, Team* team);

// The slots that at least one of T queries may see lie in first ... last, what their masks say.
inline std::pair<int64_t, int64_t> seen(const bool* mask, int64_t stride, int64_t T, int64_t S) {
  int64_t first = S, last = 0;
  for (int64_t t = 0; t < T; t++) {
    const bool* row = mask + t * stride;
    first = std::min<int64_t>(first, std::find(row, row + S, true) - row);
    int64_t end = S;
    while (end >= last + 8 && !read<uint64_t>(row + end - 8)) end -= 8;
    while (end > last && !row[end - 1]) end--;
    last = std::max(last, end);
  }
  return {std::min(first, last) & ~15, last};      // whole vectors: sums then run in the same order for any T
}
