// Token losses and the gradient of the logits, in place of the logits.
// Fused: conversion, maximum, exponentials, their sum, loss, softmax - onehot, rounding; stock
// torch writes log softmax and its gradient beside the logits. A row is read three times, from
// memory the first time, and its exponentials are computed twice: cheaper than to keep them (a row
// of float32 does not fit the L1 cache, and 16-bit rows have no room for them). Bytes per element:
// 8 in float32, 4 in bfloat16. Bound: arithmetic of exp, then memory bandwidth. Reference: nll_ in
// ttt_fast/reference.py.
#include <limits>

#include "softmax.h"

namespace ttt_fast {
namespace {

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
