// One ISA level's kernel table; isa/*.cpp include this after naming their namespace.
#pragma once

#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/float_linear.h"
#include "kernels/gated.h"
#include "kernels/int8_depthwise.h"
#include "kernels/int8_linear.h"
#include "kernels/norm.h"
#include "kernels/quantize_activation.h"
#include "kernels/quantize_weight.h"
#include "kernels/rope.h"
#include "kernels/stage.h"
#include "kernels/state_space.h"
#include "kernels/woq_decode.h"
#include "kernels/woq_prefill.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

template <int Dtype>
inline void typed_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  if (args.staged->streamed)
    decode_tile<Dtype>(args, tile);
  else
    prefill_tile<Dtype>(args, tile, begin, end, scratch);
}

inline void gemm_tile(const GemmArgs& args, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch) {
  for_dtype(args.geometry->dtype, [&](auto dtype) { typed_tile<dtype.value>(args, tile, begin, end, scratch); });
}

#if defined(IPEX_QUANT_BF16_DOT)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

constexpr KernelTable make_table() {
  return {kHasBf16Dot,         kLanes == 16 ? kDecodeRows : 2 * kLookupPassRows,
          stage_ranges,        stage_rows,
          gemm_tile,           stage_float_rows,
          float_tile,          quantize_rows,
          quantize_activation, int8_tile,
          depthwise_row,       norm_rows,
          rotate_positions,    gated_product,
          gather_rows,         attention_scratch,
          attention_task,      attention_merge,
          quantize_token,      convolve_channels,
          scan_channels};
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
