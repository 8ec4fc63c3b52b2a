// Floats to bytes by one scale and zero point, exactly as DynamicQuantizeLinear rounds, and into panels.
#pragma once

static void extremes(const float* x, int64_t count, float* low, float* high) {
  constexpr int kApart = 4 / kParts > 0 ? 4 / kParts : 1;  // sums kept apart, for speed
  F16 least[kApart], most[kApart], poison[kApart];
  for (int c = 0; c < kApart; ++c) least[c] = most[c] = poison[c] = broadcast(0.0f);
  const auto take = [&](int c, F16 v) __attribute__((always_inline)) {
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) {
      least[c].part[p] = at_most(least[c].part[p], v.part[p]);
      most[c].part[p] = at_least(most[c].part[p], v.part[p]);
      poison[c].part[p] += v.part[p] * 0.0f;  // NaN from NaN or infinity, and it stays
    }
  };
  int64_t i = 0;
  for (; i + kApart * kGroup <= count; i += kApart * kGroup) SPARSECC_UNROLL
  for (int c = 0; c < kApart; ++c) take(c, load(x + i + c * kGroup));
  for (; i < count; i += kGroup) take(0, load_first(x + i, count - i < kGroup ? count - i : kGroup));
  Vec lows = least[0].part[0], highs = most[0].part[0], poisons = poison[0].part[0];
  for (int c = 0; c < kApart; ++c)
    for (int p = 0; p < kParts; ++p) {
      lows = at_most(lows, least[c].part[p]);
      highs = at_least(highs, most[c].part[p]);
      poisons += poison[c].part[p];
    }
  *low = *high = 0.0f;
  float sum = 0.0f;
#if SPARSECC_AVX512
  *low = _mm512_reduce_min_ps((__m512)lows);
  *high = _mm512_reduce_max_ps((__m512)highs);
  sum = _mm512_reduce_add_ps((__m512)poisons);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    *low = lows[lane] < *low ? lows[lane] : *low;
    *high = highs[lane] > *high ? highs[lane] : *high;
    sum += poisons[lane];
  }
#endif
  if (sum != 0.0f) *low = *high = sum;  // NaN
}

// The division that DynamicQuantizeLinear asks for is dear, a product with the reciprocal nearly equal: the
// two round to different integers only near the middle between these, where the division is made.
// The relative errors of reciprocal, product and quotient sum up to less than 2^-22, and no quotient is
// larger than 256, or else it saturates either way.
constexpr float kSurelyRounded = 0.4998f;

struct Quantizer {
  Vec scale, reciprocal, least, most;
  VecInt zero_point;
};

SPARSECC_INLINE Quantizer quantizer(ByteScale to) {
  const float zero_point = (float)to.zero_point;
  return {splat(to.scale), splat(1.0f / to.scale), splat(-zero_point), splat(255.0f - zero_point),
          to.zero_point - kStoredLess - VecInt{}};
}

// NaN becomes the least.
SPARSECC_INLINE Vec exact_quotient(const Quantizer& q, Vec x) {
  const Vec quotient = x / q.scale;
  return at_most(quotient > q.least ? quotient : q.least, q.most);
}

