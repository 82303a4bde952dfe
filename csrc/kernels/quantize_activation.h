// Activations to unsigned bytes: with given multipliers and zero point, or with a scale of its own for every row.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/stage.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Calls f(vector, i, count) for a row of x; count is below kLanes only at its end, where the vector is filled with
// zeros.
template <FloatType Type, class F>
IPEX_QUANT_INLINE inline void for_each_activation(const void* x, int64_t begin, int64_t length, F f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(load_float(x, Type, begin + i), i, kLanes);
  if (i < length) f(load_tail(x, Type, begin + i, length - i), i, length - i);
}

template <FloatType Type>
inline void quantize_row_static(const QuantizeActivationArgs& args, int64_t row) {
  const CodeRange range(args.zero_point);
  uint8_t* codes = args.codes + row * args.stride;
  for_each_activation<Type>(args.x, row * args.k, args.k, [&](vf x, int64_t i, int64_t count) IPEX_QUANT_INLINE {
    const vf multiplier =
        count == kLanes ? load_f(args.multiplier + i) : load_tail(args.multiplier, kFloat32, i, count);
    store_codes(codes + i, range.codes(mul_f(x, multiplier)), count);
  });
}

template <FloatType Type>
inline void quantize_row_dynamic(const QuantizeActivationArgs& args, int64_t row) {
  // As integers, the bits of |x| order like |x| with NaN on top, so that their maximum does not lose a NaN.
  vi magnitude = zero_i();
  vf low = zero_f(), high = zero_f();
  for_each_activation<Type>(args.x, row * args.k, args.k, [&](vf x, int64_t, int64_t) IPEX_QUANT_INLINE {
    magnitude = max_i(magnitude, and_i(as_i(x), set1_i(0x7FFFFFFF)));
    low = min_f(x, low);
    high = max_f(x, high);
  });
  const float largest = bits_to_float(reduce_max(magnitude));
  const Range range = largest != largest ? Range{0.0f, largest} : Range{reduce_min(low), reduce_max(high)};
  const ActQuantizer quantizer(range, false);
  args.scales[row] = quantizer.scale;
  args.zero_points[row] = quantizer.zero;
  uint8_t* codes = args.codes + row * args.stride;
  for_each_activation<Type>(args.x, row * args.k, args.k, [&](vf x, int64_t i, int64_t count) IPEX_QUANT_INLINE {
    store_codes(codes + i, quantizer(x), count);
  });
}

template <FloatType Type>
inline void quantize_typed_rows(const QuantizeActivationArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (args.multiplier)
      quantize_row_static<Type>(args, row);
    else
      quantize_row_dynamic<Type>(args, row);
  }
}

inline void quantize_activation(const QuantizeActivationArgs& args, int64_t begin, int64_t end) {
  if (args.type == kFloat32) return quantize_typed_rows<kFloat32>(args, begin, end);
  if (args.type == kBFloat16) return quantize_typed_rows<kBFloat16>(args, begin, end);
  quantize_typed_rows<kFloat16>(args, begin, end);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
