// Registration of the C++ backend on torch's stable ABI (torch >= 2.10): one binary for many
// versions.
//
// This file owns tensors: describe.h checks them and makes plain Views of them, and the kernels see
// nothing else. ttt_fast/ops.py checks the arguments with their names; the checks here are what
// keeps a direct call of torch.ops.ttt_fast_cpp from touching foreign memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/tiles.h"
#include "describe.h"
#include "gradient_factor.h"
#include "launchers.h"

namespace ttt_fast {
namespace {

using MaybeTensor = std::optional<Tensor>;

double signed_factor(const MaybeTensor& grad_norm, double max_grad_norm,
                     const MaybeTensor& grad_scale, bool maximize, const char* op) {
  const Scalar norm = grad_norm ? read_scalar(*grad_norm, op, "grad_norm") : Scalar();
  const Scalar scale = grad_scale ? read_scalar(*grad_scale, op, "grad_scale") : Scalar();
  const double factor = gradient_factor(norm, max_grad_norm, scale);
  return maximize ? -factor : factor;
}

bool is_set(const MaybeTensor& found_inf, const char* op) {
  return found_inf && read_scalar(*found_inf, op, "found_inf").value != 0;
}

// What sgd_ and adamw_ have in common.
struct UpdateTensors {
  const Tensors &params, &grads, &deltas, &bases, &undo;
  const MaybeTensor& landed;
  const std::vector<int64_t>& undo_offsets;
  const std::string& rounding;
  int64_t seed;
};

UpdateCall make_call(const UpdateTensors& t, const char* op) {
  STD_TORCH_CHECK(t.rounding == "nearest" || t.rounding == "stochastic", op,
                  ": the C++ backend rounds \"nearest\" or \"stochastic\", not \"", t.rounding,
                  "\"; rounding=\"torch\" is torch's own code, use backend=\"auto\" or \"torch\".");
  UpdateCall call;
  call.params = describe_all(t.params, op, "params", true);
  for (size_t i = 0; i < call.params.size(); ++i) {
    STD_TORCH_CHECK(call.params[i].is_float(), op, ": params[", i,
                    "] must be float32, bfloat16, float16 or float64; leave it out.");
  }
  call.grads = describe_floats(t.grads, op, "grads", false, call.params);
  if (!t.deltas.empty() || !t.bases.empty()) {
    call.deltas = describe_floats(t.deltas, op, "deltas", true, call.params);
    call.bases = describe_floats(t.bases, op, "bases", false, call.params);
  }
  call.stochastic = t.rounding == "stochastic";
  call.seed = uint64_t(t.seed);
  if (t.landed) call.landed = data_of<double>(*t.landed, ScalarType::Double, 2, "landed");
  call.undo = undo_state(t.undo, t.undo_offsets, call.params, op);
  return call;
}

void sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors deltas, Tensors bases,
          MaybeTensor grad_norm, MaybeTensor grad_scale, MaybeTensor found_inf, MaybeTensor landed,
          Tensors undo, std::vector<int64_t> undo_offsets, double lr, double momentum,
          double dampening, bool nesterov, double weight_decay, bool decoupled_weight_decay,
          bool maximize, bool first_step, double max_grad_norm, std::string rounding,
          int64_t seed) {
  if (is_set(found_inf, "sgd_")) return;
  UpdateCall call =
      make_call({params, grads, deltas, bases, undo, landed, undo_offsets, rounding, seed}, "sgd_");
  if (momentum != 0) {
    call.states[0] =
        describe_floats(momentum_buffers, "sgd_", "momentum_buffers", true, call.params);
  }
  call.reads_weight = weight_decay != 0;
  call.skip_state_read = first_step;
  const double factor = signed_factor(grad_norm, max_grad_norm, grad_scale, maximize, "sgd_");
  sgd_cpu(call,
          sgd_args<float>(factor, lr, momentum, dampening, nesterov, weight_decay,
                          decoupled_weight_decay, first_step),
          sgd_args<double>(factor, lr, momentum, dampening, nesterov, weight_decay,
                           decoupled_weight_decay, first_step));
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors deltas,
            Tensors bases, MaybeTensor grad_norm, MaybeTensor grad_scale, MaybeTensor found_inf,
            MaybeTensor landed, Tensors undo, std::vector<int64_t> undo_offsets, double lr,
            double beta1, double beta2, double eps, double weight_decay, bool maximize,
            int64_t step_index, double max_grad_norm, std::string rounding, int64_t seed) {
  if (is_set(found_inf, "adamw_")) return;
  UpdateCall call = make_call(
      {params, grads, deltas, bases, undo, landed, undo_offsets, rounding, seed}, "adamw_");
  call.states[0] = describe_floats(exp_avgs, "adamw_", "exp_avgs", true, call.params);
  call.states[1] = describe_floats(exp_avg_sqs, "adamw_", "exp_avg_sqs", true, call.params);
  call.reads_weight = weight_decay != 0;
  const double factor = signed_factor(grad_norm, max_grad_norm, grad_scale, maximize, "adamw_");
  adamw_cpu(call, adamw_args<float>(factor, lr, beta1, beta2, eps, weight_decay, step_index),
            adamw_args<double>(factor, lr, beta1, beta2, eps, weight_decay, step_index));
}

Tensor grad_norm(Tensors grads) {
  const Views views = describe_all(grads, "grad_norm", "grads", false);
  bool wide = false;
  for (size_t i = 0; i < views.size(); ++i) {
    STD_TORCH_CHECK(views[i].is_float(), "grad_norm: grads[", i,
                    "] must be float32, bfloat16, float16 or float64; convert it.");
    wide = wide || views[i].dtype == Dtype::F64;
  }
  const double norm = std::sqrt(sum_of_squares_cpu(views));
  const std::vector<int64_t> no_dims;
  Tensor result = torch::stable::empty(no_dims, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *static_cast<double*>(result.data_ptr()) = norm;
  } else {
    *static_cast<float*>(result.data_ptr()) = float(norm);
  }
  return result;
}

// Norms of one pair, written to `norms` (B,) of its compute type; `wide`: that is double.
void gram_norm_into(const Tensor& x, const Tensor& dy, const char* op, size_t i, bool wide,
                    int64_t batch, void* norms) {
  const View views[2] = {describe(x, op, "x", i, false), describe(dy, op, "dy", i, false)};
  STD_TORCH_CHECK(x.dim() == 3 && dy.dim() == 3 && x.sizes()[0] == dy.sizes()[0] &&
                      x.sizes()[1] == dy.sizes()[1] && x.sizes()[0] == batch,
                  op, ": x must be (B, M, in) and dy (B, M, out).");
  STD_TORCH_CHECK(views[0].is_float() && views[0].dtype == views[1].dtype &&
                      (views[0].dtype == Dtype::F64) == wide,
                  op, ": x and dy must be of one dtype, float32, bfloat16, float16 or float64.");
  gram_norm_cpu(views[0], views[1], batch, x.sizes()[1], norms);
}

Tensor gram_norm(Tensor x, Tensor dy) {
  STD_TORCH_CHECK(x.dim() == 3, "gram_norm: x must be (B, M, in) and dy (B, M, out).");
  const bool wide = dtype_of(x) == Dtype::F64;
  const std::vector<int64_t> shape = {x.sizes()[0]};
  Tensor norms = torch::stable::empty(shape, wide ? ScalarType::Double : ScalarType::Float);
  gram_norm_into(x, dy, "gram_norm", 0, wide, shape[0], norms.data_ptr());
  return norms;
}

Tensor gram_norms(Tensors xs, Tensors dys) {
  STD_TORCH_CHECK(!xs.empty() && xs.size() == dys.size() && xs[0].dim() == 3,
                  "gram_norms: xs must be (B, M, in) and dys (B, M, out), as many of both.");
  const bool wide = dtype_of(xs[0]) == Dtype::F64;
  const std::vector<int64_t> shape = {int64_t(xs.size()), xs[0].sizes()[0]};
  Tensor norms = torch::stable::empty(shape, wide ? ScalarType::Double : ScalarType::Float);
  char* row = static_cast<char*>(norms.data_ptr());
  for (size_t i = 0; i < xs.size(); ++i, row += shape[1] * norms.element_size()) {
    gram_norm_into(xs[i], dys[i], "gram_norms", i, wide, shape[1], row);
  }
  return norms;
}

Tensor nll_(Tensor logits, Tensor targets, int64_t ignore_index) {
  const View view = describe(logits, "nll_", "logits", 0, true);
  const View columns = describe(targets, "nll_", "targets", 0, false);
  STD_TORCH_CHECK(view.is_float() && logits.dim() == 2,
                  "nll_: logits must be a matrix of float32, ",
                  "bfloat16, float16 or float64; convert it.");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 &&
                      targets.numel() == logits.sizes()[0],
                  "nll_: targets must be an int64 tensor with one element for each row of logits.");
  const std::vector<int64_t> shape = {targets.numel()};
  Tensor losses = torch::stable::empty(
      shape, view.dtype == Dtype::F64 ? ScalarType::Double : ScalarType::Float);
  nll_cpu(view, columns, ignore_index, losses.data_ptr());
  return losses;
}

