// The entries of onnxruntime's C interface that make and run sessions, as facts like those in ort_abi.h.
#ifndef SPARSECC_RUN_ORT_SESSION_ABI_H_
#define SPARSECC_RUN_ORT_SESSION_ABI_H_

#include "ort_abi.h"

struct OrtEnv;
struct OrtSession;
struct OrtRunOptions;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtTypeInfo;

namespace sparsecc::run {

inline constexpr int kLogNothing = 4;  // only what ends the process: errors come back as statuses
inline constexpr int kDeviceAllocator = 0;
inline constexpr int kDefaultMemory = 0;

// (position in OrtApi, name, result, arguments)
#define SPARSECC_ORT_SESSION_FUNCTIONS(ENTRY)                                                              \
  ENTRY(2, GetErrorMessage, const char*, (const OrtStatus*))                                               \
  ENTRY(3, CreateEnv, OrtStatus*, (int log_level, const char* id, OrtEnv**))                               \
  ENTRY(7, CreateSession, OrtStatus*,                                                                      \
        (const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**))                         \
  ENTRY(9, Run, OrtStatus*,                                                                                \
        (OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs, \
         size_t input_count, const char* const* output_names, size_t output_count, OrtValue** outputs))    \
  ENTRY(10, CreateSessionOptions, OrtStatus*, (OrtSessionOptions**))                                       \
  ENTRY(24, SetIntraOpNumThreads, OrtStatus*, (OrtSessionOptions*, int))                                   \
  ENTRY(30, SessionGetInputCount, OrtStatus*, (const OrtSession*, size_t*))                                \
  ENTRY(31, SessionGetOutputCount, OrtStatus*, (const OrtSession*, size_t*))                               \
  ENTRY(33, SessionGetInputTypeInfo, OrtStatus*, (const OrtSession*, size_t, OrtTypeInfo**))               \
  ENTRY(34, SessionGetOutputTypeInfo, OrtStatus*, (const OrtSession*, size_t, OrtTypeInfo**))              \
  ENTRY(36, SessionGetInputName, OrtStatus*, (const OrtSession*, size_t, OrtAllocator*, char**))           \
  ENTRY(37, SessionGetOutputName, OrtStatus*, (const OrtSession*, size_t, OrtAllocator*, char**))          \
  ENTRY(49, CreateTensorWithDataAsOrtValue, OrtStatus*,                                                    \
        (const OrtMemoryInfo*, void* data, size_t nbytes, const int64_t* dims, size_t rank, int type,      \
         OrtValue**))                                                                                      \
  ENTRY(51, GetTensorMutableData, OrtStatus*, (OrtValue*, void** data))                                    \
  ENTRY(55, CastTypeInfoToTensorInfo, OrtStatus*, (const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)) \
  ENTRY(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int*))                    \
  ENTRY(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                   \
  ENTRY(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t))               \
  ENTRY(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))             \
  ENTRY(69, CreateCpuMemoryInfo, OrtStatus*, (int allocator, int memory, OrtMemoryInfo**))                 \
  ENTRY(76, AllocatorFree, OrtStatus*, (OrtAllocator*, void*))                                             \
  ENTRY(78, GetAllocatorWithDefaultOptions, OrtStatus*, (OrtAllocator**))                                  \
  ENTRY(92, ReleaseEnv, void, (OrtEnv*))                                                                   \
  ENTRY(93, ReleaseStatus, void, (OrtStatus*))                                                             \
  ENTRY(94, ReleaseMemoryInfo, void, (OrtMemoryInfo*))                                                     \
  ENTRY(95, ReleaseSession, void, (OrtSession*))                                                           \
  ENTRY(96, ReleaseValue, void, (OrtValue*))                                                               \
  ENTRY(98, ReleaseTypeInfo, void, (OrtTypeInfo*))                                                         \
  ENTRY(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo*))                             \
  ENTRY(100, ReleaseSessionOptions, void, (OrtSessionOptions*))                                            \
  ENTRY(130, AddSessionConfigEntry, OrtStatus*, (OrtSessionOptions*, const char* key, const char* value))

struct SessionFunctions {
  explicit SessionFunctions(const OrtApi* table) {
    auto entries = reinterpret_cast<void* const*>(table);
#define SPARSECC_ORT_TAKE(position, name, result, arguments) \
  name = reinterpret_cast<result(*) arguments>(entries[position]);
    SPARSECC_ORT_SESSION_FUNCTIONS(SPARSECC_ORT_TAKE)
#undef SPARSECC_ORT_TAKE
  }

#define SPARSECC_ORT_MEMBER(position, name, result, arguments) result(*name) arguments = nullptr;
  SPARSECC_ORT_SESSION_FUNCTIONS(SPARSECC_ORT_MEMBER)
#undef SPARSECC_ORT_MEMBER
};

}  // namespace sparsecc::run

#endif  // SPARSECC_RUN_ORT_SESSION_ABI_H_
