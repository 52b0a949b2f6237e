// CUDA C++ for g++: the language extensions and intrinsics that csrc/common/cuda/simt.h promises,
// on top of the engine. Names and signatures are CUDA's; a defaulted source_location tells the
// engine where a call stands.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/types.h"
#include "engine.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::emblas::simt::engine::self.thread)
#define blockIdx (::emblas::simt::engine::self.block)
#define blockDim (::emblas::simt::engine::self.block_dim)
#define gridDim (::emblas::simt::engine::self.grid_dim)

#define SIMT_SHARED(type, name, dims)      \
  using name##_type = type dims;           \
  static char name##_tag;                  \
  auto& name = *static_cast<name##_type*>( \
      ::emblas::simt::engine::shared_array(&name##_tag, sizeof(name##_type), #name))
#define SIMT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::emblas::simt::engine::dynamic_shared())

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emblas::simt {

using engine::Site;

// --- launch ----------------------------------------------------------------------------------

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void* /*stream*/, A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  } call{kernel, {static_cast<P>(args)...}};
  const auto enter = [](void* pointer) {
    const Call& call = *static_cast<Call*>(pointer);
    std::apply(call.kernel, call.args);
  };
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return;
  engine::run({reinterpret_cast<const void*>(kernel), enter, &call, sizeof call}, grid, block,
              dynamic_shared_bytes);
}

inline bool has_sm_80() { return true; }

// --- warp collectives ------------------------------------------------------------------------

namespace emulated {

struct Shuffle {
  uint64_t bits;
  int source;
};
inline void finish_shuffle(const engine::Lane (&lanes)[32], uint32_t mask) {
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const int source = static_cast<const Shuffle*>(lanes[l].in)->source;
    if (!(mask >> source & 1)) {
      engine::fail("divergent collective", "a shuffle reads a lane outside its mask",
                   Site::current());
    }
    *static_cast<uint64_t*>(lanes[l].out) = static_cast<const Shuffle*>(lanes[source].in)->bits;
  }
}
template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 8);
  Shuffle in{0, source};
  std::memcpy(&in.bits, &value, sizeof(T));
  uint64_t out;
  engine::collective(name, mask, finish_shuffle, &in, &out, site);
  std::memcpy(&value, &out, sizeof(T));
  return value;
}

// Folds the lanes' values to one that every lane takes.
template <class T, class Fold>
T reduce(const char* name, uint32_t mask, T value, Fold, const Site& site) {
  const auto finish = [](const engine::Lane(&lanes)[32], uint32_t mask) {
    const int first = std::countr_zero(mask);
    T total = *static_cast<const T*>(lanes[first].in);
    for (int l = first + 1; l < 32; ++l) {
      if (mask >> l & 1) total = Fold{}(total, *static_cast<const T*>(lanes[l].in));
    }
    for (int l = first; l < 32; ++l) {
      if (mask >> l & 1) *static_cast<T*>(lanes[l].out) = total;
    }
  };
  T out;
  engine::collective(name, mask, finish, &value, &out, site);
  return out;
}

