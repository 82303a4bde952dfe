// Norms, rotary embeddings and gated activations: schema, argument checks, memory and threads. A decode step calls
// these many times with one row, where the cost is that of the call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention.h"

namespace ipex_quant {
namespace {

constexpr int64_t kTaskElements = int64_t(1) << 15;  // fewer do not pay for a thread

Tensor empty_as(const Tensor& x) { return empty_in_dtype_of(x, x.sizes().data()); }

bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

void check_like_x(const char* name, const Tensor& t, const Tensor& x) {
  check_cpu(name, t);
  IPEX_QUANT_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, ",
                   torch::headeronly::toString(x.scalar_type()), ", got ",
                   torch::headeronly::toString(t.scalar_type()));
  IPEX_QUANT_CHECK(same_shape(t, x), name, ": expected the shape of x, ", shape_of(x), ", got ", shape_of(t));
}

// ------------------------------------------------------------------------------------------------------- norms
// The weight and bias of a norm, and the kernel's arguments made of them.
struct Norm {
  std::optional<Tensor> weight, bias;
  NormArgs args{};

  Norm(const Tensor& x, std::optional<Tensor> weight_, std::optional<Tensor> bias_, double eps, bool centered)
      : weight(std::move(weight_)), bias(std::move(bias_)) {
    check_cpu("x", x);
    args.type = args.weight_type = float_type("x", x.scalar_type());
    IPEX_QUANT_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x: expected shape [..., K] with K > 0, got ",
                     shape_of(x));
    args.k = x.size(x.dim() - 1);
    args.eps = float(eps);
    args.centered = centered;
    args.weight = vector("weight", weight, x);
    args.bias = vector("bias", bias, x);
    IPEX_QUANT_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(),
                     "bias: expected the dtype of weight, ", torch::headeronly::toString(weight->scalar_type()),
                     ", got ", torch::headeronly::toString(bias->scalar_type()));
  }

  const void* vector(const char* name, std::optional<Tensor>& t, const Tensor& x) {
    if (!t) return nullptr;
    check_cpu(name, *t);
    t = as_contiguous(*t);
    const void* data = norm_vector(name, *t, x.scalar_type(), args.k);
    args.weight_type = float_type(name, t->scalar_type());
    return data;
  }

  Tensor run(const Tensor& x) {
    const Tensor rows = as_contiguous(x);
    Tensor y = empty_as(x);
    args.x = rows.const_data_ptr();
    args.y = y.mutable_data_ptr();
    const KernelTable& table = kernels();
    parallel(x.numel() / args.k, 1 + kTaskElements / args.k,
             [&](int64_t begin, int64_t end) { table.norm_rows(args, begin, end); });
    return y;
  }

  std::tuple<Tensor, Tensor> run_after_add(const Tensor& x, const Tensor& residual) {
    check_like_x("residual", residual, x);
    const Tensor residual_rows = as_contiguous(residual);
    Tensor sum = empty_as(x);
    args.residual = residual_rows.const_data_ptr();
    args.sum = sum.mutable_data_ptr();
    return {run(x), sum};
  }
};

Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps) {
  return Norm(x, std::move(weight), std::nullopt, eps, false).run(x);
}

Tensor layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  return Norm(x, std::move(weight), std::move(bias), eps, true).run(x);
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps) {
  return Norm(x, std::move(weight), std::nullopt, eps, false).run_after_add(x, residual);
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, std::optional<Tensor> weight,
                                          std::optional<Tensor> bias, double eps) {
  return Norm(x, std::move(weight), std::move(bias), eps, true).run_after_add(x, residual);
}

// ------------------------------------------------------------------------------------------- rotary embeddings
void check_table(const char* name, const Tensor& t, const RotaryInput& x, int64_t rotary_dim) {
  check_float32_or(name, t, x.dtype);
  const bool fits = t.dim() == 3 && (t.size(0) == 1 || t.size(0) == x.batch) && t.size(1) == x.length &&
                    (t.size(2) == rotary_dim || t.size(2) == rotary_dim / 2);
  IPEX_QUANT_CHECK(fits, name, ": expected shape [1 or ", x.batch, ", ", x.length, ", ", rotary_dim, " or ",
                   rotary_dim / 2, "], got ", shape_of(t));
}

