// Launches the unpacking of bit codes.
#include <algorithm>

#include "binary/unpack_planes_cuda.cuh"

namespace emblas::cuda {

template <class T>
void unpack_planes(const UnpackPlanesArgs<T>& args, void* stream) {
  constexpr int64_t block_pieces = 4 * kUnpackThreads;
  constexpr int64_t values = simt::kVector<T>;
  const int64_t row_pieces = (args.dim + values - 1) / values;
  const int64_t rows = std::max<int64_t>(1, block_pieces / row_pieces);
  simt::launch(args.dim % values == 0 ? unpack_rows<T, true> : unpack_rows<T, false>,
               unsigned((args.rows + rows - 1) / rows), kUnpackThreads, 0, stream, args, rows);
}

template void unpack_planes<float>(const UnpackPlanesArgs<float>&, void*);
template void unpack_planes<double>(const UnpackPlanesArgs<double>&, void*);
template void unpack_planes<bfloat16>(const UnpackPlanesArgs<bfloat16>&, void*);
template void unpack_planes<float16>(const UnpackPlanesArgs<float16>&, void*);

}  // namespace emblas::cuda
