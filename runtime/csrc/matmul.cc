// y[rows, outputs] = act(x[rows, inputs] W^T + bias)
#include <algorithm>
#include <string>
#include <vector>

#include "common.h"
#include "operator.h"
#include "schedule.h"

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

namespace {

constexpr int64_t kCachedBytes = 384 * 1024;  // of packed x that stays in a second-level cache
constexpr int64_t kGroupsAtOnce = 8;          // groups of outputs per pass over the rows
constexpr int64_t kSumOutputs = 1024;         // outputs of the widest block of running sums
constexpr int64_t kMostTasks = 8;             // of a thread
constexpr int64_t kPackedAtOnce = 1 << 14;    // floats, at least, that are worth a task of their own

// Rows of x up to which slots beat single weights, measured on Zen 5 (NEON: by counted instructions): they read
// every weight once per tile of rows, but where every slot is full and one permute picks from its 16 inputs they
// still pay then.
int64_t most_slice_rows(Isa isa, SliceView::Form form) {
  switch (isa) {
    case Isa::kAvx512:
      return form == SliceView::kUniform ? 24 : 8;
    case Isa::kNeon:
      return form == SliceView::kUniform ? 6 : 4;
    case Isa::kAvx2:
      return 4;
    case Isa::kGeneric:
      break;
  }
  return 1;
}

// Rows up to which blocks of 16 or 32 outputs in the lanes beat the same weights with rows in the lanes, which
// go over 64 rows per pass and a part of the inputs: these pay for blocks of 16, which need a load per row and
// multiplication, and for blocks of 32 whose weights are too many to stay in a second-level cache.
int64_t most_block_rows(Isa isa, const BlockPack& blocks) {
  constexpr int64_t kRows = 40, kGroupBytes = 220 * 1024;
  const BlockView view = blocks.view();
  const int64_t bytes = view.start[blocks.groups] * kGroup * view.wide * 4 / blocks.groups;
  return isa == Isa::kAvx512 && (view.wide == 1 || bytes > kGroupBytes) ? kRows : INT64_MAX;
}

}  // namespace

sparsecc_matmul::sparsecc_matmul(const sparsecc_weight_desc& desc)
    : sparsecc_matmul(desc, read_weight(desc)) {}

sparsecc_matmul::sparsecc_matmul(const sparsecc_weight_desc& desc, Weight weight) : linear_(desc, weight) {
  const int tall = element_tall(weight.layout);
  const auto expect_pieces = [&](int64_t outputs) {
    no_bias_ = Buffer<float>(outputs);
    unfinished_ = {no_bias_.data(), SPARSECC_ACT_NONE, 0.0f, 0.0f};
  };
  const sparsecc_value_type type = values_read(linear_.isa, weight.type);
  const auto make_elements = [&] {
    const Rows rows = expand_rows(weight, tall);
    element_.emplace(rows, 0, rows.outputs, element_block_inputs(linear_.isa, rows));
  };
  if (has_block_kernel(weight.layout)) {
    block_.emplace(weight, type);
    expect_pieces(block_->piece_view().outputs);
    tiles_ = FloatTiles::of(weight, desc.isa);
    if (tiles_.has_value()) {
      block_rows_ = tiles_->least_rows() - 1;
      return;
    }
    block_rows_ = most_block_rows(linear_.isa, *block_);
    if (block_rows_ < INT64_MAX) make_elements();
    return;
  }
  make_elements();
  slice_.emplace(expand_rows(weight, 1), linear_.isa == Isa::kAvx512, type);
  expect_pieces(slice_->piece_view().outputs);
  slice_rows_ = most_slice_rows(linear_.isa, slice_->view().form);
}

bool sparsecc_matmul::uses_slice(int64_t rows) const { return slice_.has_value() && rows <= slice_rows_; }

bool sparsecc_matmul::uses_block(int64_t rows) const { return block_.has_value() && rows <= block_rows_; }

// Rows beyond whole vectors of them that cost less with outputs in the lanes than a vector with idle lanes.
int64_t sparsecc_matmul::tail_rows(int64_t rows) const {
  if (uses_block(rows) || uses_slice(rows)) return 0;
  const int64_t tail = rows % kGroup, most = block_.has_value() ? block_rows_ : slice_rows_ / 2;
  return tail < rows && tail <= most ? tail : 0;
}

