// Products of tiles of bfloat16. Plain data only, as in kernels.h.
#ifndef SPARSECC_KERNELS_TILES_H_
#define SPARSECC_KERNELS_TILES_H_

#include <stdint.h>

#include "kernels.h"

namespace sparsecc {

constexpr int kTileInputs = 32;    // of a tile of weights, for 16 outputs
constexpr int kTilePanelRows = 2 * kTileRows;  // rows of x that a job can have: two panels
// A float32 is the sum of three numbers of bfloat16, exactly: of the upper eight bits of its 24, of the next, of the last.
constexpr int kSplits = 3;
constexpr int kTileLine = kSplits * kTileRows;  // numbers of an input in a panel

// Weights of 16 * wide outputs by 32 inputs each, any of those whose blocks are kept. Group g owns tiles
// [start[g], start[g + 1]).
struct FloatTileView {
  const int64_t* start;
  const uint32_t* index;   // [tiles][32] inputs; one past the last input stands for none
  const uint16_t* values;  // [tiles][wide][16 outputs][32 inputs]
  int wide;
  int64_t outputs;
};

struct FloatTileJob {
  const FloatTileView* weight;
  int64_t group_begin, group_end;
  const uint16_t* panel;  // [inputs, and a line of zeros][3 parts][16 rows] for each panel
  int64_t panel_size;     // numbers from one panel to the next
  int rows;               // 1..kTilePanelRows
  float* y;
  int64_t row_stride;
  const Epilogue* epilogue;
};

struct SplitJob {
  const float* x;
  int64_t row_stride, inputs;
  int rows;  // 1..kTileRows
  uint16_t* panel;
};

struct FloatTileHelpers {
  void (*split)(const SplitJob* job);  // the line of zeros included
};

#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  namespace isa {                                     \
  constexpr Tile kernel##_tile{rows, wide};           \
  void kernel(const Job* job);                        \
  extern const FloatTileHelpers kFloatTileHelpers;    \
  }
#include "kernels_tiles.inc"
#undef SPARSECC_KERNEL

}  // namespace sparsecc
#endif
