// Linears of few rows with a float weight as torch keeps it: its rows are streamed once, in the order of memory.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// A sum has kFloatLanes partial sums at every ISA level, of the products k, k + kFloatLanes, k + 2 * kFloatLanes, ...
// in the order of the staged x, and one tree adds them up: results do not depend on the level.
constexpr int64_t kFloatLanes = 16;
constexpr int kFloatParts = int(kFloatLanes / kLanes);  // vectors of a sum
static_assert(kFloatStep == 2 * kFloatLanes && kFloatParts * kLanes == kFloatLanes, "a step has two vectors a part");

constexpr int64_t kFloatGroup = 16;       // outputs whose lanes are added up together
constexpr int64_t kFloatPassRows = 4;     // rows of x whose sums, with those of one output, stay in registers
constexpr int64_t kFloatBlock = 4096;     // elements of x that stay in the first-level cache
constexpr int64_t kFloatLongRow = 4096;   // bytes, from which on several rows of the weight are read side by side
constexpr int64_t kPrefetchBytes = 1024;  // ahead of what is read
static_assert(kTileN % kFloatGroup == 0 && kFloatGroup % kLanes == 0, "groups of outputs fill tiles and vectors");

// The vectors `part` of both halves of a step. For bf16 these are its even and its odd elements.
struct FloatPair {
  vf first, second;
};
template <FloatType Type>
IPEX_QUANT_INLINE inline FloatPair load_pair(const uint8_t* step, int64_t part) {
  const int64_t i = part * kLanes;
  if constexpr (Type == kFloat32) {
    const float* p = reinterpret_cast<const float*>(step) + i;
    return {load_f(p), load_f(p + kFloatLanes)};
  } else if constexpr (Type == kFloat16) {
    return {load_half(step + 2 * i), load_half(step + 2 * (i + kFloatLanes))};
  } else {
    const vi pairs = load_i(step + 4 * i);
    return {as_f(sll_i<16>(pairs)), as_f(and_i(pairs, set1_i(int32_t(0xFFFF0000))))};
  }
}

// The `k` elements of a row of x in the order of `load_pair`, and zeros up to a whole step.
template <FloatType Type>
inline void stage_float_row(const uint8_t* x, int64_t k, float* staged) {
  constexpr int64_t kSize = Type == kFloat32 ? 4 : 2;
  uint8_t tail[kFloatStep * kSize];
  for (int64_t i = 0; i < k; i += kFloatStep) {
    const uint8_t* step = x + i * kSize;
    if (k - i < kFloatStep) {
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, step, size_t((k - i) * kSize));
      step = tail;
    }
    for (int64_t part = 0; part < kFloatParts; ++part) {
      const FloatPair pair = load_pair<Type>(step, part);
      store_f(staged + i + part * kLanes, pair.first);
      store_f(staged + i + kFloatLanes + part * kLanes, pair.second);
    }
  }
}

// Some rows of x times some rows of the weight over a run of k.
struct FloatPiece {
  const uint8_t* weight;
  const uint8_t* next;  // what will be read after this piece
  int64_t row_bytes;    // of the weight
  const float* x;
  int64_t x_stride, length;
  float* sums;  // [rows of x, kFloatGroup, kFloatLanes]
  bool first;   // begin sums, instead of adding to them
};

