// What one instruction set offers for the cells of recurrent operators; see kernels.h for the rule about code.
//
// `x_part` and `h_part` hold the gates of one row of the batch one after another, each of `hidden` floats, in
// the order of ONNX (LSTM: input, output, forget, cell; GRU: update, reset, hidden). Both are readable 16 floats
// beyond their end; states and outputs are written up to `hidden` only.
#ifndef SPARSECC_KERNELS_RECURRENT_H_
#define SPARSECC_KERNELS_RECURRENT_H_

#include <stdint.h>

#include "kernels.h"

namespace sparsecc {

struct LstmCellJob {
  const float* x_part;  // x W^T and all biases
  const float* h_part;  // h R^T
  float *c, *h;         // the state, in and out
  float* y;
  int64_t hidden;
};

struct GruResetJob {
  const float *x_part, *h_part;
  const float* h;
  float* reset_h;  // reset gate times h
  int64_t hidden;
};

struct GruCellJob {
  const float *x_part, *h_part;
  const float* candidate;  // (reset_h) R_h^T; null: the reset gate multiplies h_part instead
  float* h;                // the state, in and out
  float* y;
  int64_t hidden;
};

#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  namespace isa {                                     \
  void kernel(const Job* job);                        \
  }
#include "kernels_recurrent.inc"
#undef SPARSECC_KERNEL

}  // namespace sparsecc
#endif
