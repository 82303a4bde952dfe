// The W8A8 ops: schema, argument checks, memory and threads.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "ops/int8_group.h"

namespace ipex_quant {
namespace {

constexpr int64_t kTaskRows = 512;  // their sums of 64 columns and a tile fit the L2 cache

Tensor int8_pack(Tensor codes, Tensor scales, std::vector<int64_t> out_features) {
  check_tensor("codes", codes, ScalarType::Char, 2);
  check_tensor("scales", scales, ScalarType::Float, 1);
  const PackedGroup group(out_features, codes.size(1));
  const Int8Geometry& g = group.geometry;
  const int64_t n = sum_of(out_features);
  check_shape("codes", codes, n, g.k);
  IPEX_QUANT_CHECK(scales.size(0) == n, "scales: expected ", n, " elements, got ", scales.size(0));
  Tensor packed = empty({group.total_bytes()}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  advise_huge_pages(data, group.total_bytes());
  for (size_t i = 0; i < group.members(); ++i) {
    const Int8Header header = group.header(i);
    std::memcpy(data + group.offset(i), &header, sizeof header);
  }
  const int8_t* code_data = static_cast<const int8_t*>(codes.const_data_ptr());
  const float* scale_data = static_cast<const float*>(scales.const_data_ptr());
  group.for_each_tile([&](int64_t offset, int64_t row, int64_t rows) {
    pack_int8_tile(g, code_data + row * g.k, scale_data + row, rows, data + offset);
  });
  return packed;
}

std::tuple<Tensor, Tensor> int8_unpack(Tensor packed, std::vector<int64_t> out_features, int64_t in_features) {
  const PackedGroup group(out_features, in_features);
  const Int8Geometry& g = group.geometry;
  const uint8_t* data = group.data_of(packed);
  const int64_t n = sum_of(out_features);
  Tensor codes = empty({n, g.k}, ScalarType::Char), scales = empty({n}, ScalarType::Float);
  int8_t* code_data = static_cast<int8_t*>(codes.mutable_data_ptr());
  float* scale_data = static_cast<float*>(scales.mutable_data_ptr());
  group.for_each_tile([&](int64_t offset, int64_t row, int64_t rows) {
    unpack_int8_tile(g, data + offset, rows, code_data + row * g.k, scale_data + row);
  });
  return {codes, scales};
}

// ------------------------------------------------------------------------------------------------- activations
// `length` multipliers, or a single one for all.
struct Multipliers {
  std::vector<float> repeated;
  const float* data;

  Multipliers(const char* name, const Tensor& t, int64_t length) {
    check_tensor(name, t, ScalarType::Float, 1);
    IPEX_QUANT_CHECK(t.size(0) == length || t.size(0) == 1, name, ": expected ", length, " elements or 1, got ",
                     t.size(0));
    data = static_cast<const float*>(t.const_data_ptr());
    if (t.size(0) == length) return;
    repeated.assign(size_t(length), data[0]);
    data = repeated.data();
  }
};

int64_t check_activations(const Tensor& x) {
  check_cpu("x", x);
  IPEX_QUANT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x: expected shape [..., K] with K > 0, got ", shape_of(x));
  return x.size(x.dim() - 1);
}

void quantize_rows(const QuantizeActivationArgs& args, int64_t rows) {
  const KernelTable& table = kernels();
  parallel(rows, 1 + (int64_t(1) << 15) / args.k,
           [&](int64_t begin, int64_t end) { table.quantize_activation(args, begin, end); });
}

Tensor empty_codes(const Tensor& x) {
  return torch::stable::empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), ScalarType::Byte);
}

Tensor quantize_activation(Tensor x, Tensor multiplier, int64_t zero_point) {
  const int64_t k = check_activations(x);
  const FloatType type = float_type("x", x.scalar_type());
  const Multipliers multipliers("multiplier", multiplier, k);
  check_zero_point("zero_point", zero_point);
  const Tensor rows = as_contiguous(x);
  Tensor codes = empty_codes(x);
  quantize_rows({rows.const_data_ptr(), type, k, multipliers.data, int32_t(zero_point),
                 static_cast<uint8_t*>(codes.mutable_data_ptr()), k, nullptr, nullptr},
                x.numel() / k);
  return codes;
}

std::tuple<Tensor, Tensor, Tensor> quantize_activation_per_token(Tensor x) {
  const int64_t k = check_activations(x);
  const FloatType type = float_type("x", x.scalar_type());
  const Tensor rows = as_contiguous(x);
  Tensor codes = empty_codes(x);
  Tensor scales = empty({x.numel() / k}, ScalarType::Float), zero_points = empty({x.numel() / k}, ScalarType::Int);
  quantize_rows({rows.const_data_ptr(), type, k, nullptr, 0, static_cast<uint8_t*>(codes.mutable_data_ptr()), k,
                 static_cast<float*>(scales.mutable_data_ptr()), static_cast<int32_t*>(zero_points.mutable_data_ptr())},
                x.numel() / k);
  return {codes, scales, zero_points};
}

// ------------------------------------------------------------------------------------------------------ linear
// The activations of a call as the kernels read them, with the memory that backs them.
struct Activations {
  Tensor x;
  Buffer copied;
  std::vector<int32_t> moved_zeros;
  int64_t rows;
  Int8Args args;

