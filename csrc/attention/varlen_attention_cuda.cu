// Launches packed attention; shapes and addresses alone decide the kernel and the grid.
#include <algorithm>
#include <stdexcept>

#include "attention/varlen_attention_cuda.cuh"

namespace emblas::cuda {

template <class T>
void varlen_attention(const VarlenAttentionArgs<T>& args, const PackedSizes& sizes, void* stream) {
  if (!simt::has_sm_80()) throw std::runtime_error("emblas: varlen_attention needs sm_80");
  const bool aligned = starts_whole(args.q) && starts_whole(args.k) && starts_whole(args.v);
  const int64_t widest = std::max(args.head_dim, args.value_dim);
  const auto kernel = widest <= 32    ? attend_tile<T, 32>
                      : widest <= 64  ? attend_tile<T, 64>
                      : widest <= 128 ? attend_tile<T, 128>
                                      : attend_tile<T, 256>;
  simt::launch(kernel, unsigned(attention_slots(sizes.queries, sizes.batch) * args.heads),
               kAttentionThreads, 0, stream, args, sizes, aligned);
}

template void varlen_attention<bfloat16>(const VarlenAttentionArgs<bfloat16>&, const PackedSizes&,
                                         void*);
template void varlen_attention<float16>(const VarlenAttentionArgs<float16>&, const PackedSizes&,
                                        void*);

}  // namespace emblas::cuda
