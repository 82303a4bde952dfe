// The weight-only ops: schema, argument checks, memory and threads. Nothing in csrc but ops*.cpp talks to torch, and
// they do so only through its stable ABI.
#include "ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "pack.h"
#include "woq_plan.h"

namespace ipex_quant {
namespace {

ScalarType code_type(int64_t dtype) {
  return dtype == kInt8 ? ScalarType::Char : dtype == kFp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
}

void check_scheme(int64_t n, int64_t k, int64_t dtype, int64_t group_size, bool asymmetric) {
  constexpr int64_t kLargest = int64_t(1) << 31;
  IPEX_QUANT_CHECK(n >= 0 && n < kLargest && k > 0 && k < kLargest, "expected 0 <= out_features < 2^31 and ",
                   "0 < in_features < 2^31, got ", n, " and ", k);
  IPEX_QUANT_CHECK(dtype >= kInt8 && dtype <= kFp8, "dtype: expected 1 (INT8) to 4 (FP8), got ", dtype);
  IPEX_QUANT_CHECK(group_size == -1 || (group_size > 0 && (group_size & (group_size - 1)) == 0),
                   "group_size: expected -1 or a power of 2, got ", group_size);
  IPEX_QUANT_CHECK(!asymmetric || dtype == kInt8 || dtype == kInt4, "only INT8 and INT4 have zero points");
}

// The data of a perm, or null without one.
const int32_t* perm_data(const std::optional<Tensor>& perm, int64_t k) {
  if (!perm) return nullptr;
  check_tensor("perm", *perm, ScalarType::Int, 1);
  IPEX_QUANT_CHECK(perm->size(0) == k, "perm: expected ", k, " elements, got ", perm->size(0));
  const int32_t* p = static_cast<const int32_t*>(perm->const_data_ptr());
  for (int64_t i = 0; i < k; ++i)
    IPEX_QUANT_CHECK(p[i] >= 0 && p[i] < k, "perm: expected values in 0..", k - 1, ", got ", p[i]);
  return p;
}

// Packing and unpacking write through the perm, so there it must hit every feature.
const int32_t* permutation_data(const std::optional<Tensor>& perm, int64_t k) {
  const int32_t* p = perm_data(perm, k);
  if (!p) return nullptr;
  std::vector<bool> seen(size_t(k), false);
  for (int64_t i = 0; i < k; ++i) seen[size_t(p[i])] = true;
  IPEX_QUANT_CHECK(std::find(seen.begin(), seen.end(), false) == seen.end(), "perm: expected a permutation of 0..",
                   k - 1);
  return p;
}

WoqHeader read_header(const Tensor& packed) {
  check_tensor("packed", packed, ScalarType::Byte, 1);
  WoqHeader h;
  IPEX_QUANT_CHECK(packed.numel() >= int64_t(sizeof h), "packed: too short for a header");
  std::memcpy(&h, packed.const_data_ptr(), sizeof h);
  IPEX_QUANT_CHECK(h.magic == WoqHeader::kMagic, "packed: not a packed weight");
  check_scheme(h.out_features, h.in_features, h.dtype, h.group_size, h.asymmetric);
  return h;
}

WoqGeometry geometry_of(const WoqHeader& h, const Tensor& packed) {
  const WoqGeometry g(h.dtype, h.out_features, h.in_features, h.group_size, h.asymmetric, h.half_scales);
  constexpr int64_t kLargest = int64_t(1) << 62;  // tile_bytes itself is below 2^42
  IPEX_QUANT_CHECK(g.tiles == 0 || g.tile_bytes < kLargest / g.tiles, "packed: sizes overflow");
  IPEX_QUANT_CHECK(packed.numel() == g.total_bytes(), "packed: expected ", g.total_bytes(), " bytes, got ",
                   packed.numel());
  return g;
}

Tensor woq_pack(Tensor codes, Tensor scales, std::optional<Tensor> zero_points, std::optional<Tensor> perm,
                int64_t in_features, int64_t dtype, int64_t group_size) {
  IPEX_QUANT_CHECK(codes.dim() == 2, "codes: expected 2 dimensions, got shape ", shape_of(codes));
  const int64_t n = codes.size(0);
  check_scheme(n, in_features, dtype, group_size, zero_points.has_value());
  check_tensor("codes", codes, code_type(dtype), 2);
  check_tensor("scales", scales, ScalarType::Float, 2);
  const float* scale_data = static_cast<const float*>(scales.const_data_ptr());
  const WoqGeometry g(int32_t(dtype), n, in_features, group_size, zero_points.has_value(),
                      fits_half(scale_data, scales.numel()));
  check_shape("codes", codes, n, g.four_bit() ? (g.k + 1) / 2 : g.k);
  check_shape("scales", scales, n, g.groups);
  if (zero_points) {
    check_tensor("zero_points", *zero_points, ScalarType::Short, 2);
    check_shape("zero_points", *zero_points, n, g.groups);
    const int16_t* z = static_cast<const int16_t*>(zero_points->const_data_ptr());
    const int16_t lowest = dtype == kInt8 ? -128 : 0, highest = dtype == kInt8 ? 127 : kInt4MaxZero;
    for (int64_t i = 0; i < zero_points->numel(); ++i)
      IPEX_QUANT_CHECK(z[i] >= lowest && z[i] <= highest, "zero_points: expected values in ", lowest, "..", highest,
                       ", got ", z[i]);
  }

  Tensor packed = empty({g.total_bytes()}, ScalarType::Byte);
  uint8_t* data = static_cast<uint8_t*>(packed.mutable_data_ptr());
  advise_huge_pages(data, g.total_bytes());
  const WoqHeader header{WoqHeader::kMagic, int32_t(dtype), n, g.k, group_size, g.asymmetric, g.half_scales, {}};
  std::memcpy(data, &header, sizeof header);
  const PackArgs args{&g,
                      permutation_data(perm, g.k),
                      static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr())),
                      const_cast<float*>(scale_data),
                      zero_points ? static_cast<int16_t*>(const_cast<void*>(zero_points->const_data_ptr())) : nullptr,
                      data + sizeof header};
  parallel(g.tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(pack_scratch(g));
    for (int64_t tile = begin; tile < end; ++tile) pack_tile(args, tile, scratch.get());
  });
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> woq_unpack(Tensor packed, std::optional<Tensor> perm, int64_t out_features,
                                              int64_t in_features, int64_t dtype, int64_t group_size, bool asymmetric) {
  const WoqHeader h = read_header(packed);
  IPEX_QUANT_CHECK(h.out_features == out_features && h.in_features == in_features && h.dtype == dtype &&
                       h.group_size == group_size && bool(h.asymmetric) == asymmetric,
                   "packed: holds another weight: [", h.out_features, ", ", h.in_features, "], dtype ", h.dtype,
                   ", group size ", h.group_size);
  const WoqGeometry g = geometry_of(h, packed);
  Tensor codes = empty({g.n, g.four_bit() ? (g.k + 1) / 2 : g.k}, code_type(g.dtype));
  Tensor scales = empty({g.n, g.groups}, ScalarType::Float);
  Tensor zero_points = empty({asymmetric ? g.n : 0, g.groups}, ScalarType::Short);
  const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
  const PackArgs args{&g,
                      permutation_data(perm, g.k),
                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                      static_cast<float*>(scales.mutable_data_ptr()),
                      static_cast<int16_t*>(zero_points.mutable_data_ptr()),
                      const_cast<uint8_t*>(data) + sizeof h};
  parallel(g.tiles, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = make_buffer(pack_scratch(g));
    for (int64_t tile = begin; tile < end; ++tile) unpack_tile(args, tile, scratch.get());
  });
  return {codes, scales, zero_points};
}

