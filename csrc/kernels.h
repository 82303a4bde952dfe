// What the kernels of every ISA level take, and the table through which one level's kernels are called. No torch here.
#pragma once

#include "pack/int8_layout.h"
#include "pack/layout.h"

namespace ipex_quant {

enum FloatType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
inline int64_t float_size(FloatType t) { return t == kFloat32 ? 4 : 2; }

// The values are those of WoqLowpMode, WoqActQuantMode and PostOp in Python.
enum LowpMode : int32_t { kLowpNone = 0, kLowpFp16 = 1, kLowpBf16 = 2, kLowpInt8 = 3 };
enum ActQuantMode : int32_t { kActNone = -1, kPerTensor = 0, kPerIcBlock = 1, kPerBatch = 2, kPerBatchIcBlock = 3 };
constexpr int32_t kSymmetricActOffset = 4;  // the symmetric modes follow the four asymmetric ones
enum PostOp : int32_t { kNone, kRelu, kGelu, kNewGelu, kSilu, kAdd, kAddAdd, kMul, kRelu2, kPostOpCount };

// What the multiply-accumulate of a call runs in. INT8 compute of weights that do not fit bytes is of floats, on
// quantized activations.
enum class Compute : int32_t { kFloat, kBf16, kByte };

// Up to here weights are streamed, above they are unpacked, or meet the rows, part by part.
constexpr int64_t kDecodeRows = 8;
constexpr int64_t kByteDecodeRows = 4;  // of packed weights that are multiplied as bytes: one pass
constexpr int64_t kStepRows = 64;       // of a call for whole layers
constexpr int64_t kActBlock = 128;      // activation block of a per-channel weight
constexpr int64_t kMaxByteFold = 8192;  // 255 * 255 * 8192 fits int32; that of a panel, at most
// k that prefill unpacks at a time: bytes that many rows meet in the second-level cache, up to 512 KB, or 16 KB in the
// first. Codes that are not narrow can take two bytes there.
constexpr int64_t kPanelK = 8192, kWidePanelK = 2048, kSmallPanelK = 256;
constexpr int64_t kMostWordRows = 4;  // that are two bytes wide with them
constexpr int64_t kFloatFold = 256;   // short float sums keep fp32 error near that of one rounding

// The dtype whose code lines the kernels for floats read; others are widened to 8-bit codes first.
constexpr int32_t float_lines(int32_t dtype) { return dtype <= kFp8 || dtype == kBnbFp4 ? dtype : kInt8; }

// Activations as the kernels read them: rows of `padded_k` elements in group order, zero in the padding.
// A *fold* is a run of k after which the partial sum is scaled into fp32; it never crosses a group.
struct Staged {
  Compute compute;
  FloatType rounding;   // what x was rounded to
  bool streamed;        // decode, not prefill
  bool unsigned_bytes;  // bytes are stored as u8 = s8 + 128 (prefill) instead of s8 (decode)
  bool quantize, symmetric;
  int64_t rows;
  int64_t max_fold;
  int64_t folds;      // per row
  void* data;         // float, bf16 or byte [rows, padded_k]
  float* scales;      // [folds, rows], quantized activations only
  int32_t* zeros;     // [folds, rows], in the domain of the stored bytes; asymmetric only
  int32_t* sums;      // [folds, rows], of the stored bytes; quantized only
  float* float_sums;  // [folds, rows], of the values

