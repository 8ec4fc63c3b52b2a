// All kernels for products of bytes for one instruction set; see kernels.inl.h for the macros and the rule
// about headers. SPARSECC_VNNI: the set has dot products of four bytes that do not saturate. SPARSECC_VBMI: permutes of
// 64 bytes on top; then there are only the kernels that need those.
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
#if SPARSECC_AVX2 || SPARSECC_AVX512
#include "windows.inl.h"
#endif
#if !SPARSECC_VBMI
#include "quantize.inl.h"
#endif

}  // namespace

#if SPARSECC_VBMI
void windows64(const QuadJob* job) { window_tiles<kWide, windows64_tile.rows>(*job); }
#else
void quads(const QuadJob* job) { quad_tiles<Neighbours, quads_tile.rows>(*job); }
#if SPARSECC_AVX2 || SPARSECC_AVX512
void windows16(const QuadJob* job) { window_tiles<kNarrow, windows16_tile.rows>(*job); }
#endif

extern const ByteHelpers kByteHelpers = {kOrder, extremes, quantize, quantize_windows};
#endif

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
