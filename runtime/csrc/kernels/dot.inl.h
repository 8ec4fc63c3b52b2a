// Products of one block of 16 outputs by 4 inputs with rows of x: what the instruction sets have for it. Sums are
// 32-bit integers modulo 2^32, exactly those of MatMulInteger: nothing saturates on the way. The plain
// AVX2 instruction for bytes (vpmaddubsw) does, so weights are widened to 16 bits there.
//
// Every set defines
//   kOrder       how weights and x lie in memory (pack_int8.cc)
//   XQuad        four values of x in a panel, kStoredLess less than stored
//   QuadSums     sums of rows by 16 outputs, as RowSums or in another shape; row_of() gives one row of them
//   add_blocks   adds the products of kBlockStep blocks; x[b][r] is what row r has for block b. Tiles of kTileStep
//                rows leave nothing unused
#pragma once

// Sixteen 32-bit sums; unsigned, for they may wrap.
struct I16 {
  VecUint part[kParts];
};

#if SPARSECC_VNNI && SPARSECC_AVX512
constexpr QuadOrder kOrder = QuadOrder::kOutputs;
typedef uint32_t __attribute__((may_alias)) XQuad;
typedef __m512i QuadWeights;

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) { return _mm512_load_si512(from); }

SPARSECC_INLINE I16 dot(I16 sum, XQuad x, QuadWeights w) {
  return {{(VecUint)_mm512_dpbusd_epi32((__m512i)sum.part[0], _mm512_set1_epi32((int)x), w)}};
}
#elif SPARSECC_VNNI
constexpr QuadOrder kOrder = QuadOrder::kOutputs;
typedef uint32_t __attribute__((may_alias)) XQuad;
struct QuadWeights {
  __m256i part[2];
};

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) {
  return {{_mm256_load_si256((const __m256i*)from), _mm256_load_si256((const __m256i*)(from + 32))}};
}

SPARSECC_INLINE I16 dot(I16 sum, XQuad x, const QuadWeights& w) {
  const __m256i four = _mm256_set1_epi32((int)x);
  for (int p = 0; p < 2; ++p)
    sum.part[p] = (VecUint)_mm256_dpbusd_avx_epi32((__m256i)sum.part[p], four, w.part[p]);
  return sum;
}
#elif SPARSECC_AVX512
constexpr QuadOrder kOrder = QuadOrder::kPairs;
typedef uint64_t __attribute__((may_alias)) XQuad;
struct QuadWeights {
  __m512i pair[2];
};

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) {
  return {{_mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)from)),
           _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)(from + 32)))}};
}

SPARSECC_INLINE I16 dot(I16 sum, const XQuad& x, const QuadWeights& w) {
  const __m512i first = _mm512_madd_epi16(_mm512_set1_epi32((int)x), w.pair[0]);
  const __m512i second = _mm512_madd_epi16(_mm512_set1_epi32((int)(x >> 32)), w.pair[1]);
  sum.part[0] += (VecUint)first + (VecUint)second;
  return sum;
}
#elif SPARSECC_AVX2
constexpr QuadOrder kOrder = QuadOrder::kPairs;
typedef uint64_t __attribute__((may_alias)) XQuad;
struct QuadWeights {
  __m256i pair[2][2];
};

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) {
  QuadWeights w;
  for (int i = 0; i < 4; ++i)
    w.pair[i / 2][i % 2] = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i*)(from + 16 * i)));
  return w;
}

SPARSECC_INLINE I16 dot(I16 sum, const XQuad& x, const QuadWeights& w) {
  const __m256i first = _mm256_set1_epi32((int)x), second = _mm256_set1_epi32((int)(x >> 32));
  for (int p = 0; p < 2; ++p)
    sum.part[p] +=
        (VecUint)_mm256_madd_epi16(first, w.pair[0][p]) + (VecUint)_mm256_madd_epi16(second, w.pair[1][p]);
  return sum;
}
#elif SPARSECC_NEON
typedef uint32_t __attribute__((may_alias)) XQuad;
struct QuadWeights {
  int8x16_t part[kParts];
};

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) {
  QuadWeights w;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) w.part[p] = vld1q_s8(from + 16 * p);
  // Two instructions load all.
  __asm__("" : "+w"(w.part[0]), "+w"(w.part[1]), "+w"(w.part[2]), "+w"(w.part[3]));
  return w;
}

