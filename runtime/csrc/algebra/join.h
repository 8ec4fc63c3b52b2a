// Sums and element-wise products of sparse tensors.
#ifndef SPARSECC_ALGEBRA_JOIN_H_
#define SPARSECC_ALGEBRA_JOIN_H_

#include "algebra/merge.h"
#include "isa.h"
#include "sparsecc/algebra.h"

namespace sparsecc::algebra {

// Levels have the same kinds and sizes in all operands, dense ones first, and all arrays the same types; the last level
// is compressed. Throws Failure.
void check_join(const sparsecc_tensor* operands, int32_t count);

// Results go where `out` points to, whose room is that of sparsecc_join; counts are set to what there is.
void join(const sparsecc_tensor* operands, int32_t count, Join how, sparsecc_result* out, Isa isa,
          const sparsecc_executor* executor);

}  // namespace sparsecc::algebra
#endif
