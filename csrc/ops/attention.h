// Arguments of the rotation and of attention, which several ops check and fill in.
#pragma once

#include "host/attention_call.h"
#include "ops/call.h"

namespace ipex_quant {

// What is rotated by the angle of its position: [batch, length, heads, dim], the last dimension adjacent.
struct RotaryInput {
  const void* data;
  ScalarType dtype;
  int64_t batch, length, heads, dim;
  int64_t strides[3];
};
// The arguments but for y. `cos` and `sin` become contiguous and own what the arguments point to.
RotaryArgs rotary_args(const RotaryInput& x, Tensor& cos, Tensor& sin, int64_t rotary_dim, bool interleaved);

void run(AttentionCall& call);
void run(RopeAttention& call);

// Queries, keys and values [batch, length, width], of which a token's elements are adjacent.
struct QkvInput {
  const void* data;
  ScalarType dtype;
  int64_t batch, length, width;
  int64_t strides[2];
};

// How they are rotated, stored and attended to; owns what the arguments point to.
struct RopeAttentionOptions {
  Tensor cos, sin;
  int64_t rotary_dim;
  bool interleaved;
  Tensor key_cache, value_cache;
  std::optional<Tensor> key_scales, value_scales, key_factors;
  int64_t start;
  double scale;
  std::optional<Tensor> mask;
  int64_t window;
  double softcap;
  std::optional<Tensor> alibi;
  const PagedBatch* pages = nullptr;  // of paged caches, then without start and mask
};

// The sequences of `tokens` queries over caches like `cache`, [blocks, heads, page, dim]: tables [sequences, blocks].
PagedBatch read_pages(const Tensor& block_tables, const Tensor& lengths, const Tensor& query_starts, int64_t tokens,
                      const Tensor& cache);

// The arguments but for the output.
RopeAttentionArgs rope_attention_args(const QkvInput& qkv, RopeAttentionOptions& options);

}  // namespace ipex_quant
