// Launches late interaction; shapes and addresses alone decide the kernels and grids.
#include "binary/maxsim_cuda.cuh"

namespace emblas::cuda {
namespace {

bool is_aligned(const TokenRows& tokens) {
  return unit_of({tokens.data, tokens.stride, tokens.count}, tokens.bytes) == 16;
}

}  // namespace

template <class Q, class D>
void maxsim(const MaxSimArgs<Score<Q>>& args, bool tensor_cores, void* stream) {
  constexpr bool spread = std::is_same_v<D, Bits> && !std::is_same_v<Q, Bits>;
  const bool aligned = is_aligned(args.queries) && (spread || is_aligned(args.documents));
  const auto run = [&](auto by_mma) {
    constexpr bool mma = decltype(by_mma)::value;
    simt::launch(aligned ? score_pairs<Q, D, true, mma> : score_pairs<Q, D, false, mma>,
                 unsigned(args.queries.sets * args.documents.sets), kPairThreads, 0, stream, args);
  };
  if constexpr (std::is_same_v<Q, D> && sizeof(Q) <= 2) {  // bits, or of 16 bits
    if (tensor_cores && simt::has_sm_80()) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <class A>
void maxsim_backward(const MaxSimBackwardArgs<A>& args, void* stream) {
  const bool aligned = is_aligned(args.queries) && is_aligned(args.documents);
  const unsigned tiles = unsigned(divide_up(args.dim, 32 * simt::kVector<A>));
  simt::launch(aligned ? sum_winners<A, true, true> : sum_winners<A, true, false>,
               dim3(unsigned(args.queries.count), tiles), 256, 0, stream, args);
  simt::launch(aligned ? sum_winners<A, false, true> : sum_winners<A, false, false>,
               dim3(unsigned(args.documents.count), tiles), 32, 0, stream, args);
}

template void maxsim<float, float>(const MaxSimArgs<float>&, bool, void*);
template void maxsim<bfloat16, bfloat16>(const MaxSimArgs<float>&, bool, void*);
template void maxsim<float16, float16>(const MaxSimArgs<float>&, bool, void*);
template void maxsim<float, Bits>(const MaxSimArgs<float>&, bool, void*);
template void maxsim<double, double>(const MaxSimArgs<double>&, bool, void*);
template void maxsim<Bits, Bits>(const MaxSimArgs<float>&, bool, void*);
template void maxsim_backward<float>(const MaxSimBackwardArgs<float>&, void*);
template void maxsim_backward<double>(const MaxSimBackwardArgs<double>&, void*);

}  // namespace emblas::cuda
