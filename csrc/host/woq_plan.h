// A weight-only linear without torch: the format it computes in, which is decided once per call, the staging of its
// activations, and the tiles of its weights.
#pragma once

#include <algorithm>
#include <vector>

#include "host/buffer.h"
#include "host/team.h"
#include "kernels.h"

namespace ipex_quant {

struct WoqCall {
  FloatType type;          // of x
  int32_t lowp_mode;       // LowpMode
  int32_t act_quant_mode;  // WoqActQuantMode of Python, symmetric offset included
  int64_t group_size;      // as in the header
  int64_t rows;
  bool bf16_dot;
};

struct WoqPlan {
  Staged staged;
  int32_t range_scope;
  int64_t data_bytes;
};

// Up to how many rows the packed weight is streamed: the more its codes cost to unpack, the fewer. What more rows meet
// is unpacked once.
inline int64_t streamed_rows(Compute compute, int32_t dtype) {
  if (compute == Compute::kByte) return kByteDecodeRows;
  if (compute == Compute::kFloat) return kernels().float_decode_rows;
  if (kernels().tiles && code_bits(dtype) < 8 && dtype != kIq4) return kMinTileRows - 1;
  if (code_bits(dtype) == 8 || dtype == kIq4) return kDecodeRows;
  return dtype == kInt4 || dtype == kNf4 || dtype == kBnbFp4 ? kStepRows : 2 * kDecodeRows;
}

inline WoqPlan make_plan(const WoqGeometry& g, const WoqCall& call) {
  WoqPlan plan{};
  Staged& s = plan.staged;
  s.rows = call.rows;
  s.quantize = call.lowp_mode == kLowpInt8;
  s.rounding = call.type;
  if (s.quantize) {
    s.symmetric = call.act_quant_mode >= kSymmetricActOffset;
    plan.range_scope = call.act_quant_mode % kSymmetricActOffset;
    s.compute = fits_bytes(g.dtype) ? Compute::kByte : Compute::kFloat;
    const bool blocks = plan.range_scope == kPerIcBlock || plan.range_scope == kPerBatchIcBlock;
    s.max_fold = blocks && call.group_size < 0 ? kActBlock : kMaxByteFold;
  } else {
    if (call.lowp_mode == kLowpFp16) s.rounding = kFloat16;
    if (call.lowp_mode == kLowpBf16) s.rounding = kBFloat16;
    const bool bf16 = s.rounding == kBFloat16 && call.bf16_dot;
    s.compute = bf16 ? Compute::kBf16 : Compute::kFloat;
    s.max_fold = kFloatFold;
  }
  s.streamed = call.rows <= streamed_rows(s.compute, g.dtype);
  s.unsigned_bytes = s.quantize && !s.streamed;
  const auto folds = [&](int64_t padded) { return (padded + s.max_fold - 1) / s.max_fold; };
  s.folds = (g.groups - 1) * folds(g.padded_full) + folds(g.padded_last);
  const int64_t element = s.compute == Compute::kByte ? 1 : s.compute == Compute::kBf16 ? 2 : 4;
  plan.data_bytes = round_up(s.rows * g.padded_k * element, 64);
  return plan;
}

// All buffers of the staged rows lie in one 64-byte aligned block.
inline int64_t fold_bytes(const WoqPlan& plan) { return round_up(plan.staged.rows * plan.staged.folds * 4, 64); }
inline int64_t staged_bytes(const WoqPlan& plan) { return plan.data_bytes + 4 * fold_bytes(plan); }
inline void place_buffers(WoqPlan& plan, uint8_t* block) {
  Staged& s = plan.staged;
  uint8_t* folds = block + plan.data_bytes;
  s.data = block;
  s.float_sums = reinterpret_cast<float*>(folds + 3 * fold_bytes(plan));
  if (!s.quantize) return;
  s.scales = reinterpret_cast<float*>(folds);
  s.sums = reinterpret_cast<int32_t*>(folds + fold_bytes(plan));
  if (!s.symmetric) s.zeros = reinterpret_cast<int32_t*>(folds + 2 * fold_bytes(plan));
}

inline bool ranges_cross_rows(const WoqPlan& plan) {
  return plan.staged.quantize && (plan.range_scope == kPerTensor || plan.range_scope == kPerIcBlock);
}

// Gives every row the widest range of all rows, fold by fold; a NaN spreads to all of them.
inline void merge_ranges(float* ranges, int64_t rows, int64_t folds) {
  for (int64_t i = 0; i < folds; ++i) {
    float low = 0.0f, high = 0.0f;
    for (int64_t m = 0; m < rows; ++m) {
      const float* r = ranges + (m * folds + i) * 2;
      if (r[0] < low) low = r[0];
      if (!(r[1] <= high) && high == high) high = r[1];
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* r = ranges + (m * folds + i) * 2;
      r[0] = low, r[1] = high;
    }
  }
}

inline int64_t ranges_bytes(const WoqPlan& plan) { return plan.staged.rows * plan.staged.folds * 8; }
// Memory of StageArgs::ranges; none where every row has ranges of its own.
inline Buffer make_ranges(const WoqPlan& plan) {
  return ranges_cross_rows(plan) ? make_buffer(ranges_bytes(plan)) : Buffer();
}

// Stages the rows of a plan. `divide` gets a function of a run of rows and scratch, and calls it for all rows, on any
// threads.
template <class Divide>
void stage_rows(const WoqPlan& plan, const StageArgs& args, Divide divide) {
  const KernelTable& table = kernels();
  if (ranges_cross_rows(plan)) {
    divide([&](Tasks rows, uint8_t* scratch) { table.stage_ranges(args, rows.begin, rows.end, scratch); });
    merge_ranges(args.ranges, plan.staged.rows, plan.staged.folds);
  }
  divide([&](Tasks rows, uint8_t* scratch) { table.stage_rows(args, rows.begin, rows.end, scratch); });
}

inline int64_t tile_count(const GemmArgs& weight) { return weight.geometry->tiles; }

// Tiles of several weights as one list: those of one weight after those of another, or if `together`, one for the tiles
// of all weights at the same place, which have one size then.
template <class Weight>
int64_t count_tiles(const std::vector<Weight>& weights, bool together) {
  int64_t tiles = 0;
  for (const Weight& weight : weights) tiles += tile_count(weight);
  return together ? tile_count(weights[0]) : tiles;
}

// Calls f(weight, its tiles) for each weight that has tiles in a run of the list.
template <class Weight, class F>
void for_each_weight(const std::vector<Weight>& weights, bool together, Tasks run, F f) {
  int64_t first = 0;  // tile of the weight in the list
  for (const Weight& weight : weights) {
    const int64_t tiles = tile_count(weight);
    const Tasks own{std::max(run.begin - first, int64_t(0)), std::min(run.end - first, tiles)};
    if (own.begin < own.end) f(weight, own);
    if (!together) first += tiles;
  }
}

}  // namespace ipex_quant
