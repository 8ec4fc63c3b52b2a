// All kernels for tiles of bfloat16; see kernels.inl.h for the macros and the rule about headers.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_tiles.h"
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

#include "amx.inl.h"
#include "float_tiles.inl.h"

}  // namespace

void tiles16(const FloatTileJob* job) { float_tiles<tiles16_tile.wide>(*job); }
void tiles32(const FloatTileJob* job) { float_tiles<tiles32_tile.wide>(*job); }

extern const FloatTileHelpers kFloatTileHelpers = {split};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
