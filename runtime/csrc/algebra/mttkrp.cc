#include "algebra/mttkrp.h"

#include <algorithm>
#include <vector>

#include "algebra/rows.h"
#include "algebra/splitter.h"
#include "algebra/tensor.h"
#include "schedule.h"

namespace sparsecc::algebra {
namespace {

constexpr int64_t kGrain = 4096;  // numbers that are multiplied, at least, in a part
constexpr int64_t kFibre = 8;    // what a fibre costs beside its coordinates, of which each is 1

template <class V, class I>
class Mttkrp {
 public:
  Mttkrp(const sparsecc_tensor& a, const void* const* factors, int64_t columns, void* out)
      : last_(a.level_count - 1), first_rows_(a.levels[0].size), out_(static_cast<V*>(out)) {
    job_.modes = a.level_count;
    for (int32_t level = 1; level <= last_; ++level) {
      job_.pos[level] = static_cast<const I*>(a.levels[level].pos);
      job_.crd[level] = static_cast<const I*>(a.levels[level].crd);
      job_.factors[level] = static_cast<const V*>(factors[level - 1]);
      nodes_.push_back(a.levels[level].pos_count - 1);
    }
    job_.values = static_cast<const V*>(a.values);
    job_.columns = columns;
    job_.out = out_;
    job_.places = static_cast<const I*>(is_dense(a.levels[0]) ? nullptr : a.levels[0].crd);
    const sparsecc_level& leaves = a.levels[last_];
    const int64_t work = kFibre * (leaves.pos_count - 1) + leaves.crd_count;
    cuts_ = cut_rows(leaves, kFibre, 1, parts_for(work, std::max<int64_t>(kGrain / std::max<int64_t>(columns, 1), 1)));
  }

  void run(Isa isa, const sparsecc_executor* executor) {
    const int64_t parts = cuts_.parts(), columns = job_.columns;
    std::vector<V> carries(at(parts * columns));
    std::vector<int64_t> carried(at(parts), -1);  // node of the first level
    std::fill_n(out_, first_rows_ * columns, V{0});
    const auto kernel = kernels_of<V, I>(isa).mttkrp;
    run_tasks(executor, parts, [&](int64_t part) {
      MttkrpJob<V, I> job = job_;
      job.begin = cuts_.leaves[at(part)];
      job.end = cuts_.leaves[at(part + 1)];
      if (job.begin == job.end) return;
      std::vector<V> sums(at(last_ * columns));
      job.sums = sums.data();
      job.carry = nullptr;
      if (find_nodes(job)) {
        job.carry = carries.data() + part * columns;
        carried[at(part)] = job.node[0];
      }
      kernel(&job);
    });
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t node = carried[at(part)];
      if (node < 0) continue;
      V* row = out_ + (job_.places == nullptr ? node : int64_t{job_.places[node]}) * columns;
      for (int64_t i = 0; i < columns; ++i) row[i] += carries[at(part * columns + i)];
    }
  }

 private:
  // Those that the first coordinate is in; returns whether the one of the first level began before it.
  bool find_nodes(MttkrpJob<V, I>& job) const {
    int64_t child = job.begin;
    bool inside = false;
    for (int32_t level = last_ - 1; level >= 0; --level) {
      const I* pos = job.pos[level + 1];
      const I* end = pos + nodes_[at(level)] + 1;
      job.node[level] = std::upper_bound(pos, end, static_cast<I>(child)) - pos - 1;
      inside |= pos[job.node[level]] < child;
      child = job.node[level];
    }
    return inside;
  }

  const int32_t last_;
  const int64_t first_rows_;
  V* const out_;
  MttkrpJob<V, I> job_{};
  std::vector<int64_t> nodes_;  // of each level but the last
  RowCuts cuts_;
};

}  // namespace

void mttkrp(const sparsecc_tensor& a, const void* const* factors, int64_t columns, void* out, Isa isa,
            const sparsecc_executor* executor) {
  require(a.level_count >= 2 && a.level_count <= kMostModes, "the tensor must have 2 to 16 modes");
  for (int32_t level = 1; level < a.level_count; ++level)
    require(!is_dense(a.levels[level]), "levels below the first must be compressed");
  with_types(a, [&](auto value, auto index) {
    Mttkrp<decltype(value), decltype(index)>(a, factors, columns, out).run(isa, executor);
  });
}

}  // namespace sparsecc::algebra
