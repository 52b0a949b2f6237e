// The numpy doors of hashed tables (float32 and float64) and the hashes of byte strings.
#pragma once

#include <memory>
#include <string_view>

#include "common/aligned.h"
#include "common/hash.h"
#include "common/isa.h"
#include "common/numpy.h"
#include "common/packed.h"
#include "tables/tables.h"

namespace emblas {

inline HashedIds hashed_ids(const Array<int64_t>& ids, int64_t family, int64_t seed,
                            int64_t num_hashes, int64_t num_embeddings,
                            const std::optional<int64_t>& padding_id) {
  check_array(0 <= family && family < kHashFamilies, "unknown hash family");
  check_array(0 <= seed && seed <= UINT32_MAX, "seed must be 0 to 2^32 - 1");
  check_array(1 <= num_hashes && num_hashes <= kMaxHashes, "num_hashes must be 1 to 16");
  check_array(1 <= num_embeddings && num_embeddings <= int64_t(1) << 32,
              "num_embeddings must be 1 to 2^32");
  return {HashFamily(family),
          uint32_t(seed),
          num_hashes,
          uint64_t(num_embeddings),
          ids.data(),
          1,
          padding_id ? &*padding_id : nullptr};
}

inline Array<int64_t> hash_keys_door(const py::array& ids, int64_t family, int64_t seed,
                                     int64_t num_hashes, int64_t num_embeddings) {
  const auto values = as_array<int64_t>(ids, 1, "ids");
  const HashedIds hashed =
      hashed_ids(values, family, seed, num_hashes, num_embeddings, std::nullopt);
  const int64_t count = values.shape(0);
  Array<int64_t> keys({count, num_hashes});
  int64_t* out = keys.mutable_data();
  const py::gil_scoped_release unlocked;
  kernels<TablesKernels>().hash_keys(hashed, 0, count, out);
  return keys;
}

template <class T>
py::array hash_bag_array(const Array<int64_t>& ids, const Array<T>& table,
                         const std::optional<Array<int32_t>>& offsets,
                         const std::optional<py::array>& weights, int64_t family, int64_t seed,
                         int64_t num_hashes, const std::optional<int64_t>& padding_id) {
  const int64_t count = ids.shape(0), dim = table.shape(1);
  const HashedIds hashed = hashed_ids(ids, family, seed, num_hashes, table.shape(0), padding_id);
  std::optional<Array<T>> id_weights;
  if (weights) {
    id_weights = as_array<T>(*weights, 1, "per_sample_weights");
    check_array(id_weights->shape(0) == count, "per_sample_weights must hold one weight per id");
  }
  const int64_t bags = offsets ? offsets->shape(0) - 1 : count;
  check_array(bags >= 0, "offsets must have at least one element");
  Array<T> out({bags, dim});
  {
    const HashBagArgs<T> args{hashed,
                              table.data(),
                              dim,
                              dim,
                              offsets ? offsets->data() : nullptr,
                              id_weights ? id_weights->data() : nullptr};
    T* to = out.mutable_data();
    const py::gil_scoped_release unlocked;
    if (args.offsets) {
      check_array(valid_cu_seqlens(args.offsets, bags, count),
                  "offsets must start at 0, never decrease and end at the number of ids");
    }
    const AlignedArray<T> scratch = aligned_array<T>(dim);
    kernels<TablesKernels>().hash_bag.of(T{}).forward(args, 0, bags, scratch.get(), to);
  }
  return out;
}

inline py::array hash_bag_door(const py::array& ids, const py::array& table,
                               const std::optional<py::array>& offsets,
                               const std::optional<py::array>& weights, int64_t family,
                               int64_t seed, int64_t num_hashes,
                               std::optional<int64_t> padding_id) {
  const auto values = as_array<int64_t>(ids, 1, "ids");
  std::optional<Array<int32_t>> bags;
  if (offsets) bags = as_array<int32_t>(*offsets, 1, "offsets");
  if (py::isinstance<Array<double>>(table)) {
    return hash_bag_array(values, as_array<double>(table, 2, "table"), bags, weights, family, seed,
                          num_hashes, padding_id);
  }
  return hash_bag_array(values, as_array<float>(table, 2, "table"), bags, weights, family, seed,
                        num_hashes, padding_id);
}

inline void bind_tables(py::module_& module) {
  module.def("hash_keys", &hash_keys_door, py::arg("ids"), py::arg("family"), py::arg("seed"),
             py::arg("num_hashes"), py::arg("num_embeddings"));
  module.def("hash_bag", &hash_bag_door, py::arg("ids"), py::arg("table"), py::arg("offsets"),
             py::arg("weights"), py::arg("family"), py::arg("seed"), py::arg("num_hashes"),
             py::arg("padding_id"));
  module.def(
      "murmur3_x64_128",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view bytes = data;
        const Hash128<uint64_t> hash = murmur3(bytes.data(), int64_t(bytes.size()), seed);
        return py::make_tuple(hash.low, hash.high);
      },
      py::arg("data"), py::arg("seed"), "Return MurmurHash3_x64_128 as two 64-bit integers.");
  module.def(
      "murmur64a",
      [](const py::bytes& data, uint64_t seed) {
        const std::string_view bytes = data;
        return murmur64a(bytes.data(), int64_t(bytes.size()), seed);
      },
      py::arg("data"), py::arg("seed"),
      "Return MurmurHash64A, with seed 1 spaCy's id of a string.");
}

}  // namespace emblas
