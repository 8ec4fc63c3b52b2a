#include "packed_reader.h"

#include <cstring>

namespace sparsecc::ort {
namespace {

constexpr size_t kLongestText = 32;

std::vector<int64_t> read_shape(const NodeReader& node, const PackedForm& form, const std::string& input) {
  const TensorView tensor = node.constant(form.first + 2, input.c_str(), ElementType::kInt64, 1);
  std::vector<int64_t> shape(static_cast<size_t>(tensor.count));
  if (tensor.count > 0) std::memcpy(shape.data(), tensor.data, shape.size() * sizeof(int64_t));
  if (shape.size() < form.least || shape.size() > form.most) {
    throw KernelError("input '" + input + "' has " + std::to_string(shape.size()) + " entries, expected " +
                      std::to_string(form.least) +
                      (form.most > form.least ? " or " + std::to_string(form.most) : ""));
  }
  check_range("input '" + input + "'", shape, 1);
  int64_t columns = 1;
  for (size_t i = 1; i < shape.size(); ++i) {
    columns *= shape[i];  // cannot overflow: both factors are below 2^31
    if (columns > kLargestDim) {
      throw KernelError("input '" + input + "' is " + to_text(shape) +
                        ", a row must have at most 2147483647 entries");
    }
  }
  return shape;
}

// Function bodies take the block from the shape of the values, kernels from the layout: the two must agree.
void check_layout(const PackedWeight& weight, const PackedForm& form, const std::string& attribute,
                  const std::string& input) {
  const bool single = weight.layout.find('x') == std::string::npos;
  if (!form.blocks) {
    if (single) return;
    throw KernelError("attribute '" + attribute + "' is '" + weight.layout + "', expected 'unstructured' or N:M");
  }
  const std::vector<int64_t>& dims = weight.values.dims;
  const std::string block = std::to_string(dims[1]) + "x" + std::to_string(dims[2]);
  if (block != (single && form.singles ? "1x1" : weight.layout)) {
    throw KernelError("input '" + input + "' has shape " + to_text(dims) + ", which is not layout '" +
                      weight.layout + "': expected blocks [blocks,R,C] and layout RxC");
  }
}

}  // namespace

void check_range(const std::string& what, const std::vector<int64_t>& values, int64_t least) {
  for (const int64_t value : values) {
    if (value < least || value > kLargestDim) {
      throw KernelError(what + " is " + to_text(values) + ", every entry must be in " + std::to_string(least) +
                        "..2147483647");
    }
  }
}

void check_layout_version(const NodeReader& node) {
  const int64_t version = node.integer("layout_version");
  if (version != SPARSECC_LAYOUT_VERSION) {
    throw KernelError("layout_version " + std::to_string(version) + " is not supported (this library reads " +
                      std::to_string(SPARSECC_LAYOUT_VERSION) + "): use a matching sparsecc release");
  }
}

std::string short_text(const NodeReader& node, const std::string& attribute) {
  std::string text = node.text(attribute.c_str());
  if (text.size() > kLongestText) {
    throw KernelError("attribute '" + attribute + "' has " + std::to_string(text.size()) +
                      " characters, expected at most " + std::to_string(kLongestText));
  }
  if (text.find('\0') != std::string::npos) {
    throw KernelError("attribute '" + attribute + "' holds a zero byte");
  }
  return text;
}

std::vector<float> read_per_output(const NodeReader& node, size_t index, const char* input, int64_t outputs) {
  const TensorView tensor = node.constant(index, input, ElementType::kFloat, 1);
  if (tensor.count != outputs) {
    throw KernelError("input '" + std::string(input) + "' has " + std::to_string(tensor.count) +
                      " entries, the weight has " + std::to_string(outputs) + " outputs");
  }
  std::vector<float> held(static_cast<size_t>(outputs));
  std::memcpy(held.data(), tensor.data, held.size() * sizeof(float));
  return held;
}

int64_t PackedWeight::inputs() const {
  int64_t columns = 1;
  for (size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
  return columns;
}

PackedWeight read_packed(const NodeReader& node, const PackedForm& form) {
  const std::string prefix = form.operand.empty() ? "" : form.operand + "_";
  const std::string attribute = form.operand.empty() ? "layout" : "layout_" + form.operand;
  const std::string values = prefix + "values";
  const size_t rank = form.blocks ? 3 : 1;
  PackedWeight weight;
  weight.layout = short_text(node, attribute);
  weight.values = form.bytes ? node.constant(form.first, values.c_str(), ElementType::kInt8, rank)
                             : node.stored_values(form.first, values.c_str(), rank);
  check_layout(weight, form, attribute, values);
  weight.indices = node.constant(form.first + 1, (prefix + "indices").c_str(), ElementType::kUint8, 1);
  weight.shape = read_shape(node, form, prefix + "shape");
  return weight;
}

sparsecc_conv_geometry read_geometry(const NodeReader& node, const std::vector<int64_t>& kernel) {
  const size_t axes = kernel.size();
  const std::vector<int64_t> strides = node.integers("strides", axes);
  const std::vector<int64_t> dilations = node.integers("dilations", axes);
  const std::vector<int64_t> pads = node.integers("pads", 2 * axes);
  check_range("attribute 'strides'", strides, 1);
  check_range("attribute 'dilations'", dilations, 1);
  check_range("attribute 'pads'", pads, 0);
  sparsecc_conv_geometry geometry{1, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {0, 0}};
  for (size_t axis = 0; axis < axes; ++axis) {
    const size_t to = axis + 2 - axes;
    geometry.kernel[to] = kernel[axis];
    geometry.stride[to] = strides[axis];
    geometry.dilation[to] = dilations[axis];
    geometry.pad_begin[to] = pads[axis];
    geometry.pad_end[to] = pads[axes + axis];
  }
  return geometry;
}

int64_t read_group(const NodeReader& node) {
  const int64_t group = node.integer("group");
  check_range("attribute 'group'", {group}, 1);
  return group;
}

}  // namespace sparsecc::ort
