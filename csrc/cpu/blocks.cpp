// Conversion of blocks between storage and compute type. Bound: L1 cache, 6 bytes per element.
// Reference: Tensor.to and round_stochastic in ttt_fast/rounding.py.
#include "blocks.h"

namespace ttt_fast {
namespace {

TTT_CLONES void widen_bf16(const uint16_t* __restrict raw, float* __restrict wide, int64_t n) {
  for (int64_t i = 0; i < n; ++i) wide[i] = bf16_to_float(raw[i]);
}

TTT_CLONES void widen_f16(const uint16_t* __restrict raw, float* __restrict wide, int64_t n) {
  for (int64_t i = 0; i < n; ++i) wide[i] = f16_to_float(raw[i]);
}

TTT_CLONES void narrow_bf16(const float* __restrict wide, uint16_t* __restrict raw, int64_t n) {
  for (int64_t i = 0; i < n; ++i) raw[i] = float_to_bf16(wide[i]);
}

TTT_CLONES void narrow_f16(const float* __restrict wide, uint16_t* __restrict raw, int64_t n) {
  for (int64_t i = 0; i < n; ++i) raw[i] = float_to_f16(wide[i]);
}

TTT_CLONES void narrow_bf16_stochastic(const float* __restrict wide, uint16_t* __restrict raw,
                                       int64_t n, uint32_t at, uint32_t key, uint32_t high) {
  for (int64_t i = 0; i < n; ++i) {
    raw[i] = float_to_bf16_stochastic(wide[i], random_bits(at + uint32_t(i), key, high));
  }
}

TTT_CLONES void narrow_f16_stochastic(const float* __restrict wide, uint16_t* __restrict raw,
                                      int64_t n, uint32_t at, uint32_t key, uint32_t high) {
  for (int64_t i = 0; i < n; ++i) {
    raw[i] = float_to_f16_stochastic(wide[i], random_bits(at + uint32_t(i), key, high));
  }
}

}  // namespace

float* widen(Dtype dtype, char* raw, int64_t n, float* wide) {
  const uint16_t* half = reinterpret_cast<const uint16_t*>(raw);
  if (dtype == Dtype::F32) return reinterpret_cast<float*>(raw);
  if (dtype == Dtype::BF16) {
    widen_bf16(half, wide, n);
  } else {
    widen_f16(half, wide, n);
  }
  return wide;
}

void narrow(Dtype dtype, const float* wide, int64_t n, char* raw, const Noise& noise, int64_t at) {
  uint16_t* half = reinterpret_cast<uint16_t*>(raw);
  if (dtype == Dtype::F32) {
    if (static_cast<const void*>(wide) != raw) memcpy(raw, wide, size_t(n) * sizeof(float));
  } else if (noise.stochastic) {
    // Blocks begin at multiples of 1024, so that the upper half of the index is the same in all.
    const auto round = dtype == Dtype::BF16 ? narrow_bf16_stochastic : narrow_f16_stochastic;
    round(wide, half, n, uint32_t(at), uint32_t(noise.key), random_high(noise.key, at));
  } else if (dtype == Dtype::BF16) {
    narrow_bf16(wide, half, n);
  } else {
    narrow_f16(wide, half, n);
  }
}

}  // namespace ttt_fast
