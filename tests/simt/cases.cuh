// Small kernels that prove the emulator: each has one fault of one kind that `broken` switches on,
// and is sound without it. They compile with nvcc too, so every wrapper of simt.h does.
#pragma once

#include "common/cuda/simt.h"

namespace emblas::simt {

struct Arguments {
  const float* in;  // n values
  float* out;       // n values
  int n;            // threads in the grid, unless a kernel says otherwise
  bool broken;
};

__device__ inline int thread_in_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }

// --- memory ----------------------------------------------------------------------------------

__global__ void read_past_end(Arguments a) {
  const int i = thread_in_grid();
  a.out[i] = a.in[i + a.broken];
}
__global__ void read_before_begin(Arguments a) {
  const int i = thread_in_grid();
  a.out[i] = a.in[i - a.broken];
}
__global__ void write_past_end(Arguments a) {
  const int i = thread_in_grid();
  a.out[i + a.broken] = a.in[i];
}
__global__ void read_null(Arguments a) {
  const float* from = a.broken ? nullptr : a.in;
  a.out[thread_in_grid()] = from[thread_in_grid()];
}
__global__ void write_argument(Arguments a) {
  const int i = thread_in_grid();
  float* to = a.broken ? const_cast<float*>(a.in) + a.n : a.out;
  to[i] = a.in[i];
}
__global__ void shared_past_end(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = a.in[thread_in_grid()];
  __syncthreads();
  const float* from = tile;
  a.out[thread_in_grid()] = from[threadIdx.x + (a.broken && threadIdx.x == 63)];
}
__global__ void shared_uninitialized(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  if (!(a.broken && threadIdx.x == 9)) tile[threadIdx.x] = a.in[thread_in_grid()];
  __syncthreads();
  a.out[thread_in_grid()] = tile[63 - threadIdx.x];
}
__global__ void dynamic_shared_past_end(Arguments a) {
  SIMT_DYNAMIC_SHARED(float, tile);  // 64 floats
  tile[threadIdx.x + (a.broken && threadIdx.x == 63)] = a.in[thread_in_grid()];
  __syncthreads();
  a.out[thread_in_grid()] = tile[63 - threadIdx.x];
}
__global__ void local_past_end(Arguments a) {
  float values[4];
  for (int i = 0; i < 4 + a.broken; ++i) values[i] = a.in[thread_in_grid()];
  a.out[thread_in_grid()] = values[threadIdx.x % 4];
}
__global__ void global_uninitialized(Arguments a) {
  const int i = thread_in_grid();
  if (!a.broken) a.out[i] = 0;
  a.out[i] += a.in[i];
}
__global__ void misaligned_vector(Arguments a) {
  const int i = thread_in_grid();
  if (i >= a.n / 4 - 1) {
    if (i == a.n / 4 - 1) store_vector(a.out + 4 * i, load_vector(a.in + 4 * i));
    return;
  }
  store_vector(a.out + 4 * i, load_vector(a.in + 4 * i + a.broken));
}
__global__ void misaligned_word(Arguments a) {
  const int i = thread_in_grid();
  const char* bytes = reinterpret_cast<const char*>(a.in + i);
  if (a.broken && i < a.n - 1) bytes += 2;
  a.out[i] = *reinterpret_cast<const float*>(bytes);
}

// --- races -----------------------------------------------------------------------------------

