// Rotary positions of rows of one head.
#pragma once

SPARSECC_INLINE F16 multiply(F16 a, F16 b) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) a.part[p] *= b.part[p];
  return a;
}

SPARSECC_INLINE F16 negative(F16 v) {
  SPARSECC_UNROLL
  for (int p = 0; p < kParts; ++p) v.part[p] = -v.part[p];
  return v;
}

static void rotate(const RotaryJob* job) {
  const int64_t half = job->size / 2;
  for (int64_t r = 0; r < job->rows; ++r) {
    const float* x = job->x + r * job->x_stride;
    const float *cosines = job->cosines + r * job->table_stride, *sines = job->sines + r * job->table_stride;
    float* y = job->y + r * job->size;
    for (int64_t i = 0; i < half; i += kGroup) {
      const int64_t n = half - i < kGroup ? half - i : (int64_t)kGroup;
      const auto part = [&](const float* from) __attribute__((always_inline)) { return load_first(from, n); };
      const F16 first = part(x + i), second = part(x + half + i);
      store_first(y + i, multiply_add(multiply(first, part(cosines + i)), negative(second), part(sines + i)), n);
      store_first(y + half + i,
                  multiply_add(multiply(second, part(cosines + half + i)), first, part(sines + half + i)), n);
    }
  }
}
