// Rows of a sparse matrix, or fibres of a tensor, times what is dense.
#pragma once

SPARSECC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Products of kCount values and the numbers of x at their coordinates, which come by single loads: instructions that gather
// take longer.
template <int kCount, class V, class I>
SPARSECC_INLINE typename Lanes<V, kCount>::Type products(const V* values, const I* crd, const V* x) {
  using Vec = typename Lanes<V, kCount>::Type;
  if constexpr (kCount == 4) {
    return load<kCount>(values) * Vec{x[crd[0]], x[crd[1]], x[crd[2]], x[crd[3]]};
  } else {
    return load<kCount>(values) * Vec{x[crd[0]], x[crd[1]]};
  }
}

// Lanes that are put together from single loads: more would have to cross the middle of a register.
template <class V>
constexpr int kNarrow = 16 / static_cast<int>(sizeof(V));

// Sum of values * x over coordinates [begin, end).
template <class V, class I>
SPARSECC_INLINE V gather_dot(const V* values, const I* crd, const V* x, int64_t begin, int64_t end) {
  constexpr int kCount = kNarrow<V>, kSums = 4;
  typename Lanes<V, kCount>::Type sum[kSums] = {};
  int64_t n = begin;
  for (; n + kSums * kCount <= end; n += kSums * kCount) {
    SPARSECC_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] += products<kCount>(values + n + i * kCount, crd + n + i * kCount, x);
  }
  V whole = total<V, kCount>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; n < end; ++n) whole += values[n] * x[crd[n]];
  return whole;
}

// Sum of the first n numbers; as many as a register holds are read beyond them.
template <class V>
SPARSECC_INLINE V sum_of(const V* from, int64_t n) {
  constexpr int kCount = kWide<V>;
  using Vec = typename Lanes<V, kCount>::Type;
  using Bits = typename Lanes<typename Whole<V>::Type, kCount>::Type;
  Vec sum = {};
  for (; n >= kCount; n -= kCount, from += kCount) sum += load<kCount>(from);
  Bits lane;
  SPARSECC_UNROLL
  for (int i = 0; i < kCount; ++i) lane[i] = i;
  const Bits wanted = lane < (static_cast<typename Whole<V>::Type>(n) - Bits{});
  return total<V, kCount>(sum + (Vec)((Bits)load<kCount>(from) & wanted));
}

constexpr int64_t kLongRow = 32;    // which is added up at once
constexpr int64_t kTogether = 512;  // products of shorter rows

// Rows that are all short: first all their products, as if they were one row, then the sums. A processor guesses wrong
// where a short row ends, and had to wait for loads from x each time otherwise.
template <class V, class I>
SPARSECC_INLINE void short_rows(const SpmvJob<V, I>& job, int64_t row_begin, int64_t row_end, int64_t end) {
  constexpr int kCount = kNarrow<V>;
  V product[kTogether + kWide<V>];
  const I* pos = job.part.pos;
  const int64_t begin = pos[row_begin], size = end - begin;
  const V* values = job.part.values + begin;
  const I* crd = job.part.crd + begin;
  int64_t n = 0;
  for (; n + kCount <= size; n += kCount) store<kCount>(product + n, products<kCount>(values + n, crd + n, job.x));
  for (; n < size; ++n) product[n] = values[n] * job.x[crd[n]];
  store<kWide<V>>(product + size, typename Lanes<V, kWide<V>>::Type{});
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t first = pos[row] - begin, past = least(pos[row + 1] - begin, size);
    job.y[job.places == nullptr ? row : job.places[row]] = sum_of(product + first, past - first);
  }
}

template <class V, class I>
void spmv(SpmvJob<V, I>* job) {
  const RowPart<V, I> part = job->part;
  const int64_t first = least(part.pos[part.row_begin], part.end);
  job->carry = gather_dot(part.values, part.crd, job->x, part.begin, first);
  for (int64_t row = part.row_begin; row < part.row_end;) {
    const int64_t begin = part.pos[row];
    int64_t last = row, end = begin;
    while (last < part.row_end) {
      const int64_t next = least(part.pos[last + 1], part.end);
      if (next - end >= kLongRow || next - begin > kTogether) break;
      end = next;
      ++last;
    }
    if (last > row) {
      short_rows(*job, row, last, end);
      row = last;
    } else {
      job->y[job->places == nullptr ? row : job->places[row]] =
          gather_dot(part.values, part.crd, job->x, begin, least(part.pos[row + 1], part.end));
      ++row;
    }
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
