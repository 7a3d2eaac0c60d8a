// Registration of the CUDA backend on torch's stable ABI (torch >= 2.10).
//
// This file owns tensors and needs no header of CUDA: the kernels are behind cuda/launchers.h.
// Lists of tensors arrive as the tables of addresses of ttt_fast/kernels/pointer_table.py, made and
// kept by ttt_fast/cuda_ops.py. What a table points to is written through it, unseen by the
// dispatcher; torch.ops.ttt_fast, which ttt_fast/dispatch.py defines, is what declares it.
//
// The stream is an argument: torch.cuda's current one, from Python. A symbol of libtorch_cuda in
// its place would bind the library to CUDA builds of torch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/launchers.h"
#include "stable_dtype.h"

namespace ttt_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// tests/csrc/ runs this file and the kernels on the CPU.
#ifdef TTT_FAST_EMULATED
bool is_on_device(const Tensor& tensor) { return tensor.is_cpu(); }
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
#else
bool is_on_device(const Tensor& tensor) { return tensor.is_cuda(); }
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {}
};
#endif

void check(int code, const char* op) {
  STD_TORCH_CHECK(code == 0, op, ": CUDA error: ", cuda::ttt_fast_cuda_error(code));
}

template <class T>
T* data_of(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* what) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                      tensor.numel() >= numel,
                  what, " must be a contiguous CUDA tensor of its documented dtype and size.");
  return static_cast<T*>(tensor.data_ptr());
}

Dtype float_dtype_of(const Tensor& tensor, const char* what) {
  const Dtype dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype != Dtype::OTHER, what, " must be a floating-point tensor.");
  return dtype;
}

// The tensors of a PointerTable: pointers, numel, index, tensor.
cuda::Table table_of(const Tensors& tensors, int64_t lists, bool aligned) {
  STD_TORCH_CHECK(tensors.size() == 4, "table: four tensors of a PointerTable are needed.");
  const int64_t n = tensors[1].numel();
  cuda::Table table;
  table.pointers = data_of<int64_t>(tensors[0], ScalarType::Long, lists * n, "table.pointers");
  table.numel = data_of<int32_t>(tensors[1], ScalarType::Int, n, "table.numel");
  table.index = data_of<int64_t>(tensors[2], ScalarType::Long, n, "table.index");
  table.tensor = data_of<int32_t>(tensors[3], ScalarType::Int, n, "table.tensor");
  table.n_chunks = int32_t(n);
  table.aligned = aligned;
  return table;
}

cuda::DeviceScalar scalar_of(const MaybeTensor& tensor, const char* what) {
  if (!tensor) return {nullptr, Dtype::OTHER};
  STD_TORCH_CHECK(is_on_device(*tensor) && tensor->numel() == 1, what,
                  " must be a CUDA tensor of one element.");
  return {tensor->data_ptr(), float_dtype_of(*tensor, what)};
}

// The tensors of an UndoLog, then offsets and numel of the tensors, then the update's scratch.
cuda::UndoLog undo_of(const Tensors& undo, int64_t n_chunks) {
  cuda::UndoLog log = {};
  if (undo.empty()) return log;
  STD_TORCH_CHECK(undo.size() == 9, "undo: nine tensors are needed.");
  const int64_t runs = undo[3].numel(), tensors = undo[6].numel();
  log.index = data_of<uint32_t>(undo[0], ScalarType::Int, 0, "undo.index");
  log.value = data_of<uint16_t>(undo[1], ScalarType::Short, undo[0].numel(), "undo.value");
  log.cursor = data_of<unsigned long long>(undo[2], ScalarType::Long, 1, "undo.cursor");
  log.counts = data_of<int32_t>(undo[3], ScalarType::Int, runs, "undo.counts");
  log.paged = data_of<uint8_t>(undo[4], ScalarType::Byte, runs, "undo.paged");
  log.pages = data_of<uint16_t>(undo[5], ScalarType::Short, runs << 16, "undo.pages");
  log.offsets = data_of<int64_t>(undo[6], ScalarType::Long, tensors, "undo.offsets");
  log.numel = data_of<int64_t>(undo[7], ScalarType::Long, tensors, "undo.numel");
  log.states = data_of<int32_t>(undo[8], ScalarType::Int, n_chunks, "undo.states");
  return log;
}

// What sgd_ and adamw_ have in common.
struct UpdateTensors {
  const Tensors& table;
  const std::vector<int64_t>& dtypes;
  bool aligned;
  const MaybeTensor &grad_norm, &grad_scale, &found_inf;
  double max_grad_norm;
  const Tensors &landed, &undo;
  bool maximize, stochastic;
  int64_t seed;
};

