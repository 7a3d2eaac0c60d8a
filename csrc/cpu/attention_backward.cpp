// Gradients of attention, y = softmax(scale q k' + mask) v, at q, k and v.
// Fused: the probabilities, computed again from q and k so that nothing else is kept, and all that
// follows from them while they are in the cache. A block of queries meets its keys at once: rows of
// probabilities are whole, and need no correction. Arithmetic is in float32 (float64 for float64),
// each result is rounded once. Bytes: q, k, v, dy and the gradients once, and copies of keys,
// values and their gradients in the compute type. Bound: arithmetic, 10 width operations for each
// query and key. Reference: attention_backward in ttt_fast/layer_reference.py.
#include <limits>
#include <memory>

#include "product.h"
#include "softmax.h"

namespace ttt_fast {
namespace {

constexpr int64_t kQueries = 48;    // rows of scores in the cache
constexpr int64_t kWhole = 16;      // columns are filled up to a multiple of this
constexpr int64_t kWork = 1 << 18;  // products that are worth a thread

// Rows to columns, filled up with zeros.
template <class C>
TTT_HOST_DEVICE void transpose_loop(const C* x, int64_t stride, int64_t rows, int64_t columns, C* y,
                                    int64_t y_stride) {
  for (int64_t r = 0; r < y_stride; r += kWhole) {
    const int64_t n = std::min(kWhole, rows - r);
    for (int64_t c = 0; c < columns; ++c) {
      C* const to = y + c * y_stride + r;
      for (int64_t i = 0; i < n; ++i) to[i] = x[(r + i) * stride + c];
      for (int64_t i = std::max<int64_t>(n, 0); i < kWhole; ++i) to[i] = 0;
    }
  }
}

template <class C>
TTT_HOST_DEVICE void multiply_loop(C factor, int64_t n, C* y) {
  for (int64_t i = 0; i < n; ++i) y[i] *= factor;
}

template <class C>
TTT_HOST_DEVICE void accumulate_loop(const C* __restrict x, int64_t n, C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

template <class C>
TTT_HOST_DEVICE void choose_loop(const uint8_t* __restrict chosen, int64_t n, C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = chosen[i] ? y[i] : -std::numeric_limits<C>::infinity();
}

template <class C>
TTT_HOST_DEVICE void products_loop(const C* __restrict a, const C* __restrict b, int64_t n,
                                   C* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = a[i] * b[i];
}

// The gradient of a softmax's input from that of its output, of which `mean` is the mean under p.
template <class C>
TTT_HOST_DEVICE void gradient_loop(const C* __restrict p, C mean, C factor, int64_t n,
                                   C* __restrict dp) {
  for (int64_t i = 0; i < n; ++i) dp[i] = factor * (p[i] * (dp[i] - mean));
}

// target_clones does not take templates, hence one function for each type.
#define TTT_ATTENTION_LOOPS(C)                                                                     \
  TTT_CLONES void transpose(const C* x, int64_t stride, int64_t rows, int64_t columns, C* y,       \
                            int64_t y_stride) {                                                    \
    transpose_loop(x, stride, rows, columns, y, y_stride);                                         \
  }                                                                                                \
  TTT_CLONES void multiply_by(C factor, int64_t n, C* y) { multiply_loop(factor, n, y); }          \
  TTT_CLONES void accumulate(const C* x, int64_t n, C* y) { accumulate_loop(x, n, y); }            \
  TTT_CLONES void choose(const uint8_t* chosen, int64_t n, C* y) { choose_loop(chosen, n, y); }    \
  TTT_CLONES void products(const C* a, const C* b, int64_t n, C* y) { products_loop(a, b, n, y); } \
  TTT_CLONES void gradient(const C* p, C mean, C factor, int64_t n, C* dp) {                       \
    gradient_loop(p, mean, factor, n, dp);                                                         \
  }
TTT_ATTENTION_LOOPS(float)
TTT_ATTENTION_LOOPS(double)

template <class C>
struct AttentionBackward {
  const AttentionBackwardCall& call;
  const int64_t group = call.heads / std::max<int64_t>(call.kv_heads, 1);
  const int64_t padded = (call.keys + kWhole - 1) / kWhole * kWhole;
  // Gradients of keys and values by query head; those that share a head are added in their order.
  std::unique_ptr<C[]> dkeys, dvalues;

  explicit AttentionBackward(const AttentionBackwardCall& c)
      : call(c),
        dkeys(new C[size_t(gradient_size() * c.batch * c.heads)]),
        dvalues(new C[size_t(gradient_size() * c.batch * c.heads)]) {}

  int64_t gradient_size() const { return call.keys * call.width; }

  // What one thread needs.
  struct Scratch {
    std::unique_ptr<C[]> keys, values, columns_of_keys, columns_of_values;
    std::unique_ptr<C[]> queries, dy, scores, dscores, block, row;

    explicit Scratch(const AttentionBackward& a)
        : keys(new C[size_t(a.gradient_size())]),
          values(new C[size_t(a.gradient_size())]),
          columns_of_keys(new C[size_t(a.padded * a.call.width)]),
          columns_of_values(new C[size_t(a.padded * a.call.width)]),
          queries(new C[size_t(kQueries * a.call.width)]),
          dy(new C[size_t(kQueries * a.call.width)]),
          scores(new C[size_t(kQueries * a.padded)]),
          dscores(new C[size_t(kQueries * a.padded)]),
          block(new C[size_t(kQueries * a.call.width)]),
          row(new C[size_t(a.padded)]) {}
  };

  char* row_of(const Heads& x, int64_t b, int64_t h, int64_t t) const {
    return static_cast<char*>(x.data) +
           (b * x.batch + h * x.head + t * x.token) * call.element_size;
  }

  // n rows of one head in C: where they lie, or in `to`.
  Matrix<const C> read(const Heads& x, int64_t b, int64_t h, int64_t t, int64_t n, C* to) const {
    C* first = to;
    for (int64_t i = 0; i < n; ++i) {
      C* const row = widen(call.dtype, row_of(x, b, h, t + i), call.width, to + i * call.width);
      if (i == 0) first = row;
    }
    return {first, first == to ? call.width : x.token};
  }

  void write(const C* from, int64_t n, const Heads& x, int64_t b, int64_t h, int64_t t) const {
    for (int64_t i = 0; i < n; ++i) {
      narrow(call.dtype, from + i * call.width, call.width, row_of(x, b, h, t + i), Noise(), 0);
    }
  }

  // The keys that queries up to `end` attend to.
  int64_t seen(int64_t end) const { return call.causal ? std::min(end, call.keys) : call.keys; }

  // In place of a row of q k', the probabilities of its n keys; 0 where it attends to none.
  void softmax(int64_t b, int64_t h, int64_t i, int64_t n, C* z, C* e) const {
    multiply_by(C(call.scale), n, z);
    if (call.mask.data != nullptr) {
      const int64_t at = b * call.mask.batch + h * call.mask.head + i * call.mask.token;
      if (call.chosen) {
        choose(static_cast<const uint8_t*>(call.mask.data) + at, n, z);
      } else {
        char* const raw = static_cast<char*>(call.mask.data) + at * call.element_size;
        accumulate(widen(call.dtype, raw, n, e), n, z);
      }
    }
    const C largest = maximum(z, n);
    if (largest == -std::numeric_limits<C>::infinity()) {
      // Not NaN: whoever had one has it still.
      for (int64_t j = 0; j < n; ++j) z[j] = z[j] == largest ? C(0) : z[j];
      return;
    }
    exponentials(z, largest, n, e);
    const C total = sum(e, n);
    scale(e, C(0x1p-100) * total, C(1) / total, n, z);
  }

  // Probabilities of queries [first, end) of a head; zeros behind those that a query attends to.
  void probabilities(int64_t b, int64_t h, int64_t first, int64_t end, Matrix<const C> queries,
                     Scratch& s) const {
    const int64_t columns = (seen(end) + kWhole - 1) / kWhole * kWhole;
    multiply({queries.data, queries.stride, 1}, end - first, call.width,
             {s.columns_of_keys.get(), padded}, columns, {s.scores.get(), padded}, false);
    for (int64_t i = first; i < end; ++i) {
      C* const row = &s.scores[(i - first) * padded];
      const int64_t n = seen(i + 1);
      softmax(b, h, i, n, row, s.row.get());
      std::fill(row + n, row + columns, C(0));
    }
  }

  // Keys and values of the head, which query heads of a group share.
  struct KeysValues {
    Matrix<const C> keys, values;
  };

  KeysValues load(int64_t b, int64_t h, Scratch& s) const {
    const KeysValues found = {read(call.k, b, h / group, 0, call.keys, s.keys.get()),
                              read(call.v, b, h / group, 0, call.keys, s.values.get())};
    transpose(found.keys.data, found.keys.stride, call.keys, call.width, s.columns_of_keys.get(),
              padded);
    transpose(found.values.data, found.values.stride, call.keys, call.width,
              s.columns_of_values.get(), padded);
    return found;
  }

  void backward(int64_t b, int64_t h, const KeysValues& of, Scratch& s) const {
    const int64_t at = (b * call.heads + h) * gradient_size();
    const Matrix<C> dk = {&dkeys[at], call.width}, dv = {&dvalues[at], call.width};
    const int64_t all = call.queries == 0 ? 0 : seen(call.queries);
    for (const Matrix<C>& d : {dk, dv}) std::fill(d.at(all, 0), d.at(call.keys, 0), C(0));
    // From the end, where queries see all keys that any sees: the first block need not add.
    for (int64_t end = call.queries; end > 0; end -= std::min(end, kQueries)) {
      const int64_t t = std::max<int64_t>(0, end - kQueries), rows = end - t, n = seen(end);
      const bool add = end < call.queries;
      const int64_t columns = (n + kWhole - 1) / kWhole * kWhole;
      const Matrix<const C> queries = read(call.q, b, h, t, rows, s.queries.get());
      const Matrix<const C> dy = read(call.dy, b, h, t, rows, s.dy.get());
      probabilities(b, h, t, end, queries, s);
      multiply({dy.data, dy.stride, 1}, rows, call.width, {s.columns_of_values.get(), padded},
               columns, {s.dscores.get(), padded}, false);
      multiply({s.scores.get(), 1, padded}, n, rows, dy, call.width, dv, add);
      for (int64_t i = 0; i < rows; ++i) {
        const C* const p = &s.scores[i * padded];
        C* const dp = &s.dscores[i * padded];
        products(p, dp, n, s.row.get());
        gradient(p, sum(s.row.get(), n), C(call.scale), n, dp);
      }
      multiply({s.dscores.get(), padded, 1}, rows, n, of.keys, call.width,
               {s.block.get(), call.width}, false);
      write(s.block.get(), rows, call.dq, b, h, t);
      multiply({s.dscores.get(), 1, padded}, n, rows, queries, call.width, dk, add);
    }
  }

  // The sum over the query heads of a group.
  void join(C* by_head, const Heads& to, int64_t b, int64_t h, int64_t first, int64_t last) const {
    const int64_t size = gradient_size(), n = (last - first) * call.width;
    C* const total = by_head + (b * call.heads + h * group) * size + first * call.width;
    for (int64_t g = 1; g < group; ++g) accumulate(total + g * size, n, total);
    write(total, last - first, to, b, h, first);
  }

  void run() {
    const int64_t work = call.queries * call.keys * call.width;
    parallel_ranges(call.batch * call.heads, 1 + kWork / (1 + work), [&](int64_t from, int64_t to) {
      Scratch scratch(*this);
      KeysValues of = {};
      for (int64_t i = from; i < to; ++i) {
        const int64_t b = i / call.heads, h = i % call.heads;
        if (i == from || h % group == 0) of = load(b, h, scratch);
        backward(b, h, of, scratch);
      }
    });
    const int64_t grain = 1 + kChunk / (1 + call.width * group), keys = call.keys;
    parallel_ranges(call.batch * call.kv_heads * keys, grain, [&](int64_t from, int64_t to) {
      while (from < to) {
        const int64_t i = from / keys, first = from % keys, end = std::min(keys, first + to - from);
        join(dkeys.get(), call.dk, i / call.kv_heads, i % call.kv_heads, first, end);
        join(dvalues.get(), call.dv, i / call.kv_heads, i % call.kv_heads, first, end);
        from += end - first;
      }
    });
  }
};

}  // namespace

void attention_backward_cpu(const AttentionBackwardCall& call) {
  if (call.dtype == Dtype::F64) {
    AttentionBackward<double>(call).run();
  } else {
    AttentionBackward<float>(call).run();
  }
}

}  // namespace ttt_fast