// Stages x as `plan` says, into the buffers of the plan.
void stage(const WoqGeometry& g, WoqPlan& plan, StageArgs args) {
  const KernelTable& table = kernels();
  const int64_t rows = plan.staged.rows, scratch_bytes = stage_scratch(g, plan.staged);
  const int64_t grain = 1 + (int64_t(1) << 13) / g.padded_k;  // below this a thread costs more than it gives
  Buffer ranges;
  if (ranges_cross_rows(plan)) {
    ranges = make_buffer(rows * plan.staged.folds * 8);
    args.ranges = reinterpret_cast<float*>(ranges.get());
    parallel(rows, grain, [&](int64_t begin, int64_t end) {
      table.stage_ranges(args, begin, end, make_buffer(scratch_bytes).get());
    });
    merge_ranges(args.ranges, rows, plan.staged.folds);
  }
  parallel(rows, grain,
           [&](int64_t begin, int64_t end) { table.stage_rows(args, begin, end, make_buffer(scratch_bytes).get()); });
}

// One task a tile of columns. When tiles are fewer than threads can share evenly, rows are divided as well.
void multiply(const GemmArgs& args) {
  const KernelTable& table = kernels();
  const Staged& s = *args.staged;
  const int64_t tiles = args.geometry->tiles, threads = torch::stable::get_num_threads();
  const bool decode = s.rows <= kDecodeRows;
  int64_t row_parts = 1;
  if (!decode && tiles < 4 * threads)
    row_parts = std::max<int64_t>(1, std::min((4 * threads + tiles - 1) / tiles, s.rows / 64));
  // Decode reads memory fastest in long forward streams, so its threads take long runs of tiles.
  const int64_t run = decode ? (tiles + 4 * threads - 1) / (4 * threads) : 1;
  parallel_tasks(tiles * row_parts, run, [&](auto next) {
    const Buffer scratch = make_buffer(gemm_scratch(*args.geometry, s, (s.rows + row_parts - 1) / row_parts));
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t part = task % row_parts;
        const int64_t begin = part * s.rows / row_parts, end = (part + 1) * s.rows / row_parts;
        table.gemm_tile(args, task / row_parts, begin, end, scratch.get());
      }
  });
}

