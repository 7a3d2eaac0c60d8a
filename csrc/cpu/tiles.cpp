// Products in tiles of 16 rows of 64 bytes: C (16, 16) float32 += A (16, 32) B (32, 16), B with two
// rows next to each other: an element of 4 bytes of A has two numbers that meet two of B.
//
// x W' takes W as A, as it lies, four C at a time of two A and two B. Computed, not measured: a
// tile of W, 1024 bytes, takes part in a product of 16 cycles for each 16 tokens, and a core reads
// it in 175 cycles (14 GB/s, 2.4 GHz), so that memory bounds up to some 175 tokens.
//
// x W takes W as B, as it lies, too: its two numbers are of one row and of two columns, of which
// (x, 0) leaves the first and (0, x) the second. That is twice the products, but no W in another
// order: when rows were brought in pairs first, 1536 x 576 took 1.5 times as long at 20 tokens.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#include "tiles.h"

#include <cstring>

#include "amx.h"

#if defined(TTT_TILES)
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

constexpr int64_t kDepth = 128;     // rows of W at a time, times blocks of tokens (x W)
constexpr int64_t kTilesEach = 64;  // to be written that are worth a thread

// One tile of the first 16 or fewer rows of x, pairs of a column next to each other.
TTT_TILES void write_tile(Matrix<const uint16_t> x, int64_t rows, uint32_t* tile) {
  alignas(64) float own[kTile] = {};
  for (int64_t i = 0; i < rows; ++i) std::memcpy(own + i * 16, x.at(i, 0), kRowBytes);
  __m512 columns[kBlock16];
  transpose(own, columns);
  for (int64_t i = 0; i < kBlock16; ++i) _mm512_storeu_ps(tile + i * 16, columns[i]);
}

}  // namespace

TiledRows::TiledRows(Matrix<const uint16_t> x, int64_t rows, int64_t n)
    : rows_(rows),
      n_(n),
      blocks_(blocks_of(rows, 2 * kBlock16) * 2),
      data_(blocks_ * n / kTileSide * kTile) {
  const int64_t grain = 1 + kTilesEach / (1 + blocks_);
  parallel_ranges(n / kTileSide, grain, [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      for (int64_t first = 0; first < rows; first += kBlock16) {
        uint32_t* const tile = data_.data() + (k * blocks_ + first / kBlock16) * kTile;
        write_tile({x.at(first, k * kTileSide), x.stride}, std::min(kBlock16, rows - first), tile);
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
      const int64_t first = b * kBlock16;
      store_transposed(sums[0], x.rows() - first, {y.at(first, r), y.stride}, false);
    }
  }
  _tile_release();
}

namespace {

// 16 columns of some rows of x, as (x, 0) and in a second tile as (0, x).
TTT_TILES inline void write_pairs(Matrix<const uint16_t> x, int64_t rows, uint32_t* tiles) {
  for (int64_t i = 0; i < rows; ++i) {
    const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.at(i, 0)));
    const __m512i first = _mm512_cvtepu16_epi32(row);
    _mm512_storeu_si512(tiles + i * 16, first);
    _mm512_storeu_si512(tiles + kTile + i * 16, _mm512_slli_epi32(first, 16));
  }
}

