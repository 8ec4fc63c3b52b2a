// Sixteen keys at a time (AVX-512).
//
// Of the next sixteen keys of both lists, the second turned round, the smaller ones of each lane are the first sixteen
// of the merged list: how many of them are from which list is known at once, which is all that the next step waits for.
// A network sorts them, and their last bits say where each value is from.
#pragma once

constexpr int kAhead = 512;  // of the numbers that are read, others are asked for

SPARSECC_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)_bzhi_u32(0xffff, (uint32_t)(n < 16 ? n : 16)); }

SPARSECC_INLINE void spread_row(const int32_t* crd, int64_t n, int64_t base, uint32_t above, uint32_t* keys) {
  const __m512i from = _mm512_set1_epi32((int32_t)base), over = _mm512_set1_epi32((int32_t)above);
  for (int64_t i = 0; i < n; i += 16) {
    __builtin_prefetch(crd + i + kAhead);
    const __m512i c = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(first_lanes(n - i), crd + i), from);
    _mm512_storeu_si512(keys + i, _mm512_or_epi32(_mm512_slli_epi32(c, 1), over));
  }
}

SPARSECC_INLINE void spread_row(const int64_t* crd, int64_t n, int64_t base, uint32_t above, uint32_t* keys) {
  const __m512i from = _mm512_set1_epi64(base);
  const __m256i over = _mm256_set1_epi32((int32_t)above);
  for (int64_t i = 0; i < n; i += 8) {
    __builtin_prefetch(crd + i + kAhead / 2);
    const __m512i c = _mm512_sub_epi64(_mm512_maskz_loadu_epi64((__mmask8)first_lanes(n - i), crd + i), from);
    const __m256i narrow = _mm512_cvtepi64_epi32(c);
    _mm256_storeu_si256((__m256i*)(keys + i), _mm256_or_si256(_mm256_slli_epi32(narrow, 1), over));
  }
}

SPARSECC_INLINE void copy_row(const float* values, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(to + i, _mm512_maskz_loadu_ps(first_lanes(n - i), values + i));
}

SPARSECC_INLINE void copy_row(const double* values, int64_t n, double* to) {
  for (int64_t i = 0; i < n; i += 8)
    _mm512_storeu_pd(to + i, _mm512_maskz_loadu_pd((__mmask8)first_lanes(n - i), values + i));
}

// One exchange between lanes `kApart` from each other.
template <int kApart>
SPARSECC_INLINE __m512i exchange(__m512i x) {
  const __m512i other = kApart == 8   ? _mm512_shuffle_i64x2(x, x, 0x4e)
                        : kApart == 4 ? _mm512_shuffle_i64x2(x, x, 0xb1)
                        : kApart == 2 ? _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0x4e)
                                      : _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0xb1);
  constexpr __mmask16 kUpper = kApart == 8 ? 0xff00 : kApart == 4 ? 0xf0f0 : kApart == 2 ? 0xcccc : 0xaaaa;
  return _mm512_mask_max_epu32(_mm512_min_epu32(x, other), kUpper, x, other);
}

// Values of sixteen keys.
template <class V>
struct Sixteen;

template <>
struct Sixteen<float> {
  __m512 v;
  static Sixteen none() { return {_mm512_setzero_ps()}; }
  // Those of lanes in `from_a` and `from_b` come one after the other from there; others are zero.
  SPARSECC_INLINE Sixteen gather(const float* a, __mmask16 from_a, const float* b, __mmask16 from_b) {
    const __m512 of_a = _mm512_maskz_loadu_ps(first_lanes(_mm_popcnt_u32(from_a)), a);
    const __m512 of_b = _mm512_maskz_loadu_ps(first_lanes(_mm_popcnt_u32(from_b)), b);
    return {_mm512_mask_expand_ps(_mm512_maskz_expand_ps(from_a, of_a), from_b, of_b)};
  }
  // Of each key the value of the one before it.
  SPARSECC_INLINE Sixteen shifted(const Sixteen& earlier, const Sixteen& now) {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(now.v), _mm512_castps_si512(earlier.v), 15))};
  }
  SPARSECC_INLINE Sixteen sum(__mmask16 pairs, const Sixteen& one, const Sixteen& other) {
    return {_mm512_add_ps(_mm512_maskz_mov_ps(pairs, one.v), other.v)};
  }
  SPARSECC_INLINE Sixteen product(const Sixteen& one, const Sixteen& other) {
    return {_mm512_mul_ps(one.v, other.v)};
  }
  SPARSECC_INLINE void put(const Sixteen& x, __mmask16 which, float* to) {
    _mm512_mask_storeu_ps(to, first_lanes(_mm_popcnt_u32(which)), _mm512_maskz_compress_ps(which, x.v));
  }
};

