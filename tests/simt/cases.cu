// Runs the kernels of cases.cuh by name, on buffers of the caller.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cases.cuh"

namespace emblas::simt {
namespace {

struct Case {
  const char* name;
  void (*kernel)(Arguments);
  unsigned block = 64;
  size_t dynamic_shared_bytes = 0;
};
#define CASE(name, ...) {#name, name, __VA_ARGS__}
const Case cases[] = {
    CASE(read_past_end, 64),
    CASE(read_before_begin, 64),
    CASE(write_past_end, 64),
    CASE(read_null, 64),
    CASE(write_argument, 64),
    CASE(shared_past_end, 64),
    CASE(shared_uninitialized, 64),
    CASE(dynamic_shared_past_end, 64, 256),
    CASE(local_past_end, 64),
    CASE(global_uninitialized, 64),
    CASE(misaligned_vector, 64),
    CASE(misaligned_word, 64),
    CASE(race_read_after_write, 64),
    CASE(race_write_after_read, 64),
    CASE(race_write_write, 64),
    CASE(race_in_warp, 64),
    CASE(race_over_shuffle, 64),
    CASE(race_between_blocks, 64),
    CASE(race_with_atomic, 64),
    CASE(barrier_in_branch, 64),
    CASE(barriers_apart, 64),
    CASE(exit_before_barrier, 64),
    CASE(shuffle_in_branch, 64),
    CASE(shuffle_after_exit, 64),
    CASE(shuffle_from_outside, 64),
    CASE(masks_disagree, 64),
    CASE(lane_outside_mask, 64),
    CASE(async_without_wait, 64),
    CASE(async_without_barrier, 64),
    CASE(async_wait_too_weak, 64),
    CASE(static_shared_limit, 64),
    CASE(order_dependent, 64),
    CASE(primitives, 64),
    CASE(atomics, 64),
    CASE(conversions, 64),
    CASE(rounding, 64),
    CASE(multiply_bfloat16, 32),
    CASE(multiply_float16, 32),
    CASE(fragments_bfloat16, 32),
    CASE(fragments_bits, 32),
    CASE(matrix_loads, 32),
};

}  // namespace

// Grid of n / block blocks (one where n is smaller); block and shared bytes of the case unless
// given. The message of the fault, or nothing, goes to `message`.
extern "C" __attribute__((visibility("default"))) void simt_run_case(
    const char* name, bool broken, const float* in, int64_t in_count, float* out, int64_t out_count,
    int n, unsigned block, size_t dynamic_shared_bytes, unsigned grid_y, char* message,
    size_t message_bytes) {
  const Case* found = std::find_if(std::begin(cases), std::end(cases),
                                   [&](const Case& c) { return !std::strcmp(c.name, name); });
  message[0] = 0;
  const int64_t one = 1;
  engine::register_memory(in, &in_count, &one, 1, sizeof(float), true);
  engine::register_memory(out, &out_count, &one, 1, sizeof(float), false);
  try {
    if (found == std::end(cases)) throw std::runtime_error("no such case");
    if (!block) block = found->block;
    if (!dynamic_shared_bytes) dynamic_shared_bytes = found->dynamic_shared_bytes;
    launch(found->kernel, dim3(std::max(1u, unsigned(n) / block), grid_y), block,
           dynamic_shared_bytes, nullptr, Arguments{in, out, n, broken});
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
  }
  engine::forget_memory();
}

}  // namespace emblas::simt
