// The products of attention by tiles, where a task has many rows.
#pragma once

#include "kernels/attention.h"
#include "kernels/tile_block.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Rows that are `stride` words apart.
struct WordRows {
  float* first;
  int64_t stride;

  TileRows<uint8_t> at(int64_t word) const { return {reinterpret_cast<uint8_t*>(first + word), 4 * stride}; }
  TileRows<const uint8_t> operand(int64_t word) const { return {at(word).first, 4 * stride}; }
};

template <class Path, TileDot ScoreDot, TileDot ValueDot>
struct TilePath : Path {
  static constexpr bool kTiles = true;
  static constexpr int kRows = int(kBlockRows);
  static constexpr bool kBytes = Path::kElements == 4;

  // Scores with the tokens of `span`; those of bytes start at `offset`.
  static void score(WordRows queries, WordRows keys, int64_t words, int64_t rows, Span span, const int32_t* offset,
                    WordRows scores) {
    TileBlock block;
    for (int64_t column = span.begin / kBlockColumns * kBlockColumns; column < span.end; column += kBlockColumns)
      block.multiply<ScoreDot, 2, false>(queries.operand(0), keys.operand(column), rows, 4 * words, scores.at(column));
    if constexpr (kBytes)
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t t = span.begin; t < span.end; t += kLanes) {
          float* to = scores.first + m * scores.stride + t;
          store_f(to, cvt_f(add_i(load_i(to), set1_i(offset[m]))));
        }
  }

  // Multiplies the sums by `correction` and adds probabilities times values, those of bytes times `factor`.
  static void accumulate(WordRows probabilities, WordRows values, int64_t rows, Span span, const float* correction,
                         const float* factor, WordRows sums) {
    const int64_t first = span.begin / Path::kElements, bytes = 4 * ((span.end - span.begin) / Path::kElements);
    const WordRows seen{values.first + first * values.stride, values.stride};
    TileBlock block;
    if constexpr (!kBytes) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t d = 0; d < sums.stride; d += kLanes) {
          float* to = sums.first + m * sums.stride + d;
          store_f(to, mul_f(load_f(to), set1_f(correction[m])));
        }
      each_column(values.stride, [&](auto columns, int64_t column) {
        block.multiply<ValueDot, decltype(columns)::value, true>(probabilities.operand(first), seen.operand(column),
                                                                 rows, bytes, sums.at(column));
      });
    } else {
      BlockSums<int32_t> products;
      each_column(values.stride, [&](auto columns, int64_t column) {
        constexpr int kColumns = decltype(columns)::value;
        block.multiply<ValueDot, kColumns, false>(probabilities.operand(first), seen.operand(column), rows, bytes,
                                                  products.rows());
        for (int64_t m = 0; m < rows; ++m)
          unroll<kColumns* int(kTmmRows / kLanes)>([&](auto v) IPEX_QUANT_INLINE {
            float* to = sums.first + m * sums.stride + column + v * kLanes;
            const vf value = mul_f(cvt_f(load_i(products.at(m, v))), set1_f(factor[m]));
            store_f(to, fma_f(load_f(to), set1_f(correction[m]), value));
          });
      });
    }
  }

 private:
  // Calls f(Index<tiles>, first column) for all columns, a multiple of 16.
  template <class F>
  static void each_column(int64_t columns, F f) {
    int64_t column = 0;
    for (; column + kBlockColumns <= columns; column += kBlockColumns) f(Index<2>{}, column);
    if (column < columns) f(Index<1>{}, column);
  }
};

using ByteTilePath = TilePath<BytePath, TileDot::kSignedUnsigned, TileDot::kUnsignedSigned>;
using PairTilePath = TilePath<PairPath, TileDot::kPairs, TileDot::kPairs>;

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
