#include "weight.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "common.h"
#include "half.h"

namespace sparsecc {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 24;  // outputs, inputs
constexpr int64_t kMaxGrid = int64_t{1} << 31;  // outputs * inputs
constexpr int kMaxGroup = 16;                   // M of N:M
constexpr int kMaxBlock = 64;                   // R and C of RxC

// Reads one or two digits; the layout text is short, so that anything longer is an error anyway.
int read_number(const char*& at) {
  int number = 0, digits = 0;
  while (*at >= '0' && *at <= '9' && digits < 3) {
    number = number * 10 + (*at++ - '0');
    ++digits;
  }
  return digits == 0 || digits > 2 ? -1 : number;
}

[[noreturn]] void bad_layout(const char* text) {
  throw Failure{"unknown layout " + quoted(text) +
                ": expected \"unstructured\", \"N:M\" (N < M <= 16) or \"RxC\" (1..64 each)"};
}

void check_sizes(const sparsecc_weight_desc& desc) {
  if (desc.struct_size < sizeof(sparsecc_weight_desc))
    throw Failure{"weight descriptor is " + show(static_cast<int64_t>(desc.struct_size)) +
                  " bytes, expected " + show(sizeof(sparsecc_weight_desc)) +
                  ": caller and library do not match"};
  if (desc.layout_version != SPARSECC_LAYOUT_VERSION)
    throw Failure{"packed weight has layout version " + show(desc.layout_version) +
                  ", this library reads version " + show(SPARSECC_LAYOUT_VERSION) +
                  ": write the model again with this release"};
  if (desc.layout == nullptr) throw Failure{"packed weight has no layout text"};
  if (desc.outputs < 1 || desc.outputs > kMaxSide)
    throw Failure{"outputs is " + show(desc.outputs) + ", expected 1.." + show(kMaxSide)};
  if (desc.inputs < 0 || desc.inputs > kMaxSide)
    throw Failure{"inputs is " + show(desc.inputs) + ", expected 0.." + show(kMaxSide)};
  if (desc.outputs * desc.inputs > kMaxGrid)
    throw Failure{"weight of " + show(desc.outputs) + " x " + show(desc.inputs) +
                  " has more than 2^31 elements"};
  if (desc.value_count < 0 || desc.index_bytes < 0) throw Failure{"value_count or index_bytes is negative"};
  if ((desc.value_count > 0 && desc.values == nullptr) || (desc.index_bytes > 0 && desc.indices == nullptr))
    throw Failure{"values or indices is null although its length is not zero"};
  int activation = 0;  // as a number first: reading an enumeration that holds no member is undefined
  static_assert(sizeof activation == sizeof desc.activation);
  std::memcpy(&activation, &desc.activation, sizeof activation);
  if (activation < SPARSECC_ACT_NONE || activation > SPARSECC_ACT_HARD_SWISH)
    throw Failure{"unknown activation " + show(activation)};
  if (desc.value_type < SPARSECC_FLOAT32 || desc.value_type > SPARSECC_BFLOAT16)
    throw Failure{"unknown type of values " + show(desc.value_type)};
}

// Walks the gap stream and calls place(position) for every stored unit.
template <class Place>
void walk_gaps(const uint8_t* indices, int64_t bytes, int64_t grid, Place place) {
  int64_t cursor = -1;
  bool after_skip = false;
  for (int64_t i = 0; i < bytes * 2; ++i) {
    const int token = (i & 1) != 0 ? indices[i >> 1] >> 4 : indices[i >> 1] & 15;
    cursor += token;
    const bool stores = token != 15;
    if (stores && token == 0 && !after_skip)
      throw Failure{"index stream repeats a position at token " + show(i)};
    if (stores && cursor >= grid)
      throw Failure{"index stream reaches position " + show(cursor) + ", the grid has " + show(grid)};
    // Only the token 15 that completes the last byte may pass the end of the grid.
    if (!stores && cursor >= grid && i != bytes * 2 - 1)
      throw Failure{"index stream runs past the grid of " + show(grid) + " at token " + show(i)};
    if (stores) place(cursor);
    after_skip = !stores;
  }
}

void read_positions(const sparsecc_weight_desc& desc, int64_t units, Weight& weight) {
  const int64_t grid = weight.grid_rows * weight.grid_cols;
  if (units > grid)
    throw Failure{show(units) + " stored values or blocks do not fit a grid of " + show(grid)};
  // Every unit needs a token and every position at most 1/15 token more: bounds the memory below.
  if (units > desc.index_bytes * 2)
    throw Failure{show(desc.index_bytes) + " index bytes cannot place " + show(units) + " values or blocks"};
  weight.row_start.assign(static_cast<size_t>(weight.grid_rows) + 1, 0);
  weight.column.resize(static_cast<size_t>(units));
  int64_t placed = 0, row = 0;
  walk_gaps(desc.indices, desc.index_bytes, grid, [&](int64_t position) {
    if (placed == units)
      throw Failure{"index stream places more than the " + show(units) + " stored values or blocks"};
    const int64_t to = position / weight.grid_cols;
    while (row < to) weight.row_start[static_cast<size_t>(++row)] = placed;
    weight.column[static_cast<size_t>(placed++)] = static_cast<uint32_t>(position % weight.grid_cols);
  });
  if (placed != units)
    throw Failure{"index stream places " + show(placed) + " of " + show(units) + " stored values or blocks"};
  while (row < weight.grid_rows) weight.row_start[static_cast<size_t>(++row)] = placed;
}

void check_n_of_m(const Weight& weight) {
  const int64_t n = weight.layout.n, m = weight.layout.m, groups = ceil_div(weight.inputs, m);
  std::vector<int> count(static_cast<size_t>(groups));
  for (int64_t row = 0; row < weight.outputs; ++row) {
    std::fill(count.begin(), count.end(), 0);
    for (int64_t i = weight.row_start[static_cast<size_t>(row)];
         i < weight.row_start[static_cast<size_t>(row) + 1]; ++i)
      ++count[weight.column[static_cast<size_t>(i)] / static_cast<uint32_t>(m)];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t expected = std::min(n, std::min(m, weight.inputs - g * m));
      if (count[static_cast<size_t>(g)] != expected)
        throw Failure{"row " + show(row) + " keeps " + show(count[static_cast<size_t>(g)]) + " of columns " +
                      show(g * m) + ".., layout " + show(n) + ":" + show(m) + " needs " + show(expected)};
    }
  }
}

