// Reading code lines: what is common to the decode and the prefill kernels.
#pragma once

#include "half.h"
#include "kernels/elementwise.h"
#include "kernels/stage.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr bool is_four_bit(int dtype) { return code_bits(dtype) == 4; }
constexpr bool has_float_table(int dtype) { return dtype == kNf4 || dtype == kBnbFp4; }
// Codes are unsigned in the packed weight, those of a table once it has been looked up; this is the zero point of a
// symmetric one.
constexpr int32_t symmetric_zero(int dtype) {
  switch (dtype) {
    case kFp8:
    case kBnbFp4:
      return 0;
    case kFp4:
      return 12;
    case kIq4:
      return 127;
    case kInt8:
    case kNf4:
      return 128;
    default:
      return 1 << (code_bits(dtype) - 1);
  }
}
// Integer compute, for activations x with zero point zx and codes c with zero point zc over a fold of L:
//   sum (x - zx) * (c - zc) = sum x * c - zc * sum x - zx * (sum c - L * zc)
// exactly in int32, whatever operand is the unsigned one.

// How many dots() of u8 activations and codes less their zero point may go together, up to four; 0: they are not
// narrow.
constexpr int dots_together(int dtype) {
  if (!is_narrow(dtype)) return 0;
  const int most = 32767 / (2 * 255 * (dtype == kFp4 ? 12 : max_zero(dtype)));
  return most < 4 ? most : 4;
}
static_assert(dots_together(kInt6) == 1 && dots_together(kInt4) == 4);
static_assert(255 * 255 * kMaxByteFold < int64_t(1) << 31, "a fold fits int32");

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
// The values of E2M1 (OCP Microscaling Formats 1.0), doubled.
constexpr int8_t kFp4Bytes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
// Of GGUF's IQ4_NL.
constexpr int8_t kIq4Bytes[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Of bitsandbytes, times 192: every value has two significant bits.
constexpr int16_t kBnbFp4Levels[16] = {0, 1, 128, 192, 64, 96, 32, 48, 0, -1, -128, -192, -64, -96, -32, -48};
constexpr bool has_table(int dtype) { return has_float_table(dtype) || dtype == kFp4 || dtype == kIq4; }
constexpr const int8_t* byte_table(int dtype) {
  return dtype == kNf4 ? kNf4Bytes : dtype == kFp4 ? kFp4Bytes : kIq4Bytes;
}
// What a code of a table stands for in float compute.
inline float table_level(int dtype, int code, bool bf16) {
  if (dtype == kNf4) return nf4_level(code, bf16);
  return dtype == kBnbFp4 ? kBnbFp4Levels[code] : byte_table(dtype)[code];
}

// e4m3 without NaN, which no packed weight holds: rebias the exponent from 7 to 127; a subnormal is built in the binade
// above and brought down, so that the result does not depend on the denormal mode of the processor.
inline vf e4m3_to_f(vi byte) {
  const vi magnitude = sll_i<20>(and_i(byte, set1_i(0x7F)));
  const vi exponent = and_i(magnitude, set1_i(0x07800000));
  const vf normal = as_f(add_i(magnitude, set1_i(120 << 23)));
  const vf subnormal = sub_f(as_f(add_i(magnitude, set1_i(121 << 23))), set1_f(0x1p-6f));
  return as_f(or_i(as_i(if_zero(exponent, subnormal, normal)), sll_i<24>(and_i(byte, set1_i(0x80)))));
}

// Scales, and zero points or minimums, of one group, column by column.
class GroupHead {
 public:
  bool zero_points, minimums;

  GroupHead(const WoqGeometry& g, const GroupWalk& at)
      : zero_points(g.offsets == kZeroPoints),
        minimums(g.offsets == kMinimums),
        scale_type_(g.scale_type),
        half_supers_(g.half_supers),
        symmetric_(minimums && g.dtype != kInt8 ? 0 : symmetric_zero(g.dtype)),
        scales_(at.head()),
        offsets_(at.head() + kTileN * g.scale_bytes()),
        super_scales_(at.super_head()),
        super_minimums_(at.super_head() + kTileN * g.super_scale_bytes()) {}

  vf scale(int64_t column) const { return number(scales_, super_scales_, column); }
  vf minimum(int64_t column) const { return number(offsets_, super_minimums_, column); }
  vi zero(int64_t column) const { return zero_points ? load_u8(offsets_ + column) : set1_i(symmetric_); }

  // Of one column alone.
  float scale_of(int64_t column) const { return lane_of(scale(column / kLanes * kLanes), column); }
  float minimum_of(int64_t column) const { return lane_of(minimum(column / kLanes * kLanes), column); }
  int32_t zero_of(int64_t column) const { return zero_points ? offsets_[column] : symmetric_; }

 private:
  vf number(const uint8_t* run, const uint8_t* supers, int64_t column) const {
    switch (scale_type_) {
      case kFloatScale:
        return load_f(reinterpret_cast<const float*>(run) + column);
      case kHalfScale:
        return load_half(run + 2 * column);
      case kPowerScale:
        return as_f(sll_i<23>(load_u8(run + column)));
      case kByteScale:
        return mul_f(cvt_f(load_s8(run + column)), super(supers, column));
      default:
        return mul_f(e4m3_to_f(load_u8(run + column)), super(supers, column));
    }
  }
  vf super(const uint8_t* supers, int64_t column) const {
    return half_supers_ ? load_half(supers + 2 * column) : load_f(reinterpret_cast<const float*>(supers) + column);
  }
  static float lane_of(vf vector, int64_t column) {
    float lanes[kLanes];
    store_f(lanes, vector);
    return lanes[column % kLanes];
  }

  int32_t scale_type_;
  bool half_supers_;
  int32_t symmetric_;
  const uint8_t *scales_, *offsets_, *super_scales_, *super_minimums_;
};

// The scale that goes with integer codes.
template <int Dtype>
inline vf integer_scale(const GroupHead& head, int64_t column) {
  return Dtype == kNf4 ? mul_f(head.scale(column), set1_f(1.0f / 127)) : head.scale(column);
}

// The walk over the folds of a tile: runs of at most max_fold k that do not cross a group.
class FoldCursor {
 public:
  int64_t fold = 0;

  FoldCursor(const GemmArgs& args, int64_t tile, int64_t max_fold)
      : g_(*args.geometry), max_fold_(max_fold), walk_(g_, args.tiles + tile * args.geometry->tile_bytes) {}

  bool more() const { return walk_.more(); }
  int64_t group() const { return walk_.group; }
  GroupHead head() const { return GroupHead(g_, walk_); }
  const uint8_t* codes() const { return walk_.codes() + g_.code_bytes(k_); }
  int64_t start() const { return walk_.start + k_; }  // in a staged row
  int64_t length() const {
    const int64_t left = g_.padded(walk_.group) - k_;
    return left < max_fold_ ? left : max_fold_;
  }
  void advance() {
    ++fold;
    k_ += max_fold_;
    if (k_ >= g_.padded(walk_.group)) walk_.advance(), k_ = 0;
  }

 private:
  const WoqGeometry& g_;
  int64_t max_fold_;
  GroupWalk walk_;
  int64_t k_ = 0;
};

// Of bits that stay in their bytes; by a negative number to the right.
template <int Bits>
inline vi shift_left(vi x) {
  if constexpr (Bits > 0) return sll_i<Bits>(x);
  if constexpr (Bits < 0) return srl_i<-Bits>(x);
  return x;
}

// The codes of a set of code lines as unsigned bytes, those of a table with `offset` added to its values.
template <int Dtype>
struct CodeBytes {
  static constexpr int kPieces = int(line_k(Dtype) / 4);
  static constexpr Planes kPlanes = planes_of(Dtype);
  static constexpr int kUp = kPlanes.four >= 0 ? 4 : 0;
  ByteLut16 table;

  explicit CodeBytes(int32_t offset) {
    uint8_t bytes[16] = {};
    if constexpr (has_table(Dtype))
      for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(byte_table(Dtype)[i] + offset);
    table = make_byte_lut16(bytes);
  }

  // k 4 * Piece .. 4 * Piece + 3 of the columns from `column` on, a multiple of kLanes.
  template <int Piece>
  IPEX_QUANT_INLINE vi piece(const uint8_t* set, int64_t column) const {
    if constexpr (code_bits(Dtype) == 8) return load_i(set + 4 * kLineBytes * Piece + 4 * column);
    vi codes = zero_i();
    if constexpr (kPlanes.four >= 0) {
      const vi line = load_i(set + kPlanes.four + 4 * kLineBytes * (Piece / 2) + 4 * column);
      codes = and_i(srl_i<Piece % 2 * 4>(line), set1_i(0x0F0F0F0F));
    }
    if constexpr (kPlanes.two >= 0) {
      const vi line = load_i(set + kPlanes.two + 4 * column);
      codes = or_i(codes, shift_left<kUp - 2 * Piece>(and_i(line, set1_i(int32_t(0x03030303u << 2 * Piece)))));
    }
    if constexpr (kPlanes.one >= 0) {
      const vi line = load_i(set + kPlanes.one + column / 32 * kLineBytes + column % 16 * 4);
      const vi own = srl_i(line, int(column / 16 % 2 * 4));
      codes = or_i(codes, shift_left<(kUp ? kUp : 2) - Piece>(and_i(own, set1_i(0x01010101 << Piece))));
    }
    if constexpr (has_table(Dtype)) return lookup(table, codes);
    return codes;
  }
};

// The dtype whose kernels multiply the unpacked bytes of a panel.
constexpr int byte_lines(int dtype) {
  if (dtype <= kFp8) return dtype;
  if (!is_narrow(dtype)) return kInt8;
  return kPairSums && dots_together(dtype) < dots_together(kInt4) ? dtype : kInt4;
}

// The code lines of a fold as those of 8-bit codes.
template <int Dtype>
inline void widen_codes(const uint8_t* codes, int64_t length, uint8_t* out) {
  using Codes = CodeBytes<Dtype>;
  const Codes bytes(symmetric_zero(Dtype));
  for (int64_t k = 0; k < length; k += line_k(Dtype), codes += line_set_bytes(Dtype), out += line_k(Dtype) * kTileN)
    for (int64_t column = 0; column < kTileN; column += kLanes)
      unroll<Codes::kPieces>([&](auto p) IPEX_QUANT_INLINE {
        store_i(out + 4 * kLineBytes * p + 4 * column, bytes.template piece<decltype(p)::value>(codes, column));
      });
}

// Codes as floats with their zero point taken off; exact but for NF4, whose levels are fp32.
// value<J>(line) is byte j of an 8-bit line, or nibble position J of a 4-bit line, whose k is kOrder[J].
template <int Dtype>
struct FloatCodes {
  static constexpr int kPerLine = is_four_bit(Dtype) ? 8 : 4;
  static constexpr int kOrder[8] = {
      0, is_four_bit(Dtype) ? 4 : 1, is_four_bit(Dtype) ? 1 : 2, is_four_bit(Dtype) ? 5 : 3, 2, 6, 3, 7};
  Lut16 table;
  E4m3Lut float8 = make_e4m3_lut();

  // Compute mode BF16 rounds the NF4 levels, at every ISA level.
  explicit FloatCodes(FloatType rounding) {
    float levels[16];
    for (int i = 0; i < 16; ++i) levels[i] = has_table(Dtype) ? table_level(Dtype, i, rounding == kBFloat16) : float(i);
    table = make_lut16(levels);
  }

  template <int J>
  vf value(vi line, vf zero) const {
    if constexpr (has_table(Dtype)) {
      return lookup(table, srl_i<4 * J>(line));
    } else if constexpr (Dtype == kInt4 && kLanes == 16) {  // where a table is one instruction
      return sub_f(lookup(table, srl_i<4 * J>(line)), zero);
    } else if constexpr (Dtype == kInt4) {
      return sub_f(cvt_f(and_i(srl_i<4 * J>(line), set1_i(15))), zero);
    } else if constexpr (Dtype == kFp8 && kHalfPairs) {
      return e4m3_to_f(and_i(srl_i<8 * J>(line), set1_i(0xFF)));
    } else if constexpr (Dtype == kFp8) {
      const vi pair = e4m3_pairs<J % 2 == 1>(float8, line);
      return as_f(J < 2 ? sll_i<16>(pair) : and_i(pair, set1_i(int32_t(0xFFFF0000))));
    } else {
      return sub_f(cvt_f(and_i(srl_i<8 * J>(line), set1_i(0xFF))), zero);
    }
  }
};

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
