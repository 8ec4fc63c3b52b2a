// Layer norm and root-mean-square norm of rows, with what is added to them first. Two passes for the variance,
// over a row that is in the first-level cache after the first.
#pragma once

struct NormRow {
  const float* x;
  const float* residual;
  float* sum;  // also where the row is read from afterwards
  float* y;
};

constexpr int kNormSums = 4;  // kept apart: one sum would wait for itself

// Calls function(which sum, offset, count) for whole vectors, then for the rest.
template <class Function>
SPARSECC_INLINE void for_each_group(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + kNormSums * kGroup <= size; i += kNormSums * kGroup) SPARSECC_UNROLL
  for (int s = 0; s < kNormSums; ++s) function(s, i + s * kGroup, (int64_t)kGroup);
  for (; i < size; i += kGroup) function(0, i, size - i < kGroup ? size - i : (int64_t)kGroup);
}

SPARSECC_INLINE float sum_of_all(const F16 (&sums)[kNormSums]) {
  return sum_of_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// Everything in locals: a store may alias whatever is read through a reference, which would be loaded again.
template <bool Residual, bool Shift>
static void norm_row(const NormJob& job, NormRow row) {
  F16 total[kNormSums] = {}, squares[kNormSums] = {};
  const int64_t size = job.size;
  const float *gain = job.gain, *shift = job.shift;
  for_each_group(size, [&](int s, int64_t i, int64_t n) __attribute__((always_inline)) {
    F16 v = load_first(row.x + i, n);
    if constexpr (Residual) v = add(v, load_first(row.residual + i, n));
    store_first(row.sum + i, v, n);
    total[s] = add(total[s], v);
  });
  const float mean = job.centred ? sum_of_all(total) / (float)size : 0.0f;
  const auto centred = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    F16 v = load_first(row.sum + i, n);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] -= splat(mean);
    return v;
  };
  for_each_group(size, [&](int s, int64_t i, int64_t n) __attribute__((always_inline)) {
    F16 v = centred(i, n);
    if (n < kGroup) v = first_lanes(v, n);
    squares[s] = multiply_add(squares[s], v, v);
  });
  const float variance = sum_of_all(squares) / (float)size;
  const float share = 1.0f / __builtin_sqrtf(variance + job.epsilon);
  for_each_group(size, [&](int, int64_t i, int64_t n) __attribute__((always_inline)) {
    F16 v = centred(i, n);
    const F16 factor = load_first(gain + i, n);
    SPARSECC_UNROLL
    for (int p = 0; p < kParts; ++p) v.part[p] = v.part[p] * splat(share) * factor.part[p];
    if constexpr (Shift) v = add(v, load_first(shift + i, n));
    store_first(row.y + i, v, n);
  });
}

template <bool Residual, bool Shift>
static void norm_rows(const NormJob& job) {
  for (int64_t r = 0; r < job.rows; ++r) {
    float* y = job.y + r * job.size;
    const int64_t other = Residual ? (job.first_row + r) % job.residual_rows : 0;
    norm_row<Residual, Shift>(job, {job.x + r * job.size, Residual ? job.residual + other * job.size : nullptr,
                                    job.sum == nullptr ? y : job.sum + r * job.size, y});
  }
}

static void norm(const NormJob* job) {
  const bool residual = job->residual != nullptr, shift = job->shift != nullptr;
  const auto rows = residual ? (shift ? norm_rows<true, true> : norm_rows<true, false>)
                             : (shift ? norm_rows<false, true> : norm_rows<false, false>);
  rows(*job);
}