template <class T, class Change>
T atomic(T* address, Change change, const Site& site) {
  engine::access(address, sizeof(T), sizeof(T), engine::Kind::atomic, site);
  engine::enter_engine();
  const T before = *address;
  *address = change(before);
  engine::leave_engine();
  return before;
}

}  // namespace emulated
}  // namespace emblas::simt

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  emblas::simt::engine::block_barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       std::source_location site = std::source_location::current()) {
  emblas::simt::engine::warp_barrier(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location site = std::source_location::current()) {
  const int base = int(emblas::simt::engine::lane()) & ~(width - 1);
  return emblas::simt::emulated::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)),
                                         site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location site = std::source_location::current()) {
  const int lane = int(emblas::simt::engine::lane()), source = lane + int(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emblas::simt::emulated::shuffle("__shfl_down_sync", mask, value, inside ? source : lane,
                                         site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location site = std::source_location::current()) {
  const int lane = int(emblas::simt::engine::lane()), source = lane - int(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return emblas::simt::emulated::shuffle("__shfl_up_sync", mask, value, inside ? source : lane,
                                         site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  std::source_location site = std::source_location::current()) {
  const int lane = int(emblas::simt::engine::lane()), source = lane ^ flip;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emblas::simt::emulated::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane,
                                         site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  const unsigned bit = unsigned(predicate != 0) << emblas::simt::engine::lane();
  const auto fold = [](unsigned a, unsigned b) { return a | b; };
  return emblas::simt::emulated::reduce("__ballot_sync", mask, bit, fold, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location site = std::source_location::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location site = std::source_location::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
#define EMBLAS_REDUCE(name, type, expression)                                     \
  inline type name(unsigned mask, type value,                                     \
                   std::source_location site = std::source_location::current()) { \
    const auto fold = [](type a, type b) -> type { return expression; };          \
    return emblas::simt::emulated::reduce(#name, mask, value, fold, site);        \
  }
EMBLAS_REDUCE(__reduce_add_sync, unsigned, a + b)
EMBLAS_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
EMBLAS_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMBLAS_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMBLAS_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMBLAS_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMBLAS_REDUCE(__reduce_or_sync, unsigned, a | b)
EMBLAS_REDUCE(__reduce_and_sync, unsigned, a& b)
#undef EMBLAS_REDUCE

// --- atomics (relaxed: they order nothing else) ----------------------------------------------

#define EMBLAS_ATOMIC(name, expression)                                 \
  template <class T>                                                    \
  T name(T* address, std::type_identity_t<T> value,                     \
         std::source_location site = std::source_location::current()) { \
    return emblas::simt::emulated::atomic(                              \
        address, [value](T before) -> T { return expression; }, site);  \
  }
EMBLAS_ATOMIC(atomicAdd, before + value)
EMBLAS_ATOMIC(atomicMin, before < value ? before : value)
EMBLAS_ATOMIC(atomicMax, before > value ? before : value)
EMBLAS_ATOMIC(atomicOr, before | value)
EMBLAS_ATOMIC(atomicAnd, before& value)
EMBLAS_ATOMIC(atomicXor, before ^ value)
EMBLAS_ATOMIC(atomicExch, ((void)before, value))
#undef EMBLAS_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            std::source_location site = std::source_location::current()) {
  return emblas::simt::emulated::atomic(
      address, [=](T before) { return before == expected ? value : before; }, site);
}

// --- bits and arithmetic ---------------------------------------------------------------------

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
// Operations on doubles that nvcc doesn't fuse; g++ has no instruction to fuse them into.
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline int __popc(unsigned x) {
  emblas::simt::engine::count_operations(emblas::simt::engine::Operation::popcount, 1);
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __popc(unsigned(x)) + __popc(unsigned(x >> 32));
}
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (x >> i & 1) << (31 - i);
  return out;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}

namespace emblas::simt {

// --- conversions -----------------------------------------------------------------------------

inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(1024 + fraction), int(exponent) - 25)
                                         : std::ldexp(float(fraction), -24);
  return x.bits >> 15 ? -magnitude : magnitude;
}
inline bfloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};  // as the hardware does
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // In units of the last place; nearbyint rounds to nearest even, and a carry into the exponent
  // field is the next power of two.
  const auto units = uint16_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + (uint16_t(exponent + 14) << 10)))};
}

// --- 16 bytes at once ------------------------------------------------------------------------

inline uint4 load_16_bytes(const void* from, const Site& site = Site::current()) {
  engine::access(from, 16, 16, engine::Kind::read, site);
  uint4 out;
  std::memcpy(&out, from, 16);
  return out;
}
inline void store_16_bytes(void* to, uint4 value, const Site& site = Site::current()) {
  engine::access(to, 16, 16, engine::Kind::write, site);
  engine::enter_engine();
  std::memcpy(to, &value, 16);
  engine::leave_engine();
}

// --- cp.async --------------------------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, int valid_bytes = 16,
                        const Site& site = Site::current()) {
  engine::copy_async(shared, global, 16, size_t(valid_bytes), site);
}
inline void cp_async_commit() { engine::commit_async(); }
template <int pending_groups>
void cp_async_wait(const Site& site = Site::current()) {
  engine::wait_async(pending_groups, site);
}

