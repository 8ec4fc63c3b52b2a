// What a module that TVM loads calls: linked into it from libsparsecc_tvm.a. The module's own part (made by sparsecc/tvm/
// link.py) hands in its record and exports these under TVM's names, __tvm_ffi_sparsecc_*.
#ifndef SPARSECC_TVM_MODULE_H_
#define SPARSECC_TVM_MODULE_H_

#include "tvm/tvm_abi.h"

extern "C" {

// Of the module's own part: its record, or if the size is 0 the name of a file beside the module that holds it.
extern const unsigned char sparsecc_tvm_record[];
extern const uint64_t sparsecc_tvm_record_size;
extern const char sparsecc_tvm_record_file[];

// args: the number of a node, then its inputs that are not constant, then its outputs.
int sparsecc_tvm_run(void* self, const sparsecc::tvm::Any* args, int32_t count, sparsecc::tvm::Any* result);
// Packs the weights of all nodes for this processor now; else each is packed when it first runs.
int sparsecc_tvm_prepare(void* self, const sparsecc::tvm::Any* args, int32_t count, sparsecc::tvm::Any* result);
// Names, types and shapes of the model's inputs and outputs, as JSON.
int sparsecc_tvm_signature(void* self, const sparsecc::tvm::Any* args, int32_t count, sparsecc::tvm::Any* result);
}

#endif  // SPARSECC_TVM_MODULE_H_
