// Products and convolutions with one packed weight: every family with every activation.
#include <charconv>
#include <cstring>

#include "kernel.h"
#include "node_reader.h"
#include "op_table.h"
#include "session_threads.h"

namespace sparsecc::ort {
namespace {

constexpr size_t kValues = 1, kIndices = 2, kShape = 3;
constexpr int64_t kLargestDim = INT32_MAX;
constexpr size_t kLongestLayout = 32;

struct ConvDeleter {
  void operator()(sparsecc_conv* op) const { sparsecc_conv_destroy(op); }
};

// The inputs whose place depends on whether there are scales.
struct Places {
  explicit Places(const Family& family) : bias(family.int8 ? 5 : 4) {}
  const size_t scales = 4, bias, low = bias + 1, high = bias + 2;
};

// ---- what a node says -------------------------------------------------------------------------------

// "RxC" with nothing else around it. What sizes are allowed is the kernels' business.
bool parse_block(const std::string& layout, int64_t* rows, int64_t* cols) {
  const char* const end = layout.data() + layout.size();
  const auto first = std::from_chars(layout.data(), end, *rows);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != 'x') return false;
  const auto second = std::from_chars(first.ptr + 1, end, *cols);
  return second.ec == std::errc() && second.ptr == end && *rows > 0 && *cols > 0;
}

std::vector<int64_t> read_shape(const NodeReader& node, const Family& family) {
  const TensorView tensor = node.constant(kShape, "shape", ElementType::kInt64, 1);
  std::vector<int64_t> shape(static_cast<size_t>(tensor.count));
  if (tensor.count > 0) std::memcpy(shape.data(), tensor.data, shape.size() * sizeof(int64_t));
  const bool right_length = family.conv ? shape.size() == 3 || shape.size() == 4 : shape.size() == 2;
  if (!right_length) {
    throw KernelError("input 'shape' has " + std::to_string(shape.size()) + " entries, expected " +
                      (family.conv ? "3 or 4" : "2"));
  }
  int64_t columns = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 1 || shape[i] > kLargestDim) {
      throw KernelError("input 'shape' is " + to_text(shape) + ", every entry must be in 1..2147483647");
    }
    if (i > 0) columns *= shape[i];  // cannot overflow: both factors are below 2^31
    if (columns > kLargestDim) {
      throw KernelError("input 'shape' is " + to_text(shape) +
                        ", a row must have at most 2147483647 entries");
    }
  }
  return shape;
}

// Everything of sparsecc_weight_desc, with the storage its pointers lead to. Weights in bytes have
// `bytes` and `scales` instead of desc.values.
struct Weight {
  std::string layout;
  std::vector<int64_t> shape;
  sparsecc_weight_desc desc{};
  const int8_t* bytes = nullptr;
  std::vector<float> scales;
};

void check_values(const TensorView& values, const Family& family, const std::string& layout) {
  if (!family.blocks) return;
  int64_t rows = 0, cols = 0;
  if (!parse_block(layout, &rows, &cols)) {
    throw KernelError("attribute 'layout' is '" + layout + "', expected blocks such as '16x1'");
  }
  if (values.dims[1] != rows || values.dims[2] != cols) {
    throw KernelError("input 'values' has shape " + to_text(values.dims) + ", layout '" + layout +
                      "' needs [blocks," + std::to_string(rows) + "," + std::to_string(cols) + "]");
  }
}

void read_scales(const NodeReader& node, const Family& family, Weight* weight) {
  const TensorView scales = node.constant(Places(family).scales, "scales", ElementType::kFloat, 1);
  if (scales.count != weight->shape[0]) {
    throw KernelError("input 'scales' has " + std::to_string(scales.count) + " entries, the weight has " +
                      std::to_string(weight->shape[0]) + " outputs");
  }
  weight->scales.resize(static_cast<size_t>(scales.count));
  std::memcpy(weight->scales.data(), scales.data, weight->scales.size() * sizeof(float));
}

void read_storage(const NodeReader& node, const Family& family, Weight* weight) {
  const size_t rank = family.blocks ? 3 : 1;
  const TensorView values = family.int8 ? node.constant(kValues, "values", ElementType::kInt8, rank)
                                        : node.stored_values(kValues, "values", rank);
  check_values(values, family, weight->layout);
  const TensorView indices = node.constant(kIndices, "indices", ElementType::kUint8, 1);
  const TensorView bias = node.constant(Places(family).bias, "bias", ElementType::kFloat, 1);
  const int64_t outputs = weight->shape[0];
  if (bias.count != outputs) {
    throw KernelError("input 'bias' has " + std::to_string(bias.count) + " entries, the weight has " +
                      std::to_string(outputs) + " outputs");
  }
  sparsecc_weight_desc& desc = weight->desc;
  desc.outputs = outputs;
  desc.inputs = 1;
  for (size_t i = 1; i < weight->shape.size(); ++i) desc.inputs *= weight->shape[i];
  desc.value_count = values.count;
  desc.indices = static_cast<const uint8_t*>(indices.data);
  desc.index_bytes = indices.count;
  desc.bias = static_cast<const float*>(bias.data);
  if (family.int8) {
    weight->bytes = static_cast<const int8_t*>(values.data);
    read_scales(node, family, weight);
    return;
  }
  desc.values = values.data;
  desc.value_type = value_type(values);
}

