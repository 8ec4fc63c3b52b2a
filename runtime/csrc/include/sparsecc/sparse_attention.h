/* Attention in which each query sees some of the keys, and softmax over the entries of sparse rows. */
#ifndef SPARSECC_SPARSE_ATTENTION_H_
#define SPARSECC_SPARSE_ATTENTION_H_

#include "sparsecc/algebra.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sparsecc_attention_pattern sparsecc_attention_pattern; /* immutable after creation: safe to share */

/* Which keys each query sees: a compressed level below `keys->pos_count - 1` queries, from outside, so all of it is
 * checked. isa: one of sparsecc_isas(), or NULL. */
SPARSECC_API int sparsecc_attention_pattern_create(const sparsecc_level* keys, const char* isa,
                                                   sparsecc_attention_pattern** out, char* error,
                                                   size_t error_size);
SPARSECC_API void sparsecc_attention_pattern_destroy(sparsecc_attention_pattern* pattern);

/* As sparsecc_attention_run, over the keys that each query sees; one that sees none gives zeros. The descriptor has no
 * mask, no cosines and isa NULL, and as many queries and keys as the pattern. Hidden keys beside visible ones, up to a
 * group of 16, are computed and get a weight of 0: NaN or infinity in them may come through. */
SPARSECC_API int sparsecc_sparse_attention_run(const sparsecc_attention_pattern* pattern,
                                               const sparsecc_attention_desc* attention,
                                               const sparsecc_executor* executor, char* error, size_t error_size);

/* y = softmax over the entries of each row, for `batch` lists of values. Positions of `entries` (whose coordinates do
 * not matter) are checked. No overlap. */
SPARSECC_API int sparsecc_sparse_softmax_run(const sparsecc_level* entries, const float* values, int64_t batch,
                                             const char* isa, float* y, const sparsecc_executor* executor,
                                             char* error, size_t error_size);

#ifdef __cplusplus
}
#endif
#endif
