#include "host/attention_call.h"

#include <algorithm>
#include <cstring>

namespace ipex_quant {
namespace {

// The division of tokens into blocks affects the rounding with an int8 cache: ops/reference_attention.py has the same
// rules.
constexpr int64_t kMaxRows = 96;  // rows of a task, whose state fits the L2 cache
constexpr int64_t kFewRows = 16;  // up to here packing costs most, and a packed block stays in the L1 cache
// If one task has all rows of a KV head, its tokens are divided into kChunks, unless these get too short or too long.
constexpr int64_t kChunks = 8, kMinChunk = 512, kMaxChunk = 2048;

void set_sizes(AttentionArgs& args, const std::vector<AttentionSequence>& sequences) {
  int64_t rows = 1;
  for (const AttentionSequence& s : sequences) rows = std::max(rows, s.queries * args.group);
  args.max_rows = std::min(rows, kMaxRows);
  if (rows <= kStreamedRows)
    for (args.max_rows = 1; args.max_rows < rows;) args.max_rows *= 2;
  args.block = rows > kStreamedRows && rows <= kFewRows ? kAttentionColumns : 2 * kAttentionColumns;
}

}  // namespace

AttentionCall::AttentionCall(const AttentionArgs& args, std::vector<AttentionSequence> sequences)
    : args_(args), sequences_(std::move(sequences)) {
  set_sizes(args_, sequences_);
  for (const AttentionSequence& s : sequences_)
    for (int64_t head = 0; head < args_.kv_heads; ++head) divide(s, head);
  if (merges_.empty()) return;
  int64_t floats = 0;
  for (const AttentionMerge& merge : merges_) floats += merge.count * args_.partial_size(merge.task.rows);
  partials_ = make_buffer(floats * int64_t(sizeof(float)));
  unfinished_.reset(new std::atomic<int64_t>[merges_.size()]);
  float* at = reinterpret_cast<float*>(partials_.get());
  for (size_t i = 0; i < merges_.size(); ++i) {
    AttentionMerge& merge = merges_[i];
    const int64_t size = args_.partial_size(merge.task.rows);
    unfinished_[i].store(merge.count, std::memory_order_relaxed);
    merge.partials = at;
    for (int64_t chunk = 0; chunk < merge.count; ++chunk, at += size) {
      AttentionTask& task = tasks_[size_t(merge.first + chunk)];
      task.partial = at;
      task.merge = int64_t(i);
    }
  }
}

// Divides rows into blocks, last ones first, since they see the most tokens; a single block divides its tokens.
void AttentionCall::divide(const AttentionSequence& s, int64_t head) {
  const int64_t rows = s.queries * args_.group, blocks = (rows + kMaxRows - 1) / kMaxRows, unit = args_.block;
  for (int64_t i = blocks - 1; i >= 0; --i) {
    AttentionTask task{&s, head, i * rows / blocks, 0, 0, 0, nullptr, -1};
    task.rows = (i + 1) * rows / blocks - task.row;
    const int64_t begin = args_.first_token(s, task.row / args_.group);
    const int64_t end = std::max(begin, args_.end_token(s, (task.row + task.rows - 1) / args_.group));
    const int64_t chunk_tokens = std::clamp((end - begin) / kChunks, kMinChunk, kMaxChunk);
    const int64_t chunks = blocks == 1 ? std::max<int64_t>(1, (end - begin) / chunk_tokens) : 1;
    const int64_t units = (end - begin + unit - 1) / unit;
    if (chunks > 1) merges_.push_back({task, int64_t(tasks_.size()), chunks, nullptr});
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      task.begin = begin + chunk * units / chunks * unit;
      task.end = std::min(end, begin + (chunk + 1) * units / chunks * unit);
      tasks_.push_back(task);
    }
    products_ += task.rows * (end - begin) * (args_.key_dim + args_.value_dim);
  }
}

void AttentionCall::run(int64_t i, uint8_t* scratch) {
  const AttentionTask& task = tasks_[size_t(i)];
  kernels().attention_task(args_, task, scratch);
  if (task.merge >= 0 && unfinished_[size_t(task.merge)].fetch_sub(1, std::memory_order_acq_rel) == 1)
    kernels().attention_merge(args_, merges_[size_t(task.merge)], scratch);
}

