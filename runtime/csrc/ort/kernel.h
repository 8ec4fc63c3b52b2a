// One node of a session: made from its constant inputs and attributes, run on the session's threads; and the
// list of all operators. A family lives in a file of its own (ops_*.cc) and adds its list to all_operators().
#ifndef SPARSECC_ORT_KERNEL_H_
#define SPARSECC_ORT_KERNEL_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "node_reader.h"
#include "ort_abi.h"

namespace sparsecc::ort {

class Kernel {
 public:
  virtual ~Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Reads the inputs of the context and writes its outputs. Throws KernelError.
  virtual void run(OrtKernelContext* context) const = 0;

  const Functions api;
  const std::string label;  // "node 'fc1' (SparseMatMul)", for messages

 protected:
  Kernel(const Functions& functions, std::string node_label)
      : api(functions), label(std::move(node_label)) {}
};

// "sparsecc: <label>: <fault>" as one line, whatever the file's texts hold.
std::string message(const std::string& label, const char* fault);

TensorView read_input(const Functions& api, const OrtKernelContext* context, size_t index);
void* make_output(const Functions& api, OrtKernelContext* context, size_t index,
                  const std::vector<int64_t>& dims);

// `run` returns non-zero with a message, as every function of the C interface does.
template <typename Run>
void checked(Run run) {
  char error[512];
  error[0] = '\0';
  if (run(error, sizeof(error)) != 0) throw KernelError(error);
}

// As the type of an input: what NodeReader::stored_values takes. onnxruntime lets an operator name one type or any.
constexpr ElementType kStoredValues = ElementType::kUndefined;
// What onnxruntime is told about the type of an input.
constexpr ElementType declared_type(ElementType type) {
  return type == ElementType::kIntegers ? ElementType::kUndefined : type;
}

struct OperatorSpec {
  std::string name;
  std::vector<ElementType> inputs, outputs;  // all of them always present on a node
  // Validates everything the node says and re-packs its weights. Throws KernelError.
  // `threads` is how many the session is said to have, 0 if nothing was said.
  std::function<std::unique_ptr<Kernel>(const NodeReader& node, const Functions& api,
                                        const std::string& label, int32_t threads)>
      make;
};

std::vector<OperatorSpec> linear_operators();
std::vector<OperatorSpec> recurrent_operators();
std::vector<OperatorSpec> plane_operators();
std::vector<OperatorSpec> transformer_operators();
std::vector<OperatorSpec> algebra_operators();

std::vector<OperatorSpec> all_operators();

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_KERNEL_H_
