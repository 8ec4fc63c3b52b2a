#include "shares.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace sparsecc {
namespace {

constexpr int64_t kParts = 64;
constexpr double kEvenEnough = 1.05;
constexpr double kWorthScattering = 0.05;  // better balance, summed over all numbers of parts
constexpr double kWorthAtAll = 0.005;
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
Parts deal_in_order(const Work& work) {
  const auto all = static_cast<double>(whole(work));
  Parts parts(kParts);
  size_t unit = 0;
  double before = 0;
  for (int64_t part = 0; part < kParts; ++part) {
    const double goal = all * static_cast<double>(part + 1) / kParts;
    for (; unit < work.size(); before += static_cast<double>(work[unit++])) {
      if (part < kParts - 1 && before + static_cast<double>(work[unit]) / 2 >= goal) break;
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

// Of the parts taken `together` at a time.
double balance_of(const Parts& parts, const Work& work, int64_t together) {
  Work sums(at(kParts / together));
  for (int64_t part = 0; part < kParts; ++part)
    for (const int64_t unit : parts[at(part)]) sums[at(part / together)] += work[at(unit)];
  return evenness(sums);
}

double sum_of_balances(const Parts& parts, const Work& work) {
  double sum = 0;
  for (int64_t together = 1; together <= kParts; together *= 2) sum += balance_of(parts, work, together);
  return sum;
}

// Whether to give up that neighbours stay together: where that brings much, or what is even enough within reach.
bool worth_scattering(const Parts& in_order, const Parts& scattered, const Work& work) {
  if (sum_of_balances(scattered, work) < sum_of_balances(in_order, work) - kWorthScattering) return true;
  const double balance = balance_of(in_order, work, 1);
  return balance > kEvenEnough && balance_of(scattered, work, 1) < balance - kWorthAtAll;
}

struct Deal {
  Work work;
  Parts parts;
  std::vector<Shares::Piece> pieces;
  double balance = 0;
};

Deal deal_whole(const Work& work) {
  Deal deal{work, deal_in_order(work), {}, 0};
  if (Parts scattered = deal_longest_first(work).paired(); worth_scattering(deal.parts, scattered, work))
    deal.parts = std::move(scattered);
  deal.balance = balance_of(deal.parts, work, 1);
  return deal;
}

// Units of more than `most` are taken out, the others dealt, and those poured into what room there is: always
// into the emptiest part, so that pieces are few.
Deal deal_with_cuts(const Work& units, const int64_t* prefix, int64_t overhead, int64_t grain, double most) {
  Deal deal{units, {}, {}, 0};
  std::vector<int64_t> heavy;
  for (const int64_t unit : longest_first(units)) {
    const bool light = static_cast<double>(units[at(unit)]) <= most;
    if (light || units[at(unit)] < kLeastCut) break;
    heavy.push_back(unit);
    deal.work[at(unit)] = 0;
  }
  Bins bins = deal_longest_first(deal.work);
  const auto full = static_cast<int64_t>(static_cast<double>(whole(units)) / kParts * kFull) + overhead;
  for (const int64_t unit : heavy)
    for (int64_t begin = prefix[unit], end = prefix[unit + 1]; begin < end;) {
      const int64_t room = (full - bins.least() - overhead) / grain * grain;
      const int64_t size = std::min(std::max(room, grain), end - begin);
      bins.add(static_cast<int64_t>(deal.work.size()), size + overhead);
      deal.work.push_back(size + overhead);
      deal.pieces.push_back({unit, begin, begin + size});
      begin += size;
    }
  deal.parts = std::move(bins).paired();
  deal.balance = balance_of(deal.parts, deal.work, 1);
  return deal;
}

// As few cuts as make it even, if any do.
Deal deal_best(const Work& work, const int64_t* prefix, int64_t overhead, int64_t grain) {
  Deal best = deal_whole(work);
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
    const int64_t together = kParts >> level;
    Level& to = levels_[level];
    for (int64_t part = 0; part < kParts; part += together) {
      std::vector<int64_t> mine;
      for (int64_t i = part; i < part + together; ++i)
        mine.insert(mine.end(), deal.parts[at(i)].begin(), deal.parts[at(i)].end());
      std::sort(mine.begin(), mine.end());
      to.work.push_back(0);
      for (const int64_t unit : mine) to.work.back() += deal.work[at(unit)];
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

double Shares::balance(int64_t parts) const { return evenness(level(parts).work); }

}  // namespace sparsecc
