// Helpers for attention and normalisation by instruction set.
#ifndef SPARSECC_TRANSFORMER_H_
#define SPARSECC_TRANSFORMER_H_

#include "isa.h"
#include "kernels_transformer.h"
#include "sparsecc/c_api.h"

namespace sparsecc {

// Scores of a block of queries, in bytes, so that they stay in a first-level cache.
constexpr int64_t kScoreBytes = 24 * 1024;
// A mask this low makes a weight of exactly 0 where another key has none like it.
constexpr float kHidden = -1e30f;

// Throws Failure where there are none.
const TransformerHelpers& transformer_helpers(Isa isa);

// Throws Failure where sizes and strides are out of range or contradict each other.
void check_attention(const sparsecc_attention_desc& attention);

inline int64_t offset(const int64_t (&strides)[3], int64_t batch, int64_t row, int64_t head) {
  return batch * strides[0] + row * strides[1] + head * strides[2];
}

}  // namespace sparsecc
#endif
