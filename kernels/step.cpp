// What a step does beside products and attention, on a CPU: norms, rotary embeddings, the cache's new entries, draws. And a block of
// the model, or all of it, in one call, which has linear.cpp multiply and attention.cpp attend.
//
// What it is: what lies between the large kernels, a fifth of an uncompiled step's time and an eighth of a compiled one's
// when PyTorch's operators or its compiler's loops do it. The roundings are model.py's. What it is not: a model; cpu_block.py
// says which go this way, and Transformer and TransformerBlock of model.py are what they mean.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/library.h>          // parsed in a quarter of torch/library.h's time
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "draw.h"
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

// ---- a block ------------------------------------------------------------------------------------------------------

using bfloat16 = at::BFloat16;

struct Norm {
  const bfloat16* scale;              // null: there is none
  int64_t cast, plus;
  double eps;
};

// model.TransformerBlock as cpu_block.py writes it down, in fields of 8 bytes.
struct Block {
  Matrix wqkv, wo, w13, w2;
  Norm attention_norm, q_norm, k_norm, post_attention_norm, ffn_norm, post_ffn_norm;
  int64_t H, K, E, over_heads;        // whether q_norm and k_norm go over all heads together
  int64_t activation;                 // of the feed-forward: 1 silu, 2 gelu_tanh; 0: it is not among this
  double scale, cap, residual_scale;
  const float* frequencies;           // [pairs]: its rope's; only a whole step looks at these four
  int64_t pairs;                      // of a head that turn; 0: none
  double amplitude;
  int64_t window;                     // the keys that a query sees, 0: all
  bfloat16 *k, *v;                    // the cache [rows, K, slots, E]
  int64_t rows, slots;
};

Attend* attend = nullptr;             // other libraries' functions
const Products *plain = nullptr, *quantized = nullptr;

void connect(int64_t attention, int64_t of_bfloat16, int64_t of_quantized) {
  attend = (Attend*)attention, plain = (const Products*)of_bfloat16, quantized = (const Products*)of_quantized;
}

const Products& products(const Matrix& m) { return m.bits == 16 ? *plain : *quantized; }

void norm_row(const Norm& n, const bfloat16* x, int64_t D, bfloat16* y) { norm_row(x, n.scale, D, n.eps, n.cast, n.plus, y); }

// At least n numbers' room, which is not cleared at every turn from a narrow product to a wide one.
bfloat16* grow(Lines<bfloat16>& room, int64_t n) {
  if (int64_t(room.size()) < n) room.resize(n);
  return room.data();
}

// x [rows, D] normed, in `room`; or x itself.
const bfloat16* normed(const Norm& n, const bfloat16* x, int64_t rows, int64_t D, Lines<bfloat16>& room, Team* team) {
  if (!n.scale) return x;
  bfloat16* const y = grow(room, rows * D);
  by_row(team, rows, D, [&](int64_t r) { norm_row(n, x + r * D, D, y + r * D); });
  return y;
}

// y [n] += alpha * x
void add_row(const bfloat16* x, float alpha, int64_t n, bfloat16* y) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store16(y + i, load16(y + i) + alpha * load16(x + i));
  for (; i < n; i++) y[i] = float(y[i]) + alpha * float(x[i]);
}

// x [rows, K] -> [rows, N], in `room`; next: the matrix that the next call will have, or null
bfloat16* multiply(const Matrix& m, const Matrix* next, const bfloat16* x, int64_t rows, Lines<bfloat16>& room, Team* team) {
  bfloat16* const y = grow(room, rows * m.N);
  if (team && next && rows <= 32)     // a prompt does not wait for memory
    team->will_read([&](int64_t thread) { return products(*next).begin_of(*next, thread, team->size()); });
  products(m).multiply(m, x, rows, y, team);
  if (m.bias) by_row(team, rows, m.N, [&](int64_t r) { add_row(m.bias, 1, m.N, y + r * m.N); });
  return y;
}

// y [rows, D] += alpha * norm(x)
void add(const Norm& n, const bfloat16* x, int64_t rows, int64_t D, double alpha, Lines<bfloat16>& room, bfloat16* y,
         Team* team) {
  const bfloat16* const more = normed(n, x, rows, D, room, team);
  by_row(team, rows, D, [&](int64_t r) { add_row(more + r * D, alpha, D, y + r * D); });
}