template <>
struct Sixteen<double> {
  __m512d low, high;
  static Sixteen none() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  SPARSECC_INLINE __m512d eight(const double* a, __mmask8 from_a, const double* b, __mmask8 from_b) {
    const __m512d of_a = _mm512_maskz_loadu_pd((__mmask8)first_lanes(_mm_popcnt_u32(from_a)), a);
    const __m512d of_b = _mm512_maskz_loadu_pd((__mmask8)first_lanes(_mm_popcnt_u32(from_b)), b);
    return _mm512_mask_expand_pd(_mm512_maskz_expand_pd(from_a, of_a), from_b, of_b);
  }
  SPARSECC_INLINE Sixteen gather(const double* a, __mmask16 from_a, const double* b, __mmask16 from_b) {
    const int in_a = _mm_popcnt_u32(from_a & 0xff), in_b = _mm_popcnt_u32(from_b & 0xff);
    return {eight(a, (__mmask8)from_a, b, (__mmask8)from_b),
            eight(a + in_a, (__mmask8)(from_a >> 8), b + in_b, (__mmask8)(from_b >> 8))};
  }
  SPARSECC_INLINE __m512d shift(__m512d earlier, __m512d now) {
    return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(now), _mm512_castpd_si512(earlier), 7));
  }
  SPARSECC_INLINE Sixteen shifted(const Sixteen& earlier, const Sixteen& now) {
    return {shift(earlier.high, now.low), shift(now.low, now.high)};
  }
  SPARSECC_INLINE Sixteen sum(__mmask16 pairs, const Sixteen& one, const Sixteen& other) {
    return {_mm512_add_pd(_mm512_maskz_mov_pd((__mmask8)pairs, one.low), other.low),
            _mm512_add_pd(_mm512_maskz_mov_pd((__mmask8)(pairs >> 8), one.high), other.high)};
  }
  SPARSECC_INLINE Sixteen product(const Sixteen& one, const Sixteen& other) {
    return {_mm512_mul_pd(one.low, other.low), _mm512_mul_pd(one.high, other.high)};
  }
  SPARSECC_INLINE void put(const Sixteen& x, __mmask16 which, double* to) {
    const int first = _mm_popcnt_u32(which & 0xff), second = _mm_popcnt_u32(which >> 8);
    _mm512_mask_storeu_pd(to, (__mmask8)first_lanes(first), _mm512_maskz_compress_pd((__mmask8)which, x.low));
    _mm512_mask_storeu_pd(to + first, (__mmask8)first_lanes(second),
                          _mm512_maskz_compress_pd((__mmask8)(which >> 8), x.high));
  }
};

SPARSECC_INLINE void put_coordinates(__m512i x, int64_t base, __mmask16 lanes, int32_t* to) {
  _mm512_mask_storeu_epi32(to, lanes, _mm512_add_epi32(x, _mm512_set1_epi32((int32_t)base)));
}

SPARSECC_INLINE void put_coordinates(__m512i x, int64_t base, __mmask16 lanes, int64_t* to) {
  const __m512i from = _mm512_set1_epi64(base);
  const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(x));
  const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(x, 1));
  _mm512_mask_storeu_epi64(to, (__mmask8)lanes, _mm512_add_epi64(low, from));
  _mm512_mask_storeu_epi64(to + 8, (__mmask8)(lanes >> 8), _mm512_add_epi64(high, from));
}

