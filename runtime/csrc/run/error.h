// What ends a run, with the exit code of the command line that sparsecc gives for the same.
#ifndef SPARSECC_RUN_ERROR_H_
#define SPARSECC_RUN_ERROR_H_

#include <stdexcept>
#include <string>

namespace sparsecc::run {

enum class Exit : int { kOk = 0, kInternal = 1, kUsage = 2, kModel = 3, kMissing = 6 };

struct Error : std::runtime_error {
  Error(Exit exit, const std::string& message) : std::runtime_error(message), exit(exit) {}
  Exit exit;
};

}  // namespace sparsecc::run

#endif  // SPARSECC_RUN_ERROR_H_
