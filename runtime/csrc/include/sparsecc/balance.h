/* How evenly operators are dealt to threads, and how long threads really work. */
#ifndef SPARSECC_BALANCE_H_
#define SPARSECC_BALANCE_H_

#include "sparsecc/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The work of each part that sparsecc_matmul_balance compares: stored weights, and what a group of outputs costs beside
 * them. Returns how many parts there are, at most `parts` rounded up to a power of two and at most 64; the first `room`
 * of them are written. 0: out of memory. */
SPARSECC_API int64_t sparsecc_matmul_part_work(const sparsecc_matmul* op, int64_t rows, int64_t parts, int64_t* work,
                                               int64_t room);
SPARSECC_API int64_t sparsecc_int8_matmul_part_work(const sparsecc_int8_matmul* op, int64_t parts, int64_t* work,
                                                    int64_t room);

/* Measures our operators in all sessions of onnxruntime of the process between start and stop. A line for each node and
 * thread: "thread count nanoseconds label", separated by tabs; threads are numbered in the order in which they first
 * worked, and count is how often they did. Thread -1 is the whole node: how often it ran, and how long from start to end.
 * The text is good until the next stop. Nodes that run at start or stop may be counted in part. */
SPARSECC_API void sparsecc_busy_start(void);
SPARSECC_API const char* sparsecc_busy_stop(void);

#ifdef __cplusplus
}
#endif
#endif
