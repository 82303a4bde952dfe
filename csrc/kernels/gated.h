// activation(x) * y, each rounded to the type of x as eager code does.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// A vector at a time, the activation being known to the compiler: the polynomials then overlap between vectors.
template <FloatType Type, PostOp Activation>
inline void gated_run(const GatedArgs& args, int64_t from, int64_t to, int64_t length) {
  for_each_run(length, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
    const vf x = load_run(args.x, Type, from + i, count);
    const vf gate = Activation == kSilu ? silu(x) : Activation == kGelu ? gelu_erf(x) : gelu_tanh(x);
    store_run(args.out, Type, to + i, count, mul_f(round_to(gate, Type), load_run(args.y, Type, from + i, count)));
  });
}

template <FloatType Type>
inline void gated_typed_run(const GatedArgs& args, int64_t from, int64_t to, int64_t length) {
  if (args.activation == kSilu) return gated_run<Type, kSilu>(args, from, to, length);
  if (args.activation == kGelu) return gated_run<Type, kGelu>(args, from, to, length);
  gated_run<Type, kNewGelu>(args, from, to, length);
}

// Elements [begin, end) of the result.
inline void gated_product(const GatedArgs& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / args.columns, column = begin % args.columns, left = args.columns - column;
    const int64_t length = end - begin < left ? end - begin : left, from = row * args.stride + column;
    if (args.type == kFloat32)
      gated_typed_run<kFloat32>(args, from, begin, length);
    else if (args.type == kBFloat16)
      gated_typed_run<kBFloat16>(args, from, begin, length);
    else
      gated_typed_run<kFloat16>(args, from, begin, length);
    begin += length;
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
