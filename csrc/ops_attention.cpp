// Attention and its caches: schema, argument checks, division into tasks.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "attention_plan.h"
#include "ops.h"

namespace ipex_quant {
namespace {

constexpr int64_t kMaxRows = 96;      // of a task: what these keep fits the second-level cache
constexpr int64_t kFewRows = 16;      // up to here packing is what costs, and its result stays in the first-level cache
constexpr int64_t kTokenChunk = 512;  // of a task that has all rows of its KV head
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
  std::ostringstream expected;
  for (const int64_t size : sizes) expected << (expected.tellp() > 0 ? ", " : "") << size;
  IPEX_QUANT_CHECK(t.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin()), name,
                   ": expected shape [", expected.str(), "], got ", shape_of(t));
}

int64_t element_size(ScalarType type) { return type == ScalarType::Char ? 1 : float_size(float_type("dtype", type)); }

// Of [rows, heads, tokens, ...].
TokenView view_of(const Tensor& t, int64_t size) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
}

// What attention is told beside its tensors.
struct Options {
  double scale;
  bool causal;
  int64_t window;
  double softcap;
};

void set_options(AttentionArgs& args, const Options& options) {
  IPEX_QUANT_CHECK(std::isfinite(options.scale), "scale: expected a finite number, got ", options.scale);
  IPEX_QUANT_CHECK(std::isfinite(options.softcap) && options.softcap >= 0,
                   "softcap: expected 0 (none) or a positive number, got ", options.softcap);
  IPEX_QUANT_CHECK(options.window >= 0, "window: expected 0 (none) or a number of tokens, got ", options.window);
  args.scale = float(options.scale);
  args.softcap = float(options.softcap);
  args.causal = options.causal;
  args.window = options.window;
}

void set_heads(AttentionArgs& args, int64_t heads, int64_t kv_heads) {
  IPEX_QUANT_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
                   "key: expected a number of heads that divides the ", heads, " of query, got ", kv_heads);
  args.kv_heads = kv_heads;
  args.group = heads / kv_heads;
}

// Keys and values [rows, heads, tokens, dim], and the scales [rows, heads, tokens] that bytes come with.
struct Cache {
  Tensor key, value;
  std::optional<Tensor> key_scales, value_scales;