#if SPARSECC_I8MM
constexpr QuadOrder kOrder = QuadOrder::kBlockPairs;
#elif SPARSECC_DOTPROD
constexpr QuadOrder kOrder = QuadOrder::kOutputs;

// The quad of x is lane `Lane` of a register.
template <int Lane>
SPARSECC_INLINE I16 dot_lane(I16 sum, int8x16_t x, const QuadWeights& w) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    sum.part[p] = (VecUint)vdotq_laneq_s32((int32x4_t)sum.part[p], w.part[p], x, Lane);
  return sum;
}
#else
constexpr QuadOrder kOrder = QuadOrder::kSmallPairs;

// Eight outputs of half h: `first` and `second` have two inputs for each. Two products of signed bytes are summed
// in 16 bits, then two of those in 32.
SPARSECC_INLINE void add_pairs(I16& sum, int h, int8x16_t first, int8x16_t second, const QuadWeights& w) {
  const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(w.part[h]), vget_low_s8(first)),
                                 vget_low_s8(w.part[2 + h]), vget_low_s8(second));
  const int16x8_t high = vmlal_high_s8(vmull_high_s8(w.part[h], first), w.part[2 + h], second);
  sum.part[2 * h] = (VecUint)vpadalq_s16((int32x4_t)sum.part[2 * h], low);
  sum.part[2 * h + 1] = (VecUint)vpadalq_s16((int32x4_t)sum.part[2 * h + 1], high);
}

template <int Lane>
SPARSECC_INLINE I16 dot_lane(I16 sum, int8x16_t x, const QuadWeights& w) {
  const int8x16_t first = (int8x16_t)vdupq_laneq_s16((int16x8_t)x, 2 * Lane);
  const int8x16_t second = (int8x16_t)vdupq_laneq_s16((int16x8_t)x, 2 * Lane + 1);
  SPARSECC_UNROLL
  for (int h = 0; h < 2; ++h) add_pairs(sum, h, first, second, w);
  return sum;
}
#endif
#else
constexpr QuadOrder kOrder = QuadOrder::kInputs;
typedef int16_t Short8 __attribute__((vector_size(16)));
typedef int16_t Short8Loose __attribute__((vector_size(16), may_alias));
struct __attribute__((may_alias)) XQuad {
  int16_t value[kQuad];
};
struct QuadWeights {
  Short8 even[kQuad], odd[kQuad];  // of the 16 bytes of an input
};

SPARSECC_INLINE QuadWeights load_weights(const int8_t* from) {
  QuadWeights w;
  SPARSECC_UNROLL
  for (int i = 0; i < kQuad; ++i) {
    const Short8 both = *(const Short8Loose*)(from + i * kGroup);
    w.even[i] = (both << 8) >> 8;
    w.odd[i] = both >> 8;
  }
  return w;
}

// Products fit 16 bits: |255 * -128| < 2^15. Two of them in each 32-bit lane are told apart by shifts.
SPARSECC_INLINE I16 dot(I16 sum, const XQuad& x, const QuadWeights& w) {
  SPARSECC_UNROLL
  for (int i = 0; i < kQuad; ++i) {
    const VecInt even = (VecInt)(w.even[i] * x.value[i]), odd = (VecInt)(w.odd[i] * x.value[i]);
    sum.part[0] += (VecUint)((even << 16) >> 16);
    sum.part[1] += (VecUint)((odd << 16) >> 16);
    sum.part[2] += (VecUint)(even >> 16);
    sum.part[3] += (VecUint)(odd >> 16);
  }
  return sum;
}
#endif

#if SPARSECC_NEON && !SPARSECC_I8MM
constexpr int kStoredLess = 128;  // instructions want both factors signed
#else
constexpr int kStoredLess = 0;
#endif

// Sums of `Rows` rows by 16 outputs.
template <int Rows>
struct RowSums {
  I16 row[Rows];
};

template <int Rows>
SPARSECC_INLINE I16 row_of(const RowSums<Rows>& sums, int r) {
  return sums.row[r];
}

