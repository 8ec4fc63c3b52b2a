// Few rows of x: 16 outputs in the lanes, each picks its own input out of a slice of 16 held in
// registers. Takes N:M and unstructured weights alike.
#pragma once

#if SPARSECC_AVX512
SPARSECC_INLINE __m512i slot_positions(uint64_t packed) {
  const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  return _mm512_srlv_epi32(_mm512_set1_epi64((long long)packed), shift);
}

template <int Rows, bool Expand>
SPARSECC_INLINE void slice_slots(const SliceView& w, int64_t& slot, const float*& values, int64_t end,
                                 const F16 (&x)[Rows], F16 (&sum)[Rows]) {
  for (; slot < end; ++slot) {
    const __mmask16 mask = (__mmask16)w.masks[slot];
    const __m512i at = slot_positions(w.positions[slot]);
    __m512 weight;
    if constexpr (Expand) {
      weight = _mm512_maskz_expandloadu_ps(mask, values);
      values += __builtin_popcount(mask);
    } else {
      weight = _mm512_load_ps(values);
      values += kGroup;
    }
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const __m512 picked = _mm512_permutexvar_ps(at, (__m512)x[r].part[0]);
      sum[r].part[0] = (Vec)_mm512_mask3_fmadd_ps(picked, weight, (__m512)sum[r].part[0], mask);
    }
  }
}
#else
// The lanes of `x` that the positions name, zero where the weight is (so that x never matters there).
SPARSECC_INLINE F16 pick(const float* x, uint64_t packed, const float* values) {
  F16 picked;
#if SPARSECC_AVX2
  const __m256i pair = _mm256_set1_epi64x((long long)packed);
  const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
  SPARSECC_UNROLL
  for (int p = 0; p < 2; ++p) {
    const __m256i first = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    const __m256i at = _mm256_srlv_epi32(pair, _mm256_add_epi32(first, _mm256_set1_epi32(16 * p)));
    const __m256 from = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at),
                                         _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
    const __m256 used = _mm256_cmp_ps(_mm256_load_ps(values + 8 * p), _mm256_setzero_ps(), _CMP_NEQ_UQ);
    picked.part[p] = (Vec)_mm256_and_ps(from, used);
  }
#else
  float lanes[kGroup];
  for (int lane = 0; lane < kGroup; ++lane) {
    const int at = (int)(packed >> (lane % 2 * 32 + lane / 2 * 4)) & 15;
    lanes[lane] = values[lane] != 0.0f ? x[at] : 0.0f;
  }
  picked = load(lanes);
#endif
  return picked;
}
#endif

template <int Rows, bool Expand>
SPARSECC_INLINE void slice_group(const SliceJob& job, int64_t group, int64_t first_row, F16 (&sum)[Rows]) {
  const SliceView& w = *job.weight;
  const uint8_t* slots = w.slots + group * w.slices;
  int64_t slot = w.slot_start[group];
  const float* values = w.values + w.value_start[group];
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r] = broadcast(0.0f);
  for (int64_t slice = 0; slice < w.slices; ++slice) {
    const int64_t end = slot + slots[slice], first = slice * kGroup;
    const int64_t left = w.inputs - first;
    const float* x = job.x + first_row * job.row_stride + first;
    F16 held[Rows];
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r)
      held[r] = left < kGroup ? load_first(x + r * job.row_stride, left) : load(x + r * job.row_stride);
#if SPARSECC_AVX512
    slice_slots<Rows, Expand>(w, slot, values, end, held, sum);
#else
    float spilled[Rows][kGroup] __attribute__((aligned(32)));
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store(spilled[r], held[r]);
    for (; slot < end; ++slot, values += kGroup)
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r)
        sum[r] = multiply_add(sum[r], pick(spilled[r], w.positions[slot], values), load(values));
#endif
  }
}

template <int Rows, bool Expand>
static void slice_rows(const SliceJob& job, int64_t first_row) {
  const Target& to = job.target;
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    F16 sum[Rows];
    slice_group<Rows, Expand>(job, group, first_row, sum);
    const int64_t output = group * kGroup, left = job.weight->outputs - output;
    const int64_t n = left < kGroup ? left : kGroup;
    float tile[Rows * kGroup] __attribute__((aligned(64)));
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store(tile + r * kGroup, add(sum[r], load(job.epilogue->bias + output)));
    activate(tile, Rows, *job.epilogue);
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r)
      store_first(to.y + (first_row + r) * to.row_stride + output, load(tile + r * kGroup), n);
  }
}

template <bool Expand>
static void slice_all(const SliceJob& job) {
  int row = 0;
  for (; row + 4 <= job.rows; row += 4) slice_rows<4, Expand>(job, row);
  switch (job.rows - row) {
    case 3: return slice_rows<3, Expand>(job, row);
    case 2: return slice_rows<2, Expand>(job, row);
    case 1: return slice_rows<1, Expand>(job, row);
    default: return;
  }
}

static void slice(const SliceJob* job) {
#if SPARSECC_AVX512
  if (job->weight->expand) return slice_all<true>(*job);
#endif
  slice_all<false>(*job);
}
