// What `sparsecc optimize --emit tvm` stores in a module for the nodes that run on our kernels: operator, attributes and
// constants of each. sparsecc/tvm/record.py writes it; both say version 1.
#ifndef SPARSECC_TVM_RECORD_H_
#define SPARSECC_TVM_RECORD_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ort/ort_abi.h"

// A tensor: of a record, or of a call. Opaque to those who read it through `Functions`.
struct OrtValue {
  sparsecc::ort::ElementType type = sparsecc::ort::ElementType::kUndefined;
  std::vector<int64_t> dims;
  void* data = nullptr;
};

// A node.
struct OrtKernelInfo {
  std::string name, op;
  std::map<std::string, int64_t, std::less<>> integers;
  std::map<std::string, float, std::less<>> numbers;
  std::map<std::string, std::string, std::less<>> texts;
  std::map<std::string, std::vector<int64_t>, std::less<>> lists;
  std::vector<std::optional<OrtValue>> inputs;  // constants; nothing for what a call brings
};

namespace sparsecc::tvm {

struct Record {
  std::string signature;  // JSON
  std::vector<OrtKernelInfo> nodes;
};

// Tensors point into `bytes`. Throws std::runtime_error where these are not such a record.
Record read_record(const unsigned char* bytes, size_t size);

}  // namespace sparsecc::tvm

#endif  // SPARSECC_TVM_RECORD_H_
