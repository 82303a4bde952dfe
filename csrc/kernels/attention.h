// Flash attention: blocks of tokens are packed and met by all rows of a task, which keep the running maximum and the
// sums of the softmax (Milakov and Gimelshein 2018, Dao et al. 2022). Prefill, decode and every kind of cache run this.
#pragma once

#include <type_traits>

#include "kernels/attention_stream.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// ---------------------------------------------------------------------------------------------------------- exponent
// 2^x for x that is not above 0 by more than rounding; 0 below 2^-126. Minimax polynomials of relative error 3e-6,
// which is enough for bf16 and for bytes, and 8e-8.
template <bool Coarse>
inline vf exp2_f(vf x) {
  x = max_f(set1_f(-127.0f), x);  // NaN stays
  const vi n = round_i(x);
  const vf r = sub_f(x, cvt_f(n));
  constexpr float kCoarsePowers[] = {5.5917859e-2f, 0.24024744f, 0.69312179f, 0.99999928f};
  constexpr float kPowers[] = {9.675541e-3f, 5.5507131e-2f, 0.2402212f, 0.69314694f, 1.0000001f};
  vf p = set1_f(Coarse ? 9.5701013e-3f : 1.3276471e-3f);
  if constexpr (Coarse)
    for (const float c : kCoarsePowers) p = fma_f(p, r, set1_f(c));
  else
    for (const float c : kPowers) p = fma_f(p, r, set1_f(c));
  return mul_f(p, as_f(sll_i<23>(add_i(n, set1_i(127)))));
}

inline float exp2_scalar(float x) {
  float lanes[kLanes];
  store_f(lanes, exp2_f<false>(set1_f(x)));
  return lanes[0];
}

constexpr float kLog2E = 1.44269504f, kMinusInfinity = -__builtin_inff();
constexpr float kLowestMask = -0x1p126f;  // times kLog2E it is finite
constexpr int32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// -------------------------------------------------------------------------------------------------------------- task
constexpr int64_t kAttentionAlign = 64;

// Regions of the scratch memory of a task, in bytes from its aligned start. Tasks that only stream pack nothing, and so
// little memory that a thread gets it from what it has at hand.
struct AttentionScratch {
  int64_t query, keys, values, scores, probabilities, sums, row_state, token_state, zeros, bytes;

  AttentionScratch(const AttentionArgs& a, bool streams) {
    // Sizes are those of floats, which need the most, in whole cache lines.
    const int64_t key_words = (a.key_dim + 15) / 16 * 16;
    int64_t at = 0;
    const auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += (size + kAttentionAlign - 1) / kAttentionAlign * kAttentionAlign;
      return begin;
    };
    query = take(a.max_rows * key_words * 4);
    keys = take((streams ? a.max_rows : a.block) * key_words * 4);
    values = take(streams ? 0 : a.block * a.value_columns() * 4);
    scores = take(a.max_rows * a.block * 4);
    probabilities = take(a.max_rows * a.block * 2);
    sums = take(a.max_rows * a.value_columns() * 4);
    row_state = take(a.max_rows * 6 * 4);
    token_state = take(a.block * 40);
    zeros = take((a.key_dim > a.value_dim ? a.key_dim : a.value_dim) * 4 + 64);
    bytes = at + kAttentionAlign;
  }
};

template <class Path>
inline AttentionScratch scratch_of(const AttentionArgs& args) {
  return {args, can_stream<Path>(args.max_rows, args.key_dim, args.value_dim)};
}

