// Squared norms of gradients dy' x from the Gram matrices of x and of dy.
// Fused: conversion, both products and the sum over their elements: a block has the tile of one
// Gram matrix in registers while it makes the other's, and neither leaves the chip. The matrices
// are symmetric: only tiles on and above the diagonal are computed. A second launch adds up.
// Bytes per element: 4 in float32, 2 in bfloat16, read once for each row of tiles (from the L2
// cache after the first). Bound: float32 arithmetic, M / 2 products per element; tensor cores are
// what the Triton kernel has, kernels/gram_norm.py.
// Reference: gram_norm in ttt_fast/factor_reference.py (same products, sums in another order).
#include "reduce.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

constexpr int kColumns = 64;  // of one stage in shared memory: eight for each warp
constexpr int kPitch = kGramTile + 1;
constexpr int kOfWarp = kColumns / kWarps;
constexpr int kDown = 4, kAcross = 8;  // elements of the tile in each lane
constexpr int kLanesAcross = kGramTile / kAcross;
constexpr int kOfThread = kGramTile * kGramTile / kThreads;

// Sums need not round as another place does; fused they take half the instructions.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

template <class C>
struct Stage {
  C left[kColumns][kPitch], right[kColumns][kPitch];
};

// Columns [at, at + kColumns) of rows [row, row + kGramTile), transposed; zeros outside.
template <class Storage>
__device__ __forceinline__ void stage_rows(const Rows& rows, const Storage* data, int64_t tokens,
                                           int64_t row, int64_t at,
                                           Compute<Storage> (&to)[kColumns][kPitch]) {
  constexpr int kPack = 16 / int(sizeof(Storage)), kPacks = kColumns / kPack;
  for (int p = int(threadIdx.x); p < kGramTile * kPacks; p += kThreads) {
    const int r = p / kPacks, c = p % kPacks * kPack;
    const int64_t column = at + c;
    Storage values[kPack] = {};
    if (row + r < tokens) {
      const Storage* from = data + (row + r) * rows.stride + column;
      if (rows.aligned && column + kPack <= rows.width) {
        load(from, values);
      } else {
        for (int k = 0; k < kPack && column + k < rows.width; ++k) values[k] = from[k];
      }
    }
#pragma unroll
    for (int k = 0; k < kPack; ++k) to[c + k][r] = widen(values[k]);
  }
}

// The tile (i, j) of a Gram matrix; each thread gets kOfThread of its elements.
template <class Storage>
__device__ __forceinline__ void gram_tile(const Rows& rows, int64_t batch, int64_t tokens,
                                          int64_t i, int64_t j,
                                          Compute<Storage> (&elements)[kOfThread]) {
  using C = Compute<Storage>;
  __shared__ Stage<C> stage;
  __shared__ C tile[kGramTile][kPitch];
  const auto* data = static_cast<const Storage*>(rows.data) + batch * rows.batch_stride;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int down = lane / kLanesAcross * kDown, across = lane % kLanesAcross * kAcross;
  C sums[kDown][kAcross] = {};
  for (int64_t at = 0; at < rows.width; at += kColumns) {
    stage_rows<Storage>(rows, data, tokens, i * kGramTile, at, stage.left);
    stage_rows<Storage>(rows, data, tokens, j * kGramTile, at, stage.right);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOfWarp; ++k) {
      const int column = warp * kOfWarp + k;
      C left[kDown], right[kAcross];
#pragma unroll
      for (int p = 0; p < kDown; ++p) left[p] = stage.left[column][down + p];
#pragma unroll
      for (int q = 0; q < kAcross; ++q) right[q] = stage.right[column][across + q];
#pragma unroll
      for (int p = 0; p < kDown; ++p) {
#pragma unroll
        for (int q = 0; q < kAcross; ++q) {
          sums[p][q] = multiply_add(left[p], right[q], sums[p][q]);
        }
      }
    }
    __syncthreads();
  }
  // The warps have the same elements, each of its own columns; they add them in turn.
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int p = 0; p < kDown; ++p) {
#pragma unroll
        for (int q = 0; q < kAcross; ++q) {
          C& element = tile[down + p][across + q];
          element = turn == 0 ? sums[p][q] : element + sums[p][q];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) {
    const int e = k * kThreads + int(threadIdx.x);
    elements[k] = tile[e / kGramTile][e % kGramTile];
  }
  // The next tile takes the same memory.
  __syncthreads();
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    gram_norm_kernel(const Rows x, const Rows dy, int64_t tokens, double* partial) {
  // Tile pairs column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
  int64_t i = blockIdx.x, j = 0;
  while (i > j) i -= ++j;
  Compute<Storage> of_x[kOfThread], of_dy[kOfThread];
  gram_tile<Storage>(x, blockIdx.y, tokens, i, j, of_x);
  gram_tile<Storage>(dy, blockIdx.y, tokens, i, j, of_dy);
  double sum = 0;
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) sum = fma(double(of_x[k]), double(of_dy[k]), sum);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    partial[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = i == j ? sum : 2 * sum;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    gram_total_kernel(const double* partial, int64_t pairs, C* norms) {
  const double sum = strided_sum(partial + int64_t(blockIdx.x) * pairs, pairs, 1);
  // Tokens that cancel each other leave rounding errors of either sign; NaN stays.
  if (threadIdx.x == 0) norms[blockIdx.x] = C(sum < 0 ? 0 : sum);
}

}  // namespace

extern "C" int ttt_fast_cuda_gram_norm(const Rows* x, const Rows* dy, Dtype dtype, int64_t batch,
                                       int64_t tokens, double* partial, void* norms, void* stream) {
  return for_dtype(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using C = Compute<Storage>;
    const int64_t pairs = gram_tile_pairs(tokens);
    const int code =
        launch(gram_norm_kernel<Storage>, pairs, batch, stream, *x, *dy, tokens, partial);
    if (code != 0) return code;
    return launch(gram_total_kernel<C>, batch, 1, stream, partial, pairs, static_cast<C*>(norms));
  });
}

}  // namespace cuda
}  // namespace ttt_fast
