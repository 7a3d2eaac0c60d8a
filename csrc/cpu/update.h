// The part that sgd_ and adamw_ share: one pass over all tensors of a call that reads a block of
// each, asks `direction` for the step, and writes weights, moments and deltas.
#pragma once

#include "undo.h"

namespace ttt_fast {

// w' = w + step, or d += step, w' = base + d.
void add_step(const float* w, const float* step, int64_t n, float* target);
void add_step(const double* w, const double* step, int64_t n, double* target);
void add_step_to_delta(const float* step, int64_t n, float* delta);
void add_step_to_delta(const double* step, int64_t n, double* delta);
// landed += [<after - before, step>, <step, step>], in a fixed order.
void add_landed(const float* before, const float* after, const float* step, int64_t n,
                double* landed);
void add_landed(const double* before, const double* after, const double* step, int64_t n,
                double* landed);

// What update_landed needs of a block, in the L1 cache.
struct StepTrace {
  alignas(64) float before[kBlock], after[kBlock], step[kBlock];

  TTT_HOST_DEVICE void set(int64_t i, float weight, float written, float intended) {
    before[i] = weight;
    after[i] = written;
    step[i] = intended;
  }
};

// Scratch of one thread.
template <class C>
struct UpdateBlocks {
  StepTrace trace;
  Block<C> param, grad, delta, base, state[2], after;
  alignas(64) C step[kBlock] = {}, weight[kBlock] = {}, target[kBlock];
  alignas(64) C no_state[2][kBlock] = {};
};

// A bfloat16 in memory, so that the fused loops can be written once for both storage types.
struct Bf16 {
  uint16_t bits;
};

TTT_HOST_DEVICE float to_compute(float x) { return x; }
TTT_HOST_DEVICE float to_compute(Bf16 x) { return bf16_to_float(x.bits); }

template <class Storage>
TTT_HOST_DEVICE Storage to_storage(float x) {
  if constexpr (sizeof(Storage) == 2) {
    return Storage{float_to_bf16(x)};
  } else {
    return x;
  }
}

// Can the chunk go through Direction::fused? The general way costs bfloat16 twice the time, in
// passes over the L1 cache, and float32 little. What it computes is the same.
inline bool is_fusible(const UpdateCall& call, int64_t t, const UndoRecorder& undo) {
  const View& param = call.params[t];
  if (param.dtype != Dtype::F32 && param.dtype != Dtype::BF16) return false;
  if (!call.deltas.empty() || undo.active() || call.stochastic) return false;
  const auto alike = [&](const View& view) {
    return view.dtype == param.dtype && view.n_outer == 0;
  };
  bool all = alike(param) && alike(call.grads[t]);
  for (const Views& state : call.states) all = all && (state.empty() || alike(state[t]));
  return all;
}

template <class Storage, class Direction>
void update_chunk_fused(const UpdateCall& call, const Chunk& chunk, const Direction& direction,
                        UpdateBlocks<float>& blocks, double* landed) {
  const int64_t t = chunk.tensor;
  for (int64_t at = chunk.begin; at < chunk.begin + chunk.length; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.begin + chunk.length - at);
    const auto data = [&](const View& view) {
      return reinterpret_cast<Storage*>(view.element(at));
    };
    const auto state = [&](int k) {
      return call.states[k].empty() ? reinterpret_cast<Storage*>(blocks.no_state[k])
                                    : data(call.states[k][t]);
    };
    StepTrace* trace = landed == nullptr ? nullptr : &blocks.trace;
    direction.fused(n, data(call.grads[t]), data(call.params[t]), state(0), state(1), trace);
    if (trace != nullptr) add_landed(trace->before, trace->after, trace->step, n, landed);
  }
}