template <class Path>
class AttentionRun {
 public:
  AttentionRun(const AttentionArgs& args, const AttentionTask& task, uint8_t* scratch)
      : args_(args), task_(task), sequence_(*task.sequence), columns_(args.value_columns()), block_(args.block) {
    const AttentionScratch at = scratch_of<Path>(args);
    uint8_t* base = scratch + (-reinterpret_cast<uintptr_t>(scratch) & (kAttentionAlign - 1));
    const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
    query_words_ = (words(kSource, args.key_dim) + 15) / 16 * 16;
    query_ = floats(at.query), keys_ = floats(at.keys), values_ = floats(at.values);
    scores_ = floats(at.scores), sums_ = floats(at.sums);
    probabilities_ = Path::kElements == 1 ? scores_ : floats(at.probabilities);
    float* rows = floats(at.row_state);
    const auto next_rows = [&] { return (rows += args.max_rows) - args.max_rows; };
    maximum_ = next_rows(), total_ = next_rows(), correction_ = next_rows();
    query_scale_ = next_rows(), value_factor_ = next_rows();
    query_offset_ = reinterpret_cast<int32_t*>(rows);
    key_rows_ = reinterpret_cast<const uint8_t**>(base + at.token_state);
    value_rows_ = key_rows_ + block_;
    key_ahead_ = value_rows_ + block_;
    key_scales_ = reinterpret_cast<float*>(key_ahead_ + block_);
    value_scales_ = key_scales_ + block_;
    mask_ = value_scales_ + block_;
    zeros_ = base + at.zeros;
    std::memset(base + at.zeros, 0, size_t(at.bytes - kAttentionAlign - at.zeros));
  }

  void run() {
    pack_queries();
    std::memset(sums_, 0, size_t(task_.rows * columns_) * sizeof(float));
    for (int64_t r = 0; r < task_.rows; ++r) maximum_[r] = kMinusInfinity, total_[r] = 0.0f;
    const bool stream = !Path::kTiles && can_stream<Path>(task_.rows, args_.key_dim, args_.value_dim);
    if (stream && task_.rows > 2)
      task_.rows > 4 ? pack_query_quads<8>(query_, query_words_, steps(), keys_)
                     : pack_query_quads<4>(query_, query_words_, steps(), keys_);
    for (start_ = task_.begin; start_ < task_.end; start_ += block_) {
      count_ = task_.end - start_ < block_ ? task_.end - start_ : block_;
      find_tokens();
      stream ? stream_block() : pack_block();
    }
    task_.partial ? store_partial() : store_output();
  }

 private:
  void pack_block() {
    pack(args_.key_dim, key_rows_, keys_, block_, true);
    each_tile([&](int64_t row, int64_t count, Span span) {
      if constexpr (Path::kTiles)
        Path::score({query_ + row * query_words_, query_words_}, {keys_, block_}, words(kSource, args_.key_dim), count,
                    span, query_offset_ + row, {scores_ + row * block_, block_});
      else
        with_rows(count, [&](auto rows) { score<decltype(rows)::value>(row, span); });
      softmax(row, count, span);
    });
    pack(args_.value_dim, value_rows_, values_, columns_, false);
    each_tile([&](int64_t row, int64_t count, Span span) {
      if constexpr (Path::kTiles)
        Path::accumulate({probabilities_ + row * probability_stride(), probability_stride()}, {values_, columns_},
                         count, span, correction_ + row, value_factor_ + row, {sums_ + row * columns_, columns_});
      else
        with_rows(count, [&](auto rows) { accumulate<decltype(rows)::value, kTileVectors>(row, span, 0); });
    });
  }

  void stream_block() {
    if constexpr (Path::kTiles) return;  // which are for many rows
    find_ahead();
    const Span span = span_of_rows(0, task_.rows);
    if (span.begin >= span.end) return;
    with_source([&](auto source) {
      constexpr int kFrom = decltype(source)::value;
      unroll<4>([&](auto i) {
        constexpr int kRows = 1 << decltype(i)::value;
        if (task_.rows <= kRows && 2 * task_.rows > kRows) stream_rows<kFrom, kRows>(span);
      });
    });
  }

  // As many rows as are multiplied at once; there is room for those that are none of the task's.
  template <int S, int Rows>
  void stream_rows(Span span) {
    constexpr Source kFrom = Source(S);
    constexpr int kVectors = kStreamSums / Rows;
    constexpr int64_t element = element_bytes(kFrom);
    const RowsAhead values(value_rows_ + span.begin, span.end - span.begin, args_.value_dim * element);
    RowsAhead keys(key_ahead_, block_, args_.key_dim * element);
    if constexpr (Rows > 2)
      stream_quad_scores<Path, kFrom, Rows>(key_rows_, values, span, keys_, query_offset_, steps(), scores_, block_);
    else
      stream_scores<Path, kFrom, Rows>(key_rows_, values, span, query_, query_offset_, query_words_, steps(), scores_,
                                       block_);
    softmax(0, task_.rows, span);
    stream_values < Path, kFrom, Rows,
        kVectors<8 ? kVectors : 8>(value_rows_, keys, span, probabilities_, probability_stride(), 0,
                                   {sums_, columns_, correction_, value_factor_});
  }

