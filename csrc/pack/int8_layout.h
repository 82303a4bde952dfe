// The packed form of INT8 weights with one scale per output channel: what the W8A8 kernels stream. The members of a
// share group, which multiply the same activations, follow each other in one buffer, each as if it were alone. As with
// layout.h, one layout serves every ISA level.
//
//   group = [member | member | ...]
//   member = [Int8Header | tile 0 | tile 1 | ...]
//   tile = [scales, kTileN x f32 | sums of the codes, kTileN x i32 for every fold | code lines]
//
// A tile covers kTileN output features and the whole of K. A fold is a run of k whose sums are sure to fit int32. Code
// lines are those of 8-bit codes in layout.h, but signed.
#pragma once

#include "pack/layout.h"

namespace ipex_quant {

constexpr int64_t kInt8Fold = 65536;
static_assert(255 * 128 * kInt8Fold < int64_t(1) << 31, "u8 activations less their zero point times s8 codes");

struct Int8Header {
  static constexpr uint32_t kMagic = 0x32384949;  // "II82"
  uint32_t magic;
  int32_t out_features;
  int64_t in_features;
  uint8_t reserved[48];
};
static_assert(sizeof(Int8Header) == 64, "the header keeps the tiles 64-byte aligned");

struct Int8Geometry {
  int64_t k, padded_k, folds;
  int64_t head_bytes;  // scales and sums
  int64_t tile_bytes;

  explicit Int8Geometry(int64_t k_)
      : k(k_),
        padded_k(round_up(k, 4)),
        folds((k + kInt8Fold - 1) / kInt8Fold),
        head_bytes(4 * kTileN * (1 + folds)),
        tile_bytes(head_bytes + padded_k * kTileN) {}

  static int64_t tiles(int64_t out_features) { return (out_features + kTileN - 1) / kTileN; }
};

// Rows [0, columns) of plain codes [columns, k] with their scales, to and from one tile.
void pack_int8_tile(const Int8Geometry& g, const int8_t* codes, const float* scales, int64_t columns, uint8_t* tile);
void unpack_int8_tile(const Int8Geometry& g, const uint8_t* tile, int64_t columns, int8_t* codes, float* scales);

}  // namespace ipex_quant
