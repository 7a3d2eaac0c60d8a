// Sums and counts over a block, in an order that is always the same.
#pragma once

#include "pack.cuh"

namespace ttt_fast {
namespace cuda {

// The sum of all threads' values, in thread 0; every thread must come here.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double of_warps[kWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  // A second call must not overwrite what thread 0 still reads.
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) value += of_warps[warp];
  }
  return value;
}

// Σ values[stride * k] over all k < n, in thread 0.
__device__ __forceinline__ double strided_sum(const double* values, int64_t n, int stride) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) sum += values[stride * k];
  return block_sum(sum);
}

}  // namespace cuda
}  // namespace ttt_fast
