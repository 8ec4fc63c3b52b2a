// Who computes which outputs: the units of a packed weight dealt to up to 64 parts of nearly equal work.
#ifndef SPARSECC_SHARES_H_
#define SPARSECC_SHARES_H_

#include <cstdint>
#include <vector>

namespace sparsecc {

// What a group of outputs costs beside its blocks, in blocks.
constexpr int64_t kGroupOverhead = 4;
// Groups are cut at multiples of so many blocks, which kernels go over together.
constexpr int64_t kGrain = 4;

// The largest over the mean; 1 if all are zero.
double evenness(const std::vector<int64_t>& work);

// Units are groups or chunks of outputs, and a sum never depends on who computes it. Made once when a weight
// is packed, by the stored weights of each unit, for 1, 2, 4 .. 64 parts. Where neighbouring units can be kept
// together at little cost in balance they are: weights are read and results written in a row. Only where no way of dealing whole units is even, units much
// heavier than the others are cut along their weights, for any number of parts in the same places.
class Shares {
 public:
  struct Range {
    int64_t begin, end;
  };
  struct Ranges {
    const Range* first;
    const Range* last;
    const Range* begin() const { return first; }
    const Range* end() const { return last; }
  };
  // Weights [begin, end) of a unit, counted as in the prefix sums.
  struct Piece {
    int64_t unit, begin, end;
  };

  Shares() = default;
  // prefix[i] is the weight before unit i; every unit costs `overhead` on top. Units are cut at multiples of
  // `grain` from where they start, and not at all if it is 0.
  Shares(const int64_t* prefix, int64_t units, int64_t overhead, int64_t grain = 0);

  // Of the units that are cut; those of one unit follow each other.
  const std::vector<Piece>& pieces() const { return pieces_; }
  // The parts to cut in where `wanted` are: a power of two of at most 64, not many more than units.
  int64_t parts(int64_t wanted) const;
  // What a part of so many (as `parts` returns them) computes, in ascending order: units, and pieces numbered
  // after them. No range has both.
  Ranges of(int64_t part, int64_t parts) const;
  int64_t work(int64_t part, int64_t parts) const;
  // Of all parts, whose number is rounded up to a power of two of at most 64.
  const std::vector<int64_t>& part_work(int64_t parts) const { return level(parts).work; }

 private:
  static constexpr int kLevels = 7;  // 1, 2, 4 .. 64 parts
  struct Level {
    std::vector<Range> ranges;
    std::vector<int64_t> start;  // of each part in ranges, and the end
    std::vector<int64_t> work;   // of each part
  };
  static int level_of(int64_t parts);

  const Level& level(int64_t parts) const { return levels_[level_of(parts)]; }

  int64_t units_ = 0;
  std::vector<Piece> pieces_;
  Level levels_[kLevels];
};

}  // namespace sparsecc
#endif
