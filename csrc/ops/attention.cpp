// Attention and its caches: schema, argument checks, memory and threads.
#include "ops/attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace ipex_quant {
namespace {

constexpr int64_t kLargest = int64_t(1) << 31;

// ----------------------------------------------------------------------------------------------------- arguments
Tensor with_unit_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : torch::stable::contiguous(t);
}

void check_dim(const char* name, const Tensor& t, int64_t dim) {
  check_cpu(name, t);
  IPEX_QUANT_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got shape ", shape_of(t));
}

void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  IPEX_QUANT_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                   torch::headeronly::toString(t.scalar_type()));
}

void check_sizes(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin())) return;
  std::ostringstream expected;
  for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << size;
  fail(name, ": expected shape [", expected.str(), "], got ", shape_of(t));
}

// Of a cache for tensors of `type`, which is that of `what`.
CacheType cache_type(const char* name, const Tensor& cache, ScalarType type, const char* what) {
  const ScalarType stored = cache.scalar_type();
  IPEX_QUANT_CHECK(stored == type || stored == ScalarType::Char || stored == ScalarType::Float8_e5m2, name,
                   ": expected the dtype of ", what, ", int8 or float8_e5m2, got ",
                   torch::headeronly::toString(stored));
  return stored == ScalarType::Char          ? CacheType::kInt8
         : stored == ScalarType::Float8_e5m2 ? CacheType::kFloat8
                                             : CacheType::kFloat;
}
int64_t element_size(CacheType cache, FloatType type) { return cache == CacheType::kFloat ? float_size(type) : 1; }

// The scale of all of a float8 cache, [1], or one.
TokenView float8_scale(const char* name, const std::optional<Tensor>& scale) {
  static constexpr float kOne = 1.0f;
  if (!scale) return {reinterpret_cast<const uint8_t*>(&kOne), 0, 0, 0};
  check_tensor(name, *scale, ScalarType::Float, 1);
  IPEX_QUANT_CHECK(scale->size(0) == 1, name, ": expected one scale of a float8 cache, got ", shape_of(*scale));
  return {static_cast<const uint8_t*>(scale->const_data_ptr()), 0, 0, 0};
}

// The view of a tensor [rows, heads, tokens, ...].
TokenView view_of(const Tensor& t, int64_t size) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
}

// The options of attention besides its tensors.
struct Options {
  double scale;
  bool causal;
  int64_t window;
  double softcap;
};

void set_options(AttentionArgs& args, const Options& options) {
  const float softcap = float(options.softcap);
  IPEX_QUANT_CHECK(std::isfinite(float(options.scale)), "scale: expected a finite float32, got ", options.scale);
  IPEX_QUANT_CHECK(options.softcap == 0 || (std::isnormal(softcap) && softcap > 0),
                   "softcap: expected 0 (none) or a positive float32, got ", options.softcap);
  IPEX_QUANT_CHECK(options.window >= 0, "window: expected 0 (none) or a number of tokens, got ", options.window);
  args.scale = float(options.scale);
  args.value_factor = 1.0f;
  args.softcap = softcap;
  args.causal = options.causal;
  args.window = std::min(options.window, 2 * kLargest);  // no token is farther away; larger ones would overflow
}

void set_heads(AttentionArgs& args, int64_t heads, int64_t kv_heads) {
  IPEX_QUANT_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
                   "key: expected a number of heads that divides the ", heads, " of query, got ", kv_heads);
  args.kv_heads = kv_heads;
  args.group = heads / kv_heads;
}

// Keys and values [rows, heads, tokens, dim], and the scales [rows, heads, tokens] of int8 ones or [1] of float8 ones.
struct Cache {
  Tensor key, value;
  std::optional<Tensor> key_scales, value_scales;

