// Vocabulary pooling and lexical weights as torch operators on CPU tensors.
#include <limits>
#include <tuple>

#include "common/aligned.h"
#include "common/isa.h"
#include "pooling/segments_door.h"
#include "pooling/vocab_pool.h"

namespace emblas {
namespace {

using OptionalTensor = std::optional<Tensor>;

// out = a b
void matmul_out(const Tensor& a, const Tensor& b, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  check_torch(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

void check_projection(const SegmentTensors& tensors, const Tensor& weight) {
  tensors.check_all();
  check(tensors.batch() == 0 || tensors.disjoint(), "segments must be in order and disjoint");
  check(tensors.x.dim() == 2 && tensors.x.is_contiguous(), "x must be contiguous (tokens, dim)");
  check(weight.is_cpu() && weight.scalar_type() == tensors.x.scalar_type() && weight.dim() == 2 &&
            weight.size(1) == tensors.x.size(1) && weight.is_contiguous(),
        "weight must be a contiguous CPU tensor (vocabulary, dim) of the dtype of x");
}

std::tuple<Tensor, Tensor> vocab_max(const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, const Tensor& cu_seqlens,
                                     const OptionalTensor& weights, const OptionalTensor& ends) {
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, weights, ends, none, none};
  check_projection(tensors, weight);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), tokens = x.size(0), vocab = weight.size(0);
    if (bias) check_vector<A>(*bias, vocab, "bias must hold one accumulator per word");
    Tensor out = empty_cpu<2>(kScalarType<A>, {batch, vocab});
    Tensor argmax = empty_cpu<2>(ScalarType::Int, {batch, vocab});
    A* best = write<A>(out);
    int32_t* at = write<int32_t>(argmax);
    std::fill_n(best, batch * vocab, -std::numeric_limits<A>::infinity());
    std::fill_n(at, batch * vocab, -1);
    const auto& kernel = kernels<VocabPoolKernels>().of(element);
    Tensor buffer = empty_cpu<1>(x.scalar_type(),
                                 {std::min(kTileTokens, tokens) * std::min(kTileWords, vocab)});
    for (int64_t word = 0; word < vocab; word += kTileWords) {
      const int64_t words = std::min(kTileWords, vocab - word);
      const Tensor columns = torch::stable::transpose(
          torch::stable::narrow(const_cast<Tensor&>(weight), 0, word, words), 0, 1);
      for (int64_t token = 0; token < tokens; token += kTileTokens) {
        const int64_t rows = std::min(kTileTokens, tokens - token);
        Tensor tile =
            torch::stable::view(torch::stable::narrow(buffer, 0, 0, rows * words), {rows, words});
        matmul_out(torch::stable::narrow(const_cast<Tensor&>(x), 0, token, rows), columns, tile);
        const VocabTile<T> job{
            read<T>(tile), words,       token,     token + rows, tensors.view<T>(),
            batch,         best + word, at + word, vocab};
        parallel_for(words, rows * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
          const AlignedArray<A> scratch = aligned_array<A>(last - first);
          kernel.fold(job, first, last, scratch.get());
        });
      }
    }
    const A* shift = bias ? read<A>(*bias) : nullptr;
    parallel_for(batch, vocab * int64_t(sizeof(A)), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        for (int64_t v = 0; v < vocab; ++v) {
          A& value = best[b * vocab + v];
          // A logit of -infinity never beat the start: it is a value without a row.
          if (at[b * vocab + v] < 0 && value == -std::numeric_limits<A>::infinity())
            value = 0;
          else if (shift)
            value += shift[v];
        }
      }
    });
    return std::make_tuple(out, argmax);
  });
}

