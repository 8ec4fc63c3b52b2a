// Entry point of the operator library for onnxruntime.
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "busy.h"
#include "kernel.h"
#include "node_reader.h"
#include "schedule.h"
#include "session_threads.h"
#include "sparsecc/c_api.h"

namespace sparsecc::ort {
namespace {

constexpr const char* kDomain = "ai.sparsecc";
constexpr size_t kLongestName = 200;  // of a node, in messages

// ---- callbacks --------------------------------------------------------------------------------------

struct Operator : CustomOp {
  OperatorSpec spec;
  const Functions* api = nullptr;
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

OrtStatus* create_kernel(const CustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  const Functions& api = *self(op).api;
  return guarded(api, "", [&] {
    const NodeReader node(api, info);
    std::string name = node.name();
    if (name.size() > kLongestName) name = name.substr(0, kLongestName) + "...";
    const OperatorSpec& spec = self(op).spec;
    const std::string label = "node '" + name + "' (" + spec.name + ")";
    try {
      *kernel = spec.make(node, api, label, self(op).threads).release();
    } catch (const KernelError& error) {
      throw KernelError(message(label, error.what()));
    }
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const auto* node = static_cast<const Kernel*>(kernel);
  return guarded(node->api, "", [&] {
    const BusyRun run(node->label);
    try {
      node->run(context);
    } catch (const KernelError& error) {
      throw KernelError(message(node->label, error.what()));
    }
  });
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

const char* name_of(const CustomOp* op) { return self(op).spec.name.c_str(); }

// Null: the CPU provider.
const char* provider(const CustomOp*) { return nullptr; }

ElementType input_type(const CustomOp* op, size_t index) { return declared_type(self(op).spec.inputs[index]); }
size_t input_count(const CustomOp* op) { return self(op).spec.inputs.size(); }
ElementType output_type(const CustomOp* op, size_t index) { return self(op).spec.outputs[index]; }
size_t output_count(const CustomOp* op) { return self(op).spec.outputs.size(); }
Characteristic required(const CustomOp*, size_t) { return Characteristic::kRequired; }
MemoryType default_memory(const CustomOp*, size_t) { return MemoryType::kDefault; }
int zero(const CustomOp*) { return 0; }
int operator_version(const CustomOp*) { return 1; }

// ---- the set of operators ---------------------------------------------------------------------------

Operator make_operator(OperatorSpec spec, const Functions* api, int32_t threads) {
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
  op.spec = std::move(spec);
  op.api = api;
  op.threads = threads;
  return op;
}

// What CustomOpDomain_Add was given must stay where it is as long as any session lives, and sessions may
// outlive the library's static objects: leaked on purpose. One per copy of onnxruntime in the process and
// number of threads.
struct Domain {
  Functions api;
  std::vector<Operator> operators;
  OrtCustomOpDomain* handle = nullptr;
};

OrtStatus* make_domain(int32_t threads, Domain* domain) {
  const Functions& api = domain->api;
  if (OrtStatus* status = api.CreateCustomOpDomain(kDomain, &domain->handle)) return status;
  for (OperatorSpec& spec : all_operators()) domain->operators.push_back(make_operator(std::move(spec), &api, threads));
  for (const Operator& op : domain->operators) {
    if (OrtStatus* status = api.CustomOpDomain_Add(domain->handle, &op)) return status;
  }
  return nullptr;
}

OrtStatus* domain_for(const OrtApi* table, const Functions& api, int32_t threads, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static auto* const domains = new std::map<std::pair<const OrtApi*, int32_t>, Domain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& known = (*domains)[{table, threads}];
  if (known == nullptr) {
    std::unique_ptr<Domain> made(new Domain{api, {}, nullptr});
    if (OrtStatus* status = make_domain(threads, made.get())) return status;
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

// Version 1.n of onnxruntime has version n of the table; one that is too old would print a complaint if asked.
const OrtApi* newer_table(const OrtApiBase* base) {
  int major = 0;
  unsigned minor = 0;
  if (std::sscanf(base->GetVersionString(), "%d.%u", &major, &minor) != 2) return nullptr;
  return major == 1 && minor >= kNewerApiVersion ? base->GetApi(kNewerApiVersion) : nullptr;
}

OrtStatus* register_all(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const OrtApi* table = base->GetApi(kApiVersion);
  // Without a table there is not even a way to make a status: the session then reports the unknown
  // operators, or runs their function bodies.
  if (table == nullptr) return nullptr;
  const Functions api(table, newer_table(base));
  OrtStatus* inner = nullptr;
  OrtStatus* outer = guarded(api, "sparsecc: ", [&] {
    OrtCustomOpDomain* domain = nullptr;
    inner = domain_for(table, api, told_threads(api, options), &domain);
    if (inner == nullptr) inner = api.AddCustomOpDomain(options, domain);
  });
  return outer != nullptr ? outer : inner;
}

const char* type_name(ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return "float32";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kInt8:
      return "int8";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case kStoredValues:
      return "float32/float16/bfloat16";
    case ElementType::kIntegers:
      return "int32/int64";
    default:
      return "?";
  }
}

std::string operator_table() {
  std::string text;
  for (const OperatorSpec& spec : all_operators()) {
    text += spec.name;
    for (const ElementType type : spec.inputs) text += std::string(" ") + type_name(type);
    text += " ->";
    for (const ElementType type : spec.outputs) text += std::string(" ") + type_name(type);
    text += '\n';
  }
  return text;
}

}  // namespace
}  // namespace sparsecc::ort

extern "C" {

SPARSECC_API const char* sparsecc_operator_table(void) {
  static const std::string* const table = new std::string(sparsecc::ort::operator_table());
  return table->c_str();
}

// A name of our own, for programs that link several operator libraries; register_any.cc has the usual one.
SPARSECC_API OrtStatus* SparseccRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return sparsecc::ort::register_all(options, base);
}
}
