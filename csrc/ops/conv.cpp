// INT8 convolutions: schema, argument checks, memory and threads. Inputs and results are channels last:
// [batch, depth, height, width, channels], without depth in 2-D, without depth and height in 1-D.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "ops/int8_group.h"

namespace ipex_quant {
namespace {

constexpr int64_t kLargest = int64_t(1) << 31;
constexpr int kPlaces = 3;
constexpr int64_t kGatherBytes = int64_t(3) << 17;  // patches and their sums stay in the L2 cache
constexpr int64_t kMostRows = 512;

// The options of a convolution: one number for each spatial dimension, two for padding.
struct ConvOptions {
  std::vector<int64_t> kernel, stride, padding, dilation;  // padding: before every dimension, then after every one
};

// Sizes of a convolution as a 3-D one: 1-D and 2-D ones get leading dimensions of size 1.
struct ConvShape {
  int64_t batch, channels;
  int64_t in[kPlaces], out[kPlaces], kernel[kPlaces], stride[kPlaces], dilation[kPlaces], before[kPlaces];
  int64_t taps = 1, places = 1;  // positions of the kernel, and of one image's result

  ConvShape(const Tensor& x, const ConvOptions& options) {
    check_cpu("x", x);
    IPEX_QUANT_CHECK(x.scalar_type() == ScalarType::Byte, "x: expected dtype Byte, got ",
                     torch::headeronly::toString(x.scalar_type()));
    const int64_t dims = x.dim() - 2;
    IPEX_QUANT_CHECK(dims >= 1 && dims <= kPlaces,
                     "x: expected [batch, ..., channels] with 1 to 3 dimensions between, "
                     "got ",
                     shape_of(x));
    IPEX_QUANT_CHECK(x.is_contiguous(), "x: expected a contiguous tensor");
    batch = x.size(0);
    channels = x.size(dims + 1);
    const auto check_count = [&](const char* name, const std::vector<int64_t>& values, int64_t count) {
      IPEX_QUANT_CHECK(int64_t(values.size()) == count, name, ": expected ", count, " numbers, got ", values.size());
    };
    check_count("kernel", options.kernel, dims);
    check_count("stride", options.stride, dims);
    check_count("padding", options.padding, 2 * dims);
    check_count("dilation", options.dilation, dims);
    for (int i = 0; i < kPlaces; ++i) {
      in[i] = out[i] = kernel[i] = stride[i] = dilation[i] = 1;
      before[i] = 0;
      const int64_t at = i - (kPlaces - dims);
      if (at < 0) continue;
      in[i] = in_range("x", x.size(at + 1), 0);
      kernel[i] = in_range("kernel", options.kernel[size_t(at)], 1);
      stride[i] = in_range("stride", options.stride[size_t(at)], 1);
      dilation[i] = in_range("dilation", options.dilation[size_t(at)], 1);
      before[i] = in_range("padding", options.padding[size_t(at)], 0);
      const int64_t after = in_range("padding", options.padding[size_t(at + dims)], 0);
      const int64_t room = in[i] + before[i] + after - dilation[i] * (kernel[i] - 1) - 1;
      IPEX_QUANT_CHECK(room >= 0, "kernel: larger than the padded input, ", shape_of(x));
      out[i] = room / stride[i] + 1;
      taps *= kernel[i];
      IPEX_QUANT_CHECK(taps < kLargest, "kernel: too large");
      IPEX_QUANT_CHECK(out[i] < kLargest && places < (int64_t(1) << 40) / out[i], "padding: the result is too large");
      places *= out[i];
    }
    IPEX_QUANT_CHECK(batch < kLargest && channels < kLargest, "x: too large, ", shape_of(x));
    IPEX_QUANT_CHECK(batch == 0 || places < (int64_t(1) << 60) / batch, "x: the result is too large");
  }

  static int64_t in_range(const char* name, int64_t value, int64_t low) {
    IPEX_QUANT_CHECK(value >= low && value < kLargest, name, ": expected numbers from ", low, " on, got ", value);
    return value;
  }

