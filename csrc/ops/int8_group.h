// The packed INT8 weights of a share group, or of the groups of a convolution.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/call.h"

namespace ipex_quant {

// Whether a tensor of bytes begins with the header of packed INT8 weights.
inline bool holds_int8(const Tensor& packed) {
  uint32_t magic;
  check_tensor("packed", packed, ScalarType::Byte, 1);
  IPEX_QUANT_CHECK(packed.numel() >= int64_t(sizeof(Int8Header)), "packed: too short for a header");
  std::memcpy(&magic, packed.const_data_ptr(), sizeof magic);
  return magic == Int8Header::kMagic;
}

// The packed weights of a share group, checked against what the caller knows of them.
struct PackedGroup {
  Int8Geometry geometry;
  std::vector<int64_t> out_features;
  std::vector<int64_t> first_tiles{0};  // of every member, then the end

  PackedGroup(std::vector<int64_t> out_features_, int64_t in_features)
      : geometry(check_in_features(in_features)), out_features(std::move(out_features_)) {
    IPEX_QUANT_CHECK(!out_features.empty(), "out_features: expected one count or more");
    for (const int64_t n : out_features) {
      IPEX_QUANT_CHECK(n >= 0 && n < int64_t(1) << 31, "out_features: expected 0 <= out_features < 2^31, got ", n);
      first_tiles.push_back(first_tiles.back() + Int8Geometry::tiles(n));
    }
    IPEX_QUANT_CHECK(tiles() < (int64_t(1) << 62) / geometry.tile_bytes, "out_features: sizes overflow");
  }

  static int64_t check_in_features(int64_t k) {
    IPEX_QUANT_CHECK(k > 0 && k < int64_t(1) << 31, "expected 0 < in_features < 2^31, got ", k);
    return k;
  }
  size_t members() const { return out_features.size(); }
  int64_t tiles() const { return first_tiles.back(); }
  // Of a member's header, from the start of the group; of the end.
  int64_t offset(size_t member) const {
    return int64_t(member * sizeof(Int8Header)) + first_tiles[member] * geometry.tile_bytes;
  }
  int64_t total_bytes() const { return offset(members()); }
  size_t member_of(int64_t tile) const {
    return size_t(std::upper_bound(first_tiles.begin(), first_tiles.end(), tile) - first_tiles.begin() - 1);
  }
  // Of a tile of a member, both counted in the group.
  int64_t tile_offset(size_t member, int64_t tile) const {
    return int64_t((member + 1) * sizeof(Int8Header)) + tile * geometry.tile_bytes;
  }

  Int8Header header(size_t member) const { return {Int8Header::kMagic, int32_t(out_features[member]), geometry.k, {}}; }

  // The data of packed weights whose headers are those of the members.
  const uint8_t* data_of(const Tensor& packed) const {
    IPEX_QUANT_CHECK(holds_int8(packed), "packed: not packed INT8 weights; use int8_pack");
    IPEX_QUANT_CHECK(packed.numel() == total_bytes(), "packed: expected ", total_bytes(), " bytes of ", members(),
                     " weights of ", geometry.k, " input features, got ", packed.numel());
    const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
    for (size_t i = 0; i < members(); ++i) {
      const Int8Header expected = header(i);
      IPEX_QUANT_CHECK(!std::memcmp(data + offset(i), &expected, sizeof expected), "packed: weight ", i,
                       " is not one of ", geometry.k, " input and ", out_features[i], " output features");
    }
    return data;
  }

  // Calls f(offset of a tile, first row of the plain weights, count of rows), in parallel.
  template <class F>
  void for_each_tile(F f) const {
    std::vector<int64_t> first_rows{0};
    for (const int64_t n : out_features) first_rows.push_back(first_rows.back() + n);
    parallel(tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const size_t member = member_of(tile);
        const int64_t row = (tile - first_tiles[member]) * kTileN;
        f(tile_offset(member, tile), first_rows[member] + row, std::min(kTileN, out_features[member] - row));
      }
    });
  }
};

// A packed weight that is no part of a larger group, with the sizes in its header.
inline PackedGroup packed_alone(const Tensor& packed) {
  Int8Header header;
  IPEX_QUANT_CHECK(holds_int8(packed), "packed: not packed INT8 weights; use int8_pack");
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  return PackedGroup({header.out_features}, header.in_features);
}

inline void check_zero_point(const char* name, int64_t zero_point) {
  IPEX_QUANT_CHECK(zero_point >= 0 && zero_point <= 255, name, ": expected 0..255, got ", zero_point);
}

inline int64_t sum_of(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (const int64_t value : values) sum += value;
  return sum;
}

}  // namespace ipex_quant
