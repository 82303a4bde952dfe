// Prefill: many activation rows against one tile. The tile is unpacked once into a panel that stays in the second-level
// cache, then every block of rows runs a register-tiled multiply over it.
#pragma once

#include "kernels/byte_tile.h"
#include "kernels/weights.h"
#include "kernels/word_tile.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Lines of the weight that are asked for while those before them are multiplied, some at every `ask`.
struct LinesToCome {
  const uint8_t *at = nullptr, *end = nullptr;
  int64_t bytes = 0;

  LinesToCome(const uint8_t* first, int64_t size, int64_t asks)
      : at(first), end(first + size), bytes((size / asks + kLineBytes) / kLineBytes * kLineBytes) {}
  void ask() {
    for (const uint8_t* stop = at + bytes; at < stop && at < end; at += kLineBytes) __builtin_prefetch(at, 0, 2);
  }
};

constexpr int kFloatRows = kPortable ? 2 : 6;
// ----------------------------------------------------------------------------------------------------------- bytes
// Codes that are multiplied as words: what is not narrow, where kPairSums.
constexpr bool by_words(int dtype) { return kPairSums && !is_narrow(dtype); }

// Panel [k / 4][kTileN][4] of s8 codes with their zero point (INT8: 128) taken off, or values of a table, of as many
// folds as panel_k() allows; or of their words (word_tile.h).
struct BytePanel {
  int64_t size;  // k, at most
  int8_t* codes;
  uint16_t* words;     // [kWordRows, size] of activations
  int32_t* sums;       // [folds, kTileN] of the codes over each fold
  int32_t* residuals;  // [folds, kTileN] zero points left in the codes; INT8 with zero points only
  float* scales;       // [folds, kTileN]
  float* minimums;     // [folds, kTileN], null without
  float* partial;      // [rows, kTileN] of the folds before; null if a panel holds all of them
  int64_t first_row;
  int64_t start, end, fold;  // k in a staged row, and the first fold
};

// Columns that are unpacked together: lines are read in their order, as the hardware's prefetching expects.
constexpr int kUnpackVectors = kPortable ? 1 : 4;

// Fills the panel with the folds from `at` on.
template <int Dtype>
inline void unpack_byte_panel(FoldCursor& at, BytePanel& panel) {
  using Codes = CodeBytes<Dtype>;
  const Codes bytes(0);
  const U8<true> ones = as_u8<true>(set1_i(0x01010101));
  panel.start = panel.end = at.start(), panel.fold = at.fold;
  for (; at.more() && panel.end + at.length() - panel.start <= panel.size; at.advance()) {
    const GroupHead head = at.head();
    for (int64_t column = 0; column < kTileN; column += kUnpackVectors * kLanes) {
      const int64_t parameters = (at.fold - panel.fold) * kTileN + column;
      vi zero_bytes[kUnpackVectors], sums[kUnpackVectors];
      unroll<kUnpackVectors>([&](auto v) IPEX_QUANT_INLINE {
        const int64_t own = column + v * kLanes;
        const vi zero = Dtype == kInt8 ? set1_i(symmetric_zero(Dtype)) : head.zero(own);
        zero_bytes[v] = mul_i(zero, set1_i(0x01010101));
        sums[v] = zero_i();
        if (panel.residuals)
          store_i(panel.residuals + parameters + v * kLanes, sub_i(head.zero(own), set1_i(symmetric_zero(Dtype))));
      });
      const uint8_t* set = at.codes();
      constexpr int64_t kElement = by_words(Dtype) ? 2 : 1;
      int8_t* to = panel.codes + kElement * (at.start() - panel.start) * kTileN + 4 * column;
      for (int64_t k = 0; k < at.length(); k += line_k(Dtype), set += line_set_bytes(Dtype)) {
        unroll<Codes::kPieces>([&](auto p) IPEX_QUANT_INLINE {
          unroll<kUnpackVectors>([&](auto v) IPEX_QUANT_INLINE {
            vi codes = bytes.template piece<decltype(p)::value>(set, column + v * kLanes);
            if constexpr (!has_table(Dtype)) codes = sub_i8(codes, zero_bytes[v]);
            dot<true>(sums[v], ones, as_s8<true>(codes));
            if constexpr (by_words(Dtype))
              store_panel_words(reinterpret_cast<int16_t*>(to) + 2 * v * kLanes, codes);
            else
              store_i(to + v * kVectorBytes, codes);
          });
          to += 4 * kElement * kTileN;
        });
      }
      unroll<kUnpackVectors>([&](auto v) IPEX_QUANT_INLINE {
        const int64_t own = parameters + v * kLanes;
        store_i(panel.sums + own, sums[v]);
        store_f(panel.scales + own, integer_scale<Dtype>(head, column + v * kLanes));
        if (panel.minimums) store_f(panel.minimums + own, head.minimum(column + v * kLanes));
      });
    }
    panel.end += at.length();
  }
}

