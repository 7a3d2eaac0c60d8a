// The block loops of update.h. Bound: L1 cache; the data come from it and go back to it.
// Reference: _apply_step and _record_landed in ttt_fast/reference.py.
#include "update.h"

namespace ttt_fast {
namespace {

// Eight float64 lanes, whatever the instruction set: the sums are the same on every machine.
typedef double Lanes __attribute__((vector_size(64), aligned(8)));
constexpr int64_t kLanes = 8;

template <class C>
TTT_HOST_DEVICE void landed_loop(const C* before, const C* after, const C* step, int64_t n,
                                 double* landed) {
  Lanes dot = {}, square = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    typedef C Narrow __attribute__((vector_size(kLanes * sizeof(C)), aligned(sizeof(C))));
    Narrow b, a, s;
    memcpy(&b, before + i, sizeof b);
    memcpy(&a, after + i, sizeof a);
    memcpy(&s, step + i, sizeof s);
    const Lanes wide = __builtin_convertvector(s, Lanes);
    dot += (__builtin_convertvector(a, Lanes) - __builtin_convertvector(b, Lanes)) * wide;
    square += wide * wide;
  }
  for (int64_t k = 0; i < n; ++i, ++k) {
    dot[k] += (double(after[i]) - double(before[i])) * double(step[i]);
    square[k] += double(step[i]) * double(step[i]);
  }
  for (int64_t k = 0; k < kLanes; ++k) landed[0] += dot[k], landed[1] += square[k];
}

}  // namespace

// `target` may be `w`; ivdep says that no other overlap happens.
TTT_CLONES void add_step(const float* w, const float* step, int64_t n, float* target) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) target[i] = w[i] + step[i];
}

TTT_CLONES void add_step(const double* w, const double* step, int64_t n, double* target) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) target[i] = w[i] + step[i];
}

TTT_CLONES void add_step_to_delta(const float* __restrict step, int64_t n,
                                  float* __restrict delta) {
  for (int64_t i = 0; i < n; ++i) delta[i] += step[i];
}

TTT_CLONES void add_step_to_delta(const double* __restrict step, int64_t n,
                                  double* __restrict delta) {
  for (int64_t i = 0; i < n; ++i) delta[i] += step[i];
}

TTT_CLONES void add_landed(const float* before, const float* after, const float* step, int64_t n,
                           double* landed) {
  landed_loop(before, after, step, n, landed);
}

TTT_CLONES void add_landed(const double* before, const double* after, const double* step, int64_t n,
                           double* landed) {
  landed_loop(before, after, step, n, landed);
}

}  // namespace ttt_fast
