// The forms in which the kernels read a weight, made once when an operator is created.
#ifndef SPARSECC_PACK_H_
#define SPARSECC_PACK_H_

#include <cstdint>
#include <vector>

#include "common.h"
#include "kernels.h"
#include "pieces.h"
#include "shares.h"
#include "weight.h"

namespace sparsecc {

// Values in the type that kernels read.
class PackedValues {
 public:
  PackedValues() = default;
  // Every value is one of `type`.
  PackedValues(Buffer<float> values, sparsecc_value_type type);
  const void* data() const { return type_ == SPARSECC_FLOAT32 ? static_cast<const void*>(wide_.data()) : narrow_.data(); }
  sparsecc_value_type type() const { return type_; }

 private:
  sparsecc_value_type type_ = SPARSECC_FLOAT32;
  Buffer<float> wide_;
  Buffer<uint16_t> narrow_;
};

// Blocks with 16 | R, as groups of 16 or 32 outputs. Blocks wider than one input become columns.
struct BlockPack {
  BlockPack(const Weight& weight, sparsecc_value_type type);
  BlockView view() const;
  sparsecc_value_type type() const { return values_.type(); }
  BlockView piece_view() const;
  int64_t groups = 0;
  Buffer<int64_t> start;  // [groups + 1]
  Shares shares;          // of groups
  Pieces pieces;

 private:
  int64_t outputs_;
  int wide_;
  Buffer<uint32_t> index_;
  PackedValues values_;
};

// Rows of one or several outputs cut into chunks of outputs and blocks of inputs. Inside such a cell rows
// are ordered by their number of weights, so that the inner loop's trip count is predictable.
struct ElementPack {
  ElementPack(const Rows& rows, int64_t first_output, int64_t output_count, int64_t block_inputs);
  ElementView cell(int64_t chunk, int64_t block) const;
  int64_t first_output(int64_t chunk) const { return borders_[static_cast<size_t>(chunk)]; }
  // Of the chunks [first, last).
  int64_t outputs_of(int64_t first, int64_t last) const { return first_output(last) - first_output(first); }
  int64_t block_inputs, blocks;
  int tall;       // outputs of a row
  Shares shares;  // of chunks

 private:
  struct Cell {
    int64_t run, run_count, row, unit;
  };
  std::vector<int64_t> borders_;  // of the chunks, in outputs
  std::vector<Cell> cells_;
  std::vector<ElementRun> runs_;
  Buffer<uint16_t> row_, index_;
  Buffer<float> value_;
};

// Slots of 16 outputs by 16 inputs, see SliceView.
struct SlicePack {
  SlicePack(const Rows& rows, bool can_pack, sparsecc_value_type type);
  SliceView view() const;
  sparsecc_value_type type() const { return values_.type(); }
  SliceView piece_view() const;
  int64_t groups;
  Buffer<int64_t> slot_start;  // [groups + 1]
  Shares shares;               // of groups
  Pieces pieces;

 private:
  void find_pieces();
  int64_t outputs_, slices_, slots_per_slice_ = 0;
  SliceView::Form form_;
  Buffer<int32_t> order_;  // empty: outputs stay where they are
  Buffer<int64_t> value_start_;
  Buffer<uint8_t> positions_;
  Buffer<uint16_t> masks_;
  Buffer<SlotMove> moves_;
  PackedValues values_;
  std::vector<int64_t> piece_value_start_, piece_origin_;
};

}  // namespace sparsecc
#endif
