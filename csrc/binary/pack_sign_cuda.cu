// Launches the packing of signs.
#include <algorithm>

#include "binary/pack_sign_cuda.cuh"

namespace emblas::cuda {

template <class T>
void pack_sign(const PackSignArgs<T>& args, void* stream) {
  if (args.rows == 0 || args.dim == 0) return;
  constexpr int64_t block_pieces = 4 * kPackThreads;
  const int64_t row_pieces = (args.dim + 7) / 8 * (8 / simt::kVector<T>);
  const int64_t rows = std::max<int64_t>(1, block_pieces / row_pieces);
  const bool aligned = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                       args.row_stride * int64_t(sizeof(T)) % 16 == 0;
  const auto pack = aligned ? pack_rows<T, true> : pack_rows<T, false>;
  simt::launch(pack, unsigned((args.rows + rows - 1) / rows), kPackThreads, 0, stream, args, rows);
}

template void pack_sign<float>(const PackSignArgs<float>&, void*);
template void pack_sign<double>(const PackSignArgs<double>&, void*);
template void pack_sign<bfloat16>(const PackSignArgs<bfloat16>&, void*);
template void pack_sign<float16>(const PackSignArgs<float16>&, void*);

}  // namespace emblas::cuda
