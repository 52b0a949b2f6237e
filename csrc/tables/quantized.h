// Tables of integers with a scale for each row, looked up without a table of floats.
//
//   e(id)  = s[id] (q[id] - z[id])                    q: unsigned integers of 2, 4, 8 or 16 bits
//   out_b  = sum | mean | max of w_i e(id_i) over the ids of bag b; zero if the bag is empty
//
// Backward, g_b = d loss / d out_b, bag b of id i:   dw_i = e(id_i) . g_b
//
// The zero point z is a number of the row, or 2^(bits-1) for all. The difference is rounded once,
// if at all, and so is its product with the scale.
//
// The integers of a row are packed least significant bit first; the last byte ends in zeros.
//
// Bytes: each id reads its row, bits / 8 bytes for an element, its scale and zero point; each bag
// writes its result once. So a large table is bound by the latency of memory, which prefetching
// hides, and a cached one by the instructions that widen integers: about three for each vector of
// products.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "tables/compose.h"

namespace emblas {

// Kernels work on whole vectors. What they compute beyond the last element is never stored.
constexpr int64_t padded_dim(int64_t dim) { return (dim + 15) / 16 * 16; }
constexpr int64_t packed_bytes(int64_t dim, int64_t bits) { return (dim * bits + 7) / 8; }

// The first id that is neither a row nor the padding id; null if there is none.
inline const int64_t* find_id_outside(const int64_t* ids, int64_t count, int64_t rows,
                                      const int64_t* padding_id) {
  uint64_t bits = 0;  // the highest is set if one is negative or too large: vectors can tell this
  for (int64_t i = 0; i < count; ++i) {
    bits |= uint64_t(ids[i]) | (uint64_t(rows) - 1 - uint64_t(ids[i]));
  }
  for (int64_t i = 0; bits >> 63 && i < count; ++i) {
    const bool inside = uint64_t(ids[i]) < uint64_t(rows);
    if (!inside && !(padding_id && ids[i] == *padding_id)) return ids + i;
  }
  return nullptr;
}

template <class T>
struct QuantizedArgs {
  const uint8_t* packed;  // [rows, packed_bytes(dim, bits)]
  const T* scale;         // [rows]
  int64_t rows, dim, bits;
  BagMode mode;
  const int64_t* ids;             // 0 to rows - 1, or *padding_id
  const int32_t* offsets;         // [bags + 1], or null: every id is a bag of its own
  const Accumulator<T>* weights;  // [ids] or null; for BagMode::sum
  const int64_t* padding_id;      // contributes nothing; null for none
  const Accumulator<T>* zero;     // [rows], or null: 2^(bits-1)
};

template <class T>
struct Quantized {
  // out [bags, dim] for the bags [first, last); scratch holds 2 padded_dim(dim) accumulators.
  void (*forward)(const QuantizedArgs<T>&, int64_t first, int64_t last, Accumulator<T>* scratch,
                  T* out);
  // grad_weights [ids] for the bags [first, last), with the same scratch.
  void (*grad_weights)(const QuantizedArgs<T>&, int64_t first, int64_t last, const T* grad_out,
                       Accumulator<T>* scratch, Accumulator<T>* grad_weights);
};

struct QuantizedKernels {
  ByDtype<Quantized> quantized;
};

}  // namespace emblas
