// Plain codes <-> packed tiles. Portable: packing moves bytes and is bound by memory at every ISA level.
#pragma once

#include "pack/layout.h"

namespace ipex_quant {

// As in QuantizedWeight; read by pack, written by unpack.
struct PlainWeight {
  uint8_t* codes;
  float* scales;          // [n, groups]
  int16_t* zero_points;   // [n, groups], null without zero points
  float* minimums;        // [n, groups], null without minimums
  float* super_scales;    // [n, supers], null without super scales
  float* super_minimums;  // [n, supers], null without both
};

struct PackArgs {
  const WoqGeometry* geometry;
  const int32_t* perm;  // position in group order -> input feature, or null
  PlainWeight plain;
  uint8_t* tiles;
};

void pack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch);
void unpack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch);
inline int64_t pack_scratch(const WoqGeometry& g) { return g.padded_k + g.k + 1; }

// Whether every number is a finite half-precision one, so that storing it as one loses nothing.
bool fits_half(const float* numbers, int64_t count);
// Whether every number is 0 or a power of two, 2^-126 to 2^127.
bool fits_power(const float* numbers, int64_t count);
// Whether every number of a group is a factor of `type`, kByteScale or kFp8Scale, times that of its super group.
bool fits_super(int32_t type, const float* numbers, const float* supers, int64_t count, int64_t super_groups);

}  // namespace ipex_quant
