#include "pack/pack.h"

#include <cstring>

#include "half.h"

namespace ipex_quant {
namespace {

// INT8 codes and zero points are shifted by 128 to be unsigned.
uint8_t byte_offset(int32_t dtype) { return dtype == kInt8 ? 128 : 0; }

// Calls f(slot, position) for every slot that is no padding, with its position in group order.
template <class F>
void for_each_slot(const WoqGeometry& g, F f) {
  for (int64_t group = 0, slot = 0; group < g.groups; slot += g.padded(group), ++group)
    for (int64_t k = 0; k < g.length(group); ++k) f(slot + k, group * g.group + k);
}

// Reads row `row` of the plain codes as unsigned bytes, in group order, with zeros in the padding.
void read_row(const PackArgs& args, int64_t row, uint8_t* slots, uint8_t* plain) {
  const WoqGeometry& g = *args.geometry;
  if (g.four_bit()) {
    const uint8_t* in = args.codes + row * ((g.k + 1) / 2);
    for (int64_t k = 0; k < g.k; k += 2) plain[k] = in[k / 2] & 15, plain[k + 1] = in[k / 2] >> 4;
  } else {
    const uint8_t* in = args.codes + row * g.k;
    for (int64_t k = 0; k < g.k; ++k) plain[k] = uint8_t(in[k] + byte_offset(g.dtype));
  }
  std::memset(slots, 0, g.padded_k);
  if (args.perm) {
    for_each_slot(g, [&](int64_t slot, int64_t position) { slots[slot] = plain[args.perm[position]]; });
  } else if (g.groups == 1 || g.padded_full == g.group) {
    std::memcpy(slots, plain, g.k);
  } else {
    for_each_slot(g, [&](int64_t slot, int64_t position) { slots[slot] = plain[position]; });
  }
}

void write_row(const PackArgs& args, int64_t row, const uint8_t* slots, uint8_t* plain) {
  const WoqGeometry& g = *args.geometry;
  for_each_slot(
      g, [&](int64_t slot, int64_t position) { plain[args.perm ? args.perm[position] : position] = slots[slot]; });
  if (g.four_bit()) {
    plain[g.k] = 0;  // the spare nibble of an odd row
    uint8_t* out = args.codes + row * ((g.k + 1) / 2);
    for (int64_t k = 0; k < g.k; k += 2) out[k / 2] = uint8_t(plain[k] | plain[k + 1] << 4);
  } else {
    uint8_t* out = args.codes + row * g.k;
    for (int64_t k = 0; k < g.k; ++k) out[k] = uint8_t(plain[k] - byte_offset(g.dtype));
  }
}

// The inverse of get8.
void put8(bool four_bit, uint8_t* at, const uint8_t* slots) {
  uint32_t low, high;
  std::memcpy(&low, slots, 4), std::memcpy(&high, slots + 4, 4);
  if (four_bit) {
    low |= high << 4;
    std::memcpy(at, &low, 4);
  } else {
    std::memcpy(at, &low, 4), std::memcpy(at + 4 * kLineBytes, &high, 4);
  }
}

// Calls f(group, first slot, pointer to the group) for every group of a tile.
template <class F>
void for_each_group(const PackArgs& args, int64_t tile, F f) {
  const WoqGeometry& g = *args.geometry;
  uint8_t* at = args.tiles + tile * g.tile_bytes;
  for (int64_t group = 0, slot = 0; group < g.groups; ++group) {
    f(group, slot, at);
    slot += g.padded(group);
    at += g.head_bytes + g.code_bytes(g.padded(group));
  }
}

int64_t rows_of(const WoqGeometry& g, int64_t tile) {
  return g.n - tile * kTileN < kTileN ? g.n - tile * kTileN : kTileN;
}

}  // namespace

bool fits_half(const float* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (half_to_float(float_to_half(scales[i])) != scales[i]) return false;
  return true;
}

void pack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  uint8_t* plain = scratch + g.padded_k;
  std::memset(args.tiles + tile * g.tile_bytes, 0, g.tile_bytes);
  for (int64_t column = 0; column < rows_of(g, tile); ++column) {
    const int64_t row = tile * kTileN + column;
    read_row(args, row, scratch, plain);
    for_each_group(args, tile, [&](int64_t group, int64_t slot, uint8_t* at) {
      const float scale = args.scales[row * g.groups + group];
      const uint16_t half = uint16_t(float_to_half(scale));
      if (g.half_scales)
        std::memcpy(at + 2 * column, &half, 2);
      else
        std::memcpy(at + 4 * column, &scale, 4);
      if (g.asymmetric)
        at[g.head_bytes - kTileN + column] = uint8_t(args.zero_points[row * g.groups + group] + byte_offset(g.dtype));
      for (int64_t k = 0; k < g.padded(group); k += 8)
        put8(g.four_bit(), at + g.head_bytes + code_offset(g.four_bit(), k, column), scratch + slot + k);
    });
  }
}

void unpack_tile(const PackArgs& args, int64_t tile, uint8_t* scratch) {
  const WoqGeometry& g = *args.geometry;
  uint8_t* plain = scratch + g.padded_k;
  for (int64_t column = 0; column < rows_of(g, tile); ++column) {
    const int64_t row = tile * kTileN + column;
    for_each_group(args, tile, [&](int64_t group, int64_t slot, const uint8_t* at) {
      float scale;
      uint16_t half;
      std::memcpy(&half, at + 2 * column, 2), std::memcpy(&scale, at + 4 * column, g.half_scales ? 2 : 4);
      args.scales[row * g.groups + group] = g.half_scales ? half_to_float(half) : scale;
      if (g.asymmetric)
        args.zero_points[row * g.groups + group] = int16_t(at[g.head_bytes - kTileN + column] - byte_offset(g.dtype));
      for (int64_t k = 0; k < g.padded(group); k += 8)
        get8(g.four_bit(), at + g.head_bytes + code_offset(g.four_bit(), k, column), scratch + slot + k);
    });
    write_row(args, row, scratch, plain);
  }
}

}  // namespace ipex_quant
