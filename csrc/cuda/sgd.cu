// SGD on all tensors of a call, one launch for each group of dtypes.
// Fused: clip factor, decay, momentum, Nesterov, delta, write, rounding, undo log, update_landed.
// Bytes per element, with momentum: 20 in float32 (read g, m, w; write m, w), 10 in bfloat16, 18
// with a float32 delta and base (the weight is then written only). Bound: memory bandwidth.
// Reference: sgd_ in ttt_fast/reference.py.
#include "update.cuh"

namespace ttt_fast {
namespace cuda {
namespace {

struct SgdDirection {
  template <class C>
  using Args = SgdArgs<C>;
  static constexpr int kStates = 1;

  template <class C>
  static __device__ __forceinline__ C step(const SgdArgs<C>& args, C g, C w, C& m, C&) {
    return sgd_step(args, g, w, m);
  }
};

}  // namespace

extern "C" int ttt_fast_cuda_sgd(const UpdateCall* call, const SgdArgs<float>* f32,
                                 const SgdArgs<double>* f64, void* stream) {
  return launch_update<SgdDirection>(*call, *f32, *f64, stream);
}

}  // namespace cuda
}  // namespace ttt_fast
