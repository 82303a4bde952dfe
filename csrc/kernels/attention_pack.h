// Queries, keys and values as the multiplies of attention read them: words of one float, two bf16 or four bytes, which
// are neighbours in the dimension that is summed over.
#pragma once

#include "host/attention_plan.h"
#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

enum class Source { kFloat32, kBFloat16, kHalf, kFloat8, kPairs, kQuads };
constexpr int64_t word_elements(Source s) { return s == Source::kPairs ? 2 : s == Source::kQuads ? 4 : 1; }
constexpr int64_t word_bytes(Source s) {
  return s == Source::kFloat8 ? 1 : s == Source::kBFloat16 || s == Source::kHalf ? 2 : 4;
}
constexpr int64_t element_bytes(Source s) { return word_bytes(s) / word_elements(s); }
constexpr int64_t words(Source s, int64_t elements) { return (elements + word_elements(s) - 1) / word_elements(s); }

template <Source S>
inline vi load_words(const uint8_t* p) {
  if constexpr (S == Source::kBFloat16) return as_i(load_bf16(p));
  if constexpr (S == Source::kHalf) return as_i(load_half(p));
  if constexpr (S == Source::kFloat8) return as_i(load_e5m2(p));
  return load_i(p);
}

// The first `bytes`, then zeros.
template <Source S>
inline vi load_words_tail(const uint8_t* p, int64_t bytes) {
  uint8_t buffer[kVectorBytes] = {};
  std::memcpy(buffer, p, bytes);
  return load_words<S>(buffer);
}

// Keys of kLanes rows to [words][stride] words. Bytes become unsigned by adding 128.
template <Source S>
inline void pack_key_lanes(const uint8_t* const* rows, int64_t dim, int64_t stride, float* packed) {
  const int64_t count = words(S, dim), bytes = dim * element_bytes(S);
  for (int64_t word = 0; word < count; word += kLanes) {
    const int64_t at = word * word_bytes(S), left = bytes - at;
    vi x[kLanes];
    if (left >= kLanes * word_bytes(S))
      unroll<kLanes>([&](auto i) IPEX_QUANT_INLINE { x[i] = load_words<S>(rows[i] + at); });
    else
      for (int i = 0; i < kLanes; ++i) x[i] = load_words_tail<S>(rows[i] + at, left);
    if constexpr (S == Source::kQuads)
      unroll<kLanes>([&](auto i) IPEX_QUANT_INLINE { x[i] = sub_i8(x[i], set1_i(int32_t(0x80808080))); });
    transpose(x);
    float* to = packed + word * stride;
    if (count - word >= kLanes)
      unroll<kLanes>([&](auto i) IPEX_QUANT_INLINE { store_i(to + i * stride, x[i]); });
    else
      for (int64_t i = 0; i < count - word; ++i) store_i(to + i * stride, x[i]);
  }
}

// Values of word_elements(S) rows to one row of words; what is beyond `dim` becomes zero, up to a multiple of 16.
template <Source S>
inline void pack_value_rows(const uint8_t* const* rows, int64_t dim, float* packed) {
  constexpr int64_t kElements = S == Source::kPairs ? 2 * kLanes : kLanes;
  constexpr int64_t kSize = element_bytes(S);
  constexpr int kRows = int(word_elements(S));
  const int64_t columns = (dim + 15) / 16 * 16;
  uint8_t buffer[kRows][kElements * kSize];
  for (int64_t d = 0; d < columns; d += kElements) {
    const uint8_t* at[kRows];
    const int64_t left = dim - d;
    for (int i = 0; i < kRows; ++i) {
      at[i] = rows[i] + d * kSize;
      if (left < kElements) {
        std::memset(buffer[i], 0, sizeof buffer[i]);
        if (left > 0) std::memcpy(buffer[i], at[i], left * kSize);
        at[i] = buffer[i];
      }
    }
    if constexpr (S == Source::kQuads) {
      store_i(packed + d, load_quads(at[0], at[1], at[2], at[3]));
    } else if constexpr (S == Source::kPairs) {
#if defined(IPEX_QUANT_BF16_DOT)
      vi first, second;
      interleave_bf16(at[0], at[1], first, second);
      store_i(packed + d, first);
      if (columns - d > kLanes) store_i(packed + d + kLanes, second);
#endif
    } else {
      store_i(packed + d, load_words<S>(at[0]));
    }
  }
}

template <Source S>
inline void pack_keys(const uint8_t* const* rows, int64_t count, int64_t dim, int64_t stride, float* packed) {
  for (int64_t t = 0; t < count; t += kLanes) pack_key_lanes<S>(rows + t, dim, stride, packed + t);
}

