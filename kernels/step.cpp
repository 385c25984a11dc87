// What a step does beside products and attention, on a CPU: norms, rotary embeddings, the cache's new entries.
//
// What it is: one call for each where PyTorch's operators take nine, eight and four, a fifth of a step's time where a
// step is not compiled. The roundings are model.py's. What it is not: for compiled steps, whose compiler makes loops of
// these that fit what stands beside them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <type_traits>

#include "vectors.h"

namespace {

// f(X()) for a tensor of bfloat16 or float32.
template <class F> void by_type(const at::Tensor& x, F f) {
  if (x.scalar_type() == at::kBFloat16) f(at::BFloat16()); else f(float());
}

inline void store16(float* p, floats v) { write(p, v); }
inline void store16(at::BFloat16* p, floats v) {
#ifdef BFLOAT16_DOT
  write(p, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < LANES; i++) p[i] = v[i];
#endif
}

// x [D] -> y [D]. cast: round before the scale multiplies, and after; plus: what is added to the scale.
template <class X> void norm_row(const X* x, const X* scale, int64_t D, float eps, bool cast, float plus, X* y) {
  floats squares = {};
  int64_t i = 0;
  for (; i + LANES <= D; i += LANES) squares += load16(x + i) * load16(x + i);
  float total = sum(squares);
  for (; i < D; i++) total += float(x[i]) * float(x[i]);
  const float inverse = 1 / std::sqrt(total / D + eps);
  for (i = 0; i + LANES <= D; i += LANES) {
    store16(y + i, load16(x + i) * inverse);
    store16(y + i, (cast ? load16(y + i) : load16(x + i) * inverse) * (load16(scale + i) + plus));
  }
  for (; i < D; i++) {
    const float v = float(x[i]) * inverse;
    y[i] = (cast ? float(X(v)) : v) * (float(scale[i]) + plus);
  }
}

// x [..., D] and scale [D] of the same dtype -> x's shape.
at::Tensor norm(const at::Tensor& input, const at::Tensor& scale, double eps, bool cast, double plus) {
  const at::Tensor x = input.contiguous(), y = at::empty_like(x);
  const int64_t D = x.size(-1), rows = x.numel() / D;
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    const X *from = x.const_data_ptr<X>(), *by = scale.const_data_ptr<X>();
    X* to = y.data_ptr<X>();
    at::parallel_for(0, rows, 1 + 65536 / D, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) norm_row(from + r * D, by, D, eps, cast, plus, to + r * D);
    });
  });
  return y;
}

// Turn the pairs (j, j + n) of x's first 2n dimensions. x [B, H, T, E], rows of E in one piece; cos, sin [B, 1, T, n] float32.
at::Tensor rotate(const at::Tensor& input, const at::Tensor& cosines, const at::Tensor& sines) {
  const at::Tensor x = input.stride(3) == 1 ? input : input.contiguous(), cos = cosines.contiguous(), sin = sines.contiguous();
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), E = x.size(3), n = cos.size(3);
  at::Tensor y = at::empty({B, H, T, E}, x.options());
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    at::parallel_for(0, B * H * T, 1 + 65536 / E, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / (H * T), h = i / T % H, t = i % T;
        const X* from = x.const_data_ptr<X>() + b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
        const float *c = cos.const_data_ptr<float>() + (b * T + t) * n, *s = sin.const_data_ptr<float>() + (b * T + t) * n;
        X* to = y.data_ptr<X>() + i * E;
        for (int64_t j = 0; j < n; j++) {
          const float first = from[j], second = from[j + n];
          to[j] = first * c[j] - second * s[j], to[j + n] = second * c[j] + first * s[j];
        }
        std::copy_n(from + 2 * n, E - 2 * n, to + 2 * n);
      }
    });
  });
  return y;
}

// cache [B or more, K, S, E] at slots pos [B, T] = new [B, K, T, E], for keys and for values.
void keep(at::Tensor k_cache, at::Tensor v_cache, const at::Tensor& k, const at::Tensor& v, const at::Tensor& pos) {
  const int64_t B = k.size(0), K = k.size(1), T = k.size(2), E = k.size(3), S = k_cache.size(2), size = k.element_size();
  const at::Tensor slots = pos.contiguous();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < B * T; i++)
    TORCH_CHECK_INDEX(slot[i] >= 0 && slot[i] < S, "position ", slot[i], " in a cache of ", S, " slots");
  const auto copy = [&](const at::Tensor& input, at::Tensor& cache) {
    const at::Tensor from = input.stride(3) == 1 ? input : input.contiguous();
    for (int64_t i = 0; i < B * K * T; i++) {
      const int64_t b = i / (K * T), h = i / T % K, t = i % T;
      std::memcpy((char*)cache.data_ptr() + ((b * K + h) * S + slot[b * T + t]) * E * size,
                  (const char*)from.const_data_ptr() + (b * from.stride(0) + h * from.stride(1) + t * from.stride(2)) * size, E * size);
    }
  };
  copy(k, k_cache), copy(v, v_cache);
}

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_step
#endif

TORCH_LIBRARY(LIBRARY, m) {
  m.def("norm(Tensor x, Tensor scale, float eps, bool cast, float plus) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("keep(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor pos) -> ()");
}

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("norm", &norm);
  m.impl("rotate", &rotate);
  m.impl("keep", &keep);
}
