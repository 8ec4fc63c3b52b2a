// The part of onnxruntime's C interface that the operator library calls, as declared facts.
//
// onnxruntime promises a stable binary interface to custom-operator libraries: `OrtApi` is a table of
// function pointers to which entries are only ever appended, `OrtApiBase::GetApi(version)` returns it,
// and `OrtCustomOp` is a structure of callbacks, also append-only, whose first field says how much of it
// the library knows. Positions, signatures and field order below are those published facts, written down
// here because the Python wheel of onnxruntime carries no headers and a fixed release's header would
// tie the library to that release. Nothing is copied from onnxruntime's sources. The library asks for
// kApiVersion, the lowest version with everything it calls, so one binary serves onnxruntime 1.17 and
// every later release; tests/runtime/test_ops.py exercises it against the installed one.
#ifndef SPARSECC_ORT_ABI_H_
#define SPARSECC_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

// Opaque handles of onnxruntime.
struct OrtApi;
struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace sparsecc::ort {

inline constexpr uint32_t kApiVersion = 17;
// The first version with SPARSECC_ORT_NEWER_FUNCTIONS, which are used where there are any.
inline constexpr uint32_t kNewerApiVersion = 24;

enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6 };
enum class ElementType : int {
  kIntegers = -1,  // our own word for int32 or int64, which onnxruntime is told as kUndefined
  kUndefined = 0,  // as the type of an operator's input: any
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16
};
enum class Characteristic : int { kRequired = 0 };
enum class MemoryType : int { kDefault = 0 };

// (position in OrtApi, name, result, arguments)
#define SPARSECC_ORT_FUNCTIONS(ENTRY)                                                                      \
  ENTRY(0, CreateStatus, OrtStatus*, (ErrorCode, const char* message))                                     \
  ENTRY(2, GetErrorMessage, const char*, (const OrtStatus*))                                               \
  ENTRY(26, CreateCustomOpDomain, OrtStatus*, (const char* domain, OrtCustomOpDomain**))                   \
  ENTRY(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain*, const struct CustomOp*))                  \
  ENTRY(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                       \
  ENTRY(51, GetTensorMutableData, OrtStatus*, (OrtValue*, void** data))                                    \
  ENTRY(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, ElementType*))            \
  ENTRY(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                   \
  ENTRY(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))               \
  ENTRY(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))             \
  ENTRY(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo*, const char*, float*))         \
  ENTRY(86, KernelInfoGetAttribute_int64, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*))       \
  ENTRY(87, KernelInfoGetAttribute_string, OrtStatus*,                                                     \
        (const OrtKernelInfo*, const char*, char*, size_t*))                                               \
  ENTRY(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext*, size_t, const OrtValue**))       \
  ENTRY(91, KernelContext_GetOutput, OrtStatus*,                                                           \
        (OrtKernelContext*, size_t, const int64_t* dims, size_t rank, OrtValue**))                         \
  ENTRY(93, ReleaseStatus, void, (OrtStatus*))                                                             \
  ENTRY(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo*))                             \
  ENTRY(163, KernelInfoGetAttributeArray_int64, OrtStatus*,                                                \
        (const OrtKernelInfo*, const char*, int64_t*, size_t*))                                            \
  ENTRY(237, HasSessionConfigEntry, OrtStatus*, (const OrtSessionOptions*, const char* key, int* has))     \
  ENTRY(238, GetSessionConfigEntry, OrtStatus*,                                                            \
        (const OrtSessionOptions*, const char* key, char* value, size_t*))                                 \
  ENTRY(244, KernelInfo_GetNodeName, OrtStatus*, (const OrtKernelInfo*, char*, size_t*))                   \
  ENTRY(249, KernelInfoGetConstantInput_tensor, OrtStatus*,                                                \
        (const OrtKernelInfo*, size_t, int* is_constant, const OrtValue**))                                \
  ENTRY(274, KernelContext_ParallelFor, OrtStatus*,                                                        \
        (const OrtKernelContext*, void (*fn)(void*, size_t), size_t total, size_t num_batch, void* data))

// A tensor's type and shape without an object that has to be made and released, which took a quarter of the time of a
// call of a node.
#define SPARSECC_ORT_NEWER_FUNCTIONS(ENTRY)                                      \
  ENTRY(414, GetTensorElementTypeAndShapeDataReference, OrtStatus*,              \
        (const OrtValue*, ElementType*, const int64_t** dims, size_t* rank))

// The entries above, taken out of tables that GetApi returned. Those of `newer` are null if that is.
struct Functions {
  Functions() = default;  // for a host that is not onnxruntime and fills them in
  explicit Functions(const OrtApi* table, const OrtApi* newer = nullptr) {
    auto entries = reinterpret_cast<void* const*>(table);
#define SPARSECC_ORT_TAKE(position, name, result, arguments) \
  name = reinterpret_cast<result(*) arguments>(entries[position]);
    SPARSECC_ORT_FUNCTIONS(SPARSECC_ORT_TAKE)
    if (newer == nullptr) return;
    entries = reinterpret_cast<void* const*>(newer);
    SPARSECC_ORT_NEWER_FUNCTIONS(SPARSECC_ORT_TAKE)
#undef SPARSECC_ORT_TAKE
  }

#define SPARSECC_ORT_MEMBER(position, name, result, arguments) result(*name) arguments = nullptr;
  SPARSECC_ORT_FUNCTIONS(SPARSECC_ORT_MEMBER)
  SPARSECC_ORT_NEWER_FUNCTIONS(SPARSECC_ORT_MEMBER)
#undef SPARSECC_ORT_MEMBER
};

// OrtCustomOp as of version 17. A null callback that onnxruntime treats as optional stays null here.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  OrtStatus* (*CreateKernelV2)(const CustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

#if UINTPTR_MAX == UINT64_MAX
static_assert(offsetof(CustomOp, CreateKernel) == 8);
static_assert(offsetof(CustomOp, KernelCompute) == 64);
static_assert(offsetof(CustomOp, GetInputMemoryType) == 96);
static_assert(offsetof(CustomOp, CreateKernelV2) == 136);
static_assert(offsetof(CustomOp, GetStartVersion) == 160);
static_assert(offsetof(CustomOp, GetAliasMap) == 192);
static_assert(sizeof(CustomOp) == 208);
#endif

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_ABI_H_
