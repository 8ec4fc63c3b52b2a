// Which instruction sets the kernels were compiled for and which of them this machine can run.
#ifndef SPARSECC_ISA_H_
#define SPARSECC_ISA_H_

namespace sparsecc {

enum class Isa { kGeneric, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
bool isa_usable(Isa isa);
// The wanted one by name; null: $SPARSECC_ISA, else the best. Throws Failure for a name that is
// unknown or not usable here.
Isa choose_isa(const char* wanted);
// Usable names, best first, separated by spaces.
const char* isa_list();

// The same for products of bytes: some sets have a variant with dot products of bytes (VNNI) on top. The
// plain name forces the plain variant; for everything else a variant counts as the set it extends.
enum class ByteIsa { kGeneric, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni };

const char* isa_name(ByteIsa isa);
bool isa_usable(ByteIsa isa);
ByteIsa choose_byte_isa(const char* wanted);
const char* byte_isa_list();
// Whether kernels of kAvx512Vnni that permute 64 bytes (VBMI) can run.
bool vbmi_usable();

}  // namespace sparsecc
#endif
