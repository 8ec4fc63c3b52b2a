// LSTM and GRU ready to run: the products of all their steps with x, then step by step the rest.
#ifndef SPARSECC_RECURRENT_H_
#define SPARSECC_RECURRENT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "kernels_recurrent.h"
#include "operator.h"
#include "sparsecc/c_api.h"

namespace sparsecc {

struct CellKernels {
  void (*lstm_cell)(const LstmCellJob* job);
  void (*gru_reset)(const GruResetJob* job);
  void (*gru_cell)(const GruCellJob* job);
};

CellKernels cell_kernels(Isa isa);
// One line per cell kernel that this machine can run: name, instruction set, tile.
const char* cell_kernel_table();

}  // namespace sparsecc

struct sparsecc_recurrent {
  explicit sparsecc_recurrent(const sparsecc_recurrent_desc& desc);
  // Throws Failure if a length is not in 0..steps.
  void run(const sparsecc_recurrent_io& io, const sparsecc_executor* executor) const;
  const char* kernels() const { return kernels_.c_str(); }
  int64_t inputs() const { return inputs_; }
  bool lstm() const { return cell_ == SPARSECC_LSTM; }

 private:
  struct Direction {
    bool reverse = false;
    std::unique_ptr<sparsecc_matmul> input, state;
    std::unique_ptr<sparsecc_matmul> candidate;  // GRU whose reset gate comes before its product
    sparsecc::Buffer<float> at_rest;             // what `state` gives for a state of zeros
  };
  struct State;

  int64_t gates() const { return lstm() ? 4 : 3; }
  Direction make_direction(const sparsecc_recurrent_desc& desc, int64_t number, const sparsecc::Weight& input,
                           const sparsecc::Weight& state) const;
  int64_t steps_at_once(int64_t steps, int64_t batch) const;
  void run_direction(int64_t number, const sparsecc_recurrent_io& io, const sparsecc_executor* executor) const;
  void run_steps(const State& state, int64_t first_row, int64_t rows,
                 const sparsecc_executor* executor) const;
  void run_cells(const State& state, int64_t step, int64_t row, int64_t rows, const float* h_part,
                 float* reset_h, float* candidate, bool at_rest, const sparsecc_executor* executor) const;

  sparsecc_cell cell_;
  bool before_reset_;  // GRU: the reset gate multiplies h R^T, not h
  int64_t hidden_, inputs_ = 0, state_weights_ = 0, step_weights_ = 0;
  sparsecc::Isa isa_;
  sparsecc::CellKernels cells_;
  std::vector<Direction> directions_;
  std::string kernels_;
};
#endif
