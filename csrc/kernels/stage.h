// Staging: activation rows are gathered into group order, padded, and rounded or quantized to what a GEMM kernel reads.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// The walk over the folds of a staged row, or from one of them on: runs of at most max_fold k that do not cross a
// group.
class FoldRun {
 public:
  int64_t start, fold;

  FoldRun(const WoqGeometry& g, int64_t max_fold, int64_t first_k = 0, int64_t first_fold = 0)
      : start(first_k),
        fold(first_fold),
        full_(g.padded_full),
        last_(g.padded_k - g.padded_last),
        end_(g.padded_k),
        max_fold_(max_fold),
        group_end_(start < last_ ? start / full_ * full_ + full_ : end_) {}

  bool more() const { return start < end_; }
  int64_t length() const { return group_end_ - start < max_fold_ ? group_end_ - start : max_fold_; }
  void advance() {
    start += length();
    ++fold;
    if (start == group_end_) group_end_ = start < last_ ? start + full_ : end_;
  }

 private:
  int64_t full_, last_, end_, max_fold_, group_end_;
};

// Calls f(start, length, fold) for every fold of a staged row.
template <class F>
inline void for_each_fold(const WoqGeometry& g, int64_t max_fold, F f) {
  for (FoldRun at(g, max_fold); at.more(); at.advance()) f(at.start, at.length(), at.fold);
}

// Row `row` of x as floats in group order; padding is zero.
inline void gather_row(const StageArgs& args, int64_t row, float* out) {
  const WoqGeometry& g = *args.geometry;
  const bool direct = !args.perm && (g.groups == 1 || g.padded_full == g.group);
  float* plain = direct ? out : out + g.padded_k;
  int64_t i = 0;
  for (; i + kLanes <= g.k; i += kLanes)
    store_f(plain + i, round_to(load_float(args.x, args.type, row * g.k + i), args.staged->rounding));
  if (i < g.k)
    store_tail(plain, kFloat32, i, g.k - i,
               round_to(load_tail(args.x, args.type, row * g.k + i, g.k - i), args.staged->rounding));
  if (direct) {
    for (i = g.k; i < g.padded_k; ++i) out[i] = 0.0f;
    return;
  }
  for (int64_t group = 0, at = 0; group < g.groups; ++group) {
    const int64_t begin = group * g.group, length = g.length(group), padded = g.padded(group);
    for (int64_t k = 0; k < length; ++k) out[at + k] = plain[args.perm ? args.perm[begin + k] : begin + k];
    for (int64_t k = length; k < padded; ++k) out[at + k] = 0.0f;
    at += padded;
  }
}

struct Range {
  float low, high;  // symmetric: high is the largest magnitude

  // A NaN stays, whatever follows.
  void widen(float other_low, float other_high) {
    if (other_low < low || other_low != other_low) low = other_low;
    if (!(other_high <= high) && high == high) high = other_high;
  }
};

// Calls f(vector) for x[0..length), the last one filled with zeros.
template <class F>
inline void for_each_vector(const float* x, int64_t length, F f) {
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) f(load_f(x + k));
  if (k < length) f(load_tail(x, kFloat32, k, length - k));
}

inline Range range_of(const float* x, int64_t length, bool symmetric) {
  // As integers, the bits of |x| order like |x| with NaN on top, so that their maximum does not lose a NaN.
  vi magnitude = zero_i();
  for_each_vector(x, length, [&](vf v) { magnitude = max_i(magnitude, and_i(as_i(v), set1_i(0x7FFFFFFF))); });
  const float largest = bits_to_float(reduce_max(magnitude));
  if (symmetric || largest != largest) return {0.0f, largest};
  vf low = zero_f(), high = zero_f();
  for_each_vector(x, length, [&](vf v) { low = min_f(v, low), high = max_f(v, high); });
  return {reduce_min(low), reduce_max(high)};
}

inline void row_ranges(const StageArgs& args, const float* row, float* ranges) {
  const Staged& s = *args.staged;
  for_each_fold(*args.geometry, s.max_fold, [&](int64_t start, int64_t length, int64_t fold) {
    const Range r = range_of(row + start, length, s.symmetric);
    ranges[2 * fold] = r.low, ranges[2 * fold + 1] = r.high;
  });
  // Folds of one activation block share a range: the whole row, or a group that is longer than a fold.
  const bool blocks = args.range_scope == kPerIcBlock || args.range_scope == kPerBatchIcBlock;
  const int64_t full = (args.geometry->padded_full + s.max_fold - 1) / s.max_fold;
  const int64_t span = !blocks ? s.folds : s.max_fold == kActBlock ? 1 : full;
  for (int64_t f = 0; f < s.folds && span > 1; f += span) {
    const int64_t end = f + span < s.folds ? f + span : s.folds;
    Range r{0.0f, 0.0f};
    for (int64_t i = f; i < end; ++i) r.widen(ranges[2 * i], ranges[2 * i + 1]);
    for (int64_t i = f; i < end; ++i) ranges[2 * i] = r.low, ranges[2 * i + 1] = r.high;
  }
}

// Integer q = clamp(round(x * inverse) + zero, lowest, highest).
struct ActQuantizer {
  float scale, inverse;
  int32_t zero, lowest, highest;

  ActQuantizer(Range r, bool symmetric) {
    const float width = symmetric ? r.high : r.high - r.low, steps = symmetric ? 127.0f : 255.0f;
    scale = width / steps;
    inverse = width >= 0x1p-118f ? steps / width : 0.0f;  // a smaller range counts as zero: its inverse overflows
    zero = 0, lowest = -127, highest = 127;
    if (!symmetric) {
      lowest = 0, highest = 255;
      const float z = __builtin_rintf(-r.low * inverse);
      zero = z >= 0.0f ? (z <= 255.0f ? int32_t(z) : 255) : 0;
    }
  }