template <FloatType Type, int Rows, int Outputs>
inline void multiply_piece(const FloatPiece& piece) {
  constexpr int64_t kSize = Type == kFloat32 ? 4 : 2, kStepBytes = kFloatStep * kSize;
  const auto sum = [&](int m, int n, int part)
                       IPEX_QUANT_INLINE { return piece.sums + (m * kFloatGroup + n) * kFloatLanes + part * kLanes; };
  vf acc[Rows][Outputs][kFloatParts];
  unroll2<Rows, Outputs>([&](auto m, auto n) IPEX_QUANT_INLINE {
    unroll<kFloatParts>([&](auto p)
                            IPEX_QUANT_INLINE { acc[m][n][p] = piece.first ? zero_f() : load_f(sum(m, n, p)); });
  });
  const auto step = [&](const uint8_t* weight, int64_t row_bytes, const float* x) IPEX_QUANT_INLINE {
    unroll2<kFloatParts, Outputs>([&](auto p, auto n) IPEX_QUANT_INLINE {
      const FloatPair pair = load_pair<Type>(weight + n * row_bytes, p);
      const auto add = [&](vf w, int64_t at) IPEX_QUANT_INLINE {
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          acc[m][n][p] = fma_f(load_f(x + m * piece.x_stride + p * kLanes + at), w, acc[m][n][p]);
        });
      };
      add(pair.first, 0);
      add(pair.second, kFloatLanes);
    });
  };
  int64_t k = 0;
  const int64_t turn = piece.length - kPrefetchBytes / kSize;  // where what is ahead lies in the next piece
  for (; k + kFloatStep <= piece.length; k += kFloatStep) {
    const uint8_t* ahead =
        k < turn ? piece.weight + k * kSize + kPrefetchBytes : piece.next + (turn < 0 ? k : k - turn) * kSize;
    unroll<Outputs>([&](auto n) IPEX_QUANT_INLINE {
      for (int64_t byte = 0; byte < kStepBytes; byte += 64) __builtin_prefetch(ahead + n * piece.row_bytes + byte);
    });
    step(piece.weight + k * kSize, piece.row_bytes, piece.x + k);
  }
  if (k < piece.length) {
    uint8_t tail[Outputs][kStepBytes] = {};
    for (int n = 0; n < Outputs; ++n)
      std::memcpy(tail[n], piece.weight + n * piece.row_bytes + k * kSize, size_t((piece.length - k) * kSize));
    step(tail[0], kStepBytes, piece.x + k);
  }
  unroll2<Rows, Outputs>([&](auto m, auto n) IPEX_QUANT_INLINE {
    unroll<kFloatParts>([&](auto p) IPEX_QUANT_INLINE { store_f(sum(m, n, p), acc[m][n][p]); });
  });
}

// Rows of the weight that a pass with `rows` of x reads side by side. Short ones are read fastest one after the other.
inline int64_t float_outputs(int64_t rows, int64_t row_bytes) {
  if (rows == 1) return row_bytes < kFloatLongRow ? 1 : 4;
  return rows == 2 ? 2 : 1;
}

template <FloatType Type>
inline void multiply_piece(const FloatPiece& piece, int64_t rows, int64_t outputs) {
  if (rows == 1) return outputs == 4 ? multiply_piece<Type, 1, 4>(piece) : multiply_piece<Type, 1, 1>(piece);
  if (rows == 2) return outputs == 2 ? multiply_piece<Type, 2, 2>(piece) : multiply_piece<Type, 2, 1>(piece);
  rows == 3 ? multiply_piece<Type, 3, 1>(piece) : multiply_piece<Type, 4, 1>(piece);
}

// Some rows of x and outputs of a linear: at most kDecodeRows and kFloatGroup.
struct FloatGroup {
  int64_t row, rows, column, columns;
};

template <FloatType Type>
inline void sum_group(const FloatLinearArgs& args, const FloatGroup& group, float* sums) {
  constexpr int64_t kSize = Type == kFloat32 ? 4 : 2;
  const int64_t row_bytes = args.k * kSize, x_stride = staged_float_k(args.k);
  const uint8_t* weight = static_cast<const uint8_t*>(args.weight) + group.column * row_bytes;
  const float* x = args.x + group.row * x_stride;
  const int64_t block = kFloatBlock / group.rows / kFloatStep * kFloatStep;
  // A second pass meets the piece of the weight in the first-level cache.
  const int64_t rows = group.rows <= kFloatPassRows ? group.rows : group.rows / 2;
  const int64_t whole = float_outputs(group.rows, row_bytes);
  for (int64_t k = 0; k < args.k; k += block) {
    const int64_t length = args.k - k < block ? args.k - k : block;
    for (int64_t n = 0, outputs = whole; n < group.columns; n += outputs) {
      if (n + outputs > group.columns) outputs = 1;
      const uint8_t* at = weight + n * row_bytes + k * kSize;
      const bool turns = n + outputs == group.columns, ends = k + block >= args.k;
      const uint8_t* next = !turns ? at + outputs * row_bytes  // a prefetch beyond the weight does nothing
                            : ends ? weight + group.columns * row_bytes
                                   : weight + (k + block) * kSize;
      FloatPiece piece{at, next, row_bytes, x + k, x_stride, length, sums + n * kFloatLanes, k == 0};
      multiply_piece<Type>(piece, rows, outputs);
      if (rows == group.rows) continue;
      piece.x += rows * x_stride;
      piece.sums += rows * kFloatGroup * kFloatLanes;
      multiply_piece<Type>(piece, group.rows - rows, outputs);
    }
  }
}