  void describe(AttentionArgs& args, ScalarType type) {
    check_dim("key", key, 4);
    check_dim("value", value, 4);
    args.cache = cache_type("key", key, type, "query");
    check_dtype("value", value, key.scalar_type());
    for (int64_t i = 0; i < 3; ++i)
      IPEX_QUANT_CHECK(value.size(i) == key.size(i), "value: expected the shape of key but for the last dimension, ",
                       shape_of(key), ", got ", shape_of(value));
    IPEX_QUANT_CHECK(value.size(3) > 0 && value.size(3) < kLargest, "value: expected a head size, got ",
                     shape_of(value));
    IPEX_QUANT_CHECK(key.size(2) < kLargest, "key: too many tokens, ", shape_of(key));
    key = with_unit_stride(key);
    value = with_unit_stride(value);
    const int64_t size = element_size(args.cache, float_type("query", type));
    args.key = view_of(key, size);
    args.value = view_of(value, size);
    args.value_dim = value.size(3);
    if (args.cache == CacheType::kFloat8) {
      args.key_scales = float8_scale("key_scales", key_scales);
      args.value_scales = float8_scale("value_scales", value_scales);
      args.scale *= *reinterpret_cast<const float*>(args.key_scales.data);
      args.value_factor = *reinterpret_cast<const float*>(args.value_scales.data);
      IPEX_QUANT_CHECK(std::isfinite(args.scale), "key_scales: expected a finite product with scale, got ", args.scale);
      return;
    }
    const bool scaled = args.cache == CacheType::kInt8;
    IPEX_QUANT_CHECK(scaled == bool(key_scales) && scaled == bool(value_scales),
                     "key_scales, value_scales: expected with int8 or float8 keys and values, and only there");
    if (!scaled) return;
    args.key_scales = scales_view("key_scales", *key_scales);
    args.value_scales = scales_view("value_scales", *value_scales);
  }

  TokenView scales_view(const char* name, const Tensor& scales) const {
    check_cpu(name, scales);
    check_dtype(name, scales, ScalarType::Float);
    check_sizes(name, scales, {key.size(0), key.size(1), key.size(2)});
    return view_of(scales, sizeof(float));
  }
};

// The factors [heads, dim] that divide the keys of an int8 cache [rows, heads, tokens, dim], or null.
const float* read_factors(const std::optional<Tensor>& factors, const Tensor& cache) {
  if (!factors) return nullptr;
  IPEX_QUANT_CHECK(cache.scalar_type() == ScalarType::Char, "key_factors: expected only with an int8 cache");
  check_tensor("key_factors", *factors, ScalarType::Float, 2);
  check_shape("key_factors", *factors, cache.size(1), cache.size(3));
  return static_cast<const float*>(factors->const_data_ptr());
}

AttentionMask mask_of(const Tensor& t, std::initializer_list<int64_t> shape) {
  check_dim("mask", t, 4);
  AttentionMask mask{};
  const bool is_bool = t.scalar_type() == ScalarType::Bool;
  mask.type = is_bool ? MaskType::kBool : MaskType::kFloat;
  if (!is_bool) mask.float_type = float_type("mask", t.scalar_type());
  const int64_t size = is_bool ? 1 : float_size(mask.float_type);
  int64_t strides[4];
  for (int64_t i = 0; i < 4; ++i) {
    IPEX_QUANT_CHECK(t.size(i) == shape.begin()[i] || t.size(i) == 1,
                     "mask: expected a shape that broadcasts to [batch, heads, queries, tokens], got ", shape_of(t));
    strides[i] = t.size(i) == 1 ? 0 : t.stride(i) * size;
  }
  mask.data = static_cast<const uint8_t*>(t.const_data_ptr());
  mask.batch = strides[0], mask.head = strides[1], mask.query = strides[2], mask.token = strides[3];
  return mask;
}

// -------------------------------------------------------------------------------------------------------- ops
void run(const AttentionArgs& args, std::vector<AttentionSequence> sequences) {
  AttentionCall call(args, std::move(sequences));
  ipex_quant::run(call);
}

