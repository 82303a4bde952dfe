// Few rows, as in decode: keys and values are not packed but multiplied as they come from memory, in their order.
#pragma once

#include "attention_dots.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int kSecondLevel = 2;  // cache that prefetches go to: the first level has no room for two blocks
constexpr int kStreamSums = kLanes == 16 ? 16 : 8;  // registers
template <class Path>
constexpr int kStreamRows = kLanes / Path::kPlanes < 8 ? int(kLanes) / Path::kPlanes : 8;

// Whole vectors only.
template <class Path>
inline bool can_stream(int64_t rows, int64_t key_dim, int64_t value_dim) {
  return rows <= kStreamRows<Path> && key_dim % (kLanes * Path::kElements) == 0 && key_dim <= 512 &&
         value_dim % (2 * kLanes) == 0;
}

template <class Path>
IPEX_QUANT_INLINE inline void add_lanes(typename Path::Scores::Sum& sum, vi key, const float* query) {
  if constexpr (Path::kElements == 4)
    dot<false>(sum, as_u8<false>(sub_i8(key, set1_i(int32_t(0x80808080)))), as_s8<false>(load_i(query)));
#if defined(IPEX_QUANT_BF16_DOT)
  else if constexpr (Path::kElements == 2)
    dot_bf16(sum, key, load_i(query));
#endif
  else
    sum = fma_f(as_f(key), load_f(query), sum);
}

// Rows that are read, and for each of them one that will be read later, of which as much is asked for: the hardware
// does not foresee rows that are read in turns, and drops what is asked for in bursts.
struct RowStream {
  const uint8_t *const *rows, *const *ahead;
};

// Scores of Rows queries, each in kPlanes rows of `words` words, with keys [begin, end) to [Rows][stride].
template <class Path, Source S, int Rows>
inline void stream_scores(const RowStream& keys, Span span, const float* query, const int32_t* query_sums,
                          int64_t words, int64_t steps, float* scores, int64_t stride) {
  constexpr int kPlanes = Path::kPlanes, kTokens = int(kLanes) / Rows, kPart = kTokens / kPlanes;
  using Sum = typename Path::Scores::Sum;
  int32_t corrections[kLanes];
  if constexpr (kPlanes == 2)
    for (int i = 0; i < kLanes; ++i) {
      const int row = i % (Rows * kPart) / kPart;
      corrections[i] = int32_t(-128 * (256 * uint32_t(query_sums[2 * row]) + uint32_t(query_sums[2 * row + 1])));
    }
  for (int64_t t = span.begin; t < span.end; t += kTokens) {
    Sum results[kLanes];
    unroll<kPlanes>([&](auto part) IPEX_QUANT_INLINE {
      const uint8_t *const *rows = keys.rows + t + part * kPart, *const *ahead = keys.ahead + t + part * kPart;
      Sum sums[Rows * kPlanes][kPart];
      unroll2<Rows * kPlanes, kPart>([&](auto m, auto j) IPEX_QUANT_INLINE { sums[m][j] = Sum{}; });
      for (int64_t step = 0; step < steps; ++step) {
        vi key[kPart];
        unroll<kPart>([&](auto j) IPEX_QUANT_INLINE {
          const int64_t at = step * kLanes * word_bytes(S);
          key[j] = load_words<S>(rows[j] + at);
          __builtin_prefetch(ahead[j] + at, 0, kSecondLevel);
        });
        unroll2<Rows * kPlanes, kPart>([&](auto m, auto j) IPEX_QUANT_INLINE {
          add_lanes<Path>(sums[m][j], key[j], query + m * words + step * kLanes);
        });
      }
      unroll2<Rows, kPart>([&](auto m, auto j) IPEX_QUANT_INLINE {
        Sum& result = results[part * (Rows * kPart) + m * kPart + j];
        if constexpr (kPlanes == 2)
          result = add_i(sll_i<8>(sums[2 * m][j]), sums[2 * m + 1][j]);  // modulo 2^32, in which the score fits
        else
          result = sums[m][j];
      });
    });
    float lanes[kLanes];
    if constexpr (kPlanes == 2)
      store_f(lanes, cvt_f(add_i(reduce_lanes(results), load_i(corrections))));
    else
      store_f(lanes, reduce_lanes(results));
    for (int part = 0; part < kPlanes; ++part)
      for (int m = 0; m < Rows; ++m)
        std::memcpy(scores + m * stride + t + part * kPart, lanes + (part * Rows + m) * kPart, kPart * sizeof(float));
  }
}

