// One node of a session: made from its constant inputs and attributes, run on the session's threads.
#ifndef SPARSECC_ORT_KERNEL_H_
#define SPARSECC_ORT_KERNEL_H_

#include <memory>
#include <stdexcept>
#include <string>

#include "op_table.h"
#include "ort_abi.h"

namespace sparsecc::ort {

// A violated rule, in one line. Turned into an OrtStatus at the border; never leaves the library.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Reads input 0 of the context and writes output 0. Throws KernelError.
  virtual void run(OrtKernelContext* context) const = 0;

  const Functions api;
  const std::string label;  // "node 'fc1' (SparseMatMul)", for messages

 protected:
  Kernel(const Functions& functions, std::string node_label)
      : api(functions), label(std::move(node_label)) {}
};

// "sparsecc: <label>: <fault>" as one line, whatever the file's texts hold.
std::string message(const std::string& label, const char* fault);

// Validates everything the node says and re-packs its weight. Throws KernelError.
// `threads` is how many the session is said to have, 0 if nothing was said.
std::unique_ptr<Kernel> make_kernel(const Functions& api, const OrtKernelInfo* info, const Family& family,
                                    const Activation& activation, int32_t threads);

}  // namespace sparsecc::ort

#endif  // SPARSECC_ORT_KERNEL_H_