Tensor delta_linear(Tensor x, std::optional<Tensor> weight, Tensor a, Tensor d, Tensor beta,
                    std::optional<Tensor> rho, std::optional<Tensor> append) {
  const Dtype dtype = describe(x, "delta_linear", "x", 0, false).dtype;
  const auto same = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type(); };
  const ScalarType wide = dtype == Dtype::F64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(dtype == Dtype::F32 || dtype == Dtype::F64 || dtype == Dtype::BF16,
                  "delta_linear: x must be float32, bfloat16 or float64; use backend=\"torch\" "
                  "for others.");
  STD_TORCH_CHECK((!weight || same(*weight)) && same(a) && same(d) && (!append || same(*append)) &&
                      beta.scalar_type() == wide && (!rho || rho->scalar_type() == wide),
                  "delta_linear: x, weight, a, d and append must be of one dtype, beta and rho of "
                  "the compute type.");
  STD_TORCH_CHECK(x.is_contiguous() && beta.is_contiguous() && (!rho || rho->is_contiguous()) &&
                      dense(a, 2) && dense(d, 2) && (!append || dense(*append, 2)) &&
                      (!weight || dense(*weight, 0) || dense(*weight, 1)),
                  "delta_linear: x, beta and rho must be contiguous, and the rows of a, d, append "
                  "and weight; use backend=\"torch\" for others.");
  DeltaLinearCall call;
  call.batch = x.sizes()[0], call.tokens = x.sizes()[1], call.in = x.sizes()[2];
  call.out = d.sizes()[2], call.rank = a.sizes()[1];
  STD_TORCH_CHECK(
      (!weight || (weight->sizes()[1] == call.in && weight->sizes()[0] == call.out)) &&
          a.sizes()[2] == call.in && d.sizes()[1] == call.rank && a.sizes()[0] == call.batch &&
          d.sizes()[0] == call.batch && beta.numel() == call.batch * call.rank &&
          (!rho || rho->numel() == call.batch) &&
          (!append || (append->numel() == x.numel() && append->dim() == 3 &&
                       append->sizes()[2] == call.in && append->sizes()[0] == call.batch)),
      "delta_linear: shapes do not agree.");
  call.weight_by_columns = weight && !dense(*weight, 1);
  call.weight_stride = weight ? weight->strides()[call.weight_by_columns ? 1 : 0] : 0;
  const std::vector<int64_t> shape = {call.batch, call.tokens, call.out};
  Tensor y = torch::stable::empty(shape, x.scalar_type());
  call.x = x.data_ptr(), call.weight = weight ? weight->data_ptr() : nullptr, call.y = y.data_ptr();
  call.a = {a.data_ptr(), a.strides()[0], a.strides()[1]};
  call.d = {d.data_ptr(), d.strides()[0], d.strides()[1]};
  call.beta = beta.data_ptr(), call.rho = rho ? rho->data_ptr() : nullptr;
  call.append = append ? append->data_ptr() : nullptr;
  call.append_batch_stride = append ? append->strides()[0] : 0;
  call.append_stride = append ? append->strides()[1] : 0;
  call.dtype = dtype;
  delta_linear_cpu(call);
  return y;
}

