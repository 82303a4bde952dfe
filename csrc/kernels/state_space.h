// Selective state space models: causal convolutions of few taps and scans, a chunk of channels at a time.
#pragma once

#include "half.h"
#include "kernels/elementwise.h"

namespace ipex_quant {
namespace IPEX_QUANT_ISA_NS {

// ------------------------------------------------------------------------------------------------ strided elements
inline float load_one(const void* base, FloatType type, int64_t i) {
  if (type == kFloat32) return static_cast<const float*>(base)[i];
  const uint32_t bits = static_cast<const uint16_t*>(base)[i];
  return type == kBFloat16 ? bits_to_float(int32_t(bits << 16)) : half_to_float(bits);
}

// `count` elements that are `stride` apart, the first of them number `at`.
inline void load_strided(const StridedFloats& x, int64_t at, int64_t stride, int64_t count, float* to) {
  if (stride == 1 && count >= kLanes)
    return for_each_run(count, [&](int64_t i, int64_t run) IPEX_QUANT_INLINE {
      store_run(to, kFloat32, i, run, load_run(x.data, x.type, at + i, run));
    });
  for (int64_t i = 0; i < count; ++i) to[i] = load_one(x.data, x.type, at + i * stride);
}

inline void store_strided(const StridedFloats& x, int64_t at, int64_t stride, int64_t count, const float* from) {
  if (stride == 1)
    return for_each_run(count, [&](int64_t i, int64_t run) IPEX_QUANT_INLINE {
      store_run(x.data, x.type, at + i, run, load_run(from, kFloat32, i, run));
    });
  for (int64_t i = 0; i < count; ++i) store_tail(x.data, x.type, at + i * stride, 1, set1_f(from[i]));
}

// Some channels of a sequence, which are features of one head after the other, at positions [first, first + count).
struct ChannelBlock {
  int64_t batch, begin, end, features, first, count;

