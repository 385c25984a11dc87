// A block of the model in one call on a CPU: linear.cpp multiplies, attention.cpp attends, operators.h does the rest.
//
// What it is: model.TransformerBlock, which says what it means, on the `Block` that cpu_block.py writes down, row by row in
// rooms that stay. What it is not: a model; step.cpp is, and it reads on from here.
#pragma once
#include "calls.h"
#include "operators.h"

namespace {

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

}  // namespace
