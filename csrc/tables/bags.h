// Bags of ids as the operators take them: the checks of their offsets and weights, and tasks.
#pragma once

#include <optional>

#include "common/packed.h"
#include "common/tensor.h"

namespace emblas {

inline void check_id_weights(const std::optional<Tensor>& weights, int64_t ids, bool is_double) {
  const char* message =
      "weights must be a contiguous CPU vector of one weight per id, float64 where the table is "
      "float64 and float32 otherwise";
  if (weights && is_double) check_vector<double>(*weights, ids, message);
  if (weights && !is_double) check_vector<float>(*weights, ids, message);
}

// Returns the number of bags; without offsets each id is one.
inline int64_t check_offsets(const std::optional<Tensor>& offsets, int64_t ids) {
  if (!offsets) return ids;
  check_vector<int32_t>(*offsets, -1, "offsets must be a contiguous int32 CPU vector");
  check(offsets->size(0) >= 1, "offsets must have at least one element");
  const int64_t bags = offsets->size(0) - 1;
  check(valid_cu_seqlens(read<int32_t>(*offsets), bags, ids),
        "offsets must start at 0, never decrease and end at the number of ids");
  return bags;
}

template <class T>
const T* read_optional(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

// body(first, last) over the bags, tasks balanced by ids.
template <class Body>
void for_bags(const int32_t* offsets, int64_t bags, int64_t bytes_per_id, const Body& body) {
  if (!offsets) return parallel_for(bags, bytes_per_id, body);
  parallel_for(offsets[bags] + bags, bytes_per_id, [&](int64_t low, int64_t high) {
    body(first_sequence_from(offsets, bags, low), first_sequence_from(offsets, bags, high));
  });
}

}  // namespace emblas
