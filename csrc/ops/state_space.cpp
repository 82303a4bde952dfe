// Convolutions and scans of selective state space models: schema, argument checks, memory and threads.
#include <torch/csrc/stable/library.h>

#include "ops/call.h"

namespace ipex_quant {
namespace {

constexpr int64_t kTaskProducts = int64_t(1) << 16;  // fewer do not pay for a thread

constexpr int64_t kMaxTaps = int64_t(1) << 16;

// The elements of a tensor whose dimensions are the `places` of four; the others have stride 0. None if it is absent.
StridedFloats floats_of(const char* name, const Tensor& t, std::initializer_list<int> places) {
  check_cpu(name, t);
  StridedFloats x{const_cast<void*>(t.const_data_ptr()), float_type(name, t.scalar_type()), {}};
  int64_t dimension = 0;
  for (const int place : places) x.strides[place] = t.stride(dimension++);
  return x;
}
StridedFloats floats_of(const char* name, const std::optional<Tensor>& t, std::initializer_list<int> places) {
  return t ? floats_of(name, *t, places) : StridedFloats{};
}

void check_sizes(const char* name, const Tensor& t, const char* shape, std::initializer_list<int64_t> sizes) {
  IPEX_QUANT_CHECK(t.dim() == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin()), name,
                   ": expected shape ", shape, " as the others have it, got ", shape_of(t));
}
void check_sizes(const char* name, const std::optional<Tensor>& t, const char* shape,
                 std::initializer_list<int64_t> sizes) {
  if (t) check_sizes(name, *t, shape, sizes);
}

// A new contiguous tensor like x, [batch, channels..., length].
Tensor output_of(const Tensor& x, StridedFloats& y) {
  Tensor out = empty_in_dtype_of(x, x.sizes().data());
  y = {out.mutable_data_ptr(), float_type("x", x.scalar_type()), {}};
  return out;
}

// Calls f(batch, begin, end, scratch) for the channels of every group of every sequence, some at a time; `products` are
// those of a channel.
template <class F>
void each_chunk(int64_t batch, int64_t channels, int64_t group, int64_t products, int64_t scratch_bytes, F f) {
  const int64_t chunks = (group + kScanChannels - 1) / kScanChannels, groups = group ? channels / group : 0;
  const int64_t grain = 1 + kTaskProducts / (1 + products * std::min(group, kScanChannels));
  parallel(batch * groups * chunks, grain, [&](int64_t first, int64_t last) {
    const Buffer scratch = make_buffer(scratch_bytes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t chunk = i % chunks, base = i / chunks % groups * group;
      f(i / chunks / groups, base + chunk * group / chunks, base + (chunk + 1) * group / chunks, scratch.get());
    }
  });
}

// ---------------------------------------------------------------------------------------------------- convolutions
Tensor convolve(ConvolveArgs args, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_sizes("bias", bias, "[D]", {args.channels});
  args.x = floats_of("x", x, {0, 2, 3});
  args.weight = floats_of("weight", weight, {2, 3});
  args.bias = floats_of("bias", bias, {2});
  Tensor y = output_of(x, args.y);
  const KernelTable& table = kernels();
  each_chunk(x.size(0), args.channels, args.channels, args.length * args.width, convolve_scratch(args),
             [&](int64_t batch, int64_t begin, int64_t end, uint8_t* scratch) {
               table.convolve_channels(args, batch, begin, end, scratch);
             });
  return y;
}

ConvolveArgs sizes_of(const Tensor& x, const Tensor& weight) {
  IPEX_QUANT_CHECK(x.dim() == 3, "x: expected shape [B, D, L], got ", shape_of(x));
  IPEX_QUANT_CHECK(weight.dim() == 2 && weight.size(0) == x.size(1) && weight.size(1) > 0 && weight.size(1) <= kMaxTaps,
                   "weight: expected shape [", x.size(1), ", W] with W in 1..", kMaxTaps, ", got ", shape_of(weight));
  ConvolveArgs args{};
  args.channels = x.size(1);
  args.length = x.size(2);
  args.width = weight.size(1);
  return args;
}

Tensor causal_conv1d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> before, bool silu) {
  ConvolveArgs args = sizes_of(x, weight);
  args.silu = silu;
  args.columns = args.width - 1;
  check_sizes("before", before, "[B, D, W - 1]", {x.size(0), args.channels, args.columns});
  args.state = floats_of("before", before, {0, 2, 3});
  return convolve(args, x, weight, bias);
}

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, std::optional<Tensor> bias,
                            std::optional<Tensor> starts, bool silu) {
  ConvolveArgs args = sizes_of(x, weight);
  args.silu = silu;
  args.update = true;
  IPEX_QUANT_CHECK(state.dim() == 3 && state.size(0) == x.size(0) && state.size(1) == args.channels &&
                       state.size(2) >= args.width - 1,
                   "state: expected shape [", x.size(0), ", ", args.channels, ", ", args.width - 1, " or more], got ",
                   shape_of(state));
  args.columns = state.size(2);
  if (starts) {
    check_tensor("starts", *starts, ScalarType::Long, 1);
    check_sizes("starts", starts, "[B]", {x.size(0)});
    args.starts = static_cast<const int64_t*>(starts->const_data_ptr());
  }
  args.state = floats_of("state", state, {0, 2, 3});
  args.state.data = state.mutable_data_ptr();
  return convolve(args, x, weight, bias);
}

