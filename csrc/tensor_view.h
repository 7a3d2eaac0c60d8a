// A tensor as the kernels see it: plain data, no torch type. Shared by every backend.
#pragma once

#include <cstdint>

namespace ttt_fast {

enum class Dtype : int32_t { F32, BF16, F16, F64, OTHER };

// Elements in logical (row-major) order fall into runs of consecutive memory. A contiguous tensor
// is one run; a row slice of a fused projection is one outer dimension of runs; any other strided
// tensor has more outer dimensions, down to runs of one element.
struct View {
  static constexpr int kMaxOuter = 8;

  char* data = nullptr;
  int64_t numel = 0;
  int64_t run_length = 0;
  int32_t element_size = 0;
  Dtype dtype = Dtype::OTHER;
  int32_t n_outer = 0;                   // innermost first; 0 for a contiguous tensor
  int64_t outer_size[kMaxOuter] = {};    // in runs
  int64_t outer_stride[kMaxOuter] = {};  // in bytes

  bool is_float() const { return dtype != Dtype::OTHER; }

  char* run(int64_t index) const {
    int64_t offset = 0;
    for (int k = 0; k < n_outer; ++k) {
      offset += index % outer_size[k] * outer_stride[k];
      index /= outer_size[k];
    }
    return data + offset;
  }

  char* element(int64_t index) const {
    if (n_outer == 0) return data + index * element_size;
    return run(index / run_length) + index % run_length * element_size;
  }

  // Elements from `index` to the end of its run.
  int64_t rest_of_run(int64_t index) const {
    return n_outer == 0 ? numel - index : run_length - index % run_length;
  }
};

}  // namespace ttt_fast
