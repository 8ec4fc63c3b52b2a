// A linear map with weights in bytes, ready to run. x is quantised on the way in.
#ifndef SPARSECC_INT8_H_
#define SPARSECC_INT8_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "common.h"
#include "isa.h"
#include "kernels_int8.h"
#include "pieces.h"
#include "shares.h"
#include "sparsecc/c_api.h"
#include "weight.h"

namespace sparsecc {

// A kernel for products of bytes as selected.
struct ByteKernel {
  const char* name;
  Tile tile;
  void (*run)(const QuadJob* job);
  const ByteHelpers* help;
  QuadOrder order;
  int width;    // of the windows, 0 if inputs are not picked
  double cost;  // of a block, in blocks of neighbours; measured on Zen 5
};

// Those of an instruction set that run on this machine, by width. `wanted` as in
// choose_byte_isa, or the name of one kernel. Throws Failure if there is none.
std::vector<ByteKernel> byte_kernels(const char* wanted);
// One line per kernel that this machine can run: name, instruction set, tile.
const char* byte_kernel_table();

// Where the non-zero units stand; the descriptor's values are looked at by the pack only.
Weight read_int8_weight(const sparsecc_int8_weight_desc& desc);

// Any layout as blocks of 16 outputs by 4 inputs, those that hold a non-zero weight, or as tiles of sixteen of these.
// With a width, inputs are picked from windows of that many.
struct QuadPack {
  QuadPack(const Weight& weight, const sparsecc_int8_weight_desc& desc, QuadOrder order, int width);
  QuadView view() const;
  QuadView piece_view() const;
  int64_t blocks() const { return start[start.size() - 1]; }  // or tiles
  int64_t bytes() const { return values_.size() + places_.size(); }
  // Of tiles, and bringing x together counted as more of them.
  int64_t products() const { return products_; }
  int64_t outputs, groups;
  int tall = 0;           // of lanes: outputs that share inputs
  Buffer<int64_t> start;  // [groups + 1]; of lanes, of every `tall` outputs of a group
  Shares shares;          // of groups
  Pieces pieces;

 private:
  void pack_neighbours(const Weight& weight, const int8_t* values, QuadOrder order);
  void pack_windows(const Weight& weight, const int8_t* values, QuadOrder order, int width);
  void pack_lanes(const Weight& weight, const int8_t* values);
  Buffer<int64_t> pack_tiles();  // returns prefix sums of products

  int64_t products_ = 0;
  Picks picks_ = Picks::kNone;
  Buffer<uint32_t> index_;
  Buffer<int8_t> values_;
  Buffer<int32_t> sums_;
  Buffer<float> scales_;
  Buffer<uint8_t> places_, spread_, added_;
};

// A weight as one kernel reads it.
struct ByteForm {
  ByteKernel kernel;
  QuadPack weight;
};

// How long 16 rows of x take, where tiles are to be compared with other forms (pack_tiles.cc).
double estimated_cycles(const ByteKernel& kernel, const QuadPack& form);

}  // namespace sparsecc

struct sparsecc_int8_matmul {
  explicit sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc);
  // x quantised as DynamicQuantizeLinear does it, by a given scale, or already in bytes.
  void run(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  void run(const float* x, sparsecc::ByteScale scale, int64_t rows, float* y,
           const sparsecc_executor* executor) const;
  void run(const uint8_t* x, sparsecc::ByteScale scale, int64_t rows, float* y,
           const sparsecc_executor* executor) const;
  const char* kernel(int64_t rows) const;
  const sparsecc::Shares& shares() const { return forms_[0].weight.shares; }
  int64_t inputs() const { return inputs_; }

 private:
  sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc, const sparsecc::Weight& weight);
  sparsecc::ByteScale scale_of(const float* x, int64_t count, const sparsecc_executor* executor) const;
  struct Source {  // one of the two
    const float* x;
    const uint8_t* bytes;
  };
  int64_t lane_rows(int64_t rows) const;
  void pack(const sparsecc::ByteForm& form, Source x, int64_t first_row, int64_t rows, int64_t first, int64_t last, sparsecc::ByteScale to,
            uint8_t* panels) const;
  void run(Source x, sparsecc::ByteScale scale, int64_t rows, float* y,
           const sparsecc_executor* executor) const;
  void run(const sparsecc::ByteForm& form, Source x, sparsecc::ByteScale scale, int64_t rows, float* y,
           const sparsecc_executor* executor) const;
  struct RowChunk {
    const uint8_t* panels;
    int64_t number, first, rows;
    float* y;  // of its first row
  };
  void multiply(const sparsecc::ByteForm& form, sparsecc::Shares::Ranges groups, const RowChunk& chunk,
                sparsecc::ByteScale scale, sparsecc::PartialSums<uint32_t>& partial) const;
  void multiply(const sparsecc::ByteKernel& kernel, sparsecc::QuadJob job, int64_t begin, int64_t end,
                const RowChunk& chunk) const;

  int64_t inputs_;
  std::vector<sparsecc::ByteForm> forms_;  // the second, if there is one, for many rows
  sparsecc::Buffer<float> bias_;  // padded to whole groups
  sparsecc::Epilogue epilogue_;
};
#endif
