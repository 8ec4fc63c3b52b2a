// A program of one file: the operator library as an archive, beside another one that has onnxruntime's usual name.
#include <cstdio>

#include "sparsecc/c_api.h"

extern "C" {
int RegisterCustomOps() { return 42; }
void* SparseccRegisterCustomOps(void* options, const void* base);
}

int main() {
  void* (*volatile ours)(void*, const void*) = SparseccRegisterCustomOps;
  std::printf("%s, %s, %d\n", sparsecc_version(), sparsecc_isas(), RegisterCustomOps());
  return ours == nullptr;
}
