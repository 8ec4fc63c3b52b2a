// Blocks of outputs by one input in bfloat16, 32 inputs at a time in a tile register, with x in float32: x is the sum
// of three numbers of bfloat16 (kernels_tiles.h), each of which is multiplied. As for bytes (tiles.inl.h) outputs are
// lines, and what goes with them are words of two inputs of sixteen rows, brought together from the panel.
#pragma once

constexpr int kAtOnce = 4;  // tiles whose x is brought together first: a tile register does not see what was just stored

constexpr int sum_register(int wide, int panel) { return 2 * panel + wide; }
constexpr int kWeightRegister = 4, kXRegister = 6;  // of the first 16 outputs, and of the first panel

// Lines of one tile: words of the numbers of inputs 2i and 2i + 1.
SPARSECC_INLINE void gather_lines(const uint16_t* panel, const uint32_t* inputs, uint8_t (*lines)[kTileBytes]) {
  // Bytes 0 1 32 33 2 3 34 35 ...
  const __m512i low = _mm512_setr_epi32(0x21200100, 0x23220302, 0x25240504, 0x27260706, 0x29280908, 0x2b2a0b0a,
                                        0x2d2c0d0c, 0x2f2e0f0e, 0x31301110, 0x33321312, 0x35341514, 0x37361716,
                                        0x39381918, 0x3b3a1b1a, 0x3d3c1d1c, 0x3f3e1f1e);
  for (int i = 0; i < kTileLines; ++i) {
    const uint16_t* first = panel + (int64_t)inputs[2 * i] * kTileLine;
    const uint16_t* second = panel + (int64_t)inputs[2 * i + 1] * kTileLine;
    SPARSECC_UNROLL
    for (int part = 0; part < kSplits; ++part) {
      const __m512i both = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)(first + part * kTileRows))),
          _mm256_load_si256((const __m256i*)(second + part * kTileRows)), 1);
      _mm512_store_si512(lines[part] + i * kTileLineBytes, _mm512_permutexvar_epi8(low, both));
    }
  }
}

template <int Wide, int Panel>
SPARSECC_INLINE void add_tile(const uint8_t (*lines)[kTileBytes]) {
  constexpr int x = kXRegister + Panel;
  SPARSECC_UNROLL
  for (int part = 0; part < kSplits; ++part) {
    tile_load<x>(lines[part], kTileLineBytes);
    tile_dot_floats<sum_register(0, Panel), kWeightRegister, x>();
    if constexpr (Wide > 1) tile_dot_floats<sum_register(1, Panel), kWeightRegister + 1, x>();
  }
}

template <int Wide, int Panel>
SPARSECC_INLINE void finish_tile(const FloatTileJob& job, int64_t output, int rows) {
  const int64_t left = job.weight->outputs - output;
  if (left <= 0) return;
  float by_output[kGroup * kGroup] __attribute__((aligned(64)));
  float by_row[kGroup * kGroup] __attribute__((aligned(64)));
  tile_store<sum_register(Wide, Panel)>(by_output, kTileLineBytes);
  transpose_tile(by_output, kGroup, kGroup, rows, by_row, kGroup);
  const F16 bias = load(job.epilogue->bias + output);
  for (int r = 0; r < rows; ++r) store(by_row + r * kGroup, add(load(by_row + r * kGroup), bias));
  activate(by_row, rows, *job.epilogue);
  float* y = job.y + Panel * kTileRows * job.row_stride + output;
  for (int r = 0; r < rows; ++r)
    store_first(y + r * job.row_stride, load(by_row + r * kGroup), left < kGroup ? left : kGroup);
}

