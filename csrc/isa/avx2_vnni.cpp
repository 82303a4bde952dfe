#define IPEX_QUANT_ISA_NS avx2_vnni
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kAvx2VnniTable;
const KernelTable kAvx2VnniTable = avx2_vnni::make_table();
}  // namespace ipex_quant
