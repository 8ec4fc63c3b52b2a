// Running work on the threads the caller lends.
#ifndef SPARSECC_SCHEDULE_H_
#define SPARSECC_SCHEDULE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "common.h"
#include "sparsecc/c_api.h"

namespace sparsecc {

// A number of threads written in `text`, 0 if it is none.
int32_t parse_threads(const char* text);
// What $SPARSECC_THREADS says now, 0 if nothing.
int32_t threads_asked_for();
int32_t threads_of_machine();

inline int64_t thread_count(const sparsecc_executor* executor) {
  return executor == nullptr || executor->parallel_for == nullptr ? 1 : std::max(1, executor->threads);
}

// How many tasks to cut the work in: a few per thread even out what the prefix sums do not see.
inline int64_t wanted_tasks(int64_t threads) { return threads == 1 ? 1 : threads * 2; }
inline int64_t wanted_tasks(const sparsecc_executor* executor) { return wanted_tasks(thread_count(executor)); }

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

// Rows of x in chunks of whole panels and nearly equal size.
class RowChunks {
 public:
  // At most `fit` panels of `height` rows in each; enough for the tasks wanted, and as many for every thread as for
  // the others, where there are panels for that.
  RowChunks(int64_t rows, int64_t height, int64_t fit, int64_t threads)
      : rows_(rows), height_(height), panels_((rows + height - 1) / height) {
    fit = std::max<int64_t>(fit, 1);
    count_ = std::max((panels_ + fit - 1) / fit, std::min(wanted_tasks(threads), panels_));
    const int64_t even = (count_ + threads - 1) / threads * threads;
    if (even <= panels_) count_ = even;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t chunk) const { return chunk * panels_ / count_ * height_; }
  int64_t size(int64_t chunk) const { return std::min(rows_, begin(chunk + 1)) - begin(chunk); }

 private:
  int64_t rows_, height_, panels_, count_;
};

}  // namespace sparsecc
#endif