  int64_t at(int64_t fold, int64_t row) const { return fold * rows + row; }  // of scales to float_sums
};

struct StageArgs {
  const void* x;  // [rows, k] contiguous
  FloatType type;
  const int32_t* perm;  // staged position -> input feature, or null
  int32_t range_scope;  // ActQuantMode without the symmetric offset
  float* ranges;        // [rows, folds, 2] low and high; reduced over rows where the scope says so
  const WoqGeometry* geometry;
  Staged* staged;
};

// y = post_op(acc + bias), rounding to the type of y wherever eager code would.
struct Output {
  int64_t n, stride;  // columns, and from one row of y and others to the next
  const float* bias;  // [n] or null
  PostOp post_op;
  FloatType type;         // of y and others
  const void* others[2];  // rows of n
  void* y;                // rows of n
};

struct GemmArgs {
  const WoqGeometry* geometry;
  const uint8_t* tiles;
  const Staged* staged;
  Output output;
};

// k of the largest panel of a weight; it holds whole folds.
inline int64_t panel_k(const WoqGeometry& g, const Staged& s) {
  const int64_t group = g.padded_full > g.padded_last ? g.padded_full : g.padded_last;
  const int64_t fold = group < s.max_fold ? group : s.max_fold;
  const int64_t wanted = s.rows <= kStepRows ? kSmallPanelK : is_narrow(g.dtype) ? kPanelK : kWidePanelK;
  const int64_t most = fold > wanted ? fold : wanted;
  return g.padded_k < most ? g.padded_k : most;
}

// Bytes of scratch that one thread needs, at any ISA level.
inline int64_t stage_scratch(const WoqGeometry& g, const Staged& s) { return (2 * g.padded_k + 2 * s.folds) * 4; }
inline int64_t gemm_scratch(const WoqGeometry& g, const Staged& s, int64_t rows) {
  if (s.streamed) return 0;
  constexpr int64_t kAlign = 64;  // what a kernel that loads whole cache lines skips
  if (s.compute == Compute::kByte) {
    const int64_t k = panel_k(g, s), codes = is_narrow(g.dtype) ? kTileN * k : 2 * (kTileN + kMostWordRows) * k;
    return codes + kTileN * (16 * s.folds + (k < g.padded_k ? 4 * rows : 0)) + kAlign;
  }
  return kTileN * 4 * (kFloatFold + rows) + kAlign;
}

// A linear with a float weight [n, k] as torch keeps it; bias [n] or null. Both are of the type of the output, which
// has no bias of its own.
struct FloatLinearArgs {
  const float* x;  // [rows, staged_float_k(k)], as stage_float_rows leaves it
  int64_t rows, k;
  const void *weight, *bias;
  Output output;
};

struct FloatStageArgs {
  const void* x;  // [rows, k]
  FloatType type;
  int64_t k;
  float* staged;
};

constexpr int64_t kFloatStep = 32;  // elements of k that the kernel takes together
inline int64_t staged_float_k(int64_t k) { return (k + kFloatStep - 1) / kFloatStep * kFloatStep; }

struct QuantizeArgs {
  const void* weight;  // [n, k]
  FloatType type;
  int32_t dtype;
  bool symmetric;
  bool half_scales;  // round scales to half precision where they are normal numbers there
  int64_t n, k, group;
  uint8_t* codes;        // as in QuantizedWeight
  float* scales;         // [n, groups]
  int16_t* zero_points;  // [n, groups], null when symmetric
};

inline int64_t quantize_scratch(int64_t k) { return k + 1; }

struct QuantizeActivationArgs {
  const void* x;  // [rows, k]
  FloatType type;
  int64_t k;
  const float* multiplier;  // [k], or null: every row gets a scale and a zero point of its own
  int32_t zero_point;       // 0..255
  uint8_t* codes;           // rows of k, `stride` bytes apart
  int64_t stride;
  float* scales;  // [rows], as the next only without a multiplier
  int32_t* zero_points;
};

struct Int8Args {
  const Int8Geometry* geometry;
  const uint8_t* x;  // rows of `stride` bytes, of which padded_k can be read
  int64_t stride;
  const float* scales;         // [1] or [rows]
  const int32_t* zero_points;  // 0..255
  int64_t row_step;            // of both: 0 or 1
};

inline int64_t int8_scratch(const Int8Geometry& g, int64_t rows) { return rows * kTileN * (g.folds > 1 ? 12 : 4); }

// A convolution with one input channel for each output channel, or for each run of `multiplier` of them. A tap of the
// kernel reads `pixels[tap]`, the input's channels at one place, or nothing where that is in the padding.
struct DepthwiseArgs {
  const uint8_t* const* pixels;
  int64_t taps;  // up to kInt8Fold
  int64_t multiplier;
  const int8_t* codes;  // [taps, n]
  const float* weight_scales;
  float scale;
  int32_t zero_point;  // 0..255
};

// y = (x - mean if centered) * rsqrt(mean square + eps) * weight + bias for rows of k elements, all in float32; with a
// residual of x + residual, which goes to `sum` in x's type first.
struct NormArgs {
  const void *x, *residual;     // [rows, k]; residual may be null
  const void *weight, *bias;    // [k] or null
  FloatType type, weight_type;  // weight_type is `type` or float32; in `type`, an uncentered y is rounded before it
  bool centered;
  float eps;
  int64_t k;
  void *sum, *y;  // [rows, k]
  float offset;   // added to the weight, in float32; with one no y is rounded before
};

struct RotaryArgs {
  const void* x;  // [batch, length, heads, dim], its last dimension contiguous
  FloatType type;
  int64_t strides[3];
  int64_t length, heads, dim;
  int64_t rotary_dim;     // features that are rotated, the first ones
  const void *cos, *sin;  // [batch or 1, length, table_columns] contiguous
  FloatType table_type;
  int64_t table_batch_stride;  // 0 where all sequences share a table
  int64_t table_columns;       // rotary_dim or half of it
  bool interleaved;            // pairs are neighbours, not a half apart
  void* y;                     // contiguous
};

struct GatedArgs {
  const void *x, *y;  // rows of `columns` elements, `stride` apart
  FloatType type;
  PostOp activation;
  int64_t columns, stride;
  void* out;  // [rows, columns]
};

struct GatherArgs {
  const WoqGeometry* geometry;
  const uint8_t* tiles;
  const int32_t* perm;  // position in group order -> feature, or null
  const int64_t* rows;  // which
  FloatType type;
  void* out;  // a row of k for each
};

// The codes of a group, with room for a vector to read beyond them, and a row that is not in order yet.
inline int64_t gather_slots(const WoqGeometry& g) { return g.padded_full + 64; }
inline int64_t gather_scratch(const WoqGeometry& g) { return gather_slots(g) + 4 * g.k; }

// Floats with any strides, in elements, or none if `data` is null. Kernels write to what they are said to, and only
// that.
struct StridedFloats {
  void* data;
  FloatType type;
  int64_t strides[4];
};

constexpr int64_t kScanChannels = 64, kScanPositions = 32;  // of a task, and of what it computes at a time

// y[l] = bias + sum of weight[w] * input[l - (width - 1) + w], whose inputs before the first are in the state: the last
// `columns` ones in order or, with starts, input i of a sequence in column i % columns, x beginning with starts[batch].
struct ConvolveArgs {
  StridedFloats x;             // [batch, 1, channels, length]
  StridedFloats weight, bias;  // [1, 1, channels, width] and [1, 1, channels, 1]; bias or none
  StridedFloats state;         // [batch, 1, channels, columns] or none, which is zeros; written if `update`
  StridedFloats y;             // contiguous; written
  const int64_t* starts;       // or null
  bool silu, update;
  int64_t channels, length, width, columns;
};

inline int64_t scan_floats(int64_t count) { return count + 64; }  // and what whole vectors overrun, at any ISA level
inline int64_t convolve_scratch(const ConvolveArgs& args) {
  const int64_t row = scan_floats(args.width + kScanPositions) + args.width + 1 + kScanPositions;
  return 4 * (kScanChannels * row + scan_floats(scan_floats(0)));
}

// h = exp(delta * a) * h + delta * b * u from one position to the next; y = (c . h + d * u) * silu(z).
struct ScanArgs {
  StridedFloats u, delta, z;    // [batch, heads, features, length]; z or none
  StridedFloats a;              // [1, heads, features, states]
  StridedFloats b, c;           // [batch, groups, states, length]
  StridedFloats d, delta_bias;  // [1, heads, features, 1], or none
  StridedFloats state;          // [batch, heads, features, states]; written
  StridedFloats y;              // contiguous; written
  bool softplus;
  int64_t heads, features, length, states, groups;

