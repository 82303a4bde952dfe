// Float32 values as two halves of 16 bits, which ipex_quant/ops/halves.py defines. The loops are of integers and bound
// by memory: the baseline's vectors suffice, so every ISA runs the same code.
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

// The loops take values as pairs of 16 bits, lower ones first, and have no branches, so that the baseline's vectors
// hold eight elements. Inlined, the pointers would lose `__restrict`, and the loops their vectors.
#define IPEX_QUANT_LOOP __attribute__((noinline))

uint16_t mask(bool condition) { return condition ? 0xFFFF : 0; }
uint16_t sign_of(uint16_t half) { return uint16_t(int16_t(half) >> 15); }

IPEX_QUANT_LOOP void join(const uint16_t* __restrict high, const uint16_t* __restrict low, int64_t count,
                          uint16_t* __restrict values) {
  for (int64_t i = 0; i < count; ++i) {
    // Below zero, the bits would wrap around into a NaN.
    const uint16_t rest = low[i] & uint16_t(~(mask((high[i] & 0x7FFF) == 0) & sign_of(low[i])));
    values[2 * i] = rest;
    values[2 * i + 1] = uint16_t(high[i] + sign_of(rest));
  }
}

IPEX_QUANT_LOOP void split(const uint16_t* __restrict values, int64_t count, uint16_t* __restrict high,
                           uint16_t* __restrict low) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t rest = values[2 * i], top = values[2 * i + 1];
    const int16_t magnitude = int16_t(top & 0x7FFF);
    const uint16_t nan = mask(magnitude > 0x7F80) | (mask(magnitude == 0x7F80) & mask(rest != 0));
    const uint16_t kept = rest & uint16_t(~nan);
    high[i] = uint16_t(top - sign_of(kept)) | (nan & 0x0040);  // quiet
    low[i] = kept;
  }
}

// The halves of a part of the values, from element `begin` on.
struct Part {
  uint16_t *high, *low;
  int64_t begin, end;
};

// Checked arguments: the parts of `values`, one after the other, none of which overlaps another or `values`.
std::vector<Part> read_parts(const Tensor& values, const std::vector<Tensor>& highs, const std::vector<Tensor>& lows) {
  check_tensor("values", values, ScalarType::Float, 1);
  IPEX_QUANT_CHECK(highs.size() == lows.size(), "lows: expected ", highs.size(), " tensors as highs has, got ",
                   lows.size());
  std::vector<Part> parts;
  std::vector<std::pair<uintptr_t, uintptr_t>> extents;
  const auto extend = [&](const void* data, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    if (bytes) extents.emplace_back(begin, begin + uintptr_t(bytes));
  };
  extend(values.const_data_ptr(), 4 * values.numel());
  int64_t begin = 0;
  for (size_t i = 0; i < highs.size(); ++i) {
    check_tensor("highs", highs[i], ScalarType::BFloat16, 1);
    check_tensor("lows", lows[i], ScalarType::Short, 1);
    const int64_t count = highs[i].numel();
    IPEX_QUANT_CHECK(lows[i].numel() == count, "lows: expected ", count, " elements as in highs, got ",
                     lows[i].numel());
    const Part part{static_cast<uint16_t*>(highs[i].mutable_data_ptr()),
                    static_cast<uint16_t*>(lows[i].mutable_data_ptr()), begin, begin + count};
    extend(part.high, 2 * count);
    extend(part.low, 2 * count);
    begin = part.end;
    parts.push_back(part);
  }
  IPEX_QUANT_CHECK(values.numel() == begin, "values: expected ", begin, " elements as in all highs, got ",
                   values.numel());
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i)
    IPEX_QUANT_CHECK(extents[i - 1].second <= extents[i].first,
                     "values, highs, lows: expected tensors that do not overlap");
  return parts;
}

// Runs f(part, from, to) for the elements [from, to) of every part, counted within it, on all threads.
template <class F>
void each_part(const std::vector<Part>& parts, F f) {
  const auto ends_before = [](const Part& part, int64_t at) { return part.end <= at; };
  parallel(parts.empty() ? 0 : parts.back().end, kGrain, [&](int64_t begin, int64_t end) {
    auto part = std::lower_bound(parts.begin(), parts.end(), begin, ends_before);
    for (; part != parts.end() && part->begin < end; ++part)
      f(*part, std::max(begin, part->begin) - part->begin, std::min(end, part->end) - part->begin);
  });
}

void join_halves(std::vector<Tensor> highs, std::vector<Tensor> lows, Tensor values) {
  const std::vector<Part> parts = read_parts(values, highs, lows);
  uint16_t* data = static_cast<uint16_t*>(values.mutable_data_ptr());
  each_part(parts, [&](const Part& part, int64_t from, int64_t to) {
    join(part.high + from, part.low + from, to - from, data + 2 * (part.begin + from));
  });
}

void split_halves(Tensor values, std::vector<Tensor> highs, std::vector<Tensor> lows) {
  const std::vector<Part> parts = read_parts(values, highs, lows);
  const uint16_t* data = static_cast<const uint16_t*>(values.const_data_ptr());
  each_part(parts, [&](const Part& part, int64_t from, int64_t to) {
    split(data + 2 * (part.begin + from), to - from, part.high + from, part.low + from);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("join_halves(Tensor[] highs, Tensor[] lows, Tensor(a!) values) -> ()");
  m.def("split_halves(Tensor values, Tensor(a!)[] highs, Tensor(b!)[] lows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) {
  m.impl("join_halves", TORCH_BOX(&join_halves));
  m.impl("split_halves", TORCH_BOX(&split_halves));
}

}  // namespace ipex_quant
