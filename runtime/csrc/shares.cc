#include "shares.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace sparsecc {
namespace {

constexpr int64_t kParts = 64;
constexpr double kEvenEnough = 1.05;
constexpr double kInOrder = 1.03;  // as even as this, neighbours stay together: scattered ones take up to a tenth longer
constexpr double kWorthAtAll = 0.01;
constexpr double kWorthCutting = 0.05;  // better balance of 64 parts
constexpr double kFull = 1.02;          // up to which parts are filled with pieces, beside their overhead
constexpr double kHeavy = 2.0;          // times the mean unit, at least, that may be cut
constexpr double kHeavyOfMany = 1.4;    // likewise, where parts have several units
constexpr int64_t kLeastCut = 64;       // weights of a unit that may be cut
constexpr size_t kLeastUnits = 16;      // of fewer none is cut

size_t at(int64_t i) { return static_cast<size_t>(i); }

using Work = std::vector<int64_t>;                // of each unit, then of each piece; 0 for units that are cut
using Parts = std::vector<std::vector<int64_t>>;  // units and pieces of each

int64_t whole(const Work& work) { return std::accumulate(work.begin(), work.end(), int64_t{0}); }

// In order, each cut at the border nearest to where it should be.
Parts deal_in_order(const Work& work, int64_t count) {
  const auto all = static_cast<double>(whole(work));
  Parts parts(at(count));
  size_t unit = 0;
  double before = 0;
  for (int64_t part = 0; part < count; ++part) {
    const double goal = all * static_cast<double>(part + 1) / static_cast<double>(count);
    for (; unit < work.size(); before += static_cast<double>(work[unit++])) {
      if (part < count - 1 && before + static_cast<double>(work[unit]) / 2 >= goal) break;
      parts[at(part)].push_back(static_cast<int64_t>(unit));
    }
  }
  return parts;
}

struct Bin {
  int64_t work = 0;
  std::vector<int64_t> units;
};

bool fuller(const Bin& a, const Bin& b) { return a.work > b.work; }

// 64 parts, always with the emptiest of them at hand.
class Bins {
 public:
  Bins() : bins_(kParts) {}
  int64_t least() const { return bins_.front().work; }
  void add(int64_t unit, int64_t work) {
    std::pop_heap(bins_.begin(), bins_.end(), fuller);
    bins_.back().work += work;
    bins_.back().units.push_back(unit);
    std::push_heap(bins_.begin(), bins_.end(), fuller);
  }

  // Ordered so that halves, quarters and so on are even too: the fullest is paired with the emptiest, and so
  // again with the pairs.
  Parts paired() && {
    struct Tree {
      int64_t work;
      std::vector<size_t> bins;
    };
    std::vector<Tree> trees;
    for (size_t i = 0; i < bins_.size(); ++i) trees.push_back({bins_[i].work, {i}});
    while (trees.size() > 1) {
      std::stable_sort(trees.begin(), trees.end(), [](const Tree& a, const Tree& b) { return a.work > b.work; });
      std::vector<Tree> pairs;
      for (size_t i = 0; i < trees.size() / 2; ++i) {
        Tree& full = trees[i];
        const Tree& empty = trees[trees.size() - 1 - i];
        full.bins.insert(full.bins.end(), empty.bins.begin(), empty.bins.end());
        pairs.push_back({full.work + empty.work, std::move(full.bins)});
      }
      trees = std::move(pairs);
    }
    Parts parts;
    for (const size_t bin : trees[0].bins) parts.push_back(std::move(bins_[bin].units));
    return parts;
  }

 private:
  std::vector<Bin> bins_;  // a heap
};

std::vector<int64_t> longest_first(const Work& work) {
  std::vector<int64_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[at(a)] > work[at(b)]; });
  return order;
}

// Longest first, each to the part that has least (Graham 1969).
Bins deal_longest_first(const Work& work) {
  Bins bins;
  for (const int64_t unit : longest_first(work)) bins.add(unit, work[at(unit)]);
  return bins;
}

Work work_of(const Parts& parts, const Work& work) {
  Work sums(parts.size());
  for (size_t part = 0; part < parts.size(); ++part)
    for (const int64_t unit : parts[part]) sums[part] += work[at(unit)];
  return sums;
}

struct Deal {
  Work work;
  Parts parts;
  std::vector<Shares::Piece> pieces;
  double balance = 0;
};

Deal finish(Work work, Bins bins, std::vector<Shares::Piece> pieces) {
  Deal deal{std::move(work), std::move(bins).paired(), std::move(pieces), 0};
  deal.balance = evenness(work_of(deal.parts, deal.work));
  return deal;
}

