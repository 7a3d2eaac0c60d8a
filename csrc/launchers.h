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
// x, dy: batch * tokens rows. norms: one for each of the batch, of the compute type.
void gram_norm_cpu(const View& x, const View& dy, int64_t batch, int64_t tokens, void* norms);
// logits: as many rows as there are targets (int64). losses: one for each, of the compute type.
void nll_cpu(const View& logits, const View& targets, int64_t ignore_index, void* losses);

// Rows (batch, rank, width) of a buffer that may be larger.
struct Factor {
  const void* data;
  int64_t batch_stride, stride;  // in elements
};

// y (batch, tokens, out) = rho x W' - ((x a') o beta) d; beta and rho of the compute type. x goes
// into `append`, too.
struct DeltaLinearCall {
  int64_t batch, tokens, in, out, rank;
  const void *x, *weight;  // weight: nullptr for 0
  int64_t weight_stride;
  bool weight_by_columns;  // W' is what is stored by rows
  Factor a, d;
  const void *beta, *rho;  // rho: nullptr for 1
  void* y;
  void* append;                                // (batch, tokens, in); nullptr for none
  int64_t append_batch_stride, append_stride;  // in elements
  Dtype dtype;
};
void delta_linear_cpu(const DeltaLinearCall& call);

// y_i (rows, out_i) = x (rows, in) W_i' of several layers, or dx = sum of dy_i W_i. At least one.
struct LinearsCall {
  struct Layer {
    const void* weight;   // (out, in)
    int64_t out, stride;  // in elements
    void* y;              // written; in the backward dy, which is read
  };
  int64_t rows, in;
  Dtype dtype;
  bool backward;
  const void* x;  // forward only
  void* dx;       // backward only
  std::vector<Layer> layers;
};
void linears_cpu(const LinearsCall& call);

// Rows (batch, tokens, width) of one dtype; weight (batch, width), rstd (batch, tokens) and dweight
// are of the compute type.
struct RmsNormCall {
  int64_t batch, tokens, width;
  Dtype dtype;
  int32_t element_size;
  bool round_first;  // is x / rms rounded before it meets the weight?
  double eps;        // forward only
  const void *x, *weight;
  bool backward;
  const void* dy;  // backward only
  void* rstd;      // written in the forward, read in the backward
  void* y;         // dx in the backward
  void* dweight;
};
void rms_norm_cpu(const RmsNormCall& call);

// y = act(gate) o up; all of one dtype and consecutive.
struct GluCall {
  int64_t numel;
  Dtype dtype;
  int32_t element_size;
  bool gelu_tanh;  // else SiLU
  const void *gate, *up;
  bool backward;
  const void* dy;  // backward only
  void* y;         // dgate in the backward
  void* dup;       // backward only
};
void glu_cpu(const GluCall& call);

// x and y (batch, heads, tokens, width); the first `turned` columns are turned. cos and sin (batch,
// tokens, turned) are of the dtype of x, to which products are rounded then, or of the compute
// type.
struct RotaryCall {
  int64_t batch, heads, tokens, width, turned;
  int64_t x_batch, x_head, x_token, y_batch, y_head, y_token;  // strides, in elements
  Dtype dtype, angles;
  int32_t element_size;
  bool transposed;
  const void* x;
  Factor cos, sin;
  void* y;
};
void rotary_cpu(const RotaryCall& call);

// Rows (batch, heads, tokens, width) of a tensor whose rows are consecutive; strides in elements.
struct Heads {
  void* data;
  int64_t batch, head, token;
};

// Gradients of y = softmax(scale q k' + mask) v. Query head h attends to head h / (heads /
// kv_heads) of the keys.
struct AttentionBackwardCall {
  int64_t batch, heads, kv_heads, queries, keys, width;
  Dtype dtype;
  int32_t element_size;
  double scale;
  bool causal;  // query i attends to keys 0 .. i
  Heads dy, q, k, v;
  Heads mask;   // a row of `keys` for each query; data: nullptr for none
  bool chosen;  // mask has a byte for each key, 0 for none; else numbers of dtype that are added
  Heads dq, dk, dv;
};
void attention_backward_cpu(const AttentionBackwardCall& call);
void copy_cpu(const Views& dsts, const Views& srcs);
void undo_restore_cpu(const Views& params, const UndoState& undo);
int64_t checksum_cpu(const Views& tensors);

}  // namespace ttt_fast
