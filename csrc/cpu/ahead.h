// Memory that is needed next, fetched during the arithmetic on what is there.
#pragma once

#include <cstdint>

#include "simd.h"

namespace ttt_fast {

// A matrix stored by rows.
template <class C>
struct Matrix {
  C* data;
  int64_t stride;
  C* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Rows that are needed next: a few lines at a time, since a processor waits where too many are on
// their way, and in the order of memory, in which it reads ahead by itself.
template <class W>
class Ahead {
 public:
  // `steps` calls of fetch() are to fetch all rows.
  TTT_HOST_DEVICE Ahead(Matrix<const W> w, int64_t rows, int64_t columns, int64_t steps)
      : row_(reinterpret_cast<const char*>(w.data)),
        stride_(w.stride * int64_t(sizeof(W))),
        width_(columns * int64_t(sizeof(W))),
        left_(rows),
        lines_((rows * ((width_ + kLine - 1) / kLine) + steps - 1) / std::max<int64_t>(1, steps)) {}

  TTT_HOST_DEVICE void fetch() {
    for (int64_t i = 0; i < lines_ && left_ > 0; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= width_) {
        at_ = 0;
        row_ += stride_;
        --left_;
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes that memory gives at a time
  const char* row_;
  int64_t stride_, width_, left_, lines_, at_ = 0;
};

}  // namespace ttt_fast