Tensor attention(Tensor query, Tensor key, Tensor value, double scale, bool causal, std::optional<Tensor> mask,
                 int64_t window, double softcap, std::optional<Tensor> alibi, std::optional<Tensor> key_scales,
                 std::optional<Tensor> value_scales, std::optional<Tensor> rows, std::optional<Tensor> key_factors) {
  check_dim("query", query, 4);
  AttentionArgs args{};
  args.type = float_type("query", query.scalar_type());
  set_options(args, {scale, causal, window, softcap});
  Cache cache{key, value, key_scales, value_scales};
  cache.describe(args, query.scalar_type());
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), tokens = key.size(2);
  set_heads(args, heads, key.size(1));
  args.key_dim = query.size(3);
  args.key_factors = read_factors(key_factors, cache.key);
  IPEX_QUANT_CHECK(args.key_dim > 0 && key.size(3) == args.key_dim, "key: expected the head size of query, ",
                   args.key_dim, ", got ", key.size(3));
  IPEX_QUANT_CHECK(queries < kLargest, "query: too many tokens, ", shape_of(query));
  args.alibi = optional_vector("alibi", alibi, heads);
  if (mask) args.mask = mask_of(*mask, {batch, heads, queries, tokens});
  const int32_t* table = nullptr;
  if (rows) {
    check_cpu("rows", *rows);
    check_dtype("rows", *rows, ScalarType::Int);
    check_sizes("rows", *rows, {batch, tokens});
    rows = torch::stable::contiguous(*rows);
    table = static_cast<const int32_t*>(rows->const_data_ptr());
    check_indices("rows", table, batch * tokens, key.size(0));
  } else {
    IPEX_QUANT_CHECK(key.size(0) == batch, "key: expected the batch size of query, ", batch, ", or rows; got ",
                     key.size(0));
  }
  query = with_unit_stride(query);
  const int64_t size = float_size(args.type);
  args.query_head = query.stride(1) * size;
  args.query_token = query.stride(2) * size;
  Tensor output = empty_in_dtype_of(query, {batch, queries, heads, args.value_dim});
  if (output.numel() == 0) return output;  // whatever the number of sequences
  std::vector<AttentionSequence> sequences;
  for (int64_t b = 0; b < batch; ++b)
    sequences.push_back({b, static_cast<const uint8_t*>(query.const_data_ptr()) + b * query.stride(0) * size,
                         static_cast<uint8_t*>(output.mutable_data_ptr()) + b * queries * heads * args.value_dim * size,
                         queries, tokens, b, 0, table ? table + b * tokens : nullptr});
  run(args, std::move(sequences));
  return output;
}

// -------------------------------------------------------------------------------------------------------- writes
// New tokens to write to a cache: [batch, heads, tokens, dim].
struct NewTokens {
  TokenView view;
  FloatType type;
  ScalarType dtype;
  int64_t batch, heads, tokens, dim;
};

// A cache [rows, heads, capacity, dim] to write to, with its scales.
CacheWrite write_to(const char* name, const Tensor& cache, const std::optional<Tensor>& scales, const NewTokens& from) {
  check_dim(name, cache, 4);
  const CacheType stored = cache_type(name, cache, from.dtype, "what is written");
  CacheWrite write{from.type, stored, from.dim, from.view, {}, {}, nullptr};
  check_sizes(name, cache, {cache.size(0), from.heads, cache.size(2), from.dim});
  IPEX_QUANT_CHECK(cache.stride(3) == 1 || from.dim <= 1, name, ": expected adjacent elements of a token");
  write.cache = view_of(cache, element_size(stored, from.type));
  if (stored == CacheType::kFloat8) {
    write.scales = float8_scale("scales", scales);
    return write;
  }
  IPEX_QUANT_CHECK((stored == CacheType::kInt8) == bool(scales), name,
                   ": expected scales with an int8 or float8 cache, and only there");
  if (!scales) return write;
  check_cpu("scales", *scales);
  check_dtype("scales", *scales, ScalarType::Float);
  check_sizes("scales", *scales, {cache.size(0), from.heads, cache.size(2)});
  write.scales = view_of(*scales, sizeof(float));
  return write;
}