std::vector<float> as_floats(const sparsecc_weight_desc& desc, sparsecc_value_type type) {
  std::vector<float> floats(static_cast<size_t>(desc.value_count));
  if (type == SPARSECC_FLOAT32) {
    std::memcpy(floats.data(), desc.values, floats.size() * sizeof(float));
    return floats;
  }
  const auto* from = static_cast<const unsigned char*>(desc.values);
  for (float& to : floats) {
    uint16_t bits = 0;
    std::memcpy(&bits, from, sizeof bits);
    from += sizeof bits;
    to = widen(bits, type);
  }
  return floats;
}

}  // namespace

Layout parse_layout(const char* text) {
  Layout layout;
  if (std::strcmp(text, "unstructured") == 0) return layout;
  const char* at = text;
  const int first = read_number(at);
  const char separator = *at;
  if (first < 1 || (separator != ':' && separator != 'x')) bad_layout(text);
  const int second = read_number(++at);
  if (second < 1 || *at != '\0') bad_layout(text);
  if (separator == ':') {
    if (first >= second || second > kMaxGroup) bad_layout(text);
    layout.kind = Layout::kNofM;
    layout.n = first;
    layout.m = second;
  } else {
    if (first > kMaxBlock || second > kMaxBlock) bad_layout(text);
    layout.kind = Layout::kBlock;
    layout.rows = first;
    layout.cols = second;
  }
  return layout;
}

Weight read_weight(const sparsecc_weight_desc& desc) {
  Weight weight = read_structure(desc);
  weight.type = static_cast<sparsecc_value_type>(desc.value_type);
  // External data is mapped at whatever offset the file names; nothing after this wants to know.
  if (weight.type == SPARSECC_FLOAT32 && reinterpret_cast<uintptr_t>(desc.values) % alignof(float) == 0) {
    weight.values = static_cast<const float*>(desc.values);
  } else if (desc.value_count > 0) {
    weight.held = std::make_shared<const std::vector<float>>(as_floats(desc, weight.type));
    weight.values = weight.held->data();
  }
  return weight;
}

Weight read_structure(const sparsecc_weight_desc& desc) {
  check_sizes(desc);
  Weight weight;
  weight.layout = parse_layout(desc.layout);
  weight.outputs = desc.outputs;
  weight.inputs = desc.inputs;
  weight.grid_rows = ceil_div(desc.outputs, weight.layout.rows);
  weight.grid_cols = ceil_div(desc.inputs, weight.layout.cols);
  const int64_t unit = int64_t{weight.layout.rows} * weight.layout.cols;
  if (desc.value_count % unit != 0)
    throw Failure{show(desc.value_count) + " values are not a whole number of blocks of " + show(unit)};
  read_positions(desc, desc.value_count / unit, weight);
  if (weight.layout.kind == Layout::kNofM) check_n_of_m(weight);
  return weight;
}

Rows expand_rows(const Weight& weight, int tall) {
  const int64_t height = weight.layout.rows, width = weight.layout.cols;
  Rows rows;
  rows.outputs = weight.outputs;
  rows.inputs = weight.inputs;
  rows.tall = tall;
  rows.type = weight.type;
  rows.start.reserve(static_cast<size_t>(ceil_div(weight.outputs, tall)) + 1);
  rows.start.push_back(0);
  for (int64_t row = 0; row < weight.outputs; row += tall) {
    const size_t grid_row = static_cast<size_t>(row / height);
    for (int64_t unit = weight.row_start[grid_row]; unit < weight.row_start[grid_row + 1]; ++unit) {
      const float* values = weight.values + (unit * height + row % height) * width;
      const int64_t first = int64_t{weight.column[static_cast<size_t>(unit)]} * width;
      for (int64_t c = 0; c < std::min(width, weight.inputs - first); ++c) {
        bool zero = true;
        for (int64_t t = 0; t < tall; ++t) zero &= values[t * width + c] == 0.0f;
        if (zero) continue;  // a stored zero is as good as a pruned one
        rows.column.push_back(static_cast<uint32_t>(first + c));
        for (int64_t t = 0; t < tall; ++t) rows.value.push_back(values[t * width + c]);
      }
    }
    rows.start.push_back(static_cast<int64_t>(rows.column.size()));
  }
  return rows;
}

Weight part_of(const Weight& weight, int64_t first, int64_t outputs) {
  const Layout& layout = weight.layout;
  const auto begin = weight.row_start.begin() + first / layout.rows;
  const auto end = begin + outputs / layout.rows;
  Weight part;
  part.layout = layout;
  part.outputs = outputs;
  part.inputs = weight.inputs;
  part.grid_rows = end - begin;
  part.grid_cols = weight.grid_cols;
  for (auto at = begin; at <= end; ++at) part.row_start.push_back(*at - *begin);
  part.column.assign(weight.column.begin() + *begin, weight.column.begin() + *end);
  part.type = weight.type;
  part.held = weight.held;
  part.values = weight.values + *begin * layout.rows * layout.cols;
  return part;
}

}  // namespace sparsecc
