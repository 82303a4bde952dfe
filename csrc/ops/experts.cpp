// A mixture of experts with packed weights: tokens are grouped by expert, each group is multiplied by its expert's
// weights, and the results of a token are added in the order of the experts, for any number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "half.h"
#include "ops/woq.h"

namespace ipex_quant {
namespace {

// A pair is a token and one of its experts. Pairs are processed in chunks of whole groups, so that intermediate results
// stay small for long prompts.
constexpr int64_t kChunkPairs = 8192;

// One matrix of every expert, packed as one weight: `blocks` of n rows per expert, each padded to whole tiles.
struct Stack {
  WoqGeometry geometry;  // of one block
  int64_t group_size, blocks;
  const uint8_t* tiles;
  const int32_t* perms = nullptr;  // [experts, k]
  const float* bias = nullptr;     // [experts, blocks * n]

  const uint8_t* tile(int64_t expert, int64_t block, int64_t index) const {
    return tiles + ((expert * blocks + block) * geometry.tiles + index) * geometry.tile_bytes;
  }
  const float* bias_of(int64_t expert, int64_t block) const {
    return bias ? bias + (expert * blocks + block) * geometry.n : nullptr;
  }
  const int32_t* perm_of(int64_t expert) const { return perms ? perms + expert * geometry.k : nullptr; }
};

struct StackShape {
  int64_t experts, blocks, n, k;
};

Stack make_stack(const Tensor& packed, const StackShape& shape) {
  const WoqHeader h = read_header(packed);
  const int64_t rows = shape.experts * shape.blocks * round_up(shape.n, kTileN);
  IPEX_QUANT_CHECK(h.out_features == rows && h.in_features == shape.k, "packed: expected ", shape.experts, " experts, ",
                   rows, " rows and ", shape.k, " input features, got ", h.out_features, " rows and ", h.in_features,
                   " input features");
  geometry_of(h, packed);
  const WoqGeometry block(h, shape.n);
  return {block, h.group_size, shape.blocks, static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof h};
}

void set_perms(const char* name, Stack& stack, const std::optional<Tensor>& perms, int64_t experts) {
  if (!perms) return;
  check_tensor(name, *perms, ScalarType::Int, 2);
  check_shape(name, *perms, experts, stack.geometry.k);
  stack.perms = static_cast<const int32_t*>(perms->const_data_ptr());
}

void set_bias(const char* name, Stack& stack, const std::optional<Tensor>& bias, int64_t experts) {
  if (!bias) return;
  check_tensor(name, *bias, ScalarType::Float, 2);
  check_shape(name, *bias, experts, stack.blocks * stack.geometry.n);
  stack.bias = static_cast<const float*>(bias->const_data_ptr());
}

// The tokens of one expert: pairs [first, first + rows) in the order of experts.
struct Group {
  int64_t expert, first, rows;
  WoqPlan input, hidden;
};

// Tiles [first, first + count) of a group's gate and up projection, or of up alone.
struct UpTask {
  const Group& group;
  int64_t first, count;
};

// Tiles per task: long streams for few rows, where reading weights costs most; single tiles for many rows.
int64_t longest_run(int64_t rows) { return rows <= kDecodeRows ? 32 : 1; }

int64_t gemm_bytes(const Stack& stack, const WoqPlan& plan) {
  return gemm_scratch(stack.geometry, plan.staged, plan.staged.rows);
}

// The gated activation: activation(gate) * up; if `clamped`,
//   min(gate, limit) * sigmoid(slope * min(gate, limit)) * (clamp(up, -limit, limit) + offset);
// without a gate, activation(up).
struct Gate {
  PostOp activation;
  bool gated = true;
  bool clamped = false;
  float limit = 0.0f, slope = 1.0f, offset = 0.0f;
};

// The weights and the gate of the experts, and the type of activations.
struct Experts {
  Stack up, down;
  Gate gate;
  FloatType type;
  int32_t lowp_mode, act_quant_mode;
};

struct TokenRows {
  const void* x;  // [tokens, k of up]
  int64_t count;
  float* sums;  // [tokens, n of down], zeros
  void* y;      // the same in the type of x; `sums` itself if that is float32
};

// The routing weights of each token's experts, in any float type.
struct Weights {
  const void* data;
  FloatType type;

