#include <algorithm>
#include <cstring>

#include "pack/int8_layout.h"

namespace ipex_quant {
namespace {

constexpr int64_t kBlock = 64;  // of k: the part of the tile that a block of k fills stays in the L1 cache

// Calls f(column, k, count) for each word of codes, by blocks of k; count is 4, or less at the end of K.
template <class F>
void for_each_word(const Int8Geometry& g, int64_t columns, F f) {
  for (int64_t block = 0; block < g.k; block += kBlock)
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t k = block; k < std::min(block + kBlock, g.k); k += 4)
        f(column, k, size_t(std::min<int64_t>(4, g.k - k)));
}

}  // namespace

void pack_int8_tile(const Int8Geometry& g, const int8_t* codes, const float* scales, int64_t columns, uint8_t* tile) {
  std::memset(tile, 0, size_t(g.tile_bytes));
  std::memcpy(tile, scales, size_t(columns) * 4);
  for (int64_t fold = 0; fold < g.folds; ++fold)
    for (int64_t column = 0; column < columns; ++column) {
      int32_t sum = 0;
      for (int64_t k = fold * kInt8Fold; k < std::min((fold + 1) * kInt8Fold, g.k); ++k) sum += codes[column * g.k + k];
      std::memcpy(tile + 4 * (kTileN * (1 + fold) + column), &sum, 4);
    }
  for_each_word(g, columns, [&](int64_t column, int64_t k, size_t count) {
    std::memcpy(tile + g.head_bytes + byte_code_offset(k, column), codes + column * g.k + k, count);
  });
}

void unpack_int8_tile(const Int8Geometry& g, const uint8_t* tile, int64_t columns, int8_t* codes, float* scales) {
  std::memcpy(scales, tile, size_t(columns) * 4);
  for_each_word(g, columns, [&](int64_t column, int64_t k, size_t count) {
    std::memcpy(codes + column * g.k + k, tile + g.head_bytes + byte_code_offset(k, column), count);
  });
}

}  // namespace ipex_quant
