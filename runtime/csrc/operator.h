// A linear map ready to run: what matmul and convolution have in common.
#ifndef SPARSECC_OPERATOR_H_
#define SPARSECC_OPERATOR_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common.h"
#include "float_tiles.h"
#include "isa.h"
#include "kernels.h"
#include "pack.h"
#include "weight.h"

namespace sparsecc {

// A kernel as selected: its row of kernels.inc and the function.
template <class Job>
struct Kernel {
  const char* name;
  Tile tile;
  void (*run)(const Job* job);
};

// The type in which kernels for few rows of x read values that could be stored in `type`.
sparsecc_value_type values_read(Isa isa, sparsecc_value_type type);
Kernel<BlockJob> block_kernel(Isa isa, int wide, sparsecc_value_type type);
Kernel<ElementJob> element_kernel(Isa isa, int tall);
Kernel<SliceJob> slice_kernel(Isa isa, SliceView::Form form, sparsecc_value_type type);
const Helpers& helpers(Isa isa);
// One line per kernel that this machine can run: name, instruction set, tile.
const char* kernel_table();

// One packed weight with its epilogue, on one instruction set.
struct Linear {
  Linear(const sparsecc_weight_desc& desc, const Weight& weight);
  int64_t outputs, inputs;
  Isa isa;
  const Helpers& help;
  Epilogue epilogue;

 private:
  Buffer<float> bias_;  // padded to whole groups
};

// Whether a weight runs on the block kernels; else it runs as single weights.
bool has_block_kernel(const Layout& layout);
// Outputs that share an input in the ElementPack of such a weight.
int element_tall(const Layout& layout);
// Inputs per block of an ElementPack.
int64_t element_block_inputs(Isa isa, const Rows& rows);

// Cuts rows of x or pixels in chunks of nearly equal numbers of vectors, at most `most` of 16 each.
class LaneChunks {
 public:
  LaneChunks(int64_t lanes, int64_t most)
      : lanes_(lanes), vectors_(ceil_div(lanes, kGroup)), chunks_(ceil_div(vectors_, most)) {}
  int64_t count() const { return chunks_; }
  int64_t begin(int64_t chunk) const { return chunk * vectors_ / chunks_ * kGroup; }
  int64_t size(int64_t chunk) const { return std::min(lanes_, begin(chunk + 1)) - begin(chunk); }
  int wide(int64_t chunk) const { return static_cast<int>(ceil_div(size(chunk), kGroup)); }

 private:
  int64_t lanes_, vectors_, chunks_;
};

}  // namespace sparsecc

struct sparsecc_matmul {
  explicit sparsecc_matmul(const sparsecc_weight_desc& desc);
  // Of a weight already read, or of a part of one; only bias, activation and isa of `desc` count.
  sparsecc_matmul(const sparsecc_weight_desc& desc, sparsecc::Weight weight);
  void run(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  const char* kernel(int64_t rows) const;
  // The work of each of so many threads.
  std::vector<int64_t> part_work(int64_t rows, int64_t threads) const;
  int64_t inputs() const { return linear_.inputs; }

 private:
  void run_block(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  void run_slice(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  void run_element(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const;
  const sparsecc::Shares& shares(int64_t rows) const;
  int64_t element_parts(int64_t row_chunks, int64_t threads) const;
  bool uses_slice(int64_t rows) const;
  bool uses_block(int64_t rows) const;
  int64_t tail_rows(int64_t rows) const;
  void pack_panels(const float* x, int64_t rows, int64_t first, int64_t last, float* packed) const;
  struct RowChunk {
    const float* x;  // in panels
    int64_t number, first, rows;
    float* y;  // of its first row
  };
  void run_groups(sparsecc::Shares::Ranges groups, const RowChunk& chunk,
                  sparsecc::PartialSums<float>& partial) const;
  void multiply(const sparsecc::BlockView& weight, const sparsecc::Epilogue& epilogue, int64_t begin,
                int64_t end, const RowChunk& chunk, sparsecc::Target target) const;
  void join(const float* sums, int64_t stride, const sparsecc::Pieces::Whole& whole, int64_t width,
            int64_t output, const int32_t* order, const RowChunk& chunk) const;

  sparsecc::Linear linear_;
  int64_t slice_rows_ = 0, block_rows_ = 0;
  std::optional<sparsecc::BlockPack> block_;
  std::optional<sparsecc::ElementPack> element_;
  std::optional<sparsecc::SlicePack> slice_;
  std::optional<sparsecc::FloatTiles> tiles_;
  sparsecc::Buffer<float> no_bias_;
  sparsecc::Epilogue unfinished_;  // of pieces
};

struct sparsecc_conv {
  sparsecc_conv(const sparsecc_weight_desc& desc, const sparsecc_conv_geometry& geometry);
  void output_size(const int64_t in[2], int64_t out[2]) const;
  void run(const float* x, int64_t batch, int64_t channels, int64_t height, int64_t width, float* y,
           const sparsecc_executor* executor, const float* added = nullptr) const;
  const char* kernel() const;

 private:
  struct Frame;  // sizes that depend on the input
  sparsecc_conv(const sparsecc_weight_desc& desc, const sparsecc_conv_geometry& geometry,
                sparsecc::Weight weight);
  Frame frame(int64_t batch, int64_t height, int64_t width) const;
  void pad(const Frame& frame, const float* x, float* padded, const sparsecc_executor* executor) const;
  void run_frame(const Frame& frame, const float* x, const float* added, float* y,
                 const sparsecc_executor* executor) const;

  sparsecc_conv_geometry geometry_;
  int64_t channels_;  // of the whole input
  sparsecc::Linear linear_;
  std::vector<sparsecc::ElementPack> element_;  // one per group of the convolution
};
#endif
