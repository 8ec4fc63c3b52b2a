// The command line of sparsecc-run.
#ifndef SPARSECC_RUN_OPTIONS_H_
#define SPARSECC_RUN_OPTIONS_H_

#include <string>
#include <vector>

namespace sparsecc::run {

// An array that goes to or comes from the model; without a name it is the only one.
struct NamedFile {
  std::string name;
  std::string path;
};

struct Options {
  std::string model;
  std::vector<NamedFile> inputs;
  std::vector<NamedFile> outputs;
  int repeat = 10;
  int warmup = 1;
  int threads = 0;          // 0: the runtime's choice
  std::string library;      // the operator library; "": none
  std::string onnxruntime;  // "": looked for under its usual names
  bool json = false;
  std::string answer;  // if not empty: all there is to do is to print it
};

// Throws Error (kUsage, or kMissing for a library that is not there).
Options parse_options(int count, const char* const* words);

}  // namespace sparsecc::run

#endif  // SPARSECC_RUN_OPTIONS_H_
