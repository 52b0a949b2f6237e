// Vocabulary pooling and lexical weights as torch operators on CUDA tensors.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda/sort.h"
#include "pooling/lexical_cuda.h"
#include "pooling/vocab_door_cuda.h"
#include "pooling/vocab_pool_cuda.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> vocab_max_cuda(const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const Tensor& cu_seqlens,
                                          const OptionalTensor& weights,
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
    if (bias) call.check_vector<A>(*bias, vocab, "bias must hold one accumulator per word");
    const Tensor out = call.empty<2>(kScalarType<A>, {batch, vocab});
    const Tensor argmax = call.empty<2>(ScalarType::Int, {batch, vocab});
    const A* shift = call.read<A>(bias);
    A* best = call.write<A>(out);
    int32_t* at = call.write<int32_t>(argmax);
    Tensor buffer = call.empty<1>(x.scalar_type(), {std::min(cuda::kLogitTokens, tokens) *
                                                    std::min(cuda::kLogitWords, vocab)});
    for (int64_t word = 0; word < vocab; word += cuda::kLogitWords) {
      const int64_t words = std::min(cuda::kLogitWords, vocab - word);
      const Tensor columns = torch::stable::transpose(
          torch::stable::narrow(const_cast<Tensor&>(weight), 0, word, words), 0, 1);
      int64_t token = 0;
      do {  // once without tokens, too
        const int64_t count = std::min(cuda::kLogitTokens, tokens - token);
        Tensor tile =
            torch::stable::view(torch::stable::narrow(buffer, 0, 0, count * words), {count, words});
        matmul_out(torch::stable::narrow(const_cast<Tensor&>(x), 0, token, count), columns, tile);
        cuda::fold_logits<T>(rows, batch, {call.read<T>(tile), words, token, token + count, word},
                             shift, vocab, best, at, call.stream());
        token += count;
      } while (token < tokens);
    }
    return std::make_tuple(out, argmax);
  });
}

std::tuple<Tensor, Tensor> vocab_max_backward_cuda(const Tensor& grad_out, const Tensor& x,
                                                   const Tensor& weight, const Tensor& argmax,
                                                   const Tensor& cu_seqlens,
                                                   const OptionalTensor& ends, bool need_x,
                                                   bool need_weight) {
  const DeviceCall call(x);
  check_projection(call, x, weight);
  const int64_t batch = ends ? ends->size(0) : cu_seqlens.size(0) - 1;
  check(x.size(0) <= INT32_MAX, "x must have less than 2^31 tokens");
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t tokens = x.size(0), dim = x.size(1), vocab = weight.size(0);
    const auto is_output = [&](const Tensor& tensor, ScalarType dtype) {
      return call.holds(tensor) && tensor.scalar_type() == dtype && tensor.dim() == 2 &&
             tensor.size(0) == batch && tensor.size(1) == vocab && tensor.is_contiguous();
    };
    check(
        is_output(grad_out, kScalarType<A>) && is_output(argmax, ScalarType::Int),
        "grad_out and argmax must be contiguous tensors of the forward's shape, dtype and device");
    const cuda::VocabGradients<T> args{
        call.read<A>(grad_out), call.read<int32_t>(argmax), batch, vocab, tokens, dim};
    const Tensor grad_x = call.empty<2>(x.scalar_type(), {need_x ? tokens : 0, dim});
    const Tensor grad_weight = call.empty<2>(x.scalar_type(), {need_weight ? vocab : 0, dim});
    if (need_x) {
      const Tensor winner = call.empty<1>(ScalarType::Int, {batch * vocab});
      cuda::find_winners<T>(args, call.write<int32_t>(winner), call.stream());
      const auto [sorted, order] = sort_stable(winner);
      const Tensor bounds = call.empty<1>(ScalarType::Long, {tokens + 1});
      cuda::vocab_token_gradients<T>(args, call.read<T>(weight), call.read<int32_t>(sorted),
                                     call.read<int64_t>(order), call.write<int64_t>(bounds),
                                     call.write<T>(grad_x), call.stream());
    }
    if (need_weight) {
      cuda::vocab_word_gradients<T>(args, call.read<T>(x), call.write<T>(grad_weight),
                                    call.stream());
    }
    return std::make_tuple(grad_x, grad_weight);
  });
}

std::tuple<Tensor, Tensor, Tensor> lexical_index_cuda(const Tensor& token_ids,
                                                      const Tensor& weights,
                                                      const Tensor& cu_seqlens,
                                                      std::vector<int64_t> ignored) {
  const DeviceCall call(token_ids);
  call.check_vector<int64_t>(token_ids, -1, "token_ids must be a contiguous int64 vector");
  const int64_t tokens = token_ids.size(0);
  call.check_vector<float>(
      weights, tokens, "weights must be a contiguous float32 vector on the device of token_ids");
  call.check_vector<int32_t>(
      cu_seqlens, -1, "cu_seqlens must be a contiguous int32 vector on the device of token_ids");
  check(cu_seqlens.size(0) >= 1, "cu_seqlens must have at least one element");
  check(ignored.size() <= cuda::kMaxIgnored, "at most 32 ids can be ignored");
  check(cu_seqlens.size(0) >= 2 || tokens == 0, "cu_seqlens must end at the number of tokens");
  cuda::LexicalArgs args{};
  args.ids = call.read<int64_t>(token_ids);
  args.weights = call.read<float>(weights);
  args.cu_seqlens = call.read<int32_t>(cu_seqlens);
  args.batch = cu_seqlens.size(0) - 1;
  args.tokens = tokens;
  for (int64_t id : ignored) args.ignored[args.ignored_count++] = id;
  const Tensor chosen = call.empty<1>(ScalarType::Long, {tokens});
  cuda::choose_words(args, call.write<int64_t>(chosen), call.stream());
  const Tensor up_to = cumulative_sum(chosen);
  const Tensor crow = call.empty<1>(ScalarType::Long, {args.batch + 1});
  const Tensor columns = call.empty<1>(ScalarType::Long, {tokens});
  const Tensor at = call.empty<1>(ScalarType::Long, {tokens});
  cuda::place_words(args, call.read<int64_t>(chosen), call.read<int64_t>(up_to),
                    call.write<int64_t>(crow), call.write<int64_t>(columns),
                    call.write<int64_t>(at), call.stream());
  return std::make_tuple(crow, columns, at);
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "vocab_max_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens,"
      " Tensor? weights=None, Tensor? ends=None) -> (Tensor out, Tensor argmax)");
  library.def(
      "vocab_max_backward_cuda(Tensor grad_out, Tensor x, Tensor weight, Tensor argmax,"
      " Tensor cu_seqlens, Tensor? ends, bool need_x, bool need_weight)"
      " -> (Tensor grad_x, Tensor grad_weight)");
  library.def(
      "lexical_index_cuda(Tensor token_ids, Tensor weights, Tensor cu_seqlens, int[] ignored)"
      " -> (Tensor crow, Tensor columns, Tensor tokens)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("vocab_max_cuda", TORCH_BOX(&emblas::vocab_max_cuda));
  library.impl("vocab_max_backward_cuda", TORCH_BOX(&emblas::vocab_max_backward_cuda));
  library.impl("lexical_index_cuda", TORCH_BOX(&emblas::lexical_index_cuda));
}