Tensor rotary(Tensor x, Tensor cos, Tensor sin, int64_t rotary_dim, bool interleaved) {
  check_cpu("x", x);
  IPEX_QUANT_CHECK(x.dim() == 4, "x: expected shape [batch, length, heads, head dimension], got ", shape_of(x));
  const Tensor rows = x.size(3) == 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
  RotaryArgs args = rotary_args({rows.const_data_ptr(),
                                 x.scalar_type(),
                                 x.size(0),
                                 x.size(1),
                                 x.size(2),
                                 x.size(3),
                                 {rows.stride(0), rows.stride(1), rows.stride(2)}},
                                cos, sin, rotary_dim, interleaved);
  Tensor y = empty_as(x);
  if (y.numel() == 0) return y;
  args.y = y.mutable_data_ptr();
  const KernelTable& table = kernels();
  parallel(x.size(0) * x.size(1), 1 + kTaskElements / (x.size(2) * x.size(3)),
           [&](int64_t begin, int64_t end) { table.rotate_positions(args, begin, end); });
  return y;
}

// ---------------------------------------------------------------------------------------------- gated products
void multiply_gated(const GatedArgs& args, int64_t count) {
  const KernelTable& table = kernels();
  parallel(count, kTaskElements / 4, [&](int64_t begin, int64_t end) { table.gated_product(args, begin, end); });
}

Tensor gated_product(Tensor x, Tensor y, int64_t activation) {
  const PostOp act = check_activation(activation);
  check_cpu("x", x);
  const FloatType type = float_type("x", x.scalar_type());
  check_like_x("y", y, x);
  const Tensor gates = as_contiguous(x), factors = as_contiguous(y);
  Tensor out = empty_as(x);
  const int64_t count = x.numel();
  multiply_gated({gates.const_data_ptr(), factors.const_data_ptr(), type, act, count, count, out.mutable_data_ptr()},
                 count);
  return out;
}

Tensor gated_product_halves(Tensor xy, int64_t activation) {
  const PostOp act = check_activation(activation);
  check_cpu("xy", xy);
  const FloatType type = float_type("xy", xy.scalar_type());
  IPEX_QUANT_CHECK(xy.dim() >= 1 && xy.size(xy.dim() - 1) % 2 == 0, "xy: expected shape [..., 2 * N], got ",
                   shape_of(xy));
  std::vector<int64_t> shape(xy.sizes().begin(), xy.sizes().end());
  const int64_t stride = shape.back(), columns = stride / 2;
  shape.back() = columns;
  const Tensor rows = as_contiguous(xy);
  Tensor out = empty_in_dtype_of(xy, shape.data());
  const uint8_t* gates = static_cast<const uint8_t*>(rows.const_data_ptr());
  multiply_gated({gates, gates + columns * float_size(type), type, act, columns, stride, out.mutable_data_ptr()},
                 xy.numel() / 2);
  return out;
}

}  // namespace

RotaryArgs rotary_args(const RotaryInput& x, Tensor& cos, Tensor& sin, int64_t rotary_dim, bool interleaved) {
  const FloatType type = float_type("x", x.dtype);
  IPEX_QUANT_CHECK(rotary_dim >= 0 && rotary_dim <= x.dim && rotary_dim % 2 == 0,
                   "rotary_dim: expected an even number up to ", x.dim, ", got ", rotary_dim);
  check_table("cos", cos, x, rotary_dim);
  check_table("sin", sin, x, rotary_dim);
  IPEX_QUANT_CHECK(same_shape(cos, sin) && cos.scalar_type() == sin.scalar_type(), "sin: expected shape ",
                   shape_of(cos), " and dtype ", torch::headeronly::toString(cos.scalar_type()), " as cos has, got ",
                   shape_of(sin), " and ", torch::headeronly::toString(sin.scalar_type()));
  cos = as_contiguous(cos);
  sin = as_contiguous(sin);
  const int64_t columns = cos.size(2);
  return {x.data,
          type,
          {x.strides[0], x.strides[1], x.strides[2]},
          x.length,
          x.heads,
          x.dim,
          rotary_dim,
          cos.const_data_ptr(),
          sin.const_data_ptr(),
          float_type("cos", cos.scalar_type()),
          cos.size(0) == 1 ? 0 : x.length * columns,
          columns,
          interleaved,
          nullptr};
}

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved) -> Tensor");
  m.def("gated_product(Tensor x, Tensor y, int activation) -> Tensor");
  m.def("gated_product_halves(Tensor xy, int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("gated_product", TORCH_BOX(&gated_product));
  m.impl("gated_product_halves", TORCH_BOX(&gated_product_halves));
}

}  // namespace ipex_quant
