#include "geometry.h"

#include <climits>
#include <string>

#include "common.h"

namespace sparsecc {
namespace {

constexpr int64_t kMaxGeometry = int64_t{1} << 20;

}  // namespace

void require_in_range(bool good, const char* what, int64_t value) {
  if (!good) throw Failure{std::string("convolution ") + what + " is out of range: " + std::to_string(value)};
}

void check_geometry(const sparsecc_conv_geometry& g, int64_t outputs, int64_t inputs) {
  require_in_range(g.groups >= 1 && outputs % g.groups == 0, "groups (must divide outputs)", g.groups);
  for (int i = 0; i < 2; ++i) {
    require_in_range(g.kernel[i] >= 1 && g.kernel[i] <= kMaxGeometry, "kernel", g.kernel[i]);
    require_in_range(g.stride[i] >= 1 && g.stride[i] <= kMaxGeometry, "stride", g.stride[i]);
    require_in_range(g.dilation[i] >= 1 && g.dilation[i] <= kMaxGeometry, "dilation", g.dilation[i]);
    require_in_range(g.pad_begin[i] >= 0 && g.pad_begin[i] <= kMaxGeometry, "pad_begin", g.pad_begin[i]);
    require_in_range(g.pad_end[i] >= 0 && g.pad_end[i] <= kMaxGeometry, "pad_end", g.pad_end[i]);
  }
  require_in_range(inputs >= 1 && inputs % (g.kernel[0] * g.kernel[1]) == 0,
                   "weight columns (must be channels * kernel)", inputs);
}

void conv_output_size(const sparsecc_conv_geometry& g, const int64_t in[2], int64_t out[2]) {
  for (int i = 0; i < 2; ++i) {
    require_in_range(in[i] >= 1 && in[i] <= INT_MAX, i == 0 ? "input height" : "input width", in[i]);
    const int64_t reach = (g.kernel[i] - 1) * g.dilation[i] + 1;
    const int64_t room = in[i] + g.pad_begin[i] + g.pad_end[i];
    if (reach > room)
      throw Failure{"convolution kernel covers " + std::to_string(reach) + " of an input of " +
                    std::to_string(room) + " with its padding"};
    out[i] = (room - reach) / g.stride[i] + 1;
  }
}

}  // namespace sparsecc