inline floats sigmoid(floats x) {
  const floats t = exponential(x < 0 ? x : -x);
  return (x < 0 ? t : floats{} + 1.0f) / (1.0f + t);
}

// h [n, 2F], gate | up -> y [n, F]; the activation is rounded before it multiplies.
void gate(const bfloat16* h, int64_t n, int64_t F, bool silu, bfloat16* y, Team* team) {
  share(team, n * F / LANES, 4096 / LANES, [&](int64_t begin, int64_t end) {              // F is a multiple of LANES
    for (int64_t i = begin * LANES; i < end * LANES; i += LANES) {
      const bfloat16* const row = h + i / F * F;      // from there h lies as far behind as y
      const floats x = load16(row + i);
      const floats u = silu ? x : (x + 0.044715f * x * x * x) * 1.5957691216f;       // (1 + tanh(u / 2)) / 2 = sigmoid(u)
      store16(y + i, x * sigmoid(u));
      store16(y + i, load16(y + i) * load16(row + F + i));
    }
  });
}

// What lies between the products, of the thread that called.
struct Room {
  Lines<bfloat16> x, normed, made, y;           // made: by the last product
};
thread_local Room own;

// When a call ends: what a prompt took is given back.
struct Trim {
  ~Trim() {
    for (auto* v : {&own.x, &own.normed, &own.made, &own.y})
      if (v->capacity() > 1 << 23) Lines<bfloat16>().swap(*v);
  }
};

// What blocks of one call have in common.
struct Step {
  int64_t B, T, D, S;
  bfloat16* x;                        // [B, T, D], changed in place
  const int64_t* pos;                 // [B, T]: the slots that keys and values go to
  const bool* mask;                   // [B, T, S], true: visible
  int64_t mask_strides[2];
  int64_t n;                          // the pairs of a head that turn
  const float *cos, *sin;             // [B, T, n]
  Room* room;
  Team* team;
};

// q, k and v of one token [(H + 2K) E]: norms and rotation of q and k.
void prepare(const Block& w, bfloat16* qkv, const float* cos, const float* sin, int64_t n) {
  const int64_t E = w.E, widths[] = {w.H * E, w.K * E};
  for (int part = 0; part < 2; qkv += widths[part++]) {
    const Norm& norm = part ? w.k_norm : w.q_norm;
    const int64_t D = w.over_heads ? widths[part] : E;
    for (int64_t at = 0; norm.scale && at < widths[part]; at += D) norm_row(norm, qkv + at, D, qkv + at);
    for (int64_t at = 0; at < widths[part]; at += E) turn(qkv + at, cos, sin, n, qkv + at);
  }
}

// x += attention(norm(x))
void attention_half(const Block& w, const Step& s) {
  const int64_t n = s.B * s.T, H = w.H, K = w.K, E = w.E, width = (H + 2 * K) * E, slots = w.slots * E;
  bfloat16* const qkv = multiply(w.wqkv, &w.wo, normed(w.attention_norm, s.x, n, s.D, s.room->normed, s.team), n, s.room->made, s.team);
  by_row(s.team, n, width, [&](int64_t r) {
    bfloat16* row = qkv + r * width;
    prepare(w, row, s.cos + r * s.n, s.sin + r * s.n, s.n);
    for (int64_t h = 0; h < K; h++) {
      const int64_t slot = (r / s.T * K + h) * w.slots + s.pos[r];
      std::copy_n(row + (H + h) * E, E, w.k + slot * E);
      std::copy_n(row + (H + K + h) * E, E, w.v + slot * E);
    }
  });
  bfloat16* const y = grow(s.room->y, n * H * E);
  attend({qkv, w.k, w.v, s.mask, y, s.B, H, s.T, E, K, s.S, w.scale, w.cap, {s.T * width, E, width}, {K * slots, slots, E},
          {K * slots, slots, E}, {s.mask_strides[0], s.mask_strides[1]}}, s.team);
  const bfloat16* const made = multiply(w.wo, w.activation ? &w.w13 : nullptr, y, n, s.room->made, s.team);
  add(w.post_attention_norm, made, n, s.D, w.residual_scale, s.room->normed, s.x, s.team);
}

