// Whole decoder layers: schema, argument checks, and the threads that compute them.
#include <torch/csrc/stable/library.h>

#include "host/decoder_stack.h"
#include "ops/attention.h"
#include "ops/int8_group.h"
#include "ops/woq.h"

namespace ipex_quant {
namespace {

using Optional = std::optional<Tensor>;

// The arguments of the op, in the three groups of its schema.
struct Weights {  // lists over all layers, one layer after another
  std::vector<Tensor> packed;
  std::vector<Optional> biases, perms, static_inputs;
  std::vector<Tensor> norms;
  std::vector<Optional> norm_biases;
  std::vector<Tensor> head_norms;
};

struct Call {
  Tensor cos, sin;
  int64_t rotary_dim;
  std::vector<Tensor> caches;
  std::vector<int64_t> starts;
  Optional mask, alibi;
  std::vector<Tensor> pages;                       // block tables, lengths and starts of queries, or nothing
  std::optional<PagedBatch> batch = std::nullopt;  // of pages

  void read_pages(int64_t rows) {
    if (pages.empty()) return;
    IPEX_QUANT_CHECK(pages.size() == 3, "pages: expected block tables, lengths and starts of queries, got ",
                     pages.size(), " tensors");
    IPEX_QUANT_CHECK(!mask, "mask: expected none with pages");
    batch = ipex_quant::read_pages(pages[0], pages[1], pages[2], rows, caches[0]);
  }
};

struct Structure {  // common to all layers
  int64_t projections, mlp_inputs, activation;
  bool gated, parallel, sandwich, centered;
  double eps, offset;
  int64_t lowp_mode, act_quant_mode;
  bool interleaved;
  double scale, softcap;

  int64_t linears() const { return projections + mlp_inputs + 2; }
  int64_t norms() const { return sandwich ? 4 : 2; }
  void check() const {
    IPEX_QUANT_CHECK(projections == 1 || projections == 3, "projections: expected 1 or 3, got ", projections);
    IPEX_QUANT_CHECK(mlp_inputs == 1 || (mlp_inputs == 2 && gated), "mlp_inputs: expected 1, or 2 with gates, got ",
                     mlp_inputs);
    IPEX_QUANT_CHECK(activation >= kRelu && activation <= kSilu, "activation: expected 1..4, got ", activation);
    if (gated) check_activation(activation);
    IPEX_QUANT_CHECK(!parallel || !sandwich, "parallel: expected false in a sandwich");
    check_modes(lowp_mode, act_quant_mode);
  }
};

struct Input {
  ScalarType dtype;
  int64_t batch, length, features;

  explicit Input(const Tensor& x) {
    check_cpu("x", x);
    IPEX_QUANT_CHECK(x.dim() == 3 && x.size(2) > 0, "x: expected shape [batch, length, features], got ", shape_of(x));
    dtype = x.scalar_type();
    batch = x.size(0), length = x.size(1), features = x.size(2);
    IPEX_QUANT_CHECK(rows() <= kStepRows, "x: expected at most ", kStepRows, " tokens, got ", rows());
  }
  int64_t rows() const { return batch * length; }
};

// A list of `count` items for each of `layers`; an optional list may be empty.
template <class T>
class PerLayer {
 public:
  PerLayer(const char* name, const std::vector<T>& items, size_t layers, int64_t count, bool optional = false)
      : items_(items), count_(optional && items.empty() ? 0 : size_t(count)) {
    IPEX_QUANT_CHECK(items.size() == layers * count_, name, ": expected ", count, " for each of ", layers,
                     " layers, got ", items.size());
  }
  bool given() const { return count_ > 0; }
  int64_t count() const { return int64_t(count_); }
  const T& at(size_t layer, int64_t i) const { return items_[layer * count_ + size_t(i)]; }

 private:
  const std::vector<T>& items_;
  const size_t count_;
};

struct LayerTensors {
  PerLayer<Tensor> packed;
  PerLayer<Optional> biases, perms, static_inputs;
  PerLayer<Tensor> norms;
  PerLayer<Optional> norm_biases;
  PerLayer<Tensor> head_norms;

  LayerTensors(const Weights& w, const Structure& structure, size_t layers)
      : packed("packed", w.packed, layers, structure.linears()),
        biases("biases", w.biases, layers, structure.linears(), true),
        perms("perms", w.perms, layers, 4, true),
        static_inputs("static_inputs", w.static_inputs, layers, structure.linears(), true),
        norms("norms", w.norms, layers, structure.norms()),
        norm_biases("norm_biases", w.norm_biases, layers, structure.norms(), true),
        head_norms("head_norms", w.head_norms, layers, 2, true) {}
};

// Reads the arguments of one layer, except for its attention.
class LayerReader {
 public:
  LayerReader(const Input& input, const Structure& structure, const LayerTensors& tensors, size_t layer)
      : input_(input), structure_(structure), tensors_(tensors), layer_(layer) {}

