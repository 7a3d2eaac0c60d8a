// Rotary positions of the heads of a token: y = x o cos + rotate_half(x) o sin, or its transpose.
// Fused: both products, their roundings, the sum; stock torch writes five tensors. Bytes per
// element: 2 numbers of storage; a token's cosines and sines are read once for all its heads.
// Bound: memory bandwidth, or the call itself where tokens are few. Reference: rotary in
// ttt_fast/layer_reference.py.
#include <memory>

#include "blocks.h"

namespace ttt_fast {
namespace {

struct Bfloat16Bits {
  using Raw = uint16_t;
  using Wide = float;
  static TTT_HOST_DEVICE float load(uint16_t bits) { return bf16_to_float(bits); }
  static TTT_HOST_DEVICE uint16_t store(float x) { return float_to_bf16(x); }
};

struct Float16Bits {
  using Raw = uint16_t;
  using Wide = float;
  static TTT_HOST_DEVICE float load(uint16_t bits) { return f16_to_float(bits); }
  static TTT_HOST_DEVICE uint16_t store(float x) { return float_to_f16(x); }
};

template <class C>
struct Itself {
  using Raw = C;
  using Wide = C;
  static TTT_HOST_DEVICE C load(C x) { return x; }
  static TTT_HOST_DEVICE C store(C x) { return x; }
};

// All heads of one token.
template <class C>
struct Token {
  const void* x;
  void* y;
  int64_t heads, x_head, y_head, width, half;
  const C *cos, *sin;  // 2 * half numbers each
};

template <class Storage, bool kRound>
TTT_HOST_DEVICE typename Storage::Wide rounded(typename Storage::Wide product) {
  return kRound ? Storage::load(Storage::store(product)) : product;
}

// The two halves of one head.
template <class Storage, bool kRound, class Raw, class C>
TTT_HOST_DEVICE void halves_loop(const Raw* __restrict x1, const Raw* __restrict x2,
                                 const C* __restrict cos, const C* __restrict sin, int64_t n,
                                 Raw* __restrict y1, Raw* __restrict y2) {
  for (int64_t i = 0; i < n; ++i) {
    const C a = Storage::load(x1[i]), b = Storage::load(x2[i]);
    y1[i] =
        Storage::store(rounded<Storage, kRound>(a * cos[i]) - rounded<Storage, kRound>(b * sin[i]));
    y2[i] = Storage::store(rounded<Storage, kRound>(b * cos[n + i]) +
                           rounded<Storage, kRound>(a * sin[n + i]));
  }
}

template <class Storage, bool kRound>
TTT_HOST_DEVICE void heads_loop(const Token<typename Storage::Wide>& token) {
  using Raw = typename Storage::Raw;
  const int64_t half = token.half, turned = 2 * half, rest = token.width - turned;
  for (int64_t head = 0; head < token.heads; ++head) {
    const Raw* const x = static_cast<const Raw*>(token.x) + head * token.x_head;
    Raw* const y = static_cast<Raw*>(token.y) + head * token.y_head;
    halves_loop<Storage, kRound>(x, x + half, token.cos, token.sin, half, y, y + half);
    memcpy(y + turned, x + turned, size_t(rest) * sizeof(Raw));
  }
}

// target_clones does not take templates, hence one function for each type.
TTT_CLONES void rotate_f64(const Token<double>& token) { heads_loop<Itself<double>, false>(token); }
TTT_CLONES void rotate_f32(const Token<float>& token) { heads_loop<Itself<float>, false>(token); }
TTT_CLONES void rotate_bf16(const Token<float>& token) { heads_loop<Bfloat16Bits, false>(token); }
TTT_CLONES void rotate_f16(const Token<float>& token) { heads_loop<Float16Bits, false>(token); }
TTT_CLONES void rotate_and_round_bf16(const Token<float>& token) {
  heads_loop<Bfloat16Bits, true>(token);
}
TTT_CLONES void rotate_and_round_f16(const Token<float>& token) {
  heads_loop<Float16Bits, true>(token);
}

void rotate(const RotaryCall&, const Token<double>& token) { rotate_f64(token); }

// Products are rounded to the type of the cosines.
void rotate(const RotaryCall& call, const Token<float>& token) {
  const bool round = call.angles == call.dtype;
  if (call.dtype == Dtype::F32) {
    rotate_f32(token);
  } else if (call.dtype == Dtype::BF16) {
    (round ? rotate_and_round_bf16 : rotate_bf16)(token);
  } else {
    (round ? rotate_and_round_f16 : rotate_f16)(token);
  }
}

template <class C>
void rotary_tokens(const RotaryCall& call) {
  const int64_t turned = call.turned, half = turned / 2;
  const int64_t angle_size = call.angles == call.dtype ? call.element_size : int64_t(sizeof(C));
  // Cosines or sines of a token in C: themselves, or in `to`.
  const auto read = [&](const Factor& from, int64_t batch, int64_t token, C* to) -> const C* {
    const int64_t at = batch * from.batch_stride + token * from.stride;
    char* const raw = const_cast<char*>(static_cast<const char*>(from.data)) + at * angle_size;
    return widen(call.angles, raw, turned, to);
  };
  const int64_t grain = 1 + kChunk / (1 + call.heads * call.width);
  parallel_ranges(call.batch * call.tokens, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<C[]> rows(new C[size_t(3 * turned)]);
    C *const cosines = &rows[0], *const sines = &rows[turned], *const swapped = &rows[2 * turned];
    Token<C> token = {};
    token.heads = call.heads, token.x_head = call.x_head, token.y_head = call.y_head;
    token.width = call.width, token.half = half;
    for (int64_t i = first; i < last; ++i) {
      const int64_t batch = i / call.tokens, t = i % call.tokens;
      token.x = static_cast<const char*>(call.x) +
                (batch * call.x_batch + t * call.x_token) * call.element_size;
      token.y = static_cast<char*>(call.y) +
                (batch * call.y_batch + t * call.y_token) * call.element_size;
      token.cos = read(call.cos, batch, t, cosines);
      token.sin = read(call.sin, batch, t, sines);
      if (call.transposed) {
        for (int64_t k = 0; k < half; ++k) {
          swapped[k] = -token.sin[half + k], swapped[half + k] = -token.sin[k];
        }
        token.sin = swapped;
      }
      rotate(call, token);
    }
  });
}

}  // namespace

void rotary_cpu(const RotaryCall& call) {
  if (call.dtype == Dtype::F64) {
    rotary_tokens<double>(call);
  } else {
    rotary_tokens<float>(call);
  }
}

}  // namespace ttt_fast