// x += feed_forward(norm(x))
void feed_forward_half(const Block& w, const Matrix* next, const Step& s) {
  const int64_t n = s.B * s.T, F = w.w13.N / 2;
  const bfloat16* const h = multiply(w.w13, &w.w2, normed(w.ffn_norm, s.x, n, s.D, s.room->normed, s.team), n, s.room->made, s.team);
  bfloat16* const y = grow(s.room->y, n * F);
  gate(h, n, F, w.activation == 1, y, s.team);
  add(w.post_ffn_norm, multiply(w.w2, next, y, n, s.room->made, s.team), n, s.D, w.residual_scale, s.room->normed, s.x, s.team);
}

void check(const Tensor& forms, const Step& s) {
  STD_TORCH_CHECK(forms.size(1) * sizeof(int64_t) == sizeof(Block), "a form of another version");
  for (const Block *w = (const Block*)forms.const_data_ptr(), *end = w + forms.size(0); w < end; w++) {
    STD_TORCH_CHECK(w->k && w->v, "the model's layers or caches are elsewhere by now: pack it again");
    STD_TORCH_CHECK(s.S > 0 && s.S <= w->slots, s.S, " slots of a cache of ", w->slots);
    TORCH_CHECK_INDEX(s.B <= w->rows, s.B, " rows in a cache of ", w->rows);
    for (int64_t i = 0; i < s.B * s.T; i++)
      TORCH_CHECK_INDEX(s.pos[i] >= 0 && s.pos[i] < w->slots, "position ", s.pos[i], " in a cache of ", w->slots, " slots");
  }
}

// x [B, T, D] bfloat16 through a block; form [1, ...]: a Block, with its cache; pos [B, T]; cos, sin [B, 1, T, n] float32, or
// none; mask [B, 1, T, S] -> x's shape.
Tensor block(const Tensor& input, const Tensor& form, const Tensor& pos, const std::optional<Tensor>& cosines,
             const std::optional<Tensor>& sines, const Tensor& visible) {
  const Tensor from = whole(input), slots = whole(pos), mask = visible.stride(3) == 1 ? visible : whole(visible);
  const Tensor x = make(type(from), from.sizes(), from.strides());
  const Tensor cos = cosines ? whole(*cosines) : x, sin = sines ? whole(*sines) : x;
  Step s{x.size(0), x.size(1), x.size(2), mask.size(3), x.mutable_data_ptr<bfloat16>(), slots.const_data_ptr<int64_t>(),
         mask.const_data_ptr<bool>(), {mask.stride(0), mask.stride(2)}, cosines ? cos.size(3) : 0,
         (const float*)cos.const_data_ptr(), (const float*)sin.const_data_ptr(), &own};
  check(form, s);
  const Trim trim;
  std::copy_n(from.const_data_ptr<bfloat16>(), s.B * s.T * s.D, s.x);
  Team::gather([&](Team* team) {
    s.team = team;
    const Block& w = *(const Block*)form.const_data_ptr();
    attention_half(w, s);
    if (w.activation) feed_forward_half(w, nullptr, s);
  });
  return x;
}

// ---- a whole step -------------------------------------------------------------------------------------------------

// model.Transformer but for its blocks, as cpu_block.py writes it down.
struct Ends {
  Matrix table, head;                 // the table: packed, or with bits 0 rows of bfloat16
  Norm norm;
  double embedding_scale, output_scale, cap;
};

// ids [n] -> x [n, D]
void embed(const Ends& e, const int64_t* ids, int64_t n, bfloat16* x, Team* team) {
  const int64_t D = e.table.K;
  const float scale = bfloat16(e.embedding_scale);
  by_row(team, n, 8 * D, [&](int64_t i) {             // a packed row takes so many times as long as others
    bfloat16* row = x + i * D;
    if (e.table.bits) products(e.table).look_up(e.table, ids[i], row);
    else std::copy_n((const bfloat16*)e.table.w + ids[i] * D, D, row);
    for (int64_t d = 0; scale != 1 && d < D; d++) row[d] = float(row[d]) * scale;
  });
}

