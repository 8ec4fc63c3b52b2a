#include "algebra/join.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "algebra/fibres.h"
#include "algebra/pipeline.h"
#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

const MergeTable& merge_table(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return avx512::kMerge;
    case Isa::kAvx2:
      return avx2::kMerge;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return neon::kMerge;
#endif
    default:
      return generic::kMerge;
  }
}

template <class V, class I>
const MergeKernels<V, I>& merge_kernels(Isa isa) {
  const MergeTable& table = merge_table(isa);
  if constexpr (sizeof(V) == 4) {
    if constexpr (sizeof(I) == 4) return table.float_int32;
    else return table.float_int64;
  } else {
    if constexpr (sizeof(I) == 4) return table.double_int32;
    else return table.double_int64;
  }
}

// Coordinates that are visited for one part: its results fit into the second cache.
constexpr int64_t kGrain = 1 << 15;

// The fibres that are merged in one phase: for each group one of every operand, which may be empty.
template <class I>
struct Groups {
  int64_t count = 1;
  std::vector<const I*> begin, end;  // by operand, [count]
  const int64_t* offset = nullptr;   // work before each group, [count + 1]; null: fibres follow each other
  int64_t before(int64_t group) const {
    if (offset != nullptr) return offset[group];
    int64_t work = group;
    for (const I* of : begin) work += of[group];
    return work;
  }
};

// A cut: groups that have begun before it, and how far the operands are in the last of them.
struct Cut {
  int64_t groups = 0;
  std::vector<int64_t> cursor;
};

template <class V, class I, Join kJoin>
class Phase {
 public:
  // `level` is the one that is merged.
  Phase(const sparsecc_tensor* operands, int32_t count, int32_t level, const Groups<I>& groups)
      : operands_(operands), count_(count), level_(level), groups_(groups), work_(groups.before(groups.count)) {}

  int64_t work() const { return work_; }

  // Merges all groups; `pos` gets where the results of each begin, and what emitting them needs goes to `emit`.
  template <class Emit>
  Place run(const Emit& emit, I* pos, const sparsecc_executor* executor) {
    const int64_t threads = thread_count(executor);
    const int64_t parts = threads == 1 || is_small() ? 1 : std::max<int64_t>(work_ / kGrain, 1);
    const int64_t workers = std::min(threads, parts);
    make_cuts(parts, executor);
    if (parts == 1) {
      typename Emit::Store store(emit, 0);
      const Place first{0, 0};
      const Place size = fill(0, store, pos, &first);
      store.finish(first);
      return size;
    }
    std::vector<std::unique_ptr<typename Emit::Store>> stores;
    const int64_t room = std::max<int64_t>(most_in_a_part(), 1);
    for (int64_t worker = 0; worker < workers; ++worker)
      stores.push_back(std::make_unique<typename Emit::Store>(emit, room));
    return run_in_order(
        executor, workers, parts,
        [&](int64_t worker, int64_t part, const Place* place) { return fill(part, *stores[at(worker)], pos, place); },
        [&](int64_t worker, int64_t part, Place place) {
          const int64_t last = cuts_[at(part + 1)].groups;
          for (int64_t group = cuts_[at(part)].groups; group < last; ++group)
            pos[group] = static_cast<I>(pos[group] + place.entries);
          stores[at(worker)]->finish(place);
        });
  }

 private:
  // Not worth a second thread. Products pass over most of a fibre that one operand has hardly anything of.
  bool is_small() const {
    int64_t steps = 0;
    for (int64_t group = 0; group < groups_.count && steps < 2 * kGrain; ++group) {
      int64_t sum = 1, least = std::numeric_limits<int64_t>::max();
      for (int32_t t = 0; t < count_; ++t) {
        const int64_t length = groups_.end[at(t)][group] - groups_.begin[at(t)][group];
        sum += length;
        least = std::min(least, length);
      }
      steps += kJoin == Join::kUnion ? sum : std::min(sum, 1 + least * kSkew);
    }
    return steps < 2 * kGrain;
  }

