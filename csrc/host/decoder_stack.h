// Decoder layers for few tokens, as a team of threads computes them without leaving it in between. No torch here.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "host/attention_call.h"
#include "host/team_linears.h"

namespace ipex_quant {

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
  LinearsCall linears;  // at most kStepRows rows
  const void* x;        // [rows, k]
  void* y;              // likewise
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

class DecoderLayer {
 public:
  DecoderLayer(const DecoderLayerArgs& args, const LinearsCall& call, int64_t threads);

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
  const LinearsCall call_;
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
