/* Sparse tensor algebra: cutting walks over sparse tensors into equal parts, and kernels that run on such parts.
 *
 * A tensor is a tree of coordinates, one level per mode, as sparsecc/algebra/levels.py has them: a dense level has all
 * coordinates, a compressed one those that it lists, rising below each node of the level above. Values are float32 or
 * float64, one per node of the last level.
 *
 * Tensors are trusted: sparsecc_tensor_check is the function for those that come from outside. Sizes of everything
 * else are compared with what the tensors say.
 *
 * Work is cut into a number of parts that depends on the operands alone, and partial sums are added up in the order of
 * the parts: results have the same bits for any number of threads. They may differ between instruction sets.
 */
#ifndef SPARSECC_ALGEBRA_H_
#define SPARSECC_ALGEBRA_H_

#include "sparsecc/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;    /* of the mode */
  const void* pos; /* [nodes above + 1]: where the children of each begin; NULL: the level is dense */
  const void* crd; /* their coordinates */
  int64_t pos_count, crd_count;
  int32_t pos_bytes, crd_bytes; /* of one, signed: 4 or 8 */
} sparsecc_level;

typedef struct {
  size_t struct_size; /* sizeof(sparsecc_tensor) */
  const sparsecc_level* levels;
  int32_t level_count;
  int32_t value_bytes; /* 4: float, 8: double */
  const void* values;
  int64_t value_count;
  /* Where to cut products with dense operands, or NULL: [2][cut_parts + 1], nodes of the level above the last and of the
   * last before each part, as sparsecc_split gives them. Kernels take as many parts as they would make themselves, or
   * the next smaller number that divides cut_parts: every so many cuts are one. */
  const int64_t* cuts;
  int32_t cut_parts; /* 1 to 4096 */
} sparsecc_tensor;

/* Positions rise from 0 to the number of coordinates, coordinates are inside their mode and rise in each fibre, there
 * is a value for each node of the last level, and cuts rise from 0 to all there is, each inside the last row before it. */
SPARSECC_API int sparsecc_tensor_check(const sparsecc_tensor* tensor, char* error, size_t error_size);

/* ---- threads -------------------------------------------------------------------------------------------
 * A pool for callers that have none to lend. The calling thread is one of them. Each takes a run of neighbouring
 * tasks, then what others have left. A call from a second thread while one is running does all tasks itself. */
typedef struct sparsecc_threads sparsecc_threads;

SPARSECC_API int sparsecc_threads_create(int32_t count, sparsecc_threads** out, char* error, size_t error_size);
/* For cores that are not alike. `speeds` [count], above 0, may be NULL: each thread's run of tasks is in proportion to
 * its speed. `processors` [count] may be NULL: where the system allows it thread i keeps to processor number i of these,
 * the calling one while a job runs. */
SPARSECC_API int sparsecc_threads_create_unequal(int32_t count, const double* speeds, const int32_t* processors,
                                                 sparsecc_threads** out, char* error, size_t error_size);
/* Of a job of so many tasks, how many lie before those that each thread begins with: `before` [count + 1]. */
SPARSECC_API void sparsecc_threads_shares(const sparsecc_threads* threads, int64_t tasks, int64_t* before);
SPARSECC_API const sparsecc_executor* sparsecc_threads_executor(sparsecc_threads* threads);
/* Seconds that each of the threads has spent in tasks since this was last called. */
SPARSECC_API void sparsecc_threads_busy(sparsecc_threads* threads, double* seconds);
SPARSECC_API void sparsecc_threads_destroy(sparsecc_threads* threads);

/* ---- splitting -----------------------------------------------------------------------------------------
 * One operand as a kernel walks it: its first levels and what visiting one coordinate of each costs, 0 or more. */
typedef struct {
  const sparsecc_level* levels;
  const int64_t* costs;
  int32_t level_count;
} sparsecc_walk;

/* The cuts of a union of walks at rising targets of work, each within 0..work; see sparsecc/algebra/splitter.py.
 *
 *   cursors  per walk [levels][targets], one walk after the other: coordinates of each level before each cut
 *   paths    [targets][loops], loops the most levels of a walk: coordinates of the event before the cut, -1 below it */
