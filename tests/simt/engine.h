// The SIMT emulator's engine: runs a grid block by block, every thread of a block as a fiber on one
// OS thread, and checks every memory access and every barrier. tests/simt/README.md explains how.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emblas::simt::engine {

using Site = std::source_location;

// --- the running thread ----------------------------------------------------------------------

struct Indices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Indices self;  // changes at every fiber switch
unsigned lane();      // of the running thread in its warp

// --- launching -------------------------------------------------------------------------------

struct Kernel {
  const void* address;   // names the kernel in messages
  void (*enter)(void*);  // calls it with the arguments in `call`
  void* call;
  size_t call_bytes;
};
// Throws std::runtime_error with the first fault found.
void run(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes);

// --- synchronization -------------------------------------------------------------------------

void block_barrier(const Site& site);
void warp_barrier(uint32_t mask, const Site& site);

struct Lane {
  const void* in;
  void* out;
};
// Every lane of `mask` gives `in` and takes `out`; the last to arrive runs `finish` for all.
using Finish = void (*)(const Lane (&lanes)[32], uint32_t mask);
void collective(const char* name, uint32_t mask, Finish finish, const void* in, void* out,
                const Site& site);

// --- memory ----------------------------------------------------------------------------------

// Shared memory of the running block; `tag` tells one array from another.
void* shared_array(const void* tag, size_t bytes, const char* name);
void* dynamic_shared();

enum class Kind : uint8_t { read, write, atomic };
// One access of the running thread; `align` is what the hardware asks for.
void access(const void* address, size_t bytes, size_t align, Kind kind, const Site& site);

// Adds to what the launch has computed.
enum class Operation { popcount, tensor_flop };
void count_operations(Operation operation, uint64_t count);

void copy_async(void* to, const void* from, size_t bytes, size_t valid_bytes, const Site& site);
void commit_async();
void wait_async(unsigned pending_groups, const Site& site);

// Between these two the accesses of the running code are the engine's own and not checked.
void enter_engine();
void leave_engine();

[[noreturn]] void fail(const char* kind, const char* detail, const Site& site);

// --- host side -------------------------------------------------------------------------------

// Memory that kernels may touch: a strided view, byte by byte, until forget_memory().
void register_memory(const void* data, const int64_t* sizes, const int64_t* strides, int64_t dims,
                     size_t element_bytes, bool initialized);
void forget_memory();

}  // namespace emblas::simt::engine
