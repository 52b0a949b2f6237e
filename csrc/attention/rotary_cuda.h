// Rotary position embedding on a GPU: what rotary_cuda.cu launches, on a stream (a cudaStream_t),
// never waiting.
#pragma once

#include "attention/rotary.h"

namespace emblas::cuda {

// rows: of cos and sin, at least 1; position_ids beyond them take the first or the last.
template <class T>
void rotary(const RotaryArgs<T>& args, bool interleaved, int64_t tokens, int64_t rows,
            void* stream);

}  // namespace emblas::cuda
