// simd.h for AVX2 with FMA and F16C, and AVX-VNNI where the file is compiled for it or for its emulation.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int64_t kLanes = 8;
constexpr bool kPortable = false;
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
inline vi srl_i(vi x, int bits) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(bits)); }
template <int Bits>
inline vi sll_i(vi x) {
  return _mm256_slli_epi32(x, Bits);
}
inline vf if_zero(vi test, vf yes, vf no) {
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(test, _mm256_setzero_si256())));
}

inline vf cvt_f(vi x) { return _mm256_cvtepi32_ps(x); }
inline vi round_i(vf x) { return _mm256_cvtps_epi32(x); }
inline vf as_f(vi x) { return _mm256_castsi256_ps(x); }
inline vi as_i(vf x) { return _mm256_castps_si256(x); }

inline vi load_u8(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
inline vi load_s8(const void* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
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
inline vf load_e5m2(const void* p) {
  return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
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

// As half precision a number of e4m3 has its bits one place lower, and a bias that is eight higher; both have
// subnormals.
#define IPEX_QUANT_HALF_PAIRS 1
template <bool Odd>
inline void e4m3_halves(vi bytes, vf& first, vf& second) {
  const vi placed = _mm256_srai_epi16(Odd ? bytes : _mm256_slli_epi16(bytes, 8), 1);
  const vi halves = _mm256_and_si256(placed, _mm256_set1_epi16(int16_t(0xBF80)));
  first = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  second = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
template <bool Odd>
inline vf alternate(const float* four) {
  const vf x = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
  return _mm256_permute_ps(x, Odd ? 0xDD : 0x88);
}
inline vf sum_pairs(vf first, vf second) {
  const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(first, second));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xD8));
}

inline void transpose_quads(vi (&x)[4]) {
  const vi a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const vi c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi64(a, c), x[1] = _mm256_unpackhi_epi64(a, c);
  x[2] = _mm256_unpacklo_epi64(b, d), x[3] = _mm256_unpackhi_epi64(b, d);
}
inline vi columns_of_quads(vi x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
inline void transpose(vi (&x)[kLanes]) {
  vi quads[2][4];
  unroll<2>([&](auto g) IPEX_QUANT_INLINE {
    unroll<4>([&](auto i) IPEX_QUANT_INLINE { quads[g][i] = x[4 * g + i]; });
    transpose_quads(quads[g]);
  });
  unroll<4>([&](auto c) IPEX_QUANT_INLINE {
    x[c] = _mm256_permute2x128_si256(quads[0][c], quads[1][c], 0x20);
    x[4 + c] = _mm256_permute2x128_si256(quads[0][c], quads[1][c], 0x31);
  });
}
template <int I>
inline vi spread_quads(vi x) {
  return _mm256_shuffle_epi32(x, I * 0x55);
}
template <class Add, class V>
inline vi sum_quads_by(const V (&x)[2], Add add) {
  const vi a = vi(x[0]), b = vi(x[1]);
  return add(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}
template <class Add, class V>
inline vi reduce_lanes_by(const V (&x)[kLanes], Add add) {
  vi y[4], z[2];
  unroll<4>([&](auto i) IPEX_QUANT_INLINE {
    const vi a = vi(x[2 * i]), b = vi(x[2 * i + 1]);
    y[i] = add(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  });
  unroll<2>([&](auto i) IPEX_QUANT_INLINE {
    z[i] = add(_mm256_unpacklo_epi64(y[2 * i], y[2 * i + 1]), _mm256_unpackhi_epi64(y[2 * i], y[2 * i + 1]));
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
  const auto load = [](const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); };
  const __m128i ab = _mm_unpacklo_epi8(load(a), load(b)), cd = _mm_unpacklo_epi8(load(c), load(d));
  return _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
}

#if defined(__AVXVNNI__) || defined(IPEX_QUANT_EMULATED_VNNI)
#if defined(IPEX_QUANT_EMULATED_VNNI)
inline vi dpbusd(vi acc, vi u8, vi s8) {  // the products of bytes 0 and 2 of every lane, then those of 1 and 3
  const vi even =
      _mm256_madd_epi16(_mm256_and_si256(u8, _mm256_set1_epi16(0xFF)), _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
  const vi odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#else
inline vi dpbusd(vi acc, vi u8, vi s8) { return _mm256_dpbusd_avx_epi32(acc, u8, s8); }
#endif
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
  acc = dpbusd(acc, u8, s8);
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

// Sixteen-bit words, made once for many products, spare these the even and odd halves.
inline void dot_words(vi& acc, vi a, vi b) { acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
inline void store_words_u8(void* out, const void* bytes) {
  const vi words = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  store_i(out, _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order)));
}
inline void words_of_s8(vi x, vi& first, vi& second) {
  const Bytes<false> words = as_s8<false>(x);
  first = words.even, second = words.odd;
}

#define IPEX_QUANT_PAIR_SUMS 1
template <int Count>
inline void dots(vi& acc, const U8<true> (&u8)[Count], const S8<true> (&s8)[Count]) {
  vi pairs = _mm256_maddubs_epi16(u8[0].all, s8[0].all);
  unroll<Count - 1>([&](auto i) IPEX_QUANT_INLINE {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(u8[i + 1].all, s8[i + 1].all));
  });
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
