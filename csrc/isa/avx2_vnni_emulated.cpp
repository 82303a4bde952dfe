// The kernels of avx2_vnni where its one instruction is made of others, so that every machine with AVX2 tests them.
#define IPEX_QUANT_ISA_NS avx2_vnni_emulated
#define IPEX_QUANT_EMULATED_VNNI
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kAvx2VnniEmulatedTable;
const KernelTable kAvx2VnniEmulatedTable = avx2_vnni_emulated::make_table();
}  // namespace ipex_quant
