#include "kernels.h"

namespace ipex_quant {
extern const KernelPatch kBf16EmulatedKernels;
}  // namespace ipex_quant

#define IPEX_QUANT_ISA_NS amx_emulated
#define IPEX_QUANT_EMULATED
#define IPEX_QUANT_TILES kBf16EmulatedKernels
#include "kernels/tile_table.h"

namespace ipex_quant {
extern const KernelPatch kAmxEmulatedKernels;
const KernelPatch kAmxEmulatedKernels = amx_emulated::make_tile_kernels();
}  // namespace ipex_quant
