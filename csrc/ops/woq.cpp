// The weight-only ops: schema, argument checks, memory and threads.
#include "ops/woq.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "pack/pack.h"

namespace ipex_quant {
namespace {

void check_scheme(int64_t n, int64_t k, int64_t dtype, int64_t group_size, bool offsets) {
  constexpr int64_t kLargest = int64_t(1) << 31;
  IPEX_QUANT_CHECK(n >= 0 && n < kLargest && k > 0 && k < kLargest, "expected 0 <= out_features < 2^31 and ",
                   "0 < in_features < 2^31, got ", n, " and ", k);
  IPEX_QUANT_CHECK(dtype >= kInt8 && dtype <= kLastDtype, "dtype: expected 1 (INT8) to ", int64_t(kLastDtype), ", got ",
                   dtype);
  IPEX_QUANT_CHECK(group_size == -1 || (group_size > 0 && (group_size & (group_size - 1)) == 0),
                   "group_size: expected -1 or a power of 2, got ", group_size);
  IPEX_QUANT_CHECK(!offsets || is_integer(int32_t(dtype)), "only integers have zero points or minimums");
}

void check_storage(const WoqHeader& h) {
  const bool factors = h.scale_type == kByteScale || h.scale_type == kFp8Scale;
  IPEX_QUANT_CHECK(h.offsets >= kSymmetric && h.offsets <= kMinimums, "packed: expected offsets 0..2, got ", h.offsets);
  IPEX_QUANT_CHECK(h.scale_type >= kFloatScale && h.scale_type <= kFp8Scale, "packed: expected scale type 0..4, got ",
                   h.scale_type);
  IPEX_QUANT_CHECK(factors ? h.super_groups > 0 : h.super_groups == 0, "packed: ", h.super_groups,
                   " groups of a super group do not fit scale type ", h.scale_type);
  IPEX_QUANT_CHECK(
      h.offsets != kMinimums || h.scale_type == kFloatScale || h.scale_type == kHalfScale || h.scale_type == kByteScale,
      "packed: scale type ", h.scale_type, " has no minimums");
}

}  // namespace

WoqHeader read_header(const Tensor& packed) {
  check_tensor("packed", packed, ScalarType::Byte, 1);
  WoqHeader h;
  IPEX_QUANT_CHECK(packed.numel() >= int64_t(sizeof h), "packed: too short for a header");
  std::memcpy(&h, packed.const_data_ptr(), sizeof h);
  IPEX_QUANT_CHECK(h.magic == WoqHeader::kMagic, "packed: not a packed weight");
  check_scheme(h.out_features, h.in_features, h.dtype, h.group_size, h.offsets);
  check_storage(h);
  return h;
}

WoqGeometry geometry_of(const WoqHeader& h, const Tensor& packed) {
  const WoqGeometry g(h);
  IPEX_QUANT_CHECK(g.groups % g.super_groups == 0, "packed: expected a divisor of ", g.groups, " groups, got ",
                   g.super_groups);
  constexpr int64_t kLargest = int64_t(1) << 62;  // tile_bytes itself is below 2^42
  IPEX_QUANT_CHECK(g.tiles == 0 || g.tile_bytes < kLargest / g.tiles, "packed: sizes overflow");
  IPEX_QUANT_CHECK(packed.numel() == g.total_bytes(), "packed: expected ", g.total_bytes(), " bytes, got ",
                   packed.numel());
  return g;
}

const int32_t* perm_data(const char* name, const std::optional<Tensor>& perm, int64_t k) {
  if (!perm) return nullptr;
  check_tensor(name, *perm, ScalarType::Int, 1);
  IPEX_QUANT_CHECK(perm->size(0) == k, name, ": expected ", k, " elements, got ", perm->size(0));
  const int32_t* p = static_cast<const int32_t*>(perm->const_data_ptr());
  check_indices(name, p, k, k);
  return p;
}

const int32_t* permutation_data(const std::optional<Tensor>& perm, int64_t k) {
  const int32_t* p = perm_data("perm", perm, k);
  if (!p) return nullptr;
  std::vector<bool> seen(size_t(k), false);
  for (int64_t i = 0; i < k; ++i) seen[size_t(p[i])] = true;
  IPEX_QUANT_CHECK(std::find(seen.begin(), seen.end(), false) == seen.end(), "perm: expected a permutation of 0..",
                   k - 1);
  return p;
}

void check_modes(int64_t lowp_mode, int64_t act_quant_mode) {
  IPEX_QUANT_CHECK(lowp_mode >= kLowpNone && lowp_mode <= kLowpInt8, "lowp_mode: expected 0..3, got ", lowp_mode);
  IPEX_QUANT_CHECK(lowp_mode != kLowpInt8 || (act_quant_mode >= kPerTensor && act_quant_mode < 2 * kSymmetricActOffset),
                   "act_quant_mode: INT8 compute needs 0..7, got ", act_quant_mode);
}

namespace {

ScalarType code_type(int64_t dtype) {
  return dtype == kInt8 ? ScalarType::Char : dtype == kFp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
}

// The floats of an optional argument of a weight, [n, columns] if given.
float* optional_floats(const char* name, const std::optional<Tensor>& floats, int64_t n, int64_t columns) {
  if (!floats) return nullptr;
  check_tensor(name, *floats, ScalarType::Float, 2);
  check_shape(name, *floats, n, columns);
  return static_cast<float*>(const_cast<void*>(floats->const_data_ptr()));
}

int16_t* optional_zero_points(const std::optional<Tensor>& zero_points, const WoqGeometry& g) {
  if (!zero_points) return nullptr;
  check_tensor("zero_points", *zero_points, ScalarType::Short, 2);
  check_shape("zero_points", *zero_points, g.n, g.groups);
  int16_t* z = static_cast<int16_t*>(const_cast<void*>(zero_points->const_data_ptr()));
  const int32_t lowest = g.dtype == kInt8 ? -128 : 0, highest = max_zero(g.dtype);
  for (int64_t i = 0; i < zero_points->numel(); ++i)
    IPEX_QUANT_CHECK(z[i] >= lowest && z[i] <= highest, "zero_points: expected values in ", lowest, "..", highest,
                     ", got ", z[i]);
  return z;
}

// The smallest form that holds the scales and minimums exactly.
void choose_scales(WoqHeader& h, const PlainWeight& plain, const WoqGeometry& g, int64_t supers) {
  const auto all = [&](int64_t count, auto fits) {
    return fits(plain.scales, plain.super_scales, g.n * count) &&
           (h.offsets != kMinimums || fits(plain.minimums, plain.super_minimums, g.n * count));
  };
  if (supers) {
    h.super_groups = int32_t(g.groups / supers);
    h.half_supers = all(supers, [](const float*, const float* s, int64_t count) { return fits_half(s, count); });
    for (const int32_t type : {kByteScale, kFp8Scale}) {
      h.scale_type = type;
      if (type == kFp8Scale && h.offsets == kMinimums) break;
      if (all(g.groups, [&](const float* x, const float* s, int64_t count) {
            return fits_super(type, x, s, count, h.super_groups);
          }))
        return;
    }
    IPEX_QUANT_CHECK(false, "super_scales: expected scales that are -128..127 or float8 numbers times them");
  }
  if (h.dtype == kFp4 && fits_power(plain.scales, g.n * g.groups))
    h.scale_type = kPowerScale;
  else if (all(g.groups, [](const float* x, const float*, int64_t count) { return fits_half(x, count); }))
    h.scale_type = kHalfScale;
}

Tensor woq_pack(Tensor codes, Tensor scales, std::optional<Tensor> zero_points, std::optional<Tensor> minimums,
                std::optional<Tensor> super_scales, std::optional<Tensor> super_minimums, std::optional<Tensor> perm,
                int64_t in_features, int64_t dtype, int64_t group_size) {
  IPEX_QUANT_CHECK(codes.dim() == 2, "codes: expected 2 dimensions, got shape ", shape_of(codes));
  const int64_t n = codes.size(0);
  check_scheme(n, in_features, dtype, group_size, zero_points || minimums);
  check_tensor("codes", codes, code_type(dtype), 2);
  check_tensor("scales", scales, ScalarType::Float, 2);
  IPEX_QUANT_CHECK(!zero_points || !minimums, "expected zero_points or minimums, got both");
  const int32_t offsets = minimums ? kMinimums : zero_points ? kZeroPoints : kSymmetric;
  WoqHeader header{WoqHeader::kMagic, int32_t(dtype), n, in_features, group_size, offsets, kFloatScale, 0, 0, {}};
  const WoqGeometry plain_geometry(header);
  const int64_t groups = plain_geometry.groups, supers = super_scales ? super_scales->size(-1) : 0;
  check_shape("codes", codes, n, plain_geometry.code_columns());
  check_shape("scales", scales, n, groups);
  IPEX_QUANT_CHECK(!super_scales || (supers > 0 && groups % supers == 0), "super_scales: expected a divisor of ",
                   groups, " groups, got ", supers);
  IPEX_QUANT_CHECK(super_minimums.has_value() == (super_scales && minimums),
                   "super_minimums: expected them with super_scales and minimums, and only then");
  const PlainWeight plain{static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr())),
                          static_cast<float*>(const_cast<void*>(scales.const_data_ptr())),
                          optional_zero_points(zero_points, plain_geometry),
                          optional_floats("minimums", minimums, n, groups),
                          optional_floats("super_scales", super_scales, n, supers),
                          optional_floats("super_minimums", super_minimums, n, supers)};
  choose_scales(header, plain, plain_geometry, supers);
  const WoqGeometry g(header);
  Tensor packed = empty({g.total_bytes()}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  advise_huge_pages(data, g.total_bytes());
  std::memcpy(data, &header, sizeof header);
  const PackArgs args{&g, permutation_data(perm, g.k), plain, data + sizeof header};
  parallel(g.tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(pack_scratch(g));
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(args, tile, scratch.get());
  });
  return packed;
}

