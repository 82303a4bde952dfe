// Round-to-nearest quantization of a float weight, in one pass over each group. The formulas, and their order of
// operations, are those of ipex_quant/numerics/affine.py: both give the same bits.
#pragma once

#include "kernels/weights.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr float kZeroScale = 1.1920928955078125e-7f;              // of a group of zeros
constexpr float kLowestScale = 0x1p-126f;                         // whose inverse is finite
constexpr float kLowestHalf = 0x1p-14f, kHighestHalf = 65504.0f;  // of its normal numbers

// Magnitudes of the values that the ends of a group get.
struct GroupEnds {
  float low, high;
};
inline GroupEnds group_ends(int32_t dtype) {
  switch (dtype) {
    case kNf4:
      return {1.0f, 1.0f};
    case kFp8:
      return {448.0f, 448.0f};
    case kFp4:
      return {12.0f, 12.0f};
    case kBnbFp4:
      return {192.0f, 192.0f};
    case kIq4:
      return {127.0f, 113.0f};
    default:
      return {float((1 << (code_bits(dtype) - 1)) - 1), float((1 << (code_bits(dtype) - 1)) - 1)};
  }
}

// Index of the nearest of increasing levels; a midpoint belongs to the lower one.
template <class Level>
inline vi level_codes(vf x, int count, Level level) {
  vi code = zero_i();
  for (int i = 0; i + 1 < count; ++i) {
    const float midpoint = (level(i + 1) + level(i)) / 2;
    code = add_i(code, srl_i<31>(as_i(sub_f(set1_f(midpoint), x))));
  }
  return code;
}
inline vi nf4_codes(vf x) {
  return level_codes(x, 16, [](int i) { return kNf4Levels[i]; });
}
inline vi iq4_codes(vf x) {
  return level_codes(x, 16, [](int i) { return float(kIq4Bytes[i]); });
}
// Of a table whose upper half has the values of the lower one with a minus.
template <class Level>
inline vi signed_codes(vf x, Level level) {
  const vi sign = and_i(srl_i<28>(as_i(x)), set1_i(8));
  const vf magnitude = as_f(and_i(as_i(x), set1_i(0x7FFFFFFF)));
  return or_i(sign, level_codes(magnitude, 8, level));
}
inline vi fp4_codes(vf x) {
  return signed_codes(x, [](int i) { return float(kFp4Bytes[i]); });
}
inline vi bnb_fp4_codes(vf x) {
  static constexpr uint8_t kOrder[16] = {0, 1, 6, 7, 4, 5, 2, 3, 8, 9, 14, 15, 12, 13, 10, 11};  // by magnitude
  return lookup(make_byte_lut16(kOrder), signed_codes(x, [](int i) { return float(kBnbFp4Levels[kOrder[i]]); }));
}

inline vi e4m3_codes(vf x) {
  const vi bits = as_i(x), magnitude = and_i(bits, set1_i(0x7FFFFFFF));
  const vi half = add_i(set1_i(0x7FFFF), and_i(srl_i<20>(magnitude), set1_i(1)));  // ties to even
  const vi normal = sub_i(srl_i<20>(add_i(magnitude, half)), set1_i(120 << 3));
  const vi subnormal = round_i(mul_f(as_f(magnitude), set1_f(512.0f)));
  const vi is_normal = max_i(sub_i(magnitude, set1_i(0x3C7FFFFF)), zero_i());  // |x| >= 2^-6
  const vi code = as_i(if_zero(is_normal, as_f(subnormal), as_f(normal)));
  return or_i(code, and_i(srl_i<24>(bits), set1_i(0x80)));
}

// Codes of x = w / scale, one to a lane; `zero` is added to integer codes, which are stored as unsigned bytes.
inline vi weight_codes(int32_t dtype, vf x, int32_t zero) {
  if (dtype == kNf4) return nf4_codes(x);
  if (dtype == kFp8) return e4m3_codes(x);
  if (dtype == kFp4) return fp4_codes(x);
  if (dtype == kIq4) return iq4_codes(x);
  if (dtype == kBnbFp4) return bnb_fp4_codes(x);
  const vi code = add_i(round_i(x), set1_i(zero));
  if (dtype == kInt8) return max_i(min_i(code, set1_i(127)), set1_i(-128));
  return max_i(min_i(code, set1_i((1 << code_bits(dtype)) - 1)), zero_i());
}

inline bool quantize_group(const QuantizeArgs& args, int64_t row, int64_t group, int64_t groups, uint8_t* codes) {
  const int64_t begin = group * args.group;
  const int64_t length = args.k - begin < args.group ? args.k - begin : args.group, at = row * args.k + begin;
  const auto load = [&](int64_t k) {
    const int64_t left = length - k;
    return left >= kLanes ? load_float(args.weight, args.type, at + k)
                          : load_tail(args.weight, args.type, at + k, left);
  };
  vi magnitude = zero_i();
  vf lowest = zero_f(), highest = zero_f();
  for (int64_t k = 0; k < length; k += kLanes) {
    const vf w = load(k);
    magnitude = max_i(magnitude, and_i(as_i(w), set1_i(0x7FFFFFFF)));
    lowest = min_f(w, lowest);
    highest = max_f(w, highest);
  }
  const int32_t largest = reduce_max(magnitude);
  const float mn = reduce_min(lowest), mx = reduce_max(highest);
  const GroupEnds ends = group_ends(args.dtype);
  const float span = args.symmetric ? (-mn > mx ? -mn : mx) : mx - mn;
  if (largest >= 0x7F800000 || span > 3.40282347e38f) return false;

  const float low = -mn / ends.low, high = mx / ends.high;
  float scale = args.symmetric ? (low > high ? low : high) : span / float((1 << code_bits(args.dtype)) - 1);
  if (scale < kLowestScale) scale = span > 0.0f ? kLowestScale : kZeroScale;
  if (args.half_scales && scale >= kLowestHalf && scale <= kHighestHalf)
    scale = reduce_max(round_to_half(set1_f(scale)));
  int32_t zero = args.dtype == kInt8 ? 0 : 1 << (code_bits(args.dtype) - 1);
  if (!args.symmetric) {
    zero = (args.dtype == kInt8 ? -128 : 0) - int32_t(__builtin_rintf(mn / scale));
    args.zero_points[row * groups + group] = int16_t(zero);
  }
  args.scales[row * groups + group] = scale;
  const vf inverse = set1_f(1.0f / scale);
  for (int64_t k = 0; k < length; k += kLanes) {
    uint8_t bytes[kLanes];
    store_u8(bytes, weight_codes(args.dtype, mul_f(load(k), inverse), zero));
    const int64_t left = length - k;
    std::memcpy(codes + begin + k, bytes, left < kLanes ? left : kLanes);
  }
  return true;
}

inline bool quantize_rows(const QuantizeArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t groups = (args.k + args.group - 1) / args.group;
  const bool two_a_byte = code_bits(args.dtype) <= 4;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group)
      if (!quantize_group(args, row, group, groups, scratch)) return false;
    if (!two_a_byte) {
      std::memcpy(args.codes + row * args.k, scratch, args.k);
      continue;
    }
    scratch[args.k] = 0;  // the spare nibble of an odd row
    uint8_t* out = args.codes + row * ((args.k + 1) / 2);
    for (int64_t k = 0; k < args.k; k += 2) out[k / 2] = uint8_t(scratch[k] | scratch[k + 1] << 4);
  }
  return true;
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
