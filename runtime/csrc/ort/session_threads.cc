#include "session_threads.h"

#include <algorithm>
#include <thread>

#include "busy.h"
#include "kernel.h"
#include "schedule.h"

namespace sparsecc::ort {
namespace {

constexpr int32_t kConvinced = 16;  // runs without company that make a node cut for one thread
constexpr uint32_t kLookAgain = 16;

}  // namespace

int32_t ThreadGauge::hint() {
  static const int32_t asked_for = threads_asked_for();
  if (asked_for > 0) return asked_for;
  if (told_ > 0) return told_;
  const bool alone = alone_.load(std::memory_order_relaxed) >= kConvinced;
  // Now and then look again: the other threads may only have been busy elsewhere.
  if (alone && runs_.fetch_add(1, std::memory_order_relaxed) % kLookAgain != 0) return 1;
  return threads_of_machine();
}

void ThreadGauge::saw(bool only_the_caller) {
  const int32_t count = alone_.load(std::memory_order_relaxed);
  alone_.store(only_the_caller ? std::min(count + 1, kConvinced) : 0, std::memory_order_relaxed);
}

struct SessionThreads::Job {
  SessionThreads* threads;
  void (*fn)(void*, int64_t);
  void* arg;
  std::thread::id caller;
  BusyRun* measured;  // null: nobody measures
  std::atomic<bool> shared{false};
};

namespace {

// While tasks run, each is measured on its own.
class Lending {
 public:
  explicit Lending(BusyRun* run) : run_(run) {
    if (run_ != nullptr) start_ = Clock::now();
  }
  ~Lending() {
    if (run_ != nullptr) run_->add_lent(Clock::now() - start_);
  }
  Lending(const Lending&) = delete;
  Lending& operator=(const Lending&) = delete;

 private:
  BusyRun* const run_;
  Clock::time_point start_;
};

}  // namespace

void SessionThreads::check() const {
  if (failed_.load()) throw KernelError("a worker ran out of memory");
}

void SessionThreads::run_task(void* data, size_t task) {
  auto* job = static_cast<Job*>(data);
  if (std::this_thread::get_id() != job->caller) job->shared.store(true, std::memory_order_relaxed);
  // An exception must not unwind through onnxruntime's threads.
  try {
    if (job->measured == nullptr) return job->fn(job->arg, static_cast<int64_t>(task));
    const Clock::time_point start = Clock::now();
    job->fn(job->arg, static_cast<int64_t>(task));
    add_busy(job->measured->label(), Clock::now() - start);
  } catch (...) {
    job->threads->failed_ = true;
  }
}

void SessionThreads::parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  auto* threads = static_cast<SessionThreads*>(self);
  Job job{threads, fn, arg, std::this_thread::get_id(), BusyRun::current()};
  const Lending lending(job.measured);
  const auto total = static_cast<size_t>(std::max<int64_t>(tasks, 0));
  if (total > 1 && threads->executor.threads > 1) {
    // Batch count 0 lets idle threads take the next task, which evens out unequal tasks.
    OrtStatus* status =
        threads->api_.KernelContext_ParallelFor(threads->context_, &run_task, total, 0, &job);
    threads->gauge_.saw(!job.shared.load(std::memory_order_relaxed));
    if (status == nullptr) return;
    threads->api_.ReleaseStatus(status);  // refused before the first task: do it here
  }
  for (size_t task = 0; task < total; ++task) run_task(&job, task);
}

}  // namespace sparsecc::ort
