// Sparse tensor algebra: what one instruction set offers. Plain data only, as in kernels.h.
//
// Values are float or double (V), positions and coordinates int32_t or int64_t (I). A part of the work is a run of
// coordinates [begin, end) and the rows whose beginning lies in it; coordinates before the first of those rows belong
// to a row that an earlier part began.
#ifndef SPARSECC_KERNELS_ALGEBRA_H_
#define SPARSECC_KERNELS_ALGEBRA_H_

#include <stdint.h>

namespace sparsecc {

template <class V, class I>
struct RowPart {
  const I* pos;
  const I* crd;
  const V* values;
  int64_t row_begin, row_end;
  int64_t begin, end;
};

// y[row] = sum of values * x[coordinate] over the coordinates of the row that are in the part.
template <class V, class I>
struct SpmvJob {
  RowPart<V, I> part;
  const V* x;
  V* y;
  const I* places;  // where the results of rows go; null: y[row]
  V carry;          // out: the sum for the row that was begun before
};

// The same with x [size][columns] and y [rows][columns].
template <class V, class I>
struct SpmmJob {
  RowPart<V, I> part;
  const V* x;
  int64_t columns;
  V* y;
  const I* places;
  V* carry;  // [columns]
};

// out[n] = values[n] * (row . column) where rows are u [.][inner], columns v [.][inner].
template <class V, class I>
struct SddmmJob {
  RowPart<V, I> part;
  const V *u, *v;
  int64_t inner;
  const I* places;  // rows of u; null: in order
  V* out;
};

// out[i] = sum of values[n] * the product of the rows of all factors, over coordinates [begin, end) of the last level of
// a tree whose levels are compressed below the first, of which i is a node.
constexpr int kMostModes = 16;

template <class V, class I>
struct MttkrpJob {
  int modes;  // 2 or more
  const I* pos[kMostModes];  // of all levels but the first
  const I* crd[kMostModes];
  const V* values;
  const V* factors[kMostModes];  // [size][columns], of all levels but the first
  int64_t columns;
  int64_t begin, end;
  int64_t node[kMostModes];  // those that `begin` is in, of all levels but the last
  V* sums;                   // room for [modes - 1][columns]
  V* out;                    // [nodes of the first level][columns]
  const I* places;           // where those go; null: in order
  V* carry;                  // instead of `out` for the first node; null: it begins here
};

template <class V, class I>
struct AlgebraKernels {
  void (*spmv)(SpmvJob<V, I>* job);
  void (*spmm)(const SpmmJob<V, I>* job);
  void (*sddmm)(const SddmmJob<V, I>* job);
  void (*mttkrp)(MttkrpJob<V, I>* job);
};

struct AlgebraTable {
  AlgebraKernels<float, int32_t> float_int32;
  AlgebraKernels<float, int64_t> float_int64;
  AlgebraKernels<double, int32_t> double_int32;
  AlgebraKernels<double, int64_t> double_int64;
};

namespace generic {
extern const AlgebraTable kAlgebra;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AlgebraTable kAlgebra;
}
namespace avx512 {
extern const AlgebraTable kAlgebra;
}
#elif defined(__aarch64__)
namespace neon {
extern const AlgebraTable kAlgebra;
}
#endif

}  // namespace sparsecc
#endif
