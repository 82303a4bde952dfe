// Argument checks of the native ops, which keep the native code within bounds for any argument that Python can pass.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

// Unlike torch's macro, without the path of the source file in the message.
#define IPEX_QUANT_CHECK(condition, ...) \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (0)

namespace ipex_quant {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[2, 3]"
inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline void check_cpu(const char* name, const Tensor& t) {
  IPEX_QUANT_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}

inline void check_tensor(const char* name, const Tensor& t, ScalarType dtype, int64_t dim) {
  check_cpu(name, t);
  IPEX_QUANT_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", torch::headeronly::toString(dtype), ", got ",
                   torch::headeronly::toString(t.scalar_type()));
  IPEX_QUANT_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got shape ", shape_of(t));
  IPEX_QUANT_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// The dtypes that norms and rotations take beside `x`.
inline void check_float32_or(const char* name, const Tensor& t, ScalarType x) {
  check_cpu(name, t);
  IPEX_QUANT_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == x, name,
                   ": expected float32 or the dtype of x, ", torch::headeronly::toString(x), ", got ",
                   torch::headeronly::toString(t.scalar_type()));
}

// Indices of `bound` items, which are all read.
template <class Index>
void check_indices(const char* name, const Index* indices, int64_t count, int64_t bound) {
  for (int64_t i = 0; i < count; ++i)
    IPEX_QUANT_CHECK(indices[i] >= 0 && indices[i] < bound, name, ": expected values in 0..", bound - 1, ", got ",
                     indices[i]);
}

inline void check_shape(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  IPEX_QUANT_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ", columns,
                   "], got ", shape_of(t));
}

}  // namespace ipex_quant
