// Undo log: restore. Recording is part of an update (undo.cuh).
// An element may have been logged by several steps; the oldest entry holds the original, and
// entries of a later step lie behind those of an earlier one. So a first pass over the log finds
// each element's oldest entry, a second one over the weights writes what it or the page says.
// Bytes: 6 per entry, 4 per weight for the number of its entry (written, read), and the scattered
// 2-byte reads and writes of what had changed. Bound: those.
// Reference: undo_restore_ in ttt_fast/reference.py.
#include "undo.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // enough to fill a GPU; each takes every 1024th group of entries
constexpr uint32_t kNone = ~0u;

__global__ void __launch_bounds__(kThreads)
    oldest_entry_kernel(const UndoLog undo, uint32_t* oldest, int64_t first, int64_t window) {
  const int64_t entries = int64_t(*undo.cursor);
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < entries;
       k += kBlocks * kThreads) {
    const int64_t slot = int64_t(undo.index[k]) - first;
    if (slot >= 0 && slot < window) atomicMin(&oldest[slot], uint32_t(k));
  }
}

__global__ void __launch_bounds__(kThreads)
    restore_kernel(const Table table, const UndoLog undo, const uint32_t* oldest, int64_t first,
                   int64_t window) {
  const UndoRun run(undo, table, int(blockIdx.x));
  const int numel = table.numel[blockIdx.x];
  if (run.slot < 0 || run.slot + numel <= first || run.slot >= first + window) return;
  const bool paged = undo.paged[run.number] != 0;
  auto* params = in_global_memory(at_address<uint16_t>(table.pointers[blockIdx.x]));
  for (int i = int(threadIdx.x); i < numel; i += kThreads) {
    const int64_t slot = run.slot + i - first;
    if (slot < 0 || slot >= window) continue;
    const uint32_t entry = oldest[slot];
    if (entry != kNone) {
      params[i] = undo.value[entry];
    } else if (paged) {
      params[i] = undo.pages[run.slot + i];
    }
  }
}

}  // namespace

extern "C" int ttt_fast_cuda_undo_restore(const Table* table, const UndoLog* undo, uint32_t* oldest,
                                          int64_t first, int64_t window, void* stream) {
  const int code = launch(oldest_entry_kernel, kBlocks, 1, stream, *undo, oldest, first, window);
  if (code != 0) return code;
  return launch(restore_kernel, table->n_chunks, 1, stream, *table, *undo, oldest, first, window);
}

}  // namespace cuda
}  // namespace ttt_fast
