// Which processors the threads of torch's team may run on.
#if defined(__linux__)
#include <sched.h>
#endif
#include <torch/csrc/stable/library.h>

#include <cerrno>
#include <cstring>

#include "ops/call.h"
#include "ops/check.h"

namespace ipex_quant {
namespace {

#if defined(__linux__)

// A set of processors, of the size that the caller's table has.
class ProcessorSet {
 public:
  explicit ProcessorSet(int64_t processors)
      : processors_(processors), bytes_(CPU_ALLOC_SIZE(size_t(processors))), set_(CPU_ALLOC(size_t(processors))) {
    IPEX_QUANT_CHECK(set_ != nullptr, "exchange_affinity: no memory for a set of ", processors, " processors");
    CPU_ZERO_S(bytes_, set_);
  }
  ~ProcessorSet() { CPU_FREE(set_); }
  ProcessorSet(const ProcessorSet&) = delete;
  ProcessorSet& operator=(const ProcessorSet&) = delete;

  // Of the calling thread.
  void read() {
    const int status = sched_getaffinity(0, bytes_, set_);
    IPEX_QUANT_CHECK(status == 0, "exchange_affinity: a thread's processors cannot be read into a table of ",
                     processors_, ": ", std::strerror(errno));
  }
  void apply() const {
    const int status = sched_setaffinity(0, bytes_, set_);
    IPEX_QUANT_CHECK(status == 0, "exchange_affinity: a thread cannot be bound: ", std::strerror(errno));
  }

  void load(const bool* row) {
    for (size_t p = 0; p < size_t(processors_); ++p)
      if (row[p]) CPU_SET_S(p, bytes_, set_);
  }
  void store(bool* row) const {
    for (size_t p = 0; p < size_t(processors_); ++p) row[p] = CPU_ISSET_S(p, bytes_, set_);
  }
  bool is_empty() const { return CPU_COUNT_S(bytes_, set_) == 0; }

 private:
  const int64_t processors_;
  const size_t bytes_;
  cpu_set_t* const set_;
};

// Row t of `table`, [threads, processors], becomes the affinity of thread t of the calling thread's team, which has as
// many threads; an empty row leaves it. Returns the affinities before.
Tensor exchange_affinity(const Tensor& table) {
  check_tensor("table", table, ScalarType::Bool, 2);
  const int64_t threads = table.size(0), processors = table.size(1);
  IPEX_QUANT_CHECK(threads == int64_t(torch::stable::get_num_threads()), "table: expected a row for each of ",
                   int64_t(torch::stable::get_num_threads()), " threads, got ", threads);
  IPEX_QUANT_CHECK(processors > 0 && processors <= (1 << 20), "table: expected 1 to 2^20 columns, got ", processors);
  Tensor before = torch::stable::empty({threads, processors}, ScalarType::Bool);
  const bool* rows = static_cast<const bool*>(table.const_data_ptr());
  bool* rows_before = static_cast<bool*>(before.mutable_data_ptr());
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    ProcessorSet old(processors), wanted(processors);
    old.read();
    // A thread has several rows if the system gave torch fewer threads than it asked for.
    for (int64_t t = begin; t < end; ++t) old.store(rows_before + t * processors);
    wanted.load(rows + begin * processors);
    if (!wanted.is_empty()) wanted.apply();
  });
  return before;
}

#else

Tensor exchange_affinity(const Tensor&) { fail("exchange_affinity: threads can be bound on Linux only"); }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) { m.def("exchange_affinity(Tensor table) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("exchange_affinity", TORCH_BOX(&exchange_affinity)); }

}  // namespace ipex_quant
