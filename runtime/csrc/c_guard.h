// How functions of the C interface turn what is thrown into a code and a text.
#ifndef SPARSECC_C_GUARD_H_
#define SPARSECC_C_GUARD_H_

#include <cstddef>
#include <cstdio>
#include <exception>
#include <new>

#include "common.h"

namespace sparsecc {

inline int fail(char* error, size_t error_size, const char* message) {
  if (error != nullptr && error_size > 0) std::snprintf(error, error_size, "%s", message);
  return 1;
}

// Runs a body that may throw and turns what it throws into the C convention.
template <class Body>
int guard(char* error, size_t error_size, const Body& body) noexcept {
  if (error != nullptr && error_size > 0) error[0] = '\0';
  try {
    body();
    return 0;
  } catch (const Failure& failure) {
    return fail(error, error_size, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return fail(error, error_size, "out of memory");
  } catch (const std::exception& other) {
    return fail(error, error_size, other.what());
  }
}

inline void require(bool good, const char* message) {
  if (!good) throw Failure{message};
}

}  // namespace sparsecc
#endif
