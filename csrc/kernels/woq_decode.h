// Decode: up to kDecodeRows activation rows against one tile. The packed weight is streamed once; each group is met by
// all rows while it is in the first-level cache.
#pragma once

#include "weights.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Rows that share one pass over a fold, and column vectors a pass: accumulators + broadcasts + a line fit the registers
// (32 with AVX-512, else 16).
constexpr int kPassRows = 4;
template <int Rows>
constexpr int kPassVectors = kLanes == 16 ? 4 : Rows <= 2 ? 4 : 2;

struct DecodeFold {
  const GemmArgs& args;
  GroupHead head;
  const uint8_t* codes;
  int64_t start, length, fold;
  int64_t row;       // first of the pass
  float* acc;        // [kPassRows, kTileN]
  int64_t prefetch;  // distance in bytes, or 0
};

// Sum over the fold of (x - zx) * (code - zw), exact in int32, then one fma into fp32.
template <int Dtype, int Rows, bool Symmetric>
inline void decode_bytes(const DecodeFold& f) {
  constexpr int kVectors = kPassVectors<Rows>;
  constexpr bool kNarrow = is_narrow(Dtype);
  // With registers to spare, high nibbles are summed apart as 16 times their value: a mask each instead of mask and
  // shift, which leaves the port of the shift to the dot products.
  constexpr bool kApart = Dtype == kInt4 && Rows <= 2 && kLanes == 16;
  const Staged& s = *f.args.staged;
  const int64_t stride = f.args.geometry->padded_k;
  const Nibbles<Dtype> nibbles(128);
  const S8<kNarrow> ones = as_s8<kNarrow>(set1_i(0x01010101));
  for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
    // Start from what the weight's zero point contributes.
    vi acc[Rows][kVectors], apart[Rows][kVectors], code_sums[kVectors];
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
      const vi zero = f.head.zero(column + v * kLanes);
      code_sums[v] = mul_i(zero, set1_i(-int32_t(f.length)));
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        acc[m][v] = mul_i(zero, set1_i(-s.sums[(f.row + m) * s.folds + f.fold]));
        apart[m][v] = zero_i();
      });
    });
    const uint8_t* line = f.codes + 4 * column;
    const uint8_t* x = static_cast<const uint8_t*>(s.data) + f.row * stride + f.start;
    for (int64_t k = 0; k < f.length; k += 8, line += line_group_bytes(Dtype), x += 8) {
      if (f.prefetch)
        unroll<4>([&](auto v) IPEX_QUANT_INLINE { __builtin_prefetch(line + f.prefetch + v * kLineBytes); });
      S8<kNarrow> low[Rows], high[Rows];
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        low[m] = as_s8<kNarrow>(broadcast4(x + m * stride));
        high[m] = as_s8<kNarrow>(broadcast4(x + m * stride + 4));
      });
      unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vi first = load_i(line + v * kVectorBytes);
        const U8<kNarrow> codes = as_u8<kNarrow>(is_four_bit(Dtype) ? nibbles.low(first) : first);
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dot<kNarrow>(acc[m][v], codes, low[m]); });
        if constexpr (kApart) {
          const U8<kNarrow> shifted = as_u8<kNarrow>(nibbles.high_times_16(first));
          unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dot<kNarrow>(apart[m][v], shifted, high[m]); });
          if constexpr (Symmetric) return;
        }
        const U8<kNarrow> others =
            as_u8<kNarrow>(is_four_bit(Dtype) ? nibbles.high(first) : load_i(line + 256 + v * kVectorBytes));
        if constexpr (!kApart)
          unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dot<kNarrow>(acc[m][v], others, high[m]); });
        if constexpr (!Symmetric) {
          dot<kNarrow>(code_sums[v], codes, ones);
          dot<kNarrow>(code_sums[v], others, ones);
        }
      });
    }
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
      const int64_t at = column + v * kLanes;
      vf scale = f.head.scale(at);
      if constexpr (Dtype == kNf4) scale = mul_f(scale, set1_f(1.0f / 127));
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        const int64_t i = (f.row + m) * s.folds + f.fold;
        vi total = acc[m][v];
        if constexpr (kApart) total = add_i(total, sra_i<4>(apart[m][v]));
        if constexpr (!Symmetric) total = sub_i(total, mul_i(code_sums[v], set1_i(s.zeros[i])));
        float* out = f.acc + m * kTileN + at;
        store_f(out, fma_f(cvt_f(total), mul_f(set1_f(s.scales[i]), scale), load_f(out)));
      });
    });
  }
}

template <int Dtype, int Rows>
inline void decode_float(const DecodeFold& f) {
  constexpr int kVectors = kPassVectors<Rows>;
  using Codes = FloatCodes<Dtype>;
  const int64_t stride = f.args.geometry->padded_k;
  const Codes codes;
  for (int64_t column = 0; column < kTileN; column += kVectors * kLanes) {
    vf acc[Rows][kVectors], zero[kVectors];
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE { zero[v] = cvt_f(f.head.zero(column + v * kLanes)); });
    unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE { acc[m][v] = zero_f(); });
    const uint8_t* line = f.codes + 4 * column;
    const float* x = static_cast<const float*>(f.args.staged->data) + f.row * stride + f.start;
    for (int64_t k = 0; k < f.length; k += Codes::kPerLine, line += 256, x += Codes::kPerLine) {
      vi lines[kVectors];
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
        float* out = f.acc + m * kTileN + column + v * kLanes;
        store_f(out, fma_f(acc[m][v], scale, load_f(out)));
      });
    });
  }
}