  Activations(const Tensor& x_, const Tensor& scales, const Tensor& zero_points, const Int8Geometry& g) : x(x_) {
    const bool is_signed = x.scalar_type() == ScalarType::Char;
    IPEX_QUANT_CHECK(is_signed || x.scalar_type() == ScalarType::Byte, "x: expected dtype Byte or Char, got ",
                     torch::headeronly::toString(x.scalar_type()));
    rows = x.numel() / g.k;
    check_tensor("scales", scales, ScalarType::Float, 1);
    check_tensor("zero_points", zero_points, ScalarType::Int, 1);
    const int64_t count = scales.size(0);
    IPEX_QUANT_CHECK(count == rows || count == 1, "scales: expected ", rows, " elements or 1, got ", count);
    IPEX_QUANT_CHECK(zero_points.size(0) == count, "zero_points: expected ", count, " elements as scales has, got ",
                     zero_points.size(0));
    const int32_t* zeros = static_cast<const int32_t*>(zero_points.const_data_ptr());
    const int32_t lowest = is_signed ? -128 : 0;
    for (int64_t i = 0; i < count; ++i)
      IPEX_QUANT_CHECK(zeros[i] >= lowest && zeros[i] <= lowest + 255, "zero_points: expected ", lowest, "..",
                       lowest + 255, ", got ", zeros[i]);
    if (is_signed) {
      for (int64_t i = 0; i < count; ++i) moved_zeros.push_back(zeros[i] + 128);
      zeros = moved_zeros.data();
    }
    x = as_contiguous(x);
    args = {&g,    static_cast<const uint8_t*>(x.const_data_ptr()),
            g.k,   static_cast<const float*>(scales.const_data_ptr()),
            zeros, count == 1 ? 0 : 1};
    if (is_signed || g.padded_k != g.k) copy(is_signed ? 0x80 : 0);
  }

  // Copies the rows to a buffer whose rows are padded to whole words of four bytes, and adds 128 to signed values. The
  // weight's codes are 0 in the padding.
  void copy(uint8_t flipped) {
    const Int8Geometry& g = *args.geometry;
    copied = make_buffer(rows * g.padded_k);
    parallel(rows, 1 + (int64_t(1) << 15) / g.k, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        uint8_t* to = copied.get() + m * g.padded_k;
        const uint8_t* from = args.x + m * g.k;
        std::memset(to + g.padded_k - 4, 0, 4);
        for (int64_t i = 0; i < g.k; ++i) to[i] = from[i] ^ flipped;
      }
    });
    args.x = copied.get();
    args.stride = g.padded_k;
  }
};