// x [n, D] -> logits [n, V], rounded to bfloat16 on their way, as a layer's outputs are.
void unembed(const Ends& e, const bfloat16* x, int64_t n, float* logits, Room& room, Team* team) {
  const bfloat16* const from = multiply(e.head, nullptr, normed(e.norm, x, n, e.table.K, room.normed, team), n, room.made, team);
  const float scale = e.output_scale, cap = e.cap;
  share(team, (n * e.head.N + LANES - 1) / LANES, 65536 / LANES, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * LANES, n * e.head.N);
    const auto finish = [&](floats v) { return cap ? soft_cap(v * scale, cap) : v * scale; };
    int64_t i = begin * LANES;
    for (; i + LANES <= last; i += LANES) write(logits + i, finish(load16(from + i)));
    for (; i < last; i++) logits[i] = finish(floats{} + float(from[i]))[0];
  });
}

// What layers have in common by their rope and their window.
struct Shared {
  std::map<const float*, std::vector<float>> turns;                // cos, then sin, [B, T, n] each
  std::map<int64_t, std::vector<uint8_t>> masks;

  void point(const Block& w, Step& s) {
    const int64_t n = s.B * s.T * w.pairs;
    std::vector<float>& t = turns[w.frequencies];
    if (t.empty()) {
      t.resize(2 * n);
      for (int64_t i = 0; i < n; i++) {
        const float angle = float(s.pos[i / w.pairs]) * w.frequencies[i % w.pairs], amplitude = w.amplitude;
        t[i] = std::cos(angle) * amplitude, t[n + i] = std::sin(angle) * amplitude;
      }
    }
    std::vector<uint8_t>& mask = masks[w.window];
    if (mask.empty()) {
      mask.resize(s.B * s.T * s.S);
      for (int64_t i = 0; i < s.B * s.T; i++) {
        const int64_t first = w.window ? std::max<int64_t>(0, s.pos[i] - w.window + 1) : 0;
        const int64_t last = std::min(s.S, s.pos[i] + 1);
        if (first < last) std::fill_n(mask.begin() + i * s.S + first, last - first, 1);
      }
    }
    s.n = w.pairs, s.cos = t.data(), s.sin = t.data() + n, s.mask = (const bool*)mask.data();
  }
};

// ids and s.pos [B, T] through Blocks `forms` and Ends `e` -> logits [B, n, V] of the tokens `columns` [B, n] of each row, or of
// all; then f(team).
template <class F> void run(const int64_t* ids, Step& s, const Tensor& forms, const Ends& e, const int64_t* columns, int64_t n,
                            float* logits, const F& f) {
  const int64_t B = s.B, T = s.T, D = s.D = e.table.K;
  for (int64_t i = 0; i < B * T; i++)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < e.table.N, "id ", ids[i], " in a vocabulary of ", e.table.N);
  for (int64_t i = 0; columns && i < B * n; i++) TORCH_CHECK_INDEX(columns[i] >= 0 && columns[i] < T, "token ", columns[i], " of ", T);
  check(forms, s);
  const Trim trim;
  Room& room = *(s.room = &own);
  s.x = grow(room.x, B * T * D), s.mask_strides[0] = T * s.S, s.mask_strides[1] = s.S;
  Shared shared;
  Team::gather([&](Team* team) {
    s.team = team;
    embed(e, ids, B * T, s.x, team);
    for (const Block *w = (const Block*)forms.const_data_ptr(), *end = w + forms.size(0); w < end; w++) {
      shared.point(*w, s);
      attention_half(*w, s);
      feed_forward_half(*w, w + 1 < end ? &w[1].wqkv : &e.head, s);
    }
    bfloat16* const chosen = columns ? grow(room.y, B * n * D) : s.x;
    for (int64_t i = 0; columns && i < B * n; i++) std::copy_n(s.x + (i / n * T + columns[i]) * D, D, chosen + i * D);
    unembed(e, chosen, B * n, logits, room, team);
    f(team);
  });
}

const Ends& ends_of(const Tensor& ends, int64_t V) {
  const Ends& e = *(const Ends*)ends.const_data_ptr();
  STD_TORCH_CHECK(ends.numel() * sizeof(int64_t) == sizeof(Ends) && V == e.head.N, "a form of another version");
  return e;
}