SPARSECC_API int sparsecc_split(const sparsecc_walk* walks, int32_t walk_count, const int64_t* targets,
                                int64_t target_count, int64_t* cursors, int64_t* paths,
                                const sparsecc_executor* executor, char* error, size_t error_size);

/* ---- products with dense operands ------------------------------------------------------------------------
 * All arrays have the tensor's type of values and are row-major without gaps. Levels of a tensor share one width of
 * integers, and the last is compressed. A "row" is a node of the level above the last: of a CSR matrix a row, of a
 * higher tensor a fibre. */

/* y[row] = sum of values * x[coordinate]. x is as long as the last mode; y has one number per row, or per row of the
 * mode if the tensor has two compressed levels (DCSR). */
SPARSECC_API int sparsecc_spmv(const sparsecc_tensor* a, const void* x, void* y, const char* isa,
                               const sparsecc_executor* executor, char* error, size_t error_size);
/* The same with x [mode][columns] and y [rows][columns]. */
SPARSECC_API int sparsecc_spmm(const sparsecc_tensor* a, const void* x, int64_t columns, void* y, const char* isa,
                               const sparsecc_executor* executor, char* error, size_t error_size);
/* out[n] = values[n] * (u[row] . v[coordinate]), one for each value of `s`; u [rows][inner], v [size][inner]. */
SPARSECC_API int sparsecc_sddmm(const sparsecc_tensor* s, const void* u, const void* v, int64_t inner, void* out,
                                const char* isa, const sparsecc_executor* executor, char* error, size_t error_size);
/* y[i] = sum of values * the product of the rows of all factors (MTTKRP): factors[l] is [size of level l + 1][columns],
 * y [size of level 0][columns]. Levels below the first are compressed; for another mode the tensor is stored with that
 * one first. */
SPARSECC_API int sparsecc_mttkrp(const sparsecc_tensor* a, const void* const* factors, int64_t columns, void* y,
                                 const char* isa, const sparsecc_executor* executor, char* error, size_t error_size);

/* ---- sparse results ----------------------------------------------------------------------------------------
 * The caller brings the room; counts are set to what has been written. */
typedef struct {
  void* pos; /* NULL for a dense level */
  void* crd;
  int64_t pos_count, crd_count;
} sparsecc_result_level;

typedef struct {
  size_t struct_size; /* sizeof(sparsecc_result) */
  sparsecc_result_level* levels;
  int32_t level_count;
  void* values;
  int64_t value_count;
} sparsecc_result;

typedef enum { SPARSECC_UNION = 0, SPARSECC_INTERSECTION = 1 } sparsecc_join_kind;

/* The sum of tensors (union) or their element-wise product (intersection). All have the same sizes, kinds of levels
 * and types; dense levels come first, the last is compressed. A level of the result has room for N + 1 coordinates, N
 * all coordinates of that level of all operands (sum) or of the one that has fewest (product), and for one position
 * more than nodes above fit; values as coordinates of the last level. Numbers that add up to zero are kept. */
SPARSECC_API int sparsecc_join(const sparsecc_tensor* operands, int32_t operand_count, int32_t kind,
                               sparsecc_result* result, const sparsecc_executor* executor, char* error,
                               size_t error_size);

/* A product of sparse matrices, C = A B, or the element-wise product of that and a mask, CSR too (of which only what
 * is in its pattern is computed). A and B are CSR of the same types; without a mask A may be DCSR, and C has its rows.
 * Coordinates of C rise. It waits in memory until it is fetched: pos [rows + 1], crd and values [entries]. */
typedef struct sparsecc_product sparsecc_product;

SPARSECC_API int sparsecc_product_create(const sparsecc_tensor* a, const sparsecc_tensor* b,
                                         const sparsecc_tensor* mask, sparsecc_product** out,
                                         const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API int64_t sparsecc_product_entries(const sparsecc_product* product);
SPARSECC_API int sparsecc_product_fetch(const sparsecc_product* product, void* pos, void* crd, void* values,
                                        const sparsecc_executor* executor, char* error, size_t error_size);
SPARSECC_API void sparsecc_product_destroy(sparsecc_product* product);

#ifdef __cplusplus
}
#endif
#endif