// What is not there has no rows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> woq_unpack(Tensor packed, std::optional<Tensor> perm,
                                                                      int64_t out_features, int64_t in_features,
                                                                      int64_t dtype, int64_t group_size,
                                                                      int64_t offsets, int64_t supers) {
  const WoqHeader h = read_header(packed);
  const WoqGeometry g = geometry_of(h, packed);
  IPEX_QUANT_CHECK(h.out_features == out_features && h.in_features == in_features && h.dtype == dtype &&
                       h.group_size == group_size && h.offsets == offsets &&
                       supers == (h.super_groups ? g.supers() : 0),
                   "packed: holds another weight: [", h.out_features, ", ", h.in_features, "], dtype ", h.dtype,
                   ", group size ", h.group_size, ", offsets ", h.offsets);
  const auto floats = [&](bool given, int64_t columns) { return empty({given ? g.n : 0, columns}, ScalarType::Float); };
  const auto data_of = [](Tensor& floats) {
    return floats.size(0) ? static_cast<float*>(floats.mutable_data_ptr()) : nullptr;
  };
  Tensor codes = empty({g.n, g.code_columns()}, code_type(g.dtype));
  Tensor scales = floats(true, g.groups), minimums = floats(offsets == kMinimums, g.groups);
  Tensor zero_points = empty({offsets == kZeroPoints ? g.n : 0, g.groups}, ScalarType::Short);
  Tensor super_scales = floats(supers, supers), super_minimums = floats(supers && offsets == kMinimums, supers);
  const PlainWeight plain{static_cast<uint8_t*>(codes.mutable_data_ptr()),
                          data_of(scales),
                          zero_points.size(0) ? static_cast<int16_t*>(zero_points.mutable_data_ptr()) : nullptr,
                          data_of(minimums),
                          data_of(super_scales),
                          data_of(super_minimums)};
  const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  const PackArgs args{&g, permutation_data(perm, g.k), plain, const_cast<uint8_t*>(data) + sizeof h};
  parallel(g.tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(pack_scratch(g));
    for (int64_t tile = begin; tile < end; ++tile) unpack_tile(args, tile, scratch.get());
  });
  return {codes, scales, zero_points, minimums, super_scales, super_minimums};
}

