// Bytes in quad planes: a tensor uint8 [batch][quads of channels][pixels][4 channels], so that the four
// channels of a pixel are one 32-bit word and the pixels of a plane follow each other. What one instruction
// set offers for them; plain data only, as in kernels.h.
#ifndef SPARSECC_KERNELS_PLANES_H_
#define SPARSECC_KERNELS_PLANES_H_

#include <stdint.h>

#include "kernels.h"

namespace sparsecc {

constexpr int kLanesOfQuad = 4;  // channels in a quad
constexpr int kUnit = 16;        // pixels that are worked on at a time

// How the weights of one output by one quad are stored.
enum class TapForm {
  kBytes,        // four int8
  kSignedBytes,  // the same, for kernels that take 128 off each byte of x
  kPairs         // four int16: of channels 0, 2, 1, 3
};

constexpr int tap_bytes(TapForm form) { return form == TapForm::kPairs ? 8 : 4; }

// Sixteen consecutive pixels of the input plane. Some may belong to no output pixel (they lie in the padding
// between two rows); those that do belong to consecutive ones.
struct PlaneUnit {
  int32_t from;   // first pixel of the input plane
  int32_t to;     // first output pixel
  uint32_t kept;  // mask of the pixels that are output pixels
};

// From 32-bit sums to bytes: round(sum * scale + bias [+ residual * residual_scale]) + zero_point, saturated
// to low..high. Arrays are padded with zeros to whole groups of outputs.
struct PlaneEpilogue {
  const int32_t* start;  // where the sums start: the zero point of x times the weights, negative
  const float* scale;
  const float* bias;
  float residual_scale;
  int32_t zero_point;
  uint8_t low, high;
};

// Outputs in groups of 8 or 4. Group g owns blocks [start[g], start[g + 1]); a block is one quad of inputs at
// one place of the kernel, for all outputs of the group.
struct PlaneJob {
  const int64_t* start;
  const int32_t* offset;  // of each block: how far from an output's pixel its input lies, in pixels
  const void* values;     // [blocks][outputs of a group] quads of weights
  int64_t group_begin, group_end;
  int64_t quads;  // of y: those beyond are not stored
  const uint8_t* x;
  const PlaneUnit* units;
  int64_t unit_count;
  uint8_t* y;
  const uint8_t* residual;  // laid out as y, or null
  int64_t y_plane;          // pixels of a plane of y
  const PlaneEpilogue* epilogue;
};

// y = round((a - zero) * a_scale + (b - zero) * b_scale) + zero_point, saturated to low..high. Both zero
// points are in `bias`.
struct PlaneAddJob {
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* y;
  int64_t bytes;
  float a_scale, b_scale, bias;
  int32_t zero_point;
  uint8_t low, high;
};

// Between one quad plane and the float planes of up to four channels.
struct PlaneFloatJob {
  float* planes[kLanesOfQuad];  // only read from when quantising
  int channels;                 // 1..4; the others are the zero point
  uint8_t* quads;
  int64_t pixels;
  float scale;
  int32_t zero_point;
};

struct PlaneHelpers {
  TapForm form;
  // to[i] = from[i * step], of quads
  void (*pick)(const uint32_t* from, int64_t step, int64_t count, uint32_t* to);
  // to[i] = max(to[i], from[i]), of bytes
  void (*raise)(uint8_t* to, const uint8_t* from, int64_t bytes);
  // sums[4] of the channels of `pixels` quads
  void (*sum)(const uint32_t* quads, int64_t pixels, uint64_t sums[kLanesOfQuad]);
  void (*add)(const PlaneAddJob* job);
  void (*quantize)(const PlaneFloatJob* job);
  void (*dequantize)(const PlaneFloatJob* job);
};

#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  namespace isa {                                     \
  constexpr Tile kernel##_tile{rows, wide};           \
  void kernel(const Job* job);                        \
  extern const PlaneHelpers kPlaneHelpers;            \
  }
#include "kernels_planes.inc"
#undef SPARSECC_KERNEL

}  // namespace sparsecc
#endif
