// A tensor times a matrix for each mode but the first.
#ifndef SPARSECC_ALGEBRA_MTTKRP_H_
#define SPARSECC_ALGEBRA_MTTKRP_H_

#include "isa.h"
#include "sparsecc/algebra.h"

namespace sparsecc::algebra {

// factors: of all levels but the first, [size][columns]; out [size of the first level][columns]. Throws Failure.
void mttkrp(const sparsecc_tensor& a, const void* const* factors, int64_t columns, void* out, Isa isa,
            const sparsecc_executor* executor);

}  // namespace sparsecc::algebra
#endif
