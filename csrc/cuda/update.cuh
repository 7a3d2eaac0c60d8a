// The part that sgd_ and adamw_ share: one pass over all tensors of a call that reads a pack of
// each, asks `Direction` for the step, and writes weights, moments and deltas.
#pragma once

#include "../gradient_factor.h"
#include "undo.cuh"

namespace ttt_fast {
namespace cuda {

// N elements in the compute type, from storage or, if `wide`, as they are.
template <class Storage, int N>
__device__ __forceinline__ void read(int64_t list, bool wide, int i,
                                     Compute<Storage> (&values)[N]) {
  if (sizeof(Storage) != sizeof(Compute<Storage>) && wide) {
    load(at_address<const Compute<Storage>>(list) + i, values);
    return;
  }
  Storage stored[N];
  load(at_address<const Storage>(list) + i, stored);
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = widen(stored[k]);
}

template <class Storage, int N>
__device__ __forceinline__ void write(int64_t list, bool wide, int i,
                                      const Compute<Storage> (&values)[N]) {
  if (sizeof(Storage) != sizeof(Compute<Storage>) && wide) {
    store(at_address<Compute<Storage>>(list) + i, values);
    return;
  }
  Storage stored[N];
#pragma unroll
  for (int k = 0; k < N; ++k) narrow(values[k], stored[k]);
  store(at_address<Storage>(list) + i, stored);
}

__device__ __forceinline__ Scalar scalar_of(const DeviceScalar& scalar) {
  return scalar.data == nullptr ? Scalar() : load_scalar(scalar.data, scalar.dtype);
}

// One chunk of the table. kGeneral: with deltas, an undo log, or lists wider than the parameter;
// without them the kernel needs fewer registers.
template <class Direction, class Storage, bool kGeneral>
class ChunkUpdate {
  using C = Compute<Storage>;
  using Args = typename Direction::template Args<C>;

 public:
  __device__ ChunkUpdate(const UpdateCall& call, const Args& args, int chunk)
      : call_(call), args_(args), chunk_(chunk) {
    for (int list = 0; list < kLists; ++list) {
      lists_[list] = call.table.pointers[int64_t(list) * call.table.n_chunks + chunk];
    }
    index_ = uint64_t(call.table.index[chunk]);
    if (call.stochastic) key_ = random_key(call.seed, uint64_t(call.table.tensor[chunk]));
    const double factor =
        gradient_factor(scalar_of(call.grad_norm), call.max_grad_norm, scalar_of(call.grad_scale));
    args_.gradient_factor = C(call.maximize ? -factor : factor);
  }

  __device__ void run() {
    if constexpr (kGeneral && sizeof(Storage) == 2) {
      if (call_.undo.offsets != nullptr) {
        UndoRecorder undo(call_.undo, call_.table, chunk_);
        // The state is 16-bit: only then is there something to record.
        if (undo.active()) steps(&undo);
        if (threadIdx.x == 0) call_.undo.states[chunk_] = undo.state();
        if (undo.active()) return finish();
      }
    }
    steps(nullptr);
    finish();
  }

 private:
  __device__ __forceinline__ void steps(UndoRecorder* undo) {
    constexpr int kPack = 16 / int(sizeof(Storage));
    const int numel = call_.table.numel[chunk_];
    const int in_packs = call_.table.aligned ? numel / kPack * kPack : 0;
    // With a log, threads whose elements are out of range take part in its barriers.
    for (int from = 0; from < in_packs; from += kThreads * kPack) {
      const int i = from + int(threadIdx.x) * kPack;
      if (undo != nullptr || i < in_packs) step<kPack>(i, i < in_packs, from, undo);
    }
    for (int from = in_packs; from < numel; from += kThreads) {
      const int i = from + int(threadIdx.x);
      if (undo != nullptr || i < numel) step<1>(i, i < numel, from, undo);
    }
  }

  template <int N>
  __device__ __forceinline__ void step(int i, bool some, int from, UndoRecorder* undo) {
    Storage before[N] = {}, after[N] = {};
    if (some) compute(i, undo != nullptr, before, after);
    if constexpr (kGeneral && sizeof(Storage) == 2) {
      if (undo != nullptr) {
        uint16_t old_bits[N], new_bits[N];
        memcpy(old_bits, before, sizeof before);
        memcpy(new_bits, after, sizeof after);
        undo->record(some, i, old_bits, new_bits, from,
                     at_address<const uint16_t>(lists_[kParams]));
      }
    }
    if (some) store(at_address<Storage>(lists_[kParams]) + i, after);
  }

