// Registration of the ops of a model's layers: norms, linear layers, gated units, rotary positions,
// attention.
// What ops.cpp says of tensors and checks holds here; the arguments with their names are checked in
// ttt_fast/layer_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "describe.h"
#include "launchers.h"

namespace ttt_fast {
namespace {

using Sizes = std::vector<int64_t>;

// What forward and backward have in common; y is of x's shape.
RmsNormCall rms_norm_call(const char* op, const Tensor& x, const Tensor& weight, bool round_first) {
  const View view = describe(x, op, "x", 0, false);
  const ScalarType wide = view.dtype == Dtype::F64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(view.is_float() && x.dim() == 3 && x.is_contiguous(), op,
                  ": x must be (B, M, D), contiguous, float32, bfloat16, float16 or float64.");
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.scalar_type() == wide &&
                      weight.dim() == 2 && weight.sizes()[0] == x.sizes()[0] &&
                      weight.sizes()[1] == x.sizes()[2],
                  op, ": weight must be (B, D), contiguous, of the compute type.");
  RmsNormCall call = {};
  call.batch = x.sizes()[0], call.tokens = x.sizes()[1], call.width = x.sizes()[2];
  call.dtype = view.dtype, call.element_size = view.element_size;
  call.round_first = round_first;
  call.x = x.data_ptr(), call.weight = weight.data_ptr();
  return call;
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps, bool round_first) {
  RmsNormCall call = rms_norm_call("rms_norm", x, weight, round_first);
  const std::vector<int64_t> shape = {call.batch, call.tokens, call.width};
  const std::vector<int64_t> tokens = {call.batch, call.tokens};
  Tensor y = torch::stable::empty(shape, x.scalar_type());
  Tensor rstd = torch::stable::empty(tokens, weight.scalar_type());
  call.eps = eps, call.y = y.data_ptr(), call.rstd = rstd.data_ptr();
  rms_norm_cpu(call);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd,
                                             bool round_first) {
  RmsNormCall call = rms_norm_call("rms_norm_backward", x, weight, round_first);
  STD_TORCH_CHECK(dy.is_cpu() && dy.is_contiguous() && dy.scalar_type() == x.scalar_type() &&
                      dy.numel() == x.numel() && rstd.is_cpu() && rstd.is_contiguous() &&
                      rstd.scalar_type() == weight.scalar_type() &&
                      rstd.numel() == call.batch * call.tokens,
                  "rms_norm_backward: dy must be as x, and rstd what rms_norm returned.");
  const std::vector<int64_t> shape = {call.batch, call.tokens, call.width};
  const std::vector<int64_t> widths = {call.batch, call.width};
  Tensor dx = torch::stable::empty(shape, x.scalar_type());
  Tensor dweight = torch::stable::empty(widths, weight.scalar_type());
  call.backward = true, call.dy = dy.data_ptr(), call.rstd = rstd.data_ptr();
  call.y = dx.data_ptr(), call.dweight = dweight.data_ptr();
  rms_norm_cpu(call);
  return {dx, dweight};
}

GluCall glu_call(const char* op, const Tensor& gate, const Tensor& up,
                 const std::string& activation) {
  const View view = describe(gate, op, "gate", 0, false);
  STD_TORCH_CHECK(view.is_float() && gate.is_contiguous() && up.is_cpu() && up.is_contiguous() &&
                      up.scalar_type() == gate.scalar_type() && up.numel() == gate.numel(),
                  op, ": gate and up must be contiguous, of one shape and of one dtype, float32, ",
                  "bfloat16, float16 or float64.");
  STD_TORCH_CHECK(activation == "silu" || activation == "gelu_tanh", op, ": activation \"",
                  activation, "\" is unknown; use \"silu\" or \"gelu_tanh\".");
  GluCall call = {};
  call.numel = view.numel, call.dtype = view.dtype, call.element_size = view.element_size;
  call.gelu_tanh = activation == "gelu_tanh";
  call.gate = gate.data_ptr(), call.up = up.data_ptr();
  return call;
}

Tensor glu(Tensor gate, Tensor up, std::string activation) {
  GluCall call = glu_call("glu", gate, up, activation);
  Tensor y = torch::stable::empty_like(gate);
  call.y = y.data_ptr();
  glu_cpu(call);
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(Tensor dy, Tensor gate, Tensor up, std::string activation) {
  GluCall call = glu_call("glu_backward", gate, up, activation);
  STD_TORCH_CHECK(dy.is_cpu() && dy.is_contiguous() && dy.scalar_type() == gate.scalar_type() &&
                      dy.numel() == gate.numel(),
                  "glu_backward: dy must be as gate.");
  Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
  call.backward = true, call.dy = dy.data_ptr();
  call.y = dgate.data_ptr(), call.dup = dup.data_ptr();
  glu_cpu(call);
  return {dgate, dup};
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, bool transposed) {
  const View view = describe(x, "rotary", "x", 0, false);
  const ScalarType wide = view.dtype == Dtype::F64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(view.is_float() && x.dim() == 4 && dense(x, 3),
                  "rotary: x must be (B, H, T, D), its rows consecutive, float32, bfloat16, "
                  "float16 or float64.");
  RotaryCall call = {};
  call.batch = x.sizes()[0], call.heads = x.sizes()[1], call.tokens = x.sizes()[2];
  call.width = x.sizes()[3];
  const auto factor = [&](const Tensor& t, const char* name) -> Factor {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && dense(t, 2) &&
                        (t.sizes()[0] == 1 || t.sizes()[0] == call.batch) &&
                        t.sizes()[1] == call.tokens && t.sizes()[2] <= call.width &&
                        t.sizes()[2] % 2 == 0 &&
                        (t.scalar_type() == x.scalar_type() || t.scalar_type() == wide),
                    "rotary: ", name,
                    " must be (B or 1, T, R) with R even and at most D, its rows "
                    "consecutive, of the dtype of x or of the compute type.");
    return {t.data_ptr(), t.sizes()[0] == 1 ? 0 : t.strides()[0], t.strides()[1]};
  };
  call.cos = factor(cos, "cos"), call.sin = factor(sin, "sin");
  STD_TORCH_CHECK(cos.scalar_type() == sin.scalar_type() && cos.sizes()[2] == sin.sizes()[2],
                  "rotary: cos and sin differ in dtype or in their last dimension.");
  call.turned = cos.sizes()[2];
  call.x_batch = x.strides()[0], call.x_head = x.strides()[1], call.x_token = x.strides()[2];
  call.dtype = view.dtype, call.angles = dtype_of(cos), call.element_size = view.element_size;
  call.transposed = transposed;
  // In the order of memory of x, as results of torch's own operations are.
  Tensor y = torch::stable::empty_like(x);
  STD_TORCH_CHECK(dense(y, 3), "rotary: x shares memory between its elements; pass a clone of it.");
  call.y_batch = y.strides()[0], call.y_head = y.strides()[1], call.y_token = y.strides()[2];
  call.x = x.data_ptr(), call.y = y.data_ptr();
  rotary_cpu(call);
  return y;
}

// Where the rows of x are. What may be shared has one row for all where its dimension is 1.
Heads heads_of(const char* op, const char* name, const Tensor& x, ScalarType dtype,
               const Sizes& sizes, bool shared = false) {
  Heads heads = {x.data_ptr(), 0, 0, 0};
  bool fits = x.is_cpu() && x.scalar_type() == dtype && x.dim() == 4 && dense(x, 3) &&
              x.sizes()[3] == sizes[3];
  int64_t* const strides[] = {&heads.batch, &heads.head, &heads.token};
  for (int d = 0; d < 3 && fits; ++d) {
    fits = x.sizes()[d] == sizes[d] || (shared && x.sizes()[d] == 1);
    *strides[d] = x.sizes()[d] == 1 ? 0 : x.strides()[d];
  }
  STD_TORCH_CHECK(fits, op, ": ", name,
                  " must have four dimensions of the documented sizes, its rows consecutive, and "
                  "the dtype of q; a mask may be of bool.");
  return heads;
}

// (B, H, T, D) in the order of memory of (B, T, H, D), as projections have it.
Tensor new_heads(const Sizes& sizes, ScalarType dtype) {
  const Sizes order = {sizes[0], sizes[2], sizes[1], sizes[3]};
  return torch::stable::transpose(torch::stable::empty(order, dtype), 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v,
                                                      std::optional<Tensor> mask, double scale,
                                                      bool causal) {
  const char* const op = "attention_backward";
  const View view = describe(q, op, "q", 0, false);
  STD_TORCH_CHECK(view.is_float() && q.dim() == 4 && k.dim() == 4 && q.sizes()[1] > 0, op,
                  ": q and k must be (B, H, T, D), float32, bfloat16, float16 or float64.");
  AttentionBackwardCall call = {};
  call.batch = q.sizes()[0], call.heads = q.sizes()[1], call.queries = q.sizes()[2];
  call.width = q.sizes()[3], call.kv_heads = k.sizes()[1], call.keys = k.sizes()[2];
  STD_TORCH_CHECK(call.kv_heads > 0 && call.heads % call.kv_heads == 0, op, ": ", call.heads,
                  " heads of queries cannot share ", call.kv_heads, " of keys.");
  const Sizes queries = {call.batch, call.heads, call.queries, call.width};
  const Sizes keys = {call.batch, call.kv_heads, call.keys, call.width};
  const ScalarType dtype = q.scalar_type();
  call.dy = heads_of(op, "dy", dy, dtype, queries), call.q = heads_of(op, "q", q, dtype, queries);
  call.k = heads_of(op, "k", k, dtype, keys), call.v = heads_of(op, "v", v, dtype, keys);
  if (mask) {
    call.chosen = mask->scalar_type() == ScalarType::Bool;
    call.mask = heads_of(op, "mask", *mask, call.chosen ? ScalarType::Bool : dtype,
                         {call.batch, call.heads, call.queries, call.keys}, true);
  }
  call.dtype = view.dtype, call.element_size = view.element_size;
  call.scale = scale, call.causal = causal;
  Tensor dq = new_heads(queries, dtype), dk = new_heads(keys, dtype), dv = new_heads(keys, dtype);
  call.dq = heads_of(op, "dq", dq, dtype, queries);
  call.dk = heads_of(op, "dk", dk, dtype, keys), call.dv = heads_of(op, "dv", dv, dtype, keys);
  attention_backward_cpu(call);
  return {dq, dk, dv};
}

// What forward and backward have in common; `given` is what the first W meets.
LinearsCall linears_call(const char* op, const Tensor& given, const Tensors& weights, int64_t in) {
  const View view = describe(given, op, "x", 0, false);
  STD_TORCH_CHECK(view.dtype == Dtype::F32 || view.dtype == Dtype::BF16 || view.dtype == Dtype::F64,
                  op, ": tensors must be float32, bfloat16 or float64.");
  LinearsCall call = {};
  call.in = in, call.dtype = view.dtype;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && dense(weight, 1) &&
                        weight.sizes()[1] == in && weight.scalar_type() == given.scalar_type(),
                    op, ": weights must be (out, in), their rows consecutive, of one dtype.");
    call.layers.push_back({weight.data_ptr(), weight.sizes()[0], weight.strides()[0], nullptr});
  }
  return call;
}

