// W8A8 linear: unsigned activations against one tile of signed codes, which need no unpacking.
#pragma once

#include "kernels/byte_tile.h"
#include "kernels/elementwise.h"
#include "kernels/word_tile.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// k of a tile that all rows meet before its next part: 256 KB of codes, which stay in the second-level cache.
constexpr int64_t kInt8Part = 4096;
// Where a register tile covers less than a line group, several passes read it. In decode they take a page at a time,
// and ask for the one that follows: the hardware does not see the stream.
constexpr bool kSplitLines = kLanes < 16;
constexpr int64_t kInt8Page = 64;

// Adds x * w over `length` of k to Rows rows of int32 sums [.., kTileN].
template <int Rows, bool Prefetch>
inline void add_products(const uint8_t* x, int64_t stride, const int8_t* codes, int64_t length, int32_t* sums) {
  constexpr int kVectors = kLanes == 16 ? 4 : Rows == 1 && !kPortable ? 8 : 2;
  for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
    vi acc[Rows][kVectors];
    unroll2<Rows, kVectors>([&](auto m, auto v)
                                IPEX_QUANT_INLINE { acc[m][v] = load_i(sums + m * kTileN + column + v * kLanes); });
    multiply_bytes<Rows, kVectors, 0, Prefetch>(acc, x, stride, codes + 4 * column, length);
    unroll2<Rows, kVectors>([&](auto m, auto v)
                                IPEX_QUANT_INLINE { store_i(sums + m * kTileN + column + v * kLanes, acc[m][v]); });
  }
}

// The same for any number of rows.
#if defined(IPEX_QUANT_TILES)  // linear_tiles.h has it
template <bool Prefetch>
inline void add_row_products(const uint8_t* x, int64_t stride, const int8_t* codes, int64_t length, int64_t rows,
                             int32_t* sums);
#else
template <bool Prefetch>
inline void add_row_products(const uint8_t* x, int64_t stride, const int8_t* codes, int64_t length, int64_t rows,
                             int32_t* sums) {
  each_block<kByteRows>(rows, [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    add_products<kRows, Prefetch>(x + row * stride, stride, codes, length, sums + row * kTileN);
  });
}
#endif

// The same through words: of kInt8Words of k at most, 16 KB, which stay in the first-level cache.
constexpr int64_t kInt8Words = 128;

inline void add_word_products(const uint8_t* x, int64_t stride, const int8_t* codes, int64_t length, int64_t rows,
                              int32_t* sums) {
  constexpr int kVectors = 2;
  alignas(64) int16_t panel[kInt8Words * kTileN];
  alignas(64) uint16_t words[kWordRows * kInt8Words];
  widen_panel(codes, length, panel);
  each_block<kWordRows>(rows, [&](auto count, int64_t row) {
    constexpr int kRows = decltype(count)::value;
    for (int m = 0; m < kRows; ++m) widen_row(x + (row + m) * stride, length, words + m * kInt8Words);
    for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
      int32_t* own = sums + row * kTileN + column;
      vi acc[kRows][kVectors];
      unroll2<kRows, kVectors>([&](auto m, auto v)
                                   IPEX_QUANT_INLINE { acc[m][v] = load_i(own + m * kTileN + v * kLanes); });
      multiply_words(acc, words, kInt8Words, panel + 2 * column, length);
      unroll2<kRows, kVectors>([&](auto m, auto v)
                                   IPEX_QUANT_INLINE { store_i(own + m * kTileN + v * kLanes, acc[m][v]); });
    }
  });
}

inline void int8_tile(const Int8Args& args, const Output& output, const uint8_t* tile, int64_t column, int64_t begin,
                      int64_t end, uint8_t* scratch) {
  const Int8Geometry& g = *args.geometry;
  const bool few = end - begin <= kDecodeRows, by_page = kSplitLines && few, by_words = kPairSums && !few;
  const int64_t rows = end - begin, part = by_page ? kInt8Page : by_words ? kInt8Words : kInt8Part;
  const float* scales = reinterpret_cast<const float*>(tile);
  const int32_t* code_sums = reinterpret_cast<const int32_t*>(tile) + kTileN;
  const int8_t* codes = reinterpret_cast<const int8_t*>(tile + g.head_bytes);
  int32_t* sums = reinterpret_cast<int32_t*>(scratch);  // of one fold, [rows, kTileN]
  int64_t* totals = nullptr;                            // of all folds if there are more
  if (g.folds > 1) {
    totals = reinterpret_cast<int64_t*>(sums + rows * kTileN);
    std::memset(totals, 0, size_t(rows * kTileN) * sizeof *totals);
  }
  for (int64_t fold = 0; fold < g.folds; ++fold, code_sums += kTileN) {
    // Start from what the zero points contribute, so that the end of the fold needs no correction.
    for (int64_t m = 0; m < rows; ++m) {
      const vi zero = set1_i(-args.zero_points[(begin + m) * args.row_step]);
      for (int64_t n = 0; n < kTileN; n += kLanes) store_i(sums + m * kTileN + n, mul_i(load_i(code_sums + n), zero));
    }
    const int64_t fold_end = fold + 1 < g.folds ? (fold + 1) * kInt8Fold : g.padded_k;
    for (int64_t k = fold * kInt8Fold; k < fold_end; k += part) {
      auto* add = by_page ? add_row_products<kSplitLines> : add_row_products<false>;
      if constexpr (kPairSums) add = by_words ? add_word_products : add;
      add(args.x + begin * args.stride + k, args.stride, codes + k * kTileN, fold_end - k < part ? fold_end - k : part,
          rows, sums);
    }
    for (int64_t i = 0; totals && i < rows * kTileN; ++i) totals[i] += sums[i];
  }
  for (int64_t m = 0; m < rows; ++m) {
    float y[kTileN];
    const vf scale = set1_f(args.scales[(begin + m) * args.row_step]);
    if (totals)
      for (int64_t n = 0; n < kTileN; ++n) y[n] = float(totals[m * kTileN + n]);
    for (int64_t n = 0; n < kTileN; n += kLanes) {
      const vf sum = totals ? load_f(y + n) : cvt_f(load_i(sums + m * kTileN + n));
      store_f(y + n, mul_f(sum, mul_f(scale, load_f(scales + n))));
    }
    finish_row(output, begin + m, column, y);
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