// ids and pos [B, T], forms [layers, ...] and ends: Blocks and Ends; slots: those that are attended to -> logits [B, T, V]. With
// columns [B, n]: of these tokens of each row, [B, n, V].
Tensor step(const Tensor& ids, const Tensor& positions, const Tensor& forms, const Tensor& ends, int64_t slots,
            const std::optional<Tensor>& columns, int64_t V) {
  const Tensor tokens = whole(ids), pos = whole(positions), wanted = columns ? whole(*columns) : tokens;
  const int64_t B = tokens.size(0), T = tokens.size(1), n = wanted.size(1);
  STD_TORCH_CHECK(pos.size(0) == B && pos.size(1) == T && wanted.size(0) == B, "positions or columns of another number of rows or tokens");
  const Tensor logits = make(aoti_torch_dtype_float32(), {B, n, V}, {n * V, V, 1});
  Step s{.B = B, .T = T, .S = slots, .pos = pos.const_data_ptr<int64_t>()};
  run(tokens.const_data_ptr<int64_t>(), s, forms, ends_of(ends, V), columns ? wanted.const_data_ptr<int64_t>() : nullptr, n,
      logits.mutable_data_ptr<float>(), [](Team*) {});
  return logits;
}

// A step of one token a row, draw included: ids [B], at pos [B] + ahead -> the next ids [B]. The rest: as of `step` and `draw`.
Tensor next(const Tensor& ids, const Tensor& positions, int64_t ahead, const Tensor& forms, const Tensor& ends, int64_t slots, int64_t V,
            const std::optional<Tensor>& noise, const std::optional<Tensor>& seen, int64_t top_k, double temperature, double top_p,
            double min_p, double penalty) {
  const Tensor tokens = whole(ids), from = whole(positions);
  const int64_t B = tokens.numel();
  STD_TORCH_CHECK(from.numel() == B, "positions of another number of rows");
  const Draws draws(B, V, noise, seen, top_k, temperature, top_p, min_p, penalty);
  std::vector<int64_t> pos(from.const_data_ptr<int64_t>(), from.const_data_ptr<int64_t>() + B);
  for (int64_t& p : pos) p += ahead;
  const Tensor drawn = make(aoti_torch_dtype_int64(), {B}, {1});
  thread_local std::vector<float> logits;
  if (int64_t(logits.size()) > 8 * B * V) std::vector<float>().swap(logits);
  logits.resize(B * V);
  Step s{.B = B, .T = 1, .S = slots, .pos = pos.data()};
  run(tokens.const_data_ptr<int64_t>(), s, forms, ends_of(ends, V), nullptr, 1, logits.data(),
      [&, to = logits.data()](Team* team) { draws.draw(to, B, V, drawn.mutable_data_ptr<int64_t>(), team); });
  return drawn;
}

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_step
#endif

STABLE_TORCH_LIBRARY(LIBRARY, m) {
  m.def("norm(Tensor x, Tensor scale, float eps, bool cast, float plus) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("keep(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor pos) -> ()");
  m.def("argmax(Tensor x) -> Tensor");
  m.def("draw(Tensor logits, Tensor? noise, Tensor(a!)? seen, int top_k, float temperature, float top_p, float min_p, float penalty) -> Tensor");
  m.def("connect(int attention, int bfloat16, int quantized) -> ()");
  m.def("block(Tensor x, Tensor(a!) form, Tensor pos, Tensor? cos, Tensor? sin, Tensor mask) -> Tensor");
  m.def("step(Tensor ids, Tensor pos, Tensor(a!) forms, Tensor ends, SymInt slots, Tensor? columns, int vocabulary) -> Tensor");
  m.def("next(Tensor ids, Tensor pos, int ahead, Tensor(a!) forms, Tensor ends, int slots, int vocabulary, Tensor? noise, Tensor(b!)? seen, "
        "int top_k, float temperature, float top_p, float min_p, float penalty) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("keep", TORCH_BOX(&keep));
  m.impl("argmax", TORCH_BOX(&argmax));
  m.impl("draw", TORCH_BOX(&draw));
  m.impl("block", TORCH_BOX(&block));
  m.impl("step", TORCH_BOX(&step));
  m.impl("next", TORCH_BOX(&next));
}

STABLE_TORCH_LIBRARY_IMPL(LIBRARY, CompositeExplicitAutograd, m) { m.impl("connect", TORCH_BOX(&connect)); }
