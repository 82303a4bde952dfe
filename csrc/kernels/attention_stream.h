// Few rows, as in decode: keys and values are not packed but multiplied as they come from memory, in their order.
#pragma once

#include "kernels/attention_dots.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int kSecondLevel = 2;  // cache that prefetches go to: the first level has no room for two blocks
constexpr int kStreamSums = kLanes == 16 ? 16 : 8;  // registers

// Whole vectors only.
template <class Path>
inline bool can_stream(int64_t rows, int64_t key_dim, int64_t value_dim) {
  return rows <= kStreamedRows && key_dim % (kLanes * Path::kElements) == 0 && key_dim <= 512 &&
         value_dim % (2 * kLanes) == 0;
}

template <class Path>
IPEX_QUANT_INLINE inline void add_lanes(typename Path::Scores::Sum& sum, vi key, const float* query) {
  if constexpr (Path::kElements == 4) key = sub_i8(key, set1_i(int32_t(0x80808080)));
  Path::Scores::add(sum, Path::Scores::lanes(query), Path::Scores::from(key));
}

// Rows that will be read later, of which as much is asked for as is read meanwhile: the hardware does not foresee rows
// that are read in turns, and drops what is asked for in bursts.
class RowsAhead {
 public:
  RowsAhead(const uint8_t* const* rows, int64_t count, int64_t bytes)
      : row_(rows), last_(rows + count - 1), bytes_(bytes) {}

  template <int Lines>
  IPEX_QUANT_INLINE void ask() {
    for (int i = 0; i < Lines; ++i) {
      __builtin_prefetch(*row_ + at_, 0, kSecondLevel);
      at_ += kLine;
      const bool done = at_ >= bytes_;
      at_ = done ? 0 : at_;
      row_ += done && row_ < last_;
    }
  }

  static constexpr int64_t kLine = 64;

 private:
  const uint8_t *const *row_, *const *last_;
  int64_t bytes_, at_ = 0;
};

// Of that many bytes, at least one.
constexpr int lines(int64_t bytes) { return bytes < RowsAhead::kLine ? 1 : int(bytes / RowsAhead::kLine); }

// Scores of Rows queries of `words` words each with keys [begin, end) to [Rows][stride]; `offset` is what the products
// of bytes start at. Keys are read whole, one after the other, which is the order that memory is fastest in.
template <class Path, Source S, int Rows>
inline void stream_scores(const uint8_t* const* keys, RowsAhead ahead, Span span, const float* query,
                          const int32_t* offset, int64_t words, int64_t steps, float* scores, int64_t stride) {
  constexpr int kTokens = int(kLanes) / Rows;
  using Sum = typename Path::Scores::Sum;
  int32_t offsets[kLanes];
  if constexpr (Path::kElements == 4)
    for (int i = 0; i < kLanes; ++i) offsets[i] = offset[i / kTokens];
  for (int64_t t = span.begin; t < span.end; t += kTokens) {
    Sum sums[kLanes];
    unroll<kLanes>([&](auto i) IPEX_QUANT_INLINE { sums[i] = Sum{}; });
    unroll<kTokens>([&](auto j) IPEX_QUANT_INLINE {
      for (int64_t step = 0; step < steps; ++step) {
        const vi key = load_words<S>(keys[t + j] + step * kLanes * word_bytes(S));
        ahead.ask<lines(kLanes * word_bytes(S))>();
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          add_lanes<Path>(sums[m * kTokens + j], key, query + m * words + step * kLanes);
        });
      }
    });
    float lanes[kLanes];
    if constexpr (Path::kElements == 4)
      store_f(lanes, cvt_f(add_i(reduce_lanes(sums), load_i(offsets))));
    else
      store_f(lanes, reduce_lanes(sums));
    for (int m = 0; m < Rows; ++m) std::memcpy(scores + m * stride + t, lanes + m * kTokens, kTokens * sizeof(float));
  }
}

// Quads of four rows of `words` words each: [step][lane of a quad][group of four rows][kLanes].
template <int Rows>
inline void pack_query_quads(const float* query, int64_t words, int64_t steps, float* packed) {
  constexpr int kGroups = Rows / 4;
  for (int64_t step = 0; step < steps; ++step, packed += Rows * kLanes)
    unroll<kGroups>([&](auto group) IPEX_QUANT_INLINE {
      vi x[4];
      unroll<4>([&](auto i) IPEX_QUANT_INLINE { x[i] = load_i(query + (4 * group + i) * words + step * kLanes); });
      transpose_quads(x);
      unroll<4>([&](auto i) IPEX_QUANT_INLINE { store_i(packed + (i * kGroups + group) * kLanes, x[i]); });
    });
}

