// The library `ipex_quant` of torch and the Python module whose import registers it. Nothing in csrc but ops/ talks to
// torch, and that only through its stable ABI.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "kernels.h"

namespace ipex_quant {
namespace {

int64_t isa_active() { return active_isa(); }
bool isa_supported(int64_t level) { return level >= 0 && level < kIsaLevels && supports(IsaLevel(level)); }
std::string isa_lowered() { return lowered_isa(); }
int64_t max_decode_tokens() { return kStepRows; }

}  // namespace

STABLE_TORCH_LIBRARY(ipex_quant, m) {
  m.def("isa_active() -> int");
  m.def("isa_supported(int level) -> bool");
  m.def("isa_lowered() -> str");
  m.def("max_decode_tokens() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CompositeExplicitAutograd, m) {
  m.impl("isa_active", TORCH_BOX(&isa_active));
  m.impl("isa_supported", TORCH_BOX(&isa_supported));
  m.impl("isa_lowered", TORCH_BOX(&isa_lowered));
  m.impl("max_decode_tokens", TORCH_BOX(&max_decode_tokens));
}

}  // namespace ipex_quant

// Importing ipex_quant._C runs the registrations of all ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
