// Attention and normalisation: dense operators around the sparse products of a transformer.
#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "common.h"
#include "c_guard.h"
#include "schedule.h"
#include "sparsecc/c_api.h"
#include "transformer.h"

namespace sparsecc {

const TransformerHelpers& transformer_helpers(Isa isa) {
#define SPARSECC_KERNEL(isa_of_row, rows, wide) \
  if (isa == kIsa_##isa_of_row) return isa_of_row::kTransformer;
#include "kernels_transformer.inc"
#undef SPARSECC_KERNEL
  throw Failure{std::string("no attention kernel for ") + isa_name(isa)};
}

namespace {

constexpr int64_t kLargest = int64_t{1} << 40;

void in_range(const char* name, int64_t value) {
  if (value < 0 || value > kLargest) throw Failure{std::string(name) + " is negative or too large"};
}

}  // namespace

void check_attention(const sparsecc_attention_desc& a) {
  if (a.struct_size != sizeof(a)) throw Failure{"struct_size of the attention is wrong"};
  const int64_t sizes[] = {a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.head_size};
  for (const int64_t size : sizes) in_range("a size of the attention", size);
  for (int i = 0; i < 3; ++i)
    for (const int64_t* strides : {a.q_strides, a.k_strides, a.v_strides, a.y_strides})
      in_range("a stride of the attention", strides[i]);
  for (const int64_t stride : a.rotary_strides) in_range("a stride of the cosines", stride);
  for (const int64_t stride : a.mask_strides) in_range("a stride of the mask", stride);
  if (a.kv_heads == 0 ? a.heads != 0 : a.heads % a.kv_heads != 0)
    throw Failure{"kv_heads does not divide heads"};
  if ((a.cosines == nullptr) != (a.sines == nullptr)) throw Failure{"cosines or sines are missing"};
  if (a.cosines != nullptr && (a.queries != a.keys || a.head_size % 2 != 0))
    throw Failure{"rotary positions need an even head size and as many queries as keys"};
  if (a.mask_strides[3] > 1) throw Failure{"the last stride of the mask must be 0 or 1"};
  if (a.head_size > INT32_MAX || a.keys > INT32_MAX) throw Failure{"head size or keys are too large"};
}

namespace {

constexpr int64_t kRowTask = 1 << 13;  // floats, at least, that are worth a task of their own

struct AttentionShape {
  const TransformerHelpers& help;
  int64_t keys_wide, size_wide, block_rows;
  int64_t group;  // heads of q that share one of k and v
};

// Turns rows of one head, where there are cosines; else says where they are. Returns their stride too.
std::pair<const float*, int64_t> turned(const sparsecc_attention_desc& a, const TransformerHelpers& help,
                                        const float* x, int64_t stride, int64_t batch, int64_t first,
                                        int64_t rows, float* to) {
  if (a.cosines == nullptr) return {x, stride};
  const int64_t table = batch * a.rotary_strides[0] + first * a.rotary_strides[1];
  const RotaryJob job{x,    stride,      a.cosines + table, a.sines + table, a.rotary_strides[1],
                      rows, a.head_size, to};
  help.rotate(&job);
  return {to, a.head_size};
}

// How many keys, from the first, any of some rows of the mask does not hide, up to a whole group; all keys if a row
// hides all of them: what it adds to the scores counts then.
int64_t visible_keys(const AttentionJob& job) {
  if (job.mask == nullptr || job.mask_key_stride == 0) return job.keys;
  int64_t groups = 0;
  for (int64_t row = 0; row < (job.mask_row_stride == 0 ? 1 : job.queries); ++row) {
    const float* mask = job.mask + row * job.mask_row_stride;
    int64_t group = ceil_div(job.keys, kGroup);
    for (bool seen = false; !seen; --group) {
      if (group == 0) return job.keys;
      const int64_t first = (group - 1) * kGroup, last = std::min<int64_t>(job.keys, group * kGroup);
      for (int64_t key = first; key < last; ++key) seen |= !(mask[key] <= kHidden);
      if (seen) groups = std::max(groups, group);
    }
  }
  return std::min(job.keys, groups * kGroup);
}

// Rows [first, first + count) of the queries of all heads that share a head of keys, one head after the other.
void attention_task(const sparsecc_attention_desc& a, const AttentionShape& shape, int64_t batch,
                    int64_t kv_head, int64_t first, int64_t count) {
  const int64_t packed_keys = a.head_size * shape.keys_wide, packed_values = a.keys * shape.size_wide;
  const bool rotary = a.cosines != nullptr;
  Scratch<0> packed(packed_keys + packed_values);
  Scratch<1> working(shape.block_rows * (shape.keys_wide + 2 * a.head_size));
  Scratch<2> turned_keys(rotary ? a.keys * a.head_size : 0);
  float* turned_queries = working.data() + shape.block_rows * (shape.keys_wide + a.head_size);
  const auto [k, k_stride] =
      turned(a, shape.help, a.k + offset(a.k_strides, batch, 0, kv_head), a.k_strides[1], batch, 0, a.keys,
             turned_keys.data());
  const AttentionPackJob pack{k,
                              a.v + offset(a.v_strides, batch, 0, kv_head),
                              k_stride,
                              a.v_strides[1],
                              a.keys,
                              shape.keys_wide,
                              a.head_size,
                              shape.size_wide,
                              packed.data(),
                              packed.data() + packed_keys};
  shape.help.pack_attention(&pack);
  AttentionJob job{};
  job.keys_t = pack.keys_t;
  job.values = pack.values;
  job.keys_wide = shape.keys_wide;
  job.size = a.head_size;
  job.size_wide = shape.size_wide;
  job.mask_row_stride = a.mask_strides[2];
  job.mask_key_stride = a.mask_strides[3];
  job.scale = a.scale;
  job.y_stride = a.y_strides[1];
  job.scores = working.data();
  job.score_stride = shape.keys_wide;
  job.turned = working.data() + shape.block_rows * shape.keys_wide;
  for (int64_t at = first; at < first + count; at += job.queries) {
    const int64_t head = kv_head * shape.group + at / a.queries, row = at % a.queries;
    job.queries = std::min({shape.block_rows, a.queries - row, first + count - at});
    std::tie(job.q, job.q_stride) = turned(a, shape.help, a.q + offset(a.q_strides, batch, row, head),
                                           a.q_strides[1], batch, row, job.queries, turned_queries);
    if (a.mask != nullptr)
      job.mask = a.mask + batch * a.mask_strides[0] + head * a.mask_strides[1] + row * a.mask_strides[2];
    job.y = a.y + offset(a.y_strides, batch, row, head);
    job.keys = a.keys;
    job.keys = visible_keys(job);
    shape.help.attention(&job);
  }
}

// One task a head of keys, or several with some of the queries each where heads alone are too few; packing the keys
// is repeated then.
void run_attention(const sparsecc_attention_desc& a, const sparsecc_executor* executor) {
  if (a.batch == 0 || a.heads == 0 || a.queries == 0 || a.head_size == 0) return;
  if (a.keys == 0) {
    for (int64_t i = 0; i < a.batch * a.heads * a.queries; ++i) {
      const int64_t row = i / a.heads;
      std::fill_n(a.y + offset(a.y_strides, row / a.queries, row % a.queries, i % a.heads), a.head_size, 0.0f);
    }
    return;
  }
  const TransformerHelpers& help = transformer_helpers(choose_isa(a.isa));
  const int64_t keys_wide = round_up(a.keys, kGroup), rows = help.attention_tile.rows;
  const int64_t fit = kScoreBytes / (keys_wide * 4) / rows * rows;
  const AttentionShape shape{help, keys_wide, round_up(a.head_size, kGroup),
                             std::clamp<int64_t>(fit, rows, kMostBlockRows / rows * rows),
                             a.heads / a.kv_heads};
  const int64_t kv_heads = a.batch * a.kv_heads, queries = shape.group * a.queries;
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted_tasks(executor), kv_heads), 1, ceil_div(queries, rows));
  run_tasks(executor, kv_heads * parts, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    const int64_t first = part * queries / parts, last = (part + 1) * queries / parts;
    attention_task(a, shape, head / a.kv_heads, head % a.kv_heads, first, last - first);
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
  const TransformerHelpers& help = transformer_helpers(choose_isa(n.isa));
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
    check_attention(*attention);
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
    const TransformerHelpers& help = transformer_helpers(choose_isa(isa));
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