cuda::UpdateCall make_call(const UpdateTensors& t) {
  STD_TORCH_CHECK(t.dtypes.size() == cuda::kLists, "dtypes: one for each list of the table.");
  cuda::UpdateCall call = {};
  call.table = table_of(t.table, cuda::kLists, t.aligned);
  for (int list = 0; list < cuda::kLists; ++list) call.dtypes[list] = Dtype(t.dtypes[list]);
  call.grad_norm = scalar_of(t.grad_norm, "grad_norm");
  call.grad_scale = scalar_of(t.grad_scale, "grad_scale");
  call.found_inf = scalar_of(t.found_inf, "found_inf");
  call.max_grad_norm = t.max_grad_norm;
  if (!t.landed.empty()) {
    STD_TORCH_CHECK(t.landed.size() == 2, "landed: the sums and scratch are needed.");
    call.landed = data_of<double>(t.landed[0], ScalarType::Double, 2, "landed");
    call.partial = data_of<double>(t.landed[1], ScalarType::Double, 2 * call.table.n_chunks,
                                   "landed's scratch");
  }
  call.undo = undo_of(t.undo, call.table.n_chunks);
  call.maximize = t.maximize;
  call.stochastic = t.stochastic;
  call.seed = uint64_t(t.seed);
  return call;
}

void sgd_(Tensors table, std::vector<int64_t> dtypes, bool aligned, MaybeTensor grad_norm,
          MaybeTensor grad_scale, MaybeTensor found_inf, Tensors landed, Tensors undo, double lr,
          double momentum, double dampening, bool nesterov, double weight_decay,
          bool decoupled_weight_decay, bool maximize, bool first_step, double max_grad_norm,
          bool stochastic, int64_t seed, int64_t stream) {
  cuda::UpdateCall call = make_call({table, dtypes, aligned, grad_norm, grad_scale, found_inf,
                                     max_grad_norm, landed, undo, maximize, stochastic, seed});
  call.skip_state_read = first_step;
  const auto f32 = sgd_args<float>(1, lr, momentum, dampening, nesterov, weight_decay,
                                   decoupled_weight_decay, first_step);
  const auto f64 = sgd_args<double>(1, lr, momentum, dampening, nesterov, weight_decay,
                                    decoupled_weight_decay, first_step);
  const OnDevice guard(table[0]);
  check(cuda::ttt_fast_cuda_sgd(&call, &f32, &f64, reinterpret_cast<void*>(stream)), "sgd_");
}

void adamw_(Tensors table, std::vector<int64_t> dtypes, bool aligned, MaybeTensor grad_norm,
            MaybeTensor grad_scale, MaybeTensor found_inf, Tensors landed, Tensors undo, double lr,
            double beta1, double beta2, double eps, double weight_decay, bool maximize,
            int64_t step_index, double max_grad_norm, bool stochastic, int64_t seed,
            int64_t stream) {
  const cuda::UpdateCall call =
      make_call({table, dtypes, aligned, grad_norm, grad_scale, found_inf, max_grad_norm, landed,
                 undo, maximize, stochastic, seed});
  const auto f32 = adamw_args<float>(1, lr, beta1, beta2, eps, weight_decay, step_index);
  const auto f64 = adamw_args<double>(1, lr, beta1, beta2, eps, weight_decay, step_index);
  const OnDevice guard(table[0]);
  check(cuda::ttt_fast_cuda_adamw(&call, &f32, &f64, reinterpret_cast<void*>(stream)), "adamw_");
}

void sum_of_squares_(Tensors table, int64_t dtype, bool aligned, Tensor partial, int64_t stream) {
  const cuda::Table chunks = table_of(table, 1, aligned);
  auto* sums = data_of<double>(partial, ScalarType::Double, chunks.n_chunks, "partial");
  const OnDevice guard(partial);
  check(cuda::ttt_fast_cuda_sum_of_squares(&chunks, Dtype(dtype), sums,
                                           reinterpret_cast<void*>(stream)),
        "grad_norm");
}

void norm_of_sums_(Tensor norm, Tensor partial, int64_t stream) {
  const auto* sums = data_of<double>(partial, ScalarType::Double, 0, "partial");
  const Dtype dtype = scalar_of(norm, "norm").dtype;
  STD_TORCH_CHECK(dtype == Dtype::F32 || dtype == Dtype::F64, "norm must be float32 or float64.");
  const OnDevice guard(norm);
  check(cuda::ttt_fast_cuda_norm_of_sums(sums, partial.numel(), norm.data_ptr(),
                                         dtype == Dtype::F64, reinterpret_cast<void*>(stream)),
        "grad_norm");
}

void copy_(Tensors table, int64_t element_size, bool aligned, int64_t stream) {
  const cuda::Table chunks = table_of(table, 2, aligned);
  const OnDevice guard(table[0]);
  check(cuda::ttt_fast_cuda_copy(&chunks, int32_t(element_size), reinterpret_cast<void*>(stream)),
        "copy_");
}

