// Products of float32 matrices in the processor's matrix registers (Intel AMX), which multiply
// bfloat16: a float is the sum of three of these, w = h + m + l of 8 bits each, exactly. Of the
// nine products of two such sums the six largest are made, their sums in float32: h h, h m, m h,
// m m, h l and l h. The other three are less than 2^-21 |x| |w| together, on average less than
// 2^-24, a rounding of float32. Parts below 2^-126 count as 0, as do denormal sums; what is not
// finite gives NaN.
#pragma once

#include "../launchers.h"

namespace ttt_fast {

// Whether this is the faster way: many rows of floats, sides of W that are multiples of kTileSide.
bool float_tiles_take(const LinearsCall& call);

void float_tiles_linears(const LinearsCall& call);

}  // namespace ttt_fast
