// The nibbles of a matrix of words, transposed: what AWQ stores feature by feature becomes rows of outputs. Bound by
// memory, and the same at every ISA level.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ops/call.h"
#include "ops/check.h"

namespace ipex_quant {
namespace {

constexpr int64_t kNibbles = 8;      // of a word
constexpr int64_t kWords = 16;       // of a row that are transposed together: a line of memory
constexpr int64_t kPanelRows = 128;  // whose nibbles fill a line of memory of the result

using Square = uint32_t[kNibbles][kWords];  // a square of 8 x 8 nibbles in every column

// Exchanges nibble j of row i and nibble i of row j: blocks of 1, 2 and 4 on either side of the diagonal.
void transpose(Square& rows) {
  constexpr uint32_t kLow[] = {0, 0x0F0F0F0Fu, 0x00FF00FFu, 0, 0x0000FFFFu};
  for (const int size : {1, 2, 4}) {
    for (int i = 0; i < kNibbles; ++i) {
      if (i & size) continue;
      for (int64_t w = 0; w < kWords; ++w) {
        const uint32_t changed = (rows[i][w] >> 4 * size ^ rows[i + size][w]) & kLow[size];
        rows[i + size][w] ^= changed;
        rows[i][w] ^= changed << 4 * size;
      }
    }
  }
}

struct Transposition {
  const uint32_t* words;  // [rows, columns]
  int64_t rows, columns;
  const int64_t* order;
  uint8_t* out;  // [kNibbles * columns, stride]
  int64_t stride;

  // Of up to kWords columns from `column` on.
  void run(int64_t column) const {
    const int64_t width = std::min(kWords, columns - column);
    uint8_t panel[kNibbles * kWords][kPanelRows / 2];
    for (int64_t first = 0; first < rows; first += kPanelRows) {
      const int64_t end = std::min(first + kPanelRows, rows);
      for (int64_t row = first; row < end; row += kNibbles) {
        Square square = {};
        for (int64_t i = 0; i < std::min(kNibbles, end - row); ++i)
          std::memcpy(square[i], words + (row + i) * columns + column, size_t(4 * width));
        transpose(square);
        for (int64_t nibble = 0; nibble < kNibbles; ++nibble)
          for (int64_t w = 0; w < width; ++w)
            std::memcpy(panel[kNibbles * w + order[nibble]] + (row - first) / 2, &square[nibble][w], 4);
      }
      for (int64_t i = 0; i < kNibbles * width; ++i)
        std::memcpy(out + (kNibbles * column + i) * stride + first / 2, panel[i], size_t((end - first + 1) / 2));
    }
  }
};

Tensor transpose_nibbles(Tensor words, std::vector<int64_t> order) {
  check_tensor("words", words, ScalarType::Int, 2);
  std::vector<int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  bool fits = int64_t(sorted.size()) == kNibbles;
  for (int64_t i = 0; fits && i < kNibbles; ++i) fits = sorted[size_t(i)] == i;
  IPEX_QUANT_CHECK(fits, "order: expected a permutation of 0..7");
  const int64_t rows = words.size(0), columns = words.size(1), stride = (rows + 1) / 2;
  Tensor out = empty({kNibbles * columns, stride}, ScalarType::Byte);
  const Transposition work{static_cast<const uint32_t*>(words.const_data_ptr()), rows,  columns, order.data(),
                           static_cast<uint8_t*>(out.mutable_data_ptr()),        stride};
  parallel((columns + kWords - 1) / kWords, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work.run(i * kWords);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) { m.def("transpose_nibbles(Tensor words, int[] order) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("transpose_nibbles", TORCH_BOX(&transpose_nibbles)); }

}  // namespace ipex_quant
