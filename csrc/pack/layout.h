// The packed form of a weight: what a kernel streams. One layout serves every ISA level, so a packed tensor can be
// copied between machines of different levels.
//
//   [WoqHeader | tile 0 | tile 1 | ...]            a tile covers kTileN output features and the whole of K
//   tile  = [super group 0 | super group 1 | ...]
//   super = [super scales, kTileN x f32 or f16 | super minimums, the same | group | group | ...]
//   group = [scales, kTileN | zero points, kTileN x u8, or minimums, kTileN, or nothing | code lines]
//
// A value is table[code] * scale, or (code - zero point) * scale, or code * scale + minimum. Scales and minimums are
// f32, f16, powers of two (E8M0), or i8 or float8 (E4M3) times that of the super group; without these there is one,
// without a head. A group's k range is padded to a multiple of line_k. A code line is 64 bytes: 16 columns x 4 bytes.
//   8 bit: for k4, for v in 0..3: one line of columns 16v..16v+15; byte j holds k = 4*k4 + j.
//   4 bit: for k8, for v in 0..3: one line of columns 16v..16v+15; byte j holds k = 8*k8 + j (low nibble) and
//          k = 8*k8 + 4 + j (high nibble).
//   2, 3, 5 and 6 bit: for k16, planes of bits, the lower ones first: 4 bits as above, 2 bits, 1 bit.
//          Plane of 2: bits 2p and 2p + 1 of byte j of a line hold k = 16*k16 + 4p + j.
//          Plane of 1: two lines, of columns 32w to 32w + 31: bit p of byte j holds k = 16*k16 + 4p + j of the first 16
//          of them, bit 4 + p of the others.
// All are operands of a 4-way byte dot product without any lane crossing. INT8 codes are stored as code + 128, so that
// integer codes are unsigned everywhere and the zero point carries the sign.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ipex_quant {

enum WeightDtype : int32_t {
  kInt8 = 1,
  kInt4 = 2,
  kNf4 = 3,
  kFp8 = 4,
  kInt2 = 5,
  kInt3 = 6,
  kInt5 = 7,
  kInt6 = 8,
  kFp4 = 9,  // E2M1, doubled
  kIq4 = 10,
  kBnbFp4 = 11,  // of bitsandbytes, times 192
  kLastDtype = kBnbFp4
};
enum Offsets : int32_t { kSymmetric = 0, kZeroPoints = 1, kMinimums = 2 };
enum ScaleType : int32_t { kFloatScale = 0, kHalfScale = 1, kPowerScale = 2, kByteScale = 3, kFp8Scale = 4 };

constexpr int64_t kTileN = 64;
constexpr int64_t kLineBytes = 64;

constexpr bool is_integer(int32_t dtype) { return dtype <= kInt4 || (dtype >= kInt2 && dtype <= kInt6); }
constexpr int32_t code_bits(int32_t dtype) {
  switch (dtype) {
    case kInt8:
    case kFp8:
      return 8;
    case kInt2:
      return 2;
    case kInt3:
      return 3;
    case kInt5:
      return 5;
    case kInt6:
      return 6;
    default:
      return 4;
  }
}
// k of one set of code lines, of kTileN columns, and its bytes.
constexpr int64_t line_k(int32_t dtype) { return code_bits(dtype) % 4 ? 16 : 8; }
constexpr int64_t line_set_bytes(int32_t dtype) { return line_k(dtype) * kTileN * code_bits(dtype) / 8; }
// Highest zero point: GPTQ files write one above the largest code.
constexpr int32_t max_zero(int32_t dtype) { return dtype == kInt8 ? 127 : 1 << code_bits(dtype); }
// Whether the values of codes fit int8, so that INT8 compute multiplies them as they are.
constexpr bool fits_bytes(int32_t dtype) { return dtype != kFp8 && dtype != kBnbFp4; }
// Codes whose products with u8 activations, less their zero point, fit int16 in pairs: narrow ones.
constexpr bool is_narrow(int32_t dtype) { return (is_integer(dtype) && dtype != kInt8) || dtype == kFp4; }

struct WoqHeader {
  static constexpr uint32_t kMagic = 0x31515749;  // "IWQ1"
  uint32_t magic;
  int32_t dtype;
  int64_t out_features;
  int64_t in_features;
  int64_t group_size;  // -1: one group
  int32_t offsets;
  int32_t scale_type;
  int32_t super_groups;  // groups of a super group; 0: there are none
  int32_t half_supers;   // super scales and minimums are f16
  uint8_t reserved[16];
};
static_assert(sizeof(WoqHeader) == 64, "the header keeps the tiles 64-byte aligned");

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Sizes that follow from a header; all counts are of elements unless named bytes.
struct WoqGeometry {
  int32_t dtype;
  int32_t offsets, scale_type;
  bool half_supers;
  int64_t n, k;
  int64_t group;         // logical k of a full group
  int64_t groups;        // per row
  int64_t super_groups;  // groups of a super group; all of them if there are none
  int64_t padded_full;   // padded k of a full group
  int64_t padded_last;   // padded k of the last group
  int64_t padded_k;      // of all groups together: the length of a staged activation row
  int64_t tiles;
  int64_t head_bytes;   // scales, and zero points or minimums, of one group
  int64_t super_bytes;  // of a super group's head
  int64_t tile_bytes;

