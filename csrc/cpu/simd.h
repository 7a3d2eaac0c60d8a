// Products of matrices in vectors whose width is a template parameter, one function for each
// target.
#pragma once

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
  // Halves are added until one element is left.
  static TTT_HOST_DEVICE C sum(const Vector& v) {
    if constexpr (kLanes == 2) {
      return v[0] + v[1];
    } else {
      using Half = Simd<C, kBytes / 2>;
      typename Half::Vector low, high;
      memcpy(&low, &v, sizeof low);
      memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
      return Half::sum(low + high);
    }
  }
};

}  // namespace ttt_fast