  static constexpr Source kSource = Path::kElements == 4   ? Source::kQuads
                                    : Path::kElements == 2 ? Source::kPairs
                                                           : Source::kFloat32;

  int64_t probability_stride() const { return block_ / Path::kElements; }
  int64_t steps() const { return args_.key_dim / (kLanes * Path::kElements); }  // vectors of a streamed key
  int64_t query_of(int64_t r) const { return (task_.row + r) / args_.group; }
  int64_t head_of(int64_t r) const { return task_.head * args_.group + (task_.row + r) % args_.group; }
  // Tokens of this block that row r sees.
  Span span_of(int64_t r) const {
    const int64_t query = query_of(r);
    const int64_t begin = args_.first_token(sequence_, query) - start_,
                  end = args_.end_token(sequence_, query) - start_;
    return {begin > 0 ? begin : 0, end < count_ ? end : count_};
  }

  // Those that some of the rows see, in whole vectors.
  Span span_of_rows(int64_t row, int64_t count) const {
    return {span_of(row).begin / kLanes * kLanes, (span_of(row + count - 1).end + kLanes - 1) / kLanes * kLanes};
  }

  // Calls f(first row, count, tokens that they see, in whole vectors) for rows that are met together, unless they see
  // none.
  template <class F>
  void each_tile(F f) const {
    const int64_t tiles = (task_.rows + Path::kRows - 1) / Path::kRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * task_.rows / tiles, count = (tile + 1) * task_.rows / tiles - row;
      const Span span = span_of_rows(row, count);
      if (span.begin < span.end) f(row, count, span);
    }
  }

  // Calls f(Index<count>).
  template <class F>
  static void with_rows(int64_t count, F f) {
    unroll<Path::kRows>([&](auto i) {
      if (count == i + 1) f(Index<decltype(i)::value + 1>{});
    });
  }

  void pack_queries() {
    for (int64_t r = 0; r < task_.rows; ++r) {
      const uint8_t* x = sequence_.query + head_of(r) * args_.query_head + query_of(r) * args_.query_token;
      float* to = query_ + r * query_words_;
      query_scale_[r] = 1.0f;
      if constexpr (Path::kElements == 4) {
        const float* factors = args_.key_factors ? args_.key_factors + task_.head * args_.key_dim : nullptr;
        query_scale_[r] = quantize_query(
            {args_.type, args_.cache, args_.key_dim, x, factors, reinterpret_cast<uint8_t*>(to), nullptr}, query_words_,
            query_offset_ + r);
      } else if constexpr (Path::kElements == 2) {
        std::memset(to, 0, size_t(query_words_) * sizeof(float));
        std::memcpy(to, x, size_t(2 * args_.key_dim));
      } else {
        widen_query(x, args_.type, args_.key_dim, to);
      }
    }
  }

  // Calls f(t, count, row, token) for runs of tokens [begin, end) of the sequence, counted from start_, that are
  // neighbours in a row of the cache.
  template <class F>
  void each_run(int64_t begin, int64_t end, F f) const {
    if (!sequence_.table) {
      if (begin < end) f(begin, end - begin, sequence_.row, start_ + begin + sequence_.first);
      return;
    }
    for (int64_t t = begin, count; t < end; t += count) {
      const int64_t token = start_ + t;
      const int64_t row = sequence_.table[args_.page ? token / args_.page : token];
      if (args_.page) {
        const int64_t place = token % args_.page;
        count = args_.page - place < end - t ? args_.page - place : end - t;
        f(t, count, row, place);
      } else {
        for (count = 1; t + count < end && sequence_.table[token + count] == row;) ++count;
        f(t, count, row, token);
      }
    }
  }

  static void find_rows(const TokenView& view, const uint8_t* first, int64_t count, const uint8_t** rows) {
    for (int64_t i = 0; i < count; ++i) rows[i] = first + i * view.token;
  }

  static void read_scales(const TokenView& view, const uint8_t* first, int64_t count, float* scales) {
    if (view.token == int64_t(sizeof(float))) {
      std::memcpy(scales, first, size_t(count) * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < count; ++i) std::memcpy(scales + i, first + i * view.token, sizeof(float));
  }

  // Where the tokens of the block are, up to a multiple of 16, the last of which may be zeros.
  void find_tokens() {
    each_run(0, count_, [&](int64_t t, int64_t count, int64_t row, int64_t token) IPEX_QUANT_INLINE {
      find_rows(args_.key, args_.key.at(row, task_.head, token), count, key_rows_ + t);
      find_rows(args_.value, args_.value.at(row, task_.head, token), count, value_rows_ + t);
      if constexpr (Path::kElements == 4) {
        read_scales(args_.key_scales, args_.key_scales.at(row, task_.head, token), count, key_scales_ + t);
        read_scales(args_.value_scales, args_.value_scales.at(row, task_.head, token), count, value_scales_ + t);
      }
    });
    for (int64_t t = count_; t < (count_ + 15) / 16 * 16; ++t) {
      key_rows_[t] = value_rows_[t] = zeros_;
      key_scales_[t] = value_scales_[t] = 0.0f;
    }
  }

  // Where the keys of the next block are, in this task or in the next.
  void find_ahead() {
    const int64_t left = sequence_.tokens - start_, end = left < 2 * block_ ? left : 2 * block_;
    each_run(block_, end, [&](int64_t t, int64_t count, int64_t row, int64_t token) IPEX_QUANT_INLINE {
      find_rows(args_.key, args_.key.at(row, task_.head, token), count, key_ahead_ + t - block_);
    });
    for (int64_t t = end > block_ ? end - block_ : 0; t < block_; ++t) key_ahead_[t] = zeros_;
  }

  // Calls f(Index<source>).
  template <class F>
  void with_source(F f) const {
    if constexpr (Path::kElements > 1)
      f(Index<int(kSource)>{});
    else if (args_.cache == CacheType::kFloat8)
      f(Index<int(Source::kFloat8)>{});
    else if (args_.type == kFloat32)
      f(Index<int(Source::kFloat32)>{});
    else if (args_.type == kBFloat16)
      f(Index<int(Source::kBFloat16)>{});
    else
      f(Index<int(Source::kHalf)>{});
  }

  void pack(int64_t dim, const uint8_t* const* rows, float* to, int64_t stride, bool keys) {
    with_source([&](auto source) {
      constexpr Source kFrom = Source(decltype(source)::value);
      if (keys)
        pack_keys<kFrom>(rows, count_, dim, stride, to);
      else
        pack_values<kFrom>(rows, (count_ + 15) / 16 * 16, dim, stride, to);
    });
  }

  template <int Rows>
  void score(int64_t row, Span span) {
    constexpr int kVectors = kTileVectors;
    using Dot = typename Path::Scores;
    const float* query = query_ + row * query_words_;
    for (int64_t column = span.begin / kAttentionColumns * kAttentionColumns; column < span.end;
         column += kVectors * kLanes) {
      typename Dot::Sum sums[Rows][kVectors];
      unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        if constexpr (Path::kElements == 4)
          sums[m][v] = set1_i(query_offset_[row + m]);
        else
          sums[m][v] = zero_f();
      });
      multiply<Dot>(sums, query, query_words_, keys_ + column, block_, words(kSource, args_.key_dim));
      unroll2<Rows, kVectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        float* to = scores_ + (row + m) * block_ + column + v * kLanes;
        if constexpr (Path::kElements == 4)
          store_f(to, cvt_f(sums[m][v]));
        else
          store_f(to, sums[m][v]);
      });
    }
  }

  // Scores of rows [row, row + count) to probabilities, several at a time, whose latencies then overlap.
  void softmax(int64_t row, int64_t count, Span span) {
    const bool all_seen = span_of(row).end >= span.end && span_of(row + count - 1).begin <= span.begin;
    for (; count >= 4; row += 4, count -= 4) softmax_rows<4>(row, span, all_seen);
    if (count >= 2) softmax_rows<2>(row, span, all_seen), row += 2;
    if (count % 2) softmax_rows<1>(row, span, all_seen);
  }

  // 0 for what a row does not see in `span`, and the rows' new maxima and totals.
  template <int Rows>
  void softmax_rows(int64_t row, Span span, bool all_seen) {
    float* const s = scores_ + row * block_;
    if constexpr (Path::kElements == 4)
      for (int64_t t = span.begin; t < span.end; t += kLanes)
        unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
          store_f(s + m * block_ + t, mul_f(load_f(s + m * block_ + t), load_f(key_scales_ + t)));
        });
    const bool transformed =
        !(args_.scale > 0.0f) || args_.softcap > 0.0f || args_.alibi || args_.mask.type != MaskType::kNone;
    vf factor[Rows], largest[Rows], minus_reference[Rows], total[Rows], weighted[Rows];  // by the scales of values
    for (int m = 0; m < Rows; ++m) {
      if (transformed) transform(row + m, span);
      if (!all_seen) hide_unseen(row + m, span);
    }
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      factor[m] = set1_f(transformed ? 1.0f : args_.scale * query_scale_[row + m] * kLog2E);
      largest[m] = set1_f(kMinusInfinity);
      total[m] = zero_f();
    });
    for (int64_t t = span.begin; t < span.end; t += kLanes)
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE { largest[m] = max_f(largest[m], load_f(s + m * block_ + t)); });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      minus_reference[m] = set1_f(-raise_maximum(row + m, reduce_max(mul_f(largest[m], factor[m]))));
      largest[m] = weighted[m] = zero_f();
    });
    for (int64_t t = span.begin; t < span.end; t += kLanes)
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        const vf e = exp2_f<(Path::kElements > 1)>(fma_f(load_f(s + m * block_ + t), factor[m], minus_reference[m]));
        total[m] = add_f(total[m], e);
