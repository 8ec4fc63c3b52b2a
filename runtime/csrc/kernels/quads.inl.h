// Blocks of 16 outputs by 4 inputs of bytes: outputs in the lanes, a tile of rows of x in registers. Sums are
// 32-bit integers modulo 2^32, exactly those of MatMulInteger: nothing saturates on the way. The plain
// AVX2 instruction for bytes (vpmaddubsw) does, so weights are widened to 16 bits there.
#pragma once

// Sixteen 32-bit sums; unsigned, for they may wrap.
struct I16 {
  VecUint part[kParts];
};

// The four values of x that meet one block, and the 64 weights of the block in registers.
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
static_assert(sizeof(XQuad) == quad_bytes(kOrder));

// Few rows would wait for their own results: several blocks go to separate sums.
template <int Rows>
constexpr int kQuadChains = Rows >= 8   ? 1
                            : Rows >= 4 ? 2
                                        : 4;

// Few rows are bound by the stream of weights.
template <int Rows>
SPARSECC_INLINE void fetch_ahead(const void* from) {
  constexpr int kAhead = 2048;
  if constexpr (Rows <= 4) __builtin_prefetch((const char*)from + kAhead);
}

// Sums over the blocks of a group; block(i, part) adds block i to one sum for each row.
template <int Rows, class Block>
SPARSECC_INLINE void sum_blocks(const QuadView& w, int64_t group, I16 (&sum)[Rows], Block block) {
  constexpr int chains = kParts == 1 ? kQuadChains<Rows> : 1;
  I16 part[chains][Rows] = {};
  int64_t i = w.start[group];
  const int64_t end = w.start[group + 1];
  for (; i + chains <= end; i += chains) SPARSECC_UNROLL
  for (int c = 0; c < chains; ++c) block(i + c, part[c]);
  for (; i < end; ++i) block(i, part[0]);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    sum[r] = part[0][r];
    SPARSECC_UNROLL
    for (int c = 1; c < chains; ++c) SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) sum[r].part[p] += part[c][r].part[p];
  }
}

SPARSECC_INLINE void quad_scale(const QuadJob& job, int64_t output, I16 sum, F16& z) {
  const uint32_t zero_point = (uint32_t)job.x.zero_point;
  const F16 bias = load(job.epilogue->bias + output), scale = load(job.weight->scales + output);
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const VecUint extra = *(const VecUint*)(job.weight->sums + output + p * kLanes) * zero_point;
    const Vec exact = __builtin_convertvector((VecInt)(sum.part[p] - extra), Vec);
    z.part[p] = exact * (scale.part[p] * job.x.scale) + bias.part[p];
  }
}

template <int Rows>
SPARSECC_INLINE void quad_store(const QuadJob& job, int64_t group, int64_t first_row,
                                const I16 (&sum)[Rows]) {
  const int64_t output = group * kGroup, left = job.weight->outputs - output;
  const int64_t n = left < kGroup ? left : kGroup;
  float* y = job.y + first_row * job.row_stride + output;
  F16 z[Rows];
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) quad_scale(job, output, sum[r], z[r]);
  if (job.epilogue->activation == SPARSECC_ACT_NONE) {
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store_first(y + r * job.row_stride, z[r], n);
    return;
  }
  float tile[Rows * kGroup] __attribute__((aligned(64)));
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) store(tile + r * kGroup, z[r]);
  activate(tile, Rows, *job.epilogue);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) store_first(y + r * job.row_stride, load(tile + r * kGroup), n);
}

struct Neighbours {
  template <int Rows>
  SPARSECC_INLINE void sum(const QuadJob& job, int64_t group, int64_t first_row, I16 (&sum)[Rows]) {
    const QuadView& w = *job.weight;
    const XQuad* panel = (const XQuad*)job.panel + first_row;
    const auto block = [&](int64_t i, I16 (&part)[Rows]) __attribute__((always_inline)) {
      const XQuad* x = panel + (int64_t)w.index[i] * job.rows;
      __asm__("" : "+r"(x));  // one address per block, not one per row
      fetch_ahead<Rows>(w.values + i * kQuadValues);
      const QuadWeights weights = load_weights(w.values + i * kQuadValues);
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r) part[r] = dot(part[r], x[r], weights);
    };
    sum_blocks<Rows>(w, group, sum, block);
  }
};

template <class Form, int Rows>
static void quad_tile(const QuadJob& job, int64_t first_row) {
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    I16 sum[Rows];
    Form::template sum<Rows>(job, group, first_row, sum);
    quad_store<Rows>(job, group, first_row, sum);
  }
}

// Calls the tile of exactly `rows` rows, 1 <= rows <= Rows.
template <class Form, int Rows>
static void quad_tile_of(const QuadJob& job, int64_t first_row, int rows) {
  if (rows == Rows) return quad_tile<Form, Rows>(job, first_row);
  if constexpr (Rows > 1) quad_tile_of<Form, Rows - 1>(job, first_row, rows);
}

template <class Form, int Most>
static void quad_tiles(const QuadJob& job) {
  const int tiles = (job.rows + Most - 1) / Most;
  int first = 0;
  for (int t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int rows = (job.rows - first + tiles - t - 1) / (tiles - t);
    quad_tile_of<Form, Most>(job, first, rows);
    first += rows;
  }
}
