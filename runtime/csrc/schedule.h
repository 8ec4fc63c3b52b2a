// Cutting work by stored weight and running it on the threads the caller lends.
#ifndef SPARSECC_SCHEDULE_H_
#define SPARSECC_SCHEDULE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "common.h"
#include "sparsecc/c_api.h"

namespace sparsecc {

inline int64_t thread_count(const sparsecc_executor* executor) {
  return executor == nullptr || executor->parallel_for == nullptr ? 1 : std::max(1, executor->threads);
}

// How many tasks to cut the work in: a few per thread even out what the prefix sums do not see.
inline int64_t wanted_tasks(const sparsecc_executor* executor) {
  const int64_t threads = thread_count(executor);
  return threads == 1 ? 1 : threads * 2;
}

// Runs task(0..tasks-1). Tasks come from outside threads, so nothing may be thrown through them:
// running out of memory in one is reported when all are done.
template <class Task>
void run_tasks(const sparsecc_executor* executor, int64_t tasks, const Task& task) {
  if (tasks <= 1 || thread_count(executor) == 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  struct Shared {
    const Task& task;
    std::atomic<bool> no_memory{false};
  } shared{task};
  const auto call = [](void* arg, int64_t i) noexcept {
    Shared& s = *static_cast<Shared*>(arg);
    try {
      s.task(i);
    } catch (const std::bad_alloc&) {
      s.no_memory.store(true);
    }
  };
  executor->parallel_for(executor->context, tasks, call, &shared);
  if (shared.no_memory.load()) throw std::bad_alloc();
}

// What a group of outputs costs beside its blocks, in blocks.
constexpr int64_t kGroupOverhead = 4;

// Cuts units [0, n) in at most `parts` ranges of nearly equal weight, where prefix[i] is the weight
// before unit i and every unit costs `overhead` on top. Returns the cut points, parts + 1 of them.
inline std::vector<int64_t> cut_by_weight(const int64_t* prefix, int64_t n, int64_t parts, int64_t overhead) {
  parts = std::clamp<int64_t>(parts, 1, std::max<int64_t>(n, 1));
  std::vector<int64_t> cuts{0};
  const auto cost = [&](int64_t i) { return prefix[i] - prefix[0] + i * overhead; };
  for (int64_t part = 1; part < parts; ++part) {
    const double goal = static_cast<double>(cost(n)) * static_cast<double>(part) / static_cast<double>(parts);
    int64_t low = cuts.back(), high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<double>(cost(middle)) < goal) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    // The nearer of the two units around the goal.
    if (low > cuts.back() &&
        goal - static_cast<double>(cost(low - 1)) < static_cast<double>(cost(low)) - goal)
      --low;
    cuts.push_back(low);
  }
  cuts.push_back(n);
  return cuts;
}

}  // namespace sparsecc
#endif
