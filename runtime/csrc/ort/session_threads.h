// The session's own thread pool, lent to the kernels.
#ifndef SPARSECC_ORT_SESSION_THREADS_H_
#define SPARSECC_ORT_SESSION_THREADS_H_

#include <atomic>
#include <cstdint>

#include "ort_abi.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {

// How many threads to cut the work of one node for: what $SPARSECC_THREADS says, else what was told when the
// library was registered (session option "sparsecc.threads"). onnxruntime has no way to ask how many threads
// a session has, so where neither is given, it is the whole machine until the node has seen that its tasks
// all run on the calling thread: cutting for sixteen threads that are not there takes up to three times as
// long.
class ThreadGauge {
 public:
  explicit ThreadGauge(int32_t told) : told_(told) {}  // 0: not told

  int32_t hint();

  // After tasks were handed to the session's threads.
  void saw(bool only_the_caller);

 private:
  const int32_t told_;
  std::atomic<int32_t> alone_{0};
  std::atomic<uint32_t> runs_{0};
};

// For the time of one run.
class SessionThreads {
 public:
  SessionThreads(const Functions& api, const OrtKernelContext* context, ThreadGauge& gauge)
      : executor{this, gauge.hint(), &SessionThreads::parallel_for},
        api_(api),
        context_(context),
        gauge_(gauge) {}

  SessionThreads(const SessionThreads&) = delete;
  SessionThreads& operator=(const SessionThreads&) = delete;

  // Throws KernelError if a task threw.
  void check() const;

  const sparsecc_executor executor;

 private:
  struct Job;

  static void run_task(void* data, size_t task);
  static void parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg);

  const Functions& api_;
  const OrtKernelContext* context_;
  ThreadGauge& gauge_;
  std::atomic<bool> failed_{false};
};

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_SESSION_THREADS_H_
