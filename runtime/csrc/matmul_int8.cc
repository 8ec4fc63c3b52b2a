// y[rows, outputs] = act(x[rows, inputs] W^T + bias) with W in bytes and x brought to bytes on the way.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "int8.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr int64_t kCachedBytes = 384 * 1024;  // of packed x that stays in a second-level cache
constexpr int64_t kGroupsAtOnce = 8;          // groups of outputs per pass over the rows
constexpr int64_t kQuantized = 1 << 14;       // floats, at least, that are worth a task of their own
constexpr int64_t kScanned = 1 << 15;         // floats, at least, that are worth a task of their own

// Windows of each kernel.
constexpr int kWidth_quads = 0, kWidth_tiles = 0, kWidth_lanes = 0;
constexpr int kWidth_windows16 = kNarrow, kWidth_windows64 = kWide;

constexpr bool kVbmi_quads = false, kVbmi_tiles = false, kVbmi_windows16 = false;
constexpr bool kVbmi_windows64 = true, kVbmi_lanes = true;

// Of a block whose inputs are picked, where one of neighbours costs 1. NEON: by counted instructions.
double block_cost(ByteIsa isa, int width) {
  if (width == 0) return 1;
  if (width == kWide) return 1.25;
  switch (isa) {
    case ByteIsa::kAvx512:
      return 1.1;
    case ByteIsa::kNeon:
      return 1.4;
    case ByteIsa::kNeonDotprod:
      return 2.3;
    case ByteIsa::kNeonI8mm:
      return 3.2;
    default:
      return 1.65;
  }
}

// As DynamicQuantizeLinear: the range always holds 0, and the zero point is rounded to even.
ByteScale byte_scale(float low, float high) {
  ByteScale to{high == low ? 1.0f : (high - low) / 255.0f, 0};
  const float zero_point = std::nearbyint(0.0f - low / to.scale);
  if (zero_point > 0.0f) to.zero_point = static_cast<int32_t>(std::min(zero_point, 255.0f));  // not for NaN
  return to;
}

}  // namespace

