// Matmuls of one input as a team of threads computes them, with weight-only quantized weights and W8A8 ones. No torch
// here.
#pragma once

#include <memory>
#include <variant>
#include <vector>

#include "host/team.h"
#include "host/woq_plan.h"

namespace ipex_quant {

// What all linears of a call have in common.
struct LinearsCall {
  FloatType type;                     // of inputs and results
  int32_t lowp_mode, act_quant_mode;  // of weight-only quantized weights
  int64_t rows;
};

struct WoqWeight {
  WoqGeometry geometry;
  int64_t group_size;  // as in the header
};

// A W8A8 weight, and how its input is quantized: without multiplier, every row to its own range.
struct Int8Weight {
  Int8Geometry geometry;
  const float* multiplier;  // [k] or null; the next two are those of a static input
  float scale;
  int32_t zero_point;  // 0..255
};

struct WeightArgs {
  std::variant<WoqWeight, Int8Weight> kind;
  int64_t n, k;
  int64_t tile_bytes;
  const uint8_t* tiles;
  const float* bias;  // [n] or null
};

// Weights of one input that see its features in one order.
struct LinearsArgs {
  std::vector<WeightArgs> weights;
  const int32_t* perm;  // or null, as for every W8A8 weight
};

// Cache lines of a weight that a thread prefetches while it has to wait.
struct LinesAhead {
  const uint8_t *at, *end;

  void ask() {
    for (int i = 0; i < 4 && at < end; ++i, at += kLineBytes) __builtin_prefetch(at, 0, 2);
  }
};

struct StagingBytes {
  int64_t staged, ranges, scratch;
};

// The rows of an input as some of its weights read them.
class Staging {
 public:
  virtual ~Staging() = default;
  virtual bool serves(const WeightArgs& weight) const = 0;
  virtual StagingBytes bytes() const = 0;
  virtual void bind(const void* x, const int32_t* perm, uint8_t* staged, float* ranges) = 0;
  // Whether rows are quantized to a range of them all, so that one thread has to stage all.
  virtual bool joins_rows() const = 0;
  virtual void stage(Tasks rows, uint8_t* scratch) const = 0;
  // One tile of a weight that it serves, for all rows.
  virtual void multiply(const WeightArgs& weight, const Output& output, int64_t tile, uint8_t* scratch) const = 0;
};

// A weight with the rows that it reads and, once they are bound, its results.
struct TeamWeight {
  const WeightArgs* args;
  const Staging* staging;
  Output output;
};
inline int64_t tile_count(const TeamWeight& weight) { return (weight.args->n + kTileN - 1) / kTileN; }

// First every thread stages its rows, for each run of weights that read them alike, then all multiply.
class TeamLinears {
 public:
  TeamLinears(const LinearsArgs& args, const LinearsCall& call, bool together, int64_t threads);

  StagingBytes bytes() const;
  void bind(const void* x, const std::vector<Output>& outputs, uint8_t* staged, float* ranges);

  Tasks rows_of(const TeamThread& thread) const;
  void stage(Tasks rows, uint8_t* scratch) const;
  LinesAhead ahead(const TeamThread& thread) const;
  void multiply(const TeamThread& thread, uint8_t* scratch);

  size_t count() const { return args_.weights.size(); }
  int64_t out_features(size_t i) const { return args_.weights[i].n; }
  int64_t in_features() const { return args_.weights[0].k; }

 private:
  std::vector<TeamWeight> stage_weights(const LinearsCall& call);

  const LinearsArgs args_;
  const int64_t rows_;
  const bool together_;
  std::vector<std::unique_ptr<Staging>> stagings_;
  std::vector<TeamWeight> weights_;
  SharedTasks tasks_;
};

}  // namespace ipex_quant
