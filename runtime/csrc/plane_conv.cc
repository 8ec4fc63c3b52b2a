// Convolution on quad planes. An input with padding or strides is first copied: into planes with the padding
// around (shared by the end of a row and the start of the next), one for each remainder of the position by
// the stride. Then every place of the kernel is a constant distance from an output's pixel.
#include "plane_conv.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "geometry.h"
#include "int8.h"
#include "planes.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr int64_t kCachedBytes = 256 * 1024;  // of x that stays in a second-level cache
constexpr int64_t kMaxPixels = int64_t{1} << 40;

}  // namespace

PlaneKernel plane_kernel(ByteIsa isa, int tall) {
  const char* wanted = tall == 8 ? "planes8" : "planes4";
#define SPARSECC_KERNEL(isa_of_row, kernel, Job, rows, wide)       \
  if (without_tiles(isa) == kByteIsa_##isa_of_row && std::strcmp(wanted, #kernel) == 0) \
    return {#kernel "-" #isa_of_row, isa_of_row::kernel##_tile, isa_of_row::kernel};
#include "kernels_planes.inc"
#undef SPARSECC_KERNEL
  throw Failure{std::string("no kernel ") + wanted + " for " + isa_name(isa)};
}

const PlaneHelpers& plane_helpers(ByteIsa isa) {
#define SPARSECC_KERNEL(isa_of_row, kernel, Job, rows, wide) \
  if (without_tiles(isa) == kByteIsa_##isa_of_row) return isa_of_row::kPlaneHelpers;
#include "kernels_planes.inc"
#undef SPARSECC_KERNEL
  throw Failure{std::string("no kernels for quad planes on ") + isa_name(isa)};
}

const char* plane_kernel_table() {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  if (isa_usable(kByteIsa_##isa)) text += #kernel "-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels_planes.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}

void require_scale(float scale, const char* what) {
  if (!(scale > 0.0f) || !std::isfinite(scale))
    throw Failure{std::string("scale of ") + what + " is not a finite positive number"};
}

}  // namespace sparsecc

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

// ---- what depends on the size of the input ------------------------------------------------------------

struct sparsecc_plane_conv::Plan {
  Plan(const sparsecc_conv_geometry& g, const PlanePack& weight, int64_t x_quads, int64_t height,
       int64_t width);

  // One copy of a plane: the pixels at these remainders of the position in the padded input by the stride.
  struct Phase {
    int64_t remainder[2];
  };

  int64_t in[2], out[2];
  bool direct;       // x is read as it is
  int64_t pitch;     // pixels from one row of a plane to the next
  int64_t rows;      // of a plane
  int64_t plane;     // pixels of a plane
  std::vector<Phase> phases;
  std::vector<int32_t> offset;  // of every block
  std::vector<PlaneUnit> units;
  int64_t pixels() const { return out[0] * out[1]; }

 private:
  std::vector<int64_t> place_taps(const sparsecc_conv_geometry& g);
  void find_units();
};

namespace {

// Of `count` positions remainder, remainder + step, ... in a padded row (or column), those in the input.
struct Inside {
  Inside(int64_t remainder, int64_t step, int64_t pad, int64_t size, int64_t count)
      : begin(std::min(count, remainder >= pad ? 0 : ceil_div(pad - remainder, step))),
        end(std::clamp<int64_t>(ceil_div(pad + size - remainder, step), begin, count)) {}
  int64_t begin, end;
};

}  // namespace

sparsecc_plane_conv::Plan::Plan(const sparsecc_conv_geometry& g, const PlanePack& weight, int64_t x_quads,
                                int64_t height, int64_t width)
    : in{height, width} {
  conv_output_size(g, in, out);
  if (pixels() > INT_MAX || out[0] > INT_MAX / out[1])
    throw Failure{"convolution plane has more than 2^31 pixels"};
  direct = height * width >= kUnit;
  for (int i = 0; i < 2; ++i)
    direct &= g.kernel[i] == 1 && g.stride[i] == 1 && g.pad_begin[i] == 0 && g.pad_end[i] == 0;
  const std::vector<int64_t> place = place_taps(g);
  const int64_t copies = direct ? 1 : static_cast<int64_t>(phases.size());
  if (rows > INT_MAX / pitch || plane > INT_MAX / (x_quads * copies) - kUnit)
    throw Failure{"convolution input of " + std::to_string(x_quads) + " quad planes of " +
                  std::to_string(plane) + " pixels has more than 2^31 of them"};
  offset.reserve(weight.tap.size());
  for (size_t i = 0; i < weight.tap.size(); ++i)
    offset.push_back(static_cast<int32_t>(weight.quad[i] * copies * plane + place[weight.tap[i]]));
  find_units();
}

// Distance of every place of the kernel within the copies of one plane; sets the sizes of planes.
std::vector<int64_t> sparsecc_plane_conv::Plan::place_taps(const sparsecc_conv_geometry& g) {
  struct Tap {
    size_t phase;
    int64_t shift[2];
  };
  std::vector<Tap> taps;
  int64_t most[2] = {0, 0};
  for (int64_t ky = 0; ky < g.kernel[0]; ++ky)
    for (int64_t kx = 0; kx < g.kernel[1]; ++kx) {
      const int64_t position[2] = {ky * g.dilation[0], kx * g.dilation[1]};
      Tap tap{};
      Phase phase{};
      for (int i = 0; i < 2; ++i) {
        phase.remainder[i] = position[i] % g.stride[i];
        tap.shift[i] = position[i] / g.stride[i];
        most[i] = std::max(most[i], tap.shift[i]);
      }
      while (tap.phase < phases.size() &&
             (phases[tap.phase].remainder[0] != phase.remainder[0] ||
              phases[tap.phase].remainder[1] != phase.remainder[1]))
        ++tap.phase;
      if (tap.phase == phases.size()) phases.push_back(phase);
      taps.push_back(tap);
    }
  // Padding that begins every row of every copy and padding that ends every one need no room twice.
  const int64_t width = out[1] + most[1];
  int64_t before = width, after = width;
  for (const Phase& phase : phases) {
    const Inside columns(phase.remainder[1], g.stride[1], g.pad_begin[1], in[1], width);
    before = std::min(before, columns.begin);
    after = std::min(after, width - columns.end);
  }
  const int64_t shared = std::min({before, after, most[1]});  // every output has a pixel of its own
  pitch = width - shared;
  rows = out[0] + most[0];
  plane = rows * pitch + shared;
  std::vector<int64_t> place;
  for (const Tap& tap : taps)
    place.push_back(static_cast<int64_t>(tap.phase) * plane + tap.shift[0] * pitch + tap.shift[1]);
  return place;
}

void sparsecc_plane_conv::Plan::find_units() {
  const int64_t count = pixels();
  if (direct) {
    for (int64_t pixel = 0; pixel < count; pixel += kUnit) {
      const int64_t from = std::min(pixel, count - kUnit);  // the last one looks back, not beyond the end
      units.push_back({static_cast<int32_t>(from), static_cast<int32_t>(pixel),
                       (0xffffu << (pixel - from)) & 0xffffu});
    }
    return;
  }
  int64_t pixel = 0, row = 0, column = 0;
  while (pixel < count) {
    const int64_t from = row * pitch + column;
    PlaneUnit unit{static_cast<int32_t>(from), static_cast<int32_t>(pixel), 0};
    while (pixel < count && row * pitch + column < from + kUnit) {
      unit.kept |= 1u << (row * pitch + column - from);
      ++pixel;
      if (++column == out[1]) {
        column = 0;
        ++row;
      }
    }
    units.push_back(unit);
  }
}

std::shared_ptr<const sparsecc_plane_conv::Plan> sparsecc_plane_conv::plan_for(int64_t height,
                                                                               int64_t width) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (plan_ == nullptr || plan_->in[0] != height || plan_->in[1] != width)
    plan_ = std::make_shared<const Plan>(geometry_, weight_, x_quads_, height, width);
  return plan_;
}

// ---- making and running -------------------------------------------------------------------------------

namespace {

const sparsecc_int8_weight_desc& checked(const sparsecc_int8_weight_desc& desc,
                                         const sparsecc_conv_geometry& geometry,
                                         const sparsecc_plane_quantization& to) {
  check_quantization(to);
  check_geometry(geometry, desc.outputs, desc.inputs);
  if (desc.activation != SPARSECC_ACT_NONE)
    throw Failure{"a convolution on quad planes takes its activation as bounds of the result"};
  return desc;
}

}  // namespace

sparsecc_plane_conv::sparsecc_plane_conv(const sparsecc_int8_weight_desc& desc,
                                         const sparsecc_conv_geometry& geometry,
                                         const sparsecc_plane_quantization& to)
    : sparsecc_plane_conv(desc, geometry, to, read_int8_weight(desc), choose_byte_isa(desc.isa)) {}

sparsecc_plane_conv::sparsecc_plane_conv(const sparsecc_int8_weight_desc& desc,
                                         const sparsecc_conv_geometry& geometry,
                                         const sparsecc_plane_quantization& to, const Weight& weight,
                                         ByteIsa isa)
    : geometry_(geometry),
      x_quads_(0),
      y_quads_(ceil_div(desc.outputs, kLanesOfQuad)),
      help_(plane_helpers(isa)),
      weight_(weight, checked(desc, geometry, to).values, geometry, help_.form),
      kernel_(plane_kernel(isa, weight_.tall)),
      has_residual_(to.has_residual != 0),
      x_zero_point_(to.x_zero_point),
      start_(weight_.groups * weight_.tall),
      scale_(start_.size()),
      bias_(start_.size()) {
  const int64_t taps = geometry.kernel[0] * geometry.kernel[1];
  x_quads_ = ceil_div(weight.inputs / taps * geometry.groups, kLanesOfQuad);
  const double residual = has_residual_ ? double{to.residual_scale} / to.y_scale : 0.0;
  const uint32_t less = to.x_zero_point - (help_.form == TapForm::kSignedBytes ? 128u : 0u);
  for (int64_t n = 0; n < desc.outputs; ++n) {
    start_[n] = static_cast<int32_t>(0u - weight_.sums[static_cast<size_t>(n)] * less);
    const double bias = desc.bias == nullptr ? 0.0 : double{desc.bias[n]} / to.y_scale;
    scale_[n] = static_cast<float>(double{to.x_scale} * desc.scales[n] / to.y_scale);
    bias_[n] = static_cast<float>(bias - residual * to.residual_zero_point);
    if (!std::isfinite(scale_[n]) || !std::isfinite(bias_[n]))
      throw Failure{"scales and bias of output " + std::to_string(n) + " do not fit a float together"};
  }
  epilogue_ = {start_.data(), scale_.data(), bias_.data(), static_cast<float>(residual),
               to.y_zero_point, to.low, to.high};
}

void sparsecc_plane_conv::output_size(const int64_t in[2], int64_t out[2]) const {
  conv_output_size(geometry_, in, out);
}

void sparsecc_plane_conv::copy(const Plan& plan, const uint8_t* x, int64_t batch, uint8_t* planes,
                               const sparsecc_executor* executor) const {
  const sparsecc_conv_geometry& g = geometry_;
  const int64_t width = plan.plane - (plan.rows - 1) * plan.pitch;
  const int64_t phases = static_cast<int64_t>(plan.phases.size());
  const int64_t count = batch * x_quads_, tasks = std::min(count, wanted_tasks(executor) * 2);
  const auto copy_plane = [&](const uint32_t* from, const Plan::Phase& phase, uint32_t* to) {
    const uint32_t* const end = to + plan.plane;
    const Inside rows(phase.remainder[0], g.stride[0], g.pad_begin[0], plan.in[0], plan.rows);
    const Inside columns(phase.remainder[1], g.stride[1], g.pad_begin[1], plan.in[1], width);
    uint32_t* done = to;
    const auto fill = [&](uint32_t* until) {
      std::memset(done, x_zero_point_, static_cast<size_t>(until - done) * sizeof(*done));
    };
    for (int64_t row = rows.begin; row < rows.end && columns.begin < columns.end; ++row) {
      uint32_t* start = to + row * plan.pitch + columns.begin;
      fill(start);
      const uint32_t* source = from + (row * g.stride[0] + phase.remainder[0] - g.pad_begin[0]) * plan.in[1] +
                               columns.begin * g.stride[1] + phase.remainder[1] - g.pad_begin[1];
      const int64_t pixels = columns.end - columns.begin;
      if (g.stride[1] == 1) {
        std::memcpy(start, source, static_cast<size_t>(pixels) * sizeof(*start));
      } else {
        help_.pick(source, g.stride[1], pixels, start);
      }
      done = start + pixels;
    }
    fill(const_cast<uint32_t*>(end));
  };
  run_tasks(executor, tasks, [&](int64_t task) {
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i)
      for (int64_t p = 0; p < phases; ++p)
        copy_plane(reinterpret_cast<const uint32_t*>(x) + i * plan.in[0] * plan.in[1],
                   plan.phases[static_cast<size_t>(p)],
                   reinterpret_cast<uint32_t*>(planes) + (i * phases + p) * plan.plane);
  });
}

void sparsecc_plane_conv::multiply(const Plan& plan, const uint8_t* x, int64_t batch, const uint8_t* residual,
                                   uint8_t* y, const sparsecc_executor* executor) const {
  const int64_t x_image = (plan.direct ? plan.in[0] * plan.in[1]
                                       : plan.plane * static_cast<int64_t>(plan.phases.size())) *
                          x_quads_ * kLanesOfQuad;
  const int64_t y_image = plan.pixels() * y_quads_ * kLanesOfQuad;
  const int64_t units = static_cast<int64_t>(plan.units.size()), wanted = wanted_tasks(executor);
  const int64_t fit = kCachedBytes / (x_image / units + 1);
  const int64_t most = std::max<int64_t>(fit, 4 * kernel_.tile.wide);
  const int64_t chunks = std::min(units, std::max(ceil_div(units, most), ceil_div(wanted, batch * 4)));
  const int64_t parts = weight_.shares.parts(ceil_div(wanted, batch * chunks));
  run_tasks(executor, batch * chunks * parts, [&](int64_t task) {
    const int64_t chunk = task / parts % chunks, image = task / parts / chunks;
    const int64_t first = units * chunk / chunks, last = units * (chunk + 1) / chunks;
    for (const auto [begin, end] : weight_.shares.of(task % parts, parts)) {
      const PlaneJob job{weight_.start.data(),
                         plan.offset.data(),
                         weight_.values.data(),
                         begin,
                         end,
                         y_quads_,
                         x + image * x_image,
                         plan.units.data() + first,
                         last - first,
                         y + image * y_image,
                         residual == nullptr ? nullptr : residual + image * y_image,
                         plan.pixels(),
                         &epilogue_};
      kernel_.run(&job);
    }
  });
}

void sparsecc_plane_conv::run(const uint8_t* x, int64_t batch, int64_t height, int64_t width,
                              const uint8_t* residual, uint8_t* y, const sparsecc_executor* executor) const {
  require_in_range(batch >= 0 && batch <= INT_MAX, "batch", batch);
  if (batch == 0) return;
  const std::shared_ptr<const Plan> plan = plan_for(height, width);
  if (plan->direct) return multiply(*plan, x, batch, residual, y, executor);
  const int64_t image = x_quads_ * plan->plane * static_cast<int64_t>(plan->phases.size());
  if (batch > kMaxPixels / image) throw Failure{"convolution input with its padding is too large"};
  const int64_t pixels = batch * image;
  Scratch<3, uint8_t> planes((pixels + kUnit) * kLanesOfQuad);
  copy(*plan, x, batch, planes.data(), executor);
  // The pixels beyond a plane's end are read, though not used.
  std::memset(planes.data() + pixels * kLanesOfQuad, 0, kUnit * kLanesOfQuad);
  multiply(*plan, planes.data(), batch, residual, y, executor);
}
