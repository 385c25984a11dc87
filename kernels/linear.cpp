// y = x @ w.T for weights in bfloat16, int8 or int4, on a CPU.
//
// What it is: one matrix product whose weights are read once, in the order they lie in memory, and turned into
// numbers on the way; 1 to 32 rows at a time run at the speed of memory, more at the speed of arithmetic. Here are the
// operators, and what decides how rows are multiplied. What it is not: a layer, a quantizer or a file format; those are in
// quantize.py. Read weights.h first, the layout; then panel.h, the loops in which most of the time goes, and products.h,
// which shares them out; panel_tiles.h and many_rows.h are the same for processors with tiles.
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "many_rows.h"
#include "products.h"

namespace {

#ifdef BFLOAT16_ONLY                            // half of all this, in half the time: a model of plain weights needs no more
constexpr bool QUANTIZED = false;
#else
constexpr bool QUANTIZED = true;
#endif
constexpr int64_t MANY = 512;                   // rows that all weights meet before the next: more would not stay in the caches

// Values [N, K] as the layout has them, into out: N a multiple of 32, K of 8. heads: before each group of so many units.
void pack(const at::Tensor& values, at::Tensor out, int64_t bits, int64_t group, const std::optional<at::Tensor>& heads) {
  const int64_t N = values.size(0), K = values.size(1), units = K / UNIT, nbytes = 16 * bits;    // of a unit of 16 outputs
  const int64_t count = heads ? heads->size(1) : 0, each = heads && group ? group / UNIT : units;
  const uint8_t* from = (const uint8_t*)values.const_data_ptr();
  uint8_t* to = (uint8_t*)out.data_ptr();
  const auto put = [&](int64_t n, int64_t u) {                                       // a unit of one output
    const int64_t o = n % 16;
    const uint8_t* in = from + (n * K + u * UNIT) * (bits == 16 ? 2 : 1);
    uint8_t* unit = to + n / PANEL * (units * 2 * nbytes + count * HEAD) + (heads ? u / each + 1 : 0) * HEAD
                    + (u * 2 + n % PANEL / 16) * nbytes;
    if (bits == 16)
      for (int j = 0; j < 4; j++) std::memcpy(unit + (j * 16 + o) * 4, in + j * 4, 4);
    if (bits == 8)
      for (int q = 0; q < 2; q++)
        for (int i = 0; i < 4; i++) unit[(q * 16 + o) * 4 + i] = in[2 * q + i % 2 * 4 + i / 2] ^ 128;
    if (bits == 4)
      for (int e = 0; e < 2; e++)
        write<uint16_t>(unit + (o * 2 + e) * 2, in[e] | in[2 + e] << 4 | in[4 + e] << 8 | in[6 + e] << 12);
  };
  constexpr int64_t SOME = 64;        // units: enough of a row that the processor reads ahead, and what they become is cached
  at::parallel_for(0, N / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * PANEL; first < end * PANEL; first += PANEL)
      for (int64_t at = 0; at < units; at += SOME)
        for (int64_t n = first; n < first + PANEL; n++)
          for (int64_t u = at; u < std::min(at + SOME, units); u++) put(n, u);
    for (int64_t i = begin * count; i < end * count; i++)
      std::memcpy(to + i / count * units * 2 * nbytes + i * HEAD + i % count * each * 2 * nbytes,
                  (const uint8_t*)heads->const_data_ptr() + i * HEAD, HEAD);
  });
}

bool rounded_activations = true;

// Whether they are now: not where there is no instruction for it.
bool round_activations(bool wanted) {
  rounded_activations = wanted;
#ifdef BYTE_DOT
  return wanted;
#else
  return false;
#endif
}

// Whether tiles multiply so many rows, of bfloat16, as they are. Fewer get the bits that one row gets, or become bytes.
bool by_tiles(int64_t rows, int64_t bits) {
#ifdef TILES
  return rows > (bits == 16 || !rounded_activations ? 9 : TILE) && Tiles::given();
#else
  return false;
#endif
}

