// Reads attributes and constant inputs of a node at session creation, and tensors at run time.
#ifndef SPARSECC_ORT_NODE_READER_H_
#define SPARSECC_ORT_NODE_READER_H_

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {

// A violated rule, in one line. Turned into an OrtStatus at the border; never leaves the library.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct TensorView {
  ElementType type = ElementType::kUndefined;
  std::vector<int64_t> dims;
  int64_t count = 0;
  void* data = nullptr;  // never null, even when count is 0
};

// Throws KernelError carrying onnxruntime's own message.
void check(const Functions& api, OrtStatus* status);
TensorView view(const Functions& api, const OrtValue* value);
std::string to_text(const std::vector<int64_t>& dims);  // "[2,3]"
// Of what stored_values gave.
sparsecc_value_type value_type(const TensorView& values);

class NodeReader {
 public:
  NodeReader(const Functions& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::string name() const;
  std::string text(const char* attribute) const;
  int64_t integer(const char* attribute) const;
  float number(const char* attribute) const;
  std::vector<int64_t> integers(const char* attribute) const;
  std::vector<int64_t> integers(const char* attribute, size_t expected) const;
  // Nothing where there is no such attribute.
  std::vector<int64_t> integers_if_any(const char* attribute) const;
  TensorView constant(size_t index, const char* input, ElementType type, size_t rank) const;
  // The values of a weight whose arithmetic is float32: of the types of sparsecc_value_type, at any address.
  TensorView stored_values(size_t index, const char* input, size_t rank) const;
  float scalar(size_t index, const char* input) const;
  // Nothing where the input is computed.
  std::optional<TensorView> if_constant(size_t index) const;

 private:
  TensorView any_constant(size_t index, const char* input) const;
  TensorView constant_of_any_rank(size_t index, const char* input, ElementType type) const;

  const Functions& api_;
  const OrtKernelInfo* info_;
};

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_NODE_READER_H_