// Stages (converts or quantizes) x into the buffers of `plan`.
void stage(const WoqGeometry& g, WoqPlan& plan, StageArgs args) {
  const int64_t scratch_bytes = stage_scratch(g, plan.staged);
  const int64_t grain = 1 + (int64_t(1) << 13) / g.padded_k;  // fewer do not pay for a thread
  const Buffer ranges = make_ranges(plan);
  args.ranges = reinterpret_cast<float*>(ranges.get());
  stage_rows(plan, args, [&](auto stage_some) {
    parallel(plan.staged.rows, grain,
             [&](int64_t begin, int64_t end) { stage_some({begin, end}, make_buffer(scratch_bytes).get()); });
  });
}

// A task is a tile of columns. If there are too few tiles to share evenly among threads, rows are divided as well.
void multiply(const std::vector<GemmArgs>& weights, bool together) {
  const KernelTable& table = kernels();
  const Staged& s = *weights[0].staged;
  const int64_t tiles = count_tiles(weights, together);
  if (tiles == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t row_parts = 1;
  if (!s.streamed && tiles < 4 * threads)
    row_parts = std::max<int64_t>(1, std::min((4 * threads + tiles - 1) / tiles, s.rows / 64));
  const auto multiply_tasks = [&](auto next) {
    const Buffer scratch = make_buffer(gemm_scratch(*weights[0].geometry, s, (s.rows + row_parts - 1) / row_parts));
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next()) {
      const int64_t part = tasks.begin % row_parts;  // with several parts, every run is one task
      const int64_t begin = part * s.rows / row_parts, end = (part + 1) * s.rows / row_parts;
      const Tasks run{tasks.begin / row_parts, (tasks.end - 1) / row_parts + 1};
      for_each_weight(weights, together, run, [&](const GemmArgs& weight, Tasks own) {
        for (int64_t tile = own.begin; tile < own.end; ++tile) table.gemm_tile(weight, tile, begin, end, scratch.get());
      });
    }
  };
  if (s.streamed)
    parallel_streams(tiles, multiply_tasks);
  else
    parallel_tasks(tiles * row_parts, 1, multiply_tasks);
}

