#include "planes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "common.h"
#include "geometry.h"
#include "plane_conv.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr int64_t kTaskBytes = 32 * 1024;  // that are worth a task of their own, at least

// Calls run(i) for i in [0, count), each of so many bytes, on the threads lent.
template <class Run>
void for_each(const sparsecc_executor* executor, int64_t count, int64_t bytes, const Run& run) {
  const int64_t worth = std::max<int64_t>(1, count * bytes / kTaskBytes);
  const int64_t tasks = std::min({count, worth, wanted_tasks(executor)});
  run_tasks(executor, tasks, [&](int64_t task) {
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) run(i);
  });
}

// One quad plane and its channels' float planes.
template <class Convert>
void convert(const FloatPlanes& shape, float* floats, uint8_t* bytes, const sparsecc_executor* executor,
             Convert run) {
  require_scale(shape.scale, "the tensor");
  const int64_t quads = ceil_div(shape.channels, kLanesOfQuad);
  for_each(executor, shape.batch * quads, shape.pixels * kLanesOfQuad, [&](int64_t i) {
    const int64_t first = i % quads * kLanesOfQuad;
    PlaneFloatJob job{};
    job.channels = static_cast<int>(std::min<int64_t>(kLanesOfQuad, shape.channels - first));
    for (int c = 0; c < job.channels; ++c)
      job.planes[c] = floats + (i / quads * shape.channels + first + c) * shape.pixels;
    job.quads = bytes + i * shape.pixels * kLanesOfQuad;
    job.pixels = shape.pixels;
    job.scale = shape.scale;
    job.zero_point = shape.zero_point;
    run(&job);
  });
}

}  // namespace

void check_quantization(const sparsecc_plane_quantization& to) {
  if (to.struct_size < sizeof(to))
    throw Failure{"plane quantization is " + std::to_string(to.struct_size) + " bytes, expected " +
                  std::to_string(sizeof(to)) + ": caller and library do not match"};
  require_scale(to.x_scale, "x");
  require_scale(to.y_scale, "y");
  if (to.has_residual != 0) require_scale(to.residual_scale, "the residual");
  if (to.low > to.high) throw Failure{"low is above high"};
}

void quantize_planes(const PlaneHelpers& help, const FloatPlanes& shape, const float* x, uint8_t* y,
                     const sparsecc_executor* executor) {
  convert(shape, const_cast<float*>(x), y, executor, help.quantize);  // which only reads there
}

void dequantize_planes(const PlaneHelpers& help, const FloatPlanes& shape, const uint8_t* x, float* y,
                       const sparsecc_executor* executor) {
  convert(shape, y, const_cast<uint8_t*>(x), executor, help.dequantize);
}

void add_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, const uint8_t* a,
                const uint8_t* b, int64_t bytes, uint8_t* y, const sparsecc_executor* executor) {
  const double a_scale = double{to.x_scale} / to.y_scale, b_scale = double{to.residual_scale} / to.y_scale;
  const double bias = -a_scale * to.x_zero_point - b_scale * to.residual_zero_point;
  const auto fits = [](double value) { return std::isfinite(static_cast<float>(value)); };
  if (!fits(a_scale) || !fits(b_scale) || !fits(bias)) throw Failure{"scales do not fit a float together"};
  const int64_t pieces = ceil_div(bytes, kTaskBytes);
  for_each(executor, pieces, kTaskBytes, [&](int64_t i) {
    const int64_t at = i * kTaskBytes;
    const PlaneAddJob job{a + at,
                          b + at,
                          y + at,
                          std::min(kTaskBytes, bytes - at),
                          static_cast<float>(a_scale),
                          static_cast<float>(b_scale),
                          static_cast<float>(bias),
                          to.y_zero_point,
                          to.low,
                          to.high};
    help.add(&job);
  });
}

void concat_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, ByteSpan a, ByteSpan b,
                   int64_t batch, uint8_t* y, const sparsecc_executor* executor) {
  struct Part {
    ByteSpan from;
    int64_t place, pieces;
    float scale, bias;
    bool same;  // bytes mean the same before and after
  };
  const auto part = [&](ByteSpan from, int64_t place, float scale, int32_t zero_point) {
    const double ratio = double{scale} / to.y_scale, bias = -ratio * zero_point;
    if (!std::isfinite(static_cast<float>(ratio)) || !std::isfinite(static_cast<float>(bias)))
      throw Failure{"scales do not fit a float together"};
    const bool same = scale == to.y_scale && zero_point == to.y_zero_point && to.low == 0 && to.high == 255;
    return Part{from, place, ceil_div(from.bytes, kTaskBytes), static_cast<float>(ratio),
                static_cast<float>(bias), same};
  };
  const Part parts[2] = {part(a, 0, to.x_scale, to.x_zero_point),
                         part(b, a.bytes, to.residual_scale, to.residual_zero_point)};
  const int64_t pieces = parts[0].pieces + parts[1].pieces, whole = a.bytes + b.bytes;
  for_each(executor, batch * pieces, kTaskBytes, [&](int64_t i) {
    const int64_t image = i / pieces, piece = i % pieces;
    const Part& p = parts[piece < parts[0].pieces ? 0 : 1];
    const int64_t at = (piece < parts[0].pieces ? piece : piece - parts[0].pieces) * kTaskBytes;
    const int64_t bytes = std::min(kTaskBytes, p.from.bytes - at);
    const uint8_t* from = p.from.data + image * p.from.bytes + at;
    uint8_t* into = y + image * whole + p.place + at;
    if (p.same) {
      std::memcpy(into, from, static_cast<size_t>(bytes));
      return;
    }
    // A sum of which one part does not count.
    const PlaneAddJob job{from, from, into, bytes, p.scale, 0.0f, p.bias, to.y_zero_point, to.low, to.high};
    help.add(&job);
  });
}

