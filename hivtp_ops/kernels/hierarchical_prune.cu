// The HIVTP rule (arXiv 2509.23663) in one launch: a block takes a tile, scores in, kept patches out.
//
// `hivtp_ops.select` defines it, and hivtp_ops/kernel.py writes the constants of one grid and spec in front of this
// file: ROWS, COLS, REGIONS, QUOTAS (one per region), WINDOW, CAPACITY, IS_EXACT and NUM_THREADS.
// docs/kernel.md explains the steps.

constexpr int NUM_PATCHES = ROWS * COLS;
constexpr int NUM_REGIONS = REGIONS * REGIONS;
constexpr int WINDOWS_ACROSS = (COLS + WINDOW - 1) / WINDOW;
constexpr int NUM_WINDOWS = (ROWS + WINDOW - 1) / WINDOW * WINDOWS_ACROSS;
constexpr int PATCHES_PER_THREAD = (NUM_PATCHES + NUM_THREADS - 1) / NUM_THREADS;
constexpr int WARP = 32;
constexpr int LARGEST_REGION = ((ROWS + REGIONS - 1) / REGIONS) * ((COLS + REGIONS - 1) / REGIONS);
// Keys of a region that a lane holds in registers, since each step of a search compares them; the others it reads.
constexpr int HELD_PER_LANE = LARGEST_REGION > 8 * WARP ? 8 : (LARGEST_REGION + WARP - 1) / WARP;
constexpr int NUM_WORDS = (NUM_PATCHES + WARP - 1) / WARP;
constexpr unsigned ALL_LANES = ~0u;

// A patch's key is its stage, then its cost, which is lower for a better score, then its raster index. Keys are
// unique, and their order is the one in which patches are kept.
using Key = unsigned long long;
constexpr int COST_BITS = 32;
constexpr int PATCH_BITS = 12;
constexpr int KEY_BITS = 2 + COST_BITS + PATCH_BITS;
constexpr Key STAGE = Key(1) << (COST_BITS + PATCH_BITS);
constexpr Key GLOBAL = 0 * STAGE;
constexpr Key LOCAL = 1 * STAGE;
constexpr Key REST = 2 * STAGE;
constexpr Key NEVER = ~Key(0);
static_assert(NUM_PATCHES <= 1 << PATCH_BITS, "a raster index must fit into the key");

constexpr unsigned COST_OF_MINUS_INFINITY = 0xff800000u;

__device__ Key key_of(float score, int patch) {
    unsigned bits = __float_as_uint(score);
    // -0 equals 0.
    if (bits == 0x80000000u) bits = 0;
    // Negative floats grow as their bits fall, positive ones as their bits grow; these are turned round.
    const unsigned cost = bits & 0x80000000u ? bits : bits ^ 0x7fffffffu;
    return cost < COST_OF_MINUS_INFINITY ? REST | Key(cost) << PATCH_BITS | Key(patch) : NEVER;
}

__device__ int patch_in(Key key) { return int(key) & ((1 << PATCH_BITS) - 1); }

// Finds a limit that `num` keys are below, or all of them where there are fewer, by trying its bits from the top.
// `num_below` counts the keys below a limit; whoever takes part in it gets the same limit.
template <typename NumBelow>
__device__ Key limit_after(int num, NumBelow num_below) {
    Key limit = 0;
    for (Key bit = Key(1) << (KEY_BITS - 1); bit > 0; bit /= 2) {
        const int found = num_below(limit + bit);
        if (found <= num) limit += bit;
        if (found == num) break;
    }
    return limit;
}

// A region's patches take slots in a row, regions in raster order, and so do the patches in each.
struct Region {
    int top, left, height, width;

    __device__ Region(int down, int across)
        : top(down * ROWS / REGIONS),
          left(across * COLS / REGIONS),
          height((down + 1) * ROWS / REGIONS - top),
          width((across + 1) * COLS / REGIONS - left) {}

    __device__ int first_slot() const { return top * COLS + height * left; }
    __device__ int end_slot() const { return first_slot() + height * width; }
};

// Region i of an axis ends before floor((i + 1) * size / REGIONS), so this is the first that ends after `place`.
__device__ int region_along(int place, int size) { return ((place + 1) * REGIONS - 1) / size; }

__device__ int slot_of(int patch) {
    const int row = patch / COLS, col = patch % COLS;
    const Region region(region_along(row, ROWS), region_along(col, COLS));
    return region.first_slot() + (row - region.top) * region.width + col - region.left;
}

