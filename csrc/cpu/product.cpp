// x W' and x W, W as it lies: libraries first copy it into another order, which costs more than it
// saves where rows of x are few. The next of it is fetched during the arithmetic: the two take
// about as long at 20 rows. No sum is longer than kSpan / lanes or kDepth terms; sums of these make
// the element.
#include "product.h"

#include <type_traits>

// Sums of products need not round as another place does; fused they take half the instructions.
#pragma GCC optimize("fp-contract=fast")

#define TTT_LAMBDA __attribute__((always_inline))

namespace ttt_fast {
namespace {

constexpr int kRows = 4;         // rows of W at a time (x W')
constexpr int64_t kGroup = 16;   // rows of W that stay in the cache (x W')
constexpr int kVectors = 4;      // vectors of a row of W at a time (x W)
constexpr int64_t kDepth = 64;   // rows of W whose columns stay in the L2 cache (x W)
constexpr int64_t kSpan = 2048;  // elements of a row of W to one sum (x W'); kDepth rows (x W)

TTT_HOST_DEVICE float value(float x) { return x; }
TTT_HOST_DEVICE double value(double x) { return x; }
TTT_HOST_DEVICE float value(uint16_t x) { return bf16_to_float(x); }

// y[t][r] = [y[t][r] +] <x[t], w[r]> for T tokens and kRows rows of W, n a number of whole vectors.
template <class C, class W, int kBytes, int T>
TTT_HOST_DEVICE void dots(const C* x, int64_t ldx, const W* w, int64_t ldw, int64_t n, C* y,
                          int64_t ldy, bool add, Ahead<W>& ahead) {
  using S = Simd<C, kBytes>;
  using Y = Simd<C, kRows* int(sizeof(C))>;
  typename S::Vector sums[T][kRows] = {};
  for (int64_t i = 0; i < n; i += S::kLanes) {
    ahead.fetch();
    typename S::Vector row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = S::load(w + r * ldw + i);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const typename S::Vector token = S::load(x + t * ldx + i);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[t][r] += token * row[r];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const typename Y::Vector totals = S::sums(sums[t]);
    Y::store(y + t * ldy, add ? Y::load(y + t * ldy) + totals : totals);
  }
}

// y[t] = [y[t] +] <x[t], w> for one row of W.
template <class C, class W, int kBytes>
TTT_HOST_DEVICE void dot(const C* x, int64_t ldx, int64_t tokens, const W* w, int64_t n, C* y,
                         int64_t ldy, bool add) {
  using S = Simd<C, kBytes>;
  const int64_t whole = n / S::kLanes * S::kLanes;
  for (int64_t t = 0; t < tokens; ++t) {
    typename S::Vector sum = {};
    for (int64_t i = 0; i < whole; i += S::kLanes) sum += S::load(x + t * ldx + i) * S::load(w + i);
    C total = S::sum(sum);
    for (int64_t i = whole; i < n; ++i) total += x[t * ldx + i] * value(w[i]);
    y[t * ldy] = add ? y[t * ldy] + total : total;
  }
}

// y[t][0 .. V vectors) = [y[t][0 .. V vectors) +] sum over k < depth of x(t, k) w[k][0 .. V
// vectors).
template <class C, class W, int kBytes, int T, int V>
TTT_HOST_DEVICE void axpys(Strided<const C> x, const W* w, int64_t ldw, int64_t depth, C* y,
                           int64_t ldy, bool add, Ahead<W>& ahead) {
  using S = Simd<C, kBytes>;
  typename S::Vector sums[T][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    ahead.fetch();
    typename S::Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = S::load(w + k * ldw + v * S::kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const C factor = *x.at(t, k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[t][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      C* const to = y + t * ldy + v * S::kLanes;
      S::store(to, add ? S::load(to) + sums[t][v] : sums[t][v]);
    }
  }
}

template <int kMost>
TTT_HOST_DEVICE int64_t blocks_of(int64_t tokens) {
  return (tokens + kMost - 1) / kMost;
}

// Call f(t, T) for blocks of at most kMost tokens from t on, T their number as a constant.
template <int kMost, class F>
TTT_HOST_DEVICE void for_tokens(int64_t tokens, const F& f) {
  const int64_t blocks = blocks_of<kMost>(tokens);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t t = tokens * b / blocks;
    switch (tokens * (b + 1) / blocks - t) {
      case 1:
        f(t, std::integral_constant<int, 1>());
        break;
      case 2:
        f(t, std::integral_constant<int, 2>());
        break;
      case 3:
        f(t, std::integral_constant<int, 3>());
        break;
      case 4:
        f(t, std::integral_constant<int, 4>());
        break;
      case 5:
        f(t, std::integral_constant<int, 5>());
        break;
      default:
        f(t, std::integral_constant<int, 6>());
        break;
    }
  }
}

// y (tokens, rows) = [y +] x (tokens, n) w (rows, n)'. kMost tokens at a time: as registers allow.
// After its rows W has `more` that are needed next.
template <class C, class W, int kBytes, int kMost>
TTT_HOST_DEVICE void span_by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,
                                  int64_t rows, int64_t more, Matrix<C> y, bool add) {
  const int64_t whole = rows / kRows * kRows, vectors = n / Simd<C, kBytes>::kLanes;
  const int64_t most = vectors * Simd<C, kBytes>::kLanes;
  const int64_t steps = kGroup / kRows * blocks_of<kMost>(tokens) * vectors;
  for (int64_t group = 0; group < whole; group += kGroup) {
    const int64_t end = std::min(group + kGroup, whole);
    Ahead<W> ahead({w.at(end, 0), w.stride}, std::min(kGroup, rows + more - end), most, steps);
    for_tokens<kMost>(tokens, [&](int64_t t, auto T) TTT_LAMBDA {
      // The tokens stay in the L1 cache for a group of rows, which stays in the L2 cache for all
      // tokens.
      for (int64_t r = group; r < end; r += kRows) {
        dots<C, W, kBytes, T()>(x.at(t, 0), x.stride, w.at(r, 0), w.stride, most, y.at(t, r),
                                y.stride, add, ahead);
      }
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = r < whole ? most : 0;
    if (r < whole && from == n) continue;
    dot<C, W, kBytes>(x.at(0, from), x.stride, tokens, w.at(r, from), n - from, y.at(0, r),
                      y.stride, add || r < whole);
  }
}

// y (tokens, columns) = [y +] x (tokens, depth) w (depth, columns); `next` rows of W are needed
// after these.
template <class C, class W, int kBytes, int kMost>
TTT_HOST_DEVICE void span_by_columns(Strided<const C> x, int64_t tokens, int64_t depth,
                                     Matrix<const W> w, int64_t columns, int64_t next, Matrix<C> y,
                                     bool add) {
  constexpr int64_t kLanes = Simd<C, kBytes>::kLanes;
  const int64_t steps = columns / (kVectors * kLanes) * blocks_of<kMost>(tokens) * depth;
  Ahead<W> ahead({w.at(depth, 0), w.stride}, next, columns, steps);
  int64_t c = 0;
  for (; c + kVectors * kLanes <= columns; c += kVectors * kLanes) {
    for_tokens<kMost>(tokens, [&](int64_t t, auto T) TTT_LAMBDA {
      axpys<C, W, kBytes, T(), kVectors>(x.from(t, 0), w.at(0, c), w.stride, depth, y.at(t, c),
                                         y.stride, add, ahead);
    });
  }
  for (; c + kLanes <= columns; c += kLanes) {
    for_tokens<kMost>(tokens, [&](int64_t t, auto T) TTT_LAMBDA {
      axpys<C, W, kBytes, T(), 1>(x.from(t, 0), w.at(0, c), w.stride, depth, y.at(t, c), y.stride,
                                  add, ahead);
    });
  }
  for (; c < columns; ++c) {
    for (int64_t t = 0; t < tokens; ++t) {
      C sum = 0;
      for (int64_t j = 0; j < depth; ++j) sum += *x.at(t, j) * value(*w.at(j, c));
      *y.at(t, c) = add ? *y.at(t, c) + sum : sum;
    }
  }
}

// y (tokens, rows) = x (tokens, n) w (rows, n)', `more` rows of w to follow
template <class C, class W, int kBytes, int kMost>
TTT_HOST_DEVICE void product_by_rows(Matrix<const C> x, int64_t tokens, int64_t n,
                                     Matrix<const W> w, int64_t rows, int64_t more, Matrix<C> y) {
  int64_t k = 0;
  do {
    span_by_rows<C, W, kBytes, kMost>({x.at(0, k), x.stride}, tokens, std::min(kSpan, n - k),
                                      {w.at(0, k), w.stride}, rows, more, y, k > 0);
    k += kSpan;
  } while (k < n);
}

// y (tokens, columns) = [y +] x (tokens, n) w (n, columns)
template <class C, class W, int kBytes, int kMost>
TTT_HOST_DEVICE void product_by_columns(Strided<const C> x, int64_t tokens, int64_t n,
                                        Matrix<const W> w, int64_t columns, Matrix<C> y, bool add) {
  int64_t k = 0;
  do {
    const int64_t depth = std::min(kDepth, n - k), next = std::min(kDepth, n - k - depth);
    span_by_columns<C, W, kBytes, kMost>(x.from(0, k), tokens, depth, {w.at(k, 0), w.stride},
                                         columns, next, y, add || k > 0);
    k += kDepth;
  } while (k < n);
}

// Sixteen vector registers hold the sums of 2 tokens and what they are made of, thirty-two those of
// 6.
#define TTT_PRODUCTS_OF(C, W, target, bytes, registers)                                         \
  target void by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,          \
                      int64_t rows, int64_t more, Matrix<C> y) {                                \
    product_by_rows<C, W, bytes, registers == 32 ? 6 : 2>(x, tokens, n, w, rows, more, y);      \
  }                                                                                             \
  target void by_columns(Strided<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,      \
                         int64_t columns, Matrix<C> y, bool add) {                              \
    product_by_columns<C, W, bytes, registers == 32 ? 6 : 2>(x, tokens, n, w, columns, y, add); \
  }
#define TTT_PRODUCTS(target, bytes, registers)               \
  TTT_PRODUCTS_OF(float, float, target, bytes, registers)    \
  TTT_PRODUCTS_OF(float, uint16_t, target, bytes, registers) \
  TTT_PRODUCTS_OF(double, double, target, bytes, registers)
TTT_FOR_TARGETS(TTT_PRODUCTS)

}  // namespace

#define TTT_MULTIPLY(C, W)                                                                         \
  void multiply_by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,           \
                        int64_t rows, int64_t more, Matrix<C> y) {                                 \
    by_rows(x, tokens, n, w, rows, more, y);                                                       \
  }                                                                                                \
  void multiply(Strided<const C> x, int64_t tokens, int64_t n, Matrix<const W> w, int64_t columns, \
                Matrix<C> y, bool add) {                                                           \
    by_columns(x, tokens, n, w, columns, y, add);                                                  \
  }
TTT_MULTIPLY(float, float)
TTT_MULTIPLY(float, uint16_t)
TTT_MULTIPLY(double, double)

}  // namespace ttt_fast
