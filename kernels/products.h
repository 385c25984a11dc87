// Rows times a weight, by vectors: rows in blocks, panels shared out among threads.
//
// What it is not: a choice of how to multiply, which is linear.cpp's. More rows go by tiles where there are some: many_rows.h.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "panel_tiles.h"
#include "rounding.h"
#include "team.h"

namespace {

constexpr int64_t DIRECT = 32;                  // up to so many rows of x not rounded unpack weights as they go, more do it once
constexpr int64_t DEPTH = 1024;                 // inputs of a panel unpacked at a time: 64 KB

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

}  // namespace
