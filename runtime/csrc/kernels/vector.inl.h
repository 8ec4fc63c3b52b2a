// Sixteen floats as one value on every instruction set: one 512-bit, two 256-bit or four 128-bit
// registers. Arithmetic is GCC vector extensions; `a * b + c` is contracted to FMA where there is one.
#pragma once

#define SPARSECC_INLINE static inline __attribute__((always_inline))
// For loops over registers: left rolled they would keep the array in memory.
#define SPARSECC_UNROLL _Pragma("GCC unroll 32")

constexpr int kParts = kGroup / kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecUint __attribute__((vector_size(kLanes * 4)));
typedef float VecLoose __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

struct F16 {
  Vec part[kParts];
};

// x - 0 is x, also for -0: folds to one broadcast.
SPARSECC_INLINE Vec splat(float s) { return s - Vec{}; }

SPARSECC_INLINE F16 broadcast(float s) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) v.part[p] = splat(s);
  return v;
}

SPARSECC_INLINE F16 load(const float* from) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) v.part[p] = *(const VecLoose*)(from + p * kLanes);
  return v;
}

#if SPARSECC_AVX512
SPARSECC_INLINE F16 load(const Half* from) {
  return F16{{(Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))}};
}

SPARSECC_INLINE F16 load(const Brain* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return F16{{(Vec)_mm512_slli_epi32(wide, 16)}};
}
#elif SPARSECC_AVX2
SPARSECC_INLINE F16 load(const Half* from) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    v.part[p] = (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + p * kLanes)));
  return v;
}

SPARSECC_INLINE F16 load(const Brain* from) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + p * kLanes)));
    v.part[p] = (Vec)_mm256_slli_epi32(wide, 16);
  }
  return v;
}
#elif SPARSECC_NEON
SPARSECC_INLINE F16 load(const Half* from) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    v.part[p] = (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)(from + p * kLanes))));
  return v;
}

SPARSECC_INLINE F16 load(const Brain* from) {
  F16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    v.part[p] = (Vec)vshll_n_u16(vld1_u16((const uint16_t*)(from + p * kLanes)), 16);
  return v;
}
#endif

SPARSECC_INLINE void store(float* to, F16 v) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) *(VecLoose*)(to + p * kLanes) = v.part[p];
}

SPARSECC_INLINE F16 add(F16 a, F16 b) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p];
  return a;
}

SPARSECC_INLINE F16 multiply_add(F16 sum, F16 a, F16 b) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) sum.part[p] += a.part[p] * b.part[p];
  return sum;
}

// Numbers that stand side by side in memory, each to be multiplied with whole vectors.
#if SPARSECC_NEON
// In registers: a multiplication takes any lane of one, so that four numbers need one load.
template <int Count>
struct Singles {
  Vec four[(Count + 3) / 4];
};

// The first 1 to 4 lanes from memory, the others zero.
template <int Count>
SPARSECC_INLINE Vec load_lanes(const float* from) {
  typedef float PairLoose __attribute__((vector_size(8), aligned(4), may_alias));
  typedef float One __attribute__((may_alias));
  if constexpr (Count >= 4) return *(const VecLoose*)from;
  if constexpr (Count == 1) return (Vec)vsetq_lane_f32(*(const One*)from, vdupq_n_f32(0.0f), 0);
  const Vec pair = (Vec)vcombine_f32((float32x2_t)*(const PairLoose*)from, vdup_n_f32(0.0f));
  if constexpr (Count == 2) return pair;
  return (Vec)vsetq_lane_f32(((const One*)from)[2], (float32x4_t)pair, 2);
}

template <int Count>
SPARSECC_INLINE Singles<Count> singles(const float* from) {
  Singles<Count> s;
  SPARSECC_UNROLL
  for (int i = 0; i < Count / 4; ++i) s.four[i] = *(const VecLoose*)(from + 4 * i);
  if constexpr (Count % 4 != 0) s.four[Count / 4] = load_lanes<Count % 4>(from + Count / 4 * 4);
  return s;
}

template <int Count>
SPARSECC_INLINE F16 multiply_add(F16 sum, const Singles<Count>& s, int i, F16 b) {
  const Vec one = splat(s.four[i / 4][i % 4]);
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) sum.part[p] += one * b.part[p];
  return sum;
}
#else
// In memory: a multiplication takes one from there, or a load spreads it over a register.
template <int Count>
struct Singles {
  const float* from;
};

template <int Count>
SPARSECC_INLINE Singles<Count> singles(const float* from) {
  return {from};
}

template <int Count>
SPARSECC_INLINE F16 multiply_add(F16 sum, const Singles<Count>& s, int i, F16 b) {
  return multiply_add(sum, broadcast(s.from[i]), b);
}
#endif

// The first n of 16 (1 <= n <= 16); the others are neither written nor, when loading, read.
SPARSECC_INLINE void store_first(float* to, F16 v, int64_t n) {
#if SPARSECC_AVX512
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1u), (__m512)v.part[0]);
#else
  if (n == kGroup) {
    store(to, v);
    return;
  }
  float kept[kGroup];
  store(kept, v);
  for (int64_t i = 0; i < n; ++i) to[i] = kept[i];
#endif
}

SPARSECC_INLINE F16 load_first(const float* from, int64_t n) {
#if SPARSECC_AVX512
  return F16{{(Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), from)}};
#else
  if (n == kGroup) return load(from);
  float kept[kGroup] = {};
  for (int64_t i = 0; i < n; ++i) kept[i] = from[i];
  return load(kept);
#endif
}
