// AdamW on all tensors of a call, one launch for each group of dtypes.
// Fused: clip factor, both moments, bias corrections, decay, delta, write, rounding, undo log,
// update_landed.
// Bytes per element: 28 in float32 (read g, m, v, w; write m, v, w), 14 in bfloat16.
// Bound: memory bandwidth; a square root and two divisions per element are hidden behind it.
// Reference: adamw_ in ttt_fast/reference.py.
#include "update.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

struct AdamwDirection {
  template <class C>
  using Args = AdamwArgs<C>;
  static constexpr int kStates = 2;

  template <class C>
  static __device__ __forceinline__ C step(const AdamwArgs<C>& args, C g, C w, C& m, C& v) {
    return adamw_step(args, g, w, m, v);
  }
};

}  // namespace

extern "C" int ttt_fast_cuda_adamw(const UpdateCall* call, const AdamwArgs<float>* f32,
                                   const AdamwArgs<double>* f64, void* stream) {
  return launch_update<AdamwDirection>(*call, *f32, *f64, stream);
}

}  // namespace cuda
}  // namespace ttt_fast
