// The part of TVM's stable C interface (tvm-ffi) that compiled models use, as declared facts.
//
// A function that TVM finds by name in a shared library is `__tvm_ffi_NAME` with the signature below; tensors come as
// objects with a DLTensor behind a header of 24 bytes. Written down here so that the library needs no headers of TVM.
// What is called in TVM's runtime is looked for when the module is loaded and may be missing (weak).
#ifndef SPARSECC_TVM_ABI_H_
#define SPARSECC_TVM_ABI_H_

#include <cstddef>
#include <cstdint>

namespace sparsecc::tvm {

enum class TypeIndex : int32_t { kInt = 1, kDLTensorPtr = 7, kTensor = 70 };

struct Any {
  int32_t type_index;
  uint32_t small_length;
  union {
    int64_t integer;
    void* pointer;
  };
};
static_assert(sizeof(Any) == 16 && offsetof(Any, integer) == 8);

enum class TypeCode : uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  TypeCode code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, shape) == 24);

inline constexpr size_t kObjectHeader = 24;

struct ByteArray {
  const char* data;
  size_t size;
};

struct ParallelGroup;
using ParallelTask = int (*)(int task, ParallelGroup* group, void* data);

}  // namespace sparsecc::tvm

extern "C" {
__attribute__((weak)) void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
__attribute__((weak)) int TVMFFIStringFromByteArray(const sparsecc::tvm::ByteArray* text, sparsecc::tvm::Any* out);
// Runs the task on as many threads as TVM's pool has if `tasks` is 0.
__attribute__((weak)) int TVMBackendParallelLaunch(sparsecc::tvm::ParallelTask task, void* data, int tasks);
}

#endif  // SPARSECC_TVM_ABI_H_
