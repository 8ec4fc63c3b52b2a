// A linear map with weights in bytes, ready to run. x is quantised on the way in.
#ifndef SPARSECC_INT8_H_
#define SPARSECC_INT8_H_

#include <cstdint>

#include "common.h"
#include "isa.h"
#include "kernels_int8.h"
#include "sparsecc/c_api.h"
#include "weight.h"

namespace sparsecc {

// The kernel for products of bytes as selected.
struct ByteKernel {
  const char* name;
  Tile tile;
  void (*run)(const QuadJob* job);
  const ByteHelpers* help;
};

ByteKernel byte_kernel(ByteIsa isa);
// One line per kernel that this machine can run: name, instruction set, tile.
const char* byte_kernel_table();

// Where the non-zero units stand; the descriptor's values are looked at by the pack only.
Weight read_int8_weight(const sparsecc_int8_weight_desc& desc);

// Any RxC as blocks of 16 outputs by 4 inputs, those that hold a non-zero weight.
struct QuadPack {
  QuadPack(const Weight& weight, const sparsecc_int8_weight_desc& desc, QuadOrder order);
  QuadView view() const;
  int64_t outputs, groups;
  Buffer<int64_t> start;  // [groups + 1]; also the prefix sums that work is cut by

 private:
  Buffer<uint32_t> index_;
  Buffer<int8_t> values_;
  Buffer<int32_t> sums_;
  Buffer<float> scales_;
};

}  // namespace sparsecc

struct sparsecc_int8_matmul {
  explicit sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc);
  void run(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  const char* kernel() const { return kernel_.name; }
  int64_t inputs() const { return inputs_; }

 private:
  sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc, const sparsecc::Weight& weight);
  sparsecc::ByteScale scale_of(const float* x, int64_t count, const sparsecc_executor* executor) const;
  void pack(const float* x, int64_t rows, sparsecc::ByteScale to, uint8_t* panel) const;
  void multiply(const uint8_t* panels, int64_t rows, sparsecc::ByteScale scale, int64_t group_begin,
                int64_t group_end, float* y) const;

  int64_t inputs_;
  sparsecc::ByteKernel kernel_;
  sparsecc::QuadPack weight_;
  sparsecc::Buffer<float> bias_;  // padded to whole groups
  sparsecc::Epilogue epilogue_;
};
#endif
