// SGD on all tensors of a call.
// Fused: clip factor, decay, momentum, Nesterov, delta, write, rounding, undo log, update_landed.
// Bytes per element, with momentum: 20 in float32 (read g, m, w; write m, w), 10 in bfloat16, 18 with
// a float32 delta and base (the weight is then written only).
// Bound: memory bandwidth. Reference: sgd_ in ttt_fast/reference.py.
#include "update.h"

namespace ttt_fast {
namespace {

template <class C>
TTT_HOST_DEVICE void sgd_loop(const SgdArgs<C> args, int64_t n, const C* __restrict g,
                              const C* __restrict w, C* __restrict m, C* __restrict step) {
  for (int64_t i = 0; i < n; ++i) step[i] = sgd_step(args, g[i], w[i], m[i]);
}

TTT_CLONES void sgd_block(const SgdArgs<float>& args, int64_t n, const float* g, const float* w,
                          float* m, float* step) {
  sgd_loop(args, n, g, w, m, step);
}

TTT_CLONES void sgd_block(const SgdArgs<double>& args, int64_t n, const double* g, const double* w,
                          double* m, double* step) {
  sgd_loop(args, n, g, w, m, step);
}

}  // namespace

void sgd_cpu(const UpdateCall& call, const SgdArgs<float>& f32, const SgdArgs<double>& f64) {
  update_cpu(
      call,
      [&](int64_t n, const float* g, const float* w, float* m, float*, float* step) {
        sgd_block(f32, n, g, w, m, step);
      },
      [&](int64_t n, const double* g, const double* w, double* m, double*, double* step) {
        sgd_block(f64, n, g, w, m, step);
      });
}

}  // namespace ttt_fast
