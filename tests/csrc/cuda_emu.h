// Runs CUDA C++ kernels on the CPU, for tests: g++ compiles the unmodified .cu against this header
// alone, no CUDA toolkit is needed.
//
// Every CUDA thread is a fiber: a stack that runs until it waits at a barrier or a warp operation.
// Blocks run one after the other. What a GPU leaves open is chosen by cuda_emu_order(seed): 0 runs
// threads and blocks in ascending order, 1 in descending order, any other number in a random order,
// another one after each barrier. A missing barrier changes the result in some of them.
//
// A barrier that not all threads reach, a warp operation whose mask leaves out its caller or names
// a lane that has exited, and a deadlock end the launch with an error that says so.
//
// What kernels may use: threadIdx, blockIdx, blockDim, gridDim; static __shared__ variables;
// __syncthreads, __shfl_up_sync, __shfl_down_sync, __shfl_xor_sync; atomicAdd, atomicMin; uint4;
// cudaLaunchKernelEx. Not: <<<>>>, dynamic shared memory, inline PTX, matrix instructions, blocks
// that wait for each other.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not run at the same time

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_emu {

// ------------------------------------------------------------------ fibers

#if defined(__x86_64__)
// Twelve instructions; ucontext would make two system calls for each switch.
extern "C" void cuda_emu_switch(void** save_stack, void* load_stack);
__asm__(
    ".text\n.weak cuda_emu_switch\n.type cuda_emu_switch,@function\ncuda_emu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
    ".size cuda_emu_switch,.-cuda_emu_switch\n");

struct Context {
  void* stack = nullptr;
};
inline void switch_context(Context& from, Context& to) { cuda_emu_switch(&from.stack, to.stack); }
inline void make_context(Context& context, char* stack, size_t size, void (*run)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run);
  for (int k = 0; k < 6; ++k) *--top = nullptr;
  context.stack = top;
}
#else
#include <ucontext.h>
struct Context {
  ucontext_t context;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void make_context(Context& context, char* stack, size_t size, void (*run)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, run, 0);
}
#endif

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

// Where a barrier stands in the source. Not its address: a compiler that does not know barriers may
// have copied it.
struct Site {
  const char* file;
  int line;
};

struct Barrier {
  int arrived = 0, generation = 0;
  Site site = {"", 0};
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  bool done = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<int> warp_live;
  std::vector<unsigned char> exchange;  // 16 bytes for each thread
  Barrier block;
  Context host;
  const std::function<void()>* kernel = nullptr;
  int current = 0, live = 0;
  long progress = 0;
  unsigned order = 0;
  std::mt19937 random;
  std::string error;
};
inline Machine machine;

inline void to_host() { switch_context(machine.fibers[machine.current].context, machine.host); }

// End the launch. Nothing of the kernel runs any more; what its fibers hold has no destructors.
[[noreturn]] inline void fail(const std::string& what) {
  machine.error = what + " (block " + std::to_string(blockIdx.x) + ", " +
                  std::to_string(blockIdx.y) + ", thread " + std::to_string(machine.current) + ")";
  to_host();
  abort();
}

inline void wait(Barrier& barrier, int needed, Site site) {
  if (barrier.arrived > 0 &&
      (barrier.site.line != site.line || strcmp(barrier.site.file, site.file) != 0)) {
    fail("threads wait at different barriers, lines " + std::to_string(barrier.site.line) +
         " and " + std::to_string(site.line));
  }
  barrier.site = site;
  ++machine.progress;
  const int generation = barrier.generation;
  if (++barrier.arrived >= needed) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    const uint3 index = threadIdx;
    to_host();
    threadIdx = index;
  }
}

inline void run_fiber() {
  const int me = machine.current;
  (*machine.kernel)();
  machine.fibers[me].done = true;
  --machine.live;
  --machine.warp_live[me / kWarp];
  ++machine.progress;
  if (machine.block.arrived > 0) fail("a thread exited while others wait in __syncthreads");
  if (machine.warps[me / kWarp].arrived > 0) fail("a lane exited while others of its warp wait");
  to_host();
}

