// A check of kernels that no one may have run on this kind of processor.
#pragma once

#include "kernels.h"

namespace ipex_quant {

// Whether a product of many rows of int8 has the same bits by both tables.
bool same_product(const KernelTable& a, const KernelTable& b);

}  // namespace ipex_quant
