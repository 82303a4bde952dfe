// The register-tiled multiply of bytes that have been widened to words, where that is faster (kPairSums): the products
// of wide bytes overflow what the narrow instructions add up, and widening them costs as much as multiplying.
#pragma once

#include "kernels.h"
#include "kernels/byte_tile.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int kWordRows = kMostWordRows;

// `length` bytes, a multiple of 4, of a row of unsigned activations as words.
inline void widen_row(const uint8_t* x, int64_t length, uint16_t* out) {
  int64_t k = 0;
  for (; k + 16 <= length; k += 16) store_words_u8(out + k, x + k);
  for (; k < length; k += 4) {
    uint32_t bytes;
    std::memcpy(&bytes, x + k, 4);
    const uint32_t words[2] = {bytes & 0x00FF00FF, bytes >> 8 & 0x00FF00FF};
    std::memcpy(out + k, words, 8);
  }
}

// Of a panel of signed bytes [k / 4][kTileN][4], `count` lines of kTileN columns as words [k / 2][kTileN][2].
inline void store_panel_words(int16_t* to, vi codes) {
  vi first, second;
  words_of_s8(codes, first, second);
  store_i(to, first);
  store_i(to + 2 * kTileN, second);
}
inline void widen_panel(const int8_t* codes, int64_t length, int16_t* out) {
  for (int64_t k = 0; k < length; k += 4, codes += 4 * kTileN, out += 4 * kTileN)
    for (int64_t column = 0; column < kTileN; column += kLanes)
      store_panel_words(out + 2 * column, load_i(codes + 4 * column));
}

// Adds the sum over `length` of x * w.
template <int Rows, int Vectors>
IPEX_QUANT_INLINE inline void multiply_words(vi (&acc)[Rows][Vectors], const uint16_t* x, int64_t stride,
                                             const int16_t* panel, int64_t length) {
  for (int64_t k = 0; k < length; k += 2, x += 2, panel += 2 * kTileN) {
    vi w[Vectors];
    unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = load_i(panel + 2 * v * kLanes); });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      const vi a = broadcast4(x + m * stride);
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { dot_words(acc[m][v], a, w[v]); });
    });
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
