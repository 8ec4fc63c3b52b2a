// Sparse tensor algebra for one instruction set; see kernels.inl.h for the macros and the rule about headers.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_algebra.h"
#include "intrinsics.h"

namespace sparsecc {
namespace SPARSECC_NAMESPACE {
namespace {

#define SPARSECC_INLINE static inline __attribute__((always_inline))
#define SPARSECC_UNROLL _Pragma("GCC unroll 32")

// Integers as wide as a value.
template <class V>
struct Whole {
  typedef int32_t Type;
};
template <>
struct Whole<double> {
  typedef int64_t Type;
};

// A register of values, and halves of it down to single ones, for what is left at the end of rows.
constexpr int kRegisterBytes = 4 * SPARSECC_LANES;

template <class V, int kCount>
struct Lanes {
  typedef V Loose __attribute__((vector_size(kCount * sizeof(V)), aligned(sizeof(V)), may_alias));
  typedef V Type __attribute__((vector_size(kCount * sizeof(V))));
};
template <class V>
struct Lanes<V, 1> {
  typedef V Loose;
  typedef V Type;
};

template <class V>
constexpr int kWide = kRegisterBytes / static_cast<int>(sizeof(V));

template <int kCount, class V>
SPARSECC_INLINE typename Lanes<V, kCount>::Type load(const V* from) {
  return *reinterpret_cast<const typename Lanes<V, kCount>::Loose*>(from);
}

template <int kCount, class V>
SPARSECC_INLINE void store(V* to, typename Lanes<V, kCount>::Type v) {
  *reinterpret_cast<typename Lanes<V, kCount>::Loose*>(to) = v;
}

// The sum of all lanes.
template <class V, int kCount>
SPARSECC_INLINE V total(typename Lanes<V, kCount>::Type v) {
  if constexpr (kCount == 1) {
    return v;
  } else {
    typename Lanes<V, kCount / 2>::Type low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return total<V, kCount / 2>(low + high);
  }
}

#include "algebra_rows.inl.h"
#include "algebra_mttkrp.inl.h"

}  // namespace

#define SPARSECC_ALGEBRA(V, I) {spmv<V, I>, spmm<V, I>, sddmm<V, I>, mttkrp<V, I>}

extern const AlgebraTable kAlgebra = {SPARSECC_ALGEBRA(float, int32_t), SPARSECC_ALGEBRA(float, int64_t),
                                      SPARSECC_ALGEBRA(double, int32_t), SPARSECC_ALGEBRA(double, int64_t)};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
