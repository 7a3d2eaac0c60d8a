// Copies of all tensors of a call in one launch.
// Fused: nothing but the list. Bytes per element: read and write of the element once.
// Bound: memory bandwidth; four packs of 16 bytes are under way in each thread.
// Reference: copy_ in ttt_fast/reference.py.
#include "pack.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

// Bits of an element.
template <int kBytes>
struct Bits {
  uint8_t bytes[kBytes];
};
template <>
struct Bits<2> {
  uint16_t bits;
};
template <>
struct Bits<4> {
  uint32_t bits;
};
template <>
struct Bits<8> {
  uint64_t bits;
};
template <>
struct Bits<16> {
  uint64_t bits[2];
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads) copy_kernel(const Table table) {
  using Element = Bits<kBytes>;
  constexpr int kPack = 16 / kBytes;
  auto* dst = in_global_memory(at_address<Element>(table.pointers[blockIdx.x]));
  const auto* src = in_global_memory(
      at_address<const Element>(table.pointers[int64_t(table.n_chunks) + blockIdx.x]));
  const int numel = table.numel[blockIdx.x], thread = int(threadIdx.x);
  const int packs = table.aligned ? numel / kPack : 0;
  auto* to = reinterpret_cast<uint4*>(dst);
  const auto* from = reinterpret_cast<const uint4*>(src);
  int pack = thread;
#pragma unroll 1
  for (; pack + 3 * kThreads < packs; pack += 4 * kThreads) {
    uint4 values[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k] = from[pack + k * kThreads];
#pragma unroll
    for (int k = 0; k < 4; ++k) to[pack + k * kThreads] = values[k];
  }
#pragma unroll 1
  for (; pack < packs; pack += kThreads) to[pack] = from[pack];
#pragma unroll 1
  for (int i = packs * kPack + thread; i < numel; i += kThreads) dst[i] = src[i];
}

}  // namespace

extern "C" int ttt_fast_cuda_copy(const Table* table, int32_t element_size, void* stream) {
  const auto run = [&](auto kernel) { return launch(kernel, table->n_chunks, 1, stream, *table); };
  switch (element_size) {
    case 1:
      return run(copy_kernel<1>);
    case 2:
      return run(copy_kernel<2>);
    case 4:
      return run(copy_kernel<4>);
    case 8:
      return run(copy_kernel<8>);
    case 16:
      return run(copy_kernel<16>);
    default:
      return int(cudaErrorInvalidValue);
  }
}

}  // namespace cuda
}  // namespace ttt_fast
