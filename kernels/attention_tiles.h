// softmax(q @ k.T * scale) @ v in bfloat16 by AMX's tiles: steps and prompts in one way.
//
// What it is: attention turned on its side, so that a vector's lanes are 16 queries. 16 keys, a tile as they lie in the cache, times
// 16 queries are scores [slot][query]; the largest ones, exponentials and sums are then a vector for each slot, and nothing runs
// across one. Values are turned once for all queries, to multiply the probabilities of two slots at a time: y [E][query]. Slots come
// in blocks, and what was added up shrinks when a larger score comes (Milakov and Gimelshein 2018). What a query gets does not
// depend on the others. What it is not: needed; attention.cpp, which calls it, does the same by vectors.
#pragma once
#include "tiles.h"
#ifdef TILES
#include <algorithm>
#include <limits>
#include <vector>

#include "calls.h"
#include "team.h"
#include "vectors.h"

namespace {

// 16 rows of 16 words, `row` bytes apart -> its columns as rows of 64 bytes: four of them, and the next four `more` bytes on.
inline void turn(const void* from, int64_t row, void* to, int64_t more) {
  for (int i = 0; i < 4; i++) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {               // four words each of rows j, 4 + j, 8 + j, 12 + j
      const auto four = [&](int k) { return _mm_loadu_si128((const __m128i*)((const char*)from + (4 * k + j) * row + 16 * i)); };
      r[j] = _mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(four(0)), 0x00f0, four(1));
      r[j] = _mm512_mask_broadcast_i32x4(_mm512_mask_broadcast_i32x4(r[j], 0x0f00, four(2)), 0xf000, four(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    char* const out = (char*)to + i * more;
    write(out, _mm512_unpacklo_epi64(a, c)), write(out + 64, _mm512_unpackhi_epi64(a, c));
    write(out + 128, _mm512_unpacklo_epi64(b, d)), write(out + 192, _mm512_unpackhi_epi64(b, d));
  }
}

// Pairs of bfloat16, rounded.
inline __m512i join(floats one, floats other) {
  const __m512i half = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i turns = _mm512_or_si512(half, _mm512_slli_epi32(_mm512_add_epi32(half, _mm512_set1_epi32(16)), 16));
  return _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one));
}

// Queries of one head of keys and values, time by time, the heads that share it side by side.
class AttentionByTiles {
 public:
  static constexpr int64_t WIDEST = 256;        // E

 private:
  static constexpr int64_t STEP = TWO_TILES;    // slots whose values are multiplied at once
  static constexpr int64_t BLOCK = 64;          // slots that all queries meet before the next: what they take stays in the first cache
  static constexpr int64_t TOGETHER = 512;      // queries for which values are turned once

  struct Columns {                              // 16 queries
    int64_t from, count;                        // the first one, and how many there are: the rest are zeros
    int64_t first, last;                        // slots that at least one of them sees
    floats most, total;                         // the largest score yet, and the exponentials' sum relative to it
  };

  const Attention& a;
  const int64_t G, E, PE;                       // queries of a time; E, and in whole tiles
  const at::BFloat16 *keys, *values;            // of the head
  const bool* mask;

  struct Room {
    std::vector<Columns> columns;
    Lines<at::BFloat16> q, v;                   // [columns][PE / 2][16][2], [BLOCK / 32][PE][32]
    Lines<float> y;                             // [columns][PE][16], relative to the largest score as well
    alignas(64) floats scores[BLOCK];
    alignas(64) at::BFloat16 p[BLOCK * TILE];   // [BLOCK / 2][16][2]
    alignas(64) at::BFloat16 rows[STEP * WIDEST];
    alignas(64) uint32_t pairs[WIDEST / 32][2][TILE][TILE];
    uint16_t shown[BLOCK];                      // the queries that see a slot, a bit each
  } & room;

  static Room& of_thread() {
    thread_local Room room;
    return room;
  }

  // n lines of which the first is read now: later ones of the same head, for the second cache and for the first.
  static inline void ask(const at::BFloat16* p, int n) {
#pragma GCC unroll 1                            // a loop stays where it is among the tiles
    for (int i = 0; i < n; i++, p += 32) __builtin_prefetch(p + 2048, 0, 2), __builtin_prefetch(p + 1024);
  }

