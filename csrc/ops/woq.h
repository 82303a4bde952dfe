// What the ops with packed weights share: the checks of a packed weight and of what it is computed in.
#pragma once

#include "host/woq_plan.h"
#include "ops/call.h"

namespace ipex_quant {

// The checked header of a packed weight, and the sizes that follow from it, which are those of the tensor.
WoqHeader read_header(const Tensor& packed);
WoqGeometry geometry_of(const WoqHeader& header, const Tensor& packed);

void check_modes(int64_t lowp_mode, int64_t act_quant_mode);

// The order in which staging reads the `k` input features, or null without one.
const int32_t* perm_data(const char* name, const std::optional<Tensor>& perm, int64_t k);

// The same of one that is written through, and so must hit every feature.
const int32_t* permutation_data(const std::optional<Tensor>& perm, int64_t k);

}  // namespace ipex_quant