inline void start_block(int threads) {
  while (int(machine.fibers.size()) < threads) {
    Fiber fiber;
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fiber.stack = static_cast<char*>(memory);
    machine.fibers.push_back(fiber);
  }
  const int warps = (threads + kWarp - 1) / kWarp;
  machine.warps.assign(warps, Barrier());
  machine.warp_live.assign(warps, 0);
  machine.exchange.resize(size_t(threads) * 16);
  machine.block = Barrier();
  machine.live = threads;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    fiber.done = false;
    fiber.index = {unsigned(t) % blockDim.x, unsigned(t) / blockDim.x % blockDim.y,
                   unsigned(t) / (blockDim.x * blockDim.y)};
    ++machine.warp_live[t / kWarp];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStack);  // a launch that failed left its frames
#endif
    make_context(fiber.context, fiber.stack, kStack, run_fiber);
  }
}

inline void permute(std::vector<int>& order) {
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), machine.random);
}

inline void run_block(int threads) {
  start_block(threads);
  std::vector<int> order(threads);
  while (machine.live > 0) {
    const long before = machine.progress;
    permute(order);
    for (const int t : order) {
      if (machine.fibers[t].done) continue;
      machine.current = t;
      threadIdx = machine.fibers[t].index;
      switch_context(machine.host, machine.fibers[t].context);
      if (!machine.error.empty()) return;
    }
    if (machine.progress == before) {
      machine.error = "deadlock: no thread can go on";
      return;
    }
  }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const int64_t threads = int64_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const int64_t blocks = int64_t(config.gridDim.x) * config.gridDim.y * config.gridDim.z;
  machine.error.clear();
  if (threads < 1 || threads > 1024 || blocks < 1 || config.gridDim.y > 65535) {
    machine.error = "invalid configuration argument";
    return cudaErrorInvalidValue;
  }
  blockDim = config.blockDim, gridDim = config.gridDim;
  machine.kernel = &kernel;
  std::vector<int> order(static_cast<size_t>(blocks));
  permute(order);
  for (const int b : order) {
    blockIdx = {unsigned(b) % gridDim.x, unsigned(b) / gridDim.x % gridDim.y,
                unsigned(b) / (gridDim.x * gridDim.y)};
    run_block(int(threads));
    if (!machine.error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// ------------------------------------------------------------------ warps

inline void wait_for_warp(unsigned mask, Site site) {
  const int warp = machine.current / kWarp, lane = machine.current % kWarp;
  if ((mask >> lane & 1) == 0) fail("a lane calls a warp operation with a mask that leaves it out");
  const int needed = __builtin_popcount(mask);
  if (needed > machine.warp_live[warp]) fail("a warp operation names lanes that have exited");
  wait(machine.warps[warp], needed, site);
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 16, "at most 16 bytes");
  const int first = machine.current / kWarp * kWarp;
  const bool inside = source >= 0 && source < kWarp;
  if (inside && (mask >> source & 1) == 0) fail("a shuffle reads a lane outside its mask");
  memcpy(&machine.exchange[size_t(machine.current) * 16], &value, sizeof(T));
  wait_for_warp(mask, site);
  T result = value;
  if (inside) memcpy(&result, &machine.exchange[size_t(first + source) * 16], sizeof(T));
  wait_for_warp(mask, site);
  return result;
}

inline int lane() { return machine.current % kWarp; }

}  // namespace cuda_emu

// The place of the call, as a default argument.
#define CUDA_EMU_SITE cuda_emu::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_EMU_SITE) {
  cuda_emu::wait(cuda_emu::machine.block, cuda_emu::machine.live, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, CUDA_EMU_SITE) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() - int(distance), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, CUDA_EMU_SITE) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() + int(distance), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, CUDA_EMU_SITE) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() ^ lanes, site);
}

inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = old + value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = std::min(old, value);
  return old;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_emu::launch(*config, [&] { kernel(arguments...); });
}

inline const char* cudaGetErrorString(cudaError_t) { return cuda_emu::machine.error.c_str(); }

extern "C" __attribute__((visibility("default"), weak)) void cuda_emu_order(unsigned seed) {
  cuda_emu::machine.order = seed;
  cuda_emu::machine.random.seed(seed);
}
