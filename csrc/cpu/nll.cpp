// Token losses and the gradient of the logits, in place of the logits.
// Fused: conversion, maximum, exponentials, their sum, loss, softmax - onehot, rounding; stock
// torch writes log softmax and its gradient beside the logits. A row is read three times, from
// memory the first time, and its exponentials are computed twice: cheaper than to keep them (a row
// of float32 does not fit the L1 cache, and 16-bit rows have no room for them). Bytes per element:
// 8 in float32, 4 in bfloat16. Bound: arithmetic of exp, then memory bandwidth. Reference: nll_ in
// ttt_fast/reference.py.
#include <limits>

#include "exponential.h"

namespace ttt_fast {
namespace {

constexpr int64_t kLanes = 64;

template <class C>
TTT_HOST_DEVICE C maximum_loop(const C* __restrict z, int64_t n) {
  C lanes[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] = -std::numeric_limits<C>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = z[i + k] > lanes[k] ? z[i + k] : lanes[k];
  }
  for (; i < n; ++i) lanes[0] = z[i] > lanes[0] ? z[i] : lanes[0];
  C maximum = lanes[0];
  for (int64_t k = 1; k < kLanes; ++k) maximum = lanes[k] > maximum ? lanes[k] : maximum;
  return maximum;
}

template <class C>
TTT_HOST_DEVICE void exponential_loop(const C* __restrict z, C maximum, int64_t n,
                                      C* __restrict e) {
  for (int64_t i = 0; i < n; ++i) e[i] = exponential(z[i] - maximum);
}

// The number of lanes is fixed, and with it the order of the sum, for every instruction set.
template <class C>
TTT_HOST_DEVICE C sum_loop(const C* __restrict e, int64_t n) {
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += e[i + k];
  }
  for (; i < n; ++i) lanes[i % kLanes] += e[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

// Small values become 0 before the product, which then makes no denormal.
template <class C>
TTT_HOST_DEVICE void scale_loop(const C* __restrict e, C smallest, C factor, int64_t n,
                                C* __restrict p) {
  for (int64_t i = 0; i < n; ++i) p[i] = (e[i] < smallest ? C(0) : e[i]) * factor;
}

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

template <class C>
struct RowBlocks {
  Block<C> block;
  alignas(64) C e[kBlock];
};

// f(first column, columns) on the blocks of a row.
template <class F>
void for_blocks(int64_t vocabulary, const F& f) {
  for (int64_t at = 0; at < vocabulary; at += kBlock) f(at, std::min(kBlock, vocabulary - at));
}

template <class C>
void clear_row(const View& logits, int64_t begin, int64_t vocabulary, RowBlocks<C>& scratch) {
  for_blocks(vocabulary, [&](int64_t at, int64_t n) {
    std::fill_n(scratch.block.overwrite(logits, begin + at, n), n, C(0));
    scratch.block.write(logits, begin + at, n);
  });
}

// Returns the loss. The sum leaves out the target's exponential: where that one is nearly all there
// is, nothing of the rest is lost beside it.
template <class C>
C nll_row(const View& logits, int64_t begin, int64_t vocabulary, int64_t target,
          RowBlocks<C>& scratch) {
  Block<C>& block = scratch.block;
  C largest = -std::numeric_limits<C>::infinity();
  for_blocks(vocabulary, [&](int64_t at, int64_t n) {
    const C here = maximum(block.read(logits, begin + at, n), n);
    largest = here > largest ? here : largest;
  });
  // A target out of range finds no block: its row becomes NaN.
  C others = 0, e_target = std::numeric_limits<C>::quiet_NaN(), z_target = e_target;
  for_blocks(vocabulary, [&](int64_t at, int64_t n) {
    const C* z = block.read(logits, begin + at, n);
    exponentials(z, largest, n, scratch.e);
    if (target >= at && target < at + n) {
      z_target = z[target - at];
      e_target = scratch.e[target - at];
      scratch.e[target - at] = 0;
    }
    others += sum(scratch.e, n);
  });
  const C total = others + e_target;
  const C smallest = C(0x1p-100) * total, factor = C(1) / total;
  for_blocks(vocabulary, [&](int64_t at, int64_t n) {
    C* z = block.read(logits, begin + at, n);
    exponentials(z, largest, n, scratch.e);
    scale(scratch.e, smallest, factor, n, z);
    if (target >= at && target < at + n) {
      z[target - at] = (others < smallest ? C(0) : -others) * factor;
    }
    block.write(logits, begin + at, n);
  });
  return (largest - z_target) + std::log1p(others + (e_target - C(1)));
}

template <class C>
void nll_rows(const View& logits, const View& targets, int64_t ignore_index, C* losses) {
  const int64_t rows = targets.numel, vocabulary = logits.numel / std::max<int64_t>(rows, 1);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(vocabulary, 1));
  parallel_ranges(rows, grain, [&](int64_t first, int64_t last) {
    RowBlocks<C> scratch;
    for (int64_t row = first; row < last; ++row) {
      const int64_t target = *reinterpret_cast<const int64_t*>(targets.element(row));
      if (target == ignore_index) {
        clear_row(logits, row * vocabulary, vocabulary, scratch);
        losses[row] = 0;
      } else {
        losses[row] = nll_row(logits, row * vocabulary, vocabulary, target, scratch);
      }
    }
  });
}

}  // namespace

void nll_cpu(const View& logits, const View& targets, int64_t ignore_index, void* losses) {
  if (logits.dtype == Dtype::F64) {
    nll_rows(logits, targets, ignore_index, static_cast<double*>(losses));
  } else {
    nll_rows(logits, targets, ignore_index, static_cast<float*>(losses));
  }
}

}  // namespace ttt_fast
