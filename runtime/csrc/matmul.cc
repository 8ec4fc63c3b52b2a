// y[rows, outputs] = act(x[rows, inputs] W^T + bias)
#include <algorithm>
#include <string>

#include "common.h"
#include "operator.h"
#include "schedule.h"

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

namespace {

constexpr int64_t kCachedBytes = 384 * 1024;  // of packed x that stays in a second-level cache
constexpr int64_t kGroupsAtOnce = 8;          // groups of outputs per pass over the rows
constexpr int64_t kSumOutputs = 1024;         // outputs of the widest block of running sums

// Rows of x up to which slots beat single weights, measured on Zen 5: they read every weight once per tile
// of rows, but where every slot is full and one permute picks from its 16 inputs they still pay then.
int64_t most_slice_rows(Isa isa, SliceView::Form form) {
  if (isa == Isa::kAvx512) return form == SliceView::kUniform ? 24 : 8;
  return isa == Isa::kAvx2 ? 4 : 1;
}

}  // namespace

sparsecc_matmul::sparsecc_matmul(const sparsecc_weight_desc& desc)
    : sparsecc_matmul(desc, read_weight(desc)) {}

sparsecc_matmul::sparsecc_matmul(const sparsecc_weight_desc& desc, Weight weight) : linear_(desc, weight) {
  if (has_block_kernel(weight.layout)) {
    block_.emplace(weight);
    return;
  }
  const Rows rows = expand_rows(weight);
  element_.emplace(rows, 0, rows.outputs, element_block_inputs(linear_.isa));
  slice_.emplace(rows, linear_.isa == Isa::kAvx512);
  slice_rows_ = most_slice_rows(linear_.isa, slice_->view().form);
}

bool sparsecc_matmul::uses_slice(int64_t rows) const { return slice_.has_value() && rows <= slice_rows_; }

const char* sparsecc_matmul::kernel(int64_t rows) const {
  if (block_.has_value())
    return panel_rows(rows) > kTileRows ? lane_kernel(linear_.isa).name
                                        : block_kernel(linear_.isa, block_->view().wide).name;
  return uses_slice(rows) ? slice_kernel(linear_.isa, slice_->view().form).name
                          : element_kernel(linear_.isa).name;
}

void sparsecc_matmul::run(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const {
  if (rows == 0) return;
  if (block_.has_value()) {
    run_block(x, rows, y, executor);
  } else if (uses_slice(rows)) {
    run_slice(x, rows, y, executor);
  } else {
    run_element(x, rows, y, executor);
  }
}

// Chunks of rows whose panels stay in cache; in each, a few groups of outputs at a time over all
// panels, so that neighbouring outputs of a row are written close together in time. Whole panels of the
// lane kernel first, the rows left over by the kernel with outputs in the lanes.
void sparsecc_matmul::run_block(const float* x, int64_t rows, float* y,
                                const sparsecc_executor* executor) const {
  const int64_t inputs = linear_.inputs, outputs = linear_.outputs;
  const BlockView weight = block_->view();
  const int64_t height = panel_rows(rows), tasks = wanted_tasks(executor), panels = ceil_div(rows, height);
  const int64_t fit = kCachedBytes / (std::max<int64_t>(inputs, 1) * height * 4);
  const int64_t chunk_panels =
      std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, panels / std::min(tasks, panels)));
  const int64_t row_chunks = ceil_div(panels, chunk_panels);
  const auto cuts = cut_by_weight(block_->start.data(), block_->groups, ceil_div(tasks, row_chunks), 4);
  const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
  run_tasks(executor, row_chunks * parts, [&](int64_t task) {
    const int64_t row_begin = task / parts * chunk_panels * height;
    const int64_t row_end = std::min(rows, row_begin + chunk_panels * height);
    const int64_t group_begin = cuts[static_cast<size_t>(task % parts)];
    const int64_t group_end = cuts[static_cast<size_t>(task % parts) + 1];
    Scratch<0> panel(rows == 1 ? 0 : (row_end - row_begin) * inputs);
    if (rows > 1)
      for (int64_t row = row_begin; row < row_end; row += height) {
        const int64_t n = std::min(height, row_end - row);
        linear_.help.pack_rows(x + row * inputs, inputs, n, inputs, panel.data() + (row - row_begin) * inputs,
                               n);
      }
    for (int64_t group = group_begin; group < group_end; group += kGroupsAtOnce)
      for (int64_t row = row_begin; row < row_end; row += height)
        run_panel(weight, group, std::min(group_end, group + kGroupsAtOnce),
                  rows == 1 ? x : panel.data() + (row - row_begin) * inputs, std::min(height, row_end - row),
                  y + row * outputs);
  });
}

