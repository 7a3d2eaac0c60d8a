// Recording what an update overwrites in 16-bit weights, while it overwrites it.
//
// A run of 65536 elements (UNDO_CHUNK) is logged until more than a third of it has been; then it is
// kept whole. Several blocks may work on one run and none knows what the others will change, so:
//   - a block that would exceed the limit puts what it has not overwritten yet into the page, and
//     beside it what it has: its entries in the log, which are restored after the pages, still hold
//     the older values;
//   - a second launch (undo_pages_kernel) completes the pages of such runs with the shares of the
//     blocks that were done before, for the same reason as they are.
// Which of a run's entries come before the page is kept is up to the order of the blocks; what is
// restored is not.
#pragma once

#include "reduce.cuh"

namespace ttt_fast {
namespace cuda {

constexpr int64_t kUndoChunk = 65536;  // UNDO_CHUNK in ttt_fast/reference.py

enum UndoState : int32_t { kNotLogged, kLogged, kPaged };

// The run that a chunk of the table lies in.
struct UndoRun {
  int64_t slot;    // of the chunk's first element, in the log's numbering
  int64_t number;  // of the run
  int32_t limit;   // entries

  __device__ UndoRun(const UndoLog& undo, const Table& table, int chunk) {
    const int32_t tensor = table.tensor[chunk];
    const int64_t index = table.index[chunk], offset = undo.offsets[tensor];
    const int64_t rest = undo.numel[tensor] - index / kUndoChunk * kUndoChunk;
    slot = offset < 0 ? -1 : offset + index;
    number = slot / kUndoChunk;
    limit = int32_t((rest < kUndoChunk ? rest : kUndoChunk) / 3);
  }
};

class UndoRecorder {
 public:
  __device__ UndoRecorder(const UndoLog& undo, const Table& table, int chunk)
      : undo_(undo), run_(undo, table, chunk) {
    if (run_.slot >= 0 && undo.paged[run_.number] == 0) state_ = kLogged;
  }

  __device__ bool active() const { return state_ != kNotLogged; }
  __device__ UndoState state() const { return state_; }

  // What the elements [i, i + N) are before they are written. All threads come here together, those
  // with nothing to say with `some` == false; the block has written everything before `written`.
  template <int N>
  __device__ void record(bool some, int i, const uint16_t (&before)[N], const uint16_t (&after)[N],
                         int written, const uint16_t* params) {
    if (state_ == kLogged) log(some, i, before, after, written, params);
    if (state_ == kPaged && some) {
      for (int k = 0; k < N; ++k) undo_.pages[run_.slot + i + k] = before[k];
    }
  }

 private:
  template <int N>
  __device__ void log(bool some, int i, const uint16_t (&before)[N], const uint16_t (&after)[N],
                      int written, const uint16_t* params) {
    __shared__ int of_warps[kWarps];
    __shared__ unsigned long long at;
    int count = 0;
    for (int k = 0; some && k < N; ++k) count += before[k] != after[k];
    // Prefix sum: over the lanes, then over the warps.
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int end = count;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, end, distance);
      if (lane >= distance) end += other;
    }
    if (lane == kWarp - 1) of_warps[warp] = end;
    __syncthreads();
    int total = 0, begin = end - count;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) begin += of_warps[w];
      total += of_warps[w];
    }
    if (threadIdx.x == 0 && total > 0) {
      const bool fits = atomicAdd(&undo_.counts[run_.number], total) + total <= run_.limit;
      at = fits ? atomicAdd(undo_.cursor, (unsigned long long)total) : kFull;
    }
    __syncthreads();
    if (total == 0) return;
    if (at == kFull) {
      state_ = kPaged;
      for (int k = threadIdx.x; k < written; k += kThreads) {
        undo_.pages[run_.slot + k] = params[k];
      }
      return;
    }
    for (int k = 0; some && k < N; ++k) {
      if (before[k] == after[k]) continue;
      undo_.index[at + begin] = uint32_t(run_.slot + i + k);
      undo_.value[at + begin] = before[k];
      ++begin;
    }
  }

  static constexpr unsigned long long kFull = ~0ull;
  const UndoLog& undo_;
  UndoRun run_;
  UndoState state_ = kNotLogged;
};

}  // namespace cuda
}  // namespace ttt_fast
