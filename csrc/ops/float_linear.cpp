// Linears with float weights: schema, argument checks, memory and threads.
#include <torch/csrc/stable/library.h>

#include "ops/call.h"

namespace ipex_quant {
namespace {

constexpr int64_t kThreadProducts = int64_t(1) << 16;  // fewer do not pay for a thread

void check_bias(const Tensor& bias, ScalarType dtype, int64_t n) {
  check_cpu("bias", bias);
  IPEX_QUANT_CHECK(bias.scalar_type() == dtype, "bias: expected the dtype of x, ", torch::headeronly::toString(dtype),
                   ", got ", torch::headeronly::toString(bias.scalar_type()));
  IPEX_QUANT_CHECK(bias.dim() == 1 && bias.size(0) == n, "bias: expected shape [", n, "], got ", shape_of(bias));
}

Tensor float_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::vector<Tensor> others, int64_t post_op) {
  check_cpu("x", x);
  const FloatType type = float_type("x", x.scalar_type());
  check_tensor("weight", weight, x.scalar_type(), 2);
  const int64_t n = weight.size(0), k = weight.size(1);
  IPEX_QUANT_CHECK(k > 0, "weight: expected shape [N, K] with K > 0, got ", shape_of(weight));
  IPEX_QUANT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected shape [..., ", k, "], got ", shape_of(x));
  check_post_op(post_op, others.size());
  if (bias) {
    check_bias(*bias, x.scalar_type(), n);
    bias = as_contiguous(*bias);
  }

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor y = empty_in_dtype_of(x, shape.data());
  const Output output = make_output(y, x.scalar_type(), nullptr, post_op, others);
  const int64_t rows = x.numel() / k, staged_k = staged_float_k(k);
  if (rows == 0 || n == 0) return y;

  const Tensor rows_of_x = as_contiguous(x);
  const Buffer memory = make_buffer(4 * rows * staged_k + 64);
  float* staged = reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64));
  const KernelTable& table = kernels();
  const FloatStageArgs stage{rows_of_x.const_data_ptr(), type, k, staged};
  parallel(rows, 1 + kThreadProducts / k,
           [&](int64_t begin, int64_t end) { table.stage_float_rows(stage, begin, end); });
  const FloatLinearArgs args{staged, rows, k, weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, output};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + rows * n * k / kThreadProducts);
  parallel_streams((n + kTileN - 1) / kTileN, threads, [&](auto next) {
    for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
      for (int64_t tile = tasks.begin; tile < tasks.end; ++tile) table.float_tile(args, tile);
  });
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("float_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] others, int post_op) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("float_linear", TORCH_BOX(&float_linear)); }

}  // namespace
}  // namespace ipex_quant