namespace {

// The windows of one axis: window j covers position j * stride - pad + tap * dilation for every tap.
struct Axis {
  int64_t kernel, stride, dilation, pad, size;
  int64_t position(int64_t window, int64_t tap) const { return window * stride - pad + tap * dilation; }
  bool inside(int64_t at) const { return at >= 0 && at < size; }
};

// Windows [begin, end) of `count` for which the tap lies in the input.
void windows_inside(const Axis& axis, int64_t tap, int64_t count, int64_t* begin, int64_t* end) {
  const int64_t shift = tap * axis.dilation - axis.pad;
  *begin = std::min(count, shift >= 0 ? 0 : ceil_div(-shift, axis.stride));
  *end = shift >= axis.size ? *begin
                            : std::clamp(ceil_div(axis.size - shift, axis.stride), *begin, count);
}

// Down first, whole rows at a time, then across.
void pool_plane(const PlaneHelpers& help, const Axis (&axes)[2], const int64_t (&out)[2], const uint32_t* x,
                uint32_t* highest, uint32_t* picked, uint32_t* y) {
  const Axis &down = axes[0], &across = axes[1];
  const auto raise = [&](uint32_t* to, const uint32_t* from, int64_t count) {
    help.raise(reinterpret_cast<uint8_t*>(to), reinterpret_cast<const uint8_t*>(from), count * kLanesOfQuad);
  };
  for (int64_t row = 0; row < out[0]; ++row, y += out[1]) {
    std::fill_n(highest, across.size, 0u);
    for (int64_t tap = 0; tap < down.kernel; ++tap)
      if (const int64_t at = down.position(row, tap); down.inside(at))
        raise(highest, x + at * across.size, across.size);
    std::fill_n(y, out[1], 0u);
    for (int64_t tap = 0; tap < across.kernel; ++tap) {
      int64_t begin = 0, end = 0;
      windows_inside(across, tap, out[1], &begin, &end);
      if (begin == end) continue;
      const uint32_t* from = highest + across.position(begin, tap);
      if (across.stride != 1) {
        help.pick(from, across.stride, end - begin, picked);
        from = picked;
      }
      raise(y + begin, from, end - begin);
    }
  }
}

}  // namespace

void max_pool_planes(const PlaneHelpers& help, const sparsecc_conv_geometry& g, const uint8_t* x,
                     int64_t planes, int64_t height, int64_t width, uint8_t* y,
                     const sparsecc_executor* executor) {
  check_geometry(g, g.groups, g.kernel[0] * g.kernel[1]);
  const int64_t in[2] = {height, width};
  int64_t out[2] = {0, 0};
  conv_output_size(g, in, out);
  Axis axes[2];
  for (int i = 0; i < 2; ++i) {
    axes[i] = {g.kernel[i], g.stride[i], g.dilation[i], g.pad_begin[i], in[i]};
    if (std::max(g.pad_begin[i], g.pad_end[i]) >= g.kernel[i])
      throw Failure{"a pad of a pooling is not smaller than its kernel of " + std::to_string(g.kernel[i])};
  }
  for_each(executor, planes, height * width * kLanesOfQuad, [&](int64_t i) {
    Scratch<3, uint32_t> rows(width + out[1]);
    pool_plane(help, axes, out, reinterpret_cast<const uint32_t*>(x) + i * height * width, rows.data(),
               rows.data() + width, reinterpret_cast<uint32_t*>(y) + i * out[0] * out[1]);
  });
}

void mean_planes(const PlaneHelpers& help, const sparsecc_plane_quantization& to, const uint8_t* x,
                 int64_t planes, int64_t pixels, uint8_t* y, const sparsecc_executor* executor) {
  const double scale = double{to.x_scale} / to.y_scale;
  for_each(executor, planes, pixels * kLanesOfQuad, [&](int64_t i) {
    uint64_t sums[kLanesOfQuad];
    help.sum(reinterpret_cast<const uint32_t*>(x) + i * pixels, pixels, sums);
    for (int c = 0; c < kLanesOfQuad; ++c) {
      const double mean = static_cast<double>(sums[c]) / static_cast<double>(pixels) - to.x_zero_point;
      const double stored = std::nearbyint(mean * scale) + to.y_zero_point;
      const double low = to.low, high = to.high;
      y[i * kLanesOfQuad + c] = static_cast<uint8_t>(std::clamp(stored, low, high));
    }
  });
}

}  // namespace sparsecc
