#include "float_tiles.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "half.h"
#include "operator.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr int64_t kCachedBytes = 1024 * 1024;  // of packed x: half of the second-level cache where there is AMX
constexpr int64_t kGroupsAtOnce = 8;           // groups of outputs per pass over the rows

std::optional<FloatTileKernel> find_kernel(ByteIsa isa, int wide) {
#define SPARSECC_KERNEL(isa_of_row, kernel, Job, rows, wide_of_row)                                 \
  if (isa == kByteIsa_##isa_of_row && wide == wide_of_row && bf16_tiles_usable(isa))                \
    return FloatTileKernel{#kernel "-" #isa_of_row, isa_of_row::kernel##_tile, isa_of_row::kernel, \
                           &isa_of_row::kFloatTileHelpers};
#include "kernels_tiles.inc"
#undef SPARSECC_KERNEL
  (void)isa, (void)wide;  // other processors have no tiles
  return std::nullopt;
}

}  // namespace

const char* float_tile_kernel_table() {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  if (bf16_tiles_usable(kByteIsa_##isa)) text += #kernel "-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels_tiles.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}

std::optional<FloatTiles> FloatTiles::of(const Weight& weight, const char* isa) {
  if (weight.type != SPARSECC_BFLOAT16 || !has_block_kernel(weight.layout)) return std::nullopt;
  const int wide = weight.layout.rows % (2 * kGroup) == 0 ? 2 : 1;
  const std::optional<FloatTileKernel> kernel = find_kernel(choose_byte_isa(isa), wide);
  if (!kernel.has_value()) return std::nullopt;
  const Rows rows = expand_rows(weight, wide * kGroup);
  // Infinity times the nothing that a part of x may be would be NaN.
  if (!std::all_of(rows.value.begin(), rows.value.end(), [](float value) { return std::isfinite(value); }))
    return std::nullopt;
  FloatTiles tiles(rows, *kernel);
  if (tiles.least_rows_ > kTileRows) return std::nullopt;
  return tiles;
}

FloatTiles::FloatTiles(const Rows& rows, FloatTileKernel kernel)
    : kernel_(kernel),
      outputs_(rows.outputs),
      inputs_(rows.inputs),
      groups_(ceil_div(rows.outputs, rows.tall)),
      start_(groups_ + 1) {
  const auto unit_of = [&](int64_t group) { return rows.start[static_cast<size_t>(group)]; };
  for (int64_t group = 0; group < groups_; ++group)
    start_[group + 1] = start_[group] + ceil_div(unit_of(group + 1) - unit_of(group), kTileInputs);
  const int64_t tiles = start_[groups_];
  index_ = Buffer<uint32_t>(tiles * kTileInputs);
  values_ = Buffer<uint16_t>(tiles * kTileInputs * rows.tall);
  std::fill_n(index_.data(), index_.size(), static_cast<uint32_t>(inputs_));
  for (int64_t group = 0; group < groups_; ++group)
    for (int64_t unit = unit_of(group); unit < unit_of(group + 1); ++unit) {
      const int64_t place = start_[group] * kTileInputs + unit - unit_of(group);
      index_[place] = rows.column[static_cast<size_t>(unit)];
      uint16_t* const to = values_.data() + place / kTileInputs * kTileInputs * rows.tall + place % kTileInputs;
      for (int64_t output = 0; output < rows.tall; ++output)
        to[output * kTileInputs] =
            narrow(rows.value[static_cast<size_t>(unit * rows.tall + output)], SPARSECC_BFLOAT16);
    }
  least_rows_ = least_rows_of_tiles(tiles, unit_of(groups_), kernel.tile.wide);
  shares_ = Shares(start_.data(), groups_, 1);
}

void FloatTiles::split(const float* x, int64_t rows, uint16_t* panels) const {
  for (int64_t row = 0; row < rows; row += kTileRows, panels += panel_size()) {
    const SplitJob job{x + row * inputs_, inputs_, inputs_,
                       static_cast<int>(std::min<int64_t>(kTileRows, rows - row)), panels};
    kernel_.help->split(&job);
  }
}

void FloatTiles::multiply(Shares::Ranges groups, const uint16_t* panels, int64_t rows, float* y,
                          const Epilogue& epilogue) const {
  const FloatTileView weight{start_.data(), index_.data(), values_.data(), kernel_.tile.wide, outputs_};
  for (const auto [begin, end] : groups)
    for (int64_t group = begin; group < end; group += kGroupsAtOnce)
      for (int64_t row = 0; row < rows; row += kTilePanelRows) {
        const FloatTileJob job{&weight,
                               group,
                               std::min(end, group + kGroupsAtOnce),
                               panels + row / kTileRows * panel_size(),
                               panel_size(),
                               static_cast<int>(std::min<int64_t>(kTilePanelRows, rows - row)),
                               y + row * outputs_,
                               outputs_,
                               &epilogue};
        kernel_.run(&job);
      }
}

// As blocks are run (matmul.cc): chunks of rows, and outputs dealt too where there are fewer chunks than tasks.
void FloatTiles::run(const float* x, int64_t rows, float* y, const Epilogue& epilogue,
                     const sparsecc_executor* executor) const {
  const int64_t panels = ceil_div(rows, kTileRows), tasks = wanted_tasks(executor);
  const int64_t fit = kCachedBytes / (panel_size() * static_cast<int64_t>(sizeof(uint16_t)));
  const int64_t chunk_panels = std::clamp<int64_t>(fit, 1, ceil_div(panels, std::min(tasks, panels)));
  const int64_t chunks = ceil_div(panels, chunk_panels), chunk = chunk_panels * kTileRows;
  const int64_t parts = shares_.parts(ceil_div(tasks, chunks));
  const auto rows_of = [&](int64_t row) { return std::min(chunk, rows - row); };
  if (parts == 1) {
    run_tasks(executor, chunks, [&](int64_t i) {
      const int64_t row = i * chunk;
      Scratch<0, uint16_t> packed(chunk_panels * panel_size());
      split(x + row * inputs_, rows_of(row), packed.data());
      multiply(shares_.of(0, 1), packed.data(), rows_of(row), y + row * outputs_, epilogue);
    });
    return;
  }
  Scratch<0, uint16_t> packed(panels * panel_size());
  run_tasks(executor, panels, [&](int64_t panel) {
    const int64_t row = panel * kTileRows;
    split(x + row * inputs_, std::min<int64_t>(kTileRows, rows - row), packed.data() + panel * panel_size());
  });
  run_tasks(executor, chunks * parts, [&](int64_t task) {
    const int64_t row = task / parts * chunk;
    multiply(shares_.of(task % parts, parts), packed.data() + row / kTileRows * panel_size(), rows_of(row),
             y + row * outputs_, epilogue);
  });
}

}  // namespace sparsecc
