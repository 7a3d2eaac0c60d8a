// Copies and checksums of all tensors of a call.
// Fused: nothing but the list; the gain is streaming stores. A plain store first reads the line
// that it overwrites, 3 bytes of traffic for 2 of copy; a streaming store does not. Bytes per
// element: read and write of the element once. Bound: memory bandwidth. Reference: copy_ and
// checksum in ttt_fast/reference.py.
#include "blocks.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ttt_fast {
namespace {

// Below this a copy is likely read again soon, from the cache that a streaming store bypasses.
constexpr int64_t kStreamBytes = 8 << 20;

void copy_bytes(char* dst, const char* src, int64_t n, bool stream) {
#if defined(__SSE2__)
  // SSE2 is enough: four 16-byte stores fill a write-combining buffer of one cache line.
  if (stream && n >= 256) {
    const int64_t head = -reinterpret_cast<intptr_t>(dst) & 63;
    memcpy(dst, src, size_t(head));
    int64_t i = head;
    for (; i + 64 <= n; i += 64) {
      const __m128i* from = reinterpret_cast<const __m128i*>(src + i);
      __m128i* to = reinterpret_cast<__m128i*>(dst + i);
      const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
      const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
      _mm_stream_si128(to, a);
      _mm_stream_si128(to + 1, b);
      _mm_stream_si128(to + 2, c);
      _mm_stream_si128(to + 3, d);
    }
    dst += i, src += i, n -= i;
  }
#endif
  memcpy(dst, src, size_t(n));
}

void copy_chunk(const View& dst, const View& src, const Chunk& chunk, bool stream) {
  int64_t at = chunk.begin, left = chunk.length;
  while (left > 0) {
    const int64_t n = std::min(left, std::min(dst.rest_of_run(at), src.rest_of_run(at)));
    copy_bytes(dst.element(at), src.element(at), n * dst.element_size, stream);
    at += n, left -= n;
  }
}

// mix(x + (i + 1) * phi) of each element, summed modulo 2^64.
template <class Bits>
TTT_HOST_DEVICE uint64_t checksum_loop(const Bits* x, int64_t n, uint64_t at) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t z = uint64_t(int64_t(x[i])) + (at + uint64_t(i) + 1) * 0x9E3779B97F4A7C15u;
    const uint64_t y = z * 0xD6E8FEB86659FD93u;
    sum += (y ^ (y >> 32)) * 0xD6E8FEB86659FD93u;
  }
  return sum;
}

TTT_CLONES uint64_t checksum_block(const int8_t* x, int64_t n, uint64_t at) {
  return checksum_loop(x, n, at);
}
TTT_CLONES uint64_t checksum_block(const int16_t* x, int64_t n, uint64_t at) {
  return checksum_loop(x, n, at);
}
TTT_CLONES uint64_t checksum_block(const int32_t* x, int64_t n, uint64_t at) {
  return checksum_loop(x, n, at);
}
TTT_CLONES uint64_t checksum_block(const int64_t* x, int64_t n, uint64_t at) {
  return checksum_loop(x, n, at);
}

uint64_t checksum_run(const char* x, int32_t element_size, int64_t n, uint64_t at) {
  switch (element_size) {
    case 1:
      return checksum_block(reinterpret_cast<const int8_t*>(x), n, at);
    case 2:
      return checksum_block(reinterpret_cast<const int16_t*>(x), n, at);
    case 4:
      return checksum_block(reinterpret_cast<const int32_t*>(x), n, at);
    default:
      return checksum_block(reinterpret_cast<const int64_t*>(x), n, at);
  }
}

}  // namespace

void copy_cpu(const Views& dsts, const Views& srcs) {
  const std::vector<Chunk> chunks = make_chunks(dsts);
  int64_t bytes = 0;
  for (const View& dst : dsts) bytes += dst.numel * dst.element_size;
  const bool stream = bytes >= kStreamBytes;
  parallel_ranges(int64_t(chunks.size()), chunk_grain(chunks), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      copy_chunk(dsts[chunks[c].tensor], srcs[chunks[c].tensor], chunks[c], stream);
    }
#if defined(__SSE2__)
    _mm_sfence();  // streaming stores are not ordered with what this thread does next
#endif
  });
}

int64_t checksum_cpu(const Views& tensors) {
  const std::vector<Chunk> chunks = make_chunks(tensors);
  std::vector<uint64_t> partial(chunks.size());
  parallel_ranges(int64_t(chunks.size()), chunk_grain(chunks), [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const View& view = tensors[chunks[c].tensor];
      int64_t at = chunks[c].begin, left = chunks[c].length;
      while (left > 0) {
        const int64_t n = std::min(left, view.rest_of_run(at));
        partial[c] += checksum_run(view.element(at), view.element_size, n, uint64_t(at));
        at += n, left -= n;
      }
    }
  });
  uint64_t sum = 0;
  for (size_t c = 0; c < chunks.size(); ++c) {
    sum += partial[c] * (2 * uint64_t(chunks[c].tensor) + 1);
  }
  return int64_t(sum);
}

}  // namespace ttt_fast
