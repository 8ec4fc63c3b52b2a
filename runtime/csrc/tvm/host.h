// The functions that our operators ask their host for, answered for modules of TVM: one set of operators, with one
// set of checks, serves both runtimes.
#ifndef SPARSECC_TVM_HOST_H_
#define SPARSECC_TVM_HOST_H_

#include <string>
#include <vector>

#include "ort/ort_abi.h"
#include "tvm/record.h"

struct OrtStatus {
  std::string message;
};

// A call of a node.
struct OrtKernelContext {
  const OrtKernelInfo* node;      // holds the inputs that are constant
  std::vector<OrtValue> inputs;   // where they are constant not set
  std::vector<OrtValue> outputs;  // made by the caller
};

namespace sparsecc::tvm {

const ort::Functions& host_functions();
// $TVM_NUM_THREADS or $OMP_NUM_THREADS, as TVM's pool reads them; 0 where neither is given.
int32_t threads_of_pool();

}  // namespace sparsecc::tvm

#endif  // SPARSECC_TVM_HOST_H_
