// One element of an SGD step. Specification: sgd_ in ttt_fast/reference.py; same operations, same order.
#pragma once

#include "rounding.h"

namespace ttt_fast {

template <class C>
struct SgdArgs {
  C gradient_factor;  // clip coefficient over GradScaler's scale, 1 if neither
  C momentum, keep;   // keep = 1 - dampening
  C weight_decay;
  C minus_lr, lr_weight_decay;
  bool maximize, use_momentum, nesterov, first_step, coupled_decay, decoupled_decay;
};

// Every variant is computed and one is selected: the flags are the same for all elements, so the
// selections cost a blend in a loop that waits for memory. Adding 0 * w instead would not do: it
// turns -0 into +0 and an infinite weight into NaN.
//
// Returns the step Δ; `m` is the momentum buffer, not read when first_step.
template <class C>
TTT_HOST_DEVICE C sgd_step(const SgdArgs<C>& args, C g, C w, C& m) {
  g = g * args.gradient_factor;
  g = args.maximize ? -g : g;
  const C decayed = g + args.weight_decay * w;
  g = args.coupled_decay ? decayed : g;
  const C averaged = args.momentum * m + args.keep * g;
  m = args.first_step ? g : averaged;
  const C ahead = g + args.momentum * m;
  C u = args.nesterov ? ahead : m;
  u = args.use_momentum ? u : g;
  const C step = u * args.minus_lr;
  const C shrunk = step - args.lr_weight_decay * w;
  return args.decoupled_decay ? shrunk : step;
}

}  // namespace ttt_fast
