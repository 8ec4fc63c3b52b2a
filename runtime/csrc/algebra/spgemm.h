// Products of sparse matrices, row by row (Gustavson 1978), in parts of equally many products.
#ifndef SPARSECC_ALGEBRA_SPGEMM_H_
#define SPARSECC_ALGEBRA_SPGEMM_H_

#include <cstdint>

#include "sparsecc/algebra.h"

// A product that waits to be fetched: only then is it known how large it is.
struct sparsecc_product {
 public:
  virtual ~sparsecc_product() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t entries() const = 0;
  // pos [rows + 1], crd and values [entries], of the types of the operands.
  virtual void fetch(void* pos, void* crd, void* values, const sparsecc_executor* executor) const = 0;
};

namespace sparsecc::algebra {

// C = A B, or the element-wise product of that and a mask. The rows of C are those that A stores. Throws Failure.
sparsecc_product* multiply(const sparsecc_tensor& a, const sparsecc_tensor& b, const sparsecc_tensor* mask,
                           const sparsecc_executor* executor);

}  // namespace sparsecc::algebra
#endif
