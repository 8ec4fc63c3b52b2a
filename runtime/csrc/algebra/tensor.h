// Sparse tensors as the C interface describes them, and what kernels need to know of them.
#ifndef SPARSECC_ALGEBRA_TENSOR_H_
#define SPARSECC_ALGEBRA_TENSOR_H_

#include <cstdint>

#include "c_guard.h"
#include "common.h"
#include "sparsecc/algebra.h"

namespace sparsecc::algebra {

inline bool is_dense(const sparsecc_level& level) { return level.pos == nullptr; }

inline int64_t load(const void* numbers, int32_t bytes, int64_t i) {
  return bytes == 4 ? static_cast<const int32_t*>(numbers)[i] : static_cast<const int64_t*>(numbers)[i];
}
inline int64_t pos_at(const sparsecc_level& level, int64_t i) { return load(level.pos, level.pos_bytes, i); }
inline int64_t crd_at(const sparsecc_level& level, int64_t i) { return load(level.crd, level.crd_bytes, i); }

// Nodes of the level below `parents` of the one above.
inline int64_t count(const sparsecc_level& level, int64_t parents) {
  return is_dense(level) ? parents * level.size : level.crd_count;
}

// Where the children of `node` begin.
inline int64_t children(const sparsecc_level& level, int64_t node) {
  return is_dense(level) ? node * level.size : pos_at(level, node);
}

// Lengths that fit each other: what kernels rely on, without a look at the numbers. Throws Failure.
void check_levels(const sparsecc_level* levels, int32_t level_count);
void check_shape(const sparsecc_tensor* tensor);
// And the numbers.
void check_numbers(const sparsecc_tensor& tensor);

// Whether it comes with cuts; callers of the first version had none.
bool has_cuts(const sparsecc_tensor& tensor);

// Width of the integers of all compressed levels. Throws Failure if they differ.
int32_t index_bytes(const sparsecc_tensor& tensor);

// A level above the last and the last: the tensor as rows of coordinates.
template <class V, class I>
struct Rows {
  int64_t rows;          // nodes of the level above
  int64_t columns;       // size of the last mode
  const I* pos;
  const I* crd;
  const V* values;
};

template <class V, class I>
Rows<V, I> rows_of(const sparsecc_tensor& tensor) {
  const sparsecc_level& last = tensor.levels[tensor.level_count - 1];
  return {last.pos_count - 1, last.size, static_cast<const I*>(last.pos), static_cast<const I*>(last.crd),
          static_cast<const V*>(tensor.values)};
}

// Calls body(V{}, I{}) with the types of the tensor's values and integers.
template <class Body>
void with_types(const sparsecc_tensor& tensor, const Body& body) {
  const bool wide = index_bytes(tensor) == 8;
  if (tensor.value_bytes == 4) {
    wide ? body(float{}, int64_t{}) : body(float{}, int32_t{});
  } else {
    wide ? body(double{}, int64_t{}) : body(double{}, int32_t{});
  }
}

}  // namespace sparsecc::algebra
#endif
