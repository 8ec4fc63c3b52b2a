// What nodes say about packed weights and windows: read and checked in one place for all families.
#ifndef SPARSECC_ORT_PACKED_READER_H_
#define SPARSECC_ORT_PACKED_READER_H_

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "node_reader.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {

inline constexpr int64_t kLargestDim = INT32_MAX;

// `what` is for the message: "attribute 'strides'".
void check_range(const std::string& what, const std::vector<int64_t>& values, int64_t least);
void check_layout_version(const NodeReader& node);
// The text of an attribute that names something, fit for a message.
std::string short_text(const NodeReader& node, const std::string& attribute);
// A float for every output.
std::vector<float> read_per_output(const NodeReader& node, size_t index, const char* input, int64_t outputs);

// How an operator holds a packed weight: its inputs values, indices and shape follow each other from `first` on.
struct PackedForm {
  size_t first;
  size_t least, most;       // entries of shape
  bool bytes;               // values are int8; otherwise of a type in sparsecc_value_type
  bool blocks;              // values are [blocks,R,C]; otherwise [kept], and layouts RxC are none of its
  bool singles = false;     // single weights are blocks of 1 by 1
  std::string operand = {};  // of several weights which: "w" for w_values and layout_w
};

struct PackedWeight {
  std::string layout;
  std::vector<int64_t> shape;  // the dense one, outputs first; a row has at most kLargestDim entries
  TensorView values, indices;

  int64_t outputs() const { return shape[0]; }
  int64_t inputs() const;
};

PackedWeight read_packed(const NodeReader& node, const PackedForm& form);

// The descriptor, sparsecc_weight_desc or sparsecc_int8_weight_desc, without bias, scales and activation. Good as
// long as `weight` lives.
template <class Desc>
Desc describe(const PackedWeight& weight) {
  Desc desc{};
  desc.struct_size = sizeof(desc);
  desc.layout_version = SPARSECC_LAYOUT_VERSION;
  desc.layout = weight.layout.c_str();
  desc.outputs = weight.outputs();
  desc.inputs = weight.inputs();
  desc.value_count = weight.values.count;
  desc.indices = static_cast<const uint8_t*>(weight.indices.data);
  desc.index_bytes = weight.indices.count;
  if constexpr (std::is_same_v<Desc, sparsecc_weight_desc>) {
    desc.values = weight.values.data;
    desc.value_type = value_type(weight.values);
  } else {
    desc.values = static_cast<const int8_t*>(weight.values.data);
  }
  return desc;
}

// Attributes strides, dilations and pads for one or two axes; one axis is the second of two, the first of size 1.
// Without `group`, which not every operator has.
sparsecc_conv_geometry read_geometry(const NodeReader& node, const std::vector<int64_t>& kernel);
int64_t read_group(const NodeReader& node);

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_PACKED_READER_H_
