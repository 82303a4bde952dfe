// simd.h in portable C++: the oracle of the other levels, and what other architectures run. With IPEX_QUANT_EMULATED it
// has the vectors of AVX-512 with BF16, so that the kernels over these run on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "half.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

#if defined(IPEX_QUANT_EMULATED)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
constexpr bool kPortable = true;
struct vf {
  float v[kLanes];
};
struct vi {
  uint32_t v[kLanes];  // unsigned, so that wrap-around is defined
};

#define IPEX_QUANT_EACH(Result, expression)             \
  Result r;                                             \
  for (int i = 0; i < kLanes; ++i) r.v[i] = expression; \
  return r

inline vf set1_f(float x) { IPEX_QUANT_EACH(vf, x); }
inline vf load_f(const float* p) {  // which need not be aligned
  vf r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_f(float* p, vf x) { std::memcpy(p, x.v, sizeof x.v); }
inline vf fma_f(vf a, vf b, vf c) { IPEX_QUANT_EACH(vf, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline vf mul_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] * b.v[i]); }
inline vf add_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] + b.v[i]); }
inline vf sub_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] - b.v[i]); }
inline vf div_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] / b.v[i]); }
inline vf min_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline vf max_f(vf a, vf b) { IPEX_QUANT_EACH(vf, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }

inline int32_t to_signed(uint32_t x) {
  int32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline vi set1_i(int32_t x) { IPEX_QUANT_EACH(vi, uint32_t(x)); }
inline vi load_i(const void* p) {
  vi r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_i(void* p, vi x) { std::memcpy(p, x.v, sizeof x.v); }
inline vi add_i(vi a, vi b) { IPEX_QUANT_EACH(vi, a.v[i] + b.v[i]); }
inline vi sub_i(vi a, vi b) { IPEX_QUANT_EACH(vi, a.v[i] - b.v[i]); }
inline vi mul_i(vi a, vi b) { IPEX_QUANT_EACH(vi, a.v[i] * b.v[i]); }
inline vi max_i(vi a, vi b) { IPEX_QUANT_EACH(vi, to_signed(a.v[i]) > to_signed(b.v[i]) ? a.v[i] : b.v[i]); }
inline vi min_i(vi a, vi b) { IPEX_QUANT_EACH(vi, to_signed(a.v[i]) < to_signed(b.v[i]) ? a.v[i] : b.v[i]); }
inline vi and_i(vi a, vi b) { IPEX_QUANT_EACH(vi, a.v[i] & b.v[i]); }
inline vi or_i(vi a, vi b) { IPEX_QUANT_EACH(vi, a.v[i] | b.v[i]); }
inline vi sub_i8(vi a, vi b) {
  uint8_t x[4 * kLanes], y[4 * kLanes];
  store_i(x, a), store_i(y, b);
  for (int i = 0; i < 4 * kLanes; ++i) x[i] = uint8_t(x[i] - y[i]);
  return load_i(x);
}
template <int Bits>
inline vi srl_i(vi x) {
  IPEX_QUANT_EACH(vi, x.v[i] >> Bits);
}
inline vi srl_i(vi x, int bits) { IPEX_QUANT_EACH(vi, x.v[i] >> bits); }
template <int Bits>
inline vi sll_i(vi x) {
  IPEX_QUANT_EACH(vi, x.v[i] << Bits);
}
inline vf if_zero(vi test, vf yes, vf no) { IPEX_QUANT_EACH(vf, test.v[i] ? no.v[i] : yes.v[i]); }

inline vf cvt_f(vi x) { IPEX_QUANT_EACH(vf, float(to_signed(x.v[i]))); }
// Out of range and NaN give INT_MIN, as the x86 conversion does.
inline vi round_i(vf x) {
  IPEX_QUANT_EACH(vi, x.v[i] >= -2147483648.0f && x.v[i] < 2147483648.0f ? uint32_t(int32_t(__builtin_rintf(x.v[i])))
                                                                         : 0x80000000u);
}
inline vf as_f(vi x) {
  vf r;
  std::memcpy(r.v, x.v, sizeof r.v);
  return r;
}
inline vi as_i(vf x) { return load_i(x.v); }

inline vi load_u8(const void* p) { IPEX_QUANT_EACH(vi, static_cast<const uint8_t*>(p)[i]); }
inline vi load_s8(const void* p) { IPEX_QUANT_EACH(vi, static_cast<const int8_t*>(p)[i]); }
inline vi load_u16(const void* p) {
  uint16_t h[kLanes];
  std::memcpy(h, p, sizeof h);
  IPEX_QUANT_EACH(vi, h[i]);
}
inline void store_u8(void* p, vi x) {
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = uint8_t(x.v[i]);
}
inline void store_u16(void* p, vi x) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = uint16_t(x.v[i]);
  std::memcpy(p, h, sizeof h);
}

inline float reduce_add(vf x) {
  float r = 0.0f;
  for (const float lane : x.v) r += lane;
  return r;
}
inline float reduce_min(vf x) {
  float r = x.v[0];
  for (const float lane : x.v) r = lane < r ? lane : r;
  return r;
}
inline float reduce_max(vf x) {
  float r = x.v[0];
  for (const float lane : x.v) r = lane > r ? lane : r;
  return r;
}
inline int32_t reduce_add(vi x) {
  uint32_t r = 0;
  for (const uint32_t lane : x.v) r += lane;
  return to_signed(r);
}
inline int32_t reduce_max(vi x) {
  int32_t r = to_signed(x.v[0]);
  for (const uint32_t lane : x.v) r = to_signed(lane) > r ? to_signed(lane) : r;
  return r;
}

inline vf load_half(const void* p) {
  const vi h = load_u16(p);
  IPEX_QUANT_EACH(vf, half_to_float(h.v[i]));
}
inline vf load_e5m2(const void* p) {
  IPEX_QUANT_EACH(vf, half_to_float(uint32_t(static_cast<const uint8_t*>(p)[i]) << 8));
}
inline void store_half(void* p, vf x) {
  vi h;
  for (int i = 0; i < kLanes; ++i) h.v[i] = float_to_half(x.v[i]);
  store_u16(p, h);
}
inline vf round_to_half(vf x) { IPEX_QUANT_EACH(vf, half_to_float(float_to_half(x.v[i]))); }

struct Lut16 {
  float v[16];
};
inline Lut16 make_lut16(const float* table) {
  Lut16 r;
  std::memcpy(r.v, table, sizeof r.v);
  return r;
}
inline vf lookup(const Lut16& table, vi index) { IPEX_QUANT_EACH(vf, table.v[index.v[i] & 15]); }
struct ByteLut16 {
  uint8_t v[16];
};
inline ByteLut16 make_byte_lut16(const uint8_t* table) {
  ByteLut16 r;
  std::memcpy(r.v, table, sizeof r.v);
  return r;
}
inline vi lookup(const ByteLut16& table, vi index) {
  uint8_t bytes[4 * kLanes];
  store_i(bytes, index);
  for (uint8_t& b : bytes) b = table.v[b & 15];
  return load_i(bytes);
}

struct E4m3Lut {};
inline E4m3Lut make_e4m3_lut() { return {}; }
template <bool Odd>
inline vi e4m3_pairs(const E4m3Lut&, vi bytes) {
  const auto bf16 = [](uint32_t byte) {
    const uint32_t magnitude = byte & 0x7F;
    return (byte & 0x80) << 8 | (magnitude < 8 ? kE4m3Subnormals[magnitude] : (magnitude << 4) + kE4m3Bias);
  };
  IPEX_QUANT_EACH(vi, bf16(bytes.v[i] >> 8 * Odd) | bf16(bytes.v[i] >> (16 + 8 * Odd)) << 16);
}

inline void transpose(vi (&x)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const uint32_t lane = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = lane;
    }
}
inline void transpose_quads(vi (&x)[4]) {
  for (int q = 0; q < kLanes; q += 4)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const uint32_t lane = x[i].v[q + j];
        x[i].v[q + j] = x[j].v[q + i];
        x[j].v[q + i] = lane;
      }
}
template <int I>
inline vi spread_quads(vi x) {
  IPEX_QUANT_EACH(vi, x.v[i / 4 * 4 + I]);
}
inline vi columns_of_quads(vi x) { IPEX_QUANT_EACH(vi, x.v[i % (kLanes / 4) * 4 + i / (kLanes / 4)]); }
inline vi sum_quads(const vi (&x)[kLanes / 4]) {
  vi r{};
  for (int i = 0; i < kLanes; ++i)
    for (int q = 0; q < kLanes; q += 4) r.v[i] += x[i / 4].v[i % 4 + q];
  return r;
}
inline vi sum_quads(const vf (&x)[kLanes / 4]) {
  vf r{};
  for (int i = 0; i < kLanes; ++i)
    for (int q = 0; q < kLanes; q += 4) r.v[i] += x[i / 4].v[i % 4 + q];
  return as_i(r);
}
inline vi reduce_lanes(const vi (&x)[kLanes]) { IPEX_QUANT_EACH(vi, uint32_t(reduce_add(x[i]))); }
inline vf reduce_lanes(const vf (&x)[kLanes]) { IPEX_QUANT_EACH(vf, reduce_add(x[i])); }
inline vi load_quads(const void* a, const void* b, const void* c, const void* d) {
  const uint8_t* const rows[] = {static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b),
                                 static_cast<const uint8_t*>(c), static_cast<const uint8_t*>(d)};
  uint8_t bytes[4 * kLanes];
  for (int i = 0; i < 4 * kLanes; ++i) bytes[i] = rows[i % 4][i / 4];
  return load_i(bytes);
}

