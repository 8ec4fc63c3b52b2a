#include <algorithm>
#include <type_traits>

#include "plane_conv.h"

namespace sparsecc {
namespace {

// Work for blocks of four outputs relative to that for eight, per output: x is loaded twice as often.
constexpr double kFourCost = 1.1;

// The matrix of a convolution seen as outputs by quads of channels at places of the kernel.
class QuadGrid {
 public:
  QuadGrid(const Weight& weight, const int8_t* values, const sparsecc_conv_geometry& geometry)
      : weight_(weight),
        values_(values),
        taps_(geometry.kernel[0] * geometry.kernel[1]),
        channels_(weight.inputs / taps_),
        outputs_per_group_(weight.outputs / geometry.groups) {}

  // Calls take(key, output, lane, value) for every non-zero weight of outputs [first, last): lane is the
  // channel within its quad, key is quad * number of taps + tap, with quads counted from first_quad(first).
  template <class Take>
  void visit(int64_t first, int64_t last, Take take) const {
    const int64_t height = weight_.layout.rows, width = weight_.layout.cols;
    const int64_t base = first_quad(first);
    for (int64_t row = first / height; row * height < last; ++row)
      for (int64_t unit = weight_.row_start[at(row)]; unit < weight_.row_start[at(row) + 1]; ++unit) {
        const int64_t column = int64_t{weight_.column[at(unit)]} * width;
        const int64_t columns = std::min(width, weight_.inputs - column);
        for (int64_t output = std::max(first, row * height); output < std::min(last, (row + 1) * height);
             ++output) {
          const int8_t* values = values_ + (unit * height + output - row * height) * width;
          for (int64_t c = 0; c < columns; ++c) {
            if (values[c] == 0) continue;
            const int64_t tap = (column + c) / channels_;
            const int64_t channel = output / outputs_per_group_ * channels_ + (column + c) % channels_;
            take((channel / kLanesOfQuad - base) * taps_ + tap, output, channel % kLanesOfQuad, values[c]);
          }
        }
      }
  }

  int64_t first_quad(int64_t output) const { return output / outputs_per_group_ * channels_ / kLanesOfQuad; }
  int64_t taps() const { return taps_; }
  // Keys that outputs [first, last) can have.
  int64_t span(int64_t first, int64_t last) const {
    const int64_t end = ((last - 1) / outputs_per_group_ + 1) * channels_;
    return (ceil_div(end, kLanesOfQuad) - first_quad(first)) * taps_;
  }

 private:
  const Weight& weight_;
  const int8_t* values_;
  int64_t taps_, channels_, outputs_per_group_;
};

// The keys of every group in ascending order, so that neighbouring places of the kernel follow each other.
struct Keys {
  Keys(const QuadGrid& grid, int64_t outputs, int64_t tall) {
    std::vector<bool> seen;
    for (int64_t first = 0; first < outputs; first += tall) {
      const int64_t last = std::min(outputs, first + tall);
      const auto before = static_cast<std::ptrdiff_t>(key.size());
      seen.resize(std::max(seen.size(), at(grid.span(first, last))));
      grid.visit(first, last, [&](int64_t k, int64_t, int64_t, int8_t) {
        if (seen[at(k)]) return;
        seen[at(k)] = true;
        key.push_back(static_cast<uint32_t>(k));
      });
      std::sort(key.begin() + before, key.end());
      for (auto k = key.begin() + before; k != key.end(); ++k) seen[*k] = false;
      start.push_back(static_cast<int64_t>(key.size()));
    }
  }
  std::vector<uint32_t> key;
  std::vector<int64_t> start{0};
};

void put(int8_t* quad, int64_t lane, int8_t value, TapForm form) {
  if (form != TapForm::kPairs) {
    quad[lane] = value;
    return;
  }
  const int16_t wide = value;
  __builtin_memcpy(quad + 2 * (lane % 2 * 2 + lane / 2), &wide, sizeof wide);
}

}  // namespace

PlanePack::PlanePack(const Weight& weight, const int8_t* weights, const sparsecc_conv_geometry& geometry,
                     TapForm form)
    : sums(at(round_up(weight.outputs, 8))) {
  const QuadGrid grid(weight, weights, geometry);
  Keys keys(grid, weight.outputs, 8);
  tall = 8;
  {
    Keys fine(grid, weight.outputs, 4);
    if (kFourCost * 4 * static_cast<double>(fine.key.size()) < 8 * static_cast<double>(keys.key.size())) {
      keys = std::move(fine);
      tall = 4;
    }
  }
  groups = ceil_div(weight.outputs, tall);
  start = Buffer<int64_t>(groups + 1);
  std::copy(keys.start.begin(), keys.start.end(), start.data());
  shares = Shares(start.data(), groups, kGroupOverhead);
  const int64_t blocks = start[groups], bytes = tap_bytes(form);
  values = Buffer<int8_t>(blocks * tall * bytes);
  quad.resize(at(blocks));
  tap.resize(at(blocks));
  std::vector<int64_t> block_of;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * tall, last = std::min(weight.outputs, first + tall);
    block_of.resize(std::max(block_of.size(), at(grid.span(first, last))));
    for (int64_t block = start[group]; block < start[group + 1]; ++block) {
      const uint32_t key = keys.key[at(block)];
      block_of[key] = block;
      quad[at(block)] = static_cast<uint32_t>(grid.first_quad(first) + key / grid.taps());
      tap[at(block)] = static_cast<uint32_t>(key % grid.taps());
    }
    grid.visit(first, last, [&](int64_t key, int64_t output, int64_t lane, int8_t value) {
      put(values.data() + (block_of[at(key)] * tall + output - first) * bytes, lane, value, form);
      sums[at(output)] += static_cast<uint32_t>(int32_t{value});
    });
  }
}

}  // namespace sparsecc
