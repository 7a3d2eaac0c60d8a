// Squared norms of gradients dy' x from the Gram matrices of x and of dy.
// Fused: conversion and both products; x and dy are read once, nothing of their size is written.
// The Gram matrices are symmetric: half of the tiles are computed, which is what makes this faster
// than a matrix product at the sizes of a prompt (20 to 64 tokens).
// Bytes per element: 4 in float32, 2 in bfloat16. Bound: arithmetic, M / 2 products per element.
// Reference: gram_norm in ttt_fast/factor_reference.py.
#include <memory>

#include "simd.h"

// Sums of products need not round as another place does; fused they take half the instructions.
#pragma GCC optimize("fp-contract=fast")

namespace ttt_fast {
namespace {

constexpr int64_t kTile = 4;       // rows by rows of one tile
constexpr int64_t kGroup = 16;     // tiles whose rows stay in the L2 cache
constexpr int64_t kColumns = 768;  // eight rows of so many stay in the L1 cache

// tile[p][q] += <a[p], b[q]>, in vectors of kBytes, kAtOnce columns of the tile at a time: as many
// sums as there are registers for.
template <int kBytes, int kAtOnce, class C>
TTT_HOST_DEVICE void tile_loop(const C* const* a, const C* const* b, int64_t n, C* tile) {
  using S = Simd<C, kBytes>;
  using Vector = typename S::Vector;
  const int64_t whole = n / S::kLanes * S::kLanes;
  for (int64_t from = 0; from < kTile; from += kAtOnce) {
    Vector sums[kTile][kAtOnce] = {};
    for (int64_t i = 0; i < whole; i += S::kLanes) {
      Vector left[kTile];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kTile; ++p) left[p] = S::load(a[p] + i);
#pragma GCC unroll 4
      for (int64_t q = 0; q < kAtOnce; ++q) {
        const Vector right = S::load(b[from + q] + i);
#pragma GCC unroll 4
        for (int64_t p = 0; p < kTile; ++p) sums[p][q] += left[p] * right;
      }
    }
    for (int64_t p = 0; p < kTile; ++p) {
      for (int64_t q = 0; q < kAtOnce; ++q) {
        C sum = S::sum(sums[p][q]);
        for (int64_t i = whole; i < n; ++i) sum += a[p][i] * b[from + q][i];
        tile[p * kTile + from + q] += sum;
      }
    }
  }
}

#define TTT_TILES_OF(C, target, bytes, registers)                                  \
  target void add_tile(const C* const* a, const C* const* b, int64_t n, C* tile) { \
    tile_loop<bytes, registers == 32 ? 4 : 2>(a, b, n, tile);                      \
  }
#define TTT_TILES(target, bytes, registers)     \
  TTT_TILES_OF(float, target, bytes, registers) \
  TTT_TILES_OF(double, target, bytes, registers)
TTT_FOR_TARGETS(TTT_TILES)

int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// The tiles on and above the diagonal, row by row.
int64_t tile_index(int64_t i, int64_t j, int64_t tiles) {
  return i * tiles - i * (i - 1) / 2 + j - i;
}

// A share of one Gram matrix: the columns [begin, end) of the tokens of one delta.
struct Segment {
  const View* view;
  int64_t first_row, width, begin, end;
};

template <class C>
void add_gram(const Segment& segment, int64_t tokens, C* gram) {
  const int64_t tiles = tiles_of(tokens);
  const View& view = *segment.view;
  alignas(64) static const C kZeros[kColumns] = {};  // rows that complete the last tiles
  std::vector<const C*> rows(size_t(tiles * kTile), kZeros);
  const bool as_is = view.element_size == sizeof(C) && view.n_outer == 0;
  const std::unique_ptr<C[]> wide(as_is ? nullptr : new C[size_t(tokens * kColumns)]);
  const std::unique_ptr<char[]> raw(as_is ? nullptr : new char[size_t(kColumns) * sizeof(C)]);
  for (int64_t at = segment.begin; at < segment.end; at += kColumns) {
    const int64_t n = std::min(kColumns, segment.end - at);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t index = (segment.first_row + t) * segment.width + at;
      char* there = in_place(view, index, n);
      C* row = as_is ? nullptr : &wide[size_t(t * kColumns)];
      if (there == nullptr) {
        // Of the compute type already, the gathered elements are where they are needed.
        there = view.element_size == sizeof(C) ? reinterpret_cast<char*>(row) : raw.get();
        gather(view, index, n, there);
      }
      rows[t] = widen(view.dtype, there, n, row);
    }
    for (int64_t group = 0; group < tiles; group += kGroup) {
      const int64_t stop = std::min(group + kGroup, tiles);
      for (int64_t i = 0; i < stop; ++i) {
        for (int64_t j = std::max(i, group); j < stop; ++j) {
          add_tile(&rows[i * kTile], &rows[j * kTile], n,
                   gram + tile_index(i, j, tiles) * kTile * kTile);
        }
      }
    }
  }
}

