// Teams of threads under the thread sanitizer: what one writes, others read after a barrier, and a task is run by one
// thread alone. All data are plain, so that an order that csrc/host/team.h does not establish is a race. Threads are
// started directly: the sanitizer does not see how OpenMP's own barriers order memory.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>
#include <vector>

#include "host/team.h"

namespace {

using ipex_quant::Barrier;
using ipex_quant::SharedTasks;
using ipex_quant::Tasks;
using ipex_quant::TeamThread;

constexpr int64_t kRounds = 300, kTasks = 97;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Runs f(member) on threads, which divide `members` between them.
template <class F>
void run_team(int64_t threads, int64_t members, F f) {
  std::vector<std::thread> team;
  for (int64_t i = 0; i < threads; ++i)
    team.emplace_back([=] { f(TeamThread{i * members / threads, (i + 1) * members / threads, members}); });
  for (std::thread& thread : team) thread.join();
}

// Every member writes its part of a row that all then read to make the next one, as layers of a decoder do.
void check_barrier(int64_t threads, int64_t members) {
  Barrier barrier;
  constexpr int64_t kColumns = 24;
  std::vector<int64_t> rows[2] = {std::vector<int64_t>(kColumns, 1), std::vector<int64_t>(kColumns)};
  run_team(threads, members, [&](const TeamThread& member) {
    int64_t idle = 0;
    for (int64_t round = 0; round < kRounds; ++round) {
      int64_t sum = 0;
      for (const int64_t x : rows[round % 2]) sum += x;
      const Tasks part = member.share(kColumns);
      for (int64_t i = part.begin; i < part.end; ++i) rows[(round + 1) % 2][size_t(i)] = sum % 1009 + i;
      round % 2 ? barrier.wait(member) : barrier.wait(member, [&] { ++idle; });
    }
  });
  int64_t sum = kColumns;
  for (int64_t round = 0; round + 1 < kRounds; ++round) sum = kColumns * (sum % 1009) + kColumns * (kColumns - 1) / 2;
  for (int64_t i = 0; i < kColumns; ++i)
    expect(rows[kRounds % 2][size_t(i)] == sum % 1009 + i, "a row after all rounds");
}

// Tasks that threads take from each other; their results are read by another thread than the one that ran them.
void check_tasks(int64_t threads) {
  Barrier barrier;
  std::vector<int64_t> runs(kTasks);
  std::deque<SharedTasks> rounds;
  for (int64_t round = 0; round < kRounds; ++round) rounds.emplace_back(kTasks, threads);
  run_team(threads, threads, [&](const TeamThread& member) {
    for (int64_t round = 0; round < kRounds; ++round) {
      if (round % threads == member.begin) std::this_thread::yield();  // the others take over from this one
      SharedTasks& shared = rounds[size_t(round)];
      for (Tasks tasks = shared.next(member.begin); tasks.begin < tasks.end; tasks = shared.next(member.begin))
        for (int64_t i = tasks.begin; i < tasks.end; ++i) ++runs[size_t(i)];
      barrier.wait(member);
      for (const int64_t count : runs) expect(count == round + 1, "every task once a round");
      barrier.wait(member);
    }
  });
}

}  // namespace

int main() {
  for (int64_t threads = 2; threads <= 4; ++threads) {
    check_barrier(threads, threads);
    check_barrier(threads, 2 * threads + 1);
    check_tasks(threads);
  }
  std::puts("team.h: no race");
}
