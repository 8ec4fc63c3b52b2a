// Arrays in memory and in NumPy's .npy files.
#ifndef SPARSECC_RUN_ARRAY_H_
#define SPARSECC_RUN_ARRAY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sparsecc::run {

// An element type: as people say it, in .npy files, and as a number in ONNX files.
struct Type {
  const char* name;
  const char* npy;
  int onnx;
  size_t size;
};

const Type* type_of_npy(const std::string& npy);
const Type* type_of_onnx(int onnx);

// Row by row, without gaps.
struct Array {
  const Type* type = nullptr;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

// "2x3"; a negative number is a dimension of any size, "?"; without dimensions "scalar".
std::string shape_text(const std::vector<int64_t>& shape);

// Throws Error (kUsage) for what is no .npy file, or holds what no model takes.
Array read_npy(const std::string& path);

// Writes to a name beside `path` first: what is there in the end is complete. Throws Error (kUsage).
void write_npy(const Array& array, const std::string& path);

}  // namespace sparsecc::run

#endif  // SPARSECC_RUN_ARRAY_H_