// Segments do not depend on the number of threads. They are few where the matrices are large.
void add_segments(const View& view, int64_t batch, int64_t tokens, std::vector<Segment>& segments) {
  const int64_t width = view.numel / (batch * tokens);
  const int64_t chunks = (width + kColumns - 1) / kColumns;
  const int64_t limit = std::max<int64_t>(1, (int64_t(1) << 20) / (tokens * tokens));
  const int64_t n = std::max<int64_t>(1, std::min((chunks + 7) / 8, limit));
  const int64_t length = (chunks + n - 1) / n * kColumns;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t k = 0; k < n; ++k) {
      segments.push_back({&view, b * tokens, width, std::min(width, k * length),
                          std::min(width, (k + 1) * length)});
    }
  }
}

template <class C>
C product_of_sums(const C* x, int64_t n_x, const C* dy, int64_t n_dy, int64_t tiles) {
  const int64_t numel = tiles * (tiles + 1) / 2 * kTile * kTile;
  double total = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t j = i; j < tiles; ++j) {
      const int64_t tile = tile_index(i, j, tiles) * kTile * kTile;
      double sum = 0;
      for (int64_t e = tile; e < tile + kTile * kTile; ++e) {
        C left = 0, right = 0;
        for (int64_t k = 0; k < n_x; ++k) left += x[k * numel + e];
        for (int64_t k = 0; k < n_dy; ++k) right += dy[k * numel + e];
        sum += double(left) * double(right);
      }
      total += i == j ? sum : 2 * sum;
    }
  }
  // Tokens that cancel each other leave rounding errors of either sign; NaN stays.
  return C(total < 0 ? 0 : total);
}

template <class C>
void gram_norms(const View& x, const View& dy, int64_t batch, int64_t tokens, C* norms) {
  if (batch == 0 || tokens == 0 || x.numel == 0 || dy.numel == 0) {
    std::fill_n(norms, batch, C(0));
    return;
  }
  std::vector<Segment> segments;
  add_segments(x, batch, tokens, segments);
  const int64_t n_x = int64_t(segments.size()) / batch;
  add_segments(dy, batch, tokens, segments);
  const int64_t n_dy = int64_t(segments.size()) / batch - n_x;
  const int64_t tiles = tiles_of(tokens);
  const int64_t numel = tiles * (tiles + 1) / 2 * kTile * kTile;
  std::vector<C> grams(segments.size() * size_t(numel));
  const int64_t work = (x.numel + dy.numel) * tokens / int64_t(segments.size());
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 20) / std::max<int64_t>(work, 1));
  parallel_ranges(int64_t(segments.size()), grain, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) add_gram(segments[s], tokens, &grams[s * numel]);
  });
  const C* of_dy = &grams[size_t(batch * n_x * numel)];
  for (int64_t b = 0; b < batch; ++b) {
    norms[b] = product_of_sums(&grams[b * n_x * numel], n_x, of_dy + b * n_dy * numel, n_dy, tiles);
  }
}

}  // namespace

void gram_norm_cpu(const View& x, const View& dy, int64_t batch, int64_t tokens, void* norms) {
  if (x.dtype == Dtype::F64) {
    gram_norms(x, dy, batch, tokens, static_cast<double*>(norms));
  } else {
    gram_norms(x, dy, batch, tokens, static_cast<float*>(norms));
  }
}

}  // namespace ttt_fast