void check_start(int64_t start, int64_t tokens, int64_t capacity) {
  IPEX_QUANT_CHECK(start >= 0 && start <= capacity && tokens <= capacity - start, "start: ", tokens,
                   " tokens do not fit a cache of ", capacity, " from ", start);
}

int64_t write_grain(int64_t dim) { return 1 + (int64_t(1) << 15) / dim; }

void write_cache(Tensor key, Tensor cache, std::optional<Tensor> scales, int64_t start, std::optional<Tensor> factors) {
  check_dim("key", key, 4);
  const FloatType type = float_type("key", key.scalar_type());
  key = with_unit_stride(key);
  const NewTokens from{
      view_of(key, float_size(type)), type, key.scalar_type(), key.size(0), key.size(1), key.size(2), key.size(3)};
  CacheWrite write = write_to("cache", cache, scales, from);
  write.factors = read_factors(factors, cache);
  IPEX_QUANT_CHECK(cache.size(0) == from.batch, "cache: expected the batch size of key, ", from.batch, ", got ",
                   cache.size(0));
  check_start(start, from.tokens, cache.size(2));
  if (key.numel() == 0) return;
  parallel(from.batch * from.heads * from.tokens, write_grain(from.dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / from.tokens / from.heads, head = i / from.tokens % from.heads, token = i % from.tokens;
      write.store(row, head, token, row, start + token);
    }
  });
}

// int32 or int64 numbers.
std::vector<int64_t> integers(const char* name, const Tensor& t, int64_t count) {
  check_cpu(name, t);
  const bool narrow = t.scalar_type() == ScalarType::Int;
  if (!narrow) check_dtype(name, t, ScalarType::Long);
  check_sizes(name, t, {count});
  const Tensor data = torch::stable::contiguous(t);
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    values[size_t(i)] = narrow ? static_cast<const int32_t*>(data.const_data_ptr())[i]
                               : static_cast<const int64_t*>(data.const_data_ptr())[i];
  return values;
}