// f(W()) for the kind of weights.
template <class F> void by_kind(int64_t bits, F f) {
  if (bits == 16) f(Bfloat16());
  if constexpr (QUANTIZED) {
    if (bits == 8) f(Int8());
    if (bits == 4) f(Int4());
    if (bits == FP4) f(Fp4());
  }
}

void multiply_all(const std::vector<Job>& given, at::ScalarType type, Team* team = nullptr) {
  const int64_t bits = given[0].matrix.bits, nbytes = c10::elementSize(type);
  std::vector<Job> jobs, tiled;
  for (const Job& job : given)
    for (int64_t m = 0; m < job.M; m += MANY) {
      const Matrix& w = job.matrix;
      const int64_t rows = std::min(MANY, job.M - m);
      (type == at::kBFloat16 && by_tiles(job.M, bits) ? tiled : jobs).push_back(
          {w, (const char*)job.x + m * w.K * nbytes, rows, (char*)job.y + m * w.N * nbytes});
    }
#ifdef TILES
  if (tiled.size()) by_kind(bits, [&](auto w) { multiply_by_tiles<decltype(w)>(tiled, team); });
#endif
  if (jobs.empty()) return;
#if defined(BYTE_DOT) && !defined(BFLOAT16_ONLY)
  if (type == at::kBFloat16 && bits != 16 && rounded_activations && jobs[0].matrix.group % BLOCK == 0) {
    if (bits == 8) multiply_as<Int8, int8_t>(jobs, type, team);
    if (bits == 4) multiply_as<Int4, int8_t>(jobs, type, team);
    if (bits == FP4) multiply_as<Fp4, int8_t>(jobs, type, team);
    return;
  }
#endif
#ifdef BFLOAT16_DOT
  if (type == at::kBFloat16) return by_kind(bits, [&](auto w) { multiply_as<decltype(w), at::BFloat16>(jobs, type, team); });
#endif
  by_kind(bits, [&](auto w) { multiply_as<decltype(w), float>(jobs, type, team); });
}

using Optional = std::optional<at::Tensor>;

Matrix matrix(const at::Tensor& w, const Optional& scales, const Optional& offsets, int64_t N, int64_t bits, int64_t group) {
  const int64_t panels = (N + PANEL - 1) / PANEL, nbytes = w.nbytes() / panels, input = PANEL * (bits == FP4 ? 4 : bits) / 8;
  const bool headed = (bits == 4 || bits == FP4) && !offsets;
  int64_t K = nbytes / input;
  if (headed) {                                       // whole groups, and what is left
    const int64_t each = group ? group * input + HEAD : nbytes, rest = nbytes % each;
    K = group ? nbytes / each * group + (rest ? (rest - HEAD) / input : 0) : (nbytes - HEAD) / input;
  }
  const int64_t kind = scales ? (int64_t)scales->scalar_type() : 0;
  const int64_t least = !headed ? -1 : kind == (int64_t)at::kInt ? *(const int32_t*)scales->const_data_ptr() : 0;
  return {N, K, bits, group, w.const_data_ptr(), scales ? scales->const_data_ptr() : nullptr, kind,
          offsets ? offsets->const_data_ptr() : nullptr, least};
}

// x [M, K or what was padded to K], in one piece.
at::Tensor whole(const at::Tensor& x, int64_t K) {
  return x.size(1) == K ? x.contiguous() : at::constant_pad_nd(x, {0, K - x.size(1)});
}

// x [..., K], w packed for `bits` 16, 8, 4 or FP4; scales and offsets [panels * groups * 32] or none -> [..., N] in x's dtype.
at::Tensor linear(const at::Tensor& input, const at::Tensor& w, const Optional& scales, const Optional& offsets, int64_t N,
                  int64_t bits, int64_t group) {
  auto sizes = input.sizes().vec();
  const Matrix m = matrix(w, scales, offsets, N, bits, group);
  const at::Tensor x = whole(input.reshape({-1, sizes.back()}), m.K);
  sizes.back() = N;
  const at::Tensor y = at::empty(sizes, x.options());
  if (x.size(0)) multiply_all({{m, x.const_data_ptr(), x.size(0), y.data_ptr()}}, x.scalar_type());
  return y;
}

