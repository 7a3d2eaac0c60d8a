// Root mean square norm of tokens with a weight for each delta, forward and backward.
// Fused: conversion, mean of squares, scaling, weight, rounding; backward both gradients. Bytes per
// element: forward 2 numbers of storage, backward 3; a row stays in the cache between its passes.
// Bound: memory bandwidth, or the call itself where tokens are few. Reference: rms_norm in
// ttt_fast/layer_reference.py.
#include <cmath>
#include <memory>

#include "blocks.h"

namespace ttt_fast {
namespace {

constexpr int64_t kLanes = 64;
// Tokens whose shares of the weight's gradient are added up by one thread, in their order.
constexpr int64_t kTokens = 16;

// The number of lanes is fixed, and with it the order of the sum, for every instruction set.
template <class C>
TTT_HOST_DEVICE C dot_loop(const C* __restrict a, const C* __restrict b, int64_t n) {
  C lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
  }
  for (; i < n; ++i) lanes[i % kLanes] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

template <class C>
TTT_HOST_DEVICE void scale_loop(const C* __restrict x, C factor, int64_t n, C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * factor;
}

template <class C>
TTT_HOST_DEVICE void multiply_loop(const C* __restrict a, const C* __restrict b, int64_t n,
                                   C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
}

template <class C>
TTT_HOST_DEVICE void add_product_loop(const C* __restrict a, const C* __restrict b, int64_t n,
                                      C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a[i] * b[i];
}

// y = (a - b * factor) * scale
template <class C>
TTT_HOST_DEVICE void project_loop(const C* __restrict a, const C* __restrict b, C factor, C scale,
                                  int64_t n, C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = (a[i] - b[i] * factor) * scale;
}

// target_clones does not take templates, hence one function for each type.
#define TTT_LOOPS(C)                                                                               \
  TTT_CLONES C dot(const C* a, const C* b, int64_t n) { return dot_loop(a, b, n); }                \
  TTT_CLONES void scale(const C* x, C factor, int64_t n, C* y) { scale_loop(x, factor, n, y); }    \
  TTT_CLONES void multiply(const C* a, const C* b, int64_t n, C* y) { multiply_loop(a, b, n, y); } \
  TTT_CLONES void add_product(const C* a, const C* b, int64_t n, C* y) {                           \
    add_product_loop(a, b, n, y);                                                                  \
  }                                                                                                \
  TTT_CLONES void project(const C* a, const C* b, C factor, C by, int64_t n, C* y) {               \
    project_loop(a, b, factor, by, n, y);                                                          \
  }
TTT_LOOPS(float)
TTT_LOOPS(double)

template <class C>
struct RmsNorm {
  const RmsNormCall& call;
  const int64_t width, row_bytes;
  const C* const weight;
  C* const rstd;

  explicit RmsNorm(const RmsNormCall& c)
      : call(c),
        width(c.width),
        row_bytes(c.width * c.element_size),
        weight(static_cast<const C*>(c.weight)),
        rstd(static_cast<C*>(c.rstd)) {}

  // The row of a tensor in C: itself, or in `to`.
  const C* read(const void* data, int64_t token, C* to) const {
    char* const raw = const_cast<char*>(static_cast<const char*>(data)) + token * row_bytes;
    return widen(call.dtype, raw, width, to);
  }

  void write(const C* from, int64_t token, void* data) const {
    narrow(call.dtype, from, width, static_cast<char*>(data) + token * row_bytes, Noise(), 0);
  }

  // Round h as the model does that takes x / rms to its own dtype before the weight.
  const C* round(C* h, C* scratch) const {
    if (!call.round_first) return h;
    char* const bits = reinterpret_cast<char*>(scratch);
    narrow(call.dtype, h, width, bits, Noise(), 0);
    return widen(call.dtype, bits, width, h);
  }

  const C* weight_of(int64_t delta) const { return weight + delta * width; }

  void forward() const {
    const int64_t grain = 1 + kChunk / (1 + width);
    parallel_ranges(call.batch * call.tokens, grain, [&](int64_t first, int64_t last) {
      const std::unique_ptr<C[]> rows(new C[size_t(3 * width)]);
      C *const wide = &rows[0], *const h = &rows[width], *const y = &rows[2 * width];
      for (int64_t token = first; token < last; ++token) {
        const C* const x = read(call.x, token, wide);
        rstd[token] = C(1) / std::sqrt(dot(x, x, width) / C(width) + C(call.eps));
        scale(x, rstd[token], width, h);
        multiply(round(h, y), weight_of(token / call.tokens), width, y);
        write(y, token, call.y);
      }
    });
  }

  // dx of the tokens [first, last), of one delta; their share of dweight is added to `share`.
  void backward_rows(int64_t first, int64_t last, C* rows, C* share) const {
    C *const wide = rows, *const h = rows + width, *const g = rows + 2 * width;
    C* const wide_dy = rows + 3 * width;
    const C* const w = weight_of(first / call.tokens);
    for (int64_t token = first; token < last; ++token) {
      const C *const x = read(call.x, token, wide), *const dy = read(call.dy, token, wide_dy);
      scale(x, rstd[token], width, h);
      multiply(dy, w, width, g);
      project(g, h, dot(g, h, width) / C(width), rstd[token], width, g);
      write(g, token, call.y);
      add_product(dy, round(h, g), width, share);
    }
  }

  void backward() const {
    const int64_t blocks = (call.tokens + kTokens - 1) / kTokens;
    const int64_t n = call.batch * blocks * width;
    const std::unique_ptr<C[]> shares(new C[size_t(n)]());
    const int64_t grain = 1 + kChunk / (1 + width * std::min(kTokens, call.tokens));
    parallel_ranges(call.batch * blocks, grain, [&](int64_t first, int64_t last) {
      const std::unique_ptr<C[]> rows(new C[size_t(4 * width)]);
      for (int64_t i = first; i < last; ++i) {
        const int64_t delta = i / blocks, from = i % blocks * kTokens;
        backward_rows(delta * call.tokens + from,
                      delta * call.tokens + std::min(call.tokens, from + kTokens), rows.get(),
                      &shares[size_t(i * width)]);
      }
    });
    C* const dweight = static_cast<C*>(call.dweight);
    std::fill_n(dweight, call.batch * width, C(0));
    for (int64_t i = 0; i < call.batch * blocks; ++i) {
      C* const to = dweight + i / blocks * width;
      for (int64_t k = 0; k < width; ++k) to[k] += shares[size_t(i * width + k)];
    }
  }

  void run() const {
    if (call.backward) {
      backward();
    } else {
      forward();
    }
  }
};

}  // namespace

void rms_norm_cpu(const RmsNormCall& call) {
  if (call.dtype == Dtype::F64) {
    RmsNorm<double>(call).run();
  } else {
    RmsNorm<float>(call).run();
  }
}

}  // namespace ttt_fast
