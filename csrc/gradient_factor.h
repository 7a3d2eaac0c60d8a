// What every gradient of an update is multiplied by, from scalars that lie in tensors.
// Specification: _gradient_factor in ttt_fast/reference.py, in the types that torch's promotion
// gives there.
#pragma once

#include "rounding.h"
#include "tensor_view.h"

namespace ttt_fast {

// A 0-dim tensor's value, and whether it is float64. By default one that was not given.
struct Scalar {
  double value = 0;
  bool wide = false, given = false;
};

TTT_HOST_DEVICE Scalar load_scalar(const void* data, Dtype dtype) {
  switch (dtype) {
    case Dtype::F64:
      return {*static_cast<const double*>(data), true, true};
    case Dtype::BF16:
      return {bf16_to_float(*static_cast<const uint16_t*>(data)), false, true};
    case Dtype::F16:
      return {f16_to_float(*static_cast<const uint16_t*>(data)), false, true};
    default:
      return {*static_cast<const float*>(data), false, true};
  }
}

template <class C>
TTT_HOST_DEVICE C clip_coefficient(C norm, double max_grad_norm) {
  // torch divides a number by a tensor as reciprocal times number; clip_grad_norm_ does so too.
  const C coefficient = (C(1) / (norm + C(1e-6))) * C(max_grad_norm);
  return coefficient > C(1) ? C(1) : coefficient;  // NaN stays NaN
}

// Clip coefficient over GradScaler's scale.
TTT_HOST_DEVICE double gradient_factor(const Scalar& norm, double max_grad_norm,
                                       const Scalar& scale) {
  Scalar factor{1, false, true};
  if (norm.given && max_grad_norm >= 0) {
    factor.wide = norm.wide;
    factor.value = norm.wide ? clip_coefficient(norm.value, max_grad_norm)
                             : clip_coefficient(float(norm.value), max_grad_norm);
  }
  if (!scale.given) return factor.value;
  if (factor.wide || scale.wide) return factor.value / scale.value;
  return float(factor.value) / float(scale.value);
}

}  // namespace ttt_fast
