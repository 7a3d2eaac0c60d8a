// Products in tiles as in tiles.cpp, of numbers in three parts (float_tiles.h).
//
// Bringing W into parts takes the vector unit about as long as the products of 20 tokens take the
// matrix unit. So it goes on between these: a unit of W is split while the unit before it meets all
// tokens, into memory that stays in the L1 cache. Pairs of numbers, which share an element of a
// tile, are 16 columns apart (x W': both in one load of two vectors) or 16 rows (x W): W needs no
// shuffle, and x, which is split once, takes it over.
#include "float_tiles.h"

#include <cstring>

#include "amx.h"
#include "tiles.h"

namespace ttt_fast {

#ifdef TTT_TILES

namespace {

constexpr int64_t kParts = 3;
constexpr int64_t kSplit = kParts * kTile;    // elements of the parts of a tile of x
constexpr int64_t kLine = kParts * kBlock16;  // elements of the parts of 32 numbers of W
constexpr int64_t kSumNumel = 4 * kTile;      // of two blocks of W and a pair of blocks of tokens
constexpr int64_t kFewest = 24;               // rows of x; vectors take fewer in less time
constexpr int64_t kTokens = 256;              // rows of x at a time,
constexpr int64_t kSpan = 24;                 // tiles of each: its parts stay in the L2 cache
constexpr int64_t kFewPairs = 2;              // of blocks of tokens
constexpr int64_t kFlat = 1, kDeep = 3;       // tiles of a unit of W, for few and for many tokens
constexpr int64_t kSumBytes = 1 << 19;        // that stay in the L2 cache beside x (x W)
constexpr int64_t kTilesEach = 64;            // of x that are worth a thread

// Two vectors of floats as pairs of bfloat16: the parts h, m and l, `step` elements apart.
TTT_TILES_INLINE void split(const float* low, const float* high, uint32_t* to, int64_t step) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
#pragma GCC unroll 3
  for (int64_t part = 0; part < kParts; ++part) {
    constexpr int kFirstOrBoth = 0xf8;  // a | (b & c)
    const __m512i pairs =
        _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, kFirstOrBoth);
    _mm512_storeu_si512(to + part * step, pairs);
    const __m512 of_a = _mm512_castsi512_ps(_mm512_and_si512(a, upper));
    const __m512 of_b = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
    a = _mm512_castps_si512(_mm512_castsi512_ps(a) - of_a);
    b = _mm512_castps_si512(_mm512_castsi512_ps(b) - of_b);
  }
}

// Two blocks of 16 rows (x W') or columns (x W) of W that are brought into parts, `depth` tiles of
// 32 numbers deep.
template <bool kByRows>
class Unit {
 public:
  // `slots` calls of some() are to split all of it.
  Unit(Matrix<const float> w, int64_t depth, uint32_t* to, int64_t slots)
      : w_(w),
        to_(to),
        depth_(depth),
        left_(kByRows ? 2 * kBlock16 * (depth > 0) : kBlock16 * depth),
        pace_(blocks_of(left_, slots)) {}

  TTT_TILES_INLINE void some() {
    for (int64_t i = 0; i < pace_ && left_ > 0; ++i) row();
  }

 private:
  TTT_TILES_INLINE void row() {
    if constexpr (kByRows) {
      for (int64_t k = 0; k < depth_; ++k, to_ += kLine) {
        split(w_.at(0, k * kTileSide), w_.at(0, k * kTileSide + kBlock16), to_, kBlock16);
      }
    } else {
      split(w_.data, w_.at(kBlock16, 0), to_, kBlock16);
      split(w_.at(0, kBlock16), w_.at(kBlock16, kBlock16), to_ + kLine, kBlock16);
      to_ += 2 * kLine;
    }
    w_.data += w_.stride;
    --left_;
    if (!kByRows && left_ % kBlock16 == 0) w_.data += kBlock16 * w_.stride;
  }

  Matrix<const float> w_;
  uint32_t* to_;
  int64_t depth_, left_, pace_;
};

constexpr int64_t kSlots = 6;  // of some() for each 32 numbers of a unit and pair of blocks

// Sums of a pair of blocks in memory. They are registers meanwhile: from nothing, from there or as
// the last call left them.
struct Sums {
  float* data;
  bool zero, load, store;
};

