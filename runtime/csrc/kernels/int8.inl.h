// All kernels for products of bytes for one instruction set; see kernels.inl.h for the macros and the rule
// about headers. Further macros: SPARSECC_VNNI, SPARSECC_DOTPROD (the set has dot products of four bytes that do not
// saturate, on x86 and ARM), SPARSECC_I8MM (it multiplies matrices of bytes too), and SPARSECC_VBMI or SPARSECC_AMX
// (permutes of 64 bytes, or tile registers, on top; then there are only the kernels that need those).
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

#include "dot.inl.h"
#include "quads.inl.h"
#if SPARSECC_AVX2 || SPARSECC_AVX512 || SPARSECC_NEON
#include "windows.inl.h"
#endif
#if !SPARSECC_VBMI
#include "quad_join.inl.h"
#include "quantize.inl.h"
#endif
#if SPARSECC_VBMI || SPARSECC_AMX
#include "turned.inl.h"
#endif
#if SPARSECC_VBMI
#include "lanes.inl.h"
#endif
#if SPARSECC_AMX
#include "amx.inl.h"
#include "tiles.inl.h"
#endif

}  // namespace

#if SPARSECC_VBMI
void windows64(const QuadJob* job) { window_tiles<kWide, windows64_tile.rows>(*job); }
void lanes(const QuadJob* job) { lane_tiles(*job); }
#elif SPARSECC_AMX
void tiles(const QuadJob* job) { tile_panels(*job); }

extern const ByteHelpers kByteHelpers = {QuadOrder::kTiles, extremes, quantize, quantize_windows, quantize_lanes,
                                         join_quads};
#else
void quads(const QuadJob* job) { quad_tiles<Neighbours, quads_tile.rows>(*job); }
#if SPARSECC_AVX2 || SPARSECC_AVX512 || SPARSECC_NEON
void windows16(const QuadJob* job) { window_tiles<kNarrow, windows16_tile.rows>(*job); }
#endif

extern const ByteHelpers kByteHelpers = {kOrder, extremes, quantize, quantize_windows, quantize_lanes,
                                         join_quads};
#endif

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