  int64_t rows() const { return batch * places; }

  std::vector<int64_t> result_shape(const Tensor& x, int64_t out_channels) const {
    std::vector<int64_t> shape{batch};
    for (int64_t i = kPlaces - (x.dim() - 2); i < kPlaces; ++i) shape.push_back(out[i]);
    shape.push_back(out_channels);
    IPEX_QUANT_CHECK(out_channels == 0 || rows() < (int64_t(1) << 60) / out_channels, "x: the result is too large");
    return shape;
  }

  // Calls f(first, width) for every line of the kernel that computes `row` of the result: the index of the first pixel
  // of the input line (-1 if the line is padding), and the position in that line where the kernel begins.
  template <class F>
  void for_each_line(int64_t row, F f) const {
    const int64_t image = row / places, place = row % places;
    const int64_t at[kPlaces] = {place / (out[1] * out[2]), place / out[2] % out[1], place % out[2]};
    int64_t first[kPlaces];
    for (int i = 0; i < kPlaces; ++i) first[i] = at[i] * stride[i] - before[i];
    for (int64_t i = 0; i < kernel[0]; ++i) {
      const int64_t depth = first[0] + i * dilation[0];
      for (int64_t j = 0; j < kernel[1]; ++j) {
        const int64_t height = first[1] + j * dilation[1];
        const bool inside = depth >= 0 && depth < in[0] && height >= 0 && height < in[1];
        f(inside ? ((image * in[0] + depth) * in[1] + height) * in[2] : -1, first[2]);
      }
    }
  }

  // Calls f(tap, pixel) for every tap: the channels of its input pixel, or null in the padding.
  template <class F>
  void for_each_tap(const uint8_t* x, int64_t row, F f) const {
    int64_t tap = 0;
    for_each_line(row, [&](int64_t first, int64_t begin) {
      for (int64_t k = 0; k < kernel[2]; ++k, ++tap) {
        const int64_t width = begin + k * dilation[2];
        f(tap, first >= 0 && width >= 0 && width < in[2] ? x + (first + width) * channels : nullptr);
      }
    });
  }

  // Whether each row of the result depends on the same row of the input alone, so that no patches are gathered.
  bool is_pointwise() const {
    for (int i = 0; i < kPlaces; ++i)
      if (kernel[i] != 1 || stride[i] != 1 || before[i] != 0 || out[i] != in[i]) return false;
    return true;
  }
};

struct Activation {
  float scale;
  int32_t zero_point;

  Activation(double scale_, int64_t zero_point_) : scale(float(scale_)), zero_point(int32_t(zero_point_)) {
    IPEX_QUANT_CHECK(std::isfinite(scale), "scale: expected a finite float32, got ", scale_);
    check_zero_point("zero_point", zero_point_);
  }
};

// The part of a result that starts at `row` and has `n` columns from `column` on.
Output part_of(const Output& whole, int64_t row, int64_t column, int64_t n) {
  Output part = whole;
  part.n = n;
  if (part.bias) part.bias += column;
  part.y = static_cast<uint8_t*>(part.y) + (row * part.stride + column) * float_size(part.type);
  return part;
}

// A matmul of patches, which are gathered block by block, with the weight of each group.
struct PatchProduct {
  const ConvShape& shape;
  const PackedGroup& weights;
  const uint8_t* x;
  const uint8_t* data;
  Activation activation;
  Output output;

  int64_t groups() const { return int64_t(weights.out_features.size()); }
  int64_t group_channels() const { return shape.channels / groups(); }
  bool reads_input() const { return groups() == 1 && shape.is_pointwise() && shape.channels % 4 == 0; }