// Where the panel after this one comes from, which is about as long.
struct PanelSource {
  const uint8_t* first;
  int64_t bytes, folds;
};

// Columns that a block of rows does together: as many as leave room for the sums beside the accumulators.
constexpr int kFoldVectors = 2;

// Rows [row, row + Rows). Symmetric activations have the zero point 128; Residual tells whether the panel has
// residuals.
template <int Dtype, int Rows, bool Symmetric, bool Residual>
inline void byte_rows(const GemmArgs& args, int64_t tile, const BytePanel& panel, int64_t row, LinesToCome& lines) {
  constexpr int kColumns = kFoldVectors * kLanes;
  const Staged& s = *args.staged;
  const int64_t stride = args.geometry->padded_k;
  const uint8_t* x = static_cast<const uint8_t*>(s.data) + row * stride;
  float whole[Rows * kTileN];
  float* out = panel.partial ? panel.partial + (row - panel.first_row) * kTileN : whole;
  if constexpr (by_words(Dtype))
    for (int m = 0; m < Rows; ++m)
      widen_row(x + m * stride + panel.start, panel.end - panel.start, panel.words + m * panel.size);
  for (int64_t column = 0; column < kTileN; column += kColumns) {
    vf sums[Rows][kFoldVectors];
    unroll2<Rows, kFoldVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
      sums[m][v] = panel.start ? load_f(out + m * kTileN + column + v * kLanes) : zero_f();
    });
    for (FoldRun at(*args.geometry, s.max_fold, panel.start, panel.fold); at.start < panel.end; at.advance()) {
      const int64_t start = at.start - panel.start, length = at.length();
      const int64_t i = s.at(at.fold, row), parameters = (at.fold - panel.fold) * kTileN + column;
      lines.ask();
      // Start from what the zero points contribute, so that the end of the fold needs no correction.
      vi acc[Rows][kFoldVectors];
      unroll<kFoldVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vi codes = load_i(panel.sums + parameters + v * kLanes);
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          const int32_t zero = Symmetric ? 128 : s.zeros[i + m];
          acc[m][v] = Symmetric ? sub_i(zero_i(), sll_i<7>(codes)) : mul_i(codes, set1_i(-zero));
          if constexpr (Residual) {
            const vi residual = load_i(panel.residuals + parameters + v * kLanes);
            const int32_t activations = s.sums[i + m] - int32_t(length) * zero;
            acc[m][v] = sub_i(acc[m][v], mul_i(residual, set1_i(activations)));
          }
        });
      });
      if constexpr (by_words(Dtype))
        multiply_words(acc, panel.words + start, panel.size,
                       reinterpret_cast<const int16_t*>(panel.codes) + start * kTileN + 2 * column, length);
      else
        multiply_bytes<Rows, kFoldVectors, dots_together(Dtype)>(acc, x + at.start, stride,
                                                                 panel.codes + start * kTileN + 4 * column, length);
      unroll<kFoldVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vf scale = load_f(panel.scales + parameters + v * kLanes);
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          const vf factor = mul_f(set1_f(s.scales[i + m]), scale);
          sums[m][v] = fma_f(cvt_f(acc[m][v]), factor, sums[m][v]);
        });
        if (!panel.minimums) return;
        const vf minimum = load_f(panel.minimums + parameters + v * kLanes);
        unroll<Rows>([&](auto m)
                         IPEX_QUANT_INLINE { sums[m][v] = fma_f(minimum, set1_f(s.float_sums[i + m]), sums[m][v]); });
      });
    }
    unroll2<Rows, kFoldVectors>([&](auto m, auto v)
                                    IPEX_QUANT_INLINE { store_f(out + m * kTileN + column + v * kLanes, sums[m][v]); });
  }
  for (int m = 0; m < Rows && panel.end == stride; ++m)
    finish_row(args.output, row + m, tile * kTileN, out + m * kTileN);
}

#if defined(IPEX_QUANT_TILES)  // linear_tiles.h has it
template <int Dtype, bool Symmetric, bool Residual>
inline void byte_row_blocks(const GemmArgs& args, int64_t tile, const BytePanel& panel, int64_t end,
                            const PanelSource& next);
#else
template <int Dtype, bool Symmetric, bool Residual>
inline void byte_row_blocks(const GemmArgs& args, int64_t tile, const BytePanel& panel, int64_t end,
                            const PanelSource& next) {
  const int64_t rows = end - panel.first_row;
  constexpr int kRows = by_words(Dtype) ? kWordRows : kByteRows;
  LinesToCome lines(next.first, next.bytes, block_count<kRows>(rows) * next.folds * (kTileN / (kFoldVectors * kLanes)));
  each_block<kRows>(rows, [&](auto count, int64_t row) {
    byte_rows<Dtype, decltype(count)::value, Symmetric, Residual>(args, tile, panel, panel.first_row + row, lines);
  });
}
#endif

