// Argument checks of the native ops. Python wrappers check first and with more words; these keep the native code within
// bounds for any argument whatever.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>

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

inline void check_tensor(const char* name, const Tensor& t, ScalarType dtype, int64_t dim) {
  IPEX_QUANT_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  IPEX_QUANT_CHECK(t.scalar_type() == dtype, name, ": unexpected dtype ", int(t.scalar_type()), ", expected ",
                   int(dtype));
  IPEX_QUANT_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
  IPEX_QUANT_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_shape(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  IPEX_QUANT_CHECK(t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows, ", ", columns,
                   "], got [", t.size(0), ", ", t.size(1), "]");
}

}  // namespace ipex_quant
