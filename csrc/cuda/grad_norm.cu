// Sum of the squares of all gradients of a call, and its square root.
// Fused: conversion, square and float64 sum over all tensors in one pass; a second launch of one
// block adds the sums of the chunks, always in the same order.
// Bytes per element: 4 in float32, 2 in bfloat16, read once. Bound: memory bandwidth where float64
// runs at half the rate of float32 (data centre), its arithmetic where it runs at a 64th.
// Reference: grad_norm in ttt_fast/reference.py (same sum, another order).
#include "reduce.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

template <class Storage, int N>
__device__ __forceinline__ double squares(const Storage* from, double sum) {
  Storage values[N];
  load(from, values);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const double x = double(widen(values[k]));
    sum = fma(x, x, sum);
  }
  return sum;
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const Table table, double* partial) {
  constexpr int kPack = 16 / int(sizeof(Storage));
  const auto* grad = at_address<const Storage>(table.pointers[blockIdx.x]);
  const int numel = table.numel[blockIdx.x], thread = int(threadIdx.x);
  const int in_packs = table.aligned ? numel / kPack * kPack : 0;
  double sum = 0;
#pragma unroll 4
  for (int i = thread * kPack; i < in_packs; i += kThreads * kPack) {
    sum = squares<Storage, kPack>(grad + i, sum);
  }
  for (int i = in_packs + thread; i < numel; i += kThreads)
    sum = squares<Storage, 1>(grad + i, sum);
  sum = block_sum(sum);
  if (thread == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    norm_of_sums_kernel(const double* partial, int64_t n, void* norm, bool wide) {
  const double root = sqrt(strided_sum(partial, n, 1));
  if (threadIdx.x != 0) return;
  if (wide) {
    *static_cast<double*>(norm) = root;
  } else {
    *static_cast<float*>(norm) = float(root);
  }
}

}  // namespace

extern "C" int ttt_fast_cuda_sum_of_squares(const Table* table, Dtype dtype, double* partial,
                                            void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    return launch(sum_of_squares_kernel<decltype(storage)>, table->n_chunks, 1, stream, *table,
                  partial);
  });
}

extern "C" int ttt_fast_cuda_norm_of_sums(const double* partial, int64_t n, void* norm, bool wide,
                                          void* stream) {
  return launch(norm_of_sums_kernel, 1, 1, stream, partial, n, norm, wide);
}

extern "C" const char* ttt_fast_cuda_error(int code) {
  return cudaGetErrorString(cudaError_t(code));
}

}  // namespace cuda
}  // namespace ttt_fast