void check_modes(int64_t lowp_mode, int64_t act_quant_mode) {
  IPEX_QUANT_CHECK(lowp_mode >= kLowpNone && lowp_mode <= kLowpInt8, "lowp_mode: expected 0..3, got ", lowp_mode);
  IPEX_QUANT_CHECK(lowp_mode != kLowpInt8 || (act_quant_mode >= kPerTensor && act_quant_mode < 2 * kSymmetricActOffset),
                   "act_quant_mode: INT8 compute needs 0..7, got ", act_quant_mode);
}

Tensor woq_linear(Tensor x, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> perm,
                  std::vector<Tensor> others, int64_t out_features, int64_t lowp_mode, int64_t act_quant_mode,
                  int64_t post_op) {
  const WoqHeader h = read_header(packed);
  const WoqGeometry g = geometry_of(h, packed);
  check_modes(lowp_mode, act_quant_mode);
  check_post_op(post_op, others.size());
  IPEX_QUANT_CHECK(g.n == out_features, "out_features: expected ", g.n, ", got ", out_features);
  check_cpu("x", x);
  const FloatType type = float_type("x", x.scalar_type());
  IPEX_QUANT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == g.k, "x: expected shape [..., ", g.k, "], got ", shape_of(x));
  const float* bias_data = optional_vector("bias", bias, g.n);
  const Tensor rows_of_x = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = g.n;
  Tensor y = torch::stable::empty(shape, x.scalar_type());
  const Output output = make_output(y, x.scalar_type(), bias_data, post_op, others);
  const int32_t* feature_of = perm_data(perm, g.k);
  const int64_t rows = x.numel() / g.k;
  if (rows == 0 || g.n == 0) return y;

  WoqPlan plan =
      make_plan(g, {type, int32_t(lowp_mode), int32_t(act_quant_mode), h.group_size, rows, kernels().bf16_dot});
  const Buffer memory = make_buffer(staged_bytes(plan) + 64);
  place_buffers(plan, reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64)));
  stage(g, plan, {rows_of_x.const_data_ptr(), type, feature_of, plan.range_scope, nullptr, &g, &plan.staged});

  multiply({&g, static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof h, &plan.staged, output});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> woq_quantize(Tensor weight, int64_t dtype, int64_t group_size, bool symmetric) {
  check_cpu("weight", weight);
  IPEX_QUANT_CHECK(weight.dim() == 2, "weight: expected 2 dimensions, got shape ", shape_of(weight));
  const FloatType type = float_type("weight", weight.scalar_type());
  const int64_t n = weight.size(0), k = weight.size(1);
  check_scheme(n, k, dtype, group_size, !symmetric);
  const WoqGeometry g(int32_t(dtype), n, k, group_size, !symmetric, false);
  const Tensor rows = torch::stable::contiguous(weight);
  Tensor codes = empty({n, g.four_bit() ? (k + 1) / 2 : k}, code_type(dtype));
  Tensor scales = empty({n, g.groups}, ScalarType::Float);
  Tensor zero_points = empty({symmetric ? 0 : n, g.groups}, ScalarType::Short);
  const QuantizeArgs args{rows.const_data_ptr(),
                          type,
                          g.dtype,
                          symmetric,
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

int64_t isa_active() { return active_isa(); }
int64_t isa_supported() { return supported_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(ipex_quant, m) {
  m.def(
      "woq_pack(Tensor codes, Tensor scales, Tensor? zero_points, Tensor? perm, int in_features, int dtype, "
      "int group_size) -> Tensor");
  m.def(
      "woq_unpack(Tensor packed, Tensor? perm, int out_features, int in_features, int dtype, int group_size, "
      "bool asymmetric) -> (Tensor, Tensor, Tensor)");
  m.def(
      "woq_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? perm, Tensor[] others, int out_features, "
      "int lowp_mode, int act_quant_mode, int post_op) -> Tensor");
  m.def("woq_quantize(Tensor weight, int dtype, int group_size, bool symmetric) -> (Tensor, Tensor, Tensor)");
  m.def("isa_active() -> int");
  m.def("isa_supported() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("woq_pack", TORCH_BOX(&woq_pack));
  m.impl("woq_unpack", TORCH_BOX(&woq_unpack));
  m.impl("woq_linear", TORCH_BOX(&woq_linear));
  m.impl("woq_quantize", TORCH_BOX(&woq_quantize));
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CompositeExplicitAutograd, m) {
  m.impl("isa_active", TORCH_BOX(&isa_active));
  m.impl("isa_supported", TORCH_BOX(&isa_supported));
}

}  // namespace ipex_quant

// Importing ipex_quant._C runs the registrations above; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
