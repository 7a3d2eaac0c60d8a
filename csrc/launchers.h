// The contract between ops.cpp, which knows torch, and the kernels, which see plain data.
#pragma once

#include <cstdint>
#include <vector>

#include "adamw_math.h"
#include "sgd_math.h"
#include "tensor_view.h"

namespace ttt_fast {

using Views = std::vector<View>;

// The state of ttt_fast.undo.UndoLog, in its order. offsets == nullptr: no log.
struct UndoState {
  uint32_t* index = nullptr;
  uint16_t* value = nullptr;
  int64_t* cursor = nullptr;
  int32_t* counts = nullptr;
  uint8_t* paged = nullptr;
  uint16_t* pages = nullptr;
  const int64_t* offsets = nullptr;  // one for each parameter, -1: not tracked
};

// An optimizer step less its mathematics. Lists are empty or as long as params.
struct UpdateCall {
  Views params, grads, deltas, bases;
  Views states[2];
  bool reads_weight = false;  // does the step depend on the weight (decay)?
  bool skip_state_read = false;
  bool stochastic = false;
  uint64_t seed = 0;
  double* landed = nullptr;
  UndoState undo;
};

// Arguments come in both compute types: float64 parameters take the second.
void sgd_cpu(const UpdateCall& call, const SgdArgs<float>& f32, const SgdArgs<double>& f64);
void adamw_cpu(const UpdateCall& call, const AdamwArgs<float>& f32, const AdamwArgs<double>& f64);
double sum_of_squares_cpu(const Views& grads);
void copy_cpu(const Views& dsts, const Views& srcs);
void undo_restore_cpu(const Views& params, const UndoState& undo);
int64_t checksum_cpu(const Views& tensors);

}  // namespace ttt_fast