const char* sparsecc_matmul::kernel(int64_t rows) const {
  if (uses_block(rows)) return block_kernel(linear_.isa, block_->view().wide, block_->type()).name;
  if (tiles_.has_value()) return tiles_->kernel();
  return uses_slice(rows) ? slice_kernel(linear_.isa, slice_->view().form, slice_->type()).name
                          : element_kernel(linear_.isa, element_->tall).name;
}

// Where rows of x are cut as well, idle threads take the next task.
std::vector<int64_t> sparsecc_matmul::part_work(int64_t rows, int64_t threads) const {
  if (uses_block(rows) || uses_slice(rows) || tiles_.has_value()) return shares(rows).part_work(threads);
  const LaneChunks chunks(rows, element_kernel(linear_.isa, element_->tall).tile.wide);
  const int64_t parts = element_parts(chunks.count(), threads);
  std::vector<int64_t> work(static_cast<size_t>(threads));
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    for (int64_t part = 0; part < parts; ++part)
      *std::min_element(work.begin(), work.end()) += chunks.wide(chunk) * element_->shares.work(part, parts);
  return work;
}

const Shares& sparsecc_matmul::shares(int64_t rows) const {
  if (uses_block(rows)) return block_->shares;
  if (tiles_.has_value()) return tiles_->shares();
  return uses_slice(rows) ? slice_->shares : element_->shares;
}

void sparsecc_matmul::run(const float* x, int64_t rows, float* y, const sparsecc_executor* executor) const {
  if (rows == 0) return;
  if (const int64_t tail = tail_rows(rows); tail > 0) {
    const int64_t whole = rows - tail;
    run(x, whole, y, executor);
    return run(x + whole * linear_.inputs, tail, y + whole * linear_.outputs, executor);
  }
  if (uses_block(rows)) {
    run_block(x, rows, y, executor);
  } else if (tiles_.has_value()) {
    tiles_->run(x, rows, y, linear_.epilogue, executor);
  } else if (uses_slice(rows)) {
    run_slice(x, rows, y, executor);
  } else {
    run_element(x, rows, y, executor);
  }
}

// Chunks of rows whose panels stay in cache; in each, a few groups of outputs at a time over all
// panels, so that neighbouring outputs of a row are written close together in time. Where the chunks are fewer
// than the tasks wanted, the outputs are dealt too, and x is packed beforehand: once, not by every task.
void sparsecc_matmul::run_block(const float* x, int64_t rows, float* y,
                                const sparsecc_executor* executor) const {
  const int64_t inputs = linear_.inputs, outputs = linear_.outputs;
  const int64_t tasks = wanted_tasks(executor), width = block_->view().wide * kGroup;
  if (rows == 1 && tasks == 1) {
    PartialSums<float> partial(block_->pieces, 1, 1, width);
    return run_groups(block_->shares.of(0, 1), {x, 0, 0, 1, y}, partial);
  }
  const int64_t fit = kCachedBytes / (std::max<int64_t>(inputs, 1) * kTileRows * 4);
  const RowChunks chunks(rows, kTileRows, fit, thread_count(executor));
  const int64_t parts = block_->shares.parts(ceil_div(tasks, chunks.count()));
  PartialSums<float> partial(block_->pieces, rows, chunks.count(), width);
  const auto run_part = [&](int64_t part, int64_t chunk, const float* panels) {
    const int64_t row = chunks.begin(chunk);
    run_groups(block_->shares.of(part, parts), {panels, chunk, row, chunks.size(chunk), y + row * outputs},
               partial);
  };
  if (parts == 1) {
    run_tasks(executor, chunks.count(), [&](int64_t chunk) {
      const int64_t row = chunks.begin(chunk), count = chunks.size(chunk);
      Scratch<0> packed(rows == 1 ? 0 : count * inputs);
      if (rows > 1) pack_panels(x + row * inputs, count, 0, inputs, packed.data());
      run_part(0, chunk, rows == 1 ? x : packed.data());
    });
    return;
  }
  Scratch<0> packed(rows == 1 ? 0 : rows * inputs);
  if (rows > 1) {
    const int64_t worth = std::max<int64_t>(1, ceil_div(rows * inputs, chunks.count() * kPackedAtOnce));
    const int64_t slices = std::clamp<int64_t>(ceil_div(tasks, chunks.count()), 1, worth);
    run_tasks(executor, chunks.count() * slices, [&](int64_t task) {
      const int64_t chunk = task / slices, slice = task % slices, row = chunks.begin(chunk);
      const int64_t first = inputs * slice / slices, last = inputs * (slice + 1) / slices;
      pack_panels(x + row * inputs, chunks.size(chunk), first, last, packed.data() + row * inputs);
    });
  }
  run_tasks(executor, chunks.count() * parts, [&](int64_t task) {
    const int64_t chunk = task / parts;
    run_part(task % parts, chunk, rows == 1 ? x : packed.data() + chunks.begin(chunk) * inputs);
  });
}

