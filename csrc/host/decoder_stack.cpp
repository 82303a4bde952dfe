#include "host/decoder_stack.h"

#include <cstring>

namespace ipex_quant {
namespace {

int64_t bytes_of(const LinearsCall& call, int64_t columns) { return call.rows * columns * float_size(call.type); }

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

// -------------------------------------------------------------------------------------------------------- layer
DecoderLayer::DecoderLayer(const DecoderLayerArgs& args, const LinearsCall& call, int64_t threads)
    : args_(args),
      call_(call),
      projections_(args.projections, call, false, threads),
      output_(args.output, call, false, threads),
      mlp_inputs_(args.mlp_inputs, call, args.gated && args.mlp_inputs.weights.size() == 2, threads),
      mlp_output_(args.mlp_output, call, false, threads) {}

void DecoderLayer::add_to(WorkspaceSizes& sizes) const {
  for (const TeamLinears* linears : {&projections_, &output_, &mlp_inputs_, &mlp_output_}) {
    const StagingBytes bytes = linears->bytes();
    widen(sizes.staged, bytes.staged);
    widen(sizes.ranges, bytes.ranges);
    widen(sizes.scratch, bytes.scratch);
  }
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
  projections_.bind(w.normed, outputs, w.staged, w.ranges);
  if (args_.sandwich) {
    for (NormArgs& norm : args_.after) norm.x = norm.y = w.normed;
    output_.bind(w.attended, {output_to(w.normed, kNone)}, w.staged, w.ranges);
    mlp_output_.bind(w.inner, {output_to(w.normed, kNone)}, w.staged, w.ranges);
    args_.norms[1].x = w.normed;
    args_.norms[1].residual = x;
    args_.norms[1].sum = w.hidden;
    result_ = args_.after[1];
    result_.residual = w.hidden;
    result_.sum = y;
  } else if (args_.parallel) {
    output_.bind(w.attended, {output_to(w.hidden, kNone)}, w.staged, w.ranges);
    mlp_output_.bind(w.inner, {output_to(y, kAddAdd, w.hidden, x)}, w.staged, w.ranges);
  } else {
    args_.norms[1].x = w.hidden;
    output_.bind(w.attended, {output_to(w.hidden, kAdd, x)}, w.staged, w.ranges);
    mlp_output_.bind(w.inner, {output_to(y, kAdd, w.hidden)}, w.staged, w.ranges);
  }
  outputs = {output_to(halves() ? w.gates : w.inner, halves() ? kNone : args_.activation)};
  if (mlp_inputs_.count() == 2) outputs.push_back(output_to(w.inner, kMul, w.inner));
  mlp_inputs_.bind(w.normed, outputs, w.staged, w.ranges);

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
    layers_.emplace_back(args, call.linears, threads);
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