  vi operator()(vf x) const {
    const vi q = add_i(round_i(mul_f(x, set1_f(inverse))), set1_i(zero));
    return max_i(min_i(q, set1_i(highest)), set1_i(lowest));
  }
};

// One fold as bytes q + offset; returns their sum.
inline int32_t quantize_bytes(const float* x, int64_t length, const ActQuantizer& quantizer, int32_t offset,
                              uint8_t* out) {
  const vi shift = set1_i(offset);
  vi sum = zero_i();
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    const vi stored = add_i(quantizer(load_f(x + k)), shift);
    store_u8(out + k, stored);
    sum = add_i(sum, stored);
  }
  int32_t total = reduce_add(sum);
  if (k < length) {  // a fold is a multiple of 8, a vector may be 16
    int32_t lanes[kLanes];
    store_i(lanes, add_i(quantizer(load_tail(x, kFloat32, k, length - k)), shift));
    for (int64_t i = 0; k < length; ++i, ++k) {
      out[k] = uint8_t(lanes[i]);
      total += lanes[i];
    }
  }
  return total;
}

// One fold quantized and back in floats.
inline void quantize_floats(const float* x, int64_t length, const ActQuantizer& quantizer, float* out) {
  for (int64_t k = 0; k < length; k += kLanes) {
    const int64_t count = length - k < kLanes ? length - k : kLanes;
    const vi q = sub_i(quantizer(load_tail(x, kFloat32, k, count)), set1_i(quantizer.zero));
    store_tail(out, kFloat32, k, count, mul_f(cvt_f(q), set1_f(quantizer.scale)));
  }
}

inline void quantize_row(const StageArgs& args, const float* row, int64_t index, const float* ranges) {
  const Staged& s = *args.staged;
  const int64_t padded_k = args.geometry->padded_k;
  const int32_t offset = s.symmetric ? (s.unsigned_bytes ? 128 : 0) : (s.unsigned_bytes ? 0 : -128);
  for_each_fold(*args.geometry, s.max_fold, [&](int64_t start, int64_t length, int64_t fold) {
    const ActQuantizer quantizer({ranges[2 * fold], ranges[2 * fold + 1]}, s.symmetric);
    const int64_t at = index * padded_k + start, i = s.at(fold, index);
    if (s.compute == Compute::kFloat)
      return quantize_floats(row + start, length, quantizer, static_cast<float*>(s.data) + at);
    const int32_t zero = quantizer.zero + offset;
    s.sums[i] = quantize_bytes(row + start, length, quantizer, offset, static_cast<uint8_t*>(s.data) + at);
    s.scales[i] = quantizer.scale;
    if (s.zeros) s.zeros[i] = zero;
    s.float_sums[i] = float(s.sums[i] - int32_t(length) * zero) * quantizer.scale;
  });
}

// bf16 in the pair order in which the kernel meets the codes of a line: even k of four, then odd k.
inline void stage_bf16_row(const StageArgs& args, const float* row, int64_t index) {
  const WoqGeometry& g = *args.geometry;
  const Staged& s = *args.staged;
  constexpr int64_t kFour[8] = {0, 2, 4, 6, 1, 3, 5, 7}, kEight[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  const int64_t* order = code_bits(float_lines(g.dtype)) == 4 ? kFour : kEight;
  uint16_t* out = static_cast<uint16_t*>(s.data) + index * g.padded_k;
  for (int64_t k = 0; k < g.padded_k; k += 8)
    for (int64_t i = 0; i < 8; ++i) {
      uint32_t bits;
      std::memcpy(&bits, row + k + order[i], 4);
      out[k + i] = uint16_t(bits >> 16);  // gather_row has rounded to bf16
    }
}

inline void sum_folds(const StageArgs& args, const float* row, int64_t index) {
  const Staged& s = *args.staged;
  for_each_fold(*args.geometry, s.max_fold, [&](int64_t start, int64_t length, int64_t fold) {
    vf sum = zero_f();
    for (int64_t k = 0; k < length; k += kLanes)
      sum =
          add_f(sum, length - k >= kLanes ? load_f(row + start + k) : load_tail(row, kFloat32, start + k, length - k));
    s.float_sums[s.at(fold, index)] = reduce_add(sum);
  });
}

inline void stage_ranges(const StageArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  float* row = reinterpret_cast<float*>(scratch);
  for (int64_t m = begin; m < end; ++m) {
    gather_row(args, m, row);
    row_ranges(args, row, args.ranges + m * args.staged->folds * 2);
  }
}

inline void stage_rows(const StageArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  const Staged& s = *args.staged;
  float* row = reinterpret_cast<float*>(scratch);
  float* own_ranges = row + 2 * g.padded_k;
  const bool across_rows = args.range_scope == kPerTensor || args.range_scope == kPerIcBlock;
  for (int64_t m = begin; m < end; ++m) {
    gather_row(args, m, row);
    if (s.quantize) {
      if (!across_rows) row_ranges(args, row, own_ranges);
      quantize_row(args, row, m, across_rows ? args.ranges + m * s.folds * 2 : own_ranges);
    } else {
      sum_folds(args, row, m);
      if (s.compute == Compute::kBf16)
        stage_bf16_row(args, row, m);
      else
        std::memcpy(static_cast<float*>(s.data) + m * g.padded_k, row, g.padded_k * 4);
    }
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
