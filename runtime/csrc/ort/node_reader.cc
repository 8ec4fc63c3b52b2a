#include "node_reader.h"

namespace sparsecc::ort {
namespace {

const char* type_name(ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return "float32";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kInt8:
      return "int8";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    default:
      break;
  }
  return "another type";
}

std::string quoted(const char* name) { return "'" + std::string(name) + "'"; }

// Texts come with a two-step protocol: the size, which counts the terminator, then the contents.
template <typename Query>
std::string sized_string(const Functions& api, Query query) {
  size_t size = 0;
  check(api, query(nullptr, &size));
  std::string text(size, '\0');
  if (size > 0) check(api, query(text.data(), &size));
  if (!text.empty()) text.pop_back();
  return text;
}

// onnxruntime's own words for a missing attribute and for one of another type differ between releases.
template <typename Read>
auto attribute_of_type(const char* name, const char* type, Read read) {
  try {
    return read();
  } catch (const KernelError&) {
    throw KernelError("attribute " + quoted(name) + " is missing or is not " + type);
  }
}

void check_rank(const TensorView& tensor, const char* input, size_t rank) {
  if (tensor.dims.size() != rank) {
    throw KernelError("input " + quoted(input) + " has shape " + to_text(tensor.dims) + ", expected rank " +
                      std::to_string(rank));
  }
}

}  // namespace

void check(const Functions& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw KernelError(message);
}

namespace {

// By way of an object that holds both; the only way before version 24.
void read_type_and_dims(const Functions& api, const OrtValue* value, TensorView* tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  struct Guard {
    const Functions& api;
    OrtTensorTypeAndShapeInfo* info;
    ~Guard() { api.ReleaseTensorTypeAndShapeInfo(info); }
  } guard{api, info};
  size_t rank = 0;
  check(api, api.GetTensorElementType(info, &tensor->type));
  check(api, api.GetDimensionsCount(info, &rank));
  tensor->dims.resize(rank);
  check(api, api.GetDimensions(info, tensor->dims.data(), rank));
}

}  // namespace

TensorView view(const Functions& api, const OrtValue* value) {
  TensorView tensor;
  if (api.GetTensorElementTypeAndShapeDataReference == nullptr) {
    read_type_and_dims(api, value, &tensor);
  } else {
    const int64_t* dims = nullptr;
    size_t rank = 0;
    check(api, api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &dims, &rank));
    tensor.dims.assign(dims, dims + rank);
  }
  tensor.count = 1;
  for (const int64_t dim : tensor.dims) tensor.count *= dim;
  // There is one accessor for data, and it takes a mutable value: constants are only ever read here.
  check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  alignas(16) static int64_t nothing[2] = {};
  if (tensor.count == 0 || tensor.data == nullptr) tensor.data = nothing;
  return tensor;
}

std::string to_text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i > 0 ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

std::string NodeReader::name() const {
  return sized_string(api_, [&](char* out, size_t* size) {
    return api_.KernelInfo_GetNodeName(info_, out, size);
  });
}

std::string NodeReader::text(const char* attribute) const {
  return attribute_of_type(attribute, "a text", [&] {
    return sized_string(api_, [&](char* out, size_t* size) {
      return api_.KernelInfoGetAttribute_string(info_, attribute, out, size);
    });
  });
}

int64_t NodeReader::integer(const char* attribute) const {
  return attribute_of_type(attribute, "an integer", [&] {
    int64_t value = 0;
    check(api_, api_.KernelInfoGetAttribute_int64(info_, attribute, &value));
    return value;
  });
}

float NodeReader::number(const char* attribute) const {
  return attribute_of_type(attribute, "a float", [&] {
    float value = 0;
    check(api_, api_.KernelInfoGetAttribute_float(info_, attribute, &value));
    return value;
  });
}

std::vector<int64_t> NodeReader::integers(const char* attribute) const {
  return attribute_of_type(attribute, "a list of integers", [&] {
    size_t size = 0;
    check(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size));
    std::vector<int64_t> read(size);
    if (size > 0) check(api_, api_.KernelInfoGetAttributeArray_int64(info_, attribute, read.data(), &size));
    return read;
  });
}

std::vector<int64_t> NodeReader::integers(const char* attribute, size_t expected) const {
  std::vector<int64_t> values = integers(attribute);
  if (values.size() != expected) {
    throw KernelError("attribute " + quoted(attribute) + " has " + std::to_string(values.size()) +
                      " entries, expected " + std::to_string(expected));
  }
  return values;
}

std::vector<int64_t> NodeReader::integers_if_any(const char* attribute) const {
  size_t size = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttributeArray_int64(info_, attribute, nullptr, &size)) {
    api_.ReleaseStatus(status);
    return {};
  }
  return integers(attribute);
}

sparsecc_value_type value_type(const TensorView& values) {
  if (values.type == ElementType::kFloat16) return SPARSECC_FLOAT16;
  return values.type == ElementType::kBfloat16 ? SPARSECC_BFLOAT16 : SPARSECC_FLOAT32;
}

std::optional<TensorView> NodeReader::if_constant(size_t index) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (is_constant == 0 || value == nullptr) return std::nullopt;
  return view(api_, value);
}

TensorView NodeReader::any_constant(size_t index, const char* input) const {
  std::optional<TensorView> tensor = if_constant(index);
  if (!tensor) {
    throw KernelError("input " + quoted(input) +
                      " must be a constant initializer of the node's own graph (not a graph input or a "
                      "computed value)");
  }
  return *std::move(tensor);
}

TensorView NodeReader::constant_of_any_rank(size_t index, const char* input, ElementType type) const {
  TensorView tensor = any_constant(index, input);
  if (tensor.type != type) {
    throw KernelError("input " + quoted(input) + " must be " + type_name(type));
  }
  return tensor;
}

TensorView NodeReader::constant(size_t index, const char* input, ElementType type, size_t rank) const {
  TensorView tensor = constant_of_any_rank(index, input, type);
  check_rank(tensor, input, rank);
  return tensor;
}

TensorView NodeReader::stored_values(size_t index, const char* input, size_t rank) const {
  TensorView tensor = any_constant(index, input);
  if (tensor.type != ElementType::kFloat && tensor.type != ElementType::kFloat16 &&
      tensor.type != ElementType::kBfloat16) {
    throw KernelError("input " + quoted(input) + " must be float32, float16 or bfloat16");
  }
  check_rank(tensor, input, rank);
  return tensor;
}

float NodeReader::scalar(size_t index, const char* input) const {
  const TensorView tensor = constant_of_any_rank(index, input, ElementType::kFloat);
  if (tensor.count != 1) {
    throw KernelError("input " + quoted(input) + " has shape " + to_text(tensor.dims) +
                      ", expected one number");
  }
  return *static_cast<const float*>(tensor.data);
}

}  // namespace sparsecc::ort
