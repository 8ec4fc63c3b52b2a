// Blocks of outputs stored in bfloat16 as tiles, and x in float32 as sums of three of that, ready to run.
#ifndef SPARSECC_FLOAT_TILES_H_
#define SPARSECC_FLOAT_TILES_H_

#include <cstdint>
#include <optional>

#include "common.h"
#include "isa.h"
#include "kernels_tiles.h"
#include "shares.h"
#include "sparsecc/c_api.h"
#include "weight.h"

namespace sparsecc {

struct FloatTileKernel {
  const char* name;
  Tile tile;
  void (*run)(const FloatTileJob* job);
  const FloatTileHelpers* help;
};

// One line per kernel that this machine can run: name, instruction set, tile.
const char* float_tile_kernel_table();

class FloatTiles {
 public:
  // Empty where the set named (as in choose_byte_isa) has no tiles, or the weight is not one for them: not in bfloat16, of
  // single weights, with values that are not finite, or with so few in a group that blocks are faster at any number of
  // rows.
  static std::optional<FloatTiles> of(const Weight& weight, const char* isa);

  // Rows of x from which tiles take less time than blocks.
  int64_t least_rows() const { return least_rows_; }
  const char* kernel() const { return kernel_.name; }
  const Shares& shares() const { return shares_; }
  void run(const float* x, int64_t rows, float* y, const Epilogue& epilogue,
           const sparsecc_executor* executor) const;

 private:
  FloatTiles(const Rows& rows, FloatTileKernel kernel);
  int64_t panel_size() const { return (inputs_ + 1) * kTileLine; }
  void split(const float* x, int64_t rows, uint16_t* panels) const;
  void multiply(Shares::Ranges groups, const uint16_t* panels, int64_t rows, float* y,
                const Epilogue& epilogue) const;

  FloatTileKernel kernel_;
  int64_t outputs_, inputs_, groups_, least_rows_;
  Buffer<int64_t> start_;
  Buffer<uint32_t> index_;
  Buffer<uint16_t> values_;
  Shares shares_;
};

// In pack_tiles.cc: as the comment there says, by estimate.
int64_t least_rows_of_tiles(int64_t tiles, int64_t blocks, int wide);

}  // namespace sparsecc
#endif
