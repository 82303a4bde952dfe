// Decode: few activation rows against one tile. The packed weight is streamed once; each group is met by all rows while
// it is in the first-level cache.
#pragma once

#include "kernels/weights.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Rows that share one pass over a fold, and column vectors a pass: accumulators + broadcasts + a line fit the registers
// (32 with AVX-512, else 16).
constexpr int kPassRows = 4;
constexpr int kLookupPassRows = kLanes == 16 ? 4 : 3;  // lookups of codes take registers, too
template <int Rows>
constexpr int kPassVectors = kLanes == 16 ? 4
                             : Rows <= 2  ? 4
                                          : 2;
// One row of bytes reads all columns in one pass, as memory likes it, where that fits the registers, too.
constexpr bool one_pass(int rows, bool symmetric) { return kLanes == 8 && !kPortable && rows == 1 && symmetric; }

// Some rows over some folds of a tile.
struct DecodePass {
  const GemmArgs& args;
  int64_t row;  // first
  float* acc;   // [rows, kTileN]
  int64_t folds;
  int64_t ahead;  // ask for memory so many bytes before it is read; 0: leave that to the hardware
};

struct DecodeFold {
  const DecodePass& pass;
  GroupHead head;
  const uint8_t* codes;
  int64_t start, length, fold;

  DecodeFold(const DecodePass& p, const FoldCursor& at, const uint8_t* code_lines)
      : pass(p), head(at.head()), codes(code_lines), start(at.start()), length(at.length()), fold(at.fold) {}
};

// Asks for what will be read after `lines`.
template <int Lines>
IPEX_QUANT_INLINE inline void prefetch_lines(const DecodePass& pass, const uint8_t* lines) {
  if (pass.ahead)
    unroll<Lines>([&](auto i) IPEX_QUANT_INLINE { __builtin_prefetch(lines + pass.ahead + i * kLineBytes); });
}

// Sum over the fold of (x - zx) * (code - zw), exact in int32, then one fma into fp32.
template <int Dtype, int Rows, bool Symmetric>
IPEX_QUANT_INLINE inline void decode_bytes(const DecodeFold& f) {
  constexpr int kVectors = one_pass(Rows, Symmetric) ? 8 : kPassVectors<Rows>;
  // Independent sums hide the latency of a dot product where one row has few of them.
  constexpr int kChains = Rows == 1 && kLanes == 16 ? 2 : 1;
  constexpr bool kNarrow = is_narrow(Dtype);
  const Staged& s = *f.pass.args.staged;
  const int64_t stride = f.pass.args.geometry->padded_k;
  using Codes = CodeBytes<Dtype>;
  const Codes bytes(symmetric_zero(Dtype));
  const S8<kNarrow> one = as_s8<kNarrow>(set1_i(0x01010101)), ones[2] = {one, one};
  for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
    // Start from what the weight's zero point contributes.
    vi acc[Rows][kVectors][kChains], code_sums[kVectors];
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
      const vi zero = f.head.zero(column + v * kLanes);
      code_sums[v] = mul_i(zero, set1_i(-int32_t(f.length)));
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        acc[m][v][0] = mul_i(zero, set1_i(-s.sums[s.at(f.fold, f.pass.row + m)]));
        if constexpr (kChains == 2) acc[m][v][1] = zero_i();
      });
    });
    const uint8_t* set = f.codes;
    const uint8_t* x = static_cast<const uint8_t*>(s.data) + f.pass.row * stride + f.start;
    for (int64_t k = 0; k < f.length; k += line_k(Dtype), set += line_set_bytes(Dtype)) {
      prefetch_lines<int(line_set_bytes(Dtype) / kLineBytes)>(f.pass, set);
      // Lines are read in their order, as the hardware's prefetching expects: the pieces of one together.
      constexpr int kTogether = code_bits(Dtype) == 8 ? 1 : 2;
      unroll<Codes::kPieces / kTogether>([&](auto group) IPEX_QUANT_INLINE {
        S8<kNarrow> a[Rows][kTogether];
        unroll2<Rows, kTogether>(
            [&](auto m, auto p) IPEX_QUANT_INLINE { a[m][p] = as_s8<kNarrow>(broadcast4(x + m * stride + 4 * p)); });
        x += 4 * kTogether;
        constexpr int kFirst = kTogether * decltype(group)::value;
        unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
          if constexpr (kPairSums && kNarrow) {  // codes are below 64: the products of both pieces go together
            U8<true> codes[kTogether];
            unroll<kTogether>([&](auto p) IPEX_QUANT_INLINE {
              constexpr int kPiece = kFirst + decltype(p)::value;
              codes[p] = as_u8<true>(bytes.template piece<kPiece>(set, column + v * kLanes));
            });
            unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dots(acc[m][v][0], codes, a[m]); });
            if constexpr (!Symmetric) dots(code_sums[v], codes, ones);
          } else {
            unroll<kTogether>([&](auto p) IPEX_QUANT_INLINE {
              constexpr int kPiece = kFirst + decltype(p)::value;
              const U8<is_narrow(Dtype)> codes =
                  as_u8<is_narrow(Dtype)>(bytes.template piece<kPiece>(set, column + v * kLanes));
              unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
                dot<is_narrow(Dtype)>(acc[m][v][kPiece % kChains], codes, a[m][p]);
              });
              if constexpr (!Symmetric) dot<is_narrow(Dtype)>(code_sums[v], codes, ones[0]);
            });
          }
        });
      });
    }
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
      const int64_t at = column + v * kLanes;
      const vf scale = integer_scale<Dtype>(f.head, at);
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        const int64_t i = s.at(f.fold, f.pass.row + m);
        vi total = acc[m][v][0];
        if constexpr (kChains == 2) total = add_i(total, acc[m][v][1]);
        if constexpr (!Symmetric) total = sub_i(total, mul_i(code_sums[v], set1_i(s.zeros[i])));
        float* out = f.pass.acc + m * kTileN + at;
        store_f(out, fma_f(cvt_f(total), mul_f(set1_f(s.scales[i]), scale), load_f(out)));
      });
    });
  }
}