template <int Dtype, bool Residual>
inline void multiply_byte_panel(const GemmArgs& args, int64_t tile, const BytePanel& panel, int64_t end,
                                const PanelSource& next) {
  if (args.staged->symmetric)
    byte_row_blocks<Dtype, true, Residual>(args, tile, panel, end, next);
  else
    byte_row_blocks<Dtype, false, Residual>(args, tile, panel, end, next);
}

template <int Dtype>
inline void prefill_bytes(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  const int64_t parameters = kTileN * args.staged->folds, size = panel_k(g, *args.staged);
  constexpr int64_t kElement = by_words(Dtype) ? 2 : 1, kWords = by_words(Dtype) ? kWordRows : 0;
  uint8_t* words = scratch + kElement * kTileN * size;
  int32_t* sums = reinterpret_cast<int32_t*>(words + 2 * kWords * size);
  float* scales = reinterpret_cast<float*>(sums + 2 * parameters);
  const bool residual = Dtype == kInt8 && g.offsets == kZeroPoints;
  BytePanel panel{size,
                  reinterpret_cast<int8_t*>(scratch),
                  reinterpret_cast<uint16_t*>(words),
                  sums,
                  residual ? sums + parameters : nullptr,
                  scales,
                  g.offsets == kMinimums ? scales + parameters : nullptr,
                  size < g.padded_k ? scales + 2 * parameters : nullptr,
                  begin,
                  0,
                  0,
                  0};
  const int64_t panel_bytes = g.tile_bytes * size / g.padded_k;
  for (FoldCursor at(args, tile, args.staged->max_fold); at.more();) {
    const uint8_t* codes = at.codes();
    const int64_t fold = at.fold;
    unpack_byte_panel<Dtype>(at, panel);
    const PanelSource next{codes + panel_bytes, panel_bytes, at.fold - fold};
    if constexpr (Dtype == kInt8) {
      if (residual) {
        multiply_byte_panel<Dtype, true>(args, tile, panel, end, next);
        continue;
      }
    }
    multiply_byte_panel<byte_lines(Dtype), false>(args, tile, panel, end, next);
  }
}

// ---------------------------------------------------------------------------------------------------------- floats
// Panel of one fold: [length][kTileN] floats, or [length / 2][kTileN][2] bf16 in the staged pair order.
template <int Dtype, bool Bf16>
inline void unpack_float_panel(const GroupHead& head, const FloatCodes<Dtype>& codes, const uint8_t* lines,
                               int64_t length, float* panel) {
  using Codes = FloatCodes<Dtype>;
  for (int64_t column = 0; column < kTileN; column += kTileVectors * kLanes) {
    vf zero[kTileVectors];
    unroll<kTileVectors>([&](auto v) IPEX_QUANT_INLINE { zero[v] = cvt_f(head.zero(column + v * kLanes)); });
    const uint8_t* line = lines + 4 * column;
    for (int64_t k = 0; k < length; k += Codes::kPerLine, line += 256)
      unroll<kTileVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vi word = load_i(line + v * kVectorBytes);
        float* to = panel + column + v * kLanes;
        if constexpr (Bf16) {
          // Pair p of a line holds k = kPairs[p], kPairs[p] + 2: lane positions 4-bit (p, p + 4), 8-bit (p, p + 2). The
          // values are numbers of bf16 already: integers of 8 bits and a sign, and rounded levels.
          constexpr int kHalf = Codes::kPerLine / 2;
          unroll<kHalf>([&](auto p) IPEX_QUANT_INLINE {
            const vi low = as_i(codes.template value<decltype(p)::value>(word, zero[v]));
            const vi high = as_i(codes.template value<decltype(p)::value + kHalf>(word, zero[v]));
            store_i(to + (k / 2 + p.value) * kTileN, or_i(srl_i<16>(low), high));
          });
        } else {
          unroll<Codes::kPerLine>([&](auto j) IPEX_QUANT_INLINE {
            store_f(to + (k + Codes::kOrder[j.value]) * kTileN,
                    codes.template value<decltype(j)::value>(word, zero[v]));
          });
        }
      });
  }
}

