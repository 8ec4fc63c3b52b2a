#include "tvm/host.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "schedule.h"
#include "tvm/tvm_abi.h"

namespace sparsecc::tvm {
namespace {

using ort::ElementType;

OrtStatus* fault(const char* message) { return new OrtStatus{message}; }

OrtStatus* create_status(ort::ErrorCode, const char* message) { return fault(message); }
const char* error_message(const OrtStatus* status) { return status->message.c_str(); }
void release_status(OrtStatus* status) { delete status; }

// ---- tensors ----------------------------------------------------------------------------------------

OrtStatus* mutable_data(OrtValue* value, void** data) {
  *data = value->data;
  return nullptr;
}

OrtStatus* type_and_shape(const OrtValue* value, ElementType* type, const int64_t** dims, size_t* rank) {
  *type = value->type;
  *dims = value->dims.data();
  *rank = value->dims.size();
  return nullptr;
}

// ---- nodes ------------------------------------------------------------------------------------------

template <typename Map, typename T>
OrtStatus* found(const Map& map, const char* name, T* out) {
  const auto at = map.find(name);
  if (at == map.end()) return fault("no such attribute");
  *out = at->second;
  return nullptr;
}

OrtStatus* number(const OrtKernelInfo* node, const char* name, float* out) {
  return found(node->numbers, name, out);
}

OrtStatus* integer(const OrtKernelInfo* node, const char* name, int64_t* out) {
  return found(node->integers, name, out);
}

// First the size, which counts the terminator, then the letters.
OrtStatus* copy_text(const std::string& text, char* out, size_t* size) {
  if (out != nullptr) {
    if (*size < text.size() + 1) return fault("too little room for a text");
    std::memcpy(out, text.c_str(), text.size() + 1);
  }
  *size = text.size() + 1;
  return nullptr;
}

OrtStatus* text(const OrtKernelInfo* node, const char* name, char* out, size_t* size) {
  const auto at = node->texts.find(name);
  return at == node->texts.end() ? fault("no such attribute") : copy_text(at->second, out, size);
}

OrtStatus* node_name(const OrtKernelInfo* node, char* out, size_t* size) {
  return copy_text(node->name, out, size);
}

OrtStatus* list(const OrtKernelInfo* node, const char* name, int64_t* out, size_t* size) {
  const auto at = node->lists.find(name);
  if (at == node->lists.end()) return fault("no such attribute");
  if (out != nullptr) {
    if (*size < at->second.size()) return fault("too little room for a list");
    std::copy(at->second.begin(), at->second.end(), out);
  }
  *size = at->second.size();
  return nullptr;
}

OrtStatus* constant(const OrtKernelInfo* node, size_t index, int* is_constant, const OrtValue** value) {
  const bool there = index < node->inputs.size() && node->inputs[index].has_value();
  *is_constant = there ? 1 : 0;
  *value = there ? &*node->inputs[index] : nullptr;
  return nullptr;
}

// ---- calls ------------------------------------------------------------------------------------------

OrtStatus* input(const OrtKernelContext* call, size_t index, const OrtValue** value) {
  if (index >= call->inputs.size()) return fault("a call without one of its inputs");
  const std::optional<OrtValue>& constant = call->node->inputs[index];
  *value = constant.has_value() ? &*constant : &call->inputs[index];
  return nullptr;
}

OrtStatus* output(OrtKernelContext* call, size_t index, const int64_t* dims, size_t rank, OrtValue** value) {
  if (index >= call->outputs.size()) return fault("a call without one of its outputs");
  OrtValue& made = call->outputs[index];
  if (!std::equal(made.dims.begin(), made.dims.end(), dims, dims + rank))
    return fault("a result of another shape than the module was compiled for");
  *value = &made;
  return nullptr;
}

struct Shared {
  void (*run)(void*, size_t);
  void* data;
  size_t total;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t task = next++; task < total; task = next++) run(data, task);
  }
};

int join(int, ParallelGroup*, void* data) {
  static_cast<Shared*>(data)->work();
  return 0;
}

OrtStatus* parallel_for(const OrtKernelContext*, void (*run)(void*, size_t), size_t total, size_t, void* data) {
  Shared shared{run, data, total};
  if (TVMBackendParallelLaunch != nullptr) TVMBackendParallelLaunch(&join, &shared, 0);
  shared.work();  // what is left where there is no pool, or where this is one of its tasks
  return nullptr;
}

ort::Functions make_functions() {
  ort::Functions made;
  made.CreateStatus = create_status;
  made.GetErrorMessage = error_message;
  made.ReleaseStatus = release_status;
  made.GetTensorMutableData = mutable_data;
  made.GetTensorElementTypeAndShapeDataReference = type_and_shape;
  made.KernelInfoGetAttribute_float = number;
  made.KernelInfoGetAttribute_int64 = integer;
  made.KernelInfoGetAttribute_string = text;
  made.KernelInfoGetAttributeArray_int64 = list;
  made.KernelInfo_GetNodeName = node_name;
  made.KernelInfoGetConstantInput_tensor = constant;
  made.KernelContext_GetInput = input;
  made.KernelContext_GetOutput = output;
  made.KernelContext_ParallelFor = parallel_for;
  return made;
}

}  // namespace

const ort::Functions& host_functions() {
  static const ort::Functions functions = make_functions();
  return functions;
}

int32_t threads_of_pool() {
  for (const char* variable : {"TVM_NUM_THREADS", "OMP_NUM_THREADS"}) {
    if (const char* text = std::getenv(variable)) return parse_threads(text);
  }
  return 0;
}

}  // namespace sparsecc::tvm
