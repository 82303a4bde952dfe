// Memory of a call.
#pragma once

#include <cstdint>
#include <memory>

namespace ipex_quant {

using Buffer = std::unique_ptr<uint8_t[]>;

// Uninitialised, unlike std::vector.
inline Buffer make_buffer(int64_t bytes) { return Buffer(new uint8_t[size_t(bytes)]); }

}  // namespace ipex_quant