  float operator[](int64_t i) const {
    if (type == kFloat32) return static_cast<const float*>(data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i];
    if (type == kFloat16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

// Rounds as the kernels do; it stores too little to need a kernel.
void store_rounded(void* to, FloatType type, const float* from, int64_t count) {
  if (type == kFloat32) {
    std::memcpy(to, from, size_t(count) * 4);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    if (type == kFloat16)
      out[i] = uint16_t(float_to_half(from[i]));
    else
      out[i] = uint16_t(from[i] != from[i] ? bits >> 16 | 0x40 : rounded);
  }
}

class Mixture {
 public:
  Mixture(const Experts& experts, const TokenRows& tokens)
      : experts_(experts), tokens_(tokens), up_(experts_.up), down_(experts_.down), type_(experts.type) {}

  // `experts` and `weights` are [tokens, choices], experts in 0..count - 1.
  void run(const int64_t* experts, const Weights& weights, int64_t choices, int64_t count) {
    route(experts, weights, choices, count);
    for (size_t begin = 0, end; begin < groups_.size(); begin = end) {
      int64_t pairs = 0;
      for (end = begin; end < groups_.size() && (end == begin || pairs + groups_[end].rows <= kChunkPairs); ++end)
        pairs += groups_[end].rows;
      run_chunk(begin, end, pairs);
    }
  }

 private:
  const Experts experts_;
  const TokenRows tokens_;
  const Stack &up_, &down_;
  const FloatType type_;
  std::vector<Group> groups_;
  std::vector<int32_t> token_;  // of every pair, in the order of experts
  std::vector<float> weight_;
  Group *begin_ = nullptr, *end_ = nullptr;  // the chunk
  int64_t widest_ = 0;                       // largest number of rows of a group in it
  bool last_ = false;

  void route(const int64_t* experts, const Weights& weights, int64_t choices, int64_t count) {
    std::vector<int64_t> next(size_t(count) + 1, 0);
    const int64_t pairs = tokens_.count * choices;
    for (int64_t i = 0; i < pairs; ++i) ++next[size_t(experts[i]) + 1];
    for (int64_t e = 0; e < count; ++e) {
      const int64_t first = next[size_t(e)], rows = next[size_t(e) + 1];
      if (rows > 0) {
        if (up_.perms) check_indices("gate_up_perm", up_.perm_of(e), up_.geometry.k, up_.geometry.k);
        if (down_.perms) check_indices("down_perm", down_.perm_of(e), down_.geometry.k, down_.geometry.k);
        groups_.push_back({e, first, rows, plan(up_, rows), plan(down_, rows)});
      }
      next[size_t(e) + 1] += first;
    }
    token_.resize(size_t(pairs)), weight_.resize(size_t(pairs));
    for (int64_t i = 0; i < pairs; ++i) {
      const size_t at = size_t(next[size_t(experts[i])]++);
      token_[at] = int32_t(i / choices), weight_[at] = weights[i];
    }
  }

  WoqPlan plan(const Stack& stack, int64_t rows) const {
    return make_plan(stack.geometry,
                     {type_, experts_.lowp_mode, experts_.act_quant_mode, stack.group_size, rows, kernels().bf16_dot});
  }

  void run_chunk(size_t begin, size_t end, int64_t pairs) {
    begin_ = groups_.data() + begin, end_ = groups_.data() + end;
    last_ = end == groups_.size();
    widest_ = 0;
    for (Group* g = begin_; g < end_; ++g) widest_ = std::max(widest_, g->rows);
    const Buffer hidden = make_buffer(pairs * down_.geometry.k * float_size(type_));
    {
      // A single token without permutations is staged once for all of its experts.
      const bool shared = tokens_.count == 1 && widest_ == 1 && !up_.perms;
      const Buffer memory = stage_groups(up_, &Group::input, shared, [&](const Group& g, Buffer& rows) -> const void* {
        if (tokens_.count == 1 && g.rows == 1) return tokens_.x;
        const int64_t bytes = up_.geometry.k * float_size(type_);
        rows = make_buffer(g.rows * bytes);
        for (int64_t i = 0; i < g.rows; ++i)
          std::memcpy(rows.get() + i * bytes,
                      static_cast<const uint8_t*>(tokens_.x) + token_[size_t(g.first + i)] * bytes, size_t(bytes));
        return rows.get();
      });
      multiply_up(hidden.get());
    }
    const Buffer memory = stage_groups(down_, &Group::hidden, false, [&](const Group& g, Buffer&) -> const void* {
      return row_of_hidden(hidden.get(), g);
    });
    multiply_down();
  }

  uint8_t* row_of_hidden(uint8_t* hidden, const Group& g) const {
    return hidden + (g.first - begin_->first) * down_.geometry.k * float_size(type_);
  }

  // Stages the rows of every group of the chunk in one buffer. If `shared`, all groups use those of the first.
  template <class F>
  Buffer stage_groups(const Stack& stack, WoqPlan Group::* plan, bool shared, F rows_of) {
    int64_t bytes = 64, rows = 0;
    for (Group* g = begin_; g < (shared ? begin_ + 1 : end_); ++g)
      bytes += round_up(staged_bytes(g->*plan), 64), rows += g->rows;
    Buffer memory = make_buffer(bytes);
    uint8_t* at = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(memory.get()), 64));
    for (Group* g = begin_; g < end_; ++g) {
      place_buffers(g->*plan, at);
      if (!shared) at += round_up(staged_bytes(g->*plan), 64);
    }
    const int64_t count = shared ? 1 : end_ - begin_;
    const bool small = rows * stack.geometry.padded_k <= int64_t(1) << 15;  // too little to pay for a thread
    parallel_tasks(count, small ? count : 1, [&](auto next) {
      const Buffer scratch = make_buffer(stage_scratch(stack.geometry, (begin_->*plan).staged));
      for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next()) {
        for (Group* g = begin_ + tasks.begin; g < begin_ + tasks.end; ++g) {
          WoqPlan& own = g->*plan;
          Buffer gathered;
          const Buffer ranges = make_ranges(own);
          const StageArgs args{rows_of(*g, gathered),
                               type_,
                               stack.perm_of(g->expert),
                               own.range_scope,
                               reinterpret_cast<float*>(ranges.get()),
                               &stack.geometry,
                               &own.staged};
          stage_rows(own, args, [&](auto stage_some) { stage_some({0, g->rows}, scratch.get()); });
        }
      }
    });
    return memory;
  }

