// Products in tiles of 16 rows of 64 bytes: C (16, 16) float32 += A (16, 32) B (32, 16), B with two
// rows next to each other. Four C at a time, of two A and two B. Computed, not measured: a tile of
// W, 1024 bytes, takes part in a product of 16 cycles for each 16 tokens, and a core reads it in
// 175 cycles (14 GB/s, 2.4 GHz), so that memory bounds up to some 175 tokens.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#include "tiles.h"

#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 12)
#define TTT_TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
// GCC 12 takes what its own header leaves open for an oversight.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ttt_fast {

bool is_intel() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

#ifdef TTT_TILES

bool has_tiles() {
  // The system keeps the registers of a thread only for who asked (Linux: arch/x86/xstate).
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool found = __builtin_cpu_supports("amx-bf16") &&
                            __builtin_cpu_supports("avx512bw") &&
                            syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return found;
}

namespace {

constexpr int64_t kBlock16 = 16;    // rows of a tile
constexpr int64_t kDepth = 64;      // rows of W whose columns are put in order at a time
constexpr int64_t kRowBytes = 64;   // of a tile
constexpr int64_t kTile = 256;      // 4-byte elements of a tile
constexpr int64_t kTilesEach = 64;  // to be written that are worth a thread

// All eight registers are tiles of 16 rows of 64 bytes, until _tile_release().
TTT_TILES void configure_tiles() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// Of a tile (16, 16) of floats.
TTT_TILES inline __m512 column(const float* tile, int64_t i) {
  const __m512i rows =
      _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
  return _mm512_i32gather_ps(rows, tile + i, sizeof(float));
}

// One tile of the first 16 or fewer rows of x: as they are, or pairs of a column next to each
// other.
TTT_TILES void write_tile(Matrix<const uint16_t> x, int64_t rows, bool in_pairs, uint32_t* tile) {
  alignas(64) float own[kTile] = {};
  for (int64_t i = 0; i < rows; ++i) std::memcpy(own + i * 16, x.at(i, 0), kRowBytes);
  for (int64_t i = 0; i < kBlock16; ++i) {
    _mm512_storeu_ps(tile + i * 16, in_pairs ? column(own, i) : _mm512_load_ps(own + i * 16));
  }
}

}  // namespace

TiledRows::TiledRows(Matrix<const uint16_t> x, int64_t rows, int64_t n, bool for_columns)
    : rows_(rows),
      n_(n),
      blocks_((rows + 2 * kBlock16 - 1) / (2 * kBlock16) * 2),
      data_(size_t(blocks_ * n / kTileSide * kTile)) {
  const int64_t grain = 1 + kTilesEach / (1 + blocks_);
  parallel_ranges(n / kTileSide, grain, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      for (int64_t first = 0; first < rows; first += kBlock16) {
        uint32_t* const tile = &data_[size_t((k * blocks_ + first / kBlock16) * kTile)];
        write_tile({x.at(first, k * kTileSide), x.stride}, std::min(kBlock16, rows - first),
                   !for_columns, tile);
      }
    }
  });
}

TTT_TILES void tiles_by_rows(const TiledRows& x, Matrix<const uint16_t> w, int64_t rows,
                             int64_t more, Matrix<float> y) {
  configure_tiles();
  const int64_t depth = x.n() / kTileSide, stride = w.stride * int64_t(sizeof(uint16_t));
  alignas(64) float sums[4][kTile];
  for (int64_t r = 0; r < rows; r += kTileSide) {
    const int64_t next = r + kTileSide;
    Ahead<uint16_t> ahead({w.at(next, 0), w.stride}, std::min(kTileSide, rows + more - next), x.n(),
                          depth * x.pairs());
    for (int64_t b = 0; b < 2 * x.pairs(); b += 2) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < depth; ++k) {
        ahead.fetch();
        _tile_loadd(4, w.at(r, k * kTileSide), stride);
        _tile_loadd(5, w.at(r + kBlock16, k * kTileSide), stride);
        _tile_loadd(6, x.tile(b, k), kRowBytes);
        _tile_loadd(7, x.tile(b + 1, k), kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums[0], kRowBytes);
      _tile_stored(1, sums[1], kRowBytes);
      _tile_stored(2, sums[2], kRowBytes);
      _tile_stored(3, sums[3], kRowBytes);
      const int64_t first = b * kBlock16, count = std::min(kTileSide, x.rows() - first);
      for (int64_t i = 0; i < count; ++i) {
        const float* const tile = sums[i / kBlock16 * 2];
        _mm512_storeu_ps(y.at(first + i, r), column(tile, i % kBlock16));
        _mm512_storeu_ps(y.at(first + i, r + kBlock16), column(tile + kTile, i % kBlock16));
      }
    }
  }
  _tile_release();
}

