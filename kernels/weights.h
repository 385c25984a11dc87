// How packed weights lie, and what they mean.
//
// What it is: the layout, the kinds of weights, a panel of them with its scales, and `unpack`, by which many rows meet them as
// bfloat16. `pack` in linear.cpp and pack_scaled in cpu.py write what is read here. What it is not: a product; panel.h is what to
// read next.
//
// The layout. 32 outputs make a panel, K inputs long. Inputs come in units of 8, four pairs (2j, 2j+1) each. A pair
// of 16 outputs is one 64-byte vector of bfloat16 pairs, the operand of AVX-512's dot product of pairs, so that no
// sum ever runs across a vector:
//     bfloat16   [panel][unit][half][pair][16 outputs][2]       512 bytes a unit
//     int8       [panel][unit][half][2 quads][16 outputs][4]    256 bytes a unit: a byte less 128 is the value
//     int4       [panel][unit][half][16 outputs][2]             128 bytes a unit: 16-bit lanes, a nibble a pair
// A quad is four inputs, 0 4 1 5 or 2 6 3 7 of a unit: the operand of the dot product of bytes, which int4's low and
// high nibbles are as they lie. For it, x in bfloat16 is rounded to int8, 32 inputs by a scale of their own; what is lost is
// measured in the README.
// A weight is (value + offset) * scale, where value is the int8, or the nibble less 8. Scales and offsets are
// [panel][group][32]. But of 4 bits each group begins with a head of 64 bytes: 32 + 16 bytes of scales, in two parts the 12 bits
// by which a bfloat16's are more than the weight's `least`, and 16 of offsets -7 ... 8. That is one stream, which the processor
// itself reads ahead a seventh faster than three. Scales of another kind are beside it; with offsets that do not fit there are
// no heads. (Floats of 4 bits have no offsets.)
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "calls.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 32, UNIT = 8;
constexpr int64_t BLOCK = 32;                   // inputs of x that share a scale
constexpr int64_t HEAD = 64;                    // bytes of a group's scales and offsets, where they lie before its weights
constexpr int64_t FP4 = 40;                     // `bits` of 4-bit floats
constexpr int64_t FAR = 4096;                   // bytes, a page, that are asked for before they are needed;
constexpr int64_t NEAR = 1024;                  // and where weights are unpacked

// ---- weights: pair j of a unit, for 16 outputs --------------------------------------------------------------------

struct Pair { floats even, odd; };

#ifdef BFLOAT16_DOT
// Pair j of a unit of 4 bits by a table of 16 numbers, which is there twice: an index has 5 bits.
inline __m512bh look_up_pairs(const uint8_t* p, int j, const uint16_t (&table)[32]) {
  return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(p), 4 * j), _mm512_load_si512(table));
}
#endif

struct Bfloat16 {
  static constexpr int HALF = 256;              // bytes of a unit of 16 outputs
  static inline Pair pair(const uint8_t* p, int j) {
    words w = read<words>(p + 64 * j);
    return {(floats)(w << 16), (floats)(w & 0xffff0000u)};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) { return (__m512bh)_mm512_loadu_si512(p + 64 * j); }
#endif
};

struct Int8 {
  static constexpr int HALF = 128, BIAS = 128;  // BIAS: what the quads' unsigned bytes are too large by
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p + 64 * (j & 1)) >> (j & 2 ? 8 : 0);
#ifdef BFLOAT16_DOT                              // 2^23 and more: a byte is a float's last one
    const auto value = [](words w) { return (floats)((w & 255u) | 0x4b000000u) - (0x1p23f + 128); };
#else
    const auto value = [](words w) { return __builtin_convertvector((ints)(w & 255u) - 128, floats); };
#endif
    return {value(w), value(w >> 16)};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {      // an int8 is exact in bfloat16: the float's upper half
    const Pair f = pair(p, j);
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32((__m512i)f.even, 16), (__m512i)f.odd);
  }
#endif
  // What unpacking takes: of words whose lower halves hold a number of pair j each, these numbers, but MORE[j] too high. Their bits,
  // where they are, become the lower ones of a float whose upper ones say a power of two: no shift, no table.
  static constexpr float MORE[4] = {0x1p23f + 128, 0x1p23f + 128, 0x1p15f + 128, 0x1p15f + 128};
  static inline floats high(words w, int j) { return (floats)(j < 2 ? (w & 0xffu) | 0x4b000000u : (w & 0xff00u) | 0x47000000u); }
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) { return _mm512_loadu_si512(p + 64 * q); }
#endif
};

struct Int4 {
  static constexpr int HALF = 64, BIAS = 8;
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p);
#ifdef BFLOAT16_DOT                              // by a table: its index is the lower 4 bits
    const floats table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const auto value = [&](words w) { return (floats)_mm512_permutexvar_ps((__m512i)w, (__m512)table); };
