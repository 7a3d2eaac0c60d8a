// Sum of the squares of all gradients of a call.
// Fused: conversion, square and float64 sum over all tensors in one pass.
// Bytes per element: 4 in float32, 2 in bfloat16, read once. Bound: memory bandwidth.
// Reference: grad_norm in ttt_fast/reference.py (same sum, another order).
#include "blocks.h"

namespace ttt_fast {
namespace {

typedef double Lanes __attribute__((vector_size(64), aligned(8)));
constexpr int64_t kLanes = 8;

// Four accumulators of eight lanes hide the latency of the addition. Their number is fixed, and
// with it the order of the sum, for every instruction set.
template <class C>
TTT_HOST_DEVICE double square_sum_loop(const C* x, int64_t n) {
  typedef C Narrow __attribute__((vector_size(kLanes * sizeof(C)), aligned(sizeof(C))));
  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) {
      Narrow narrow;
      memcpy(&narrow, x + i + k * kLanes, sizeof narrow);
      const Lanes wide = __builtin_convertvector(narrow, Lanes);
      sums[k] += wide * wide;
    }
  }
  const Lanes total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += total[k];
  for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
  return sum;
}

TTT_CLONES double square_sum(const float* x, int64_t n) { return square_sum_loop(x, n); }
TTT_CLONES double square_sum(const double* x, int64_t n) { return square_sum_loop(x, n); }

template <class C>
double chunk_square_sum(const View& grad, const Chunk& chunk) {
  Block<C> block;
  double sum = 0;
  for (int64_t at = chunk.begin; at < chunk.begin + chunk.length; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.begin + chunk.length - at);
    sum += square_sum(block.read(grad, at, n), n);
  }
  return sum;
}

}  // namespace

double sum_of_squares_cpu(const Views& grads) {
  const std::vector<Chunk> chunks = make_chunks(grads);
  std::vector<double> partial(chunks.size());
  parallel_ranges(int64_t(chunks.size()), chunk_grain(chunks), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const View& grad = grads[chunks[c].tensor];
      partial[c] = grad.dtype == Dtype::F64 ? chunk_square_sum<double>(grad, chunks[c])
                                            : chunk_square_sum<float>(grad, chunks[c]);
    }
  });
  double sum = 0;
  for (const double term : partial) sum += term;
  return sum;
}

}  // namespace ttt_fast
