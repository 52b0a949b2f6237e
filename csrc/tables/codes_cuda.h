// Codes on a GPU: what codes_cuda.cu launches, on a stream (a cudaStream_t), never waiting. The
// formulas stand in codes.h.
#pragma once

#include "tables/codes.h"

namespace emblas::cuda {

// out [rows, dim].
template <class T>
void random_codes(const CodeArgs& args, int64_t rows, T* out, void* stream);

}  // namespace emblas::cuda