// sums [+]= x w: of one or two blocks of tokens, the even and the odd of 32 columns. The tiles of x
// for 16 rows of w are followed by those for the next after `step` elements.
template <int kBlocks>
TTT_TILES inline void column_tiles(const uint32_t* x, int64_t step, Matrix<const uint16_t> w,
                                   int64_t rows, float* sums, bool add, Ahead<uint16_t>& ahead) {
  const int64_t stride = w.stride * int64_t(sizeof(uint16_t));
  if (add) {
    _tile_loadd(0, sums, kRowBytes);
    _tile_loadd(1, sums + kTile, kRowBytes);
    if constexpr (kBlocks == 2) _tile_loadd(2, sums + 2 * kTile, kRowBytes);
    if constexpr (kBlocks == 2) _tile_loadd(3, sums + 3 * kTile, kRowBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t r = 0; r < rows; r += kBlock16, x += step) {
    ahead.fetch();
    // From the L2 cache, where the processor itself does not see rows as a sequence.
    for (int64_t i = r + kBlock16; i < std::min(r + 2 * kBlock16, rows); ++i) {
      __builtin_prefetch(w.at(i, 0), 0, 3);
    }
    _tile_loadd(7, w.at(r, 0), stride);
    _tile_loadd(4, x, kRowBytes);
    _tile_loadd(5, x + kTile, kRowBytes);
    _tile_dpbf16ps(0, 4, 7);
    ahead.fetch();
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kBlocks == 2) {
      ahead.fetch();
      _tile_loadd(6, x + 2 * kTile, kRowBytes);
      _tile_loadd(4, x + 3 * kTile, kRowBytes);
      _tile_dpbf16ps(2, 6, 7);
      ahead.fetch();
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, kRowBytes);
  _tile_stored(1, sums + kTile, kRowBytes);
  if constexpr (kBlocks == 2) _tile_stored(2, sums + 2 * kTile, kRowBytes);
  if constexpr (kBlocks == 2) _tile_stored(3, sums + 3 * kTile, kRowBytes);
}

// A row of the even and of the odd columns, in order.
TTT_TILES inline void restore_order(const float* even, const float* odd, float* to, bool add) {
  const __m512 first = _mm512_load_ps(even), second = _mm512_load_ps(odd);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __m512 left = _mm512_permutex2var_ps(first, low, second);
  __m512 right = _mm512_permutex2var_ps(first, high, second);
  if (add) left += _mm512_loadu_ps(to), right += _mm512_loadu_ps(to + 16);
  _mm512_storeu_ps(to, left);
  _mm512_storeu_ps(to + 16, right);
}

}  // namespace

TTT_TILES void tiles_by_columns(Matrix<const uint16_t> x, int64_t tokens, int64_t n,
                                Matrix<const uint16_t> w, int64_t columns, Matrix<float> y,
                                bool add) {
  if (tokens == 0) return;
  const int64_t blocks = blocks_of(tokens, kBlock16), each = blocks_of(tokens, blocks);
  const int64_t most = std::max(kTileSide, kDepth / blocks / kTileSide * kTileSide);
  // For each block and 32 columns the sums while the rows of W go by; x that meets some of these.
  const int64_t pair = 2 * kTile, step = blocks * pair, numel = columns / kTileSide * step;
  const Lines memory(numel + most / kBlock16 * step);
  uint32_t* const tiles = memory.data();
  float* const sums = reinterpret_cast<float*>(tiles + most / kBlock16 * step);
  configure_tiles(each, 7);
  for (int64_t from = 0; from < n; from += most) {
    const int64_t rows = std::min(most, n - from), next = from + rows;
    for (int64_t i = 0; i < rows / kBlock16 * blocks; ++i) {
      const int64_t first = i % blocks * each;
      write_pairs({x.at(first, from + i / blocks * kBlock16), x.stride},
                  std::min(each, tokens - first), tiles + i * pair);
    }
    finish_writes();
    const int64_t times = columns / kTileSide * (rows / kBlock16) * ((blocks + 1) / 2);
    Ahead<uint16_t> ahead({w.at(next, 0), w.stride}, std::min(most, n - next), columns, 4 * times);
    for (int64_t c = 0; c < columns; c += kTileSide) {
      float* const block = sums + c / kTileSide * step;
      for (int64_t b = 0; b < blocks; b += 2) {
        const auto run = b + 1 < blocks ? column_tiles<2> : column_tiles<1>;
        run(tiles + b * pair, step, {w.at(from, c), w.stride}, rows, block + b * pair, from > 0,
            ahead);
      }
      for (int64_t t = 0; t < tokens && next == n; ++t) {
        const float* const row = block + t / each * pair + t % each * 16;
        restore_order(row, row + kTile, y.at(t, c), add);
      }
    }
  }
  _tile_release();
}

#else

bool has_tiles() { return false; }

TiledRows::TiledRows(Matrix<const uint16_t>, int64_t rows, int64_t n)
    : rows_(rows), n_(n), blocks_(0), data_(0) {}

void tiles_by_rows(const TiledRows&, Matrix<const uint16_t>, int64_t, int64_t, Matrix<float>) {}

void tiles_by_columns(Matrix<const uint16_t>, int64_t, int64_t, Matrix<const uint16_t>, int64_t,
                      Matrix<float>, bool) {}

#endif

}  // namespace ttt_fast