// The checked arguments of weight-only linears with one input, which is staged once for all weights.
class PreparedCall {
 public:
  PreparedCall(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<int64_t>& out_features,
               const std::optional<Tensor>& perm, int64_t lowp_mode, int64_t act_quant_mode)
      : x_(x), lowp_mode_(int32_t(lowp_mode)), act_quant_mode_(int32_t(act_quant_mode)) {
    IPEX_QUANT_CHECK(!packed.empty() && packed.size() == out_features.size(), "out_features: expected one for each of ",
                     packed.size(), " packed weights, got ", out_features.size());
    for (size_t i = 0; i < packed.size(); ++i) add_weight(packed[i], out_features[i]);
    check_modes(lowp_mode, act_quant_mode);
    check_cpu("x", x);
    type_ = float_type("x", x.scalar_type());
    const int64_t k = geometries_[0].k;
    IPEX_QUANT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected shape [..., ", k, "], got ", shape_of(x));
    perm_ = perm_data("perm", perm, k);
    rows_ = x.numel() / k;
  }

  Tensor empty_result(size_t weight) const {
    std::vector<int64_t> shape(x_.sizes().begin(), x_.sizes().end());
    shape.back() = geometries_[weight].n;
    return empty_in_dtype_of(x_, shape.data());
  }

