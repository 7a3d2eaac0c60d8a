// y = rho x W' - ((x a') o beta) d, W and a stored by rows, for a batch that shares W.
// Fused: both products, scaling, accumulation. Libraries leave products of 20 to 64 rows at a third
// of the arithmetic rate, for they first copy W into another order; here W is read as it lies.
// Arithmetic is in float32 (float64 for float64), bfloat16 is rounded once: a small delta is not
// lost. Bytes: those of W, a, d once, and y twice. Bound: arithmetic from about 10 rows on.
// Reference: delta_linear in ttt_fast/reference.py.
#include <algorithm>
#include <type_traits>

#include "blocks.h"

// Sums of products need not round as another place does; fused they take half the instructions.
#pragma GCC optimize("fp-contract=fast")
// Vectors wider than the default target has are passed only between functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && defined(__gnu_linux__)
#define TTT_TARGET(name) __attribute__((target(name)))
#else
#define TTT_TARGET(name)
#endif
#define TTT_INLINE inline __attribute__((always_inline))
#define TTT_LAMBDA __attribute__((always_inline))

namespace ttt_fast {
namespace {

constexpr int kRows = 4;          // rows of W at a time (x W')
constexpr int64_t kGroup = 16;    // rows of W that stay in the cache (x W')
constexpr int kVectors = 4;       // vectors of a row of W at a time (x W)
constexpr int64_t kDepth = 64;    // rows of W whose columns stay in the L2 cache (x W)
constexpr int64_t kColumns = 64;  // columns of y that one thread computes at a time

// A matrix stored by rows.
template <class C>
struct Matrix {
  C* data;
  int64_t stride;
  C* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Vectors of floats, as their bits, from half as many bytes of bfloat16: the upper halves.
template <int kBytes>
struct Bfloat16;
// Written out for each size: GCC 12 refuses to convert vectors whose size is a template parameter.
#define TTT_BFLOAT16(bytes)                                          \
  template <>                                                        \
  struct Bfloat16<bytes> {                                           \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2))); \
    typedef uint32_t Words __attribute__((vector_size(bytes)));      \
    static TTT_INLINE Words load(const uint16_t* from) {             \
      Halves halves;                                                 \
      memcpy(&halves, from, sizeof halves);                          \
      return __builtin_convertvector(halves, Words) << 16;           \
    }                                                                \
  };
TTT_BFLOAT16(16)
TTT_BFLOAT16(32)
TTT_BFLOAT16(64)

template <class C, int kBytes>
struct Simd {
  static constexpr int64_t kLanes = kBytes / sizeof(C);
  typedef C Vector __attribute__((vector_size(kBytes)));
  typedef C Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(C)), may_alias));
  static TTT_INLINE Vector load(const C* from) { return *(const Unaligned*)from; }
  static TTT_INLINE Vector load(const uint16_t* from) {
    return (Vector)Bfloat16<kBytes>::load(from);
  }
  static TTT_INLINE void store(C* to, const Vector& value) { *(Unaligned*)to = value; }
  // Halves are added until one element is left.
  static TTT_INLINE C sum(const Vector& v) {
    if constexpr (kLanes == 2) {
      return v[0] + v[1];
    } else {
      using Half = Simd<C, kBytes / 2>;
      typename Half::Vector low, high;
      memcpy(&low, &v, sizeof low);
      memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Half::sum(low + high);
    }
  }
};

