#include "recurrent.h"

#include <algorithm>
#include <cstring>

#include "common.h"
#include "schedule.h"

namespace sparsecc {
namespace {

constexpr int64_t kMostHidden = int64_t{1} << 20;
constexpr int64_t kPartBytes = int64_t{1} << 20;  // of x W^T that is made at once: stays in cache
constexpr int64_t kPartRows = 64;                 // but never fewer rows: products want some
// Multiplications worth handing to another thread (some 20 us), and those of one step that are.
constexpr int64_t kThreadWork = int64_t{1} << 18;
constexpr int64_t kStepWork = int64_t{1} << 19;

void check_weight(const sparsecc_weight_desc& desc, const char* name, int64_t outputs, int64_t inputs) {
  const std::string weight = std::string(name) + " weight ";
  if (desc.outputs != outputs)
    throw Failure{weight + "has " + show(desc.outputs) + " outputs, expected " + show(outputs) +
                  " (directions, gates and hidden units)"};
  if (inputs >= 0 && desc.inputs != inputs)
    throw Failure{weight + "has " + show(desc.inputs) + " inputs, expected " + show(inputs)};
  if (desc.bias != nullptr || desc.activation != SPARSECC_ACT_NONE)
    throw Failure{weight + "has a bias or an activation of its own"};
}

void check_layout(const Weight& weight, int64_t hidden) {
  if (hidden % weight.layout.rows != 0)
    throw Failure{"blocks of " + show(weight.layout.rows) + " outputs cross the gates of " + show(hidden) +
                  " hidden units"};
}

int64_t check_sizes(const sparsecc_recurrent_desc& desc) {
  if (desc.struct_size < sizeof(desc))
    throw Failure{"recurrent descriptor is " + show(static_cast<int64_t>(desc.struct_size)) +
                  " bytes, expected " + show(sizeof(desc)) + ": caller and library do not match"};
  if (desc.cell != SPARSECC_LSTM && desc.cell != SPARSECC_GRU) throw Failure{"unknown cell " + show(desc.cell)};
  if (desc.direction < SPARSECC_FORWARD || desc.direction > SPARSECC_BIDIRECTIONAL)
    throw Failure{"unknown direction " + show(desc.direction)};
  if (desc.hidden < 1 || desc.hidden > kMostHidden)
    throw Failure{"hidden is " + show(desc.hidden) + ", expected 1.." + show(kMostHidden)};
  return desc.hidden;
}

int64_t stored(const Weight& weight) {
  return static_cast<int64_t>(weight.column.size()) * weight.layout.rows * weight.layout.cols;
}

}  // namespace

CellKernels cell_kernels(Isa isa) {
  CellKernels found{};
#define SPARSECC_KERNEL(isa_of_row, kernel, Job, rows, wide) \
  if (isa == kIsa_##isa_of_row) found.kernel = isa_of_row::kernel;
#include "kernels_recurrent.inc"
#undef SPARSECC_KERNEL
  return found;
}

const char* cell_kernel_table() {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, kernel, Job, rows, wide) \
  if (isa_usable(kIsa_##isa)) text += #kernel "-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels_recurrent.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}

}  // namespace sparsecc

using namespace sparsecc;  // NOLINT: the operator's type is a C name and lies outside the namespace

// What one direction has in hand between its products with x and its steps.
struct sparsecc_recurrent::State {
  const Direction& direction;
  int64_t number;
  const sparsecc_recurrent_io& io;
  int64_t first, steps;  // of the sequence, as far as x_part reaches
  const float* x_part;   // [steps][batch][gates * hidden]
  float *h, *c;          // [batch][hidden]
  bool at_rest;          // h is zero before the first step done here
};

sparsecc_recurrent::sparsecc_recurrent(const sparsecc_recurrent_desc& desc)
    : cell_(static_cast<sparsecc_cell>(desc.cell)),
      before_reset_(desc.linear_before_reset != 0),
      hidden_(check_sizes(desc)),
      isa_(choose_isa(desc.isa)),
      cells_(cell_kernels(isa_)) {
  const int64_t count = desc.direction == SPARSECC_BIDIRECTIONAL ? 2 : 1, width = gates() * hidden_;
  check_weight(desc.input_weight, "input", count * width, -1);
  check_weight(desc.state_weight, "state", count * width, hidden_);
  const Weight input = read_weight(desc.input_weight), state = read_weight(desc.state_weight);
  check_layout(input, hidden_);
  check_layout(state, hidden_);
  inputs_ = input.inputs;
  state_weights_ = stored(state) / count;
  step_weights_ = state_weights_ + stored(input) / count;
  for (int64_t number = 0; number < count; ++number)
    directions_.push_back(make_direction(desc, number, input, state));
  kernels_ = std::string(lstm() ? "lstm_cell-" : "gru_cell-") + isa_name(isa_) + " " +
             directions_[0].input->kernel(1) + " " + directions_[0].state->kernel(1);
}

// All biases are added to the product with x, except where the reset gate multiplies a biased product.
sparsecc_recurrent::Direction sparsecc_recurrent::make_direction(const sparsecc_recurrent_desc& desc,
                                                                 int64_t number, const Weight& input,
                                                                 const Weight& state) const {
  const int64_t width = gates() * hidden_, first = number * width, biased_later = 2 * hidden_;
  const bool split = !lstm() && !before_reset_, late = !lstm() && before_reset_;
  Direction direction;
  direction.reverse = desc.direction == SPARSECC_REVERSE || number == 1;
  direction.at_rest = Buffer<float>(width + kGroup);
  Buffer<float> bias(width);
  if (desc.bias != nullptr) {
    const float *of_w = desc.bias + number * 2 * width, *of_r = of_w + width;
    for (int64_t i = 0; i < width; ++i) {
      const bool with_state = late && i >= biased_later;
      bias[i] = with_state ? of_w[i] : of_w[i] + of_r[i];
      direction.at_rest[i] = with_state ? of_r[i] : 0.0f;
    }
  }
  sparsecc_weight_desc part = desc.input_weight;
  part.isa = desc.isa;
  part.bias = bias.data();
  direction.input = std::make_unique<sparsecc_matmul>(part, part_of(input, first, width));
  part.bias = direction.at_rest.data();
  direction.state =
      std::make_unique<sparsecc_matmul>(part, part_of(state, first, split ? biased_later : width));
  part.bias = nullptr;
  if (split)
    direction.candidate =
        std::make_unique<sparsecc_matmul>(part, part_of(state, first + biased_later, hidden_));
  return direction;
}

int64_t sparsecc_recurrent::steps_at_once(int64_t steps, int64_t batch) const {
  const int64_t row_bytes = gates() * hidden_ * static_cast<int64_t>(sizeof(float));
  const int64_t rows = std::max(kPartRows, kPartBytes / row_bytes);
  return std::clamp<int64_t>(rows / batch, 1, steps);
}

void sparsecc_recurrent::run(const sparsecc_recurrent_io& io, const sparsecc_executor* executor) const {
  if (io.batch == 0) return;
  for (int64_t row = 0; io.lengths != nullptr && row < io.batch; ++row)
    if (io.lengths[row] < 0 || io.lengths[row] > io.steps)
      throw Failure{"length " + show(io.lengths[row]) + " of a sequence is not in 0.." + show(io.steps)};
  const int64_t count = static_cast<int64_t>(directions_.size());
  const bool small = step_weights_ * io.batch * io.steps < kThreadWork;
  if (small) executor = nullptr;
  if (count > 1 && io.batch < thread_count(executor))
    return run_tasks(executor, count, [&](int64_t number) { run_direction(number, io, nullptr); });
  for (int64_t number = 0; number < count; ++number) run_direction(number, io, executor);
}

void sparsecc_recurrent::run_direction(int64_t number, const sparsecc_recurrent_io& io,
                                       const sparsecc_executor* executor) const {
  const Direction& direction = directions_[static_cast<size_t>(number)];
  const int64_t size = io.batch * hidden_, width = gates() * hidden_;
  float *h = io.y_h + number * size, *c = lstm() ? io.y_c + number * size : nullptr;
  const auto start = [&](float* to, const float* from) {
    if (to == nullptr) return;
    if (from == nullptr) {
      std::fill_n(to, size, 0.0f);
    } else {
      std::copy_n(from + number * size, size, to);
    }
  };
  start(h, io.initial_h);
  start(c, io.initial_c);
  const int64_t most = io.steps == 0 ? 0 : steps_at_once(io.steps, io.batch);
  Scratch<8> x_part(most * io.batch * width + kGroup);
  const int64_t parts = std::min(io.batch, thread_count(executor));
  for (int64_t done = 0; done < io.steps;) {
    const int64_t steps = std::min(most, io.steps - done);
    const int64_t first = direction.reverse ? io.steps - done - steps : done;
    direction.input->run(io.x + first * io.batch * inputs_, steps * io.batch, x_part.data(), executor);
    const State state{direction, number,        io, first, steps, x_part.data(),
                      h,         c, done == 0 && io.initial_h == nullptr};
    // The rows of a batch never meet: each part goes through all steps without waiting for the others.
    run_tasks(executor, parts, [&](int64_t part) {
      const int64_t begin = part * io.batch / parts, end = (part + 1) * io.batch / parts;
      run_steps(state, begin, end - begin, parts == 1 ? executor : nullptr);
    });
    done += steps;
  }
  // As in onnxruntime: what has not even one step ends in zeros, whatever it started from.
  for (int64_t row = 0; io.lengths != nullptr && row < io.batch; ++row)
    for (float* last : {h, c})
      if (last != nullptr && io.lengths[row] == 0) std::fill_n(last + row * hidden_, hidden_, 0.0f);
}

void sparsecc_recurrent::run_steps(const State& state, int64_t first_row, int64_t rows,
                                   const sparsecc_executor* executor) const {
  const int64_t width = gates() * hidden_;
  const bool split = state.direction.candidate != nullptr;
  Scratch<9> products(rows * width + kGroup);
  Scratch<10> resets(split ? rows * 2 * hidden_ + kGroup : 0);
  float* candidate = split ? resets.data() + rows * hidden_ : nullptr;
  if (state_weights_ * rows < kStepWork) executor = nullptr;
  for (int64_t i = 0; i < state.steps; ++i) {
    const int64_t step = state.first + (state.direction.reverse ? state.steps - 1 - i : i);
    const bool at_rest = state.at_rest && i == 0;
    if (!at_rest) state.direction.state->run(state.h + first_row * hidden_, rows, products.data(), executor);
    run_cells(state, step, first_row, rows, products.data(), resets.data(), candidate, at_rest, executor);
  }
}

void sparsecc_recurrent::run_cells(const State& state, int64_t step, int64_t row, int64_t rows,
                                   const float* h_part, float* reset_h, float* candidate, bool at_rest,
                                   const sparsecc_executor* executor) const {
  const sparsecc_recurrent_io& io = state.io;
  const int64_t width = gates() * hidden_, product = candidate == nullptr ? width : 2 * hidden_;
  const float* x_part = state.x_part + ((step - state.first) * io.batch + row) * width;
  float *h = state.h + row * hidden_, *c = lstm() ? state.c + row * hidden_ : nullptr;
  float* y = io.y + ((step * static_cast<int64_t>(directions_.size()) + state.number) * io.batch + row) * hidden_;
  const auto part = [&](int64_t i) { return at_rest ? state.direction.at_rest.data() : h_part + i * product; };
  if (candidate != nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      const GruResetJob job{x_part + i * width, part(i), h + i * hidden_, reset_h + i * hidden_, hidden_};
      cells_.gru_reset(&job);
    }
    state.direction.candidate->run(reset_h, rows, candidate, executor);
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (io.lengths != nullptr && step >= io.lengths[row + i]) {
      std::fill_n(y + i * hidden_, hidden_, 0.0f);
    } else if (lstm()) {
      const LstmCellJob job{x_part + i * width, part(i), c + i * hidden_, h + i * hidden_, y + i * hidden_,
                            hidden_};
      cells_.lstm_cell(&job);
    } else {
      const GruCellJob job{x_part + i * width, part(i),          candidate == nullptr ? nullptr : candidate + i * hidden_,
                           h + i * hidden_,    y + i * hidden_, hidden_};
      cells_.gru_cell(&job);
    }
  }
}
