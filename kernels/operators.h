// What lies between the large kernels on a CPU, one operator each: norms, rotary embeddings, the cache's new entries, draws. A
// fifth of an uncompiled step's time and an eighth of a compiled one's when PyTorch's operators or its compiler's loops do it.
//
// What it is: each on tensors, and by rows, as block.h and step.cpp call them. The roundings are model.py's. What it is not: how
// an id is picked; draw.h is.
#pragma once
#include <c10/util/Exception.h>
#include <torch/csrc/stable/library.h>          // parsed in a quarter of torch/library.h's time
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "draw.h"
#include "team.h"
#include "vectors.h"

namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

int32_t type(const Tensor& x) {
  int32_t found;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &found));
  return found;
}

// f(X()) for a tensor of bfloat16 or float32.
template <class F> void by_type(const Tensor& x, F f) {
  if (type(x) == aoti_torch_dtype_bfloat16()) f(at::BFloat16()); else f(float());
}

// A new tensor. (torch::stable::empty looks its operator up by name at every call, as contiguous does.)
Tensor make(int32_t type, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// x, or a copy of it, in one piece.
Tensor whole(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline void store16(float* p, floats v) { write(p, v); }
inline void store16(at::BFloat16* p, floats v) {
#ifdef BFLOAT16_DOT
  write(p, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < LANES; i++) p[i] = v[i];
#endif
}

// f(row) for all of them, by threads where there is work enough.
template <class F> void by_row(Team* team, int64_t rows, int64_t width, const F& f) {
  share(team, rows, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) f(r);
  });
}

// x [D] -> y [D], which may be x. cast: round before the scale multiplies, and after; plus: what is added to the scale.
template <class X> void norm_row(const X* x, const X* scale, int64_t D, float eps, bool cast, float plus, X* y) {
  floats squares = {};
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES) squares += load16(x + i) * load16(x + i);
  float total = sum(squares);
  for (; i < D; i++) total += float(x[i]) * float(x[i]);
  const float inverse = 1 / std::sqrt(total / D + eps);
  for (i = 0; i + LANES <= D; i += LANES) {
    floats v = load16(x + i) * inverse;
    if (cast) store16(y + i, v), v = load16(y + i);
    store16(y + i, v * (load16(scale + i) + plus));
  }
  for (; i < D; i++) {
    const float v = float(x[i]) * inverse;
    y[i] = (cast ? float(X(v)) : v) * (float(scale[i]) + plus);
  }
}

// x [..., D] and scale [D] of the same dtype -> x's shape.
Tensor norm(const Tensor& input, const Tensor& scale, double eps, bool cast, double plus) {
  const Tensor x = whole(input), y = make(type(x), x.sizes(), x.strides());
  const int64_t D = x.size(-1), rows = x.numel() / D;
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    const X *from = x.const_data_ptr<X>(), *by = scale.const_data_ptr<X>();
    X* to = y.mutable_data_ptr<X>();
    by_row(nullptr, rows, D, [&](int64_t r) { norm_row(from + r * D, by, D, eps, cast, plus, to + r * D); });
  });
  return y;
}

// Pairs (j, j + n) of x [2n], turned -> y [2n], which may be x.
template <class X> void turn(const X* x, const float* cos, const float* sin, int64_t n, X* y) {
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const floats first = load16(x + j), second = load16(x + j + n), c = load16(cos + j), s = load16(sin + j);
    store16(y + j, first * c - second * s), store16(y + j + n, second * c + first * s);
  }
  for (; j < n; j++) {
    const float first = x[j], second = x[j + n];
    y[j] = first * cos[j] - second * sin[j], y[j + n] = second * cos[j] + first * sin[j];
  }
}

// The same for the first 2n dimensions of heads. x [B, H, T, E], rows of E in one piece; cos, sin [B, 1, T, n] float32.
Tensor rotate(const Tensor& input, const Tensor& cosines, const Tensor& sines) {
  const Tensor x = input.stride(3) == 1 ? input : whole(input), cos = whole(cosines), sin = whole(sines);
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), E = x.size(3), n = cos.size(3);
  const Tensor y = make(type(x), {B, H, T, E}, {H * T * E, T * E, E, 1});
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    const X* x0 = x.const_data_ptr<X>();
    X* y0 = y.mutable_data_ptr<X>();
    const float *cos0 = cos.const_data_ptr<float>(), *sin0 = sin.const_data_ptr<float>();
    const auto strides = x.strides();
    share(nullptr, B * H * T, 1 + 65536 / E, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / (H * T), h = i / T % H, t = i % T;
        const X* from = x0 + b * strides[0] + h * strides[1] + t * strides[2];
        const float *c = cos0 + (b * T + t) * n, *s = sin0 + (b * T + t) * n;
        X* to = y0 + i * E;
        turn(from, c, s, n, to);
        std::copy_n(from + 2 * n, E - 2 * n, to + 2 * n);
      }
    });
  });
  return y;
}

