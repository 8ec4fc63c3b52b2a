// Attention and normalisation: dense operators around the sparse products of a transformer.
#include <algorithm>
#include <cstring>
#include <string>

#include "common.h"
#include "c_guard.h"
#include "isa.h"
#include "kernels_transformer.h"
#include "schedule.h"
#include "sparsecc/c_api.h"

namespace sparsecc {
namespace {

constexpr int64_t kScoreBytes = 24 * 1024;  // of a block of queries, so that they stay in a first-level cache
constexpr int64_t kLargest = int64_t{1} << 40;
constexpr int64_t kRowTask = 1 << 13;  // floats, at least, that are worth a task of their own

const TransformerHelpers& transformer(Isa isa) {
#define SPARSECC_KERNEL(isa_of_row, rows, wide) \
  if (isa == kIsa_##isa_of_row) return isa_of_row::kTransformer;
#include "kernels_transformer.inc"
#undef SPARSECC_KERNEL
  throw Failure{std::string("no attention kernel for ") + isa_name(isa)};
}

void in_range(const char* name, int64_t value) {
  if (value < 0 || value > kLargest) throw Failure{std::string(name) + " is negative or too large"};
}

void check(const sparsecc_attention_desc& a) {
  if (a.struct_size != sizeof(a)) throw Failure{"struct_size of the attention is wrong"};
  const int64_t sizes[] = {a.batch, a.heads, a.queries, a.keys, a.head_size};
  for (const int64_t size : sizes) in_range("a size of the attention", size);
  for (int i = 0; i < 3; ++i)
    for (const int64_t* strides : {a.q_strides, a.k_strides, a.v_strides, a.y_strides})
      in_range("a stride of the attention", strides[i]);
  for (const int64_t stride : a.mask_strides) in_range("a stride of the mask", stride);
  if (a.mask_strides[3] > 1) throw Failure{"the last stride of the mask must be 0 or 1"};
  if (a.head_size > INT32_MAX || a.keys > INT32_MAX) throw Failure{"head size or keys are too large"};
}

struct AttentionShape {
  const TransformerHelpers& help;
  int64_t keys_wide, size_wide, block_rows;
};

// Queries [first, first + count) of one head.
void attention_task(const sparsecc_attention_desc& a, const AttentionShape& shape, int64_t batch, int64_t head,
                    int64_t first, int64_t count) {
  const auto at = [&](const int64_t (&strides)[3]) { return batch * strides[0] + head * strides[2]; };
  const int64_t packed_keys = a.head_size * shape.keys_wide, packed_values = a.keys * shape.size_wide;
  Scratch<0> packed(packed_keys + packed_values);
  Scratch<1> working(shape.block_rows * (shape.keys_wide + a.head_size));
  const AttentionPackJob pack{a.k + at(a.k_strides),
                              a.v + at(a.v_strides),
                              a.k_strides[1],
                              a.v_strides[1],
                              a.keys,
                              shape.keys_wide,
                              a.head_size,
                              shape.size_wide,
                              packed.data(),
                              packed.data() + packed_keys};
  shape.help.pack_attention(&pack);
  AttentionJob job{};
  job.q = a.q + at(a.q_strides) + first * a.q_strides[1];
  job.q_stride = a.q_strides[1];
  job.queries = count;
  job.keys_t = pack.keys_t;
  job.values = pack.values;
  job.keys = a.keys;
  job.keys_wide = shape.keys_wide;
  job.size = a.head_size;
  job.size_wide = shape.size_wide;
  if (a.mask != nullptr)
    job.mask =
        a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1] + first * a.mask_strides[2];
  job.mask_row_stride = a.mask_strides[2];
  job.mask_key_stride = a.mask_strides[3];
  job.scale = a.scale;
  job.y = a.y + at(a.y_strides) + first * a.y_strides[1];
  job.y_stride = a.y_strides[1];
  job.scores = working.data();
  job.turned = working.data() + shape.block_rows * shape.keys_wide;
  job.block_rows = shape.block_rows;
  shape.help.attention(&job);
}

// One task a head, or several with some of its queries each where heads alone are too few; packing the keys is
// repeated then.
void run_attention(const sparsecc_attention_desc& a, const sparsecc_executor* executor) {
  const int64_t heads = a.batch * a.heads;
  if (heads == 0 || a.queries == 0 || a.head_size == 0) return;
  if (a.keys == 0) {
    for (int64_t i = 0; i < heads * a.queries; ++i) {
      const int64_t row = i / a.heads;
      std::fill_n(a.y + row / a.queries * a.y_strides[0] + row % a.queries * a.y_strides[1] +
                      i % a.heads * a.y_strides[2],
                  a.head_size, 0.0f);
    }
    return;
  }
  const TransformerHelpers& help = transformer(choose_isa(a.isa));
  const int64_t keys_wide = round_up(a.keys, kGroup), rows = help.attention_tile.rows;
  const int64_t fit = kScoreBytes / (keys_wide * 4) / rows * rows;
  const AttentionShape shape{help, keys_wide, round_up(a.head_size, kGroup),
                             std::clamp<int64_t>(fit, rows, kMostBlockRows / rows * rows)};
  const int64_t tasks = wanted_tasks(executor);
  const int64_t parts = std::clamp<int64_t>(ceil_div(tasks, heads), 1, ceil_div(a.queries, rows));
  run_tasks(executor, heads * parts, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    const int64_t first = part * a.queries / parts, last = (part + 1) * a.queries / parts;
    attention_task(a, shape, head / a.heads, head % a.heads, first, last - first);
  });
}

void check(const sparsecc_norm_desc& n) {
  if (n.struct_size != sizeof(n)) throw Failure{"struct_size of the norm is wrong"};
  in_range("rows", n.rows);
  in_range("size", n.size);
  if (n.residual != nullptr && (n.residual_rows < 1 || n.residual_rows > kLargest))
    throw Failure{"residual_rows must be at least 1"};
}

// task(first row, number of rows) over all rows of `size` floats.
template <class Task>
void run_rows(int64_t rows, int64_t size, const sparsecc_executor* executor, const Task& task) {
  const int64_t worth = std::max<int64_t>(1, rows * size / kRowTask);
  const int64_t tasks = std::min({wanted_tasks(executor), worth, rows});
  run_tasks(executor, tasks, [&](int64_t i) {
    const int64_t first = i * rows / tasks;
    task(first, (i + 1) * rows / tasks - first);
  });
}

void run_norm(const sparsecc_norm_desc& n, const sparsecc_executor* executor) {
  const TransformerHelpers& help = transformer(choose_isa(n.isa));
  run_rows(n.rows, n.size, executor, [&](int64_t first, int64_t rows) {
    const int64_t offset = first * n.size;
    const NormJob job{n.x + offset,
                      n.residual,
                      first,
                      n.residual_rows,
                      n.gain,
                      n.shift,
                      n.y + offset,
                      n.sum == nullptr ? nullptr : n.sum + offset,
                      rows,
                      n.size,
                      n.epsilon,
                      n.centred != 0};
    help.norm(&job);
  });
}

}  // namespace
}  // namespace sparsecc

