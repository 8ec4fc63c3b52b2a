// Who computes which outputs: the units of a packed weight dealt to up to 64 parts of nearly equal work.
#ifndef SPARSECC_SHARES_H_
#define SPARSECC_SHARES_H_

#include <cstdint>
#include <vector>

namespace sparsecc {

// What a group of outputs costs beside its blocks, in blocks.
constexpr int64_t kGroupOverhead = 4;

// Units are groups or chunks of outputs, so that a sum never depends on who computes it. Made once when a weight
// is packed, by the stored weights of each unit, for 64 parts; fewer parts are unions of these: part i of n holds
// the parts [64 i / n, 64 (i + 1) / n). Where neighbouring units can be kept together at little cost in balance
// they are, since their results lie side by side.
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

  Shares() = default;
  // prefix[i] is the weight before unit i; every unit costs `overhead` on top.
  Shares(const int64_t* prefix, int64_t units, int64_t overhead);

  // The parts to cut in where `wanted` are: a power of two of at most 64, not many more than units.
  int64_t parts(int64_t wanted) const;
  // What a part of so many (as `parts` returns them) computes, in ascending order.
  Ranges of(int64_t part, int64_t parts) const;
  // Work of the largest part over the mean part; 1 without work.
  double balance(int64_t parts) const;

 private:
  static constexpr int kLevels = 7;  // 1, 2, 4 .. 64 parts
  struct Level {
    std::vector<Range> ranges;
    std::vector<int64_t> start;  // of each part in ranges, and the end
    double balance = 1.0;
  };
  static int level_of(int64_t parts);

  int64_t units_ = 0;
  Level levels_[kLevels];
};

}  // namespace sparsecc
#endif