// The same for step.cpp, which is another library and calls this by its address.
void multiply_matrix(const Matrix& m, const at::BFloat16* x, int64_t rows, at::BFloat16* y, Team* team) {
  RECORD_FUNCTION("linear", std::array<c10::IValue, 0>());    // what a profiler shows within a step
  if (rows) multiply_all({{m, x, rows, y}}, at::kBFloat16, team);
}

template <class W> void look_up_as(const Matrix& m, int64_t row, at::BFloat16* y) {
  thread_local Scratch s;
  const int64_t half = row % PANEL / 16, o = row % 16;
  Groups g = first_panel<W>(m);
  g.next(row / PANEL);
  widen_scales(m, row / PANEL, g, s.scale);
  for (int64_t u = 0; u < g.all; u++) {
    const int64_t i = u / g.units;
    const float scale = g.scales(i, half)[o], offset = g.offsets() ? g.offsets(i, half)[o] : 0;
    for (int j = 0; j < 4; j++) {
      const Pair f = W::pair(g.unit<W>(u) + half * W::HALF, j);
      y[u * UNIT + 2 * j] = (f.even[o] + offset) * scale, y[u * UNIT + 2 * j + 1] = (f.odd[o] + offset) * scale;
    }
  }
}

// Row `row` of a packed weight, a token's embedding -> y [K], K a multiple of 8. Also for step.cpp.
void look_up(const Matrix& m, int64_t row, at::BFloat16* y) {
  if (m.bits == 16) return look_up_as<Bfloat16>(m, row, y);
  if constexpr (QUANTIZED) {
    if (m.bits == 8) return look_up_as<Int8>(m, row, y);
    if (m.bits == 4) return look_up_as<Int4>(m, row, y);
    look_up_as<Fp4>(m, row, y);
  }
}

// Where the weights begin that thread `part` of `parts` reads first. Also for step.cpp.
const char* begin_of(const Matrix& m, int64_t part, int64_t parts) {
  const auto begin = [&](const Groups& g) {
    return (const char*)(g.heads ? g.heads : g.w) + (m.N + PANEL - 1) / PANEL * part / parts * g.nbytes;
  };
  if (m.bits == 16) return begin(first_panel<Bfloat16>(m));
  if (m.bits == 8) return begin(first_panel<Int8>(m));
  return begin(first_panel<Int4>(m));
}

const Products PRODUCTS{multiply_matrix, look_up, begin_of};

// ---- a mixture of experts -----------------------------------------------------------------------------------------

// All experts' weights of one kind, packed, one behind another: w [X, bytes], scales and offsets [X, n] or none.
struct Stack {
  at::Tensor w;
  Optional scales, offsets, bias;
  int64_t N, bits, group;

  // x [n, K], its first counts[0] rows for expert chosen[0], and so on -> [n, N]
  at::Tensor multiply(const at::Tensor& x, const std::vector<int64_t>& chosen, const std::vector<int64_t>& counts) const {
    const auto of = [](const Optional& t, int64_t e) { return t ? Optional(t->select(0, e)) : std::nullopt; };
    at::Tensor y = at::empty({x.size(0), N}, x.options());
    std::vector<Job> jobs;
    const int64_t width = matrix(w.select(0, 0), std::nullopt, of(offsets, 0), N, bits, group).K;
    const at::Tensor rows = whole(x, width);
    for (size_t i = 0, at = 0; i < chosen.size(); at += counts[i++]) {
      const int64_t e = chosen[i];
      jobs.push_back({matrix(w.select(0, e), of(scales, e), of(offsets, e), N, bits, group),
                      (const char*)rows.const_data_ptr() + at * width * x.element_size(), counts[i],
                      (char*)y.data_ptr() + at * N * x.element_size()});
    }
    multiply_all(jobs, x.scalar_type());
    for (size_t i = 0, at = 0; bias && i < chosen.size(); at += counts[i++]) y.narrow(0, at, counts[i]).add_(bias->select(0, chosen[i]));
    return y;
  }
};

