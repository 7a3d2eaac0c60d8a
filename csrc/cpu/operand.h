// Rows of x in the forms in which their products with W take them.
#pragma once

#include <memory>
#include <optional>
#include <type_traits>

#include "product.h"
#include "tiles.h"

namespace ttt_fast {

// Columns of y that one thread computes at a time: few, so that threads have as many each.
constexpr int64_t kColumns = 32;
constexpr int64_t kWideColumns = 64;  // where W is met by columns, in four vectors at a time

enum class Weight { kByRows, kByColumns };

// Whether the processor multiplies so stored numbers in tiles, W having these sides.
template <class S>
bool takes_tiles(int64_t n, int64_t out) {
  const bool fits = n > 0 && out > 0 && n % kTileSide == 0 && out % kTileSide == 0;
  return std::is_same_v<S, uint16_t> && fits && has_tiles();
}

// Arithmetic in C, storage in S.
template <class C, class S>
class Operand {
 public:
  // weight: how W lies. tiles: whether W is to be taken in tiles. in_c: whether x is needed in C,
  // too.
  Operand(const void* x, int64_t rows, int64_t n, Dtype dtype, Weight weight, bool tiles, bool in_c)
      : stored_(static_cast<const S*>(x)), rows_(rows), n_(n), tiles_(tiles) {
    if constexpr (std::is_same_v<C, S>) {
      wide_ = stored_;
    } else {
      if (tiles && weight == Weight::kByRows) tiled_.emplace(stored(), rows, n);
      if (tiles && !in_c) return;
      copy_.reset(new C[size_t(rows * n)]);
      char* const from = static_cast<char*>(const_cast<void*>(x));
      parallel_ranges(rows * n, kChunk, [&](int64_t first, int64_t last) {
        widen(dtype, from + first * int64_t(sizeof(S)), last - first, &copy_[first]);
      });
      wide_ = copy_.get();
    }
  }

  // Rows [row, ..) in C.
  Matrix<const C> in_c(int64_t row) const { return {wide_ + row * n_, n_}; }

  // y (rows, columns) = x w (columns, n)', after which `more` rows of w are needed
  void times_rows(Matrix<const S> w, int64_t columns, int64_t more, Matrix<C> y) const {
    if constexpr (!std::is_same_v<C, S>) {
      if (tiles_) return tiles_by_rows(*tiled_, w, columns, more, y);
    }
    multiply_by_rows(in_c(0), rows_, n_, w, columns, more, y);
  }

  // y (rows, columns) = [y +] x w (n, columns)
  void times_columns(Matrix<const S> w, int64_t columns, Matrix<C> y, bool add) const {
    if constexpr (!std::is_same_v<C, S>) {
      if (tiles_) return tiles_by_columns(stored(), rows_, n_, w, columns, y, add);
    }
    multiply({wide_, n_, 1}, rows_, n_, w, columns, y, add);
  }

 private:
  Matrix<const S> stored() const { return {stored_, n_}; }

  const S* stored_;
  int64_t rows_, n_;
  bool tiles_;
  std::optional<TiledRows> tiled_;
  std::unique_ptr<C[]> copy_;
  const C* wide_ = nullptr;
};

// Columns [c, c + n) of y (rows, out) from a block of their own, rounded once.
template <class C, class S>
void store_columns(Dtype dtype, Matrix<C> block, int64_t rows, int64_t n, S* y, int64_t out) {
  for (int64_t t = 0; t < rows; ++t) {
    char* const to = reinterpret_cast<char*>(y + t * out);
    narrow(dtype, block.at(t, 0), n, to, Noise(), 0);  // nothing where it is there already
  }
}

}  // namespace ttt_fast
