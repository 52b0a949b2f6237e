// Summed vocabulary pooling as torch operators on CUDA tensors.
#include <algorithm>
#include <optional>
#include <tuple>

#include "pooling/vocab_door_cuda.h"
#include "pooling/vocab_sum_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor rows_from(const Tensor& tensor, int64_t first, int64_t count) {
  return torch::stable::narrow(const_cast<Tensor&>(tensor), 0, first, count);
}
Tensor transposed(Tensor matrix) { return torch::stable::transpose(matrix, 0, 1); }

// The first elements of a buffer as a matrix.
Tensor matrix_in(const Tensor& buffer, int64_t rows, int64_t columns) {
  return torch::stable::view(rows_from(buffer, 0, rows * columns), {rows, columns});
}

int64_t chunks_of(int64_t tokens) { return (tokens + cuda::kChunkRows - 1) / cuda::kChunkRows; }

template <class T>
cuda::Activated<T> activated_by(const DeviceCall& call, const OptionalTensor& bias, int64_t vocab,
                                int64_t activation) {
  if (bias) {
    call.check_vector<Accumulator<T>>(*bias, vocab, "bias must hold one accumulator per word");
  }
  check(activation >= 0 && activation < cuda::kActivations, "activation must be 0 to 3");
  return {call.read<Accumulator<T>>(bias), activation};
}

