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
#include "join.inl.h"
#include "recurrent.inl.h"

}  // namespace

// A kernel for each type of values.
#define SPARSECC_BLOCKS(suffix, Value)                                                                \
  void block16##suffix(const BlockJob* job) { block_panel<Value, block16##suffix##_tile.rows, 1>(*job); } \
  void block32##suffix(const BlockJob* job) { block_panel<Value, block32##suffix##_tile.rows, 2>(*job); }
#define SPARSECC_SLICES(form, Form, suffix, Value)                          \
  void slice_##form##suffix(const SliceJob* job) {                          \
    slice_tiles<Value, slice_##form##suffix##_tile.rows, SliceView::Form>(*job); \
  }
#if SPARSECC_AVX512
#define SPARSECC_PACKED_SLICES(suffix, Value) SPARSECC_SLICES(packed, kPacked, suffix, Value)
#else
#define SPARSECC_PACKED_SLICES(suffix, Value)
#endif
#define SPARSECC_FEW_ROWS(suffix, Value)            \
  SPARSECC_BLOCKS(suffix, Value)                    \
  SPARSECC_SLICES(uniform, kUniform, suffix, Value) \
  SPARSECC_SLICES(masked, kMasked, suffix, Value)   \
  SPARSECC_PACKED_SLICES(suffix, Value)

SPARSECC_FEW_ROWS(, float)
#if SPARSECC_AVX512 || SPARSECC_AVX2 || SPARSECC_NEON
SPARSECC_FEW_ROWS(_f16, Half)
SPARSECC_FEW_ROWS(_bf16, Brain)
#endif
void element(const ElementJob* job) { element_of<1, element_tile.wide>(*job); }
void element4(const ElementJob* job) { element_of<4, element4_tile.wide>(*job); }

void lstm_cell(const LstmCellJob* job) { lstm_units(*job); }
void gru_reset(const GruResetJob* job) { gru_reset_units(*job); }
void gru_cell(const GruCellJob* job) { gru_units(*job); }

const Helpers kHelpers = {pack_rows, pack_pixels, finish, join};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
