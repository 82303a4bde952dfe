// Typed loads and stores, and the activation functions of the fused epilogues.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

inline vf load_float(const void* base, FloatType type, int64_t i) {
  const uint8_t* p = static_cast<const uint8_t*>(base) + i * float_size(type);
  if (type == kFloat32) return load_f(reinterpret_cast<const float*>(p));
  return type == kBFloat16 ? load_bf16(p) : load_half(p);
}

inline void store_float(void* base, FloatType type, int64_t i, vf x) {
  uint8_t* p = static_cast<uint8_t*>(base) + i * float_size(type);
  if (type == kFloat32)
    store_f(reinterpret_cast<float*>(p), x);
  else if (type == kBFloat16)
    store_bf16(p, x);
  else
    store_half(p, x);
}

inline vf round_to(vf x, FloatType type) {
  return type == kFloat32 ? x : type == kBFloat16 ? round_to_bf16(x) : round_to_half(x);
}

// The first `count` < kLanes elements; the others are zero.
inline vf load_tail(const void* base, FloatType type, int64_t i, int64_t count) {
  float buffer[kLanes] = {};
  std::memcpy(buffer, static_cast<const uint8_t*>(base) + i * float_size(type), count * float_size(type));
  return load_float(buffer, type, 0);
}

inline void store_tail(void* base, FloatType type, int64_t i, int64_t count, vf x) {
  float buffer[kLanes];
  store_float(buffer, type, 0, x);
  std::memcpy(static_cast<uint8_t*>(base) + i * float_size(type), buffer, count * float_size(type));
}

// `count` <= kLanes elements.
IPEX_QUANT_INLINE inline vf load_run(const void* base, FloatType type, int64_t i, int64_t count) {
  return count == kLanes ? load_float(base, type, i) : load_tail(base, type, i, count);
}
IPEX_QUANT_INLINE inline void store_run(void* base, FloatType type, int64_t i, int64_t count, vf x) {
  if (count == kLanes) return store_float(base, type, i, x);
  store_tail(base, type, i, count, x);
}

// Calls f(i, count) for runs of kLanes elements, of which the last may be shorter.
template <class F>
IPEX_QUANT_INLINE inline void for_each_run(int64_t length, F f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, kLanes);
  if (i < length) f(i, length - i);
}

// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, with a degree 6 Taylor polynomial: relative error below 2e-7.
inline vf exp_f(vf x) {
  x = max_f(set1_f(-87.0f), min_f(set1_f(89.0f), x));  // exp(89) comes out as infinity, NaN as NaN
  const vi n = round_i(mul_f(x, set1_f(1.44269504f)));
  const vf nf = cvt_f(n);
  vf r = fma_f(nf, set1_f(-0.693359375f), x);  // ln(2) in two parts
  r = fma_f(nf, set1_f(2.12194440e-4f), r);
  constexpr float kTaylor[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  vf p = set1_f(1.0f / 720);
  for (const float c : kTaylor) p = fma_f(p, r, set1_f(c));
  return mul_f(p, as_f(sll_i<23>(add_i(n, set1_i(127)))));
}

inline vf silu(vf x) { return div_f(x, add_f(set1_f(1.0f), exp_f(sub_f(zero_f(), x)))); }

// Relative error below 2e-7: where x is small x + x^3 * p(x^2), with a minimax polynomial, else 1 - 2 / (exp(2x) + 1).
inline vf tanh_f(vf x) {
  const vi sign = and_i(as_i(x), set1_i(int32_t(0x80000000)));
  const vf a = as_f(and_i(as_i(x), set1_i(0x7FFFFFFF))), square = mul_f(x, x), one = set1_f(1.0f);
  constexpr float kPowers[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  vf p = set1_f(-5.70498872745e-3f);
  for (const float c : kPowers) p = fma_f(p, square, set1_f(c));
  const vf small = fma_f(mul_f(square, x), p, x);
  const vf large = sub_f(one, div_f(set1_f(2.0f), add_f(exp_f(add_f(a, a)), one)));
  const vi above = max_i(sub_i(as_i(a), as_i(set1_f(0.625f))), zero_i());  // 0 up to there
  return if_zero(above, small, as_f(or_i(as_i(large), sign)));
}

inline vf gelu_tanh(vf x) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u))
  const vf cubic = mul_f(mul_f(x, x), mul_f(x, set1_f(0.044715f)));
  const vf u = mul_f(add_f(x, cubic), set1_f(0.7978845608f));
  return div_f(x, add_f(set1_f(1.0f), exp_f(mul_f(u, set1_f(-2.0f)))));
}

