// What the attention kernels take. A call is divided into tasks: some rows, which are the queries of all heads that
// share one KV head, against a range of its tokens.
#pragma once

#include "kernels.h"

namespace ipex_quant {

constexpr int64_t kAttentionColumns = 64;  // columns of a panel; blocks of tokens are whole panels
constexpr int64_t kStreamedRows = 8;       // up to here keys and values are multiplied as they come

// Elements that are `row`, `head` and `token` bytes apart; those of a token are adjacent.
struct TokenView {
  const uint8_t* data;
  int64_t row, head, token;

  const uint8_t* at(int64_t r, int64_t h, int64_t t) const { return data + r * row + h * head + t * token; }
};

// What keys and values are: of the type of the query, codes with scales, or float8 (e5m2), the upper half of a float16.
enum class CacheType : int32_t { kFloat, kInt8, kFloat8 };

enum class MaskType : int32_t { kNone, kBool, kFloat };

struct AttentionMask {
  MaskType type;
  FloatType float_type;
  const uint8_t* data;
  int64_t batch, head, query, token;  // bytes; 0 where it is broadcast
};

struct AttentionSequence {
  int64_t index;            // batch index of the mask
  const uint8_t* query;     // head 0 of the first query
  uint8_t* output;          // likewise
  int64_t queries, tokens;  // query i is at position tokens - queries + i
  int64_t row, first;       // where the first token is, if no table says so
  const int32_t* table;     // row of every page, or of every token
};

struct AttentionArgs {
  FloatType type;  // of query and output
  CacheType cache;
  int64_t kv_heads, group;  // query heads of each KV head
  int64_t key_dim, value_dim;
  float scale, softcap;
  float value_factor;  // multiplies the result; 1 unless values are float8
  bool causal;
  int64_t window;
  const float* alibi;               // [heads]
  int64_t query_head, query_token;  // strides in bytes; of the output it is the contiguous [heads, value_dim]
  TokenView key, value, key_scales, value_scales;
  const float* key_factors;  // [kv_heads, key_dim], by which the bytes of keys were divided, or null
  int64_t page;  // tokens in a row of the cache that a table leads to; 0 if an entry of the table is for one token
  AttentionMask mask;
  int64_t max_rows, block;  // of any task, up to kStreamedRows a power of two; tokens that are met at a time

  int64_t value_columns() const { return (value_dim + 15) / 16 * 16; }
  // First token that query i sees, and the one after the last.
  int64_t first_token(const AttentionSequence& s, int64_t i) const {
    const int64_t first = s.tokens - s.queries + i + 1 - window;
    return window > 0 && first > 0 ? first : 0;
  }
  int64_t end_token(const AttentionSequence& s, int64_t i) const {
    const int64_t end = s.tokens - s.queries + i + 1;
    return !causal && window <= 0 ? s.tokens : end > 0 ? end : 0;
  }
  // Floats of a partial result: sums of values, then of each row the maximum and the sum of the exponentials.
  int64_t partial_size(int64_t rows) const { return rows * (value_columns() + 2); }
};

struct AttentionTask {
  const AttentionSequence* sequence;
  int64_t head;       // of key and value
  int64_t row, rows;  // row = query * group + head within the group
  int64_t begin, end;
  float* partial;  // where the result goes, or null: to the output
  int64_t merge;   // that joins it with those of other tasks, or -1
};

struct AttentionMerge {
  AttentionTask task;    // any of those that are merged
  int64_t first, count;  // of these
  const float* partials;
};

struct WriteCacheArgs {
  FloatType type;
  CacheType cache;  // of bytes
  int64_t dim;
  const uint8_t* x;
  const float* factors;  // [dim] by which x is divided before it becomes int8, or null
  uint8_t* codes;
  float* scale;  // written with int8 codes, read and divided by before x becomes float8
};

}  // namespace ipex_quant
