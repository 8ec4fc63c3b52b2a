// Four or eight outputs by four inputs from anywhere, 32 rows of x in the lanes: bytes of the four inputs are brought
// together once for all of those outputs, so that weights come one after the other, without places and hardly a zero.
#pragma once

// What outputs first.. of a group hold in two registers of sixteen rows each.
template <int Tall>
SPARSECC_INLINE void lane_sums(const QuadJob& job, int64_t part, uint32_t* sums) {
  const QuadView& w = *job.weight;
  const uint8_t* panel = (const uint8_t*)job.panel;
  // Bytes r, 32 + r, 64 + r, 96 + r of two registers for every row r.
  const __m512i rows = _mm512_add_epi32(
      _mm512_set1_epi32(0x60402000),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x01010101),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  const __m512i later_rows = _mm512_add_epi32(rows, _mm512_set1_epi32(0x10101010));
  __m512i sum[Tall][2];
  SPARSECC_UNROLL
  for (int t = 0; t < Tall; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_si512();
  const auto input = [&](int64_t i) __attribute__((always_inline)) {
    return _mm256_load_si256((const __m256i*)(panel + w.index[i]));
  };
  const auto two = [&](int64_t i) __attribute__((always_inline)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(input(i)), input(i + 1), 1);
  };
  for (int64_t i = w.start[part]; i < w.end[part]; ++i) {
    const __m512i first = two(i * kQuad), second = two(i * kQuad + 2);
    const __m512i x = _mm512_permutex2var_epi8(first, rows, second);
    const __m512i later_x = _mm512_permutex2var_epi8(first, later_rows, second);
    const int8_t* values = w.values + i * (Tall * kQuad);
    SPARSECC_UNROLL
    for (int t = 0; t < Tall; ++t) {
      const __m512i weights = _mm512_set1_epi32(((const int32_t*)values)[t]);
      sum[t][0] = _mm512_dpbusd_epi32(sum[t][0], x, weights);
      sum[t][1] = _mm512_dpbusd_epi32(sum[t][1], later_x, weights);
    }
  }
  SPARSECC_UNROLL
  for (int t = 0; t < Tall; ++t) SPARSECC_UNROLL
  for (int h = 0; h < 2; ++h) _mm512_store_si512(sums + t * kLaneRows + h * kGroup, sum[t][h]);
}

template <int Tall>
static void lane_groups(const QuadJob& job) {
  for (int64_t group = job.group_begin; group < job.group_end; ++group) {
    uint32_t sums[kGroup * kLaneRows] __attribute__((aligned(64)));
    for (int part = 0; part < kGroup / Tall; ++part)
      lane_sums<Tall>(job, group * (kGroup / Tall) + part, sums + part * Tall * kLaneRows);
    store_turned(job, group, 0, job.rows < kGroup ? job.rows : kGroup, sums, kLaneRows);
    if (job.rows > kGroup) store_turned(job, group, kGroup, job.rows - kGroup, sums + kGroup, kLaneRows);
  }
}

static void lane_tiles(const QuadJob& job) {
  if (job.weight->tall == 8) return lane_groups<8>(job);
  lane_groups<4>(job);
}
