// Operators on quad planes; see sparsecc/emit/ops_planes.py.
#include <algorithm>
#include <cstring>
#include <memory>

#include "kernel.h"
#include "node_reader.h"
#include "packed_reader.h"
#include "session_threads.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {
namespace {

constexpr int64_t kLanes = 4;

// ---- what a node says -------------------------------------------------------------------------------

// steps and zero_points at `first`, bounds behind them if there are any.
sparsecc_plane_quantization read_quantization(const NodeReader& node, size_t first, int64_t count,
                                              bool bounds) {
  const TensorView steps = node.constant(first, "steps", ElementType::kFloat, 1);
  const TensorView zero_points = node.constant(first + 1, "zero_points", ElementType::kUint8, 1);
  if (steps.count != count || zero_points.count != count) {
    throw KernelError("inputs 'steps' and 'zero_points' have " + std::to_string(steps.count) + " and " +
                      std::to_string(zero_points.count) + " entries, expected " + std::to_string(count));
  }
  float scales[3] = {1.0f, 1.0f, 1.0f};
  uint8_t zeros[3] = {0, 0, 0};
  std::memcpy(scales, steps.data, static_cast<size_t>(count) * sizeof(float));
  std::memcpy(zeros, zero_points.data, static_cast<size_t>(count));
  sparsecc_plane_quantization to{};
  to.struct_size = sizeof(to);
  to.x_scale = scales[0];
  to.y_scale = scales[1];
  to.x_zero_point = zeros[0];
  to.y_zero_point = zeros[1];
  to.has_residual = count == 3 ? 1 : 0;
  to.residual_scale = scales[2];
  to.residual_zero_point = zeros[2];
  to.high = 255;
  if (bounds) {
    const TensorView both = node.constant(first + 2, "bounds", ElementType::kUint8, 1);
    if (both.count != 2) {
      throw KernelError("input 'bounds' has " + std::to_string(both.count) + " entries, expected 2");
    }
    to.low = static_cast<const uint8_t*>(both.data)[0];
    to.high = static_cast<const uint8_t*>(both.data)[1];
  }
  return to;
}

// ---- shapes at run time -----------------------------------------------------------------------------

// A tensor in quad planes of one or two spatial axes.
struct Planes {
  Planes(const TensorView& tensor, const char* name) : data(static_cast<uint8_t*>(tensor.data)) {
    const std::vector<int64_t>& dims = tensor.dims;
    if ((dims.size() != 4 && dims.size() != 5) || dims.back() != kLanes) {
      throw KernelError(std::string(name) + " has shape " + to_text(dims) +
                        ", expected quad planes [B,quads,H,W,4] or [B,quads,L,4]");
    }
    axes = dims.size() - 3;
    batch = dims[0];
    quads = dims[1];
    sides[0] = axes == 2 ? dims[2] : 1;
    sides[1] = dims[dims.size() - 2];
    count = tensor.count;
  }
  std::vector<int64_t> with_sides(int64_t of_quads, const int64_t hw[2]) const {
    std::vector<int64_t> dims{batch, of_quads};
    if (axes == 2) dims.push_back(hw[0]);
    dims.insert(dims.end(), {hw[1], kLanes});
    return dims;
  }
  int64_t pixels() const { return sides[0] * sides[1]; }

  uint8_t* data;
  size_t axes;
  int64_t batch, quads, sides[2], count;
};

class PlaneKernel : public Kernel {
 protected:
  PlaneKernel(const Functions& functions, std::string node_label, int32_t threads)
      : Kernel(functions, std::move(node_label)), gauge_(threads) {}

  Planes planes(const OrtKernelContext* context, size_t index, const char* name, size_t axes = 0) const {
    const Planes x(read_input(api, context, index), name);
    if (axes != 0 && x.axes != axes) {
      throw KernelError(std::string(name) + " has " + std::to_string(x.axes) + " spatial axes, expected " +
                        std::to_string(axes));
    }
    return x;
  }

  // Calls run(executor, error, size), which is a function of the C interface.
  template <typename Run>
  void on_threads(const OrtKernelContext* context, Run run) const {
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) { return run(&threads.executor, error, size); });
    threads.check();
  }

 private:
  mutable ThreadGauge gauge_;
};

// ---- convolution ------------------------------------------------------------------------------------

struct Destroy {
  void operator()(sparsecc_plane_conv* op) const { sparsecc_plane_conv_destroy(op); }
};

