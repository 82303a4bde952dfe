// Vectors of the instruction set that a file is compiled for. Each ISA level compiles this into a namespace of its own
// (IPEX_QUANT_ISA_NS); the kernels are written once over the names below, which each simd_*.h defines. Nothing here may
// call an out-of-line std:: template: the linker could keep the copy that was compiled for a newer CPU.
//
//   vf, vi            kLanes floats / kLanes int32 (or 4 * kLanes bytes)
//   kPortable         no registers, so that unrolling gains nothing
//   *_f, *_i          lane by lane; min_f and max_f return their second operand where either is NaN
//   cvt_f, round_i    int32 to float and back, to nearest even
//   U8, S8            byte operands of dot(acc, u8, s8), which adds four products to every lane; Narrow promises
//                     |u8 * s8 + u8 * s8| < 2^15, which AVX2 can exploit
//   dots              several narrow dot(): with kPairSums faster than one by one; the sum of |u8 * s8 + u8 * s8| over
//                     all of them is below 2^15
//   dot_words         with kPairSums: adds the products of two pairs of 16-bit words to every lane. Of four bytes the
//   first
//                     two words are 0 and 2, then 1 and 3: words_of_s8 and, for 16 bytes, store_words_u8 order them so
//   Lut16, ByteLut16  16-entry tables indexed by the low four bits of a lane / of every byte
//   e4m3_pairs        pairs of bf16 from float8 bytes that are no NaN: bytes 0 and 2 of every lane, if Odd 1 and 3
//   e4m3_halves       with kHalfPairs, in place of e4m3_pairs: floats of these, times 2^-8, side by side, of the first
//                     half of the lanes and of the second; alternate gives their factors of four, 0 and 2, if Odd 1
//                     and 3, to all lanes; sum_pairs adds what lies side by side, one lane each again
//   transpose         kLanes vectors of int32: rows become columns
//   reduce_lanes      lane i is the sum of vector i of kLanes
//   *_quads           runs of four lanes: transpose_quads makes rows columns within those of four vectors, spread_quads
//                     gives all lanes of a quad its lane I, quad i of sum_quads is the sum of those of vector i,
//                     columns_of_quads puts lane 0 of every quad first, then lane 1
//   load_e5m2         kLanes float8 numbers, which are the upper bytes of half precision ones
//   load_quads        the first byte of each of four rows to the first lane, the second bytes to the second
//   dot_bf16          with IPEX_QUANT_BF16_DOT: adds two bf16 products to every float lane
//   interleave_bf16   with it: (a, b) pairs of bf16, two vectors of them; store_bf16_operand rounds, denormals to zero
#pragma once

#include <cstdint>
#include <cstring>

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Loops over the registers of a tile, unrolled by templates: an accumulator array stays in registers only if every
// index is a constant before the compiler's first passes. A lambda body is marked with IPEX_QUANT_INLINE.
#if defined(IPEX_QUANT_EMULATED)  // which has no registers
#define IPEX_QUANT_INLINE
#else
#define IPEX_QUANT_INLINE __attribute__((always_inline))
#endif
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

// The bf16 of 0 to 7 times 2^-9, which are 0 and the subnormal numbers of e4m3. Above them the exponent is 120 higher.
constexpr uint16_t kE4m3Subnormals[8] = {0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};
constexpr uint16_t kE4m3Bias = 120 << 7;

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int64_t kVectorBytes = 4 * kLanes;
#if defined(IPEX_QUANT_EMULATED)
constexpr bool kOnlyBf16 = true;  // the generic level has the rest
#else
constexpr bool kOnlyBf16 = false;
#endif

#if defined(IPEX_QUANT_PAIR_SUMS)
constexpr bool kPairSums = true;
#else
constexpr bool kPairSums = false;
void dot_words(vi& acc, vi a, vi b);  // for branches that are never compiled
void store_words_u8(void* out, const void* bytes);
void words_of_s8(vi x, vi& first, vi& second);
template <int Count>
inline void dots(vi& acc, const U8<true> (&u8)[Count], const S8<true> (&s8)[Count]) {
  unroll<Count>([&](auto i) IPEX_QUANT_INLINE { dot<true>(acc, u8[i], s8[i]); });
}
#endif

#if defined(IPEX_QUANT_HALF_PAIRS)
constexpr bool kHalfPairs = true;
struct E4m3Lut {};  // for branches that are never compiled
inline E4m3Lut make_e4m3_lut() { return {}; }
template <bool Odd>
vi e4m3_pairs(const E4m3Lut& lut, vi bytes);
#else
constexpr bool kHalfPairs = false;
template <bool Odd>
void e4m3_halves(vi bytes, vf& first, vf& second);
template <bool Odd>
vf alternate(const float* four);
vf sum_pairs(vf first, vf second);
#endif

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