// 0.5 x erfc(-x / sqrt(2)), erfc by formula 7.1.26 of Abramowitz and Stegun (absolute error 1.5e-7).
inline vf gelu_erf(vf x) {
  const vf a = mul_f(as_f(and_i(as_i(x), set1_i(0x7FFFFFFF))), set1_f(0.70710678f));
  const vf t = div_f(set1_f(1.0f), fma_f(a, set1_f(0.3275911f), set1_f(1.0f)));
  constexpr float kErfc[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  vf p = set1_f(1.061405429f);
  for (const float c : kErfc) p = fma_f(p, t, set1_f(c));
  const vf erfc = mul_f(mul_f(p, t), exp_f(sub_f(zero_f(), mul_f(a, a))));
  const vf half_x = mul_f(x, set1_f(0.5f));
  const vi negative = and_i(as_i(x), set1_i(int32_t(0x80000000)));
  return mul_f(half_x, if_zero(negative, sub_f(set1_f(2.0f), erfc), erfc));
}

// What follows a sum that has its bias.
struct Epilogue {
  PostOp op;
  FloatType type;

  vf apply(vf x, vf first, vf second) const {
    if (op == kNone) return x;
    x = round_to(x, type);
    switch (op) {
      case kRelu:
        return max_f(zero_f(), x);
      case kRelu2:
        x = max_f(zero_f(), x);
        return mul_f(x, x);
      case kGelu:
        return gelu_erf(x);
      case kNewGelu:
        return gelu_tanh(x);
      case kSilu:
        return silu(x);
      case kAdd:
        return add_f(x, first);
      case kAddAdd:
        return add_f(round_to(add_f(x, first), type), second);
      default:
        return mul_f(x, first);
    }
  }
};

// The low bytes of the first `count` <= kLanes lanes.
inline void store_codes(uint8_t* to, vi codes, int64_t count) {
  if (count == kLanes) return store_u8(to, codes);
  uint8_t buffer[kLanes];
  store_u8(buffer, codes);
  std::memcpy(to, buffer, count);
}

// Codes clamp(round(x) + zero_point, 0, 255). The clamp comes first, since an integer conversion overflows; NaN gives
// 0.
struct CodeRange {
  vf low, high;
  vi zero;

  explicit CodeRange(int32_t zero_point)
      : low(set1_f(float(-zero_point))), high(set1_f(float(255 - zero_point))), zero(set1_i(zero_point)) {}
  vi codes(vf x) const { return add_i(round_i(min_f(max_f(x, low), high)), zero); }
};

// The columns of one row that a tile covers, the first of them being `column`.
inline void finish_row(const Output& output, int64_t row, int64_t column, const float* acc) {
  const int64_t count = output.n - column < kTileN ? output.n - column : kTileN, at = row * output.stride + column;
  const Epilogue epilogue{output.post_op, output.type};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t left = count - i;
    const bool whole = left >= kLanes;
    const auto load = [&](const void* p, FloatType type, int64_t index) {
      if (!p) return zero_f();
      return whole ? load_float(p, type, index) : load_tail(p, type, index, left);
    };
    vf x = load_f(acc + i);
    if (output.bias) x = add_f(x, load(output.bias, kFloat32, column + i));
    x = epilogue.apply(x, load(output.others[0], output.type, at + i), load(output.others[1], output.type, at + i));
    if (whole)
      store_float(output.y, output.type, at + i, x);
    else
      store_tail(output.y, output.type, at + i, left, x);
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
