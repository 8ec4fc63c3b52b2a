#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "int8.h"

namespace sparsecc {
namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

// Where weight (output, input) of a block lies among its 64 bytes.
int64_t place(QuadOrder order, int64_t output, int64_t input) {
  switch (order) {
    case QuadOrder::kOutputs:
      return output * kQuad + input;
    case QuadOrder::kPairs:
      return input / 2 * (2 * kGroup) + output * 2 + input % 2;
    case QuadOrder::kInputs:
      break;
  }
  return input * kGroup + output % 4 * 4 + output / 4;
}

// Calls take(output, input, value) for every non-zero weight of a group of 16 outputs.
template <class Take>
void visit_group(const Weight& weight, const int8_t* values, int64_t group, Take take) {
  const int64_t height = weight.layout.rows, width = weight.layout.cols;
  const int64_t first = group * kGroup, last = std::min(weight.outputs, first + kGroup);
  for (int64_t row = first / height; row * height < last; ++row)
    for (int64_t unit = weight.row_start[at(row)]; unit < weight.row_start[at(row) + 1]; ++unit) {
      const int64_t input = int64_t{weight.column[at(unit)]} * width;
      const int64_t inputs = std::min(width, weight.inputs - input);
      for (int64_t output = std::max(first, row * height); output < std::min(last, (row + 1) * height);
           ++output)
        for (int64_t c = 0; c < inputs; ++c) {
          const int8_t value = values[(unit * height + output - row * height) * width + c];
          if (value != 0) take(output, input + c, value);
        }
    }
}

}  // namespace

Weight read_int8_weight(const sparsecc_int8_weight_desc& desc) {
  if (desc.struct_size < sizeof(desc))
    throw Failure{"int8 weight descriptor is " + std::to_string(desc.struct_size) + " bytes, expected " +
                  std::to_string(sizeof(desc)) + ": caller and library do not match"};
  // Only whether there are values is asked there, never what they are.
  sparsecc_weight_desc positions{};
  positions.struct_size = sizeof(positions);
  positions.layout_version = desc.layout_version;
  positions.layout = desc.layout;
  positions.outputs = desc.outputs;
  positions.inputs = desc.inputs;
  positions.values = reinterpret_cast<const float*>(desc.values);
  positions.value_count = desc.value_count;
  positions.indices = desc.indices;
  positions.index_bytes = desc.index_bytes;
  static_assert(sizeof positions.activation == sizeof desc.activation);
  __builtin_memcpy(&positions.activation, &desc.activation, sizeof desc.activation);  // may hold no member
  Weight weight = read_weight(positions);
  weight.values = nullptr;
  if (desc.scales == nullptr) throw Failure{"int8 weights have no scales"};
  for (int64_t n = 0; n < desc.outputs; ++n)
    if (!(desc.scales[n] > 0.0f) || !std::isfinite(desc.scales[n]))
      throw Failure{"scale of output " + std::to_string(n) + " is not a finite positive number"};
  return weight;
}

QuadPack::QuadPack(const Weight& weight, const sparsecc_int8_weight_desc& desc, QuadOrder order)
    : outputs(weight.outputs),
      groups(ceil_div(weight.outputs, kGroup)),
      start(groups + 1),
      sums_(groups * kGroup),
      scales_(groups * kGroup) {
  std::copy_n(desc.scales, outputs, scales_.data());
  std::vector<uint32_t> index;
  std::vector<int64_t> block_of(at(ceil_div(weight.inputs, kQuad)), -1);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t before = static_cast<int64_t>(index.size());
    visit_group(weight, desc.values, group, [&](int64_t, int64_t input, int8_t) {
      int64_t& block = block_of[at(input / kQuad)];
      if (block < before) {
        block = before;  // marked; the number comes with the order
        index.push_back(static_cast<uint32_t>(input / kQuad));
      }
    });
    std::sort(index.begin() + before, index.end());
    start[group + 1] = static_cast<int64_t>(index.size());
  }
  const int64_t blocks = static_cast<int64_t>(index.size());
  index_ = Buffer<uint32_t>(blocks);
  std::copy(index.begin(), index.end(), index_.data());
  values_ = Buffer<int8_t>(blocks * kQuadValues);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t block = start[group]; block < start[group + 1]; ++block) block_of[index_[block]] = block;
    visit_group(weight, desc.values, group, [&](int64_t output, int64_t input, int8_t value) {
      const int64_t block = block_of[at(input / kQuad)];
      values_[block * kQuadValues + place(order, output % kGroup, input % kQuad)] = value;
      // Modulo 2^32, as all sums here.
      sums_[output] =
          static_cast<int32_t>(static_cast<uint32_t>(sums_[output]) + static_cast<uint32_t>(value));
    });
  }
}

QuadView QuadPack::view() const {
  return {start.data(), index_.data(), values_.data(), sums_.data(), scales_.data(), outputs};
}

}  // namespace sparsecc
