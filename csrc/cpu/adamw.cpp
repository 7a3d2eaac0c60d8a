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

// Everything at once, where all tensors have the parameter's dtype and nobody asks for more.
template <bool kTrace, class Storage>
TTT_HOST_DEVICE void adamw_fused_loop(const AdamwArgs<float> args, int64_t n,
                                      const Storage* __restrict g, Storage* __restrict w,
                                      Storage* __restrict m, Storage* __restrict v,
                                      StepTrace* __restrict trace) {
  for (int64_t i = 0; i < n; ++i) {
    const float weight = to_compute(w[i]);
    float average = to_compute(m[i]), square = to_compute(v[i]);
    const float step = adamw_step(args, to_compute(g[i]), weight, average, square);
    const float target = weight + step;
    m[i] = to_storage<Storage>(average);
    v[i] = to_storage<Storage>(square);
    w[i] = to_storage<Storage>(target);
    // Rounded once more rather than read back: a struct in a variable keeps GCC from vectorising.
    if constexpr (kTrace) trace->set(i, weight, to_compute(to_storage<Storage>(target)), step);
  }
}

TTT_CLONES void adamw_fused(const AdamwArgs<float>& args, int64_t n, const float* g, float* w,
                            float* m, float* v, StepTrace* trace) {
  if (trace == nullptr) return adamw_fused_loop<false>(args, n, g, w, m, v, trace);
  adamw_fused_loop<true>(args, n, g, w, m, v, trace);
}

TTT_CLONES void adamw_fused(const AdamwArgs<float>& args, int64_t n, const Bf16* g, Bf16* w,
                            Bf16* m, Bf16* v, StepTrace* trace) {
  if (trace == nullptr) return adamw_fused_loop<false>(args, n, g, w, m, v, trace);
  adamw_fused_loop<true>(args, n, g, w, m, v, trace);
}

template <class C>
struct AdamwDirection {
  const AdamwArgs<C>& args;

  void operator()(int64_t n, const C* g, const C* w, C* m, C* v, C* step) const {
    adamw_block(args, n, g, w, m, v, step);
  }

  template <class Storage>
  void fused(int64_t n, const Storage* g, Storage* w, Storage* m, Storage* v,
             StepTrace* trace) const {
    adamw_fused(args, n, g, w, m, v, trace);
  }
};

}  // namespace

void adamw_cpu(const UpdateCall& call, const AdamwArgs<float>& f32, const AdamwArgs<double>& f64) {
  update_cpu(call, AdamwDirection<float>{f32}, AdamwDirection<double>{f64});
}

}  // namespace ttt_fast
