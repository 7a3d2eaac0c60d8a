// The processor's matrix registers (Intel AMX), where the compiler knows them: TTT_TILES is
// defined. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
// chapter 18.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 12)
#define TTT_TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
#define TTT_TILES_INLINE TTT_TILES __attribute__((always_inline)) inline
// GCC 12 takes what its own header leaves open for an oversight.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace ttt_fast {

constexpr int64_t kBlock16 = 16;   // rows of a tile
constexpr int64_t kRowBytes = 64;  // of a tile
constexpr int64_t kTile = 256;     // 4-byte elements of a tile

// Before tiles are loaded from what was just written: the loads of GCC 12 do not say that they
// read.
inline void finish_writes() { asm volatile("" : : : "memory"); }

// All eight registers are tiles of so many rows of 64 bytes, until _tile_release(); but for those
// from `whole` on, which have 16.
TTT_TILES inline void configure_tiles(int64_t rows = kBlock16, int whole = 8) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.rows[i] = uint8_t(i < whole ? rows : kBlock16);
  // GCC 12 believes that the instruction reads 8 bytes, and leaves out what else was written.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The columns of a tile (16, 16) of floats.
TTT_TILES_INLINE void transpose(const float* tile, __m512* columns) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512 even = _mm512_loadu_ps(tile + i * 16);
    const __m512 odd = _mm512_loadu_ps(tile + (i + 1) * 16);
    a[i] = _mm512_unpacklo_ps(even, odd), a[i + 1] = _mm512_unpackhi_ps(even, odd);
  }
  // Afterwards each 16 bytes of b[i + j] are of one column and of rows i to i + 3.
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // of 16 bytes
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[j + 4], kEven);
    const __m512 odd = _mm512_shuffle_f32x4(b[j], b[j + 4], kOdd);
    const __m512 next_even = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], kEven);
    const __m512 next_odd = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], kOdd);
    columns[j] = _mm512_shuffle_f32x4(even, next_even, kEven);
    columns[j + 4] = _mm512_shuffle_f32x4(odd, next_odd, kEven);
    columns[j + 8] = _mm512_shuffle_f32x4(even, next_even, kOdd);
    columns[j + 12] = _mm512_shuffle_f32x4(odd, next_odd, kOdd);
  }
}

// [y +=] sums of four tiles, in two pairs: 16 rows of W and the next 16 with a token in each
// column. y has a row for each token, of which there are at most `tokens`.
TTT_TILES inline void store_transposed(const float* sums, int64_t tokens, Matrix<float> y,
                                       bool add) {
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t first = i / 2 * kBlock16, count = std::min(kBlock16, tokens - first);
    if (count <= 0) break;
    __m512 columns[kBlock16];
    transpose(sums + i * kTile, columns);
    for (int64_t t = 0; t < count; ++t) {
      float* const to = y.at(first + t, i % 2 * kBlock16);
      _mm512_storeu_ps(to, add ? columns[t] + _mm512_loadu_ps(to) : columns[t]);
    }
  }
}

}  // namespace ttt_fast

#endif