template <int Wide, int Panels>
static void float_tile_group(const FloatTileJob& job, int64_t group) {
  uint8_t lines[kAtOnce][Panels][kSplits][kTileBytes] __attribute__((aligned(64)));
  const FloatTileView& w = *job.weight;
  const auto zero = [&]<int Panel>() __attribute__((always_inline)) {
    tile_zero<sum_register(0, Panel)>();
    if constexpr (Wide > 1) tile_zero<sum_register(1, Panel)>();
  };
  zero.template operator()<0>();
  if constexpr (Panels > 1) zero.template operator()<1>();
  const int64_t end = w.start[group + 1];
  for (int64_t first = w.start[group]; first < end; first += kAtOnce) {
    const int count = (int)(end - first < kAtOnce ? end - first : kAtOnce);
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < Panels; ++p)
        gather_lines(job.panel + p * job.panel_size, w.index + (first + i) * kTileInputs, lines[i][p]);
    for (int i = 0; i < count; ++i) {
      const uint16_t* values = w.values + (first + i) * (Wide * kGroup * kTileInputs);
      tile_load<kWeightRegister>(values, kTileLineBytes);
      if constexpr (Wide > 1) tile_load<kWeightRegister + 1>(values + kGroup * kTileInputs, kTileLineBytes);
      add_tile<Wide, 0>(lines[i][0]);
      if constexpr (Panels > 1) add_tile<Wide, 1>(lines[i][1]);
    }
  }
  const int64_t output = group * Wide * kGroup;
  const int rows = Panels > 1 ? kTileRows : job.rows;
  finish_tile<0, 0>(job, output, rows);
  if constexpr (Wide > 1) finish_tile<1, 0>(job, output + kGroup, rows);
  if constexpr (Panels > 1) {
    finish_tile<0, 1>(job, output, job.rows - kTileRows);
    if constexpr (Wide > 1) finish_tile<1, 1>(job, output + kGroup, job.rows - kTileRows);
  }
}

template <int Wide, int Panels>
static void float_tile_groups(const FloatTileJob& job) {
  TileConfig config = {};
  config.palette = 1;
  for (int panel = 0; panel < Panels; ++panel) {
    const int rows = panel + 1 < Panels ? kTileRows : job.rows - panel * kTileRows;
    for (int v = 0; v < Wide; ++v) configure(config, sum_register(v, panel), rows * 4);
    configure(config, kXRegister + panel, rows * 4);
  }
  for (int v = 0; v < Wide; ++v) configure(config, kWeightRegister + v, kTileLineBytes);
  tile_config(config);
  for (int64_t group = job.group_begin; group < job.group_end; ++group) float_tile_group<Wide, Panels>(job, group);
  tile_release();
}

template <int Wide>
static void float_tiles(const FloatTileJob& job) {
  if (job.rows > kTileRows) return float_tile_groups<Wide, 2>(job);
  float_tile_groups<Wide, 1>(job);
}

// Upper halves of sixteen numbers whose lower ones do not count.
SPARSECC_INLINE void store_upper(uint16_t* to, __m512i bits) {
  _mm256_store_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// What a part leaves for the next is exact. Infinity and NaN are a first part with nothing left.
SPARSECC_INLINE void split_line(__m512 x, uint16_t* line) {
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), _mm512_setzero_ps(), _CMP_EQ_OQ);
  __m512i part = _mm512_and_si512(_mm512_castps_si512(x), upper);
  part = _mm512_mask_or_epi32(part, nan, part, _mm512_set1_epi32(0x400000));
  store_upper(line, part);
  __m512 rest = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(part));
  SPARSECC_UNROLL
  for (int i = 1; i < kSplits; ++i) {
    part = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    store_upper(line + i * kTileRows, part);
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(part));
  }
}

static void split(const SplitJob* job) {
  for (int64_t k = 0; k < job->inputs; k += kGroup) {
    const int64_t n = job->inputs - k < kGroup ? job->inputs - k : kGroup;
    float by_input[kGroup * kGroup] __attribute__((aligned(64)));
    if (job->rows < kTileRows) __builtin_memset(by_input, 0, sizeof by_input);
    transpose_tile(job->x + k, job->row_stride, job->rows, n, by_input, kGroup);
    for (int64_t i = 0; i < n; ++i)
      split_line(_mm512_load_ps(by_input + i * kGroup), job->panel + (k + i) * kTileLine);
  }
  __builtin_memset(job->panel + job->inputs * kTileLine, 0, kTileLine * sizeof(uint16_t));
}
