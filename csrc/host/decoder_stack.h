// Decoder layers for few tokens, as a team of threads computes them without leaving it in between. No torch here.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "host/attention_call.h"
#include "host/team.h"
#include "host/woq_plan.h"

namespace ipex_quant {

struct WeightArgs {
  WoqGeometry geometry;
  int64_t group_size;  // as in the header
  const uint8_t* tiles;
  const float* bias;  // [n] or null
};

// Weights of one input that see its features in one order.
struct LinearsArgs {
  std::vector<WeightArgs> weights;
  const int32_t* perm;
};

// h = x + output(attention(projections(norm(x)))), then h + mlp_output(activation(mlp_inputs(norm(h)))); if `parallel`,
// x + output(attention(projections(norm(x)))) + mlp_output(activation(mlp_inputs(norm(x)))); if `sandwich`, what is
// added to x and to h is normed before.
struct DecoderLayerArgs {
  NormArgs norms[2];                // without x and y
  NormArgs after[2];                // of what is added, likewise; if `sandwich`
  NormArgs head_norms[2];           // of every query and key before it is rotated, without x and y; or without weight
  RopeAttentionArgs attention;      // without rotary.x and output
  LinearsArgs projections, output;  // queries, keys and values in this order; one weight or three
  LinearsArgs mlp_inputs, mlp_output;
  PostOp activation;
  bool gated;  // with one weight, gates are the first half of its results
  bool parallel, sandwich;
};

struct DecoderArgs {
  FloatType type;
  int32_t lowp_mode, act_quant_mode;
  int64_t rows;   // at most kStepRows
  const void* x;  // [rows, k]
  void* y;        // likewise
};

// Cache lines of a weight that a thread prefetches while it has to wait.
struct LinesAhead {
  const uint8_t *at, *end;

  void ask() {
    for (int i = 0; i < 4 && at < end; ++i, at += kLineBytes) __builtin_prefetch(at, 0, 2);
  }
};

// 64-byte aligned memory, which lives as long as this.
class Memory {
 public:
  uint8_t* take(int64_t bytes) {
    blocks_.push_back(make_buffer(bytes + 64));
    return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(blocks_.back().get()), 64));
  }

 private:
  std::vector<Buffer> blocks_;
};

// Buffers that all layers use, one after the other.
struct Workspace {
  uint8_t *normed, *projected, *joined, *attended, *hidden, *gates, *inner, *staged;
  float* ranges;
  std::vector<uint8_t*> scratch;  // of each thread
};

// Sizes of a workspace in bytes.
struct WorkspaceSizes {
  int64_t features = 0, projected = 0, attended = 0, gates = 0, inner = 0, staged = 0, ranges = 0, scratch = 0;

  Workspace take(Memory& memory) const;  // without the scratch of the threads
};

// Matmuls of one input with some weights: first every thread prepares its rows, for each run of weights of one dtype
// and group size, then all multiply.
class TeamLinears {
 public:
  TeamLinears(const LinearsArgs& args, const DecoderArgs& call, bool together, int64_t threads);

  void add_to(WorkspaceSizes& sizes) const;
  void bind(const void* x, const std::vector<Output>& outputs, const Workspace& workspace);

  Tasks rows_of(const TeamThread& thread) const;
  void stage(Tasks rows, uint8_t* scratch) const;
  LinesAhead ahead(const TeamThread& thread) const;
  void multiply(const TeamThread& thread, uint8_t* scratch);

  int64_t out_features(size_t i) const { return args_.weights[i].geometry.n; }
  size_t count() const { return args_.weights.size(); }
  int64_t in_features() const { return args_.weights[0].geometry.k; }

 private:
  struct Staging {
    WoqPlan plan;
    StageArgs args;
    size_t weight;  // the first that reads it
  };
  static std::vector<Staging> stagings_of(const LinearsArgs& args, const DecoderArgs& call);
  std::vector<GemmArgs> gemms() const;

  LinearsArgs args_;
  std::vector<Staging> stagings_;
  const bool together_;
  std::vector<GemmArgs> weights_;  // their outputs once they are bound
  SharedTasks tasks_;
};

class DecoderLayer {
 public:
  DecoderLayer(const DecoderLayerArgs& args, const DecoderArgs& call, int64_t threads);

  void add_to(WorkspaceSizes& sizes) const;
  void bind(const void* x, void* y, const Workspace& workspace, int64_t threads);
  int64_t attention_scratch() const { return attention_->attention().scratch_bytes(); }  // after it is bound
  LinesAhead ahead(const TeamThread& thread) const { return projections_.ahead(thread); }
  // `next` is the layer after this one or null.
  void run(const TeamThread& thread, Barrier& barrier, LinesAhead& lines, const DecoderLayer* next);

 private:
  void prepare(const TeamLinears& linears, const NormArgs* norm, const TeamThread& thread) const;
  void multiply_gates(Tasks rows) const;
  void finish_sandwich(const TeamThread& thread) const;
  void join(Tasks rows) const;
  void norm_heads(Tasks rows) const;
  void attend(const TeamThread& thread);
  bool halves() const { return args_.gated && mlp_inputs_.count() == 1; }

  DecoderLayerArgs args_;
  NormArgs result_{};  // whose sum is that of a sandwich
  const DecoderArgs call_;
  TeamLinears projections_, output_, mlp_inputs_, mlp_output_;
  const Workspace* workspace_ = nullptr;
  std::unique_ptr<RopeAttention> attention_;
  std::unique_ptr<SharedTasks> attention_tasks_;
};

class DecoderStack {
 public:
  DecoderStack(const std::vector<DecoderLayerArgs>& layers, const DecoderArgs& call, int64_t threads);
  // By all threads of a team at the same time.
  void run(const TeamThread& thread) noexcept;

 private:
  Memory memory_;
  Workspace workspace_;
  Barrier barrier_;
  std::deque<DecoderLayer> layers_;
};

}  // namespace ipex_quant
