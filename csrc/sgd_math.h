// One element of an SGD step. Specification: sgd_ in ttt_fast/reference.py; same operations, same
// order.
#pragma once

#include "rounding.h"

namespace ttt_fast {

template <class C>
struct SgdArgs {
  // Clip coefficient over GradScaler's scale, negative to maximise.
  C gradient_factor;
  C momentum, keep;  // keep = 1 - dampening
  C weight_decay;
  C minus_lr, lr_weight_decay;
  Mask<C> use_momentum, nesterov, first_step, coupled_decay, decoupled_decay;
};

// Every variant is computed and one is chosen; the loop waits for memory anyway. Adding 0 * w
// instead would not do: it turns -0 into +0 and an infinite weight into NaN.
//
// Returns the step Δ; `m` is the momentum buffer, its old value does not matter on the first step.
template <class C>
TTT_HOST_DEVICE C sgd_step(const SgdArgs<C>& args, C g, C w, C& m) {
  g = g * args.gradient_factor;
  g = choose(args.coupled_decay, g + args.weight_decay * w, g);
  m = choose(args.first_step, g, args.momentum * m + args.keep * g);
  const C averaged = choose(args.nesterov, g + args.momentum * m, m);
  const C u = choose(args.use_momentum, averaged, g);
  const C step = u * args.minus_lr;
  return choose(args.decoupled_decay, step - args.lr_weight_decay * w, step);
}

// factor: what gradients are multiplied by, with its sign.
template <class C>
SgdArgs<C> sgd_args(double factor, double lr, double momentum, double dampening, bool nesterov,
                    double weight_decay, bool decoupled, bool first_step) {
  SgdArgs<C> args;
  args.gradient_factor = C(factor);
  args.momentum = C(momentum);
  args.keep = C(1.0 - dampening);
  args.weight_decay = C(weight_decay);
  args.minus_lr = C(-lr);
  args.lr_weight_decay = C(lr * weight_decay);
  args.use_momentum = Mask<C>(momentum != 0);
  args.nesterov = Mask<C>(nesterov);
  args.first_step = Mask<C>(first_step);
  args.coupled_decay = Mask<C>(weight_decay != 0 && !decoupled);
  args.decoupled_decay = Mask<C>(weight_decay != 0 && decoupled);
  return args;
}

}  // namespace ttt_fast