Tensor vocab_sum_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const Tensor& cu_seqlens, int64_t activation, const OptionalTensor& weights,
                      const OptionalTensor& ends) {
  const DeviceCall call(x);
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  check_projection(call, x, weight);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const cuda::SegmentRows<T> rows = segment_rows<T>(call, tensors);
    const int64_t batch = tensors.batch(), tokens = x.size(0), vocab = weight.size(0);
    const cuda::Activated<T> activated = activated_by<T>(call, bias, vocab, activation);
    const Tensor out = call.empty<2>(kScalarType<A>, {batch, vocab});
    if (batch == 0) return out;
    A* sums = call.write<A>(out);
    const int64_t tile_words = std::min(cuda::kLogitWords, vocab);
    const int64_t reach = cuda::kLogitTokens + cuda::kChunkRows - 1;  // of a tile's chunks
    const Tensor buffer = call.empty<1>(x.scalar_type(), {std::min(reach, tokens) * tile_words});
    const Tensor chunks =
        call.empty<2>(kScalarType<A>, {cuda::chunk_slots(batch, tokens), tile_words});
    A* partial = call.write<A>(chunks);
    for (int64_t word = 0; word < vocab; word += cuda::kLogitWords) {
      const int64_t words = std::min(cuda::kLogitWords, vocab - word);
      const Tensor columns = transposed(rows_from(weight, word, words));
      for (int64_t token = 0; token < tokens; token += cuda::kLogitTokens) {
        const int64_t count = std::min(reach, tokens - token);
        Tensor tile = matrix_in(buffer, count, words);
        matmul_out(rows_from(x, token, count), columns, tile);
        const int64_t last = std::min(token + cuda::kLogitTokens, tokens);
        cuda::sum_tile<T>(rows, {call.read<T>(tile), words, token, last, word}, activated, partial,
                          call.stream());
      }
      cuda::add_chunks<T>(rows, partial, word, words, vocab, sums, call.stream());
    }
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> vocab_sum_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& cu_seqlens, int64_t activation, const OptionalTensor& weights,
    const OptionalTensor& ends, bool need_x, bool need_weight, bool need_bias) {
  const DeviceCall call(x);
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  check_projection(call, x, weight);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const cuda::SegmentRows<T> rows = segment_rows<T>(call, tensors);
    const int64_t tokens = x.size(0), dim = x.size(1), vocab = weight.size(0);
    check(call.holds(grad_out) && grad_out.scalar_type() == kScalarType<A> && grad_out.dim() == 2 &&
              grad_out.size(0) == tensors.batch() && grad_out.size(1) == vocab &&
              grad_out.is_contiguous(),
          "grad_out must be a contiguous tensor of the forward's shape, dtype and device");
    const Tensor grad_x = call.empty<2>(x.scalar_type(), {need_x ? tokens : 0, dim});
    const Tensor grad_weight = call.empty<2>(x.scalar_type(), {need_weight ? vocab : 0, dim});
    const Tensor grad_bias = call.empty<1>(kScalarType<A>, {need_bias ? vocab : 0});

    const int64_t tile_tokens = std::min(cuda::kLogitTokens, tokens);
    const int64_t tile_words = std::min(cuda::kLogitWords, vocab);
    const Tensor buffer = call.empty<1>(x.scalar_type(), {tile_tokens * tile_words});
    const Tensor product =
        call.empty<1>(x.scalar_type(), {std::max(tile_tokens, tile_words) * dim});
    const Tensor sum_x = call.empty<2>(kScalarType<A>, {grad_x.size(0), dim});
    const Tensor sum_weight = call.empty<2>(kScalarType<A>, {need_weight ? tile_words : 0, dim});
    const Tensor chunks =
        call.empty<2>(kScalarType<A>, {need_bias ? chunks_of(tokens) : 0, tile_words});
    A *of_tokens = call.write<A>(sum_x), *of_words = call.write<A>(sum_weight);
    T *to_x = call.write<T>(grad_x), *to_weight = call.write<T>(grad_weight);
    A *partial = call.write<A>(chunks), *to_bias = call.write<A>(grad_bias);

    const Tensor owners = call.empty<1>(ScalarType::Int, {tokens});
    cuda::find_owners<T>(rows, call.write<int32_t>(owners), call.stream());
    const Tensor kept = call.empty<2>(x.scalar_type(), {need_weight ? tokens : 0, dim});
    if (need_weight) {
      cuda::keep_tokens<T>(call.read<T>(x), call.read<int32_t>(owners), tokens, dim,
                           call.write<T>(kept), call.stream());
    }
    cuda::TileGradients<T> args{};
    args.activated = activated_by<T>(call, bias, vocab, activation);
    args.owner = call.read<int32_t>(owners);
    args.grad_out = call.read<A>(grad_out);
    args.vocab = vocab;
    args.partial = need_bias ? partial : nullptr;

    int64_t word = 0;
    do {  // once without words, and without tokens, too: there are zeros to be written
      const int64_t words = std::min(cuda::kLogitWords, vocab - word);
      const Tensor rows_of_words = rows_from(weight, word, words);
      int64_t token = 0;
      do {
        const int64_t count = std::min(cuda::kLogitTokens, tokens - token);
        Tensor tile = matrix_in(buffer, count, words);
        matmul_out(rows_from(x, token, count), transposed(rows_of_words), tile);
        args.tile = {call.read<T>(tile), words, token, token + count, word};
        args.logits = write<T>(tile);
        cuda::tile_gradients<T>(args, call.stream());
        if (need_x) {
          Tensor part = matrix_in(product, count, dim);
          matmul_out(tile, rows_of_words, part);
          cuda::add_product<T>({call.read<T>(part), count * dim, word == 0, word + words == vocab,
                                of_tokens + token * dim, to_x + token * dim},
                               call.stream());
        }
        if (need_weight) {
          Tensor part = matrix_in(product, words, dim);
          matmul_out(transposed(tile), rows_from(kept, token, count), part);
          cuda::add_product<T>({call.read<T>(part), words * dim, token == 0,
                                token + count == tokens, of_words, to_weight + word * dim},
                               call.stream());
        }
        token += count;
      } while (token < tokens);
      if (need_bias) {
        cuda::add_bias_gradients<T>(partial, chunks_of(tokens), words, to_bias + word,
                                    call.stream());
      }
      word += words;
    } while (word < vocab);
    return std::make_tuple(grad_x, grad_weight, grad_bias);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "vocab_sum_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, int activation,"
      " Tensor? weights=None, Tensor? ends=None) -> Tensor");
  library.def(
      "vocab_sum_backward_cuda(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias,"
      " Tensor cu_seqlens, int activation, Tensor? weights, Tensor? ends, bool need_x,"
      " bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor "
      "grad_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("vocab_sum_cuda", TORCH_BOX(&emblas::vocab_sum_cuda));
  library.impl("vocab_sum_backward_cuda", TORCH_BOX(&emblas::vocab_sum_backward_cuda));
}
