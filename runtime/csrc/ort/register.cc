// Entry point of the operator library for onnxruntime.
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "kernel.h"
#include "node_reader.h"
#include "session_threads.h"

namespace sparsecc::ort {
namespace {

// ---- callbacks --------------------------------------------------------------------------------------

struct Operator : CustomOp {
  std::string name;
  Family family{};
  Activation activation{};
  int32_t threads = 0;  // of the sessions it is registered with, 0 if not known
};

const Operator& self(const CustomOp* op) { return *static_cast<const Operator*>(op); }

// Runs `body` and turns whatever it throws into a status: nothing may unwind into onnxruntime.
template <typename Body>
OrtStatus* guarded(const Functions& api, const char* prefix, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ErrorCode::kFail, "sparsecc: out of memory");
  } catch (const std::exception& error) {
    try {
      return api.CreateStatus(ErrorCode::kInvalidArgument, (std::string(prefix) + error.what()).c_str());
    } catch (...) {
      return api.CreateStatus(ErrorCode::kFail, "sparsecc: out of memory");
    }
  } catch (...) {
    return api.CreateStatus(ErrorCode::kRuntimeException, "sparsecc: internal error");
  }
}

OrtStatus* create_kernel(const CustomOp* op, const OrtApi* table, const OrtKernelInfo* info, void** kernel) {
  const Functions api(table);
  return guarded(api, "", [&] {
    *kernel = make_kernel(api, info, self(op).family, self(op).activation, self(op).threads).release();
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto* node = static_cast<const Kernel*>(kernel);
  return guarded(node->api, "", [&] {
    try {
      node->run(context);
    } catch (const KernelError& error) {
      throw KernelError(message(node->label, error.what()));
    }
  });
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

const char* name_of(const CustomOp* op) { return self(op).name.c_str(); }

// Null: the CPU provider.
const char* provider(const CustomOp*) { return nullptr; }

// x, values, indices, shape, scales with values in bytes, bias, and lo, hi for Clip.
ElementType input_type(const CustomOp* op, size_t index) {
  if (index == 1 && self(op).family.int8) return ElementType::kInt8;
  if (index == 2) return ElementType::kUint8;
  if (index == 3) return ElementType::kInt64;
  return ElementType::kFloat;
}

size_t input_count(const CustomOp* op) {
  return (self(op).activation.kind == SPARSECC_ACT_CLIP ? 7 : 5) + (self(op).family.int8 ? 1 : 0);
}

ElementType output_type(const CustomOp*, size_t) { return ElementType::kFloat; }
size_t output_count(const CustomOp*) { return 1; }
Characteristic required(const CustomOp*, size_t) { return Characteristic::kRequired; }
MemoryType default_memory(const CustomOp*, size_t) { return MemoryType::kDefault; }
int zero(const CustomOp*) { return 0; }
int operator_version(const CustomOp*) { return 1; }

// ---- the set of operators ---------------------------------------------------------------------------

Operator make_operator(const Family& family, const Activation& activation, int32_t threads) {
  Operator op{};
  op.version = kApiVersion;
  op.GetName = name_of;
  op.GetExecutionProviderType = provider;
  op.GetInputType = input_type;
  op.GetInputTypeCount = input_count;
  op.GetOutputType = output_type;
  op.GetOutputTypeCount = output_count;
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = required;
  op.GetOutputCharacteristic = required;
  op.GetInputMemoryType = default_memory;
  op.GetVariadicInputMinArity = zero;
  op.GetVariadicInputHomogeneity = zero;
  op.GetVariadicOutputMinArity = zero;
  op.GetVariadicOutputHomogeneity = zero;
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.GetStartVersion = operator_version;
  op.GetEndVersion = operator_version;
  op.name = std::string(family.name) + activation.suffix;
  op.family = family;
  op.activation = activation;
  op.threads = threads;
  return op;
}

// What CustomOpDomain_Add was given must stay where it is as long as any session lives, and sessions may
// outlive the library's static objects: leaked on purpose. One per copy of onnxruntime in the process and
// number of threads.
struct Domain {
  std::array<Operator, kFamilies.size() * kActivations.size()> operators;
  OrtCustomOpDomain* handle = nullptr;
};

OrtStatus* make_domain(const Functions& api, int32_t threads, Domain* domain) {
  if (OrtStatus* status = api.CreateCustomOpDomain(kDomain, &domain->handle)) return status;
  size_t next = 0;
  for (const Family& family : kFamilies) {
    for (const Activation& activation : kActivations) {
      Operator& op = domain->operators[next++];
      op = make_operator(family, activation, threads);
      if (OrtStatus* status = api.CustomOpDomain_Add(domain->handle, &op)) return status;
    }
  }
  return nullptr;
}

OrtStatus* domain_for(const OrtApi* table, const Functions& api, int32_t threads, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static auto* const domains = new std::map<std::pair<const OrtApi*, int32_t>, Domain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& known = (*domains)[{table, threads}];
  if (known == nullptr) {
    auto made = std::make_unique<Domain>();
    if (OrtStatus* status = make_domain(api, threads, made.get())) return status;
    known = made.release();
  }
  *out = known->handle;
  return nullptr;
}

// Session option "sparsecc.threads": how many threads the session has, which cannot be asked for.
int32_t told_threads(const Functions& api, const OrtSessionOptions* options) {
  constexpr const char* kKey = "sparsecc.threads";
  int has = 0;
  check(api, api.HasSessionConfigEntry(options, kKey, &has));
  if (has == 0) return 0;
  char text[16] = "";
  size_t size = sizeof(text) - 1;
  if (OrtStatus* status = api.GetSessionConfigEntry(options, kKey, text, &size)) {
    api.ReleaseStatus(status);  // too long for a number
    return 0;
  }
  return parse_threads(text);
}

OrtStatus* register_all(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const OrtApi* table = base->GetApi(kApiVersion);
  // Without a table there is not even a way to make a status: the session then reports the unknown
  // operators, or runs their function bodies.
  if (table == nullptr) return nullptr;
  const Functions api(table);
  OrtStatus* inner = nullptr;
  OrtStatus* outer = guarded(api, "sparsecc: ", [&] {
    OrtCustomOpDomain* domain = nullptr;
    inner = domain_for(table, api, told_threads(api, options), &domain);
    if (inner == nullptr) inner = api.AddCustomOpDomain(options, domain);
  });
  return outer != nullptr ? outer : inner;
}

}  // namespace
}  // namespace sparsecc::ort

extern "C" {

// The name onnxruntime looks for in a library.
SPARSECC_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return sparsecc::ort::register_all(options, base);
}

// The same under a name of our own, for programs that link several operator libraries statically.
SPARSECC_API OrtStatus* SparseccRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return sparsecc::ort::register_all(options, base);
}
}