#if defined(IPEX_QUANT_BF16_DOT)
inline uint16_t exact_bf16(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A 16-bit lane of a line holds four nibbles; shifting by 0, 4, 8, 12 brings each to the low bits, where it indexes a
// table (entry 16 + i repeats entry i, as the index has five bits). 4-bit codes are whole nibbles; an INT8 code is the
// sum of two: its high nibble's table carries 16 * h - 128.
template <int Dtype, int Rows>
inline void decode_bf16(const DecodeFold& f) {
  constexpr int kVectors = kPassVectors<Rows>;
  constexpr int kChains = Rows == 1 ? 2 : 1;  // 8 independent sums hide the latency of vdpbf16ps
  uint16_t low_table[32], high_table[32];
  for (int i = 0; i < 32; ++i) {
    const int code = i % 16;
    low_table[i] = exact_bf16(Dtype == kNf4 ? kNf4Levels[code] : float(Dtype == kInt4 ? code - 8 : code));
    high_table[i] = exact_bf16(float(16 * code - 128));
  }
  const vi low = make_bf16_lut32(low_table), high = make_bf16_lut32(high_table);
  const int64_t stride = 2 * f.args.geometry->padded_k;
  vf acc[Rows][kVectors][kChains];
  unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
    unroll<kChains>([&](auto c) IPEX_QUANT_INLINE { acc[m][v][c] = zero_f(); });
  });
  const uint8_t* line = f.codes;
  const uint8_t* x = static_cast<const uint8_t*>(f.args.staged->data) + f.row * stride + 2 * f.start;
  constexpr int64_t kStep = is_four_bit(Dtype) ? 8 : 4;  // k of one line
  for (int64_t k = 0; k < f.length; k += kStep, line += 256, x += 2 * kStep) {
    vi lines[kVectors];
    unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE { lines[v] = load_i(line + v * kVectorBytes); });
    unroll<4>([&](auto j) IPEX_QUANT_INLINE {
      constexpr int kShift = decltype(j)::value;
      const vi table = is_four_bit(Dtype) || kShift % 2 == 0 ? low : high;
      constexpr int kPair = is_four_bit(Dtype) ? kShift : kShift / 2;
      vi a[Rows];
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { a[m] = broadcast4(x + m * stride + 4 * kPair); });
      unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
        const vi w = lookup_bf16(table, srl_i<4 * kShift>(lines[v]));
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { dot_bf16(acc[m][v][kShift % kChains], w, a[m]); });
      });
    });
  }
  const Staged& s = *f.args.staged;
  unroll<kVectors>([&](auto v) IPEX_QUANT_INLINE {
    const vf scale = f.head.scale(v * kLanes);
    const vf residual = cvt_f(sub_i(f.head.zero(v * kLanes), set1_i(symmetric_zero(Dtype))));
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      vf total = acc[m][v][0];
      if constexpr (kChains == 2) total = add_f(total, acc[m][v][1]);
      if (f.head.zeros) total = sub_f(total, mul_f(residual, set1_f(s.float_sums[(f.row + m) * s.folds + f.fold])));
      float* out = f.acc + m * kTileN + v * kLanes;
      store_f(out, fma_f(total, scale, load_f(out)));
    });
  });
}
#endif

template <int Dtype, int Rows>
inline void decode_pass(const DecodeFold& f) {
  const Staged& s = *f.args.staged;
  if constexpr (Dtype != kFp8) {
    if (s.compute == Compute::kByte) {
      if (s.symmetric)
        decode_bytes<Dtype, Rows, true>(f);
      else
        decode_bytes<Dtype, Rows, false>(f);
      return;
    }
#if defined(IPEX_QUANT_BF16_DOT)
    if (s.compute == Compute::kBf16) return decode_bf16<Dtype, Rows>(f);
#endif
  }
  decode_float<Dtype, Rows>(f);
}

template <int Dtype>
inline void decode_rows(const DecodeFold& f, int64_t rows) {
  switch (rows) {
    case 1:
      return decode_pass<Dtype, 1>(f);
    case 2:
      return decode_pass<Dtype, 2>(f);
    case 3:
      return decode_pass<Dtype, 3>(f);
    default:
      return decode_pass<Dtype, 4>(f);
  }
}

template <int Dtype>
inline void decode_tile(const GemmArgs& args, int64_t tile) {
  const WoqGeometry& g = *args.geometry;
  const Staged& s = *args.staged;
  float acc[kDecodeRows * kTileN] = {};
  const int64_t passes = (s.rows + kPassRows - 1) / kPassRows;
  const uint8_t* group_data = args.tiles + tile * g.tile_bytes;
  int64_t start = 0, fold = 0;
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t padded = g.padded(group);
    const GroupHead head(g, group_data);
    const uint8_t* codes = group_data + g.head_bytes;
    for (int64_t k = 0; k < padded; k += s.max_fold, ++fold) {
      const int64_t length = padded - k < s.max_fold ? padded - k : s.max_fold;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t row = pass * s.rows / passes, rows = (pass + 1) * s.rows / passes - row;
        // A first pass leaves prefetching to the hardware, which is better at it. A second one finds the group in the
        // cache and would leave the memory idle, so it asks for the next group.
        const int64_t prefetch = pass > 0 ? g.group_bytes() : 0;
        decode_rows<Dtype>(
            {args, head, codes + g.code_bytes(k), start + k, length, fold, row, acc + row * kTileN, prefetch}, rows);
      }
    }
    start += padded;
    group_data += g.head_bytes + g.code_bytes(padded);
  }
  for (int64_t m = 0; m < s.rows; ++m) finish_row(args, m, tile, acc + m * kTileN);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
