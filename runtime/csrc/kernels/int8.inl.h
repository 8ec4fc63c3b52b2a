// All kernels for products of bytes for one instruction set; see kernels.inl.h for the macros and the rule
// about headers. SPARSECC_VNNI: the set has dot products of four bytes that do not saturate.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_int8.h"
#include "sparsecc/c_api.h"

#include "intrinsics.h"

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