void write_paged_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, std::optional<Tensor> key_scales,
                       std::optional<Tensor> value_scales, Tensor slots) {
  check_dim("key", key, 3);
  check_dim("value", value, 3);
  const FloatType type = float_type("key", key.scalar_type());
  check_dtype("value", value, key.scalar_type());
  key = with_unit_stride(key);
  value = with_unit_stride(value);
  const int64_t size = float_size(type), tokens = key.size(0), heads = key.size(1);
  check_sizes("value", value, {tokens, heads, value.size(2)});
  const auto tokens_of = [&](const Tensor& t) {
    const TokenView view{static_cast<const uint8_t*>(t.const_data_ptr()), 0, t.stride(1) * size, t.stride(0) * size};
    return NewTokens{view, type, t.scalar_type(), 1, heads, tokens, t.size(2)};
  };
  const CacheWrite keys = write_to("key_cache", key_cache, key_scales, tokens_of(key));
  const CacheWrite values = write_to("value_cache", value_cache, value_scales, tokens_of(value));
  const int64_t block = key_cache.size(2);
  IPEX_QUANT_CHECK(value_cache.size(0) == key_cache.size(0) && value_cache.size(2) == block,
                   "value_cache: expected as many blocks of as many tokens as key_cache, ", shape_of(key_cache),
                   ", got ", shape_of(value_cache));
  const std::vector<int64_t> places = integers("slots", slots, tokens);
  const int64_t count = key_cache.size(0) * block;
  for (const int64_t slot : places)
    IPEX_QUANT_CHECK(slot >= -1 && slot < count, "slots: expected -1 (skip) or 0..", count - 1, ", got ", slot);
  if (tokens == 0 || heads == 0) return;  // whatever the other sizes
  parallel(tokens, write_grain(1 + heads * (key.size(2) + value.size(2))), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = places[size_t(token)];
      for (int64_t head = 0; slot >= 0 && head < heads; ++head) {
        keys.store(0, head, token, slot / block, slot % block);
        values.store(0, head, token, slot / block, slot % block);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------ fused and ragged
Tensor fused_rope_attention(Tensor qkv, Tensor cos, Tensor sin, int64_t rotary_dim, bool interleaved, Tensor key_cache,
                            Tensor value_cache, std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                            int64_t start, double scale, std::optional<Tensor> mask, int64_t window, double softcap,
                            std::optional<Tensor> alibi, std::optional<Tensor> key_factors) {
  check_dim("qkv", qkv, 3);
  qkv = with_unit_stride(qkv);
  const QkvInput input{qkv.const_data_ptr(), qkv.scalar_type(), qkv.size(0),
                       qkv.size(1),          qkv.size(2),       {qkv.stride(0), qkv.stride(1)}};
  RopeAttentionOptions options{cos,         sin,        rotary_dim,   interleaved, key_cache,
                               value_cache, key_scales, value_scales, key_factors, start,
                               scale,       mask,       window,       softcap,     alibi};
  RopeAttentionArgs args = rope_attention_args(input, options);
  Tensor output = empty_in_dtype_of(
      qkv, {input.batch, input.length, args.attention.kv_heads * args.attention.group * args.attention.value_dim});
  args.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  RopeAttention call(args);
  run(call);
  return output;
}

// For caches that the tokens of `pages` are written to.
void check_writable(const PagedBatch& pages, const Tensor& cache) {
  IPEX_QUANT_CHECK(pages.blocks <= cache.size(0), "block_tables: expected values in 0..", cache.size(0) - 1, ", got ",
                   pages.blocks - 1);
  IPEX_QUANT_CHECK(cache.size(2) == pages.page, "key_cache: expected blocks of ", pages.page, " tokens, got ",
                   shape_of(cache));
  for (int64_t i = 0; i < pages.sequences(); ++i)
    IPEX_QUANT_CHECK(pages.queries(i) <= pages.lengths[size_t(i)], "lengths: expected at least the ", pages.queries(i),
                     " new tokens of sequence ", i, ", got ", pages.lengths[size_t(i)]);
}

Tensor paged_rope_attention(Tensor qkv, Tensor cos, Tensor sin, int64_t rotary_dim, bool interleaved, Tensor key_cache,
                            Tensor value_cache, std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                            Tensor block_tables, Tensor lengths, Tensor query_starts, double scale, int64_t window,
                            double softcap, std::optional<Tensor> alibi) {
  check_dim("qkv", qkv, 2);
  qkv = with_unit_stride(qkv);
  const int64_t tokens = qkv.size(0);
  const PagedBatch pages = read_pages(block_tables, lengths, query_starts, tokens, key_cache);
  const QkvInput input{qkv.const_data_ptr(), qkv.scalar_type(), 1, tokens, qkv.size(1), {0, qkv.stride(0)}};
  RopeAttentionOptions options{cos,        sin,          rotary_dim,   interleaved, key_cache, value_cache,
                               key_scales, value_scales, std::nullopt, /*start=*/0, scale,     std::nullopt,
                               window,     softcap,      alibi,        &pages};
  RopeAttentionArgs args = rope_attention_args(input, options);
  Tensor output =
      empty_in_dtype_of(qkv, {tokens, args.attention.kv_heads * args.attention.group * args.attention.value_dim});
  if (output.numel() == 0) return output;
  args.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  RopeAttention call(args);
  run(call);
  return output;
}

std::vector<int64_t> read_starts(const char* name, const Tensor& starts, int64_t tokens) {
  IPEX_QUANT_CHECK(starts.dim() == 1 && starts.size(0) >= 1, name, ": expected one number more than sequences, got ",
                   shape_of(starts));
  std::vector<int64_t> values = integers(name, starts, starts.size(0));
  IPEX_QUANT_CHECK(values.front() == 0 && values.back() == tokens && std::is_sorted(values.begin(), values.end()), name,
                   ": expected numbers that rise from 0 to the ", tokens, " tokens");
  return values;
}

// Queries of several sequences, concatenated along the tokens: [tokens, heads, dim].
struct RaggedQueries {
  Tensor query;
  std::vector<int64_t> starts;
  Tensor output;

  RaggedQueries(const Tensor& query_, std::vector<int64_t> starts_) : query(query_), starts(std::move(starts_)) {}

  int64_t batch() const { return int64_t(starts.size()) - 1; }

  void describe(AttentionArgs& args, const Options& options, const std::optional<Tensor>& alibi) {
    args.type = float_type("query", query.scalar_type());
    set_options(args, options);
    query = with_unit_stride(query);
    args.key_dim = query.size(2);
    IPEX_QUANT_CHECK(args.key_dim > 0, "query: expected a head size, got ", shape_of(query));
    args.query_head = query.stride(1) * float_size(args.type);
    args.query_token = query.stride(0) * float_size(args.type);
    args.alibi = optional_vector("alibi", alibi, query.size(1));
  }

  AttentionSequence sequence(const AttentionArgs& args, int64_t i) {
    const int64_t first = starts[size_t(i)], token = query.size(1) * args.value_dim * float_size(args.type);
    return {i,
            static_cast<const uint8_t*>(query.const_data_ptr()) + first * args.query_token,
            static_cast<uint8_t*>(output.mutable_data_ptr()) + first * token,
            starts[size_t(i) + 1] - first,
            0,
            0,
            0,
            nullptr};
  }
};

Tensor paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, std::optional<Tensor> key_scales,
                       std::optional<Tensor> value_scales, Tensor block_tables, Tensor lengths, Tensor query_starts,
                       double scale, bool causal, int64_t window, double softcap, std::optional<Tensor> alibi) {
  check_dim("query", query, 3);
  AttentionArgs args{};
  const PagedBatch pages = read_pages(block_tables, lengths, query_starts, query.size(0), key_cache);
  RaggedQueries queries(query, pages.starts);
  queries.describe(args, {scale, causal, window, softcap}, alibi);
  Cache cache{key_cache, value_cache, key_scales, value_scales};
  cache.describe(args, query.scalar_type());
  set_heads(args, query.size(1), key_cache.size(1));
  IPEX_QUANT_CHECK(key_cache.size(3) == args.key_dim, "key: expected the head size of query, ", args.key_dim, ", got ",
                   key_cache.size(3));
  args.page = pages.page;
  queries.output = empty_in_dtype_of(query, {query.size(0), query.size(1), args.value_dim});
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < pages.sequences(); ++i) {
    AttentionSequence sequence = queries.sequence(args, i);
    sequence.tokens = pages.lengths[size_t(i)];
    sequence.table = pages.table(i);
    sequences.push_back(sequence);
  }
  run(args, std::move(sequences));
  return queries.output;
}

Tensor varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_starts, Tensor key_starts, double scale,
                        bool causal, int64_t window, double softcap, std::optional<Tensor> alibi) {
  check_dim("query", query, 3);
  check_dim("key", key, 3);
  check_dim("value", value, 3);
  AttentionArgs args{};
  RaggedQueries queries(query, read_starts("query_starts", query_starts, query.size(0)));
  queries.describe(args, {scale, causal, window, softcap}, alibi);
  check_dtype("key", key, query.scalar_type());
  check_dtype("value", value, query.scalar_type());
  check_sizes("key", key, {key.size(0), key.size(1), args.key_dim});
  check_sizes("value", value, {key.size(0), key.size(1), value.size(2)});
  IPEX_QUANT_CHECK(value.size(2) > 0, "value: expected a head size, got ", shape_of(value));
  set_heads(args, query.size(1), key.size(1));
  const std::vector<int64_t> starts = read_starts("key_starts", key_starts, key.size(0));
  IPEX_QUANT_CHECK(starts.size() == queries.starts.size(), "key_starts: expected ", queries.starts.size(),
                   " numbers as query_starts has, got ", starts.size());
  key = with_unit_stride(key);
  value = with_unit_stride(value);
  const int64_t size = float_size(args.type);
  const auto view = [size](const Tensor& t) {
    return TokenView{static_cast<const uint8_t*>(t.const_data_ptr()), 0, t.stride(1) * size, t.stride(0) * size};
  };
  args.key = view(key);
  args.value = view(value);
  args.value_dim = value.size(2);
  queries.output = empty_in_dtype_of(query, {query.size(0), query.size(1), args.value_dim});
  std::vector<AttentionSequence> sequences;
  for (int64_t i = 0; i < queries.batch(); ++i) {
    AttentionSequence sequence = queries.sequence(args, i);
    sequence.first = starts[size_t(i)];
    sequence.tokens = starts[size_t(i) + 1] - sequence.first;
    sequences.push_back(sequence);
  }
  run(args, std::move(sequences));
  return queries.output;
}

}  // namespace

