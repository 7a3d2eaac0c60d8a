// Products of matrices in vectors whose width is a template parameter, one function for each
// target.
#pragma once

#include <utility>

#include "blocks.h"

// Vectors wider than the default target has are passed only between functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

// Calls define(target, bytes of a vector register, vector registers). Functions that it defines are
// overloads of one name: the loader of the library takes the best.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define TTT_FOR_TARGETS(define)                                 \
  define(__attribute__((target("default"))), 16, 16)            \
      define(__attribute__((target("arch=x86-64-v3"))), 32, 16) \
          define(__attribute__((target("arch=x86-64-v4"))), 64, 32)
#else
#define TTT_FOR_TARGETS(define) define(, 16, 16)
#endif

namespace ttt_fast {

// Vectors of floats, as their bits, from half as many bytes of bfloat16: the upper halves.
template <int kBytes>
struct Bfloat16;
// Written out for each size: GCC 12 refuses to convert vectors whose size is a template parameter.
#define TTT_BFLOAT16(bytes)                                          \
  template <>                                                        \
  struct Bfloat16<bytes> {                                           \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2))); \
    typedef uint32_t Words __attribute__((vector_size(bytes)));      \
    static TTT_HOST_DEVICE Words load(const uint16_t* from) {        \
      Halves halves;                                                 \
      memcpy(&halves, from, sizeof halves);                          \
      return __builtin_convertvector(halves, Words) << 16;           \
    }                                                                \
  };
TTT_BFLOAT16(16)
TTT_BFLOAT16(32)
TTT_BFLOAT16(64)

// Elements of two vectors, by constants.
#if defined(__clang__)
#define TTT_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TTT_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, (Mask){__VA_ARGS__})
#endif

template <class C, int kBytes>
struct Simd {
  static constexpr int64_t kLanes = kBytes / sizeof(C);
  typedef C Vector __attribute__((vector_size(kBytes)));
  typedef C Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(C)), may_alias));
  static TTT_HOST_DEVICE Vector load(const C* from) { return *(const Unaligned*)from; }
  static TTT_HOST_DEVICE Vector load(const uint16_t* from) {
    return (Vector)Bfloat16<kBytes>::load(from);
  }
  static TTT_HOST_DEVICE void store(C* to, const Vector& value) { *(Unaligned*)to = value; }

  static TTT_HOST_DEVICE C sum(const Vector& v) {
    const auto parts = folded(v);
    C total = parts[0];
    for (int64_t i = 1; i < kQuarter; ++i) total += parts[i];
    return total;
  }

  // Of four vectors, which together take half the instructions.
  static TTT_HOST_DEVICE auto sums(const Vector (&v)[4]) {
    const Vector low = joined<1>(v[0], v[1], Lanes()), high = joined<1>(v[2], v[3], Lanes());
    if constexpr (kQuarter == 4) {
      return folded(joined<2>(low, high, Lanes()));
    } else {
      const auto first = folded(low), second = folded(high);
      return typename Simd<C, 2 * 16>::Vector{first[0], first[1], second[0], second[1]};
    }
  }

 private:
  // Lanes of sixteen bytes, within which shuffles are fastest.
  static constexpr int64_t kQuarter = 16 / sizeof(C);
  using Lanes = std::make_index_sequence<size_t(kLanes)>;

  // Sums of the halves of each sixteen bytes, kRun elements of a, then of b, and so on in turn.
  template <int kRun, size_t... kLane>
  static TTT_HOST_DEVICE Vector joined(const Vector& a, const Vector& b,
                                       std::index_sequence<kLane...>) {
    typedef std::conditional_t<sizeof(C) == 8, int64_t, int32_t> Index;
    typedef Index Mask __attribute__((vector_size(kBytes)));
    return TTT_SHUFFLE(Mask, a, b, from<kRun>(kLane)...) +
           TTT_SHUFFLE(Mask, a, b, (from<kRun>(kLane) + kQuarter / 2)...);
  }

  template <int kRun>
  static constexpr int64_t from(int64_t lane) {
    const int64_t i = lane % kQuarter, of_b = i / kRun % 2;
    return lane - i + of_b * kLanes + i / (2 * kRun) * kRun + i % kRun;
  }

  // Halves are added until sixteen bytes are left.
  static TTT_HOST_DEVICE auto folded(const Vector& v) {
    if constexpr (kBytes == 16) {
      return v;
    } else {
      using Half = Simd<C, kBytes / 2>;
      typename Half::Vector low, high;
      memcpy(&low, &v, sizeof low);
      memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Half::folded(low + high);
    }
  }

  template <class, int>
  friend struct Simd;
};

}  // namespace ttt_fast
