// The arguments that the attention operators share: checked, prepared, and as kernels take them.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "attention/attention.h"
#include "attention/position_runs.h"
#include "common/packed.h"
#include "common/tensor.h"

namespace emblas {

inline void check_head_vectors(const Tensor& tensor, const char* message) {
  check(tensor.is_cpu() && tensor.dim() == 3 && (tensor.stride(2) == 1 || tensor.size(2) <= 1),
        message);
}

template <class T>
HeadVectors<const T> head_vectors(const Tensor& tensor) {
  return {read<T>(tensor), tensor.stride(0), tensor.stride(1)};
}
template <class T>
HeadVectors<T> new_head_vectors(const Tensor& tensor) {
  return {write<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

inline void check_offsets(const Tensor& offsets, int64_t batch, int64_t total,
                          const char* type_message, const char* value_message) {
  check_vector<int32_t>(offsets, batch + 1, type_message);
  check(valid_cu_seqlens(read<int32_t>(offsets), batch, total), value_message);
}

// What is made of the arguments once per call, for all tasks to read.
template <class A>
struct Prepared {
  PositionRuns runs;
  std::vector<A> position_keys, position_queries;  // of the runs
  std::vector<int64_t> pair_starts;
};

// What forward and backward are given alike.
struct Inputs {
  const Tensor &q, &k, &v, &cu_seqlens_q, &cu_seqlens_k;
  const std::optional<double>& softmax_scale;
  int64_t window_left, window_right;
  double softcap;
  const std::optional<Tensor>&alibi_slopes, &distance_bias, &prefix_len, &branch, &block_ids;
  const std::optional<Tensor>&position_keys, &position_queries, &position_lookup, &pair_bias;
  double dropout_p;
  const std::optional<Tensor>& dropout_seeds;

  int64_t tokens() const { return q.size(0); }
  int64_t heads() const { return q.size(1); }
  int64_t key_heads() const { return k.size(1); }
  int64_t batch() const { return cu_seqlens_q.size(0) - 1; }

  void check_values() const {
    check_head_vectors(q, "q must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check_head_vectors(k, "k must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check_head_vectors(v, "v must be a CPU tensor (tokens, heads, head_dim) of contiguous vectors");
    check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
          "q, k and v must have one dtype");
    check(v.size(0) == k.size(0) && v.size(1) == k.size(1),
          "k and v must have the same tokens and heads");
    check(k.size(2) == q.size(2), "k must have the head_dim of q");
    check(key_heads() > 0 ? heads() % key_heads() == 0 : heads() == 0,
          "the heads of q must be a multiple of the heads of k");
    check(q.size(2) >= 1 && q.size(2) <= kMaxHeadDim && v.size(2) >= 1 && v.size(2) <= kMaxHeadDim,
          "head_dim must be from 1 to 512");
    check(cu_seqlens_q.dim() == 1 && batch() >= 0,
          "cu_seqlens_q must be a vector of at least one element");
    check_offsets(
        cu_seqlens_q, batch(), tokens(), "cu_seqlens_q must be a contiguous int32 CPU vector",
        "cu_seqlens_q must start at 0, never decrease and end at the number of tokens of q");
    check_offsets(
        cu_seqlens_k, batch(), k.size(0),
        "cu_seqlens_k must be a contiguous int32 CPU vector as long as cu_seqlens_q",
        "cu_seqlens_k must start at 0, never decrease and end at the number of tokens of k");
    check_ids(prefix_len, batch(), "prefix_len must be a contiguous int32 vector per sequence");
    check_ids(branch, k.size(0), "branch must be a contiguous int32 vector, one per token of k");
    check_ids(block_ids, k.size(0),
              "block_ids must be a contiguous int32 vector, one per token of k");
    const ScalarType accumulator = has_dtype<double>(q) ? ScalarType::Double : ScalarType::Float;
    const auto is_table = [&](const Tensor& tensor) {
      return tensor.is_cpu() && tensor.scalar_type() == accumulator && tensor.dim() == 2 &&
             tensor.is_contiguous();
    };
    check(!alibi_slopes || (is_table(*alibi_slopes) && alibi_slopes->size(1) == heads() &&
                            (alibi_slopes->size(0) == 1 || alibi_slopes->size(0) == batch())),
          "alibi_slopes must be contiguous (1 or batch, heads), of the accumulator's dtype");
    check(!distance_bias || (is_table(*distance_bias) && distance_bias->size(0) == heads() &&
                             distance_bias->size(1) % 2 == 1),
          "distance_bias must be contiguous (heads, 2 radius + 1), of the accumulator's dtype");
    check_positions(accumulator);
    check_pair_bias(accumulator);
    check(dropout_p >= 0 && dropout_p < 1 && (dropout_p == 0 || dropout_seeds),
          "dropout_p must be at least 0 and less than 1, and needs dropout_seeds");
    if (dropout_seeds) {
      check_vector<int64_t>(*dropout_seeds, batch(),
                            "dropout_seeds must be a contiguous int64 vector, one per sequence");
    }
  }

  void check_positions(ScalarType accumulator) const {
    if (!position_lookup) return;
    check_vector<int32_t>(*position_lookup, -1, "position_lookup must be an int32 vector");
    check(position_lookup->size(0) % 2 == 1, "position_lookup must have an odd length");
    int64_t slots = std::numeric_limits<int64_t>::max();
    const auto check_table = [&](const std::optional<Tensor>& table, int64_t heads,
                                 const char* message) {
      if (!table) return;
      check_head_vectors(*table, message);
      check(table->scalar_type() == accumulator && table->size(1) == heads &&
                table->size(2) == q.size(2),
            message);
      slots = std::min(slots, table->size(0));
    };
    check_table(position_keys, key_heads(), "position_keys must be (slots, heads of k, head_dim)");
    check_table(position_queries, heads(), "position_queries must be (slots, heads, head_dim)");
    const int32_t* slot = read<int32_t>(*position_lookup);
    bool inside = true;
    for (int64_t i = 0; i < position_lookup->size(0); ++i) {
      inside &= slot[i] >= 0 && slot[i] < slots;
    }
    check(inside, "the lookup of disentangled must hold rows of its tables");
  }

  // Padded (batch, heads, queries, keys), or ragged (heads, pairs): one sequence after another.
  void check_pair_bias(ScalarType accumulator) const {
    if (!pair_bias) return;
    const Tensor& bias = *pair_bias;
    const int64_t dims = bias.dim();
    check(bias.is_cpu() && bias.scalar_type() == accumulator && (dims == 2 || dims == 4) &&
              (bias.stride(dims - 1) == 1 || bias.size(dims - 1) <= 1) &&
              bias.size(dims == 2 ? 0 : 1) == heads() && (dims == 2 || bias.size(0) == batch()),
          "pair_bias must be (batch, heads, queries, keys) or (heads, pairs), of the accumulator's "
          "dtype");
    int64_t pairs = 0, longest_q = 0, longest_k = 0;
    for (int64_t b = 0; b < batch(); ++b) {
      const int64_t queries = length(cu_seqlens_q, b), keys = length(cu_seqlens_k, b);
      pairs += queries * keys;
      longest_q = std::max(longest_q, queries);
      longest_k = std::max(longest_k, keys);
    }
    if (dims == 2) {
      check(bias.size(1) == pairs, "attn_bias must have a number for each pair of query and key");
    } else {
      check(bias.size(2) >= longest_q && bias.size(3) >= longest_k,
            "attn_bias must be as large as the longest sequences");
    }
  }

  static int64_t length(const Tensor& cu_seqlens, int64_t b) {
    return read<int32_t>(cu_seqlens)[b + 1] - read<int32_t>(cu_seqlens)[b];
  }

  template <class A>
  Prepared<A> prepare() const {
    Prepared<A> prepared;
    if (position_lookup) {
      prepared.runs = runs_of(read<int32_t>(*position_lookup), position_lookup->size(0));
      if (position_keys) prepared.position_keys = expand<A>(*position_keys, prepared.runs);
      if (position_queries) prepared.position_queries = expand<A>(*position_queries, prepared.runs);
    }
    if (pair_bias) {
      prepared.pair_starts.assign(batch() + 1, 0);
      for (int64_t b = 0; b < batch(); ++b) {
        prepared.pair_starts[b + 1] =
            prepared.pair_starts[b] + (pair_bias->dim() == 4
                                           ? pair_bias->stride(0)
                                           : length(cu_seqlens_q, b) * length(cu_seqlens_k, b));
      }
    }
    return prepared;
  }

  static void check_ids(const std::optional<Tensor>& ids, int64_t size, const char* message) {
    if (ids) check_vector<int32_t>(*ids, size, message);
  }
  template <class E>
  static const E* read_optional(const std::optional<Tensor>& tensor) {
    return tensor ? read<E>(*tensor) : nullptr;
  }

  template <class T>
  VarlenAttentionArgs<T> args(const HeadVectors<T>& out, Accumulator<T>* lse,
                              const Prepared<Accumulator<T>>& prepared) const {
    constexpr int64_t widest = int64_t(1) << 32;  // sees all keys, and can be added to a position
    using A = Accumulator<T>;
    const auto table = [](const std::vector<A>& x) { return x.empty() ? nullptr : x.data(); };
    PositionVectors<A> positions;
    if (position_lookup) {
      positions = {.keys = table(prepared.position_keys),
                   .queries = table(prepared.position_queries),
                   .run = prepared.runs.run.data(),
                   .radius = position_lookup->size(0) / 2,
                   .runs = int64_t(prepared.runs.slot.size()),
                   .stride = padded_dim(q.size(2))};
    }
    PairMatrices<const A> pairs;
    if (pair_bias) {
      const bool padded = pair_bias->dim() == 4;
      pairs = {.data = read<A>(*pair_bias),
               .starts = prepared.pair_starts.data(),
               .head_stride = pair_bias->stride(padded ? 1 : 0),
               .query_stride = padded ? pair_bias->stride(2) : -1};
    }
    Dropout<A> dropout;
    if (dropout_p > 0) {
      dropout = {.seeds = read<int64_t>(*dropout_seeds),
                 .threshold = uint32_t(dropout_p * 0x1p32),
                 .factor = A(1 / (1 - dropout_p))};
    }
    return {
        .q = head_vectors<T>(q),
        .k = head_vectors<T>(k),
        .v = head_vectors<T>(v),
        .out = out,
        .lse = lse,
        .lse_stride = tokens(),
        .heads = heads(),
        .heads_per_group = key_heads() ? heads() / key_heads() : 1,
        .head_dim = q.size(2),
        .value_dim = v.size(2),
        .cu_seqlens_q = read<int32_t>(cu_seqlens_q),
        .cu_seqlens_k = read<int32_t>(cu_seqlens_k),
        .scale = Accumulator<T>(softmax_scale ? *softmax_scale : std::pow(double(q.size(2)), -0.5)),
        .window_left = std::min(window_left, widest),
        .window_right = std::min(window_right, widest),
        .scores = {.softcap = Accumulator<T>(softcap),
                   .alibi_slopes = read_optional<Accumulator<T>>(alibi_slopes),
                   .alibi_stride = alibi_slopes && alibi_slopes->size(0) != 1 ? heads() : 0,
                   .distance_bias = read_optional<Accumulator<T>>(distance_bias),
                   .distance_radius = distance_bias ? distance_bias->size(1) / 2 : 0,
                   .prefix_len = read_optional<int32_t>(prefix_len),
                   .branch = read_optional<int32_t>(branch),
                   .block_ids = read_optional<int32_t>(block_ids),
                   .positions = positions,
                   .pair_bias = pairs,
                   .dropout = dropout}};
  }
};

}  // namespace emblas
