#include "algebra/threads.h"

#include <chrono>

#include "c_guard.h"
#include "schedule.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kOpen = 1u << 31;
constexpr int32_t kMostThreads = 1024;
// How long a thread without work looks out for the next job: waking a sleeping one takes about as long.
constexpr auto kLookOut = std::chrono::microseconds(50);
constexpr int kLooks = 64;  // between two looks at the clock

void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits a little for a change of `value`, then sleeps until there is one.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto until = Clock::now() + kLookOut;
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      rest();
    }
  } while (Clock::now() < until);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

sparsecc_threads::sparsecc_threads(int32_t count)
    : count_(count), lanes_(new Lane[static_cast<size_t>(count)]), executor_{this, count, &parallel_for} {
  try {
    for (int32_t lane = 1; lane < count; ++lane) others_.emplace_back([this, lane] { wait_and_work(lane); });
  } catch (...) {  // the system has no more threads: those that began must end before they are forgotten
    stop();
    throw;
  }
}

sparsecc_threads::~sparsecc_threads() { stop(); }

void sparsecc_threads::stop() {
  stop_.store(true);
  jobs_.fetch_add(1);
  jobs_.notify_all();
  for (std::thread& other : others_) other.join();
}

void sparsecc_threads::take_busy(double* seconds) {
  for (int32_t lane = 0; lane < count_; ++lane)
    seconds[lane] = 1e-9 * static_cast<double>(lanes_[sparsecc::at(lane)].busy_ns.exchange(0));
}

void sparsecc_threads::parallel_for(void* self, int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  static_cast<sparsecc_threads*>(self)->run(tasks, fn, arg);
}

void sparsecc_threads::run(int64_t tasks, void (*fn)(void*, int64_t), void* arg) {
  const std::unique_lock<std::mutex> mine(caller_, std::try_to_lock);
  if (!mine.owns_lock()) {
    for (int64_t task = 0; task < tasks; ++task) fn(arg, task);
    return;
  }
  fn_ = fn;
  arg_ = arg;
  for (int64_t lane = 0; lane < count_; ++lane) {
    lanes_[sparsecc::at(lane)].next.store(lane * tasks / count_, std::memory_order_relaxed);
    lanes_[sparsecc::at(lane)].end = (lane + 1) * tasks / count_;
  }
  open_.store(kOpen, std::memory_order_release);
  jobs_.fetch_add(1, std::memory_order_release);
  jobs_.notify_all();
  work(0);
  // Whoever has not come by now finds nothing to do: only those inside are waited for.
  open_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int looks = 0; open_.load(std::memory_order_acquire) != 0; ++looks)
    looks < kLooks ? rest() : std::this_thread::yield();
}

void sparsecc_threads::work(int32_t lane) {
  const auto began = Clock::now();
  bool any = false;
  for (int32_t i = 0; i < count_; ++i) {
    Lane& from = lanes_[sparsecc::at((lane + i) % count_)];
    while (from.next.load(std::memory_order_relaxed) < from.end) {
      const int64_t task = from.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= from.end) break;
      any = true;
      fn_(arg_, task);
    }
  }
  if (!any) return;
  const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
  lanes_[sparsecc::at(lane)].busy_ns.fetch_add(spent, std::memory_order_relaxed);
}

bool sparsecc_threads::enter() {
  uint32_t seen = open_.load(std::memory_order_acquire);
  while ((seen & kOpen) != 0)
    if (open_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
  return false;
}

void sparsecc_threads::wait_and_work(int32_t lane) {
  for (uint32_t job = 0; !stop_.load(std::memory_order_relaxed);) {
    if (enter()) {
      work(lane);
      open_.fetch_sub(1, std::memory_order_acq_rel);
    }
    wait_for_change(jobs_, job);
    job = jobs_.load(std::memory_order_acquire);
  }
}

int sparsecc_threads_create(int32_t count, sparsecc_threads** out, char* error, size_t error_size) {
  return sparsecc::guard(error, error_size, [&] {
    sparsecc::require(out != nullptr, "out must not be null");
    *out = nullptr;
    sparsecc::require(count >= 1 && count <= kMostThreads, "threads must be 1 to 1024");
    *out = new sparsecc_threads(count);
  });
}

const sparsecc_executor* sparsecc_threads_executor(sparsecc_threads* threads) { return threads->executor(); }

void sparsecc_threads_busy(sparsecc_threads* threads, double* seconds) { threads->take_busy(seconds); }

void sparsecc_threads_destroy(sparsecc_threads* threads) { delete threads; }
