// Launches the gradients of packed attention; shapes and addresses alone decide kernels and grids.
#include <algorithm>
#include <stdexcept>

#include "attention/varlen_attention_backward_cuda.cuh"

namespace emblas::cuda {
namespace {

template <class T, int dim>
void launch_both(const VarlenAttentionBackwardArgs<T>& args, float* deltas,
                 const PackedSizes& sizes, int64_t key_heads, void* stream) {
  const VarlenAttentionArgs<T>& forward = args.forward;
  const bool aligned = starts_whole(forward.q) && starts_whole(forward.k) &&
                       starts_whole(forward.v) && starts_whole(forward.out) &&
                       starts_whole(args.grad_out);
  simt::launch(grad_queries_tile<T, dim>,
               unsigned(attention_slots(sizes.queries, sizes.batch) * forward.heads),
               kTeamThreads * kTeamsOfQueries<dim>, 0, stream, args, deltas, sizes, aligned);
  simt::launch(
      grad_keys_tile<T, dim>, unsigned(attention_slots(sizes.keys, sizes.batch) * key_heads),
      kTeamThreads * kTeamsOfKeys<dim>, 0, stream, args, deltas, sizes, key_heads, aligned);
}

}  // namespace

template <class T>
void varlen_attention_backward(const VarlenAttentionBackwardArgs<T>& args, float* deltas,
                               const PackedSizes& sizes, int64_t key_heads, void* stream) {
  if (!simt::has_sm_80()) throw std::runtime_error("emblas: varlen_attention needs sm_80");
  const int64_t widest = std::max(args.forward.head_dim, args.forward.value_dim);
  const auto launch = widest <= 32    ? launch_both<T, 32>
                      : widest <= 64  ? launch_both<T, 64>
                      : widest <= 128 ? launch_both<T, 128>
                                      : launch_both<T, 256>;
  launch(args, deltas, sizes, key_heads, stream);
}

template void varlen_attention_backward<bfloat16>(const VarlenAttentionBackwardArgs<bfloat16>&,
                                                  float*, const PackedSizes&, int64_t, void*);
template void varlen_attention_backward<float16>(const VarlenAttentionBackwardArgs<float16>&,
                                                 float*, const PackedSizes&, int64_t, void*);

}  // namespace emblas::cuda
