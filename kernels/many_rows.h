// Ten rows and more times a weight, by tiles: rows laid out once, panels piece by piece.
//
// What it is not: needed; products.h does the same by vectors.
#pragma once
#include "products.h"

#ifdef TILES
namespace {

constexpr int64_t TOGETHER = 8;                 // panels that tiles multiply at once, piece by piece
constexpr int64_t FEW_BYTES = 1 << 19;          // of rows that stay in the second cache anyway: panels go one by one
constexpr int64_t MOST_TILED = 1 << 23;         // inputs of rows that are laid out as tiles at once

// A row x [K] as a tile's of `rows`: [pieces, `stride` apart][PIECE spans][4][rows][16 pairs][2], zeros behind it.
void lay_row(const at::BFloat16* x, int64_t K, int64_t rows, int64_t stride, at::BFloat16* tiles) {
  const auto pick = [](__m512i a, __m512i b, int j) {               // pairs j, j + 4 ... of both, then j + 1, j + 5 ...
    const __m512i index = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    return _mm512_permutex2var_epi32(a, _mm512_add_epi32(index, _mm512_set1_epi32(j)), b);
  };
  alignas(64) at::BFloat16 padded[SPAN] = {};
  for (int64_t k = 0; k < K; k += SPAN) {
    const at::BFloat16* const from = K - k < SPAN ? (std::copy_n(x + k, K - k, padded), padded) : x + k;
    at::BFloat16* const to = tiles + k / SPAN / PIECE * stride + k / SPAN % PIECE * SPAN * rows;
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_loadu_si512(from + 32 * i);
    for (int j = 0; j < 4; j += 2) {
      const __m512i low = pick(v[0], v[1], j), high = pick(v[2], v[3], j);
      _mm512_storeu_si512(to + j * rows * 32, _mm512_shuffle_i64x2(low, high, 0x44));
      _mm512_storeu_si512(to + (j + 1) * rows * 32, _mm512_shuffle_i64x2(low, high, 0xee));
    }
  }
}

// Rows of x that tiles multiply, in even blocks of at most 32.
struct Tiled : Job {
  int64_t blocks, rows, pieces;
  at::BFloat16* room;                 // [pieces][blocks][of a piece and a block]; rows that are not there are undefined

  explicit Tiled(const Job& job) : Job(job) {
    blocks = (M + TWO_TILES - 1) / TWO_TILES, rows = (M + blocks - 1) / blocks;
    pieces = (matrix.K + PIECE * SPAN - 1) / (PIECE * SPAN);
  }
  void lay(at::BFloat16* here, Team* team) {
    room = here;
    share(team, M, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        lay_row((const at::BFloat16*)x + r * matrix.K, matrix.K, rows, blocks * each(), tiles(0, r / rows) + r % rows * 32);
    });
  }
  int64_t each() const { return PIECE * SPAN * rows; }
  at::BFloat16* tiles(int64_t piece, int64_t block) const { return room + (piece * blocks + block) * each(); }
};

// A piece of a panel in bfloat16: where it lies, or else made in `made`. plain: unscaled.
template <class W> const uint8_t* piece_of(const Groups& g, int64_t piece, bool plain, at::BFloat16* made) {
  constexpr int64_t UNITS = PIECE * TILE;
  const int64_t first = piece * UNITS, n = std::min(UNITS, g.all - first);
  if (std::is_same_v<W, Bfloat16> && n % TILE == 0) return g.unit<W>(first);
  if constexpr (W::HALF == Int4::HALF) unpack<W>(first, n, g, made);
  else if (plain) unpack<W, true>(first, n, g, made);
  else if constexpr (W::HALF == Int8::HALF) unpack<W>(first, n, g, made);
  std::fill(made + n * UNIT * PANEL, made + UNITS * UNIT * PANEL, at::BFloat16(0));
  return (const uint8_t*)made;
}

// Sums of n panels from `first` on, [n][blocks * rows][32], scaled and rounded to y.
void store_panels(const Tiled& p, int64_t first, int64_t n, const Groups* g, bool plain, float* sums) {
  const bool far = p.blocks == 1 && far_away(g[0], p.matrix.N / PANEL);
  for (int64_t r = 0; r < p.M; r++)
    for (int64_t i = 0; i < n; i++) {
      float* const y = sums + (i * p.blocks * p.rows + r) * PANEL;
      for (int at = 0; at < PANEL && plain; at += 16) write(y + at, read<floats>(y + at) * g[i].scales(0, at / 16));
      const int64_t column = (first + i) * PANEL;
      store(y, std::min<int64_t>(PANEL, p.matrix.N - column), (at::BFloat16*)p.y + r * p.matrix.N + column, far);
    }
}