// --- matrix fragments ------------------------------------------------------------------------
// The layouts are those of the PTX manual (chapter on warp-level matrix instructions); in every
// m16n8 shape lane l holds rows l / 4 and l / 4 + 8 of A and C, and column l / 4 of B.

namespace emulated {

inline void finish_ldmatrix(const engine::Lane (&lanes)[32], uint32_t, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t at[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(at[row], *static_cast<const void* const*>(lanes[8 * matrix + row].in), 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = transposed ? at[column][row] : at[row][column];
      const uint32_t high = transposed ? at[column + 1][row] : at[row][column + 1];
      static_cast<uint32_t*>(lanes[l].out)[matrix] = low | high << 16;
    }
  }
}
template <bool transposed>
void ldmatrix(uint32_t (&out)[4], const void* row, const char* name, const Site& site) {
  engine::access(row, 16, 16, engine::Kind::read, site);
  engine::collective(
      name, 0xffffffffu,
      [](const engine::Lane(&lanes)[32], uint32_t mask) {
        finish_ldmatrix(lanes, mask, transposed);
      },
      &row, out, site);
}

template <class C>
struct Fragments {
  C c[4];
  uint32_t a[4], b[2];
};
// d = a b + c over K elements of `bits` bits; multiply(x, y) of two elements as integers.
template <class C, int K, int bits, class Multiply>
void mma(const char* name, C (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Site& site) {
  Fragments<C> in;
  std::copy(d, d + 4, in.c);
  std::copy(a, a + 4, in.a);
  std::copy(b, b + 2, in.b);
  const auto finish = [](const engine::Lane(&lanes)[32], uint32_t) {
    engine::count_operations(engine::Operation::tensor_flop, 2 * 16 * 8 * K);
    constexpr int packed = 32 / bits;  // elements in a register
    const auto fragments = [&](int lane) -> const Fragments<C>& {
      return *static_cast<const Fragments<C>*>(lanes[lane].in);
    };
    // Element (row, k): registers 0, 2 hold the first and second half of k for rows 0-7, registers
    // 1, 3 for rows 8-15; four lanes share a row, each with `packed` neighbours.
    const auto element = [](const uint32_t* registers, int stride, int k) {
      const uint32_t word = registers[k / (K / 2) * stride];
      return word >> k % packed * bits & uint32_t((uint64_t(1) << bits) - 1);
    };
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        C total = fragments(l).c[i];
        for (int k = 0; k < K; ++k) {
          const int lane = k % (K / 2) / packed;
          const uint32_t x = element(fragments(row % 8 * 4 + lane).a + row / 8, 2, k);
          const uint32_t y = element(fragments(column * 4 + lane).b, 1, k);
          total += Multiply{}(x, y);
        }
        static_cast<C*>(lanes[l].out)[i] = total;
      }
    }
  };
  engine::collective(name, 0xffffffffu, finish, &in, d, site);
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, const Site& site = Site::current()) {
  emulated::ldmatrix<false>(out, row, "ldmatrix", site);
}
inline void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row,
                                   const Site& site = Site::current()) {
  emulated::ldmatrix<true>(out, row, "ldmatrix.trans", site);
}

struct MultiplyBfloat16 {
  float operator()(uint32_t x, uint32_t y) const {
    return to_float(bfloat16{uint16_t(x)}) * to_float(bfloat16{uint16_t(y)});
  }
};
struct MultiplyFloat16 {
  float operator()(uint32_t x, uint32_t y) const {
    return to_float(float16{uint16_t(x)}) * to_float(float16{uint16_t(y)});
  }
};
struct MultiplyBits {
  int operator()(uint32_t x, uint32_t y) const { return int(x & y); }
};
inline void mma_m16n8k16(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const Site& site = Site::current()) {
  emulated::mma<float, 16, 16, MultiplyBfloat16>("mma.bf16", d, a, b, site);
}
inline void mma_m16n8k16(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         const Site& site = Site::current()) {
  emulated::mma<float, 16, 16, MultiplyFloat16>("mma.f16", d, a, b, site);
}
inline void mma_m16n8k256_and_popc(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                   const Site& site = Site::current()) {
  emulated::mma<int, 256, 1, MultiplyBits>("mma.b1", d, a, b, site);
}

}  // namespace emblas::simt