  DecoderLayerArgs read() {
    const int64_t k = input_.features;
    DecoderLayerArgs args{};
    args.activation = PostOp(structure_.activation);
    args.gated = structure_.gated;
    args.parallel = structure_.parallel;
    args.sandwich = structure_.sandwich;
    args.projections = linears(structure_.projections, k);
    args.output = linears(1, -1, k);
    args.mlp_inputs = linears(structure_.mlp_inputs, k);
    const int64_t inner = args.mlp_inputs.weights[0].n;
    if (structure_.mlp_inputs == 2) expect("mlp input", args.mlp_inputs.weights[1].n, inner);
    const bool halves = structure_.gated && structure_.mlp_inputs == 1;
    IPEX_QUANT_CHECK(!halves || inner % 2 == 0, "packed: expected gates and as many factors, got ", inner, " features");
    args.mlp_output = linears(1, halves ? inner / 2 : inner, k);
    for (int64_t i = 0; i < 2; ++i) args.norms[i] = layer_norm(i);
    for (int64_t i = 0; args.sandwich && i < 2; ++i) args.after[i] = layer_norm(2 + i);
    return args;
  }

  void read_head_norms(DecoderLayerArgs& args, int64_t head_size) const {
    if (!tensors_.head_norms.given()) return;
    for (int64_t i = 0; i < 2; ++i)
      args.head_norms[i] = norm("head_norms", tensors_.head_norms.at(layer_, i), head_size);
  }

 private:
  static void expect(const char* name, int64_t got, int64_t expected) {
    IPEX_QUANT_CHECK(got == expected, "packed: expected ", name, " features ", expected, ", got ", got);
  }

  // Reads the next `count` weights, which share one input; `in` or `out` below 0 allow any number of features.
  LinearsArgs linears(int64_t count, int64_t in, int64_t out = -1) {
    LinearsArgs args{{}, nullptr};
    for (int64_t i = 0; i < count; ++i, ++weight_) {
      const Tensor& packed = tensors_.packed.at(layer_, weight_);
      WeightArgs weight = holds_int8(packed) ? int8_weight(packed) : woq_weight(packed);
      if (in >= 0) expect("in", weight.k, in);
      if (out >= 0) expect("out", weight.n, out);
      if (tensors_.biases.given())
        weight.bias = optional_vector("biases", tensors_.biases.at(layer_, weight_), weight.n);
      args.weights.push_back(weight);
      IPEX_QUANT_CHECK(weight.k == args.weights[0].k, "packed: expected weights of one input");
    }
    if (tensors_.perms.given()) args.perm = perm_data("perms", tensors_.perms.at(layer_, group_), args.weights[0].k);
    for (const WeightArgs& weight : args.weights)
      IPEX_QUANT_CHECK(!args.perm || std::holds_alternative<WoqWeight>(weight.kind),
                       "perms: expected none with an INT8 weight");
    ++group_;
    return args;
  }

  WeightArgs woq_weight(const Tensor& packed) const {
    const WoqHeader header = read_header(packed);
    const WoqGeometry geometry = geometry_of(header, packed);
    IPEX_QUANT_CHECK(!static_input(), "static_inputs: expected None with a weight-only quantized weight");
    const uint8_t* tiles = static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof header;
    return {WoqWeight{geometry, header.group_size}, geometry.n, geometry.k, geometry.tile_bytes, tiles, nullptr};
  }

  WeightArgs int8_weight(const Tensor& packed) const {
    const PackedGroup alone = packed_alone(packed);
    const uint8_t* tiles = alone.data_of(packed) + sizeof(Int8Header);
    const Int8Geometry& geometry = alone.geometry;
    Int8Weight weight{geometry, nullptr, 0.0f, 0};
    if (const Tensor* input = static_input()) {
      check_tensor("static_inputs", *input, ScalarType::Float, 1);
      IPEX_QUANT_CHECK(input->size(0) == 2 + geometry.k, "static_inputs: expected ", 2 + geometry.k, " elements, got ",
                       input->size(0));
      const float* values = static_cast<const float*>(input->const_data_ptr());
      IPEX_QUANT_CHECK(values[1] >= 0 && values[1] <= 255 && values[1] == float(int32_t(values[1])),
                       "static_inputs: expected a zero point of 0..255, got ", values[1]);
      weight = {geometry, values + 2, values[0], int32_t(values[1])};
    }
    return {weight, alone.out_features[0], geometry.k, geometry.tile_bytes, tiles, nullptr};
  }

