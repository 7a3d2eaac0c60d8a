// A product of matrices that lie in the cache, on the calling thread.
#pragma once

#include "ahead.h"

namespace ttt_fast {

// A matrix stored in any order.
template <class C>
struct Strided {
  C* data;
  int64_t row, column;  // strides
  C* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  Strided from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
};

// y (rows, columns) = [y +] x (rows, n) w (n, columns); fastest in whole vectors of columns.
void multiply(Strided<const float> x, int64_t rows, int64_t n, Matrix<const float> w,
              int64_t columns, Matrix<float> y, bool add);
void multiply(Strided<const double> x, int64_t rows, int64_t n, Matrix<const double> w,
              int64_t columns, Matrix<double> y, bool add);

}  // namespace ttt_fast
