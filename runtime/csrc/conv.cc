// NCHW convolution as a sparse product over flattened output pixels: for a chunk of pixels, the
// values of every (channel, kernel row, kernel column) are laid side by side in a panel that stays in
// cache (never the whole im2col matrix), and the matmul kernels run on that panel.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <string>

#include "common.h"
#include "geometry.h"
#include "operator.h"
#include "schedule.h"

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

namespace {

constexpr int64_t kSumOutputs = 1024;
constexpr int64_t kSlack = 64;  // floats that may be read past the end of padded input

void check_blocks(const sparsecc_conv_geometry& g, const Weight& weight) {
  if (weight.layout.kind == Layout::kBlock && g.groups > 1 &&
      weight.outputs / g.groups % weight.layout.rows != 0)
    throw Failure{"blocks of " + show(weight.layout.rows) + " outputs cross the convolution's groups of " +
                  show(weight.outputs / g.groups) + " outputs"};
}

}  // namespace

struct sparsecc_conv::Frame {
  int64_t batch, in[2], out[2];
  int64_t pixels;     // of one output plane
  bool direct;        // x can be read as it is
  int64_t padded[2];  // size of a plane as it is read
  int64_t plane() const { return padded[0] * padded[1]; }
};

sparsecc_conv::sparsecc_conv(const sparsecc_weight_desc& desc, const sparsecc_conv_geometry& geometry)
    : sparsecc_conv(desc, geometry, read_weight(desc)) {}

sparsecc_conv::sparsecc_conv(const sparsecc_weight_desc& desc, const sparsecc_conv_geometry& geometry,
                             Weight weight)
    : geometry_(geometry), linear_(desc, weight) {
  check_geometry(geometry, weight.outputs, weight.inputs);
  check_blocks(geometry, weight);
  channels_ = weight.inputs / (geometry.kernel[0] * geometry.kernel[1]) * geometry.groups;
  const int tall = element_tall(weight.layout);
  const Rows rows = expand_rows(weight, tall);
  const int64_t outputs = weight.outputs / geometry.groups;
  for (int64_t group = 0; group < geometry.groups; ++group)
    element_.emplace_back(rows, group * outputs, outputs, element_block_inputs(linear_.isa, rows));
}

const char* sparsecc_conv::kernel() const { return element_kernel(linear_.isa, element_[0].tall).name; }

void sparsecc_conv::output_size(const int64_t in[2], int64_t out[2]) const {
  conv_output_size(geometry_, in, out);
}

sparsecc_conv::Frame sparsecc_conv::frame(int64_t batch, int64_t height, int64_t width) const {
  const sparsecc_conv_geometry& g = geometry_;
  Frame f{};
  f.batch = batch;
  f.in[0] = height;
  f.in[1] = width;
  output_size(f.in, f.out);
  f.pixels = f.out[0] * f.out[1];
  f.direct = true;
  for (int i = 0; i < 2; ++i) {
    f.direct &= g.kernel[i] == 1 && g.stride[i] == 1 && g.pad_begin[i] == 0 && g.pad_end[i] == 0;
    // Only what is read: the right and bottom padding may be longer than any kernel position reaches.
    f.padded[i] = (f.out[i] - 1) * g.stride[i] + (g.kernel[i] - 1) * g.dilation[i] + 1;
  }
  if (f.padded[0] > INT_MAX / f.padded[1] || f.pixels > INT_MAX)
    throw Failure{"convolution plane of " + show(f.padded[0]) + " x " + show(f.padded[1]) +
                  " has more than 2^31 pixels"};
  return f;
}

void sparsecc_conv::pad(const Frame& f, const float* x, float* padded,
                        const sparsecc_executor* executor) const {
  const int64_t top = geometry_.pad_begin[0], left = geometry_.pad_begin[1];
  const int64_t height = f.padded[0], width = f.padded[1];
  const int64_t copied = std::clamp<int64_t>(width - left, 0, f.in[1]);
  const int64_t planes = f.batch * channels_, tasks = std::min(planes, thread_count(executor) * 4);
  run_tasks(executor, tasks, [&](int64_t task) {
    for (int64_t plane = planes * task / tasks; plane < planes * (task + 1) / tasks; ++plane) {
      float* to = padded + plane * height * width;
      const float* from = x + plane * f.in[0] * f.in[1];
      for (int64_t h = 0; h < height; ++h, to += width) {
        const int64_t source = h - top;
        if (source < 0 || source >= f.in[0] || copied == 0) {
          std::fill_n(to, width, 0.0f);
          continue;
        }
        std::fill_n(to, left, 0.0f);
        std::memcpy(to + left, from + source * f.in[1], static_cast<size_t>(copied) * sizeof(float));
        std::fill_n(to + left + copied, width - left - copied, 0.0f);
      }
    }
  });
  std::fill_n(padded + planes * height * width, kSlack, 0.0f);
}

void sparsecc_conv::run(const float* x, int64_t batch, int64_t channels, int64_t height, int64_t width,
                        float* y, const sparsecc_executor* executor, const float* added) const {
  if (channels != channels_)
    throw Failure{"convolution got " + show(channels) + " channels, its weight has " + show(channels_)};
  require_in_range(batch >= 0 && batch <= INT_MAX, "batch", batch);
  if (batch == 0) return;
  const Frame f = frame(batch, height, width);
  Scratch<2> padded(f.direct ? 0 : batch * channels_ * f.plane() + kSlack);
  if (!f.direct) pad(f, x, padded.data(), executor);
  const float* from = f.direct ? x : padded.data();
  run_frame(f, from, added, y, executor);
}

