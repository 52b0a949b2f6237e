#include "common/hash.h"
#include "common/isa.h"
#include "native.h"
#include "tables/tables.h"

namespace {

using emblas::HashedIds;
using emblas::HashFamily;

// The definition, one id and one division at a time.
uint64_t row_of(const HashedIds& hashed, uint64_t id, int64_t j) {
  emblas::Hash128<uint64_t> words;
  if (hashed.family == HashFamily::murmur3) {
    words = emblas::murmur3(&id, 8, hashed.seed + uint32_t(j / 4));
  } else {
    const uint64_t state = id ^ emblas::splitmix64_mix(uint64_t(hashed.seed));
    const uint64_t first = 2 * uint64_t(j / 4) + 1;
    words = {emblas::splitmix64_mix(state + first * emblas::kSplitmixStep),
             emblas::splitmix64_mix(state + (first + 1) * emblas::kSplitmixStep)};
  }
  const uint64_t word = j % 4 < 2 ? words.low : words.high;
  return (j % 2 ? word >> 32 : word & 0xffffffff) % hashed.num_embeddings;
}

template <class T>
void check_bags(double unit) {
  const std::vector<int32_t> offsets{0, 0, 5, 6, 150};
  const int64_t bags = 4, count = 150, rows = 37;
  const auto& kernels = emblas::kernels<emblas::TablesKernels>();
  const auto& kernel = kernels.hash_bag.of(T{});
  auto ids = native::random_bits<int64_t>(2 * count, 1);
  for (int64_t i = 0; i < count; ++i) ids[2 * i] %= 20;
  const int64_t padding_id = 3;
  for (int64_t num_hashes : {1, 3, 4, 9}) {
    for (int64_t dim : {1, 3, 16, 37, 70, 131}) {
      const HashedIds hashed{HashFamily::murmur3, 1, num_hashes, uint64_t(rows),
                             ids.data(),          2, &padding_id};
      const auto table = native::random_values<T>(rows * dim, 2);
      const auto grad_out = native::random_values<T>(bags * dim, 3);
      const auto weights = native::random_values<T>(count, 4);
      std::vector<T> out(bags * dim), grad_table(rows * dim), grad_weights(count), scratch(dim);
      const emblas::HashBagArgs<T> args{hashed, table.data(),   dim,
                                        dim,    offsets.data(), weights.data()};
      kernel.forward(args, 0, bags, scratch.data(), out.data());
      kernel.grad_weights(args, 0, bags, grad_out.data(), grad_weights.data());
      std::vector<uint32_t> numbers(count * num_hashes);
      kernels.hash_rows(hashed, 0, count, numbers.data());
      const emblas::HashBagTableArgs<T> back{
          hashed,          numbers.data(),   bags, dim, offsets.data(), weights.data(),
          grad_out.data(), grad_table.data()};
      kernel.grad_table(back, 0, 10, nullptr);
      kernel.grad_table(back, 10, rows, nullptr);

      std::vector<double> expected_out(bags * dim), expected_table(rows * dim);
      for (int64_t b = 0; b < bags; ++b) {
        for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
          double along = 0;
          const int64_t id = ids[2 * i];
          for (int64_t j = 0; j < num_hashes && id != padding_id; ++j) {
            const int64_t row = int64_t(row_of(hashed, uint64_t(id), j));
            CHECK(numbers[i * num_hashes + j] == row);
            for (int64_t d = 0; d < dim; ++d) {
              expected_out[b * dim + d] += double(weights[i]) * table[row * dim + d];
              expected_table[row * dim + d] += double(weights[i]) * grad_out[b * dim + d];
              along += double(table[row * dim + d]) * grad_out[b * dim + d];
            }
          }
          CHECK_NEAR(grad_weights[i], along, 1e3 * unit * (1 + std::fabs(along)));
        }
      }
      for (int64_t k = 0; k < bags * dim; ++k) CHECK_NEAR(out[k], expected_out[k], 1e4 * unit);
      for (int64_t k = 0; k < rows * dim; ++k) {
        CHECK_NEAR(grad_table[k], expected_table[k], 1e4 * unit);
      }
    }
  }
}

