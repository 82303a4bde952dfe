// Reading code lines: what is common to the decode and the prefill kernels.
#pragma once

#include "half.h"
#include "kernels/elementwise.h"
#include "kernels/stage.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr bool is_four_bit(int dtype) { return dtype == kInt4 || dtype == kNf4; }
// Integer codes are unsigned in the packed weight; this is the zero point of a symmetric one (NF4: of its byte table).
constexpr int32_t symmetric_zero(int dtype) { return dtype == kInt4 ? 8 : dtype == kFp8 ? 0 : 128; }
// Integer compute, for activations x with zero point zx and codes c with zero point zc over a fold of L:
//   sum (x - zx) * (c - zc) = sum x * c - zc * sum x - zx * (sum c - L * zc)
// exactly in int32, whatever operand is the unsigned one. Only INT4 keeps sums of two products below 2^15.
constexpr bool is_narrow(int dtype) { return dtype == kInt4; }
static_assert(2 * 255 * kInt4MaxZero < 1 << 15, "u8 activations times INT4 codes less their zero point");
static_assert(255 * 255 * kMaxByteFold < int64_t(1) << 31, "a fold fits int32");
constexpr int64_t line_group_bytes(int dtype) { return is_four_bit(dtype) ? 256 : 512; }  // of 8 k

// QLoRA's 4-bit NormalFloat levels (Dettmers et al. 2023), as bitsandbytes rounds them.
constexpr float kNf4Levels[16] = {-1.0f,
                                  -0.6961928009986877f,
                                  -0.5250730514526367f,
                                  -0.39491748809814453f,
                                  -0.28444138169288635f,
                                  -0.18477343022823334f,
                                  -0.09105003625154495f,
                                  0.0f,
                                  0.07958029955625534f,
                                  0.16093020141124725f,
                                  0.24611230194568634f,
                                  0.33791524171829224f,
                                  0.44070982933044434f,
                                  0.5626170039176941f,
                                  0.7229568362236023f,
                                  1.0f};
inline float nf4_level(int code, bool bf16) {
  if (!bf16) return kNf4Levels[code];
  uint32_t bits;
  std::memcpy(&bits, &kNf4Levels[code], 4);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000;
  return bits_to_float(int32_t(bits));
}
// round(127 * level), the byte form for INT8 compute; the scale is divided by 127 to match.
constexpr int8_t kNf4Bytes[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

// Scales and zero points of one group, column by column.
struct GroupHead {
  const uint8_t* scales;
  const uint8_t* zeros;  // null when symmetric
  bool half_scales;
  int32_t symmetric;

  GroupHead(const WoqGeometry& g, const uint8_t* group)
      : scales(group),
        zeros(g.asymmetric ? group + kTileN * (g.half_scales ? 2 : 4) : nullptr),
        half_scales(g.half_scales),
        symmetric(symmetric_zero(g.dtype)) {}

  vf scale(int64_t column) const {
    return half_scales ? load_half(scales + 2 * column) : load_f(reinterpret_cast<const float*>(scales) + column);
  }
  vi zero(int64_t column) const { return zeros ? load_u8(zeros + column) : set1_i(symmetric); }

  // Of one column alone.
  float scale_of(int64_t column) const {
    if (!half_scales) return reinterpret_cast<const float*>(scales)[column];
    uint16_t half;
    std::memcpy(&half, scales + 2 * column, 2);
    return half_to_float(half);
  }
  int32_t zero_of(int64_t column) const { return zeros ? zeros[column] : symmetric; }
};

// The scale that goes with integer codes.
template <int Dtype>
inline vf byte_scale(const GroupHead& head, int64_t column) {
  return Dtype == kNf4 ? mul_f(head.scale(column), set1_f(1.0f / 127)) : head.scale(column);
}

// The walk over the folds of a tile: runs of at most max_fold k that do not cross a group.
class FoldCursor {
 public:
  int64_t group = 0, fold = 0;

  FoldCursor(const GemmArgs& args, int64_t tile, int64_t max_fold)
      : g_(*args.geometry), max_fold_(max_fold), data_(args.tiles + tile * args.geometry->tile_bytes) {}

  bool more() const { return group < g_.groups; }
  GroupHead head() const { return GroupHead(g_, data_); }
  const uint8_t* codes() const { return data_ + g_.head_bytes + g_.code_bytes(k_); }
  int64_t start() const { return group_start_ + k_; }  // in a staged row
  int64_t length() const { return g_.padded(group) - k_ < max_fold_ ? g_.padded(group) - k_ : max_fold_; }
  void advance() {
    const int64_t padded = g_.padded(group);
    ++fold;
    k_ += max_fold_;
    if (k_ < padded) return;
    group_start_ += padded;
    data_ += g_.head_bytes + g_.code_bytes(padded);
    ++group, k_ = 0;
  }

 private:
  const WoqGeometry& g_;
  int64_t max_fold_;
  const uint8_t* data_;
  int64_t k_ = 0, group_start_ = 0;
};

// The nibbles of a line as unsigned bytes (or, for NF4, table bytes): k 0..3 and k 4..7 of every column.
template <int Dtype>
struct Nibbles {
  ByteLut16 table;

  explicit Nibbles(int32_t offset) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(kNf4Bytes[i] + offset);
    table = make_byte_lut16(bytes);
  }
  vi low(vi line) const { return decode(and_i(line, set1_i(0x0F0F0F0F))); }
  vi high(vi line) const { return decode(and_i(srl_i<4>(line), set1_i(0x0F0F0F0F))); }

 private:
  vi decode(vi index) const {
    if constexpr (Dtype == kNf4)
      return lookup(table, index);
    else
      return index;
  }
};

