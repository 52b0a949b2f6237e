#include "common/isa.h"
#include "common/philox.h"
#include "native.h"
#include "tables/codes.h"

namespace {

using emblas::CodeArgs;
using emblas::CodeKind;

template <class T>
std::vector<T> codes_of(CodeKind kind, const std::vector<int64_t>& ids, int64_t dim,
                        int64_t sequence = 0, uint64_t seed = 0, int64_t sparsity = 1) {
  std::vector<T> out(ids.size() * dim);  // as long as written: sanitizers see more
  const CodeArgs args{kind, seed, sparsity, dim, ids.data(), &sequence, 0};
  const auto& kernel = emblas::kernels<emblas::CodesKernels>().codes.of(T{});
  const int64_t count = int64_t(ids.size());
  kernel.fill(args, 0, count / 2, out.data());
  kernel.fill(args, count / 2, count, out.data());
  return out;
}

}  // namespace

// The same bits on every machine.
NATIVE_TEST(codes_recorded) {
  const std::vector<float> expected{0x1.fb7666p-1f,  -0x1.d96d6p-1f, -0x1.3c373ep-1f,
                                    -0x1.1202d4p-4f, 0x1.4f2cdp+1f,  0x1.85d076p+0f};
  CHECK(codes_of<float>(CodeKind::normal, {0, 12345}, 3) == expected);
}

NATIVE_TEST(codes_by_definition) {
  const auto ids = native::random_bits<int64_t>(5, 1);
  for (int64_t dim : {1, 3, 8, 33, 70}) {
    const auto normal = codes_of<double>(CodeKind::normal, ids, dim, 9, 0x123456789abc);
    const auto uniform = codes_of<double>(CodeKind::uniform, ids, dim, 9, 0x123456789abc);
    const auto sparse = codes_of<double>(CodeKind::sparse, ids, dim, 9, 0x123456789abc, 3);
    for (size_t i = 0; i < ids.size(); ++i) {
      for (int64_t k = 0; k < dim; ++k) {
        const emblas::Philox4 counter{
            {uint32_t(k / 4), uint32_t(ids[i]), uint32_t(uint64_t(ids[i]) >> 32), 9}};
        double numbers[4];
        emblas::philox_normal(counter, 0x123456789abc, numbers);
        CHECK_NEAR(normal[i * dim + k], numbers[k % 4], 1e-13);
        const uint32_t word = emblas::philox4x32(counter, 0x123456789abc).word[k % 4];
        CHECK(uniform[i * dim + k] == (word + 0.5) * 0x1p-31 - 1);
        const double sign = word < 715827883u ? -1 : word < 2 * 715827883u ? 1 : 0;
        CHECK(sparse[i * dim + k] == sign * std::sqrt(3.0));
      }
    }
  }
}