template <int Dtype, int Rows>
IPEX_QUANT_INLINE inline void decode_float(const DecodeFold& f) {
  constexpr int kVectors = kPassVectors<Rows>;
  using Codes = FloatCodes<Dtype>;
  const int64_t stride = f.pass.args.geometry->padded_k;
  const Codes codes(f.pass.args.staged->rounding);
  for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
    vf acc[Rows][kVectors], zero[kVectors];
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE { zero[v] = cvt_f(f.head.zero(column + v * kLanes)); });
    unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE { acc[m][v] = zero_f(); });
    const uint8_t* line = f.codes + 4 * column;
    const float* x = static_cast<const float*>(f.pass.args.staged->data) + f.pass.row * stride + f.start;
    for (int64_t k = 0; k < f.length; k += Codes::kPerLine, line += 256, x += Codes::kPerLine) {
      vi lines[kVectors];
      prefetch_lines<kVectors * kVectorBytes / kLineBytes>(f.pass, line);
      unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE { lines[v] = load_i(line + v * kVectorBytes); });
      unroll<Codes::kPerLine>([&](auto j) IPEX_QUANT_INLINE {
        vf a[Rows];
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { a[m] = set1_f(x[m * stride + Codes::kOrder[j]]); });
        unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
          const vf w = codes.template value<decltype(j)::value>(lines[v], zero[v]);
          unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { acc[m][v] = fma_f(a[m], w, acc[m][v]); });
        });
      });
    }
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
      const vf scale = f.head.scale(column + v * kLanes);
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        float* out = f.pass.acc + m * kTileN + column + v * kLanes;
        store_f(out, fma_f(acc[m][v], scale, load_f(out)));
      });
    });
  }
}