  // Everything but the write of the parameter itself.
  template <int N>
  __device__ __forceinline__ void compute(int i, bool logged, Storage (&before)[N],
                                          Storage (&after)[N]) {
    const bool accumulate = kGeneral && lists_[kDeltas] != 0;
    const bool measure = call_.landed != nullptr;
    C g[N], base[N], delta[N], states[2][N] = {};
    read<Storage>(lists_[kGrads], wide(kGrads), i, g);
    if (!accumulate || measure || logged) {
      load(at_address<const Storage>(lists_[kParams]) + i, before);
    }
#pragma unroll
    for (int s = 0; s < Direction::kStates; ++s) {
      if (lists_[kStates + s] == 0 || call_.skip_state_read) continue;
      read<Storage>(lists_[kStates + s], wide(kStates + s), i, states[s]);
    }
    if (accumulate) {
      read<Storage>(lists_[kBases], false, i, base);
      load(at_address<const C>(lists_[kDeltas]) + i, delta);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const C weight = accumulate ? base[k] + delta[k] : widen(before[k]);
      const C step = Direction::step(args_, g[k], weight, states[0][k], states[1][k]);
      C target = weight + step;
      if (accumulate) {
        delta[k] = delta[k] + step;
        target = base[k] + delta[k];
      }
      round(target, index_ + uint64_t(i + k), after[k]);
      if (measure) {
        dot_ += (double(widen(after[k])) - double(widen(before[k]))) * double(step);
        square_ += double(step) * double(step);
      }
    }
#pragma unroll
    for (int s = 0; s < Direction::kStates; ++s) {
      if (lists_[kStates + s] == 0) continue;
      write<Storage>(lists_[kStates + s], wide(kStates + s), i, states[s]);
    }
    if (accumulate) store(at_address<C>(lists_[kDeltas]) + i, delta);
  }

  __device__ __forceinline__ void round(C target, uint64_t index, Storage& to) const {
    if (!call_.stochastic) return narrow(target, to);
    narrow_stochastic(target,
                      random_bits(uint32_t(index), uint32_t(key_), random_high(key_, index)), to);
  }

  __device__ __forceinline__ bool wide(int list) const {
    return kGeneral && call_.dtypes[list] != call_.dtypes[kParams];
  }

  __device__ __forceinline__ void finish() {
    if (call_.landed == nullptr) return;
    const double dot = block_sum(dot_), square = block_sum(square_);
    if (threadIdx.x == 0) {
      call_.partial[2 * chunk_] = dot;
      call_.partial[2 * chunk_ + 1] = square;
    }
  }

  const UpdateCall& call_;
  Args args_;
  int chunk_;
  int64_t lists_[kLists];  // addresses, 0 for an empty list
  uint64_t index_, key_ = 0;
  double dot_ = 0, square_ = 0;
};

// Blocks that a multiprocessor has room for: with four of them (64 registers), AdamW would spill.
constexpr int kResidentBlocks = 3;

template <class Direction, class Storage, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    update_kernel(const UpdateCall call,
                  const typename Direction::template Args<Compute<Storage>> args) {
  const int chunk = int(blockIdx.x);
  if (scalar_of(call.found_inf).value != 0) {
    // What a later launch reads of this chunk says that nothing happened.
    if (threadIdx.x == 0) {
      if (call.landed != nullptr) call.partial[2 * chunk] = call.partial[2 * chunk + 1] = 0;
      if (call.undo.offsets != nullptr) call.undo.states[chunk] = kNotLogged;
    }
    return;
  }
  ChunkUpdate<Direction, Storage, kGeneral>(call, args, chunk).run();
}

// What follows an update (update.cu): complete the pages of the undo log, add to `landed`.
int finish_update(const UpdateCall& call, void* stream);

template <class Direction>
int launch_update(const UpdateCall& call, const typename Direction::template Args<float>& f32,
                  const typename Direction::template Args<double>& f64, void* stream) {
  bool general = call.dtypes[kDeltas] != Dtype::OTHER || call.undo.offsets != nullptr;
  for (const Dtype dtype : call.dtypes) {
    general = general || (dtype != Dtype::OTHER && dtype != call.dtypes[kParams]);
  }
  const int code = for_dtype(call.dtypes[kParams], [&](auto storage) {
    using Storage = decltype(storage);
    const auto run = [&](auto kernel) {
      if constexpr (sizeof(Storage) == 8) {
        return launch(kernel, call.table.n_chunks, 1, stream, call, f64);
      } else {
        return launch(kernel, call.table.n_chunks, 1, stream, call, f32);
      }
    };
    return general ? run(update_kernel<Direction, Storage, true>)
                   : run(update_kernel<Direction, Storage, false>);
  });
  return code != 0 ? code : finish_update(call, stream);
}

}  // namespace cuda
}  // namespace ttt_fast
