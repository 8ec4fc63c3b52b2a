#include "array.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "error.h"

namespace sparsecc::run {
namespace {

constexpr Type kTypes[] = {
    {"float32", "<f4", 1, 4},  {"uint8", "|u1", 2, 1},    {"int8", "|i1", 3, 1},    {"uint16", "<u2", 4, 2},
    {"int16", "<i2", 5, 2},    {"int32", "<i4", 6, 4},    {"int64", "<i8", 7, 8},   {"bool", "|b1", 9, 1},
    {"float16", "<f2", 10, 2}, {"float64", "<f8", 11, 8}, {"uint32", "<u4", 12, 4}, {"uint64", "<u8", 13, 8},
};

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicSize = 6;
constexpr size_t kLongestHeader = 4096;
constexpr size_t kAlignment = 64;  // of the data in files, as NumPy writes them

[[noreturn]] void bad_file(const std::string& path, const std::string& why) {
  throw Error(Exit::kUsage, path + ": " + why);
}

// Header of a version 1, 2 or 3 file; the stream then stands at the data.
std::string read_header(std::ifstream& file, const std::string& path) {
  char start[kMagicSize + 2];
  if (!file.read(start, sizeof(start)) || std::memcmp(start, kMagic, kMagicSize) != 0) {
    bad_file(path, "not a .npy file: write it with numpy.save");
  }
  const int version = start[kMagicSize];
  if (version < 1 || version > 3)
    bad_file(path, "a .npy file of an unknown version: write it with numpy.save");
  unsigned char length[4] = {};
  if (!file.read(reinterpret_cast<char*>(length), version == 1 ? 2 : 4))
    bad_file(path, "the file is cut short");
  const size_t size = length[0] | length[1] << 8 | length[2] << 16 | static_cast<size_t>(length[3]) << 24;
  if (size > kLongestHeader) bad_file(path, "its header is too long for a .npy file of numbers");
  std::string header(size, '\0');
  if (!file.read(header.data(), static_cast<std::streamsize>(size))) bad_file(path, "the file is cut short");
  return header;
}

// The text between `begin` and `end` after the key: a header is a Python dictionary as NumPy prints it.
std::string field(const std::string& header, const std::string& key, char begin, char end,
                  const std::string& path) {
  size_t from = header.find("'" + key + "':");
  if (from != std::string::npos) from = header.find_first_not_of(' ', from + key.size() + 3);
  const size_t to = from == std::string::npos ? from : header.find(end, from + 1);
  if (to == std::string::npos || (begin != '\0' && header[from] != begin)) {
    bad_file(path, "its header is not that of an array of numbers: write it with numpy.save");
  }
  return begin == '\0' ? header.substr(from, to - from) : header.substr(from + 1, to - from - 1);
}

std::vector<int64_t> parse_shape(const std::string& text, const std::string& path) {
  std::vector<int64_t> shape;
  std::istringstream numbers(text);
  for (std::string number; std::getline(numbers, number, ',');) {
    if (number.find_first_not_of(' ') == std::string::npos) continue;  // behind the last comma
    char* end = nullptr;
    errno = 0;
    const long long dim = std::strtoll(number.c_str(), &end, 10);
    if (errno != 0 || *end != '\0' || dim < 0) bad_file(path, "its shape (" + text + ") is none");
    shape.push_back(dim);
  }
  return shape;
}

size_t nbytes(const std::vector<int64_t>& shape, size_t element, const std::string& path) {
  size_t total = element;
  for (const int64_t dim : shape) {
    if (dim != 0 && total > std::numeric_limits<size_t>::max() / 2 / static_cast<size_t>(dim)) {
      bad_file(path, "its shape is too large");
    }
    total *= static_cast<size_t>(dim);
  }
  return total;
}

std::string npy_header(const Array& array) {
  std::string shape;
  for (const int64_t dim : array.shape) shape += std::to_string(dim) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  if (array.shape.size() == 1) shape.resize(shape.size() - 1);
  std::string header =
      std::string("{'descr': '") + array.type->npy + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  const size_t before = kMagicSize + 4;
  header.append((kAlignment - (before + header.size() + 1) % kAlignment) % kAlignment, ' ');
  header += '\n';
  std::string start(kMagic, kMagicSize);
  start += {1, 0, static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
  return start + header;
}

}  // namespace

const Type* type_of_npy(const std::string& npy) {
  for (const Type& type : kTypes) {
    if (npy == type.npy) return &type;
  }
  return nullptr;
}

const Type* type_of_onnx(int onnx) {
  for (const Type& type : kTypes) {
    if (onnx == type.onnx) return &type;
  }
  return nullptr;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t dim : shape) text += (text.empty() ? "" : "x") + (dim < 0 ? "?" : std::to_string(dim));
  return text.empty() ? "scalar" : text;
}

Array read_npy(const std::string& path) {
  std::error_code problem;
  if (!std::filesystem::is_regular_file(path, problem)) bad_file(path, "no such file");
  std::ifstream file(path, std::ios::binary);
  if (!file) bad_file(path, std::string("cannot be read: ") + std::strerror(errno));
  const std::string header = read_header(file, path);
  const std::string npy = field(header, "descr", '\'', '\'', path);
  Array array;
  array.type = type_of_npy(npy);
  if (array.type == nullptr)
    bad_file(path, "elements of type '" + npy + "' are not supported: convert them with astype");
  if (field(header, "fortran_order", '\0', ',', path) == "True") {
    bad_file(path, "the array lies column by column: save numpy.ascontiguousarray of it");
  }
  array.shape = parse_shape(field(header, "shape", '(', ')', path), path);
  const size_t size = nbytes(array.shape, array.type->size, path);
  const auto begin = static_cast<uintmax_t>(file.tellg());
  if (std::filesystem::file_size(path) != begin + size) {
    bad_file(path, "shape and size do not fit: the file is cut short or has more than one array");
  }
  array.bytes.resize(size);
  if (!file.read(reinterpret_cast<char*>(array.bytes.data()), static_cast<std::streamsize>(size))) {
    bad_file(path, "the file is cut short");
  }
  return array;
}

void write_npy(const Array& array, const std::string& path) {
  const std::string temporary = path + "." + std::to_string(getpid()) + ".tmp";
  const std::string header = npy_header(array);
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file.write(header.data(), static_cast<std::streamsize>(header.size()));
    file.write(reinterpret_cast<const char*>(array.bytes.data()),
               static_cast<std::streamsize>(array.bytes.size()));
    file.close();
    if (file && std::rename(temporary.c_str(), path.c_str()) == 0) return;
  }
  const std::string why = std::strerror(errno);
  std::remove(temporary.c_str());
  throw Error(Exit::kUsage, "cannot write " + path + ": " + why);
}

}  // namespace sparsecc::run
