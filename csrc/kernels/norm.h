// Norms of rows: root mean square and layer norm, with a residual sum before them where there is one.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// The sum of term(i, count) over runs of at most kLanes elements, in several accumulators to hide their latency.
template <class F>
IPEX_QUANT_INLINE inline float sum_terms(int64_t length, F term) {
  constexpr int kSums = 4;
  vf sums[kSums];
  for (vf& sum : sums) sum = zero_f();
  int64_t i = 0;
  for (; i + kSums * kLanes <= length; i += kSums * kLanes)
    unroll<kSums>([&](auto s) IPEX_QUANT_INLINE { sums[s] = add_f(sums[s], term(i + s * kLanes, kLanes)); });
  for (; i < length; i += kLanes) sums[0] = add_f(sums[0], term(i, length - i < kLanes ? length - i : kLanes));
  return reduce_add(add_f(add_f(sums[0], sums[1]), add_f(sums[2], sums[3])));
}

// x with zeros from lane `count` on.
inline vf keep_lanes(vf x, int64_t count) {
  if (count == kLanes) return x;
  float buffer[kLanes];
  store_f(buffer, x);
  for (int64_t i = count; i < kLanes; ++i) buffer[i] = 0.0f;
  return load_f(buffer);
}

template <FloatType Type, FloatType WeightType, bool Centered>
inline void norm_row(const NormArgs& args, int64_t row) {
  const int64_t k = args.k, at = row * k;
  const void* x = args.x;
  if (args.residual) {
    for_each_run(k, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
      const vf sum = add_f(load_run(x, Type, at + i, count), load_run(args.residual, Type, at + i, count));
      store_run(args.sum, Type, at + i, count, sum);
    });
    x = args.sum;
  }
  const auto load = [&](int64_t i, int64_t count) IPEX_QUANT_INLINE { return load_run(x, Type, at + i, count); };
  vf mean = zero_f();
  if constexpr (Centered) mean = set1_f(sum_terms(k, load) / float(k));
  const float squares = sum_terms(k, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
    const vf centered = Centered ? keep_lanes(sub_f(load(i, count), mean), count) : load(i, count);
    return mul_f(centered, centered);
  });
  const vf scale = set1_f(1.0f / __builtin_sqrtf(squares / float(k) + args.eps));
  for_each_run(k, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
    const vf value = load(i, count);
    vf y = mul_f(Centered ? sub_f(value, mean) : value, scale);
    // A weight of x's dtype multiplies what was rounded to it, as transformers' LlamaRMSNorm has it.
    if (!Centered && WeightType == Type && args.offset == 0.0f) y = round_to(y, Type);
    if (args.weight) y = mul_f(y, add_f(load_run(args.weight, WeightType, i, count), set1_f(args.offset)));
    if (args.bias) y = add_f(y, load_run(args.bias, WeightType, i, count));
    store_run(args.y, Type, at + i, count, y);
  });
}

template <FloatType Type, FloatType WeightType>
inline void norm_typed_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.centered)
      norm_row<Type, WeightType, true>(args, row);
    else
      norm_row<Type, WeightType, false>(args, row);
  }
}

inline void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  const bool same = args.weight_type == args.type;
  if (args.type == kFloat32) return norm_typed_rows<kFloat32, kFloat32>(args, begin, end);
  if (args.type == kBFloat16)
    return same ? norm_typed_rows<kBFloat16, kBFloat16>(args, begin, end)
                : norm_typed_rows<kBFloat16, kFloat32>(args, begin, end);
  same ? norm_typed_rows<kFloat16, kFloat16>(args, begin, end) : norm_typed_rows<kFloat16, kFloat32>(args, begin, end);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
