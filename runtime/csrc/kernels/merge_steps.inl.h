// One key at a time, without a branch on it: nothing predicts those.
#pragma once

constexpr int kAhead = 512;  // of the numbers that are read, others are asked for

template <class I>
SPARSECC_INLINE void spread_row(const I* crd, int64_t n, int64_t base, uint32_t above, uint32_t* keys) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(crd + i + kAhead);
  for (int64_t i = 0; i < n; ++i) keys[i] = (uint32_t)(crd[i] - base) << 1 | above;
}

template <class V>
SPARSECC_INLINE void copy_row(const V* values, int64_t n, V* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = values[i];
}

template <bool kToKeys, class V, class I>
SPARSECC_INLINE void put(const MergeJob<V, I>& job, int64_t out, uint32_t key, V value) {
  if constexpr (kToKeys) {
    job.keys[out] = key & ~1u;
  } else {
    job.crd[out] = (I)((int64_t)(key >> 1 & job.mask) + job.base);
  }
  job.values[out] = value;
}

// The value, or zero where it is not wanted.
SPARSECC_INLINE float value_if(float value, bool wanted) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits &= 0u - (uint32_t)wanted;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

SPARSECC_INLINE double value_if(double value, bool wanted) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  bits &= uint64_t{0} - (uint64_t)wanted;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Positions in both lists and in what comes out, and which merged keys were the second of two equal ones.
struct Places {
  int64_t a, b, out;
  uint32_t* pairs;
};

template <bool kBoth, bool kToKeys, class V, class I>
SPARSECC_INLINE void step(const MergeJob<V, I>& job, Places& at) {
  const uint32_t ka = job.a[at.a], kb = job.b[at.b];
  const V va = job.a_values[at.a], vb = job.b_values[at.b];
  const bool from_a = ka < kb, from_b = kb <= (ka | 1), pair = from_a & from_b;
  *at.pairs = (uint32_t)(at.a + at.b + 1);
  at.pairs += pair;
  put<kToKeys>(job, at.out, from_a ? ka : kb, kBoth ? va * vb : value_if(va, from_a) + value_if(vb, from_b));
  at.out += kBoth ? pair : 1;
  at.a += from_a;
  at.b += from_b;
}

template <bool kBoth, bool kToKeys, class V, class I>
SPARSECC_INLINE void finish(const MergeJob<V, I>& job, Places& at, const Places& end) {
  while (at.a < end.a && at.b < end.b) step<kBoth, kToKeys>(job, at);
  if constexpr (!kBoth) {
    for (; at.a < end.a; ++at.a) put<kToKeys>(job, at.out++, job.a[at.a], job.a_values[at.a] + V{0});
    for (; at.b < end.b; ++at.b) put<kToKeys>(job, at.out++, job.b[at.b], job.b_values[at.b] + V{0});
  }
}

// How many keys are below `wanted`.
static int64_t keys_below(const uint32_t* keys, int64_t count, uint32_t wanted) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    const bool less = keys[middle] < wanted;
    low = less ? middle + 1 : low;
    count = less ? count : middle;
  }
  return low;
}

SPARSECC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SPARSECC_INLINE void mark(const uint32_t* places, const uint32_t* end, uint64_t* bits) {
  for (; places < end; ++places) bits[*places / 64] |= uint64_t{1} << *places % 64;
}

template <class T>
SPARSECC_INLINE void move_down(T* to, const T* from, int64_t n) {
  __builtin_memmove(to, from, (size_t)n * sizeof(T));
}

// A step waits for the one before it: both halves are merged at once, the second with results as far away as the first
// can have, to where they are moved in the end.
template <bool kBoth, bool kToKeys, class V, class I>
static int64_t merge_to(const MergeJob<V, I>& job) {
  const int64_t words = pair_words(job.a_count + job.b_count), half = job.a_count / 2;
  for (int64_t i = 0; i < words; ++i) job.pairs[i] = 0;
  const int64_t in_b = keys_below(job.b, job.b_count, job.a[half]);
  const int64_t pairs = smaller(half, in_b);  // at most, in the first half
  const Places middle = {half, in_b, kBoth ? pairs : half + in_b, job.room + pairs + 1};
  const Places end = {job.a_count, job.b_count, 0, nullptr};
  Places near = {0, 0, 0, job.room}, far = middle;
  for (;;) {  // as far as no list can end
    const int64_t steps = smaller(smaller(middle.a - near.a, middle.b - near.b), smaller(end.a - far.a, end.b - far.b));
    if (steps <= 0) break;
    Places one = near, other = far;
    for (int64_t i = 0; i < steps; ++i) {
      step<kBoth, kToKeys>(job, one);
      step<kBoth, kToKeys>(job, other);
    }
    near = one;
    far = other;
  }
  finish<kBoth, kToKeys>(job, near, middle);
  finish<kBoth, kToKeys>(job, far, end);
  mark(job.room, near.pairs, job.pairs);
  mark(middle.pairs, far.pairs, job.pairs);
  const int64_t n = far.out - middle.out;
  if constexpr (kToKeys) {
    move_down(job.keys + near.out, job.keys + middle.out, n);
  } else {
    move_down(job.crd + near.out, job.crd + middle.out, n);
  }
  move_down(job.values + near.out, job.values + middle.out, n);
  return near.out + n;
}