  void make_cuts(int64_t parts, const sparsecc_executor* executor) {
    cuts_.resize(at(parts + 1));
    const int64_t tasks = std::min(parts + 1, thread_count(executor));
    run_tasks(executor, tasks, [&](int64_t task) {
      for (int64_t i = task * (parts + 1) / tasks; i < (task + 1) * (parts + 1) / tasks; ++i)
        cuts_[at(i)] = cut(i == parts ? work_ : i * (work_ / parts) + i * (work_ % parts) / parts);
    });
    // Groups without coordinates behind the last that counts.
    Cut& last = cuts_.back();
    last.groups = groups_.count;
    for (int32_t t = 0; t < count_; ++t)
      last.cursor[at(t)] = groups_.count == 0 ? 0 : int64_t{groups_.end[at(t)][groups_.count - 1]};
  }

  Cut cut(int64_t target) const {
    Cut found;
    found.cursor.assign(at(count_), 0);
    if (target == 0 || groups_.count == 0) return found;
    int64_t low = 0, high = groups_.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) >> 1;
      (groups_.before(middle) < target ? low : high) = middle;
    }
    found.groups = low + 1;
    const int64_t left = target - groups_.before(low) - 1;  // behind the group's own header
    for (int32_t t = 0; t < count_; ++t) found.cursor[at(t)] = groups_.begin[at(t)][low];
    if (left > 0) cut_fibres(low, left, found);
    return found;
  }

  // The fibres of one group as walks of one level each.
  void cut_fibres(int64_t group, int64_t target, Cut& found) const {
    constexpr int64_t kCost = 1;
    std::vector<sparsecc_level> levels;
    std::vector<I> windows;
    std::vector<sparsecc_walk> walks;
    for (int32_t t = 0; t < count_; ++t) {
      windows.push_back(groups_.begin[at(t)][group]);
      windows.push_back(groups_.end[at(t)][group]);
      levels.push_back(level_of(t));
    }
    Cursors out{{}, 1, nullptr, 1};
    for (int32_t t = 0; t < count_; ++t) {
      levels[at(t)].pos = windows.data() + 2 * t;
      walks.push_back({&levels[at(t)], &kCost, 1});
      out.of_walk.push_back(&found.cursor[at(t)]);
    }
    int64_t path;
    out.paths = &path;
    find_splits(walks.data(), count_, &target, 1, out, nullptr);
  }

  const sparsecc_level& level_of(int32_t t) const { return operands_[t].levels[level_]; }

  int64_t most_in_a_part() const {
    int64_t most = 0;
    for (size_t part = 0; part + 1 < cuts_.size(); ++part) most = std::max(most, entries(cuts_[part], cuts_[part + 1]));
    return most;
  }

  // Coordinates between two cuts, or more.
  int64_t entries(const Cut& from, const Cut& to) const {
    int64_t sum = 0;
    if (groups_.offset != nullptr) return work_before(to) - work_before(from);
    for (int32_t t = 0; t < count_; ++t) sum += to.cursor[at(t)] - from.cursor[at(t)];
    return sum;
  }

  int64_t work_before(const Cut& cut) const {
    if (cut.groups == 0) return 0;
    int64_t work = groups_.before(cut.groups - 1) + 1;
    for (int32_t t = 0; t < count_; ++t) work += cut.cursor[at(t)] - groups_.begin[at(t)][cut.groups - 1];
    return work;
  }

  template <class Store>
  Place fill(int64_t part, Store& store, I* pos, const Place* place) const {
    const Cut &from = cuts_[at(part)], &to = cuts_[at(part + 1)];
    store.begin(place);
    std::vector<Window>& windows = store.windows;
    if (from.groups > 0) {  // what is left of the group that an earlier part began
      const int64_t group = from.groups - 1;
      for (int32_t t = 0; t < count_; ++t) {
        const int64_t end = to.groups == from.groups ? to.cursor[at(t)] : int64_t{groups_.end[at(t)][group]};
        windows[at(t)] = {from.cursor[at(t)], end};
      }
      store.merge_group();
    }
    if (to.groups == from.groups) return {store.entries, store.work};
    const int64_t last = to.groups - 1;  // which may go on in the next part
    store.merge_groups(from.groups, last, pos);
    pos[last] = static_cast<I>(store.entries);
    for (int32_t t = 0; t < count_; ++t) windows[at(t)] = {groups_.begin[at(t)][last], to.cursor[at(t)]};
    store.merge_group();
    return {store.entries, store.work};
  }

  const sparsecc_tensor* operands_;
  const int32_t count_;
  const int32_t level_;
  const Groups<I>& groups_;
  const int64_t work_;
  std::vector<Cut> cuts_;
};