// The inputs [first, last) of rows, to panels that hold all inputs.
void sparsecc_matmul::pack_panels(const float* x, int64_t rows, int64_t first, int64_t last,
                                  float* packed) const {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, rows - row);
    linear_.help.pack_rows(x + row * linear_.inputs + first, linear_.inputs, count, last - first,
                           packed + row * linear_.inputs + first * count, count);
  }
}

// Of groups that are cut only partial sums, until the last piece is there.
void sparsecc_matmul::run_groups(Shares::Ranges groups, const RowChunk& chunk,
                                 PartialSums<float>& partial) const {
  const BlockView weight = block_->view(), pieces = block_->piece_view();
  for (const auto [begin, end] : groups) {
    if (begin < block_->groups) {
      multiply(weight, linear_.epilogue, begin, end, chunk, Target{chunk.y, linear_.outputs, 1});
      continue;
    }
    const int64_t first = begin - block_->groups, last = end - block_->groups;
    multiply(pieces, unfinished_, first, last, chunk, Target{partial.row(chunk.first), partial.stride(), 1});
    partial.done(chunk.number, first, last, [&](const Pieces::Whole& whole) {
      for (int64_t v = 0; v < weight.wide; ++v)
        join(partial.of(chunk.first, whole) + v * kGroup, partial.stride(), whole, weight.wide * kGroup,
             (whole.group * weight.wide + v) * kGroup, nullptr, chunk);
    });
  }
}

// A few groups of outputs at a time over all panels.
void sparsecc_matmul::multiply(const BlockView& weight, const Epilogue& epilogue, int64_t begin, int64_t end,
                               const RowChunk& chunk, Target target) const {
  const auto kernel = block_kernel(linear_.isa, weight.wide, block_->type());
  const int64_t at_once = chunk.rows <= kTileRows ? weight.outputs : kGroupsAtOnce;
  for (int64_t group = begin; group < end; group += at_once)
    for (int64_t row = 0; row < chunk.rows; row += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, chunk.rows - row);
      const BlockJob job{&weight,
                         group,
                         std::min(end, group + at_once),
                         chunk.x + row * linear_.inputs,
                         count,
                         static_cast<int>(count),
                         Target{target.y + row * target.row_stride, target.row_stride, 1},
                         &epilogue};
      kernel.run(&job);
    }
}

void sparsecc_matmul::join(const float* sums, int64_t stride, const Pieces::Whole& whole, int64_t width,
                           int64_t output, const int32_t* order, const RowChunk& chunk) const {
  const int64_t outputs = std::min<int64_t>(kGroup, linear_.outputs - output);
  if (outputs <= 0) return;
  const JoinJob job{sums,  stride,  whole.count,     width,           chunk.rows, output, outputs,
                    order, chunk.y, linear_.outputs, &linear_.epilogue};
  linear_.help.join(&job);
}

