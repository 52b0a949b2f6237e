// Packed attention as torch operators on CUDA tensors.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "attention/varlen_attention_cuda.h"
#include "common/cuda/device_call.h"

namespace emblas {
namespace {

// What forward and backward are given alike.
struct Inputs {
  const Tensor &q, &k, &v, &cu_seqlens_q, &cu_seqlens_k;
  const std::optional<double>& softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  const std::optional<Tensor>& alibi_slopes;

  int64_t tokens() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t key_heads() const { return k.size(1); }
  cuda::PackedSizes sizes() const { return {cu_seqlens_q.size(0) - 1, q.size(0), k.size(0)}; }

  static bool is_head_vectors(const DeviceCall& call, const Tensor& x) {
    return call.holds(x) && x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1);
  }

  void check_values(const DeviceCall& call) const {
    for (const Tensor* x : {&q, &k, &v}) {
      check(is_head_vectors(call, *x) && x->size(0) < cuda::kMostAttentionTokens,
            "q, k and v must be tensors (tokens, heads, head_dim) of contiguous vectors, of less "
            "than 2^30 tokens");
      check(x->scalar_type() == q.scalar_type(), "q, k and v must have one dtype");
      check(x->size(2) >= 1 && x->size(2) <= cuda::kWidestHead, "head_dim must be from 1 to 256");
    }
    check(v.size(0) == k.size(0) && v.size(1) == key_heads(),
          "k and v must have the same tokens and heads");
    check(k.size(2) == q.size(2), "k must have the head_dim of q");
    check(key_heads() > 0 ? heads() % key_heads() == 0 : heads() == 0,
          "the heads of q must be a multiple of the heads of k");
    call.check_vector<int32_t>(cu_seqlens_q, -1, "cu_seqlens_q must be a contiguous int32 vector");
    check(cu_seqlens_q.size(0) >= (tokens() > 0 ? 2 : 1),
          "cu_seqlens_q must have an element, and two where there are tokens");
    call.check_vector<int32_t>(cu_seqlens_k, cu_seqlens_q.size(0),
                               "cu_seqlens_k must be a contiguous int32 vector as long as "
                               "cu_seqlens_q");
    check(cuda::attention_slots(tokens(), sizes().batch) * heads() < int64_t(1) << 31,
          "q must have less than 2^31 tiles of 64 tokens in all heads");
    check(!alibi_slopes || (call.holds(*alibi_slopes) && has_dtype<float>(*alibi_slopes) &&
                            alibi_slopes->dim() == 2 && alibi_slopes->is_contiguous() &&
                            alibi_slopes->size(1) == heads() &&
                            (alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == sizes().batch)),
          "alibi_slopes must be contiguous float32 (1 or batch, heads)");
  }

  template <class T>
  VarlenAttentionArgs<T> args(const DeviceCall& call, const HeadVectors<T>& out, float* lse) const {
    const auto window = [](int64_t radius) {  // negative: sees all keys
      return radius < 0 ? cuda::kMostAttentionTokens : std::min(radius, cuda::kMostAttentionTokens);
    };
    return {.q = head_vectors<T>(call, q),
            .k = head_vectors<T>(call, k),
            .v = head_vectors<T>(call, v),
            .out = out,
            .lse = lse,
            .lse_stride = tokens(),
            .heads = heads(),
            .heads_per_group = key_heads() ? heads() / key_heads() : 1,
            .head_dim = q.size(2),
            .value_dim = v.size(2),
            .cu_seqlens_q = call.read<int32_t>(cu_seqlens_q),
            .cu_seqlens_k = call.read<int32_t>(cu_seqlens_k),
            .scale = float(softmax_scale ? *softmax_scale : std::pow(double(q.size(2)), -0.5)),
            .window_left = window(window_left),
            .window_right = window(window_right),
            .scores = {.softcap = float(softcap),
                       .alibi_slopes = call.read<float>(alibi_slopes),
                       .alibi_stride = alibi_slopes && alibi_slopes->size(0) != 1 ? heads() : 0}};
  }

  template <class T>
  static HeadVectors<const T> head_vectors(const DeviceCall& call, const Tensor& x) {
    return {call.read<T>(x), x.stride(0), x.stride(1)};
  }
  template <class T>
  static HeadVectors<T> new_head_vectors(const DeviceCall& call, const Tensor& x) {
    return {call.write<T>(x), x.stride(0), x.stride(1)};
  }

