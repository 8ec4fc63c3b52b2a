// All kernels for quad planes for one instruction set; see kernels.inl.h for the macros and the rule about
// headers, int8.inl.h for SPARSECC_VNNI. Pixels are in the lanes: a vector of x, sixteen pixels of a quad of
// channels, is loaded once for several outputs, whose weights are broadcast. Sums are exact.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_planes.h"
#include "sparsecc/c_api.h"

#include "intrinsics.h"

namespace sparsecc {
namespace SPARSECC_NAMESPACE {
namespace {

constexpr int kLanes = SPARSECC_LANES;

// Each of these uses what the ones above it define.
#include "vector.inl.h"

#include "plane_bytes.inl.h"
#include "plane_tiles.inl.h"

}  // namespace

void planes8(const PlaneJob* job) { plane_tiles<8, planes8_tile.rows, planes8_tile.wide>(*job); }

void planes4(const PlaneJob* job) { plane_tiles<4, planes4_tile.rows, planes4_tile.wide>(*job); }

extern const PlaneHelpers kPlaneHelpers = {kForm,     plane_pick,     plane_raise,     plane_sum,
                                           plane_add, plane_quantize, plane_dequantize};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