  // Of the next weight, or null.
  const Tensor* static_input() const {
    if (!tensors_.static_inputs.given()) return nullptr;
    const Optional& input = tensors_.static_inputs.at(layer_, weight_);
    return input ? &*input : nullptr;
  }

  NormArgs norm(const char* name, const Tensor& weight, int64_t k) const {
    NormArgs args{};
    args.k = k;
    args.eps = float(structure_.eps);
    args.offset = float(structure_.offset);
    args.centered = structure_.centered;
    args.type = float_type("x", input_.dtype);
    args.weight = norm_vector(name, weight, input_.dtype, k);
    args.weight_type = float_type(name, weight.scalar_type());
    return args;
  }

  NormArgs layer_norm(int64_t i) const {
    const Tensor& weight = tensors_.norms.at(layer_, i);
    NormArgs args = norm("norms", weight, input_.features);
    if (!tensors_.norm_biases.given()) return args;
    const Optional& bias = tensors_.norm_biases.at(layer_, i);
    if (!bias) return args;
    args.bias = norm_vector("norm_biases", *bias, input_.dtype, args.k);
    IPEX_QUANT_CHECK(bias->scalar_type() == weight.scalar_type(), "norm_biases: expected the dtype of norms");
    return args;
  }

  const Input& input_;
  const Structure& structure_;
  const LayerTensors& tensors_;
  const size_t layer_;
  int64_t weight_ = 0, group_ = 0;
};

// The range of addresses from the first to the last element of a tensor.
std::pair<uintptr_t, uintptr_t> extent(const Tensor& t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + uintptr_t(last + 1) * t.element_size()};
}

// Permutations are checked before caches are written, so they must not overlap a cache.
void check_apart(const std::vector<Optional>& perms, const PerLayer<Tensor>& cache, size_t layers) {
  std::vector<std::pair<uintptr_t, uintptr_t>> written;
  const auto any = [](const Optional& perm) { return perm.has_value(); };
  if (std::none_of(perms.begin(), perms.end(), any)) return;
  for (size_t i = 0; i < layers; ++i)
    for (int64_t j = 0; j < cache.count(); ++j) written.push_back(extent(cache.at(i, j)));
  std::sort(written.begin(), written.end());
  uintptr_t furthest = 0;  // largest end so far, so that comparing a perm with the last one before it suffices
  for (auto& each : written) each.second = furthest = std::max(furthest, each.second);
  for (const Optional& perm : perms) {
    if (!perm) continue;
    const auto [begin, end] = extent(*perm);
    const auto after = std::lower_bound(written.begin(), written.end(), std::pair<uintptr_t, uintptr_t>(end, 0));
    IPEX_QUANT_CHECK(after == written.begin() || std::prev(after)->second <= begin,
                     "perms: expected memory of their own, got some that a cache has");
  }
}

// Reads the attention arguments of one layer, with its cache.
void read_attention(DecoderLayerArgs& args, const Input& input, RopeAttentionOptions& options) {
  int64_t width = 0;
  for (const WeightArgs& weight : args.projections.weights) width += weight.n;
  const QkvInput qkv{nullptr, input.dtype, input.batch, input.length, width, {input.length * width, width}};
  args.attention = rope_attention_args(qkv, options);
  const AttentionArgs& attention = args.attention.attention;
  const int64_t heads = attention.kv_heads * attention.group, size = attention.key_dim;
  if (args.projections.weights.size() == 3)
    IPEX_QUANT_CHECK(
        args.projections.weights[0].n == heads * size && args.projections.weights[1].n == attention.kv_heads * size,
        "packed: expected projections to ", heads, ", ", attention.kv_heads, " and ", attention.kv_heads, " heads of ",
        size);
  IPEX_QUANT_CHECK(args.output.weights[0].k == heads * size, "packed: expected an output projection of ", heads * size,
                   " features, got ", args.output.weights[0].k);
}

// The checked arguments of all layers. `call` owns what they point to.
std::vector<DecoderLayerArgs> read_layers(const Input& input, const Weights& weights, Call& call,
                                          const Structure& structure) {
  structure.check();
  const size_t layers = call.starts.size();
  IPEX_QUANT_CHECK(layers > 0, "starts: expected one for each layer");
  const LayerTensors tensors(weights, structure, layers);
  const int64_t parts = call.caches.size() == 5 * layers ? 5 : call.caches.size() == 4 * layers ? 4 : 2;
  const PerLayer<Tensor> cache("caches", call.caches, layers, parts);
  check_apart(weights.perms, cache, layers);
  call.read_pages(input.rows());
  IPEX_QUANT_CHECK(!call.batch || input.batch == 1, "x: expected a batch of 1 with pages, got ", input.batch);
  call.cos = as_contiguous(call.cos);
  call.sin = as_contiguous(call.sin);
  RopeAttentionOptions options{call.cos,       call.sin,          call.rotary_dim, structure.interleaved,
                               cache.at(0, 0), cache.at(0, 1),    std::nullopt,    std::nullopt,
                               std::nullopt,   /*start=*/0,       structure.scale, call.mask,
                               /*window=*/0,   structure.softcap, call.alibi,      call.batch ? &*call.batch : nullptr};
  std::vector<DecoderLayerArgs> args;
  for (size_t i = 0; i < layers; ++i) {
    options.key_cache = cache.at(i, 0);
    options.value_cache = cache.at(i, 1);
    if (parts > 2) {
      options.key_scales = cache.at(i, 2);
      options.value_scales = cache.at(i, 3);
    }
    if (parts > 4) options.key_factors = cache.at(i, 4);
    options.start = call.starts[i];
    LayerReader reader(input, structure, tensors, i);
    args.push_back(reader.read());
    read_attention(args[i], input, options);
    reader.read_head_norms(args[i], args[i].attention.attention.key_dim);
  }
  return args;
}

Tensor run_layers(const Tensor& x, const Weights& weights, Call& call, const Structure& structure) {
  const Input input(x);
  const std::vector<DecoderLayerArgs> layers = read_layers(input, weights, call, structure);
  const Tensor rows_of_x = as_contiguous(x);
  Tensor y = empty_in_dtype_of(x, {input.batch, input.length, input.features});
  if (input.rows() == 0) return y;
  const LinearsCall linears{float_type("x", input.dtype), int32_t(structure.lowp_mode),
                            int32_t(structure.act_quant_mode), input.rows()};
  const DecoderArgs args{linears, rows_of_x.const_data_ptr(), y.mutable_data_ptr()};
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  DecoderStack stack(layers, args, threads);
  parallel(threads, 1, [&](int64_t begin, int64_t end) { stack.run({begin, end, threads}); });
  return y;
}

// In the order of the schema below, which callers leave to `native_arguments` in ipex_quant/ops/decoder.py.
Tensor decoder_layers(Tensor x,
                      // weights
                      std::vector<Tensor> packed, std::vector<Optional> biases, std::vector<Optional> perms,
                      std::vector<Optional> static_inputs, std::vector<Tensor> norms, std::vector<Optional> norm_biases,
                      std::vector<Tensor> head_norms,
                      // call
                      Tensor cos, Tensor sin, int64_t rotary_dim, std::vector<Tensor> caches,
                      std::vector<int64_t> starts, Optional mask, Optional alibi, std::vector<Tensor> pages,
                      // structure
                      int64_t projections, int64_t mlp_inputs, int64_t activation, bool gated, bool parallel,
                      bool sandwich, bool centered, double eps, double offset, int64_t lowp_mode,
                      int64_t act_quant_mode, bool interleaved, double scale, double softcap) {
  const Weights weights{std::move(packed), std::move(biases),      std::move(perms),     std::move(static_inputs),
                        std::move(norms),  std::move(norm_biases), std::move(head_norms)};
  Call call{cos, sin, rotary_dim, std::move(caches), std::move(starts), mask, alibi, std::move(pages)};
  return run_layers(x, weights, call,
                    {projections, mlp_inputs, activation, gated, parallel, sandwich, centered, eps, offset, lowp_mode,
                     act_quant_mode, interleaved, scale, softcap});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "decoder_layers(Tensor x, "
      // weights
      "Tensor[] packed, Tensor?[] biases, Tensor?[] perms, Tensor?[] static_inputs, Tensor[] norms, "
      "Tensor?[] norm_biases, Tensor[] head_norms, "
      // call
      "Tensor cos, Tensor sin, int rotary_dim, Tensor(a!)[] caches, SymInt[] starts, Tensor? mask, Tensor? alibi, "
      "Tensor[] pages, "
      // structure
      "int projections, int mlp_inputs, int activation, bool gated, bool parallel, bool sandwich, bool centered, "
      "float eps, float offset, int lowp_mode, int act_quant_mode, bool interleaved, float scale, float softcap) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("decoder_layers", TORCH_BOX(&decoder_layers)); }

}  // namespace ipex_quant
