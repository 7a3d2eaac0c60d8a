// Gated linear unit of two projections, y = act(gate) o up, forward and backward.
// Fused: conversion, activation, product, rounding; backward both gradients, with the activation
// computed again, not kept. Bytes per element: forward 3 numbers of storage, backward 5. Bound:
// memory bandwidth, or arithmetic of exp while all lies in the cache. Reference: glu in
// ttt_fast/layer_reference.py.
#include "exponential.h"

namespace ttt_fast {
namespace {

// act(x) = x s(u(x)) with s the logistic function: u = x for SiLU, and the tanh form of GELU has
// (1 + tanh z) / 2 = s(2 z).
template <class C>
TTT_HOST_DEVICE C logistic(C u) {
  const C e = exponential(u < C(0) ? u : -u);
  return (u < C(0) ? e : C(1)) / (C(1) + e);
}

template <class C>
struct Silu {
  static TTT_HOST_DEVICE C inner(C x) { return x; }
  static TTT_HOST_DEVICE C slope(C) { return C(1); }
};

template <class C>
struct GeluTanh {
  static constexpr C kScale = C(1.5957691216057308);  // 2 sqrt(2 / pi)
  static constexpr C kCubic = C(0.044715);
  static TTT_HOST_DEVICE C inner(C x) { return kScale * (x + kCubic * (x * x * x)); }
  static TTT_HOST_DEVICE C slope(C x) { return kScale * (C(1) + C(3) * kCubic * (x * x)); }
};

template <template <class> class Act, class C>
TTT_HOST_DEVICE void activate_loop(const C* __restrict gate, int64_t n, C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * logistic(Act<C>::inner(gate[i]));
}

template <template <class> class Act, class C>
TTT_HOST_DEVICE void gradient_loop(const C* __restrict dy, const C* __restrict gate,
                                   const C* __restrict up, int64_t n, C* __restrict dgate) {
  for (int64_t i = 0; i < n; ++i) {
    const C u = Act<C>::inner(gate[i]), s = logistic(u);
    // 1 - s has few digits left where s is nearly 1.
    const C derivative = s + gate[i] * (s * logistic(-u)) * Act<C>::slope(gate[i]);
    dgate[i] = dy[i] * up[i] * derivative;
  }
}

template <class C>
TTT_HOST_DEVICE void multiply_loop(const C* __restrict a, const C* __restrict b, int64_t n,
                                   C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
}

// target_clones does not take templates, hence one function for each type.
#define TTT_GLU_LOOPS(C)                                                                           \
  TTT_CLONES void silu(const C* gate, int64_t n, C* y) { activate_loop<Silu>(gate, n, y); }        \
  TTT_CLONES void gelu_tanh(const C* gate, int64_t n, C* y) {                                      \
    activate_loop<GeluTanh>(gate, n, y);                                                           \
  }                                                                                                \
  TTT_CLONES void silu_gradient(const C* dy, const C* gate, const C* up, int64_t n, C* out) {      \
    gradient_loop<Silu>(dy, gate, up, n, out);                                                     \
  }                                                                                                \
  TTT_CLONES void gelu_tanh_gradient(const C* dy, const C* gate, const C* up, int64_t n, C* out) { \
    gradient_loop<GeluTanh>(dy, gate, up, n, out);                                                 \
  }                                                                                                \
  TTT_CLONES void multiply(const C* a, const C* b, int64_t n, C* y) { multiply_loop(a, b, n, y); }
TTT_GLU_LOOPS(float)
TTT_GLU_LOOPS(double)

// A block of act(gate) in C, rounded to storage as the model's own code does before the product.
template <class C>
C* activated(const GluCall& call, const C* gate, int64_t n, C* to, char* bits) {
  if (call.gelu_tanh) {
    gelu_tanh(gate, n, to);
  } else {
    silu(gate, n, to);
  }
  if (call.dtype == Dtype::F32 || call.dtype == Dtype::F64) return to;
  narrow(call.dtype, to, n, bits, Noise(), 0);
  return widen(call.dtype, bits, n, to);
}

template <class C>
void glu_blocks(const GluCall& call) {
  const auto raw = [&](const void* data, int64_t at) {
    return const_cast<char*>(static_cast<const char*>(data)) + at * call.element_size;
  };
  const int64_t blocks = (call.numel + kBlock - 1) / kBlock;
  parallel_ranges(blocks, kChunk / kBlock / 4, [&](int64_t first, int64_t last) {
    alignas(64) C gates[kBlock], ups[kBlock], dys[kBlock], act[kBlock], out[kBlock];
    alignas(64) char bits[kBlock * sizeof(C)];
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * kBlock, n = std::min(kBlock, call.numel - at);
      const C* const gate = widen(call.dtype, raw(call.gate, at), n, gates);
      const C* const up = widen(call.dtype, raw(call.up, at), n, ups);
      const C* const act_gate = activated(call, gate, n, act, bits);
      if (!call.backward) {
        multiply(act_gate, up, n, out);
        narrow(call.dtype, out, n, raw(call.y, at), Noise(), 0);
        continue;
      }
      const C* const dy = widen(call.dtype, raw(call.dy, at), n, dys);
      multiply(dy, act_gate, n, out);
      narrow(call.dtype, out, n, raw(call.dup, at), Noise(), 0);
      if (call.gelu_tanh) {
        gelu_tanh_gradient(dy, gate, up, n, out);
      } else {
        silu_gradient(dy, gate, up, n, out);
      }
      narrow(call.dtype, out, n, raw(call.y, at), Noise(), 0);
    }
  });
}

}  // namespace

void glu_cpu(const GluCall& call) {
  if (call.dtype == Dtype::F64) {
    glu_blocks<double>(call);
  } else {
    glu_blocks<float>(call);
  }
}

}  // namespace ttt_fast
