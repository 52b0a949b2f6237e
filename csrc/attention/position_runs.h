// Tables of position vectors as kernels read them: by run of distances, of accumulators, padded.
#pragma once

#include <vector>

#include "attention/attention.h"
#include "common/tensor.h"

namespace emblas {

inline int64_t padded_dim(int64_t head_dim) {
  return (head_dim + kPositionPadding - 1) / kPositionPadding * kPositionPadding;
}

// Rows of neighbouring distances that take the same row of the tables.
struct PositionRuns {
  std::vector<int32_t> run;   // of each distance
  std::vector<int32_t> slot;  // of each run: the row of the tables
};

inline PositionRuns runs_of(const int32_t* lookup, int64_t size) {
  PositionRuns runs;
  runs.run.reserve(size);
  for (int64_t i = 0; i < size; ++i) {
    if (i == 0 || lookup[i] != lookup[i - 1]) runs.slot.push_back(lookup[i]);
    runs.run.push_back(int32_t(runs.slot.size()) - 1);
  }
  return runs;
}

// [heads][runs][padded_dim] of a table (slots, heads, head_dim).
template <class A>
std::vector<A> expand(const Tensor& table, const PositionRuns& runs) {
  const int64_t heads = table.size(1), dim = table.size(2), stride = padded_dim(dim);
  std::vector<A> expanded(heads * int64_t(runs.slot.size()) * stride);
  A* to = expanded.data();
  for (int64_t head = 0; head < heads; ++head) {
    for (const int32_t slot : runs.slot) {
      const A* from = read<A>(table) + slot * table.stride(0) + head * table.stride(1);
      std::copy(from, from + dim, to);
      to += stride;
    }
  }
  return expanded;
}

// grad[slot][head] = the sums by run of all sequences, one after the other.
template <class T>
void add_sequences(const VarlenAttentionArgs<T>& args, int64_t batch, const Accumulator<T>* sums,
                   int64_t head_stride, const PositionRuns& runs, const Tensor& grad) {
  using A = Accumulator<T>;
  const PositionVectors<A>& positions = args.scores.positions;
  const int64_t slots = grad.size(0), heads = grad.size(1), dim = grad.size(2);
  A* const to = write<A>(grad);
  parallel_for(heads, head_stride * int64_t(sizeof(A)), [&](int64_t low, int64_t high) {
    for (int64_t head = low; head < high; ++head) {
      std::vector<A> total(slots * dim);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t queries = args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b];
        const int64_t keys = args.cu_seqlens_k[b + 1] - args.cu_seqlens_k[b];
        if (queries == 0 || keys == 0) continue;
        const int64_t first = positions.run_of(1 - keys), last = positions.run_of(queries - 1);
        const A* from = sums + head * head_stride +
                        (args.cu_seqlens_q[b] + args.cu_seqlens_k[b]) * positions.stride;
        for (int64_t run = first; run <= last; ++run, from += positions.stride) {
          A* const row = total.data() + runs.slot[run] * dim;
          for (int64_t c = 0; c < dim; ++c) row[c] += from[c];
        }
      }
      for (int64_t slot = 0; slot < slots; ++slot) {
        const A* const from = total.data() + slot * dim;
        std::copy(from, from + dim, to + (slot * heads + head) * dim);
      }
    }
  });
}

}  // namespace emblas
