#include "tvm/module.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <mutex>
#include <new>
#include <stdexcept>

#include "ort/kernel.h"
#include "tvm/host.h"
#include "tvm/record.h"

namespace sparsecc::tvm {
namespace {

using ort::ElementType;
using ort::Kernel;
using ort::KernelError;

// ---- where the record is ----------------------------------------------------------------------------

// The file beside this module, mapped for good: weights that are packed are given back to the system by itself.
std::pair<const unsigned char*, size_t> map_file_beside() {
  Dl_info self{};
  if (dladdr(sparsecc_tvm_record_file, &self) == 0) throw std::runtime_error("the module does not know where it is");
  std::string path = self.dli_fname;
  const size_t slash = path.rfind('/');
  path = (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + sparsecc_tvm_record_file;
  const std::string fault = "cannot read " + path + ", the weights that belong beside this module";
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error(fault);
  struct stat status {};
  void* mapped = MAP_FAILED;
  if (fstat(file, &status) == 0 && status.st_size > 0)
    mapped = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) throw std::runtime_error(fault);
  return {static_cast<const unsigned char*>(mapped), static_cast<size_t>(status.st_size)};
}

// ---- nodes ------------------------------------------------------------------------------------------

struct Node {
  const OrtKernelInfo* info = nullptr;
  std::once_flag made;
  std::unique_ptr<Kernel> kernel;
  std::vector<size_t> computed;  // places of the inputs that a call brings
};

class Module {
 public:
  Module() {
    const auto [bytes, size] = sparsecc_tvm_record_size > 0
                                   ? std::pair{&sparsecc_tvm_record[0], static_cast<size_t>(sparsecc_tvm_record_size)}
                                   : map_file_beside();
    record_ = read_record(bytes, size);
    nodes_ = std::vector<Node>(record_.nodes.size());
    for (size_t i = 0; i < nodes_.size(); ++i) nodes_[i].info = &record_.nodes[i];
    for (ort::OperatorSpec& spec : ort::all_operators()) {
      std::string name = spec.name;
      specs_.emplace(std::move(name), std::move(spec));
    }
  }

  const std::string& signature() const { return record_.signature; }
  size_t size() const { return nodes_.size(); }

  const Node& node(int64_t number) {
    if (number < 0 || static_cast<size_t>(number) >= nodes_.size()) throw KernelError("no such node");
    Node& node = nodes_[static_cast<size_t>(number)];
    std::call_once(node.made, [&] { make(&node); });
    return node;
  }

 private:
  void make(Node* node) const {
    const OrtKernelInfo& info = *node->info;
    const std::string label = "node '" + info.name + "' (" + info.op + ")";
    const auto spec = specs_.find(info.op);
    if (spec == specs_.end() || spec->second.inputs.size() != info.inputs.size())
      throw KernelError(ort::message(label, "this module's kernels do not know it: make the module again"));
    for (size_t i = 0; i < info.inputs.size(); ++i) {
      if (!info.inputs[i].has_value()) node->computed.push_back(i);
    }
    try {
      node->kernel = spec->second.make(ort::NodeReader(host_functions(), &info), host_functions(), label,
                                       threads_of_pool());
    } catch (const KernelError& error) {
      throw KernelError(ort::message(label, error.what()));
    }
  }

