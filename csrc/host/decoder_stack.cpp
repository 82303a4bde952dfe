#include "host/decoder_stack.h"

#include <cstring>

namespace ipex_quant {
namespace {

// Most bytes that a thread prefetches while it waits: they stay in the L2 cache.
constexpr int64_t kAheadBytes = int64_t(1) << 17;

int64_t bytes_of(const DecoderArgs& call, int64_t columns) { return call.rows * columns * float_size(call.type); }

void widen(int64_t& size, int64_t other) { size = std::max(size, other); }

}  // namespace

Workspace WorkspaceSizes::take(Memory& memory) const {
  return {memory.take(features),
          memory.take(projected),
          memory.take(projected),
          memory.take(attended),
          memory.take(features),
          memory.take(gates),
          memory.take(inner),
          memory.take(staged),
          reinterpret_cast<float*>(memory.take(ranges)),
          {}};
}

// ------------------------------------------------------------------------------------------------------ linears
TeamLinears::TeamLinears(const LinearsArgs& args, const DecoderArgs& call, bool together, int64_t threads)
    : args_(args),
      stagings_(stagings_of(args_, call)),
      together_(together),
      weights_(gemms()),
      tasks_(count_tiles(weights_, together_), threads) {}

std::vector<TeamLinears::Staging> TeamLinears::stagings_of(const LinearsArgs& args, const DecoderArgs& call) {
  std::vector<Staging> stagings;
  for (size_t i = 0; i < args.weights.size(); ++i) {
    const WeightArgs &own = args.weights[i], &last = args.weights[i ? i - 1 : 0];
    if (i && own.geometry.dtype == last.geometry.dtype && own.group_size == last.group_size) continue;
    const WoqCall woq{call.type, call.lowp_mode, call.act_quant_mode, own.group_size, call.rows, kernels().bf16_dot};
    stagings.push_back({make_plan(own.geometry, woq), {}, i});
  }
  return stagings;
}

std::vector<GemmArgs> TeamLinears::gemms() const {
  std::vector<GemmArgs> result;
  auto staging = stagings_.begin();
  for (size_t i = 0; i < args_.weights.size(); ++i) {
    if (staging + 1 != stagings_.end() && (staging + 1)->weight == i) ++staging;
    result.push_back({&args_.weights[i].geometry, args_.weights[i].tiles, &staging->plan.staged, {}});
  }
  return result;
}

void TeamLinears::add_to(WorkspaceSizes& sizes) const {
  int64_t staged = 0;
  for (const Staging& staging : stagings_) {
    staged += staged_bytes(staging.plan);
    widen(sizes.ranges, ranges_bytes(staging.plan));
    widen(sizes.scratch, stage_scratch(args_.weights[staging.weight].geometry, staging.plan.staged));
  }
  for (const GemmArgs& weight : weights_)
    widen(sizes.scratch, gemm_scratch(*weight.geometry, *weight.staged, weight.staged->rows));
  widen(sizes.staged, staged);
}

void TeamLinears::bind(const void* x, const std::vector<Output>& outputs, const Workspace& workspace) {
  uint8_t* staged = workspace.staged;
  for (Staging& staging : stagings_) {
    place_buffers(staging.plan, staged);
    staged += staged_bytes(staging.plan);
    staging.args = {x,
                    outputs[0].type,
                    args_.perm,
                    staging.plan.range_scope,
                    workspace.ranges,
                    &args_.weights[staging.weight].geometry,
                    &staging.plan.staged};
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    weights_[i].output = outputs[i];
    weights_[i].output.n = weights_[i].output.stride = args_.weights[i].geometry.n;
    weights_[i].output.bias = args_.weights[i].bias;
  }
}

// If rows share a quantization range, the first thread stages them all.
Tasks TeamLinears::rows_of(const TeamThread& thread) const {
  const WoqPlan& plan = stagings_[0].plan;
  if (!ranges_cross_rows(plan)) return thread.share(plan.staged.rows);
  return {0, thread.begin == 0 ? plan.staged.rows : 0};
}

void TeamLinears::stage(Tasks rows, uint8_t* scratch) const {
  if (rows.begin == rows.end) return;
  for (const Staging& staging : stagings_)
    stage_rows(staging.plan, staging.args, [&](auto stage_some) { stage_some(rows, scratch); });
}

LinesAhead TeamLinears::ahead(const TeamThread& thread) const {
  LinesAhead lines{nullptr, nullptr};
  const int64_t count = count_tiles(weights_, together_);
  const Tasks tasks{thread.begin * count / thread.size, (thread.begin + 1) * count / thread.size};
  for_each_weight(weights_, together_, tasks, [&](const GemmArgs& weight, Tasks own) {
    if (lines.at) return;
    const int64_t bytes = weight.geometry->tile_bytes;
    lines.at = weight.tiles + own.begin * bytes;
    lines.end = lines.at + std::min(kAheadBytes, (own.end - own.begin) * bytes);
  });
  return lines;
}

void TeamLinears::multiply(const TeamThread& thread, uint8_t* scratch) {
  const KernelTable& table = kernels();
  const int64_t rows = stagings_[0].plan.staged.rows;
  for (Tasks tasks = tasks_.next(thread.begin); tasks.begin < tasks.end; tasks = tasks_.next(thread.begin))
    for_each_weight(weights_, together_, tasks, [&](const GemmArgs& weight, Tasks own) {
      for (int64_t tile = own.begin; tile < own.end; ++tile) table.gemm_tile(weight, tile, 0, rows, scratch);
    });
}

// -------------------------------------------------------------------------------------------------------- layer
DecoderLayer::DecoderLayer(const DecoderLayerArgs& args, const DecoderArgs& call, int64_t threads)
    : args_(args),
      call_(call),
      projections_(args.projections, call, false, threads),
      output_(args.output, call, false, threads),
      mlp_inputs_(args.mlp_inputs, call, args.gated && args.mlp_inputs.weights.size() == 2, threads),
      mlp_output_(args.mlp_output, call, false, threads) {}

void DecoderLayer::add_to(WorkspaceSizes& sizes) const {
  for (const TeamLinears* linears : {&projections_, &output_, &mlp_inputs_, &mlp_output_}) linears->add_to(sizes);
  int64_t projected = 0;
  for (size_t i = 0; i < projections_.count(); ++i) projected += projections_.out_features(i);
  widen(sizes.features, bytes_of(call_, projections_.in_features()));
  widen(sizes.projected, bytes_of(call_, projected));
  widen(sizes.attended, bytes_of(call_, output_.in_features()));
  widen(sizes.inner, bytes_of(call_, mlp_output_.in_features()));
  if (halves()) widen(sizes.gates, bytes_of(call_, mlp_inputs_.out_features(0)));
}

void DecoderLayer::bind(const void* x, void* y, const Workspace& workspace, int64_t threads) {
  workspace_ = &workspace;
  const Workspace& w = workspace;
  const auto output_to = [&](void* to, PostOp post_op, const void* first = nullptr, const void* second = nullptr) {
    Output output{};
    output.post_op = post_op;
    output.type = call_.type;
    output.others[0] = first;
    output.others[1] = second;
    output.y = to;
    return output;
  };
  for (NormArgs& norm : args_.norms) {
    norm.x = x;
    norm.y = w.normed;
  }
  std::vector<Output> outputs;
  uint8_t* to = w.projected;
  for (size_t i = 0; i < projections_.count(); ++i) {
    outputs.push_back(output_to(to, kNone));
    to += bytes_of(call_, projections_.out_features(i));
  }
  projections_.bind(w.normed, outputs, w);
  if (args_.sandwich) {
    for (NormArgs& norm : args_.after) norm.x = norm.y = w.normed;
    output_.bind(w.attended, {output_to(w.normed, kNone)}, w);
    mlp_output_.bind(w.inner, {output_to(w.normed, kNone)}, w);
    args_.norms[1].x = w.normed;
    args_.norms[1].residual = x;
    args_.norms[1].sum = w.hidden;
    result_ = args_.after[1];
    result_.residual = w.hidden;
    result_.sum = y;
  } else if (args_.parallel) {
    output_.bind(w.attended, {output_to(w.hidden, kNone)}, w);
    mlp_output_.bind(w.inner, {output_to(y, kAddAdd, w.hidden, x)}, w);
  } else {
    args_.norms[1].x = w.hidden;
    output_.bind(w.attended, {output_to(w.hidden, kAdd, x)}, w);
    mlp_output_.bind(w.inner, {output_to(y, kAdd, w.hidden)}, w);
  }
  outputs = {output_to(halves() ? w.gates : w.inner, halves() ? kNone : args_.activation)};
  if (mlp_inputs_.count() == 2) outputs.push_back(output_to(w.inner, kMul, w.inner));
  mlp_inputs_.bind(w.normed, outputs, w);

  args_.attention.rotary.x = call_.rows > 1 && projections_.count() > 1 ? w.joined : w.projected;
  args_.attention.output = w.attended;
  attention_.reset(new RopeAttention(args_.attention));
  attention_tasks_.reset(new SharedTasks(attention_->attention().tasks(), threads));
}

// Stages the input rows of `linears`, after `norm` if there is one.
void DecoderLayer::prepare(const TeamLinears& linears, const NormArgs* norm, const TeamThread& thread) const {
  const Tasks rows = linears.rows_of(thread);
  if (&linears == &mlp_inputs_ && args_.sandwich) kernels().norm_rows(args_.after[0], rows.begin, rows.end);
  if (norm) kernels().norm_rows(*norm, rows.begin, rows.end);
  if (&linears == &mlp_output_ && halves()) multiply_gates(rows);
  linears.stage(rows, workspace_->scratch[size_t(thread.begin)]);
}

void DecoderLayer::multiply_gates(Tasks rows) const {
  const int64_t columns = mlp_output_.in_features();
  const GatedArgs args{workspace_->gates, workspace_->gates + columns * float_size(call_.type),
                       call_.type,        args_.activation,
                       columns,           2 * columns,
                       workspace_->inner};
  kernels().gated_product(args, rows.begin * columns, rows.end * columns);
}

// Norms the results of the MLP, and adds them to its input. The thread is the one that reads these rows next.
void DecoderLayer::finish_sandwich(const TeamThread& thread) const {
  const Tasks rows = mlp_output_.rows_of(thread);
  kernels().norm_rows(args_.after[1], rows.begin, rows.end);
  kernels().norm_rows(result_, rows.begin, rows.end);  // for its sum
}

// Copies queries, keys and values of each row next to each other.
void DecoderLayer::join(Tasks rows) const {
  if (args_.attention.rotary.x != workspace_->joined) return;
  const int64_t size = float_size(call_.type), row = args_.attention.rotary.strides[1] * size;
  int64_t before = 0;
  for (size_t i = 0; i < projections_.count(); ++i) {
    const int64_t bytes = projections_.out_features(i) * size;
    for (int64_t r = rows.begin; r < rows.end; ++r)
      std::memcpy(workspace_->joined + r * row + before, workspace_->projected + call_.rows * before + r * bytes,
                  size_t(bytes));
    before += bytes;
  }
}

void DecoderLayer::norm_heads(Tasks rows) const {
  const RotaryArgs& rotary = args_.attention.rotary;
  const AttentionArgs& attention = args_.attention.attention;
  const int64_t size = float_size(call_.type);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* heads = static_cast<uint8_t*>(const_cast<void*>(rotary.x)) + row * rotary.strides[1] * size;
    for (int i = 0; i < 2; ++i) {
      const int64_t count = attention.kv_heads * (i == 0 ? attention.group : 1);
      NormArgs norm = args_.head_norms[i];
      if (!norm.weight) return;
      norm.x = norm.y = heads;
      kernels().norm_rows(norm, 0, count);
      heads += count * attention.key_dim * size;
    }
  }
}

