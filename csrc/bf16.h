// Arithmetic on bf16 as the instructions of x86 do it: denormals are zero, both those that come and those that result.
#pragma once

#include <cstdint>
#include <cstring>

namespace ipex_quant {

// Not shared between files: each keeps a copy compiled with its own flags.
static inline float flush_denormal(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}

static inline float bf16_to_float(uint32_t half) {
  const uint32_t bits = half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Rounds to nearest even; a NaN stays one.
static inline uint32_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline float fma_bf16(uint32_t a, uint32_t b, float c) {
  return flush_denormal(
      __builtin_fmaf(flush_denormal(bf16_to_float(a)), flush_denormal(bf16_to_float(b)), flush_denormal(c)));
}

}  // namespace ipex_quant
