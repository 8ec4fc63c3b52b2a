// Sizes of convolutions, which come from a file and are checked here.
#ifndef SPARSECC_GEOMETRY_H_
#define SPARSECC_GEOMETRY_H_

#include <cstdint>

#include "sparsecc/c_api.h"

namespace sparsecc {

// Throws Failure "convolution <what> is out of range: <value>".
void require_in_range(bool good, const char* what, int64_t value);
// For a weight of that many outputs by inputs, i.e. channels of a group times places of the kernel.
void check_geometry(const sparsecc_conv_geometry& geometry, int64_t outputs, int64_t inputs);
// Height and width of the result; throws Failure if the kernel does not fit.
void conv_output_size(const sparsecc_conv_geometry& geometry, const int64_t in[2], int64_t out[2]);

}  // namespace sparsecc
#endif
