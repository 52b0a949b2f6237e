// Hashed tables as torch operators on CPU tensors.
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "common/aligned.h"
#include "common/isa.h"
#include "tables/bags.h"
#include "tables/repeats.h"
#include "tables/tables.h"

namespace emblas {
namespace {

constexpr char kDtypes[] = "table must be float32, float64, bfloat16 or float16";

HashedIds hashed_ids(const Tensor& ids, int64_t family, int64_t seed, int64_t num_hashes,
                     int64_t num_embeddings, const std::optional<int64_t>& padding_id) {
  check(ids.is_cpu() && has_dtype<int64_t>(ids) && ids.dim() == 1,
        "ids must be an int64 CPU vector");
  check(0 <= family && family < kHashFamilies, "unknown hash family");
  check(0 <= seed && seed <= UINT32_MAX, "seed must be 0 to 2^32 - 1");
  check(1 <= num_hashes && num_hashes <= kMaxHashes, "num_hashes must be 1 to 16");
  check(1 <= num_embeddings && num_embeddings <= int64_t(1) << 32,
        "num_embeddings must be 1 to 2^32");
  return {HashFamily(family),
          uint32_t(seed),
          num_hashes,
          uint64_t(num_embeddings),
          read<int64_t>(ids),
          ids.stride(0),
          padding_id ? &*padding_id : nullptr};
}

// Checks everything that the kernels index with; returns the number of bags.
int64_t check_bags(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& offsets,
                   const std::optional<Tensor>& weights) {
  check_rows(table, "table must be a CPU tensor (rows, dim) with a contiguous last dimension");
  check_id_weights(weights, ids.size(0), has_dtype<double>(table));
  return check_offsets(offsets, ids.size(0));
}

Tensor hash_keys(const Tensor& ids, int64_t family, int64_t seed, int64_t num_hashes,
                 int64_t num_embeddings) {
  const HashedIds hashed = hashed_ids(ids, family, seed, num_hashes, num_embeddings, std::nullopt);
  Tensor keys = empty_cpu<2>(ScalarType::Long, {ids.size(0), num_hashes});
  int64_t* out = write<int64_t>(keys);
  const auto kernel = kernels<TablesKernels>().hash_keys;
  parallel_for(ids.size(0), num_hashes * int64_t(sizeof(int64_t)),
               [&](int64_t first, int64_t last) { kernel(hashed, first, last, out); });
  return keys;
}

Tensor hash_bag(const Tensor& ids, const Tensor& table, const std::optional<Tensor>& offsets,
                const std::optional<Tensor>& weights, int64_t family, int64_t seed,
                int64_t num_hashes, std::optional<int64_t> padding_id) {
  const int64_t bags = check_bags(ids, table, offsets, weights), dim = table.size(1);
  const HashedIds hashed = hashed_ids(ids, family, seed, num_hashes, table.size(0), padding_id);
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Tensor out = empty_cpu<2>(table.scalar_type(), {bags, dim});
    const HashBagArgs<T> args{hashed,
                              read<T>(table),
                              table.stride(0),
                              dim,
                              read_optional<int32_t>(offsets),
                              read_optional<A>(weights)};
    T* to = write<T>(out);
    const auto& kernel = kernels<TablesKernels>().hash_bag.of(element);
    for_bags(args.offsets, bags, num_hashes * dim * int64_t(sizeof(T)),
             [&](int64_t first, int64_t last) {
               const AlignedArray<A> scratch = aligned_array<A>(dim);
               kernel.forward(args, first, last, scratch.get(), to);
             });
    return out;
  });
}

// Tasks own ranges of rows. A 16-bit gradient is added up in float, a few rows at a time.
template <class T>
void grad_table(const HashBagTableArgs<T>& args, int64_t rows, int64_t ids) {
  using A = Accumulator<T>;
  constexpr int64_t scratch_bytes = 4 << 20;
  const int64_t row_bytes = std::max<int64_t>(1, args.dim) * int64_t(sizeof(A));
  const int64_t scratch_rows = sizeof(T) == sizeof(A) ? rows : 1 + scratch_bytes / row_bytes;
  const int64_t work = row_bytes * (1 + ids * args.hashed.num_hashes / rows);
  const auto& kernel = kernels<TablesKernels>().hash_bag.of(T{});
  parallel_for(rows, work, [&](int64_t first, int64_t last) {
    const int64_t size = std::min(scratch_rows, last - first);
    const AlignedArray<A> scratch =
        sizeof(T) == sizeof(A) ? nullptr : aligned_array<A>(size * args.dim);
    for (; first < last; first += size) {
      kernel.grad_table(args, first, std::min(first + size, last), scratch.get());
    }
  });
}

