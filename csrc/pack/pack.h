// Plain codes <-> packed tiles. Portable: packing moves bytes and is bound by memory at every ISA level.
#pragma once

#include "pack/layout.h"

namespace ipex_quant {

struct PackArgs {
  const WoqGeometry* geometry;
  const int32_t* perm;   // position in group order -> input feature, or null
  uint8_t* codes;        // as in QuantizedWeight; read by pack, written by unpack (as are the next two)
  float* scales;         // [n, groups]
  int16_t* zero_points;  // [n, groups], null when symmetric
  uint8_t* tiles;
};

void pack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch);
void unpack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch);
inline int64_t pack_scratch(const WoqGeometry& g) { return g.padded_k + g.k + 1; }

// Whether every scale is a finite half-precision number, so that storing it as one loses nothing.
bool fits_half(const float* scales, int64_t count);

}  // namespace ipex_quant