using namespace sparsecc;  // NOLINT: the C functions lie outside the namespace

int sparsecc_attention_run(const sparsecc_attention_desc* attention, const sparsecc_executor* executor,
                           char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(attention != nullptr, "attention must not be null");
    check(*attention);
    const bool empty = attention->batch == 0 || attention->heads == 0 || attention->queries == 0 ||
                       attention->head_size == 0;
    require(empty || (attention->q != nullptr && attention->y != nullptr), "q and y must not be null");
    require(empty || attention->keys == 0 || (attention->k != nullptr && attention->v != nullptr),
            "k and v must not be null");
    run_attention(*attention, executor);
  });
}

int sparsecc_norm_run(const sparsecc_norm_desc* norm, const sparsecc_executor* executor, char* error,
                      size_t error_size) {
  return guard(error, error_size, [&] {
    require(norm != nullptr, "norm must not be null");
    check(*norm);
    if (norm->rows == 0 || norm->size == 0) return;
    require(norm->x != nullptr && norm->gain != nullptr && norm->y != nullptr,
            "x, gain and y must not be null");
    run_norm(*norm, executor);
  });
}

int sparsecc_gate_run(const float* x, int64_t rows, int64_t size, sparsecc_activation activation,
                      const char* isa, float* y, const sparsecc_executor* executor, char* error,
                      size_t error_size) {
  return guard(error, error_size, [&] {
    in_range("rows", rows);
    in_range("size", size);
    require(activation >= SPARSECC_ACT_NONE && activation <= SPARSECC_ACT_HARD_SWISH &&
                activation != SPARSECC_ACT_LEAKY_RELU && activation != SPARSECC_ACT_CLIP,
            "the activation of a gate must be one without parameters");
    if (rows == 0 || size == 0) return;
    require(x != nullptr && y != nullptr, "x and y must not be null");
    const TransformerHelpers& help = transformer(choose_isa(isa));
    run_rows(rows, size, executor, [&](int64_t first, int64_t count) {
      const GateJob job{x + first * 2 * size, y + first * size, count, size, {nullptr, activation, 0, 0}};
      help.gate(&job);
    });
  });
}

const char* sparsecc_transformer_kernel_table(void) {
  static const std::string table = [] {
    std::string text;
#define SPARSECC_KERNEL(isa, rows, wide) \
  if (isa_usable(kIsa_##isa)) text += "attention-" #isa " " #isa " " #rows "x" #wide "\n";
#include "kernels_transformer.inc"
#undef SPARSECC_KERNEL
    return text;
  }();
  return table.c_str();
}
