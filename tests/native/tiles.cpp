// Products of csrc/kernels/tile_block.h and the self-test of csrc/host/self_test.h, for tests/ops/test_tiles.py.
// Compiled with IPEX_QUANT_EMULATED for one twin of tile.h and without it, together with tile_trap.cpp, for the other.
#define IPEX_QUANT_ISA_NS tiles_test
#include "host/self_test.h"
#include "kernels/tile_block.h"

using namespace ipex_quant;
using namespace ipex_quant::tiles_test;

namespace {

using Rows = TileRows<const uint8_t>;

template <TileDot Dot, int Columns>
void multiply(bool add, Rows a, Rows b, int64_t rows, int64_t bytes, TileRows<uint8_t> c) {
  TileBlock block;
  if (add)
    block.multiply<Dot, Columns, true>(a, b, rows, bytes, c);
  else
    block.multiply<Dot, Columns, false>(a, b, rows, bytes, c);
}

template <TileDot Dot>
void multiply(int tiles, bool add, Rows a, Rows b, int64_t rows, int64_t bytes, TileRows<uint8_t> c) {
  tiles == 1 ? multiply<Dot, 1>(add, a, b, rows, bytes, c) : multiply<Dot, 2>(add, a, b, rows, bytes, c);
}

// Sums that are wrong in the last place of one row.
template <bool Wrong>
void fake_product(const Int8Args& args, const Output& output, const uint8_t*, int64_t, int64_t begin, int64_t end,
                  uint8_t*) {
  for (int64_t i = begin * kTileN; i < end * kTileN; ++i)
    static_cast<float*>(output.y)[i] = float(args.x[i]) + (Wrong && i == 20 * kTileN ? 0x1p-16f : 0.0f);
}

}  // namespace

extern "C" void tile_product(int dot, int tiles, int add, const uint8_t* a, int64_t a_stride, const uint8_t* b,
                             int64_t b_stride, int64_t rows, int64_t bytes, uint8_t* c, int64_t c_stride) {
  auto* product = dot == 0   ? multiply<TileDot::kUnsignedSigned>
                  : dot == 1 ? multiply<TileDot::kSignedUnsigned>
                             : multiply<TileDot::kPairs>;
  product(tiles, add, {a, a_stride}, {b, b_stride}, rows, bytes, {c, c_stride});
}

extern "C" int self_test_accepts(int wrong) {
  KernelTable right{}, other{};
  right.int8_tile = fake_product<false>;
  other.int8_tile = wrong ? fake_product<true> : fake_product<false>;
  return same_product(other, right);
}
