// Few rows of x: 16 outputs in the lanes, each picks its own input out of a window of 16 or 32 held in
// registers. Takes N:M and unstructured weights alike.
#pragma once

// Slots whose sums are kept apart, so that one need not wait for another.
template <int Rows>
constexpr int kSliceChains = kParts > 1 || Rows > 2 ? 1 : 4 / Rows;

// Inputs by which a window moves on.
template <int Form>
constexpr int kUnit = Form == SliceView::kPacked ? kGroup : 1;

// One slot for all rows: where[] picks from x, and `used` says which outputs have a weight at all, so
// that x never matters where there is none.
#if SPARSECC_AVX512
// Straight from memory: by way of a general register, as compilers prefer it, takes two instructions more.
SPARSECC_INLINE __mmask16 slice_mask(const uint16_t* mask) {
  __mmask16 used;
  __asm__("kmovw %1, %0" : "=k"(used) : "m"(*mask));
  return used;
}

template <class Value, int Rows, int Form>
SPARSECC_INLINE void slice_slot(const SliceView& w, int64_t slot, const Value*& values, const float* x,
                                int64_t row_stride, F16 (&sum)[Rows]) {
  __m512i where;
  __m512 weight;
  __mmask16 used = (__mmask16)0xffff;
  if constexpr (Form == SliceView::kPacked) {
    where = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(w.positions + 16 * slot)));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Not vexpandps: on Zen 5 it takes six cycles where this permute takes one.
    weight = _mm512_permutexvar_ps(_mm512_sub_epi32(lane, _mm512_srli_epi32(where, 5)),
                                   (__m512)load(values).part[0]);
    values += w.moves[slot].values;
    used = slice_mask(w.masks + slot);
  } else {
    const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    where = _mm512_srlv_epi32(_mm512_set1_epi64(((const long long*)w.positions)[slot]), shift);
    weight = (__m512)load(values).part[0];
    values += kGroup;
    if constexpr (Form == SliceView::kMasked) used = slice_mask(w.masks + slot);
  }
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const float* from = x + r * row_stride;
    const __m512 picked =
        Form == SliceView::kPacked
            ? _mm512_permutex2var_ps(_mm512_load_ps(from), where, _mm512_load_ps(from + kGroup))
            : _mm512_permutexvar_ps(where, _mm512_loadu_ps(from));
    __m512& to = (__m512&)sum[r].part[0];
    if constexpr (Form == SliceView::kUniform) {
      to = _mm512_fmadd_ps(picked, weight, to);
    } else {
      to = _mm512_mask3_fmadd_ps(picked, weight, to, used);
    }
  }
}
#elif SPARSECC_NEON
// A table of 64 bytes holds a slice; what lies beyond its end reads as zero.
template <class Value, int Rows, int Form>
SPARSECC_INLINE void slice_slot(const SliceView& w, int64_t slot, const Value*& values, const float* x,
                                int64_t row_stride, F16 (&sum)[Rows]) {
  const uint8x8_t packed = vld1_u8(w.positions + 8 * slot);
  // Where each input starts in the table: of outputs 0 4 8 12, 1 5 9 13, 2 6 10 14, 3 7 11 15.
  const uint8x16_t starts =
      vandq_u8(vcombine_u8(vshl_n_u8(packed, 2), vshr_n_u8(packed, 2)), vdupq_n_u8(15 * sizeof(float)));
  const uint8x16_t lanes = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
  const uint8x16_t bytes = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  const F16 weight = load(values);
  uint8x16_t where[kParts];
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const uint8x16_t at = vorrq_u8(vqtbl1q_u8(starts, vaddq_u8(lanes, vdupq_n_u8((uint8_t)p))), bytes);
    where[p] = vorrq_u8(at, (uint8x16_t)vceqzq_f32((float32x4_t)weight.part[p]));
  }
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const uint8x16x4_t slice = vld1q_u8_x4((const uint8_t*)(x + r * row_stride));
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p)
      sum[r].part[p] += (Vec)vqtbl4q_u8(slice, where[p]) * weight.part[p];
  }
  values += kGroup;
}
#else
SPARSECC_INLINE F16 pick(const float* x, uint64_t packed, F16 weight) {
  F16 picked;
#if SPARSECC_AVX2
  const __m256i pair = _mm256_set1_epi64x((long long)packed);
  const __m256 low = _mm256_loadu_ps(x), high = _mm256_loadu_ps(x + 8);
  for (int p = 0; p < 2; ++p) {
    const __m256i first = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    const __m256i where = _mm256_srlv_epi32(pair, _mm256_add_epi32(first, _mm256_set1_epi32(16 * p)));
    const __m256 from =
        _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, where), _mm256_permutevar8x32_ps(high, where),
                         _mm256_castsi256_ps(_mm256_slli_epi32(where, 28)));
    const __m256 used = _mm256_cmp_ps((__m256)weight.part[p], _mm256_setzero_ps(), _CMP_NEQ_UQ);
    picked.part[p] = (Vec)_mm256_and_ps(from, used);
  }
