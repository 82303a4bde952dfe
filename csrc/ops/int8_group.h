// The packed INT8 weights of a share group, or of the groups of a convolution.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "ops/call.h"

namespace ipex_quant {

// The packed weights of a share group, checked against what the caller knows of them.
struct PackedGroup {
  Int8Geometry geometry;
  std::vector<int64_t> out_features;
  std::vector<int64_t> first_tiles{0};  // of every member, then the end

  PackedGroup(std::vector<int64_t> out_features_, int64_t in_features)
      : geometry(check_in_features(in_features)), out_features(std::move(out_features_)) {
    constexpr int64_t kLargest = int64_t(1) << 31;
    IPEX_QUANT_CHECK(!out_features.empty() && int64_t(out_features.size()) < kLargest,
                     "out_features: expected one count or more, got ", out_features.size());
    for (const int64_t n : out_features) {
      IPEX_QUANT_CHECK(n >= 0 && n < kLargest, "out_features: expected 0 <= out_features < 2^31, got ", n);
      first_tiles.push_back(first_tiles.back() + Int8Geometry::tiles(n));
    }
    IPEX_QUANT_CHECK(tiles() < (int64_t(1) << 62) / geometry.tile_bytes, "out_features: sizes overflow");
  }

  static int64_t check_in_features(int64_t k) {
    IPEX_QUANT_CHECK(k > 0 && k < int64_t(1) << 31, "expected 0 < in_features < 2^31, got ", k);
    return k;
  }
  int64_t tiles() const { return first_tiles.back(); }
  int64_t total_bytes() const { return int64_t(sizeof(Int8Header)) + tiles() * geometry.tile_bytes; }
  size_t member_of(int64_t tile) const {
    return size_t(std::upper_bound(first_tiles.begin(), first_tiles.end(), tile) - first_tiles.begin() - 1);
  }

  Int8Header header() const {
    Int8Header h{Int8Header::kMagic, int32_t(out_features.size()), geometry.k, 0xCBF29CE484222325u, {}};
    for (const int64_t n : out_features) h.out_features_hash = (h.out_features_hash ^ uint64_t(n)) * 0x100000001B3u;
    return h;
  }

  const uint8_t* tiles_of(const Tensor& packed) const {
    check_tensor("packed", packed, ScalarType::Byte, 1);
    Int8Header h;
    const Int8Header expected = header();
    IPEX_QUANT_CHECK(packed.numel() >= int64_t(sizeof h), "packed: too short for a header");
    const uint8_t* data = static_cast<const uint8_t*>(packed.const_data_ptr());
    std::memcpy(&h, data, sizeof h);
    IPEX_QUANT_CHECK(h.magic == Int8Header::kMagic, "packed: not packed INT8 weights; use int8_pack");
    IPEX_QUANT_CHECK(!std::memcmp(&h, &expected, sizeof h), "packed: holds ", h.members, " weights of ", h.in_features,
                     " input features, which are not the ", out_features.size(), " weights of ", geometry.k,
                     " input features that out_features names");
    IPEX_QUANT_CHECK(packed.numel() == total_bytes(), "packed: expected ", total_bytes(), " bytes, got ",
                     packed.numel());
    return data + sizeof h;
  }

  // Calls f(tile, first row of the plain weights, count of rows), in parallel.
  template <class F>
  void for_each_tile(F f) const {
    std::vector<int64_t> first_rows{0};
    for (const int64_t n : out_features) first_rows.push_back(first_rows.back() + n);
    parallel(tiles(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const size_t member = member_of(tile);
        const int64_t row = (tile - first_tiles[member]) * kTileN;
        f(tile, first_rows[member] + row, std::min(kTileN, out_features[member] - row));
      }
    });
  }
};

inline void check_zero_point(const char* name, int64_t zero_point) {
  IPEX_QUANT_CHECK(zero_point >= 0 && zero_point <= 255, name, ": expected 0..255, got ", zero_point);
}

inline int64_t sum_of(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (const int64_t value : values) sum += value;
  return sum;
}

}  // namespace ipex_quant