template <Source S>
inline void pack_values(const uint8_t* const* rows, int64_t count, int64_t dim, int64_t stride, float* packed) {
  for (int64_t t = 0; t < count; t += word_elements(S), packed += stride) pack_value_rows<S>(rows + t, dim, packed);
}

// A float row; `to` has room for a multiple of 16.
inline void widen_query(const uint8_t* x, FloatType type, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += kLanes)
    store_f(to + d, dim - d >= kLanes ? load_float(x, type, d) : load_tail(x, type, d, dim - d));
}

// Symmetric bytes of a token of one head, and their scale: x is near codes * scale. A NaN makes the scale one.
template <bool Multiply>
inline float quantize_bytes(const WriteCacheArgs& args) {
  vf largest = zero_f(), not_finite = zero_f();
  const auto load = [&](int64_t d) IPEX_QUANT_INLINE {
    const int64_t count = args.dim - d < kLanes ? args.dim - d : kLanes;
    const vf x = load_run(args.x, args.type, d, count);
    if (!args.factors) return x;
    if (count < kLanes) {  // whose tail of zeros is not to be divided
      float factors[kLanes];
      store_f(factors, set1_f(1.0f));
      std::memcpy(factors, args.factors + d, size_t(count) * sizeof(float));
      return Multiply ? mul_f(x, load_f(factors)) : div_f(x, load_f(factors));
    }
    return Multiply ? mul_f(x, load_f(args.factors + d)) : div_f(x, load_f(args.factors + d));
  };
  for (int64_t d = 0; d < args.dim; d += kLanes) {
    const vf value = load(d);
    largest = max_f(largest, as_f(and_i(as_i(value), set1_i(0x7FFFFFFF))));
    not_finite = add_f(not_finite, sub_f(value, value));
  }
  const float range = reduce_max(largest);
  const vf inverse = set1_f(range >= 0x1p-118f ? 127.0f / range : 0.0f);
  const vf low = set1_f(-127.0f), high = set1_f(127.0f);
  for (int64_t d = 0; d < args.dim; d += kLanes)
    store_codes(args.codes + d, round_i(min_f(max_f(mul_f(load(d), inverse), low), high)),
                args.dim - d < kLanes ? args.dim - d : kLanes);
  return range / 127.0f + reduce_add(not_finite);
}

// x / scale in float8 (e5m2), to nearest even, beyond its range infinite: torch's rounding, and so nothing is rounded
// twice.
inline void store_float8(const WriteCacheArgs& args) {
  const vf scale = set1_f(*args.scale);
  for_each_run(args.dim, [&](int64_t d, int64_t count) IPEX_QUANT_INLINE {
    const vf x = div_f(load_run(args.x, args.type, d, count), scale);
    const vi bits = as_i(x), magnitude = and_i(bits, set1_i(0x7FFFFFFF));
    const vi odd = and_i(srl_i<21>(magnitude), set1_i(1));
    const vi rounded = srl_i<21>(add_i(magnitude, add_i(odd, set1_i(0xFFFFF))));
    const vi normal = min_i(sub_i(rounded, set1_i(112 << 2)), set1_i(0x7C));
    const vf units = mul_f(as_f(magnitude), set1_f(0x1p16f));  // of numbers below 2^-14, which have a fixed point
    const vi small = round_i(min_f(units, set1_f(4.0f)));
    const vi above_small = max_i(sub_i(magnitude, set1_i(0x387FFFFF)), zero_i());
    const vi above_infinity = max_i(sub_i(magnitude, set1_i(0x7F800000)), zero_i());
    const vf finite = if_zero(above_small, as_f(small), as_f(normal));
    const vi code = as_i(if_zero(above_infinity, finite, as_f(set1_i(0x7F))));
    store_codes(args.codes + d, or_i(code, and_i(srl_i<24>(bits), set1_i(0x80))), count);
  });
}

inline void quantize_token(const WriteCacheArgs& args) {
  if (args.cache == CacheType::kFloat8) return store_float8(args);
  *args.scale = quantize_bytes<false>(args);
}

// A query, multiplied by the factors, as symmetric bytes in `words` words. The sum of its products with keys that were
// made unsigned starts at `offset`. Returns the scale.
inline float quantize_query(const WriteCacheArgs& args, int64_t words, int32_t* offset) {
  std::memset(args.codes, 0, size_t(4 * words));
  const float scale = quantize_bytes<true>(args);
  vi sum = zero_i();
  for (int64_t d = 0; d < 4 * words; d += kVectorBytes)
    dot<false>(sum, as_u8<false>(set1_i(0x01010101)), as_s8<false>(load_i(args.codes + d)));
  *offset = -128 * reduce_add(sum);
  return scale;
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
