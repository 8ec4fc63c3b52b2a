// Sixteen pixels of a quad plane in registers, and what is done with planes besides convolution.
#pragma once

typedef uint32_t __attribute__((may_alias)) Quad32;

// Sixteen 32-bit words: pixels of a quad plane, or one channel of them widened.
struct I16 {
  VecInt part[kParts];
};

typedef int32_t VecIntLoose __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

SPARSECC_INLINE I16 load_unit(const uint8_t* from) {
  I16 v;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) v.part[p] = *(const VecIntLoose*)(from + p * kLanes * 4);
  return v;
}

SPARSECC_INLINE void store_unit(uint8_t* to, const I16& v) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) *(VecIntLoose*)(to + p * kLanes * 4) = v.part[p];
}

constexpr uint32_t kAll = 0xffff;

// Where bit i of `kept` is the n-th that is set, word i <-> word n in memory. Nothing beyond the set bits is
// touched.
SPARSECC_INLINE I16 load_kept(const uint8_t* from, uint32_t kept) {
  if (kept == kAll) return load_unit(from);
#if SPARSECC_AVX512
  const __mmask16 first = (__mmask16)((1u << __builtin_popcount(kept)) - 1u);
  return {{(VecInt)_mm512_maskz_expand_epi32((__mmask16)kept, _mm512_maskz_loadu_epi32(first, from))}};
#else
  Quad32 words[kUnit] = {};
  const Quad32* next = (const Quad32*)from;
  for (int i = 0; i < kUnit; ++i)
    if ((kept >> i & 1) != 0) words[i] = *next++;
  return load_unit((const uint8_t*)words);
#endif
}

SPARSECC_INLINE void store_kept(uint8_t* to, const I16& v, uint32_t kept) {
  if (kept == kAll) return store_unit(to, v);
#if SPARSECC_AVX512
  const __mmask16 first = (__mmask16)((1u << __builtin_popcount(kept)) - 1u);
  _mm512_mask_storeu_epi32(to, first, _mm512_maskz_compress_epi32((__mmask16)kept, (__m512i)v.part[0]));
#else
  Quad32 words[kUnit];
  store_unit((uint8_t*)words, v);
  Quad32* next = (Quad32*)to;
  for (int i = 0; i < kUnit; ++i)
    if ((kept >> i & 1) != 0) *next++ = words[i];
#endif
}

SPARSECC_INLINE VecInt channel_of(VecInt quads, int c) { return (VecInt)((VecUint)quads >> (8 * c)) & 255; }

// To the nearest integer, ties to even. Whatever is far outside of a byte stays there.
SPARSECC_INLINE VecInt rounded(Vec z) {
  z = z < splat(1e6f) ? z : splat(1e6f);
#if SPARSECC_AVX512
  return (VecInt)_mm512_cvtps_epi32((__m512)z);
#elif SPARSECC_AVX2
  return (VecInt)_mm256_cvtps_epi32((__m256)z);
#elif SPARSECC_NEON
  return (VecInt)vcvtnq_s32_f32((float32x4_t)z);
#else
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  z = z > splat(-1e6f) ? z : splat(-1e6f);
  return __builtin_convertvector((z + shift) - shift, VecInt);
#endif
}

struct ByteRange {
  uint8_t low, high;
};

// Four channels of integers to the bytes of quads, saturated to the range.
SPARSECC_INLINE VecInt pack_quads(VecInt c0, VecInt c1, VecInt c2, VecInt c3, ByteRange range) {
#if SPARSECC_AVX512
  const __m512i mixed = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)c0, (__m512i)c1),
                                            _mm512_packs_epi32((__m512i)c2, (__m512i)c3));
  const __m512i kept = _mm512_min_epu8(_mm512_max_epu8(mixed, _mm512_set1_epi8((char)range.low)),
                                       _mm512_set1_epi8((char)range.high));
  const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  return (VecInt)_mm512_shuffle_epi8(kept, order);
#elif SPARSECC_AVX2
  const __m256i mixed = _mm256_packus_epi16(_mm256_packs_epi32((__m256i)c0, (__m256i)c1),
                                            _mm256_packs_epi32((__m256i)c2, (__m256i)c3));
  const __m256i kept = _mm256_min_epu8(_mm256_max_epu8(mixed, _mm256_set1_epi8((char)range.low)),
                                       _mm256_set1_epi8((char)range.high));
  const __m256i order = _mm256_setr_epi32(0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703, 0x0c080400,
                                          0x0d090501, 0x0e0a0602, 0x0f0b0703);
  return (VecInt)_mm256_shuffle_epi8(kept, order);
#else
  const VecInt low = (int32_t)range.low - VecInt{}, high = (int32_t)range.high - VecInt{};
  VecInt c[kLanesOfQuad] = {c0, c1, c2, c3};
  for (int i = 0; i < kLanesOfQuad; ++i) {
    c[i] = c[i] > low ? c[i] : low;
    c[i] = c[i] < high ? c[i] : high;
  }
  return c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
#endif
}

