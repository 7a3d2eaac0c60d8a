// How every CPU kernel walks over its tensors.
//
//   tensor -> chunks of 65536 elements   the unit of work of a thread, of a partial sum, of the
//   undo log chunk  -> blocks of 1024 elements    stay in the L1 cache while several plain loops
//   pass over them
//
// Chunks do not depend on the number of threads and partial sums are added in chunk order, so that
// results do not depend on it either.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../launchers.h"

// One clone for each level of the instruction set, chosen when the library is loaded. Everything
// that a clone calls has to be inlined into it.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define TTT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TTT_CLONES
#endif

namespace ttt_fast {

constexpr int64_t kChunk = 65536;  // UNDO_CHUNK in ttt_fast/reference.py
constexpr int64_t kBlock = 1024;

struct Chunk {
  int64_t tensor, begin, length;
};

inline std::vector<Chunk> make_chunks(const Views& tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      chunks.push_back({int64_t(t), begin, std::min(kChunk, tensors[t].numel - begin)});
    }
  }
  return chunks;
}

// Call f(first, last) on ranges of [0, n). f must not throw: it is called through C.
template <class F>
void parallel_ranges(int64_t n, int64_t grain, const F& f) {
  const auto call = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const F*>(context))(first, last);
  };
  void* context = const_cast<void*>(static_cast<const void*>(&f));
  if (torch_parallel_for(0, n, grain, call, context) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("ttt_fast: torch could not run a parallel loop.");
  }
}

// Blocks of at most so many that n are.
inline int64_t blocks_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

// As many chunks to a thread as make waking it worth while; only this depends on the hardware.
inline int64_t chunk_grain(const std::vector<Chunk>& chunks) {
  int64_t numel = 0;
  for (const Chunk& chunk : chunks) numel += chunk.length;
  const int64_t n_chunks = int64_t(chunks.size());
  return numel < 2 * kChunk ? std::max<int64_t>(n_chunks, 1)
                            : std::max<int64_t>(1, n_chunks * kChunk / (2 * numel));
}

// ------------------------------------------------------------------ memory -> block -> memory

// The elements [at, at + n) where they lie, or nullptr if they are not consecutive.
inline char* in_place(const View& view, int64_t at, int64_t n) {
  return n <= view.rest_of_run(at) ? view.element(at) : nullptr;
}

inline void gather(const View& view, int64_t at, int64_t n, char* to) {
  while (n > 0) {
    const int64_t piece = std::min(n, view.rest_of_run(at));
    memcpy(to, view.element(at), size_t(piece) * view.element_size);
    at += piece, n -= piece, to += piece * view.element_size;
  }
}

inline void scatter(const View& view, int64_t at, int64_t n, const char* from) {
  while (n > 0) {
    const int64_t piece = std::min(n, view.rest_of_run(at));
    memcpy(view.element(at), from, size_t(piece) * view.element_size);
    at += piece, n -= piece, from += piece * view.element_size;
  }
}

// Storage to compute type. Returns `raw` itself where it is of that type already.
float* widen(Dtype dtype, char* raw, int64_t n, float* wide);
inline double* widen(Dtype, char* raw, int64_t, double*) { return reinterpret_cast<double*>(raw); }

// Where random bits come from; key is that of the tensor.
struct Noise {
  bool stochastic = false;
  uint64_t key = 0;
};

// Compute type to storage, rounding to nearest even or stochastically; `at` counts in the tensor.
void narrow(Dtype dtype, const float* wide, int64_t n, char* raw, const Noise& noise, int64_t at);
inline void narrow(Dtype, const double* wide, int64_t n, char* raw, const Noise&, int64_t) {
  if (static_cast<const void*>(wide) != raw) memcpy(raw, wide, size_t(n) * sizeof(double));
}

// A block of one tensor: its bits in storage (in the tensor itself if they lie together, else
// gathered) and its values in the compute type (the same memory if that is the storage type).
template <class C>
struct Block {
  alignas(64) char gathered[kBlock * sizeof(C)];
  alignas(64) C widened[kBlock];
  char* raw;
  C* values;

  C* read(const View& view, int64_t at, int64_t n) {
    raw = in_place(view, at, n);
    if (raw == nullptr) gather(view, at, n, raw = gathered);
    return values = widen(view.dtype, raw, n, widened);
  }

  // Take the place of read() for a tensor whose old values do not matter.
  C* overwrite(const View& view, int64_t at, int64_t n) {
    raw = in_place(view, at, n);
    if (raw == nullptr) raw = gathered;
    const bool same_type = view.dtype == (sizeof(C) == 8 ? Dtype::F64 : Dtype::F32);
    return values = same_type ? reinterpret_cast<C*>(raw) : widened;
  }

  // Put the values, rounded to nearest, into the tensor.
  void write(const View& view, int64_t at, int64_t n) {
    narrow(view.dtype, values, n, raw, Noise(), at);
    if (raw == gathered) scatter(view, at, n, raw);
  }
};

}  // namespace ttt_fast