// The shape of a tensor but for its last dimension, and its rows.
Sizes with_columns(const Tensor& t, int64_t columns, int64_t* rows) {
  Sizes shape;
  *rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    shape.push_back(t.sizes()[d]);
    *rows *= t.sizes()[d];
  }
  shape.push_back(columns);
  return shape;
}

Tensors linears(Tensor x, Tensors weights) {
  const char* const op = "linears";
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), op, ": x must be (..., in), contiguous.");
  LinearsCall call = linears_call(op, x, weights, x.sizes()[x.dim() - 1]);
  Tensors ys;
  for (auto& layer : call.layers) {
    ys.push_back(torch::stable::empty(with_columns(x, layer.out, &call.rows), x.scalar_type()));
    layer.y = ys.back().data_ptr();
  }
  call.x = x.data_ptr();
  if (!ys.empty()) linears_cpu(call);
  return ys;
}

Tensor linears_backward(Tensors dys, Tensors weights) {
  const char* const op = "linears_backward";
  STD_TORCH_CHECK(!dys.empty() && dys.size() == weights.size() && weights[0].dim() == 2, op,
                  ": needs one dy for each of weights, at least one.");
  LinearsCall call = linears_call(op, dys[0], weights, weights[0].sizes()[1]);
  const Sizes shape = with_columns(dys[0], call.in, &call.rows);
  for (size_t i = 0; i < dys.size(); ++i) {
    const Tensor& dy = dys[i];
    STD_TORCH_CHECK(dy.is_cpu() && dy.dim() > 0 && dy.is_contiguous() &&
                        dy.scalar_type() == dys[0].scalar_type() &&
                        dy.sizes()[dy.dim() - 1] == call.layers[i].out &&
                        dy.numel() == call.rows * call.layers[i].out,
                    op,
                    ": dys must be (..., out), contiguous, of one dtype and as many rows each.");
    call.layers[i].y = dy.data_ptr();
  }
  Tensor dx = torch::stable::empty(shape, dys[0].scalar_type());
  call.backward = true, call.dx = dx.data_ptr();
  linears_cpu(call);
  return dx;
}

}  // namespace
}  // namespace ttt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ttt_fast_cpp, m) {
  m.def("linears(Tensor x, Tensor[] weights) -> Tensor[]");
  m.def("linears_backward(Tensor[] dys, Tensor[] weights) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps, bool round_first) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, *, bool round_first) -> "
      "(Tensor, Tensor)");
  m.def("glu(Tensor gate, Tensor up, *, str activation) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor gate, Tensor up, *, str activation) -> (Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, *, bool transposed) -> Tensor");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, *, float scale, "
      "bool causal) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ttt_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("linears", TORCH_BOX(&ttt_fast::linears));
  m.impl("linears_backward", TORCH_BOX(&ttt_fast::linears_backward));
  m.impl("rms_norm", TORCH_BOX(&ttt_fast::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&ttt_fast::rms_norm_backward));
  m.impl("glu", TORCH_BOX(&ttt_fast::glu));
  m.impl("glu_backward", TORCH_BOX(&ttt_fast::glu_backward));
  m.impl("rotary", TORCH_BOX(&ttt_fast::rotary));
  m.impl("attention_backward", TORCH_BOX(&ttt_fast::attention_backward));
}
