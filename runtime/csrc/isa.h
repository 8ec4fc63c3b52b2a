// Which instruction sets the kernels were compiled for and which of them this machine can run.
#ifndef SPARSECC_ISA_H_
#define SPARSECC_ISA_H_

namespace sparsecc {

enum class Isa { kGeneric, kAvx2, kAvx512, kNeon };

// As the tables of kernels name them.
constexpr Isa kIsa_generic = Isa::kGeneric, kIsa_avx2 = Isa::kAvx2, kIsa_avx512 = Isa::kAvx512,
              kIsa_neon = Isa::kNeon;

const char* isa_name(Isa isa);
bool isa_usable(Isa isa);
// The wanted one by name; null: $SPARSECC_ISA, else the best. Throws Failure for a name that is
// unknown or not usable here.
Isa choose_isa(const char* wanted);
// Usable names, best first, separated by spaces.
const char* isa_list();

// The same for products of bytes: some sets have variants with dot products (VNNI, dotprod) or matrix
// products (i8mm, AMX) of bytes on top. The plain name forces the plain variant; for everything else a variant counts
// as the set it extends.
enum class ByteIsa {
  kGeneric,
  kAvx2,
  kAvxVnni,
  kAvx512,
  kAvx512Vnni,
  kAvx512Amx,
  kAvx512AmxEmulated,  // in builds for tests; never chosen unless asked for by name
  kNeon,
  kNeonDotprod,
  kNeonI8mm
};

constexpr ByteIsa kByteIsa_generic = ByteIsa::kGeneric, kByteIsa_avx2 = ByteIsa::kAvx2,
                  kByteIsa_avxvnni = ByteIsa::kAvxVnni, kByteIsa_avx512 = ByteIsa::kAvx512,
                  kByteIsa_avx512vnni = ByteIsa::kAvx512Vnni, kByteIsa_avx512amx = ByteIsa::kAvx512Amx,
                  kByteIsa_avx512amx_emulated = ByteIsa::kAvx512AmxEmulated, kByteIsa_neon = ByteIsa::kNeon,
                  kByteIsa_neon_dotprod = ByteIsa::kNeonDotprod, kByteIsa_neon_i8mm = ByteIsa::kNeonI8mm;

const char* isa_name(ByteIsa isa);
bool isa_usable(ByteIsa isa);
ByteIsa choose_byte_isa(const char* wanted);
const char* byte_isa_list();
// Sets with tile registers have kernels for these only, and all those of the set they extend: which that is. Others are
// returned as they are.
ByteIsa without_tiles(ByteIsa isa);
// Whether kernels for tiles of bfloat16 of such a set can run.
bool bf16_tiles_usable(ByteIsa isa);
// Whether kernels of kAvx512Vnni that permute 64 bytes (VBMI) can run.
bool vbmi_usable();

}  // namespace sparsecc
#endif
