// Undo log: record (inside an update) and restore.
// Fused: comparison of old and new bits inside the update's own pass over the weights.
// Bytes: 6 per changed element, 2 per element of a chunk that is kept whole; restore reads them
// back. Bound: the comparison is done in L1; restore is bound by scattered 2-byte stores.
// Reference: undo_record_ and undo_restore_ in ttt_fast/reference.py. The order of the entries in
// the log may differ from the reference's, what they restore does not.
#include "undo.h"

namespace ttt_fast {
namespace {

constexpr int64_t kGroup = 64;

// Most groups of a small step change nothing; one vector reduction finds that out.
TTT_CLONES uint32_t any_difference(const uint16_t* __restrict a, const uint16_t* __restrict b) {
  uint16_t any = 0;
  for (int64_t i = 0; i < kGroup; ++i) any |= uint16_t(a[i] ^ b[i]);
  return any;
}

}  // namespace

void UndoRecorder::begin(const View& param, const Chunk& chunk) {
  active_ = false;
  if (state_.offsets == nullptr || state_.offsets[chunk.tensor] < 0) return;
  param_ = &param;
  chunk_ = chunk;
  offset_ = state_.offsets[chunk.tensor] + chunk.begin;
  count_ = 0;
  limit_ = chunk.length / 3 - state_.counts[offset_ / kChunk];
  active_ = state_.paged[offset_ / kChunk] == 0;
}

void UndoRecorder::record(int64_t at, int64_t n, const uint16_t* before, const uint16_t* after) {
  for (int64_t i = 0; i < n;) {
    if (n - i >= kGroup && any_difference(before + i, after + i) == 0) {
      i += kGroup;
      continue;
    }
    // Every element is written to the buffer and only a changed one kept: no branch to mispredict.
    for (const int64_t stop = std::min(n, i + kGroup); i < stop; ++i) {
      index_[count_] = uint32_t(offset_ + (at - chunk_.begin) + i);
      value_[count_] = before[i];
      count_ += before[i] != after[i];
    }
  }
  if (count_ > limit_) keep_page();
}

// Too dense: keep the chunk as it was before this step. Some blocks are written already; the
// entries hold what they were. Nothing of this step has reached the log yet.
void UndoRecorder::keep_page() {
  uint16_t* page = state_.pages + offset_;
  gather(*param_, chunk_.begin, chunk_.length, reinterpret_cast<char*>(page));
  for (int64_t k = 0; k < count_; ++k) page[index_[k] - uint32_t(offset_)] = value_[k];
  state_.paged[offset_ / kChunk] = 1;
  active_ = false;
}

void UndoRecorder::end() {
  if (!active_ || count_ == 0) return;
  // Chunks may enter the log in any order: entries of one element only ever meet in later steps.
  const int64_t to = __atomic_fetch_add(state_.cursor, count_, __ATOMIC_RELAXED);
  memcpy(state_.index + to, index_.data(), size_t(count_) * sizeof(uint32_t));
  memcpy(state_.value + to, value_.data(), size_t(count_) * sizeof(uint16_t));
  state_.counts[offset_ / kChunk] += int32_t(count_);
  active_ = false;
}

void undo_restore_cpu(const Views& params, const UndoState& undo) {
  const std::vector<Chunk> all = make_chunks(params);
  std::vector<Chunk> by_number;  // chunk of the log -> chunk of a parameter
  for (const Chunk& chunk : all) {
    if (undo.offsets[chunk.tensor] < 0) continue;
    const int64_t number = (undo.offsets[chunk.tensor] + chunk.begin) / kChunk;
    if (number >= int64_t(by_number.size())) by_number.resize(number + 1, Chunk{0, 0, 0});
    by_number[number] = chunk;
  }
  const int64_t used = *undo.cursor;
  // A thread owns a range of chunks and reads the whole log, newest entry first, so that the oldest
  // value of an element is the last one written.
  parallel_ranges(int64_t(by_number.size()), 64, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = by_number[c];
      if (!undo.paged[c] || chunk.length == 0) continue;
      scatter(params[chunk.tensor], chunk.begin, chunk.length,
              reinterpret_cast<const char*>(undo.pages + c * kChunk));
    }
    for (int64_t k = used - 1; k >= 0; --k) {
      const int64_t c = undo.index[k] / kChunk, within = undo.index[k] % kChunk;
      if (c < first || c >= last || within >= by_number[c].length) continue;
      const Chunk& chunk = by_number[c];
      memcpy(params[chunk.tensor].element(chunk.begin + within), &undo.value[k], sizeof(uint16_t));
    }
  });
}

}  // namespace ttt_fast