// 16-bit types: 1 + 1 + ... is exact, and so is its conversion.
template <class T>
void check_half(uint16_t one) {
  const auto& kernel = emblas::kernels<emblas::TablesKernels>().hash_bag.of(T{});
  const auto ids = native::random_bits<int64_t>(70, 1);
  const HashedIds hashed{HashFamily::splitmix64, 1, 4, 5, ids.data(), 1, nullptr};
  for (int64_t dim : {1, 15, 16, 37, 70}) {
    const std::vector<T> table(5 * dim, T{one});
    std::vector<T> out(dim), grad_table(5 * dim);
    std::vector<float> scratch(5 * dim);
    const std::vector<int32_t> offsets{0, 8};
    const emblas::HashBagArgs<T> args{hashed, table.data(), dim, dim, offsets.data(), nullptr};
    kernel.forward(args, 0, 1, scratch.data(), out.data());
    const uint16_t thirty_two = out[0].bits;
    const bool is_bfloat = one == 0x3f80;
    CHECK(thirty_two == (is_bfloat ? 0x4200 : 0x5000));
    for (const T& x : out) CHECK(x.bits == thirty_two);
    std::vector<uint32_t> numbers(8 * 4);
    emblas::kernels<emblas::TablesKernels>().hash_rows(hashed, 0, 8, numbers.data());
    const emblas::HashBagTableArgs<T> back{
        hashed, numbers.data(), 1, dim, offsets.data(), nullptr, table.data(), grad_table.data()};
    kernel.grad_table(back, 0, 5, scratch.data());
    for (int64_t k = 0; k < 5 * dim; ++k)
      CHECK(grad_table[k].bits == grad_table[k / dim * dim].bits);
  }
}

}  // namespace

NATIVE_TEST(hash_vectors) {
  const emblas::Hash128<uint64_t> zero = emblas::murmur3(uint64_t(0), 0);
  CHECK(zero.low == 0x28df63b7cc57c3cb && zero.high == 0xf2557dfcc4e8fe52);
  CHECK(emblas::splitmix64_mix(emblas::kSplitmixStep) == 0xe220a8397b1dcdaf);
  CHECK(emblas::murmur64a("apple", 5, 1) == 8566208034543834098u);
  CHECK(emblas::murmur64a("123456789", 9, 1) == 2056675840866671865u);
  for (uint64_t id : native::random_bits<uint64_t>(50, 1)) {
    const auto direct = emblas::murmur3(id, 77), general = emblas::murmur3(&id, 8, 77);
    CHECK(direct.low == general.low && direct.high == general.high);
  }
}

NATIVE_TEST(modulo_is_exact) {
  auto divisors = native::random_bits<uint64_t>(2000, 1);
  for (size_t i = 0; i < divisors.size(); ++i) divisors[i] = (divisors[i] >> (32 + i % 32)) + 1;
  divisors.insert(divisors.end(), {1, 2, 3, 5000, 0x80000000, 0xffffffff, 0x100000000});
  for (uint64_t divisor : divisors) {
    const emblas::Modulo modulo(divisor);
    for (uint64_t k : {uint64_t(0), divisor - 1, divisor, divisor + 1, 7 * divisor - 1, 7 * divisor,
                       uint64_t(0xfffffffe), uint64_t(0xffffffff), divisor * 0x9e3779b1}) {
      const uint64_t key = k & 0xffffffff;
      CHECK(modulo(key) == key % divisor);
    }
  }
}

NATIVE_TEST(hash_keys_of_every_count) {
  const auto& kernels = emblas::kernels<emblas::TablesKernels>();
  for (int64_t count : {0, 1, 7, 63, 64, 65, 200}) {
    const auto ids = native::random_bits<int64_t>(count, 5);
    for (HashFamily family : {HashFamily::murmur3, HashFamily::splitmix64}) {
      for (int64_t num_hashes : {1, 4, 5, 16}) {
        const HashedIds hashed{family, 9, num_hashes, 5000, ids.data(), 1, nullptr};
        std::vector<int64_t> keys(count * num_hashes);
        kernels.hash_keys(hashed, 0, count, keys.data());
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t j = 0; j < num_hashes; ++j) {
            CHECK(uint64_t(keys[i * num_hashes + j]) == row_of(hashed, uint64_t(ids[i]), j));
          }
        }
      }
    }
  }
}

NATIVE_TEST(hash_bag_float32) { check_bags<float>(1e-7); }
NATIVE_TEST(hash_bag_float64) { check_bags<double>(1e-15); }
NATIVE_TEST(hash_bag_bfloat16) { check_half<emblas::bfloat16>(0x3f80); }
NATIVE_TEST(hash_bag_float16) { check_half<emblas::float16>(0x3c00); }