// sums += the products of a unit of W with one or two blocks of x. Meanwhile the next unit is split
// and later lines are fetched.
template <bool kByRows, int kBlocks>
TTT_TILES void meet(const uint32_t* w, const uint32_t* x, int64_t depth, const Sums& sums,
                    Unit<kByRows>& next, Ahead<float>& later) {
#define TTT_EACH_SUM(f)                                    \
  f(0, sums.data);                                         \
  f(1, sums.data + kTile);                                 \
  if constexpr (kBlocks == 2) f(2, sums.data + 2 * kTile); \
  if constexpr (kBlocks == 2) f(3, sums.data + 3 * kTile);
#define TTT_ZERO(tile, at) _tile_zero(tile)
#define TTT_LOAD(tile, at) _tile_loadd(tile, at, kRowBytes)
#define TTT_STORE(tile, at) _tile_stored(tile, at, kRowBytes)
// W by rows is what sums have their rows of, else x.
#define TTT_PRODUCT(sum, x_tile, w_tile) \
  if constexpr (kByRows) {               \
    _tile_dpbf16ps(sum, w_tile, x_tile); \
  } else {                               \
    _tile_dpbf16ps(sum, x_tile, w_tile); \
  }
#define TTT_LOAD_X(part)                         \
  _tile_loadd(4, x + (part) * kTile, kRowBytes); \
  if constexpr (kBlocks == 2) _tile_loadd(5, x + kSplit + (part) * kTile, kRowBytes);
#define TTT_LOAD_W(part)                         \
  _tile_loadd(6, w + (part) * kBlock16, stride); \
  _tile_loadd(7, w + other + (part) * kBlock16, stride);
#define TTT_PRODUCTS            \
  TTT_PRODUCT(0, 4, 6)          \
  TTT_PRODUCT(1, 4, 7)          \
  if constexpr (kBlocks == 2) { \
    TTT_PRODUCT(2, 5, 6)        \
    TTT_PRODUCT(3, 5, 7)        \
  }                             \
  unit.some();                  \
  ahead.fetch();
  finish_writes();
  if (sums.zero) {
    TTT_EACH_SUM(TTT_ZERO)
  } else if (sums.load) {
    TTT_EACH_SUM(TTT_LOAD)
  }
  Unit<kByRows> unit = next;  // copies, which can be in registers
  Ahead<float> ahead = later;
  const int64_t across = (kByRows ? depth : 2) * kLine, stride = across * int64_t(sizeof(float));
  const int64_t other = kByRows ? kBlock16 * across : kLine;
  const int64_t step = kByRows ? kLine : kBlock16 * across;
  for (int64_t k = 0; k < depth; ++k, w += step, x += 2 * kSplit) {
    // The smallest first, and one of both factors as it was.
    TTT_LOAD_X(2)
    TTT_LOAD_W(0)
    TTT_PRODUCTS
    TTT_LOAD_X(1)
    TTT_PRODUCTS
    TTT_LOAD_W(1)
    TTT_PRODUCTS
    TTT_LOAD_X(0)
    TTT_PRODUCTS
    TTT_LOAD_W(0)
    TTT_PRODUCTS
    TTT_LOAD_W(2)
    TTT_PRODUCTS
  }
  next = unit;
  later = ahead;
  if (sums.store) {
    TTT_EACH_SUM(TTT_STORE)
  }
#undef TTT_EACH_SUM
#undef TTT_ZERO
#undef TTT_LOAD
#undef TTT_STORE
#undef TTT_PRODUCT
#undef TTT_LOAD_X
#undef TTT_LOAD_W
#undef TTT_PRODUCTS
}

// Memory for two units and sums.
class Workspace {
 public:
  Workspace(int64_t depth, int64_t sums)
      : memory_(2 * numel(depth) + sums),
        now(memory_.data()),
        later(now + numel(depth)),
        sums(reinterpret_cast<float*>(later + numel(depth))) {}

 private:
  static int64_t numel(int64_t depth) { return 2 * kBlock16 * kLine * depth; }
  Lines memory_;

 public:
  uint32_t *now, *later;  // parts of the unit that is met and of the next
  float* sums;
};

// A part of x in its parts: at most kTokens rows and kSpan tiles of their columns.
struct SplitRows {
  int64_t rows, tiles;
  bool for_columns;
  uint32_t* data;

  // Blocks of at most 16 rows, of which each but the last has `each`: as few as can be where they
  // are what takes time.
  int64_t blocks() const { return blocks_of(rows, kBlock16); }
  int64_t pairs() const { return blocks_of(rows, 2 * kBlock16); }
  int64_t each() const { return for_columns ? blocks_of(rows, blocks()) : kBlock16; }
  int64_t depth() const { return std::min(tiles, pairs() <= kFewPairs ? kFlat : kDeep); }

  // The parts of 32 columns of a block, a tile each. Those of the other block of a pair (b even)
  // follow, then those of the next columns.
  uint32_t* at(int64_t b, int64_t k) const {
    return data + ((b / 2 * tiles + k) * 2 + b % 2) * kSplit;
  }

