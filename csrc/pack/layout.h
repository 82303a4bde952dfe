// The packed form of a weight: what a kernel streams. One layout serves every ISA level, so a packed tensor can be
// copied between machines of different levels.
//
//   [WoqHeader | tile 0 | tile 1 | ...]            a tile covers kTileN output features and the whole of K
//   tile  = [group 0 | group 1 | ...]
//   group = [scales, kTileN x f32 or f16 | zero points, kTileN x u8, only if asymmetric | code lines]
//
// A group's k range is padded to a multiple of kPadK. A code line is 64 bytes: 16 columns x 4 bytes.
//   4 bit: for k8, for v in 0..3: one line of columns 16v..16v+15; byte j holds k = 8*k8 + j (low nibble) and
//          k = 8*k8 + 4 + j (high nibble).
//   8 bit: for k4, for v in 0..3: one line of columns 16v..16v+15; byte j holds k = 4*k4 + j.
// Both are operands of a 4-way byte dot product without any lane crossing. INT8 codes are stored as code + 128, so that
// integer codes are unsigned everywhere and the zero point carries the sign.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ipex_quant {

enum WeightDtype : int32_t { kInt8 = 1, kInt4 = 2, kNf4 = 3, kFp8 = 4 };

constexpr int64_t kTileN = 64;
constexpr int64_t kPadK = 8;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kInt4MaxZero = 16;  // GPTQ files write 16, one above the largest code

struct WoqHeader {
  static constexpr uint32_t kMagic = 0x31515749;  // "IWQ1"
  uint32_t magic;
  int32_t dtype;
  int64_t out_features;
  int64_t in_features;
  int64_t group_size;  // -1: one group
  int32_t asymmetric;
  int32_t half_scales;
  uint8_t reserved[24];
};
static_assert(sizeof(WoqHeader) == 64, "the header keeps the tiles 64-byte aligned");

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Sizes that follow from a header; all counts are of elements unless named bytes.
struct WoqGeometry {
  int32_t dtype;
  bool asymmetric, half_scales;
  int64_t n, k;
  int64_t group;        // logical k of a full group
  int64_t groups;       // per row
  int64_t padded_full;  // padded k of a full group
  int64_t padded_last;  // padded k of the last group
  int64_t padded_k;     // of all groups together: the length of a staged activation row
  int64_t tiles;
  int64_t head_bytes;  // scales and zero points of one group
  int64_t tile_bytes;

  WoqGeometry(int32_t dtype_, int64_t n_, int64_t k_, int64_t group_size, bool asymmetric_, bool half_scales_)
      : dtype(dtype_), asymmetric(asymmetric_), half_scales(half_scales_), n(n_), k(k_) {
    group = group_size < 0 || group_size > k ? k : group_size;
    groups = (k + group - 1) / group;
    padded_full = round_up(group, kPadK);
    padded_last = round_up(k - (groups - 1) * group, kPadK);
    padded_k = (groups - 1) * padded_full + padded_last;
    tiles = (n + kTileN - 1) / kTileN;
    head_bytes = kTileN * ((half_scales ? 2 : 4) + (asymmetric ? 1 : 0));
    tile_bytes = groups * head_bytes + code_bytes(padded_k);
  }

  bool four_bit() const { return dtype == kInt4 || dtype == kNf4; }
  int64_t code_bytes(int64_t padded) const { return padded * kTileN / (four_bit() ? 2 : 1); }
  int64_t padded(int64_t g) const { return g + 1 == groups ? padded_last : padded_full; }
  int64_t length(int64_t g) const { return g + 1 == groups ? k - g * group : group; }
  int64_t total_bytes() const { return int64_t(sizeof(WoqHeader)) + tiles * tile_bytes; }
};

// Byte offset of code (k, column) from the start of a group's code lines.
inline int64_t code_offset(bool four_bit, int64_t k, int64_t column) {
  const int64_t line = (four_bit ? k / 8 : k / 4) * 4 + column / 16;
  return line * kLineBytes + column % 16 * 4 + k % 4;
}

// Eight codes of one column, one a byte, whose first is at `at`. Not shared between files: each keeps a copy compiled
// with its own flags.
static inline void get8(bool four_bit, const uint8_t* at, uint8_t* slots) {
  uint32_t low, high;
  std::memcpy(&low, at, 4);
  if (four_bit) {
    high = low >> 4 & 0x0F0F0F0F;
    low &= 0x0F0F0F0F;
  } else {
    std::memcpy(&high, at + 4 * kLineBytes, 4);
  }
  std::memcpy(slots, &low, 4), std::memcpy(slots + 4, &high, 4);
}

}  // namespace ipex_quant