  void multiply_up(uint8_t* hidden) {
    const int64_t tiles = up_.geometry.tiles;
    int64_t most_cells = 0, scratch_bytes = 0;
    for (const Group* g = begin_; g < end_; ++g) {
      most_cells = std::max(most_cells, g->rows * std::min(longest_run(g->rows), tiles) * kTileN);
      scratch_bytes = std::max(scratch_bytes, gemm_bytes(up_, g->input));
    }
    const int64_t side = round_up(most_cells * float_size(side_type()), 64);
    parallel_streams((end_ - begin_) * tiles, [&](auto next) {
      const Buffer sides = make_buffer(up_.blocks * side), scratch = make_buffer(scratch_bytes);
      for (Tasks run = next(); run.begin < run.end; run = next())
        for (int64_t i = run.begin, count; i < run.end; i += count) {
          const Group& g = begin_[i / tiles];
          const int64_t tile = i % tiles;
          count = std::min({longest_run(g.rows), run.end - i, tiles - tile});
          up_task({g, tile, count}, sides.get(), sides.get() + side, hidden, scratch.get());
        }
    });
  }

  // Gate and up projection of a run of columns, then the gated activation; without a gate, up with the activation.
  void up_task(const UpTask& task, uint8_t* gate_side, uint8_t* up_side, uint8_t* hidden, uint8_t* scratch) const {
    const KernelTable& table = kernels();
    const Group& g = task.group;
    const int64_t column = task.first * kTileN, n = up_.geometry.n;
    const int64_t columns = std::min(task.count * kTileN, n - column);
    for (int64_t block = 0; block < up_.blocks; ++block) {
      Output output{};
      output.n = output.stride = columns;
      output.bias = up_.bias ? up_.bias_of(g.expert, block) + column : nullptr;
      output.type = side_type();
      output.y = block == 0 ? gate_side : up_side;
      output.post_op = experts_.gate.gated ? kNone : experts_.gate.activation;
      const GemmArgs args{&up_.geometry, up_.tile(g.expert, block, task.first), &g.input.staged, output};
      for (int64_t tile = 0; tile < task.count; ++tile) table.gemm_tile(args, tile, 0, g.rows, scratch);
    }
    const int64_t cells = g.rows * columns, row_bytes = columns * float_size(type_);
    uint8_t* to = row_of_hidden(hidden, g) + column * float_size(type_);
    GatedArgs gated{gate_side, up_side, side_type(), experts_.gate.activation, columns, columns, gate_side};
    if (experts_.gate.clamped) prepare_clamped(gate_side, up_side, cells);
    if (experts_.gate.gated) table.gated_product(gated, 0, cells);
    for (int64_t row = 0; row < g.rows; ++row, to += n * float_size(type_)) {
      if (experts_.gate.clamped)
        store_rounded(to, type_, reinterpret_cast<float*>(gate_side) + row * columns, columns);
      else
        std::memcpy(to, gate_side + row * row_bytes, size_t(row_bytes));
    }
  }