// A task is a tile of columns, or if `together`, the same tile of all weights, which then have one size. If there are
// too few tiles to share evenly among threads, rows are divided as well.
void multiply(const PackedGroup& group, const uint8_t* data, const Activations& act, const std::vector<Output>& outputs,
              bool together = false) {
  const KernelTable& table = kernels();
  const int64_t threads = torch::stable::get_num_threads(), rows = act.rows;
  const int64_t tile_count = together ? group.first_tiles[1] : group.tiles();
  if (rows == 0 || tile_count == 0) return;
  const bool decode = rows <= kDecodeRows;
  int64_t row_parts = (rows + kTaskRows - 1) / kTaskRows;
  if (!decode && tile_count * row_parts < 4 * threads)
    row_parts = std::max(row_parts, std::min((4 * threads + tile_count - 1) / tile_count, rows / 64));
  // Decode reads memory fastest in long forward streams, so its threads take long runs of tiles.
  const int64_t run = decode ? (tile_count + 4 * threads - 1) / (4 * threads) : 1;
  parallel_tasks(tile_count * row_parts, run, [&](auto next) {
    const Buffer scratch = make_buffer(int8_scratch(group.geometry, (rows + row_parts - 1) / row_parts));
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
      for (int64_t first = 0; first < group.tiles(); first += tile_count)
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
          const int64_t tile = first + task / row_parts, part = task % row_parts;
          const size_t member = group.member_of(tile);
          table.int8_tile(act.args, outputs[member], data + group.tile_offset(member, tile),
                          (tile - group.first_tiles[member]) * kTileN, part * rows / row_parts,
                          (part + 1) * rows / row_parts, scratch.get());
        }
  });
}

std::vector<int64_t> result_shape(const Tensor& x, int64_t out_features) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  return shape;
}

std::vector<Tensor> int8_linear(Tensor x, Tensor scales, Tensor zero_points, Tensor packed, std::optional<Tensor> bias,
                                std::vector<Tensor> others, std::vector<int64_t> out_features, ScalarType dtype,
                                int64_t post_op) {
  const PackedGroup group(out_features, check_activations(x));
  const uint8_t* data = group.data_of(packed);
  float_type("dtype", dtype);
  check_post_op(post_op, others.size());
  IPEX_QUANT_CHECK(out_features.size() == 1 || post_op == kNone,
                   "post_op: expected 0 (none) with several weights, got ", post_op);
  const float* bias_data = optional_vector("bias", bias, sum_of(out_features));
  const Activations act(x, scales, zero_points, group.geometry);
  std::vector<Tensor> results;
  std::vector<Output> outputs;
  for (const int64_t n : out_features) {
    results.push_back(torch::stable::empty(result_shape(x, n), dtype));
    outputs.push_back(make_output(results.back(), dtype, bias_data, post_op, others));
    if (bias_data) bias_data += n;
  }
  multiply(group, data, act, outputs);
  return results;
}

// The gate is written to the result; the same task then computes `up` and multiplies the result by it.
Tensor int8_linear_gated(Tensor x, Tensor scales, Tensor zero_points, Tensor packed, std::optional<Tensor> bias,
                         int64_t out_features, ScalarType dtype, int64_t activation) {
  const PackedGroup group({out_features, out_features}, check_activations(x));
  const uint8_t* data = group.data_of(packed);
  float_type("dtype", dtype);
  check_activation(activation);
  const float* gate_bias = optional_vector("bias", bias, 2 * out_features);
  const float* up_bias = gate_bias ? gate_bias + out_features : nullptr;
  const Activations act(x, scales, zero_points, group.geometry);
  Tensor y = torch::stable::empty(result_shape(x, out_features), dtype);
  std::vector<Tensor> none, gated{y};
  const Output gate_output = make_output(y, dtype, gate_bias, activation, none);
  const Output up_output = make_output(y, dtype, up_bias, kMul, gated);
  multiply(group, data, act, {gate_output, up_output}, true);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("quantize_activation(Tensor x, Tensor multiplier, int zero_point) -> Tensor");
  m.def("quantize_activation_per_token(Tensor x) -> (Tensor, Tensor, Tensor)");
  m.def("int8_pack(Tensor codes, Tensor scales, int[] out_features) -> Tensor");
  m.def("int8_unpack(Tensor packed, int[] out_features, int in_features) -> (Tensor, Tensor)");
  m.def(
      "int8_linear(Tensor x, Tensor scales, Tensor zero_points, Tensor packed, Tensor? bias, Tensor[] others, "
      "int[] out_features, ScalarType dtype, int post_op) -> Tensor[]");
  m.def(
      "int8_linear_gated(Tensor x, Tensor scales, Tensor zero_points, Tensor packed, Tensor? bias, int out_features, "
      "ScalarType dtype, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("quantize_activation", TORCH_BOX(&quantize_activation));
  m.impl("quantize_activation_per_token", TORCH_BOX(&quantize_activation_per_token));
  m.impl("int8_pack", TORCH_BOX(&int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&int8_unpack));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear_gated", TORCH_BOX(&int8_linear_gated));
}

}  // namespace ipex_quant
