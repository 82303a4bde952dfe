#define IPEX_QUANT_ISA_NS avx2
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kAvx2Table;
const KernelTable kAvx2Table = avx2::make_table();
}  // namespace ipex_quant
