#include "host/self_test.h"

#include <cstring>
#include <vector>

namespace ipex_quant {
namespace {

constexpr int64_t kRows = 27, kK = 204;  // no multiples of what a tile holds

// Bytes that follow no pattern that a mistake could share.
std::vector<uint8_t> scattered_bytes(int64_t count) {
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  uint32_t state = 1;
  for (uint8_t& byte : bytes) byte = uint8_t((state = state * 1664525 + 1013904223) >> 24);
  return bytes;
}

}  // namespace

bool same_product(const KernelTable& a, const KernelTable& b) {
  const Int8Geometry g(kK);
  const std::vector<uint8_t> x = scattered_bytes(kRows * kK), codes = scattered_bytes(kTileN * kK);
  const std::vector<float> column_scales(kTileN, 0.5f);
  std::vector<uint8_t> tile(static_cast<size_t>(g.tile_bytes));
  pack_int8_tile(g, reinterpret_cast<const int8_t*>(codes.data()), column_scales.data(), kTileN, tile.data());
  const float scale = 0.25f;
  const int32_t zero_point = 131;
  const Int8Args args{&g, x.data(), kK, &scale, &zero_point, 0};
  std::vector<uint8_t> scratch(static_cast<size_t>(int8_scratch(g, kRows)));
  const auto product = [&](const KernelTable& table) {
    std::vector<float> y(size_t(kRows * kTileN));
    const Output output{kTileN, kTileN, nullptr, kNone, kFloat32, {nullptr, nullptr}, y.data()};
    table.int8_tile(args, output, tile.data(), 0, 0, kRows, scratch.data());
    return y;
  };
  const std::vector<float> first = product(a), second = product(b);
  return !std::memcmp(first.data(), second.data(), first.size() * sizeof(float));
}

}  // namespace ipex_quant
