// How long each thread works on each node, while somebody measures.
#ifndef SPARSECC_ORT_BUSY_H_
#define SPARSECC_ORT_BUSY_H_

#include <atomic>
#include <chrono>
#include <string>

namespace sparsecc::ort {

using Clock = std::chrono::steady_clock;

// Costs one look at a flag while nobody measures.
bool measuring();

// This thread has worked for that long on a node.
void add_busy(const std::string& label, Clock::duration time);

// One run of a node. The thread that runs it is busy all the time but while it waits for tasks of others.
class BusyRun {
 public:
  explicit BusyRun(const std::string& label);
  ~BusyRun();

  BusyRun(const BusyRun&) = delete;
  BusyRun& operator=(const BusyRun&) = delete;

  // The run that this thread is in; null if nobody measures.
  static BusyRun* current();
  const std::string& label() const { return label_; }
  void add_lent(Clock::duration time) { lent_ += time; }

 private:
  const std::string& label_;
  const bool on_;
  BusyRun* outer_ = nullptr;
  Clock::time_point start_;
  Clock::duration lent_{};  // in which tasks ran, this thread's own among them
};

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_BUSY_H_