  // outputs[i] is the destination of the matmul with weight i.
  void run(const std::vector<Output>& outputs, bool together) const {
    const WoqGeometry& g = geometries_[0];
    if (rows_ == 0) return;
    const Tensor rows_of_x = as_contiguous(x_);
    WoqPlan plan = make_plan(g, {type_, lowp_mode_, act_quant_mode_, group_size_, rows_, kernels().bf16_dot});
    const Buffer memory = make_buffer(staged_bytes(plan) + 64);
    place_buffers(plan, reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64)));
    stage(g, plan, {rows_of_x.const_data_ptr(), type_, perm_, plan.range_scope, nullptr, &g, &plan.staged});
    std::vector<GemmArgs> weights;
    for (size_t i = 0; i < outputs.size(); ++i)
      weights.push_back({&geometries_[i], tiles_[i], &plan.staged, outputs[i]});
    multiply(weights, together);
  }

 private:
  void add_weight(const Tensor& packed, int64_t out_features) {
    const WoqHeader h = read_header(packed);
    geometries_.push_back(geometry_of(h, packed));
    IPEX_QUANT_CHECK(h.out_features == out_features, "out_features: expected ", h.out_features, ", got ", out_features);
    tiles_.push_back(static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof h);
    if (geometries_.size() == 1) group_size_ = h.group_size;
    const WoqGeometry& first = geometries_[0];
    IPEX_QUANT_CHECK(h.in_features == first.k && h.dtype == first.dtype && h.group_size == group_size_,
                     "packed: expected weights of the same in_features, dtype and group size, got ", first.k, ", ",
                     first.dtype, ", ", group_size_, " and ", h.in_features, ", ", h.dtype, ", ", h.group_size);
  }

  const Tensor& x_;
  std::vector<WoqGeometry> geometries_;
  std::vector<const uint8_t*> tiles_;
  int64_t group_size_ = -1, rows_ = 0;
  FloatType type_ = kFloat32;
  const int32_t* perm_ = nullptr;
  int32_t lowp_mode_, act_quant_mode_;
};

Tensor woq_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> perm,
                  std::vector<Tensor> others, int64_t out_features, int64_t lowp_mode, int64_t act_quant_mode,
                  int64_t post_op) {
  const PreparedCall call(x, {packed}, {out_features}, perm, lowp_mode, act_quant_mode);
  check_post_op(post_op, others.size());
  const float* bias_data = optional_vector("bias", bias, out_features);
  Tensor y = call.empty_result(0);
  call.run({make_output(y, x.scalar_type(), bias_data, post_op, others)}, false);
  return y;
}

std::vector<Tensor> woq_linear_group(Tensor x, std::vector<Tensor> packed, std::vector<std::optional<Tensor>> biases,
                                     std::optional<Tensor> perm, std::vector<int64_t> out_features, int64_t lowp_mode,
                                     int64_t act_quant_mode) {
  const PreparedCall call(x, packed, out_features, perm, lowp_mode, act_quant_mode);
  IPEX_QUANT_CHECK(biases.size() == packed.size(), "biases: expected ", packed.size(), ", got ", biases.size());
  std::vector<Tensor> results, others;
  std::vector<Output> outputs;
  for (size_t i = 0; i < packed.size(); ++i) {
    const float* bias_data = optional_vector("biases", biases[i], out_features[i]);
    results.push_back(call.empty_result(i));
    outputs.push_back(make_output(results.back(), x.scalar_type(), bias_data, kNone, others));
  }
  call.run(outputs, false);
  return results;
}