TTT_INLINE float value(float x) { return x; }
TTT_INLINE double value(double x) { return x; }
TTT_INLINE float value(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// y[t][r] = <x[t], w[r]> for T tokens and R rows of W; `ahead` is a row that is needed soon.
template <class C, class W, int kBytes, int T, int R>
TTT_INLINE void dots(const C* x, int64_t ldx, const W* w, int64_t ldw, int64_t n, C* y, int64_t ldy,
                     const W* ahead) {
  using S = Simd<C, kBytes>;
  typename S::Vector sums[T][R] = {};
  const int64_t whole = n / S::kLanes * S::kLanes;
  for (int64_t i = 0; i < whole; i += S::kLanes) {
    __builtin_prefetch(ahead + i, 0, 2);
    typename S::Vector row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = S::load(w + r * ldw + i);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const typename S::Vector token = S::load(x + t * ldx + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[t][r] += token * row[r];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      C total = S::sum(sums[t][r]);
      for (int64_t i = whole; i < n; ++i) total += x[t * ldx + i] * value(w[r * ldw + i]);
      y[t * ldy + r] = total;
    }
  }
}

// y[t][0 .. V vectors) += sum over k < depth of x[t][k] w[k][0 .. V vectors); `ahead` is a vector
// of a row that is needed soon.
template <class C, class W, int kBytes, int T, int V>
TTT_INLINE void axpys(const C* x, int64_t ldx, const W* w, int64_t ldw, int64_t depth, C* y,
                      int64_t ldy, const W* ahead) {
  using S = Simd<C, kBytes>;
  typename S::Vector sums[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[t][v] = S::load(y + t * ldy + v * S::kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * ldw, 0, 2);
    typename S::Vector row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = S::load(w + k * ldw + v * S::kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const C factor = x[t * ldx + k];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[t][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(y + t * ldy + v * S::kLanes, sums[t][v]);
  }
}

// Call f(b, t, T) for blocks b of at most kMost tokens from t on, T their number as a constant.
template <int kMost, class F>
TTT_INLINE void for_tokens(int64_t tokens, const F& f) {
  const int64_t blocks = (tokens + kMost - 1) / kMost;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t t = tokens * b / blocks;
    switch (tokens * (b + 1) / blocks - t) {
      case 1:
        f(b, t, std::integral_constant<int, 1>());
        break;
      case 2:
        f(b, t, std::integral_constant<int, 2>());
        break;
      case 3:
        f(b, t, std::integral_constant<int, 3>());
        break;
      case 4:
        f(b, t, std::integral_constant<int, 4>());
        break;
      case 5:
        f(b, t, std::integral_constant<int, 5>());
        break;
      default:
        f(b, t, std::integral_constant<int, 6>());
        break;
    }
  }
}

// y (tokens, rows) = x (tokens, n) w (rows, n)'. kMost tokens at a time: as registers allow.
template <class C, class W, int kBytes, int kMost>
TTT_INLINE void product_by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,
                                int64_t rows, Matrix<C> y) {
  const int64_t whole = rows / kRows * kRows;
  for (int64_t group = 0; group < whole; group += kGroup) {
    const int64_t end = std::min(group + kGroup, whole);
    for_tokens<kMost>(tokens, [&](int64_t b, int64_t t, auto T) TTT_LAMBDA {
      // The tokens stay in the L1 cache for a group of rows, which stays in the L2 cache for all
      // tokens. Each block of tokens fetches another kGroup / kRows rows of the next group.
      for (int64_t r = group; r < end; r += kRows) {
        const int64_t ahead = (b * kGroup + r - group) / kRows;
        const int64_t next = ahead < kGroup ? std::min(group + kGroup + ahead, rows - 1) : r;
        dots<C, W, kBytes, T(), kRows>(x.at(t, 0), x.stride, w.at(r, 0), w.stride, n, y.at(t, r),
                                       y.stride, w.at(next, 0));
      }
    });
  }
  for (int64_t r = whole; r < rows; ++r) {
    for_tokens<kMost>(tokens, [&](int64_t, int64_t t, auto T) TTT_LAMBDA {
      dots<C, W, kBytes, T(), 1>(x.at(t, 0), x.stride, w.at(r, 0), w.stride, n, y.at(t, r),
                                 y.stride, w.at(r, 0));
    });
  }
}

// y (tokens, columns) += x (tokens, n) w (n, columns).
template <class C, class W, int kBytes, int kMost>
TTT_INLINE void add_product_by_columns(Matrix<const C> x, int64_t tokens, int64_t n,
                                       Matrix<const W> w, int64_t columns, Matrix<C> y) {
  constexpr int64_t kLanes = Simd<C, kBytes>::kLanes;
  for (int64_t k = 0; k < n; k += kDepth) {
    const int64_t depth = std::min(kDepth, n - k);
    // Each block of tokens fetches another vector of the same columns of the next rows.
    const int64_t next = std::min(k + kDepth, n - depth);
    int64_t c = 0;
    for (; c + kVectors * kLanes <= columns; c += kVectors * kLanes) {
      for_tokens<kMost>(tokens, [&](int64_t b, int64_t t, auto T) TTT_LAMBDA {
        axpys<C, W, kBytes, T(), kVectors>(x.at(t, k), x.stride, w.at(k, c), w.stride, depth,
                                           y.at(t, c), y.stride,
                                           w.at(next, c + b % kVectors * kLanes));
      });
    }
    for (; c + kLanes <= columns; c += kLanes) {
      for_tokens<kMost>(tokens, [&](int64_t, int64_t t, auto T) TTT_LAMBDA {
        axpys<C, W, kBytes, T(), 1>(x.at(t, k), x.stride, w.at(k, c), w.stride, depth, y.at(t, c),
                                    y.stride, w.at(next, c));
      });
    }
    for (; c < columns; ++c) {
      for (int64_t t = 0; t < tokens; ++t) {
        C sum = *y.at(t, c);
        for (int64_t j = 0; j < depth; ++j) sum += *x.at(t, k + j) * value(*w.at(k + j, c));
        *y.at(t, c) = sum;
      }
    }
  }
}

// Overloads of one name for several targets: the loader of the library takes the best. Sixteen
// vector registers hold the sums of 2 tokens and what they are made of, thirty-two those of 6.
#define TTT_PRODUCTS_OF(C, W, target, bytes, most)                                            \
  TTT_TARGET(target)                                                                          \
  void by_rows(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w, int64_t rows, \
               Matrix<C> y) {                                                                 \
    product_by_rows<C, W, bytes, most>(x, tokens, n, w, rows, y);                             \
  }                                                                                           \
  TTT_TARGET(target)                                                                          \
  void by_columns(Matrix<const C> x, int64_t tokens, int64_t n, Matrix<const W> w,            \
                  int64_t columns, Matrix<C> y) {                                             \
    add_product_by_columns<C, W, bytes, most>(x, tokens, n, w, columns, y);                   \
  }
#define TTT_PRODUCTS(target, bytes, most)               \
  TTT_PRODUCTS_OF(float, float, target, bytes, most)    \
  TTT_PRODUCTS_OF(float, uint16_t, target, bytes, most) \
  TTT_PRODUCTS_OF(double, double, target, bytes, most)
TTT_PRODUCTS("default", 16, 2)
#if defined(__x86_64__) && defined(__gnu_linux__)
TTT_PRODUCTS("arch=x86-64-v3", 32, 2)
TTT_PRODUCTS("arch=x86-64-v4", 64, 6)
#endif

// One call with its matrices in their types: arithmetic in C, storage in S.
template <class C, class S>
struct DeltaLinear {
  const DeltaLinearCall& call;
  std::vector<C> wide_x;  // x in C where it is stored in another type
  std::vector<C> scores;  // (x a') o -beta, (batch, tokens, rank)

  explicit DeltaLinear(const DeltaLinearCall& c)
      : call(c), scores(size_t(c.batch * c.tokens * c.rank)) {
    if constexpr (!std::is_same_v<C, S>) {
      const S* const from = static_cast<const S*>(call.x);
      wide_x.resize(size_t(call.batch * call.tokens * call.in));
      for (size_t i = 0; i < wide_x.size(); ++i) wide_x[i] = value(from[i]);
    }
  }

  Matrix<const C> x(int64_t b) const {
    const C* data;
    if constexpr (std::is_same_v<C, S>) {
      data = static_cast<const C*>(call.x);
    } else {
      data = wide_x.data();
    }
    return {data + b * call.tokens * call.in, call.in};
  }

  static Matrix<const S> rows(const Factor& factor, int64_t b, int64_t row, int64_t column) {
    return {
        static_cast<const S*>(factor.data) + b * factor.batch_stride + row * factor.stride + column,
        factor.stride};
  }

  Matrix<C> scores_of(int64_t b, int64_t from) {
    return {&scores[size_t(b * call.tokens * call.rank + from)], call.rank};
  }

  void score(int64_t b, int64_t from, int64_t to) {
    const Matrix<C> h = scores_of(b, from);
    by_rows(x(b), call.tokens, call.in, rows(call.a, b, from, 0), to - from, h);
    const C* const beta = static_cast<const C*>(call.beta) + b * call.rank + from;
    for (int64_t t = 0; t < call.tokens; ++t) {
      for (int64_t r = 0; r < to - from; ++r) *h.at(t, r) *= -beta[r];
    }
  }

  // Columns [c, c + n) of y for all of the batch.
  void columns(int64_t c, int64_t n) {
    const int64_t tokens = call.batch * call.tokens;
    // Elsewhere while it is small: rows of y lie pages apart.
    const bool own = std::is_same_v<C, S> && call.weight_by_columns;
    std::vector<C> scratch(own ? 0 : size_t(tokens * n));
    const Matrix<C> block =
        own ? Matrix<C>{static_cast<C*>(call.y) + c, call.out} : Matrix<C>{scratch.data(), n};
    const S* const weight = static_cast<const S*>(call.weight);
    const int64_t stride = call.weight_stride;
    if (weight == nullptr || call.weight_by_columns) {
      for (int64_t t = 0; t < tokens; ++t) std::fill_n(block.at(t, 0), n, C(0));
    }
    if (weight == nullptr) {
      // Only the delta is asked for.
    } else if (call.weight_by_columns) {
      by_columns(x(0), tokens, call.in, {weight + c, stride}, n, block);
    } else {
      by_rows(x(0), tokens, call.in, {weight + c * stride, stride}, n, block);
    }
    const C* const rho = static_cast<const C*>(call.rho);
    for (int64_t b = 0; b < call.batch; ++b) {
      const Matrix<C> part = {block.at(b * call.tokens, 0), block.stride};
      for (int64_t t = 0; rho != nullptr && t < call.tokens; ++t) {
        for (int64_t k = 0; k < n; ++k) *part.at(t, k) *= rho[b];
      }
      const Matrix<C> h = scores_of(b, 0);
      by_columns({h.data, h.stride}, call.tokens, call.rank, rows(call.d, b, 0, c), n, part);
    }
    S* const y = static_cast<S*>(call.y) + c;
    for (int64_t t = 0; !own && t < tokens; ++t) {
      if constexpr (std::is_same_v<C, S>) {
        memcpy(y + t * call.out, block.at(t, 0), size_t(n) * sizeof(C));
      } else {
        char* const to = reinterpret_cast<char*>(y + t * call.out);
        narrow(Dtype::BF16, block.at(t, 0), n, to, Noise(), 0);
      }
    }
  }

  void run() {
    const int64_t blocks = (call.rank + kRows - 1) / kRows;
    const int64_t grain = 1 + 16384 / (1 + call.tokens * call.in / 8);
    parallel_ranges(call.batch * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t b = i / blocks, stop = std::min(last, (b + 1) * blocks);
        score(b, (i - b * blocks) * kRows, std::min(call.rank, (stop - b * blocks) * kRows));
        i = stop;
      }
    });
    parallel_ranges((call.out + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
      // By columns, the whole range at a time: the rows of W are then read as they lie.
      const int64_t step = call.weight_by_columns ? last - first : 1;
      for (int64_t i = first; i < last; i += step) {
        columns(i * kColumns, std::min(call.out, (i + step) * kColumns) - i * kColumns);
      }
    });
  }
};

}  // namespace

void delta_linear_cpu(const DeltaLinearCall& call) {
  switch (call.dtype) {
    case Dtype::F64:
      DeltaLinear<double, double>(call).run();
      break;
    case Dtype::BF16:
      DeltaLinear<float, uint16_t>(call).run();
      break;
    default:
      DeltaLinear<float, float>(call).run();
      break;
  }
}

}  // namespace ttt_fast
