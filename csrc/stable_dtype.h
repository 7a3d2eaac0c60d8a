// A torch tensor's dtype as the kernels name it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "tensor_view.h"

namespace ttt_fast {

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::F32;
    case ScalarType::BFloat16:
      return Dtype::BF16;
    case ScalarType::Half:
      return Dtype::F16;
    case ScalarType::Double:
      return Dtype::F64;
    default:
      return Dtype::OTHER;
  }
}

}  // namespace ttt_fast
