// Launches vocabulary pooling; shapes and addresses alone decide the grids.
#include "pooling/vocab_pool_cuda.cuh"

namespace emblas::cuda {
namespace {

unsigned blocks(int64_t items, int64_t size) { return unsigned((items + size - 1) / size); }

template <class T>
bool aligned_rows(const T* rows, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && row_stride * sizeof(T) % 16 == 0;
}

}  // namespace

template <class T>
void fold_logits(const SegmentRows<T>& rows, int64_t batch, const LogitTile<T>& tile,
                 const Accumulator<T>* bias, int64_t vocab, Accumulator<T>* out, int32_t* argmax,
                 void* stream) {
  const auto kernel =
      aligned_rows(tile.logits, tile.words) ? fold_tile<T, true> : fold_tile<T, false>;
  const dim3 grid(unsigned(batch), blocks(tile.words, 32 * simt::kVector<T>));
  simt::launch(kernel, grid, kVocabThreads, 0, stream, rows, tile, bias, vocab, out, argmax);
}

template <class T>
void find_winners(const VocabGradients<T>& args, int32_t* winner, void* stream) {
  simt::launch(name_winners<T>, blocks(args.batch * args.vocab, kVocabThreads), kVocabThreads, 0,
               stream, args, winner);
}

template <class T>
void vocab_token_gradients(const VocabGradients<T>& args, const T* weight, const int32_t* sorted,
                           const int64_t* order, int64_t* bounds, T* grad_x, void* stream) {
  simt::launch(token_bounds<T>, blocks(args.tokens + 1, kVocabThreads), kVocabThreads, 0, stream,
               args, sorted, bounds);
  const auto kernel = aligned_rows(weight, args.dim) ? token_gradients_of_words<T, true>
                                                     : token_gradients_of_words<T, false>;
  const dim3 grid(unsigned(args.tokens), blocks(args.dim, 32 * simt::kVector<T>));
  simt::launch(kernel, grid, kVocabThreads, 0, stream, args, weight, order, bounds, grad_x);
}

template <class T>
void vocab_word_gradients(const VocabGradients<T>& args, const T* x, T* grad_weight, void* stream) {
  const auto kernel =
      aligned_rows(x, args.dim) ? word_gradients<T, true> : word_gradients<T, false>;
  simt::launch(kernel, blocks(args.vocab, kVocabWarps), kVocabThreads, 0, stream, args, x,
               grad_weight);
}

#define EMBLAS_INSTANTIATE(T)                                                                     \
  template void fold_logits<T>(const SegmentRows<T>&, int64_t, const LogitTile<T>&,               \
                               const Accumulator<T>*, int64_t, Accumulator<T>*, int32_t*, void*); \
  template void find_winners<T>(const VocabGradients<T>&, int32_t*, void*);                       \
  template void vocab_token_gradients<T>(const VocabGradients<T>&, const T*, const int32_t*,      \
                                         const int64_t*, int64_t*, T*, void*);                    \
  template void vocab_word_gradients<T>(const VocabGradients<T>&, const T*, T*, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
