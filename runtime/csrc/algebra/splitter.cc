#include "algebra/splitter.h"

#include <algorithm>

#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

constexpr int64_t kMostWork = int64_t{1} << 62;
constexpr int64_t kMostParts = 64;
// Targets that are searched for side by side: their loads from memory overlap.
constexpr int64_t kLanes = 16;
// Below so many targets other threads are not worth waking.
constexpr int64_t kTargetsPerTask = 256;

__extension__ typedef __int128 Wide;

// Work of all subtrees of the nodes of a level before `position`.
int64_t before(const sparsecc_walk& walk, int32_t level, int64_t position) {
  int64_t total = walk.costs[level] * position;
  for (int32_t below = level + 1; below < walk.level_count; ++below) {
    position = children(walk.levels[below], position);
    total += walk.costs[below] * position;
  }
  return total;
}

template <class I>
void follow(const void* pos, int64_t* positions, int64_t n) {
  const I* from = static_cast<const I*>(pos);
  for (int64_t i = 0; i < n; ++i) positions[i] = from[positions[i]];
}

// The same for several positions at once, which are lost; adds to `total`.
void add_before(const sparsecc_walk& walk, int32_t level, int64_t* positions, int64_t n, int64_t* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += walk.costs[level] * positions[i];
  for (int32_t below = level + 1; below < walk.level_count; ++below) {
    const sparsecc_level& next = walk.levels[below];
    if (is_dense(next)) {
      for (int64_t i = 0; i < n; ++i) positions[i] *= next.size;
    } else if (next.pos_bytes == 4) {
      follow<int32_t>(next.pos, positions, n);
    } else {
      follow<int64_t>(next.pos, positions, n);
    }
    const int64_t cost = walk.costs[below];
    for (int64_t i = 0; i < n; ++i) total[i] += cost * positions[i];
  }
}

// First position in [low, high) whose coordinate is not below `wanted`.
int64_t lower_bound(const sparsecc_level& level, int64_t low, int64_t high, int64_t wanted) {
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    const bool less = crd_at(level, middle) < wanted;
    low = less ? middle + 1 : low;
    high = less ? high : middle;
  }
  return low;
}

// One operand in the search for one cut.
struct Operand {
  const sparsecc_walk* walk;
  bool active;
  int64_t low, high;      // children of the node that was opened last
  int64_t lower, upper;   // among them: the positions of both ends of the coordinates still in question
  int64_t start;          // work before `low`
};

class Search {
 public:
  Search(const sparsecc_walk* walks, int32_t walk_count, const Cursors& out) : walks_(walks), out_(out) {
    operands_.resize(at(walk_count));
  }

  // Cuts number `first` to `first + n`, n <= kLanes.
  void run(const int64_t* targets, int64_t first, int64_t n) {
    int64_t found[kLanes], left[kLanes];
    const bool together = side_by_side(targets + first, n, found, left);
    for (int64_t i = 0; i < n; ++i) find(targets[first + i], first + i, together, found[i], left[i]);
  }

 private:
  // The first loop for all targets at once where positions are all one needs: a single operand, or coordinates that
  // are positions in every operand. Returns whether it is so; then the positions and what is left before their headers.
  bool side_by_side(const int64_t* targets, int64_t n, int64_t* found, int64_t* left) {
    bool dense = true;
    for (size_t i = 0; i < operands_.size(); ++i)
      dense &= walks_[i].level_count > 0 && is_dense(walks_[i].levels[0]);
    if (operands_.empty() || walks_[0].level_count == 0 || (!dense && operands_.size() > 1)) return false;
    int64_t high[kLanes], middle[kLanes], position[kLanes], total[kLanes];
    const int64_t nodes = count(walks_[0].levels[0], 1);
    for (int64_t i = 0; i < n; ++i) {
      found[i] = left[i] = 0;
      high[i] = nodes;
    }
    for (int64_t size = nodes; size > 1; size -= size / 2) {
      for (int64_t i = 0; i < n; ++i) {
        middle[i] = (found[i] + high[i]) >> 1;
        total[i] = 0;
      }
      sum_before(middle, position, n, total);
      for (int64_t i = 0; i < n; ++i) {
        const bool less = total[i] < targets[i];
        found[i] = less ? middle[i] : found[i];
        high[i] = less ? high[i] : middle[i];
      }
    }
    std::fill_n(total, n, 0);
    sum_before(found, position, n, total);
    for (int64_t i = 0; i < n; ++i) left[i] = targets[i] - total[i];
    return true;
  }

  void sum_before(const int64_t* positions, int64_t* room, int64_t n, int64_t* total) {
    for (size_t walk = 0; walk < operands_.size(); ++walk) {
      std::copy_n(positions, n, room);
      add_before(walks_[walk], 0, room, n, total);
    }
  }