// FP8 with kHalfPairs: two sums of a column lie side by side. Runs of k that are short enough for the lines to be met
// nearly in their order, as the hardware's prefetching expects.
template <int Rows>
IPEX_QUANT_INLINE inline void decode_halves(const DecodeFold& f) {
  constexpr int kVectors = Rows == 1 ? 4 : Rows == 2 ? 2 : 1, kAll = int(kTileN / kLanes);
  constexpr int64_t kRun = 32;
  const int64_t stride = f.pass.args.geometry->padded_k;
  vf sums[Rows][kAll][2];
  for (int m = 0; m < Rows; ++m)
    for (int v = 0; v < kAll; ++v) sums[m][v][0] = sums[m][v][1] = zero_f();
  for (int64_t begin = 0; begin < f.length; begin += kRun) {
    const int64_t end = begin + kRun < f.length ? begin + kRun : f.length;
    for (int first = 0; first < kAll; first += kVectors) {
      vf acc[Rows][kVectors][2];
      unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        acc[m][v][0] = sums[m][first + v][0], acc[m][v][1] = sums[m][first + v][1];
      });
      const uint8_t* line = f.codes + begin * kTileN + first * kVectorBytes;
      const float* x = static_cast<const float*>(f.pass.args.staged->data) + f.pass.row * stride + f.start + begin;
      for (int64_t k = begin; k < end; k += 4, line += 4 * kLineBytes, x += 4) {
        prefetch_lines<(kVectors + 1) / 2>(f.pass, line);
        unroll<2>([&](auto odd) IPEX_QUANT_INLINE {
          vf a[Rows];
          unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { a[m] = alternate<odd.value == 1>(x + m * stride); });
          unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
            vf w[2];
            e4m3_halves<odd.value == 1>(load_i(line + v * kVectorBytes), w[0], w[1]);
            unroll2<Rows, 2>([&](auto m, auto h) IPEX_QUANT_INLINE { acc[m][v][h] = fma_f(a[m], w[h], acc[m][v][h]); });
          });
        });
      }
      unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        sums[m][first + v][0] = acc[m][v][0], sums[m][first + v][1] = acc[m][v][1];
      });
    }
  }
  for (int m = 0; m < Rows; ++m)
    for (int v = 0; v < kAll; ++v) {
      const vf total = mul_f(sum_pairs(sums[m][v][0], sums[m][v][1]), set1_f(0x1p8f));
      float* out = f.pass.acc + m * kTileN + v * kLanes;
      store_f(out, fma_f(total, f.head.scale(v * kLanes), load_f(out)));
    }
}

#if defined(IPEX_QUANT_BF16_DOT)
constexpr int kNarrowBytes = kLastDtype + 1;  // the lines of narrow codes that were widened
constexpr int bf16_lines(int dtype) {
  return float_lines(dtype) != dtype && is_narrow(dtype) ? kNarrowBytes : float_lines(dtype);
}

// Code pairs of a line as bf16, four terms each: term J goes with pair kPair of the staged activations. Put into the
// mantissa of 128.0, an integer c becomes 128 + c; the fold takes the offset off again through the sum of x.
template <int Dtype>
struct Bf16Codes {
  static constexpr int kOffset = Dtype == kInt4 || Dtype == kNarrowBytes ? 128 : Dtype == kInt8 ? 256 : 0;
  static constexpr int kTerms = Dtype == kNarrowBytes || Dtype == kFp8 ? 2 : 4;  // of a line
  vi table = zero_i();
  E4m3Lut float8 = make_e4m3_lut();

  Bf16Codes() {
    if constexpr (!has_float_table(Dtype)) return;
    uint16_t levels[32];  // the index of a table lookup has five bits: entry 16 + i repeats entry i
    for (int i = 0; i < 32; ++i) {
      const float level = table_level(Dtype, i % 16, true);
      std::memcpy(&levels[i], reinterpret_cast<const uint8_t*>(&level) + 2, 2);
    }
    table = make_bf16_lut32(levels);
  }

  template <int J>
  static constexpr int kPair = Dtype == kInt8 ? J / 2 : J;

  template <int J>
  vi term(vi line) const {
    const vi base = set1_i(0x43004300);  // 128.0 twice
    if constexpr (has_float_table(Dtype)) {
      return lookup_bf16(table, srl_i<4 * J>(line));
    } else if constexpr (Dtype == kInt4) {
      return and_or_i(srl_i<4 * J>(line), set1_i(0x000F000F), base);
    } else if constexpr (Dtype == kNarrowBytes) {
      return and_or_i(srl_i<8 * J>(line), set1_i(0x007F007F), base);
    } else if constexpr (Dtype == kFp8) {
      return e4m3_pairs<J == 1>(float8, line);
    } else {  // seven bits of mantissa: the top bit of a byte is a term of its own
      return and_or_i(srl_i<8 * (J / 2)>(line), set1_i(J % 2 ? 0x00800080 : 0x007F007F), base);
    }
  }
};

