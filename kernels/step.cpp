// What a step does beside products and attention, on a CPU: norms, rotary embeddings, the cache's new entries.
//
// What it is: one call for each where PyTorch's operators take nine, eight and four, a fifth of a step's time where a
// step is not compiled. The roundings are model.py's. What it is not: for compiled steps, whose compiler makes loops of
// these that fit what stands beside them.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/library.h>          // parsed in a quarter of torch/library.h's time
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <type_traits>

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

// A new tensor of x's type. (torch::stable::empty looks its operator up by name at every call, as contiguous does.)
Tensor make(const Tensor& x, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type(x),
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
Tensor norm(const Tensor& input, const Tensor& scale, double eps, bool cast, double plus) {
  const Tensor x = whole(input), y = make(x, x.sizes(), x.strides());
  const int64_t D = x.size(-1), rows = x.numel() / D;
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    const X *from = x.const_data_ptr<X>(), *by = scale.const_data_ptr<X>();
    X* to = y.mutable_data_ptr<X>();
    at::parallel_for(0, rows, 1 + 65536 / D, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) norm_row(from + r * D, by, D, eps, cast, plus, to + r * D);
    });
  });
  return y;
}

// Turn the pairs (j, j + n) of x's first 2n dimensions. x [B, H, T, E], rows of E in one piece; cos, sin [B, 1, T, n] float32.
Tensor rotate(const Tensor& input, const Tensor& cosines, const Tensor& sines) {
  const Tensor x = input.stride(3) == 1 ? input : whole(input), cos = whole(cosines), sin = whole(sines);
  const int64_t B = x.size(0), H = x.size(1), T = x.size(2), E = x.size(3), n = cos.size(3);
  const Tensor y = make(x, {B, H, T, E}, {H * T * E, T * E, E, 1});
  by_type(x, [&](auto zero) {
    using X = decltype(zero);
    const X* x0 = x.const_data_ptr<X>();
    X* y0 = y.mutable_data_ptr<X>();
    const float *cos0 = cos.const_data_ptr<float>(), *sin0 = sin.const_data_ptr<float>();
    const auto strides = x.strides();
    at::parallel_for(0, B * H * T, 1 + 65536 / E, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / (H * T), h = i / T % H, t = i % T;
        const X* from = x0 + b * strides[0] + h * strides[1] + t * strides[2];
        const float *c = cos0 + (b * T + t) * n, *s = sin0 + (b * T + t) * n;
        X* to = y0 + i * E;
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
void keep(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v, const Tensor& pos) {
  const int64_t B = k.size(0), K = k.size(1), T = k.size(2), E = k.size(3), S = k_cache.size(2), size = k.element_size();
  const Tensor slots = whole(pos);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
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

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_step
#endif

STABLE_TORCH_LIBRARY(LIBRARY, m) {
  m.def("norm(Tensor x, Tensor scale, float eps, bool cast, float plus) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("keep(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor pos) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("keep", TORCH_BOX(&keep));
}
