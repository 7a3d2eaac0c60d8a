// Products of matrices on the calling thread.
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

// multiply: y (tokens, columns) = [y +] x (tokens, n) w (n, columns); fastest in whole vectors of
// columns. multiply_by_rows: y (tokens, rows) = x (tokens, n) w (rows, n)', after which `more` rows
// of w are needed. W of bfloat16 is widened on the way.
#define TTT_PRODUCT(C, W)                                                                          \
  void multiply(Strided<const C> x, int64_t tokens, int64_t n, Matrix<const W> w, int64_t columns, \
                Matrix<C> y, bool add);                                                            \
  void multiply_by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,           \
                        int64_t rows, int64_t more, Matrix<C> y);
TTT_PRODUCT(float, float)
TTT_PRODUCT(float, uint16_t)
TTT_PRODUCT(double, double)
#undef TTT_PRODUCT

}  // namespace ttt_fast
