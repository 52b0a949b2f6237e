// Hashed tables as torch operators on CUDA tensors: emblas::<op>_cuda, which the router of the
// public operator calls. Offsets stay on the device: the kernels clamp them, nobody waits.
#include <optional>
#include <tuple>

#include "common/cuda/device_call.h"
#include "common/cuda/sort.h"
#include "tables/tables_cuda.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "table must be float32, float64, bfloat16 or float16";

cuda::HashedIds hashed_ids(const DeviceCall& call, const Tensor& ids, int64_t family, int64_t seed,
                           int64_t num_hashes, int64_t num_embeddings,
                           const std::optional<int64_t>& padding_id) {
  check(call.holds(ids) && has_dtype<int64_t>(ids) && ids.dim() == 1,
        "ids must be an int64 vector on the device of the first argument");
  check(0 <= family && family < kHashFamilies, "unknown hash family");
  check(0 <= seed && seed <= UINT32_MAX, "seed must be 0 to 2^32 - 1");
  check(1 <= num_hashes && num_hashes <= kMaxHashes, "num_hashes must be 1 to 16");
  check(1 <= num_embeddings && num_embeddings <= int64_t(1) << 32,
        "num_embeddings must be 1 to 2^32");
  return {HashFamily(family),
          uint32_t(seed),
          int(num_hashes),
          uint64_t(num_embeddings),
          Modulo::reciprocal(uint64_t(num_embeddings)),
          call.read<int64_t>(ids),
          ids.stride(0),
          ids.size(0),
          padding_id.has_value(),
          padding_id.value_or(0)};
}

// Checks everything that the kernels index with; returns the number of bags.
int64_t check_bags(const DeviceCall& call, const Tensor& ids, const Tensor& table,
                   const std::optional<Tensor>& offsets, const std::optional<Tensor>& weights) {
  call.check_rows(table,
                  "table must be a tensor (rows, dim) with a contiguous last dimension on the "
                  "device of the first argument");
  const char* message =
      "weights must be a contiguous vector of one weight per id on the device of the table, "
      "float64 where the table is float64 and float32 otherwise";
  if (weights && has_dtype<double>(table)) {
    call.check_vector<double>(*weights, ids.size(0), message);
  } else if (weights) {
    call.check_vector<float>(*weights, ids.size(0), message);
  }
  if (!offsets) return ids.size(0);
  call.check_vector<int32_t>(
      *offsets, -1, "offsets must be a contiguous int32 vector on the device of the table");
  check(offsets->size(0) >= 1, "offsets must have at least one element");
  return offsets->size(0) - 1;
}

template <class T>
cuda::HashBagArgs<T> hash_bag_args(const DeviceCall& call, const cuda::HashedIds& hashed,
                                   const Tensor& table, const std::optional<Tensor>& weights) {
  return {hashed, call.read<T>(table), table.stride(0), table.size(1),
          call.read<Accumulator<T>>(weights)};
}

Tensor hash_keys_cuda(const Tensor& ids, int64_t family, int64_t seed, int64_t num_hashes,
                      int64_t num_embeddings) {
  const DeviceCall call(ids);
  const cuda::HashedIds hashed =
      hashed_ids(call, ids, family, seed, num_hashes, num_embeddings, std::nullopt);
  const Tensor keys = call.empty<2>(ScalarType::Long, {ids.size(0), num_hashes});
  cuda::hash_keys(hashed, {nullptr, hashed.count}, call.write<int64_t>(keys), call.stream());
  return keys;
}

Tensor hash_bag_cuda(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& weights, int64_t family, int64_t seed,
                     int64_t num_hashes, std::optional<int64_t> padding_id) {
  const DeviceCall call(ids);
  const int64_t bags = check_bags(call, ids, table, offsets, weights), dim = table.size(1);
  const cuda::HashedIds hashed =
      hashed_ids(call, ids, family, seed, num_hashes, table.size(0), padding_id);
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Tensor out = call.empty<2>(table.scalar_type(), {bags, dim});
    const auto args = hash_bag_args<T>(call, hashed, table, weights);
    if (!offsets) {
      cuda::hash_lookup(args, call.write<T>(out), call.stream());
      return out;
    }
    const Tensor partial = call.empty<2>(kScalarType<A>, {cuda::piece_rows(hashed.count), dim});
    cuda::hash_bag(args, call.read<int32_t>(*offsets), bags, call.write<A>(partial),
                   call.write<T>(out), call.stream());
    return out;
  });
}

