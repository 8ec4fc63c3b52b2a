// Parts whose results follow each other in memory, though nobody knows beforehand how long they are.
#ifndef SPARSECC_ALGEBRA_PIPELINE_H_
#define SPARSECC_ALGEBRA_PIPELINE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "schedule.h"

namespace sparsecc::algebra {

// What lies before a part in the results.
struct Place {
  int64_t entries, work;
};

// Calls fill(worker, part, place), which makes the results of a part and returns how much they are: where they belong if
// that is known already, else (place is null) in memory of the worker's own. Then put(worker, part, place) with what is
// before them. Parts are taken in order, so that the parts before one that waits for its place are all being made by
// others; neither function may throw.
template <class Fill, class Put>
Place run_in_order(const sparsecc_executor* executor, int64_t workers, int64_t parts, const Fill& fill,
                   const Put& put) {
  struct alignas(64) Turn {
    Place place{0, 0};
    std::atomic<bool> known{false};
  };
  std::vector<Turn> turns(at(parts + 1));
  turns[0].known.store(true);
  std::atomic<int64_t> next{0};
  run_tasks(executor, workers, [&](int64_t worker) {
    for (int64_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1)) {
      Turn& mine = turns[at(part)];
      const bool placed = mine.known.load(std::memory_order_acquire);
      const Place size = fill(worker, part, placed ? &mine.place : nullptr);
      while (!mine.known.load(std::memory_order_acquire)) std::this_thread::yield();
      Turn& after = turns[at(part + 1)];
      after.place = {mine.place.entries + size.entries, mine.place.work + size.work};
      after.known.store(true, std::memory_order_release);
      put(worker, part, mine.place);
    }
  });
  return turns.back().place;
}

}  // namespace sparsecc::algebra
#endif