class ConvKernel final : public PlaneKernel {
 public:
  ConvKernel(const Functions& functions, std::string node_label, const NodeReader& node, bool residual,
             int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads), residual_(residual) {
    const size_t first = residual ? 2 : 1;  // x and the residual come before the weight
    check_layout_version(node);
    // The shape is [Cout, kernel..., Cin / group].
    const PackedWeight weight = read_packed(
        node, {.first = first, .least = 3, .most = 4, .bytes = true, .blocks = true});
    const std::vector<int64_t>& shape = weight.shape;
    outputs_ = weight.outputs();
    const std::vector<float> scales = read_per_output(node, first + 3, "scales", outputs_);
    const std::vector<float> bias = read_per_output(node, first + 4, "bias", outputs_);
    axes_ = shape.size() - 2;
    sparsecc_conv_geometry geometry = read_geometry(node, {shape.begin() + 1, shape.end() - 1});
    geometry.groups = read_group(node);
    if (shape.back() > kLargestDim / geometry.groups) throw KernelError("there are too many input channels");
    quads_ = (shape.back() * geometry.groups + kLanes - 1) / kLanes;
    const sparsecc_plane_quantization to = read_quantization(node, first + 5, residual ? 3 : 2, true);
    auto desc = describe<sparsecc_int8_weight_desc>(weight);
    desc.scales = scales.data();
    desc.bias = bias.data();
    sparsecc_plane_conv* op = nullptr;
    checked([&](char* error, size_t size) {
      return sparsecc_plane_conv_create(&desc, &geometry, &to, &op, error, size);
    });
    op_.reset(op);
  }

  void run(OrtKernelContext* context) const override {
    const Planes x = planes(context, 0, "x", axes_);
    if (x.quads != quads_) {
      throw KernelError("x has " + std::to_string(x.quads) + " quads of channels, expected " +
                        std::to_string(quads_));
    }
    int64_t out[2] = {0, 0};
    checked([&](char* error, size_t size) {
      return sparsecc_plane_conv_output_size(op_.get(), x.sides, out, error, size);
    });
    const std::vector<int64_t> dims = x.with_sides((outputs_ + kLanes - 1) / kLanes, out);
    const uint8_t* residual = nullptr;
    if (residual_) {
      const TensorView added = read_input(api, context, 1);
      if (added.dims != dims) {
        throw KernelError("residual has shape " + to_text(added.dims) + ", expected " + to_text(dims));
      }
      residual = static_cast<const uint8_t*>(added.data);
    }
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, dims));
    if (x.batch == 0) return;
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_plane_conv_run(op_.get(), x.data, x.batch, x.sides[0], x.sides[1], residual, y, executor,
                                     error, size);
    });
  }

 private:
  const bool residual_;
  std::unique_ptr<sparsecc_plane_conv, Destroy> op_;
  int64_t outputs_ = 0, quads_ = 0;
  size_t axes_ = 0;
};

// ---- everything else --------------------------------------------------------------------------------

class AddKernel final : public PlaneKernel {
 public:
  AddKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads), to_(read_quantization(node, 2, 3, true)) {}

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0), added = read_input(api, context, 1);
    if (added.dims != x.dims) {
      throw KernelError("residual has shape " + to_text(added.dims) + ", x has " + to_text(x.dims));
    }
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, x.dims));
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_add(static_cast<const uint8_t*>(x.data), static_cast<const uint8_t*>(added.data),
                                 x.count, &to_, y, nullptr, executor, error, size);
    });
  }

 private:
  const sparsecc_plane_quantization to_;
};

class ConcatKernel final : public PlaneKernel {
 public:
  ConcatKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads), to_(read_quantization(node, 2, 3, true)) {}

  void run(OrtKernelContext* context) const override {
    const Planes x = planes(context, 0, "x"), behind = planes(context, 1, "residual", x.axes);
    const std::vector<int64_t> expected = x.with_sides(behind.quads, x.sides);
    if (const std::vector<int64_t> dims = behind.with_sides(behind.quads, behind.sides); dims != expected) {
      throw KernelError("residual has shape " + to_text(dims) + ", expected " + to_text(expected));
    }
    const int64_t quads = x.quads + behind.quads;
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, x.with_sides(quads, x.sides)));
    if (x.batch == 0) return;
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_concat(x.data, x.count / x.batch, behind.data, behind.count / x.batch, x.batch, &to_,
                                    y, nullptr, executor, error, size);
    });
  }

 private:
  const sparsecc_plane_quantization to_;
};

class MaxPoolKernel final : public PlaneKernel {
 public:
  MaxPoolKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads) {
    const std::vector<int64_t> kernel = node.integers("kernel_shape");
    if (kernel.size() != 1 && kernel.size() != 2) {
      throw KernelError("attribute 'kernel_shape' is " + to_text(kernel) + ", expected one or two axes");
    }
    check_range("attribute 'kernel_shape'", kernel, 1);
    axes_ = kernel.size();
    geometry_ = read_geometry(node, kernel);
  }

  void run(OrtKernelContext* context) const override {
    const Planes x = planes(context, 0, "x", axes_);
    int64_t out[2] = {0, 0};
    checked([&](char* error, size_t size) {
      return sparsecc_planes_output_size(&geometry_, x.sides, out, error, size);
    });
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, x.with_sides(x.quads, out)));
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_max_pool(x.data, x.batch * x.quads, x.sides[0], x.sides[1], &geometry_, y, nullptr,
                                      executor, error, size);
    });
  }

 private:
  sparsecc_conv_geometry geometry_{};
  size_t axes_ = 0;
};