template <int Dtype, int Rows>
IPEX_QUANT_INLINE inline void decode_bf16(const DecodeFold& f) {
  constexpr int kVectors = kPassVectors<Rows>;
  constexpr int kChains = Rows == 1 ? 2 : 1;  // 8 independent sums hide the latency of vdpbf16ps
  using Codes = Bf16Codes<Dtype>;
  const Codes codes;
  const int64_t stride = 2 * f.pass.args.geometry->padded_k;
  vf acc[Rows][kVectors][kChains];
  unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
    unroll<kChains>([&](auto c) IPEX_QUANT_INLINE { acc[m][v][c] = zero_f(); });
  });
  const uint8_t* line = f.codes;
  const uint8_t* x = static_cast<const uint8_t*>(f.pass.args.staged->data) + f.pass.row * stride + 2 * f.start;
  constexpr int64_t kStep = Dtype == kInt4 || has_float_table(Dtype) ? 8 : 4;  // k of one line
  for (int64_t k = 0; k < f.length; k += kStep, line += 256, x += 2 * kStep) {
    vi lines[kVectors];
    prefetch_lines<kVectors * kVectorBytes / kLineBytes>(f.pass, line);
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE { lines[v] = load_i(line + v * kVectorBytes); });
    unroll<Codes::kTerms>([&](auto j) IPEX_QUANT_INLINE {
      constexpr int kTerm = decltype(j)::value;
      vi a[Rows];
      unroll<Rows>([&](auto m)
                       IPEX_QUANT_INLINE { a[m] = broadcast4(x + m * stride + 4 * Codes::template kPair<kTerm>); });
      unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vi w = codes.template term<kTerm>(lines[v]);
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dot_bf16(acc[m][v][kTerm % kChains], w, a[m]); });
      });
    });
  }
  const Staged& s = *f.pass.args.staged;
  unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
    const vf scale = f.head.scale(v * kLanes);
    const vf offset = cvt_f(add_i(f.head.zero(v * kLanes), set1_i(Codes::kOffset)));
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      vf total = acc[m][v][0];
      if constexpr (kChains == 2) total = add_f(total, acc[m][v][1]);
      if constexpr (Codes::kOffset != 0)
        total = sub_f(total, mul_f(offset, set1_f(s.float_sums[s.at(f.fold, f.pass.row + m)])));
      float* out = f.pass.acc + m * kTileN + v * kLanes;
      store_f(out, fma_f(total, scale, load_f(out)));
    });
  });
}
#endif

enum class DecodeKernel { kFloat, kBf16, kBytes, kSymmetricBytes };

// Adds what the minimums contribute.
template <int Rows>
inline void add_minimums(const DecodePass& pass, const FoldCursor& at) {
  const GroupHead head = at.head();
  const Staged& staged = *pass.args.staged;
  for (int64_t column = 0; column < kTileN; column += kLanes) {
    const vf minimum = head.minimum(column);
    for (int64_t m = 0; m < Rows; ++m) {
      float* out = pass.acc + m * kTileN + column;
      store_f(out, fma_f(minimum, set1_f(staged.float_sums[staged.at(at.fold, pass.row + m)]), load_f(out)));
    }
  }
}

template <int Dtype, int Rows, DecodeKernel Kernel>
inline void decode_fold(const DecodeFold& fold) {
  if constexpr (Kernel == DecodeKernel::kFloat) {
    if constexpr (Dtype == kFp8 && kHalfPairs)
      decode_halves<Rows>(fold);
    else
      decode_float<Dtype, Rows>(fold);
  }
  if constexpr (Kernel == DecodeKernel::kBytes) decode_bytes<Dtype, Rows, false>(fold);
  if constexpr (Kernel == DecodeKernel::kSymmetricBytes) decode_bytes<Dtype, Rows, true>(fold);
#if defined(IPEX_QUANT_BF16_DOT)
  if constexpr (Kernel == DecodeKernel::kBf16) decode_bf16<Dtype, Rows>(fold);
#endif
}

