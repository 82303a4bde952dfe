// Rows of a packed weight, dequantized: what an embedding looks up.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/weights.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// Row args.rows[i] goes to `out`, its features in group order.
template <int Dtype>
inline void gather_row(const GatherArgs& args, int64_t i, uint8_t* out, uint8_t* slots) {
  const WoqGeometry& g = *args.geometry;
  const FloatCodes<Dtype> codes(kFloat32);
  const int64_t column = args.rows[i] % kTileN;
  const uint8_t* at = args.tiles + args.rows[i] / kTileN * g.tile_bytes;
  for (int64_t group = 0; group < g.groups; ++group) {
    const uint8_t* own = at + g.head_bytes + code_offset(is_four_bit(Dtype), 0, column);
    for (int64_t k = 0; k < g.padded(group); k += 8, own += line_group_bytes(Dtype))
      get8(is_four_bit(Dtype), own, slots + k);
    const GroupHead head(g, at);
    const vf scale = set1_f(head.scale_of(column)), zero = set1_f(float(head.zero_of(column)));
    for_each_run(g.length(group), [&](int64_t k, int64_t count) IPEX_QUANT_INLINE {
      const vf value = codes.template value<0>(load_u8(slots + k), zero);
      store_run(out, args.type, group * g.group + k, count, mul_f(value, scale));
    });
    at += g.head_bytes + g.code_bytes(g.padded(group));
  }
}

template <int Dtype>
inline void gather_typed_rows(const GatherArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t k = args.geometry->k, size = float_size(args.type);
  uint8_t* ordered = scratch + gather_slots(*args.geometry);
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* out = static_cast<uint8_t*>(args.out) + i * k * size;
    gather_row<Dtype>(args, i, args.perm ? ordered : out, scratch);
    if (args.perm)
      for (int64_t j = 0; j < k; ++j) std::memcpy(out + args.perm[j] * size, ordered + j * size, size_t(size));
  }
}

inline void gather_rows(const GatherArgs& args, int64_t begin, int64_t end, uint8_t* scratch) {
  switch (args.geometry->dtype) {
    case kInt8:
      return gather_typed_rows<kInt8>(args, begin, end, scratch);
    case kInt4:
      return gather_typed_rows<kInt4>(args, begin, end, scratch);
    case kNf4:
      return gather_typed_rows<kNf4>(args, begin, end, scratch);
    default:
      return gather_typed_rows<kFp8>(args, begin, end, scratch);
  }
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
