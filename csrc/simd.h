// The only file with intrinsics. Each ISA level compiles it into a namespace of its own (IPEX_QUANT_ISA_NS); the
// kernels are written once over the names below. Nothing here may call an out-of-line std:: template: the linker could
// keep the copy that was compiled for a newer CPU.
//
//   vf, vi            kLanes floats / kLanes int32 (or 4 * kLanes bytes)
//   U8, S8            byte operands of dot(); Narrow promises |u8 * s8 + u8 * s8| < 2^15, which AVX2 can exploit
//   Lut16, ByteLut16  16-entry tables indexed by the low four bits of a lane / of every byte
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// ---------------------------------------------------------------------------------------------------- AVX-512 VNNI
#if defined(__AVX512VNNI__)
constexpr int64_t kLanes = 16;
using vf = __m512;
using vi = __m512i;

inline vf set1_f(float x) { return _mm512_set1_ps(x); }
inline vf load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf fma_f(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf mul_f(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf add_f(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub_f(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf div_f(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf min_f(vf a, vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
inline vf max_f(vf a, vf b) { return _mm512_max_ps(a, b); }

inline vi set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline vi load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i(void* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi add_i(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi mul_i(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi max_i(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline vi min_i(vi a, vi b) { return _mm512_min_epi32(a, b); }
inline vi and_i(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi or_i(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi sub_i8(vi a, vi b) { return _mm512_sub_epi8(a, b); }
template <int Bits>
inline vi srl_i(vi x) {
  return _mm512_srli_epi32(x, Bits);
}
template <int Bits>
inline vi sll_i(vi x) {
  return _mm512_slli_epi32(x, Bits);
}
template <int Bits>
inline vi sra_i(vi x) {
  return _mm512_srai_epi32(x, Bits);
}
inline vf if_zero(vi test, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_testn_epi32_mask(test, test), no, yes); }

inline vf cvt_f(vi x) { return _mm512_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm512_cvtps_epi32(x); }
inline vf as_f(vi x) { return _mm512_castsi512_ps(x); }
inline vi as_i(vf x) { return _mm512_castps_si512(x); }

inline vi load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vi load_u16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline void store_u8(void* p, vi x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
inline void store_u16(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
inline vf load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline void store_half(void* p, vf x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline vf round_to_half(vf x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

inline float reduce_add(vf x) { return _mm512_reduce_add_ps(x); }
inline float reduce_min(vf x) { return _mm512_reduce_min_ps(x); }
inline float reduce_max(vf x) { return _mm512_reduce_max_ps(x); }
inline int32_t reduce_add(vi x) { return _mm512_reduce_add_epi32(x); }
inline int32_t reduce_max(vi x) { return _mm512_reduce_max_epi32(x); }

using Lut16 = vf;
inline Lut16 make_lut16(const float* table) { return _mm512_loadu_ps(table); }
inline vf lookup(const Lut16& table, vi index) { return _mm512_permutexvar_ps(index, table); }
using ByteLut16 = vi;
inline ByteLut16 make_byte_lut16(const uint8_t* table) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline vi lookup(const ByteLut16& table, vi index) { return _mm512_shuffle_epi8(table, index); }

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
// GCC 12 spills the accumulators of a tile written with _mm512_dpbusd_epi32 and halves its speed; not so with asm.
template <bool Narrow>
inline void dot(vi& acc, vi u8, vi s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}

#if defined(__AVX512BF16__)
#define IPEX_QUANT_BF16_DOT 1
inline vi and_or_i(vi x, vi mask, vi bits) { return _mm512_ternarylogic_epi32(x, mask, bits, 0xEA); }
// 32-entry table of bf16, indexed by the low five bits of every 16-bit lane.
inline vi make_bf16_lut32(const uint16_t* table) { return load_i(table); }
inline vi lookup_bf16(vi table, vi index) { return _mm512_permutexvar_epi16(index, table); }
inline void dot_bf16(vf& acc, vi a, vi b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
#endif

// ------------------------------------------------------------------------------------------------------------ AVX2
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
using vf = __m256;
using vi = __m256i;

inline vf set1_f(float x) { return _mm256_set1_ps(x); }
inline vf load_f(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf fma_f(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf mul_f(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf add_f(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub_f(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf div_f(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf min_f(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf max_f(vf a, vf b) { return _mm256_max_ps(a, b); }

inline vi set1_i(int32_t x) { return _mm256_set1_epi32(x); }
inline vi load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_i(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline vi add_i(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi sub_i(vi a, vi b) { return _mm256_sub_epi32(a, b); }
inline vi mul_i(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
inline vi max_i(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline vi min_i(vi a, vi b) { return _mm256_min_epi32(a, b); }
inline vi and_i(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi or_i(vi a, vi b) { return _mm256_or_si256(a, b); }
inline vi sub_i8(vi a, vi b) { return _mm256_sub_epi8(a, b); }
template <int Bits>
inline vi srl_i(vi x) {
  return _mm256_srli_epi32(x, Bits);
}
template <int Bits>
inline vi sll_i(vi x) {
  return _mm256_slli_epi32(x, Bits);
}
template <int Bits>
inline vi sra_i(vi x) {
  return _mm256_srai_epi32(x, Bits);
}
inline vf if_zero(vi test, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(test, _mm256_setzero_si256())));
}

inline vf cvt_f(vi x) { return _mm256_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm256_cvtps_epi32(x); }
inline vf as_f(vi x) { return _mm256_castsi256_ps(x); }
inline vi as_i(vf x) { return _mm256_castps_si256(x); }

inline vi load_u8(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline vi load_u16(const void* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline __m128i low_u16(vi x) {  // the low 16 bits of every lane
  x = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline void store_u16(void* p, vi x) { _mm_storeu_si128(static_cast<__m128i*>(p), low_u16(x)); }
inline void store_u8(void* p, vi x) {
  const __m128i words = _mm_and_si128(low_u16(x), _mm_set1_epi16(0xFF));
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline vf load_half(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline void store_half(void* p, vf x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline vf round_to_half(vf x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

// Combines the two halves of a vector, then lanes 0 and 2, then 0 and 1.
template <class F>
inline __m128i fold_lanes(vi x, F combine) {
  __m128i y = combine(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = combine(y, _mm_shuffle_epi32(y, 0x4E));
  return combine(y, _mm_shuffle_epi32(y, 0xB1));
}
template <class F>
inline float fold_floats(vf x, F combine) {
  const __m128i y = fold_lanes(_mm256_castps_si256(x), [&](__m128i a, __m128i b) {
    return _mm_castps_si128(combine(_mm_castsi128_ps(a), _mm_castsi128_ps(b)));
  });
  return _mm_cvtss_f32(_mm_castsi128_ps(y));
}
inline float reduce_add(vf x) {
  return fold_floats(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float reduce_min(vf x) {
  return fold_floats(x, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
}
inline float reduce_max(vf x) {
  return fold_floats(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
inline int32_t reduce_add(vi x) {
  return _mm_cvtsi128_si32(fold_lanes(x, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); }));
}
inline int32_t reduce_max(vi x) {
  return _mm_cvtsi128_si32(fold_lanes(x, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); }));
}

struct Lut16 {
  vf low, high;
};
inline Lut16 make_lut16(const float* table) { return {load_f(table), load_f(table + 8)}; }
inline vf lookup(const Lut16& table, vi index) {
  const vf bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          bit3);
}
using ByteLut16 = vi;
inline ByteLut16 make_byte_lut16(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline vi lookup(const ByteLut16& table, vi index) { return _mm256_shuffle_epi8(table, index); }

#if defined(__AVXVNNI__)
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
inline void dot(vi& acc, vi u8, vi s8) {
  acc = _mm256_dpbusd_avx_epi32(acc, u8, s8);
}
#else
// Without VNNI vpmaddubsw does narrow products; its int16 pair sums would saturate on wide ones, which go through
// 16-bit even and odd halves instead.
template <bool Narrow>
struct Bytes {
  vi all;
};
template <>
struct Bytes<false> {
  vi even, odd;
};
template <bool Narrow>
using U8 = Bytes<Narrow>;
template <bool Narrow>
using S8 = Bytes<Narrow>;
template <bool Narrow>
inline Bytes<Narrow> as_u8(vi x) {
  if constexpr (Narrow)
    return {x};
  else
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(x, 8)};
}
template <bool Narrow>
inline Bytes<Narrow> as_s8(vi x) {
  if constexpr (Narrow)
    return {x};
  else
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
template <bool Narrow>
inline void dot(vi& acc, const Bytes<Narrow>& u8, const Bytes<Narrow>& s8) {
  if constexpr (Narrow) {
    const vi pairs = _mm256_maddubs_epi16(u8.all, s8.all);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(u8.even, s8.even));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(u8.odd, s8.odd));
  }
}
#endif

// --------------------------------------------------------------------------------------------------------- generic
#else
constexpr int64_t kLanes = 8;
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
inline vf load_f(const float* p) { IPEX_QUANT_EACH(vf, p[i]); }
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
template <int Bits>
inline vi sll_i(vi x) {
  IPEX_QUANT_EACH(vi, x.v[i] << Bits);
}
template <int Bits>
inline vi sra_i(vi x) {
  IPEX_QUANT_EACH(vi, uint32_t(to_signed(x.v[i]) >> Bits));
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

// IEEE binary16 by hand: no type for it is portable in C++17.
inline float half_to_float(uint32_t h) {
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3FF;
  float x;
  if (exponent == 0) {
    x = float(mantissa) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
    std::memcpy(&x, &bits, 4);
  }
  return h & 0x8000 ? -x : x;
}
inline uint32_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // rounds to 2^16 or more
  if (magnitude < 0x38800000) return sign | uint32_t(__builtin_rintf(__builtin_fabsf(x) * 0x1p24f));
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | ((rounded >> 13) - (112u << 10));
}
inline vf load_half(const void* p) {
  const vi h = load_u16(p);
  IPEX_QUANT_EACH(vf, half_to_float(h.v[i]));
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
#undef IPEX_QUANT_EACH
#endif

// --------------------------------------------------------------------------------------------------- on every level
constexpr int64_t kVectorBytes = 4 * kLanes;

// Loops over the registers of a tile, unrolled by templates: an accumulator array stays in registers only if every
// index is a constant before the compiler's first passes. A lambda body is marked with IPEX_QUANT_INLINE.
#define IPEX_QUANT_INLINE __attribute__((always_inline))
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int Count, int I = 0, class F>
IPEX_QUANT_INLINE inline void unroll(F&& f) {
  if constexpr (I < Count) {
    f(Index<I>{});
    unroll<Count, I + 1>(f);
  }
}
template <int Rows, int Columns, class F>
IPEX_QUANT_INLINE inline void unroll2(F&& f) {
  unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { unroll<Columns>([&](auto v) IPEX_QUANT_INLINE { f(m, v); }); });
}

inline vf zero_f() { return set1_f(0.0f); }
inline vi zero_i() { return set1_i(0); }

inline vi broadcast4(const void* p) {  // four bytes to every lane
  int32_t bytes;
  std::memcpy(&bytes, p, 4);
  return set1_i(bytes);
}

inline vf load_bf16(const void* p) { return as_f(sll_i<16>(load_u16(p))); }
// Round to nearest even, to the upper half of the bits; a NaN stays one.
inline vi bf16_bits(vf x) {
  const vi bits = as_i(x);
  const vi rounded = add_i(bits, add_i(set1_i(0x7FFF), and_i(srl_i<16>(bits), set1_i(1))));
  const vi magnitude = and_i(bits, set1_i(0x7FFFFFFF));
  const vi above_infinity = max_i(sub_i(magnitude, set1_i(0x7F800000)), zero_i());  // 0 unless NaN
  return as_i(if_zero(above_infinity, as_f(rounded), as_f(or_i(bits, set1_i(0x00400000)))));
}
inline vf round_to_bf16(vf x) { return as_f(and_i(bf16_bits(x), set1_i(int32_t(0xFFFF0000)))); }
inline void store_bf16(void* p, vf x) { store_u16(p, srl_i<16>(bf16_bits(x))); }

inline float bits_to_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
