// What the launchers of the tables family share. Included by .cu files.
#pragma once

#include "tables/segment_sum_cuda.cuh"

namespace emblas::cuda::tables {
namespace {

unsigned blocks(int64_t items, int64_t per_block) {
  return unsigned((items + per_block - 1) / per_block);
}

template <class T>
unsigned column_tiles(const RowShape& shape) {
  return blocks(shape.dim, shape.tile<T>());
}

template <class T>
bool aligned_rows(const T* data, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * sizeof(T) % 16 == 0;
}

// partial: workspace of piece_rows(entries) x dim.
template <bool aligned, class Source, class Segments, class Sink>
void sum_rows(const Source& source, const Segments& segments, int64_t entries, int64_t dim,
              Accumulator<typename Source::Element>* partial, const Sink& sink, void* stream) {
  using T = typename Source::Element;
  const auto shape = RowShape::of<T>(dim);
  const unsigned tiles = column_tiles<T>(shape);
  simt::launch(sum_segments<Source, Segments, Sink, aligned>,
               dim3(blocks(segments.count, kWarps), tiles), kThreads, 0, stream, source, segments,
               shape, sink);
  const int64_t slots = piece_rows(entries);
  if (slots == 0 || segments.count == 0) return;
  simt::launch(sum_pieces<Source, Segments, aligned>, dim3(blocks(slots, kWarps), tiles), kThreads,
               0, stream, source, segments, shape, partial);
  simt::launch(add_pieces<T, Segments, Sink, aligned>, dim3(unsigned(slots), tiles), kThreads, 0,
               stream, Partials<T>{partial, dim}, segments, shape, sink);
}

template <class Source, class... Arguments>
void sum(bool aligned, const Source& source, const Arguments&... arguments) {
  if (aligned) {
    sum_rows<true>(source, arguments...);
  } else {
    sum_rows<false>(source, arguments...);
  }
}

}  // namespace
}  // namespace emblas::cuda::tables