void read_weight(const NodeReader& node, const Family& family, const Activation& activation,
                 Weight* weight) {
  const int64_t version = node.integer("layout_version");
  if (version != SPARSECC_LAYOUT_VERSION) {
    throw KernelError("layout_version " + std::to_string(version) + " is not supported (this library reads " +
                      std::to_string(SPARSECC_LAYOUT_VERSION) + "): use a matching sparsecc release");
  }
  weight->layout = node.text("layout");
  if (weight->layout.size() > kLongestLayout) {
    throw KernelError("attribute 'layout' has " + std::to_string(weight->layout.size()) +
                      " characters, which is no layout");
  }
  if (weight->layout.find('\0') != std::string::npos) {
    throw KernelError("attribute 'layout' holds a zero byte");
  }
  if (!family.blocks && weight->layout.find('x') != std::string::npos) {
    throw KernelError("attribute 'layout' is '" + weight->layout + "', expected 'unstructured' or N:M");
  }
  weight->shape = read_shape(node, family);
  read_storage(node, family, weight);
  sparsecc_weight_desc& desc = weight->desc;
  desc.struct_size = sizeof(desc);
  desc.layout_version = SPARSECC_LAYOUT_VERSION;
  desc.layout = weight->layout.c_str();
  desc.activation = activation.kind;
  if (activation.kind == SPARSECC_ACT_LEAKY_RELU) desc.alpha = node.number("alpha");
  if (activation.kind == SPARSECC_ACT_CLIP) {
    desc.alpha = node.scalar(Places(family).low, "lo");
    desc.beta = node.scalar(Places(family).high, "hi");
  }
}

void check_range(const char* attribute, const std::vector<int64_t>& values, int64_t least) {
  for (const int64_t value : values) {
    if (value < least || value > kLargestDim) {
      throw KernelError("attribute '" + std::string(attribute) + "' is " + to_text(values) +
                        ", every entry must be in " + std::to_string(least) + "..2147483647");
    }
  }
}

// A one-dimensional convolution is a two-dimensional one of height 1.
sparsecc_conv_geometry read_geometry(const NodeReader& node, const std::vector<int64_t>& shape) {
  const size_t axes = shape.size() - 2;
  const std::vector<int64_t> strides = node.integers("strides", axes);
  const std::vector<int64_t> dilations = node.integers("dilations", axes);
  const std::vector<int64_t> pads = node.integers("pads", 2 * axes);
  const int64_t group = node.integer("group");
  check_range("strides", strides, 1);
  check_range("dilations", dilations, 1);
  check_range("pads", pads, 0);
  check_range("group", {group}, 1);
  if (shape[0] % group != 0) {
    throw KernelError("attribute 'group' is " + std::to_string(group) + ", which does not divide the " +
                      std::to_string(shape[0]) + " output channels");
  }
  sparsecc_conv_geometry geometry{group, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {0, 0}};
  for (size_t axis = 0; axis < axes; ++axis) {
    const size_t to = axis + 2 - axes;
    geometry.kernel[to] = shape[2 + axis];
    geometry.stride[to] = strides[axis];
    geometry.dilation[to] = dilations[axis];
    geometry.pad_begin[to] = pads[axis];
    geometry.pad_end[to] = pads[axes + axis];
  }
  return geometry;
}

// ---- the two kernels --------------------------------------------------------------------------------

// What the C interface offers for float weights and for weights in bytes.
struct FloatMatMul {
  using Op = sparsecc_matmul;
  static int create(const Weight& weight, Op** op, char* error, size_t size) {
    return sparsecc_matmul_create(&weight.desc, op, error, size);
  }
  void operator()(Op* op) const { sparsecc_matmul_destroy(op); }
};

