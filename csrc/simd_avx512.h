// simd.h for AVX-512 with VNNI, and BF16 where the file is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int64_t kLanes = 16;
constexpr bool kPortable = false;
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
inline vi srl_i(vi x, int bits) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(bits)); }
template <int Bits>
inline vi sll_i(vi x) {
  return _mm512_slli_epi32(x, Bits);
}
inline vf if_zero(vi test, vf yes, vf no) { return _mm512_mask_blend_ps(_mm512_testn_epi32_mask(test, test), no, yes); }

inline vf cvt_f(vi x) { return _mm512_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm512_cvtps_epi32(x); }
inline vf as_f(vi x) { return _mm512_castsi512_ps(x); }
inline vi as_i(vf x) { return _mm512_castps_si512(x); }

inline vi load_u8(const void* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vi load_s8(const void* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline vi load_u16(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline void store_u8(void* p, vi x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
inline void store_u16(void* p, vi x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x)); }
inline vf load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline vf load_e5m2(const void* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(bytes, 8));
}
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

// What to add to exponent and mantissa where they stand in bf16: by the low five bits of a word, if it is subnormal.
struct E4m3Words {
  uint16_t more[32] = {};
  constexpr E4m3Words() {
    for (int i = 0; i < 8; ++i) more[i] = uint16_t(kE4m3Subnormals[i] - (i << 4));
  }
};
struct E4m3Lut {
  vi more;
};
inline E4m3Lut make_e4m3_lut() {
  static constexpr E4m3Words words;
  return {load_i(words.more)};
}
template <bool Odd>
inline vi e4m3_pairs(const E4m3Lut& lut, vi bytes) {
  const vi upper = Odd ? bytes : _mm512_slli_epi16(bytes, 8), lower = Odd ? _mm512_srli_epi16(bytes, 8) : bytes;
  const __mmask32 subnormal = _mm512_testn_epi16_mask(upper, _mm512_set1_epi16(0x7800));
  const vi more = _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(kE4m3Bias), subnormal, lower, lut.more);
  const vi placed = _mm512_and_si512(_mm512_srai_epi16(upper, 4), _mm512_set1_epi16(int16_t(0x87F0)));
  return _mm512_add_epi16(placed, more);
}

inline void transpose_quads(vi (&x)[4]) {
  const vi a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const vi c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}
inline vi columns_of_quads(vi x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}
inline void transpose(vi (&x)[kLanes]) {
  vi quads[4][4];
  unroll<4>([&](auto g) IPEX_QUANT_INLINE {
    unroll<4>([&](auto i) IPEX_QUANT_INLINE { quads[g][i] = x[4 * g + i]; });
    transpose_quads(quads[g]);
  });
  unroll<4>([&](auto c) IPEX_QUANT_INLINE {
    const vi low = _mm512_shuffle_i32x4(quads[0][c], quads[1][c], 0x44);
    const vi high = _mm512_shuffle_i32x4(quads[0][c], quads[1][c], 0xEE);
    const vi low2 = _mm512_shuffle_i32x4(quads[2][c], quads[3][c], 0x44);
    const vi high2 = _mm512_shuffle_i32x4(quads[2][c], quads[3][c], 0xEE);
    x[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    x[8 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
    x[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  });
}
template <int I>
inline vi spread_quads(vi x) {
  return _mm512_shuffle_epi32(x, _MM_PERM_ENUM(I * 0x55));
}
template <class Add, class V>
inline vi sum_quads_by(const V (&x)[4], Add add) {
  const auto across = [&](vi a, vi b) IPEX_QUANT_INLINE {
    return add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  return across(across(vi(x[0]), vi(x[1])), across(vi(x[2]), vi(x[3])));
}
// Halves the number of vectors twice within quads, then twice across them.
template <class Add, class V>
inline vi reduce_lanes_by(const V (&x)[kLanes], Add add) {
  vi y[8], z[4];
  unroll<8>([&](auto i) IPEX_QUANT_INLINE {
    const vi a = vi(x[2 * i]), b = vi(x[2 * i + 1]);
    y[i] = add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  });
  unroll<4>([&](auto i) IPEX_QUANT_INLINE {
    z[i] = add(_mm512_unpacklo_epi64(y[2 * i], y[2 * i + 1]), _mm512_unpackhi_epi64(y[2 * i], y[2 * i + 1]));
  });
  return sum_quads_by(z, add);
}
constexpr auto kAddLanes = [](vi a, vi b) IPEX_QUANT_INLINE { return add_i(a, b); };
constexpr auto kAddFloatLanes = [](vi a, vi b) IPEX_QUANT_INLINE { return as_i(add_f(as_f(a), as_f(b))); };
inline vi reduce_lanes(const vi (&x)[kLanes]) { return reduce_lanes_by(x, kAddLanes); }
inline vf reduce_lanes(const vf (&x)[kLanes]) { return as_f(reduce_lanes_by(x, kAddFloatLanes)); }
inline vi sum_quads(const vi (&x)[kLanes / 4]) { return sum_quads_by(x, kAddLanes); }
inline vi sum_quads(const vf (&x)[kLanes / 4]) { return sum_quads_by(x, kAddFloatLanes); }
inline vi load_quads(const void* a, const void* b, const void* c, const void* d) {
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  vi x = _mm512_inserti32x4(_mm512_castsi128_si512(load(a)), load(b), 1);
  x = _mm512_inserti32x4(_mm512_inserti32x4(x, load(c), 2), load(d), 3);
  // Four by four dwords, then within each 128-bit lane four by four bytes.
  return _mm512_shuffle_epi8(
      columns_of_quads(x), _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
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
inline void interleave_bf16(const void* a, const void* b, vi& first, vi& second) {
  const vi low = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                   0x280008, 0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F);
  const vi x = load_i(a), y = load_i(b);
  first = _mm512_permutex2var_epi16(x, low, y);
  second = _mm512_permutex2var_epi16(x, _mm512_add_epi32(low, _mm512_set1_epi32(0x100010)), y);
}
inline void store_bf16_operand(void* p, vf x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