  // 2^x for x <= 0; a 13,000th off at most, where bfloat16 is a 512th.
  static inline floats power_of_two(floats x) {
    const floats f = (floats)_mm512_reduce_ps((__m512)x, 1);                         // less the whole number below it
    const floats y = ((f * 0.0780245215f + 0.226067156f) * f + 0.695833564f) * f + 0.999925196f;
    return (floats)_mm512_scalef_ps((__m512)y, (__m512)x);
  }

  // Rows of E numbers, `stride` apart, in whole tiles, from the r-th row of room.rows on; zeros from row `count` to `n`.
  void pad(const at::BFloat16* from, int64_t stride, int64_t r, int64_t count, int64_t n) {
    for (; r < n; r++, from += stride)
      for (int64_t e = 0; e < PE; e += 32)
        write(room.rows + r * PE + e, _mm512_maskz_loadu_epi16(r < count ? here(e) : 0, from + e));
  }
  // Of 32 numbers from e on, those that there are.
  __mmask32 here(int64_t e) const { return E - e < 32 ? 0xffff : ~0u; }

  void start(Columns& c, int64_t b, int64_t kv, int64_t from, int64_t to) {
    c = {from, std::min(TILE, to - from), a.S, 0, floats{} - 1e30f, floats{}};
    for (int64_t i = 0; i < c.count; i++) {
      const int64_t t = (from + i) / G, head = kv * G + (from + i) % G;
      pad((const at::BFloat16*)a.q + b * a.q_strides[0] + head * a.q_strides[1] + t * a.q_strides[2], 0, i, TILE, i + 1);
    }
    pad(nullptr, 0, c.count, 0, TILE);
    at::BFloat16* const q = room.q.data() + (&c - room.columns.data()) * PE * TILE;
    for (int64_t e = 0; e < PE; e += 32) turn(room.rows + e, 2 * PE, q + e * TILE, 4 * 64);
    for (int64_t t = from / G; t <= (from + c.count - 1) / G; t++) {
      const auto [first, last] = seen(mask + t * a.mask_strides[1], 0, 1, a.S);
      c.first = std::min(c.first, first), c.last = std::max(c.last, last);
    }
  }

  // Values of slots at ... last, at most BLOCK, and zeros: two slots' values joined, and 16 such pairs turned.
  void turn_values(int64_t at, int64_t last) {
    const int64_t stride = a.v_strides[2];
    for (int64_t s = at; s < std::min(at + BLOCK, last); s += STEP) {
      for (int64_t i = 0; i < TILE; i++) {
        const int64_t slot = s + 2 * i;
        const at::BFloat16* const v = values + slot * stride;
        for (int64_t e = 0; e < E; e += 32) {
          const __m512i one = _mm512_maskz_loadu_epi16(slot < last ? here(e) : 0, v + e);
          const __m512i other = _mm512_maskz_loadu_epi16(slot + 1 < last ? here(e) : 0, v + stride + e);
          _mm512_store_si512(room.pairs[e / 32][0][i], _mm512_unpacklo_epi16(one, other));           // e 0-3, 8-11 ...
          _mm512_store_si512(room.pairs[e / 32][1][i], _mm512_unpackhi_epi16(one, other));           // e 4-7, 12-15 ...
        }
        ask(v, 2 * PE / 32);
      }
      at::BFloat16* to = room.v.data() + (s - at) * PE;
      for (int64_t e = 0; e < E; e += 32, to += 32 * STEP)
        turn(room.pairs[e / 32][0], 64, to, 8 * 64), turn(room.pairs[e / 32][1], 64, to + 4 * STEP, 8 * 64);
    }
  }

