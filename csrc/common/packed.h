// Packed batches: the offsets contract that every family shares.
#pragma once

#include <cstdint>

namespace emblas {

// cu_seqlens [batch + 1]: starts at 0, never decreases, ends at total.
inline bool valid_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  bool valid = cu_seqlens[0] == 0 && cu_seqlens[batch] == total;
  for (int64_t b = 0; b < batch; ++b) valid &= cu_seqlens[b] <= cu_seqlens[b + 1];
  return valid;
}

// Sequences as work items. Position cu_seqlens[b] + b grows strictly with b, even over empty
// sequences, so a range of the positions [0, total + batch) stands for the sequences that start in
// it: tasks get equal numbers of tokens, not of sequences.
inline int64_t first_sequence_from(const int32_t* cu_seqlens, int64_t batch, int64_t position) {
  int64_t low = 0, high = batch;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu_seqlens[middle] + middle < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace emblas