  // Calls with an element of q's dtype.
  template <class Visit>
  auto visit(const Visit& visit) const {
    if (has_dtype<bfloat16>(q)) return visit(bfloat16{});
    check(has_dtype<float16>(q), "q must be bfloat16 or float16");
    return visit(float16{});
  }
};

std::tuple<Tensor, Tensor> varlen_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& cu_seqlens_q,
                                                 const Tensor& cu_seqlens_k, int64_t, int64_t,
                                                 const std::optional<double>& softmax_scale,
                                                 int64_t window_left, int64_t window_right,
                                                 bool return_lse, double softcap,
                                                 const std::optional<Tensor>& alibi_slopes) {
  const DeviceCall call(q);
  const Inputs inputs{
      q,       k,           v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_left, window_right,
      softcap, alibi_slopes};
  inputs.check_values(call);
  return inputs.visit([&](auto element) {
    using T = decltype(element);
    const int64_t tokens = inputs.tokens(), heads = inputs.heads();
    const Tensor out = call.empty<3>(q.scalar_type(), {tokens, heads, v.size(2)});
    const Tensor lse = call.empty<2>(ScalarType::Float, {return_lse ? heads : 0, tokens});
    float* const sums = call.write<float>(lse);
    cuda::varlen_attention<T>(
        inputs.args<T>(call, Inputs::new_head_vectors<T>(call, out), return_lse ? sums : nullptr),
        inputs.sizes(), call.stream());
    return std::make_tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward_cuda(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t, int64_t, const std::optional<double>& softmax_scale,
    int64_t window_left, int64_t window_right, double softcap,
    const std::optional<Tensor>& alibi_slopes) {
  const DeviceCall call(q);
  const Inputs inputs{
      q,       k,           v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_left, window_right,
      softcap, alibi_slopes};
  inputs.check_values(call);
  const int64_t tokens = inputs.tokens(), heads = inputs.heads(), key_heads = inputs.key_heads();
  const cuda::PackedSizes sizes = inputs.sizes();
  check(cuda::attention_slots(sizes.keys, sizes.batch) * key_heads < int64_t(1) << 31,
        "k must have less than 2^31 tiles of 64 tokens in all heads");
  check(cu_seqlens_k.size(0) >= (sizes.keys > 0 ? 2 : 1),
        "cu_seqlens_k must have two elements where there are tokens");
  for (const Tensor* x : {&grad_out, &out}) {
    check(Inputs::is_head_vectors(call, *x) && x->scalar_type() == q.scalar_type() &&
              x->size(0) == tokens && x->size(1) == heads && x->size(2) == v.size(2),
          "grad_out and out must have the shape of the result and the dtype of q");
  }
  const auto is_lse = [&](const Tensor& x) {
    return call.holds(x) && has_dtype<float>(x) && x.dim() == 2 && x.size(0) == heads &&
           x.size(1) == tokens && x.is_contiguous();
  };
  check(is_lse(lse) && (!grad_lse || is_lse(*grad_lse)),
        "lse and grad_lse must be contiguous float32 (heads, tokens)");
  return inputs.visit([&](auto element) {
    using T = decltype(element);
    const auto like = [&](const Tensor& x) {
      return call.empty<3>(x.scalar_type(), {x.size(0), x.size(1), x.size(2)});
    };
    const Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v);
    const Tensor deltas = call.empty<2>(ScalarType::Float, {heads, tokens});
    // Backward only reads out and lse.
    const HeadVectors<T> given{const_cast<T*>(call.read<T>(out)), out.stride(0), out.stride(1)};
    float* const logarithms = const_cast<float*>(call.read<float>(lse));
    const VarlenAttentionBackwardArgs<T> args{.forward = inputs.args<T>(call, given, logarithms),
                                              .grad_out = Inputs::head_vectors<T>(call, grad_out),
                                              .grad_lse = call.read<float>(grad_lse),
                                              .grad_q = Inputs::new_head_vectors<T>(call, grad_q),
                                              .grad_k = Inputs::new_head_vectors<T>(call, grad_k),
                                              .grad_v = Inputs::new_head_vectors<T>(call, grad_v)};
    cuda::varlen_attention_backward<T>(args, call.write<float>(deltas), sizes, key_heads,
                                       call.stream());
    return std::make_tuple(grad_q, grad_k, grad_v, call.empty<2>(ScalarType::Float, {0, 0}));
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "varlen_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
      " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale,"
      " int window_left, int window_right, bool return_lse, float softcap=0.0,"
      " Tensor? alibi_slopes=None) -> (Tensor out, Tensor lse)");
  library.def(
      "varlen_attention_backward_cuda(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k,"
      " Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, int window_left,"
      " int window_right, float softcap=0.0, Tensor? alibi_slopes=None)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_distance_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("varlen_attention_cuda", TORCH_BOX(&emblas::varlen_attention_cuda));
  library.impl("varlen_attention_backward_cuda",
               TORCH_BOX(&emblas::varlen_attention_backward_cuda));
}
