// What tiles do in the place of vectors where many rows meet a weight: products of a panel of unpacked codes, or of the
// codes of W8A8. All else is that of woq_prefill.h and int8_linear.h, and sums of integers have the same bits.
#pragma once

#include "kernels/int8_linear.h"
#include "kernels/tile_block.h"
#include "kernels/woq_prefill.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Rows of kTileN words from `column` on.
inline TileRows<const uint8_t> panel_columns(const void* panel, int64_t column) {
  return {static_cast<const uint8_t*>(panel) + 4 * column, 4 * kTileN};
}

// ------------------------------------------------------------------------------------------------------- weight-only
// The fold at `at` of a block's rows, whose products are in `products`, scaled and added to `out`, [rows, kTileN].
template <bool Symmetric, bool Residual>
inline void add_byte_fold(const Staged& s, const BytePanel& panel, const FoldRun& at, int64_t row, int64_t rows,
                          int64_t column, const BlockSums<int32_t>& products, float* out) {
  const int64_t parameters = (at.fold - panel.fold) * kTileN + column;
  vi codes[kBlockVectors], residual[kBlockVectors];
  vf scale[kBlockVectors], minimum[kBlockVectors];
  unroll<kBlockVectors>([&](auto v) IPEX_QUANT_INLINE {
    const int64_t own = parameters + v * kLanes;
    codes[v] = load_i(panel.sums + own);
    scale[v] = load_f(panel.scales + own);
    if constexpr (Symmetric) codes[v] = sll_i<7>(codes[v]);
    if constexpr (Residual) residual[v] = load_i(panel.residuals + own);
    minimum[v] = panel.minimums ? load_f(panel.minimums + own) : zero_f();
  });
  for (int64_t m = 0; m < rows; ++m, out += kTileN) {
    const int64_t i = s.at(at.fold, row + m);
    const int32_t zero = Symmetric ? 128 : s.zeros[i];
    const vi zeros = set1_i(zero), activations = set1_i(s.sums[i] - int32_t(at.length()) * zero);
    const vf row_scale = set1_f(s.scales[i]), float_sum = set1_f(s.float_sums[i]);
    unroll<kBlockVectors>([&](auto v) IPEX_QUANT_INLINE {
      float* to = out + column + v * kLanes;
      vi sum = sub_i(load_i(products.at(m, v)), Symmetric ? codes[v] : mul_i(codes[v], zeros));
      if constexpr (Residual) sum = sub_i(sum, mul_i(residual[v], activations));
      vf total = fma_f(cvt_f(sum), mul_f(row_scale, scale[v]), load_f(to));
      if (panel.minimums) total = fma_f(minimum[v], float_sum, total);
      store_f(to, total);
    });
  }
}

template <int Dtype, bool Symmetric, bool Residual>
inline void byte_row_blocks(const GemmArgs& args, int64_t tile, const BytePanel& panel, int64_t end,
                            const PanelSource& next) {
  const Staged& s = *args.staged;
  const int64_t stride = args.geometry->padded_k, all_rows = end - panel.first_row;
  const uint8_t* x = static_cast<const uint8_t*>(s.data) + panel.first_row * stride;
  TileBlock block;
  BlockSums<int32_t> products;
  float whole[kBlockRows * kTileN];
  LinesToCome lines(next.first, next.bytes, block_count<kBlockRows>(all_rows) * next.folds);
  each_row_block(all_rows, [&](int64_t row, int64_t rows) {
    float* out = panel.partial ? panel.partial + row * kTileN : whole;
    if (panel.start == 0) std::memset(out, 0, size_t(rows * kTileN) * sizeof(float));
    for (FoldRun at(*args.geometry, s.max_fold, panel.start, panel.fold); at.start < panel.end; at.advance()) {
      lines.ask();
      for (int64_t column = 0; column < kTileN; column += kBlockColumns) {
        block.multiply<TileDot::kUnsignedSigned, 2, false>(
            {x + row * stride + at.start, stride},
            panel_columns(panel.codes + (at.start - panel.start) * kTileN, column), rows, at.length(), products.rows());
        add_byte_fold<Symmetric, Residual>(s, panel, at, panel.first_row + row, rows, column, products, out);
      }
    }
    for (int64_t m = 0; m < rows && panel.end == stride; ++m)
      finish_row(args.output, panel.first_row + row + m, tile * kTileN, out + m * kTileN);
  });
}

template <bool Bf16>
inline void float_row_blocks(const FloatFold& f, int64_t all_rows, const uint8_t* next, int64_t bytes) {
  static_assert(Bf16, "tiles have no float32");
  const GroupHead head = f.at.head();
  TileBlock block;
  BlockSums<float> products;
  LinesToCome lines(next, bytes, block_count<kBlockRows>(all_rows));
  each_row_block(all_rows, [&](int64_t row, int64_t rows) {
    lines.ask();
    for (int64_t column = 0; column < kTileN; column += kBlockColumns) {
      block.multiply<TileDot::kPairs, 2, false>({reinterpret_cast<const uint8_t*>(f.x + row * f.stride), 4 * f.stride},
                                                panel_columns(f.panel, column), rows, 4 * f.steps, products.rows());
      vf scale[kBlockVectors], minimum[kBlockVectors];
      unroll<kBlockVectors>([&](auto v) IPEX_QUANT_INLINE {
        scale[v] = head.scale(column + v * kLanes);
        minimum[v] = head.minimums ? head.minimum(column + v * kLanes) : zero_f();
      });
      for (int64_t m = row; m < row + rows; ++m) {
        const vf float_sum = set1_f(f.staged.float_sums[f.staged.at(f.at.fold, f.first_row + m)]);
        unroll<kBlockVectors>([&](auto v) IPEX_QUANT_INLINE {
          float* to = f.sums + m * kTileN + column + v * kLanes;
          vf total = fma_f(load_f(products.at(m - row, v)), scale[v], load_f(to));
          if (head.minimums) total = fma_f(minimum[v], float_sum, total);
          store_f(to, total);
        });
      }
    }
  });
}

// -------------------------------------------------------------------------------------------------------------- W8A8
template <bool Prefetch>
inline void add_row_products(const uint8_t* x, int64_t stride, const int8_t* codes, int64_t length, int64_t all_rows,
                             int32_t* sums) {
  static_assert(!Prefetch, "a matter of few rows");
  TileBlock block;
  each_row_block(all_rows, [&](int64_t row, int64_t rows) {
    for (int64_t column = 0; column < kTileN; column += kBlockColumns)
      block.multiply<TileDot::kUnsignedSigned, 2, true>(
          {x + row * stride, stride}, panel_columns(codes, column), rows, length,
          {reinterpret_cast<uint8_t*>(sums + row * kTileN + column), 4 * kTileN});
  });
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