  void gather(int64_t begin, int64_t end, int64_t group, uint8_t* patches) const {
    const size_t length = size_t(group_channels());
    if (groups() == 1 && shape.dilation[2] == 1) return gather_runs(begin, end, patches);
    for (int64_t row = begin; row < end; ++row, patches += weights.geometry.padded_k) {
      std::memset(patches + weights.geometry.k, 0, size_t(weights.geometry.padded_k - weights.geometry.k));
      shape.for_each_tap(x, row, [&](int64_t tap, const uint8_t* pixel) {
        uint8_t* to = patches + tap * int64_t(length);
        if (pixel)
          std::memcpy(to, pixel + group * int64_t(length), length);
        else
          std::memset(to, activation.zero_point, length);
      });
    }
  }

  // Gathers without groups and dilation in width: the taps of a line of the kernel are contiguous in the input.
  void gather_runs(int64_t begin, int64_t end, uint8_t* patches) const {
    const int64_t line = shape.kernel[2] * shape.channels;
    for (int64_t row = begin; row < end; ++row, patches += weights.geometry.padded_k) {
      std::memset(patches + weights.geometry.k, 0, size_t(weights.geometry.padded_k - weights.geometry.k));
      uint8_t* to = patches;
      shape.for_each_line(row, [&](int64_t first, int64_t width) {
        const int64_t skip = std::clamp<int64_t>(-width, 0, shape.kernel[2]);
        const int64_t stop = first < 0 ? skip : std::clamp(shape.in[2] - width, skip, shape.kernel[2]);
        std::memset(to, activation.zero_point, size_t(skip * shape.channels));
        if (stop > skip)
          std::memcpy(to + skip * shape.channels, x + (first + width + skip) * shape.channels,
                      size_t((stop - skip) * shape.channels));
        std::memset(to + stop * shape.channels, activation.zero_point, size_t(line - stop * shape.channels));
        to += line;
      });
    }
  }