  explicit WoqGeometry(const WoqHeader& h) : WoqGeometry(h, h.out_features) {}
  WoqGeometry(const WoqHeader& h, int64_t out_features)
      : dtype(h.dtype),
        offsets(h.offsets),
        scale_type(h.scale_type),
        half_supers(h.half_supers),
        n(out_features),
        k(h.in_features) {
    group = h.group_size < 0 || h.group_size > k ? k : h.group_size;
    groups = (k + group - 1) / group;
    super_groups = h.super_groups ? h.super_groups : groups;
    padded_full = round_up(group, line_k(dtype));
    padded_last = round_up(k - (groups - 1) * group, line_k(dtype));
    padded_k = (groups - 1) * padded_full + padded_last;
    tiles = (n + kTileN - 1) / kTileN;
    head_bytes = kTileN * (scale_bytes() + (offsets == kZeroPoints ? 1 : offsets == kMinimums ? scale_bytes() : 0));
    super_bytes = h.super_groups ? kTileN * super_scale_bytes() * (offsets == kMinimums ? 2 : 1) : 0;
    tile_bytes = groups * head_bytes + supers() * super_bytes + code_bytes(padded_k);
  }

  int64_t scale_bytes() const { return scale_type == kFloatScale ? 4 : scale_type == kHalfScale ? 2 : 1; }
  int64_t super_scale_bytes() const { return half_supers ? 2 : 4; }
  int64_t supers() const { return groups / super_groups; }
  bool two_a_byte() const { return code_bits(dtype) <= 4; }  // of the plain codes
  int64_t code_columns() const { return two_a_byte() ? (k + 1) / 2 : k; }
  int64_t code_bytes(int64_t padded) const { return padded * kTileN / 8 * code_bits(dtype); }
  int64_t padded(int64_t g) const { return g + 1 == groups ? padded_last : padded_full; }
  int64_t length(int64_t g) const { return g + 1 == groups ? k - g * group : group; }
  int64_t total_bytes() const { return int64_t(sizeof(WoqHeader)) + tiles * tile_bytes; }
};

// The walk over the groups of a tile.
class GroupWalk {
 public:
  int64_t group = 0, start = 0;  // start: in a staged row

  GroupWalk(const WoqGeometry& g, const uint8_t* tile) : g_(g), super_(tile), at_(tile + g.super_bytes) {}

  bool more() const { return group < g_.groups; }
  const uint8_t* head() const { return at_; }
  const uint8_t* super_head() const { return super_; }
  const uint8_t* codes() const { return at_ + g_.head_bytes; }
  void advance() {
    const int64_t padded = g_.padded(group);
    at_ += g_.head_bytes + g_.code_bytes(padded);
    start += padded;
    if (++group % g_.super_groups == 0 && more()) super_ = at_, at_ += g_.super_bytes;
  }

 private:
  const WoqGeometry& g_;
  const uint8_t *super_, *at_;
};

// Byte offset of an 8-bit code from the start of a group's code lines.
inline int64_t byte_code_offset(int64_t k, int64_t column) {
  return (k / 4 * 4 + column / 16) * kLineBytes + column % 16 * 4 + k % 4;
}

// Calls f(std::integral_constant) of the dtype.
template <int32_t Dtype = kInt8, class F>
static inline void for_dtype(int32_t dtype, F f) {
  if constexpr (Dtype < kLastDtype) {
    if (dtype != Dtype) return for_dtype<Dtype + 1>(dtype, f);
  }
  f(std::integral_constant<int32_t, Dtype>{});
}

// Where the planes of bits lie in a set of code lines that is no line of bytes; -1: there is no such plane.
struct Planes {
  int64_t four, two, one;
};
constexpr Planes planes_of(int32_t dtype) {
  switch (code_bits(dtype)) {
    case 2:
      return {-1, 0, -1};
    case 3:
      return {-1, 0, 4 * kLineBytes};
    case 4:
      return {0, -1, -1};
    case 5:
      return {0, -1, 8 * kLineBytes};
    default:
      return {0, 8 * kLineBytes, -1};
  }
}

// The four codes of a column at place `piece` of a set of code lines, k = 4 * piece + 0..3: f(offset, shift, mask, up)
// is called for every word at `offset` that has bits of them, ((word >> shift) & mask) << up. Not shared between files:
// each keeps a copy compiled with its own flags.
template <int32_t Dtype, class F>
static inline void for_each_plane(int64_t piece, int64_t column, F f) {
  const int64_t lane = column % 16 * 4, line = column / 16 * kLineBytes;
  if constexpr (code_bits(Dtype) == 8) {
    f(4 * kLineBytes * piece + line + lane, 0, ~0u, 0);
  } else {
    constexpr Planes planes = planes_of(Dtype);
    constexpr int up = planes.four >= 0 ? 4 : 0;
    if constexpr (planes.four >= 0)
      f(planes.four + 4 * kLineBytes * (piece / 2) + line + lane, int(piece % 2 * 4), 0x0F0F0F0Fu, 0);
    if constexpr (planes.two >= 0) f(planes.two + line + lane, int(piece * 2), 0x03030303u, up);
    if constexpr (planes.one >= 0)
      f(planes.one + column / 32 * kLineBytes + lane, int(piece + column / 16 % 2 * 4), 0x01010101u, up ? up : 2);
  }
}

// The codes of one column of a set of code lines, one a byte: line_k of them.
template <int32_t Dtype>
static inline void get_codes(const uint8_t* set, int64_t column, uint8_t* slots) {
  for (int64_t piece = 0; 4 * piece < line_k(Dtype); ++piece) {
    uint32_t codes = 0;
    for_each_plane<Dtype>(piece, column, [&](int64_t offset, int shift, uint32_t mask, int up) {
      uint32_t word;
      std::memcpy(&word, set + offset, 4);
      codes |= (word >> shift & mask) << up;
    });
    std::memcpy(slots + 4 * piece, &codes, 4);
  }
}

}  // namespace ipex_quant
