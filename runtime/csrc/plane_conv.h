// Convolution of bytes on quad planes (kernels_planes.h), ready to run.
#ifndef SPARSECC_PLANE_CONV_H_
#define SPARSECC_PLANE_CONV_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common.h"
#include "isa.h"
#include "kernels_planes.h"
#include "shares.h"
#include "sparsecc/c_api.h"
#include "weight.h"

namespace sparsecc {

struct PlaneKernel {
  const char* name;
  Tile tile;
  void (*run)(const PlaneJob* job);
};

// For groups of `tall` outputs, 8 or 4.
PlaneKernel plane_kernel(ByteIsa isa, int tall);
const PlaneHelpers& plane_helpers(ByteIsa isa);
// One line per kernel that this machine can run: name, instruction set, tile.
const char* plane_kernel_table();

// Throws Failure if a scale is not a finite positive number.
void require_scale(float scale, const char* what);

// Any RxC as blocks of 8 or 4 outputs by one quad of channels at one place of the kernel.
struct PlanePack {
  PlanePack(const Weight& weight, const int8_t* values, const sparsecc_conv_geometry& geometry, TapForm form);
  int tall;  // outputs of a group, whichever is less work
  int64_t groups;
  Buffer<int64_t> start;  // [groups + 1]
  Shares shares;          // of groups
  std::vector<uint32_t> quad, tap;  // of each block
  Buffer<int8_t> values;
  std::vector<uint32_t> sums;  // of the weights of each output, modulo 2^32
};

}  // namespace sparsecc

struct sparsecc_plane_conv {
  sparsecc_plane_conv(const sparsecc_int8_weight_desc& weight, const sparsecc_conv_geometry& geometry,
                      const sparsecc_plane_quantization& to);
  void output_size(const int64_t in[2], int64_t out[2]) const;
  void run(const uint8_t* x, int64_t batch, int64_t height, int64_t width, const uint8_t* residual,
           uint8_t* y, const sparsecc_executor* executor) const;
  const char* kernel() const { return kernel_.name; }
  bool has_residual() const { return has_residual_; }

 private:
  struct Plan;  // everything that depends on the size of the input
  sparsecc_plane_conv(const sparsecc_int8_weight_desc& desc, const sparsecc_conv_geometry& geometry,
                      const sparsecc_plane_quantization& to, const sparsecc::Weight& weight,
                      sparsecc::ByteIsa isa);
  std::shared_ptr<const Plan> plan_for(int64_t height, int64_t width) const;
  void copy(const Plan& plan, const uint8_t* x, int64_t batch, uint8_t* planes,
            const sparsecc_executor* executor) const;
  void multiply(const Plan& plan, const uint8_t* x, int64_t batch, const uint8_t* residual, uint8_t* y,
                const sparsecc_executor* executor) const;

  sparsecc_conv_geometry geometry_;
  int64_t x_quads_, y_quads_;
  const sparsecc::PlaneHelpers& help_;
  sparsecc::PlanePack weight_;
  sparsecc::PlaneKernel kernel_;
  bool has_residual_;
  uint8_t x_zero_point_;
  sparsecc::Buffer<int32_t> start_;         // padded to whole groups of outputs, as all of these
  sparsecc::Buffer<float> scale_, bias_;
  sparsecc::PlaneEpilogue epilogue_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Plan> plan_;  // of the last size seen
};
#endif
