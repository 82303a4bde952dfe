// IEEE binary16 in integer arithmetic, for where no instruction converts it.
#pragma once

#include <cstdint>
#include <cstring>

namespace ipex_quant {

// Not shared between files: each keeps a copy compiled with its own flags.
static inline float half_to_float(uint32_t half) {
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3FF;
  float x = float(mantissa) * 0x1p-24f;
  if (exponent) {
    const uint32_t bits = (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
    std::memcpy(&x, &bits, 4);
  }
  return half & 0x8000 ? -x : x;
}

// Rounds to nearest even.
static inline uint32_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // rounds to 2^16 or more
  if (magnitude < 0x38800000) return sign | uint32_t(__builtin_rintf(__builtin_fabsf(x) * 0x1p24f));
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | ((rounded >> 13) - (112u << 10));
}

}  // namespace ipex_quant