template <bool Narrow>
using U8 = vi;
template <bool Narrow>
using S8 = vi;
template <bool Narrow>
inline vi as_u8(vi x) {
  return x;
}
template <bool Narrow>
inline vi as_s8(vi x) {
  return x;
}
template <bool Narrow>
inline void dot(vi& acc, const vi& u8, const vi& s8) {
  for (int i = 0; i < kLanes; ++i)
    for (int shift = 0; shift < 32; shift += 8)
      acc.v[i] += uint32_t(int32_t(u8.v[i] >> shift & 0xFF) * int32_t(int8_t(s8.v[i] >> shift & 0xFF)));
}

#if defined(IPEX_QUANT_EMULATED)
#define IPEX_QUANT_BF16_DOT 1
struct Halves {
  uint16_t v[2 * kLanes];
};
inline Halves load_halves(const void* p) {
  Halves r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline vi and_or_i(vi x, vi mask, vi bits) { return or_i(and_i(x, mask), bits); }
inline vi make_bf16_lut32(const uint16_t* table) { return load_i(table); }
inline vi lookup_bf16(vi table, vi index) {
  const Halves levels = load_halves(table.v);
  Halves r = load_halves(index.v);
  for (uint16_t& half : r.v) half = levels.v[half & 31];
  return load_i(r.v);
}
inline void dot_bf16(vf& acc, vi a, vi b) {  // the upper products first, as VDPBF16PS
  for (int i = 0; i < kLanes; ++i) {
    acc.v[i] = fma_bf16(a.v[i] >> 16, b.v[i] >> 16, acc.v[i]);
    acc.v[i] = fma_bf16(a.v[i] & 0xFFFF, b.v[i] & 0xFFFF, acc.v[i]);
  }
}
inline void interleave_bf16(const void* a, const void* b, vi& first, vi& second) {
  const Halves x = load_halves(a), y = load_halves(b);
  for (int i = 0; i < kLanes; ++i) {
    first.v[i] = x.v[i] | uint32_t(y.v[i]) << 16;
    second.v[i] = x.v[kLanes + i] | uint32_t(y.v[kLanes + i]) << 16;
  }
}
inline void store_bf16_operand(void* p, vf x) {
  uint16_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = uint16_t(float_to_bf16(flush_denormal(x.v[i])));
  std::memcpy(p, h, sizeof h);
}
#endif
#undef IPEX_QUANT_EACH

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