// importance [tiles, NUM_PATCHES], kept_indices [tiles, CAPACITY], kept_counts [tiles]; a block for each tile.
extern "C" __global__ void __launch_bounds__(NUM_THREADS) hierarchical_prune(
    const float* __restrict__ importance, long long* __restrict__ kept_indices, long long* __restrict__ kept_counts) {
    __shared__ Key keys[NUM_PATCHES];
    __shared__ unsigned short slots[NUM_PATCHES];
    __shared__ unsigned kept_bits[NUM_WORDS];
    __shared__ int kept_before[NUM_WORDS + 1];
    const int thread = threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const long long tile = blockIdx.x;

    for (int patch = thread; patch < NUM_PATCHES; patch += NUM_THREADS) {
        const int slot = slot_of(patch);
        slots[patch] = slot;
        keys[slot] = key_of(importance[tile * NUM_PATCHES + patch], patch);
    }
    __syncthreads();

    // Global stage: a warp finds the limit of a region.
    for (int number = warp; number < NUM_REGIONS; number += NUM_THREADS / WARP) {
        const Region region(number / REGIONS, number % REGIONS);
        const int first = region.first_slot() + lane, end = region.end_slot();
        Key held[HELD_PER_LANE];
#pragma unroll
        for (int i = 0; i < HELD_PER_LANE; ++i) held[i] = first + i * WARP < end ? keys[first + i * WARP] : NEVER;
        const Key limit = limit_after(QUOTAS[number], [&](Key bound) {
            int num = 0;
#pragma unroll
            for (int i = 0; i < HELD_PER_LANE; ++i) num += held[i] < bound;
            if (LARGEST_REGION > HELD_PER_LANE * WARP)
                for (int slot = first + HELD_PER_LANE * WARP; slot < end; slot += WARP) num += keys[slot] < bound;
            return __reduce_add_sync(ALL_LANES, num);
        });
        for (int slot = first; slot < end; slot += WARP)
            if (keys[slot] < limit) keys[slot] += GLOBAL - REST;
    }
    __syncthreads();

    // Local stage: a thread finds the best patch of a window that is free.
    for (int window = thread; window < NUM_WINDOWS; window += NUM_THREADS) {
        const int top = window / WINDOWS_ACROSS * WINDOW, left = window % WINDOWS_ACROSS * WINDOW;
        Key best = NEVER;
        for (int row = top; row < min(top + WINDOW, ROWS); ++row)
            for (int col = left; col < min(left + WINDOW, COLS); ++col) {
                const Key key = keys[slots[row * COLS + col]];
                if (key >= REST && key < best) best = key;
            }
        if (best != NEVER) keys[slots[patch_in(best)]] += LOCAL - REST;
    }
    __syncthreads();

    // Exact count: the block finds the limit of the tile.
    Key own[PATCHES_PER_THREAD];
#pragma unroll
    for (int i = 0; i < PATCHES_PER_THREAD; ++i) {
        const int patch = thread + i * NUM_THREADS;
        own[i] = patch < NUM_PATCHES ? keys[slots[patch]] : NEVER;
    }
    Key limit = REST;
    if (IS_EXACT)
        limit = limit_after(CAPACITY, [&](Key bound) {
            int num = 0;
#pragma unroll
            for (int i = 0; i < PATCHES_PER_THREAD; ++i) num += __syncthreads_count(own[i] < bound);
            return num;
        });

    // Raster order: the place of a kept patch is the number of bits before its own.
#pragma unroll
    for (int i = 0; i < PATCHES_PER_THREAD; ++i) {
        const int word = (thread + i * NUM_THREADS) / WARP;
        const unsigned bits = __ballot_sync(ALL_LANES, own[i] < limit);
        if (lane == 0 && word < NUM_WORDS) kept_bits[word] = bits;
    }
    __syncthreads();
    for (int word = thread; word <= NUM_WORDS; word += NUM_THREADS) {
        int num_before = 0;
        for (int i = 0; i < word; ++i) num_before += __popc(kept_bits[i]);
        kept_before[word] = num_before;
    }
    __syncthreads();
    long long* indices = kept_indices + tile * CAPACITY;
#pragma unroll
    for (int i = 0; i < PATCHES_PER_THREAD; ++i) {
        const int patch = thread + i * NUM_THREADS, word = patch / WARP;
        if (own[i] < limit) indices[kept_before[word] + __popc(kept_bits[word] & ((1u << lane) - 1))] = patch;
    }
    const int count = kept_before[NUM_WORDS];
    for (int i = count + thread; i < CAPACITY; i += NUM_THREADS) indices[i] = -1;
    if (thread == 0) kept_counts[tile] = count;
}
