// Launches summed vocabulary pooling; shapes and addresses alone decide the grids.
#include "pooling/vocab_sum_cuda.cuh"

namespace emblas::cuda {
namespace {

unsigned blocks(int64_t items, int64_t size) { return unsigned((items + size - 1) / size); }

template <class T>
bool aligned_tile(const LogitTile<T>& tile) {
  return reinterpret_cast<uintptr_t>(tile.logits) % 16 == 0 && tile.words * sizeof(T) % 16 == 0;
}

}  // namespace

template <class T>
void sum_tile(const SegmentRows<T>& rows, const LogitTile<T>& tile, const Activated<T>& activated,
              Accumulator<T>* partial, void* stream) {
  const auto kernel = aligned_tile(tile) ? sum_chunk_of_tile<T, true> : sum_chunk_of_tile<T, false>;
  // A chunk that begins at p has slot p / kChunkRows + b, b of `batch` segments.
  const unsigned chunks = blocks(tile.last_token - tile.first_token, kChunkRows);
  const dim3 grid(chunks + unsigned(rows.batch) - 1, blocks(tile.words, 32 * simt::kVector<T>));
  simt::launch(kernel, grid, kSumThreads, 0, stream, rows, tile, activated, partial);
}

template <class T>
void add_chunks(const SegmentRows<T>& rows, const Accumulator<T>* partial, int64_t first_word,
                int64_t words, int64_t vocab, Accumulator<T>* out, void* stream) {
  const dim3 grid(unsigned(rows.batch), blocks(words, kSumThreads));
  simt::launch(add_chunks_of_words<T>, grid, kSumThreads, 0, stream, rows, partial, words, vocab,
               out + first_word);
}

template <class T>
void find_owners(const SegmentRows<T>& rows, int32_t* owner, void* stream) {
  simt::launch(write_owners<T>, blocks(rows.positions, kSumThreads), kSumThreads, 0, stream, rows,
               owner);
}

template <class T>
void keep_tokens(const T* x, const int32_t* owner, int64_t tokens, int64_t dim, T* to,
                 void* stream) {
  simt::launch(copy_owned<T>, blocks(tokens * dim, kSumThreads), kSumThreads, 0, stream, x, owner,
               tokens, dim, to);
}

template <class T>
void tile_gradients(const TileGradients<T>& args, void* stream) {
  const LogitTile<T>& tile = args.tile;
  const auto kernel = aligned_tile(tile) ? tile_slopes<T, true> : tile_slopes<T, false>;
  const dim3 grid(blocks(tile.last_token - tile.first_token, kChunkRows),
                  blocks(tile.words, 32 * simt::kVector<T>));
  simt::launch(kernel, grid, kSumThreads, 0, stream, args);
}

template <class T>
void add_bias_gradients(const Accumulator<T>* partial, int64_t chunks, int64_t words,
                        Accumulator<T>* grad_bias, void* stream) {
  simt::launch(add_bias_chunks<Accumulator<T>>, blocks(words, kSumThreads), kSumThreads, 0, stream,
               partial, chunks, words, grad_bias);
}

template <class T>
void add_product(const ProductSum<T>& args, void* stream) {
  simt::launch(add_to_sum<T>, blocks(args.size, kSumThreads), kSumThreads, 0, stream, args);
}

#define EMBLAS_INSTANTIATE(T)                                                                   \
  template void sum_tile<T>(const SegmentRows<T>&, const LogitTile<T>&, const Activated<T>&,    \
                            Accumulator<T>*, void*);                                            \
  template void add_chunks<T>(const SegmentRows<T>&, const Accumulator<T>*, int64_t, int64_t,   \
                              int64_t, Accumulator<T>*, void*);                                 \
  template void find_owners<T>(const SegmentRows<T>&, int32_t*, void*);                         \
  template void keep_tokens<T>(const T*, const int32_t*, int64_t, int64_t, T*, void*);          \
  template void tile_gradients<T>(const TileGradients<T>&, void*);                              \
  template void add_bias_gradients<T>(const Accumulator<T>*, int64_t, int64_t, Accumulator<T>*, \
                                      void*);                                                   \
  template void add_product<T>(const ProductSum<T>&, void*);
EMBLAS_INSTANTIATE(float)
EMBLAS_INSTANTIATE(double)
EMBLAS_INSTANTIATE(bfloat16)
EMBLAS_INSTANTIATE(float16)

}  // namespace emblas::cuda