void sparsecc_matmul::run_slice(const float* x, int64_t rows, float* y,
                                const sparsecc_executor* executor) const {
  const SliceView weight = slice_->view();
  const auto kernel = slice_kernel(linear_.isa, weight.form, slice_->type());
  const int64_t inputs = linear_.inputs, whole = round_up(inputs, kGroup) + kGroup;
  Scratch<2> padded(rows * whole);  // windows are read whole, and much faster from aligned memory
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(x + row * inputs, inputs, padded.data() + row * whole);
    std::fill_n(padded.data() + row * whole + inputs, whole - inputs, 0.0f);
  }
  const RowChunk all{padded.data(), 0, 0, rows, y};
  const SliceView pieces = slice_->piece_view();
  PartialSums<float> partial(slice_->pieces, rows, 1, kGroup);
  const int64_t parts = slice_->shares.parts(wanted_tasks(executor));
  run_tasks(executor, parts, [&](int64_t part) {
    for (const auto [begin, end] : slice_->shares.of(part, parts)) {
      if (begin < slice_->groups) {
        const SliceJob job{&weight, begin, end, all.x, whole, static_cast<int>(rows), Target{y, linear_.outputs, 1},
                           &linear_.epilogue};
        kernel.run(&job);
        continue;
      }
      const int64_t first = begin - slice_->groups, last = end - slice_->groups;
      const SliceJob job{&pieces, first, last, all.x, whole, static_cast<int>(rows),
                         Target{partial.row(0), partial.stride(), 1}, &unfinished_};
      kernel.run(&job);
      partial.done(0, first, last, [&](const Pieces::Whole& group) {
        const int64_t output = group.group * kGroup;
        join(partial.of(0, group), partial.stride(), group, kGroup, output,
             weight.order, all);
      });
    }
  });
}

// Parts of the outputs, for each chunk of rows: as few as give every thread as many tasks as the others.
int64_t sparsecc_matmul::element_parts(int64_t row_chunks, int64_t threads) const {
  const Shares& shares = element_->shares;
  const int64_t for_threads = ceil_div(wanted_tasks(threads), row_chunks);
  int64_t parts = shares.parts(std::max(for_threads, ceil_div(linear_.outputs, kSumOutputs)));
  const auto uneven = [&] { return row_chunks * parts % threads != 0; };
  while (uneven() && row_chunks * parts < kMostTasks * threads && shares.parts(2 * parts) > parts) parts *= 2;
  return parts;
}

void sparsecc_matmul::run_element(const float* x, int64_t rows, float* y,
                                  const sparsecc_executor* executor) const {
  const ElementPack& weight = *element_;
  const auto kernel = element_kernel(linear_.isa, weight.tall);
  const int64_t inputs = linear_.inputs, outputs = linear_.outputs;
  const LaneChunks chunks(rows, kernel.tile.wide);
  const int64_t parts = element_parts(chunks.count(), thread_count(executor));
  run_tasks(executor, chunks.count() * parts, [&](int64_t task) {
    const int64_t chunk = task / parts, row = chunks.begin(chunk), count = chunks.size(chunk);
    const int wide = chunks.wide(chunk);
    const int64_t lanes = int64_t{wide} * kGroup;
    const Shares::Ranges mine = weight.shares.of(task % parts, parts);
    int64_t height = 0;  // outputs with running sums
    for (const auto [first, last] : mine) height += weight.outputs_of(first, last);
    if (height == 0) return;
    Scratch<0> panel(weight.block_inputs * lanes);
    Scratch<1> sums(round_up(height, weight.tall) * lanes);
    ElementJob job{};
    job.panel = panel.data();
    job.wide = wide;
    for (int64_t block = 0; block < weight.blocks; ++block) {
      const int64_t k = block * weight.block_inputs;
      linear_.help.pack_rows(x + row * inputs + k, inputs, count, std::min(weight.block_inputs, inputs - k),
                             panel.data(), lanes);
      job.sums = sums.data();
      for (const auto [first, last] : mine)
        for (int64_t c = first; c < last; ++c) {
          job.weight = weight.cell(c, block);
          job.bias = block == 0 ? linear_.epilogue.bias + weight.first_output(c) : nullptr;
          job.outputs = weight.outputs_of(c, c + 1);
          kernel.run(&job);
          job.sums += job.outputs * lanes;
        }
    }
    float* done = sums.data();
    for (const auto [first, last] : mine) {
      const int64_t output = weight.first_output(first), output_count = weight.outputs_of(first, last);
      linear_.help.finish(done, lanes, output_count, count, Target{y + row * outputs + output, outputs, 1},
                          &linear_.epilogue);
      done += output_count * lanes;
    }
  });
}
