// y_i = x W_i' of several W, and their gradient at x, dx = sum of dy_i W_i.
// Fused: the products of all W, which share what is prepared of x and one loop over threads; the
// sum, which is made in float32 (float64 for float64) and rounded once. Computed, not measured:
// bytes are those of each W once; an element of W takes part in as many products as x has rows, so
// that memory bounds few rows, arithmetic many. Reference: linears in ttt_fast/layer_reference.py.
#include <algorithm>

#include "float_tiles.h"
#include "operand.h"

namespace ttt_fast {
namespace {

template <class S>
bool all_take_tiles(const LinearsCall& call) {
  return std::all_of(call.layers.begin(), call.layers.end(), [&](const LinearsCall::Layer& layer) {
    return takes_tiles<S>(call.in, layer.out);
  });
}

template <class C, class S>
void forward(const LinearsCall& call) {
  const Operand<C, S> x(call.x, call.rows, call.in, call.dtype, Weight::kByRows,
                        all_take_tiles<S>(call), false);
  int64_t parts = 0;
  for (const auto& layer : call.layers) parts += blocks_of(layer.out, kColumns);
  parallel_ranges(parts, 1, [&](int64_t first, int64_t last) {
    // A block of its own while it is small: rows of y lie pages apart.
    const std::unique_ptr<C[]> scratch(new C[size_t(call.rows * kColumns)]);
    for (const auto& layer : call.layers) {
      const int64_t count = blocks_of(layer.out, kColumns);
      const int64_t end = std::min(layer.out, last * kColumns);
      for (int64_t c = std::max<int64_t>(first, 0) * kColumns; c < end; c += kColumns) {
        const int64_t n = std::min(kColumns, end - c);
        const S* const rows = static_cast<const S*>(layer.weight) + c * layer.stride;
        const Matrix<C> block = {scratch.get(), n};
        x.times_rows({rows, layer.stride}, n, end - c - n, block);
        store_columns(call.dtype, block, call.rows, n, static_cast<S*>(layer.y) + c, layer.out);
      }
      first -= count, last -= count;
    }
  });
}

template <class C, class S>
void backward(const LinearsCall& call) {
  const bool tiles = all_take_tiles<S>(call);
  std::vector<Operand<C, S>> dys;
  dys.reserve(call.layers.size());
  for (const auto& layer : call.layers) {
    dys.emplace_back(layer.y, call.rows, layer.out, call.dtype, Weight::kByColumns, tiles, false);
  }
  const int64_t unit = tiles ? kColumns : kWideColumns;
  parallel_ranges(blocks_of(call.in, unit), 1, [&](int64_t first, int64_t last) {
    // The whole range at a time: the rows of W are then read as they lie.
    const int64_t c = first * unit, n = std::min(call.in, last * unit) - c;
    S* const dx = static_cast<S*>(call.dx) + c;
    const bool own = !std::is_same_v<C, S>;
    const std::unique_ptr<C[]> scratch(own ? new C[size_t(call.rows * n)] : nullptr);
    const Matrix<C> block =
        own ? Matrix<C>{scratch.get(), n} : Matrix<C>{static_cast<C*>(call.dx) + c, call.in};
    for (size_t i = 0; i < dys.size(); ++i) {
      const auto& layer = call.layers[i];
      dys[i].times_columns({static_cast<const S*>(layer.weight) + c, layer.stride}, n, block,
                           i > 0);
    }
    store_columns(call.dtype, block, call.rows, n, dx, call.in);
  });
}

template <class C, class S>
void run(const LinearsCall& call) {
  call.backward ? backward<C, S>(call) : forward<C, S>(call);
}

}  // namespace

void linears_cpu(const LinearsCall& call) {
  if (float_tiles_take(call)) return float_tiles_linears(call);
  switch (call.dtype) {
    case Dtype::F64:
      return run<double, double>(call);
    case Dtype::BF16:
      return run<float, uint16_t>(call);
    default:
      return run<float, float>(call);
  }
}

}  // namespace ttt_fast