template <int Rows, bool Bf16>
IPEX_QUANT_INLINE inline void multiply_floats(vf (&acc)[Rows][kTileVectors], const float* x, int64_t stride,
                                              const float* panel, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k, panel += kTileN) {
    vf w[kTileVectors];
    unroll<kTileVectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = load_f(panel + v * kLanes); });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      const vf a = set1_f(x[m * stride + k]);
      unroll<kTileVectors>([&](auto v) IPEX_QUANT_INLINE {
        if constexpr (Bf16)
          dot_bf16(acc[m][v], as_i(w[v]), as_i(a));
        else
          acc[m][v] = fma_f(a, w[v], acc[m][v]);
      });
    });
  }
}

struct FloatFold {
  const Staged& staged;
  const FoldCursor& at;
  int64_t first_row;
  const float* panel;
  const float* x;  // row 0; a bf16 pair counts as one float
  int64_t stride, steps;
  float* sums;  // [rows, kTileN]
};

template <int Rows, bool Bf16>
inline void float_rows(const FloatFold& f, const GroupHead& head, int64_t row, LinesToCome& lines) {
  for (int64_t column = 0; column < kTileN; column += kTileVectors * kLanes) {
    lines.ask();
    vf acc[Rows][kTileVectors];
    unroll2<Rows, kTileVectors>([&](auto m, auto v) IPEX_QUANT_INLINE { acc[m][v] = zero_f(); });
    multiply_floats<Rows, Bf16>(acc, f.x + row * f.stride, f.stride, f.panel + column, f.steps);
    unroll<kTileVectors>([&](auto v) IPEX_QUANT_INLINE {
      const vf scale = head.scale(column + v * kLanes);
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        float* out = f.sums + (row + m) * kTileN + column + v * kLanes;
        store_f(out, fma_f(acc[m][v], scale, load_f(out)));
      });
      if (!head.minimums) return;
      const vf minimum = head.minimum(column + v * kLanes);
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        float* out = f.sums + (row + m) * kTileN + column + v * kLanes;
        store_f(out, fma_f(minimum, set1_f(f.staged.float_sums[f.staged.at(f.at.fold, f.first_row + row + m)]),
                           load_f(out)));
      });
    });
  }
}

#if defined(IPEX_QUANT_TILES)  // linear_tiles.h has it
template <bool Bf16>
inline void float_row_blocks(const FloatFold& f, int64_t rows, const uint8_t* next, int64_t bytes);
#else
template <bool Bf16>
inline void float_row_blocks(const FloatFold& f, int64_t rows, const uint8_t* next, int64_t bytes) {
  const GroupHead head = f.at.head();
  LinesToCome lines(next, bytes, block_count<kFloatRows>(rows) * (kTileN / (kTileVectors * kLanes)));
  each_block<kFloatRows>(
      rows, [&](auto count, int64_t row) { float_rows<decltype(count)::value, Bf16>(f, head, row, lines); });
}
#endif

template <int Dtype, bool Bf16>
inline void prefill_floats(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  const Staged& s = *args.staged;
  float* panel = reinterpret_cast<float*>(scratch);
  float* sums = panel + kTileN * kFloatFold;
  std::memset(sums, 0, (end - begin) * kTileN * sizeof(float));
  constexpr int64_t kPerFloat = Bf16 ? 2 : 1;
  const int64_t stride = g.padded_k / kPerFloat;
  const float* rows = static_cast<const float*>(s.data) + begin * stride;
  constexpr int kLines = float_lines(Dtype);
  const FloatCodes<kLines> codes(s.rounding);
  alignas(64) uint8_t wide[kLines == Dtype ? 64 : kFloatFold * kTileN];
  for (FoldCursor at(args, tile, kFloatFold); at.more(); at.advance()) {
    const uint8_t* lines = at.codes();
    if constexpr (kLines != Dtype) {
      widen_codes<Dtype>(lines, at.length(), wide);
      lines = wide;
    }
    unpack_float_panel<kLines, Bf16>(at.head(), codes, lines, at.length(), panel);
    const FloatFold fold{s, at, begin, panel, rows + at.start() / kPerFloat, stride, at.length() / kPerFloat, sums};
    const int64_t bytes = g.code_bytes(at.length());
    float_row_blocks<Bf16>(fold, end - begin, at.codes() + bytes, bytes);
  }
  for (int64_t m = begin; m < end; ++m) finish_row(args.output, m, tile * kTileN, sums + (m - begin) * kTileN);
}

template <int Dtype>
inline void prefill_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  if constexpr (fits_bytes(Dtype)) {
    if (args.staged->compute == Compute::kByte) return prefill_bytes<Dtype>(args, tile, begin, end, scratch);
  }
#if defined(IPEX_QUANT_BF16_DOT)
  if (args.staged->compute == Compute::kBf16) return prefill_floats<Dtype, true>(args, tile, begin, end, scratch);
#endif
  prefill_floats<Dtype, false>(args, tile, begin, end, scratch);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
