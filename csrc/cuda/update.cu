// What follows the update of one group of tensors: two small launches.
// Bound: latency. The pages that are completed here are read again once, in the step in which a run
// of the undo log becomes dense.
// Reference: undo_record_ and _record_landed in ttt_fast/reference.py.
#include "update.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

// One block: landed += Σ partial.
__global__ void __launch_bounds__(kThreads)
    landed_kernel(const double* partial, int64_t n, double* landed) {
  for (int which = 0; which < 2; ++which) {
    const double sum = strided_sum(partial + which, n, 2);
    if (threadIdx.x == 0) landed[which] += sum;
  }
}

// Complete the pages of the runs that an update found too dense to log (undo.cuh).
__global__ void __launch_bounds__(kThreads) undo_pages_kernel(const UpdateCall call) {
  const int chunk = int(blockIdx.x);
  const int32_t state = call.undo.states[chunk];
  if (state == kNotLogged) return;
  const UndoRun run(call.undo, call.table, chunk);
  if (call.undo.counts[run.number] <= run.limit) return;
  if (state == kLogged) {
    const auto* params = in_global_memory(at_address<const uint16_t>(call.table.pointers[chunk]));
    for (int k = int(threadIdx.x); k < call.table.numel[chunk]; k += kThreads) {
      call.undo.pages[run.slot + k] = params[k];
    }
  }
  if (threadIdx.x == 0) call.undo.paged[run.number] = 1;
}

}  // namespace

int finish_update(const UpdateCall& call, void* stream) {
  const int64_t n = call.table.n_chunks;
  if (call.undo.offsets != nullptr) {
    const int code = launch(undo_pages_kernel, n, 1, stream, call);
    if (code != 0) return code;
  }
  if (call.landed == nullptr || n == 0) return 0;
  return launch(landed_kernel, 1, 1, stream, call.partial, n, call.landed);
}

}  // namespace cuda
}  // namespace ttt_fast
