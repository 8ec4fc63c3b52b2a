// Products of sparse rows with dense operands, in parts of equal work.
#ifndef SPARSECC_ALGEBRA_ROWS_H_
#define SPARSECC_ALGEBRA_ROWS_H_

#include "isa.h"
#include "kernels_algebra.h"
#include "sparsecc/algebra.h"

namespace sparsecc::algebra {

// The kernels of an instruction set.
const AlgebraTable& table_of(Isa isa);

template <class V, class I>
const AlgebraKernels<V, I>& kernels_of(Isa isa);

void spmv(const sparsecc_tensor& a, const void* x, void* y, Isa isa, const sparsecc_executor* executor);
void spmm(const sparsecc_tensor& a, const void* x, int64_t columns, void* y, Isa isa,
          const sparsecc_executor* executor);
// out has a value for each of `s`; u [rows][inner], v [columns][inner].
void sddmm(const sparsecc_tensor& s, const void* u, const void* v, int64_t inner, void* out, Isa isa,
           const sparsecc_executor* executor);

}  // namespace sparsecc::algebra
#endif
