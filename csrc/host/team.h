// Threads that run one function at the same time, meet at barriers in it, and divide tasks. No torch here.
#pragma once

#include <algorithm>
#include <atomic>
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

// All threads of a team wait here for each other.
class Barrier {
 public:
  // Calls idle() again and again while it waits.
  template <class F>
  void wait(const TeamThread& thread, F idle) {
    const int64_t round = round_.load(std::memory_order_acquire), count = thread.end - thread.begin;
    if (arrived_.fetch_add(count, std::memory_order_acq_rel) + count == thread.size) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
      idle();
      if (i < kSpins)
        pause();
      else
        std::this_thread::yield();  // another process may have the processor that they need
    }
  }
  void wait(const TeamThread& thread) {
    wait(thread, [] {});
  }

 private:
  static constexpr int64_t kSpins = 4096;
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace ipex_quant
