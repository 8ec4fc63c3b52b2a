// A pool of threads for callers of the C interface that have none to lend.
#ifndef SPARSECC_ALGEBRA_THREADS_H_
#define SPARSECC_ALGEBRA_THREADS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "sparsecc/algebra.h"

// Threads that sleep between jobs, after looking out for the next one for a while.
struct sparsecc_threads {
 public:
  // Speeds and processors may be null: alike, and wherever the system puts them.
  sparsecc_threads(int32_t count, const double* speeds, const int32_t* processors);
  ~sparsecc_threads();
  sparsecc_threads(const sparsecc_threads&) = delete;
  sparsecc_threads& operator=(const sparsecc_threads&) = delete;

  const sparsecc_executor* executor() const { return &executor_; }
  // The tasks of a job before those that thread `lane` begins with.
  int64_t before(int64_t lane, int64_t tasks) const;
  int32_t count() const { return count_; }
  // Writes the busy seconds of each thread and starts again from zero.
  void take_busy(double* seconds);

 private:
  // Of one thread: the tasks it begins with, from which others take what is left when they have done theirs.
  struct alignas(64) Lane {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
    std::atomic<int64_t> busy_ns{0};
  };

  static void parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg);
  void stop();
  void run(int64_t tasks, void (*fn)(void*, int64_t), void* arg);
  void work(int32_t lane);
  void wait_and_work(int32_t lane);
  bool enter();

  const int32_t count_;
  std::vector<double> speed_before_;  // [count + 1]: of the threads before each; empty: all are alike
  std::vector<int32_t> processors_;   // empty: any
  std::unique_ptr<Lane[]> lanes_;
  std::mutex caller_;
  void (*fn_)(void*, int64_t) = nullptr;
  void* arg_ = nullptr;
  // A job is open while threads may join in: the flag kOpen, and how many others are inside.
  std::atomic<uint32_t> open_{0};
  std::atomic<uint32_t> jobs_{0};  // counts them; threads sleep on it
  std::atomic<bool> stop_{false};
  sparsecc_executor executor_;
  std::vector<std::thread> others_;
};

#endif