// e4m3 without NaN, which no packed weight holds: rebias the exponent from 7 to 127; a subnormal is built in the binade
// above and brought down, so that the result does not depend on the denormal mode of the processor.
inline vf e4m3_to_f(vi byte) {
  const vi magnitude = sll_i<20>(and_i(byte, set1_i(0x7F)));
  const vi exponent = and_i(magnitude, set1_i(0x07800000));
  const vf normal = as_f(add_i(magnitude, set1_i(120 << 23)));
  const vf subnormal = sub_f(as_f(add_i(magnitude, set1_i(121 << 23))), set1_f(0x1p-6f));
  return as_f(or_i(as_i(if_zero(exponent, subnormal, normal)), sll_i<24>(and_i(byte, set1_i(0x80)))));
}

// Codes as floats with their zero point taken off; exact but for NF4, whose levels are fp32.
// value<J>(line) is byte j of an 8-bit line, or nibble position J of a 4-bit line, whose k is kOrder[J].
template <int Dtype>
struct FloatCodes {
  static constexpr int kPerLine = is_four_bit(Dtype) ? 8 : 4;
  static constexpr int kOrder[8] = {
      0, is_four_bit(Dtype) ? 4 : 1, is_four_bit(Dtype) ? 1 : 2, is_four_bit(Dtype) ? 5 : 3, 2, 6, 3, 7};
  Lut16 table;

  // Compute mode BF16 rounds the NF4 levels, at every ISA level.
  explicit FloatCodes(FloatType rounding) {
    float levels[16];
    for (int i = 0; i < 16; ++i) levels[i] = Dtype != kNf4 ? float(i) : nf4_level(i, rounding == kBFloat16);
    table = make_lut16(levels);
  }

  template <int J>
  vf value(vi line, vf zero) const {
    if constexpr (Dtype == kNf4) {
      return lookup(table, srl_i<4 * J>(line));
    } else if constexpr (Dtype == kInt4) {
      return sub_f(lookup(table, srl_i<4 * J>(line)), zero);
    } else {
      const vi byte = and_i(srl_i<8 * J>(line), set1_i(0xFF));
      if constexpr (Dtype == kFp8)
        return e4m3_to_f(byte);
      else
        return sub_f(cvt_f(byte), zero);
    }
  }
};

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