// h [n, 2F], gate | up -> [n, F]: model.ACTIVATIONS' silu and silu_clamped.
at::Tensor gated(const at::Tensor& h, bool clamped) {
  const int64_t F = h.size(1) / 2;
  at::Tensor gate = h.narrow(1, 0, F), up = h.narrow(1, F, F);
  if (!clamped) return at::silu(gate).mul_(up);
  gate = gate.clamp_max(7);
  return gate.mul(1.702).sigmoid_().mul_(gate).mul_(up.clamp(-7, 7).add_(1));
}

// What each token's experts make of it: x [T, D], ids [T, A] -> [T, A, D]; zeros for an id of -1. An expert that is wanted
// runs once, on all rows that want it.
at::Tensor experts(const at::Tensor& input, const at::Tensor& ids, at::TensorList w,
                   const c10::List<std::optional<at::Tensor>>& more, at::IntArrayRef sizes, bool clamped) {
  const at::Tensor x = input.contiguous(), all = ids.contiguous();
  const Stack up{w[0], more[0], more[1], more[2], sizes[0], sizes[1], sizes[2]};
  const Stack down{w[1], more[3], more[4], more[5], sizes[3], sizes[4], sizes[5]};
  const int64_t T = x.size(0), D = x.size(1), A = all.size(1), nbytes = D * x.element_size();
  const int64_t* id = all.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> places(w[0].size(0));       // where each expert is wanted, of T * A places
  at::Tensor out = at::empty({T, A, D}, x.options());
  char* y = (char*)out.data_ptr();
  for (int64_t i = 0; i < T * A; i++)
    if (id[i] >= 0) places[id[i]].push_back(i);
    else std::memset(y + i * nbytes, 0, nbytes);
  std::vector<int64_t> order, chosen, counts;
  for (size_t e = 0; e < places.size(); e++)
    if (!places[e].empty()) {
      order.insert(order.end(), places[e].begin(), places[e].end());
      chosen.push_back(e), counts.push_back(places[e].size());
    }
  if (order.empty()) return out;
  at::Tensor rows = at::empty({(int64_t)order.size(), D}, x.options());
  for (size_t i = 0; i < order.size(); i++)
    std::memcpy((char*)rows.data_ptr() + i * nbytes, (const char*)x.const_data_ptr() + order[i] / A * nbytes, nbytes);
  const at::Tensor made = down.multiply(gated(up.multiply(rows, chosen, counts), clamped), chosen, counts);
  for (size_t i = 0; i < order.size(); i++)
    std::memcpy(y + order[i] * nbytes, (const char*)made.const_data_ptr() + i * nbytes, nbytes);
  return out;
}

}  // namespace

#ifndef LIBRARY
#define LIBRARY cpu_kernels
#endif

TORCH_LIBRARY(LIBRARY, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? scales, Tensor? offsets, int N, int bits, int group) -> Tensor");
  m.def("pack(Tensor values, Tensor(a!) out, int bits, int group, Tensor? heads) -> ()", &pack);
  m.def("round_activations(bool wanted) -> bool", &round_activations);
  m.def("by_tiles(int rows, int bits) -> bool", &by_tiles);
  m.def("address() -> int", +[] { return (int64_t)&PRODUCTS; });
  m.def("experts(Tensor x, Tensor ids, Tensor[] w, Tensor?[] more, int[] sizes, bool clamped) -> Tensor");
}

TORCH_LIBRARY_IMPL(LIBRARY, CPU, m) {
  m.impl("linear", &linear);
  m.impl("experts", &experts);
}
