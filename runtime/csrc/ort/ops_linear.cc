// Products and convolutions with one packed weight: every family with every activation.
#include <cstring>

#include "kernel.h"
#include "node_reader.h"
#include "op_table.h"
#include "packed_reader.h"
#include "session_threads.h"

namespace sparsecc::ort {
namespace {

constexpr size_t kPackedWeight = 1;  // values, indices, shape

struct ConvDeleter {
  void operator()(sparsecc_conv* op) const { sparsecc_conv_destroy(op); }
};

// The inputs whose place depends on whether there are scales.
struct Places {
  explicit Places(const Family& family) : bias(family.int8 ? 5 : 4) {}
  const size_t scales = 4, bias, low = bias + 1, high = bias + 2;
};

// ---- what a node says -------------------------------------------------------------------------------

struct Weight {
  PackedWeight packed;
  std::vector<float> scales, bias;  // scales: of weights in bytes
  sparsecc_activation activation = SPARSECC_ACT_NONE;
  float alpha = 0.0f, beta = 0.0f;
};

// Good as long as `weight` lives.
template <class Desc>
Desc describe(const Weight& weight) {
  Desc desc = describe<Desc>(weight.packed);
  desc.bias = weight.bias.data();
  desc.activation = weight.activation;
  desc.alpha = weight.alpha;
  desc.beta = weight.beta;
  if constexpr (std::is_same_v<Desc, sparsecc_int8_weight_desc>) desc.scales = weight.scales.data();
  return desc;
}

Weight read_weight(const NodeReader& node, const Family& family, const Activation& activation) {
  check_layout_version(node);
  Weight weight;
  const size_t least = family.conv ? 3 : 2, most = family.conv ? 4 : 2;
  weight.packed = read_packed(node, {.first = kPackedWeight,
                                     .least = least,
                                     .most = most,
                                     .bytes = family.int8,
                                     .blocks = family.blocks});
  const Places places(family);
  const int64_t outputs = weight.packed.outputs();
  weight.bias = read_per_output(node, places.bias, "bias", outputs);
  if (family.int8) weight.scales = read_per_output(node, places.scales, "scales", outputs);
  weight.activation = activation.kind;
  if (activation.kind == SPARSECC_ACT_LEAKY_RELU) weight.alpha = node.number("alpha");
  if (activation.kind == SPARSECC_ACT_CLIP) {
    weight.alpha = node.scalar(places.low, "lo");
    weight.beta = node.scalar(places.high, "hi");
  }
  return weight;
}

sparsecc_conv_geometry read_convolution(const NodeReader& node, const std::vector<int64_t>& shape) {
  sparsecc_conv_geometry geometry = read_geometry(node, {shape.begin() + 2, shape.end()});
  geometry.groups = read_group(node);
  if (shape[0] % geometry.groups != 0) {
    throw KernelError("attribute 'group' is " + std::to_string(geometry.groups) +
                      ", which does not divide the " + std::to_string(shape[0]) + " output channels");
  }
  return geometry;
}

// ---- the two kernels --------------------------------------------------------------------------------

// What the C interface offers for float weights and for weights in bytes.
struct FloatMatMul {
  using Op = sparsecc_matmul;
  static int create(const Weight& weight, Op** op, char* error, size_t size) {
    const auto desc = describe<sparsecc_weight_desc>(weight);
    return sparsecc_matmul_create(&desc, op, error, size);
  }
  void operator()(Op* op) const { sparsecc_matmul_destroy(op); }
};

struct ByteMatMul {
  using Op = sparsecc_int8_matmul;
  static int create(const Weight& weight, Op** op, char* error, size_t size) {
    const auto desc = describe<sparsecc_int8_weight_desc>(weight);
    return sparsecc_int8_matmul_create(&desc, op, error, size);
  }
  void operator()(Op* op) const { sparsecc_int8_matmul_destroy(op); }
};

template <typename Form>
class MatMulKernel : public Kernel {
 public:
  MatMulKernel(const Functions& functions, std::string node_label, const Weight& weight, int32_t threads)
      : Kernel(functions, std::move(node_label)),
        outputs_(weight.packed.outputs()),
        inputs_(weight.packed.inputs()),
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
        outputs_(weight.packed.outputs()),
        channels_(weight.packed.shape[1] * geometry.groups),
        rank_(weight.packed.shape.size()),
        added_(added),
        gauge_(threads) {
    sparsecc_conv* op = nullptr;
    const auto desc = describe<sparsecc_weight_desc>(weight);
    checked([&](char* error, size_t size) {
      return sparsecc_conv_create(&desc, &geometry, &op, error, size);
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
  const Weight weight = read_weight(node, family, activation);
  if (family.int8)
    return std::make_unique<ByteMatMulKernel>(api, label, weight, threads, family.given,
                                              input_types(family, activation).size());
  if (!family.conv) return std::make_unique<FloatMatMulKernel>(api, label, weight, threads);
  const size_t added = family.adds ? input_types(family, activation).size() - 1 : 0;
  return std::make_unique<ConvKernel>(api, label, weight, read_convolution(node, weight.packed.shape), added, threads);
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
