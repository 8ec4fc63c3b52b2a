#include "sparsecc/c_api.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "c_guard.h"
#include "int8.h"
#include "isa.h"
#include "operator.h"
#include "sparsecc/balance.h"

using sparsecc::guard;
using sparsecc::require;

namespace {

constexpr int64_t kMostParts = 1024;

int64_t copied(const std::vector<int64_t>& from, int64_t* to, int64_t room) {
  const auto count = static_cast<int64_t>(from.size());
  std::copy_n(from.begin(), std::clamp<int64_t>(room, 0, count), to);
  return count;
}

}  // namespace

int sparsecc_matmul_create(const sparsecc_weight_desc* weight, sparsecc_matmul** out, char* error,
                           size_t error_size) {
  return guard(error, error_size, [&] {
    require(weight != nullptr && out != nullptr, "weight and out must not be null");
    *out = nullptr;
    *out = new sparsecc_matmul(*weight);
  });
}

int sparsecc_matmul_run(const sparsecc_matmul* op, const float* x, int64_t rows, float* y,
                        const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr, "op must not be null");
    require(rows >= 0 && rows <= (int64_t{1} << 40), "rows is negative or too large");
    require(rows == 0 || (y != nullptr && (x != nullptr || op->inputs() == 0)), "x and y must not be null");
    op->run(x, rows, y, executor);
  });
}

void sparsecc_matmul_destroy(sparsecc_matmul* op) { delete op; }

int sparsecc_conv_create(const sparsecc_weight_desc* weight, const sparsecc_conv_geometry* geometry,
                         sparsecc_conv** out, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(weight != nullptr && geometry != nullptr && out != nullptr,
            "weight, geometry and out must not be null");
    *out = nullptr;
    *out = new sparsecc_conv(*weight, *geometry);
  });
}

int sparsecc_conv_output_size(const sparsecc_conv* op, const int64_t in_hw[2], int64_t out_hw[2], char* error,
                              size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr && in_hw != nullptr && out_hw != nullptr, "op, in_hw and out_hw must not be null");
    op->output_size(in_hw, out_hw);
  });
}

int sparsecc_conv_run(const sparsecc_conv* op, const float* x, int64_t batch, int64_t channels,
                      int64_t height, int64_t width, float* y, const sparsecc_executor* executor, char* error,
                      size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr, "op must not be null");
    require(batch == 0 || (x != nullptr && y != nullptr), "x and y must not be null");
    op->run(x, batch, channels, height, width, y, executor);
  });
}

int sparsecc_conv_add_run(const sparsecc_conv* op, const float* x, const float* added, int64_t batch,
                          int64_t channels, int64_t height, int64_t width, float* y,
                          const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr, "op must not be null");
    require(batch == 0 || (x != nullptr && added != nullptr && y != nullptr),
            "x, added and y must not be null");
    op->run(x, batch, channels, height, width, y, executor, added);
  });
}

void sparsecc_conv_destroy(sparsecc_conv* op) { delete op; }

int sparsecc_int8_matmul_create(const sparsecc_int8_weight_desc* weight, sparsecc_int8_matmul** out,
                                char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(weight != nullptr && out != nullptr, "weight and out must not be null");
    *out = nullptr;
    *out = new sparsecc_int8_matmul(*weight);
  });
}

int sparsecc_int8_matmul_run(const sparsecc_int8_matmul* op, const float* x, int64_t rows, float* y,
                             const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr, "op must not be null");
    require(rows >= 0 && rows <= (int64_t{1} << 38), "rows is negative or too large");
    require(rows == 0 || (y != nullptr && (x != nullptr || op->inputs() == 0)), "x and y must not be null");
    op->run(x, rows, y, executor);
  });
}

namespace {

void check_given(const sparsecc_int8_matmul* op, const void* x, int64_t rows, float x_scale,
                 int32_t x_zero_point, const float* y) {
  require(op != nullptr, "op must not be null");
  require(rows >= 0 && rows <= (int64_t{1} << 38), "rows is negative or too large");
  require(rows == 0 || (y != nullptr && (x != nullptr || op->inputs() == 0)), "x and y must not be null");
  require(std::isfinite(x_scale) && x_scale > 0.0f, "x_scale is not a finite positive number");
  require(x_zero_point >= 0 && x_zero_point <= 255, "x_zero_point must be in 0..255");
}

}  // namespace

int sparsecc_int8_matmul_run_given(const sparsecc_int8_matmul* op, const float* x, int64_t rows,
                                   float x_scale, int32_t x_zero_point, float* y,
                                   const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_given(op, x, rows, x_scale, x_zero_point, y);
    op->run(x, {x_scale, x_zero_point}, rows, y, executor);
  });
}

int sparsecc_int8_matmul_run_bytes(const sparsecc_int8_matmul* op, const uint8_t* x, int64_t rows,
                                   float x_scale, int32_t x_zero_point, float* y,
                                   const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    check_given(op, x, rows, x_scale, x_zero_point, y);
    op->run(x, {x_scale, x_zero_point}, rows, y, executor);
  });
}

void sparsecc_int8_matmul_destroy(sparsecc_int8_matmul* op) { delete op; }

const char* sparsecc_int8_isas(void) { return sparsecc::byte_isa_list(); }

const char* sparsecc_int8_matmul_kernel(const sparsecc_int8_matmul* op, int64_t rows) {
  return op->kernel(rows);
}

const char* sparsecc_int8_kernel_table(void) { return sparsecc::byte_kernel_table(); }

const char* sparsecc_isas(void) { return sparsecc::isa_list(); }

const char* sparsecc_matmul_kernel(const sparsecc_matmul* op, int64_t rows) { return op->kernel(rows); }

double sparsecc_matmul_balance(const sparsecc_matmul* op, int64_t rows, int64_t parts) {
  return sparsecc::evenness(op->part_work(rows, parts));
}

double sparsecc_int8_matmul_balance(const sparsecc_int8_matmul* op, int64_t parts) {
  return sparsecc::evenness(op->shares().part_work(parts));
}

int64_t sparsecc_matmul_part_work(const sparsecc_matmul* op, int64_t rows, int64_t parts, int64_t* work,
                                  int64_t room) {
  try {
    return copied(op->part_work(rows, std::clamp<int64_t>(parts, 1, kMostParts)), work, room);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

int64_t sparsecc_int8_matmul_part_work(const sparsecc_int8_matmul* op, int64_t parts, int64_t* work,
                                       int64_t room) {
  return copied(op->shares().part_work(parts), work, room);
}

const char* sparsecc_conv_kernel(const sparsecc_conv* op) { return op->kernel(); }

const char* sparsecc_tile_kernel_table(void) { return sparsecc::float_tile_kernel_table(); }

const char* sparsecc_kernel_table(void) { return sparsecc::kernel_table(); }

const char* sparsecc_version(void) { return SPARSECC_VERSION; }