PagedBatch read_pages(const Tensor& block_tables, const Tensor& lengths, const Tensor& query_starts, int64_t tokens,
                      const Tensor& cache) {
  check_dim("key", cache, 4);
  const int64_t page = cache.size(2);
  IPEX_QUANT_CHECK(page > 0 && page < kLargest, "key: expected blocks of tokens, got ", shape_of(cache));
  PagedBatch batch{read_starts("query_starts", query_starts, tokens), {}, {}, 0, page, 0};
  const int64_t sequences = int64_t(batch.starts.size()) - 1;
  check_cpu("block_tables", block_tables);
  check_dtype("block_tables", block_tables, ScalarType::Int);
  IPEX_QUANT_CHECK(block_tables.dim() == 2 && block_tables.size(0) == sequences, "block_tables: expected shape [",
                   sequences, ", blocks], got ", shape_of(block_tables));
  const int64_t width = block_tables.size(1);
  IPEX_QUANT_CHECK(width < kLargest, "block_tables: too many blocks, ", shape_of(block_tables));
  const Tensor data = as_contiguous(block_tables);
  const int32_t* tables = static_cast<const int32_t*>(data.const_data_ptr());
  batch.width = width;
  batch.lengths = integers("lengths", lengths, sequences);
  batch.tables.assign(tables, tables + sequences * width);  // a copy, which no write to a cache can change
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t length = batch.lengths[size_t(i)];
    IPEX_QUANT_CHECK(length >= 0 && length <= width * page, "lengths: expected 0..", width * page,
                     ", what block_tables have room for, got ", length);
    const int32_t* table = batch.table(i);
    const int64_t used = (length + page - 1) / page;
    check_indices("block_tables", table, used, cache.size(0));
    if (used) batch.blocks = std::max<int64_t>(batch.blocks, *std::max_element(table, table + used) + 1);
  }
  return batch;
}