struct ByteMatMul {
  using Op = sparsecc_int8_matmul;
  static int create(const Weight& weight, Op** op, char* error, size_t size) {
    const sparsecc_weight_desc& same = weight.desc;
    sparsecc_int8_weight_desc desc{};
    desc.struct_size = sizeof(desc);
    desc.layout_version = same.layout_version;
    desc.layout = same.layout;
    desc.outputs = same.outputs;
    desc.inputs = same.inputs;
    desc.values = weight.bytes;
    desc.value_count = same.value_count;
    desc.indices = same.indices;
    desc.index_bytes = same.index_bytes;
    desc.scales = weight.scales.data();
    desc.bias = same.bias;
    desc.activation = same.activation;
    desc.alpha = same.alpha;
    desc.beta = same.beta;
    return sparsecc_int8_matmul_create(&desc, op, error, size);
  }
  void operator()(Op* op) const { sparsecc_int8_matmul_destroy(op); }
};

template <typename Form>
class MatMulKernel : public Kernel {
 public:
  MatMulKernel(const Functions& functions, std::string node_label, const Weight& weight, int32_t threads)
      : Kernel(functions, std::move(node_label)),
        outputs_(weight.desc.outputs),
        inputs_(weight.desc.inputs),
        gauge_(threads) {
    typename Form::Op* op = nullptr;
    checked([&](char* error, size_t size) { return Form::create(weight, &op, error, size); });
    op_.reset(op);
  }

  void run(OrtKernelContext* context) const override {
    TensorView x = read_input(api, context, 0);
    if (x.dims.empty() || x.dims.back() != inputs_) {
      throw KernelError("x has shape " + to_text(x.dims) + ", expected a last dimension of " +
                        std::to_string(inputs_));
    }
    x.dims.back() = outputs_;
    auto* y = static_cast<float*>(make_output(api, context, 0, x.dims));
    const int64_t rows = x.count / inputs_;
    if (rows == 0) return;
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) {
      return multiply(context, x.data, rows, y, &threads.executor, error, size);
    });
    threads.check();
  }

 protected:
  std::unique_ptr<typename Form::Op, Form> op_;

 private:
  virtual int multiply(OrtKernelContext* context, const void* x, int64_t rows, float* y,
                       const sparsecc_executor* executor, char* error, size_t size) const = 0;

  const int64_t outputs_, inputs_;
  mutable ThreadGauge gauge_;
};

class FloatMatMulKernel final : public MatMulKernel<FloatMatMul> {
 public:
  using MatMulKernel::MatMulKernel;

 private:
  int multiply(OrtKernelContext*, const void* x, int64_t rows, float* y, const sparsecc_executor* executor,
               char* error, size_t size) const override {
    return sparsecc_matmul_run(op_.get(), static_cast<const float*>(x), rows, y, executor, error, size);
  }
};

class ByteMatMulKernel final : public MatMulKernel<ByteMatMul> {
 public:
  // x_scale and x_zero_point, where there are any, are the last two inputs.
  ByteMatMulKernel(const Functions& functions, std::string node_label, const Weight& weight, int32_t threads,
                   Given given, size_t inputs)
      : MatMulKernel(functions, std::move(node_label), weight, threads),
        given_(given),
        scale_input_(inputs - 2) {}

 private:
  template <typename T>
  T scalar(OrtKernelContext* context, size_t index, const char* input) const {
    const TensorView tensor = read_input(api, context, index);
    if (tensor.count != 1) {
      throw KernelError(std::string("input '") + input + "' has shape " + to_text(tensor.dims) +
                        ", expected one number");
    }
    T value{};
    std::memcpy(&value, tensor.data, sizeof(value));
    return value;
  }

  int multiply(OrtKernelContext* context, const void* x, int64_t rows, float* y,
               const sparsecc_executor* executor, char* error, size_t size) const override {
    const auto* floats = static_cast<const float*>(x);
    if (given_ == Given::kNothing)
      return sparsecc_int8_matmul_run(op_.get(), floats, rows, y, executor, error, size);
    const auto scale = scalar<float>(context, scale_input_, "x_scale");
    const int32_t zero_point = scalar<uint8_t>(context, scale_input_ + 1, "x_zero_point");
    if (given_ == Given::kScale)
      return sparsecc_int8_matmul_run_given(op_.get(), floats, rows, scale, zero_point, y, executor, error,
                                            size);
    return sparsecc_int8_matmul_run_bytes(op_.get(), static_cast<const uint8_t*>(x), rows, scale, zero_point,
                                          y, executor, error, size);
  }

  const Given given_;
  const size_t scale_input_;
};