void copy_(Tensors dsts, Tensors srcs) {
  const Views to = describe_all(dsts, "copy_", "dsts", true);
  const Views from = describe_all(srcs, "copy_", "srcs", false, &to);
  for (size_t i = 0; i < to.size(); ++i) {
    STD_TORCH_CHECK(dsts[i].scalar_type() == srcs[i].scalar_type(), "copy_: srcs[", i,
                    "] and dsts[", i, "] differ in dtype; bits are copied, nothing is converted.");
  }
  copy_cpu(to, from);
}

void undo_restore_(Tensors params, Tensors undo, std::vector<int64_t> undo_offsets) {
  const Views views = describe_all(params, "undo_restore_", "params", true);
  const UndoState state = undo_state(undo, undo_offsets, views, "undo_restore_");
  if (state.offsets != nullptr) undo_restore_cpu(views, state);
}

Tensor checksum(Tensors tensors) {
  const Views views = describe_all(tensors, "checksum", "tensors", false);
  for (size_t i = 0; i < views.size(); ++i) {
    STD_TORCH_CHECK(views[i].element_size <= 8, "checksum: tensors[", i, "] has elements of ",
                    views[i].element_size, " bytes; at most 8 are supported. View it as real.");
  }
  const std::vector<int64_t> no_dims;
  Tensor result = torch::stable::empty(no_dims, ScalarType::Long);
  *static_cast<int64_t*>(result.data_ptr()) = checksum_cpu(views);
  return result;
}

}  // namespace
}  // namespace ttt_fast

