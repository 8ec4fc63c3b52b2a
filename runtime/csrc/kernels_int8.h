// Products of bytes: what one instruction set offers. Plain data only, as in kernels.h.
#ifndef SPARSECC_KERNELS_INT8_H_
#define SPARSECC_KERNELS_INT8_H_

#include <stdint.h>

#include "kernels.h"

namespace sparsecc {

constexpr int kQuad = 4;                       // inputs of a block
constexpr int kQuadValues = kGroup * kQuad;    // weights of a block
constexpr int kQuantizeStep = kGroup * kQuad;  // inputs that are quantised at a time
constexpr int kTileQuads = 16;                 // blocks in a tile

// How the 64 weights of a block lie in memory, and how wide a value of x is in the panel beside them.
enum class QuadOrder {
  kOutputs,  // [16 outputs][4 inputs], x as bytes: for dot products of four bytes
  kPairs,    // [2][16 outputs][2 inputs], x as 16-bit integers: for dot products of two of those
  // [16 outputs][2 blocks][4 inputs] of two blocks, x as bytes: for products of two by eight with eight by two
  // bytes. Groups have an even number of blocks.
  kBlockPairs,
  // As kPairs, but x as bytes too, and no weight is -128 (it becomes -127 and, in one more block, -1): the sum of two
  // products with signed bytes fits 16 bits.
  kSmallPairs,
  // [16 outputs][16 blocks][4 inputs] of sixteen blocks, x as bytes: for products of tiles.
  kTiles,
  // [4 or 8 outputs][4 inputs], x as bytes with 32 rows side by side.
  kLanes,
  kInputs  // [4 inputs][16 outputs, those four apart side by side], x likewise: for machines with neither
};

// Bytes of four values of x in a panel.
constexpr int quad_bytes(QuadOrder order) {
  return order == QuadOrder::kPairs || order == QuadOrder::kInputs ? 2 * kQuad : kQuad;
}

// How the inputs that a block of weights is multiplied with are found.
enum class Picks {
  kNone,   // four neighbours that all 16 outputs share
  kOwn,    // every output picks four of a window of inputs: 64 places
  kShared  // four outputs pick together, or each output four neighbours: 16 places
};

// Blocks of 16 outputs by 4 inputs. Group g owns blocks [start[g], end[g]). In the order of tiles these are
// tiles, of sixteen blocks each: index has sixteen quads for each, values 16 * 64 bytes. In the order of lanes `start` is
// of each `tall` outputs, and blocks of so many have four of index: 32 times an input.
struct QuadView {
  const int64_t *start, *end;
  const uint32_t* index;  // which four inputs, or which window of inputs
  const int8_t* values;   // [blocks][64]
  const int32_t* sums;    // of the weights of each output, padded with zeros to whole groups
  const float* scales;    // of each output, padded likewise
  int64_t outputs;
  int tall;  // in the order of lanes
  Picks picks;
  // kOwn: a place in the window for each of the block's 64 bytes of x. kShared: 16 places, and for each byte
  // of x which of those it takes and what is added to it.
  const uint8_t* places;
  const uint8_t *spread, *added;  // [64] each
};

// x = scale * (stored - zero_point), as ONNX's DynamicQuantizeLinear has it.
struct ByteScale {
  float scale;
  int32_t zero_point;
};

struct QuadJob {
  const QuadView* weight;
  int64_t group_begin, group_end;
  const void* panel;  // [quads][rows] quads of x, or [windows][rows][width], or [inputs][kLaneRows] bytes of x
  int rows;           // 1..kTileRows, also the stride of the panel; for lanes 1..kLaneRows
  // Of a row in its panel. Tiles take more rows, as their table says: those after kTileRows are a panel of their own,
  // kTileRows * row_bytes further on.
  int64_t row_bytes;
  ByteScale x;
  float* y;
  int64_t row_stride;  // of y or sums
  const Epilogue* epilogue;
  uint32_t* sums;  // if not null: sums go there as they are, sixteen per group, and y does not count
};

struct QuantizeJob {
  const float* x;
  const uint8_t* bytes;  // if not null: these are laid down as they are, and x does not count
  int64_t row_stride, inputs;
  int rows;  // 1..kTileRows, or kLaneRows
  ByteScale to;
  void* panel;  // as in QuadJob; written up to a multiple of kQuantizeStep inputs
};

// Windows overlap by half: window i begins at input i * width / 2. What lies beyond the last input of a panel is
// of no consequence there, for its weights are zero.
constexpr int kNarrow = 16, kWide = 64;
constexpr int kLaneRows = 32;

struct ByteHelpers {
  QuadOrder order;
  // The smallest and the largest of x and 0. Both are NaN if any of x is NaN or infinite.
  void (*extremes)(const float* x, int64_t count, float* low, float* high);
  void (*quantize)(const QuantizeJob* job);
  void (*quantize_windows)(const QuantizeJob* job, int width);
  void (*quantize_lanes)(const QuantizeJob* job);  // [input][32 rows]; null where no kernel reads that
  // What is due for the first group of the job, whose sums are [rows][pieces][16].
  void (*join)(const QuadJob* job, const uint32_t* sums, int64_t row_stride, int64_t pieces);
};

#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  namespace isa {                                     \
  constexpr Tile kernel##_tile{rows, wide};           \
  void kernel(const Job* job);                        \
  extern const ByteHelpers kByteHelpers;              \
  }
#include "kernels_int8.inc"
#undef SPARSECC_KERNEL

}  // namespace sparsecc
#endif
