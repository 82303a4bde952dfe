// What the ops share: memory, threads, and the checks that go with a linear's result.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <optional>
#include <vector>

#include "host/buffer.h"
#include "host/team.h"
#include "kernels.h"
#include "ops/check.h"

namespace ipex_quant {

// Rethrows the first exception of f, whose text torch's own loop would lose.
template <class F>
void parallel(int64_t count, int64_t grain, F f) {
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Runs f(next) on every thread, where next() hands out runs [begin, end) of at most `run` tasks until it returns an
// empty one: threads that the system slows down take fewer.
template <class F>
void parallel_tasks(int64_t count, int64_t run, F f) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t begin = taken.fetch_add(run, std::memory_order_relaxed);
    return Tasks{std::min(begin, count), std::min(begin + run, count)};
  };
  const int64_t workers = std::min<int64_t>((count + run - 1) / run, torch::stable::get_num_threads());
  parallel(workers, 1, [&](int64_t, int64_t) { f(next); });
}

// Likewise with `SharedTasks`.
template <class F>
void parallel_streams(int64_t count, int64_t threads, F f) {
  const int64_t workers = std::min(count, threads);
  SharedTasks tasks(count, workers);
  parallel(workers, 1, [&](int64_t thread, int64_t) { f([&] { return tasks.next(thread); }); });
}
template <class F>
void parallel_streams(int64_t count, F f) {
  parallel_streams(count, torch::stable::get_num_threads(), f);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

// torch::stable::contiguous calls an op even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A new contiguous tensor in the dtype of x; torch::stable::empty looks its op up by name, which takes twice as long.
inline Tensor empty_in_dtype_of(const Tensor& x, const int64_t* shape, int64_t dim) {
  std::vector<int64_t> strides(size_t(dim), 1);
  for (int64_t i = dim - 1; i > 0; --i) strides[size_t(i - 1)] = strides[size_t(i)] * std::max<int64_t>(shape[i], 1);
  int32_t dtype;
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, shape, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}
inline Tensor empty_in_dtype_of(const Tensor& x, const int64_t* shape) { return empty_in_dtype_of(x, shape, x.dim()); }
inline Tensor empty_in_dtype_of(const Tensor& x, std::initializer_list<int64_t> shape) {
  return empty_in_dtype_of(x, shape.begin(), int64_t(shape.size()));
}

inline FloatType float_type(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      fail(name, ": expected float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  }
}

// Large pages spare the decode kernels, which read all of a weight once a token, most address translation.
inline void advise_huge_pages(uint8_t* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may be refused
#endif
}

inline void check_post_op(int64_t post_op, size_t others) {
  IPEX_QUANT_CHECK(post_op >= kNone && post_op < kPostOpCount, "post_op: expected 0..8, got ", post_op);
  const size_t operands = post_op == kAddAdd ? 2 : post_op == kAdd || post_op == kMul ? 1 : 0;
  IPEX_QUANT_CHECK(others == operands, "others: expected ", operands, " tensors, got ", others);
}

inline bool is_activation(int64_t op) { return (op >= kRelu && op <= kSilu) || op == kRelu2; }

// The post op that may stand before a product: what gates have.
inline PostOp check_activation(int64_t activation) {
  IPEX_QUANT_CHECK(activation == kGelu || activation == kNewGelu || activation == kSilu,
                   "activation: expected 2 (gelu), 3 (gelu by tanh) or 4 (silu), got ", activation);
  return PostOp(activation);
}

// The data of a float32 vector, or null without one.
inline const float* optional_vector(const char* name, const std::optional<Tensor>& t, int64_t length) {
  if (!t) return nullptr;
  check_tensor(name, *t, ScalarType::Float, 1);
  IPEX_QUANT_CHECK(t->size(0) == length, name, ": expected ", length, " elements, got ", t->size(0));
  return static_cast<const float*>(t->const_data_ptr());
}

// The data of a weight or bias of a norm over `k` features of x.
inline const void* norm_vector(const char* name, const Tensor& t, ScalarType x, int64_t k) {
  check_float32_or(name, t, x);
  IPEX_QUANT_CHECK(t.dim() == 1 && t.size(0) == k && t.is_contiguous(), name, ": expected shape [", k,
                   "], contiguous, got ", shape_of(t));
  return t.const_data_ptr();
}

// What `y` is computed with. Checks `others`, which have y's shape and the dtype `type`, and makes them contiguous:
// they own the memory that the result points to.
inline Output make_output(Tensor& y, ScalarType type, const float* bias, int64_t post_op, std::vector<Tensor>& others) {
  Output output{};
  output.n = output.stride = y.size(y.dim() - 1);
  output.bias = bias;
  output.post_op = PostOp(post_op);
  output.type = float_type("dtype", type);
  output.y = y.mutable_data_ptr();
  for (size_t i = 0; i < others.size(); ++i) {
    Tensor& other = others[i];
    check_cpu("others", other);
    IPEX_QUANT_CHECK(other.scalar_type() == type, "others: expected dtype ", torch::headeronly::toString(type),
                     ", got ", torch::headeronly::toString(other.scalar_type()));
    IPEX_QUANT_CHECK(other.dim() == y.dim() && std::equal(y.sizes().begin(), y.sizes().end(), other.sizes().begin()),
                     "others: expected the shape of the result, ", shape_of(y), ", got ", shape_of(other));
    other = as_contiguous(other);
    output.others[i] = other.const_data_ptr();
  }
  return output;
}

}  // namespace ipex_quant
