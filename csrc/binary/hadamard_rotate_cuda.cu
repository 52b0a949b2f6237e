// Launches rotations.
#include <algorithm>
#include <cmath>

#include "binary/hadamard_rotate_cuda.cuh"

namespace emblas::cuda {

template <class T>
void hadamard_rotate(const HadamardRotateArgs<T>& args, int64_t rows, void* stream) {
  using A = Accumulator<T>;
  if (args.dim == 0) return;
  int size = 1;
  while (2 * size <= args.dim) size *= 2;
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                       args.row_stride * int64_t(sizeof(T)) % 16 == 0;
  const auto kernel = aligned ? rotate_rows<T, true> : rotate_rows<T, false>;
  const int threads = std::clamp(size / 2, 32, kRotateThreads);
  simt::launch(kernel, unsigned(rows), unsigned(threads), size_t(args.dim) * sizeof(A), stream,
               args, size, A(1 / std::sqrt(double(size))));
}

template void hadamard_rotate<float>(const HadamardRotateArgs<float>&, int64_t, void*);
template void hadamard_rotate<double>(const HadamardRotateArgs<double>&, int64_t, void*);
template void hadamard_rotate<bfloat16>(const HadamardRotateArgs<bfloat16>&, int64_t, void*);
template void hadamard_rotate<float16>(const HadamardRotateArgs<float16>&, int64_t, void*);

}  // namespace emblas::cuda
