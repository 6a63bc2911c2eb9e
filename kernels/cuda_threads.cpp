// ms_deform_attn.cu as a GPU runs it, slowly: every CUDA thread is a thread of the operating
// system, with real barriers, shuffles and atomic additions. For tests and for chapters
// cuda_kernel and making_it_fast.
//
// C++20. Macros as for the GPU (deformable_detr.ops.cuda.specialise), and of its own:
//
//   TRACE    write down who touches which address of value, output and their gradients
//   RACE     add without atomics: wrong, to be seen
//   PROGRAM  a main() for ThreadSanitizer, whose sums one knows

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdio>
#include <deque>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

// ---- CUDA's words ----

#define __global__
#define __device__ static inline
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(threads)
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
using std::floor;
using std::llrint;

struct Index {
    int x, y;
};
static thread_local Index threadIdx, blockIdx;

constexpr int WARP = 32;
constexpr int THREADS = LANES * GROUPS;  // of a block

struct Warp {
    std::barrier<> barrier;
    std::atomic<REAL> held[WARP];
    std::atomic<int> met[WARP] = {};  // for each head, how many came to a shuffle, all in all
    explicit Warp(int threads) : barrier(threads) {}
};
static thread_local Warp* warp;

__device__ int thread_of_block() { return threadIdx.x + threadIdx.y * LANES; }

__device__ void __syncwarp() { warp->barrier.arrive_and_wait(); }

// The lanes of a head wait for one another.
__device__ void meet() {
#if defined(PROGRAM) && defined(__x86_64__)
    // For ThreadSanitizer without any order of memory, which CUDA's shuffles do not promise: else it
    // would not see where a __syncwarp is missing. Other processors need the order, to be right.
    std::atomic<int>& met = warp->met[thread_of_block() % WARP / LANES];
    int all = (met.fetch_add(1, std::memory_order_relaxed) / LANES + 1) * LANES;
    while (met.load(std::memory_order_relaxed) < all) std::this_thread::yield();
#else
    __syncwarp();
#endif
}

// What the lane holds whose number differs in the bits of `step`; with step < width it is one of
// the same `width` lanes.
__device__ REAL __shfl_xor_sync(unsigned, REAL x, int step, int) {
    int lane = thread_of_block() % WARP;
    warp->held[lane].store(x, std::memory_order_relaxed);
    meet();
    REAL other = warp->held[lane ^ step].load(std::memory_order_relaxed);
    meet();  // before anyone overwrites what another has yet to read
    return other;
}

template <typename T>
static void atomicAdd(T* pointer, T x) {
#ifdef RACE
    T read = *pointer;
    std::this_thread::yield();  // as the scheduler does now and then
    *pointer = read + x;
#else
    std::atomic_ref<T>(*pointer).fetch_add(x, std::memory_order_relaxed);
#endif
}

__device__ float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
__device__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

// binary16 has 5 bits of exponent, 10 of fraction; float has 8 and 23.
__device__ float half_to_float(unsigned short bits) {
    unsigned magnitude = (bits & 0x7fffu) << 13;
    bool finite = (bits & 0x7c00) != 0x7c00;
    float x = __uint_as_float(finite ? magnitude : magnitude | 0x7f800000);
    if (finite) x *= 0x1p112f;  // exact, also where x is subnormal
    return bits & 0x8000 ? -x : x;
}

// To nearest, ties to even, as the GPU's own instruction.
__device__ unsigned short float_to_half(float x) {
    unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffff, result;
    if (magnitude > 0x7f800000)
        return 0x7fff;  // NaN
    else if (magnitude >= 0x477ff000)
        result = 0x7c00;  // from 65520 on: infinity
    else if (magnitude < 0x38800000)  // below 2^-14 steps are 2^-24, as a float's beside 0.5
        result = __float_as_uint(std::fabs(x) + 0.5f) - 0x3f000000;
    else
        result = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    return (bits >> 16 & 0x8000) | result;
}

// ---- The trace ----

#ifdef TRACE
struct Access {
    const void* address;
    int block, thread, bytes;
    char kind;  // 'r' read, 'w' write, 'a' atomic addition
};
static std::vector<Access> accesses[THREADS];