  void describe(AttentionArgs& args, ScalarType type) {
    check_dim("key", key, 4);
    check_dim("value", value, 4);
    IPEX_QUANT_CHECK(key.scalar_type() == type || key.scalar_type() == ScalarType::Char,
                     "key: expected the dtype of query or int8, got ", torch::headeronly::toString(key.scalar_type()));
    check_dtype("value", value, key.scalar_type());
    for (int64_t i = 0; i < 3; ++i)
      IPEX_QUANT_CHECK(value.size(i) == key.size(i), "value: expected the shape of key but for the last dimension, ",
                       shape_of(key), ", got ", shape_of(value));
    IPEX_QUANT_CHECK(value.size(3) > 0 && value.size(3) < kLargest, "value: expected a head size, got ",
                     shape_of(value));
    IPEX_QUANT_CHECK(key.size(2) < kLargest, "key: too many tokens, ", shape_of(key));
    args.bytes = key.scalar_type() == ScalarType::Char;
    key = with_unit_stride(key);
    value = with_unit_stride(value);
    const int64_t size = element_size(key.scalar_type());
    args.key = view_of(key, size);
    args.value = view_of(value, size);
    args.value_dim = value.size(3);
    IPEX_QUANT_CHECK(args.bytes == bool(key_scales) && args.bytes == bool(value_scales),
                     "key_scales, value_scales: expected with int8 keys and values, and only there");
    if (!args.bytes) return;
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

// Entries of a table of rows, all of which are read.
void check_table(const char* name, const int32_t* table, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    IPEX_QUANT_CHECK(table[i] >= 0 && table[i] < rows, name, ": expected 0..", rows - 1, ", got ", table[i]);
}

// -------------------------------------------------------------------------------------------------------- tasks
// The division of a call does not depend on the number of threads, so neither does its result.
struct Plan {
  std::vector<AttentionTask> tasks;
  std::vector<AttentionMerge> merges;
  Buffer partials;

  Plan(AttentionArgs& args, const std::vector<AttentionSequence>& sequences) {
    int64_t most_rows = 1;
    for (const AttentionSequence& s : sequences) most_rows = std::max(most_rows, s.queries * args.group);
    args.max_rows = std::min(most_rows, kMaxRows);
    args.block = most_rows <= kFewRows ? kAttentionColumns : 2 * kAttentionColumns;
    std::vector<int64_t> offsets;  // of each task's partial result, or -1
    int64_t floats = 0;
    for (const AttentionSequence& s : sequences) {
      const int64_t rows = s.queries * args.group, blocks = (rows + kMaxRows - 1) / kMaxRows;
      for (int64_t head = 0; head < args.kv_heads; ++head)
        for (int64_t i = blocks - 1; i >= 0; --i) {  // the last ones see the most
          AttentionTask task{&s, head, i * rows / blocks, 0, 0, 0, nullptr};
          task.rows = (i + 1) * rows / blocks - task.row;
          task.begin = args.first_token(s, task.row / args.group);
          task.end = std::max(task.begin, args.end_token(s, (task.row + task.rows - 1) / args.group));
          const int64_t chunks = blocks == 1 ? std::max<int64_t>(1, (task.end - task.begin) / kTokenChunk) : 1;
          if (chunks > 1) merges.push_back({task, nullptr, chunks});
          const int64_t begin = task.begin, units = (task.end - begin + args.block - 1) / args.block;
          const int64_t end = task.end;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            task.begin = begin + chunk * units / chunks * args.block;
            task.end = std::min(end, begin + (chunk + 1) * units / chunks * args.block);
            tasks.push_back(task);
            offsets.push_back(chunks > 1 ? floats : -1);
            if (chunks > 1) floats += args.partial_size(task.rows);
          }
        }
    }
    partials = make_buffer(floats * int64_t(sizeof(float)));
    float* data = reinterpret_cast<float*>(partials.get());
    for (size_t i = 0; i < tasks.size(); ++i)
      if (offsets[i] >= 0) tasks[i].partial = data + offsets[i];
    floats = 0;
    for (AttentionMerge& merge : merges) {
      merge.partials = data + floats;
      floats += merge.count * args.partial_size(merge.task.rows);
    }
  }
};

void run(AttentionArgs& args, const std::vector<AttentionSequence>& sequences) {
  const Plan plan(args, sequences);
  const KernelTable& table = kernels();
  parallel_tasks(int64_t(plan.tasks.size()), 1, [&](auto next) {
    const Buffer scratch = make_buffer(AttentionScratch(args).bytes);
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
      for (int64_t i = tasks.begin; i < tasks.end; ++i)
        table.attention_task(args, plan.tasks[size_t(i)], scratch.get());
  });
  if (plan.merges.empty()) return;
  parallel(int64_t(plan.merges.size()), 8, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(args.value_columns() * int64_t(sizeof(float)));
    for (int64_t i = begin; i < end; ++i) table.attention_merge(args, plan.merges[size_t(i)], scratch.get());
  });
}

// -------------------------------------------------------------------------------------------------------- ops
Tensor attention(Tensor query, Tensor key, Tensor value, double scale, bool causal, std::optional<Tensor> mask,
                 int64_t window, double softcap, std::optional<Tensor> alibi, std::optional<Tensor> key_scales,
                 std::optional<Tensor> value_scales, std::optional<Tensor> rows) {
  check_dim("query", query, 4);
  AttentionArgs args{};
  args.type = float_type("query", query.scalar_type());
  set_options(args, {scale, causal, window, softcap});
  Cache cache{key, value, key_scales, value_scales};
  cache.describe(args, query.scalar_type());
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), tokens = key.size(2);
  set_heads(args, heads, key.size(1));
  args.key_dim = query.size(3);
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
    check_table("rows", table, batch * tokens, key.size(0));
    args.page = 1;
  } else {
    IPEX_QUANT_CHECK(key.size(0) == batch, "key: expected the batch size of query, ", batch, ", or rows; got ",
                     key.size(0));
  }
  query = with_unit_stride(query);
  const int64_t size = float_size(args.type);
  args.query_head = query.stride(1) * size;
  args.query_token = query.stride(2) * size;
  Tensor output = empty({batch, queries, heads, args.value_dim}, query.scalar_type());
  std::vector<AttentionSequence> sequences;
  for (int64_t b = 0; b < batch; ++b)
    sequences.push_back({b, static_cast<const uint8_t*>(query.const_data_ptr()) + b * query.stride(0) * size,
                         static_cast<uint8_t*>(output.mutable_data_ptr()) + b * queries * heads * args.value_dim * size,
                         queries, tokens, b, 0, table ? table + b * tokens : nullptr});
  run(args, sequences);
  return output;
}

