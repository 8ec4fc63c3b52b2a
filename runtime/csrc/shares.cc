#include "shares.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace sparsecc {
namespace {

constexpr int64_t kParts = 64;
constexpr double kEvenEnough = 1.05;
constexpr double kWorthScattering = 0.05;  // better balance, summed over all numbers of parts
constexpr double kWorthAtAll = 0.005;

using Parts = std::vector<std::vector<int64_t>>;  // units of each

// In order, each cut at the border nearest to where it should be.
Parts deal_in_order(const std::vector<int64_t>& before) {
  const int64_t units = static_cast<int64_t>(before.size()) - 1, whole = before.back();
  Parts parts(kParts);
  int64_t unit = 0;
  for (int64_t part = 0; part < kParts; ++part) {
    const double goal = static_cast<double>(whole) * static_cast<double>(part + 1) / kParts;
    const auto at = [&](int64_t i) { return static_cast<double>(before[static_cast<size_t>(i)]); };
    for (; unit < units && (part == kParts - 1 || (at(unit) + at(unit + 1)) / 2 < goal); ++unit)
      parts[static_cast<size_t>(part)].push_back(unit);
  }
  return parts;
}

// Longest first, each to the part that has least (Graham 1969); then the parts are ordered so that halves,
// quarters and so on are even too: the fullest is paired with the emptiest, and so again with the pairs.
Parts deal_longest_first(const std::vector<int64_t>& before) {
  const auto work = [&](int64_t unit) {
    return before[static_cast<size_t>(unit) + 1] - before[static_cast<size_t>(unit)];
  };
  std::vector<int64_t> order(before.size() - 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work(a) > work(b); });
  struct Bin {
    int64_t work = 0;
    std::vector<int64_t> units;
  };
  const auto fuller = [](const Bin& a, const Bin& b) { return a.work > b.work; };
  std::vector<Bin> bins(kParts);
  for (const int64_t unit : order) {  // a heap of bins, the emptiest in front
    std::pop_heap(bins.begin(), bins.end(), fuller);
    bins.back().work += work(unit);
    bins.back().units.push_back(unit);
    std::push_heap(bins.begin(), bins.end(), fuller);
  }
  // Trees of bins, flattened: a tree of 2^k bins is their concatenation with separators implied by its size.
  struct Tree {
    int64_t work;
    std::vector<size_t> bins;
  };
  std::vector<Tree> trees;
  for (size_t i = 0; i < bins.size(); ++i) trees.push_back({bins[i].work, {i}});
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
  for (const size_t bin : trees[0].bins) parts.push_back(std::move(bins[bin].units));
  return parts;
}

// Of the parts taken `together` at a time.
double balance_of(const Parts& parts, const std::vector<int64_t>& before, int64_t together) {
  int64_t most = 0;
  for (int64_t part = 0; part < kParts; part += together) {
    int64_t work = 0;
    for (int64_t i = part; i < part + together; ++i)
      for (const int64_t unit : parts[static_cast<size_t>(i)])
        work += before[static_cast<size_t>(unit) + 1] - before[static_cast<size_t>(unit)];
    most = std::max(most, work);
  }
  const double mean = static_cast<double>(before.back()) / (static_cast<double>(kParts) / together);
  return mean > 0 ? static_cast<double>(most) / mean : 1.0;
}

double sum_of_balances(const Parts& parts, const std::vector<int64_t>& before) {
  double sum = 0;
  for (int64_t together = 1; together <= kParts; together *= 2) sum += balance_of(parts, before, together);
  return sum;
}

// Whether to give up that neighbours stay together: where that brings much, or what is even enough within reach.
bool worth_scattering(const Parts& in_order, const Parts& scattered, const std::vector<int64_t>& before) {
  if (sum_of_balances(scattered, before) < sum_of_balances(in_order, before) - kWorthScattering) return true;
  const double balance = balance_of(in_order, before, 1);
  return balance > kEvenEnough && balance_of(scattered, before, 1) < balance - kWorthAtAll;
}

}  // namespace

Shares::Shares(const int64_t* prefix, int64_t units, int64_t overhead) : units_(units) {
  std::vector<int64_t> before;
  for (int64_t i = 0; i <= units; ++i) before.push_back(prefix[i] - prefix[0] + i * overhead);
  Parts parts = deal_in_order(before);
  if (Parts scattered = deal_longest_first(before); worth_scattering(parts, scattered, before))
    parts = std::move(scattered);
  for (int level = 0; level < kLevels; ++level) {
    const int64_t together = kParts >> level;
    Level& to = levels_[level];
    to.balance = balance_of(parts, before, together);
    for (int64_t part = 0; part < kParts; part += together) {
      std::vector<int64_t> mine;
      for (int64_t i = part; i < part + together; ++i)
        mine.insert(mine.end(), parts[static_cast<size_t>(i)].begin(), parts[static_cast<size_t>(i)].end());
      std::sort(mine.begin(), mine.end());
      to.start.push_back(static_cast<int64_t>(to.ranges.size()));
      for (const int64_t unit : mine) {
        const bool goes_on = static_cast<int64_t>(to.ranges.size()) > to.start.back() &&
                             to.ranges.back().end == unit;
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
  return int64_t{1} << level_of(std::min(wanted, std::max<int64_t>(units_, 1)));
}

Shares::Ranges Shares::of(int64_t part, int64_t parts) const {
  const Level& level = levels_[level_of(parts)];
  const Range* ranges = level.ranges.data();
  return {ranges + level.start[static_cast<size_t>(part)], ranges + level.start[static_cast<size_t>(part) + 1]};
}

double Shares::balance(int64_t parts) const { return levels_[level_of(parts)].balance; }

}  // namespace sparsecc
