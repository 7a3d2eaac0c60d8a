// Recording what an update overwrites in 16-bit weights. See ttt_fast.undo.UndoLog.
#pragma once

#include <atomic>
#include <vector>

#include "blocks.h"

namespace ttt_fast {

// The entries of the chunk in hand. They wait here, in the L2 cache, until it is known that the
// chunk stays sparse; the log itself is shared and takes whole chunks only.
class UndoRecorder {
 public:
  explicit UndoRecorder(const UndoState& state) : state_(state) {
    if (state_.offsets != nullptr) {
      index_.resize(kChunk / 3 + kBlock);
      value_.resize(kChunk / 3 + kBlock);
    }
  }

  void begin(const View& param, const Chunk& chunk);
  // `before` and `after`: bits of the block at `at`; called before the tensor is written.
  void record(int64_t at, int64_t n, const uint16_t* before, const uint16_t* after);
  void end();
  bool active() const { return active_; }

 private:
  void keep_page();

  UndoState state_;
  std::vector<uint32_t> index_;
  std::vector<uint16_t> value_;
  const View* param_ = nullptr;
  Chunk chunk_ = {};
  int64_t offset_ = 0, count_ = 0, limit_ = 0;
  bool active_ = false;
};

}  // namespace ttt_fast