// Two vectors of rows per panel where the lane kernel takes them and there are enough rows; a kernel
// with two vectors of outputs has as few loads without the final transpose.
int64_t sparsecc_matmul::panel_rows(int64_t rows) const {
  const int64_t lanes = int64_t{lane_kernel(linear_.isa).tile.wide} * kGroup;
  return block_->view().wide == 1 && lanes > kTileRows && rows >= lanes ? lanes : kTileRows;
}

void sparsecc_matmul::run_panel(const BlockView& weight, int64_t group_begin, int64_t group_end,
                                const float* panel, int64_t rows, float* y) const {
  const Target target{y, linear_.outputs, 1};
  if (rows > kTileRows && rows % kGroup == 0) {
    const LaneJob job{&weight, group_begin, group_end,        panel, static_cast<int>(rows / kGroup),
                      rows,    target,      &linear_.epilogue};
    return lane_kernel(linear_.isa).run(&job);
  }
  const auto kernel = block_kernel(linear_.isa, weight.wide);
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const BlockJob job{&weight,
                       group_begin,
                       group_end,
                       panel + row,
                       rows,
                       static_cast<int>(std::min<int64_t>(kTileRows, rows - row)),
                       Target{y + row * linear_.outputs, linear_.outputs, 1},
                       &linear_.epilogue};
    kernel.run(&job);
  }
}

void sparsecc_matmul::run_slice(const float* x, int64_t rows, float* y,
                                const sparsecc_executor* executor) const {
  const SliceView weight = slice_->view();
  const auto kernel = slice_kernel(linear_.isa, weight.form);
  const int64_t inputs = linear_.inputs, whole = round_up(inputs, kGroup) + kGroup;
  Scratch<2> padded(rows * whole);  // windows are read whole, and much faster from aligned memory
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(x + row * inputs, inputs, padded.data() + row * whole);
    std::fill_n(padded.data() + row * whole + inputs, whole - inputs, 0.0f);
  }
  x = padded.data();
  const auto cuts = cut_by_weight(slice_->slot_start.data(), slice_->groups, wanted_tasks(executor), 8);
  run_tasks(executor, static_cast<int64_t>(cuts.size()) - 1, [&](int64_t task) {
    const SliceJob job{
        &weight, cuts[static_cast<size_t>(task)], cuts[static_cast<size_t>(task) + 1], x,
        whole,   static_cast<int>(rows),          Target{y, linear_.outputs, 1},       &linear_.epilogue};
    kernel.run(&job);
  });
}

void sparsecc_matmul::run_element(const float* x, int64_t rows, float* y,
                                  const sparsecc_executor* executor) const {
  const ElementPack& weight = *element_;
  const auto kernel = element_kernel(linear_.isa);
  const int64_t inputs = linear_.inputs, outputs = linear_.outputs;
  const LaneChunks chunks = cut_lanes(rows, kernel.tile.wide, weight.chunks, wanted_tasks(executor));
  const int64_t parts_wanted =
      std::max(ceil_div(wanted_tasks(executor), chunks.count()), ceil_div(outputs, kSumOutputs));
  const auto cuts =
      cut_by_weight(weight.chunk_start.data(), weight.chunks, parts_wanted, ElementPack::kChunk);
  const int64_t parts = static_cast<int64_t>(cuts.size()) - 1;
  run_tasks(executor, chunks.count() * parts, [&](int64_t task) {
    const int64_t chunk = task / parts, row = chunks.begin(chunk), count = chunks.size(chunk);
    const int wide = chunks.wide(chunk);
    const int64_t lanes = int64_t{wide} * kGroup;
    const int64_t first = cuts[static_cast<size_t>(task % parts)],
                  last = cuts[static_cast<size_t>(task % parts) + 1];
    if (first == last) return;
    const int64_t output = first * ElementPack::kChunk;
    const int64_t output_count = (last - 1) * ElementPack::kChunk + weight.chunk_outputs(last - 1) - output;
    Scratch<0> panel(weight.block_inputs * lanes);
    Scratch<1> sums(output_count * lanes);
    ElementJob job{};
    job.panel = panel.data();
    job.wide = wide;
    for (int64_t block = 0; block < weight.blocks; ++block) {
      const int64_t k = block * weight.block_inputs;
      linear_.help.pack_rows(x + row * inputs + k, inputs, count, std::min(weight.block_inputs, inputs - k),
                             panel.data(), lanes);
      for (int64_t c = first; c < last; ++c) {
        const int64_t local = (c - first) * ElementPack::kChunk;
        job.weight = weight.cell(c, block);
        job.sums = sums.data() + local * lanes;
        job.bias = block == 0 ? linear_.epilogue.bias + output + local : nullptr;
        kernel.run(&job);
      }
    }
    linear_.help.finish(sums.data(), lanes, output_count, count,
                        Target{y + row * outputs + output, outputs, 1}, &linear_.epilogue);
  });
}