  void find(int64_t target, int64_t cut, bool together, int64_t first_found, int64_t first_left) {
    begin(cut);
    int64_t left = target;
    for (int32_t loop = 0; loop < out_.loops && left > 0; ++loop) {
      if (!any_active(loop)) break;
      int64_t chosen;
      if (loop == 0 && together) {
        chosen = take_first(first_found);
        left = first_left;
      } else {
        chosen = search(loop, left);
      }
      out_.paths[cut * out_.loops + loop] = chosen;
      left -= take(loop, chosen, cut);
    }
  }

  void begin(int64_t cut) {
    for (size_t i = 0; i < operands_.size(); ++i) {
      const sparsecc_walk& walk = walks_[i];
      operands_[i] = {&walk, walk.level_count > 0, 0, 0, 0, 0, 0};
      if (walk.level_count > 0) open(operands_[i], 0, 0);
      for (int32_t level = 0; level < walk.level_count; ++level) cursor(i, level, cut) = 0;
    }
    std::fill_n(out_.paths + cut * out_.loops, out_.loops, -1);
  }

  int64_t& cursor(size_t walk, int32_t level, int64_t cut) { return out_.of_walk[walk][level * out_.stride + cut]; }

  static void open(Operand& operand, int32_t level, int64_t node) {
    const sparsecc_level& children_of = operand.walk->levels[level];
    operand.low = children(children_of, node);
    operand.high = children(children_of, node + 1);
  }

  bool any_active(int32_t loop) {
    bool any = false;
    for (Operand& operand : operands_) {
      operand.active &= loop < operand.walk->level_count;
      any |= operand.active;
    }
    return any;
  }

  // What `search` leaves behind, where the position is known.
  int64_t take_first(int64_t found) {
    for (Operand& operand : operands_) operand.lower = found;
    const sparsecc_level& level = walks_[0].levels[0];
    return is_dense(level) ? found : crd_at(level, found);
  }

  // The largest coordinate with less work before it than `left`, which is lowered by that work; `lower` of each
  // operand becomes its position.
  int64_t search(int32_t loop, int64_t& left) {
    int alone = 0;
    bool dense = false;
    Operand* one = nullptr;
    for (Operand& operand : operands_) {
      if (!operand.active) continue;
      ++alone;
      one = &operand;
      dense |= is_dense(operand.walk->levels[loop]);
      operand.lower = operand.low;
      operand.upper = operand.high;
      operand.start = before(*operand.walk, loop, operand.low);
    }
    return alone == 1 ? search_one(*one, loop, left) : search_many(loop, dense, left);
  }

  // By positions.
  static int64_t search_one(Operand& operand, int32_t loop, int64_t& left) {
    const sparsecc_walk& walk = *operand.walk;
    const sparsecc_level& level = walk.levels[loop];
    const int64_t wanted = operand.start + left;
    if (loop + 1 == walk.level_count && walk.costs[loop] > 0) {
      operand.lower = std::min(operand.low + (left - 1) / walk.costs[loop], operand.high - 1);
    } else {
      int64_t high = operand.high;
      while (high - operand.lower > 1) {
        const int64_t middle = (operand.lower + high) >> 1;
        const bool less = before(walk, loop, middle) < wanted;
        operand.lower = less ? middle : operand.lower;
        high = less ? high : middle;
      }
    }
    left = wanted - before(walk, loop, operand.lower);
    return is_dense(level) ? operand.lower - operand.low : crd_at(level, operand.lower);
  }

  // By coordinates: halves of those in question if some operand has them all, else coordinates that are stored.
  int64_t search_many(int32_t loop, bool dense, int64_t& left) {
    int64_t low = 0, high = size_of(loop), passed = 0;
    pivot_of_ = nullptr;
    while (high - low > 1) {
      const int64_t middle = dense ? (low + high) >> 1 : pivot(loop, low, high);
      int64_t work = 0;
      for (Operand& operand : operands_)
        if (operand.active) work += place(operand, loop, middle);
      const bool less = work < left;
      for (Operand& operand : operands_)
        if (operand.active) (less ? operand.lower : operand.upper) = found_[at(&operand - operands_.data())];
      if (less) passed = work;
      (less ? low : high) = middle;
    }
    left -= passed;
    return low;
  }

  int64_t size_of(int32_t loop) const {
    for (const Operand& operand : operands_)
      if (operand.active) return operand.walk->levels[loop].size;
    return 0;
  }

  // Notes where a coordinate would be and returns the work before it.
  int64_t place(Operand& operand, int32_t loop, int64_t coordinate) {
    const sparsecc_level& level = operand.walk->levels[loop];
    found_.resize(operands_.size());
    int64_t& found = found_[at(&operand - operands_.data())];
    if (is_dense(level)) {
      found = std::min(operand.low + coordinate, operand.high);
    } else if (&operand == pivot_of_) {
      found = pivot_at_;
    } else {
      found = lower_bound(level, operand.lower, operand.upper, coordinate);
    }
    return before(*operand.walk, loop, found) - operand.start;
  }