// Units of more than `most` are taken out, the others dealt, and those poured into what room there is: always
// into the emptiest part, so that pieces are few.
Deal deal_with_cuts(const Work& units, const int64_t* prefix, int64_t overhead, int64_t grain, double most) {
  Work work = units;
  std::vector<Shares::Piece> pieces;
  std::vector<int64_t> heavy;
  for (const int64_t unit : longest_first(units)) {
    const bool light = static_cast<double>(units[at(unit)]) <= most;
    if (light || units[at(unit)] < kLeastCut) break;
    heavy.push_back(unit);
    work[at(unit)] = 0;
  }
  Bins bins = deal_longest_first(work);
  const auto full = static_cast<int64_t>(static_cast<double>(whole(units)) / kParts * kFull) + overhead;
  for (const int64_t unit : heavy)
    for (int64_t begin = prefix[unit], end = prefix[unit + 1]; begin < end;) {
      const int64_t room = (full - bins.least() - overhead) / grain * grain;
      const int64_t size = std::min(std::max(room, grain), end - begin);
      bins.add(static_cast<int64_t>(work.size()), size + overhead);
      work.push_back(size + overhead);
      pieces.push_back({unit, begin, begin + size});
      begin += size;
    }
  return finish(std::move(work), std::move(bins), std::move(pieces));
}

// As few cuts as make it even, if any do.
Deal deal_best(const Work& work, const int64_t* prefix, int64_t overhead, int64_t grain) {
  Deal best = finish(work, deal_longest_first(work), {});
  if (grain == 0 || work.size() < kLeastUnits || best.balance <= kEvenEnough) return best;
  const auto all = static_cast<double>(whole(work)), share = all / kParts;
  const double mean = all / static_cast<double>(work.size());
  const double least = work.size() >= 2 * kParts ? kHeavyOfMany : kHeavy;
  for (const double most : {std::max(share, kHeavy * mean), std::max(share / 2, least * mean), least * mean}) {
    Deal deal = deal_with_cuts(work, prefix, overhead, grain, most);
    if (deal.balance < best.balance - (best.pieces.empty() ? kWorthCutting : kWorthAtAll)) best = std::move(deal);
    if (best.balance <= kEvenEnough) break;
  }
  return best;
}

// 64 parts taken together until they are `count`, in ascending order.
Parts united(const Parts& parts, int64_t count) {
  Parts some(at(count));
  for (int64_t part = 0; part < kParts; ++part) {
    std::vector<int64_t>& to = some[at(part * count / kParts)];
    to.insert(to.end(), parts[at(part)].begin(), parts[at(part)].end());
  }
  for (std::vector<int64_t>& mine : some) std::sort(mine.begin(), mine.end());
  return some;
}

}  // namespace

double evenness(const std::vector<int64_t>& work) {
  const double mean = static_cast<double>(whole(work)) / static_cast<double>(work.size());
  return mean > 0 ? static_cast<double>(*std::max_element(work.begin(), work.end())) / mean : 1.0;
}

Shares::Shares(const int64_t* prefix, int64_t units, int64_t overhead, int64_t grain) : units_(units) {
  Work work;
  for (int64_t i = 0; i < units; ++i) work.push_back(prefix[i + 1] - prefix[i] + overhead);
  Deal deal = deal_best(work, prefix, overhead, grain);
  pieces_ = std::move(deal.pieces);
  std::vector<bool> cut(at(units));
  for (const Piece& piece : pieces_) cut[at(piece.unit)] = true;
  for (int level = 0; level < kLevels; ++level) {
    Parts parts = united(deal.parts, int64_t{1} << level), in_order = deal_in_order(deal.work, int64_t{1} << level);
    const double even = std::max(kInOrder, evenness(work_of(parts, deal.work)) + kWorthAtAll);
    if (evenness(work_of(in_order, deal.work)) <= even) parts = std::move(in_order);
    Level& to = levels_[level];
    to.work = work_of(parts, deal.work);
    for (const std::vector<int64_t>& mine : parts) {
      to.start.push_back(static_cast<int64_t>(to.ranges.size()));
      for (const int64_t unit : mine) {
        if (unit < units && cut[at(unit)]) continue;
        const bool goes_on = static_cast<int64_t>(to.ranges.size()) > to.start.back() &&
                             to.ranges.back().end == unit && unit != units;
        if (goes_on) {
          ++to.ranges.back().end;
        } else {
          to.ranges.push_back({unit, unit + 1});
        }
      }
    }
    to.start.push_back(static_cast<int64_t>(to.ranges.size()));
  }
}

int Shares::level_of(int64_t parts) {
  int level = 0;
  while (level < kLevels - 1 && (int64_t{1} << level) < parts) ++level;
  return level;
}

int64_t Shares::parts(int64_t wanted) const {
  const int64_t most = units_ + static_cast<int64_t>(pieces_.size());
  return int64_t{1} << level_of(std::min(wanted, std::max<int64_t>(most, 1)));
}

Shares::Ranges Shares::of(int64_t part, int64_t parts) const {
  const Level& of = level(parts);
  const Range* ranges = of.ranges.data();
  return {ranges + of.start[at(part)], ranges + of.start[at(part) + 1]};
}

int64_t Shares::work(int64_t part, int64_t parts) const { return level(parts).work[at(part)]; }

}  // namespace sparsecc
