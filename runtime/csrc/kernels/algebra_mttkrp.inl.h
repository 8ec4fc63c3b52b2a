// A tensor times a matrix for each mode but the first (MTTKRP), fibre by fibre: sums go up the tree, each times the row
// of its own node, when the last coordinate below that node is done.
#pragma once

// y += factor * x, column by column.
template <class V>
SPARSECC_INLINE void add_scaled(V* y, const V* factor, const V* x, int64_t columns) {
  constexpr int kCount = kWide<V>;
  int64_t i = 0;
  for (; i + kCount <= columns; i += kCount)
    store<kCount>(y + i, load<kCount>(y + i) + load<kCount>(factor + i) * load<kCount>(x + i));
  for (; i < columns; ++i) y[i] += factor[i] * x[i];
}

// The nodes that coordinate `n` of the last level is in, from those of an earlier one on.
template <class V, class I>
SPARSECC_INLINE void find_nodes(const MttkrpJob<V, I>& job, int64_t n, int64_t* node) {
  int64_t child = n;
  for (int level = job.modes - 2; level >= 0; --level) {
    while (job.pos[level + 1][node[level] + 1] <= child) ++node[level];
    child = node[level];
  }
}

template <class V, class I>
void mttkrp(MttkrpJob<V, I>* job) {
  const int last = job->modes - 1;
  const int64_t columns = job->columns;
  const RowPart<V, I> leaves = {job->pos[last], job->crd[last], job->values, 0, 0, 0, 0};
  int64_t node[kMostModes], next[kMostModes];
  for (int level = 0; level < last; ++level) node[level] = next[level] = job->node[level];
  __builtin_memset(job->sums, 0, static_cast<size_t>(last * columns) * sizeof(V));
  V* to = job->carry;
  for (int64_t n = job->begin; n < job->end;) {
    const int64_t end = least(job->pos[last][node[last - 1] + 1], job->end);
    row_times(leaves, job->factors[last], columns, n, end, job->sums + (last - 1) * columns);
    n = end;
    if (n < job->end) find_nodes(*job, n, next);
    int done = 0;  // the first level whose node is
    while (n < job->end && next[done] == node[done]) ++done;
    for (int level = last - 1; level >= done; --level) {
      V* sums = job->sums + level * columns;
      if (level > 0) {
        const V* factor = job->factors[level] + job->crd[level][node[level]] * columns;
        add_scaled(sums - columns, factor, sums, columns);
      } else {
        if (to == nullptr) to = job->out + (job->places == nullptr ? node[0] : int64_t{job->places[node[0]]}) * columns;
        __builtin_memcpy(to, sums, static_cast<size_t>(columns) * sizeof(V));
        to = nullptr;
      }
      __builtin_memset(sums, 0, static_cast<size_t>(columns) * sizeof(V));
    }
    for (int level = done; level < last; ++level) node[level] = next[level];
  }
}
