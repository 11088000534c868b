// Runs the source of a CUDA kernel on the CPU, to test it where there is no GPU.
//
// Every CUDA thread is a fiber. An OS thread holds several blocks at once and resumes their fibers in random order;
// several OS threads do so concurrently, so blocks really race for tickets and published words. A forgotten barrier, a
// wrong index, a deadlock, a misaligned vector, a read of shared memory that nobody wrote (it starts as NaN) or of
// global memory out of bounds (under a sanitizer) shows. What does not show: the GPU's memory model, its scheduler, the
// accuracy of __expf, speed.
#pragma once

#include <sched.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define MEGATRON_FIPO_PARAMETER const
#define MEGATRON_FIPO_SHARED(type, name) type& name = *emulator::shared_memory<type>()
#define MEGATRON_FIPO_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), emulator::launch(static_cast<unsigned>(blocks), threads, [&] { kernel(__VA_ARGS__); }))

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef int cudaError_t;
inline int cudaGetLastError() { return 0; }

namespace emulator {

constexpr int kMaxThreads = 128, kStackBytes = 128 * 1024;
constexpr int kResidentBlocks = 4, kWorkers = 3;

struct Settings {
  unsigned seed = 1;
};
inline Settings& settings() {
  static Settings s;
  return s;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::_Exit(3);
}

struct Random {
  uint64_t state;
  unsigned operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>(state >> 33);
  }
};

struct Warp {
  uint64_t slots[2][32];   // two sets: a lane may enter the next collective while others still read this one's
  int arrived = 0, alive = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::vector<Copy> copies;   // asynchronous, not yet waited for
  bool done = true;
};

struct Block {
  std::vector<Fiber> fibers{kMaxThreads};
  Warp warps[kMaxThreads / 32];
  unsigned index = 0, current = 0, generation = 0;
  int threads = 0, arrived = 0, alive = 0;
  std::unique_ptr<char[]> shared;
};

template <class Body>
struct Launch {
  Body* body;
  unsigned blocks;
  int threads;
  std::atomic<unsigned> next{0};
};

struct Worker {
  ucontext_t scheduler;
  Random random{1};
  Block* block = nullptr;
  void (*run)(void*) = nullptr;
  void* launch = nullptr;
};
inline Worker& worker() {
  static thread_local Worker w;
  return w;
}

__attribute__((noinline)) inline void yield() {
  Worker& w = worker();
  swapcontext(&w.block->fibers[w.block->current].context, &w.scheduler);
}

// A thread may also fall far behind the others.
inline void stall() {
  const int rounds = worker().random() % 6 == 0 ? 60 : 1;
  for (int i = 0; i < rounds; ++i) yield();
}

inline void enter_fiber() {
  Worker& w = worker();
  w.run(w.launch);
  Block& block = *w.block;
  block.fibers[block.current].done = true;
  --block.alive;
  --block.warps[block.current / 32].alive;
  setcontext(&w.scheduler);
}

inline void start(Block& block, unsigned index, int threads) {
  block.index = index;
  block.threads = block.alive = threads;
  block.arrived = 0;
  block.shared.reset();
  for (Warp& warp : block.warps) warp.arrived = warp.alive = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
    ++block.warps[i / 32].alive;
  }
}

template <class Body>
void work(Launch<Body>& launch, uint64_t seed) {
  Worker& w = worker();
  w.launch = &launch;
  w.run = [](void* p) { (*static_cast<Launch<Body>*>(p)->body)(); };
  w.random.state = seed;
  Random& random = w.random;
  std::unique_ptr<Block[]> blocks(new Block[kResidentBlocks]);
  std::vector<Block*> idle, resident;
  for (int i = 0; i < kResidentBlocks; ++i) idle.push_back(&blocks[i]);
  std::vector<int> order(launch.threads);
  for (int i = 0; i < launch.threads; ++i) order[i] = i;
  bool more = true;
  while (more || !resident.empty()) {
    if (more && !idle.empty() && (resident.empty() || random() % 8 == 0)) {
      const unsigned index = launch.next++;
      more = index < launch.blocks;
      if (more) {
        start(*idle.back(), index, launch.threads);
        resident.push_back(idle.back());
        idle.pop_back();
      }
    }
    if (resident.empty()) continue;
    const size_t which = random() % resident.size();
    w.block = resident[which];
    for (int i = launch.threads - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    for (int i : order) {
      if (w.block->fibers[i].done) continue;
      w.block->current = static_cast<unsigned>(i);
      swapcontext(&w.scheduler, &w.block->fibers[i].context);
    }
    if (w.block->alive == 0) {
      idle.push_back(w.block);
      resident.erase(resident.begin() + static_cast<long>(which));
    } else if (random() % 16 == 0) {
      sched_yield();
    }
  }
}

template <class Body>
void launch(unsigned blocks, int threads, Body body) {
  Launch<Body> launch{&body, blocks, threads};
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < std::min<unsigned>(kWorkers, blocks); ++i)
    workers.emplace_back([&launch, i] { work(launch, settings().seed * 7919u + i); });
  for (std::thread& t : workers) t.join();
}

