#include "tvm/record.h"

#include <cstring>
#include <stdexcept>

namespace sparsecc::tvm {
namespace {

constexpr std::string_view kMagic = "SPARSECC-TVM-1\n\0";  // 16 bytes with the literal's own end
constexpr size_t kMagicSize = 16;
constexpr uint32_t kMost = 1U << 24;  // of nodes, attributes, inputs, letters

[[noreturn]] void bad() {
  throw std::runtime_error("the weights of this module are cut off or of another release: make the module again");
}

class Reader {
 public:
  Reader(const unsigned char* bytes, size_t size) : bytes_(bytes), size_(size) {}

  const unsigned char* take(size_t count) {
    if (count > size_ - at_) bad();
    at_ += count;
    return bytes_ + at_ - count;
  }

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }

  uint32_t count() {
    const auto value = number<uint32_t>();
    if (value > kMost) bad();
    return value;
  }

  std::string text() {
    const uint32_t size = count();
    return std::string(reinterpret_cast<const char*>(take(size)), size);
  }

  std::vector<int64_t> list() {
    std::vector<int64_t> values(count());
    for (int64_t& value : values) value = number<int64_t>();
    return values;
  }

  // At an offset from the beginning.
  const unsigned char* at(uint64_t offset, uint64_t count) const {
    if (offset > size_ || count > size_ - offset) bad();
    return bytes_ + offset;
  }

 private:
  const unsigned char* bytes_;
  size_t size_, at_ = 0;
};

size_t bytes_of(ort::ElementType type) {
  switch (type) {
    case ort::ElementType::kUint8:
    case ort::ElementType::kInt8:
      return 1;
    case ort::ElementType::kFloat16:
    case ort::ElementType::kBfloat16:
      return 2;
    case ort::ElementType::kFloat:
    case ort::ElementType::kInt32:
      return 4;
    case ort::ElementType::kInt64:
      return 8;
    default:
      bad();
  }
}

OrtValue read_tensor(Reader& reader) {
  OrtValue value;
  value.type = static_cast<ort::ElementType>(reader.number<int32_t>());
  value.dims = reader.list();
  const auto offset = reader.number<uint64_t>();
  uint64_t bytes = bytes_of(value.type);
  for (const int64_t dim : value.dims) {
    if (dim < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(dim), &bytes)) bad();
  }
  // Constants are only ever read; the one accessor for data takes a mutable tensor.
  value.data = const_cast<unsigned char*>(reader.at(offset, bytes));
  return value;
}

void read_attribute(Reader& reader, OrtKernelInfo* node) {
  const std::string name = reader.text();
  switch (reader.number<uint8_t>()) {
    case 'i':
      node->integers[name] = reader.number<int64_t>();
      return;
    case 'f':
      node->numbers[name] = reader.number<float>();
      return;
    case 's':
      node->texts[name] = reader.text();
      return;
    case 'l':
      node->lists[name] = reader.list();
      return;
    default:
      bad();
  }
}

OrtKernelInfo read_node(Reader& reader) {
  OrtKernelInfo node;
  node.name = reader.text();
  node.op = reader.text();
  for (uint32_t count = reader.count(); count > 0; --count) read_attribute(reader, &node);
  for (uint32_t count = reader.count(); count > 0; --count) {
    if (reader.number<uint8_t>() != 0) {
      node.inputs.emplace_back(read_tensor(reader));
    } else {
      node.inputs.emplace_back();
    }
  }
  return node;
}

}  // namespace

Record read_record(const unsigned char* bytes, size_t size) {
  Reader reader(bytes, size);
  if (std::memcmp(reader.take(kMagicSize), kMagic.data(), kMagicSize) != 0) bad();
  Record record;
  record.signature = reader.text();
  const uint32_t nodes = reader.count();
  for (uint32_t i = 0; i < nodes; ++i) record.nodes.push_back(read_node(reader));
  return record;
}

}  // namespace sparsecc::tvm
