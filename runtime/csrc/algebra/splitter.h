// Cutting walks over sparse tensors into equal parts; the method and its bound are those of sparsecc/algebra/splitter.py.
#ifndef SPARSECC_ALGEBRA_SPLITTER_H_
#define SPARSECC_ALGEBRA_SPLITTER_H_

#include <cstdint>
#include <vector>

#include "sparsecc/algebra.h"

namespace sparsecc::algebra {

// Where the results of a split go: for a walk, [levels][stride], of which one column per target.
struct Cursors {
  std::vector<int64_t*> of_walk;
  int64_t stride;
  int64_t* paths;  // [targets][loops]
  int32_t loops;
};

// Work of a whole walk. Throws Failure where it does not fit into 62 bits.
int64_t work_of(const sparsecc_walk& walk);

// Levels that several walks share have one size, costs are not negative, and all work fits. Throws Failure.
int64_t check_walks(const sparsecc_walk* walks, int32_t walk_count);

// Cuts at rising targets of at most all work.
void find_splits(const sparsecc_walk* walks, int32_t walk_count, const int64_t* targets, int64_t target_count,
                 const Cursors& cursors, const sparsecc_executor* executor);

// Cuts of one tensor's last two levels: `header` is what a row costs, `leaf` each coordinate in it.
struct RowCuts {
  std::vector<int64_t> rows, leaves;  // before each cut, [parts + 1]
  int64_t parts() const { return static_cast<int64_t>(rows.size()) - 1; }
};
RowCuts cut_rows(const sparsecc_level& last, int64_t header, int64_t leaf, int64_t parts);

// How many parts work is cut into: up to 64, of no less than a grain.
int64_t parts_for(int64_t work, int64_t grain);

}  // namespace sparsecc::algebra
#endif
