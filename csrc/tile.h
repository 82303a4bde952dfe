// The tiles of AMX: eight registers of up to 16 rows of 64 bytes. Two twins of one class: the instructions themselves
// and, with IPEX_QUANT_EMULATED, portable C++ that does what Intel's manual says they do, in the order of additions
// that it says. What would fault traps there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(IPEX_QUANT_EMULATED)
#include "bf16.h"
#endif

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

constexpr int64_t kTmmRows = 16, kTmmBytes = 64;

// The shapes of the tiles, as LDTILECFG reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "the operand of LDTILECFG");

#if !defined(IPEX_QUANT_EMULATED)

// In assembly, since the intrinsics of GCC 12 neither take the number of a tile from a template nor say what memory
// they read. The strides are in bytes.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }

  // Zeroes all tiles.
  void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // c += a * b: rows of a by columns of words of b.
  template <int C, int A, int B>
  void dot_u8_s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  void dot_s8_u8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>
  void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;

  void configure(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0);
    for (int t = 0; t < 16; ++t) {
      require(t < kTiles || (config.rows[t] == 0 && config.row_bytes[t] == 0));
      require(config.rows[t] <= kTmmRows && config.row_bytes[t] <= kTmmBytes);
      require((config.rows[t] == 0) == (config.row_bytes[t] == 0));
    }
    config_ = config;
    std::memset(tiles_, 0, sizeof tiles_);
  }
  template <int T>
  void zero() {
    shape(T);
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    const Shape s = shape(T);
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
    for (int64_t m = 0; m < s.rows; ++m)
      std::memcpy(tiles_[T][m], static_cast<const uint8_t*>(p) + m * stride, size_t(s.bytes));
  }
  template <int T>
  void store(void* p, int64_t stride) {
    const Shape s = shape(T);
    for (int64_t m = 0; m < s.rows; ++m)
      std::memcpy(static_cast<uint8_t*>(p) + m * stride, tiles_[T][m], size_t(s.bytes));
  }
  template <int C, int A, int B>
  void dot_u8_s8() {
    dot_bytes<uint8_t, int8_t>(C, A, B);
  }
  template <int C, int A, int B>
  void dot_s8_u8() {
    dot_bytes<int8_t, uint8_t>(C, A, B);
  }
  template <int C, int A, int B>
  void dot_bf16() {
    each_sum(C, A, B, [](const Word* a, const Word* b, int64_t words, uint32_t& sum) {
      float lower = 0.0f, upper = 0.0f, total;
      for (int64_t k = 0; k < words; ++k, ++a, b += kTmmBytes / 4) {
        uint32_t x, y;
        std::memcpy(&x, a, 4), std::memcpy(&y, b, 4);
        lower = fma_bf16(x & 0xFFFF, y & 0xFFFF, lower);
        upper = fma_bf16(x >> 16, y >> 16, upper);
      }
      std::memcpy(&total, &sum, 4);
      total = flush_denormal(flush_denormal(total) + flush_denormal(lower + upper));
      std::memcpy(&sum, &total, 4);
    });
  }

 private:
  static constexpr int kTiles = 8;
  struct Word {
    uint8_t bytes[4];
  };
  struct Shape {
    int64_t rows, bytes;
  };

  static void require(bool condition) {
    if (!condition) __builtin_trap();
  }
  Shape shape(int t) const {
    require(config_.rows[t] > 0);
    return {config_.rows[t], config_.row_bytes[t]};
  }

  // Calls f(row of a, column of b, words of both, element of c).
  template <class F>
  void each_sum(int c, int a, int b, F f) {
    const Shape shape_c = shape(c), shape_a = shape(a), shape_b = shape(b);
    require(c != a && c != b && a != b && shape_a.bytes % 4 == 0 && shape_b.bytes % 4 == 0);
    require(shape_c.rows == shape_a.rows && shape_c.bytes == shape_b.bytes && shape_a.bytes == 4 * shape_b.rows);
    for (int64_t m = 0; m < shape_c.rows; ++m)
      for (int64_t n = 0; n < shape_c.bytes / 4; ++n) {
        uint32_t sum;
        std::memcpy(&sum, tiles_[c][m] + 4 * n, 4);
        f(reinterpret_cast<const Word*>(tiles_[a][m]), reinterpret_cast<const Word*>(tiles_[b][0]) + n, shape_b.rows,
          sum);
        std::memcpy(tiles_[c][m] + 4 * n, &sum, 4);
      }
  }

  template <class X, class Y>
  void dot_bytes(int c, int a, int b) {
    each_sum(c, a, b, [](const Word* x, const Word* y, int64_t words, uint32_t& sum) {
      for (int64_t k = 0; k < words; ++k, ++x, y += kTmmBytes / 4)
        for (int i = 0; i < 4; ++i) sum += uint32_t(int32_t(X(x->bytes[i])) * int32_t(Y(y->bytes[i])));
    });
  }

  TileConfig config_;
  uint8_t tiles_[kTiles][kTmmRows][kTmmBytes];
};

#endif

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