RopeAttentionArgs rope_attention_args(const QkvInput& qkv, RopeAttentionOptions& o) {
  check_dim("key_cache", o.key_cache, 4);
  const FloatType type = float_type("qkv", qkv.dtype);
  const int64_t batch = qkv.batch, length = qkv.length;
  const int64_t kv_heads = o.key_cache.size(1), dim = o.key_cache.size(3),
                heads = dim ? qkv.width / dim - 2 * kv_heads : 0;
  IPEX_QUANT_CHECK(heads > 0 && qkv.width == (heads + 2 * kv_heads) * dim, "qkv: expected [batch, length, (heads + ",
                   2 * kv_heads, ") * ", dim, "], got [", batch, ", ", length, ", ", qkv.width, "]");
  RopeAttentionArgs args{};
  args.rotary =
      rotary_args({qkv.data, qkv.dtype, batch, length, heads + kv_heads, dim, {qkv.strides[0], qkv.strides[1], dim}},
                  o.cos, o.sin, o.rotary_dim, o.interleaved);
  AttentionArgs& attention = args.attention;
  attention.type = type;
  set_options(attention, {o.scale, true, o.window, o.softcap});
  set_heads(attention, heads, kv_heads);
  attention.key_dim = dim;
  attention.alibi = optional_vector("alibi", o.alibi, heads);
  const NewTokens tokens{{}, type, qkv.dtype, batch, kv_heads, length, dim};
  write_to("key_cache", o.key_cache, o.key_scales, tokens);
  write_to("value_cache", o.value_cache, o.value_scales, tokens);
  if (o.pages) {
    check_writable(*o.pages, o.key_cache);
    attention.page = o.pages->page;
  } else {
    IPEX_QUANT_CHECK(o.key_cache.size(0) == batch, "key_cache: expected the batch size of qkv, ", batch, ", got ",
                     o.key_cache.size(0));
    check_start(o.start, length, o.key_cache.size(2));
  }
  Cache{o.key_cache, o.value_cache, o.key_scales, o.value_scales}.describe(attention, qkv.dtype);
  attention.key_factors = read_factors(o.key_factors, o.key_cache);
  if (o.mask) attention.mask = mask_of(*o.mask, {batch, heads, length, o.start + length});
  args.batch = batch;
  args.start = o.start;
  args.pages = o.pages;
  return args;
}

