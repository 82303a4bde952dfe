#define IPEX_QUANT_ISA_NS generic
#include "kernels/table.h"

namespace ipex_quant {
extern const KernelTable kGenericTable;
const KernelTable kGenericTable = generic::make_table();
}  // namespace ipex_quant