#else
    const auto value = [](words w) { return __builtin_convertvector((ints)(w & 15u) - 8, floats); };
#endif
    return {value(w >> (4 * j)), value(w >> (16 + 4 * j))};
  }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {      // -8 ... 7
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
        0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040,
        0x4080, 0x40A0, 0x40C0, 0x40E0};
    return look_up_pairs(p, j, TABLE);
  }
#endif
  static constexpr float MORE[4] = {0x1p15f + 8, 0x1p11f + 8, 0x1p15f + 8, 0x1p11f + 8};
  static inline floats high(words w, int j) {
    w = j < 2 ? w << 8 : w;
    return (floats)(j % 2 ? (w & 0xf000u) | 0x45000000u : (w & 0xf00u) | 0x47000000u);
  }
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) {
    const __m512i w = _mm512_loadu_si512(p);
#ifdef __GFNI__                                  // bits 4 to 7 of each byte, in one instruction
    if (q) return _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(0x1020408000000000), 0);
#endif
    return _mm512_and_si512(q ? _mm512_srli_epi16(w, 4) : w, _mm512_set1_epi8(15));
  }
#endif
};

// Floats of 4 bits: sign, two bits of exponent, one of mantissa; twice their value, which is a whole number.
struct Fp4 {
  static constexpr int HALF = 64, BIAS = 12;
  static inline floats value(words w) {         // of the lower 4 bits
    static constexpr float TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#ifdef BFLOAT16_DOT
    return (floats)_mm512_permutexvar_ps((__m512i)w, _mm512_loadu_ps(TABLE));
#else
    floats f;
    for (int i = 0; i < 16; i++) f[i] = TABLE[w[i] & 15];
    return f;
#endif
  }
  static inline Pair pair(const uint8_t* p, int j) {
    const words w = read<words>(p);
    return {value(w >> (4 * j)), value(w >> (16 + 4 * j))};
  }
  static constexpr float MORE[4] = {};
  static inline floats high(words w, int j) { return value(w >> (4 * j)); }
#ifdef BFLOAT16_DOT
  static inline __m512bh packed(const uint8_t* p, int j) {
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, 0x0000, 0xBF80, 0xC000, 0xC040, 0xC080, 0xC0C0,
        0xC100, 0xC140, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40C0, 0x4100, 0x4140, 0x0000, 0xBF80, 0xC000, 0xC040,
        0xC080, 0xC0C0, 0xC100, 0xC140};
    return look_up_pairs(p, j, TABLE);
  }
#endif
#ifdef BYTE_DOT
  static inline __m512i quad(const uint8_t* p, int q) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    return _mm512_shuffle_epi8(table, Int4::quad(p, q));
  }
#endif
};

// ---- a panel ------------------------------------------------------------------------------------------------------

// Of a block of x as int8: what they were divided by, and what their sum of products starts from, since weights' bytes are
// too large; where weights have offsets, the sum of x itself, its lower 16 bits.
struct Rounding { float scale; int32_t start; };

// A panel: its weights, and what they are multiplied with: heads, or [groups][32] each scales in bfloat16 or float (null: 1)
// and offsets (null: 0). With x's sums by group and, of bytes, how its blocks were rounded, [groups or blocks][rows].
struct alignas(64) Groups {
  int64_t count, units, all;          // groups, units in each, units in all of them: the last may be shorter
  const uint8_t* w;                   // the first group's
  int64_t stride, nbytes;             // from one group's weights to the next one's, or from head to head; a panel's
  const uint8_t* heads;               // the first one, or null
  const Rounding* rounding;
  uint32_t least;                     // the smallest scale of a head, as a float's bits
  const at::BFloat16* scale16;
  const float* scale;
  const int8_t* offset;
  const float* x_sum;
  int64_t ahead;                      // groups that lie as far ahead as the weights that are asked for

  // To the next panel. What that takes is at hand, in the first cache, through which all that is multiplied passes: had it to
  // be fetched, behind the weights that are under way, nothing would be read meanwhile. (A twentieth of int4's time.)
  inline void next(int64_t n = 1) {
    w += n * nbytes;
    if (heads) heads += n * nbytes;
    if (scale16) scale16 += n * count * PANEL;
    if (scale) scale += n * count * PANEL;
    if (offset) offset += n * count * PANEL;
  }
  // Unit u's weights.
  template <class W> inline const uint8_t* unit(int64_t u) const { return w + u / units * stride + u % units * 2 * W::HALF; }
  inline floats scales(int64_t i, int half) const {
    const int64_t at = i * PANEL + half * 16;
    if (scale16) return load16(scale16 + at);
    if (scale) return read<floats>(scale + at);
    if (!heads) return floats{} + 1.0f;
    const uint8_t* head = heads + i * stride;
    const words low = load_bytes(head + 16 * half) << 16, high = load_bytes(head + 32) << (half ? 20 : 24) & 0xf000000u;
    return (floats)((low | high) + least);
  }
  inline bool offsets() const { return heads || offset; }
  inline ints offsets(int64_t i, int half) const {
    if (!heads) return to_int(read<bytes>(offset + i * PANEL + half * 16));
    return (ints)(load_bytes(heads + i * stride + 48) >> 4 * half & 15u) - 7;
  }
};