#if defined(IPEX_QUANT_BF16_DOT)
        if constexpr (Path::kElements == 2) {
          float* p = probabilities_ + (row + m) * probability_stride();
          return store_bf16_operand(reinterpret_cast<uint8_t*>(p) + 2 * t, e);
        }
#endif
        vf x = e;
        if constexpr (Path::kElements == 4) {
          x = mul_f(e, load_f(value_scales_ + t));
          largest[m] = max_f(largest[m], x);
          weighted[m] = add_f(weighted[m], x);
        }
        store_f(s + m * block_ + t, x);
      });
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      total_[row + m] = total_[row + m] * correction_[row + m] + reduce_add(total[m]);
    });
    if constexpr (Path::kElements == 4) quantize_probabilities<Rows>(row, span, largest, weighted);
  }

  // Takes the largest score of a block into the maximum of row r. Returns what is subtracted from its scores.
  float raise_maximum(int64_t r, float block_maximum) {
    const float previous = maximum_[r], maximum = block_maximum > previous ? block_maximum : previous;
    const float reference = maximum == kMinusInfinity ? 0.0f : maximum;  // nothing seen so far
    correction_[r] = maximum == previous ? 1.0f : exp2_scalar(previous - reference);
    maximum_[r] = maximum;
    return reference;
  }

  void hide_unseen(int64_t r, Span span) {
    const Span seen = span_of(r);
    const auto hide = [&](int64_t t) IPEX_QUANT_INLINE {  // the lanes of t on that are not in seen
      const vi token = add_i(load_i(kLaneNumbers), set1_i(int32_t(t)));
      const vi before = sub_i(set1_i(int32_t(seen.begin)), token), behind = sub_i(token, set1_i(int32_t(seen.end - 1)));
      float* s = scores_ + r * block_ + t;
      store_f(s, if_zero(max_i(max_i(before, behind), zero_i()), load_f(s), set1_f(kMinusInfinity)));
    };
    int64_t t = span.begin;
    for (; t < span.end && t < seen.begin; t += kLanes) hide(t);
    const int64_t whole = t > seen.end ? t : t + (seen.end - t) / kLanes * kLanes;
    for (t = whole; t < span.end; t += kLanes) hide(t);
  }

  // Everything but the product itself, in the order that eager code has.
  void transform(int64_t r, Span span) {
    float* s = scores_ + r * block_;
    const int64_t query = query_of(r), head = head_of(r);
    const vf scale = set1_f(args_.scale * query_scale_[r]);
    if (args_.mask.type != MaskType::kNone) read_mask(head, query, span);
    const int64_t distance = start_ - (sequence_.tokens - sequence_.queries + query);
    for (int64_t t = span.begin; t < span.end; t += kLanes) {
      vf x = mul_f(load_f(s + t), scale);
      if (args_.softcap > 0.0f) x = mul_f(tanh_f(div_f(x, set1_f(args_.softcap))), set1_f(args_.softcap));
      if (args_.alibi) {
        const vi steps = add_i(load_i(kLaneNumbers), set1_i(int32_t(distance + t)));
        x = fma_f(cvt_f(steps), set1_f(args_.alibi[head]), x);
      }
      if (args_.mask.type != MaskType::kNone) x = add_f(x, load_f(mask_ + t));
      store_f(s + t, mul_f(x, set1_f(kLog2E)));
    }
  }

  // What is added to the scores of row (head, query). Finite numbers stay so in all that follows: a row of which
  // everything is masked by the lowest float then gets the mean of what it sees, and 0 only where that is nothing.
  void read_mask(int64_t head, int64_t query, Span span) {
    const AttentionMask& mask = args_.mask;
    const uint8_t* from =
        mask.data + sequence_.index * mask.batch + head * mask.head + query * mask.query + start_ * mask.token;
    const int64_t size = mask.type == MaskType::kBool ? 1 : float_size(mask.float_type);
    const vf hidden = set1_f(kMinusInfinity);
    for (int64_t t = span.begin; t < span.end; t += kLanes) {
      const uint8_t* p = from + t * mask.token;
      uint8_t elements[4 * kLanes] = {};
      if (mask.token != size || count_ - t < kLanes) {
        for (int64_t i = 0; i < kLanes && t + i < count_; ++i)
          std::memcpy(elements + i * size, p + i * mask.token, size_t(size));
        p = elements;
      }
      vf x;
      if (mask.type == MaskType::kBool) {
        x = if_zero(load_u8(p), hidden, zero_f());
      } else {
        x = load_float(p, mask.float_type, 0);
        x = if_zero(sub_i(as_i(x), as_i(hidden)), x, max_f(set1_f(kLowestMask), x));
      }
      store_f(mask_ + t, x);
    }
  }

  // Probabilities times the scales of the values, as bytes relative to the largest.
  template <int Rows>
  void quantize_probabilities(int64_t row, Span span, const vf (&largest)[Rows], const vf (&sum)[Rows]) {
    vf inverse[Rows];
    unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
      const float range = reduce_max(largest[m]), total = reduce_add(sum[m]);
      inverse[m] = set1_f(range >= 0x1p-100f ? 255.0f / range : 0.0f);
      value_factor_[row + m] = range / 255.0f + (total - total);  // NaN if any is not finite
    });
    const float* s = scores_ + row * block_;
    uint8_t* to = reinterpret_cast<uint8_t*>(probabilities_ + row * probability_stride());
    for (int64_t t = span.begin; t < span.end; t += kLanes)
      unroll<Rows>([&](auto m) IPEX_QUANT_INLINE {
        store_u8(to + m * block_ + t, round_i(mul_f(load_f(s + m * block_ + t), inverse[m])));
      });
  }

  template <int Rows, int Vectors>
  void accumulate(int64_t row, Span span, int64_t column) {
    using Dot = typename Path::Values;
    const int64_t stride = probability_stride(), first = span.begin / Path::kElements;
    const float* p = probabilities_ + row * stride + first;
    for (; column + Vectors * kLanes <= columns_; column += Vectors * kLanes) {
      float* to = sums_ + row * columns_ + column;
      typename Dot::Sum sums[Rows][Vectors];
      unroll2<Rows, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        if constexpr (Path::kElements == 4)
          sums[m][v] = zero_i();
        else
          sums[m][v] = mul_f(load_f(to + m * columns_ + v * kLanes), set1_f(correction_[row + m]));
      });
      multiply<Dot>(sums, p, stride, values_ + first * columns_ + column, columns_,
                    (span.end - span.begin) / Path::kElements);
      unroll2<Rows, Vectors>([&](auto m, auto v) IPEX_QUANT_INLINE {
        float* at = to + m * columns_ + v * kLanes;
        if constexpr (Path::kElements == 4) {
          const vf value = mul_f(cvt_f(sums[m][v]), set1_f(value_factor_[row + m]));
          store_f(at, fma_f(load_f(at), set1_f(correction_[row + m]), value));
        } else {
          store_f(at, sums[m][v]);
        }
      });
    }
    if constexpr (Vectors > 1)
      if (column < columns_) accumulate<Rows, 1>(row, span, column);
  }

  void store_partial() {
    std::memcpy(task_.partial, sums_, size_t(task_.rows * columns_) * sizeof(float));
    float* state = task_.partial + task_.rows * columns_;
    std::memcpy(state, maximum_, size_t(task_.rows) * sizeof(float));
    std::memcpy(state + task_.rows, total_, size_t(task_.rows) * sizeof(float));
  }

  void store_output();

  const AttentionArgs& args_;
  const AttentionTask& task_;
  const AttentionSequence& sequence_;
  const int64_t columns_, block_;
  int64_t query_words_, start_ = 0, count_ = 0;
  float *query_, *keys_, *values_, *scores_, *probabilities_, *sums_;
  float *maximum_, *total_, *correction_, *query_scale_, *value_factor_;
  int32_t* query_offset_;
  const uint8_t **key_rows_, **value_rows_, **key_ahead_;
  float *key_scales_, *value_scales_, *mask_;
  const uint8_t* zeros_;
};

