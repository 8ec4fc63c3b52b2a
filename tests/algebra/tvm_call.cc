// Calls a kernel compiled by TVM once: reads its arguments from a file, writes all arrays to another when it is done.
// Needs nothing of TVM: the structures are those of its C ABI (tvm/ffi/c_api.h) and of DLPack.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

namespace {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Any {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    void* pointer;
  };
};

constexpr int32_t kNone = 0, kInteger = 1, kTensor = 7;

struct Header {
  int64_t kind, bits, number;
};

}  // namespace

extern "C" int32_t __tvm_ffi_kernel(void* self, const Any* arguments, int32_t count, Any* result);

extern "C" void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  std::fprintf(stderr, "%s: ", kind);
  for (int32_t at = 0; at < count; ++at) std::fprintf(stderr, "%s", parts[at]);
  std::fprintf(stderr, "\n");
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::FILE* in = std::fopen(argv[1], "rb");
  if (in == nullptr) return 2;
  std::deque<Tensor> tensors;
  std::deque<std::vector<char>> data;
  std::deque<int64_t> sizes;
  std::vector<Any> arguments;
  Header header;
  int64_t stride = 1;
  while (std::fread(&header, sizeof header, 1, in) == 1) {
    Any argument{kInteger, 0, {header.number}};
    if (header.kind >= 0) {
      data.emplace_back(header.number * header.bits / 8);
      if (std::fread(data.back().data(), 1, data.back().size(), in) != data.back().size()) return 2;
      sizes.push_back(header.number);
      tensors.push_back({data.back().data(), 1, 0, 1, static_cast<uint8_t>(header.kind),
                         static_cast<uint8_t>(header.bits), 1, &sizes.back(), &stride, 0});
      argument.type_index = kTensor;
      argument.pointer = &tensors.back();
    }
    arguments.push_back(argument);
  }
  std::fclose(in);
  Any result{kNone, 0, {0}};
  if (__tvm_ffi_kernel(nullptr, arguments.data(), static_cast<int32_t>(arguments.size()), &result) != 0) return 1;
  std::FILE* out = std::fopen(argv[2], "wb");
  if (out == nullptr) return 2;
  for (const auto& bytes : data) std::fwrite(bytes.data(), 1, bytes.size(), out);
  return std::fclose(out) == 0 ? 0 : 2;
}