// As stream_scores for four or eight rows: a word of a key meets four rows at once, so that sums need few additions
// across lanes. The sums of a token are over every fourth word; lane i of a quad is row i of its group.
template <class Path, Source S, int Rows>
inline void stream_quad_scores(const uint8_t* const* keys, RowsAhead ahead, Span span, const float* query,
                               const int32_t* offset, int64_t steps, float* scores, int64_t stride) {
  constexpr int kGroups = Rows / 4, kQuads = int(kLanes) / 4;
  using Sum = typename Path::Scores::Sum;
  for (int64_t t = span.begin; t < span.end; t += kLanes) {
    vi totals[kGroups][4];
    unroll<4>([&](auto part) IPEX_QUANT_INLINE {
      const uint8_t* const* rows = keys + t + part * kQuads;
      Sum sums[kGroups][kQuads];
      unroll2<kGroups, kQuads>([&](auto group, auto j) IPEX_QUANT_INLINE { sums[group][j] = Sum{}; });
      const float* q = query;
      for (int64_t step = 0; step < steps; ++step) {
        vi key[kQuads];
        unroll<kQuads>([&](auto j) IPEX_QUANT_INLINE {
          key[j] = load_words<S>(rows[j] + step * kLanes * word_bytes(S));
          if constexpr (S == Source::kQuads) key[j] = sub_i8(key[j], set1_i(int32_t(0x80808080)));
        });
        ahead.ask<lines(kQuads * kLanes * word_bytes(S))>();
        unroll<4>([&](auto i) IPEX_QUANT_INLINE {
          decltype(Path::Scores::lanes(q)) x[kGroups];
          unroll<kGroups>([&](auto group) IPEX_QUANT_INLINE { x[group] = Path::Scores::lanes(q + group * kLanes); });
          unroll<kQuads>([&](auto j) IPEX_QUANT_INLINE {
            const auto word = Path::Scores::from(spread_quads<decltype(i)::value>(key[j]));
            unroll<kGroups>([&](auto group) IPEX_QUANT_INLINE { Path::Scores::add(sums[group][j], x[group], word); });
          });
          q += kGroups * kLanes;
        });
      }
      unroll<kGroups>([&](auto group) IPEX_QUANT_INLINE { totals[group][part] = sum_quads(sums[group]); });
    });
    unroll<kGroups>([&](auto group) IPEX_QUANT_INLINE {
      transpose_quads(totals[group]);
      unroll<4>([&](auto i) IPEX_QUANT_INLINE {
        constexpr int kRow = 4 * decltype(group)::value + decltype(i)::value;
        const vi total = columns_of_quads(totals[group][i]);
        vf score = as_f(total);
        if constexpr (Path::kElements == 4) score = cvt_f(add_i(total, set1_i(offset[kRow])));
        store_f(scores + kRow * stride + t, score);
      });
    });
  }
}

// Words of kElements rows of values, from `column` on.
template <Source S, int Vectors>
IPEX_QUANT_INLINE inline void load_values(const uint8_t* const* rows, RowsAhead& ahead, int64_t column,
                                          vi (&words)[Vectors]) {
  constexpr int64_t kSize = element_bytes(S);
  ahead.ask<lines(word_elements(S) * Vectors * kLanes * kSize)>();
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

// Adds probabilities, in rows that are `stride` words apart, times the values of tokens [begin, end).
template <class Path, Source S, int Rows, int Vectors>
inline void stream_values(const uint8_t* const* values, RowsAhead& ahead, Span span, const float* p, int64_t stride,
                          int64_t column, const StreamSums& out) {
  constexpr int kElements = Path::kElements;
  using Dot = typename Path::Values;
  for (; column + Vectors * kLanes <= out.columns; column += Vectors * kLanes) {
    typename Dot::Sum sums[Rows][Vectors];
    unroll2<Rows, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
      if constexpr (kElements == 4)
        sums[m][v] = zero_i();
      else
        sums[m][v] = mul_f(load_f(out.sums + m * out.columns + column + v * kLanes), set1_f(out.correction[m]));
    });
    for (int64_t t = span.begin; t < span.end; t += kElements) {
      vi words[Vectors];
      load_values<S>(values + t, ahead, column, words);
      decltype(Dot::b(p)) w[Vectors];
      unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { w[v] = Dot::from(words[v]); });
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        const auto x = Dot::a(p + m * stride + t / kElements);
        unroll<Vectors>([&](auto v) IPEX_QUANT_INLINE { Dot::add(sums[m][v], x, w[v]); });
      });
    }
    unroll2<Rows, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
      float* to = out.sums + m * out.columns + column + v * kLanes;
      if constexpr (kElements == 4) {
        const vf value = mul_f(cvt_f(sums[m][v]), set1_f(out.factor[m]));
        store_f(to, fma_f(load_f(to), set1_f(out.correction[m]), value));
      } else {
        store_f(to, sums[m][v]);
      }
    });
  }
  if constexpr (Vectors > (S == Source::kPairs ? 2 : 1))
    if (column < out.columns) stream_values<Path, S, Rows, Vectors / 2>(values, ahead, span, p, stride, column, out);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