template <class T>
T* shared_memory() {
  Block& block = *worker().block;
  if (!block.shared) {
    block.shared.reset(new char[sizeof(T) + 16]);
    std::memset(block.shared.get(), 0xff, sizeof(T) + 16);
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block.shared.get()) + 15) / 16 * 16);
}

inline void wait(int& arrived, const int& alive, unsigned& generation) {
  const unsigned mine = generation;
  if (++arrived == alive) {
    arrived = 0;
    ++generation;
  } else {
    while (generation == mine) yield();
  }
}

// Every lane brings a value and picks from what all lanes of its warp brought.
template <class T, class Pick>
T collective(T value, Pick pick) {
  static_assert(sizeof(T) <= 8, "");
  Block& block = *worker().block;
  Warp& warp = block.warps[block.current / 32];
  uint64_t* slots = warp.slots[warp.generation & 1];
  std::memcpy(&slots[block.current % 32], &value, sizeof(T));
  wait(warp.arrived, warp.alive, warp.generation);
  const auto of_lane = [slots](int lane) {
    T v;
    std::memcpy(&v, &slots[lane & 31], sizeof(T));
    return v;
  };
  return pick(of_lane, static_cast<int>(worker().block->current % 32));
}

struct Index {
  unsigned x;
};

template <class T>
void check_aligned(const T* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned vector access");
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::worker().block->current})
#define blockIdx (emulator::Index{emulator::worker().block->index})

inline void __syncthreads() {
  emulator::Block& block = *emulator::worker().block;
  emulator::wait(block.arrived, block.alive, block.generation);
}
inline void __syncwarp() {
  emulator::Block& block = *emulator::worker().block;
  emulator::Warp& warp = block.warps[block.current / 32];
  emulator::wait(warp.arrived, warp.alive, warp.generation);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_sync(unsigned, T v, int from) {
  return emulator::collective(v, [=](auto of, int) { return of(from); });
}
template <class T>
T __shfl_down_sync(unsigned, T v, int distance) {
  return emulator::collective(v, [=](auto of, int lane) { return of(lane + distance < 32 ? lane + distance : lane); });
}
template <class T>
T __shfl_up_sync(unsigned, T v, int distance) {
  return emulator::collective(v, [=](auto of, int lane) { return of(lane >= distance ? lane - distance : lane); });
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulator::collective(v, [=](auto of, int lane) { return of(lane ^ mask); });
}
inline unsigned __reduce_add_sync(unsigned, unsigned v) {
  return emulator::collective(v, [](auto of, int) {
    unsigned sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += of(lane);
    return sum;
  });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  return emulator::collective(static_cast<unsigned>(predicate), [](auto of, int) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= of(lane) << lane;
    return bits;
  });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline float __expf(float x) { return std::exp2(x * 1.44269504f); }

template <class To, class From>
To emulated_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  std::memcpy(&r, &v, sizeof(r));
  return r;
}
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline long long __double_as_longlong(double v) { return emulated_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emulated_bits<double>(v); }

// Everything that blocks do to each other is a point where the scheduler may switch, before and after.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  emulator::stall();
  const unsigned before = __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
  emulator::stall();
  return before;
}
inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }

namespace megatron_fipo::cuda {

template <class T>
T load_stream(const T* p) {
  emulator::check_aligned(p, sizeof(T));
  return *p;
}
inline void store_vector(float4* p, float4 v) {
  emulator::check_aligned(p, sizeof(v));
  *p = v;
}

template <int kBytes>
void async_copy(void* shared, const void* global, int valid) {
  emulator::check_aligned(static_cast<const char*>(global), kBytes);
  emulator::check_aligned(static_cast<const char*>(shared), kBytes);
  emulator::Block& block = *emulator::worker().block;
  block.fibers[block.current].copies.push_back({shared, global, kBytes, valid});
}
inline void async_wait() {
  emulator::Block& block = *emulator::worker().block;
  for (const emulator::Copy& copy : block.fibers[block.current].copies) {
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
  }
  block.fibers[block.current].copies.clear();
}

inline void store_relaxed(uint64_t* p, uint64_t v) {
  emulator::stall();
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  emulator::stall();
}
inline uint64_t load_relaxed(const uint64_t* p) {
  emulator::yield();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

inline float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

}  // namespace megatron_fipo::cuda
