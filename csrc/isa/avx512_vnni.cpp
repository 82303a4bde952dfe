#define IPEX_QUANT_ISA_NS avx512_vnni
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kAvx512VnniTable;
const KernelTable kAvx512VnniTable = avx512_vnni::make_table();
}  // namespace ipex_quant