// Lane i is the total of sum i of kLanes; those of the lanes are added in halves.
inline vf add_up(const float* sums) {
  vi lanes[kLanes];
  unroll<int(kLanes)>([&](auto i) IPEX_QUANT_INLINE {
    vf sum = load_f(sums + i * kFloatLanes);
    if constexpr (kFloatParts == 2) sum = add_f(sum, load_f(sums + i * kFloatLanes + kLanes));
    lanes[i] = as_i(sum);
  });
  transpose(lanes);
  vf totals[kLanes];
  unroll<int(kLanes)>([&](auto i) IPEX_QUANT_INLINE { totals[i] = as_f(lanes[i]); });
  if constexpr (kLanes == 16)
    unroll<8>([&](auto i) IPEX_QUANT_INLINE { totals[i] = add_f(totals[i], totals[i + kLanes - 8]); });
  unroll<4>([&](auto i) IPEX_QUANT_INLINE { totals[i] = add_f(totals[i], totals[i + 4]); });
  return add_f(add_f(totals[0], totals[2]), add_f(totals[1], totals[3]));
}

template <FloatType Type>
inline void float_typed_tile(const FloatLinearArgs& args, int64_t tile) {
  const int64_t first = tile * kTileN, columns = args.output.n - first < kTileN ? args.output.n - first : kTileN;
  float sums[kDecodeRows * kFloatGroup * kFloatLanes] = {};  // zero for the outputs that the last group lacks
  float totals[kDecodeRows][kTileN];
  for (int64_t row = 0; row < args.rows; row += kDecodeRows) {
    const int64_t rows = args.rows - row < kDecodeRows ? args.rows - row : kDecodeRows;
    for (int64_t n = 0; n < columns; n += kFloatGroup) {
      sum_group<Type>(args, {row, rows, first + n, columns - n < kFloatGroup ? columns - n : kFloatGroup}, sums);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < kFloatGroup; i += kLanes)
          store_f(totals[m] + n + i, add_up(sums + (m * kFloatGroup + i) * kFloatLanes));
    }
    for (int64_t m = 0; m < rows; ++m) {
      if (args.bias)
        for_each_run(columns, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
          store_f(totals[m] + i, add_f(load_f(totals[m] + i), load_run(args.bias, Type, first + i, count)));
        });
      finish_row(args.output, row + m, first, totals[m]);
    }
  }
}

inline void stage_float_rows(const FloatStageArgs& args, int64_t begin, int64_t end) {
  const int64_t row_bytes = args.k * float_size(args.type);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* x = static_cast<const uint8_t*>(args.x) + row * row_bytes;
    float* staged = args.staged + row * staged_float_k(args.k);
    if (args.type == kFloat32)
      stage_float_row<kFloat32>(x, args.k, staged);
    else if (args.type == kBFloat16)
      stage_float_row<kBFloat16>(x, args.k, staged);
    else
      stage_float_row<kFloat16>(x, args.k, staged);
  }
}

inline void float_tile(const FloatLinearArgs& args, int64_t tile) {
  if (args.output.type == kFloat32) return float_typed_tile<kFloat32>(args, tile);
  if (args.output.type == kBFloat16) return float_typed_tile<kBFloat16>(args, tile);
  float_typed_tile<kFloat16>(args, tile);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
