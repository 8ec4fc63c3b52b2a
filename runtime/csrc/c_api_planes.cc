// The part of the C interface that is about quad planes.
#include "c_guard.h"
#include "geometry.h"
#include "plane_conv.h"
#include "planes.h"
#include "sparsecc/c_api.h"

using sparsecc::guard;
using sparsecc::require;

namespace {

constexpr int64_t kMost = int64_t{1} << 40;  // of anything that is counted

const sparsecc::PlaneHelpers& helpers_of(const char* isa) {
  return sparsecc::plane_helpers(sparsecc::choose_byte_isa(isa));
}

bool countable(int64_t a, int64_t b, int64_t c) {
  return a >= 0 && b >= 0 && c >= 0 && a <= kMost && b <= kMost / (a + 1) && c <= kMost / (a * b + 1);
}

}  // namespace

int sparsecc_plane_conv_create(const sparsecc_int8_weight_desc* weight,
                               const sparsecc_conv_geometry* geometry,
                               const sparsecc_plane_quantization* quantization, sparsecc_plane_conv** out,
                               char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(weight != nullptr && geometry != nullptr && quantization != nullptr && out != nullptr,
            "weight, geometry, quantization and out must not be null");
    *out = nullptr;
    *out = new sparsecc_plane_conv(*weight, *geometry, *quantization);
  });
}

int sparsecc_plane_conv_output_size(const sparsecc_plane_conv* op, const int64_t in_hw[2], int64_t out_hw[2],
                                    char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr && in_hw != nullptr && out_hw != nullptr, "op, in_hw and out_hw must not be null");
    op->output_size(in_hw, out_hw);
  });
}

int sparsecc_plane_conv_run(const sparsecc_plane_conv* op, const uint8_t* x, int64_t batch, int64_t height,
                            int64_t width, const uint8_t* residual, uint8_t* y,
                            const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr, "op must not be null");
    require(batch == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    require(batch == 0 || op->has_residual() == (residual != nullptr),
            "a residual must be given where the operator has one, and only there");
    op->run(x, batch, height, width, residual, y, executor);
  });
}

void sparsecc_plane_conv_destroy(sparsecc_plane_conv* op) { delete op; }

const char* sparsecc_plane_conv_kernel(const sparsecc_plane_conv* op) { return op->kernel(); }

const char* sparsecc_plane_kernel_table(void) { return sparsecc::plane_kernel_table(); }

int sparsecc_planes_quantize(const float* x, int64_t batch, int64_t channels, int64_t pixels, float scale,
                             uint8_t zero_point, uint8_t* y, const char* isa,
                             const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(countable(batch, channels, pixels), "a size is negative or too large");
    require(batch * channels * pixels == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    sparsecc::quantize_planes(helpers_of(isa), {batch, channels, pixels, scale, zero_point}, x, y, executor);
  });
}

int sparsecc_planes_dequantize(const uint8_t* x, int64_t batch, int64_t channels, int64_t pixels, float scale,
                               uint8_t zero_point, float* y, const char* isa,
                               const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(countable(batch, channels, pixels), "a size is negative or too large");
    require(batch * channels * pixels == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    sparsecc::dequantize_planes(helpers_of(isa), {batch, channels, pixels, scale, zero_point}, x, y,
                                executor);
  });
}

int sparsecc_planes_add(const uint8_t* a, const uint8_t* b, int64_t bytes,
                        const sparsecc_plane_quantization* quantization, uint8_t* y, const char* isa,
                        const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(quantization != nullptr, "quantization must not be null");
    require(countable(bytes, 1, 1), "a size is negative or too large");
    require(bytes == 0 || (a != nullptr && b != nullptr && y != nullptr), "a, b and y must not be null");
    sparsecc::check_quantization(*quantization);
    require(quantization->has_residual != 0, "the residual is what is added: it must be there");
    sparsecc::add_planes(helpers_of(isa), *quantization, a, b, bytes, y, executor);
  });
}

int sparsecc_planes_concat(const uint8_t* a, int64_t a_bytes, const uint8_t* b, int64_t b_bytes, int64_t batch,
                           const sparsecc_plane_quantization* quantization, uint8_t* y, const char* isa,
                           const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(quantization != nullptr, "quantization must not be null");
    require(countable(batch, a_bytes, 1) && countable(batch, b_bytes, 1), "a size is negative or too large");
    require(batch * a_bytes == 0 || (a != nullptr && y != nullptr), "a and y must not be null");
    require(batch * b_bytes == 0 || (b != nullptr && y != nullptr), "b and y must not be null");
    sparsecc::check_quantization(*quantization);
    require(quantization->has_residual != 0, "the residual is what comes second: it must be there");
    sparsecc::concat_planes(helpers_of(isa), *quantization, {a, a_bytes}, {b, b_bytes}, batch, y, executor);
  });
}

int sparsecc_planes_max_pool(const uint8_t* x, int64_t planes, int64_t height, int64_t width,
                             const sparsecc_conv_geometry* geometry, uint8_t* y, const char* isa,
                             const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(geometry != nullptr, "geometry must not be null");
    require(countable(planes, height, width), "a size is negative or too large");
    require(planes == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    sparsecc::max_pool_planes(helpers_of(isa), *geometry, x, planes, height, width, y, executor);
  });
}

int sparsecc_planes_output_size(const sparsecc_conv_geometry* geometry, const int64_t in_hw[2],
                                int64_t out_hw[2], char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(geometry != nullptr && in_hw != nullptr && out_hw != nullptr,
            "geometry, in_hw and out_hw must not be null");
    sparsecc::check_geometry(*geometry, geometry->groups, geometry->kernel[0] * geometry->kernel[1]);
    sparsecc::conv_output_size(*geometry, in_hw, out_hw);
  });
}

int sparsecc_planes_mean(const uint8_t* x, int64_t planes, int64_t pixels,
                         const sparsecc_plane_quantization* quantization, uint8_t* y, const char* isa,
                         const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(quantization != nullptr, "quantization must not be null");
    require(countable(planes, pixels, 1) && pixels > 0, "a size is not positive or too large");
    require(planes == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    sparsecc::check_quantization(*quantization);
    sparsecc::mean_planes(helpers_of(isa), *quantization, x, planes, pixels, y, executor);
  });
}
