// Products of bf16 by vectors, which the generic level lacks, for what tiles leave to vectors.
#define IPEX_QUANT_ISA_NS bf16_emulated
#define IPEX_QUANT_EMULATED
#include "kernels/attention.h"
#include "kernels/woq_decode.h"
#include "kernels/woq_prefill.h"

namespace ipex_quant {
extern const KernelTable kGenericTable;

namespace bf16_emulated {
namespace {

void gemm_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  if (args.staged->compute != Compute::kBf16) return kGenericTable.gemm_tile(args, tile, begin, end, scratch);
  for_dtype(args.geometry->dtype, [&](auto dtype) {
    constexpr int kDtype = decltype(dtype)::value;
    if (args.staged->streamed)
      decode_tile<kDtype>(args, tile);
    else
      prefill_floats<kDtype, true>(args, tile, begin, end, scratch);
  });
}

void int8_rows(const Int8Args& args, const Output& output, const uint8_t* tile, int64_t column, int64_t begin,
               int64_t end, uint8_t* scratch) {
  kGenericTable.int8_tile(args, output, tile, column, begin, end, scratch);
}

bool is_bf16(const AttentionArgs& args) { return args.cache == CacheType::kFloat && args.type == kBFloat16; }

int64_t attention_bytes(const AttentionArgs& args) {
  return is_bf16(args) ? scratch_of<PairPath>(args).bytes : kGenericTable.attention_scratch(args);
}

void attention_rows(const AttentionArgs& args, const AttentionTask& task, uint8_t* scratch) {
  if (!is_bf16(args)) return kGenericTable.attention_task(args, task, scratch);
  AttentionRun<PairPath>(args, task, scratch).run();
}

}  // namespace
}  // namespace bf16_emulated

extern const KernelPatch kBf16EmulatedKernels;
const KernelPatch kBf16EmulatedKernels{bf16_emulated::gemm_tile, bf16_emulated::int8_rows,
                                       bf16_emulated::attention_bytes, bf16_emulated::attention_rows};
}  // namespace ipex_quant
