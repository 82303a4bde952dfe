#define IPEX_QUANT_ISA_NS avx512_bf16
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kAvx512Bf16Table;
const KernelTable kAvx512Bf16Table = avx512_bf16::make_table();
}  // namespace ipex_quant