void undo_restore_(Tensors table, Tensors undo, Tensor oldest, int64_t first, int64_t stream) {
  const cuda::Table chunks = table_of(table, 1, false);
  const cuda::UndoLog log = undo_of(undo, 0);
  auto* entries = data_of<uint32_t>(oldest, ScalarType::Int, 0, "oldest");
  const OnDevice guard(oldest);
  check(cuda::ttt_fast_cuda_undo_restore(&chunks, &log, entries, first, oldest.numel(),
                                         reinterpret_cast<void*>(stream)),
        "undo_restore_");
}

cuda::Rows rows_of(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(is_on_device(tensor) && tensor.dim() == 3 &&
                      (tensor.strides()[2] == 1 || tensor.sizes()[2] <= 1),
                  what, " must be a CUDA tensor (B, M, width) with rows of consecutive elements.");
  const int64_t size = tensor.element_size();
  cuda::Rows rows = {tensor.data_ptr(), tensor.strides()[0], tensor.strides()[1], tensor.sizes()[2],
                     false};
  rows.aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                 rows.batch_stride * size % 16 == 0 && rows.stride * size % 16 == 0;
  return rows;
}

void gram_norm_(Tensor norms, Tensor partial, Tensor x, Tensor dy, int64_t stream) {
  const cuda::Rows x_rows = rows_of(x, "x"), dy_rows = rows_of(dy, "dy");
  const Dtype dtype = float_dtype_of(x, "x");
  const int64_t batch = x.sizes()[0], tokens = x.sizes()[1];
  STD_TORCH_CHECK(
      dy.sizes()[0] == batch && dy.sizes()[1] == tokens && dy.scalar_type() == x.scalar_type(),
      "gram_norm: x and dy must agree in batch, tokens and dtype.");
  auto* sums = data_of<double>(partial, ScalarType::Double, batch * cuda::gram_tile_pairs(tokens),
                               "partial");
  void* result =
      dtype == Dtype::F64
          ? static_cast<void*>(data_of<double>(norms, ScalarType::Double, batch, "norms"))
          : data_of<float>(norms, ScalarType::Float, batch, "norms");
  const OnDevice guard(x);
  check(cuda::ttt_fast_cuda_gram_norm(&x_rows, &dy_rows, dtype, batch, tokens, sums, result,
                                      reinterpret_cast<void*>(stream)),
        "gram_norm");
}

}  // namespace
}  // namespace ttt_fast

// ttt_fast/cuda_ops.py is the only caller.
STABLE_TORCH_LIBRARY(ttt_fast_cuda, m) {
  m.def(
      "sgd_(Tensor[] table, int[] dtypes, bool aligned, Tensor? grad_norm, Tensor? grad_scale, "
      "Tensor? found_inf, Tensor(a!)[] landed, Tensor(b!)[] undo, *, float lr, float momentum, "
      "float dampening, bool nesterov, float weight_decay, bool decoupled_weight_decay, "
      "bool maximize, bool first_step, float max_grad_norm, bool stochastic, int seed, "
      "int stream) -> ()");
  m.def(
      "adamw_(Tensor[] table, int[] dtypes, bool aligned, Tensor? grad_norm, Tensor? grad_scale, "
      "Tensor? found_inf, Tensor(a!)[] landed, Tensor(b!)[] undo, *, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, bool maximize, int step_index, "
      "float max_grad_norm, bool stochastic, int seed, int stream) -> ()");
  m.def(
      "sum_of_squares_(Tensor[] table, int dtype, bool aligned, Tensor(a!) partial, *, "
      "int stream) -> ()");
  m.def("norm_of_sums_(Tensor(a!) norm, Tensor partial, *, int stream) -> ()");
  m.def("copy_(Tensor[] table, int element_size, bool aligned, *, int stream) -> ()");
  m.def(
      "undo_restore_(Tensor[] table, Tensor[] undo, Tensor(a!) oldest, int first, *, "
      "int stream) -> ()");
  m.def(
      "gram_norm_(Tensor(a!) norms, Tensor(b!) partial, Tensor x, Tensor dy, *, int stream) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(ttt_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("sgd_", TORCH_BOX(&ttt_fast::sgd_));
  m.impl("adamw_", TORCH_BOX(&ttt_fast::adamw_));
  m.impl("sum_of_squares_", TORCH_BOX(&ttt_fast::sum_of_squares_));
  m.impl("norm_of_sums_", TORCH_BOX(&ttt_fast::norm_of_sums_));
  m.impl("copy_", TORCH_BOX(&ttt_fast::copy_));
  m.impl("undo_restore_", TORCH_BOX(&ttt_fast::undo_restore_));
  m.impl("gram_norm_", TORCH_BOX(&ttt_fast::gram_norm_));
}
