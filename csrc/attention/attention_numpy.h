// The numpy door of packed attention: float32 and float64.
#pragma once

#include <memory>

#include "attention/attention.h"
#include "common/aligned.h"
#include "common/isa.h"
#include "common/numpy.h"
#include "common/packed.h"

namespace emblas {

template <class T>
py::array varlen_attention_array(const Array<T>& q, const Array<T>& k, const Array<T>& v,
                                 const Array<int32_t>& cu_seqlens_q,
                                 const Array<int32_t>& cu_seqlens_k, double softmax_scale,
                                 int64_t window_left, int64_t window_right) {
  const int64_t tokens = q.shape(0), heads = q.shape(1), head_dim = q.shape(2);
  const int64_t key_tokens = k.shape(0), key_heads = k.shape(1);
  const int64_t batch = cu_seqlens_q.shape(0) - 1;
  const int64_t value_dim = v.shape(2);
  check_array(
      head_dim >= 1 && head_dim <= kMaxHeadDim && value_dim >= 1 && value_dim <= kMaxHeadDim,
      "head_dim must be from 1 to 512, got " + std::to_string(head_dim) + " and " +
          std::to_string(value_dim) + " for v");
  check_array(k.shape(2) == head_dim && v.shape(0) == key_tokens && v.shape(1) == key_heads,
              "k must have the head_dim of q, and v the tokens and heads of k");
  check_array(key_heads > 0 && heads % key_heads == 0,
              "the heads of q must be a multiple of the heads of k");
  check_array(batch >= 0 && cu_seqlens_k.shape(0) == batch + 1,
              "cu_seqlens_q and cu_seqlens_k must have the same length, at least 1");
  Array<T> out({tokens, heads, value_dim});
  constexpr int64_t widest = int64_t(1) << 32;
  const VarlenAttentionArgs<T> args{.q = {q.data(), heads * head_dim, head_dim},
                                    .k = {k.data(), key_heads * head_dim, head_dim},
                                    .v = {v.data(), key_heads * value_dim, value_dim},
                                    .out = {out.mutable_data(), heads * value_dim, value_dim},
                                    .lse = nullptr,
                                    .lse_stride = tokens,
                                    .heads = heads,
                                    .heads_per_group = heads / key_heads,
                                    .head_dim = head_dim,
                                    .value_dim = value_dim,
                                    .cu_seqlens_q = cu_seqlens_q.data(),
                                    .cu_seqlens_k = cu_seqlens_k.data(),
                                    .scale = T(softmax_scale),
                                    .window_left = std::min(window_left, widest),
                                    .window_right = std::min(window_right, widest)};
  {
    const py::gil_scoped_release unlocked;
    const char* message =
        "cu_seqlens must start at 0, never decrease and end at the number of tokens";
    check_array(valid_cu_seqlens(args.cu_seqlens_q, batch, tokens), message);
    check_array(valid_cu_seqlens(args.cu_seqlens_k, batch, key_tokens), message);
    const auto& kernel = kernels<AttentionKernels>().of(T{});
    const AlignedArray<T> scratch = aligned_array<T>(kernel.scratch_size(args, batch));
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t queries = args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b];
      const int64_t tiles = (queries + kernel.tile_queries - 1) / kernel.tile_queries;
      kernel.forward(args, b, 0, heads * tiles, scratch.get());
    }
  }
  return std::move(out);
}

inline py::array varlen_attention_door(const py::array& q, const py::array& k, const py::array& v,
                                       const py::array& cu_seqlens_q, const py::array& cu_seqlens_k,
                                       double softmax_scale, int64_t window_left,
                                       int64_t window_right) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    return varlen_attention_array(as_array<T>(q, 3, "q"), as_array<T>(k, 3, "k"),
                                  as_array<T>(v, 3, "v"),
                                  as_array<int32_t>(cu_seqlens_q, 1, "cu_seqlens_q"),
                                  as_array<int32_t>(cu_seqlens_k, 1, "cu_seqlens_k"), softmax_scale,
                                  window_left, window_right);
  };
  return py::isinstance<Array<double>>(q) ? run(double{}) : run(float{});
}

inline void bind_attention(py::module_& module) {
  module.def("varlen_attention", &varlen_attention_door, py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("softmax_scale"),
             py::arg("window_left"), py::arg("window_right"));
}

}  // namespace emblas
