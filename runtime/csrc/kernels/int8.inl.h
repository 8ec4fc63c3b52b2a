// All kernels for products of bytes for one instruction set; see kernels.inl.h for the macros and the rule
// about headers. SPARSECC_VNNI: the set has dot products of four bytes that do not saturate.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_int8.h"
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

// Each of these uses what the ones above it define.
#include "vector.inl.h"

#include "activation.inl.h"
#include "transpose.inl.h"

#include "quads.inl.h"
#include "quantize.inl.h"

}  // namespace

void quads(const QuadJob* job) { quad_tiles<quads_tile.rows>(*job); }

extern const ByteHelpers kByteHelpers = {kOrder, extremes, quantize};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
