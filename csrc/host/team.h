// Threads that run one function at the same time, meet at barriers in it, and divide tasks. No torch here.
#pragma once

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <thread>

namespace ipex_quant {

struct Tasks {
  int64_t begin, end;
};

// Tasks that threads divide so that each goes through a part of its own from the front, in long forward streams, as
// memory is read fastest; one that is through takes over from others, which the system may have slowed down.
class SharedTasks {
 public:
  SharedTasks(int64_t count, int64_t threads) : threads_(threads), parts_(new Part[size_t(threads)]) {
    for (int64_t i = 0; i < threads; ++i) {
      parts_[size_t(i)].next.store(i * count / threads, std::memory_order_relaxed);
      parts_[size_t(i)].end = (i + 1) * count / threads;
    }
  }

  // The next run for a thread; empty when there is none.
  Tasks next(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
      Part& part = parts_[size_t((thread + i) % threads_)];
      int64_t begin = part.next.load(std::memory_order_relaxed);
      while (begin < part.end) {
        const int64_t end = begin + (part.end - begin + 1) / 2;
        if (part.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
      }
    }
    return {0, 0};
  }

 private:
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads_;
  const std::unique_ptr<Part[]> parts_;
};

// Places [begin, end) in a team of `size` that one thread has: where there are fewer threads than places, several.
struct TeamThread {
  int64_t begin, end, size;

  // Its share of `count` equal parts.
  Tasks share(int64_t count) const { return {begin * count / size, end * count / size}; }
};

// All threads of a team wait here for each other: they spin for as long as threads that run take to arrive, and then
// sleep, since another process may have the processor of those that they wait for. The system gives one that wakes up
// its turn at once, where one that yields comes after a process that spins.
class Barrier {
 public:
  // Calls idle() again and again while it spins.
  template <class F>
  void wait(const TeamThread& thread, F idle) {
    const uint32_t round = round_.load(std::memory_order_acquire);
    const int64_t count = thread.end - thread.begin;
    if (arrived_.fetch_add(count, std::memory_order_acq_rel) + count == thread.size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1);
      if (sleepers_.load() > 0) wake();
      return;
    }
    for (int64_t i = 0; i < kSpins; ++i) {
      if (round_.load(std::memory_order_acquire) != round) return;
      idle();
      pause();
    }
    sleepers_.fetch_add(1);
    while (round_.load() == round) sleep(round);
    sleepers_.fetch_sub(1);
  }
  void wait(const TeamThread& thread) {
    wait(thread, [] {});
  }

 private:
  static constexpr int64_t kSpins = 2048;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
#if defined(__linux__)
  static_assert(sizeof(std::atomic<uint32_t>) == 4, "the system waits for a word of memory");
  // Returns at once if the round is over.
  void sleep(uint32_t round) { syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
  void sleep(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif

  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int32_t> sleepers_{0};
};

}  // namespace ipex_quant
