// Finishing pooled vectors on a GPU: what finish_cuda.cu launches on a stream (a cudaStream_t),
// never waiting. The formulas stand in finish.h.
#pragma once

#include "pooling/finish.h"

namespace emblas::cuda {

inline constexpr int kMaxFinishDims = 32;  // they travel as an argument of the kernels

template <class A>
struct FinishArgs {
  const A* x;  // [rows, dim]
  int64_t rows, dim;
  int32_t dims[kMaxFinishDims];
  int32_t count;  // of dims
  bool normalize;
  double noise;  // standard deviation; 0: none
  uint64_t seed;
};

// out: [rows, sum of dims]. T is stored, and x holds its accumulators.
template <class T>
void finish(const FinishArgs<Accumulator<T>>& args, T* out, void* stream);
// out: [rows, sum of dims]; ranges: [2, sum of dims].
template <class A>
void finish_int8(const FinishArgs<A>& args, const A* ranges, int8_t* out, void* stream);
// out: [rows, sum of the bytes of dims].
template <class A>
void finish_bits(const FinishArgs<A>& args, uint8_t* out, void* stream);
// grad_out: [rows, sum of dims]; grad_x: [rows, dim].
template <class A>
void finish_backward(const FinishArgs<A>& args, const A* grad_out, A* grad_x, void* stream);

}  // namespace emblas::cuda
