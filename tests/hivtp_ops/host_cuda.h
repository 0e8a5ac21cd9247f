// The words of CUDA that the kernel uses, for a C++ compiler: a block runs on one CPU thread.
//
// Every thread of the block has a stack of its own and runs until it meets a barrier; then the next one runs. A
// barrier lets its threads go on when all of the warp, or of the block, have come. Threads take turns in ascending or
// in descending order: where a barrier is missing, some thread reads too early in one of the two.
#include <ucontext.h>

#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __constant__ static const
// Shared memory is not cleared between blocks on a GPU, and neither is it here.
#define __shared__ static
#define __launch_bounds__(num_threads)

struct Index {
    int x;
};
static Index threadIdx, blockIdx;

namespace host {

using Kernel = void (*)(const float*, long long*, long long*);

struct Arguments {
    Kernel kernel;
    const float* importance;
    long long *kept_indices, *kept_counts;
};

enum class State { RUNS, AT_WARP_BARRIER, AT_BLOCK_BARRIER, ENDED };

struct Thread {
    ucontext_t context;
    State state;
    // What the thread shows at a barrier, and, once released, the sum of what all that came there show.
    unsigned value;
    std::unique_ptr<char[]> stack;
};

constexpr int STACK_BYTES = 32 * 1024;
static std::vector<Thread> threads;
static ucontext_t scheduler;
static Arguments arguments;

static unsigned wait(State barrier, unsigned value = 0) {
    Thread& thread = threads[threadIdx.x];
    thread.state = barrier;
    thread.value = value;
    swapcontext(&thread.context, &scheduler);
    return thread.value;
}

static void run_thread() {
    arguments.kernel(arguments.importance, arguments.kept_indices, arguments.kept_counts);
    threads[threadIdx.x].state = State::ENDED;
}

// Lets the threads from `first` up to `end` go on if all of them wait at this barrier.
static bool release(State barrier, int first, int end) {
    unsigned sum = 0;
    for (int thread = first; thread < end; ++thread) {
        if (threads[thread].state != barrier) return false;
        sum += threads[thread].value;
    }
    for (int thread = first; thread < end; ++thread) {
        threads[thread].state = State::RUNS;
        threads[thread].value = sum;
    }
    return true;
}

// Gives false if threads wait at a barrier to which others never come.
static bool run_block(int num_threads, bool is_descending) {
    for (Thread& thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = &scheduler;
        thread.state = State::RUNS;
        makecontext(&thread.context, run_thread, 0);
    }
    for (bool goes_on = true; goes_on;) {
        for (int turn = 0; turn < num_threads; ++turn) {
            threadIdx.x = is_descending ? num_threads - 1 - turn : turn;
            Thread& thread = threads[threadIdx.x];
            if (thread.state == State::RUNS) swapcontext(&scheduler, &thread.context);
        }
        goes_on = release(State::AT_BLOCK_BARRIER, 0, num_threads);
        for (int warp = 0; warp < num_threads; warp += 32)
            goes_on |= release(State::AT_WARP_BARRIER, warp, warp + 32);
    }
    for (const Thread& thread : threads)
        if (thread.state != State::ENDED) return false;
    return true;
}

static bool launch(const Arguments& launched, int num_blocks, int num_threads, bool is_descending) {
    arguments = launched;
    threads.clear();
    threads.resize(num_threads);
    for (Thread& thread : threads) thread.stack.reset(new char[STACK_BYTES]);
    for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x)
        if (!run_block(num_threads, is_descending)) return false;
    return true;
}

}  // namespace host

static inline void __syncthreads() { host::wait(host::State::AT_BLOCK_BARRIER); }
static inline int __syncthreads_count(bool is_counted) {
    return host::wait(host::State::AT_BLOCK_BARRIER, is_counted);
}
static inline unsigned __ballot_sync(unsigned lanes, bool is_set) {
    return lanes & host::wait(host::State::AT_WARP_BARRIER, unsigned(is_set) << threadIdx.x % 32);
}
static inline int __reduce_add_sync(unsigned, int value) { return host::wait(host::State::AT_WARP_BARRIER, value); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int min(int a, int b) { return a < b ? a : b; }

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
