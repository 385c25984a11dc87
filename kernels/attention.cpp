// softmax(q @ k.T * scale) @ v for few queries, on a CPU: a step of one token, or the few that speculation verifies.
//
// What it is: each head of keys and values is read once, front to back, for all the queries that share it, and no
// further than the last slot that one of them may see. A query's sums do not depend on the other queries of the call,
// so that a token gets the same bits alone and among others. What it is not: fast for long prompts, where PyTorch's own
// fused operator serves. The plain form of the same thing is `attend` in model.py.
#include <ATen/Parallel.h>
#include <torch/csrc/stable/library.h>          // parsed in a quarter of torch/library.h's time
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "calls.h"
#include "vectors.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t BLOCK = 256;      // slots looked at for one query after the other: 32 KB of keys of 64 bfloat16

// One key/value head and the queries that share it. Query r stands at time r % T.
template <class X> struct Head {
  const X *k, *v, *next_k;          // of slot 0; the next slot is a stride on. next_k: the next head's, or its own
  int64_t k_stride, v_stride, E, T;
  const bool* mask;                 // [T] rows, a stride apart
  int64_t mask_stride;
  float scale, cap;
  bool near;                        // its keys and values are few enough to stay in the second cache
};

// Queries as they are multiplied: bfloat16 pairs where there is an instruction for them, else floats.
#ifdef BFLOAT16_DOT
template <class X> using Query = X;
inline __m512i load32(const at::BFloat16* p, bool half) {
  return half ? _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p)) : _mm512_loadu_si512(p);
}
#else
template <class X> using Query = float;
#endif

// Ask for n numbers that are wanted soon: a head is too short for the processor to see by itself where reading goes on.
template <class X> inline void fetch(const X* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(X)) __builtin_prefetch(p + i);
}

// dots [j] += lane by lane products of a query and key j, LANES keys.
template <class X> void multiply(const Query<X>* q, const X* const* keys, int64_t E, floats* dots) {
#ifdef BFLOAT16_DOT
  if constexpr (std::is_same_v<X, at::BFloat16>) {
    for (int64_t e = 0; e < E; e += 32) {
      const __m512i pairs = load32(q + e, e + 16 == E);
      for (int j = 0; j < LANES; j++)
        dots[j] = (floats)_mm512_dpbf16_ps((__m512)dots[j], (__m512bh)load32(keys[j] + e, e + 16 == E), (__m512bh)pairs);
    }
    return;
  }
#endif
  for (int64_t e = 0; e < E; e += 16) {
    const floats x = load16(q + e);
    for (int j = 0; j < LANES; j++) dots[j] += load16(keys[j] + e) * x;
  }
}

// scores [s] of slots first ... last for query r of R, scaled and masked; a whole vector at a time.
template <class X>
void score(const Head<X>& h, const Query<X>* q, int64_t r, int64_t R, int64_t first, int64_t last, float* scores) {
  const bool* visible = h.mask + r % h.T * h.mask_stride;
  for (int64_t s = first; s < last; s += LANES) {
    for (int64_t j = s + r; h.near && j < std::min(s + LANES, last); j += R) fetch(h.v + j * h.v_stride, h.E);
    const X* keys[LANES];
    for (int j = 0; j < LANES; j++) keys[j] = h.k + std::min(s + j, last - 1) * h.k_stride;
    floats dots[LANES] = {};
    multiply<X>(q, keys, h.E, dots);
    floats y = fold(dots, [](floats a, floats b) { return a + b; }) * h.scale;
    if (h.cap) y = soft_cap(y, h.cap);
    bytes shown = {};
    std::memcpy(&shown, visible + s, std::min<int64_t>(LANES, last - s));
    y = __builtin_convertvector(shown, ints) ? y : -std::numeric_limits<float>::infinity();
    write(scores + s, y);
  }
}

// scores [n], n whole vectors -> their exponentials, less the largest; returns 1 / their sum.
inline float soften(float* scores, int64_t n) {
  floats most = read<floats>(scores), total = {};
  for (int64_t s = LANES; s < n; s += LANES) {
    const floats x = read<floats>(scores + s);
    most = x > most ? x : most;
  }
  float highest = most[0];
  for (int j = 1; j < LANES; j++) highest = std::max(highest, most[j]);
  for (int64_t s = 0; s < n; s += LANES) {
    floats p = read<floats>(scores + s);
    p = p >= -std::numeric_limits<float>::max() ? exponential(p - highest) : floats{};   // masked: nothing at all
    write(scores + s, p);
    total += p;
  }
  return 1 / sum(total);
}

// y [R][E] += sum over slots of p [R][s] v [s], from e on, N vectors wide.
template <class X, int R, int N>
void weigh(const Head<X>& h, const float* p, int64_t room, int64_t first, int64_t last, int64_t e, float* y) {
  floats total[R][N];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) total[r][i] = read<floats>(y + r * h.E + e + 16 * i);
  for (int64_t s = first; s < last; s++) {
    if (h.near) fetch(h.next_k + s * h.k_stride + e, 16 * N);
    for (int i = 0; i < N; i++) {
      const floats v = load16(h.v + s * h.v_stride + e + 16 * i);
      for (int r = 0; r < R; r++) total[r][i] += v * p[r * room + s];
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < N; i++) write(y + r * h.E + e + 16 * i, total[r][i]);
}

template <class X, int R>
void weigh_all(const Head<X>& h, const float* p, int64_t room, int64_t first, int64_t last, float* y) {
  int64_t e = 0;
  for (; e + 64 <= h.E; e += 64) weigh<X, R, 4>(h, p, room, first, last, e, y);
  for (; e < h.E; e += 16) weigh<X, R, 1>(h, p, room, first, last, e, y);
}

