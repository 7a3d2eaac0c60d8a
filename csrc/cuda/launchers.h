// The contract between ops_cuda.cpp, which knows torch and is compiled by the C++ compiler, and the
// CUDA kernels, which see plain data and are compiled by nvcc. Every pointer is to device memory;
// every function returns a cudaError_t, 0 if the launch went well.
#pragma once

#include <cstdint>

#include "../adamw_math.h"
#include "../sgd_math.h"
#include "../tensor_view.h"

namespace ttt_fast {
namespace cuda {

// A PointerTable of ttt_fast/kernels/pointer_table.py; one block works on one chunk.
struct Table {
  const int64_t* pointers;  // (lists, n_chunks)
  const int32_t* numel;
  const int64_t* index;
  const int32_t* tensor;
  int32_t n_chunks;
  bool aligned;  // every address is a multiple of 16
};

// A tensor of one element; nullptr: not given.
struct DeviceScalar {
  const void* data;
  Dtype dtype;
};

// ttt_fast.undo.UndoLog; offsets == nullptr: no log.
struct UndoLog {
  uint32_t* index;
  uint16_t* value;
  unsigned long long* cursor;
  int32_t* counts;
  uint8_t* paged;
  uint16_t* pages;
  const int64_t* offsets;  // (n_tensors,) -1: not tracked
  const int64_t* numel;    // (n_tensors,)
  int32_t* states;         // scratch of an update, one for each chunk of its table (UndoState)
};

// Rows of an update's table.
enum UpdateList : int32_t { kParams, kGrads, kDeltas, kBases, kStates, kLists = kStates + 2 };

// An optimizer step less its mathematics.
struct UpdateCall {
  Table table;
  Dtype dtypes[kLists];  // OTHER: the list is empty
  bool skip_state_read;
  bool maximize;
  bool stochastic;
  uint64_t seed;
  DeviceScalar grad_norm, grad_scale, found_inf;
  double max_grad_norm;  // negative: no clipping
  double* landed;        // nullptr: not measured
  double* partial;       // scratch with `landed`, (n_chunks, 2)
  UndoLog undo;
};

// x, dy: (batch, tokens, width), rows of consecutive elements; strides in elements.
struct Rows {
  const void* data;
  int64_t batch_stride, stride, width;
  bool aligned;  // every row starts at a multiple of 16
};

// Tiles on and above the diagonal of a Gram matrix.
constexpr int kGramTile = 32;
inline int64_t gram_tile_pairs(int64_t tokens) {
  const int64_t tiles = (tokens + kGramTile - 1) / kGramTile;
  return tiles * (tiles + 1) / 2;
}

extern "C" {
// gradient_factor of the arguments is not read: it is computed on the device.
int ttt_fast_cuda_sgd(const UpdateCall* call, const SgdArgs<float>* f32, const SgdArgs<double>* f64,
                      void* stream);
int ttt_fast_cuda_adamw(const UpdateCall* call, const AdamwArgs<float>* f32,
                        const AdamwArgs<double>* f64, void* stream);
// partial: (n_chunks,), one sum for each chunk.
int ttt_fast_cuda_sum_of_squares(const Table* table, Dtype dtype, double* partial, void* stream);
// norm = sqrt(Σ partial), float64 if wide, else float32.
int ttt_fast_cuda_norm_of_sums(const double* partial, int64_t n, void* norm, bool wide,
                               void* stream);
// Lists of the table: dsts, srcs.
int ttt_fast_cuda_copy(const Table* table, int32_t element_size, void* stream);
// oldest: scratch of `window` slots, all ones. Restores the elements whose slot in the log is in
// [first, first + window).
int ttt_fast_cuda_undo_restore(const Table* table, const UndoLog* undo, uint32_t* oldest,
                               int64_t first, int64_t window, void* stream);
// partial: (batch, gram_tile_pairs(tokens)). norms: (batch,) of the compute type.
int ttt_fast_cuda_gram_norm(const Rows* x, const Rows* dy, Dtype dtype, int64_t batch,
                            int64_t tokens, double* partial, void* norms, void* stream);
const char* ttt_fast_cuda_error(int code);
}

}  // namespace cuda
}  // namespace ttt_fast