// direction(n, grad, weight, state0, state1, step): reads and writes the states in place.
template <class C, class Direction>
void update_chunk(const UpdateCall& call, const Chunk& chunk, const Direction& direction,
                  UpdateBlocks<C>& blocks, UndoRecorder& undo, double* landed) {
  const int64_t t = chunk.tensor;
  const View& param = call.params[t];
  if constexpr (sizeof(C) == sizeof(float)) {
    if (is_fusible(call, t, undo)) {
      return param.dtype == Dtype::F32
                 ? update_chunk_fused<float>(call, chunk, direction, blocks, landed)
                 : update_chunk_fused<Bf16>(call, chunk, direction, blocks, landed);
    }
  }
  const bool accumulate = !call.deltas.empty();
  const bool needs_before = !accumulate || landed != nullptr || undo.active();
  const Noise noise{call.stochastic, random_key(call.seed, uint64_t(t))};
  for (int64_t at = chunk.begin; at < chunk.begin + chunk.length; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.begin + chunk.length - at);
    C* before = needs_before ? blocks.param.read(param, at, n) : nullptr;
    const C* weight = before;
    if (accumulate) {
      blocks.delta.read(call.deltas[t], at, n);
      blocks.base.read(call.bases[t], at, n);
      if (call.reads_weight) {
        add_step(blocks.base.values, blocks.delta.values, n, blocks.weight);
      }
      weight = blocks.weight;  // zeros, and not used, where there is no decay
    }
    C* states[2] = {blocks.no_state[0], blocks.no_state[1]};
    for (int k = 0; k < 2; ++k) {
      if (call.states[k].empty()) continue;
      states[k] = call.skip_state_read ? blocks.state[k].overwrite(call.states[k][t], at, n)
                                       : blocks.state[k].read(call.states[k][t], at, n);
    }
    direction(n, blocks.grad.read(call.grads[t], at, n), weight, states[0], states[1], blocks.step);
    for (int k = 0; k < 2; ++k) {
      if (!call.states[k].empty()) blocks.state[k].write(call.states[k][t], at, n);
    }

    // In place where nobody asks for the old values any more.
    C* target = accumulate || landed != nullptr ? blocks.target : before;
    if (accumulate) {
      add_step_to_delta(blocks.step, n, blocks.delta.values);
      add_step(blocks.base.values, blocks.delta.values, n, target);
      blocks.delta.write(call.deltas[t], at, n);
    } else {
      add_step(before, blocks.step, n, target);
    }
    char* there = in_place(param, at, n);
    char* rounded = there == nullptr || undo.active() ? blocks.after.gathered : there;
    if (landed != nullptr && rounded == blocks.param.raw &&
        static_cast<void*>(before) == blocks.param.raw) {
      rounded = blocks.after.gathered;  // `before` is the tensor itself: measure, then overwrite
    }
    narrow(param.dtype, target, n, rounded, noise, at);
    if (undo.active()) {
      undo.record(at, n, reinterpret_cast<const uint16_t*>(blocks.param.raw),
                  reinterpret_cast<const uint16_t*>(rounded));
    }
    if (landed != nullptr) {
      C* after = widen(param.dtype, rounded, n, blocks.after.widened);
      add_landed(before, after, blocks.step, n, landed);
    }
    if (rounded != there) scatter(param, at, n, rounded);
  }
}

template <class DirectionF32, class DirectionF64>
void update_cpu(const UpdateCall& call, const DirectionF32& f32, const DirectionF64& f64) {
  const std::vector<Chunk> chunks = make_chunks(call.params);
  std::vector<double> landed(call.landed == nullptr ? 0 : 2 * chunks.size());
  parallel_ranges(int64_t(chunks.size()), chunk_grain(chunks), [&](int64_t first, int64_t last) {
    UpdateBlocks<float> blocks_f32;
    UpdateBlocks<double> blocks_f64;
    UndoRecorder undo(call.undo);
    for (int64_t c = first; c < last; ++c) {
      const View& param = call.params[chunks[c].tensor];
      double* sums = landed.empty() ? nullptr : &landed[2 * c];
      undo.begin(param, chunks[c]);
      if (param.dtype == Dtype::F64) {
        update_chunk(call, chunks[c], f64, blocks_f64, undo, sums);
      } else {
        update_chunk(call, chunks[c], f32, blocks_f32, undo, sums);
      }
      undo.end();
    }
  });
  double sums[2] = {0, 0};
  for (size_t k = 0; k < landed.size(); ++k) sums[k % 2] += landed[k];
  if (call.landed != nullptr) call.landed[0] += sums[0], call.landed[1] += sums[1];
}

}  // namespace ttt_fast
