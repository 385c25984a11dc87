// A whole step in one call on a CPU: ids in, logits or the next ids out, through every block and the draw.
//
// What it is: model.Transformer on what cpu_block.py writes down, and the library of these operators. What it is not: a model;
// cpu_block.py says which go this way. Read operators.h first, then block.h.
#include <map>
#include <vector>

#include "block.h"

namespace {

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
