// Float32 values as two halves of 16 bits, which ipex_quant/ops/halves.py defines. The loops are bound by memory and
// have the same bits in wider vectors, which the compiler's clones choose: they are not in the tables of an ISA level.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "ops/call.h"
#include "ops/check.h"

namespace ipex_quant {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread, as in torch

// The loops take values as pairs of 16 bits, lower ones first, and have no branches, so that a vector holds as many
// elements as it can. Inlined, the pointers would lose `__restrict`, and the loops their vectors. Their clones have the
// same bits, as `fmaf` rounds once with and without an instruction for it.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define IPEX_QUANT_LOOP(isa) __attribute__((noinline, target_clones("default", isa)))
#else
#define IPEX_QUANT_LOOP(isa) __attribute__((noinline))
#endif

using Pairs = uint16_t __attribute__((may_alias));  // of float32 values

uint16_t mask(bool condition) { return condition ? 0xFFFF : 0; }
uint16_t sign_of(uint16_t half) { return uint16_t(int16_t(half) >> 15); }

IPEX_QUANT_LOOP("avx2")
void join(const uint16_t* __restrict high, const uint16_t* __restrict low, int64_t count, Pairs* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    // Below zero, the bits would wrap around into a NaN.
    const uint16_t rest = low[i] & uint16_t(~(mask((high[i] & 0x7FFF) == 0) & sign_of(low[i])));
    values[2 * i] = rest;
    values[2 * i + 1] = uint16_t(high[i] + sign_of(rest));
  }
}

IPEX_QUANT_LOOP("avx2")
void split(const Pairs* __restrict values, int64_t count, uint16_t* __restrict high, uint16_t* __restrict low) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t rest = values[2 * i], top = values[2 * i + 1];
    const int16_t magnitude = int16_t(top & 0x7FFF);
    const uint16_t nan = mask(magnitude > 0x7F80) | (mask(magnitude == 0x7F80) & mask(rest != 0));
    const uint16_t kept = rest & uint16_t(~nan);
    high[i] = uint16_t(top - sign_of(kept)) | (nan & 0x0040);  // quiet
    low[i] = kept;
  }
}

IPEX_QUANT_LOOP("avx2")
void widen(const uint16_t* __restrict bfloat16, int64_t count, Pairs* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    values[2 * i] = 0;
    values[2 * i + 1] = bfloat16[i];
  }
}

IPEX_QUANT_LOOP("fma")
void scale(float* __restrict y, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] *= factor;
}

// y = y * factor + x * other
IPEX_QUANT_LOOP("fma")
void blend(float* __restrict y, float factor, const float* __restrict x, float other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = __builtin_fmaf(x[i], other, y[i] * factor);
}

// y += x * factor
IPEX_QUANT_LOOP("fma")
void add(float* __restrict y, const float* __restrict x, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = __builtin_fmaf(x[i], factor, y[i]);
}

// The halves of a part of the values, from element `begin` on.
struct Part {
  uint16_t *high, *low;
  int64_t begin, end;
};

// Collects checked arguments, of which those that are written must not overlap.
class PartReader {
 public:
  std::vector<Part> read(const std::vector<Tensor>& highs, const std::vector<Tensor>& lows) {
    check_count("lows", lows, highs);
    std::vector<Part> parts;
    int64_t begin = 0;
    for (size_t i = 0; i < highs.size(); ++i) {
      check_tensor("highs", highs[i], ScalarType::BFloat16, 1);
      check_like("lows", lows[i], ScalarType::Short, highs[i]);
      const int64_t end = begin + highs[i].numel();
      parts.push_back(
          {static_cast<uint16_t*>(written(highs[i])), static_cast<uint16_t*>(written(lows[i])), begin, end});
      begin = end;
    }
    return parts;
  }

  static void check_count(const char* name, const std::vector<Tensor>& list, const std::vector<Tensor>& highs) {
    IPEX_QUANT_CHECK(list.size() == highs.size(), name, ": expected ", highs.size(), " tensors as in highs, got ",
                     list.size());
  }
  static void check_like(const char* name, const Tensor& t, ScalarType dtype, const Tensor& high) {
    check_tensor(name, t, dtype, 1);
    IPEX_QUANT_CHECK(t.numel() == high.numel(), name, ": expected ", high.numel(), " elements as in highs, got ",
                     t.numel());
  }

  // The data of a tensor that is written.
  void* written(const Tensor& t) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (t.numel()) extents_.emplace_back(begin, begin + uintptr_t(t.numel()) * t.element_size());
    return t.mutable_data_ptr();
  }

  void check_apart() {
    std::sort(extents_.begin(), extents_.end());
    for (size_t i = 1; i < extents_.size(); ++i)
      IPEX_QUANT_CHECK(extents_[i - 1].second <= extents_[i].first,
                       "highs, lows and what goes with them: expected tensors that do not overlap");
  }

 private:
  std::vector<std::pair<uintptr_t, uintptr_t>> extents_;
};

// The parts of `values`, one after the other.
std::vector<Part> parts_of(const Tensor& values, const std::vector<Tensor>& highs, const std::vector<Tensor>& lows) {
  check_tensor("values", values, ScalarType::Float, 1);
  PartReader reader;
  std::vector<Part> parts = reader.read(highs, lows);
  const int64_t count = parts.empty() ? 0 : parts.back().end;
  IPEX_QUANT_CHECK(values.numel() == count, "values: expected ", count, " elements as in all highs, got ",
                   values.numel());
  reader.written(values);
  reader.check_apart();
  return parts;
}