// Results of the last level: coordinates and values.
template <class V, class I, Join kJoin>
struct EmitLeaves {
  std::vector<Leaves<V, I>> leaves;
  I* crd;
  V* values;
  int64_t columns;
  bool adjacent;
  const MergeKernels<V, I>& kernels;

  struct Store {
    const EmitLeaves& to;
    Buffer<I> own_crd;
    Buffer<V> own_values;
    I* crd = nullptr;
    V* values = nullptr;
    bool placed = false;
    int64_t entries = 0, work = 0;
    std::vector<Window> windows;
    FibreMerger<V, I, kJoin> merger;

    Store(const EmitLeaves& emit, int64_t room)
        : to(emit), windows(emit.leaves.size()), merger(emit.kernels, emit.leaves, emit.columns, emit.adjacent) {
      own_crd.grow(room + 1);
      own_values.grow(room + 1);
    }

    // Where its results belong is known, or null.
    void begin(const Place* place) {
      placed = place != nullptr;
      crd = placed ? to.crd + place->entries : own_crd.data();
      values = placed ? to.values + place->entries : own_values.data();
      entries = work = 0;
    }

    void merge_group() { entries += merger.merge_fibres(windows, crd + entries, values + entries); }

    void merge_groups(int64_t first, int64_t last, I* pos) {
      entries = merger.merge_groups(first, last, entries, pos, crd, values);
    }

    void finish(Place place) {
      if (placed) return;
      std::copy_n(crd, entries, to.crd + place.entries);
      std::copy_n(values, entries, to.values + place.entries);
    }
  };
};

// Results of a level above the last: coordinates, and the fibres below them, which are the groups of the next phase.
template <class V, class I, Join kJoin>
struct EmitNodes {
  std::vector<const sparsecc_level*> level, next;  // of each operand
  const Groups<I>& groups;
  I* crd;
  std::vector<I*> begin, end;
  int64_t* offset;

  struct Store {
    const EmitNodes& to;
    const bool direct;
    std::vector<I> own_crd;
    std::vector<int64_t> found;  // positions of all operands for each coordinate
    int64_t entries = 0, work = 0;
    std::vector<Window> windows;
    std::vector<int64_t> positions;

    Store(const EmitNodes& emit, int64_t room)
        : to(emit), direct(room == 0), windows(emit.level.size()), positions(emit.level.size()) {
      own_crd.reserve(at(room));
      found.reserve(at(room) * emit.level.size());
    }
    void begin(const Place* /*place*/) {
      entries = work = 0;
      found.clear();
      own_crd.clear();
    }

    void merge_group() {
      merge<kJoin>(
          windows.data(), static_cast<int64_t>(to.level.size()), positions.data(),
          [&](int64_t t, int64_t position) { return int64_t{static_cast<const I*>(to.level[at(t)]->crd)[position]}; },
          [&](int64_t coordinate, const int64_t* position) {
            if (direct) {
              put(entries, static_cast<I>(coordinate), position, work);
            } else {
              own_crd.push_back(static_cast<I>(coordinate));
              found.insert(found.end(), position, position + to.level.size());
            }
            work += weight(position);
            ++entries;
          });
    }

    void merge_groups(int64_t first, int64_t last, I* pos) {
      for (int64_t group = first; group < last; ++group) {
        pos[group] = static_cast<I>(entries);
        for (size_t t = 0; t < windows.size(); ++t) windows[t] = {to.groups.begin[t][group], to.groups.end[t][group]};
        merge_group();
      }
    }

