// Depthwise convolution of unsigned activations with signed codes, at one place of the result.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// The input of `kLanes` output channels from `column` on, of which `count` exist.
inline vi depthwise_input(const DepthwiseArgs& args, const uint8_t* pixel, int64_t column, int64_t count) {
  if (args.multiplier == 1 && count == kLanes) return load_u8(pixel + column);
  uint8_t channels[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) channels[i] = pixel[(column + i) / args.multiplier];
  return load_u8(channels);
}

inline vi depthwise_codes(const int8_t* codes, int64_t count) {
  if (count == kLanes) return load_s8(codes);
  int8_t bytes[kLanes] = {};
  std::memcpy(bytes, codes, size_t(count));
  return load_s8(bytes);
}

// Sums of `Vectors` vectors of channels. What the padding holds is the zero point, which adds nothing.
template <int Vectors>
inline void depthwise_sums(const DepthwiseArgs& args, int64_t n, int64_t column, int64_t count, int32_t* sums) {
  const vi zero = set1_i(args.zero_point);
  vi acc[Vectors];
  unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { acc[v] = zero_i(); });
  for (int64_t tap = 0; tap < args.taps; ++tap) {
    const uint8_t* pixel = args.pixels[tap];
    if (!pixel) continue;
    const int8_t* codes = args.codes + tap * n + column;
    unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE {
      const int64_t at = v * kLanes, left = count - at < kLanes ? count - at : kLanes;
      const vi x = sub_i(depthwise_input(args, pixel, column + at, left), zero);
      acc[v] = add_i(acc[v], mul_i(x, depthwise_codes(codes + at, left)));
    });
  }
  unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { store_i(sums + v * kLanes, acc[v]); });
}

inline void depthwise_row(const DepthwiseArgs& args, const Output& output, int64_t row) {
  constexpr int kVectors = 4;
  const vf scale = set1_f(args.scale);
  for (int64_t column = 0; column < output.n; column += kTileN) {
    const int64_t count = output.n - column < kTileN ? output.n - column : kTileN;
    int32_t sums[kTileN];
    float y[kTileN];
    int64_t at = 0;
    for (; at + kVectors * kLanes <= count; at += kVectors * kLanes)
      depthwise_sums<kVectors>(args, output.n, column + at, kVectors * kLanes, sums + at);
    for (; at < count; at += kLanes)
      depthwise_sums<1>(args, output.n, column + at, count - at < kLanes ? count - at : kLanes, sums + at);
    for (int64_t i = 0; i < count; i += kLanes) {
      const vf weight_scale =
          load_run(args.weight_scales, kFloat32, column + i, count - i < kLanes ? count - i : kLanes);
      store_f(y + i, mul_f(cvt_f(load_i(sums + i)), mul_f(scale, weight_scale)));
    }
    finish_row(output, row, column, y);
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
