// What one instruction set offers. Plain data only: this header is compiled with several sets of
// compiler flags, so nothing in it may produce code that the linker could pick for another set.
#ifndef SPARSECC_KERNELS_H_
#define SPARSECC_KERNELS_H_

#include <stdint.h>

namespace sparsecc {

constexpr int kGroup = 16;     // outputs (or pixels, or rows of x) that share a vector, on every ISA
constexpr int kMaxWide = 4;    // vectors of 16 in a panel, at most
constexpr int kTileRows = 16;  // rows of x in one block panel

struct Epilogue {
  const float* bias;  // padded with zeros to whole groups of outputs
  int activation;     // sparsecc_activation
  float alpha, beta;
};

// Where results go: element (row of x or pixel r, output n) at y[r * row_stride + n * output_stride].
// One of the two strides is 1: output_stride for row-major matrices, row_stride for NCHW planes.
struct Target {
  float* y;
  int64_t row_stride, output_stride;
};

// Values of 16 bits that kernels read as float32: IEEE binary16, and the upper half of a float32.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

// Blocks of 16 * wide outputs by one input. Group g owns blocks [start[g], end[g]).
struct BlockView {
  const int64_t *start, *end;
  const uint32_t* index;  // input of each block
  const void* values;     // [blocks][16 * wide] of the type the kernel reads
  int wide;
  int64_t outputs;
};

struct BlockJob {
  const BlockView* weight;
  int64_t group_begin, group_end;
  const float* panel;  // [inputs][stride]: rows of x side by side
  int64_t stride;
  int rows;  // 1..kTileRows
  Target target;
  const Epilogue* epilogue;
};

// Rows of `tall` outputs that hold the same number of weights within one block of inputs.
struct ElementRun {
  uint32_t rows, count;
};

constexpr int kElementAhead = 4;  // rows that are prefetched

// Weights of up to 2^16 outputs within one block of at most 2^16 inputs, `tall` outputs (as many as the
// kernel's tile has) by one input at a time.
struct ElementView {
  const ElementRun* runs;
  int64_t run_count;
  const uint16_t* row;    // each row's local outputs divided by `tall`, in run order; kElementAhead of slack
  const uint16_t* index;  // local input of each unit of `tall` weights
  const float* value;     // [units][tall]
};

struct ElementJob {
  ElementView weight;
  const float* panel;  // [block of inputs][16 * wide]
  int wide;
  int64_t outputs;    // that exist in the target, from its beginning
  float* sums;        // [outputs, up to a whole row][16 * wide]
  const float* bias;  // first block of inputs: where sums start (their old contents do not count); else null
  const float* added;  // with bias, planes only: what is added to it, laid out as the target; or null
  // Last block of inputs, planes only, activation none, relu or clip: results go straight to the target.
  bool direct;
  Target target;
  int64_t count;  // lanes that exist, at most 16 * wide
  float low, high;
};

// What comes with a slot: how far its window moves on before it, and how many values it has.
struct SlotMove {
  uint8_t step, values;
};

// Weights of groups of 16 outputs in slots, which hold at most one weight of each output. The slots of a
// group are one flat list, so that the loop over them has no inner loop with a small, unpredictable trip
// count.
//   kUniform  every slice of 16 inputs has `slots_per_slice` slots with a weight for every output
//   kMasked   a slot takes from a window of 16 inputs that moves on by any number; zeros where there is no weight
//   kPacked   windows of 32 inputs that move on by sixteens; of the zeros only those are stored that keep
//             the distance between a lane and its value below 8 (needs two-register permutes)
// A window moves on only when nobody needs its beginning any more, so that an output that is ahead of the
// others can wait: at 80 % zeros 11.5 of 16 lanes are used by kMasked, 12 by kPacked, 8 if windows did not overlap.
struct SliceView {
  enum Form { kUniform, kMasked, kPacked } form;
  const int64_t *slot_start, *slot_end;  // per group: first slot and the one after the last
  const int64_t* value_start;            // per group: first value
  const int64_t* origin;                 // per group: input where its first window starts to move; null: 0
  // kUniform, kMasked: 8 bytes per slot, four bits per output: 2j at bit 4j of the low half, 2j + 1 at
  // bit 4j of the high half. kPacked: 16 bytes, per output the input in five bits and above it by how much
  // the output's value comes before its lane.
  const uint8_t* positions;
  const uint16_t* masks;  // per slot: outputs that have a weight
  const SlotMove* moves;  // per slot
  const void* values;     // of the type the kernel reads, 16 of slack at the end
  int64_t slots_per_slice;
  int64_t slices;
  int64_t outputs;
  const int32_t* order;  // which output each lane of the groups is; null: in order
};
struct SliceJob {
  const SliceView* weight;
  int64_t group_begin, group_end;
  const float* x;  // aligned; rows readable up to a whole number of slices and one more
  int64_t row_stride;
  int rows;
  Target target;
  const Epilogue* epilogue;
};

struct PixelJob {
  const float* base;      // first channel of this group of one (padded) image
  const int64_t* inputs;  // offset of each input (channel, kernel row, kernel column)
  int64_t input_count;
  const int32_t* pixels;  // [count] offsets of output pixels, ascending
  int64_t count;
  int64_t stride;  // of the panel, a multiple of 16
  bool slack;      // at least 64 floats may be read after any pixel
  float* panel;    // [input_count][stride]; lanes after `count` are of no consequence
};

// Sums that were cut: [rows][pieces][width], of which the first `outputs` of each `width` are added up.
struct JoinJob {
  const float* sums;
  int64_t row_stride, pieces, width;
  int64_t rows;
  int64_t output, outputs;  // the first of at most 16
  const int32_t* order;     // which output each place from `output` on is; null: in order
  float* y;
  int64_t y_stride;
  const Epilogue* epilogue;
};

// What surrounds the kernels: bringing x into panels and sums out of them.
struct Helpers {
  // panel[k * stride + r] = x[r * row_stride + k]; rows..stride are filled with zeros.
  void (*pack_rows)(const float* x, int64_t row_stride, int64_t rows, int64_t inputs, float* panel,
                    int64_t stride);
  void (*pack_pixels)(const PixelJob* job);
  // sums[outputs][stride] -> activation -> target, for `rows` of the stride.
  void (*finish)(float* sums, int64_t stride, int64_t outputs, int64_t rows, Target target,
                 const Epilogue* epilogue);
  void (*join)(const JoinJob* job);
};

struct Tile {
  int rows, wide;
};

#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  namespace isa {                                     \
  static_assert(wide <= kMaxWide);                    \
  constexpr Tile kernel##_tile{rows, wide};           \
  void kernel(const Job* job);                        \
  }
#include "kernels.inc"
#undef SPARSECC_KERNEL

namespace generic {
extern const Helpers kHelpers;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Helpers kHelpers;
}
namespace avx512 {
extern const Helpers kHelpers;
}
#elif defined(__aarch64__)
namespace neon {
extern const Helpers kHelpers;
}
#endif

}  // namespace sparsecc
#endif
