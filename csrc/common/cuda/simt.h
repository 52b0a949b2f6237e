// Everything of CUDA that the kernels use, in one place: launching, shared memory, 16-byte
// accesses, 16-bit floats, warp and block reductions, cp.async, ldmatrix and mma.sync.
//
// The same kernel sources compile with nvcc and, for the tests, with g++ against the emulator in
// tests/simt, which runs them on a CPU and checks every access. For that to work a kernel
//   - includes this header and no other of CUDA; inline PTX stands only here,
//   - declares shared memory with SIMT_SHARED or SIMT_DYNAMIC_SHARED, never __shared__,
//   - is launched with launch(), never <<<>>>,
//   - copies device memory by assignment or the functions below, never by memcpy or memset,
//   - joins the lanes of a warp by __syncwarp before they read each other's shared memory.
// CUDA's own names are kept for what CUDA has: threadIdx, __syncthreads, __shfl_*_sync,
// __ballot_sync, __any_sync, __all_sync, __reduce_*_sync (sm_80), atomics on integers, __popc,
// min...
#pragma once

#include <cstdint>

#include "common/types.h"

#if !defined(__CUDACC__)

#include "simt/emulator.h"  // tests/simt/emulator.h: the twin of the branch below

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

// SIMT_SHARED(float, tile, [8][32]); aligned to 16 bytes.
#define SIMT_SHARED(type, name, dims) __shared__ __align__(16) type name dims
// SIMT_DYNAMIC_SHARED(float, tile); the size comes with the launch; 16-byte aligned.
#define SIMT_DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(16) unsigned char emblas_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(emblas_dynamic_shared)

namespace emblas::simt {

// --- launch ----------------------------------------------------------------------------------

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

// Runs the kernel on a stream (a cudaStream_t); an empty grid is no launch. Arguments are
// converted to the kernel's own parameter types. Never waits.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, void* stream,
            A&&... args) {
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr size_t without_opting_in = 48 << 10;
  if (dynamic_shared_bytes > without_opting_in) {
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(dynamic_shared_bytes)));
  }
  std::tuple<P...> values{static_cast<P>(args)...};
  std::apply(
      [&](P&... value) {
        void* pointers[] = {&value...};
        check_cuda(cudaLaunchKernel(function, grid, block, pointers, dynamic_shared_bytes,
                                    static_cast<cudaStream_t>(stream)));
      },
      values);
}

// Whether the current device has what sm_80 brought: cp.async, mma.sync on bits, redux.
inline bool has_sm_80() {
  int device, major;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 8;
}

// --- conversions (round to nearest even) -----------------------------------------------------

__device__ inline float to_float(bfloat16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}
__device__ inline float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline bfloat16 to_bfloat16(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
__device__ inline float16 to_float16(float x) { return {__half_as_ushort(__float2half_rn(x))}; }

// --- 16 bytes at once (aligned to 16) --------------------------------------------------------

__device__ inline uint4 load_16_bytes(const void* from) { return *static_cast<const uint4*>(from); }
__device__ inline void store_16_bytes(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// --- cp.async: global to shared memory, behind the computation -------------------------------

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes, both sides aligned; beyond `valid_bytes` (0 to 16) it reads nothing and writes
// zeros. The bytes may be read after cp_async_wait by this thread and a barrier by the others.
__device__ inline void cp_async_16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
               : "memory");
}
// Closes a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `pending_groups` groups of this thread are under way.
template <int pending_groups>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
}

// --- matrix fragments (all 32 lanes together) ------------------------------------------------

// Four 8 x 8 matrices of 16-bit values from shared memory; lane l gives the address (aligned to 16)
// of row l % 8 of matrix l / 8 and gets of each matrix row l / 4, columns 2 (l % 4) and the next.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of each matrix transposed.
__device__ inline void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, of shape 16 x 16 (row-major a) times 16 x 8 (column-major b). Lane l holds
//   a[0..3]: rows l / 4, l / 4 + 8, l / 4, l / 4 + 8; columns 2 (l % 4) and the next, in a[2], a[3]
//            those + 8
//   b[0..1]: column l / 4; rows 2 (l % 4) and the next, in b[1] those + 8
//   d[0..3]: row l / 4 (d[0], d[1]) and l / 4 + 8 (d[2], d[3]), columns 2 (l % 4) and the next
__device__ inline void mma_m16n8k16(bfloat16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16(float16, float (&d)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[m][n] += number of bits set in both row m of a and column n of b, 256 bits each. The layout is
// the one above with 32 bits in place of two values: a lane's word w of a row is bits 32 w to
// 32 w + 31, w = l % 4, and l % 4 + 4 in a[2], a[3], b[1].
__device__ inline void mma_m16n8k256_and_popc(int (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace emblas::simt

#endif

// --- built on the above, the same for both compilers -----------------------------------------

namespace emblas::simt {

inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_accumulator(float x) { return x; }
__device__ inline double to_accumulator(double x) { return x; }
__device__ inline float to_accumulator(bfloat16 x) { return to_float(x); }
__device__ inline float to_accumulator(float16 x) { return to_float(x); }
__device__ inline void from_accumulator(float x, float* out) { *out = x; }
__device__ inline void from_accumulator(double x, double* out) { *out = x; }
__device__ inline void from_accumulator(float x, bfloat16* out) { *out = to_bfloat16(x); }
__device__ inline void from_accumulator(float x, float16* out) { *out = to_float16(x); }

// Elements in one 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T at[kVector<T>];
};
template <class T>
__device__ inline Vector<T> load_vector(const T* from) {
  const uint4 raw = load_16_bytes(from);
  Vector<T> out;
  memcpy(&out, &raw, 16);
  return out;
}
template <class T>
__device__ inline void store_vector(T* to, const Vector<T>& value) {
  uint4 raw;
  memcpy(&raw, &value, 16);
  store_16_bytes(to, raw);
}

// Sum over a warp; every lane gets the same bits.
template <class A>
__device__ inline A warp_sum(A x) {
  for (int flip = 16; flip > 0; flip /= 2) x += __shfl_xor_sync(kAllLanes, x, flip);
  return x;
}

// Sum over a block of `warps` whole warps (one-dimensional); every thread gets the same bits.
template <int warps, class A>
__device__ inline A block_sum(A x) {
  SIMT_SHARED(A, of_warp, [warps]);
  x = warp_sum(x);
  __syncthreads();  // the call before may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  A total = 0;
  for (int w = 0; w < warps; ++w) total += of_warp[w];
  return total;
}

}  // namespace emblas::simt
