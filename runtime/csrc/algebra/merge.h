// Walks of several rising lists of coordinates at once: all that are in any (union), or in all (intersection).
#ifndef SPARSECC_ALGEBRA_MERGE_H_
#define SPARSECC_ALGEBRA_MERGE_H_

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

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

// A value where it is wanted, else zero; without a branch.
template <class V>
V value_if(V value, bool wanted) {
  using Bits = std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>;
  return std::bit_cast<V>(static_cast<Bits>(std::bit_cast<Bits>(value) & (Bits{0} - Bits{wanted})));
}

// Positions in two lists and in what comes out.
struct Places {
  int64_t a, b, out;
};

// Two lists that are merged. Results are written one behind the last, too: there must be room for that.
template <Join kJoin, class V, class I>
struct TwoLists {
  const I *a, *b;
  const V *a_values, *b_values;
  I* crd;
  V* values;

  // One coordinate, without a branch on it: nothing predicts those. They are compared as unsigned numbers, of which
  // processors add the outcome to a position in one step.
  void step(Places& at) const {
    using Unsigned = std::make_unsigned_t<I>;
    const auto x = static_cast<Unsigned>(a[at.a]), y = static_cast<Unsigned>(b[at.b]);
    const bool first = x <= y, second = y <= x;
    if constexpr (kJoin == Join::kUnion) {
      crd[at.out] = static_cast<I>(std::min(x, y));
      values[at.out++] = value_if(a_values[at.a], first) + value_if(b_values[at.b], second);
    } else {
      crd[at.out] = static_cast<I>(x);
      values[at.out] = a_values[at.a] * b_values[at.b];
      at.out += x == y;
    }
    at.a += first;
    at.b += second;
  }

  // From `from` to where both lists end, `to`; returns the places there.
  Places finish(Places from, Places to) const {
    while (from.a < to.a && from.b < to.b) step(from);
    if constexpr (kJoin == Join::kUnion) {
      for (; from.a < to.a; ++from.a, ++from.out) {
        crd[from.out] = a[from.a];
        values[from.out] = a_values[from.a];
      }
      for (; from.b < to.b; ++from.b, ++from.out) {
        crd[from.out] = b[from.b];
        values[from.out] = b_values[from.b];
      }
    }
    return from;
  }

  // A step waits for the one before it: two places are merged at once, from `near` to `middle` and from there, with
  // results from `far` on, to `end`. Then those of the second place are moved to where the first one ends.
  Places finish_both(Places near, Places middle, Places end) const {
    Places far = middle;
    for (;;) {  // as far as no list can end
      const int64_t steps = std::min(std::min(middle.a - near.a, middle.b - near.b), std::min(end.a - far.a, end.b - far.b));
      if (steps <= 0) break;
      Places one = near, other = far;
      for (int64_t i = 0; i < steps; ++i) {
        step(one);
        step(other);
      }
      near = one;
      far = other;
    }
    // What is written behind the last result of the first place would be in the way of the second.
    const I kept_crd = crd[middle.out];
    const V kept_value = values[middle.out];
    near = finish(near, middle);
    crd[middle.out] = kept_crd;
    values[middle.out] = kept_value;
    far = finish(far, end);
    const int64_t n = far.out - middle.out;
    std::copy_n(crd + middle.out, n, crd + near.out);
    std::copy_n(values + middle.out, n, values + near.out);
    return {end.a, end.b, near.out + n};
  }
};

// Lists of `kShort` are not worth two places; results of `kLong` are still in the first cache when they are moved.
constexpr int64_t kShort = 24, kLong = 512;

// Returns how many results there are.
template <Join kJoin, class V, class I>
int64_t merge_two(const Leaves<V, I>& one, Window in_one, const Leaves<V, I>& other, Window in_other, I* crd,
                  V* values) {
  const TwoLists<kJoin, V, I> lists = {one.crd, other.crd, one.values, other.values, crd, values};
  Places from = {in_one.begin, in_other.begin, 0};
  const Places end = {in_one.end, in_other.end, 0};
  while (end.a - from.a > kShort && end.b - from.b > kShort) {
    const int64_t half = std::min(kLong, end.a - from.a) / 2;
    const auto before = [&](int64_t a, int64_t b) {
      return std::lower_bound(lists.b + b, lists.b + end.b, lists.a[a]) - lists.b;
    };
    Places middle = {from.a + half, before(from.a + half, from.b), from.out};
    const int64_t in_b = middle.b - from.b;
    middle.out += kJoin == Join::kUnion ? half + in_b : std::min(half, in_b);
    Places stop = {middle.a + half, end.b, 0};
    if (end.a - stop.a <= 1) {
      stop.a = end.a;
    } else {
      stop.b = before(stop.a, middle.b);
    }
    from = lists.finish_both(from, middle, stop);
  }
  return lists.finish(from, end).out;
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
