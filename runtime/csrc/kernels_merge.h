// Merging sorted lists of keys: what one instruction set offers. Plain data only, as in kernels.h.
//
// A key is a coordinate, less some base, behind the number of its row, times two: lists of many short rows are one
// list, of which nobody looks for the ends of rows. The last bit is 0 in the first list and 1 in the second: equal
// coordinates follow each other, and a merged list still says where its keys are from.
#ifndef SPARSECC_KERNELS_MERGE_H_
#define SPARSECC_KERNELS_MERGE_H_

#include <stdint.h>

namespace sparsecc {

constexpr uint32_t kNoKey = 0xffffffffu;  // above all keys
constexpr int kKeyPad = 16;               // such keys behind a list, and room for as many more
constexpr int kKeyBits = 30;              // of row and coordinate, so that no key comes next to kNoKey

// Writes the keys of rows.
template <class V, class I>
struct SpreadJob {
  const I *begin, *end;  // [rows]
  int64_t rows;
  const I* crd;
  const V* values;
  int64_t base;      // coordinates are from here on
  int32_t bits;      // that a coordinate takes
  uint32_t list;     // 0 or 1
  uint32_t* keys;
  V* copied;         // values one behind the other; null: they are that already
  uint32_t* ends;    // [rows] in and out: to each is added how many keys there are before its end
};

// Merges two lists.
template <class V, class I>
struct MergeJob {
  const uint32_t *a, *b;
  const V *a_values, *b_values;
  int64_t a_count, b_count;
  uint32_t* keys;    // of the result as the first list of another merge; null: it goes to crd
  I* crd;            // written up to a_count + b_count (of both: the smaller one) at most
  int64_t base;
  uint32_t mask;     // of the coordinate in row and coordinate
  V* values;
  uint32_t* ends;    // [rows] in: keys of both lists before the end of each row; out: results
  int64_t rows;
  uint64_t* pairs;   // [pair_words(a_count + b_count)]: which merged keys are the second of two equal ones
  uint32_t* room;    // [a_count + b_count + kKeyPad]
};
constexpr int64_t pair_words(int64_t keys) { return keys / 64 + 2; }

template <class V, class I>
struct MergeKernels {
  int64_t (*spread)(const SpreadJob<V, I>& job);    // returns how many keys there are
  int64_t (*unite)(const MergeJob<V, I>& job);      // coordinates in either list; returns how many
  int64_t (*intersect)(const MergeJob<V, I>& job);  // in both
};

struct MergeTable {
  MergeKernels<float, int32_t> float_int32;
  MergeKernels<float, int64_t> float_int64;
  MergeKernels<double, int32_t> double_int32;
  MergeKernels<double, int64_t> double_int64;
};

namespace generic {
extern const MergeTable kMerge;
}
#if defined(__x86_64__)
namespace avx2 {
extern const MergeTable kMerge;
}
namespace avx512 {
extern const MergeTable kMerge;
}
#elif defined(__aarch64__)
namespace neon {
extern const MergeTable kMerge;
}
#endif

}  // namespace sparsecc
#endif