// 64 floats to 64 bytes. What is far outside their range or NaN is never surely rounded, or saturates.
#if SPARSECC_AVX512
SPARSECC_INLINE void quantize64(const Quantizer& q, const float* x, uint8_t* to) {
  __m512i rounded[4];
  __mmask16 unsure = 0;
  SPARSECC_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), (__m512)q.reciprocal);
    rounded[i] = _mm512_cvtps_epi32(product);
    const __m512 rest = _mm512_abs_ps(_mm512_sub_ps(product, _mm512_cvtepi32_ps(rounded[i])));
    unsure |= _mm512_cmp_ps_mask(rest, _mm512_set1_ps(kSurelyRounded), _CMP_NLT_UQ);
  }
  if (__builtin_expect(unsure != 0, 0)) {
    for (int i = 0; i < 4; ++i)
      rounded[i] = _mm512_cvtps_epi32((__m512)exact_quotient(q, (Vec)_mm512_loadu_ps(x + 16 * i)));
  }
  const __m512i zero_point = _mm512_set1_epi16((short)q.zero_point[0]);
  const __m512i mixed = _mm512_packus_epi16(
      _mm512_adds_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), zero_point),
      _mm512_adds_epi16(_mm512_packs_epi32(rounded[2], rounded[3]), zero_point));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, mixed));
}
#elif SPARSECC_AVX2
SPARSECC_INLINE void quantize64(const Quantizer& q, const float* x, uint8_t* to) {
  for (int half = 0; half < 2; ++half, x += 32, to += 32) {
    __m256i rounded[4];
    __m256 unsure = _mm256_setzero_ps();
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    SPARSECC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), (__m256)q.reciprocal);
      rounded[i] = _mm256_cvtps_epi32(product);
      const __m256 rest = _mm256_and_ps(_mm256_sub_ps(product, _mm256_cvtepi32_ps(rounded[i])), magnitude);
      unsure = _mm256_or_ps(unsure, _mm256_cmp_ps(rest, _mm256_set1_ps(kSurelyRounded), _CMP_NLT_UQ));
    }
    if (__builtin_expect(_mm256_movemask_ps(unsure) != 0, 0)) {
      for (int i = 0; i < 4; ++i)
        rounded[i] = _mm256_cvtps_epi32((__m256)exact_quotient(q, (Vec)_mm256_loadu_ps(x + 8 * i)));
    }
    const __m256i zero_point = _mm256_set1_epi16((short)q.zero_point[0]);
    const __m256i mixed = _mm256_packus_epi16(
        _mm256_adds_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), zero_point),
        _mm256_adds_epi16(_mm256_packs_epi32(rounded[2], rounded[3]), zero_point));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(mixed, order));
  }
}
#elif SPARSECC_NEON
SPARSECC_INLINE void quantize64(const Quantizer& q, const float* x, uint8_t* to) {
  for (int quarter = 0; quarter < 4; ++quarter, x += 16, to += 16) {
    int32x4_t rounded[4];
    uint32x4_t sure = vdupq_n_u32(0xffffffffu);
    SPARSECC_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float32x4_t product = vmulq_f32(vld1q_f32(x + 4 * i), (float32x4_t)q.reciprocal);
      rounded[i] = vcvtnq_s32_f32(product);
      const float32x4_t rest = vabdq_f32(product, vcvtq_f32_s32(rounded[i]));
      sure = vandq_u32(sure, vcltq_f32(rest, vdupq_n_f32(kSurelyRounded)));
    }
    if (__builtin_expect(vminvq_u32(sure) == 0, 0)) {
      for (int i = 0; i < 4; ++i)
        rounded[i] = vcvtnq_s32_f32((float32x4_t)exact_quotient(q, (Vec)vld1q_f32(x + 4 * i)));
    }
    SPARSECC_UNROLL
    for (int i = 0; i < 4; ++i) rounded[i] = vqaddq_s32(rounded[i], (int32x4_t)q.zero_point);
    const int16x8_t low = vqmovn_high_s32(vqmovn_s32(rounded[0]), rounded[1]);
    const int16x8_t high = vqmovn_high_s32(vqmovn_s32(rounded[2]), rounded[3]);
    if constexpr (kStoredLess == 0) {
      vst1q_u8(to, vqmovun_high_s16(vqmovun_s16(low), high));
    } else {
      vst1q_s8((int8_t*)to, vqmovn_high_s16(vqmovn_s16(low), high));
    }
  }
}
#else
SPARSECC_INLINE void quantize64(const Quantizer& q, const float* x, uint8_t* to) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int i = 0; i < kQuantizeStep; i += kLanes) {
    const Vec rounded = (exact_quotient(q, *(const VecLoose*)(x + i)) + shift) - shift;
    const VecInt stored = __builtin_convertvector(rounded, VecInt) + q.zero_point;
    for (int lane = 0; lane < kLanes; ++lane) to[i + lane] = (uint8_t)stored[lane];
  }
}
#endif

// Sixteen quads of each of `rows` rows, [rows][16] by four bytes, to [16][rows] of the panel.
SPARSECC_INLINE void lay_quads(const float* bytes, int rows, XQuad* panel) {
  float turned[kGroup * kGroup] __attribute__((aligned(64)));
  float* to = sizeof(XQuad) == sizeof(float) ? (float*)panel : turned;
  if (rows > 1) {
    transpose_tile(bytes, kGroup, rows, kGroup, to, rows);
  } else {
    store(to, load(bytes));
  }
  if (sizeof(XQuad) == sizeof(float)) return;
  typedef uint16_t __attribute__((may_alias)) Wide;
  for (int64_t i = 0; i < int64_t{kQuantizeStep} * rows; ++i) ((Wide*)panel)[i] = ((const uint8_t*)turned)[i];
}

