#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "host/self_test.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ipex_quant {

extern const KernelTable kGenericTable;
extern const KernelPatch kAmxEmulatedKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table, kAvx2VnniTable, kAvx2VnniEmulatedTable, kAvx512VnniTable, kAvx512Bf16Table;
extern const KernelPatch kAmxKernels;
#endif

namespace {

constexpr const char* kNames[kIsaLevels] = {"generic",     "avx2", "avx2_vnni",          "avx512_vnni",
                                            "avx512_bf16", "amx",  "avx2_vnni_emulated", "amx_emulated"};

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
bool has_amx() {
  constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24, kInt8Dot = 1u << 25, kAll = kBf16 | kTile | kInt8Dot;
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kAll) != kAll) return false;
  constexpr uint32_t kTileState = 3u << 17;  // that the operating system saves
  asm("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileState) == kTileState;
}
#endif

// Asks the operating system for the tiles, which a process has only from then on.
bool request_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

KernelTable with_tiles(KernelTable table, const KernelPatch& own) {
  table.gemm_tile = own.gemm_tile;
  table.int8_tile = own.int8_tile;
  table.attention_scratch = own.attention_scratch;
  table.attention_task = own.attention_task;
  table.bf16_dot = table.tiles = true;
  return table;
}

KernelTable table_of(IsaLevel level) {
  if (level == kAmxEmulated) return with_tiles(kGenericTable, kAmxEmulatedKernels);
#if defined(__x86_64__)
  if (level == kAmx) return with_tiles(kAvx512Bf16Table, kAmxKernels);
  if (level == kAvx512Bf16) return kAvx512Bf16Table;
  if (level == kAvx512Vnni) return kAvx512VnniTable;
  if (level == kAvx2Vnni) return kAvx2VnniTable;
  if (level == kAvx2VnniEmulated) return kAvx2VnniEmulatedTable;
  if (level == kAvx2) return kAvx2Table;
#endif
  return kGenericTable;
}

IsaLevel wanted_isa() {
  const char* wanted = std::getenv("IPEX_QUANT_ISA");
  const bool any = !wanted || !*wanted;
  std::string choices;
  IsaLevel best = kGeneric;
  for (int32_t i = 0; i < kIsaLevels; ++i) {
    const IsaLevel level = IsaLevel(i);
    if (!supports(level)) continue;
    if (!any && !std::strcmp(wanted, kNames[level])) return level;
    if (level > kAmx) continue;
    best = level;
    choices += std::string(level ? ", " : "") + kNames[level];
  }
  if (any) return best;
  throw std::runtime_error(std::string("IPEX_QUANT_ISA: expected one of ") + choices + " on this CPU, got '" + wanted +
                           "'");
}

struct Choice {
  IsaLevel level;
  std::string lowered;
};

// Tiles have to be permitted, and to compute what the other levels do.
Choice choose_isa() {
  const IsaLevel level = wanted_isa();
  if (level != kAmx && level != kAmxEmulated) return {level, ""};
  const char* why = nullptr;
  if (level == kAmx && !request_tiles())
    why = "the operating system does not permit its tiles";
  else if (!same_product(table_of(level), kGenericTable))
    why = "a product by its tiles is not what it should be";
  if (!why) return {level, ""};
  const IsaLevel below = level == kAmx ? kAvx512Bf16 : kGeneric;
  return {below, std::string("instruction set ") + kNames[level] + ": " + why + "; " + kNames[below] + " is used"};
}

const Choice& chosen_isa() {
  static const Choice choice = choose_isa();  // a throw leaves it unset, so that the next call throws again
  return choice;
}

}  // namespace

bool supports(IsaLevel level) {
  switch (level) {
    case kGeneric:
    case kAmxEmulated:
      return true;
#if defined(__x86_64__)
    case kAvx2:
    case kAvx2VnniEmulated:
      return has_avx2();
    case kAvx2Vnni:
      return has_avx_vnni();
    case kAvx512Vnni:
      return has_avx512_vnni();
    case kAvx512Bf16:
      return has_avx512_bf16();
    case kAmx:
      return has_amx();
#endif
    default:
      return false;
  }
}

IsaLevel active_isa() { return chosen_isa().level; }
const char* lowered_isa() { return chosen_isa().lowered.c_str(); }

const KernelTable& kernels() {
  static const KernelTable table = table_of(active_isa());
  return table;
}

}  // namespace ipex_quant