namespace {

// Offset of every input of one conv group: channel, kernel row, kernel column.
std::vector<int64_t> input_offsets(const sparsecc_conv_geometry& g, int64_t inputs, int64_t plane,
                                   int64_t width) {
  std::vector<int64_t> offsets;
  offsets.reserve(static_cast<size_t>(inputs));
  const int64_t channels = inputs / (g.kernel[0] * g.kernel[1]);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t h = 0; h < g.kernel[0]; ++h)
      for (int64_t w = 0; w < g.kernel[1]; ++w)
        offsets.push_back(c * plane + h * g.dilation[0] * width + w * g.dilation[1]);
  return offsets;
}

void pixel_offsets(const sparsecc_conv_geometry& g, int64_t width, int64_t out_width, int64_t first,
                   int64_t count, int32_t* offsets) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = first + i;
    offsets[i] =
        static_cast<int32_t>(pixel / out_width * g.stride[0] * width + pixel % out_width * g.stride[1]);
  }
}

}  // namespace

void sparsecc_conv::run_frame(const Frame& f, const float* x, const float* added, float* y,
                              const sparsecc_executor* executor) const {
  const auto kernel = element_kernel(linear_.isa, element_[0].tall);
  const int64_t outputs = linear_.outputs / geometry_.groups;
  const int64_t group_channels = channels_ / geometry_.groups;
  const auto inputs = input_offsets(geometry_, linear_.inputs, f.plane(), f.padded[1]);
  const int64_t planes = f.batch * geometry_.groups, wanted = wanted_tasks(executor);
  const LaneChunks chunks(f.pixels, kernel.tile.wide);
  const int64_t outer = planes * chunks.count();
  const int64_t parts =
      element_[0].shares.parts(std::max(ceil_div(wanted, outer), ceil_div(outputs, kSumOutputs)));
  const bool relu = linear_.epilogue.activation == SPARSECC_ACT_RELU;
  const bool clip = linear_.epilogue.activation == SPARSECC_ACT_CLIP;
  const bool direct = relu || clip || linear_.epilogue.activation == SPARSECC_ACT_NONE;
  run_tasks(executor, outer * parts, [&](int64_t task) {
    const int64_t part = task % parts, chunk = task / parts % chunks.count();
    const int64_t plane = task / parts / chunks.count();  // image and conv group
    const int64_t image = plane / geometry_.groups, group = plane % geometry_.groups;
    const ElementPack& weight = element_[static_cast<size_t>(group)];
    const Shares::Ranges mine = weight.shares.of(part, parts);
    int64_t height = 0;  // outputs with running sums
    for (const auto [first, last] : mine) height += weight.outputs_of(first, last);
    if (height == 0) return;
    const int64_t pixel = chunks.begin(chunk), count = chunks.size(chunk);
    const int64_t lanes = int64_t{chunks.wide(chunk)} * kGroup;
    int32_t offsets[kMaxWide * kGroup];
    pixel_offsets(geometry_, f.padded[1], f.out[1], pixel, count, offsets);
    Scratch<0> panel(weight.block_inputs * lanes);
    Scratch<1> sums(round_up(height, weight.tall) * lanes);
    const float* bias = linear_.epilogue.bias + group * outputs;
    const float* base = x + (image * channels_ + group * group_channels) * f.plane();
    const int64_t place = (image * linear_.outputs + group * outputs) * f.pixels + pixel;
    float* to = y + place;
    ElementJob job{};
    job.panel = panel.data();
    job.wide = chunks.wide(chunk);
    job.count = count;
    job.low = clip ? linear_.epilogue.alpha : relu ? 0.0f : -INFINITY;
    job.high = clip ? linear_.epilogue.beta : INFINITY;
    for (int64_t block = 0; block < weight.blocks; ++block) {
      const int64_t k = block * weight.block_inputs;
      const PixelJob pixels{base,
                            inputs.data() + k,
                            std::min(weight.block_inputs, linear_.inputs - k),
                            offsets,
                            count,
                            lanes,
                            !f.direct,
                            panel.data()};
      linear_.help.pack_pixels(&pixels);
      job.direct = direct && block == weight.blocks - 1;
      job.sums = sums.data();
      for (const auto [first, last] : mine)
        for (int64_t c = first; c < last; ++c) {
          const int64_t output = weight.first_output(c);
          job.weight = weight.cell(c, block);
          job.bias = block == 0 ? bias + output : nullptr;
          job.added = added == nullptr ? nullptr : added + place + output * f.pixels;
          job.outputs = weight.outputs_of(c, c + 1);
          job.target = Target{to + output * f.pixels, 1, f.pixels};
          kernel.run(&job);
          job.sums += job.outputs * lanes;
        }
    }
    if (direct) return;
    float* done = sums.data();
    for (const auto [first, last] : mine) {
      const int64_t output_count = weight.outputs_of(first, last);
      linear_.help.finish(done, lanes, output_count, count,
                          Target{to + weight.first_output(first) * f.pixels, 1, f.pixels}, &linear_.epilogue);
      done += output_count * lanes;
    }
  });
}
