// Walks of several rising lists of coordinates at once: all that are in any (union), or in all (intersection).
#ifndef SPARSECC_ALGEBRA_MERGE_H_
#define SPARSECC_ALGEBRA_MERGE_H_

#include <algorithm>
#include <cstdint>
#include <limits>

namespace sparsecc::algebra {

enum class Join { kUnion, kIntersection };

// Coordinates [begin, end) of one operand.
struct Window {
  int64_t begin, end;
};

// Calls found(coordinate, positions) for each coordinate; the position of an operand that lacks it is -1. `positions`
// and `windows` are room for one number of each operand.
template <Join kJoin, class CoordinateAt, class Found>
void merge(Window* windows, int64_t operands, int64_t* positions, const CoordinateAt& coordinate_at,
           const Found& found) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  for (;;) {
    int64_t least = kNone, most = 0;
    for (int64_t t = 0; t < operands; ++t) {
      const int64_t c = windows[t].begin < windows[t].end ? coordinate_at(t, windows[t].begin) : kNone;
      least = std::min(least, c);
      most = std::max(most, c);
    }
    if ((kJoin == Join::kUnion ? least : most) == kNone) return;
    for (int64_t t = 0; t < operands; ++t) {
      const bool here = windows[t].begin < windows[t].end && coordinate_at(t, windows[t].begin) == least;
      positions[t] = here ? windows[t].begin : -1;
      windows[t].begin += here;
    }
    if (kJoin == Join::kUnion || least == most) found(least, positions);
  }
}

}  // namespace sparsecc::algebra
#endif
