#include "algebra/threads.h"

#include <chrono>
#include <optional>

#if defined(__linux__)
#include <sched.h>
#endif

#include "c_guard.h"
#include "schedule.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kOpen = 1u << 31;
constexpr int32_t kMostThreads = 1024;
constexpr double kMostSpeed = 1e15;  // sums of products with numbers of tasks stay finite
// How long a thread without work looks out for the next job. Waking a sleeping one takes 50 us, but the system may put
// it beside the caller at first: products of a millisecond took nearly twice as long after a pause.
constexpr auto kLookOut = std::chrono::milliseconds(2);
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

// While it lives the calling thread keeps to one processor, if the system lets it.
class Kept {
 public:
  explicit Kept(int32_t processor) {
#if defined(__linux__)
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<size_t>(processor), &one);
    kept_ = sched_setaffinity(0, sizeof(one), &one) == 0;
#else
    static_cast<void>(processor);
#endif
  }
  ~Kept() {
#if defined(__linux__)
    if (kept_) sched_setaffinity(0, sizeof(before_), &before_);
#endif
  }
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool kept_ = false;
#endif
};

}  // namespace

sparsecc_threads::sparsecc_threads(int32_t count, const double* speeds, const int32_t* processors)
    : count_(count), lanes_(new Lane[static_cast<size_t>(count)]), executor_{this, count, &parallel_for} {
  if (speeds != nullptr) {
    speed_before_.push_back(0);
    for (int32_t lane = 0; lane < count; ++lane) speed_before_.push_back(speed_before_.back() + speeds[lane]);
  }
  if (processors != nullptr) processors_.assign(processors, processors + count);
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

int64_t sparsecc_threads::before(int64_t lane, int64_t tasks) const {
  if (speed_before_.empty()) return lane * tasks / count_;
  if (lane == count_) return tasks;
  return static_cast<int64_t>(static_cast<double>(tasks) * speed_before_[sparsecc::at(lane)] / speed_before_.back());
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
  std::optional<Kept> kept;
  if (!processors_.empty()) kept.emplace(processors_[0]);
  fn_ = fn;
  arg_ = arg;
  for (int64_t lane = 0; lane < count_; ++lane) {
    lanes_[sparsecc::at(lane)].next.store(before(lane, tasks), std::memory_order_relaxed);
    lanes_[sparsecc::at(lane)].end = before(lane + 1, tasks);
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
  std::optional<Kept> kept;
  if (!processors_.empty()) kept.emplace(processors_[sparsecc::at(lane)]);
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
  return sparsecc_threads_create_unequal(count, nullptr, nullptr, out, error, error_size);
}

int sparsecc_threads_create_unequal(int32_t count, const double* speeds, const int32_t* processors,
                                    sparsecc_threads** out, char* error, size_t error_size) {
  return sparsecc::guard(error, error_size, [&] {
    sparsecc::require(out != nullptr, "out must not be null");
    *out = nullptr;
    sparsecc::require(count >= 1 && count <= kMostThreads, "threads must be 1 to 1024");
    for (int32_t i = 0; speeds != nullptr && i < count; ++i)
      sparsecc::require(speeds[i] > 0 && speeds[i] <= kMostSpeed, "speeds must be above 0 and at most 1e15");
    *out = new sparsecc_threads(count, speeds, processors);
  });
}

const sparsecc_executor* sparsecc_threads_executor(sparsecc_threads* threads) { return threads->executor(); }

void sparsecc_threads_shares(const sparsecc_threads* threads, int64_t tasks, int64_t* before) {
  for (int32_t lane = 0; lane <= threads->count(); ++lane) before[lane] = threads->before(lane, tasks);
}

void sparsecc_threads_busy(sparsecc_threads* threads, double* seconds) { threads->take_busy(seconds); }

void sparsecc_threads_destroy(sparsecc_threads* threads) { delete threads; }