template <int Dtype, int Rows, DecodeKernel Kernel>
inline void decode_folds(const DecodePass& pass, FoldCursor cursor) {
  constexpr bool kBytes = Kernel == DecodeKernel::kBytes || Kernel == DecodeKernel::kSymmetricBytes;
#if defined(IPEX_QUANT_BF16_DOT)
  constexpr int kLines = kBytes ? Dtype : Kernel == DecodeKernel::kBf16 ? bf16_lines(Dtype) : float_lines(Dtype);
#else
  constexpr int kLines = kBytes ? Dtype : float_lines(Dtype);
#endif
  const bool minimums = pass.args.geometry->offsets == kMinimums;
  DecodePass widened = pass;
  widened.ahead = 0;  // its lines are no longer where memory is read
  for (int64_t i = 0; i < pass.folds; ++i, cursor.advance()) {
    if constexpr (kLines == Dtype) {
      decode_fold<Dtype, Rows, Kernel>(DecodeFold(pass, cursor, cursor.codes()));
    } else {
      alignas(64) uint8_t wide[kFloatFold * kTileN];
      widen_codes<Dtype>(cursor.codes(), cursor.length(), wide);
      decode_fold<kLines, Rows, Kernel>(DecodeFold(widened, cursor, wide));
    }
    if (minimums) add_minimums<Rows>(pass, cursor);
  }
}

template <int Dtype, int Rows>
inline void decode_pass(const DecodePass& pass, const FoldCursor& cursor) {
  if constexpr (kOnlyBf16) return decode_folds<Dtype, Rows, DecodeKernel::kBf16>(pass, cursor);
  const Staged& s = *pass.args.staged;
  if constexpr (fits_bytes(Dtype)) {
    if (s.compute == Compute::kByte)
      return s.symmetric ? decode_folds<Dtype, Rows, DecodeKernel::kSymmetricBytes>(pass, cursor)
                         : decode_folds<Dtype, Rows, DecodeKernel::kBytes>(pass, cursor);
  }
  if (s.compute == Compute::kBf16) return decode_folds<Dtype, Rows, DecodeKernel::kBf16>(pass, cursor);
  decode_folds<Dtype, Rows, DecodeKernel::kFloat>(pass, cursor);
}

template <int Dtype>
inline void decode_rows(const DecodePass& pass, const FoldCursor& cursor, int64_t rows) {
  switch (rows) {
    case 1:
      return decode_pass<Dtype, 1>(pass, cursor);
    case 2:
      return decode_pass<Dtype, 2>(pass, cursor);
    case 3:
      return decode_pass<Dtype, 3>(pass, cursor);
    default:
      return decode_pass<Dtype, 4>(pass, cursor);
  }
}

template <int Dtype>
inline void decode_tile(const GemmArgs& args, int64_t tile) {
  const Staged& s = *args.staged;
  float acc[kStepRows * kTileN];
  std::memset(acc, 0, size_t(s.rows * kTileN) * sizeof(float));
  FoldCursor cursor(args, tile, s.max_fold);
  const int64_t most = s.compute == Compute::kFloat ? kLookupPassRows : kPassRows;
  if (s.rows <= most) {
    // Lines of less than 8 bits are met out of their order, or too slowly for the hardware to run far enough ahead;
    // those of one pass are met faster than it runs.
    const bool single = one_pass(int(s.rows), s.symmetric) && s.compute == Compute::kByte;
    const bool slow = code_bits(Dtype) < 8 || (Dtype == kFp8 && kHalfPairs);
    const int64_t ahead = single ? 2048 : slow ? 4096 : 0;
    decode_rows<Dtype>({args, 0, acc, s.folds, ahead}, cursor, s.rows);
  } else {
    const int64_t passes = (s.rows + most - 1) / most;
    for (; cursor.more(); cursor.advance())
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t row = pass * s.rows / passes, rows = (pass + 1) * s.rows / passes - row;
        // Several passes leave the memory idle in between, so one of them asks for what follows.
        const int64_t ahead = pass < 2 ? args.geometry->code_bytes(cursor.length()) : 0;
        decode_rows<Dtype>({args, row, acc + row * kTileN, 1, ahead}, cursor, rows);
      }
  }
  for (int64_t m = 0; m < s.rows; ++m) finish_row(args.output, m, tile * kTileN, acc + m * kTileN);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
