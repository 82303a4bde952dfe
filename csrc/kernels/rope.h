// Rotary position embedding: pairs of features rotated by the angle of their position.
#pragma once

#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// The first and second members of kLanes pairs.
struct Pairs {
  vf first, second;
};

// From 2 * count elements in which the members of a pair are neighbours.
inline Pairs load_neighbours(const void* base, FloatType type, int64_t i, int64_t count) {
  float both[2 * kLanes] = {}, first[kLanes], second[kLanes];
  for_each_run(2 * count, [&](int64_t j, int64_t run) { store_f(both + j, load_run(base, type, i + j, run)); });
  for (int64_t j = 0; j < kLanes; ++j) first[j] = both[2 * j], second[j] = both[2 * j + 1];
  return {load_f(first), load_f(second)};
}

inline void store_neighbours(void* base, FloatType type, int64_t i, int64_t count, const Pairs& pairs) {
  float both[2 * kLanes], first[kLanes], second[kLanes];
  store_f(first, pairs.first), store_f(second, pairs.second);
  for (int64_t j = 0; j < kLanes; ++j) both[2 * j] = first[j], both[2 * j + 1] = second[j];
  for_each_run(2 * count, [&](int64_t j, int64_t run) { store_run(base, type, i + j, run, load_f(both + j)); });
}

// Cosines or sines of pairs [i, i + count): a table row holds one for every pair or one for every feature.
template <bool Interleaved>
inline Pairs load_angles(const RotaryArgs& args, const void* table, int64_t at, int64_t i, int64_t count) {
  const int64_t half = args.rotary_dim / 2;
  if (args.table_columns == half) {
    const vf both = load_run(table, args.table_type, at + i, count);
    return {both, both};
  }
  if (Interleaved) return load_neighbours(table, args.table_type, at + 2 * i, count);
  return {load_run(table, args.table_type, at + i, count), load_run(table, args.table_type, at + half + i, count)};
}

template <FloatType Type, bool Interleaved>
inline void rotate_head(const RotaryArgs& args, int64_t table_at, int64_t from, int64_t to) {
  const int64_t half = args.rotary_dim / 2;
  for_each_run(half, [&](int64_t i, int64_t count) IPEX_QUANT_INLINE {
    const Pairs cos = load_angles<Interleaved>(args, args.cos, table_at, i, count);
    const Pairs sin = load_angles<Interleaved>(args, args.sin, table_at, i, count);
    const Pairs x =
        Interleaved ? load_neighbours(args.x, Type, from + 2 * i, count)
                    : Pairs{load_run(args.x, Type, from + i, count), load_run(args.x, Type, from + half + i, count)};
    const Pairs y{sub_f(mul_f(x.first, cos.first), mul_f(x.second, sin.first)),
                  add_f(mul_f(x.second, cos.second), mul_f(x.first, sin.second))};
    if (Interleaved) return store_neighbours(args.y, Type, to + 2 * i, count, y);
    store_run(args.y, Type, to + i, count, y.first);
    store_run(args.y, Type, to + half + i, count, y.second);
  });
  const int64_t size = float_size(Type), rotated = args.rotary_dim;
  std::memcpy(static_cast<uint8_t*>(args.y) + (to + rotated) * size,
              static_cast<const uint8_t*>(args.x) + (from + rotated) * size, size_t((args.dim - rotated) * size));
}

template <FloatType Type>
inline void rotate_typed(const RotaryArgs& args, int64_t begin, int64_t end) {
  for (int64_t position = begin; position < end; ++position) {
    const int64_t batch = position / args.length, at = position % args.length;
    const int64_t table_at = batch * args.table_batch_stride + at * args.table_columns;
    int64_t from = batch * args.strides[0] + at * args.strides[1], to = position * args.heads * args.dim;
    for (int64_t head = 0; head < args.heads; ++head, from += args.strides[2], to += args.dim) {
      if (args.interleaved)
        rotate_head<Type, true>(args, table_at, from, to);
      else
        rotate_head<Type, false>(args, table_at, from, to);
    }
  }
}

// All heads of positions [begin, end), counted through the batch.
inline void rotate_positions(const RotaryArgs& args, int64_t begin, int64_t end) {
  if (args.type == kFloat32) return rotate_typed<kFloat32>(args, begin, end);
  if (args.type == kBFloat16) return rotate_typed<kBFloat16>(args, begin, end);
  rotate_typed<kFloat16>(args, begin, end);
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