// Divides by the total, which is 0 where everything was masked.
inline void store_row(const AttentionArgs& args, const AttentionTask& task, int64_t r, const float* sums, float total) {
  const int64_t query = (task.row + r) / args.group, in_group = (task.row + r) % args.group;
  const int64_t heads = args.kv_heads * args.group;
  const int64_t at = (query * heads + task.head * args.group + in_group) * args.value_dim;
  uint8_t* to = task.sequence->output;
  const vf inverse = set1_f(total == 0.0f ? 0.0f : args.value_factor / total);
  for (int64_t d = 0; d < args.value_dim; d += kLanes) {
    const vf x = mul_f(load_f(sums + d), inverse);
    if (args.value_dim - d >= kLanes)
      store_float(to, args.type, at + d, x);
    else
      store_tail(to, args.type, at + d, args.value_dim - d, x);
  }
}

template <class Path>
void AttentionRun<Path>::store_output() {
  for (int64_t r = 0; r < task_.rows; ++r) store_row(args_, task_, r, sums_ + r * columns_, total_[r]);
}

// Calls f with the path of a call, as a null pointer.
template <class F>
inline auto with_path(const AttentionArgs& args, F f) {
  if (args.cache == CacheType::kInt8) return f(static_cast<BytePath*>(nullptr));
#if defined(IPEX_QUANT_BF16_DOT)
  if (args.cache == CacheType::kFloat && args.type == kBFloat16) return f(static_cast<PairPath*>(nullptr));
#endif
  return f(static_cast<FloatPath*>(nullptr));
}