void run(AttentionCall& call) {
  parallel_streams(call.tasks(), call.threads(torch::stable::get_num_threads()), [&](auto next) {
    const Buffer scratch = make_buffer(call.scratch_bytes());
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
      for (int64_t i = tasks.begin; i < tasks.end; ++i) call.run(i, scratch.get());
  });
}

void run(RopeAttention& call) {
  parallel(call.positions(), 8, [&](int64_t begin, int64_t end) { call.rotate_and_store(begin, end); });
  run(call.attention());
}

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal, Tensor? mask, int window, "
      "float softcap, Tensor? alibi, Tensor? key_scales, Tensor? value_scales, Tensor? rows, Tensor? key_factors=None) "
      "-> Tensor");
  m.def("write_cache(Tensor key, Tensor(a!) cache, Tensor(b!)? scales, SymInt start, Tensor? factors=None) -> ()");
  m.def(
      "fused_rope_attention(Tensor qkv, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!)? key_scales, Tensor(d!)? value_scales, SymInt start, "
      "float scale, Tensor? mask, int window, float softcap, Tensor? alibi, Tensor? key_factors=None) -> Tensor");
  m.def(
      "write_paged_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor(c!)? key_scales, Tensor(d!)? value_scales, Tensor slots) -> ()");
  m.def(
      "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? key_scales, Tensor? value_scales, "
      "Tensor block_tables, Tensor lengths, Tensor query_starts, float scale, bool causal, int window, float softcap, "
      "Tensor? alibi) -> Tensor");
  m.def(
      "paged_rope_attention(Tensor qkv, Tensor cos, Tensor sin, int rotary_dim, bool interleaved, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!)? key_scales, Tensor(d!)? value_scales, "
      "Tensor block_tables, Tensor lengths, Tensor query_starts, float scale, int window, float softcap, "
      "Tensor? alibi) -> Tensor");
  m.def(
      "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor query_starts, Tensor key_starts, float scale, "
      "bool causal, int window, float softcap, Tensor? alibi) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("write_cache", TORCH_BOX(&write_cache));
  m.impl("fused_rope_attention", TORCH_BOX(&fused_rope_attention));
  m.impl("write_paged_cache", TORCH_BOX(&write_paged_cache));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("paged_rope_attention", TORCH_BOX(&paged_rope_attention));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
}

}  // namespace ipex_quant
