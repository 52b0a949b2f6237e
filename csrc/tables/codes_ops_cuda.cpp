// Codes of ids as a torch operator on CUDA tensors: emblas::random_codes_cuda, which the router of
// the public operator calls. Values of sequences are not checked: they are taken modulo 2^32.
#include "common/cuda/device_call.h"
#include "tables/codes_cuda.h"

namespace emblas {
namespace {

// In the order of the floating-point types that Python names (emblas._op.FLOATS).
constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                  ScalarType::Half};

Tensor random_codes_cuda(const Tensor& ids, const Tensor& sequence, int64_t dim, int64_t kind,
                         int64_t seed, int64_t sparsity, int64_t dtype) {
  const DeviceCall call(ids);
  call.check_vector<int64_t>(ids, -1, "ids must be a contiguous int64 vector");
  const int64_t count = ids.size(0);
  call.check_vector<int64_t>(sequence, -1,
                             "sequence must be a contiguous int64 vector on the device of ids");
  check(sequence.size(0) == 1 || sequence.size(0) == count, "sequence must hold one or all");
  check(1 <= dim && dim < int64_t(1) << 34, "dim must be 1 to 2^34 - 1");
  check(0 <= kind && kind < kCodeKinds, "unknown kind of codes");
  check(1 <= sparsity && sparsity <= int64_t(1) << 31, "sparsity must be 1 to 2^31");
  check(0 <= dtype && dtype < 4, "unknown dtype");
  const CodeArgs args{CodeKind(kind),
                      uint64_t(seed),
                      sparsity,
                      dim,
                      call.read<int64_t>(ids),
                      call.read<int64_t>(sequence),
                      sequence.size(0) == 1 ? 0 : 1};
  return visit_float(kDtypes[dtype], "unknown dtype", [&](auto element) {
    using T = decltype(element);
    const Tensor out = call.empty<2>(kDtypes[dtype], {count, dim});
    cuda::random_codes(args, count, call.write<T>(out), call.stream());
    return out;
  });
}

}  // namespace
}  // namespace emblas

STABLE_TORCH_LIBRARY_FRAGMENT(EMBLAS_CUDA_NAMESPACE, library) {
  library.def(
      "random_codes_cuda(Tensor ids, Tensor sequence, int dim, int kind, int seed, int sparsity,"
      " int dtype) -> Tensor out");
}
STABLE_TORCH_LIBRARY_IMPL(EMBLAS_CUDA_NAMESPACE, EMBLAS_CUDA_KEY, library) {
  library.impl("random_codes_cuda", TORCH_BOX(&emblas::random_codes_cuda));
}