// Writes rows of x, each `dim` elements, to where the cache wants them.
class CacheWriter {
 public:
  CacheWriter(const Tensor& x, const Tensor& cache, const std::optional<Tensor>& scales)
      : bytes_(cache.scalar_type() == ScalarType::Char), table_(kernels()) {
    type_ = float_type("key", x.scalar_type());
    if (!bytes_) check_dtype("cache", cache, x.scalar_type());
    IPEX_QUANT_CHECK(bytes_ == bool(scales), "scales: expected with an int8 cache, and only there");
    dim_ = x.size(x.dim() - 1);
  }
  void write(const uint8_t* x, uint8_t* cache, float* scale) const {
    if (bytes_)
      table_.quantize_token({type_, dim_, x, cache, scale});
    else
      std::memcpy(cache, x, size_t(dim_ * float_size(type_)));
  }

 private:
  bool bytes_;
  const KernelTable& table_;
  FloatType type_;
  int64_t dim_;
};

void write_cache(Tensor key, Tensor cache, std::optional<Tensor> scales, int64_t start) {
  check_dim("key", key, 4);
  check_dim("cache", cache, 4);
  const CacheWriter writer(key, cache, scales);
  const int64_t batch = key.size(0), heads = key.size(1), tokens = key.size(2), capacity = cache.size(2);
  check_sizes("cache", cache, {batch, heads, capacity, key.size(3)});
  IPEX_QUANT_CHECK(cache.stride(3) == 1 || cache.size(3) <= 1, "cache: expected adjacent elements of a token");
  IPEX_QUANT_CHECK(start >= 0 && start <= capacity && tokens <= capacity - start, "start: ", tokens,
                   " tokens do not fit a cache of ", capacity, " from ", start);
  TokenView scales_at{};
  if (scales) {
    check_cpu("scales", *scales);
    check_dtype("scales", *scales, ScalarType::Float);
    check_sizes("scales", *scales, {batch, heads, capacity});
    scales_at = view_of(*scales, sizeof(float));
  }
  key = with_unit_stride(key);
  const TokenView from = view_of(key, element_size(key.scalar_type()));
  TokenView to = view_of(cache, element_size(cache.scalar_type()));
  to.data = static_cast<uint8_t*>(cache.mutable_data_ptr());
  const auto address = [](const TokenView& view, int64_t row, int64_t head, int64_t token) {
    return view.data + row * view.row + head * view.head + token * view.token;
  };
  if (key.numel() == 0) return;
  parallel(batch * heads * tokens, 1 + (int64_t(1) << 15) / key.size(3), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tokens / heads, head = i / tokens % heads, token = i % tokens;
      float* scale = scales
                         ? reinterpret_cast<float*>(const_cast<uint8_t*>(address(scales_at, row, head, start + token)))
                         : nullptr;
      writer.write(address(from, row, head, token), const_cast<uint8_t*>(address(to, row, head, start + token)), scale);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, float scale, bool causal, Tensor? mask, int window, "
      "float softcap, Tensor? alibi, Tensor? key_scales, Tensor? value_scales, Tensor? rows) -> Tensor");
  m.def("write_cache(Tensor key, Tensor(a!) cache, Tensor(b!)? scales, int start) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("write_cache", TORCH_BOX(&write_cache));
}

}  // namespace ipex_quant
