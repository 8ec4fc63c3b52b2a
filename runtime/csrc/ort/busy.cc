#include "busy.h"

#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "sparsecc/balance.h"

namespace sparsecc::ort {
namespace {

struct Entry {
  Clock::duration time{};
  int64_t count = 0;
};

struct Ledger {
  std::atomic<bool> on{false};
  std::mutex mutex;
  std::vector<std::thread::id> threads;               // in the order in which they first worked
  std::map<std::pair<std::string, size_t>, Entry> busy;  // by node and thread
  std::map<std::string, Entry> runs;                     // of each node, from its start to its end
};

// Threads of sessions may outlive the library's static objects: leaked on purpose.
Ledger& ledger() {
  static auto* const one = new Ledger;
  return *one;
}

thread_local BusyRun* running = nullptr;

void add(Entry& entry, Clock::duration time) {
  entry.time += time;
  ++entry.count;
}

}  // namespace

bool measuring() { return ledger().on.load(std::memory_order_relaxed); }

void add_busy(const std::string& label, Clock::duration time) {
  Ledger& all = ledger();
  const std::lock_guard<std::mutex> lock(all.mutex);
  size_t thread = 0;
  while (thread < all.threads.size() && all.threads[thread] != std::this_thread::get_id()) ++thread;
  if (thread == all.threads.size()) all.threads.push_back(std::this_thread::get_id());
  add(all.busy[{label, thread}], time);
}

BusyRun::BusyRun(const std::string& label) : label_(label), on_(measuring()) {
  if (!on_) return;
  outer_ = std::exchange(running, this);
  start_ = Clock::now();
}

BusyRun::~BusyRun() {
  if (!on_) return;
  running = outer_;
  const Clock::duration whole = Clock::now() - start_;
  try {
    add_busy(label_, whole - lent_);
    Ledger& all = ledger();
    const std::lock_guard<std::mutex> lock(all.mutex);
    add(all.runs[label_], whole);
  } catch (const std::bad_alloc&) {  // a measurement is lost, the result is not
  }
}

BusyRun* BusyRun::current() { return running; }

}  // namespace sparsecc::ort

extern "C" {

SPARSECC_API void sparsecc_busy_start(void) {
  auto& all = sparsecc::ort::ledger();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.threads.clear();
  all.busy.clear();
  all.runs.clear();
  all.on.store(true);
}

SPARSECC_API const char* sparsecc_busy_stop(void) {
  auto& all = sparsecc::ort::ledger();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.on.store(false);
  static auto* const text = new std::string;
  text->clear();
  const auto line = [](int64_t thread, const sparsecc::ort::Entry& entry, std::string label) {
    for (char& c : label)
      if (static_cast<unsigned char>(c) < 0x20) c = '?';  // names are the model file's
    const auto time = std::chrono::duration_cast<std::chrono::nanoseconds>(entry.time);
    *text += std::to_string(thread) + '\t' + std::to_string(entry.count) + '\t' + std::to_string(time.count()) + '\t' +
             label + '\n';
  };
  for (const auto& [label, entry] : all.runs) line(-1, entry, label);
  for (const auto& [key, entry] : all.busy) line(static_cast<int64_t>(key.second), entry, key.first);
  return text->c_str();
}
}
