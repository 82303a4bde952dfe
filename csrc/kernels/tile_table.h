// The kernels of a level with tiles; isa/*.cpp include this after naming their namespace and those kernels that serve
// what tiles do not: few rows and float32.
#pragma once

#include "kernels/attention_tiles.h"
#include "kernels/linear_tiles.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

inline void gemm_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  const Staged& s = *args.staged;
  if (s.streamed || s.compute == Compute::kFloat || end - begin < kMinTileRows)
    return IPEX_QUANT_TILES.gemm_tile(args, tile, begin, end, scratch);
  scratch += -reinterpret_cast<uintptr_t>(scratch) & (kTmmBytes - 1);
  for_dtype(args.geometry->dtype, [&](auto dtype) {
    constexpr int kDtype = decltype(dtype)::value;
    if constexpr (fits_bytes(kDtype)) {
      if (s.compute == Compute::kByte) return prefill_bytes<kDtype>(args, tile, begin, end, scratch);
    }
    prefill_floats<kDtype, true>(args, tile, begin, end, scratch);
  });
}

inline void int8_rows(const Int8Args& args, const Output& output, const uint8_t* tile, int64_t column, int64_t begin,
                      int64_t end, uint8_t* scratch) {
  if (end - begin < kMinTileRows) return IPEX_QUANT_TILES.int8_tile(args, output, tile, column, begin, end, scratch);
  int8_tile(args, output, tile, column, begin, end, scratch);
}

inline void attention_rows(const AttentionArgs& args, const AttentionTask& task, uint8_t* scratch) {
  if (task.rows < kMinTileRows) return IPEX_QUANT_TILES.attention_task(args, task, scratch);
  if (args.cache == CacheType::kInt8) return AttentionRun<ByteTilePath>(args, task, scratch).run();
  if (args.cache == CacheType::kFloat && args.type == kBFloat16)
    return AttentionRun<PairTilePath>(args, task, scratch).run();
  IPEX_QUANT_TILES.attention_task(args, task, scratch);
}

inline int64_t attention_bytes(const AttentionArgs& args) { return IPEX_QUANT_TILES.attention_scratch(args); }

constexpr KernelPatch make_tile_kernels() { return {gemm_tile, int8_rows, attention_bytes, attention_rows}; }

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
