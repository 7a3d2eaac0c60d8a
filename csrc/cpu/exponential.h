// e^x for loops that the compiler vectorises.
#pragma once

#include <cmath>

#include "blocks.h"

namespace ttt_fast {

// e^x = 2^k e^r with |r| <= ln 2 / 2, for x <= 0; the polynomial is Cephes' (Moshier), good to one
// ulp. Free of branches; NaN stays NaN, and what would come near the denormals is 0.
TTT_HOST_DEVICE float exponential(float x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves k in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float k = shifted - kRound;
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const float power = bits_float((float_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : p * power;
}

TTT_HOST_DEVICE double exponential(double x) { return std::exp(x); }

}  // namespace ttt_fast
