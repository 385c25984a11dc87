// Vectors of 16 floats and how numbers become them: what weights.h, attention.cpp and step.cpp share. The compiler's portable
// vectors, with the instruction itself where it is known to be better.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if !defined(PORTABLE) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#include <immintrin.h>
#define BFLOAT16_DOT 1
#ifdef __AVX512VNNI__
#define BYTE_DOT 1
#endif
#endif

constexpr int LANES = 16;
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef int8_t bytes __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32)));

template <class T> inline T read(const void* p) { T v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> inline void write(void* p, T v) { std::memcpy(p, &v, sizeof v); }

// A std::vector from the start of a cache line on: what vectors and tiles read and write then is one line, not parts of two.
template <class X> struct FromLine {
  using value_type = X;
  X* allocate(size_t n) { return (X*)::operator new(n * sizeof(X), std::align_val_t(64)); }
  void deallocate(X* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const FromLine&) const = default;
};
template <class X> using Lines = std::vector<X, FromLine<X>>;

inline ints to_int(bytes v) {                    // the compiler's own conversion from bytes goes one by one
#ifdef BFLOAT16_DOT
  return (ints)_mm512_cvtepi8_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, ints);
#endif
}

inline words load_bytes(const uint8_t* p) {      // 16 of 0 ... 255
#ifdef BFLOAT16_DOT
  return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return (words)to_int(read<bytes>(p)) & 255u;
#endif
}

inline floats load16(const float* p) { return read<floats>(p); }
inline floats load16(const at::BFloat16* p) {    // a bfloat16 is a float's upper half
  return (floats)(__builtin_convertvector(read<halves>(p), words) << 16);
}

inline float sum(floats v) {
#ifdef BFLOAT16_DOT
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < 16; i++) total += v[i];
  return total;
#endif
}

// e^x for x <= 0: 2^n e^f with |f| <= ln 2 / 2, the latter by its series; 2e-7 off at most.
inline floats exponential(floats x) {
  const floats lowest = floats{} - 87.0f;
  x = x < lowest ? lowest : x;                                                       // -inf as well; NaN stays what it is
  const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
  const floats whole = __builtin_convertvector(n, floats);
  const floats f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  floats p = f * (1 / 720.0f) + 1 / 120.0f;
  p = p * f + 1 / 24.0f;
  p = p * f + 1 / 6.0f;
  p = (p * f + 0.5f) * f * f + f + 1.0f;
  return p * (floats)((n + 127) << 23);
}

// c tanh(x / c)
inline floats soft_cap(floats x, float cap) {
  const floats size = x < 0 ? -x : x, t = exponential(size * (-2 / cap));
  const floats y = (1.0f - t) / (1.0f + t) * cap;
  return x < 0 ? -y : y;                         // NaN: itself
}

// Lanes i and i ^ STEP of two vectors, joined: a's where i has not the bit STEP, else b's.
template <int STEP, class F, int... I> inline floats merge(floats a, floats b, F join, std::integer_sequence<int, I...>) {
  return join(__builtin_shufflevector(a, b, (I & STEP ? 16 + I : I)...),
              __builtin_shufflevector(a, b, (I & STEP ? 16 + (I ^ STEP) : I ^ STEP)...));
}

// Lane j: vector j's lanes, joined.
template <class F> inline floats fold(floats (&v)[LANES], F join) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
  for (int j = 0; j < 16; j += 2) v[j] = merge<1>(v[j], v[j + 1], join, lanes);
  for (int j = 0; j < 16; j += 4) v[j] = merge<2>(v[j], v[j + 2], join, lanes);
  for (int j = 0; j < 16; j += 8) v[j] = merge<4>(v[j], v[j + 4], join, lanes);
  return merge<8>(v[0], v[8], join, lanes);
}