    Window below(size_t t, int64_t position) const {
      const I* pos = static_cast<const I*>(to.next[t]->pos);
      return position < 0 ? Window{0, 0} : Window{pos[position], pos[position + 1]};
    }

    int64_t weight(const int64_t* position) const {
      int64_t sum = 1;
      for (size_t t = 0; t < to.level.size(); ++t) {
        const Window fibre = below(t, position[t]);
        sum += fibre.end - fibre.begin;
      }
      return sum;
    }

    void put(int64_t node, I coordinate, const int64_t* position, int64_t before) const {
      to.crd[node] = coordinate;
      to.offset[node] = before;
      for (size_t t = 0; t < to.level.size(); ++t) {
        const Window fibre = below(t, position[t]);
        to.begin[t][node] = static_cast<I>(fibre.begin);
        to.end[t][node] = static_cast<I>(fibre.end);
      }
    }

    void finish(Place place) {
      for (int64_t i = 0; i < entries && !direct; ++i) {
        const int64_t* position = found.data() + i * static_cast<int64_t>(to.level.size());
        put(place.entries + i, own_crd[at(i)], position, place.work);
        place.work += weight(position);
      }
    }
  };
};

// The groups of a phase that the one before it made.
template <class I>
struct MadeGroups {
  Buffer<int64_t> offset;
  std::vector<Buffer<I>> begin, end;
  Groups<I> groups;
};

// Most results of a level: all coordinates of all operands, or of the one that has fewest.
int64_t most_nodes(const sparsecc_tensor* operands, int32_t count, int32_t level, Join how) {
  int64_t most = operands[0].levels[level].crd_count;
  for (int32_t t = 1; t < count; ++t) {
    const int64_t next = operands[t].levels[level].crd_count;
    most = how == Join::kUnion ? most + next : std::min(most, next);
  }
  return most;
}

template <class V, class I, Join kJoin>
class Joiner {
 public:
  Joiner(const sparsecc_tensor* operands, int32_t count, sparsecc_result* out, Isa isa,
         const sparsecc_executor* executor)
      : operands_(operands),
        count_(count),
        levels_(operands[0].level_count),
        out_(*out),
        isa_(isa),
        executor_(executor) {}

  void run() {
    int64_t dense = 1;
    while (is_dense(operands_[0].levels[first_])) dense *= operands_[0].levels[first_++].size;
    auto groups = std::make_unique<MadeGroups<I>>();
    groups->groups.count = dense;
    for (int32_t t = 0; t < count_; ++t) {
      const I* pos = static_cast<const I*>(operands_[t].levels[first_].pos);
      groups->groups.begin.push_back(pos);
      groups->groups.end.push_back(pos + 1);
    }
    for (int32_t level = first_; level + 1 < levels_; ++level) groups = nodes(level, groups->groups);
    leaves(groups->groups);
    if (kJoin == Join::kIntersection) drop_empty();
    out_.value_count = out_.levels[levels_ - 1].crd_count;
  }

 private:
  I* pos(int32_t level) { return static_cast<I*>(out_.levels[level].pos); }
  I* crd(int32_t level) { return static_cast<I*>(out_.levels[level].crd); }

  void close(int32_t level, int64_t groups, int64_t entries) {
    pos(level)[groups] = static_cast<I>(entries);
    out_.levels[level].pos_count = groups + 1;
    out_.levels[level].crd_count = entries;
  }

  std::unique_ptr<MadeGroups<I>> nodes(int32_t level, const Groups<I>& groups) {
    auto made = std::make_unique<MadeGroups<I>>();
    const int64_t room = most_nodes(operands_, count_, level, kJoin);
    made->offset.grow(room + 1);
    EmitNodes<V, I, kJoin> emit{{}, {}, groups, crd(level), {}, {}, made->offset.data()};
    for (int32_t t = 0; t < count_; ++t) {
      made->begin.emplace_back().grow(room + 1);
      made->end.emplace_back().grow(room + 1);
      emit.level.push_back(&operands_[t].levels[level]);
      emit.next.push_back(&operands_[t].levels[level + 1]);
    }
    for (int32_t t = 0; t < count_; ++t) {
      emit.begin.push_back(made->begin[at(t)].data());
      emit.end.push_back(made->end[at(t)].data());
      made->groups.begin.push_back(emit.begin.back());
      made->groups.end.push_back(emit.end.back());
    }
    Phase<V, I, kJoin> phase(operands_, count_, level, groups);
    const Place size = phase.run(emit, pos(level), executor_);
    close(level, groups.count, size.entries);
    made->offset[size.entries] = size.work;
    made->groups.count = size.entries;
    made->groups.offset = made->offset.data();
    return made;
  }

