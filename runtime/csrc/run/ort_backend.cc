// Models on onnxruntime, which is loaded when the program runs: nothing of it is needed to build this.
#include <dlfcn.h>

#include <filesystem>
#include <memory>
#include <utility>

#include "backend.h"
#include "error.h"
#include "options.h"
#include "ort_session_abi.h"

namespace sparsecc::run {
namespace {

using ort::kApiVersion;

void* open_library(const std::string& path, const std::string& what) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw Error(Exit::kMissing, what + " cannot be loaded: " + dlerror());
  return handle;
}

template <typename Function>
Function* symbol(void* handle, const char* name, const std::string& path) {
  void* found = dlsym(handle, name);
  if (found == nullptr) throw Error(Exit::kMissing, path + " has no " + name + ": it is another library");
  return reinterpret_cast<Function*>(found);
}

// Never closed: sessions and threads of onnxruntime live as long as the process.
const OrtApiBase* load_onnxruntime(const std::string& path) {
  void* handle = nullptr;
  if (!path.empty()) {
    handle = open_library(path, "onnxruntime");
  } else {
    for (const char* name : {"libonnxruntime.so.1", "libonnxruntime.so"}) {
      if ((handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) != nullptr) break;
    }
  }
  if (handle == nullptr) {
    throw Error(Exit::kMissing,
                "onnxruntime is not found: install libonnxruntime, or give its file with --onnxruntime or in "
                "SPARSECC_ONNXRUNTIME (the Python package has it as onnxruntime/capi/libonnxruntime.so.*)");
  }
  return symbol<const OrtApiBase*()>(handle, "OrtGetApiBase", path.empty() ? "libonnxruntime.so" : path)();
}

const OrtApi* table_of(const OrtApiBase* base) {
  const OrtApi* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    throw Error(Exit::kMissing, std::string("onnxruntime ") + base->GetVersionString() +
                                    " is too old: install 1.17 or later");
  }
  return table;
}

class OrtBackend : public Backend {
 public:
  explicit OrtBackend(const Options& options)
      : base_(load_onnxruntime(options.onnxruntime)), api_(table_of(base_)), library_(options.library) {
    std::error_code problem;
    if (!std::filesystem::is_regular_file(options.model, problem)) {
      throw Error(Exit::kModel, options.model + ": no such file");
    }
    const auto settings = make<OrtSessionOptions>(api_.CreateSessionOptions, api_.ReleaseSessionOptions);
    if (options.threads > 0) {
      check(api_.SetIntraOpNumThreads(settings.get(), options.threads));
      check(api_.AddSessionConfigEntry(settings.get(), "sparsecc.threads",
                                       std::to_string(options.threads).c_str()));
    }
    if (!library_.empty()) register_operators(settings.get());
    env_ = make<OrtEnv>(api_.CreateEnv, api_.ReleaseEnv, kLogNothing, "sparsecc-run");
    session_ = make<OrtSession>(api_.CreateSession, api_.ReleaseSession, env_.get(), options.model.c_str(),
                                static_cast<const OrtSessionOptions*>(settings.get()));
    inputs_ = declared(api_.SessionGetInputCount, api_.SessionGetInputName, api_.SessionGetInputTypeInfo);
    outputs_ = declared(api_.SessionGetOutputCount, api_.SessionGetOutputName, api_.SessionGetOutputTypeInfo);
    for (const Declared& item : inputs_) input_names_.push_back(item.name.c_str());
    for (const Declared& item : outputs_) output_names_.push_back(item.name.c_str());
    results_.resize(outputs_.size());
  }

  ~OrtBackend() override {
    release_outputs();
    for (OrtValue* value : values_) api_.ReleaseValue(value);
  }
  OrtBackend(const OrtBackend&) = delete;
  OrtBackend& operator=(const OrtBackend&) = delete;

  const std::vector<Declared>& inputs() const override { return inputs_; }
  const std::vector<Declared>& outputs() const override { return outputs_; }
  std::string runtime() const override { return std::string("onnxruntime ") + base_->GetVersionString(); }
  std::string library() const override { return library_; }

  void set_inputs(std::vector<Array> arrays) override {
    arrays_ = std::move(arrays);
    const auto memory = make<OrtMemoryInfo>(api_.CreateCpuMemoryInfo, api_.ReleaseMemoryInfo,
                                            kDeviceAllocator, kDefaultMemory);
    for (Array& array : arrays_) {
      array.bytes.reserve(1);  // data() of an empty vector may be null, which is refused
      OrtValue* value = nullptr;
      check(api_.CreateTensorWithDataAsOrtValue(memory.get(), array.bytes.data(), array.bytes.size(),
                                                array.shape.data(), array.shape.size(), array.type->onnx,
                                                &value));
      values_.push_back(value);
    }
  }

