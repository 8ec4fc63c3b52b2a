// All kernels for one instruction set. The including file sets the macros
//   SPARSECC_NAMESPACE, SPARSECC_LANES (floats in a register), SPARSECC_AVX2, SPARSECC_AVX512, SPARSECC_NEON
// (one that is not defined counts as 0) and is compiled with the flags of that set. No standard C++ header may be included here: an inline
// function of one would be compiled with these flags and might then be linked into the generic path.
#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"
#include "../kernels_recurrent.h"
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

#include "block.inl.h"
#include "element.inl.h"
#include "pack.inl.h"
#include "slice.inl.h"
#include "recurrent.inl.h"

}  // namespace

void block16(const BlockJob* job) { block_panel<block16_tile.rows, 1>(*job); }
void block32(const BlockJob* job) { block_panel<block32_tile.rows, 2>(*job); }
void element(const ElementJob* job) { element_of<1, element_tile.wide>(*job); }
void element4(const ElementJob* job) { element_of<4, element4_tile.wide>(*job); }
void slice_uniform(const SliceJob* job) { slice_tiles<slice_uniform_tile.rows, SliceView::kUniform>(*job); }
void slice_masked(const SliceJob* job) { slice_tiles<slice_masked_tile.rows, SliceView::kMasked>(*job); }
#if SPARSECC_AVX512
void slice_packed(const SliceJob* job) { slice_tiles<slice_packed_tile.rows, SliceView::kPacked>(*job); }
#endif

void lstm_cell(const LstmCellJob* job) { lstm_units(*job); }
void gru_reset(const GruResetJob* job) { gru_reset_units(*job); }
void gru_cell(const GruCellJob* job) { gru_units(*job); }

const Helpers kHelpers = {pack_rows, pack_pixels, finish};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
