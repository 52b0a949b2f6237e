// What the two halves of the engine (engine.cpp: threads, memory.cpp: accesses) know of each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"

namespace emblas::simt::engine {

// A cp.async copy that was issued and not yet waited for.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid_bytes;
  unsigned group;
};

enum class State : uint8_t { ready, at_barrier, in_collective, finished };

struct Fiber {
  void* stack_pointer;
  State state;
  uint16_t index;  // in the block
  uint3 thread;
  // What it waits for.
  Site site;
  const char* what;
  uint32_t mask;
  Lane exchange;
  // Happens-before inside a warp: clock[l] is the last __syncwarp of lane l that this thread knows
  // of, counted by that lane; its own entry is its present time.
  uint16_t clock[32];
  std::vector<Copy> copies;
  unsigned groups_committed;
};

struct Options {
  int order = 0;  // 0 forward, 1 reverse, 2 random
  uint64_t seed = 0;
  double preemption = 0;  // probability that a thread is interrupted at an access
  bool check_uninitialized = true;
  bool check_races = true;
};
extern Options options;
uint64_t random_bits();

extern Fiber* current;                      // null on the host
extern bool in_engine;                      // accesses are the engine's own
extern uint32_t stamp;                      // grows at every launch, block and block barrier
extern uint32_t block_stamp, launch_stamp;  // the stamps at which these began
extern const Kernel* running;

void yield();  // lets other threads run; the caller stays ready

// Ends the block with this message; pc (or site) tells the source line.
[[noreturn]] void stop(std::string message, const void* pc, const Site* site);

bool on_fiber_stack(uintptr_t address);
void begin_launch_memory(const Kernel& kernel);
void begin_block_memory(size_t dynamic_bytes);

std::string source_of(const void* pc);  // "function at file:line" by addr2line
std::string function_of(const void* pc);

inline constexpr size_t kSharedLimit = 99 << 10;        // a block, sm_86 to sm_120: the smallest
inline constexpr size_t kStaticSharedLimit = 48 << 10;  // without opting in

}  // namespace emblas::simt::engine