// The inputs k..k+63 of row r as bytes; anything beyond the last.
SPARSECC_INLINE void bytes64(const Quantizer& q, const QuantizeJob& job, int r, int64_t k, uint8_t* to) {
  const int64_t from = r * job.row_stride + k, left = job.inputs - k;
  if (job.bytes != nullptr) {
    const int64_t n = left < kQuantizeStep ? left : kQuantizeStep;
    __builtin_memcpy(to, job.bytes + from, (size_t)n);
    if constexpr (kStoredLess != 0)
      for (int64_t i = 0; i < n; ++i) to[i] = (uint8_t)(to[i] - kStoredLess);
  } else if (left < kQuantizeStep) {
    float last[kQuantizeStep] = {};
    for (int64_t i = 0; i < left; ++i) last[i] = job.x[from + i];
    quantize64(q, last, to);
  } else {
    quantize64(q, job.x + from, to);
  }
}

static void quantize(const QuantizeJob* job) {
  const Quantizer q = quantizer(job->to);
  XQuad* panel = (XQuad*)job->panel;
  float bytes[kGroup * kGroup] __attribute__((aligned(64)));  // four bytes each
  for (int64_t k = 0; k < job->inputs; k += kQuantizeStep, panel += kGroup * job->rows) {
    for (int r = 0; r < job->rows; ++r) bytes64(q, *job, r, k, (uint8_t*)(bytes + r * kGroup));
    lay_quads(bytes, job->rows, panel);
  }
}

// Every half of a window is the first half of one and the second half of the one before.
template <int Width>
static void quantize_windows_of(const QuantizeJob* job) {
  constexpr int kHalf = Width / 2;
  const Quantizer q = quantizer(job->to);
  const int64_t window = (int64_t)job->rows * Width;
  for (int64_t k = 0; k < job->inputs; k += kQuantizeStep)
    for (int r = 0; r < job->rows; ++r) {
      uint8_t bytes[kQuantizeStep] __attribute__((aligned(64)));
      bytes64(q, *job, r, k, bytes);
      uint8_t* to = (uint8_t*)job->panel + k / kHalf * window + r * Width;
      SPARSECC_UNROLL
      for (int h = 0; h < kQuantizeStep / kHalf; ++h, to += window) {
        __builtin_memcpy(to, bytes + h * kHalf, kHalf);
        if (k + h > 0) __builtin_memcpy(to - window + kHalf, bytes + h * kHalf, kHalf);
      }
    }
}

static void quantize_windows(const QuantizeJob* job, int width) {
  if (width == kWide) return quantize_windows_of<kWide>(job);
  quantize_windows_of<kNarrow>(job);
}

#if SPARSECC_AVX512 && SPARSECC_VNNI
// [input][32 rows]: of four inputs by twice sixteen rows, first four by four bytes are turned and then fours of them
// brought together.
static void quantize_lanes(const QuantizeJob* job) {
  const Quantizer q = quantizer(job->to);
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i first_two = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i last_two = _mm512_add_epi32(first_two, _mm512_set1_epi32(2));
  float bytes[kGroup * kGroup] __attribute__((aligned(64)));                 // four bytes each
  float turned[2][kGroup * kGroup] __attribute__((aligned(64))) = {};  // [quad][row] likewise
  uint8_t* to = (uint8_t*)job->panel;
  for (int64_t k = 0; k < job->inputs; k += kQuantizeStep) {
    for (int first = 0; first < job->rows; first += kGroup) {
      const int rows = job->rows - first < kGroup ? job->rows - first : kGroup;
      for (int r = 0; r < rows; ++r) bytes64(q, *job, first + r, k, (uint8_t*)(bytes + r * kGroup));
      transpose_tile(bytes, kGroup, rows, kGroup, turned[first / kGroup], kGroup);
    }
    for (int quad = 0; quad < kGroup; ++quad, to += kQuad * kLaneRows) {
      const __m512i low = _mm512_shuffle_epi8(_mm512_load_si512(turned[0] + quad * kGroup), turn);
      const __m512i high = _mm512_shuffle_epi8(_mm512_load_si512(turned[1] + quad * kGroup), turn);
      _mm512_store_si512(to, _mm512_permutex2var_epi32(low, first_two, high));
      _mm512_store_si512(to + 2 * kLaneRows, _mm512_permutex2var_epi32(low, last_two, high));
    }
  }
}
#else
constexpr void (*quantize_lanes)(const QuantizeJob*) = nullptr;
#endif