static void plane_pick(const uint32_t* from, int64_t step, int64_t count, uint32_t* to) {
  int64_t i = 0;
#if SPARSECC_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  if (step == 2)
    for (; i + kUnit < count; i += kUnit)  // reads one word beyond the last it needs
      _mm512_storeu_si512(to + i, _mm512_permutex2var_epi32(_mm512_loadu_si512(from + 2 * i), even,
                                                            _mm512_loadu_si512(from + 2 * i + kUnit)));
#elif SPARSECC_AVX2
  if (step == 2)
    for (; i + 8 < count; i += 8) {
      const __m256 low = _mm256_loadu_ps((const float*)(from + 2 * i));
      const __m256 high = _mm256_loadu_ps((const float*)(from + 2 * i + 8));
      const __m256i mixed = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
      _mm256_storeu_si256((__m256i*)(to + i), _mm256_permute4x64_epi64(mixed, 0xd8));
    }
#endif
  for (; i < count; ++i) to[i] = from[i * step];
}

static void plane_raise(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) to[i] = to[i] > from[i] ? to[i] : from[i];
}

static void plane_sum(const uint32_t* quads, int64_t pixels, uint64_t sums[kLanesOfQuad]) {
  constexpr int64_t kSafe = 1 << 20;  // units whose sums of bytes fit 32 bits
  for (int c = 0; c < kLanesOfQuad; ++c) sums[c] = 0;
  int64_t i = 0;
  while (i + kUnit <= pixels) {
    const int64_t end = pixels - i > kSafe * kUnit ? i + kSafe * kUnit : pixels;
    VecInt part[kLanesOfQuad] = {};
    for (; i + kUnit <= end; i += kUnit) {
      const I16 x = load_unit((const uint8_t*)(quads + i));
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p) SPARSECC_UNROLL
      for (int c = 0; c < kLanesOfQuad; ++c) part[c] += channel_of(x.part[p], c);
    }
    for (int c = 0; c < kLanesOfQuad; ++c)
      for (int lane = 0; lane < kLanes; ++lane) sums[c] += (uint32_t)part[c][lane];
  }
  for (; i < pixels; ++i)
    for (int c = 0; c < kLanesOfQuad; ++c) sums[c] += quads[i] >> (8 * c) & 255;
}

static void plane_add(const PlaneAddJob* job) {
  const ByteRange range = {job->low, job->high};
  const Vec a_scale = splat(job->a_scale), b_scale = splat(job->b_scale), bias = splat(job->bias);
  uint8_t last[3][kUnit * kLanesOfQuad];
  constexpr int64_t kStep = kUnit * kLanesOfQuad;
  for (int64_t i = 0; i < job->bytes; i += kStep) {
    const uint8_t *a = job->a + i, *b = job->b + i;
    uint8_t* y = job->y + i;
    const int64_t left = job->bytes - i;
    if (left < kStep) {
      for (int64_t k = 0; k < kStep; ++k) {
        last[0][k] = k < left ? a[k] : 0;
        last[1][k] = k < left ? b[k] : 0;
      }
      a = last[0];
      b = last[1];
      y = last[2];
    }
    const I16 x[2] = {load_unit(a), load_unit(b)};
    I16 sum;
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) {
      VecInt c[kLanesOfQuad];
      SPARSECC_UNROLL
      for (int k = 0; k < kLanesOfQuad; ++k) {
        const Vec one = __builtin_convertvector(channel_of(x[0].part[p], k), Vec);
        const Vec two = __builtin_convertvector(channel_of(x[1].part[p], k), Vec);
        c[k] = rounded(one * a_scale + (two * b_scale + bias)) + job->zero_point;
      }
      sum.part[p] = pack_quads(c[0], c[1], c[2], c[3], range);
    }
    store_unit(y, sum);
    for (int64_t k = 0; left < kStep && k < left; ++k) job->y[i + k] = last[2][k];
  }
}

static void plane_quantize(const PlaneFloatJob* job) {
  const Vec scale = splat(job->scale);
  for (int64_t i = 0; i < job->pixels; i += kUnit) {
    const int64_t left = job->pixels - i < kUnit ? job->pixels - i : kUnit;
    I16 c[kLanesOfQuad] = {}, quads;
    for (int k = 0; k < job->channels; ++k) {
      const F16 x = load_first(job->planes[k] + i, left);
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p) c[k].part[p] = rounded(x.part[p] / scale);
    }
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p)
      quads.part[p] = pack_quads(c[0].part[p] + job->zero_point, c[1].part[p] + job->zero_point,
                                 c[2].part[p] + job->zero_point, c[3].part[p] + job->zero_point, {0, 255});
    store_kept(job->quads + i * kLanesOfQuad, quads, kAll >> (kUnit - left));
  }
}

static void plane_dequantize(const PlaneFloatJob* job) {
  const Vec scale = splat(job->scale);
  for (int64_t i = 0; i < job->pixels; i += kUnit) {
    const int64_t left = job->pixels - i < kUnit ? job->pixels - i : kUnit;
    const I16 quads = load_kept(job->quads + i * kLanesOfQuad, kAll >> (kUnit - left));
    for (int k = 0; k < job->channels; ++k) {
      F16 x;
      SPARSECC_UNROLL
      for (int p = 0; p < kParts; ++p)
        x.part[p] =
            __builtin_convertvector(channel_of(quads.part[p], k) - job->zero_point, Vec) * scale;
      store_first(job->planes[k] + i, x, left);
    }
  }
}