namespace {

// Rows of W, of 32 columns two tiles for every 32 rows: two rows next to each other, of columns
// 8 i + [0, 4) in the first tile, 8 i + [4, 8) in the second.
TTT_TILES inline void interleave(Matrix<const uint16_t> w, int64_t rows, int64_t columns,
                                 uint16_t* to, Ahead<uint16_t>& ahead) {
  for (int64_t i = 0; i < rows; i += 2) {
    const uint16_t *const even = w.at(i, 0), *const odd = w.at(i + 1, 0);
    uint16_t* row = to + i / kTileSide * kTileSide * columns + i % kTileSide * 16;
    for (int64_t c = 0; c < columns; c += kTileSide, row += 4 * kTile) {
      ahead.fetch();
      const __m512i a = _mm512_loadu_si512(even + c), b = _mm512_loadu_si512(odd + c);
      _mm512_store_si512(row, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(row + 2 * kTile, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// A row of two such tiles, its 32 columns in order.
TTT_TILES inline void restore_order(const float* first, const float* second, float* to) {
  const __m512 low = _mm512_load_ps(first), high = _mm512_load_ps(second);
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(low, left, high));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(low, right, high));
}

}  // namespace

TTT_TILES void tiles_by_columns(const TiledRows& x, Matrix<const uint16_t> w, int64_t columns,
                                Matrix<float> y) {
  configure_tiles();
  // Sums of all columns, as tiles, while the rows of W go by, and kDepth of these.
  const int64_t numel = columns / kTileSide * x.pairs() * 4 * kTile;
  std::vector<float> memory(size_t(numel + kDepth * columns / 2 + 16));
  float* const sums = reinterpret_cast<float*>((uintptr_t(memory.data()) + 63) / 64 * 64);
  uint16_t* const part = reinterpret_cast<uint16_t*>(sums + numel);
  for (int64_t from = 0; from < x.n(); from += kDepth) {
    const int64_t depth = std::min(kDepth, x.n() - from), next = from + depth;
    Ahead<uint16_t> ahead({w.at(next, 0), w.stride}, std::min(kDepth, x.n() - next), columns,
                          columns / kTileSide * depth / 2);
    interleave({w.at(from, 0), w.stride}, depth, columns, part, ahead);
    for (int64_t c = 0; c < columns; c += kTileSide) {
      for (int64_t b = 0; b < 2 * x.pairs(); b += 2) {
        float* const sum = sums + (c / kTileSide * x.pairs() + b / 2) * 4 * kTile;
        if (from == 0) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          _tile_loadd(0, sum, kRowBytes);
          _tile_loadd(1, sum + kTile, kRowBytes);
          _tile_loadd(2, sum + 2 * kTile, kRowBytes);
          _tile_loadd(3, sum + 3 * kTile, kRowBytes);
        }
        for (int64_t k = 0; k < depth; k += kTileSide) {
          const uint16_t* const two = part + k * columns + c * kTileSide;
          _tile_loadd(4, x.tile(b, (from + k) / kTileSide), kRowBytes);
          _tile_loadd(5, x.tile(b + 1, (from + k) / kTileSide), kRowBytes);
          _tile_loadd(6, two, kRowBytes);
          _tile_loadd(7, two + 2 * kTile, kRowBytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sum, kRowBytes);
        _tile_stored(1, sum + kTile, kRowBytes);
        _tile_stored(2, sum + 2 * kTile, kRowBytes);
        _tile_stored(3, sum + 3 * kTile, kRowBytes);
        if (next < x.n()) continue;
        const int64_t first = b * kBlock16, count = std::min(kTileSide, x.rows() - first);
        for (int64_t i = 0; i < count; ++i) {
          const float* const row = sum + i / kBlock16 * 2 * kTile + i % kBlock16 * 16;
          restore_order(row, row + kTile, y.at(first + i, c));
        }
      }
    }
  }
  _tile_release();
}

#else

bool has_tiles() { return false; }

TiledRows::TiledRows(Matrix<const uint16_t>, int64_t rows, int64_t n, bool)
    : rows_(rows), n_(n), blocks_(0) {}

void tiles_by_rows(const TiledRows&, Matrix<const uint16_t>, int64_t, int64_t, Matrix<float>) {}

void tiles_by_columns(const TiledRows&, Matrix<const uint16_t>, int64_t, Matrix<float>) {}

#endif

}  // namespace ttt_fast
