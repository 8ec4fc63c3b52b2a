// All kernels for one instruction set. The including file sets the macros
//   SPARSECC_NAMESPACE, SPARSECC_LANES (floats in a register), SPARSECC_AVX2, SPARSECC_AVX512
// and is compiled with the flags of that set. No standard C++ header may be included here: an inline
// function of one would be compiled with these flags and might then be linked into the generic path.
#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"
#include "sparsecc/c_api.h"

#if SPARSECC_AVX2 || SPARSECC_AVX512
// GCC 12 reports its own intrinsics headers (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sparsecc {
namespace SPARSECC_NAMESPACE {
namespace {

constexpr int kLanes = SPARSECC_LANES;
#if defined(__aarch64__) || SPARSECC_AVX512
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif
constexpr int kElementWide = kLanes == 4 && !kManyRegisters ? 2 : 4;

#include "vector.inl.h"
// In this order.
#include "activation.inl.h"
#include "transpose.inl.h"
// In this order.
#include "block.inl.h"
#include "element.inl.h"
#include "pack.inl.h"
#include "slice.inl.h"

}  // namespace

const KernelSet kKernels = {
    {kBlockRows<1>, kBlockRows<2>}, kElementWide, SPARSECC_AVX512 != 0, SPARSECC_AVX512 != 0 ? 3 : 1,
    block, element, slice, pack_rows, pack_pixels, finish,
};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