void DecoderLayer::attend(const TeamThread& thread) {
  uint8_t* scratch = workspace_->scratch[size_t(thread.begin)];
  AttentionCall& call = attention_->attention();
  for (Tasks tasks = attention_tasks_->next(thread.begin); tasks.begin < tasks.end;
       tasks = attention_tasks_->next(thread.begin))
    for (int64_t i = tasks.begin; i < tasks.end; ++i) call.run(i, scratch);
}

void DecoderLayer::run(const TeamThread& thread, Barrier& barrier, LinesAhead& lines, const DecoderLayer* next) {
  const auto wait = [&] { barrier.wait(thread, [&] { lines.ask(); }); };
  const auto multiply = [&](TeamLinears& linears, const NormArgs* norm, const TeamLinears* following) {
    prepare(linears, norm, thread);
    wait();
    linears.multiply(thread, workspace_->scratch[size_t(thread.begin)]);
    lines = following ? following->ahead(thread) : LinesAhead{nullptr, nullptr};
    wait();
  };
  multiply(projections_, &args_.norms[0], &output_);
  const Tasks rows = thread.share(call_.rows);
  join(rows);
  norm_heads(rows);
  attention_->rotate_and_store(rows.begin, rows.end);
  wait();
  attend(thread);
  wait();
  multiply(output_, nullptr, &mlp_inputs_);
  multiply(mlp_inputs_, &args_.norms[1], &mlp_output_);
  multiply(mlp_output_, nullptr, next ? &next->projections_ : nullptr);
  if (args_.sandwich) finish_sandwich(thread);
}

// -------------------------------------------------------------------------------------------------------- stack
DecoderStack::DecoderStack(const std::vector<DecoderLayerArgs>& layers, const DecoderArgs& call, int64_t threads) {
  WorkspaceSizes sizes;
  for (const DecoderLayerArgs& args : layers) {
    layers_.emplace_back(args, call, threads);
    layers_.back().add_to(sizes);
  }
  workspace_ = sizes.take(memory_);
  const void* x = call.x;
  for (DecoderLayer& layer : layers_) {
    layer.bind(x, call.y, workspace_, threads);
    widen(sizes.scratch, layer.attention_scratch());
    x = call.y;
  }
  for (int64_t i = 0; i < threads; ++i) workspace_.scratch.push_back(memory_.take(sizes.scratch));
}

void DecoderStack::run(const TeamThread& thread) noexcept {
  LinesAhead lines = layers_.front().ahead(thread);
  for (size_t i = 0; i < layers_.size(); ++i)
    layers_[i].run(thread, barrier_, lines, i + 1 < layers_.size() ? &layers_[i + 1] : nullptr);
}

}  // namespace ipex_quant