  TTT_TILES void split_block(Matrix<const float> x, int64_t b, int64_t k) const {
    alignas(64) uint32_t parts[kSplit] = {};
    for (int64_t row = 0; row < std::min(each(), rows - b * each()); ++row) {
      const float* const low = x.at(b * each() + row, k * kTileSide);
      split(low, low + kBlock16, parts + row * 16, kTile);
    }
    if (for_columns) {
      std::memcpy(at(b, k), parts, sizeof parts);
      return;
    }
    for (int64_t part = 0; part < kParts; ++part) {
      __m512 columns[kBlock16];
      transpose(reinterpret_cast<const float*>(parts) + part * kTile, columns);
      float* const to = reinterpret_cast<float*>(at(b, k) + part * kTile);
      for (int64_t i = 0; i < kBlock16; ++i) _mm512_storeu_ps(to + i * 16, columns[i]);
    }
  }
};

// y (x.rows, rows) = [y +] x w (rows, x.tiles)'
TTT_TILES void by_rows(const SplitRows& x, Matrix<const float> w, int64_t rows, Matrix<float> y,
                       bool add) {
  const int64_t pairs = x.pairs(), most = x.depth();
  Workspace work(most, pairs * kSumNumel);
  configure_tiles();
  const auto unit = [&](int64_t row, int64_t k, uint32_t* to, int64_t slots) {
    const int64_t depth = row < rows ? std::min(most, x.tiles - k) : 0;
    return Unit<true>({w.at(row, k * kTileSide), w.stride}, depth, to, slots);
  };
  unit(0, 0, work.now, 1).some();
  for (int64_t row = 0; row < rows; row += kTileSide) {
    const int64_t below = row + kTileSide;
    Ahead<float> later({w.at(below, 0), w.stride}, std::min(kTileSide, rows - below),
                       x.tiles * kTileSide, x.tiles * pairs * kSlots);
    for (int64_t k = 0; k < x.tiles; k += most) {
      const int64_t depth = std::min(most, x.tiles - k), slots = depth * pairs * kSlots;
      const bool last = k + depth == x.tiles;
      Unit<true> next =
          last ? unit(below, 0, work.later, slots) : unit(row, k + depth, work.later, slots);
      for (int64_t p = 0; p < pairs; ++p) {
        const Sums sums = {work.sums + p * kSumNumel, k == 0, pairs > 1, last || pairs > 1};
        const auto run = 2 * p + 1 < x.blocks() ? meet<true, 2> : meet<true, 1>;
        run(work.now, x.at(2 * p, k), depth, sums, next, later);
        if (!last) continue;
        const int64_t first = p * kTileSide;
        store_transposed(sums.data, x.rows - first, {y.at(first, row), y.stride}, add);
      }
      std::swap(work.now, work.later);
    }
  }
  _tile_release();
}

// Sums of tokens and 32 columns of W: a pair of blocks of x, of which so many rows are left.
TTT_TILES void store_rows(const float* sums, int64_t rows, int64_t each, Matrix<float> y,
                          bool add) {
  for (int64_t t = 0; t < std::min(2 * each, rows); ++t) {
    const float* const row = sums + t / each * 2 * kTile + t % each * 16;
    float* const to = y.at(t, 0);
    __m512 left = _mm512_loadu_ps(row), right = _mm512_loadu_ps(row + kTile);
    if (add) left += _mm512_loadu_ps(to), right += _mm512_loadu_ps(to + 16);
    _mm512_storeu_ps(to, left);
    _mm512_storeu_ps(to + 16, right);
  }
}

// y (x.rows, columns) = [y +] x w (x.tiles, columns), of so many columns that sums stay in the
// cache
TTT_TILES void by_columns(const SplitRows& x, Matrix<const float> w, int64_t columns,
                          Matrix<float> y, bool add) {
  const int64_t pairs = x.pairs(), most = x.depth(), across = columns / kTileSide;
  Workspace work(most, across * pairs * kSumNumel);
  configure_tiles(x.each(), 6);
  const auto unit = [&](int64_t k, int64_t c, uint32_t* to, int64_t slots) {
    const int64_t depth = std::min(most, x.tiles - k);
    return Unit<false>({w.at(k * kTileSide, c * kTileSide), w.stride}, depth, to, slots);
  };
  unit(0, 0, work.now, 1).some();
  for (int64_t k = 0; k < x.tiles; k += most) {
    const int64_t depth = std::min(most, x.tiles - k), below = k + depth;
    const int64_t slots = pairs * depth * kSlots;
    Ahead<float> later({w.at(below * kTileSide, 0), w.stride},
                       std::min(most, x.tiles - below) * kTileSide, columns, slots * across);
    for (int64_t c = 0; c < across; ++c) {
      Unit<false> next =
          c + 1 < across ? unit(k, c + 1, work.later, slots) : unit(below, 0, work.later, slots);
      for (int64_t p = 0; p < pairs; ++p) {
        const Sums sums = {work.sums + (c * pairs + p) * kSumNumel, k == 0, true, true};
        const auto run = 2 * p + 1 < x.blocks() ? meet<false, 2> : meet<false, 1>;
        run(work.now, x.at(2 * p, k), depth, sums, next, later);
        if (below < x.tiles) continue;
        const int64_t first = 2 * p * x.each();
        store_rows(sums.data, x.rows - first, x.each(), {y.at(first, c * kTileSide), y.stride},
                   add);
      }
      std::swap(work.now, work.later);
    }
  }
  _tile_release();
}

