#include "c_guard.h"
#include "recurrent.h"
#include "sparsecc/c_api.h"

using sparsecc::guard;
using sparsecc::require;

namespace {

constexpr int64_t kMostRows = int64_t{1} << 40;

void check_io(const sparsecc_recurrent& op, const sparsecc_recurrent_io& io) {
  require(io.struct_size >= sizeof(io), "the structure io is too short: caller and library do not match");
  require(io.steps >= 0 && io.batch >= 0 && io.steps <= kMostRows && io.batch <= kMostRows &&
              (io.batch == 0 || io.steps <= kMostRows / io.batch),
          "steps or batch is negative or too large");
  if (io.batch == 0) return;
  require(io.steps == 0 || io.y != nullptr, "y must not be null");
  require(io.steps == 0 || op.inputs() == 0 || io.x != nullptr, "x must not be null");
  require(io.y_h != nullptr && (io.y_c != nullptr || !op.lstm()), "y_h and y_c must not be null");
}

}  // namespace

int sparsecc_recurrent_create(const sparsecc_recurrent_desc* desc, sparsecc_recurrent** out, char* error,
                              size_t error_size) {
  return guard(error, error_size, [&] {
    require(desc != nullptr && out != nullptr, "desc and out must not be null");
    *out = nullptr;
    *out = new sparsecc_recurrent(*desc);
  });
}

int sparsecc_recurrent_run(const sparsecc_recurrent* op, const sparsecc_recurrent_io* io,
                           const sparsecc_executor* executor, char* error, size_t error_size) {
  return guard(error, error_size, [&] {
    require(op != nullptr && io != nullptr, "op and io must not be null");
    check_io(*op, *io);
    op->run(*io, executor);
  });
}

void sparsecc_recurrent_destroy(sparsecc_recurrent* op) { delete op; }

const char* sparsecc_recurrent_kernels(const sparsecc_recurrent* op) { return op->kernels(); }

const char* sparsecc_recurrent_kernel_table(void) { return sparsecc::cell_kernel_table(); }
