#include "host/team_linears.h"

#include <cstring>

namespace ipex_quant {
namespace {

// Most bytes that a thread prefetches while it waits: they stay in the L2 cache.
constexpr int64_t kAheadBytes = int64_t(1) << 17;

class WoqStaging : public Staging {
 public:
  WoqStaging(const WoqWeight& weight, const LinearsCall& call)
      : weight_(weight),
        type_(call.type),
        plan_(make_plan(weight.geometry, {call.type, call.lowp_mode, call.act_quant_mode, weight.group_size, call.rows,
                                          kernels().bf16_dot})) {}

  bool serves(const WeightArgs& weight) const override {
    const WoqWeight* other = std::get_if<WoqWeight>(&weight.kind);
    return other && other->geometry.dtype == weight_.geometry.dtype && other->group_size == weight_.group_size;
  }
  StagingBytes bytes() const override {
    const Staged& staged = plan_.staged;
    return {staged_bytes(plan_), ranges_bytes(plan_),
            std::max(stage_scratch(weight_.geometry, staged), gemm_scratch(weight_.geometry, staged, staged.rows))};
  }
  void bind(const void* x, const int32_t* perm, uint8_t* staged, float* ranges) override {
    place_buffers(plan_, staged);
    args_ = {x, type_, perm, plan_.range_scope, ranges, &weight_.geometry, &plan_.staged};
  }
  bool joins_rows() const override { return ranges_cross_rows(plan_); }
  void stage(Tasks rows, uint8_t* scratch) const override {
    stage_rows(plan_, args_, [&](auto stage_some) { stage_some(rows, scratch); });
  }
  void multiply(const WeightArgs& weight, const Output& output, int64_t tile, uint8_t* scratch) const override {
    const GemmArgs args{&std::get<WoqWeight>(weight.kind).geometry, weight.tiles, &plan_.staged, output};
    kernels().gemm_tile(args, tile, 0, plan_.staged.rows, scratch);
  }

 private:
  const WoqWeight weight_;
  const FloatType type_;
  WoqPlan plan_;
  StageArgs args_{};
};

class Int8Staging : public Staging {
 public:
  Int8Staging(const Int8Weight& weight, const LinearsCall& call)
      : weight_(weight), type_(call.type), rows_(call.rows) {}

  bool serves(const WeightArgs& weight) const override {
    const Int8Weight* other = std::get_if<Int8Weight>(&weight.kind);
    return other && other->multiplier == weight_.multiplier && other->scale == weight_.scale &&
           other->zero_point == weight_.zero_point;
  }
  StagingBytes bytes() const override {
    const int64_t parameters = weight_.multiplier ? 0 : 2 * parameter_bytes();
    return {code_bytes() + parameters, 0, int8_scratch(weight_.geometry, rows_)};
  }
  void bind(const void* x, const int32_t*, uint8_t* staged, float*) override {
    const Int8Geometry& g = weight_.geometry;
    quantize_ = {x, type_, g.k, weight_.multiplier, weight_.zero_point, staged, g.padded_k, nullptr, nullptr};
    args_ = {&g, staged, g.padded_k, &weight_.scale, &weight_.zero_point, 0};
    if (weight_.multiplier) return;
    args_.scales = quantize_.scales = reinterpret_cast<float*>(staged + code_bytes());
    args_.zero_points = quantize_.zero_points = reinterpret_cast<int32_t*>(staged + code_bytes() + parameter_bytes());
    args_.row_step = 1;
  }
  bool joins_rows() const override { return false; }
  void stage(Tasks rows, uint8_t*) const override {
    kernels().quantize_activation(quantize_, rows.begin, rows.end);
    const int64_t padding = quantize_.stride - quantize_.k;
    for (int64_t row = rows.begin; padding > 0 && row < rows.end; ++row)
      std::memset(quantize_.codes + row * quantize_.stride + quantize_.k, 0, size_t(padding));
  }
  void multiply(const WeightArgs& weight, const Output& output, int64_t tile, uint8_t* scratch) const override {
    kernels().int8_tile(args_, output, weight.tiles + tile * weight.tile_bytes, tile * kTileN, 0, rows_, scratch);
  }