// y [R][E] of queries q [R][E] over slots first ... last; scores: R rows of `room` floats.
template <class X>
void attend_head(const Head<X>& h, const Query<X>* q, int64_t R, int64_t first, int64_t last, float* scores,
                 int64_t room, float* y) {
  for (int64_t at = first; at < last; at += BLOCK)
    for (int64_t r = 0; r < R; r++)
      score(h, q + r * h.E, r, R, at, std::min(at + BLOCK, last), scores + r * room);
  for (int64_t r = 0; r < R; r++) {
    float* p = scores + r * room;
    const float share = soften(p + first, (last - first + 15) / LANES * LANES);
    for (int64_t s = first; s < last; s++) p[s] *= share;
  }
  std::fill_n(y, R * h.E, 0.0f);
  for (int64_t at = first; at < last; at += BLOCK) {
    const int64_t end = std::min(at + BLOCK, last);
    int64_t r = 0;
    for (; r + 4 <= R; r += 4) weigh_all<X, 4>(h, scores + r * room, room, at, end, y + r * h.E);
    for (; r < R; r++) weigh_all<X, 1>(h, scores + r * room, room, at, end, y + r * h.E);
  }
}

// The slots that at least one of the T queries may see lie in first ... last.
std::pair<int64_t, int64_t> seen(const bool* mask, int64_t stride, int64_t T, int64_t S) {
  int64_t first = S, last = 0;
  for (int64_t t = 0; t < T; t++) {
    const bool* row = mask + t * stride;
    first = std::min<int64_t>(first, std::find(row, row + S, true) - row);
    int64_t end = S;
    while (end > last && !row[end - 1]) end--;
    last = std::max(last, end);
  }
  return {std::min(first, last) & ~15, last};      // whole vectors: sums then run in the same order for any T
}

template <class X> void attend_all(const Attention& a, Team* team) {
  const int64_t H = a.H, T = a.T, E = a.E, R = H / a.K * T, room = (a.S + 31) / LANES * LANES;
  const X *q = (const X*)a.q, *k = (const X*)a.k, *v = (const X*)a.v;
  const int64_t grain = std::max<int64_t>(1, 65536 / (a.S * R * E));                 // as in linear.cpp
  share(team, a.B * a.K, grain, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scores, y;
    thread_local std::vector<Query<X>> queries;
    scores.resize(R * room), y.resize(R * E), queries.resize(R * E);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / a.K, kv = i % a.K;
      const auto head_of = [&](int64_t r) { return kv * (H / a.K) + r / T; };
      const auto keys = [&](int64_t i) { return k + i / a.K * a.k_strides[0] + i % a.K * a.k_strides[1]; };
      const auto [first, last] = seen(a.mask + b * a.mask_strides[0], a.mask_strides[1], T, a.S);
      const Head<X> h{keys(i), v + b * a.v_strides[0] + kv * a.v_strides[1], keys(std::min(i + 1, a.B * a.K - 1)),
                      a.k_strides[2], a.v_strides[2], E, T, a.mask + b * a.mask_strides[0], a.mask_strides[1],
                      float(a.scale), float(a.cap), (last - first) * E * int64_t(sizeof(X)) <= 1 << 18};
      for (int64_t r = 0; r < R; r++)
        std::copy_n(q + b * a.q_strides[0] + head_of(r) * a.q_strides[1] + r % T * a.q_strides[2], E, queries.data() + r * E);
      attend_head(h, queries.data(), R, first, last, scores.data(), room, y.data());
      for (int64_t r = 0; r < R; r++)
        std::copy_n(y.data() + r * E, E, (X*)a.out + ((b * T + r % T) * H + head_of(r)) * E);
    }
  });
}

// q [B, H, T, E]; k, v [B, K, S, E] of the same dtype, float32 or bfloat16; mask bool [B, 1, T, S], true: visible
// -> q's shape, in memory [B, T, H, E]. E is a multiple of 16; every query sees a slot. cap 0: no soft cap of the
// scores.
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& visible, double scale, double cap) {
  const auto rows = [](const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); };
  const Tensor q = rows(query), k = rows(key), v = rows(value), mask = rows(visible);
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), E = q.size(3);
  const int64_t sizes[] = {B, H, T, E}, strides[] = {T * H * E, E, H * E, 1};
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &type));
  AtenTensorHandle made;            // torch::stable::empty would look its operator up by name at every call
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &made));
  const Tensor out(made);
  Attention a{q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), mask.const_data_ptr<bool>(), out.mutable_data_ptr(),
              B, H, T, E, k.size(1), k.size(2), scale, cap};
  for (int i = 0; i < 3; i++) a.q_strides[i] = q.stride(i), a.k_strides[i] = k.stride(i), a.v_strides[i] = v.stride(i);
  a.mask_strides[0] = mask.stride(0), a.mask_strides[1] = mask.stride(2);
  if (type == aoti_torch_dtype_bfloat16()) attend_all<at::BFloat16>(a, nullptr); else attend_all<float>(a, nullptr);
  return out;
}

int64_t address() { return (int64_t)(Attend*)&attend_all<at::BFloat16>; }            // for step.cpp

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_attention
#endif

STABLE_TORCH_LIBRARY(LIBRARY, m) {
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float cap) -> Tensor");
  m.def("address() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CompositeExplicitAutograd, m) { m.impl("address", TORCH_BOX(&address)); }