// n panels from `first` on times all rows. A piece of a panel stays in the first cache while all rows meet it; and the rows' inputs
// that it needs in the second one, while the panels' pieces do. What comes next is asked for.
template <class W> void multiply_panels(const Tiled& p, int64_t first, int64_t n, Scratch& s) {
  constexpr int64_t UNITS = PIECE * TILE, STEPS = 4 * PIECE;            // of a piece: units, and tiles one behind another
  const int64_t spans = (p.matrix.K + SPAN - 1) / SPAN, steps = p.blocks * STEPS;
  const bool direct = std::is_same_v<W, Bfloat16> && p.blocks == 1;
  const int64_t lines = (UNITS * 2 * W::HALF / 64 + steps - 1) / steps, x_lines = n > 1 ? p.each() * 2 / 64 / (n * STEPS) : 0;
  Groups g[TOGETHER] = {};
  const Groups start = first_panel<W>(p.matrix);
  const int64_t each = p.blocks * p.rows * PANEL;
  const bool plain = std::is_same_v<W, Bfloat16> || (std::is_same_v<W, Int8> && start.count == 1 && !start.offsets());
  s.y.resize(std::max<size_t>(s.y.size(), n * each)), s.weights.resize(UNITS * UNIT * PANEL);
  for (int64_t i = 0; i < n; i++) {
    g[i] = start, g[i].next(first + i);
    widen_scales(p.matrix, first + i, g[i], s.scale, i, n);
  }
  for (int64_t at = 0; at < p.pieces; at++)
    for (int64_t i = 0; i < n; i++) {
      const uint8_t* const panel = piece_of<W>(g[i], at, plain, s.weights.data());
      const uint8_t* const next = i + 1 < n ? g[i + 1].template unit<W>(at * UNITS) :
                                  at + 1 < p.pieces ? g[0].template unit<W>((at + 1) * UNITS) : g[i].w + g[i].nbytes;
      for (int64_t b = 0; b < p.blocks; b++) {
        const Ahead next_w{next + b * lines * STEPS * 64, lines};
        const Ahead next_x{(const uint8_t*)p.tiles((at + 1) % p.pieces, b) + i * x_lines * STEPS * 64, x_lines};
        (p.rows > TILE ? direct ? multiply_spans<true, true> : multiply_spans<true, false> :
                         direct ? multiply_spans<false, true> : multiply_spans<false, false>)(
            p.tiles(at, b), p.rows, panel, std::min(PIECE, spans - at * PIECE),
            s.y.data() + i * each + b * p.rows * PANEL, at > 0, next_x, next_w);
      }
    }
  store_panels(p, first, n, g, plain, s.y.data());
}

// Room for rows as tiles, of the thread that called. It stays: to get its pages anew takes as long as to fill them.
at::BFloat16* tiles_room(int64_t n) {
  thread_local Lines<at::BFloat16> room;
  const int64_t has = room.size();
  if (has < n || has > 8 * std::max(n, MOST_TILED)) Lines<at::BFloat16>().swap(room), room.resize(n);
  return room.data();
}

// Jobs in bfloat16 whose matrices have one shape.
template <class W> void multiply_by_tiles(const std::vector<Job>& jobs, Team* team) {
  std::vector<Tiled> products(jobs.begin(), jobs.end());
  int64_t n = 0;
  for (const Tiled& p : products) n += p.pieces * p.blocks * p.each();
  if (n > MOST_TILED && jobs.size() > 1) {        // halves: the room stays small
    const auto half = jobs.begin() + jobs.size() / 2;
    multiply_by_tiles<W>({jobs.begin(), half}, team);
    return multiply_by_tiles<W>({half, jobs.end()}, team);
  }
  at::BFloat16* room = tiles_room(n);
  for (Tiled& p : products) p.lay(room, team), room += p.pieces * p.blocks * p.each();
  // as many panels together as all threads have a part of
  const int64_t panels = (jobs[0].matrix.N + PANEL - 1) / PANEL, threads = team ? team->size() : at::get_num_threads();
  const int64_t turns = (panels + threads * TOGETHER - 1) / (threads * TOGETHER);
  const int64_t some = (panels + threads * turns - 1) / (threads * turns), parts = (panels + some - 1) / some;
  share(team, parts * products.size(), 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch s;
    for (int64_t i = begin; i < end; i++) {
      const Tiled& p = products[i / parts];
      const Tiles tiles(p.rows);
      const int64_t first = i % parts * some, last = std::min(first + some, panels);
      const int64_t n = p.M * p.matrix.K * 2 > FEW_BYTES ? some : 1;
      for (int64_t at = first; at < last; at += n) multiply_panels<W>(p, at, std::min(n, last - at), s);
    }
    all_stored();
  });
}
}  // namespace
#endif