 private:
  int64_t code_bytes() const { return round_up(rows_ * weight_.geometry.padded_k, 64); }
  int64_t parameter_bytes() const { return round_up(rows_ * 4, 64); }

  const Int8Weight weight_;
  const FloatType type_;
  const int64_t rows_;
  QuantizeActivationArgs quantize_{};
  Int8Args args_{};
};

std::unique_ptr<Staging> make_staging(const WeightArgs& weight, const LinearsCall& call) {
  if (const WoqWeight* woq = std::get_if<WoqWeight>(&weight.kind)) return std::make_unique<WoqStaging>(*woq, call);
  return std::make_unique<Int8Staging>(std::get<Int8Weight>(weight.kind), call);
}

}  // namespace

TeamLinears::TeamLinears(const LinearsArgs& args, const LinearsCall& call, bool together, int64_t threads)
    : args_(args),
      rows_(call.rows),
      together_(together),
      weights_(stage_weights(call)),
      tasks_(count_tiles(weights_, together_), threads) {}

std::vector<TeamWeight> TeamLinears::stage_weights(const LinearsCall& call) {
  std::vector<TeamWeight> weights;
  for (const WeightArgs& weight : args_.weights) {
    if (stagings_.empty() || !stagings_.back()->serves(weight)) stagings_.push_back(make_staging(weight, call));
    weights.push_back({&weight, stagings_.back().get(), {}});
  }
  return weights;
}

StagingBytes TeamLinears::bytes() const {
  StagingBytes all{};
  for (const auto& staging : stagings_) {
    const StagingBytes own = staging->bytes();
    all = {all.staged + own.staged, std::max(all.ranges, own.ranges), std::max(all.scratch, own.scratch)};
  }
  return all;
}

void TeamLinears::bind(const void* x, const std::vector<Output>& outputs, uint8_t* staged, float* ranges) {
  for (const auto& staging : stagings_) {
    staging->bind(x, args_.perm, staged, ranges);
    staged += staging->bytes().staged;
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    weights_[i].output = outputs[i];
    weights_[i].output.n = weights_[i].output.stride = args_.weights[i].n;
    weights_[i].output.bias = args_.weights[i].bias;
  }
}

// If rows share a quantization range, the first thread stages them all.
Tasks TeamLinears::rows_of(const TeamThread& thread) const {
  for (const auto& staging : stagings_)
    if (staging->joins_rows()) return {0, thread.begin == 0 ? rows_ : 0};
  return thread.share(rows_);
}

void TeamLinears::stage(Tasks rows, uint8_t* scratch) const {
  if (rows.begin == rows.end) return;
  for (const auto& staging : stagings_) staging->stage(rows, scratch);
}

LinesAhead TeamLinears::ahead(const TeamThread& thread) const {
  LinesAhead lines{nullptr, nullptr};
  const int64_t count = count_tiles(weights_, together_);
  const Tasks tasks{thread.begin * count / thread.size, (thread.begin + 1) * count / thread.size};
  for_each_weight(weights_, together_, tasks, [&](const TeamWeight& weight, Tasks own) {
    if (lines.at) return;
    const int64_t bytes = weight.args->tile_bytes;
    lines.at = weight.args->tiles + own.begin * bytes;
    lines.end = lines.at + std::min(kAheadBytes, (own.end - own.begin) * bytes);
  });
  return lines;
}

void TeamLinears::multiply(const TeamThread& thread, uint8_t* scratch) {
  for (Tasks tasks = tasks_.next(thread.begin); tasks.begin < tasks.end; tasks = tasks_.next(thread.begin))
    for_each_weight(weights_, together_, tasks, [&](const TeamWeight& weight, Tasks own) {
      for (int64_t tile = own.begin; tile < own.end; ++tile)
        weight.staging->multiply(*weight.args, weight.output, tile, scratch);
    });
}

}  // namespace ipex_quant
