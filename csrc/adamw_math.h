// One element of an AdamW step. Specification: adamw_ in ttt_fast/reference.py; same operations,
// same order.
#pragma once

#include <cmath>

#include "rounding.h"

namespace ttt_fast {

template <class C>
struct AdamwArgs {
  // Clip coefficient over GradScaler's scale, negative to maximise.
  C gradient_factor;
  C one_minus_beta1;
  C beta2, one_minus_beta2;
  C sqrt_correction2;  // sqrt(1 - beta2^t)
  C eps;
  C minus_step_size;  // -lr / (1 - beta1^t)
  C lr_weight_decay;
  Mask<C> decay;
};

TTT_HOST_DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
TTT_HOST_DEVICE double square_root(double x) { return __builtin_sqrt(x); }

// Returns the step Δ; `m` and `v` are the moments.
template <class C>
TTT_HOST_DEVICE C adamw_step(const AdamwArgs<C>& args, C g, C w, C& m, C& v) {
  g = g * args.gradient_factor;
  m = m + args.one_minus_beta1 * (g - m);
  v = args.beta2 * v + args.one_minus_beta2 * (g * g);
  const C denominator = square_root(v) / args.sqrt_correction2 + args.eps;
  const C step = (m / denominator) * args.minus_step_size;
  return choose(args.decay, step - args.lr_weight_decay * w, step);
}

// factor: what gradients are multiplied by, with its sign.
template <class C>
AdamwArgs<C> adamw_args(double factor, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step_index) {
  AdamwArgs<C> args;
  args.gradient_factor = C(factor);
  args.one_minus_beta1 = C(1.0 - beta1);
  args.beta2 = C(beta2);
  args.one_minus_beta2 = C(1.0 - beta2);
  args.sqrt_correction2 = C(std::pow(1.0 - std::pow(beta2, double(step_index)), 0.5));
  args.eps = C(eps);
  args.minus_step_size = C(-(lr / (1.0 - std::pow(beta1, double(step_index)))));
  args.lr_weight_decay = C(lr * weight_decay);
  args.decay = Mask<C>(weight_decay != 0);
  return args;
}

}  // namespace ttt_fast