  // The middle coordinate of the operand that has most in question, if it is between both ends.
  int64_t pivot(int32_t loop, int64_t low, int64_t high) {
    const Operand* widest = nullptr;
    for (const Operand& operand : operands_)
      if (operand.active &&
          (widest == nullptr || operand.upper - operand.lower > widest->upper - widest->lower))
        widest = &operand;
    pivot_of_ = nullptr;
    if (widest->upper <= widest->lower) return low + 1;  // nothing is stored here
    pivot_at_ = (widest->lower + widest->upper) >> 1;
    const int64_t chosen = crd_at(widest->walk->levels[loop], pivot_at_);
    if (low < chosen && chosen < high) pivot_of_ = widest;  // nobody has to look for it there
    return std::clamp(chosen, low + 1, high - 1);
  }

  // Puts the cursors behind the header of the chosen coordinate and returns its weight.
  int64_t take(int32_t loop, int64_t chosen, int64_t cut) {
    int64_t weight = 0;
    for (size_t i = 0; i < operands_.size(); ++i) {
      Operand& operand = operands_[i];
      if (!operand.active) continue;
      const sparsecc_walk& walk = *operand.walk;
      const sparsecc_level& level = walk.levels[loop];
      int64_t position = operand.lower;
      const bool stored = is_dense(level) || (position < operand.high && crd_at(level, position) == chosen);
      cursor(i, loop, cut) = position + (stored ? 1 : 0);
      for (int32_t below = loop + 1; below < walk.level_count; ++below) {
        position = children(walk.levels[below], position);
        cursor(i, below, cut) = position;
      }
      operand.active = stored;
      if (!stored) continue;
      weight += walk.costs[loop];
      if (loop + 1 < walk.level_count) open(operand, loop + 1, operand.lower);
    }
    return weight;
  }

  const sparsecc_walk* walks_;
  const Cursors& out_;
  std::vector<Operand> operands_;
  std::vector<int64_t> found_;
  const Operand* pivot_of_ = nullptr;  // the operand that the pivot is from, and where
  int64_t pivot_at_ = 0;
};

}  // namespace

int64_t work_of(const sparsecc_walk& walk) {
  Wide work = 0;
  int64_t nodes = 1;
  for (int32_t i = 0; i < walk.level_count; ++i) {
    require(walk.costs[i] >= 0, "costs must be 0 or more");
    nodes = count(walk.levels[i], nodes);
    work += Wide{walk.costs[i]} * nodes;
  }
  require(work < kMostWork, "the work does not fit into 64 bits");
  return static_cast<int64_t>(work);
}

int64_t check_walks(const sparsecc_walk* walks, int32_t walk_count) {
  Wide work = 0;
  for (int32_t i = 0; i < walk_count; ++i) {
    check_levels(walks[i].levels, walks[i].level_count);
    require(walks[i].level_count == 0 || walks[i].costs != nullptr, "costs must not be null");
    work += work_of(walks[i]);
    for (int32_t level = 0; level < walks[i].level_count; ++level)
      for (int32_t other = 0; other < i; ++other)
        if (level < walks[other].level_count &&
            walks[other].levels[level].size != walks[i].levels[level].size)
          throw Failure{"loop " + show(level) + " has different sizes"};
  }
  require(work < kMostWork, "the work does not fit into 64 bits");
  return static_cast<int64_t>(work);
}

void find_splits(const sparsecc_walk* walks, int32_t walk_count, const int64_t* targets, int64_t target_count,
                 const Cursors& cursors, const sparsecc_executor* executor) {
  const int64_t tasks = std::clamp(target_count / kTargetsPerTask, int64_t{1}, wanted_tasks(executor));
  run_tasks(executor, tasks, [&](int64_t task) {
    Search search(walks, walk_count, cursors);
    const int64_t end = (task + 1) * target_count / tasks;
    for (int64_t first = task * target_count / tasks; first < end; first += kLanes)
      search.run(targets, first, std::min(kLanes, end - first));
  });
}

int64_t parts_for(int64_t work, int64_t grain) { return std::clamp(work / grain, int64_t{1}, kMostParts); }

RowCuts cut_rows(const sparsecc_level& last, int64_t header, int64_t leaf, int64_t parts) {
  const int64_t rows = last.pos_count - 1;
  const sparsecc_level levels[2] = {{rows, nullptr, nullptr, 0, 0, 0, 0}, last};
  const int64_t costs[2] = {header, leaf};
  const sparsecc_walk walk = {levels, costs, 2};
  const int64_t work = work_of(walk);
  std::vector<int64_t> targets(at(parts + 1)), cursors(at(2 * (parts + 1))), paths(at(2 * (parts + 1)));
  for (int64_t part = 0; part <= parts; ++part)
    targets[at(part)] = static_cast<int64_t>(Wide{part} * work / parts);
  find_splits(&walk, 1, targets.data(), parts + 1, {{cursors.data()}, parts + 1, paths.data(), 2}, nullptr);
  RowCuts cuts{{cursors.begin(), cursors.begin() + parts + 1}, {cursors.begin() + parts + 1, cursors.end()}};
  cuts.rows.back() = rows;
  cuts.leaves.back() = last.crd_count;
  return cuts;
}

}  // namespace sparsecc::algebra
