// Sums that come out with rows of x side by side.
#pragma once

template <int Rows>
static void store_rows(const QuadJob& job, int64_t group, int64_t first_row, const float* sums) {
  I16 sum[Rows];
  SPARSECC_UNROLL
  for (int r = 0; r < Rows; ++r) sum[r].part[0] = (VecUint)load(sums + r * kGroup).part[0];
  quad_store<Rows>(job, group, first_row, sum);
}

// At most sixteen rows, of sums [16 outputs][stride]: moved as floats, but never looked at as such.
static void store_turned(const QuadJob& job, int64_t group, int64_t first_row, int rows, const uint32_t* sums,
                         int64_t stride) {
  typedef float __attribute__((may_alias)) Moved;
  float by_row[kGroup * kGroup] __attribute__((aligned(64)));
  transpose_tile((const Moved*)sums, stride, kGroup, rows, by_row, kGroup);
  if (rows == kGroup) return store_rows<kGroup>(job, group, first_row, by_row);
  for (int r = 0; r < rows; ++r) store_rows<1>(job, group, first_row + r, by_row + r * kGroup);
}
