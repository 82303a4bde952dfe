// Attention as native callers see it: calls that are divided into tasks, which any threads may run. No torch here.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "host/attention_plan.h"
#include "host/buffer.h"

namespace ipex_quant {

// The division of a call does not depend on the number of threads, so neither does its result.
class AttentionCall {
 public:
  AttentionCall(const AttentionArgs& args, std::vector<AttentionSequence> sequences);
  AttentionCall(const AttentionCall&) = delete;

  int64_t tasks() const { return int64_t(tasks_.size()); }
  // How many of the `available` threads to share the tasks between: a small call is not worth waking one for.
  int64_t threads(int64_t available) const { return std::clamp<int64_t>(products_ / kThreadProducts, 1, available); }
  int64_t scratch_bytes() const { return kernels().attention_scratch(args_); }
  // In any order, by any thread; of the tasks that share rows the last one to finish joins their results.
  void run(int64_t task, uint8_t* scratch);

 private:
  static constexpr int64_t kThreadProducts = int64_t(1) << 17;  // below this a thread costs more than it gives

  void divide(const AttentionSequence& sequence, int64_t head);

  AttentionArgs args_;
  std::vector<AttentionSequence> sequences_;
  std::vector<AttentionTask> tasks_;
  std::vector<AttentionMerge> merges_;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished_;  // tasks of each merge
  Buffer partials_;
  int64_t products_ = 0;  // multiply-accumulates, at most
};

// Tokens on their way into a cache.
struct CacheWrite {
  FloatType type;
  CacheType stored;
  int64_t dim;
  TokenView from;           // [batch, heads, tokens]
  TokenView cache, scales;  // written, but for the scales of float8
  const float* factors;     // [heads, dim] by which int8 ones are divided, or null

  // One token of one head, to a row and a place of the cache.
  void store(int64_t batch, int64_t head, int64_t token, int64_t row, int64_t place) const;
};

// The last tokens of several sequences, one after the other, and the blocks of paged caches where all their tokens are.
struct PagedBatch {
  std::vector<int64_t> starts;   // of the sequences' tokens, and the end of the last
  std::vector<int64_t> lengths;  // of the sequences, with these tokens
  std::vector<int32_t> tables;   // [sequences, width], block of every `page` tokens
  int64_t width, page, blocks;   // of the caches at least

  int64_t sequences() const { return int64_t(lengths.size()); }
  int64_t queries(int64_t i) const { return starts[size_t(i) + 1] - starts[size_t(i)]; }
  const int32_t* table(int64_t i) const { return tables.data() + i * width; }
};

// Rotary embedding, cache write and causal attention of the next tokens of every sequence.
struct RopeAttentionArgs {
  RotaryArgs rotary;        // of queries and keys, whose heads it counts together; behind them in x are the values
  AttentionArgs attention;  // with the caches as keys and values, and a mask for start + length tokens
  int64_t batch, start;
  const PagedBatch* pages;  // of a batch of 1 whose tokens are those of several sequences, without a start; or null
  uint8_t* output;          // [batch, length, heads, dim] contiguous
};

// rotary.y and what attention says of queries, max_rows and block are set here.
class RopeAttention {
 public:
  explicit RopeAttention(const RopeAttentionArgs& args) : RopeAttention(args, make_rotated(args)) {}

  // First this for positions [begin, end) of all, by any threads; when all have returned, the attention.
  int64_t positions() const { return args_.batch * args_.rotary.length; }
  void rotate_and_store(int64_t begin, int64_t end) const;
  AttentionCall& attention() { return attention_; }

 private:
  RopeAttention(const RopeAttentionArgs& args, Buffer rotated);
  static Buffer make_rotated(const RopeAttentionArgs& args);
  void store_paged(const PagedBatch& pages, int64_t begin, int64_t end) const;

  RopeAttentionArgs args_;
  Buffer rotated_;  // queries and keys [batch, length, heads + kv_heads, dim]
  CacheWrite keys_, values_;
  AttentionCall attention_;
};

}  // namespace ipex_quant