// Words of kElements rows of values, from `column` on.
template <Source S, int Vectors>
IPEX_QUANT_INLINE inline void load_values(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t column,
                                          vi (&words)[Vectors]) {
  constexpr int64_t kSize = S == Source::kQuads ? 1 : S == Source::kFloat32 ? 4 : 2;
  unroll<int(word_elements(S))>([&](auto i) IPEX_QUANT_INLINE {
    unroll<int((Vectors * kLanes * kSize + 63) / 64)>([&](auto line) IPEX_QUANT_INLINE {
      __builtin_prefetch(ahead[i] + column * kSize + 64 * line, 0, kSecondLevel);
    });
  });
  if constexpr (S == Source::kPairs) {
#if defined(IPEX_QUANT_BF16_DOT)
    unroll<Vectors / 2>([&](auto v) IPEX_QUANT_INLINE {
      const int64_t at = 2 * (column + 2 * v * kLanes);
      interleave_bf16(rows[0] + at, rows[1] + at, words[2 * v], words[2 * v + 1]);
    });
#endif
  } else {
    unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE {
      const int64_t at = column + v * kLanes;
      if constexpr (S == Source::kQuads)
        words[v] = load_quads(rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at);
      else
        words[v] = load_words<S>(rows[0] + at * word_bytes(S));
    });
  }
}

// The sums of Rows rows, `columns` apart, and what they are multiplied by before and after.
struct StreamSums {
  float* sums;
  int64_t columns;
  const float *correction, *factor;
};

// Adds probabilities, whose planes are `stride` words apart, times the values of tokens [begin, end).
template <class Path, Source S, int Rows, int Vectors>
inline void stream_values(const RowStream& values, Span span, const float* p, int64_t stride, int64_t column,
                          const StreamSums& out) {
  constexpr int kPlanes = Path::kPlanes, kElements = Path::kElements;
  using Dot = typename Path::Values;
  for (; column + Vectors * kLanes <= out.columns; column += Vectors * kLanes) {
    typename Dot::Sum sums[Rows * kPlanes][Vectors];
    unroll2<Rows * kPlanes, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
      if constexpr (kPlanes == 2)
        sums[m][v] = zero_i();
      else
        sums[m][v] = mul_f(load_f(out.sums + m * out.columns + column + v * kLanes), set1_f(out.correction[m]));
    });
    for (int64_t t = span.begin; t < span.end; t += kElements) {
      vi words[Vectors];
      load_values<S>(values.rows + t, values.ahead + t, column, words);
      decltype(Dot::b(p)) w[Vectors];
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = Dot::from(words[v]); });
      unroll<Rows * kPlanes>([&](auto m) IPEX_QUANT_INLINE {
        const auto x = Dot::a(p + m * stride + t / kElements);
        unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { Dot::add(sums[m][v], x, w[v]); });
      });
    }
    unroll2<Rows, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
      float* to = out.sums + m * out.columns + column + v * kLanes;
      if constexpr (kPlanes == 2) {
        const vf value = mul_f(planes_value(sums[2 * m][v], sums[2 * m + 1][v]), set1_f(out.factor[m]));
        store_f(to, fma_f(load_f(to), set1_f(out.correction[m]), value));
      } else {
        store_f(to, sums[m][v]);
      }
    });
  }
  if constexpr (Vectors > (S == Source::kPairs ? 2 : 1))
    if (column < out.columns) stream_values<Path, S, Rows, Vectors / 2>(values, span, p, stride, column, out);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
