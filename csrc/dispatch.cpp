#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ipex_quant {

extern const KernelTable kGenericTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table, kAvx2VnniTable, kAvx512VnniTable, kAvx512Bf16Table;
#endif

namespace {

constexpr const char* kNames[kIsaLevels] = {"generic", "avx2", "avx512_vnni", "avx512_bf16"};

#if defined(__x86_64__)
// Leaf 7, subleaf 1, of a processor whose operating system saves the wide registers (checked through AVX2).
bool has_leaf7_1(uint32_t bit) {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> bit & 1);
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx_vnni() { return has_avx2() && has_leaf7_1(4); }
bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512_vnni() && has_leaf7_1(5); }
#endif

const KernelTable& table_of(IsaLevel level) {
#if defined(__x86_64__)
  if (level == kAvx512Bf16) return kAvx512Bf16Table;
  if (level == kAvx512Vnni) return kAvx512VnniTable;
  if (level == kAvx2) return has_avx_vnni() ? kAvx2VnniTable : kAvx2Table;
#endif
  (void)level;
  return kGenericTable;
}

IsaLevel choose_isa() {
  const IsaLevel best = supported_isa();
  const char* wanted = std::getenv("IPEX_QUANT_ISA");
  if (!wanted || !*wanted) return best;
  std::string choices;
  for (int32_t level = 0; level <= best; ++level) {
    if (!std::strcmp(wanted, kNames[level])) return IsaLevel(level);
    choices += std::string(level ? ", " : "") + kNames[level];
  }
  throw std::runtime_error(std::string("IPEX_QUANT_ISA: expected one of ") + choices + " on this CPU, got '" + wanted +
                           "'");
}

}  // namespace

IsaLevel supported_isa() {
#if defined(__x86_64__)
  if (has_avx512_bf16()) return kAvx512Bf16;
  if (has_avx512_vnni()) return kAvx512Vnni;
  if (has_avx2()) return kAvx2;
#endif
  return kGeneric;
}

IsaLevel active_isa() {
  static const IsaLevel level = choose_isa();  // a throw leaves it unset, so that the next call throws again
  return level;
}

const KernelTable& kernels() {
  static const KernelTable& table = table_of(active_isa());
  return table;
}

}  // namespace ipex_quant
