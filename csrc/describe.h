// Tensors on the CPU as plain Views, checked; scalars that the caller left in tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "gradient_factor.h"
#include "launchers.h"
#include "stable_dtype.h"

namespace ttt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The stride of a dimension of one element is anything.
inline bool dense(const Tensor& t, int64_t dim) {
  return t.strides()[dim] == 1 || t.sizes()[dim] <= 1;
}

// Fold the dimensions, innermost first, into runs of consecutive memory and as few outer dimensions
// as possible: a contiguous tensor becomes one run, rows of a fused projection one outer dimension.
inline View describe(const Tensor& tensor, const char* op, const char* name, size_t i,
                     bool written) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, "[", i,
                  "] is not on the CPU; the C++ backend runs there. Use backend=\"auto\".");
  View view;
  view.data = static_cast<char*>(tensor.data_ptr());
  view.numel = tensor.numel();
  view.dtype = dtype_of(tensor);
  view.element_size = int32_t(tensor.element_size());
  view.run_length = 1;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (int64_t d = tensor.dim() - 1; d >= 0 && view.numel > 0; --d) {
    const int64_t size = sizes[d], stride = strides[d] * view.element_size;
    if (size == 1) continue;
    STD_TORCH_CHECK(!written || stride != 0, op, ": ", name, "[", i,
                    "] is expanded (several elements share memory) and cannot be written; pass a "
                    "clone of it.");
    const int k = view.n_outer;
    if (k == 0 && strides[d] == view.run_length) {
      view.run_length *= size;
    } else if (k > 0 && stride == view.outer_stride[k - 1] * view.outer_size[k - 1]) {
      view.outer_size[k - 1] *= size;
    } else {
      STD_TORCH_CHECK(k < View::kMaxOuter, op, ": ", name, "[", i, "] has more than ",
                      View::kMaxOuter, " dimensions of strides; pass a contiguous tensor.");
      view.outer_size[k] = size;
      view.outer_stride[k] = stride;
      view.n_outer = k + 1;
    }
  }
  return view;
}

// One view for each of `like`, of the same number of elements.
inline Views describe_all(const Tensors& tensors, const char* op, const char* name, bool written,
                          const Views* like = nullptr) {
  STD_TORCH_CHECK(like == nullptr || tensors.size() == like->size(), op, ": got ", tensors.size(),
                  " ", name, "; one for each of ", like == nullptr ? 0 : like->size(),
                  " tensors is needed.");
  Views views;
  views.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    views.push_back(describe(tensors[i], op, name, i, written));
    STD_TORCH_CHECK(like == nullptr || views[i].numel == (*like)[i].numel, op, ": ", name, "[", i,
                    "] has ", views[i].numel,
                    " elements, its parameter does not; they must agree.");
  }
  return views;
}

inline bool compute_type_or_same(Dtype dtype, Dtype param) {
  return dtype == param || (param != Dtype::F64 && dtype == Dtype::F32);
}

inline Views describe_floats(const Tensors& tensors, const char* op, const char* name, bool written,
                             const Views& params) {
  Views views = describe_all(tensors, op, name, written, &params);
  for (size_t i = 0; i < views.size(); ++i) {
    STD_TORCH_CHECK(compute_type_or_same(views[i].dtype, params[i].dtype), op, ": ", name, "[", i,
                    "] has neither the dtype of its parameter nor its compute type; convert it.");
  }
  return views;
}

template <class T>
T* data_of(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                      tensor.numel() >= numel,
                  what, " must be a contiguous CPU tensor of its documented dtype and size.");
  return static_cast<T*>(tensor.data_ptr());
}

inline Scalar read_scalar(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, op, ": ", name,
                  " must be a CPU tensor of one element.");
  const Dtype dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype != Dtype::OTHER, op, ": ", name, " must be a floating-point tensor.");
  return load_scalar(tensor.data_ptr(), dtype);
}

inline UndoState undo_state(const Tensors& undo, const std::vector<int64_t>& offsets,
                            const Views& params, const char* op) {
  UndoState state;
  if (undo.empty()) return state;
  STD_TORCH_CHECK(undo.size() == 6 && offsets.size() == params.size(), op,
                  ": undo must be the tensors of an UndoLog made for these params.");
  const int64_t chunks = undo[3].numel();
  state.index = data_of<uint32_t>(undo[0], ScalarType::Int, 0, "undo.index");
  state.value = data_of<uint16_t>(undo[1], ScalarType::Short, undo[0].numel(), "undo.value");
  state.cursor = data_of<int64_t>(undo[2], ScalarType::Long, 1, "undo.cursor");
  state.counts = data_of<int32_t>(undo[3], ScalarType::Int, chunks, "undo.counts");
  state.paged = data_of<uint8_t>(undo[4], ScalarType::Byte, chunks, "undo.paged");
  state.pages = data_of<uint16_t>(undo[5], ScalarType::Short, chunks << 16, "undo.pages");
  state.offsets = offsets.data();
  for (size_t i = 0; i < params.size(); ++i) {
    if (offsets[i] < 0) continue;
    const int64_t end = (offsets[i] >> 16) + ((params[i].numel + 65535) >> 16);
    STD_TORCH_CHECK(params[i].element_size == 2 && (offsets[i] & 65535) == 0 && end <= chunks, op,
                    ": params[", i, "] is not the one that undo was made for.");
  }
  // Every parameter is float32 or wider: there is nothing to log.
  if (chunks == 0) state.offsets = nullptr;
  return state;
}

}  // namespace ttt_fast
