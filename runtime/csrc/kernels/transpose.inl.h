// 16 x 16 transposes in registers, from and to memory with any strides.
#pragma once

typedef float Quad __attribute__((vector_size(16)));
typedef float QuadLoose __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SPARSECC_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t QuadIndex __attribute__((vector_size(16)));
#define SPARSECC_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

SPARSECC_INLINE void transpose4(Quad (&r)[4]) {
  const Quad a = SPARSECC_SHUFFLE(r[0], r[1], 0, 4, 1, 5);
  const Quad b = SPARSECC_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Quad c = SPARSECC_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
  const Quad d = SPARSECC_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  r[0] = SPARSECC_SHUFFLE(a, c, 0, 1, 4, 5);
  r[1] = SPARSECC_SHUFFLE(a, c, 2, 3, 6, 7);
  r[2] = SPARSECC_SHUFFLE(b, d, 0, 1, 4, 5);
  r[3] = SPARSECC_SHUFFLE(b, d, 2, 3, 6, 7);
}

#if SPARSECC_AVX512
// Rows of 16 in, columns out: four rounds of exchanges at distance 1, 2 (in lane), 4 and 8.
SPARSECC_INLINE void transpose16(Vec (&r)[16]) {
  Vec t[16];
  SPARSECC_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = (Vec)_mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = (Vec)_mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
  SPARSECC_UNROLL
  for (int i = 0; i < 16; i += 4) {
    r[i] = (Vec)_mm512_shuffle_ps((__m512)t[i], (__m512)t[i + 2], 0x44);
    r[i + 1] = (Vec)_mm512_shuffle_ps((__m512)t[i], (__m512)t[i + 2], 0xee);
    r[i + 2] = (Vec)_mm512_shuffle_ps((__m512)t[i + 1], (__m512)t[i + 3], 0x44);
    r[i + 3] = (Vec)_mm512_shuffle_ps((__m512)t[i + 1], (__m512)t[i + 3], 0xee);
  }
  SPARSECC_UNROLL
  for (int i = 0; i < 16; i += 8) SPARSECC_UNROLL
  for (int j = 0; j < 4; ++j) {
    t[i + j] = (Vec)_mm512_shuffle_f32x4((__m512)r[i + j], (__m512)r[i + j + 4], 0x88);
    t[i + j + 4] = (Vec)_mm512_shuffle_f32x4((__m512)r[i + j], (__m512)r[i + j + 4], 0xdd);
  }
  SPARSECC_UNROLL
  for (int j = 0; j < 8; ++j) {
    r[j] = (Vec)_mm512_shuffle_f32x4((__m512)t[j], (__m512)t[j + 8], 0x88);
    r[j + 8] = (Vec)_mm512_shuffle_f32x4((__m512)t[j], (__m512)t[j + 8], 0xdd);
  }
}
#endif

// to[c * to_stride + r] = from[r * from_stride + c]. Reads rows x columns and writes columns x rows
// elements, no more; both at most 16.
SPARSECC_INLINE void transpose_tile(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                                    float* to, int64_t to_stride) {
#if SPARSECC_AVX512
  Vec r[16];
  const __mmask16 in = (__mmask16)((1u << columns) - 1u), out = (__mmask16)((1u << rows) - 1u);
  SPARSECC_UNROLL
  for (int i = 0; i < 16; ++i)
    r[i] = i < rows ? (Vec)_mm512_maskz_loadu_ps(in, from + i * from_stride) : splat(0.0f);
  transpose16(r);
  SPARSECC_UNROLL
  for (int i = 0; i < 16; ++i)
    if (i < columns) _mm512_mask_storeu_ps(to + i * to_stride, out, (__m512)r[i]);
#else
  const int64_t whole_rows = rows & ~INT64_C(3), whole_columns = columns & ~INT64_C(3);
  for (int64_t i = 0; i < whole_rows; i += 4)
    for (int64_t j = 0; j < whole_columns; j += 4) {
      Quad r[4];
      SPARSECC_UNROLL
      for (int k = 0; k < 4; ++k) r[k] = *(const QuadLoose*)(from + (i + k) * from_stride + j);
      transpose4(r);
      SPARSECC_UNROLL
      for (int k = 0; k < 4; ++k) *(QuadLoose*)(to + (j + k) * to_stride + i) = r[k];
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      to[j * to_stride + i] = from[i * from_stride + j];
#endif
}