// How far a merge has come, and the last keys and values.
template <class V>
struct Progress {
  int64_t a = 0, b = 0, out = 0;
  __m512i keys;
  Sixteen<V> values;
};

// Merges sixteen keys, of which `lanes` are some; without kAll, keys behind the last are none.
template <bool kBoth, bool kToKeys, bool kAll, class V, class I>
SPARSECC_INLINE void merge_sixteen(const MergeJob<V, I>& job, Progress<V>& at, __mmask16 lanes, uint16_t* pairs_to) {
  const __m512i turned = _mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i ka = _mm512_loadu_si512(job.a + at.a);
  const __m512i kb = _mm512_permutexvar_epi32(turned, _mm512_loadu_si512(job.b + at.b));
  const int64_t in_a = _mm_popcnt_u32(_mm512_cmplt_epu32_mask(ka, kb));
  const __m512i x = exchange<1>(exchange<2>(exchange<4>(exchange<8>(_mm512_min_epu32(ka, kb)))));
  const __mmask16 second = _mm512_test_epi32_mask(x, _mm512_set1_epi32(1));
  const __mmask16 from_b = kAll ? second : (__mmask16)(second & lanes);
  const __mmask16 from_a = (__mmask16)(kAll ? ~second : ~second & lanes);
  const __m512i earlier = _mm512_alignr_epi32(x, at.keys, 15);
  __mmask16 pairs = _mm512_cmpeq_epi32_mask(_mm512_xor_epi32(x, earlier), _mm512_set1_epi32(1));
  if (!kAll) pairs &= lanes;
  const Sixteen<V> values = Sixteen<V>::gather(job.a_values + at.a, from_a, job.b_values + at.b, from_b);
  const Sixteen<V> first = Sixteen<V>::shifted(at.values, values);
  // A sum is written where the second of two keys is. If that is in the next sixteen, what was written for the first
  // one is written over.
  const __mmask16 kept = (__mmask16)(kBoth ? pairs : kAll ? ~(pairs >> 1) : ~(pairs >> 1) & lanes);
  __builtin_prefetch(job.a_values + at.a + kAhead);
  __builtin_prefetch(job.b_values + at.b + kAhead);
  if (!kToKeys && !kBoth) {
    __builtin_prefetch(job.crd + at.out + kAhead, 1);
    __builtin_prefetch(job.values + at.out + kAhead, 1);
  }
  const int64_t out = kBoth ? at.out : at.out - (pairs & 1);
  const int64_t n = _mm_popcnt_u32(kept);
  Sixteen<V>::put(kBoth ? Sixteen<V>::product(first, values) : Sixteen<V>::sum(pairs, first, values), kept,
                  job.values + out);
  if constexpr (kToKeys) {
    const __m512i keys = _mm512_and_epi32(x, _mm512_set1_epi32(-2));
    _mm512_mask_storeu_epi32(job.keys + out, first_lanes(n), _mm512_maskz_compress_epi32(kept, keys));
  } else {
    const __m512i crd = _mm512_and_epi32(_mm512_srli_epi32(x, 1), _mm512_set1_epi32((int32_t)job.mask));
    put_coordinates(_mm512_maskz_compress_epi32(kept, crd), job.base, first_lanes(n), job.crd + out);
  }
  *pairs_to = pairs;
  at.keys = x;
  at.values = values;
  at.a += in_a;
  at.b += 16 - in_a;
  at.out = out + n;
}

template <bool kBoth, bool kToKeys, class V, class I>
static int64_t merge_to(const MergeJob<V, I>& job) {
  const int64_t total = job.a_count + job.b_count, whole = total / 16;
  uint16_t* pairs = (uint16_t*)job.pairs;
  Progress<V> at = {0, 0, 0, _mm512_set1_epi32(-1), Sixteen<V>::none()};
  for (int64_t i = 0; i < whole; ++i) merge_sixteen<kBoth, kToKeys, true>(job, at, 0xffff, pairs + i);
  merge_sixteen<kBoth, kToKeys, false>(job, at, first_lanes(total % 16), pairs + whole);
  for (int64_t i = whole + 1; i < 4 * pair_words(total); ++i) pairs[i] = 0;
  return at.out;
}
