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
  const FloatCodes<code_bits(Dtype) % 4 ? kInt8 : Dtype> codes(kFloat32);
  const int64_t column = args.rows[i] % kTileN;
  for (GroupWalk at(g, args.tiles + args.rows[i] / kTileN * g.tile_bytes); at.more(); at.advance()) {
    const uint8_t* set = at.codes();
    for (int64_t k = 0; k < g.padded(at.group); k += line_k(Dtype), set += line_set_bytes(Dtype))
      get_codes<Dtype>(set, column, slots + k);
    const GroupHead head(g, at);
    const vf scale = set1_f(head.scale_of(column)), zero = set1_f(float(head.zero_of(column)));
    const vf minimum = set1_f(head.minimums ? head.minimum_of(column) : 0.0f);
    for_each_run(g.length(at.group), [&](int64_t k, int64_t count) IPEX_QUANT_INLINE {
      vf value = mul_f(codes.template value<0>(load_u8(slots + k), zero), scale);
      if (head.minimums) value = add_f(value, minimum);
      store_run(out, args.type, at.group * g.group + k, count, value);
    });
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
  for_dtype(args.geometry->dtype, [&](auto dtype) { gather_typed_rows<dtype.value>(args, begin, end, scratch); });
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
