// y = rho x W' - ((x a') o beta) d, W and a stored by rows, for a batch that shares W.
// Fused: both products, scaling, accumulation, a copy of x. Arithmetic is in float32 (float64 for
// float64), bfloat16 is rounded once: a small delta is not lost. Computed, not measured: bytes are
// those of W, a and d once, of y and the copy once or twice; an element of W takes part in as many
// products as x has rows, so that memory bounds few rows, arithmetic many.
// Reference: delta_linear in ttt_fast/factor_reference.py.
#include <cstring>

#include "float_tiles.h"
#include "operand.h"

namespace ttt_fast {
namespace {

constexpr int64_t kBlocks = 4;      // rows of a that are worth a thread together
constexpr int64_t kWork = 1 << 19;  // products of x and a that are worth a thread

// y = x W' as a call of linears: with W' stored by rows it is a gradient at an input.
LinearsCall base_of(const DeltaLinearCall& call) {
  const bool turned = call.weight_by_columns;
  void* const x = const_cast<void*>(call.x);
  LinearsCall base = {};
  base.rows = call.batch * call.tokens;
  base.in = turned ? call.out : call.in;
  base.dtype = call.dtype;
  base.backward = turned;
  base.x = x;
  base.dx = call.y;
  base.layers = {
      {call.weight, turned ? call.in : call.out, call.weight_stride, turned ? x : call.y}};
  return base;
}

// One call with its matrices in their types: arithmetic in C, storage in S.
template <class C, class S>
struct DeltaLinear {
  const DeltaLinearCall& call;
  bool base_made;  // whether y is x W' already
  bool tiles;
  Operand<C, S> x;
  std::unique_ptr<C[]> scores;  // (x a') o -beta, (batch, tokens, rank)

  DeltaLinear(const DeltaLinearCall& c, bool base_made)
      : call(c),
        base_made(base_made),
        tiles(c.weight != nullptr && takes_tiles<S>(c.in, c.out)),
        x(c.x, c.batch * c.tokens, c.in, c.dtype,
          c.weight_by_columns ? Weight::kByColumns : Weight::kByRows, tiles, c.rank > 0),
        scores(new C[size_t(c.batch * c.tokens * c.rank)]) {}

  static Matrix<const S> rows(const Factor& factor, int64_t b, int64_t row, int64_t column) {
    return {
        static_cast<const S*>(factor.data) + b * factor.batch_stride + row * factor.stride + column,
        factor.stride};
  }

  Matrix<C> scores_of(int64_t b, int64_t from) const {
    return {scores.get() + b * call.tokens * call.rank + from, call.rank};
  }

  void score(int64_t b, int64_t from, int64_t to) const {
    const Matrix<C> h = scores_of(b, from);
    multiply_by_rows(x.in_c(b * call.tokens), call.tokens, call.in, rows(call.a, b, from, 0),
                     to - from, 0, h);
    const C* const beta = static_cast<const C*>(call.beta) + b * call.rank + from;
    for (int64_t t = 0; t < call.tokens; ++t) {
      for (int64_t r = 0; r < to - from; ++r) *h.at(t, r) *= -beta[r];
    }
  }

  // block = x W', columns [c, c + n), to be followed by those up to `end`.
  void base(int64_t c, int64_t n, int64_t end, Matrix<C> block) const {
    const int64_t stride = call.weight_stride;
    const S* const weight = static_cast<const S*>(call.weight);
    if (call.weight_by_columns) {
      x.times_columns({weight + c, stride}, n, block, false);
    } else {
      x.times_rows({weight + c * stride, stride}, n, end - c - n, block);
    }
  }

  void scale(int64_t n, Matrix<C> block) const {
    for (int64_t t = 0; t < call.batch * call.tokens; ++t) {
      const C rho = static_cast<const C*>(call.rho)[t / call.tokens];
      for (int64_t k = 0; k < n; ++k) *block.at(t, k) *= rho;
    }
  }

  // Columns [c, c + n) of y for all of the batch, in a block of y itself or of other memory; those
  // up to `end` follow.
  void columns(int64_t c, int64_t n, int64_t end, Matrix<C> block) const {
    const bool has_base = call.weight != nullptr;
    if (has_base && !base_made) base(c, n, end, block);
    if (has_base && call.rho != nullptr) scale(n, block);
    for (int64_t b = 0; b < call.batch && !(has_base && call.rank == 0); ++b) {
      const Matrix<C> h = scores_of(b, 0);
      multiply({h.data, h.stride, 1}, call.tokens, call.rank, rows(call.d, b, 0, c), n,
               {block.at(b * call.tokens, 0), block.stride}, has_base);
    }
    store_columns(call.dtype, block, call.batch * call.tokens, n, static_cast<S*>(call.y) + c,
                  call.out);
  }

  // A share of the rows of x, [first, last), into the memory that they are kept in.
  void append(int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row) {
      const int64_t to =
          row / call.tokens * call.append_batch_stride + row % call.tokens * call.append_stride;
      std::memcpy(static_cast<S*>(call.append) + to, static_cast<const S*>(call.x) + row * call.in,
                  size_t(call.in) * sizeof(S));
    }
  }

  void run() const {
    const int64_t blocks = blocks_of(call.rank, kBlocks);
    const int64_t grain = 1 + kWork / (1 + call.tokens * call.in * kBlocks);
    parallel_ranges(call.batch * blocks, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last;) {
        const int64_t b = i / blocks, stop = std::min(last, (b + 1) * blocks);
        score(b, (i - b * blocks) * kBlocks, std::min(call.rank, (stop - b * blocks) * kBlocks));
        i = stop;
      }
    });
    const int64_t parts = std::max<int64_t>(1, blocks_of(call.out, kWideColumns));
    const int64_t tokens = call.batch * call.tokens;
    parallel_ranges(parts, 1, [&](int64_t first, int64_t last) {
      if (call.append != nullptr) append(tokens * first / parts, tokens * last / parts);
      // By columns, the whole range at a time: the rows of W are then read as they lie.
      const bool whole = call.weight_by_columns || base_made;
      const int64_t step = (whole ? last - first : 1) * kWideColumns;
      // A block of its own while it is small: rows of y lie pages apart.
      const bool own = !(std::is_same_v<C, S> && whole);
      const std::unique_ptr<C[]> scratch(own ? new C[size_t(call.batch * call.tokens * step)]
                                             : nullptr);
      const int64_t end = std::min(call.out, last * kWideColumns);
      for (int64_t c = first * kWideColumns; c < end; c += step) {
        const int64_t n = std::min(step, end - c);
        columns(
            c, n, end,
            own ? Matrix<C>{scratch.get(), n} : Matrix<C>{static_cast<C*>(call.y) + c, call.out});
      }
    });
  }
};

}  // namespace

void delta_linear_cpu(const DeltaLinearCall& call) {
  const LinearsCall base = base_of(call);
  const bool base_first = call.weight != nullptr && float_tiles_take(base);
  if (base_first) float_tiles_linears(base);
  switch (call.dtype) {
    case Dtype::F64:
      DeltaLinear<double, double>(call, false).run();
      break;
    case Dtype::BF16:
      DeltaLinear<float, uint16_t>(call, false).run();
      break;
    default:
      DeltaLinear<float, float>(call, base_first).run();
      break;
  }
}

}  // namespace ttt_fast
