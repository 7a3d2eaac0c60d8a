// Products of bfloat16 matrices in the processor's matrix registers (Intel AMX): sums in float32,
// denormal numbers count as 0. W is read as it lies, once for all tokens of a few hundred.
#pragma once

#include <cstdint>
#include <memory>

#include "ahead.h"

namespace ttt_fast {

// Whether this processor has them, the system lets us and the compiler knew them.
bool has_tiles();

// Whether this is a processor that torch's own products (MKL) are tuned for.
bool is_intel();

// Rows and columns of W have to be multiples of this.
constexpr int64_t kTileSide = 32;

// Memory from the begin of a line of the cache on, so that a row of a tile lies in one.
class Lines {
 public:
  explicit Lines(int64_t numel) : memory_(new uint32_t[size_t(numel) + kBytes / 4]) {}
  uint32_t* data() const {
    const auto start = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<uint32_t*>((start + kBytes - 1) / kBytes * kBytes);
  }

 private:
  static constexpr uintptr_t kBytes = 64;  // of a line
  std::unique_ptr<uint32_t[]> memory_;
};

// Rows of bfloat16 numbers in the order in which tiles are read.
class TiledRows {
 public:
  TiledRows(Matrix<const uint16_t> x, int64_t rows, int64_t n);
  int64_t rows() const { return rows_; }
  int64_t n() const { return n_; }
  // Columns [32 k, 32 k + 32) of rows [16 b, 16 b + 16).
  const uint32_t* tile(int64_t b, int64_t k) const {
    return data_.data() + (k * blocks_ + b) * 256;
  }
  int64_t pairs() const { return blocks_ / 2; }

 private:
  int64_t rows_, n_, blocks_;
  Lines data_;
};

// y (x.rows, rows) = x w (rows, x.n)', after which `more` rows of w are needed.
void tiles_by_rows(const TiledRows& x, Matrix<const uint16_t> w, int64_t rows, int64_t more,
                   Matrix<float> y);

// y (tokens, columns) = [y +] x (tokens, n) w (n, columns). Two columns next to each other share
// what is not finite in either.
void tiles_by_columns(Matrix<const uint16_t> x, int64_t tokens, int64_t n, Matrix<const uint16_t> w,
                      int64_t columns, Matrix<float> y, bool add);

}  // namespace ttt_fast
