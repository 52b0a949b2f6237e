// Launches rotary position embedding; shapes and addresses alone decide the grid.
#include "attention/rotary_cuda.cuh"

namespace emblas::cuda {
namespace {

template <class T, bool interleaved>
void turn(const RotaryArgs<T>& args, int64_t tokens, int64_t rows, void* stream) {
  constexpr int64_t size = sizeof(T), vector = simt::kVector<T>;
  const auto parts_of = [](int64_t elements) { return (elements + vector - 1) / vector; };
  const auto whole = [](int64_t elements) { return elements * size % 16 == 0; };
  const auto starts_whole = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0;
  };
  const bool aligned = starts_whole(args.x.data) && starts_whole(args.out.data) &&
                       whole(args.x.token_stride) && whole(args.x.head_stride) &&
                       whole(args.out.token_stride) && whole(args.out.head_stride) &&
                       (interleaved || whole(args.pairs));
  const int64_t turning = parts_of(interleaved ? 2 * args.pairs : args.pairs);
  const int64_t parts = turning + parts_of(args.head_dim - 2 * args.pairs);
  const int64_t items = tokens * args.heads * parts;
  const dim3 grid(unsigned((items + kRotaryThreads - 1) / kRotaryThreads));
  simt::launch(aligned ? turn_pairs<T, interleaved, true> : turn_pairs<T, interleaved, false>, grid,
               kRotaryThreads, 0, stream, args, tokens, rows, turning, parts);
}

}  // namespace

template <class T>
void rotary(const RotaryArgs<T>& args, bool interleaved, int64_t tokens, int64_t rows,
            void* stream) {
  interleaved ? turn<T, true>(args, tokens, rows, stream)
              : turn<T, false>(args, tokens, rows, stream);
}

#define EMBLAS_INSTANTIATE(T) \
  template void rotary<T>(const RotaryArgs<T>&, bool, int64_t, int64_t, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