// ------------------------------------------------------------------------------------------------------------ scan
void check_factors(const char* name, const Tensor& t, const ScanArgs& args, int64_t batch) {
  IPEX_QUANT_CHECK(t.dim() == 4 && t.size(0) == batch && t.size(1) == args.groups && t.size(2) == args.states &&
                       t.size(3) == args.length,
                   name, ": expected shape [", batch, ", ", args.groups, ", ", args.states, ", ", args.length,
                   "], got ", shape_of(t));
}

Tensor selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, std::optional<Tensor> d,
                      std::optional<Tensor> z, std::optional<Tensor> delta_bias, bool softplus, Tensor state) {
  IPEX_QUANT_CHECK(u.dim() == 4, "u: expected shape [B, H, P, L], got ", shape_of(u));
  IPEX_QUANT_CHECK(a.dim() == 3, "a: expected shape [H, P, N], got ", shape_of(a));
  IPEX_QUANT_CHECK(b.dim() == 4, "b: expected shape [B, G, N, L], got ", shape_of(b));
  ScanArgs args{};
  const int64_t batch = u.size(0);
  args.heads = u.size(1), args.features = u.size(2), args.length = u.size(3);
  args.states = a.size(2), args.groups = b.size(1);
  args.softplus = softplus;
  check_sizes("delta", delta, "[B, H, P, L]", {batch, args.heads, args.features, args.length});
  check_sizes("z", z, "[B, H, P, L]", {batch, args.heads, args.features, args.length});
  check_sizes("a", a, "[H, P, N]", {args.heads, args.features, args.states});
  check_sizes("state", state, "[B, H, P, N]", {batch, args.heads, args.features, args.states});
  check_sizes("d", d, "[H, P]", {args.heads, args.features});
  check_sizes("delta_bias", delta_bias, "[H, P]", {args.heads, args.features});
  IPEX_QUANT_CHECK(args.groups > 0 && args.heads % args.groups == 0, "b: expected a number of groups that divides the ",
                   args.heads, " heads, got ", args.groups);
  check_factors("b", b, args, batch);
  check_factors("c", c, args, batch);
  args.u = floats_of("u", u, {0, 1, 2, 3});
  args.delta = floats_of("delta", delta, {0, 1, 2, 3});
  args.z = floats_of("z", z, {0, 1, 2, 3});
  args.a = floats_of("a", a, {1, 2, 3});
  args.b = floats_of("b", b, {0, 1, 2, 3});
  args.c = floats_of("c", c, {0, 1, 2, 3});
  args.d = floats_of("d", d, {1, 2});
  args.delta_bias = floats_of("delta_bias", delta_bias, {1, 2});
  args.state = floats_of("state", state, {0, 1, 2, 3});
  args.state.data = state.mutable_data_ptr();
  Tensor y = output_of(u, args.y);
  const KernelTable& table = kernels();
  each_chunk(batch, args.channels(), args.group_channels(), 8 * args.length * (args.states + 8),
             scan_scratch(args, std::min(args.group_channels(), kScanChannels)),
             [&](int64_t sequence, int64_t begin, int64_t end, uint8_t* scratch) {
               table.scan_channels(args, sequence, begin, end, scratch);
             });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? before, bool silu) -> Tensor");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? starts, bool silu) "
      "-> Tensor");
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, "
      "bool softplus, Tensor(a!) state) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
}

}  // namespace ipex_quant
