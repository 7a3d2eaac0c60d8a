// Conversions between storage and compute types, and stochastic rounding: element by element, free
// of branches so that a plain loop over them vectorises, and the same bits on every device.
// Specification: round_stochastic and random_bits in ttt_fast/rounding.py.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TTT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Inlining must not be left to chance: inside a clone for a wider instruction set, a function that
// stays a call is compiled for the narrow one.
#define TTT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ttt_fast {

TTT_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TTT_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// A flag that is the same for all elements. Choosing by a mask of ones or zeros, not by a branch
// that the compiler would hoist in and out of the loop, keeps the loop in vector form (GCC 12).
template <class C>
struct Mask;
template <>
struct Mask<float> {
  uint32_t bits;
  explicit Mask(bool flag = false) : bits(flag ? ~0u : 0u) {}
};
template <>
struct Mask<double> {
  uint64_t bits;
  explicit Mask(bool flag = false) : bits(flag ? ~uint64_t(0) : 0u) {}
};

// flag ? yes : no
template <class C>
TTT_HOST_DEVICE C choose(Mask<C> flag, C yes, C no) {
  decltype(flag.bits) a, b;
  memcpy(&a, &yes, sizeof a);
  memcpy(&b, &no, sizeof b);
  a = (a & flag.bits) | (b & ~flag.bits);
  memcpy(&yes, &a, sizeof a);
  return yes;
}

TTT_HOST_DEVICE float bf16_to_float(uint16_t x) { return bits_float(uint32_t(x) << 16); }

// Round to nearest even. NaN must not reach the addition: it could carry into infinity or zero.
TTT_HOST_DEVICE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return uint16_t(nan ? 0x7fc0u : rounded);
}

// The exponent is moved from bias 15 to bias 127. A subnormal has no hidden bit: it is given one
// and loses it again in the subtraction, which is exact, and never a float32 subnormal
// (flush-to-zero would eat that).
TTT_HOST_DEVICE float f16_to_float(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t infinite = normal + 0x38000000u;
  const uint32_t subnormal = float_bits(bits_float(normal + 0x00800000u) - bits_float(0x38800000u));
  uint32_t bits = exponent == 0x0f800000u ? infinite : normal;
  bits = exponent == 0 ? subnormal : bits;
  return bits_float(bits | (uint32_t(x & 0x8000u) << 16));
}

// Round to nearest even. For a subnormal result the float32 addition of 0.5 shifts the mantissa to
// where float16 wants it and rounds it on the way.
TTT_HOST_DEVICE uint16_t float_to_f16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x47800000u ? huge : rounded;
  return uint16_t(rounded | ((bits >> 16) & 0x8000u));
}

TTT_HOST_DEVICE uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

TTT_HOST_DEVICE uint64_t random_key(uint64_t seed, uint64_t tensor_index) {
  return splitmix64(splitmix64(seed) + tensor_index);
}

TTT_HOST_DEVICE uint32_t lowbias32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// `high` is what the upper halves of key and index give (random_high); it changes every 2^32
// elements.
TTT_HOST_DEVICE uint32_t random_bits(uint32_t index_low, uint32_t key_low, uint32_t high) {
  return lowbias32(lowbias32(index_low ^ key_low) ^ high);
}

TTT_HOST_DEVICE uint32_t random_high(uint64_t key, uint64_t index) {
  return uint32_t(key >> 32) + uint32_t(index >> 32) * 0x9E3779B9u;
}

TTT_HOST_DEVICE bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

TTT_HOST_DEVICE uint16_t float_to_bf16_stochastic(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
  return is_finite_bits(bits) ? uint16_t(rounded) : float_to_bf16(x);
}

TTT_HOST_DEVICE uint16_t float_to_f16_stochastic(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t noise = random & 0x1fffu;
  const uint16_t normal = float_to_f16(bits_float((bits + noise) & ~0x1fffu));
  // Below 2^-14 float16 is a grid of 2^-24. The sum is below 1025, so that cutting it to an integer
  // is the floor, and the integer is the result's bits.
  const bool small = magnitude < 0x38800000u;
  const float units =
      small ? bits_float(magnitude) * 16777216.0f + float(int32_t(noise)) * 0x1p-13f : 0.0f;
  const uint16_t subnormal = uint16_t(uint32_t(int32_t(units)) | ((bits >> 16) & 0x8000u));
  const uint16_t rounded = small ? subnormal : normal;
  return is_finite_bits(bits) ? rounded : float_to_f16(x);
}

}  // namespace ttt_fast