std::tuple<Tensor, Tensor> hash_bag_backward(const Tensor& grad_out, const Tensor& ids,
                                             const Tensor& table,
                                             const std::optional<Tensor>& offsets,
                                             const std::optional<Tensor>& weights, int64_t family,
                                             int64_t seed, int64_t num_hashes,
                                             std::optional<int64_t> padding_id, bool need_table,
                                             bool need_weights) {
  const int64_t bags = check_bags(ids, table, offsets, weights), dim = table.size(1);
  const int64_t rows = table.size(0), count = ids.size(0);
  const HashedIds hashed = hashed_ids(ids, family, seed, num_hashes, rows, padding_id);
  check(grad_out.is_cpu() && grad_out.scalar_type() == table.scalar_type() && grad_out.dim() == 2 &&
            grad_out.size(0) == bags && grad_out.size(1) == dim && grad_out.is_contiguous(),
        "grad_out must be a contiguous (bags, dim) CPU tensor of the dtype of the table");
  return visit_float(table.scalar_type(), kDtypes, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const auto& tables = kernels<TablesKernels>();
    const int32_t* bag_offsets = read_optional<int32_t>(offsets);
    Tensor table_gradient = empty_cpu<2>(table.scalar_type(), {need_table ? rows : 0, dim});
    Tensor weights_gradient = empty_cpu<1>(kScalarType<A>, {need_weights ? count : 0});
    if (need_table) {
      // A batch of ids that repeat becomes one of each id once (repeats.h).
      HashedIds looked_up = hashed;
      const T* gradients = read<T>(grad_out);
      int64_t lookups = count, sums_of = bags;
      std::optional<Repeats> repeats;
      std::unique_ptr<T[]> sums;
      if (sizeof(T) == sizeof(A) && !offsets && !weights && num_hashes > 1) {
        repeats = find_repeats(hashed.ids, hashed.stride, count);
      }
      if (repeats) {
        sums = sum_repeats(*repeats, gradients, count, dim);
        gradients = sums.get();
        looked_up.ids = repeats->ids.get();
        looked_up.stride = 1;
        lookups = sums_of = repeats->distinct();
      }
      const std::unique_ptr<uint32_t[]> numbers(new uint32_t[lookups * num_hashes]);
      parallel_for(lookups, num_hashes * int64_t(sizeof(uint32_t)),
                   [&](int64_t first, int64_t last) {
                     tables.hash_rows(looked_up, first, last, numbers.get());
                   });
      grad_table<T>({looked_up, numbers.get(), sums_of, dim, bag_offsets, read_optional<A>(weights),
                     gradients, write<T>(table_gradient)},
                    rows, lookups);
    }
    if (need_weights) {
      const HashBagArgs<T> args{hashed, read<T>(table), table.stride(0), dim, bag_offsets, nullptr};
      for_bags(bag_offsets, bags, num_hashes * dim * int64_t(sizeof(T)),
               [&](int64_t first, int64_t last) {
                 tables.hash_bag.of(element).grad_weights(args, first, last, read<T>(grad_out),
                                                          write<A>(weights_gradient));
               });
    }
    return std::make_tuple(table_gradient, weights_gradient);
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(emblas, library) {
  library.def(
      "hash_keys(Tensor ids, int family, int seed, int num_hashes, int num_embeddings)"
      " -> Tensor keys");
  library.def(
      "hash_bag(Tensor ids, Tensor table, Tensor? offsets, Tensor? weights, int family, int seed,"
      " int num_hashes, int? padding_id) -> Tensor out");
  library.def(
      "hash_bag_backward(Tensor grad_out, Tensor ids, Tensor table, Tensor? offsets,"
      " Tensor? weights, int family, int seed, int num_hashes, int? padding_id, bool need_table,"
      " bool need_weights) -> (Tensor grad_table, Tensor grad_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(emblas, CPU, library) {
  library.impl("hash_keys", TORCH_BOX(&emblas::hash_keys));
  library.impl("hash_bag", TORCH_BOX(&emblas::hash_bag));
  library.impl("hash_bag_backward", TORCH_BOX(&emblas::hash_bag_backward));
}