  int64_t channels() const { return end - begin; }
  int64_t elements() const { return channels() * count; }
  // Calls f(number of the block, element of x at its position 0) for each channel.
  template <class F>
  IPEX_QUANT_INLINE void each_channel(const StridedFloats& x, F f) const {
    for (int64_t c = begin; c < end; ++c)
      f(c - begin, batch * x.strides[0] + c / features * x.strides[1] + c % features * x.strides[2]);
  }
};

// Elements of x to [channel][position].
inline void gather_block(const StridedFloats& x, const ChannelBlock& block, float* to) {
  const int64_t at = block.batch * x.strides[0] + block.begin * x.strides[2] + block.first * x.strides[3];
  if (block.count == 1 && block.features >= block.end)  // of one head: the channels are the run
    return load_strided(x, at, x.strides[2], block.channels(), to);
  block.each_channel(x, [&](int64_t c, int64_t from) IPEX_QUANT_INLINE {
    load_strided(x, from + block.first * x.strides[3], x.strides[3], block.count, to + c * block.count);
  });
}

// [channel][position] to the contiguous [batch, channels, length].
inline void scatter_block(const float* from, const ChannelBlock& block, int64_t row, int64_t length,
                          const StridedFloats& y) {
  if (block.count == length) return store_strided(y, row * length, 1, block.elements(), from);
  for (int64_t c = 0; c < block.channels(); ++c)
    store_strided(y, (row + c) * length + block.first, 1, block.count, from + c * block.count);
}

// Room for what whole vectors overrun.
inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Hands out parts of scratch memory.
struct FloatScratch {
  float* at;
  float* take(int64_t count) { return (at += padded(count) + kLanes) - padded(count) - kLanes; }
};

template <class F>
IPEX_QUANT_INLINE inline void each_vector(int64_t count, F f) {
  for (int64_t i = 0; i < count; i += kLanes) f(i);
}

// ----------------------------------------------------------------------------------------------------- convolution
// The column of input number `start + i` in the state of a sequence.
inline int64_t column_of(const ConvolveArgs& args, int64_t batch, int64_t i) {
  if (!args.starts) return args.columns + i;
  const int64_t column = (args.starts[batch] % args.columns + i) % args.columns;
  return column < 0 ? column + args.columns : column;
}

// Writes the inputs of one channel to its state, of which element `at` is column 0.
inline void update_column(const ConvolveArgs& args, const ChannelBlock& block, int64_t at, int64_t x_at) {
  const StridedFloats& state = args.state;
  const int64_t kept = args.length < args.columns ? args.length : args.columns, step = state.strides[3];
  if (!args.starts)  // in order, so that nothing is overwritten before it was moved
    for (int64_t i = 0; i + kept < args.columns; ++i) {
      const float moved = load_one(state.data, state.type, at + (i + kept) * step);
      store_strided(state, at + i * step, 0, 1, &moved);
    }
  for (int64_t i = args.length - kept; i < args.length; ++i) {
    const float x = load_one(args.x.data, args.x.type, x_at + i * args.x.strides[3]);
    const int64_t column = args.starts ? column_of(args, block.batch, i) : args.columns - args.length + i;
    store_strided(state, at + column * step, 0, 1, &x);
  }
}

// Channels [begin, end) of a sequence.
inline void convolve_channels(const ConvolveArgs& args, int64_t batch, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t before = args.width - 1, positions = args.length < kScanPositions ? args.length : kScanPositions;
  const int64_t channels = end - begin, row = padded(before + positions) + kLanes;
  FloatScratch memory{reinterpret_cast<float*>(scratch)};
  float *inputs = memory.take(channels * row), *weights = memory.take(channels * args.width),
        *bias = memory.take(channels), *sums = memory.take(channels * positions);
  ChannelBlock block{batch, begin, end, args.channels, 0, args.width};
  std::memset(inputs, 0, size_t(channels * row) * sizeof(float));
  gather_block(args.weight, block, weights);
  block.count = 1;
  std::memset(bias, 0, size_t(channels) * sizeof(float));
  if (args.bias.data) gather_block(args.bias, block, bias);
  if (args.state.data)
    block.each_channel(args.state, [&](int64_t c, int64_t at) {
      for (int64_t i = 0; i < before; ++i) {
        const int64_t column = column_of(args, batch, i - before);
        inputs[c * row + i] = load_one(args.state.data, args.state.type, at + column * args.state.strides[3]);
      }
    });
  for (; block.first < args.length; block.first += positions) {
    block.count = args.length - block.first < positions ? args.length - block.first : positions;
    block.each_channel(args.x, [&](int64_t c, int64_t at) IPEX_QUANT_INLINE {
      float* const in = inputs + c * row;
      load_strided(args.x, at + block.first * args.x.strides[3], args.x.strides[3], block.count, in + before);
      for (int64_t i = 0; i < block.count; i += kLanes) {
        vf sum = set1_f(bias[c]);
        for (int64_t tap = 0; tap < args.width; ++tap)
          sum = fma_f(set1_f(weights[c * args.width + tap]), load_f(in + i + tap), sum);
        store_f(sums + c * block.count + i, sum);  // overrun by the next channel, then by the room behind all
      }
      for (int64_t i = 0; i < before; ++i) in[i] = in[block.count + i];
    });
    if (args.silu)
      each_vector(block.elements(), [&](int64_t i) IPEX_QUANT_INLINE { store_f(sums + i, silu(load_f(sums + i))); });
    scatter_block(sums, block, batch * args.channels + begin, args.length, args.y);
  }
  if (args.update)
    block.each_channel(args.state, [&](int64_t c, int64_t at) {
      const int64_t x_at = batch * args.x.strides[0] + (begin + c) * args.x.strides[2];
      update_column(args, block, at, x_at);
    });
}

// ------------------------------------------------------------------------------------------------------------ scan
// log(1 + exp(x)) = max(x, 0) + log(1 + t) with t = exp(-|x|), and log(1 + t) = 2 artanh(t / (2 + t)) by its series,
// whose argument is at most 1/3: relative error below 3e-7.
inline vf softplus(vf x) {
  const vf t = exp_f(as_f(or_i(as_i(x), set1_i(int32_t(0x80000000)))));
  const vf s = div_f(t, add_f(t, set1_f(2.0f))), square = mul_f(s, s);
  constexpr float kSeries[] = {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  vf p = set1_f(1.0f / 15);
  for (const float c : kSeries) p = fma_f(p, square, set1_f(c));
  return fma_f(add_f(s, s), p, max_f(zero_f(), x));
}

// What a scan keeps between blocks and computes of one.
struct ScanBuffers {
  float *u, *delta, *inputs, *sums, *other;     // [channel][position]
  float *state, *rates;                         // [channel][states]
  float *in_factors, *out_factors, *positions;  // [position][states], and a row of positions
  float* real;                                  // [states]: all bits set, and none in the padding
};

// b or c of a group to [position][states].
inline void gather_factors(const StridedFloats& x, const ScanArgs& args, const ChannelBlock& block, float* row,
                           float* to) {
  const int64_t stride = padded(args.states), group = block.begin / args.group_channels();
  const int64_t at = block.batch * x.strides[0] + group * x.strides[1] + block.first * x.strides[3];
  if (x.strides[2] == 1) {
    for (int64_t i = 0; i < block.count; ++i) load_strided(x, at + i * x.strides[3], 1, args.states, to + i * stride);
    return;
  }
  for (int64_t n = 0; n < args.states; ++n) {
    load_strided(x, at + n * x.strides[2], x.strides[3], block.count, row);
    for (int64_t i = 0; i < block.count; ++i) to[i * stride + n] = row[i];
  }
}

// The state of channel c through the positions of a block. With `SharedRate` all states of a channel have one rate.
template <bool SharedRate>
inline void scan_channel(const ScanBuffers& at, int64_t states, int64_t count, int64_t c) {
  const int64_t stride = padded(states);
  float* const state = at.state + c * stride;
  const float* const rates = at.rates + c * stride;
  for (int64_t i = 0; i < count; ++i) {
    const vf delta = set1_f(at.delta[c * count + i]), input = set1_f(at.inputs[c * count + i]);
    const float *in = at.in_factors + i * stride, *out = at.out_factors + i * stride;
    const vf decay = SharedRate ? exp_f(mul_f(delta, set1_f(rates[0]))) : zero_f();
    vf sum = zero_f();
    for (int64_t n = 0; n < stride; n += kLanes) {
      const vf factor = SharedRate ? decay : exp_f(mul_f(delta, load_f(rates + n)));
      vf h = fma_f(load_f(state + n), factor, mul_f(input, load_f(in + n)));
      h = as_f(and_i(as_i(h), load_i(at.real + n)));  // an infinite input would make the padding NaN
      store_f(state + n, h);
      sum = fma_f(h, load_f(out + n), sum);
    }
    at.sums[c * count + i] = reduce_add(sum);
  }
}

inline void scan_block(const ScanArgs& args, const ChannelBlock& block, const ScanBuffers& at) {
  const int64_t count = block.elements();
  gather_block(args.u, block, at.u);
  gather_block(args.delta, block, at.delta);
  if (args.delta_bias.data) gather_block(args.delta_bias, block, at.other);
  each_vector(count, [&](int64_t i) IPEX_QUANT_INLINE {
    vf delta = load_f(at.delta + i);
    if (args.delta_bias.data) delta = add_f(delta, load_f(at.other + i));
    if (args.softplus) delta = softplus(delta);
    store_f(at.delta + i, delta);
    store_f(at.inputs + i, mul_f(delta, load_f(at.u + i)));
  });
  gather_factors(args.b, args, block, at.positions, at.in_factors);
  gather_factors(args.c, args, block, at.positions, at.out_factors);
  for (int64_t c = 0; c < block.channels(); ++c)
    args.a.strides[3] == 0 ? scan_channel<true>(at, args.states, block.count, c)
                           : scan_channel<false>(at, args.states, block.count, c);
  if (args.d.data) {
    gather_block(args.d, block, at.other);
    each_vector(count, [&](int64_t i) IPEX_QUANT_INLINE {
      store_f(at.sums + i, fma_f(load_f(at.other + i), load_f(at.u + i), load_f(at.sums + i)));
    });
  }
  if (args.z.data) {
    gather_block(args.z, block, at.other);
    each_vector(count, [&](int64_t i) IPEX_QUANT_INLINE {
      store_f(at.sums + i, mul_f(load_f(at.sums + i), silu(load_f(at.other + i))));
    });
  }
  scatter_block(at.sums, block, block.batch * args.channels() + block.begin, args.length, args.y);
}

// Channels [begin, end) of a sequence, which are of one group.
inline void scan_channels(const ScanArgs& args, int64_t batch, int64_t begin, int64_t end, uint8_t* scratch) {
  const int64_t positions = args.length < kScanPositions ? args.length : kScanPositions;
  const int64_t channels = end - begin, stride = padded(args.states);
  ChannelBlock block{batch, begin, end, args.features, 0, 0};
  FloatScratch memory{reinterpret_cast<float*>(scratch)};
  std::memset(scratch, 0, size_t(scan_scratch(args, channels)));  // factors and states of what is no state
  ScanBuffers at;
  float** const blocks[] = {&at.u, &at.delta, &at.inputs, &at.sums, &at.other};
  for (float** each : blocks) *each = memory.take(channels * positions);
  at.state = memory.take(channels * stride), at.rates = memory.take(channels * stride);
  at.in_factors = memory.take(positions * stride), at.out_factors = memory.take(positions * stride);
  at.positions = memory.take(positions), at.real = memory.take(stride);
  std::memset(at.real, 0xFF, size_t(args.states) * sizeof(float));
  block.each_channel(args.state, [&](int64_t c, int64_t from) {
    load_strided(args.state, from, args.state.strides[3], args.states, at.state + c * stride);
  });
  block.each_channel(args.a, [&](int64_t c, int64_t from) {
    load_strided(args.a, from, args.a.strides[3], args.states, at.rates + c * stride);
  });
  for (; block.first < args.length; block.first += positions) {
    block.count = args.length - block.first < positions ? args.length - block.first : positions;
    scan_block(args, block, at);
  }
  block.each_channel(args.state, [&](int64_t c, int64_t to) {
    store_strided(args.state, to, args.state.strides[3], args.states, at.state + c * stride);
  });
}

}  // namespace IPEX_QUANT_ISA_NS
}  // namespace ipex_quant
