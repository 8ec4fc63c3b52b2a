// Blocks of 16 outputs by 4 inputs which the outputs pick from a window of x by a permute of bytes: as many
// products per block as for neighbours, at one more instruction a row, and hardly any zero is multiplied.
#pragma once

#if SPARSECC_AVX512
struct PickedBytes {
  __m512i part[1];
};

template <Picks Kind>
SPARSECC_INLINE PickedBytes load_places(const QuadView& w, int64_t block) {
  if constexpr (Kind == Picks::kOwn) return {{_mm512_load_si512(w.places + block * kQuadValues)}};
  const __m512i sixteen = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)(w.places + block * kGroup)));
  return {{_mm512_add_epi8(_mm512_shuffle_epi8(sixteen, _mm512_load_si512(w.spread)),
                           _mm512_load_si512(w.added))}};
}

template <int Width>
SPARSECC_INLINE PickedBytes pick(const uint8_t* x, const PickedBytes& places) {
#if SPARSECC_VBMI
  if constexpr (Width == kWide)
    return {{_mm512_permutexvar_epi8(places.part[0], _mm512_load_si512(x))}};
#endif
  return {{_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)x)), places.part[0])}};
}
#elif SPARSECC_NEON
struct PickedBytes {
  uint8x16_t part[kParts];
};

template <Picks Kind>
SPARSECC_INLINE PickedBytes load_places(const QuadView& w, int64_t block) {
  PickedBytes places;
  if constexpr (Kind == Picks::kOwn) {
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) places.part[p] = vld1q_u8(w.places + block * kQuadValues + 16 * p);
    return places;
  }
  const uint8x16_t sixteen = vld1q_u8(w.places + block * kGroup);
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    places.part[p] = vaddq_u8(vqtbl1q_u8(sixteen, vld1q_u8(w.spread + 16 * p)), vld1q_u8(w.added + 16 * p));
  return places;
}

template <int Width>
SPARSECC_INLINE PickedBytes pick(const uint8_t* x, const PickedBytes& places) {
  static_assert(Width == 16);
  const uint8x16_t window = vld1q_u8(x);
  PickedBytes picked;
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) picked.part[p] = vqtbl1q_u8(window, places.part[p]);
  return picked;
}
#else
struct PickedBytes {
  __m256i part[2];
};

template <Picks Kind>
SPARSECC_INLINE PickedBytes load_places(const QuadView& w, int64_t block) {
  PickedBytes places;
  if constexpr (Kind == Picks::kOwn) {
    SPARSECC_UNROLL
    for (int p = 0; p < 2; ++p)
      places.part[p] = _mm256_load_si256((const __m256i*)(w.places + block * kQuadValues) + p);
    return places;
  }
  const __m256i sixteen =
      _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)(w.places + block * kGroup)));
  SPARSECC_UNROLL
  for (int p = 0; p < 2; ++p)
    places.part[p] = _mm256_add_epi8(
        _mm256_shuffle_epi8(sixteen, _mm256_load_si256((const __m256i*)w.spread + p)),
        _mm256_load_si256((const __m256i*)w.added + p));
  return places;
}

template <int Width>
SPARSECC_INLINE PickedBytes pick(const uint8_t* x, const PickedBytes& places) {
  const __m256i window = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)x));
  return {{_mm256_shuffle_epi8(window, places.part[0]), _mm256_shuffle_epi8(window, places.part[1])}};
}
#endif

// Without dot products of bytes, even and odd bytes are widened apart; places are ordered to suit.
SPARSECC_INLINE I16 dot_picked(I16 sum, const PickedBytes& x, const QuadWeights& w) {
#if SPARSECC_AVX512 && SPARSECC_VNNI
  return {{(VecUint)_mm512_dpbusd_epi32((__m512i)sum.part[0], x.part[0], w)}};
#elif SPARSECC_AVX512
  const __m512i even = _mm512_and_si512(x.part[0], _mm512_set1_epi16(0xff));
  const __m512i odd = _mm512_srli_epi16(x.part[0], 8);
  sum.part[0] += (VecUint)_mm512_madd_epi16(even, w.pair[0]) + (VecUint)_mm512_madd_epi16(odd, w.pair[1]);
  return sum;
#elif SPARSECC_I8MM
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    sum.part[p] = (VecUint)vusdotq_s32((int32x4_t)sum.part[p], x.part[p], w.part[p]);
  return sum;
#elif SPARSECC_NEON && SPARSECC_DOTPROD
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p)
    sum.part[p] = (VecUint)vdotq_s32((int32x4_t)sum.part[p], (int8x16_t)x.part[p], w.part[p]);
  return sum;
#elif SPARSECC_NEON
  SPARSECC_UNROLL
  for (int h = 0; h < 2; ++h)
    add_pairs(sum, h, (int8x16_t)x.part[h], (int8x16_t)x.part[2 + h], w);
  return sum;
#else
  SPARSECC_UNROLL
  for (int p = 0; p < 2; ++p) {
#if SPARSECC_VNNI
    sum.part[p] = (VecUint)_mm256_dpbusd_avx_epi32((__m256i)sum.part[p], x.part[p], w.part[p]);
#else
    const __m256i even = _mm256_and_si256(x.part[p], _mm256_set1_epi16(0xff));
    const __m256i odd = _mm256_srli_epi16(x.part[p], 8);
    sum.part[p] +=
        (VecUint)_mm256_madd_epi16(even, w.pair[0][p]) + (VecUint)_mm256_madd_epi16(odd, w.pair[1][p]);
#endif
  }
  return sum;
#endif
}

template <int Width, Picks Kind>
struct Windows {
  static constexpr int kRowStep = 1;
  template <int Rows>
  SPARSECC_INLINE void sum(const QuadJob& job, int64_t group, int64_t first_row, I16 (&sum)[Rows]) {
    const QuadView& w = *job.weight;
    const uint8_t* panel = (const uint8_t*)job.panel + first_row * Width;
    const auto block = [&](int64_t i, RowSums<Rows>& part) __attribute__((always_inline)) {
      const uint8_t* x = panel + (int64_t)w.index[i] * job.rows * Width;
      __asm__("" : "+r"(x));
      fetch_ahead<Rows>(w.values + i * kQuadValues);
      if constexpr (Kind == Picks::kOwn) fetch_ahead<Rows>(w.places + i * kQuadValues);
      const PickedBytes places = load_places<Kind>(w, i);
      const QuadWeights weights = load_weights(w.values + i * kQuadValues);
      SPARSECC_UNROLL
      for (int r = 0; r < Rows; ++r)
        part.row[r] = dot_picked(part.row[r], pick<Width>(x + r * Width, places), weights);
    };
    sum_blocks<Rows, RowSums<Rows>, 1>(w, group, sum, block);
  }
};

template <int Width, int Most>
static void window_tiles(const QuadJob& job) {
  if (job.weight->picks == Picks::kOwn) return quad_tiles<Windows<Width, Picks::kOwn>, Most>(job);
  quad_tiles<Windows<Width, Picks::kShared>, Most>(job);
}
