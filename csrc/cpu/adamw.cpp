// AdamW on all tensors of a call.
// Fused: clip factor, both moments, bias corrections, decay, delta, write, rounding, undo log,
// update_landed.
// Bytes per element: 28 in float32 (read g, m, v, w; write m, v, w), 14 in bfloat16.
// Bound: memory bandwidth; a square root and two divisions per element come close to it.
// Reference: adamw_ in ttt_fast/reference.py.
#include "update.h"

namespace ttt_fast {
namespace {

template <class C>
TTT_HOST_DEVICE void adamw_loop(const AdamwArgs<C> args, int64_t n, const C* __restrict g,
                                const C* __restrict w, C* __restrict m, C* __restrict v,
                                C* __restrict step) {
  for (int64_t i = 0; i < n; ++i) step[i] = adamw_step(args, g[i], w[i], m[i], v[i]);
}

TTT_CLONES void adamw_block(const AdamwArgs<float>& args, int64_t n, const float* g, const float* w,
                            float* m, float* v, float* step) {
  adamw_loop(args, n, g, w, m, v, step);
}

TTT_CLONES void adamw_block(const AdamwArgs<double>& args, int64_t n, const double* g,
                            const double* w, double* m, double* v, double* step) {
  adamw_loop(args, n, g, w, m, v, step);
}

}  // namespace

void adamw_cpu(const UpdateCall& call, const AdamwArgs<float>& f32, const AdamwArgs<double>& f64) {
  update_cpu(
      call,
      [&](int64_t n, const float* g, const float* w, float* m, float* v, float* step) {
        adamw_block(f32, n, g, w, m, v, step);
      },
      [&](int64_t n, const double* g, const double* w, double* m, double* v, double* step) {
        adamw_block(f64, n, g, w, m, v, step);
      });
}

}  // namespace ttt_fast