// A weight's first panel.
template <class W> Groups first_panel(const Matrix& m) {
  const int64_t units = (m.K + UNIT - 1) / UNIT, group = m.scales && m.group ? m.group / UNIT : units;
  const int64_t count = (units + group - 1) / group, head = m.least < 0 ? 0 : HEAD, stride = group * 2 * W::HALF + head;
  const uint8_t* w = (const uint8_t*)m.w;
  return {.count = count, .units = group, .all = units, .w = w + head, .stride = stride,
          .nbytes = units * 2 * W::HALF + count * head, .heads = head ? w : nullptr, .least = uint32_t(m.least) << 16,
          .scale16 = m.scale_type == (int64_t)at::kBFloat16 ? (const at::BFloat16*)m.scales : nullptr,
          .scale = m.scale_type == (int64_t)at::kFloat ? (const float*)m.scales : nullptr, .offset = (const int8_t*)m.offsets,
          .ahead = std::max<int64_t>(1, FAR / stride)};
}

// Where scales are 16-bit floats of the other kind: those of a panel, as 32-bit ones, the i-th of n panels' in `room`.
inline void widen_scales(const Matrix& m, int64_t panel, Groups& g, Lines<float>& room, int64_t i = 0, int64_t n = 1) {
  if (!m.scales || m.scale_type != (int64_t)at::kHalf) return;
  const int64_t each = g.count * PANEL;
  room.resize(n * each);
  g.scale = std::copy_n((const at::Half*)m.scales + panel * each, each, room.data() + i * each) - each;
}

// ---- weights as bfloat16, for many rows -----------------------------------------------------------------------------

#ifdef BFLOAT16_DOT
// Numbers of outputs 0 to 7, or of 8 to 15 (`part` 1), each twice.
inline floats twice(floats v, int part) {
  const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (floats)_mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(8 * part)), (__m512)v);
}

// Units of a panel as pairs of bfloat16, scaled: what the dequantized weight would be. plain: of bfloat16 and int8, without scales.
template <class W, bool plain = false>
void unpack(int64_t first, int64_t units, const Groups& g, at::BFloat16* out) {
  constexpr int LINES = W::HALF / 64;
  for (int64_t u = first, last; u < first + units; u = last) {
    const int64_t i = u / g.units;
    last = std::min((i + 1) * g.units, first + units);
    floats scale[2][2] = {}, offset[2][2] = {};
#pragma GCC unroll 4
    for (int at = 0; at < 4 && !plain; at++) {
      scale[at / 2][at % 2] = twice(g.scales(i, at / 2), at % 2);
      if (W::HALF == 64 || g.offsets()) offset[at / 2][at % 2] = twice(__builtin_convertvector(g.offsets(i, at / 2), floats), at % 2);
    }
    const auto all = [&](auto exact) {
      const uint8_t* unit = g.unit<W>(u);
      for (int64_t n = u; n < last; n++) {
#pragma GCC unroll 8
        for (int line = 0; line < 2 * LINES; line++) __builtin_prefetch(unit + NEAR + 64 * line);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++, unit += W::HALF) {
          words w[LINES][2];
          for (int at = 0; at < 2 * LINES && !plain; at++) w[at / 2][at % 2] = (words)_mm512_cvtepu16_epi32(read<__m256i>(unit + 32 * at));
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++, out += 32) {
            if constexpr (plain) {
              _mm512_storeu_si512(out, (__m512i)W::packed(unit, j));
            } else {
              const auto scaled = [&](int part) {
                const floats v = W::high(w[j % LINES][part], j), by = scale[half][part], less = W::MORE[j] - offset[half][part];
                return exact ? _mm512_fmsub_ps((__m512)v, (__m512)by, (__m512)(less * by)) : (__m512)((v - less) * by);
              };
              _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(scaled(1), scaled(0)));
            }
          }
        }
      }
    };
    // a scale of 8 bits times numbers of 16 is exact, before what is too much comes off and after
    W::HALF == 64 && !g.scale ? all(std::true_type()) : all(std::false_type());
  }
}
#endif

}  // namespace
