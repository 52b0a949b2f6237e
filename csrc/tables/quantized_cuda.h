// Quantized tables on a GPU: what quantized_bag_cuda.cu launches, on a stream (a cudaStream_t),
// never waiting. The formulas stand in quantized.h.
#pragma once

#include "tables/compose.h"
#include "tables/tables_cuda.h"

namespace emblas::cuda {

template <class T>
struct QuantizedArgs {
  const uint8_t* packed;  // [rows, row_bytes]
  int64_t rows, row_bytes, dim;
  int64_t bits;
  BagMode mode;
  const int64_t* ids;
  int64_t count;
  const int32_t* offsets;  // [bags + 1], or null: every id is a bag of its own
  int64_t bags;
  const T* scale;                 // [rows]
  const Accumulator<T>* weights;  // [ids] or null
  const Accumulator<T>* zero;     // [rows], or null: 2^(bits-1)
  bool has_padding;
  int64_t padding_id;
};

// out [bags, dim].
template <class T>
void quantized_bag(const QuantizedArgs<T>& args, T* out, void* stream);

// grad_weights [ids]; args.weights is not read.
template <class T>
void quantized_grad_weights(const QuantizedArgs<T>& args, const BagNumbers& bags, const T* grad_out,
                            Accumulator<T>* grad_weights, void* stream);

}  // namespace emblas::cuda
