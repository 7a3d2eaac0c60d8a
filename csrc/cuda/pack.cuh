// Storage types, and memory access in packs of 16 bytes. Shared by all CUDA kernels, with the way
// in which they are launched.
#pragma once

#include <cuda_runtime.h>

#include "launchers.h"

namespace ttt_fast {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class Storage>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class Storage>
using Compute = typename ComputeType<Storage>::Type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return bf16_to_float(x.bits); }
__device__ __forceinline__ float widen(F16 x) { return f16_to_float(x.bits); }

// To nearest even.
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, Bf16& to) { to.bits = float_to_bf16(x); }
__device__ __forceinline__ void narrow(float x, F16& to) { to.bits = float_to_f16(x); }

__device__ __forceinline__ void narrow_stochastic(float x, uint32_t, float& to) { to = x; }
__device__ __forceinline__ void narrow_stochastic(double x, uint32_t, double& to) { to = x; }
__device__ __forceinline__ void narrow_stochastic(float x, uint32_t random, Bf16& to) {
  to.bits = float_to_bf16_stochastic(x, random);
}
__device__ __forceinline__ void narrow_stochastic(float x, uint32_t random, F16& to) {
  to.bits = float_to_f16_stochastic(x, random);
}

// Said to be in global memory: an access that could be to shared memory as well is slower (the
// machine code has LD in place of LDG).
template <class T>
__device__ __forceinline__ T* in_global_memory(T* pointer) {
  return reinterpret_cast<T*>(__cvta_global_to_generic(reinterpret_cast<size_t>(pointer)));
}

// What an address in a table points to. Not yet said to be in global memory: nvcc 13.0 does not
// come to an end where that is said of addresses that a class keeps.
template <class T>
__device__ __forceinline__ T* at_address(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// N elements at once: N == 1, or a multiple of 16 bytes at an address that is one, too.
template <class T, int N>
__device__ __forceinline__ void load(const T* from, T (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = *in_global_memory(from);
  } else {
    constexpr int kPacks = N * int(sizeof(T)) / 16;
    static_assert(kPacks * 16 == N * sizeof(T), "whole packs");
    uint4 packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      packs[k] = in_global_memory(reinterpret_cast<const uint4*>(from))[k];
    memcpy(to, packs, sizeof to);
  }
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const T (&from)[N]) {
  if constexpr (N == 1) {
    *in_global_memory(to) = from[0];
  } else {
    constexpr int kPacks = N * int(sizeof(T)) / 16;
    uint4 packs[kPacks];
    memcpy(packs, from, sizeof from);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) in_global_memory(reinterpret_cast<uint4*>(to))[k] = packs[k];
  }
}

// Call launch(Storage()) with the storage type that a dtype names.
template <class F>
int for_dtype(Dtype dtype, const F& launch) {
  switch (dtype) {
    case Dtype::F32:
      return launch(float());
    case Dtype::BF16:
      return launch(Bf16());
    case Dtype::F16:
      return launch(F16());
    case Dtype::F64:
      return launch(double());
    default:
      return int(cudaErrorInvalidValue);
  }
}

// An ordinary function, not <<<>>>: a C++ compiler can read it, and so the tests can run it.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t batch, void* stream,
           const Arguments&... arguments) {
  if (blocks == 0 || batch == 0) return int(cudaSuccess);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks), unsigned(batch));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return int(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace cuda
}  // namespace ttt_fast
