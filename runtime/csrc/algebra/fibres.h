// Leaves of several operands, merged fibre by fibre.
#ifndef SPARSECC_ALGEBRA_FIBRES_H_
#define SPARSECC_ALGEBRA_FIBRES_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "algebra/merge.h"
#include "common.h"
#include "kernels_merge.h"

namespace sparsecc::algebra {

// The leaves of one operand, and where its fibre of each group is.
template <class V, class I>
struct Leaves {
  const I* crd;
  const V* values;
  const I *begin, *end;
};

// Where all fibres together are so many times as long as the shortest, the others are searched for its coordinates.
constexpr int64_t kSkew = 64;

// Fibres become lists of keys, many short ones or a piece of a long one at a time, which the kernels of an instruction
// set merge, one operand after the other: ((a + b) + c) + ..., whatever the pieces are. What an operand lacks counts as +0
// in sums.
template <class V, class I, Join kJoin>
class FibreMerger {
 public:
  // `columns`: size of the mode. `adjacent`: fibres of an operand follow each other in memory.
  FibreMerger(const MergeKernels<V, I>& kernels, const std::vector<Leaves<V, I>>& leaves, int64_t columns, bool adjacent)
      : kernels_(kernels),
        leaves_(leaves),
        adjacent_(adjacent),
        bits_(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(columns - 1, 1)))),
        most_rows_(bits_ > kKeyBits ? 1 : std::min(int64_t{1} << (kKeyBits - bits_), kChunk)),
        windows_(leaves.size()),
        pieces_(leaves.size()),
        begin_(leaves.size()),
        end_(leaves.size()) {
    const int64_t most = share() * operands();
    for (List* list : {&result_, &next_, &other_}) {
      list->keys.grow(most + 2 * kKeyPad);
      list->values.grow(most + 2 * kKeyPad);
    }
    pairs_.grow(pair_words(most));
    room_.grow(most + kKeyPad);
    ends_.grow(kChunk);
  }

  // All of the groups first..last-1. Results go behind the `made` that there are at `crd` and `values`; `pos` gets how many
  // there are before each group. Returns how many there are in the end.
  int64_t merge_groups(int64_t first, int64_t last, int64_t made, I* pos, I* crd, V* values) {
    while (first < last) {
      const int64_t rows = operands() > 1 ? rows_of_list(first, last) : 0;
      pos[first] = static_cast<I>(made);
      if (rows <= 1) {
        for (size_t t = 0; t < leaves_.size(); ++t) windows_[t] = {leaves_[t].begin[first], leaves_[t].end[first]};
        made += merge_fibres(windows_, crd + made, values + made);
        ++first;
        continue;
      }
      const auto begin_of = [&](size_t t) { return leaves_[t].begin + first; };
      const auto end_of = [&](size_t t) { return leaves_[t].end + first; };
      const int64_t n = merge_rows(begin_of, end_of, {rows, 0, bits_}, crd + made, values + made);
      for (int64_t row = 1; row < rows; ++row) pos[first + row] = static_cast<I>(made + ends_[row - 1]);
      made += n;
      first += rows;
    }
    return made;
  }

  // One group: of the fibre of each operand what is in its window, which is used up. Returns how many results there are.
  int64_t merge_fibres(std::vector<Window>& windows, I* crd, V* values) {
    int64_t made = 0;
    for (;;) {
      int64_t filled = 0, all = 0;
      size_t least = 0;
      for (size_t t = 0; t < windows.size(); ++t) {
        filled += size(windows[t]) > 0;
        all += size(windows[t]);
        if (size(windows[t]) < size(windows[least])) least = t;
      }
      if (kUnion || operands() == 1) {
        if (filled <= 1) return made + copy(windows, crd + made, values + made);
      } else if (all >= kSkew * size(windows[least])) {
        return made + seek_each(windows, least, crd + made, values + made);
      }
      made += merge_piece(windows, crd + made, values + made);
    }
  }

 private:
  static constexpr bool kUnion = kJoin == Join::kUnion;
  // Coordinates that are merged at a time: their keys fit into the first cache.
  static constexpr int64_t kChunk = 4096;
  struct List {
    Buffer<uint32_t> keys;
    Buffer<V> values;
  };
  struct Shape {
    int64_t rows, base;
    int bits;
  };

  static int64_t size(Window window) { return window.end - window.begin; }
  int64_t operands() const { return static_cast<int64_t>(leaves_.size()); }
  // Coordinates of each operand in a piece.
  int64_t share() const { return std::max<int64_t>(ceil_div(kChunk, operands()), 1); }

  int64_t entries(int64_t first, int64_t last) const {
    int64_t sum = 0;
    for (const Leaves<V, I>& of : leaves_) {
      if (adjacent_) {
        sum += of.end[last - 1] - of.begin[first];
      } else {
        for (int64_t group = first; group < last; ++group) sum += of.end[group] - of.begin[group];
      }
    }
    return sum;
  }

  // How many groups fit into one list of keys.
  int64_t rows_of_list(int64_t first, int64_t last) const {
    last = std::min(last, first + most_rows_);
    int64_t end = first, room = kChunk;
    for (int64_t step = 64; step > 0 && end < last;) {
      const int64_t next = std::min(end + step, last), more = entries(end, next);
      if (more > room) {
        step /= 2;
        continue;
      }
      end = next;
      room -= more;
    }
    return end - first;
  }

  int64_t copy(const std::vector<Window>& windows, I* crd, V* values) const {
    int64_t made = 0;
    for (size_t t = 0; t < windows.size(); ++t) {
      const int64_t n = size(windows[t]);
      if (n <= 0) continue;
      std::copy_n(leaves_[t].crd + windows[t].begin, n, crd);
      const V* from = leaves_[t].values + windows[t].begin;
      for (int64_t i = 0; i < n; ++i) values[i] = kUnion ? from[i] + V{0} : from[i];
      made += n;
    }
    return made;
  }

  // Coordinates of the shortest list that the others have too.
  int64_t seek_each(std::vector<Window>& windows, size_t shortest, I* crd, V* values) const {
    int64_t made = 0;
    const Window mine = windows[shortest];
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const I wanted = leaves_[shortest].crd[i];
      windows[shortest].begin = i;
      bool everywhere = true;
      for (size_t t = 0; t < windows.size() && everywhere; ++t) {
        if (t != shortest) windows[t].begin = seek(leaves_[t].crd, windows[t], wanted);
        everywhere = size(windows[t]) > 0 && leaves_[t].crd[windows[t].begin] == wanted;
      }
      if (!everywhere) continue;
      V product = leaves_[0].values[windows[0].begin];
      for (size_t t = 1; t < windows.size(); ++t) product *= leaves_[t].values[windows[t].begin];
      crd[made] = wanted;
      values[made++] = product;
    }
    return made;
  }

  // First position whose coordinate is not below `wanted`, looked for in steps that double.
  static int64_t seek(const I* crd, Window in, I wanted) {
    int64_t step = 1;
    while (in.begin + step < in.end && crd[in.begin + step] < wanted) step *= 2;
    const int64_t end = std::min(in.begin + step + 1, in.end);
    return std::lower_bound(crd + in.begin + step / 2, crd + end, wanted) - crd;
  }

  // What all operands have up to some coordinate; windows begin behind it then.
  int64_t merge_piece(std::vector<Window>& windows, I* crd, V* values) {
    const int64_t share = this->share();
    int64_t least = std::numeric_limits<int64_t>::max();
    for (size_t t = 0; t < windows.size(); ++t)
      if (size(windows[t]) > 0) least = std::min(least, int64_t{leaves_[t].crd[windows[t].begin]});
    constexpr int64_t kReach = (int64_t{1} << kKeyBits) - 1;
    int64_t last = least > std::numeric_limits<I>::max() - kReach ? std::numeric_limits<I>::max() : least + kReach;
    for (size_t t = 0; t < windows.size(); ++t)
      if (size(windows[t]) > share) last = std::min(last, int64_t{leaves_[t].crd[windows[t].begin + share - 1]});
    std::vector<Window>& piece = pieces_;
    int64_t filled = 0;
    for (size_t t = 0; t < windows.size(); ++t) {
      const I *from = leaves_[t].crd + windows[t].begin, *to = from + std::min(size(windows[t]), share);
      piece[t] = {windows[t].begin, windows[t].begin + (std::upper_bound(from, to, static_cast<I>(last)) - from)};
      windows[t].begin = piece[t].end;
      filled += size(piece[t]) > 0;
    }
    if (kUnion && filled == 1) return copy(piece, crd, values);
    if (!kUnion && filled < operands()) return 0;
    for (size_t t = 0; t < windows.size(); ++t) {
      begin_[t] = static_cast<I>(piece[t].begin);
      end_[t] = static_cast<I>(piece[t].end);
    }
    const auto begin_of = [this](size_t t) { return begin_.data() + t; };
    const auto end_of = [this](size_t t) { return end_.data() + t; };
    return merge_rows(begin_of, end_of, {1, least, kKeyBits}, crd, values);
  }

  // Rows with at most kChunk coordinates, as one list of each operand.
  template <class BeginOf, class EndOf>
  int64_t merge_rows(const BeginOf& begin_of, const EndOf& end_of, Shape shape, I* crd, V* values) {
    std::fill_n(ends_.data(), shape.rows, 0u);
    const bool in_place = adjacent_ || shape.rows == 1;
    const auto spread = [&](size_t t, uint32_t number, List& to) {
      const Leaves<V, I>& of = leaves_[t];
      return kernels_.spread({begin_of(t), end_of(t), shape.rows, of.crd, of.values, shape.base, shape.bits, number,
                              to.keys.data(), in_place ? nullptr : to.values.data(), ends_.data()});
    };
    const auto values_of = [&](size_t t, List& list) {
      return in_place ? leaves_[t].values + *begin_of(t) : list.values.data();
    };
    int64_t made = spread(0, 0, result_);
    const V* made_values = values_of(0, result_);
    for (size_t t = 1; t < leaves_.size(); ++t) {
      const int64_t n = spread(t, 1, other_);
      const bool last = t + 1 == leaves_.size();
      const MergeJob<V, I> job{result_.keys.data(), other_.keys.data(), made_values, values_of(t, other_), made, n,
                               last ? nullptr : next_.keys.data(), crd, shape.base, (uint32_t{1} << shape.bits) - 1,
                               last ? values : next_.values.data(), ends_.data(), shape.rows, pairs_.data(),
                               room_.data()};
      made = (kUnion ? kernels_.unite : kernels_.intersect)(job);
      std::swap(result_, next_);
      made_values = result_.values.data();
    }
    return made;
  }

  const MergeKernels<V, I>& kernels_;
  const std::vector<Leaves<V, I>>& leaves_;
  const bool adjacent_;
  const int bits_;  // of a coordinate
  const int64_t most_rows_;
  List result_, next_, other_;
  Buffer<uint64_t> pairs_;
  Buffer<uint32_t> room_, ends_;
  std::vector<Window> windows_, pieces_;
  std::vector<I> begin_, end_;
};

}  // namespace sparsecc::algebra
#endif
