// Reads an untrusted packed weight: everything is checked here, nothing after it checks again.
#ifndef SPARSECC_WEIGHT_H_
#define SPARSECC_WEIGHT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "sparsecc/c_api.h"

namespace sparsecc {

struct Layout {
  enum Kind { kElement, kNofM, kBlock } kind = kElement;
  int n = 0, m = 0;        // kNofM
  int rows = 1, cols = 1;  // kBlock
};

// Rows of the grid with the columns that are stored, in order. For blocks a unit is a block and
// values[unit * rows * cols] its first float; otherwise a unit is one float.
struct Weight {
  Layout layout;
  int64_t outputs = 0, inputs = 0;
  int64_t grid_rows = 0, grid_cols = 0;
  std::vector<int64_t> row_start;  // [grid_rows + 1]
  std::vector<uint32_t> column;    // [units]
  sparsecc_value_type type = SPARSECC_FLOAT32;  // what every value can be stored in without loss
  const float* values = nullptr;  // borrowed from the descriptor, or `held`
  std::shared_ptr<const std::vector<float>> held;
};

// Compressed rows of `tall` outputs each, whatever the layout was; no unit of `tall` weights is all zero.
struct Rows {
  int64_t outputs = 0, inputs = 0;
  int tall = 1;
  std::vector<int64_t> start;    // [rows + 1]
  std::vector<uint32_t> column;  // of each unit, ascending in each row
  std::vector<float> value;      // [units][tall]
  sparsecc_value_type type = SPARSECC_FLOAT32;  // as of the weight
};

Layout parse_layout(const char* text);
Weight read_weight(const sparsecc_weight_desc& desc);
// Everything but the values, which are not looked at.
Weight read_structure(const sparsecc_weight_desc& desc);
// With `tall` > 1 a weight of blocks whose height it divides.
Rows expand_rows(const Weight& weight, int tall);
// The outputs [first, first + outputs), a whole number of rows of the grid.
Weight part_of(const Weight& weight, int64_t first, int64_t outputs);

}  // namespace sparsecc
#endif
