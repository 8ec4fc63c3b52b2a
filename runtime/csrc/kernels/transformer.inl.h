// Attention and normalisation for one instruction set; see kernels.inl.h for the macros and the rule about
// headers.
#include <stddef.h>
#include <stdint.h>

#include "../kernels_transformer.h"
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

#include "attention.inl.h"
#include "gate.inl.h"
#include "norm.inl.h"
#include "rotary.inl.h"
#include "softmax.inl.h"

}  // namespace

extern const TransformerHelpers kTransformer = {attention_tile, pack_attention, attention, softmax,
                                                rotate,         norm,           gate};

}  // namespace SPARSECC_NAMESPACE
}  // namespace sparsecc
