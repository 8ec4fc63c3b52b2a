#include "kernel.h"

#include <algorithm>
#include <iterator>

namespace sparsecc::ort {

std::string message(const std::string& label, const char* fault) {
  std::string text = "sparsecc: " + label + ": " + fault;
  for (char& c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (code < 0x20 || code == 0x7f) c = '?';
  }
  return text;
}

TensorView read_input(const Functions& api, const OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  check(api, api.KernelContext_GetInput(context, index, &value));
  return view(api, value);
}

void* make_output(const Functions& api, OrtKernelContext* context, size_t index,
                  const std::vector<int64_t>& dims) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(api, api.KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  check(api, api.GetTensorMutableData(value, &data));
  return data;
}

std::vector<OperatorSpec> all_operators() {
  std::vector<OperatorSpec> all;
  for (const auto family : {linear_operators, recurrent_operators, plane_operators, transformer_operators,
                            algebra_operators}) {
    std::vector<OperatorSpec> specs = family();
    std::move(specs.begin(), specs.end(), std::back_inserter(all));
  }
  return all;
}

}  // namespace sparsecc::ort