#else
  float lanes[kGroup];
  for (int lane = 0; lane < kGroup; ++lane) {
    const int at = (int)(packed >> (lane % 2 * 32 + lane / 2 * 4)) & 15;
    lanes[lane] = weight.part[lane / kLanes][lane % kLanes] != 0.0f ? x[at] : 0.0f;
  }
  picked = load(lanes);
#endif
  return picked;
}

template <class Value, int Rows, int Form>
SPARSECC_INLINE void slice_slot(const SliceView& w, int64_t slot, const Value*& values, const float* x,
                                int64_t row_stride, F16 (&sum)[Rows]) {
  const uint64_t packed = ((const uint64_t*)w.positions)[slot];
  const F16 weight = load(values);
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r)
    sum[r] = multiply_add(sum[r], pick(x + r * row_stride, packed, weight), weight);
  values += kGroup;
}
#endif

template <class Value, int Rows, int Form>
SPARSECC_INLINE void slice_group(const SliceJob& job, int64_t group, int64_t first_row, F16 (&sum)[Rows]) {
  constexpr int chains = kSliceChains<Rows>;
  const SliceView& w = *job.weight;
  const Value* values = (const Value*)w.values + w.value_start[group];
  const float* x = job.x + first_row * job.row_stride + (w.origin == nullptr ? 0 : w.origin[group]);
  F16 part[chains][Rows];
  SPARSECC_UNROLL
  for (int c = 0; c < chains; ++c) SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) part[c][r] = broadcast(0.0f);
  int64_t slot = w.slot_start[group];
  const auto one = [&](int64_t i, int c) __attribute__((always_inline)) {
    if constexpr (Form != SliceView::kUniform) x += w.moves[i].step * kUnit<Form>;
    slice_slot<Value, Rows, Form>(w, i, values, x, job.row_stride, part[c]);
  };
  const auto several = [&](int64_t end) __attribute__((always_inline)) {
    for (; slot + chains <= end; slot += chains) SPARSECC_UNROLL
    for (int c = 0; c < chains; ++c) one(slot + c, c);
    for (; slot < end; ++slot) one(slot, 0);
  };
  if constexpr (Form == SliceView::kUniform) {
    for (int64_t slice = 0; slice < w.slices; ++slice, x += kGroup) several(slot + w.slots_per_slice);
  } else {
    several(w.slot_end[group]);
  }
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) {
    sum[r] = part[0][r];
    SPARSECC_UNROLL
    for (int c = 1; c < chains; ++c) sum[r] = add(sum[r], part[c][r]);
  }
}

// The biases of the n outputs of a group, wherever these are.
SPARSECC_INLINE F16 lane_bias(const Epilogue& epilogue, const int32_t* order, int64_t output, int64_t n) {
  if (order == nullptr) return load(epilogue.bias + output);
  float bias[kGroup] __attribute__((aligned(64))) = {};
  for (int64_t lane = 0; lane < n; ++lane) bias[lane] = epilogue.bias[order[output + lane]];
  return load(bias);
}

// One row of their results.
SPARSECC_INLINE void store_lanes(float* y, const float* lanes, const int32_t* order, int64_t output, int64_t n) {
  if (order == nullptr) {
    store_first(y + output, load(lanes), n);
  } else {
    for (int64_t lane = 0; lane < n; ++lane) y[order[output + lane]] = lanes[lane];
  }
}

template <class Value, int Rows, int Form>
static void slice_rows(const SliceJob& job, int64_t first_row) {
  const Target& to = job.target;
  const int32_t* order = job.weight->order;
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    F16 sum[Rows];
    slice_group<Value, Rows, Form>(job, group, first_row, sum);
    const int64_t output = group * kGroup, left = job.weight->outputs - output;
    const int64_t n = left < kGroup ? left : kGroup;
    const F16 bias = lane_bias(*job.epilogue, order, output, n);
    float tile[Rows * kGroup] __attribute__((aligned(64)));
    SPARSECC_UNROLL
    for (int r = 0; r < Rows; ++r) store(tile + r * kGroup, add(sum[r], bias));
    activate(tile, Rows, *job.epilogue);
    for (int r = 0; r < Rows; ++r)
      store_lanes(to.y + (first_row + r) * to.row_stride, tile + r * kGroup, order, output, n);
  }
}

// Calls the kernel for exactly `rows` rows, 1 <= rows <= Rows.
template <class Value, int Rows, int Form>
static void slice_rows_of(const SliceJob& job, int64_t first_row, int64_t rows) {
  if (rows == Rows) return slice_rows<Value, Rows, Form>(job, first_row);
  if constexpr (Rows > 1) slice_rows_of<Value, Rows - 1, Form>(job, first_row, rows);
}

template <class Value, int Most, int Form>
static void slice_tiles(const SliceJob& job) {
  const int64_t tiles = (job.rows + Most - 1) / Most;
  int64_t first = 0;
  for (int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal height
    const int64_t rows = (job.rows - first + tiles - t - 1) / (tiles - t);
    slice_rows_of<Value, Most, Form>(job, first, rows);
    first += rows;
  }
}
