// Products of up to 32 rows by 16 or 32 columns in the tiles of tile.h: two tiles of rows, one or two of columns, so
// that what is loaded meets two others.
#pragma once

#include "simd.h"
#include "tile.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int64_t kBlockRows = 2 * kTmmRows, kBlockColumns = 32;
constexpr int kBlockVectors = int(kBlockColumns / kLanes);

// Calls f(first row, rows) for blocks of at most kBlockRows, as equal as can be: of kMinTileRows or more rows, none has
// fewer.
template <class F>
inline void each_row_block(int64_t rows, F f) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block * rows / blocks;
    f(row, (block + 1) * rows / blocks - row);
  }
}

enum class TileDot { kUnsignedSigned, kSignedUnsigned, kPairs };

// Rows that are `stride` bytes apart.
template <class T>
struct TileRows {
  T* first;
  int64_t stride;

  T* at(int64_t row, int64_t byte) const { return first + row * stride + byte; }
};

// [rows][kBlockColumns] products of a block; T is what they are.
template <class T>
struct alignas(64) BlockSums {
  T sums[kBlockRows * kBlockColumns];

  TileRows<uint8_t> rows() { return {reinterpret_cast<uint8_t*>(sums), 4 * kBlockColumns}; }
  const T* at(int64_t row, int v) const { return sums + row * kBlockColumns + v * kLanes; }
};

class TileBlock {
 public:
  // Sets c, [rows][16 * Columns] sums of four bytes each, to a times b, or adds that to it. A row of a is `bytes` long,
  // a multiple of 4; b is [bytes / 4][16 * Columns] words that meet those of a. Takes 2 to kBlockRows rows.
  template <TileDot Dot, int Columns, bool Add>
  void multiply(TileRows<const uint8_t> a, TileRows<const uint8_t> b, int64_t rows, int64_t bytes,
                TileRows<uint8_t> c) {
    static_assert(Columns == 1 || Columns == 2, "as many tiles as there are");
    const int64_t half = (rows + 1) / 2;
    // A run of whole tiles, then one of what is left.
    for (int64_t k = 0; k < bytes;) {
      const int64_t step = bytes - k < kTmmBytes ? bytes - k : kTmmBytes, end = bytes - (bytes - k) % step;
      configure(rows, step, Columns);
      if (Add || k > 0)
        load_sums<Columns>(c, half);
      else
        zero_sums<Columns>();
      for (; k < end; k += step) {
        tiles_.load<kA>(a.at(0, k), a.stride);
        tiles_.load<kB>(b.at(k / 4, 0), b.stride);
        dot<Dot, kC, kA, kB>();
        tiles_.load<kA + 1>(a.at(half, k), a.stride);
        dot<Dot, kC + 2, kA + 1, kB>();
        if constexpr (Columns == 2) {
          tiles_.load<kB + 1>(b.at(k / 4, kTmmBytes), b.stride);
          dot<Dot, kC + 1, kA, kB + 1>();
          dot<Dot, kC + 3, kA + 1, kB + 1>();
        }
      }
      store_sums<Columns>(c, half);
    }
  }

 private:
  static constexpr int kC = 0, kA = 4, kB = 6;  // tiles: four of sums, two of rows, two of columns

  void configure(int64_t rows, int64_t step, int columns) {
    if (rows == rows_ && step == step_ && columns == columns_) return;
    rows_ = rows, step_ = step, columns_ = columns;
    TileConfig config;
    for (int i = 0; i < 2; ++i) {
      const int64_t own = i ? rows / 2 : (rows + 1) / 2;
      config.set(kA + i, own, step);
      for (int j = 0; j < columns; ++j) config.set(kC + 2 * i + j, own, kTmmBytes);
      if (i < columns) config.set(kB + i, step / 4, kTmmBytes);
    }
    tiles_.configure(config);
  }

  template <int Columns>
  void zero_sums() {
    tiles_.zero<kC>();
    tiles_.zero<kC + 2>();
    if constexpr (Columns == 2) {
      tiles_.zero<kC + 1>();
      tiles_.zero<kC + 3>();
    }
  }
  template <int Columns>
  void load_sums(TileRows<uint8_t> c, int64_t half) {
    tiles_.load<kC>(c.at(0, 0), c.stride);
    tiles_.load<kC + 2>(c.at(half, 0), c.stride);
    if constexpr (Columns == 2) {
      tiles_.load<kC + 1>(c.at(0, kTmmBytes), c.stride);
      tiles_.load<kC + 3>(c.at(half, kTmmBytes), c.stride);
    }
  }
  template <int Columns>
  void store_sums(TileRows<uint8_t> c, int64_t half) {
    tiles_.store<kC>(c.at(0, 0), c.stride);
    tiles_.store<kC + 2>(c.at(half, 0), c.stride);
    if constexpr (Columns == 2) {
      tiles_.store<kC + 1>(c.at(0, kTmmBytes), c.stride);
      tiles_.store<kC + 3>(c.at(half, kTmmBytes), c.stride);
    }
  }
  template <TileDot Dot, int C, int A, int B>
  void dot() {
    if constexpr (Dot == TileDot::kUnsignedSigned) tiles_.dot_u8_s8<C, A, B>();
    if constexpr (Dot == TileDot::kSignedUnsigned) tiles_.dot_s8_u8<C, A, B>();
    if constexpr (Dot == TileDot::kPairs) tiles_.dot_bf16<C, A, B>();
  }

  Tiles tiles_;
  int64_t rows_ = 0, step_ = 0;
  int columns_ = 0;
};

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
