// LSTM and GRU with packed weights; see sparsecc/emit/ops_recurrent.py.
#include <cstring>

#include "kernel.h"
#include "node_reader.h"
#include "packed_reader.h"
#include "session_threads.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {
namespace {

// x, three inputs for each weight, bias; then what the variant has.
constexpr size_t kInputWeight = 1, kStateWeight = 4, kBias = 7, kFirstOptional = 8;

struct Variant {
  const char* name;
  sparsecc_cell cell;
  bool lengths, state;
};

constexpr Variant kVariants[] = {
    {"SparseLSTM", SPARSECC_LSTM, false, false},
    {"SparseLSTMState", SPARSECC_LSTM, false, true},
    {"SparseLSTMLengths", SPARSECC_LSTM, true, false},
    {"SparseLSTMLengthsState", SPARSECC_LSTM, true, true},
    {"SparseGRU", SPARSECC_GRU, false, false},
    {"SparseGRUState", SPARSECC_GRU, false, true},
    {"SparseGRULengths", SPARSECC_GRU, true, false},
    {"SparseGRULengthsState", SPARSECC_GRU, true, true},
};

bool lstm(const Variant& variant) { return variant.cell == SPARSECC_LSTM; }

sparsecc_direction read_direction(const NodeReader& node) {
  const std::string text = short_text(node, "direction");
  if (text == "forward") return SPARSECC_FORWARD;
  if (text == "reverse") return SPARSECC_REVERSE;
  if (text == "bidirectional") return SPARSECC_BIDIRECTIONAL;
  throw KernelError("attribute 'direction' is '" + text + "', expected forward, reverse or bidirectional");
}

PackedWeight read_operand(const NodeReader& node, size_t first, const char* operand) {
  return read_packed(node, {.first = first,
                            .least = 2,
                            .most = 2,
                            .bytes = false,
                            .blocks = true,
                            .singles = true,
                            .operand = operand});
}

struct Destroy {
  void operator()(sparsecc_recurrent* op) const { sparsecc_recurrent_destroy(op); }
};

class RecurrentKernel final : public Kernel {
 public:
  RecurrentKernel(const Functions& functions, std::string node_label, const Variant& variant,
                  const NodeReader& node, int32_t threads)
      : Kernel(functions, std::move(node_label)), variant_(variant), gauge_(threads) {
    check_layout_version(node);
    sparsecc_recurrent_desc desc{};
    desc.struct_size = sizeof(desc);
    desc.cell = variant.cell;
    desc.direction = read_direction(node);
    desc.hidden = hidden_ = node.integer("hidden_size");
    if (!lstm(variant)) desc.linear_before_reset = node.integer("linear_before_reset") != 0 ? 1 : 0;
    directions_ = desc.direction == SPARSECC_BIDIRECTIONAL ? 2 : 1;
    if (hidden_ < 1 || hidden_ > kLargestDim / 16) {
      throw KernelError("attribute 'hidden_size' is " + std::to_string(hidden_) + ", which is out of range");
    }
    const PackedWeight input = read_operand(node, kInputWeight, "w");
    const PackedWeight state = read_operand(node, kStateWeight, "r");
    desc.input_weight = describe<sparsecc_weight_desc>(input);
    desc.state_weight = describe<sparsecc_weight_desc>(state);
    inputs_ = input.inputs();
    const TensorView bias = node.constant(kBias, "bias", ElementType::kFloat, 2);
    const std::vector<int64_t> expected{directions_, (lstm(variant) ? 8 : 6) * hidden_};
    if (bias.dims != expected) {
      throw KernelError("input 'bias' has shape " + to_text(bias.dims) + ", expected " + to_text(expected));
    }
    std::vector<float> held(static_cast<size_t>(bias.count));
    std::memcpy(held.data(), bias.data, held.size() * sizeof(float));
    desc.bias = held.data();
    sparsecc_recurrent* op = nullptr;
    checked([&](char* error, size_t size) { return sparsecc_recurrent_create(&desc, &op, error, size); });
    op_.reset(op);
  }

  void run(OrtKernelContext* context) const override {
    const TensorView x = read_input(api, context, 0);
    if (x.dims.size() != 3 || x.dims[2] != inputs_) {
      throw KernelError("x has shape " + to_text(x.dims) + ", expected [T,B," + std::to_string(inputs_) +
                        "]");
    }
    const std::vector<int64_t> state{directions_, x.dims[1], hidden_};
    sparsecc_recurrent_io io{};
    io.struct_size = sizeof(io);
    io.x = static_cast<const float*>(x.data);
    io.steps = x.dims[0];
    io.batch = x.dims[1];
    size_t next = kFirstOptional;
    if (variant_.lengths) {
      io.lengths = static_cast<const int32_t*>(read_sized(context, next++, "lengths", {io.batch}));
    }
    if (variant_.state) {
      io.initial_h = static_cast<const float*>(read_sized(context, next++, "initial_h", state));
      if (lstm(variant_)) {
        io.initial_c = static_cast<const float*>(read_sized(context, next, "initial_c", state));
      }
    }
    io.y = static_cast<float*>(make_output(api, context, 0, {io.steps, directions_, io.batch, hidden_}));
    io.y_h = static_cast<float*>(make_output(api, context, 1, state));
    if (lstm(variant_)) io.y_c = static_cast<float*>(make_output(api, context, 2, state));
    if (io.batch == 0) return;
    SessionThreads threads(api, context, gauge_);
    checked([&](char* error, size_t size) {
      return sparsecc_recurrent_run(op_.get(), &io, &threads.executor, error, size);
    });
    threads.check();
  }

 private:
  const void* read_sized(const OrtKernelContext* context, size_t index, const char* name,
                         const std::vector<int64_t>& expected) const {
    const TensorView tensor = read_input(api, context, index);
    if (tensor.dims != expected) {
      throw KernelError(std::string(name) + " has shape " + to_text(tensor.dims) + ", expected " +
                        to_text(expected));
    }
    return tensor.data;
  }

  const Variant& variant_;
  std::unique_ptr<sparsecc_recurrent, Destroy> op_;
  int64_t directions_ = 1, hidden_ = 0, inputs_ = 0;
  mutable ThreadGauge gauge_;
};

OperatorSpec make_spec(const Variant& variant) {
  std::vector<ElementType> inputs{ElementType::kFloat};
  for (int weight = 0; weight < 2; ++weight) {
    inputs.insert(inputs.end(), {kStoredValues, ElementType::kUint8, ElementType::kInt64});
  }
  inputs.push_back(ElementType::kFloat);
  if (variant.lengths) inputs.push_back(ElementType::kInt32);
  if (variant.state) inputs.insert(inputs.end(), lstm(variant) ? 2 : 1, ElementType::kFloat);
  const std::vector<ElementType> outputs(lstm(variant) ? 3 : 2, ElementType::kFloat);
  return {variant.name, std::move(inputs), outputs,
          [&variant](const NodeReader& node, const Functions& api, const std::string& label, int32_t threads) {
            return std::make_unique<RecurrentKernel>(api, label, variant, node, threads);
          }};
}

}  // namespace

std::vector<OperatorSpec> recurrent_operators() {
  std::vector<OperatorSpec> specs;
  for (const Variant& variant : kVariants) specs.push_back(make_spec(variant));
  return specs;
}

}  // namespace sparsecc::ort
