// Packed attention as torch operators on CUDA tensors.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "attention/varlen_attention_cuda.h"
#include "common/cuda/device_call.h"

namespace emblas {
namespace {

std::tuple<Tensor, Tensor> varlen_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& cu_seqlens_q,
                                                 const Tensor& cu_seqlens_k, int64_t, int64_t,
                                                 const std::optional<double>& softmax_scale,
                                                 int64_t window_left, int64_t window_right,
                                                 bool return_lse, double softcap,
                                                 const std::optional<Tensor>& alibi_slopes) {
  const DeviceCall call(q);
  for (const Tensor* x : {&q, &k, &v}) {
    check(call.holds(*x) && x->dim() == 3 && (x->stride(2) == 1 || x->size(2) <= 1) &&
              x->size(0) < cuda::kMostAttentionTokens,
          "q, k and v must be tensors (tokens, heads, head_dim) of contiguous vectors, of less "
          "than 2^30 tokens");
    check(x->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
    check(x->size(2) >= 1 && x->size(2) <= kMaxHeadDim, "head_dim must be from 1 to 256");
  }
  const int64_t tokens = q.size(0), heads = q.size(1), key_heads = k.size(1);
  check(v.size(0) == k.size(0) && v.size(1) == key_heads,
        "k and v must have the same tokens and heads");
  check(k.size(2) == q.size(2), "k must have the head_dim of q");
  check(key_heads > 0 ? heads % key_heads == 0 : heads == 0,
        "the heads of q must be a multiple of the heads of k");
  call.check_vector<int32_t>(cu_seqlens_q, -1, "cu_seqlens_q must be a contiguous int32 vector");
  check(cu_seqlens_q.size(0) >= (tokens > 0 ? 2 : 1),
        "cu_seqlens_q must have an element, and two where there are tokens");
  call.check_vector<int32_t>(cu_seqlens_k, cu_seqlens_q.size(0),
                             "cu_seqlens_k must be a contiguous int32 vector as long as "
                             "cu_seqlens_q");
  const cuda::PackedSizes sizes{cu_seqlens_q.size(0) - 1, tokens, k.size(0)};
  check(cuda::attention_slots(sizes) * heads < int64_t(1) << 31,
        "q must have less than 2^31 tiles of 64 tokens in all heads");
  check(!alibi_slopes || (call.holds(*alibi_slopes) && has_dtype<float>(*alibi_slopes) &&
                          alibi_slopes->dim() == 2 && alibi_slopes->is_contiguous() &&
                          alibi_slopes->size(1) == heads &&
                          (alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == sizes.batch)),
        "alibi_slopes must be contiguous float32 (1 or batch, heads)");
  const auto run = [&](auto element) {
    using T = decltype(element);
    const auto vectors = [&](const Tensor& x) {
      return HeadVectors<const T>{call.read<T>(x), x.stride(0), x.stride(1)};
    };
    const auto window = [](int64_t radius) {  // negative: sees all keys
      return radius < 0 ? cuda::kMostAttentionTokens : std::min(radius, cuda::kMostAttentionTokens);
    };
    const Tensor out = call.empty<3>(q.scalar_type(), {tokens, heads, v.size(2)});
    const Tensor lse = call.empty<2>(ScalarType::Float, {return_lse ? heads : 0, tokens});
    float* const sums = call.write<float>(lse);
    const VarlenAttentionArgs<T> args{
        .q = vectors(q),
        .k = vectors(k),
        .v = vectors(v),
        .out = {call.write<T>(out), out.stride(0), out.stride(1)},
        .lse = return_lse ? sums : nullptr,
        .lse_stride = tokens,
        .heads = heads,
        .heads_per_group = key_heads ? heads / key_heads : 1,
        .head_dim = q.size(2),
        .value_dim = v.size(2),
        .cu_seqlens_q = call.read<int32_t>(cu_seqlens_q),
        .cu_seqlens_k = call.read<int32_t>(cu_seqlens_k),
        .scale = float(softmax_scale ? *softmax_scale : std::pow(double(q.size(2)), -0.5)),
        .window_left = window(window_left),
        .window_right = window(window_right),
        .scores = {.softcap = float(softcap),
                   .alibi_slopes = call.read<float>(alibi_slopes),
                   .alibi_stride = alibi_slopes && alibi_slopes->size(0) != 1 ? heads : 0}};
    cuda::varlen_attention<T>(args, sizes, call.stream());
    return std::make_tuple(out, lse);
  };
  if (has_dtype<bfloat16>(q)) return run(bfloat16{});
  check(has_dtype<float16>(q), "q must be bfloat16 or float16");
  return run(float16{});
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "varlen_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
      " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale,"
      " int window_left, int window_right, bool return_lse, float softcap=0.0,"
      " Tensor? alibi_slopes=None) -> (Tensor out, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("varlen_attention_cuda", TORCH_BOX(&emblas::varlen_attention_cuda));
}