std::tuple<Tensor, Tensor> vocab_max_backward(const Tensor& grad_out, const Tensor& x,
                                              const Tensor& weight, const Tensor& argmax,
                                              const Tensor& cu_seqlens, const OptionalTensor& ends,
                                              bool need_x, bool need_weight) {
  const std::optional<Tensor> none;
  const SegmentTensors tensors{x, cu_seqlens, none, ends, none, none};
  check_projection(tensors, weight);
  return visit_float(x.scalar_type(), kPoolingDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t batch = tensors.batch(), tokens = x.size(0), dim = x.size(1);
    const int64_t vocab = weight.size(0);
    const auto is_output = [&](const Tensor& tensor, ScalarType dtype) {
      return tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == 2 &&
             tensor.size(0) == batch && tensor.size(1) == vocab && tensor.is_contiguous();
    };
    check(is_output(grad_out, kScalarType<A>) && is_output(argmax, ScalarType::Int),
          "grad_out and argmax must be contiguous CPU tensors of the forward's shape and dtype");
    const A* grad = read<A>(grad_out);
    const int32_t* at = read<int32_t>(argmax);
    const int32_t *begins = tensors.begin_values(), *last_of = tensors.end_values();
    bool valid = true;
    for (int64_t i = 0; i < batch * vocab; ++i) {
      valid &= at[i] == -1 || (begins[i / vocab] <= at[i] && at[i] < last_of[i / vocab]);
    }
    check(valid, "argmax must hold tokens of their own segments");
    const auto& kernel = kernels<VocabPoolKernels>().of(element);
    const T *rows = read<T>(x), *words = read<T>(weight);
    Tensor grad_x = empty_cpu<2>(x.scalar_type(), {need_x ? tokens : 0, dim});
    Tensor grad_weight = empty_cpu<2>(x.scalar_type(), {need_weight ? vocab : 0, dim});
    if (need_x) {
      T* to = write<T>(grad_x);
      std::memset(static_cast<void*>(to), 0, tokens * dim * sizeof(T));
      parallel_for(batch, vocab * int64_t(sizeof(A)), [&](int64_t first, int64_t last) {
        std::vector<A> sums;  // of one sequence's tokens
        for (int64_t b = first; b < last; ++b) {
          const int64_t begin = begins[b], count = last_of[b] - begin;
          sums.assign(count * dim, A(0));
          for (int64_t v = 0; v < vocab; ++v) {
            const A g = grad[b * vocab + v];
            const int64_t t = at[b * vocab + v] - begin;
            if (g != 0 && t >= 0) kernel.add(&sums[t * dim], words + v * dim, g, dim);
          }
          for (int64_t t = 0; t < count; ++t) {
            kernel.narrow(to + (begin + t) * dim, &sums[t * dim], A(1), dim);
          }
        }
      });
    }
    if (need_weight) {
      T* to = write<T>(grad_weight);
      parallel_for(vocab, dim * int64_t(sizeof(T)), [&](int64_t first, int64_t last) {
        std::vector<A> sum(dim);
        for (int64_t v = first; v < last; ++v) {
          std::fill(sum.begin(), sum.end(), A(0));
          for (int64_t b = 0; b < batch; ++b) {
            const A g = grad[b * vocab + v];
            const int64_t t = at[b * vocab + v];
            if (g != 0 && t >= 0) kernel.add(sum.data(), rows + t * dim, g, dim);
          }
          kernel.narrow(to + v * dim, sum.data(), A(1), dim);
        }
      });
    }
    return std::make_tuple(grad_x, grad_weight);
  });
}

// Of each sequence: its distinct ids in rising order, each with the token of its largest weight
// (the first such). Entries of all sequences lie side by side at the front; sequence b has
// [crow[b], crow[b + 1]). Ids in `ignored` and weights of at most 0 are left out.
std::tuple<Tensor, Tensor, Tensor> lexical_index(const Tensor& token_ids, const Tensor& weights,
                                                 const Tensor& cu_seqlens,
                                                 std::vector<int64_t> ignored) {
  check_vector<int64_t>(token_ids, -1, "token_ids must be a contiguous int64 CPU vector");
  const int64_t tokens = token_ids.size(0);
  check_vector<float>(weights, tokens, "weights must be a contiguous float32 CPU vector");
  check_vector<int32_t>(cu_seqlens, -1, "cu_seqlens must be a contiguous int32 CPU vector");
  check(cu_seqlens.size(0) >= 1, "cu_seqlens must have at least one element");
  const int64_t batch = cu_seqlens.size(0) - 1;
  const int32_t* offsets = read<int32_t>(cu_seqlens);
  check(valid_cu_seqlens(offsets, batch, tokens),
        "cu_seqlens must start at 0, never decrease and end at the number of tokens");
  Tensor crow = empty_cpu<1>(ScalarType::Long, {batch + 1});
  Tensor columns = empty_cpu<1>(ScalarType::Long, {tokens});
  Tensor at = empty_cpu<1>(ScalarType::Long, {tokens});
  const int64_t* ids = read<int64_t>(token_ids);
  const float* weight = read<float>(weights);
  std::sort(ignored.begin(), ignored.end());
  std::vector<int32_t> order;
  int64_t count = 0;
  write<int64_t>(crow)[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    order.clear();
    for (int32_t t = offsets[b]; t < offsets[b + 1]; ++t) {
      if (weight[t] > 0 && !std::binary_search(ignored.begin(), ignored.end(), ids[t])) {
        order.push_back(t);
      }
    }
    std::sort(order.begin(), order.end(), [&](int32_t s, int32_t t) {
      if (ids[s] != ids[t]) return ids[s] < ids[t];
      return weight[s] != weight[t] ? weight[s] > weight[t] : s < t;
    });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i > 0 && ids[order[i]] == ids[order[i - 1]]) continue;
      write<int64_t>(columns)[count] = ids[order[i]];
      write<int64_t>(at)[count++] = order[i];
    }
    write<int64_t>(crow)[b + 1] = count;
  }
  std::fill(write<int64_t>(columns) + count, write<int64_t>(columns) + tokens, -1);
  std::fill(write<int64_t>(at) + count, write<int64_t>(at) + tokens, -1);
  return std::make_tuple(crow, columns, at);
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "vocab_max(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor? weights=None,"
      " Tensor? ends=None) -> (Tensor out, Tensor argmax)");
  library.def(
      "vocab_max_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor argmax,"
      " Tensor cu_seqlens, Tensor? ends, bool need_x, bool need_weight)"
      " -> (Tensor grad_x, Tensor grad_weight)");
  library.def(
      "lexical_index(Tensor token_ids, Tensor weights, Tensor cu_seqlens, int[] ignored)"
      " -> (Tensor crow, Tensor columns, Tensor tokens)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("vocab_max", TORCH_BOX(&emblas::vocab_max));
  library.impl("vocab_max_backward", TORCH_BOX(&emblas::vocab_max_backward));
  library.impl("lexical_index", TORCH_BOX(&emblas::lexical_index));
}
