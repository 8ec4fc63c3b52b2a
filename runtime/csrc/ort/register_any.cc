// The name that onnxruntime looks for in a shared library. In a file of its own: a program that links several operator
// libraries as archives takes only what it calls out of each, and calls ours SparseccRegisterCustomOps.
#include "ort_abi.h"
#include "sparsecc/c_api.h"

extern "C" {

SPARSECC_API OrtStatus* SparseccRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

SPARSECC_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return SparseccRegisterCustomOps(options, base);
}
}