__global__ void race_read_after_write(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = a.in[thread_in_grid()];
  if (!a.broken) __syncthreads();
  a.out[thread_in_grid()] = tile[threadIdx.x ^ 32];
}
__global__ void race_write_after_read(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = a.in[thread_in_grid()];
    __syncthreads();
    sum += tile[threadIdx.x ^ 32];
    if (!a.broken) __syncthreads();
  }
  a.out[thread_in_grid()] = sum / 2;
}
__global__ void race_write_write(Arguments a) {
  SIMT_SHARED(float, flag, [1]);
  if (a.broken || threadIdx.x == 0) flag[0] = 1;
  __syncthreads();
  a.out[thread_in_grid()] = a.in[thread_in_grid()] * flag[0];
}
__global__ void race_in_warp(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = a.in[thread_in_grid()];
  if (!a.broken) __syncwarp();
  a.out[thread_in_grid()] = tile[threadIdx.x ^ 1];
}
// A shuffle moves registers; it orders no memory.
__global__ void race_over_shuffle(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  const float x = a.in[thread_in_grid()];
  tile[threadIdx.x] = x;
  const float same = __shfl_sync(kAllLanes, x, threadIdx.x % 32);
  if (!a.broken) __syncwarp();
  a.out[thread_in_grid()] = tile[threadIdx.x ^ 1] + (same - x);
}
__global__ void race_between_blocks(Arguments a) {
  const int i = a.broken ? int(threadIdx.x) : thread_in_grid();
  a.out[i] = a.in[i];
}
__global__ void race_with_atomic(Arguments a) {
  SIMT_SHARED(int, counter, [1]);
  if (threadIdx.x == 0) counter[0] = 0;
  __syncthreads();
  if (a.broken && threadIdx.x == 5) {
    counter[0] += 1;
  } else {
    atomicAdd(&counter[0], 1);
  }
  __syncthreads();
  a.out[thread_in_grid()] = float(counter[0]);
}

// --- barriers and collectives ----------------------------------------------------------------

__global__ void barrier_in_branch(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = a.in[thread_in_grid()];
  if (!a.broken || threadIdx.x < 32) __syncthreads();
  a.out[thread_in_grid()] = tile[threadIdx.x];
}
__global__ void barriers_apart(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = a.in[thread_in_grid()];
  if (a.broken && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[thread_in_grid()] = tile[threadIdx.x ^ 32];
}
__global__ void exit_before_barrier(Arguments a) {
  if (a.broken && threadIdx.x >= 60) return;
  __syncthreads();
  a.out[thread_in_grid()] = a.in[thread_in_grid()];
}
__global__ void shuffle_in_branch(Arguments a) {
  float x = a.in[thread_in_grid()];
  if (!a.broken || threadIdx.x % 2) {
    x = __shfl_xor_sync(kAllLanes, x, 2);
  } else {
    __syncthreads();
  }
  a.out[thread_in_grid()] = x;
}
__global__ void shuffle_after_exit(Arguments a) {
  if (a.broken && threadIdx.x == 3) return;
  a.out[thread_in_grid()] = __shfl_xor_sync(kAllLanes, a.in[thread_in_grid()], 2);
}
__global__ void shuffle_from_outside(Arguments a) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  a.out[thread_in_grid()] = __shfl_xor_sync(mask, a.in[thread_in_grid()], a.broken ? 16 : 8);
}
__global__ void masks_disagree(Arguments a) {
  const unsigned mask = a.broken && threadIdx.x % 32 == 7 ? 0xffu : kAllLanes;
  a.out[thread_in_grid()] = __shfl_xor_sync(mask, a.in[thread_in_grid()], 1);
}
__global__ void lane_outside_mask(Arguments a) {
  const int all = __all_sync(a.broken ? 0x7fffffffu : kAllLanes, 1);
  a.out[thread_in_grid()] = a.in[thread_in_grid()] * float(all);
}

// --- cp.async --------------------------------------------------------------------------------