class MeanKernel final : public PlaneKernel {
 public:
  MeanKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads), to_(read_quantization(node, 1, 2, true)) {}

  void run(OrtKernelContext* context) const override {
    const Planes x = planes(context, 0, "x");
    const int64_t one[2] = {1, 1};
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, x.with_sides(x.quads, one)));
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_mean(x.data, x.batch * x.quads, x.pixels(), &to_, y, nullptr, executor, error,
                                  size);
    });
  }

 private:
  const sparsecc_plane_quantization to_;
};

class QuantizeKernel final : public PlaneKernel {
 public:
  QuantizeKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads), to_(read_quantization(node, 1, 1, false)) {}

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0);
    if (x.dims.size() != 3 && x.dims.size() != 4) {
      throw KernelError("x has shape " + to_text(x.dims) + ", expected [B,C,H,W] or [B,C,L]");
    }
    std::vector<int64_t> dims = x.dims;
    dims[1] = (dims[1] + kLanes - 1) / kLanes;
    dims.push_back(kLanes);
    auto* y = static_cast<uint8_t*>(make_output(api, context, 0, dims));
    int64_t pixels = 1;
    for (size_t i = 2; i < x.dims.size(); ++i) pixels *= x.dims[i];
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_quantize(static_cast<const float*>(x.data), x.dims[0], x.dims[1], pixels,
                                      to_.x_scale, to_.x_zero_point, y, nullptr, executor, error, size);
    });
  }

 private:
  const sparsecc_plane_quantization to_;
};

class DequantizeKernel final : public PlaneKernel {
 public:
  DequantizeKernel(const Functions& functions, std::string node_label, const NodeReader& node, int32_t threads)
      : PlaneKernel(functions, std::move(node_label), threads),
        to_(read_quantization(node, 1, 1, false)),
        channels_(node.integer("channels")) {
    check_range("attribute 'channels'", {channels_}, 1);
  }

  void run(OrtKernelContext* context) const override {
    const Planes x = planes(context, 0, "x");
    if (x.quads != (channels_ + kLanes - 1) / kLanes) {
      throw KernelError("x has " + std::to_string(x.quads) + " quads, not those of " +
                        std::to_string(channels_) + " channels");
    }
    std::vector<int64_t> dims{x.batch, channels_};
    if (x.axes == 2) dims.push_back(x.sides[0]);
    dims.push_back(x.sides[1]);
    auto* y = static_cast<float*>(make_output(api, context, 0, dims));
    on_threads(context, [&](const sparsecc_executor* executor, char* error, size_t size) {
      return sparsecc_planes_dequantize(x.data, x.batch, channels_, x.pixels(), to_.x_scale, to_.x_zero_point,
                                        y, nullptr, executor, error, size);
    });
  }

 private:
  const sparsecc_plane_quantization to_;
  const int64_t channels_;
};

template <class MadeKernel>
OperatorSpec simple_spec(const char* name, std::vector<ElementType> inputs, ElementType output) {
  return {name, std::move(inputs), {output},
          [](const NodeReader& node, const Functions& api, const std::string& label, int32_t threads) {
            return std::make_unique<MadeKernel>(api, label, node, threads);
          }};
}

OperatorSpec conv_spec(const char* name, bool residual) {
  using enum ElementType;
  std::vector<ElementType> inputs{kUint8};
  if (residual) inputs.push_back(kUint8);
  inputs.insert(inputs.end(), {kInt8, kUint8, kInt64, kFloat, kFloat, kFloat, kUint8, kUint8});
  return {name, std::move(inputs), {kUint8},
          [residual](const NodeReader& node, const Functions& api, const std::string& label, int32_t threads) {
            return std::make_unique<ConvKernel>(api, label, node, residual, threads);
          }};
}

}  // namespace

std::vector<OperatorSpec> plane_operators() {
  using enum ElementType;
  return {conv_spec("BlockSparseConvQuads", false),
          conv_spec("BlockSparseConvAddQuads", true),
          simple_spec<AddKernel>("AddQuads", {kUint8, kUint8, kFloat, kUint8, kUint8}, kUint8),
          simple_spec<ConcatKernel>("ConcatQuads", {kUint8, kUint8, kFloat, kUint8, kUint8}, kUint8),
          simple_spec<MaxPoolKernel>("MaxPoolQuads", {kUint8}, kUint8),
          simple_spec<MeanKernel>("GlobalAveragePoolQuads", {kUint8, kFloat, kUint8, kUint8}, kUint8),
          simple_spec<QuantizeKernel>("QuantizeQuads", {kFloat, kFloat, kUint8}, kUint8),
          simple_spec<DequantizeKernel>("DequantizeQuads", {kUint8, kFloat, kUint8}, kFloat)};
}

}  // namespace sparsecc::ort