class ConvKernel final : public Kernel {
 public:
  ConvKernel(const Functions& functions, std::string node_label, const Weight& weight,
             const sparsecc_conv_geometry& geometry, size_t added, int32_t threads)
      : Kernel(functions, std::move(node_label)),
        outputs_(weight.shape[0]),
        channels_(weight.shape[1] * geometry.groups),
        rank_(weight.shape.size()),
        added_(added),
        gauge_(threads) {
    sparsecc_conv* op = nullptr;
    checked([&](char* error, size_t size) {
      return sparsecc_conv_create(&weight.desc, &geometry, &op, error, size);
    });
    op_.reset(op);
  }

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0);
    if (x.dims.size() != rank_ || x.dims[1] != channels_) {
      throw KernelError("x has shape " + to_text(x.dims) + ", expected rank " + std::to_string(rank_) +
                        " and " + std::to_string(channels_) + " channels");
    }
    const int64_t in_hw[2] = {rank_ == 4 ? x.dims[2] : 1, x.dims.back()};
    int64_t out_hw[2] = {0, 0};
    checked([&](char* error, size_t size) {
      return sparsecc_conv_output_size(op_.get(), in_hw, out_hw, error, size);
    });
    std::vector<int64_t> dims{x.dims[0], outputs_};
    if (rank_ == 4) dims.push_back(out_hw[0]);
    dims.push_back(out_hw[1]);
    const float* added = added_ == 0 ? nullptr : read_added(context, dims);
    auto* y = static_cast<float*>(make_output(api, context, 0, dims));
    if (x.dims[0] == 0 || out_hw[0] == 0 || out_hw[1] == 0) return;
    SessionThreads threads(api, context, gauge_);
    const auto* from = static_cast<const float*>(x.data);
    checked([&](char* error, size_t size) {
      return added == nullptr ? sparsecc_conv_run(op_.get(), from, x.dims[0], channels_, in_hw[0], in_hw[1],
                                                  y, &threads.executor, error, size)
                              : sparsecc_conv_add_run(op_.get(), from, added, x.dims[0], channels_, in_hw[0],
                                                      in_hw[1], y, &threads.executor, error, size);
    });
    threads.check();
  }

 private:
  const float* read_added(OrtKernelContext* context, const std::vector<int64_t>& dims) const {
    const TensorView added = read_input(api, context, added_);
    if (added.dims != dims)
      throw KernelError("residual has shape " + to_text(added.dims) + ", the result has " + to_text(dims));
    return static_cast<const float*>(added.data);
  }

  std::unique_ptr<sparsecc_conv, ConvDeleter> op_;
  const int64_t outputs_, channels_;
  const size_t rank_, added_;  // added_: place of the input that is added, 0 if none
  mutable ThreadGauge gauge_;
};

// x, values, indices, shape, scales with values in bytes, bias, lo and hi for Clip, x_scale and x_zero_point
// where these are given, or what is added.
std::vector<ElementType> input_types(const Family& family, const Activation& activation) {
  std::vector<ElementType> types{
      family.given == Given::kBytes ? ElementType::kUint8 : ElementType::kFloat,
      family.int8 ? ElementType::kInt8 : kStoredValues, ElementType::kUint8, ElementType::kInt64};
  if (family.int8) types.push_back(ElementType::kFloat);
  types.push_back(ElementType::kFloat);
  if (activation.kind == SPARSECC_ACT_CLIP) types.insert(types.end(), 2, ElementType::kFloat);
  if (family.given != Given::kNothing) {
    types.push_back(ElementType::kFloat);
    types.push_back(ElementType::kUint8);
  }
  if (family.adds) types.push_back(ElementType::kFloat);
  return types;
}

std::unique_ptr<Kernel> make_kernel(const NodeReader& node, const Functions& api, const Family& family,
                                    const Activation& activation, const std::string& label,
                                    int32_t threads) {
  Weight weight;
  read_weight(node, family, activation, &weight);
  if (family.int8)
    return std::make_unique<ByteMatMulKernel>(api, label, weight, threads, family.given,
                                              input_types(family, activation).size());
  if (!family.conv) return std::make_unique<FloatMatMulKernel>(api, label, weight, threads);
  const size_t added = family.adds ? input_types(family, activation).size() - 1 : 0;
  return std::make_unique<ConvKernel>(api, label, weight, read_geometry(node, weight.shape), added, threads);
}

}  // namespace

std::vector<OperatorSpec> linear_operators() {
  std::vector<OperatorSpec> specs;
  for (const Family& family : kFamilies) {
    for (const Activation& activation : kActivations) {
      specs.push_back({std::string(family.name) + activation.suffix,
                       input_types(family, activation),
                       {ElementType::kFloat},
                       [&family, &activation](const NodeReader& node, const Functions& api,
                                              const std::string& label, int32_t threads) {
                         return make_kernel(node, api, family, activation, label, threads);
                       }});
    }
  }
  return specs;
}

}  // namespace sparsecc::ort