// What setup.py put into this library, for ttt-fast doctor.
extern "C" __attribute__((visibility("default"))) const char* ttt_fast_built() {
  return TTT_FAST_BUILT;
}

// The schemas of ttt_fast/dispatch.py less `backend`; tests/test_ops_contract.py compares them.
STABLE_TORCH_LIBRARY(ttt_fast_cpp, m) {
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(d!)[] deltas, Tensor[] bases, Tensor? grad_norm, Tensor? grad_scale, "
      "Tensor? found_inf, Tensor(e!)? landed, Tensor(f!)[] undo, int[] undo_offsets, *, "
      "float lr, float momentum, float dampening, bool nesterov, float weight_decay, "
      "bool decoupled_weight_decay, bool maximize, bool first_step, float max_grad_norm, "
      "str rounding, int seed) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] deltas, Tensor[] bases, Tensor? grad_norm, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor(e!)? landed, Tensor(f!)[] undo, "
      "int[] undo_offsets, *, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool maximize, int step_index, float max_grad_norm, str rounding, "
      "int seed) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def("gram_norm(Tensor x, Tensor dy) -> Tensor");
  m.def("gram_norms(Tensor[] xs, Tensor[] dys) -> Tensor");
  m.def(
      "delta_linear(Tensor x, Tensor? weight, Tensor a, Tensor d, Tensor beta, Tensor? rho, "
      "Tensor(a!)? append) -> Tensor");
  m.def("has_tiles() -> bool");
  m.def("is_intel() -> bool");
  m.def("nll_(Tensor(a!) logits, Tensor targets, *, int ignore_index) -> Tensor");
  m.def("copy_(Tensor(a!)[] dsts, Tensor[] srcs) -> ()");
  m.def("undo_restore_(Tensor(a!)[] params, Tensor[] undo, int[] undo_offsets) -> ()");
  m.def("checksum(Tensor[] tensors) -> Tensor");
}

// Not the CPU key: the dispatcher finds a device from the arguments, and an empty list has none.
STABLE_TORCH_LIBRARY_IMPL(ttt_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("sgd_", TORCH_BOX(&ttt_fast::sgd_));
  m.impl("adamw_", TORCH_BOX(&ttt_fast::adamw_));
  m.impl("grad_norm", TORCH_BOX(&ttt_fast::grad_norm));
  m.impl("gram_norm", TORCH_BOX(&ttt_fast::gram_norm));
  m.impl("gram_norms", TORCH_BOX(&ttt_fast::gram_norms));
  m.impl("delta_linear", TORCH_BOX(&ttt_fast::delta_linear));
  m.impl("has_tiles", TORCH_BOX(&ttt_fast::has_tiles));
  m.impl("is_intel", TORCH_BOX(&ttt_fast::is_intel));
  m.impl("nll_", TORCH_BOX(&ttt_fast::nll_));
  m.impl("copy_", TORCH_BOX(&ttt_fast::copy_));
  m.impl("undo_restore_", TORCH_BOX(&ttt_fast::undo_restore_));
  m.impl("checksum", TORCH_BOX(&ttt_fast::checksum));
}
