// The register-tiled multiply of unsigned bytes by a panel of signed bytes [k / 4][kTileN][4].
#pragma once

#include "pack/layout.h"
#include "simd.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Register tile. AVX-512: 6 x 4 accumulators + 4 weight vectors + 1 broadcast = 29 of 32 registers. AVX2 bytes:
// 4 x 2 + 4 (even and odd halves) + 2 + temporaries of 16; AVX2 floats: 6 x 2 + 2 + 1 = 15 of 16.
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kByteRows = kPortable ? 2 : kLanes == 16 ? 6 : 4;

// Calls f(Index<count>, first row) for blocks of at most Most rows, as equal as can be: none is too low to be fast.
template <int Most>
constexpr int64_t block_count(int64_t rows) {
  return (rows + Most - 1) / Most;
}
template <int Most, class F>
inline void each_block(int64_t rows, F f) {
  const int64_t blocks = block_count<Most>(rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * rows / blocks, count = (block + 1) * rows / blocks - row;
    unroll<Most>([&](auto i) {
      if (count == i + 1) f(Index<decltype(i)::value + 1>{}, row);
    });
  }
}

// Adds the sum over `length` of x * w, for unsigned x. `Together` dots() of the products may go together; 0: they are
// not narrow. With Prefetch it asks for what follows `length`.
template <int Rows, int Vectors, int Together, bool Prefetch = false>
IPEX_QUANT_INLINE inline void multiply_bytes(vi (&acc)[Rows][Vectors], const uint8_t* x, int64_t stride,
                                             const int8_t* panel, int64_t length) {
  constexpr bool kNarrow = Together > 0;
  int64_t k = 0;
  if constexpr (kPairSums && Together > 1) {
    for (; k + 4 * Together <= length; k += 4 * Together, x += 4 * Together, panel += 4 * Together * kTileN)
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE {
        S8<true> w[Together];
        unroll<Together>(
            [&](auto i) IPEX_QUANT_INLINE { w[i] = as_s8<true>(load_i(panel + 4 * i * kTileN + v * kVectorBytes)); });
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          U8<true> a[Together];
          unroll<Together>([&](auto i) IPEX_QUANT_INLINE { a[i] = as_u8<true>(broadcast4(x + m * stride + 4 * i)); });
          dots(acc[m][v], a, w);
        });
      });
  }
  for (; k < length; k += 4, x += 4, panel += 4 * kTileN) {
    if constexpr (Prefetch)
      unroll<Vectors>([&](auto v)
                          IPEX_QUANT_INLINE { __builtin_prefetch(panel + length * kTileN + v * kVectorBytes); });
    S8<kNarrow> w[Vectors];
    unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = as_s8<kNarrow>(load_i(panel + v * kVectorBytes)); });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      const U8<kNarrow> a = as_u8<kNarrow>(broadcast4(x + m * stride));
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { dot<kNarrow>(acc[m][v], a, w[v]); });
    });
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