  // Clamped gates are computed in float32 and rounded once.
  FloatType side_type() const { return experts_.gate.clamped ? kFloat32 : type_; }

  // Clamps and scales gate and up for the kernel of silu: silu(slope * g) * u / slope. NaN stays NaN.
  void prepare_clamped(uint8_t* gate_side, uint8_t* up_side, int64_t cells) const {
    const Gate& gate = experts_.gate;
    float *g = reinterpret_cast<float*>(gate_side), *u = reinterpret_cast<float*>(up_side);
    for (int64_t i = 0; i < cells; ++i) {
      g[i] = (g[i] > gate.limit ? gate.limit : g[i]) * gate.slope;
      const float low = u[i] > gate.limit ? gate.limit : u[i];
      u[i] = ((low < -gate.limit ? -gate.limit : low) + gate.offset) / gate.slope;
    }
  }

  // A task computes some columns of the result: the down projection of every group, added up.
  void multiply_down() {
    const int64_t tiles = down_.geometry.tiles, longest = std::min(longest_run(widest_), tiles);
    int64_t scratch_bytes = 0;
    for (const Group* g = begin_; g < end_; ++g) scratch_bytes = std::max(scratch_bytes, gemm_bytes(down_, g->hidden));
    parallel_streams(tiles, [&](auto next) {
      const Buffer rows = make_buffer(widest_ * longest * kTileN * 4), scratch = make_buffer(scratch_bytes);
      for (Tasks run = next(); run.begin < run.end; run = next())
        for (int64_t first = run.begin; first < run.end; first += longest)
          down_task(first, std::min(longest, run.end - first), rows.get(), scratch.get());
    });
  }

  // Computes the columns of `count` tiles of every group, adds them up, and rounds the sums after the last chunk.
  void down_task(int64_t first, int64_t count, uint8_t* rows, uint8_t* scratch) const {
    const KernelTable& table = kernels();
    const int64_t column = first * kTileN, n = down_.geometry.n, columns = std::min(count * kTileN, n - column);
    for (const Group* g = begin_; g < end_; ++g) {
      Output output{};
      output.n = output.stride = columns;
      output.bias = down_.bias ? down_.bias_of(g->expert, 0) + column : nullptr;
      output.y = rows;
      const GemmArgs args{&down_.geometry, down_.tile(g->expert, 0, first), &g->hidden.staged, output};
      for (int64_t tile = 0; tile < count; ++tile) table.gemm_tile(args, tile, 0, g->rows, scratch);
      add_weighted(*g, reinterpret_cast<const float*>(rows), column, columns);
    }
    for (int64_t token = 0; last_ && type_ != kFloat32 && token < tokens_.count; ++token) {
      const int64_t at = token * n + column;
      store_rounded(static_cast<uint8_t*>(tokens_.y) + 2 * at, type_, tokens_.sums + at, columns);
    }
  }

