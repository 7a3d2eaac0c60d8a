// SGD on all tensors of a call.
// Fused: clip factor, decay, momentum, Nesterov, delta, write, rounding, undo log, update_landed.
// Bytes per element, with momentum: 20 in float32 (read g, m, w; write m, w), 10 in bfloat16, 18
// with a float32 delta and base (the weight is then written only). Bound: memory bandwidth.
// Reference: sgd_ in ttt_fast/reference.py.
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

// Everything at once, where all tensors have the parameter's dtype; `trace` as update.h asks for
// it.
template <bool kTrace, class Storage>
TTT_HOST_DEVICE void sgd_fused_loop(const SgdArgs<float> args, int64_t n,
                                    const Storage* __restrict g, Storage* __restrict w,
                                    Storage* __restrict m, StepTrace* __restrict trace) {
  for (int64_t i = 0; i < n; ++i) {
    const float weight = to_compute(w[i]);
    float buffer = to_compute(m[i]);
    const float step = sgd_step(args, to_compute(g[i]), weight, buffer);
    const float target = weight + step;
    m[i] = to_storage<Storage>(buffer);
    w[i] = to_storage<Storage>(target);
    // Rounded once more rather than read back: a struct in a variable keeps GCC from vectorising.
    if constexpr (kTrace) trace->set(i, weight, to_compute(to_storage<Storage>(target)), step);
  }
}

// target_clones does not take templates, hence one function for each type.
TTT_CLONES void sgd_fused(const SgdArgs<float>& args, int64_t n, const float* g, float* w, float* m,
                          StepTrace* trace) {
  if (trace == nullptr) return sgd_fused_loop<false>(args, n, g, w, m, trace);
  sgd_fused_loop<true>(args, n, g, w, m, trace);
}

TTT_CLONES void sgd_fused(const SgdArgs<float>& args, int64_t n, const Bf16* g, Bf16* w, Bf16* m,
                          StepTrace* trace) {
  if (trace == nullptr) return sgd_fused_loop<false>(args, n, g, w, m, trace);
  sgd_fused_loop<true>(args, n, g, w, m, trace);
}

template <class C>
struct SgdDirection {
  const SgdArgs<C>& args;

  void operator()(int64_t n, const C* g, const C* w, C* m, C*, C* step) const {
    sgd_block(args, n, g, w, m, step);
  }

  template <class Storage>
  void fused(int64_t n, const Storage* g, Storage* w, Storage* m, Storage*,
             StepTrace* trace) const {
    sgd_fused(args, n, g, w, m, trace);
  }
};

}  // namespace

void sgd_cpu(const UpdateCall& call, const SgdArgs<float>& f32, const SgdArgs<double>& f64) {
  update_cpu(call, SgdDirection<float>{f32}, SgdDirection<double>{f64});
}

}  // namespace ttt_fast
