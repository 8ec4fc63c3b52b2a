// What is done with whole tensors in quad planes besides convolution; see c_api.h.
#ifndef SPARSECC_PLANES_H_
#define SPARSECC_PLANES_H_

#include <cstdint>

#include "kernels_planes.h"
#include "sparsecc/c_api.h"

namespace sparsecc {

struct FloatPlanes {
  int64_t batch, channels, pixels;
  float scale;
  uint8_t zero_point;
};

void quantize_planes(const PlaneHelpers& help, const FloatPlanes& shape, const float* x, uint8_t* y,
                     const sparsecc_executor* executor);
void dequantize_planes(const PlaneHelpers& help, const FloatPlanes& shape, const uint8_t* x, float* y,
                       const sparsecc_executor* executor);
void add_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, const uint8_t* a,
                const uint8_t* b, int64_t bytes, uint8_t* y, const sparsecc_executor* executor);
struct ByteSpan {
  const uint8_t* data;
  int64_t bytes;
};

// The bytes of images of a, each with those of b behind it.
void concat_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, ByteSpan a, ByteSpan b,
                   int64_t batch, uint8_t* y, const sparsecc_executor* executor);
void max_pool_planes(const PlaneHelpers& help, const sparsecc_conv_geometry& geometry, const uint8_t* x,
                     int64_t planes, int64_t height, int64_t width, uint8_t* y,
                     const sparsecc_executor* executor);
void mean_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, const uint8_t* x,
                 int64_t planes, int64_t pixels, uint8_t* y, const sparsecc_executor* executor);

// Throws Failure for scales, bounds and a size of the structure that cannot be.
void check_quantization(const sparsecc_plane_quantization& to);

}  // namespace sparsecc
#endif
