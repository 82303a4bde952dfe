// Limits of this machine that the benchmarks divide by: memory read bandwidth and the multiply-accumulate rates of the
// instruction set that this is compiled for, on the number of threads that the measured kernels use.
#include <immintrin.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

double seconds_of(int threads, void (*work)(int, int, void*), void* context) {
  std::vector<std::thread> pool;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i, threads, context);
  work(0, threads, context);
  for (std::thread& t : pool) t.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Memory {
  const uint8_t* const* data;
  const int64_t* bytes;
  int count;
};

volatile uint64_t sink;

void read_part(int part, int parts, void* context) {
  const Memory& memory = *static_cast<Memory*>(context);
  __m256i sums[4] = {};
  for (int piece = 0; piece < memory.count; ++piece) {
    const int64_t share = memory.bytes[piece] / parts / 512 * 512;
    const uint8_t* p = memory.data[piece] + part * share;
    for (int64_t i = 0; i < share; i += 512)
      for (int j = 0; j < 16; ++j)
        sums[j % 4] =
            _mm256_xor_si256(sums[j % 4], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  }
  for (int j = 1; j < 4; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  sink = uint64_t(_mm256_extract_epi64(sums[0], 0));
}

constexpr int64_t kRounds = 4000000;  // some ten milliseconds, in which threads find their processors
constexpr int kChains = 12;  // hide a latency of 4 at 2 a cycle

// kRounds rounds of one instruction in kChains chains, which stay in registers.
#define IPEX_QUANT_CHAINS(vector, zero, instruction, constraint)              \
  vector acc[kChains], a = zero, b = zero;                                    \
  _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) acc[j] = zero;   \
  for (int64_t i = 0; i < kRounds; ++i)                                       \
    _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) asm volatile(  \
        instruction : "+" constraint(acc[j]) : constraint(a), constraint(b)); \
  _Pragma("GCC unroll 12") for (int j = 0; j < kChains; ++j) asm volatile("" : : constraint(acc[j]));

#if defined(__AVX512VNNI__)
constexpr double kOpsPerRound = kChains * 128;
void multiply(int, int, void*) { IPEX_QUANT_CHAINS(__m512i, _mm512_setzero_si512(), "vpdpbusd %2, %1, %0", "v") }
constexpr double kFloatOpsPerRound = kChains * 32;
void multiply_floats(int, int, void*) { IPEX_QUANT_CHAINS(__m512, _mm512_setzero_ps(), "vfmadd231ps %2, %1, %0", "v") }
#else
constexpr double kFloatOpsPerRound = kChains * 16;
void multiply_floats(int, int, void*) { IPEX_QUANT_CHAINS(__m256, _mm256_setzero_ps(), "vfmadd231ps %2, %1, %0", "x") }
#if defined(__AVXVNNI__)
constexpr double kOpsPerRound = kChains * 64;
void multiply(int, int, void*) {
  IPEX_QUANT_CHAINS(__m256i, _mm256_setzero_si256(), "%{vex%} vpdpbusd %2, %1, %0", "x")
}
#else
// Without VNNI the products of bytes are exact only as words, sixteen in an instruction. Those of 4-bit codes may be
// added up before they are widened, and reach 1.6 times this rate: five multiplying instructions for 128 products, not
// eight.
constexpr double kOpsPerRound = 12.0 * 32;
void multiply(int, int, void*) {
  __m256i acc[12] = {}, a = _mm256_set1_epi16(1), b = _mm256_set1_epi16(2);
  for (int64_t i = 0; i < kRounds; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      __m256i pair;
      asm volatile("vpmaddwd %2, %1, %0" : "=x"(pair) : "x"(a), "x"(b));
      acc[j] = _mm256_add_epi32(acc[j], pair);
    }
#pragma GCC unroll 12
  for (int j = 1; j < 12; ++j) acc[0] = _mm256_add_epi32(acc[0], acc[j]);
  sink = uint64_t(_mm256_extract_epi64(acc[0], 0));
}
#endif
#endif

#if defined(__AVX512BF16__)
constexpr double kBf16OpsPerRound = kChains * 64;
void multiply_bf16(int, int, void*) { IPEX_QUANT_CHAINS(__m512, _mm512_setzero_ps(), "vdpbf16ps %2, %1, %0", "v") }
#else  // which is widened to floats
constexpr double kBf16OpsPerRound = kFloatOpsPerRound;
void multiply_bf16(int part, int parts, void* context) { multiply_floats(part, parts, context); }
#endif

double rate(int threads, double operations, void (*work)(int, int, void*)) {
  return threads * kRounds * operations / seconds_of(threads, work, nullptr);
}

}  // namespace

// Memory to read, in large pages where the system gives them.
extern "C" uint8_t* allocate(int64_t bytes) {
  void* data = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  madvise(data, size_t(bytes), MADV_HUGEPAGE);
  std::memset(data, 1, size_t(bytes));
  return static_cast<uint8_t*>(data);
}

// Bytes per second of one pass over `count` pieces of memory, each of them by all threads.
extern "C" double read_bandwidths(const uint8_t* const* data, const int64_t* bytes, int count, int threads) {
  Memory memory{data, bytes, count};
  double total = 0;
  for (int i = 0; i < count; ++i) total += double(bytes[i]);
  return total / seconds_of(threads, read_part, &memory);
}

// Bytes per second of one pass over `data`.
extern "C" double read_bandwidth(const uint8_t* data, int64_t bytes, int threads) {
  return read_bandwidths(&data, &bytes, 1, threads);
}

// Operations per second, of which a multiply-accumulate is two: on bytes, float32 and bfloat16.
extern "C" double int8_rate(int threads) { return rate(threads, kOpsPerRound, multiply); }
extern "C" double float_rate(int threads) { return rate(threads, kFloatOpsPerRound, multiply_floats); }
extern "C" double bf16_rate(int threads) { return rate(threads, kBf16OpsPerRound, multiply_bf16); }
