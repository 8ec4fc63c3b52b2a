// Rows of a sparse matrix, or fibres of a tensor, times what is dense.
#pragma once

SPARSECC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sum of values * x over coordinates [begin, end): on four sums of their own where they are many, else in one loop, which
// ends with one wrong guess instead of two.
template <class V, class I>
SPARSECC_INLINE V gather_dot(const V* values, const I* crd, const V* x, int64_t begin, int64_t end) {
  constexpr int64_t kMany = 32;
  V sum[4] = {};
  int64_t n = begin;
  if (end - begin >= kMany)
    for (; n + 4 <= end; n += 4) {
      SPARSECC_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] += values[n + i] * x[crd[n + i]];
    }
  for (; n < end; ++n) sum[0] += values[n] * x[crd[n]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class V, class I>
void spmv(SpmvJob<V, I>* job) {
  const RowPart<V, I> part = job->part;
  const V* x = job->x;
  const int64_t first = least(part.pos[part.row_begin], part.end);
  job->carry = gather_dot(part.values, part.crd, x, part.begin, first);
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    const int64_t end = least(part.pos[row + 1], part.end);
    job->y[job->places == nullptr ? row : job->places[row]] =
        gather_dot(part.values, part.crd, x, part.pos[row], end);
  }
}

// y[0 .. kRegisters * kCount) of one row.
template <int kRegisters, int kCount, class V, class I>
SPARSECC_INLINE void row_tile(const RowPart<V, I>& part, const V* x, int64_t columns, int64_t begin, int64_t end,
                              V* y) {
  using Vec = typename Lanes<V, kCount>::Type;
  Vec sum[kRegisters] = {};
  for (int64_t n = begin; n < end; ++n) {
    const V* from = x + part.crd[n] * columns;
    const Vec value = part.values[n] - Vec{};
    SPARSECC_UNROLL
    for (int i = 0; i < kRegisters; ++i) sum[i] += value * load<kCount>(from + i * kCount);
  }
  SPARSECC_UNROLL
  for (int i = 0; i < kRegisters; ++i) store<kCount>(y + i * kCount, sum[i]);
}

// What is left of a row, in halves.
template <int kCount, class V, class I>
SPARSECC_INLINE void row_rest(const RowPart<V, I>& part, const V* x, int64_t columns, int64_t column, int64_t begin,
                              int64_t end, V* y) {
  if (columns - column >= kCount) {
    row_tile<1, kCount>(part, x + column, columns, begin, end, y + column);
    column += kCount;
  }
  if constexpr (kCount > 1) row_rest<kCount / 2>(part, x, columns, column, begin, end, y);
}

template <class V, class I>
SPARSECC_INLINE void row_times(const RowPart<V, I>& part, const V* x, int64_t columns, int64_t begin, int64_t end,
                               V* y) {
  constexpr int kCount = kWide<V>;
  int64_t column = 0;
  for (; column + 8 * kCount <= columns; column += 8 * kCount)
    row_tile<8, kCount>(part, x + column, columns, begin, end, y + column);
  for (; column + 4 * kCount <= columns; column += 4 * kCount)
    row_tile<4, kCount>(part, x + column, columns, begin, end, y + column);
  for (; column + 2 * kCount <= columns; column += 2 * kCount)
    row_tile<2, kCount>(part, x + column, columns, begin, end, y + column);
  row_rest<kCount>(part, x, columns, column, begin, end, y);
}

template <class V, class I>
void spmm(const SpmmJob<V, I>* job) {
  const RowPart<V, I>& part = job->part;
  const int64_t first = least(part.pos[part.row_begin], part.end);
  row_times(part, job->x, job->columns, part.begin, first, job->carry);
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    const int64_t end = least(part.pos[row + 1], part.end);
    V* y = job->y + (job->places == nullptr ? row : int64_t{job->places[row]}) * job->columns;
    row_times(part, job->x, job->columns, part.pos[row], end, y);
  }
}

// kColumns products u . v[coordinate], which share the loads from u.
template <int kColumns, class V, class I>
SPARSECC_INLINE void dots(const V* u, const V* v, int64_t inner, const I* crd, const V* values, V* out) {
  constexpr int kCount = kWide<V>;
  using Vec = typename Lanes<V, kCount>::Type;
  Vec sum[kColumns] = {};
  const V* from[kColumns];
  SPARSECC_UNROLL
  for (int i = 0; i < kColumns; ++i) from[i] = v + crd[i] * inner;
  int64_t k = 0;
  for (; k + kCount <= inner; k += kCount) {
    const Vec left = load<kCount>(u + k);
    SPARSECC_UNROLL
    for (int i = 0; i < kColumns; ++i) sum[i] += left * load<kCount>(from[i] + k);
  }
  SPARSECC_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    V whole = total<V, kCount>(sum[i]);
    for (int64_t rest = k; rest < inner; ++rest) whole += u[rest] * from[i][rest];
    out[i] = values[i] * whole;
  }
}

template <class V, class I>
SPARSECC_INLINE void row_of_dots(const SddmmJob<V, I>& job, int64_t row, int64_t begin, int64_t end) {
  const V* u = job.u + (job.places == nullptr ? row : int64_t{job.places[row]}) * job.inner;
  int64_t n = begin;
  for (; n + 4 <= end; n += 4)
    dots<4>(u, job.v, job.inner, job.part.crd + n, job.part.values + n, job.out + n);
  for (; n < end; ++n) dots<1>(u, job.v, job.inner, job.part.crd + n, job.part.values + n, job.out + n);
}

template <class V, class I>
void sddmm(const SddmmJob<V, I>* job) {
  const RowPart<V, I>& part = job->part;
  const int64_t first = least(part.pos[part.row_begin], part.end);
  if (part.begin < first) row_of_dots(*job, part.row_begin - 1, part.begin, first);
  for (int64_t row = part.row_begin; row < part.row_end; ++row)
    row_of_dots(*job, row, part.pos[row], least(part.pos[row + 1], part.end));
}
