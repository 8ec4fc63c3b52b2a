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

// The leaves of one operand.
template <class V, class I>
struct Leaves {
  const I* crd;
  const V* values;
};

// Results are written one behind the last, too: there must be room for that.
//
// Two lists without a branch on their coordinates, which nothing predicts.
template <class V, class I>
int64_t merge_two(const Leaves<V, I>& a, Window in_a, const Leaves<V, I>& b, Window in_b, I* crd, V* values,
                  std::integral_constant<Join, Join::kUnion>) {
  int64_t i = in_a.begin, j = in_b.begin, n = 0;
  while (i < in_a.end && j < in_b.end) {
    const I x = a.crd[i], y = b.crd[j];
    const bool first = x <= y, second = y <= x;
    crd[n] = first ? x : y;
    values[n] = (first ? a.values[i] : V{0}) + (second ? b.values[j] : V{0});
    i += first;
    j += second;
    ++n;
  }
  for (; i < in_a.end; ++i, ++n) {
    crd[n] = a.crd[i];
    values[n] = a.values[i];
  }
  for (; j < in_b.end; ++j, ++n) {
    crd[n] = b.crd[j];
    values[n] = b.values[j];
  }
  return n;
}

template <class V, class I>
int64_t merge_two(const Leaves<V, I>& a, Window in_a, const Leaves<V, I>& b, Window in_b, I* crd, V* values,
                  std::integral_constant<Join, Join::kIntersection>) {
  int64_t i = in_a.begin, j = in_b.begin, n = 0;
  while (i < in_a.end && j < in_b.end) {
    const I x = a.crd[i], y = b.crd[j];
    crd[n] = x;
    values[n] = a.values[i] * b.values[j];
    n += x == y;
    i += x <= y;
    j += y <= x;
  }
  return n;
}

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