  void run() override {
    check(api_.Run(session_.get(), nullptr, input_names_.data(), values_.data(), values_.size(),
                   output_names_.data(), results_.size(), results_.data()));
  }

  void release_outputs() override {
    for (OrtValue*& value : results_) {
      if (value != nullptr) api_.ReleaseValue(value);
      value = nullptr;
    }
  }

  Array output(size_t index) const override {
    const Declared& wanted = outputs_[index];
    if (wanted.type == nullptr)
      throw Error(Exit::kUsage, "output '" + wanted.name + "' is of a type that .npy files do not hold");
    OrtValue* value = results_[index];
    const auto info = make<OrtTensorTypeAndShapeInfo>(
        [&](OrtTensorTypeAndShapeInfo** out) { return api_.GetTensorTypeAndShape(value, out); },
        api_.ReleaseTensorTypeAndShapeInfo);
    Array array{wanted.type, shape_of(info.get()), {}};
    size_t size = wanted.type->size;
    for (const int64_t dim : array.shape) size *= static_cast<size_t>(dim);
    void* data = nullptr;
    check(api_.GetTensorMutableData(value, &data));
    const auto* begin = static_cast<const std::byte*>(data);
    if (size > 0) array.bytes.assign(begin, begin + size);
    return array;
  }

 private:
  template <typename Handle>
  using Owned = std::unique_ptr<Handle, void (*)(Handle*)>;

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = api_.GetErrorMessage(status);
    api_.ReleaseStatus(status);
    throw Error(Exit::kModel, "onnxruntime: " + message);
  }

  template <typename Handle, typename Create, typename... Arguments>
  Owned<Handle> make(Create create, void (*release)(Handle*), Arguments... arguments) const {
    Handle* made = nullptr;
    check(create(arguments..., &made));
    return {made, release};
  }

  void register_operators(OrtSessionOptions* settings) const {
    void* handle = open_library(library_, "the operator library");
    check(symbol<OrtStatus*(OrtSessionOptions*, const OrtApiBase*)>(handle, "SparseccRegisterCustomOps",
                                                                    library_)(settings, base_));
  }

  std::vector<int64_t> shape_of(const OrtTensorTypeAndShapeInfo* info) const {
    size_t rank = 0;
    check(api_.GetDimensionsCount(info, &rank));
    std::vector<int64_t> shape(rank);
    check(api_.GetDimensions(info, shape.data(), rank));
    return shape;
  }

  template <typename Count, typename Name, typename Info>
  std::vector<Declared> declared(Count count, Name name, Info type_info) const {
    size_t total = 0;
    check(count(session_.get(), &total));
    OrtAllocator* allocator = nullptr;
    check(api_.GetAllocatorWithDefaultOptions(&allocator));
    std::vector<Declared> items(total);
    for (size_t i = 0; i < total; ++i) {
      char* text = nullptr;
      check(name(session_.get(), i, allocator, &text));
      items[i].name = text;
      check(api_.AllocatorFree(allocator, text));
      const auto info = make<OrtTypeInfo>(
          [&](OrtTypeInfo** out) { return type_info(session_.get(), i, out); }, api_.ReleaseTypeInfo);
      const OrtTensorTypeAndShapeInfo* tensor = nullptr;
      check(api_.CastTypeInfoToTensorInfo(info.get(), &tensor));
      if (tensor == nullptr) continue;
      int type = 0;
      check(api_.GetTensorElementType(tensor, &type));
      items[i].type = type_of_onnx(type);
      items[i].shape = shape_of(tensor);
    }
    return items;
  }

  const OrtApiBase* base_;
  SessionFunctions api_;
  std::string library_;
  Owned<OrtEnv> env_{nullptr, nullptr};
  Owned<OrtSession> session_{nullptr, nullptr};
  std::vector<Declared> inputs_;
  std::vector<Declared> outputs_;
  std::vector<const char*> input_names_;
  std::vector<const char*> output_names_;
  std::vector<Array> arrays_;
  std::vector<OrtValue*> values_;
  std::vector<OrtValue*> results_;
};

}  // namespace

std::unique_ptr<Backend> make_ort_backend(const Options& options) {
  return std::make_unique<OrtBackend>(options);
}

}  // namespace sparsecc::run
