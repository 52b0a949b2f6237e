// Launches codes; shapes alone decide the grids.
#include <cmath>

#include "tables/codes_cuda.cuh"

namespace emblas::cuda {

using namespace tables;

template <class T>
void random_codes(const CodeArgs& args, int64_t rows, T* out, void* stream) {
  const int64_t pieces = (args.dim + kNumbers<T> - 1) / kNumbers<T>;
  const bool aligned =
      args.dim % simt::kVector<T> == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const double sparsity = double(args.sparsity);
  simt::launch(aligned ? make_codes<T, true> : make_codes<T, false>,
               unsigned((rows * pieces + kCodeThreads - 1) / kCodeThreads), kCodeThreads, 0, stream,
               args, rows, std::sqrt(sparsity), std::nearbyint(0x1p31 / sparsity), out);
}
template void random_codes<float>(const CodeArgs&, int64_t, float*, void*);
template void random_codes<double>(const CodeArgs&, int64_t, double*, void*);
template void random_codes<bfloat16>(const CodeArgs&, int64_t, bfloat16*, void*);
template void random_codes<float16>(const CodeArgs&, int64_t, float16*, void*);

}  // namespace emblas::cuda
