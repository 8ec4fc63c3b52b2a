// What runs a model: one implementation per kind of file.
#ifndef SPARSECC_RUN_BACKEND_H_
#define SPARSECC_RUN_BACKEND_H_

#include <memory>
#include <string>
#include <vector>

#include "array.h"

namespace sparsecc::run {

struct Options;

// An input or output as the model declares it. `type` is null if it is no tensor, or one of elements that
// .npy files do not hold. A negative dimension may have any size.
struct Declared {
  std::string name;
  const Type* type = nullptr;
  std::vector<int64_t> shape;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const std::vector<Declared>& inputs() const = 0;
  virtual const std::vector<Declared>& outputs() const = 0;
  // In the order of inputs(), of the declared types and shapes. Kept for every later run.
  virtual void set_inputs(std::vector<Array> arrays) = 0;
  // Once, from the inputs to new outputs. Throws Error.
  virtual void run() = 0;
  // Lets go of the outputs of the last run, so that doing so is not timed.
  virtual void release_outputs() = 0;
  // A copy of an output of the last run. Throws Error if outputs()[index].type is null.
  virtual Array output(size_t index) const = 0;
  // Name and version of what runs the model.
  virtual std::string runtime() const = 0;
  // The operator library in use, or "".
  virtual std::string library() const = 0;
};

// Throws Error: kMissing if a library is not there, kModel if the model is refused.
std::unique_ptr<Backend> make_ort_backend(const Options& options);

}  // namespace sparsecc::run

#endif  // SPARSECC_RUN_BACKEND_H_