  void run() const {
    const Int8Geometry& g = weights.geometry;
    const KernelTable& table = kernels();
    const int64_t rows = shape.rows(), threads = torch::stable::get_num_threads();
    if (rows == 0 || weights.tiles() == 0) return;
    const int64_t most = std::min(kMostRows, std::max<int64_t>(kGatherBytes / g.padded_k, 16));
    int64_t blocks = (rows + most - 1) / most;
    if (blocks * groups() < 4 * threads) blocks = std::max(blocks, std::min(4 * threads, (rows + 15) / 16));
    const int64_t block = (rows + blocks - 1) / blocks;
    const int64_t bytes = reads_input() ? 0 : block * g.padded_k;
    parallel_tasks(blocks * groups(), 1, [&](auto next) {
      const Buffer patches = make_buffer(bytes), scratch = make_buffer(int8_scratch(g, block));
      for (Tasks tasks = next(); tasks.begin < tasks.end; tasks = next())
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
          const int64_t group = task % groups(), begin = task / groups() * rows / blocks,
                        end = (task / groups() + 1) * rows / blocks;
          const uint8_t* from = x + begin * shape.channels;
          if (!reads_input()) {
            gather(begin, end, group, patches.get());
            from = patches.get();
          }
          const int64_t n = weights.out_features[size_t(group)], first = weights.first_tiles[size_t(group)];
          const Int8Args args{&g, from, g.padded_k, &activation.scale, &activation.zero_point, 0};
          const Output part = part_of(output, begin, group * n, n);
          for (int64_t tile = first; tile < weights.first_tiles[size_t(group) + 1]; ++tile)
            table.int8_tile(args, part, data + weights.tile_offset(size_t(group), tile), (tile - first) * kTileN, 0,
                            end - begin, scratch.get());
        }
    });
  }
};

// The number of output channels of each group.
std::vector<int64_t> group_features(int64_t out_channels, int64_t groups) {
  IPEX_QUANT_CHECK(groups > 0 && groups < kLargest && out_channels > 0 && out_channels % groups == 0,
                   "groups: expected a divisor of the ", out_channels, " output channels, got ", groups);
  return std::vector<int64_t>(size_t(groups), out_channels / groups);
}

Tensor int8_conv(Tensor x, double scale, int64_t zero_point, Tensor packed, std::optional<Tensor> bias,
                 int64_t out_channels, int64_t groups, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                 std::vector<int64_t> padding, std::vector<int64_t> dilation, ScalarType dtype) {
  const ConvShape shape(x, {kernel, stride, padding, dilation});
  const std::vector<int64_t> features = group_features(out_channels, groups);
  IPEX_QUANT_CHECK(shape.channels > 0 && shape.channels % groups == 0, "x: expected channels that ", groups,
                   " groups divide, got ", shape_of(x));
  const int64_t channels = shape.channels / groups;
  IPEX_QUANT_CHECK(shape.taps < kLargest / channels, "kernel: too large");
  const PackedGroup weights(features, shape.taps * channels);
  const uint8_t* data = weights.data_of(packed);
  const float* bias_data = optional_vector("bias", bias, out_channels);
  const Activation activation(scale, zero_point);
  Tensor y = torch::stable::empty(shape.result_shape(x, out_channels), dtype);
  std::vector<Tensor> none;
  const Output output = make_output(y, dtype, bias_data, kNone, none);
  PatchProduct{shape, weights, static_cast<const uint8_t*>(x.const_data_ptr()), data, activation, output}.run();
  return y;
}

Tensor int8_depthwise_conv(Tensor x, double scale, int64_t zero_point, Tensor codes, Tensor weight_scales,
                           std::optional<Tensor> bias, int64_t groups, std::vector<int64_t> kernel,
                           std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                           ScalarType dtype) {
  const ConvShape shape(x, {kernel, stride, padding, dilation});
  check_tensor("codes", codes, ScalarType::Char, 2);
  const int64_t n = codes.size(1);
  check_shape("codes", codes, shape.taps, n);
  IPEX_QUANT_CHECK(shape.taps <= kInt8Fold, "kernel: expected at most ", kInt8Fold, " taps, got ", shape.taps);
  IPEX_QUANT_CHECK(groups > 0 && shape.channels == groups, "x: expected as many channels as there are groups, ", groups,
                   ", got ", shape_of(x));
  IPEX_QUANT_CHECK(n > 0 && n % groups == 0, "codes: expected output channels that are a multiple of the ", groups,
                   " groups, got ", n);
  const float* scales = optional_vector("weight_scales", weight_scales, n);
  const float* bias_data = optional_vector("bias", bias, n);
  const Activation activation(scale, zero_point);
  Tensor y = torch::stable::empty(shape.result_shape(x, n), dtype);
  std::vector<Tensor> none;
  const Output output = make_output(y, dtype, bias_data, kNone, none);
  const uint8_t* data = static_cast<const uint8_t*>(x.const_data_ptr());
  const KernelTable& table = kernels();
  parallel(shape.rows(), 1 + (int64_t(1) << 14) / (n * shape.taps), [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> pixels(static_cast<size_t>(shape.taps));
    const DepthwiseArgs args{
        pixels.data(), shape.taps,       n / shape.channels,   static_cast<const int8_t*>(codes.const_data_ptr()),
        scales,        activation.scale, activation.zero_point};
    for (int64_t row = begin; row < end; ++row) {
      shape.for_each_tap(data, row, [&](int64_t tap, const uint8_t* pixel) { pixels[size_t(tap)] = pixel; });
      table.depthwise_row(args, output, row);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def(
      "int8_conv(Tensor x, float scale, int zero_point, Tensor packed, Tensor? bias, int out_channels, int groups, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation, ScalarType dtype) -> Tensor");
  m.def(
      "int8_depthwise_conv(Tensor x, float scale, int zero_point, Tensor codes, Tensor weight_scales, Tensor? bias, "
      "int groups, int[] kernel, int[] stride, int[] padding, int[] dilation, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("int8_conv", TORCH_BOX(&int8_conv));
  m.impl("int8_depthwise_conv", TORCH_BOX(&int8_depthwise_conv));
}

}  // namespace ipex_quant