  // Scores of slots begin ... end, whole tiles; what lies at `last` and behind is not read. fresh: keys are read for the first time.
  void score(const Columns& c, int64_t begin, int64_t end, int64_t last, bool fresh) {
    const at::BFloat16* const q = room.q.data() + (&c - room.columns.data()) * PE * TILE;
    const int64_t stride = a.k_strides[2];
    for (int64_t s = begin; s < end; s += STEP) {
      const at::BFloat16* const k = keys + s * stride;
      const bool direct = E == PE && s + STEP <= last;
      if (!direct) pad(k, stride, 0, last - s, STEP);
      const at::BFloat16* const tile = direct ? k : room.rows;
      const int64_t row = direct ? stride : PE;
      asm volatile("" : : : "memory");
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t e = 0; e < PE; e += 32) {
        _tile_loadd(4, q + e * TILE, 64);
        ask(k + e * STEP, fresh ? 16 : 0);
        _tile_loadd(5, tile + e, 2 * row);
        _tile_dpbf16ps(0, 5, 4);
        ask(k + (e + 16) * STEP, fresh ? 16 : 0);
        _tile_loadd(6, tile + TILE * row + e, 2 * row);
        _tile_dpbf16ps(1, 6, 4);
      }
      floats* const scores = room.scores + s % BLOCK;
      _tile_stored(0, scores, 64);
      _tile_stored(1, scores + TILE, 64);
      asm volatile("" : : : "memory");
    }
  }

  // Whether all queries see slots begin ... end; else `shown` says who does.
  bool all_see(const Columns& c, int64_t begin, int64_t end) {
    const int64_t from = c.from / G, to = (c.from + c.count - 1) / G;
    bool all = end <= a.S;
    for (int64_t t = from; t <= to && all; t++)
      for (int64_t s = begin; s < end; s += LANES)
        all &= !_mm_cmpeq_epi8_mask(read<__m128i>(mask + t * a.mask_strides[1] + s), __m128i{});
    if (all) return true;
    std::fill_n(room.shown + begin % BLOCK, end - begin, 0);
    for (int64_t t = from; t <= to; t++) {
      const int64_t low = std::max<int64_t>(0, t * G - c.from), high = t == to ? TILE : (t + 1) * G - c.from;
      const uint16_t lanes = (1u << high) - (1u << low);
      for (int64_t s = begin; s < end; s += STEP) {
        const __mmask32 there = _bzhi_u32(~0u, std::clamp<int64_t>(a.S - s, 0, STEP));
        const __m256i they = _mm256_maskz_loadu_epi8(there, mask + t * a.mask_strides[1] + s);
        uint16_t* const shown = room.shown + s % BLOCK;
        write(shown, _mm512_or_si512(read<__m512i>(shown), _mm512_maskz_set1_epi16(_mm256_test_epi8_mask(they, they), lanes)));
      }
    }
    return false;
  }

  // Scores of slots begin ... end -> p.
  template <bool all> void soften(Columns& c, int64_t begin, int64_t end, float* y) {
    floats* const scores = room.scores + begin % BLOCK;
    const uint16_t* const shown = room.shown + begin % BLOCK;
    const int64_t n = end - begin;
    const bool made = a.cap || a.scale < 0;     // what they are before they are softened; else a difference is scaled, not each
    for (int64_t s = 0; made && s < n; s++) scores[s] = a.cap ? soft_cap(scores[s] * float(a.scale), a.cap) : scores[s] * float(a.scale);
    const float factor = made ? 1 : a.scale;
    const __m512 in_twos = _mm512_set1_ps(factor * 1.44269504f), never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const auto seen = [&](int64_t s, __m512 x) { return all ? x : _mm512_mask_mov_ps(never, shown[s], x); };
    __m512 largest[4];                          // which do not wait for each other
    std::fill_n(largest, 4, (__m512)c.most);
    for (int64_t s = 0; s < n; s += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) largest[i] = _mm512_max_ps(seen(s + i, (__m512)scores[s + i]), largest[i]);
    const __m512 most = _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3]));
    if (_mm512_cmp_ps_mask(most, (__m512)c.most, _CMP_NEQ_UQ)) {
      const floats shrink = exponential((c.most - (floats)most) * factor);          // exactly 1 where nothing has changed
      c.most = (floats)most, c.total *= shrink;
      for (int64_t e = 0; e < PE; e++) write(y + e * TILE, read<floats>(y + e * TILE) * shrink);
    }
    floats total = {};
    for (int64_t s = 0; s < n; s += 2) {
      const auto p = [&](int64_t s) { return power_of_two((floats)seen(s, _mm512_mul_ps((__m512)(scores[s] - (floats)most), in_twos))); };
      const floats one = p(s), other = p(s + 1);
      total += one + other;
      write(room.p + s * TILE, join(one, other));
    }
    c.total += total;
  }

  // y += values of slots begin ... end times p
  void weigh(int64_t begin, int64_t end, float* y) {
    asm volatile("" : : : "memory");
    for (int64_t e = 0; e < PE; e += 4 * TILE, y += 4 * TILE * TILE) {
      const bool four = e + 4 * TILE <= PE;     // else two
      _tile_loadd(0, y, 64);
      _tile_loadd(1, y + TILE * TILE, 64);
      if (four) {
        _tile_loadd(2, y + 2 * TILE * TILE, 64);
        _tile_loadd(3, y + 3 * TILE * TILE, 64);
      }
      for (int64_t s = begin; s < end; s += STEP) {
        const at::BFloat16* const v = room.v.data() + s % BLOCK * PE + e * STEP;
        _tile_loadd(4, room.p + (s - begin) * TILE, 64);
        _tile_loadd(5, v, 64);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, v + TILE * STEP, 64);
        _tile_dpbf16ps(1, 6, 4);
        if (!four) continue;
        _tile_loadd(7, v + 2 * TILE * STEP, 64);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, v + 3 * TILE * STEP, 64);
        _tile_dpbf16ps(3, 5, 4);
      }
      _tile_stored(0, y, 64);
      _tile_stored(1, y + TILE * TILE, 64);
      if (four) {
        _tile_stored(2, y + 2 * TILE * TILE, 64);
        _tile_stored(3, y + 3 * TILE * TILE, 64);
      }
    }
    asm volatile("" : : : "memory");
  }

  void finish(const Columns& c, int64_t b, int64_t kv, float* y) {
    const floats share = 1 / c.total;
    for (int64_t e = 0; e < E; e += TILE, y += TILE * TILE) {
      turn(y, 64, room.scores, 4 * 64);
      for (int64_t i = 0; i < c.count; i++) {
        const int64_t t = (c.from + i) / G, head = kv * G + (c.from + i) % G;
        write((at::BFloat16*)a.out + ((b * a.T + t) * a.H + head) * E + e, _mm512_cvtneps_pbh((__m512)(room.scores[i] * share[i])));
      }
    }
  }

  void attend(int64_t b, int64_t kv, int64_t from, int64_t to) {
    keys = (const at::BFloat16*)a.k + b * a.k_strides[0] + kv * a.k_strides[1];
    values = (const at::BFloat16*)a.v + b * a.v_strides[0] + kv * a.v_strides[1];
    mask = a.mask + b * a.mask_strides[0];
    const int64_t n = (to - from + TILE - 1) / TILE;
    room.columns.resize(n), room.q.resize(n * PE * TILE), room.v.resize(BLOCK * PE), room.y.assign(n * PE * TILE, 0);
    int64_t first = a.S, last = 0;
    for (Columns& c : room.columns) {
      start(c, b, kv, from + (&c - room.columns.data()) * TILE, to);
      first = std::min(first, c.first), last = std::max(last, c.last);
    }
    for (int64_t at = first / BLOCK * BLOCK; at < last; at += BLOCK) {
      turn_values(at, last);
      bool fresh = true;
      for (Columns& c : room.columns) {
        const int64_t begin = std::max(at, c.first / STEP * STEP), end = std::min(at + BLOCK, (c.last + STEP - 1) / STEP * STEP);
        if (begin >= end) continue;
        float* const y = room.y.data() + (&c - room.columns.data()) * PE * TILE;
        score(c, begin, end, last, fresh);
        all_see(c, begin, end) ? soften<true>(c, begin, end, y) : soften<false>(c, begin, end, y);
        weigh(begin, end, y);
        fresh = false;
      }
    }
    for (const Columns& c : room.columns) finish(c, b, kv, room.y.data() + (&c - room.columns.data()) * PE * TILE);
  }

 public:
  explicit AttentionByTiles(const Attention& a) : a(a), G(a.H / a.K), E(a.E), PE((E + 31) / 32 * 32), room(of_thread()) {}

  static void all(const Attention& a, Team* team) {
    const int64_t n = a.H / a.K * a.T, parts = (n + TOGETHER - 1) / TOGETHER;
    share(team, a.B * a.K * parts, 1, [&](int64_t begin, int64_t end) {
      AttentionByTiles attention(a);
      const Tiles shapes(TWO_TILES);
      for (int64_t i = begin; i < end; i++) {
        const int64_t from = i % parts * TOGETHER;
        attention.attend(i / parts / a.K, i / parts % a.K, from, std::min(n, from + TOGETHER));
      }
    });
  }
};

}  // namespace
#endif