void CacheWrite::store(int64_t batch, int64_t head, int64_t token, int64_t row, int64_t place) const {
  const uint8_t* x = from.at(batch, head, token);
  uint8_t* to = const_cast<uint8_t*>(cache.at(row, head, place));
  if (stored != CacheType::kFloat)
    kernels().quantize_token({type, stored, dim, x, factors ? factors + head * dim : nullptr, to,
                              reinterpret_cast<float*>(const_cast<uint8_t*>(scales.at(row, head, place)))});
  else
    std::memcpy(to, x, size_t(dim * float_size(type)));
}

Buffer RopeAttention::make_rotated(const RopeAttentionArgs& a) {
  return make_buffer(a.batch * a.rotary.length * a.rotary.heads * a.rotary.dim * float_size(a.rotary.type));
}

namespace {

AttentionArgs with_queries(const RopeAttentionArgs& a) {
  AttentionArgs attention = a.attention;
  attention.query_head = a.rotary.dim * float_size(a.rotary.type);
  attention.query_token = a.rotary.heads * attention.query_head;
  return attention;
}

std::vector<AttentionSequence> sequences_of(const RopeAttentionArgs& a, const uint8_t* rotated) {
  const int64_t length = a.rotary.length, token = a.rotary.dim * float_size(a.rotary.type);
  const int64_t heads = a.attention.kv_heads * a.attention.group;
  std::vector<AttentionSequence> sequences;
  if (a.pages) {
    const PagedBatch& pages = *a.pages;
    for (int64_t i = 0; i < pages.sequences(); ++i) {
      const int64_t first = pages.starts[size_t(i)];
      sequences.push_back({i, rotated + first * a.rotary.heads * token, a.output + first * heads * token,
                           pages.queries(i), pages.lengths[size_t(i)], 0, 0, pages.table(i)});
    }
    return sequences;
  }
  sequences.reserve(size_t(a.batch));
  for (int64_t b = 0; b < a.batch; ++b)
    sequences.push_back({b, rotated + b * length * a.rotary.heads * token, a.output + b * length * heads * token,
                         length, a.start + length, b, 0, nullptr});
  return sequences;
}

}  // namespace

RopeAttention::RopeAttention(const RopeAttentionArgs& args, Buffer rotated)
    : args_(args), rotated_(std::move(rotated)), attention_(with_queries(args), sequences_of(args, rotated_.get())) {
  RotaryArgs& rotary = args_.rotary;
  const AttentionArgs& attention = args_.attention;
  rotary.y = rotated_.get();
  const int64_t size = float_size(rotary.type), head = rotary.dim * size, token = rotary.heads * head;
  const int64_t query_heads = attention.kv_heads * attention.group;
  keys_ = {rotary.type,          attention.cache,
           rotary.dim,           {rotated_.get() + query_heads * head, rotary.length * token, head, token},
           attention.key,        attention.key_scales,
           attention.key_factors};
  values_ = {rotary.type,
             attention.cache,
             rotary.dim,
             {static_cast<const uint8_t*>(rotary.x) + rotary.heads * rotary.strides[2] * size, rotary.strides[0] * size,
              rotary.strides[2] * size, rotary.strides[1] * size},
             attention.value,
             attention.value_scales,
             nullptr};
}

void RopeAttention::rotate_and_store(int64_t begin, int64_t end) const {
  kernels().rotate_positions(args_.rotary, begin, end);
  if (args_.pages) return store_paged(*args_.pages, begin, end);
  for (int64_t position = begin; position < end; ++position) {
    const int64_t row = position / args_.rotary.length, token = position % args_.rotary.length;
    for (int64_t head = 0; head < args_.attention.kv_heads; ++head) {
      keys_.store(row, head, token, row, args_.start + token);
      values_.store(row, head, token, row, args_.start + token);
    }
  }
}

void RopeAttention::store_paged(const PagedBatch& pages, int64_t begin, int64_t end) const {
  int64_t sequence = std::upper_bound(pages.starts.begin(), pages.starts.end(), begin) - pages.starts.begin() - 1;
  for (int64_t token = begin; token < end; ++token) {
    while (token >= pages.starts[size_t(sequence) + 1]) ++sequence;
    const int64_t place = pages.lengths[size_t(sequence)] - (pages.starts[size_t(sequence) + 1] - token);
    const int64_t block = pages.table(sequence)[place / pages.page];
    for (int64_t head = 0; head < args_.attention.kv_heads; ++head) {
      keys_.store(0, head, token, block, place % pages.page);
      values_.store(0, head, token, block, place % pages.page);
    }
  }
}

}  // namespace ipex_quant