  int64_t channels() const { return heads * features; }
  int64_t group_channels() const { return channels() / groups; }
};

inline int64_t scan_scratch(const ScanArgs& args, int64_t channels) {
  const int64_t positions = args.length < kScanPositions ? args.length : kScanPositions, states = args.states + 16;
  return 4 * (5 * scan_floats(channels * positions) + 2 * scan_floats(channels * states) +
              2 * scan_floats(positions * states) + scan_floats(positions) + scan_floats(states));
}

// attention_plan.h
struct AttentionArgs;
struct AttentionTask;
struct AttentionMerge;
struct WriteCacheArgs;

struct KernelTable {
  bool bf16_dot;
  int64_t float_decode_rows;  // kDecodeRows of packed weights that are multiplied in float
  // Ranges of rows [begin, end), then (after any reduction over rows) their staged form.
  void (*stage_ranges)(const StageArgs&, int64_t begin, int64_t end, uint8_t* scratch);
  void (*stage_rows)(const StageArgs&, int64_t begin, int64_t end, uint8_t* scratch);
  // One tile of columns for rows [begin, end).
  void (*gemm_tile)(const GemmArgs&, int64_t tile, int64_t begin, int64_t end, uint8_t* scratch);
  void (*stage_float_rows)(const FloatStageArgs&, int64_t begin, int64_t end);
  void (*float_tile)(const FloatLinearArgs&, int64_t tile);  // kTileN columns, all rows
  // False when a value is NaN or infinite.
  bool (*quantize_rows)(const QuantizeArgs&, int64_t begin, int64_t end, uint8_t* scratch);
  void (*quantize_activation)(const QuantizeActivationArgs&, int64_t begin, int64_t end);
  // One tile, whose first column is `column` of the output, for rows [begin, end).
  void (*int8_tile)(const Int8Args&, const Output&, const uint8_t* tile, int64_t column, int64_t begin, int64_t end,
                    uint8_t* scratch);
  void (*depthwise_row)(const DepthwiseArgs&, const Output&, int64_t row);
  void (*norm_rows)(const NormArgs&, int64_t begin, int64_t end);
  void (*rotate_positions)(const RotaryArgs&, int64_t begin, int64_t end);
  void (*gated_product)(const GatedArgs&, int64_t begin, int64_t end);  // a range of elements
  void (*gather_rows)(const GatherArgs&, int64_t begin, int64_t end, uint8_t* scratch);
  int64_t (*attention_scratch)(const AttentionArgs&);  // bytes, of any task
  void (*attention_task)(const AttentionArgs&, const AttentionTask&, uint8_t* scratch);
  void (*attention_merge)(const AttentionArgs&, const AttentionMerge&, uint8_t* scratch);
  void (*quantize_token)(const WriteCacheArgs&);
  // Channels [begin, end) of a sequence, at most kScanChannels; those of a scan are of one group.
  void (*convolve_channels)(const ConvolveArgs&, int64_t batch, int64_t begin, int64_t end, uint8_t* scratch);
  void (*scan_channels)(const ScanArgs&, int64_t batch, int64_t begin, int64_t end, uint8_t* scratch);
  bool tiles = false;  // whether products of kMinTileRows rows and more go through the tiles of tile.h
};

// What a level has of its own where the rest of its table is that of another one.
struct KernelPatch {
  decltype(KernelTable::gemm_tile) gemm_tile;
  decltype(KernelTable::int8_tile) int8_tile;
  decltype(KernelTable::attention_scratch) attention_scratch;
  decltype(KernelTable::attention_task) attention_task;
};

// Fewer rows than a tile holds leave part of it empty, while it takes as long to load the weight.
constexpr int64_t kMinTileRows = 16;

// Each includes those before it, but for kAvx2Vnni, whose encoding of VNNI processors with AVX-512 may lack. The last
// two, which tests choose, have the kernels of others without their instructions.
enum IsaLevel : int32_t {
  kGeneric,
  kAvx2,
  kAvx2Vnni,
  kAvx512Vnni,
  kAvx512Bf16,
  kAmx,
  kAvx2VnniEmulated,
  kAmxEmulated,
  kIsaLevels
};
bool supports(IsaLevel level);
// The level that runs: the best that the CPU has, or what IPEX_QUANT_ISA names, or the one below if that cannot run
// after all. Throws std::runtime_error that lists the choices when it names anything else.
IsaLevel active_isa();
// Why it is the one below; empty if it is not.
const char* lowered_isa();
const KernelTable& kernels();

}  // namespace ipex_quant