// Calls f(split, row, column) for all of x (rows, n), split a part at a time by all threads. Parts
// of a row follow each other.
template <class F>
void for_parts(Matrix<const float> x, int64_t rows, int64_t n, bool for_columns, const F& f) {
  const int64_t groups = blocks_of(rows, kTokens), tokens = blocks_of(rows, groups);
  const int64_t tiles = n / kTileSide, spans = blocks_of(tiles, kSpan);
  const int64_t span = blocks_of(tiles, spans);
  const int64_t most_blocks = blocks_of(tokens, 2 * kBlock16) * 2;
  const Lines memory(most_blocks * span * kSplit);
  for (int64_t row = 0; row < rows; row += tokens) {
    for (int64_t k = 0; k < tiles; k += span) {
      const Matrix<const float> from = {x.at(row, k * kTileSide), x.stride};
      const SplitRows part = {std::min(tokens, rows - row), std::min(span, tiles - k), for_columns,
                              memory.data()};
      const int64_t blocks = part.blocks();
      parallel_ranges(blocks * part.tiles, kTilesEach, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) part.split_block(from, i % blocks, i / blocks);
      });
      f(part, row, k * kTileSide);
    }
  }
}

void forward(const LinearsCall& call) {
  int64_t all = 0;
  for (const auto& layer : call.layers) all += layer.out / kTileSide;
  const Matrix<const float> x = {static_cast<const float*>(call.x), call.in};
  for_parts(x, call.rows, call.in, false, [&](const SplitRows& part, int64_t row, int64_t column) {
    parallel_ranges(all, 1, [&](int64_t first, int64_t last) {
      for (const auto& layer : call.layers) {
        const int64_t from = std::max<int64_t>(first, 0) * kTileSide;
        const int64_t to = std::min(layer.out, last * kTileSide);
        const Matrix<const float> w = {static_cast<const float*>(layer.weight), layer.stride};
        const Matrix<float> y = {static_cast<float*>(layer.y), layer.out};
        if (from < to) {
          by_rows(part, {w.at(from, column), w.stride}, to - from, {y.at(row, from), y.stride},
                  column > 0);
        }
        first -= layer.out / kTileSide, last -= layer.out / kTileSide;
      }
    });
  });
}

void backward(const LinearsCall& call) {
  const Matrix<float> dx = {static_cast<float*>(call.dx), call.in};
  for (size_t i = 0; i < call.layers.size(); ++i) {
    const auto& layer = call.layers[i];
    const Matrix<const float> w = {static_cast<const float*>(layer.weight), layer.stride};
    const Matrix<const float> dy = {static_cast<const float*>(layer.y), layer.out};
    for_parts(dy, call.rows, layer.out, true, [&](const SplitRows& part, int64_t row, int64_t k) {
      const int64_t bytes = part.pairs() * kSumNumel * int64_t(sizeof(float));
      const int64_t width = std::max<int64_t>(1, kSumBytes / bytes);
      parallel_ranges(call.in / kTileSide, 1, [&](int64_t first, int64_t last) {
        for (; first < last; first += width) {
          const int64_t c = first * kTileSide, columns = std::min(width, last - first) * kTileSide;
          by_columns(part, {w.at(k, c), w.stride}, columns, {dx.at(row, c), dx.stride},
                     i > 0 || k > 0);
        }
      });
    });
  }
}

}  // namespace

bool float_tiles_take(const LinearsCall& call) {
  const auto fits = [](int64_t n) { return n > 0 && n % kTileSide == 0; };
  bool all = call.dtype == Dtype::F32 && call.rows >= kFewest && fits(call.in) && has_tiles();
  for (const auto& layer : call.layers) all = all && fits(layer.out);
  return all;
}

void float_tiles_linears(const LinearsCall& call) {
  call.backward ? backward(call) : forward(call);
}

#else

bool float_tiles_take(const LinearsCall&) { return false; }

void float_tiles_linears(const LinearsCall&) {}

#endif

}  // namespace ttt_fast