#if SPARSECC_I8MM
constexpr int kBlockStep = 2, kTileStep = 2;

// Tiles of two rows by two outputs, as USMMLA makes them.
template <int Rows>
struct QuadSums {
  int32x4_t tile[(Rows + 1) / 2][kGroup / 2];
};

// Eight inputs of two rows in one register: the quads of the first block, beside them those of the second.
template <int Rows>
SPARSECC_INLINE void pair_rows(const XQuad* first, const XQuad* second, uint8x16_t* pairs) {
  constexpr int here = Rows < 4 ? Rows : 4;
  const float32x4_t a = (float32x4_t)load_lanes<here>((const float*)first);
  const float32x4_t b = (float32x4_t)load_lanes<here>((const float*)second);
  pairs[0] = (uint8x16_t)vzip1q_f32(a, b);
  if constexpr (Rows > 2) pairs[1] = (uint8x16_t)vzip2q_f32(a, b);
  if constexpr (Rows > 4) pair_rows<Rows - 4>(first + 4, second + 4, pairs + 2);
}

template <int Rows>
SPARSECC_INLINE void add_blocks(QuadSums<Rows>& sums, const XQuad* const (&x)[kBlockStep],
                                const int8_t* values) {
  uint8x16_t pairs[(Rows + 1) / 2];
  pair_rows<Rows>(x[0], x[1], pairs);
  SPARSECC_UNROLL
  for (int o = 0; o < kGroup / 2; o += 2) {
    int8x16_t even = vld1q_s8(values + 16 * o), odd = vld1q_s8(values + 16 * o + 16);
    __asm__("" : "+w"(even), "+w"(odd));  // one instruction loads both
    SPARSECC_UNROLL
    for (int r = 0; r < (Rows + 1) / 2; ++r) {
      sums.tile[r][o] = vusmmlaq_s32(sums.tile[r][o], pairs[r], even);
      sums.tile[r][o + 1] = vusmmlaq_s32(sums.tile[r][o + 1], pairs[r], odd);
    }
  }
}

template <int Rows>
SPARSECC_INLINE I16 row_of(const QuadSums<Rows>& sums, int r) {
  I16 row;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const int64x2_t a = (int64x2_t)sums.tile[r / 2][2 * p], b = (int64x2_t)sums.tile[r / 2][2 * p + 1];
    row.part[p] = (VecUint)(r % 2 == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b));
  }
  return row;
}
#else
constexpr int kBlockStep = 1, kTileStep = 1;
template <int Rows>
using QuadSums = RowSums<Rows>;

#if SPARSECC_NEON
// A register has what four rows have for the block.
template <int Rows, int Row = 0>
SPARSECC_INLINE void add_rows(QuadSums<Rows>& sums, const XQuad* x, const QuadWeights& weights) {
  constexpr int here = Rows - Row < 4 ? Rows - Row : 4;
  int8x16_t four = (int8x16_t)load_lanes<here>((const float*)x);
  __asm__("" : "+w"(four));  // by one load, not lane by lane
  sums.row[Row] = dot_lane<0>(sums.row[Row], four, weights);
  if constexpr (here > 1) sums.row[Row + 1] = dot_lane<1>(sums.row[Row + 1], four, weights);
  if constexpr (here > 2) sums.row[Row + 2] = dot_lane<2>(sums.row[Row + 2], four, weights);
  if constexpr (here > 3) sums.row[Row + 3] = dot_lane<3>(sums.row[Row + 3], four, weights);
  if constexpr (Row + 4 < Rows) add_rows<Rows, Row + 4>(sums, x + 4, weights);
}
#else
template <int Rows>
SPARSECC_INLINE void add_rows(QuadSums<Rows>& sums, const XQuad* x, const QuadWeights& weights) {
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) sums.row[r] = dot(sums.row[r], x[r], weights);
}
#endif

template <int Rows>
SPARSECC_INLINE void add_blocks(QuadSums<Rows>& sums, const XQuad* const (&x)[kBlockStep],
                                const int8_t* values) {
  add_rows<Rows>(sums, x[0], load_weights(values));
}
#endif
static_assert(sizeof(XQuad) == quad_bytes(kOrder));