// 16 threads copy 64 floats; all read them reversed.
__global__ void async_without_wait(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  if (threadIdx.x < 16) {
    cp_async_16(&tile[4 * threadIdx.x], a.in + blockIdx.x * 64 + 4 * threadIdx.x);
  }
  cp_async_commit();
  if (!a.broken) cp_async_wait<0>();
  __syncthreads();
  a.out[thread_in_grid()] = tile[63 - threadIdx.x];
}
__global__ void async_without_barrier(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  if (threadIdx.x < 16) {
    cp_async_16(&tile[4 * threadIdx.x], a.in + blockIdx.x * 64 + 4 * threadIdx.x);
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (!a.broken) __syncthreads();
  a.out[thread_in_grid()] = tile[63 - threadIdx.x];
}
// Two groups under way: waiting for all but the last is enough for the first half only.
__global__ void async_wait_too_weak(Arguments a) {
  SIMT_SHARED(float, tile, [64]);
  const float* from = a.in + blockIdx.x * 64;
  for (int half = 0; half < 2; ++half) {
    const int at = 32 * half + 4 * threadIdx.x;
    if (threadIdx.x < 8) cp_async_16(&tile[at], from + at, half == 0 ? 16 : 8);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  const float first = tile[threadIdx.x % 32];
  if (!a.broken) cp_async_wait<0>();
  __syncthreads();
  a.out[thread_in_grid()] = threadIdx.x < 32 ? first : tile[threadIdx.x];
}

// --- limits ----------------------------------------------------------------------------------

#if !defined(__CUDACC__)  // ptxas refuses it
__global__ void static_shared_limit(Arguments a) {
  SIMT_SHARED(float, small, [64]);
  small[threadIdx.x] = a.in[thread_in_grid()];
  if (a.broken) {
    SIMT_SHARED(float, large, [12 << 10]);
    large[threadIdx.x] = 0;
  }
  a.out[thread_in_grid()] = small[threadIdx.x];
}
#endif

// --- behaviour: no fault, the results are compared -------------------------------------------

// Tickets in the order of arrival: this result depends on the schedule.
__global__ void order_dependent(Arguments a) {
  SIMT_SHARED(int, counter, [1]);
  if (threadIdx.x == 0) counter[0] = 0;
  __syncthreads();
  a.out[thread_in_grid()] = float(atomicAdd(&counter[0], 1));
}

// Rows of `n` results, one for each primitive.
__global__ void primitives(Arguments a) {
  const int i = thread_in_grid(), lane = threadIdx.x % 32;
  const float x = a.in[i];
  float* out = a.out + i;
  const auto put = [&](float y) {
    *out = y;
    out += a.n;
  };
  put(__shfl_sync(kAllLanes, x, 5));
  put(__shfl_sync(kAllLanes, x, 5, 8));
  put(__shfl_up_sync(kAllLanes, x, 3));
  put(__shfl_down_sync(kAllLanes, x, 3, 16));
  put(__shfl_xor_sync(kAllLanes, x, 9));
  put(float(__ballot_sync(kAllLanes, x > 0) >> 8));
  put(float(__any_sync(kAllLanes, lane == 40)) + 2 * float(__all_sync(kAllLanes, lane < 32)));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  put(0), put(0), put(0), put(0), put(0);
#else
  put(float(__reduce_add_sync(kAllLanes, lane - 10)));
  put(float(__reduce_min_sync(kAllLanes, lane - 10)));
  put(float(__reduce_max_sync(kAllLanes, unsigned(lane))));
  put(float(__reduce_add_sync(kAllLanes, unsigned(lane)) +
            __reduce_min_sync(kAllLanes, unsigned(lane + 3))) +
      float(__reduce_max_sync(kAllLanes, lane - 40)));
  put(float(__reduce_or_sync(kAllLanes, 1u << lane % 5) + __reduce_and_sync(kAllLanes, 5u)));
#endif
  put(warp_sum(x));
  put(float(block_sum<2>(double(x))));
  put(float(__popc(0xf0f0u) + 100 * __clz(1) + 10000 * __ffs(8)));
  put(float(__popcll(0xf0f0f0f0f0ull) + 100 * int(__brev(1u) >> 31) +
            1000 * int(__umul64hi(1ull << 63, 6))));
}

// The last value of each atomic operation, over all threads of the grid; out holds 8 zeros.
__global__ void atomics(Arguments a) {
  SIMT_SHARED(int, value, [8]);
  if (threadIdx.x < 8) value[threadIdx.x] = threadIdx.x == 4 ? -1 : 0;
  __syncthreads();
  const int t = int(threadIdx.x);
  atomicAdd(&value[0], t);
  atomicMin(&value[1], -t);
  atomicMax(&value[2], t);
  atomicOr(&value[3], t);
  atomicAnd(&value[4], ~t);
  atomicXor(&value[5], t);
  atomicExch(&value[6], 7);
  int seen;
  do {  // an addition by compare and swap
    seen = atomicAdd(&value[7], 0);
  } while (atomicCAS(&value[7], seen, seen + 2) != seen);
  __syncthreads();
  if (threadIdx.x < 8) a.out[blockIdx.x * 8 + threadIdx.x] = float(value[threadIdx.x]);
}

// in: bit patterns of 16-bit floats as floats; out: [4, n], bfloat16 and float16, widened and back.
__global__ void conversions(Arguments a) {
  const int i = thread_in_grid();
  const auto bits = uint16_t(a.in[i]);
  a.out[i] = to_float(bfloat16{bits});
  a.out[a.n + i] = to_float(float16{bits});
  a.out[2 * a.n + i] = float(to_bfloat16(a.out[i]).bits);
  a.out[3 * a.n + i] = float(to_float16(a.out[a.n + i]).bits);
}
// in: any floats; out: [2, n] rounded to bfloat16 and float16.
__global__ void rounding(Arguments a) {
  const int i = thread_in_grid();
  a.out[i] = to_float(to_bfloat16(a.in[i]));
  a.out[a.n + i] = to_float(to_float16(a.in[i]));
}

// Matrix fragments; one warp. in: a 16 x 16, then b 8 x 16 (b transposed), as floats that T holds;
// out: 16 x 8. `a` goes through ldmatrix, b through ldmatrix of both matrices (x4 reads it twice).
template <class T>
__device__ void multiply(Arguments args) {
  SIMT_SHARED(T, a, [16][16]);
  SIMT_SHARED(T, b, [8][16]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) from_accumulator(args.in[i], &a[i / 16][i % 16]);
  for (int i = lane; i < 128; i += 32) from_accumulator(args.in[256 + i], &b[i / 16][i % 16]);
  __syncthreads();
  uint32_t fragment_a[4], pair[4];
  ldmatrix_x4(fragment_a, &a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4(pair, &b[lane % 8][lane / 8 % 2 * 8]);
  const uint32_t fragment_b[2] = {pair[0], pair[1]};
  float d[4] = {};
  mma_m16n8k16(T{}, d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) args.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
__global__ void multiply_bfloat16(Arguments args) { multiply<bfloat16>(args); }
__global__ void multiply_float16(Arguments args) { multiply<float16>(args); }

// Fragments as they are; one warp. in: per lane 6 words, a[0..3] and b[0..1]; out: per lane
// d[0..3].
__device__ inline const uint32_t* lane_words(const Arguments& args) {
  return reinterpret_cast<const uint32_t*>(args.in) + 6 * threadIdx.x;
}
__global__ void fragments_bfloat16(Arguments args) {
  const uint32_t* words = lane_words(args);
  const uint32_t a[4] = {words[0], words[1], words[2], words[3]}, b[2] = {words[4], words[5]};
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k16(bfloat16{}, d, a, b);
  for (int i = 0; i < 4; ++i) args.out[4 * threadIdx.x + i] = d[i];
}
__global__ void fragments_bits(Arguments args) {
  const uint32_t* words = lane_words(args);
  const uint32_t a[4] = {words[0], words[1], words[2], words[3]}, b[2] = {words[4], words[5]};
  int d[4] = {1, 1, 1, 1};
  mma_m16n8k256_and_popc(d, a, b);
  for (int i = 0; i < 4; ++i) args.out[4 * threadIdx.x + i] = float(d[i]);
}

// One warp; in: 32 rows of 8 values 0 .. 255 below 2048; out: [2, 32 lanes, 8] the values that each
// lane gets from ldmatrix and from its transposed form.
__global__ void matrix_loads(Arguments args) {
  SIMT_SHARED(uint16_t, rows, [32][8]);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane][i] = uint16_t(args.in[lane * 8 + i]);
  __syncthreads();
  uint32_t got[4];
  ldmatrix_x4(got, rows[lane]);
  for (int i = 0; i < 8; ++i) args.out[lane * 8 + i] = float(got[i / 2] >> i % 2 * 16 & 0xffff);
  ldmatrix_x4_transposed(got, rows[lane]);
  for (int i = 0; i < 8; ++i) {
    args.out[256 + lane * 8 + i] = float(got[i / 2] >> i % 2 * 16 & 0xffff);
  }
}

}  // namespace emblas::simt