__device__ void record(const void* pointer, int bytes, char kind) {
    int thread = thread_of_block();
    accesses[thread].push_back({pointer, blockIdx.x, thread, bytes, kind});
}
#define RECORD(pointer, bytes, kind) record(pointer, bytes, kind)

// Moves what was recorded since the last call to `target`, thread after thread, and returns how
// many these are; a null target only counts.
extern "C" long long take_trace(Access* target) {
    long long count = 0;
    for (std::vector<Access>& own : accesses) {
        if (target) std::copy(own.begin(), own.end(), target + count);
        count += own.size();
        if (target) own.clear();
    }
    return count;
}
#endif

#include "ms_deform_attn.cu"

// ---- Launching ----

// One block; its threads start in a random order.
template <typename Kernel>
static void run_block(int block, std::mt19937& random, const Kernel& kernel) {
    std::deque<Warp> warps;
    for (int first = 0; first < THREADS; first += WARP)
        warps.emplace_back(std::min(WARP, THREADS - first));
    std::vector<int> order(THREADS);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::thread> threads;
    for (int t : order)
        threads.emplace_back([&warps, &kernel, block, t] {
            blockIdx = {block, 0};
            threadIdx = {t % LANES, t / LANES};
            warp = &warps[t / WARP];
            kernel();
            warp->barrier.arrive_and_drop();  // the others wait no longer for who has returned
        });
    for (std::thread& thread : threads) thread.join();
}

// Blocks [begin, end) one after another, in a random order: a GPU promises none.
template <typename Kernel>
static void launch(int begin, int end, unsigned seed, const Kernel& kernel) {
    std::mt19937 random(seed);
    std::vector<int> blocks(end - begin);
    std::iota(blocks.begin(), blocks.end(), begin);
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (int block : blocks) run_block(block, random, kernel);
}

extern "C" void launch_forward(int begin, int end, unsigned seed, const VALUE* value,
                               const Levels* levels, const REAL* locations, const REAL* weights,
                               VALUE* output, long long items, int tokens, int queries, int heads) {
    launch(begin, end, seed, [=] {
        forward(value, *levels, locations, weights, output, items, tokens, queries, heads);
    });
}

extern "C" void launch_backward(int begin, int end, unsigned seed, const VALUE* value,
                                const Levels* levels, const REAL* locations, const REAL* weights,
                                const VALUE* grad_output, GRADIENT* grad_value,
                                REAL* grad_locations, REAL* grad_weights, const double* scale,
                                long long items, int tokens, int queries, int heads) {
    launch(begin, end, seed, [=] {
        backward(value, *levels, locations, weights, grad_output, grad_value, grad_locations,
                 grad_weights, scale, items, tokens, queries, heads);
    });
}

#ifdef PROGRAM
// Forward and backward of two images, for VALUE float or double. All samples lie in the middle of a
// map of 2 x 2 pixels, with a quarter of their weight, 4, on each; the output's gradients are 1. So
// each number of value's gradient is a count, queries times POINTS. Prints the right number, then
// all of them.
int main() {
    const int images = 2, tokens = 4, queries = GROUPS, heads = 1;
    const int items = images * queries * heads, blocks = (items + GROUPS - 1) / GROUPS;
    Levels levels;
    std::fill_n(levels.height, POINTS, 2);
    std::fill_n(levels.width, POINTS, 2);
    std::fill_n(levels.start, POINTS, 0);
    std::vector<VALUE> value(images * tokens * heads * D, 1);
    std::vector<VALUE> output(items * D), grad_output(items * D, 1);
    std::vector<REAL> locations(items * POINTS * 2, (REAL)0.5), weights(items * POINTS, 4);
    std::vector<REAL> grad_locations(locations.size()), grad_weights(weights.size());
    std::vector<GRADIENT> grad_value(value.size());
    const double scale = 1;
    launch_forward(0, blocks, 0, value.data(), &levels, locations.data(), weights.data(),
                   output.data(), items, tokens, queries, heads);
    launch_backward(0, blocks, 0, value.data(), &levels, locations.data(), weights.data(),
                    grad_output.data(), grad_value.data(), grad_locations.data(),
                    grad_weights.data(), &scale, items, tokens, queries, heads);
    printf("%d\n", queries * POINTS);
    for (GRADIENT sum : grad_value) printf("%.0f\n", (double)sum);
}
#endif
