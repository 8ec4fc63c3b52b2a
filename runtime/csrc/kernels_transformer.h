// Attention and normalisation: what one instruction set offers. Plain data only, as in kernels.h.
#ifndef SPARSECC_KERNELS_TRANSFORMER_H_
#define SPARSECC_KERNELS_TRANSFORMER_H_

#include <stdint.h>

#include "kernels.h"

namespace sparsecc {

constexpr int kMostBlockRows = 48;

// One head, some rows of queries. `keys_wide` and `size_wide` are keys and size in whole groups of 16, `score_stride`
// at least keys in whole groups.
struct AttentionJob {
  const float* q;  // [queries][size], rows q_stride apart
  int64_t q_stride, queries;  // at most kMostBlockRows queries, so that scores stay in cache
  const float* keys_t;  // [size][keys_wide]
  const float* values;  // [keys][size_wide], zeros beyond size
  int64_t keys, keys_wide, size, size_wide;  // only the first `keys` of those packed count
  const float* mask;  // added to the scores; null: none
  int64_t mask_row_stride, mask_key_stride;
  float scale;
  float* y;
  int64_t y_stride;
  float* scores;  // room for [queries, up to a whole tile][score_stride]
  int64_t score_stride;
  float* turned;  // room for [queries, up to a whole tile][size]
};

// Keys and values of one head into the form that AttentionJob reads.
struct AttentionPackJob {
  const float* k;
  const float* v;
  int64_t k_stride, v_stride, keys, keys_wide, size, size_wide;
  float* keys_t;
  float* values;
};

// Rotary positions: y = x * cosines + (-second half of x, first half of x) * sines.
struct RotaryJob {
  const float* x;
  int64_t x_stride;
  const float *cosines, *sines;
  int64_t table_stride, rows, size;
  float* y;  // [rows][size]
};

// y = norm(x + residual) * gain + shift over rows of `size`.
struct NormJob {
  const float* x;
  const float* residual;  // null: none. Rows come round again after residual_rows of them
  int64_t first_row, residual_rows;
  const float* gain;
  const float* shift;  // null: none
  float* y;
  float* sum;  // where x + residual goes; null: nowhere
  int64_t rows, size;
  float epsilon;
  bool centred;  // minus the mean (layer norm); else root mean square only
};

// y = act(gate) * up, where a row of x holds the gates and behind them the ups, `size` of each.
struct GateJob {
  const float* x;
  float* y;
  int64_t rows, size;
  Epilogue epilogue;
};

struct TransformerHelpers {
  Tile attention_tile;
  void (*pack_attention)(const AttentionPackJob* job);
  void (*attention)(const AttentionJob* job);
  void (*softmax)(const float* x, int64_t count, float* y);
  void (*rotate)(const RotaryJob* job);
  void (*norm)(const NormJob* job);
  void (*gate)(const GateJob* job);
};

#define SPARSECC_KERNEL(isa, rows, wide)                      \
  namespace isa {                                             \
  constexpr Tile attention_tile{rows, wide};                  \
  extern const TransformerHelpers kTransformer;               \
  }
#include "kernels_transformer.inc"
#undef SPARSECC_KERNEL

}  // namespace sparsecc
#endif