  void add_weighted(const Group& g, const float* rows, int64_t column, int64_t columns) const {
    for (int64_t i = 0; i < g.rows; ++i, rows += columns) {
      float* sum = tokens_.sums + token_[size_t(g.first + i)] * down_.geometry.n + column;
      const float weight = weight_[size_t(g.first + i)];
      for (int64_t c = 0; c < columns; ++c) sum[c] += weight * rows[c];
    }
  }
};

Gate check_gate(int64_t activation, const std::vector<double>& clamp, bool gated) {
  if (!gated) {
    IPEX_QUANT_CHECK(is_activation(activation), "activation: expected one of 1..4 or 8 without a gate, got ",
                     activation);
    IPEX_QUANT_CHECK(clamp.empty(), "clamp: expected nothing without a gate, got ", clamp.size(), " values");
    return {PostOp(activation), false};
  }
  Gate gate{check_activation(activation)};
  if (clamp.empty()) return gate;
  IPEX_QUANT_CHECK(clamp.size() == 3 && gate.activation == kSilu && clamp[1] > 0, "clamp: expected nothing, or with ",
                   "the activation 4 (silu) a limit, a positive slope and an offset, got ", clamp.size(), " values");
  gate.clamped = true;
  gate.limit = float(clamp[0]), gate.slope = float(clamp[1]), gate.offset = float(clamp[2]);
  return gate;
}

Tensor woq_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down,
                   std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                   std::optional<Tensor> gate_up_perm, std::optional<Tensor> down_perm, int64_t num_experts,
                   int64_t intermediate, int64_t lowp_mode, int64_t act_quant_mode, int64_t activation,
                   std::vector<double> clamp, bool gated) {
  check_modes(lowp_mode, act_quant_mode);
  check_cpu("x", x);
  IPEX_QUANT_CHECK(x.dim() == 2 && x.size(1) > 0, "x: expected shape [tokens, hidden], got ", shape_of(x));
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_tensor("experts", experts, ScalarType::Long, 2);
  const int64_t choices = experts.size(1);
  check_shape("experts", experts, tokens, choices);
  check_tensor("weights", weights, weights.scalar_type(), 2);
  check_shape("weights", weights, tokens, choices);
  const Weights counts{weights.const_data_ptr(), float_type("weights", weights.scalar_type())};
  constexpr int64_t kLargest = int64_t(1) << 31, kMostExperts = int64_t(1) << 20;  // the product fits 64 bits
  IPEX_QUANT_CHECK(
      num_experts > 0 && num_experts < kMostExperts && intermediate > 0 && intermediate < kLargest && tokens < kLargest,
      "expected 0 < num_experts < 2^20, 0 < intermediate < 2^31 and less than 2^31 tokens, got ", num_experts, ", ",
      intermediate, " and ", tokens);
  Stack up_stack = make_stack(gate_up, {num_experts, gated ? 2 : 1, intermediate, hidden});
  Stack down_stack = make_stack(down, {num_experts, 1, hidden, intermediate});
  set_bias("gate_up_bias", up_stack, gate_up_bias, num_experts);
  set_bias("down_bias", down_stack, down_bias, num_experts);
  set_perms("gate_up_perm", up_stack, gate_up_perm, num_experts);
  set_perms("down_perm", down_stack, down_perm, num_experts);
  const int64_t* chosen = static_cast<const int64_t*>(experts.const_data_ptr());
  check_indices("experts", chosen, tokens * choices, num_experts);

  const FloatType type = float_type("x", x.scalar_type());
  const Gate gate = check_gate(activation, clamp, gated);
  const Tensor rows_of_x = as_contiguous(x);
  Tensor y = empty_in_dtype_of(x, x.sizes().data());
  const int64_t elements = tokens * hidden;
  if (elements == 0) return y;
  if (choices == 0 || type == kFloat32) std::memset(y.mutable_data_ptr(), 0, size_t(elements * float_size(type)));
  if (choices == 0) return y;
  Buffer wide;
  float* sums = static_cast<float*>(y.mutable_data_ptr());
  if (type != kFloat32) {
    wide = make_buffer(elements * 4);
    sums = reinterpret_cast<float*>(wide.get());
    std::memset(sums, 0, size_t(elements * 4));
  }
  Mixture mixture{{up_stack, down_stack, gate, type, int32_t(lowp_mode), int32_t(act_quant_mode)},
                  {rows_of_x.const_data_ptr(), tokens, sums, y.mutable_data_ptr()}};
  mixture.run(chosen, counts, choices, num_experts);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "woq_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
      "Tensor? down_bias, Tensor? gate_up_perm, Tensor? down_perm, int num_experts, int intermediate, "
      "int lowp_mode, int act_quant_mode, int activation, float[] clamp, bool gated=True) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("woq_experts", TORCH_BOX(&woq_experts)); }

}  // namespace ipex_quant