// cache [B or more, K, S, E] at slots pos [B, T] = new [B, K, T, E], for keys and for values.
void keep(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& pos) {
  const int64_t B = k.size(0), K = k.size(1), T = k.size(2), E = k.size(3), S = k_cache.size(2), size = k.element_size();
  const Tensor slots = whole(pos);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(B <= k_cache.size(0), B, " rows in a cache of ", k_cache.size(0));
  for (int64_t i = 0; i < B * T; i++)
    TORCH_CHECK_INDEX(slot[i] >= 0 && slot[i] < S, "position ", slot[i], " in a cache of ", S, " slots");
  const auto copy = [&](const Tensor& input, const Tensor& cache) {
    const Tensor x = input.stride(3) == 1 ? input : whole(input);
    const auto strides = x.strides();
    const char* from = (const char*)x.const_data_ptr();
    char* to = (char*)cache.mutable_data_ptr();
    for (int64_t i = 0; i < B * K * T; i++) {
      const int64_t b = i / (K * T), h = i / T % K, t = i % T;
      std::memcpy(to + ((b * K + h) * S + slot[b * T + t]) * E * size,
                  from + (b * strides[0] + h * strides[1] + t * strides[2]) * size, E * size);
    }
  };
  copy(k, k_cache), copy(v, v_cache);
}

// x [..., V] float32 -> [...], where each row is largest; the first of several. NaN is passed over.
Tensor argmax(const Tensor& input) {
  const Tensor x = whole(input);
  const int64_t V = x.size(-1), B = x.numel() / V;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1), strides(sizes.size(), 1);
  for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * sizes[i + 1];
  const Tensor out = make(aoti_torch_dtype_int64(), sizes, strides);
  for (int64_t b = 0; b < B; b++) out.mutable_data_ptr<int64_t>()[b] = first_largest(x.const_data_ptr<float>() + b * V, V);
  return out;
}

// What rows of logits [B, V] are drawn with.
struct Draws {
  Settings settings;
  const float* noise;                 // [B, n]
  int64_t n;                          // 0: the likeliest ids are taken
  bool* seen;                         // [B, V], or null

  Draws(int64_t B, int64_t V, const std::optional<Tensor>& noise, const std::optional<Tensor>& seen, int64_t top_k,
        double temperature, double top_p, double min_p, double penalty)
      : settings{top_k, float(temperature), float(top_p), float(min_p), float(penalty)},
        noise(noise ? noise->const_data_ptr<float>() : nullptr), n(noise ? noise->size(1) : 0),
        seen(seen ? seen->mutable_data_ptr<bool>() : nullptr) {
    STD_TORCH_CHECK(!noise || (noise->is_contiguous() && noise->size(0) == B && 0 < top_k && top_k <= n && n <= V),
                    "noise of another shape than the logits, or too little of it");
    STD_TORCH_CHECK(!seen || (seen->is_contiguous() && seen->size(0) == B && seen->size(1) == V), "seen is of another shape than the logits");
  }

  void draw(const float* logits, int64_t B, int64_t V, int64_t* ids, Team* team) const {
    share(team, B, std::max<int64_t>(1, 65536 / V), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) ids[b] = draw_unseen(logits + b * V, V, settings, noise + b * n, n, seen ? seen + b * V : nullptr);
    });
  }
};

// logits [B, V] float32, noise [B, n] or none, seen [B, V] or none, and the fields of sampling.Sampling -> ids [B]
Tensor draw(const Tensor& input, const std::optional<Tensor>& noise, const std::optional<Tensor>& seen, int64_t top_k,
            double temperature, double top_p, double min_p, double penalty) {
  const Tensor logits = whole(input);
  const int64_t B = logits.size(0), V = logits.size(1);
  const Draws draws(B, V, noise, seen, top_k, temperature, top_p, min_p, penalty);
  const Tensor ids = make(aoti_torch_dtype_int64(), {B}, {1});
  draws.draw(logits.const_data_ptr<float>(), B, V, ids.mutable_data_ptr<int64_t>(), nullptr);
  return ids;
}

}  // namespace
