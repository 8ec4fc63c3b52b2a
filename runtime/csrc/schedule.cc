#include "schedule.h"

#include <cstdlib>
#include <thread>

namespace sparsecc {
namespace {

constexpr long kMostThreads = 1024;

}  // namespace

int32_t parse_threads(const char* text) {
  return static_cast<int32_t>(std::clamp(std::strtol(text, nullptr, 10), 0L, kMostThreads));
}

int32_t threads_asked_for() {
  const char* text = std::getenv("SPARSECC_THREADS");
  return text != nullptr ? parse_threads(text) : 0;
}

int32_t threads_of_machine() {
  static const unsigned cores = std::thread::hardware_concurrency();
  return static_cast<int32_t>(std::max(cores, 1U));
}

}  // namespace sparsecc
