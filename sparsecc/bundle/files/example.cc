// Runs a model of one input and writes its first output. What stands beside
// this file are parts of sparsecc-run that a program may take as they are:
// arrays in .npy files, and onnxruntime loaded at run time.
//
//     c++ -std=c++20 -O2 examples/cpp/*.cc -o example -ldl
//     ./example MODEL.onnx LIBRARY.so ONNXRUNTIME.so INPUT.npy OUTPUT.npy
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "array.h"
#include "backend.h"
#include "error.h"
#include "options.h"

int main(int count, char **words) {
  using namespace sparsecc::run;
  if (count != 6) {
    std::fprintf(stderr, "usage: example MODEL.onnx LIBRARY.so ONNXRUNTIME.so "
                         "INPUT.npy OUTPUT.npy\n");
    return 2;
  }
  try {
    Options options;
    options.model = words[1];
    options.library = words[2];
    options.onnxruntime = words[3];
    const std::unique_ptr<Backend> backend = make_ort_backend(options);
    std::vector<Array> inputs;
    inputs.push_back(read_npy(words[4]));
    backend->set_inputs(std::move(inputs));
    backend->run();
    write_npy(backend->output(0), words[5]);
    std::printf("%s: %s\n", backend->outputs()[0].name.c_str(), words[5]);
    return 0;
  } catch (const Error &error) {
    std::fprintf(stderr, "example: %s\n", error.what());
    return static_cast<int>(error.exit);
  }
}