// Runs f(i, from, to) for the elements [from, to) of every part i, counted within it, on all threads.
template <class F>
void each_part(const std::vector<Part>& parts, F f) {
  const auto ends_before = [](const Part& part, int64_t at) { return part.end <= at; };
  parallel(parts.empty() ? 0 : parts.back().end, kGrain, [&](int64_t begin, int64_t end) {
    auto part = std::lower_bound(parts.begin(), parts.end(), begin, ends_before);
    for (; part != parts.end() && part->begin < end; ++part)
      f(size_t(part - parts.begin()), std::max(begin, part->begin) - part->begin,
        std::min(end, part->end) - part->begin);
  });
}

void join_halves(std::vector<Tensor> highs, std::vector<Tensor> lows, Tensor values) {
  const std::vector<Part> parts = parts_of(values, highs, lows);
  uint16_t* data = static_cast<uint16_t*>(values.mutable_data_ptr());
  each_part(parts, [&](size_t i, int64_t from, int64_t to) {
    const Part& part = parts[i];
    join(part.high + from, part.low + from, to - from, data + 2 * (part.begin + from));
  });
}

void split_halves(Tensor values, std::vector<Tensor> highs, std::vector<Tensor> lows) {
  const std::vector<Part> parts = parts_of(values, highs, lows);
  const uint16_t* data = static_cast<const uint16_t*>(values.const_data_ptr());
  each_part(parts, [&](size_t i, int64_t from, int64_t to) {
    const Part& part = parts[i];
    split(data + 2 * (part.begin + from), to - from, part.high + from, part.low + from);
  });
}

// Blocks are read and written in turns, in which the memory would idle: so it fetches for the fourth block from here.
constexpr int64_t kBlock = 256, kAhead = 4 * kBlock;

// Asks for the block of x that starts at x; past the end of a tensor, without effect.
template <class T>
void prefetch(const T* x) {
  constexpr int64_t kLine = 64;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x);
  for (uintptr_t at = begin; at < begin + kBlock * sizeof(T); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at));
}

struct SgdSettings {
  float lr, momentum, undamped, weight_decay, factor;
  bool nesterov, maximize, first;
};

// One update of `count` values, with the roundings of torch's fused kernel as it is compiled for AVX2 and higher.
void update(const SgdSettings& s, float* values, float* grads, float* momentum, int64_t count) {
  if (s.factor != 1) scale(grads, s.factor, count);
  if (s.maximize) scale(grads, -1, count);
  if (s.weight_decay != 0) add(grads, values, s.weight_decay, count);
  const float* steps = grads;
  if (momentum) {
    if (s.first)
      std::copy_n(grads, count, momentum);
    else
      blend(momentum, s.momentum, grads, s.undamped, count);
    if (s.nesterov)
      add(grads, momentum, s.momentum, count);
    else
      steps = momentum;
  }
  add(values, steps, -s.lr, count);
}

void sgd_halves(std::vector<Tensor> highs, std::vector<Tensor> lows, std::vector<Tensor> grads,
                std::vector<Tensor> momenta, double lr, double momentum, double dampening, double weight_decay,
                double factor, bool nesterov, bool maximize, bool first) {
  const SgdSettings settings{
      float(lr), float(momentum), float(1 - dampening), float(weight_decay), float(factor), nesterov, maximize, first};
  PartReader reader;
  const std::vector<Part> parts = reader.read(highs, lows);
  PartReader::check_count("grads", grads, highs);
  if (!momenta.empty()) PartReader::check_count("momenta", momenta, highs);
  std::vector<const uint16_t*> gradients;
  std::vector<float*> buffers(parts.size(), nullptr);
  for (size_t i = 0; i < parts.size(); ++i) {
    PartReader::check_like("grads", grads[i], ScalarType::BFloat16, highs[i]);
    gradients.push_back(static_cast<const uint16_t*>(grads[i].const_data_ptr()));
    if (momenta.empty()) continue;
    PartReader::check_like("momenta", momenta[i], ScalarType::Float, highs[i]);
    buffers[i] = static_cast<float*>(reader.written(momenta[i]));
  }
  reader.check_apart();
  each_part(parts, [&](size_t i, int64_t from, int64_t to) {
    alignas(64) float values[kBlock], gradient[kBlock];
    Pairs* const pairs = reinterpret_cast<Pairs*>(values);
    for (int64_t at = from; at < to; at += kBlock) {
      const int64_t count = std::min(kBlock, to - at);
      if (at + kAhead < to) {
        prefetch(parts[i].high + at + kAhead);
        prefetch(parts[i].low + at + kAhead);
        prefetch(gradients[i] + at + kAhead);
        if (buffers[i]) prefetch(buffers[i] + at + kAhead);
      }
      join(parts[i].high + at, parts[i].low + at, count, pairs);
      widen(gradients[i] + at, count, reinterpret_cast<Pairs*>(gradient));
      update(settings, values, gradient, buffers[i] ? buffers[i] + at : nullptr, count);
      split(pairs, count, parts[i].high + at, parts[i].low + at);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("join_halves(Tensor[] highs, Tensor[] lows, Tensor(a!) values) -> ()");
  m.def("split_halves(Tensor values, Tensor(a!)[] highs, Tensor(b!)[] lows) -> ()");
  m.def(
      "sgd_halves(Tensor(a!)[] highs, Tensor(b!)[] lows, Tensor[] grads, Tensor(c!)[] momenta, float lr, "
      "float momentum, float dampening, float weight_decay, float factor, bool nesterov, bool maximize, bool first) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("join_halves", TORCH_BOX(&join_halves));
  m.impl("split_halves", TORCH_BOX(&split_halves));
  m.impl("sgd_halves", TORCH_BOX(&sgd_halves));
}

}  // namespace ipex_quant
