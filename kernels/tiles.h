// AMX's tiles, 16 rows of 64 bytes each, which multiply each other eight times as fast as vectors do.
//
// What it is: whether there are tiles, their shapes, and a step of a product: 32 inputs of up to 32 rows times 32 outputs in bfloat16,
// 2 tiles of x, 2 of weights and 4 of sums, which are all there are; or 32 of up to 16 rows in bytes, whose sums are those of that
// step alone. What it is not: a product; panel_tiles.h and attention.cpp make some of it.
#pragma once
#include "vectors.h"

#if defined(BFLOAT16_DOT) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

constexpr int64_t TILE = 16;          // a tile's rows
constexpr int64_t TWO_TILES = 2 * TILE;

// The tiles' shapes, of this thread while it lives. Then they are as before: another library may have set its own once for all.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 1, rest[15] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } before;

 public:
  // Linux lets a program use them that asks for it. CPU_KERNELS=vectors: nobody wants them.
  static bool given() {
    static const bool yes = [] {
      const char* wish = std::getenv("CPU_KERNELS");
      return !(wish && std::string_view(wish) == "vectors") &&
             syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' data */) == 0;
    }();
    return yes;
  }
  // rows: of x and of sums, at most 32; in tiles 4, 0 and 1, and the rest of them in 5, 2 and 3. of_bytes: at most 16, and in
  // 5, 2 and 3 the next step's; x takes 32 bytes, and 8 quads of weights are 6 and 7
  explicit Tiles(int64_t rows, bool of_bytes = false) {
    Config ours;
    std::fill_n(ours.bytes, 8, 64), std::fill_n(ours.rows, 8, TILE);
    for (int t : {0, 1, 4}) ours.rows[t] = std::min(rows, TILE);
    for (int t : {2, 3, 5}) ours.rows[t] = of_bytes ? rows : std::clamp<int64_t>(rows - TILE, 1, TILE);
    for (int t : {4, 5}) ours.bytes[t] = of_bytes ? 32 : 64;
    for (int t : {6, 7}) ours.rows[t] = of_bytes ? TILE / 2 : TILE;
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before)); }
  Tiles(const Tiles&) = delete;
};

// Sums [rows][32], `stride` apart: what a product starts from, zeros or y, and where it ends. both: there are more than 16 rows. The
// compiler does not know what memory tiles read and write; so nothing that they read may be written between these two.
template <bool both> inline void begin_sums(const float* y, int64_t stride, bool add) {
  asm volatile("" : : : "memory");
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, y, stride * 4);
  _tile_loadd(1, y + TILE, stride * 4);
  if (!both) return;
  _tile_loadd(2, y + TILE * stride, stride * 4);
  _tile_loadd(3, y + TILE * stride + TILE, stride * 4);
}

template <bool both> inline void end_sums(float* y, int64_t stride) {
  _tile_stored(0, y, stride * 4);
  _tile_stored(1, y + TILE, stride * 4);
  if (both) {
    _tile_stored(2, y + TILE * stride, stride * 4);
    _tile_stored(3, y + TILE * stride + TILE, stride * 4);
  }
  asm volatile("" : : : "memory");
}

// Rows x of 16 pairs of inputs, x_row bytes apart, times 16 pairs of 16 outputs w, w_row bytes apart, and the next 16 outputs.
// Meanwhile, MEANWHILE times, something is asked of the memory: little at a time, else tiles wait behind it.
constexpr int MEANWHILE = 4;
template <bool both, class F>
inline void add_products(const char* x, int64_t x_row, const char* w, int64_t w_row, int64_t w_next, F meanwhile) {
  meanwhile();
  _tile_loadd(6, w, w_row);
  meanwhile();
  _tile_loadd(4, x, x_row);
  meanwhile();
  _tile_loadd(7, w + w_next, w_row);
  meanwhile();
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (!both) return;
  _tile_loadd(5, x + TILE * x_row, x_row);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Signed bytes x [rows][32] times unsigned w [2][8 quads][16 outputs][4]. Two of these are under way at once, EVEN and not: what was
// begun is stored after the next one has been, or it would be waited for. The same about memory.
template <bool EVEN> inline void begin_dots(const int8_t* x, const uint8_t (&w)[2][TILE * 32]) {
  asm volatile("" : : : "memory");
  _tile_loadd(6, w[0], 64);
  _tile_loadd(7, w[1], 64);
  if constexpr (EVEN) {
    _tile_loadd(4, x, 32);
    _tile_zero(0);
    _tile_zero(1);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  } else {
    _tile_loadd(5, x, 32);
    _tile_zero(2);
    _tile_zero(3);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  asm volatile("" : : : "memory");
}

template <bool EVEN> inline void end_dots(int32_t (&dots)[2][TILE][LANES]) {
  if constexpr (EVEN) {
    _tile_stored(0, dots[0], 64);
    _tile_stored(1, dots[1], 64);
  } else {
    _tile_stored(2, dots[0], 64);
    _tile_stored(3, dots[1], 64);
  }
  asm volatile("" : : : "memory");
}
#endif
