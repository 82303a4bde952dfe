// The products of attention: queries with keys, probabilities with values.
#pragma once

#include "kernels/attention_pack.h"
#include "kernels/byte_tile.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// ------------------------------------------------------------------------------------------------------- multiplies
// Operands of a multiply: words of `a` are broadcast or, as `lanes`, one for each lane; those of `b` are read by
// vectors.
struct FloatDot {
  using Sum = vf;
  static vf a(const float* p) { return set1_f(*p); }
  static vf b(const float* p) { return load_f(p); }
  static vf lanes(const float* p) { return load_f(p); }
  static vf from(vi words) { return as_f(words); }
  static void add(vf& sum, vf a, vf b) { sum = fma_f(a, b, sum); }
};
#if defined(IPEX_QUANT_BF16_DOT)
struct PairDot {
  using Sum = vf;
  static vi a(const float* p) { return broadcast4(p); }
  static vi b(const float* p) { return load_i(p); }
  static vi lanes(const float* p) { return load_i(p); }
  static vi from(vi words) { return words; }
  static void add(vf& sum, vi a, vi b) { dot_bf16(sum, b, a); }
};
#endif
struct QueryKeyDot {
  using Sum = vi;
  static S8<false> a(const float* p) { return as_s8<false>(broadcast4(p)); }
  static U8<false> b(const float* p) { return from(load_i(p)); }
  static S8<false> lanes(const float* p) { return as_s8<false>(load_i(p)); }
  static U8<false> from(vi words) { return as_u8<false>(words); }
  static void add(vi& sum, S8<false> a, U8<false> b) { dot<false>(sum, b, a); }
};
struct ProbabilityValueDot {
  using Sum = vi;
  static U8<false> a(const float* p) { return as_u8<false>(broadcast4(p)); }
  static S8<false> b(const float* p) { return from(load_i(p)); }
  static S8<false> from(vi words) { return as_s8<false>(words); }
  static void add(vi& sum, U8<false> a, S8<false> b) { dot<false>(sum, a, b); }
};

// What the products are made of. With kTiles a path has functions of its own for them, those of attention_tiles.h.
struct FloatPath {
  using Scores = FloatDot;
  using Values = FloatDot;
  static constexpr bool kTiles = false;
  static constexpr int kElements = 1, kRows = 6;
};
#if defined(IPEX_QUANT_BF16_DOT)
struct PairPath {
  using Scores = PairDot;
  using Values = PairDot;
  static constexpr bool kTiles = false;
  static constexpr int kElements = 2, kRows = 6;
};
#endif
struct BytePath {
  using Scores = QueryKeyDot;
  using Values = ProbabilityValueDot;
  static constexpr bool kTiles = false;
  static constexpr int kElements = 4, kRows = kByteRows;
};

template <class Dot, int Rows, int Vectors>
IPEX_QUANT_INLINE inline void multiply(typename Dot::Sum (&sums)[Rows][Vectors], const float* a, int64_t a_stride,
                                       const float* b, int64_t b_stride, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k, ++a, b += b_stride) {
    decltype(Dot::b(b)) w[Vectors];
    unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = Dot::b(b + v * kLanes); });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      const auto x = Dot::a(a + m * a_stride);
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { Dot::add(sums[m][v], x, w[v]); });
    });
  }
}

// A range of tokens of a block.
struct Span {
  int64_t begin, end;
};

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