std::vector<ByteKernel> byte_kernels(const char* wanted) {
  const bool one = wanted != nullptr && std::strchr(wanted, '-') != nullptr;
  const ByteIsa isa = one ? ByteIsa::kGeneric : choose_byte_isa(wanted);
  std::vector<ByteKernel> kernels;
#define SPARSECC_KERNEL(isa_of_row, kernel, Job, rows, wide)                                        \
  if (isa_usable(kByteIsa_##isa_of_row) && (!kVbmi_##kernel || vbmi_usable()) &&                                   \
      (one ? std::strcmp(wanted, #kernel "-" #isa_of_row) == 0                                           \
           : isa == kByteIsa_##isa_of_row || without_tiles(isa) == kByteIsa_##isa_of_row))                \
    kernels.push_back({#kernel "-" #isa_of_row, isa_of_row::kernel##_tile, isa_of_row::kernel,      \
                       &isa_of_row::kByteHelpers,                                                   \
                       std::strcmp(#kernel, "lanes") == 0 ? QuadOrder::kLanes : isa_of_row::kByteHelpers.order, \
                       kWidth_##kernel,                                                             \
                       block_cost(kByteIsa_##isa_of_row, kWidth_##kernel)});
#include "kernels_int8.inc"
#undef SPARSECC_KERNEL
  if (kernels.empty())
    throw Failure{"no kernel for products of bytes " + (one ? quoted(wanted) : isa_name(isa)) +
                  " can run here"};
  return kernels;
}

const char* byte_kernel_table() {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  if (isa_usable(kByteIsa_##isa) && (!kVbmi_##kernel || vbmi_usable())) text += #kernel "-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels_int8.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}

}  // namespace sparsecc

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

namespace {

// Rows left over that are worth 32 in the lanes; measured on Zen 5, as the costs below.
constexpr int64_t kLaneRowsFrom = 25;

// In blocks of neighbours, of 16 outputs by 4 inputs.
double lane_cost(const QuadPack& form) {
  return static_cast<double>(form.blocks()) * form.tall / kGroup * (form.tall == 8 ? 1.1 : 1.3);
}

// The form that takes least time: blocks of neighbours hold more zeros, blocks with picks cost more each. Beside it one
// with rows in the lanes, if many rows take less time in that.
std::vector<ByteForm> best_forms(const Weight& weight, const sparsecc_int8_weight_desc& desc) {
  const std::vector<ByteKernel> kernels = byte_kernels(desc.isa);
  const auto pack = [&](const ByteKernel& kernel) {
    return ByteForm{kernel, QuadPack(weight, desc, kernel.order, kernel.width)};
  };
  std::vector<ByteForm> forms;
  forms.push_back(pack(kernels[0]));
  const auto consider = [&](const ByteKernel* kernel, const auto& cost) {
    if (kernel == nullptr || kernel == kernels.data()) return;
    ByteForm other = pack(*kernel);
    if (cost(other) < cost(forms[0])) forms[0] = std::move(other);
  };
  const auto last = [&](const auto& wanted) -> const ByteKernel* {
    const auto found = std::find_if(kernels.rbegin(), kernels.rend(), wanted);
    return found == kernels.rend() ? nullptr : &*found;
  };
  const auto block_cost = [](const ByteForm& form) {
    return static_cast<double>(form.weight.blocks()) * form.kernel.cost;
  };
  if (weight.layout.rows % kGroup != 0 || weight.layout.cols % kQuad != 0)
    consider(last([](const ByteKernel& kernel) { return kernel.width > 0; }), block_cost);  // fullest and cheapest
  const double cost = block_cost(forms[0]);
  consider(last([](const ByteKernel& kernel) { return kernel.order == QuadOrder::kTiles; }),
           [](const ByteForm& form) { return estimated_cycles(form.kernel, form.weight); });
  const ByteKernel* const lanes = last([](const ByteKernel& kernel) { return kernel.order == QuadOrder::kLanes; });
  if (lanes == nullptr || forms[0].kernel.width == 0 || weight.layout.rows % 4 != 0) return forms;
  ByteForm other = pack(*lanes);
  if (lane_cost(other.weight) < cost) forms.push_back(std::move(other));
  return forms;
}

}  // namespace

sparsecc_int8_matmul::sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc)
    : sparsecc_int8_matmul(desc, read_int8_weight(desc)) {}

sparsecc_int8_matmul::sparsecc_int8_matmul(const sparsecc_int8_weight_desc& desc, const Weight& weight)
    : inputs_(weight.inputs),
      forms_(best_forms(weight, desc)),
      bias_(forms_[0].weight.groups * kGroup),
      epilogue_{bias_.data(), desc.activation, desc.alpha, desc.beta} {
  if (desc.bias != nullptr) std::copy_n(desc.bias, weight.outputs, bias_.data());
}

// Of so many, how many the second form takes.
int64_t sparsecc_int8_matmul::lane_rows(int64_t rows) const {
  if (forms_.size() == 1) return 0;
  const int64_t tail = rows % kLaneRows;
  return tail < kLaneRowsFrom ? rows - tail : rows;
}

const char* sparsecc_int8_matmul::kernel(int64_t rows) const {
  return lane_rows(rows) > 0 ? forms_[1].kernel.name : forms_[0].kernel.name;
}

ByteScale sparsecc_int8_matmul::scale_of(const float* x, int64_t count,
                                         const sparsecc_executor* executor) const {
  const int64_t tasks = std::clamp<int64_t>(count / kScanned, 1, thread_count(executor));
  if (tasks == 1) {
    float low = 0.0f, high = 0.0f;
    forms_[0].kernel.help->extremes(x, count, &low, &high);
    return byte_scale(low, high);
  }
  std::vector<float> low(static_cast<size_t>(tasks)), high(low);
  run_tasks(executor, tasks, [&](int64_t task) {
    const int64_t begin = count / tasks * task, end = task + 1 == tasks ? count : count / tasks * (task + 1);
    const size_t i = static_cast<size_t>(task);
    forms_[0].kernel.help->extremes(x + begin, end - begin, &low[i], &high[i]);
  });
  // NaN stands for x that is not finite, and wins.
  for (const float each : low)
    if (each != each) return byte_scale(each, each);
  return byte_scale(*std::min_element(low.begin(), low.end()), *std::max_element(high.begin(), high.end()));
}

namespace {

// Of one row as it lies in a panel, where it is written a whole step at a time. Windows overlap by half.
int64_t panel_bytes(int64_t inputs, const ByteKernel& kernel) {
  const int64_t whole = round_up(inputs, kQuantizeStep);
  return kernel.width == 0 ? whole / kQuad * quad_bytes(kernel.order) : whole * 2;
}

// Of a panel; those with rows in the lanes are always whole.
int64_t panel_height(const ByteKernel& kernel) {
  return kernel.order == QuadOrder::kLanes ? kLaneRows : kTileRows;
}

}  // namespace

// The inputs [first, last) of rows, to panels that hold all inputs; first is a multiple of kQuantizeStep, and 0
// for panels of windows.
void sparsecc_int8_matmul::pack(const ByteForm& form, Source x, int64_t first_row, int64_t rows, int64_t first,
                                int64_t last, ByteScale to, uint8_t* panels) const {
  const ByteKernel& kernel = form.kernel;
  const int64_t bytes = panel_bytes(inputs_, kernel), most = panel_height(kernel);
  for (int64_t row = 0; row < rows; row += most) {
    const int height = static_cast<int>(std::min(most, rows - row));
    const int64_t from = (first_row + row) * inputs_ + first;
    const int64_t stride = kernel.order == QuadOrder::kLanes ? most : height;
    uint8_t* panel = panels + row * bytes + first / kQuad * quad_bytes(kernel.order) * stride;
    const QuantizeJob job{x.x == nullptr ? nullptr : x.x + from, x.bytes == nullptr ? nullptr : x.bytes + from,
                          inputs_,    last - first,
                          height,     to,
                          panel};
    if (kernel.order == QuadOrder::kLanes) {
      kernel.help->quantize_lanes(&job);
    } else if (kernel.width == 0) {
      kernel.help->quantize(&job);
    } else {
      kernel.help->quantize_windows(&job, kernel.width);
    }
  }
}

// Of groups that are cut only partial sums, until the last piece is there.
void sparsecc_int8_matmul::multiply(const ByteForm& form, Shares::Ranges groups, const RowChunk& chunk,
                                    ByteScale scale, PartialSums<uint32_t>& partial) const {
  const int64_t whole_groups = form.weight.groups;
  const QuadView weight = form.weight.view(), pieces = form.weight.piece_view();
  const int64_t bytes = panel_bytes(inputs_, form.kernel);
  QuadJob job{&weight, 0, 0, nullptr, 0, bytes, scale, chunk.y, weight.outputs, &epilogue_, nullptr};
  QuadJob cut{&pieces, 0, 0, nullptr, 0, bytes, scale, nullptr, partial.stride(), &epilogue_, partial.row(chunk.first)};
  for (const auto [begin, end] : groups) {
    if (begin < whole_groups) {
      multiply(form.kernel, job, begin, end, chunk);
      continue;
    }
    const int64_t first = begin - whole_groups, last = end - whole_groups;
    multiply(form.kernel, cut, first, last, chunk);
    partial.done(chunk.number, first, last, [&](const Pieces::Whole& whole) {
      job.group_begin = whole.group;
      job.rows = static_cast<int>(chunk.rows);
      form.kernel.help->join(&job, partial.of(chunk.first, whole), partial.stride(), whole.count);
    });
  }
}

// A few groups of outputs at a time over all panels, so that neighbouring outputs of a row are written close
// together in time.
void sparsecc_int8_matmul::multiply(const ByteKernel& kernel, QuadJob job, int64_t begin, int64_t end,
                                    const RowChunk& chunk) const {
  const int64_t bytes = panel_bytes(inputs_, kernel), step = std::max(kTileRows, kernel.tile.rows);
  const int64_t groups = chunk.rows <= kTileRows ? end - begin : kGroupsAtOnce;
  const QuadJob first = job;
  for (int64_t group = begin; group < end; group += groups)
    for (int64_t row = 0; row < chunk.rows; row += step) {
      job.group_begin = group;
      job.group_end = std::min(end, group + groups);
      job.panel = chunk.panels + row * bytes;
      job.rows = static_cast<int>(std::min(step, chunk.rows - row));
      if (job.sums != nullptr) {
        job.sums = first.sums + row * job.row_stride;
      } else {
        job.y = first.y + row * job.row_stride;
      }
      kernel.run(&job);
    }
}

// Chunks of rows whose panels stay in cache. Where these are fewer than the tasks wanted, the outputs are cut
// too, by stored blocks, and then x is quantised beforehand: once, not by every task.
void sparsecc_int8_matmul::run(const ByteForm& form, Source x, ByteScale scale, int64_t rows, float* y,
                               const sparsecc_executor* executor) const {
  if (rows == 0) return;
  const QuadPack& weight = form.weight;
  const int64_t bytes = panel_bytes(inputs_, form.kernel), height = panel_height(form.kernel);
  const int64_t tasks = wanted_tasks(executor), step = std::max<int64_t>(height, form.kernel.tile.rows);
  const RowChunks chunks(rows, step, kCachedBytes / std::max<int64_t>(1, bytes * step), thread_count(executor));
  const int64_t parts = weight.shares.parts(ceil_div(tasks, chunks.count()));
  PartialSums<uint32_t> partial(weight.pieces, rows, chunks.count(), kGroup);
  const auto run_part = [&](int64_t part, int64_t chunk, const uint8_t* panels) {
    const int64_t row = chunks.begin(chunk);
    const RowChunk mine{panels, chunk, row, chunks.size(chunk), y + row * weight.outputs};
    multiply(form, weight.shares.of(part, parts), mine, scale, partial);
  };
  if (parts == 1) {
    run_tasks(executor, chunks.count(), [&](int64_t chunk) {
      Scratch<0, uint8_t> packed(round_up(chunks.size(chunk), height) * bytes);
      pack(form, x, chunks.begin(chunk), chunks.size(chunk), 0, inputs_, scale, packed.data());
      run_part(0, chunk, packed.data());
    });
    return;
  }
  Scratch<0, uint8_t> packed(round_up(rows, height) * bytes);
  const int64_t steps = ceil_div(inputs_, kQuantizeStep);
  const int64_t worth = std::min(steps, ceil_div(rows * inputs_, chunks.count() * kQuantized));
  const int64_t slices = form.kernel.width == 0 ? std::clamp<int64_t>(ceil_div(tasks, chunks.count()), 1,
                                                                  std::max<int64_t>(1, worth))
                                            : 1;
  run_tasks(executor, chunks.count() * slices, [&](int64_t task) {
    const int64_t chunk = task / slices, slice = task % slices, row = chunks.begin(chunk);
    const int64_t first = steps * slice / slices * kQuantizeStep;
    const int64_t last = std::min(inputs_, steps * (slice + 1) / slices * kQuantizeStep);
    pack(form, x, row, chunks.size(chunk), first, last, scale, packed.data() + row * bytes);
  });
  run_tasks(executor, chunks.count() * parts, [&](int64_t task) {
    const int64_t chunk = task / parts;
    run_part(task % parts, chunk, packed.data() + chunks.begin(chunk) * bytes);
  });
}

void sparsecc_int8_matmul::run(Source x, ByteScale scale, int64_t rows, float* y,
                               const sparsecc_executor* executor) const {
  const int64_t many = lane_rows(rows), values = many * inputs_;
  run(forms_.back(), x, scale, many, y, executor);
  const Source rest{x.x == nullptr ? nullptr : x.x + values, x.bytes == nullptr ? nullptr : x.bytes + values};
  run(forms_[0], rest, scale, rows - many, y + many * forms_[0].weight.outputs, executor);
}

void sparsecc_int8_matmul::run(const float* x, int64_t rows, float* y,
                               const sparsecc_executor* executor) const {
  run(Source{x, nullptr}, scale_of(x, rows * inputs_, executor), rows, y, executor);
}

void sparsecc_int8_matmul::run(const float* x, ByteScale scale, int64_t rows, float* y,
                               const sparsecc_executor* executor) const {
  run(Source{x, nullptr}, scale, rows, y, executor);
}

void sparsecc_int8_matmul::run(const uint8_t* x, ByteScale scale, int64_t rows, float* y,
                               const sparsecc_executor* executor) const {
  run(Source{nullptr, x}, scale, rows, y, executor);
}