// The gate is written to the result; the same task then computes `up` and multiplies the result by it.
Tensor woq_linear_gated(Tensor x, Tensor gate, Tensor up, std::optional<Tensor> gate_bias,
                        std::optional<Tensor> up_bias, std::optional<Tensor> perm, int64_t out_features,
                        int64_t lowp_mode, int64_t act_quant_mode, int64_t activation) {
  const PreparedCall call(x, {gate, up}, {out_features, out_features}, perm, lowp_mode, act_quant_mode);
  check_activation(activation);
  const float* gate_bias_data = optional_vector("gate_bias", gate_bias, out_features);
  const float* up_bias_data = optional_vector("up_bias", up_bias, out_features);
  Tensor y = call.empty_result(0);
  std::vector<Tensor> none, gated{y};
  const Output gate_output = make_output(y, x.scalar_type(), gate_bias_data, activation, none);
  const Output up_output = make_output(y, x.scalar_type(), up_bias_data, kMul, gated);
  call.run({gate_output, up_output}, true);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> woq_quantize(Tensor weight, int64_t dtype, int64_t group_size, bool symmetric,
                                                bool half_scales) {
  check_cpu("weight", weight);
  IPEX_QUANT_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got shape ", shape_of(weight));
  const FloatType type = float_type("weight", weight.scalar_type());
  const int64_t n = weight.size(0), k = weight.size(1);
  check_scheme(n, k, dtype, group_size, !symmetric);
  const WoqGeometry g(WoqHeader{WoqHeader::kMagic, int32_t(dtype), n, k, group_size, 0, 0, 0, 0, {}});
  const Tensor rows = torch::stable::contiguous(weight);
  Tensor codes = empty({n, g.code_columns()}, code_type(dtype));
  Tensor scales = empty({n, g.groups}, ScalarType::Float);
  Tensor zero_points = empty({symmetric ? 0 : n, g.groups}, ScalarType::Short);
  const QuantizeArgs args{rows.const_data_ptr(),
                          type,
                          g.dtype,
                          symmetric,
                          half_scales,
                          n,
                          k,
                          g.group,
                          static_cast<uint8_t*>(codes.mutable_data_ptr()),
                          static_cast<float*>(scales.mutable_data_ptr()),
                          symmetric ? nullptr : static_cast<int16_t*>(zero_points.mutable_data_ptr())};
  const KernelTable& table = kernels();
  std::atomic<bool> finite{true};
  parallel(n, 1 + (int64_t(1) << 16) / k, [&](int64_t begin, int64_t end) {
    if (!table.quantize_rows(args, begin, end, make_buffer(quantize_scratch(k)).get())) finite = false;
  });
  IPEX_QUANT_CHECK(finite,
                   "weight: expected finite values whose range fits float32, got NaN, Inf or larger; check "
                   "the checkpoint, or leave this module in float");
  return {codes, scales, zero_points};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "woq_pack(Tensor codes, Tensor scales, Tensor? zero_points, Tensor? minimums, Tensor? super_scales, "
      "Tensor? super_minimums, Tensor? perm, int in_features, int dtype, int group_size) -> Tensor");
  m.def(
      "woq_unpack(Tensor packed, Tensor? perm, int out_features, int in_features, int dtype, int group_size, "
      "int offsets, int supers) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "woq_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? perm, Tensor[] others, int out_features, "
      "int lowp_mode, int act_quant_mode, int post_op) -> Tensor");
  m.def(
      "woq_linear_group(Tensor x, Tensor[] packed, Tensor?[] biases, Tensor? perm, int[] out_features, "
      "int lowp_mode, int act_quant_mode) -> Tensor[]");
  m.def(
      "woq_linear_gated(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, Tensor? perm, "
      "int out_features, int lowp_mode, int act_quant_mode, int activation) -> Tensor");
  m.def(
      "woq_quantize(Tensor weight, int dtype, int group_size, bool symmetric, bool half_scales) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("woq_pack", TORCH_BOX(&woq_pack));
  m.impl("woq_unpack", TORCH_BOX(&woq_unpack));
  m.impl("woq_linear", TORCH_BOX(&woq_linear));
  m.impl("woq_linear_group", TORCH_BOX(&woq_linear_group));
  m.impl("woq_linear_gated", TORCH_BOX(&woq_linear_gated));
  m.impl("woq_quantize", TORCH_BOX(&woq_quantize));
}

}  // namespace ipex_quant
