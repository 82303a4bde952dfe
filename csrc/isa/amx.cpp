#include "kernels.h"

namespace ipex_quant {
extern const KernelTable kAvx512Bf16Table;
}  // namespace ipex_quant

#define IPEX_QUANT_ISA_NS amx
#define IPEX_QUANT_TILES kAvx512Bf16Table
#include "kernels/tile_table.h"

namespace ipex_quant {
extern const KernelPatch kAmxKernels;
const KernelPatch kAmxKernels = amx::make_tile_kernels();
}  // namespace ipex_quant
