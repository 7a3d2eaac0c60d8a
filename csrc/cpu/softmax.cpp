// Loops over a row of numbers that a softmax is made of. Bound: arithmetic of exp, or the L1 cache.
// Reference: torch.softmax, as nll_ and attention in ttt_fast/reference.py use it.
#include "softmax.h"

#include <limits>

#include "exponential.h"

namespace ttt_fast {
namespace {

// The number of lanes is fixed, and with it the order of a sum, for every instruction set.
constexpr int64_t kLanes = 64;

// f(lane, element) on all elements, then on both halves of the lanes until one is left.
template <int64_t kWidth = kLanes / 2, class C, class F>
TTT_HOST_DEVICE C folded(C* lanes, const F& f) {
  for (int64_t k = 0; k < kWidth; ++k) lanes[k] = f(lanes[k], lanes[k + kWidth]);
  if constexpr (kWidth > 1) return folded<kWidth / 2>(lanes, f);
  return lanes[0];
}

template <class C, class F>
TTT_HOST_DEVICE C reduce_loop(const C* __restrict x, int64_t n, C neutral, const F& f) {
  C lanes[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] = neutral;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = f(lanes[k], x[i + k]);
  }
  for (int64_t k = 0; k < n - whole; ++k) lanes[k] = f(lanes[k], x[whole + k]);
  return folded(lanes, f);
}

template <class C>
TTT_HOST_DEVICE C maximum_loop(const C* __restrict z, int64_t n) {
  const auto larger = [](C a, C b) __attribute__((always_inline)) { return b > a ? b : a; };
  return reduce_loop(z, n, -std::numeric_limits<C>::infinity(), larger);
}

template <class C>
TTT_HOST_DEVICE C sum_loop(const C* __restrict e, int64_t n) {
  const auto plus = [](C a, C b) __attribute__((always_inline)) { return a + b; };
  return reduce_loop(e, n, C(0), plus);
}

template <class C>
TTT_HOST_DEVICE void exponential_loop(const C* __restrict z, C maximum, int64_t n,
                                      C* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = exponential(z[i] - maximum);
}

// Small values become 0 before the product, which then makes no denormal.
template <class C>
TTT_HOST_DEVICE void scale_loop(const C* __restrict e, C smallest, C factor, int64_t n,
                                C* __restrict p) {
  for (int64_t i = 0; i < n; ++i) p[i] = (e[i] < smallest ? C(0) : e[i]) * factor;
}

}  // namespace

// target_clones does not take templates, hence one function for each type.
TTT_CLONES float maximum(const float* z, int64_t n) { return maximum_loop(z, n); }
TTT_CLONES double maximum(const double* z, int64_t n) { return maximum_loop(z, n); }
TTT_CLONES void exponentials(const float* z, float maximum, int64_t n, float* e) {
  exponential_loop(z, maximum, n, e);
}
TTT_CLONES void exponentials(const double* z, double maximum, int64_t n, double* e) {
  exponential_loop(z, maximum, n, e);
}
TTT_CLONES float sum(const float* e, int64_t n) { return sum_loop(e, n); }
TTT_CLONES double sum(const double* e, int64_t n) { return sum_loop(e, n); }
TTT_CLONES void scale(const float* e, float smallest, float factor, int64_t n, float* p) {
  scale_loop(e, smallest, factor, n, p);
}
TTT_CLONES void scale(const double* e, double smallest, double factor, int64_t n, double* p) {
  scale_loop(e, smallest, factor, n, p);
}

}  // namespace ttt_fast