  Record record_;
  std::vector<Node> nodes_;
  std::map<std::string, ort::OperatorSpec> specs_;
};

// Freed with the library.
Module& module() {
  static Module only;
  return only;
}

// ---- calls ------------------------------------------------------------------------------------------

ElementType element_type(const DLTensor& tensor) {
  switch (tensor.code) {
    case TypeCode::kFloat:
      return tensor.bits == 32 ? ElementType::kFloat : tensor.bits == 16 ? ElementType::kFloat16 : ElementType::kUndefined;
    case TypeCode::kBfloat:
      return ElementType::kBfloat16;
    case TypeCode::kUint:
      return tensor.bits == 8 ? ElementType::kUint8 : ElementType::kUndefined;
    case TypeCode::kInt:
      return tensor.bits == 8    ? ElementType::kInt8
             : tensor.bits == 32 ? ElementType::kInt32
             : tensor.bits == 64 ? ElementType::kInt64
                                 : ElementType::kUndefined;
    default:
      return ElementType::kUndefined;
  }
}

bool is_compact(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

OrtValue read_tensor(const Any& argument) {
  const DLTensor* tensor = nullptr;
  if (argument.type_index == static_cast<int32_t>(TypeIndex::kTensor)) {
    tensor = reinterpret_cast<const DLTensor*>(static_cast<const char*>(argument.pointer) + kObjectHeader);
  } else if (argument.type_index == static_cast<int32_t>(TypeIndex::kDLTensorPtr)) {
    tensor = static_cast<const DLTensor*>(argument.pointer);
  } else {
    throw KernelError("an argument is no tensor");
  }
  constexpr int32_t kProcessor = 1;
  if (tensor->device_type != kProcessor || tensor->lanes != 1 || !is_compact(*tensor))
    throw KernelError("a tensor is not a contiguous one of the processor");
  OrtValue value;
  value.type = element_type(*tensor);
  if (value.type == ElementType::kUndefined) throw KernelError("a tensor of a type that no operator takes");
  value.dims.assign(tensor->shape, tensor->shape + tensor->ndim);
  value.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  return value;
}

void run(const Any* args, int32_t count) {
  if (count < 1 || args[0].type_index != static_cast<int32_t>(TypeIndex::kInt))
    throw KernelError("a call that names no node");
  const Node& node = module().node(args[0].integer);
  const auto inputs = static_cast<int32_t>(node.computed.size());
  if (count < 1 + inputs) throw KernelError("a call without one of its inputs");
  OrtKernelContext call{node.info, std::vector<OrtValue>(node.info->inputs.size()), {}};
  for (int32_t i = 0; i < inputs; ++i) call.inputs[node.computed[static_cast<size_t>(i)]] = read_tensor(args[1 + i]);
  for (int32_t i = 1 + inputs; i < count; ++i) call.outputs.push_back(read_tensor(args[i]));
  try {
    node.kernel->run(&call);
  } catch (const KernelError& error) {
    throw KernelError(ort::message(node.kernel->label, error.what()));
  }
}

// Runs a body and turns what it throws into an error of TVM's.
template <typename Body>
int guarded(const Body& body) noexcept {
  const char* text = "sparsecc: internal error";
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    text = "sparsecc: out of memory";
  } catch (const std::exception& error) {
    if (TVMFFIErrorSetRaisedFromCStr != nullptr) TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
    return -1;
  } catch (...) {
  }
  if (TVMFFIErrorSetRaisedFromCStr != nullptr) TVMFFIErrorSetRaisedFromCStr("RuntimeError", text);
  return -1;
}

}  // namespace
}  // namespace sparsecc::tvm

extern "C" {

int sparsecc_tvm_run(void*, const sparsecc::tvm::Any* args, int32_t count, sparsecc::tvm::Any*) {
  return sparsecc::tvm::guarded([&] { sparsecc::tvm::run(args, count); });
}

int sparsecc_tvm_prepare(void*, const sparsecc::tvm::Any*, int32_t, sparsecc::tvm::Any*) {
  return sparsecc::tvm::guarded([] {
    for (size_t i = 0; i < sparsecc::tvm::module().size(); ++i) sparsecc::tvm::module().node(static_cast<int64_t>(i));
  });
}

int sparsecc_tvm_signature(void*, const sparsecc::tvm::Any*, int32_t, sparsecc::tvm::Any* result) {
  int code = 0;
  const int thrown = sparsecc::tvm::guarded([&] {
    const std::string& text = sparsecc::tvm::module().signature();
    const sparsecc::tvm::ByteArray bytes{text.data(), text.size()};
    if (TVMFFIStringFromByteArray == nullptr) throw std::runtime_error("sparsecc: TVM's runtime is not loaded");
    code = TVMFFIStringFromByteArray(&bytes, result);
  });
  return thrown != 0 ? thrown : code;
}
}
