// Says which digit a picture shows. A device would take the picture from a camera; here it stands below.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "backend.h"
#include "error.h"
#include "options.h"

namespace {

constexpr int kSide = 8;
constexpr float kWhite = 16;
constexpr float kPicture[kSide * kSide] = {
    0, 0, 1,  13, 7,  0,  0,  0,  //
    0, 0, 7,  14, 2,  0,  0,  0,  //
    0, 0, 13, 5,  0,  0,  0,  0,  //
    0, 0, 16, 3,  0,  0,  0,  0,  //
    0, 3, 16, 10, 12, 12, 3,  0,  //
    0, 3, 16, 11, 5,  9,  12, 0,  //
    0, 1, 13, 11, 4,  13, 11, 0,  //
    0, 0, 1,  12, 16, 11, 2,  0,  //
};

sparsecc::run::Array picture() {
  std::vector<float> grey(kPicture, kPicture + kSide * kSide);
  for (float& value : grey) value /= kWhite;
  sparsecc::run::Array array;
  array.type = sparsecc::run::type_of_npy("<f4");
  array.shape = {1, 1, kSide, kSide};
  array.bytes.resize(grey.size() * sizeof(float));
  std::memcpy(array.bytes.data(), grey.data(), array.bytes.size());
  return array;
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: classify MODEL.onnx LIBSPARSECC_OPS.so LIBONNXRUNTIME.so\n");
    return 2;
  }
  try {
    sparsecc::run::Options options;
    options.model = words[1];
    options.library = words[2];
    options.onnxruntime = words[3];
    options.threads = 1;
    const std::unique_ptr<sparsecc::run::Backend> model = sparsecc::run::make_ort_backend(options);
    std::vector<sparsecc::run::Array> inputs;
    inputs.push_back(picture());
    model->set_inputs(std::move(inputs));
    model->run();
    const sparsecc::run::Array scores = model->output(0);
    std::vector<float> values(scores.bytes.size() / sizeof(float));
    std::memcpy(values.data(), scores.bytes.data(), scores.bytes.size());
    std::printf("digit %td\n", std::max_element(values.begin(), values.end()) - values.begin());
    return 0;
  } catch (const sparsecc::run::Error& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return static_cast<int>(error.exit);
  }
}