  void leaves(const Groups<I>& groups) {
    const int32_t level = levels_ - 1;
    EmitLeaves<V, I, kJoin> emit{{}, crd(level), static_cast<V*>(out_.values), operands_[0].levels[level].size,
                                 groups.offset == nullptr, merge_kernels<V, I>(isa_)};
    for (int32_t t = 0; t < count_; ++t)
      emit.leaves.push_back({static_cast<const I*>(operands_[t].levels[level].crd),
                             static_cast<const V*>(operands_[t].values), groups.begin[at(t)], groups.end[at(t)]});
    Phase<V, I, kJoin> phase(operands_, count_, level, groups);
    close(level, groups.count, phase.run(emit, pos(level), executor_).entries);
  }

  // Nodes that all operands have, but nothing below them.
  void drop_empty() {
    for (int32_t level = levels_ - 2; level >= first_; --level) {
      sparsecc_result_level &mine = out_.levels[level], &below = out_.levels[level + 1];
      int64_t kept = 0, parent = 0;
      for (int64_t node = 0; node < mine.crd_count; ++node) {
        for (; parent + 1 < mine.pos_count && pos(level)[parent] <= node; ++parent)
          pos(level)[parent] = static_cast<I>(kept);
        if (pos(level + 1)[node] == pos(level + 1)[node + 1]) continue;
        crd(level)[kept] = crd(level)[node];
        pos(level + 1)[kept++] = pos(level + 1)[node];
      }
      for (; parent < mine.pos_count; ++parent) pos(level)[parent] = static_cast<I>(kept);
      pos(level + 1)[kept] = static_cast<I>(below.crd_count);
      below.pos_count = kept + 1;
      mine.crd_count = kept;
    }
  }

  const sparsecc_tensor* operands_;
  const int32_t count_, levels_;
  int32_t first_ = 0;  // compressed level
  sparsecc_result& out_;
  const Isa isa_;
  const sparsecc_executor* executor_;
};

}  // namespace

void check_join(const sparsecc_tensor* operands, int32_t count) {
  const int32_t levels = operands[0].level_count;
  require(levels > 0 && !is_dense(operands[0].levels[levels - 1]), "the last level must be compressed");
  for (int32_t t = 0; t < count; ++t) {
    require(operands[t].level_count == levels, "operands have different orders");
    require(operands[t].value_bytes == operands[0].value_bytes && index_bytes(operands[t]) == index_bytes(operands[0]),
            "operands must have the same types");
    for (int32_t level = 0; level < levels; ++level) {
      const sparsecc_level &mine = operands[t].levels[level], &first = operands[0].levels[level];
      require(mine.size == first.size, "operands have different shapes");
      require(is_dense(mine) == is_dense(first), "operands have different formats");
      require(level == 0 || !is_dense(mine) || is_dense(operands[t].levels[level - 1]),
              "a dense level is below a compressed one: convert to CSF");
    }
  }
}

void join(const sparsecc_tensor* operands, int32_t count, Join how, sparsecc_result* out, Isa isa,
          const sparsecc_executor* executor) {
  with_types(operands[0], [&](auto value, auto index) {
    using V = decltype(value);
    using I = decltype(index);
    if (how == Join::kUnion) {
      Joiner<V, I, Join::kUnion>(operands, count, out, isa, executor).run();
    } else {
      Joiner<V, I, Join::kIntersection>(operands, count, out, isa, executor).run();
    }
  });
}

}  // namespace sparsecc::algebra