inline int64_t attention_scratch(const AttentionArgs& args) {
  return with_path(args, [&](auto* path) { return scratch_of<std::remove_pointer_t<decltype(path)>>(args).bytes; });
}

inline void attention_task(const AttentionArgs& args, const AttentionTask& task, uint8_t* scratch) {
  with_path(args, [&](auto* path) { AttentionRun<std::remove_pointer_t<decltype(path)>>(args, task, scratch).run(); });
}

// Joins the partial results of the same rows. `scratch` holds a row of sums.
inline void attention_merge(const AttentionArgs& args, const AttentionMerge& merge, uint8_t* scratch) {
  const int64_t columns = args.value_columns(), rows = merge.task.rows, size = args.partial_size(rows);
  float* sums = reinterpret_cast<float*>(scratch);
  for (int64_t r = 0; r < rows; ++r) {
    const auto state = [&](int64_t i) { return merge.partials + i * size + rows * columns + r; };
    float maximum = kMinusInfinity, total = 0.0f;
    for (int64_t i = 0; i < merge.count; ++i) maximum = *state(i) > maximum ? *state(i) : maximum;
    const float reference = maximum == kMinusInfinity ? 0.0f : maximum;
    std::memset(sums, 0, size_t(columns) * sizeof(float));
    for (int64_t i = 0; i < merge.count; ++i) {
      const float weight = exp2_scalar(*state(i) - reference);
      const float* from = merge.partials + i * size + r * columns;
      total += weight * state(i)[rows];
      for (int64_t d = 0; d < columns; d += kLanes)
        store_f(sums + d, fma_f(load_f(from + d), set1_f(weight), load_f(sums + d)));
    }
    store_row(args, merge.task, r, sums, total);
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