std::tuple<Tensor, Tensor> hash_bag_backward_cuda(const Tensor& grad_out, const Tensor& ids,
                                                  const Tensor& table,
                                                  const std::optional<Tensor>& offsets,
                                                  const std::optional<Tensor>& weights,
                                                  int64_t family, int64_t seed, int64_t num_hashes,
                                                  std::optional<int64_t> padding_id,
                                                  bool need_table, bool need_weights) {
  const DeviceCall call(grad_out);
  const int64_t bags = check_bags(call, ids, table, offsets, weights), dim = table.size(1);
  const int64_t rows = table.size(0), count = ids.size(0), lookups = count * num_hashes;
  check(rows <= INT32_MAX && lookups <= INT32_MAX,
        "the gradient needs fewer than 2^31 rows and lookups");
  const cuda::HashedIds hashed = hashed_ids(call, ids, family, seed, num_hashes, rows, padding_id);
  check(grad_out.scalar_type() == table.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == bags && grad_out.size(1) == dim && grad_out.is_contiguous(),
        "grad_out must be a contiguous (bags, dim) tensor of the dtype of the table");
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Tensor numbers = call.empty<1>(ScalarType::Int, {offsets ? count : 0});
    const cuda::BagNumbers bag_numbers{offsets ? call.write<int32_t>(numbers) : nullptr, bags};
    if (offsets) {
      cuda::bag_numbers(call.read<int32_t>(*offsets), bags, count, call.write<int32_t>(numbers),
                        call.stream());
    }
    const T* gradient = call.read<T>(grad_out);
    const Tensor grad_table = call.empty<2>(table.scalar_type(), {need_table ? rows : 0, dim});
    const Tensor grad_weights = call.empty<1>(kScalarType<A>, {need_weights ? count : 0});
    if (need_table) {
      const Tensor keys = call.empty<1>(ScalarType::Int, {lookups});
      cuda::hash_keys(hashed, bag_numbers, call.write<int32_t>(keys), call.stream());
      const auto [sorted, order] = sort_stable(keys);
      const Tensor bounds = call.empty<1>(ScalarType::Int, {rows + 1});
      cuda::row_bounds(call.read<int32_t>(sorted), lookups, rows, call.write<int32_t>(bounds),
                       call.stream());
      const Tensor partial = call.empty<2>(kScalarType<A>, {cuda::piece_rows(lookups), dim});
      const cuda::HashBagTableArgs<T> args{call.read<int64_t>(order),
                                           int(num_hashes),
                                           bag_numbers,
                                           call.read<A>(weights),
                                           gradient,
                                           call.write<int32_t>(bounds),
                                           rows,
                                           lookups,
                                           dim,
                                           call.write<T>(grad_table)};
      cuda::hash_bag_grad_table(args, call.write<A>(partial), call.stream());
    }
    if (need_weights) {
      const auto args = hash_bag_args<T>(call, hashed, table, std::nullopt);
      cuda::hash_bag_grad_weights(args, bag_numbers, gradient, call.write<A>(grad_weights),
                                  call.stream());
    }
    return std::make_tuple(grad_table, grad_weights);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "hash_keys_cuda(Tensor ids, int family, int seed, int num_hashes, int num_embeddings)"
      " -> Tensor keys");
  library.def(
      "hash_bag_cuda(Tensor ids, Tensor table, Tensor? offsets, Tensor? weights, int family,"
      " int seed, int num_hashes, int? padding_id) -> Tensor out");
  library.def(
      "hash_bag_backward_cuda(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, int family, int seed, int num_hashes, int? padding_id, bool need_table,"
      " bool need_weights) -> (Tensor grad_table, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("hash_keys_cuda", TORCH_BOX(&emblas::hash_keys_cuda));
  library.impl("hash_bag_cuda", TORCH_BOX(&emblas::hash_bag_cuda));
  library.impl("hash_bag_backward_cuda", TORCH_BOX(&emblas::hash_bag_backward_cuda));
}
