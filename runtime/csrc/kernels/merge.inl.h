// Merging sorted lists of keys for one instruction set; see kernels.inl.h for the macros and the rule about headers.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_merge.h"
#include "intrinsics.h"

namespace sparsecc {
namespace SPARSECC_NAMESPACE {
namespace {

#define SPARSECC_INLINE static inline __attribute__((always_inline))

#if SPARSECC_AVX512
#include "merge_registers.inl.h"
#else
#include "merge_steps.inl.h"
#endif

static void end_list(uint32_t* end) {
  for (int i = 0; i < kKeyPad; ++i) end[i] = kNoKey;
}

template <class V, class I>
static int64_t spread(const SpreadJob<V, I>& job) {
  int64_t n = 0;
  for (int64_t row = 0; row < job.rows; ++row) {
    const int64_t from = job.begin[row], length = job.end[row] - from;
    const uint32_t above = ((uint32_t)row << (job.bits + 1)) | job.list;
    spread_row(job.crd + from, length, job.base, above, job.keys + n);
    if (job.copied != nullptr) copy_row(job.values + from, length, job.copied + n);
    n += length;
    job.ends[row] += (uint32_t)n;
  }
  end_list(job.keys + n);
  return n;
}

// From how many keys of both lists there are before the ends of rows to how many results.
template <bool kBoth, class V, class I>
static void count_results(const MergeJob<V, I>& job) {
  const int64_t words = pair_words(job.a_count + job.b_count);
  uint32_t before = 0;  // pairs in the words before
  for (int64_t i = 0; i < words; ++i) {
    job.room[i] = before;
    before += (uint32_t)__builtin_popcountll(job.pairs[i]);
  }
  for (int64_t row = 0; row < job.rows; ++row) {
    const uint32_t end = job.ends[row];
    const uint64_t in_word = job.pairs[end / 64] & ((uint64_t{1} << end % 64) - 1);
    const uint32_t pairs = job.room[end / 64] + (uint32_t)__builtin_popcountll(in_word);
    job.ends[row] = kBoth ? pairs : end - pairs;
  }
}

template <bool kBoth, class V, class I>
static int64_t merge(const MergeJob<V, I>& job) {
  const int64_t n = job.keys != nullptr ? merge_to<kBoth, true>(job) : merge_to<kBoth, false>(job);
  count_results<kBoth>(job);
  if (job.keys != nullptr) end_list(job.keys + n);
  return n;
}

}  // namespace

#define SPARSECC_MERGE(V, I) {spread<V, I>, merge<false, V, I>, merge<true, V, I>}

extern const MergeTable kMerge = {SPARSECC_MERGE(float, int32_t), SPARSECC_MERGE(float, int64_t),
                                  SPARSECC_MERGE(double, int32_t), SPARSECC_MERGE(double, int64_t)};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
