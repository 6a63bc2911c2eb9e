// ms_deform_attn.cu as a C++ compiler builds it, fast: a lane has a head to itself (LANES = 1), its
// channels are the machine's own vectors, and each worker thread runs over a range of heads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#define NEAREST _MM_FROUND_TO_NEAREST_INT
#endif

#define __device__ static inline
#define __syncwarp()
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define NATIVE_VECTOR
#define LANES 1
using std::floor;

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

// The largest power of two that divides `count` and is at most `limit`.
constexpr int power_of_two(int count, int limit) {
    return limit == 1 || count % limit == 0 ? limit : power_of_two(count, limit / 2);
}
// The largest number that divides `count` and is at most `limit`.
constexpr int divisor(int count, int limit) {
    return count % limit == 0 ? limit : divisor(count, limit - 1);
}
constexpr int VECTOR = power_of_two(D, REGISTER / sizeof(REAL));
constexpr int VECTORS = divisor(D / VECTOR, 8);

typedef REAL Vector __attribute__((vector_size(sizeof(REAL) * VECTOR)));
typedef REAL GRADIENT;

// Numbers of 16 bits are converted where they are read and written, a vector at a time: by arithmetic
// that every processor has, which takes more instructions than x86's own for half precision.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
typedef float Floats __attribute__((vector_size(sizeof(float) * VECTOR)));
typedef uint32_t Bits __attribute__((vector_size(sizeof(float) * VECTOR)));
typedef uint16_t Halves __attribute__((vector_size(sizeof(uint16_t) * VECTOR)));

__device__ Floats widen(Halves x, BFloat16) {
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
}
__device__ Halves narrow(Floats x, BFloat16) {
    Bits bits = (Bits)x, nan = (Bits)(x != x);
    Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    return __builtin_convertvector(rounded | (nan & 0x7fc0), Halves);
}

// The bits of a half, moved to a float's places, are the number times 2^-112, the smallest numbers
// too. (Templates, so that only those instructions are compiled that fit the vector.)
template <typename From>
__device__ Floats widen(From x, Half) {
#ifdef __AVX512F__
    if constexpr (sizeof(x) == 32) return (Floats)_mm512_cvtph_ps((__m256i)x);
#endif
#ifdef __F16C__
    if constexpr (sizeof(x) == 16) return (Floats)_mm256_cvtph_ps((__m128i)x);
#endif
    Bits bits = __builtin_convertvector(x, Bits), magnitude = (bits & 0x7fff) << 13;
    Bits infinite = (Bits)(magnitude >= 0x7c00u << 13) & 0x7f800000;  // or NaN
    Floats scaled = (Floats)magnitude * 0x1p112f;
    return (Floats)((Bits)scaled | infinite | (bits & 0x8000) << 16);
}
template <typename From>
__device__ Halves narrow(From x, Half) {
#ifdef __AVX512F__
    if constexpr (sizeof(x) == 64) return (Halves)_mm512_cvtps_ph((__m512)x, NEAREST);
#endif
#ifdef __F16C__
    if constexpr (sizeof(x) == 32) return (Halves)_mm256_cvtps_ph((__m256)x, NEAREST);
#endif
    Bits bits = (Bits)x, nan = (Bits)(x != x), sign = bits >> 16 & 0x8000;
    Bits magnitude = bits & 0x7fffffff, large = (Bits)(magnitude >= 0x47800000);
    magnitude = (magnitude & ~large) | (large & 0x47800000);  // at most 2^16, a half's infinity
    Bits exponent = magnitude & 0x7f800000, small = (Bits)(exponent < 0x38800000);
    exponent = (exponent & ~small) | (small & 0x38800000);  // at least 2^-14, a half's smallest
    Floats step = (Floats)(exponent + (13 << 23));  // beside it, a float has a half's digits
    Floats rounded = ((Floats)magnitude + step - step) * 0x1p-112f;
    return __builtin_convertvector((Bits)rounded >> 13 | sign | (nan & 0x7fff), Halves);
}

__device__ Vector load(const REAL* pointer) {
    Vector vector;
    memcpy(&vector, pointer, sizeof(vector));
    return vector;
}
__device__ void store(REAL* pointer, Vector vector) { memcpy(pointer, &vector, sizeof(vector)); }
template <typename T>
__device__ Vector load(const T* pointer) {
    Halves halves;
    memcpy(&halves, pointer, sizeof(halves));
    return __builtin_convertvector(widen(halves, T()), Vector);
}
template <typename T>
__device__ void store(T* pointer, Vector vector) {
    Halves halves = narrow(__builtin_convertvector(vector, Floats), T());
    memcpy(pointer, &halves, sizeof(halves));
}
__device__ Vector zeros() { return Vector{}; }
__device__ void add(Vector& sum, REAL factor, Vector vector) { sum += factor * vector; }
__device__ void add(Vector& sum, Vector one, Vector other) { sum += one * other; }
__device__ void accumulate(REAL* pointer, REAL factor, Vector vector, const double*) {
    store(pointer, load(pointer) + factor * vector);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// Writes sums[c][p], the sum of vector c over its channels; I = 0 ... VECTOR - 1. Vectors are mixed by
// twos, so that one addition serves both: of every four channels {a0, b0, a1, b1} + {a2, b2, a3, b3},
// and likewise what came of a and b with what came of c and d.
template <int... I>
static inline void sum_each(const Vector (&x)[4], REAL (*sums)[POINTS], int p,
                            std::integer_sequence<int, I...>) {
    if constexpr (sizeof...(I) < 4) {
        for (int c = 0; c < 4; c++) sums[c][p] = (x[c][I] + ...);
    } else {
        Vector ab = SHUFFLE(x[0], x[1], (I / 4 * 4 + I % 4 / 2 + I % 2 * VECTOR)...) +
                    SHUFFLE(x[0], x[1], (I / 4 * 4 + I % 4 / 2 + I % 2 * VECTOR + 2)...);
        Vector cd = SHUFFLE(x[2], x[3], (I / 4 * 4 + I % 4 / 2 + I % 2 * VECTOR)...) +
                    SHUFFLE(x[2], x[3], (I / 4 * 4 + I % 4 / 2 + I % 2 * VECTOR + 2)...);
        Vector all = SHUFFLE(ab, cd, (I / 4 * 4 + I % 2 + I % 4 / 2 * VECTOR)...) +
                     SHUFFLE(ab, cd, (I / 4 * 4 + I % 2 + I % 4 / 2 * VECTOR + 2)...);
        for (int c = 0; c < 4; c++) {
            REAL sum = all[c];
            for (int i = c + 4; i < VECTOR; i += 4) sum += all[i];
            sums[c][p] = sum;
        }
    }
}
__device__ void put_sums(const Vector (&products)[4], REAL (*sums)[POINTS], int p, int) {
    sum_each(products, sums, p, std::make_integer_sequence<int, VECTOR>());
}

// Asks for memory before it is wanted, by lines of the cache.
template <typename T>
static void prefetch(const T* memory, int count) {
    for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(memory + i);
}
// Rows that are not gathered (below) lie anywhere, and each sum would wait for its own.
#define LOOK_AHEAD(rows, p) \
    if (stride != D && p + 2 < POINTS) \
        for (int c = 0; c < 4; c++) prefetch(rows + corners.offset[c][p + 2], D)

#include "ms_deform_attn.cu"

// Calls work(begin, end) for `threads` equal parts of [0, count), one of them in this thread. With
// OpenMP (backend/cpu.py decides) torch's own threads do it, which wait for work without sleeping and
// would take the processors from others. Returns false where memory ran out, or std::thread's threads
// (OpenMP ends the process without one).
template <typename Work>
static bool in_parallel(long long count, int threads, const Work& work) {
    std::atomic<bool> whole{true};
    auto part = [&](int t) {
        try {
            work(count * t / threads, count * (t + 1) / threads);
        } catch (const std::bad_alloc&) {
            whole = false;
        }
    };
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int t = 0; t < threads; t++) part(t);
#else
    std::vector<std::thread> others;
    try {
        for (int t = 1; t < threads; t++) others.emplace_back(part, t);
        part(0);
    } catch (const std::exception&) {
        whole = false;
    }
    for (std::thread& other : others) other.join();
#endif
    return whole;
}

// Asks for pages of 2 MiB under memory that is about to be written: what was just allocated would
// else be mapped, and cleared, 4 KiB at a time.
static void large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t size = 2 << 20;
    uintptr_t first = ((uintptr_t)memory + size - 1) / size * size;
    uintptr_t last = ((uintptr_t)memory + bytes) / size * size;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// A worker's memory for one head, a mapping of its own: the heap of any thread but the first has
// small pages, which cost a second thread a quarter of its time. The address sanitizer watches heaps.
#ifdef __SANITIZE_ADDRESS__
typedef std::vector<REAL> Buffer;
#else
class Buffer {
    static constexpr size_t ALIGNMENT = 2 << 20;
    size_t bytes;
    void* mapping = nullptr;

public:
    explicit Buffer(size_t count) : bytes(count ? sizeof(REAL) * count + ALIGNMENT : 0) {
        if (!count) return;
        mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (mapping == MAP_FAILED) throw std::bad_alloc();
        large_pages(data(), sizeof(REAL) * count);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        if (mapping) munmap(mapping, bytes);
    }
    REAL* data() const {
        return (REAL*)(((uintptr_t)mapping + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    }
};
#endif

// Copies a head's channels between an image's tokens, `stride` elements apart, and a buffer where
// they lie without gaps, as REAL. There neighbouring pixels share cache lines' sets no longer with
// the other heads: a query's samples mostly stay in the nearest cache until the next query wants
// them.
static void gather(const VALUE* head, REAL* buffer, int tokens, int stride) {
    for (long long t = 0; t < tokens; t++)
        for (int i = 0; i < D; i += VECTOR) store(buffer + t * D + i, load(head + t * stride + i));
}
static void scatter(const REAL* buffer, VALUE* head, int tokens, int stride) {
    for (long long t = 0; t < tokens; t++)
        for (int i = 0; i < D; i += VECTOR) store(head + t * stride + i, load(buffer + t * D + i));
}

// Whether memory is more than a part of the caches, which other data want too.
static bool too_much(size_t bytes) {
    long cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return bytes > (size_t)std::max(cache / 4, 8L << 20);
}

// Fills memory with zeros, past the caches or through them: there a store first fetches what it will
// overwrite. (Where there is no AVX, as the C library likes.)
static void clear(REAL* begin, REAL* end, bool past_caches) {
#ifdef __AVX__
    const int step = 32 / sizeof(REAL);
    if (past_caches) {
        for (; begin < end && (uintptr_t)begin % 32; begin++) *begin = 0;
        for (; end - begin >= step; begin += step) _mm256_stream_si256((__m256i*)begin, __m256i{});
        _mm_sfence();
    }
#endif
    std::fill(begin, end, (REAL)0);
}

// A head's queries lie too far apart for the processor to foresee the next: a worker asks for what
// belongs to a query this many queries before.
constexpr int LATER = 8;

// Whether samples are so many that copying every token first pays.
static bool worth_gathering(int tokens, int queries) { return 4LL * POINTS * queries > 16LL * tokens; }

// Arrays as deformable_detr.ms_deform_attn has them, work in the order of image, head, query. Any
// number of threads gives the same bits. Returns whether there was memory enough.
extern "C" bool forward(const VALUE* value, const Levels* levels, const REAL* locations,
                        const REAL* weights, VALUE* output, long long images, int tokens,
                        int queries, int heads, int threads) {
    bool gathered = worth_gathering(tokens, queries);
    large_pages(output, sizeof(VALUE) * images * queries * heads * D);
    return in_parallel(images * heads * queries, threads, [=](long long begin, long long end) {
        std::vector<Corners> corners(1);  // not on the stack: POINTS may be large
        Buffer buffer(gathered ? (size_t)tokens * D : 0);
        for (long long task = begin; task < end;) {
            long long image = task / queries / heads, head = task / queries % heads;
            const VALUE* rows = value + (image * tokens * heads + head) * D;
            if (gathered) gather(rows, buffer.data(), tokens, heads * D);
            long long stop = std::min(end, (task / queries + 1) * queries);
            for (; task < stop; task++) {
                long long item = (image * queries + task % queries) * heads + head;
                if (task + LATER < stop) {
                    long long later = item + LATER * heads;
                    prefetch(locations + later * POINTS * 2, POINTS * 2);
                    prefetch(weights + later * POINTS, POINTS);
                    prefetch(output + later * D, D);
                }
                auto run = [&](auto* from, int stride) {
                    forward_head(from, *levels, locations + item * POINTS * 2,
                                 weights + item * POINTS, output + item * D, stride, 0, corners[0]);
                };
                gathered ? run(buffer.data(), D) : run(rows, heads * D);
            }
        }
    });
}

// A worker owns whole heads of an image: no two write to one gradient of value, and the order of its
// sums, query by query, is the same for any number of workers. No gradient need hold zeros before.
// Where tokens are gathered, one buffer holds first a head's value, then its gradient; numbers of 16
// bits are summed there in any case, and rounded once.
extern "C" bool backward(const VALUE* value, const Levels* levels, const REAL* locations,
                         const REAL* weights, const VALUE* grad_output, VALUE* grad_value,
                         REAL* grad_locations, REAL* grad_weights, long long images, int tokens,
                         int queries, int heads, int threads) {
    bool gathered = worth_gathering(tokens, queries);
    bool apart = gathered || sizeof(VALUE) < sizeof(REAL);
    size_t values = (size_t)images * tokens * heads * D;
    size_t samples = (size_t)images * queries * heads * POINTS;
    large_pages(grad_value, sizeof(VALUE) * values);
    large_pages(grad_locations, sizeof(REAL) * samples * 2);
    large_pages(grad_weights, sizeof(REAL) * samples);
    bool past_caches = too_much(sizeof(VALUE) * values);
    auto clear_gradients = [=](long long begin, long long end) {
        clear((REAL*)grad_value + begin, (REAL*)grad_value + end, past_caches);
    };
    // else every token's gradient is copied there from a buffer
    if (!apart && !in_parallel(values, threads, clear_gradients)) return false;
    return in_parallel(images * heads, threads, [=](long long begin, long long end) {
        std::vector<Corners> corners(1);
        Buffer buffer(apart ? (size_t)tokens * D : 0);
        for (long long task = begin; task < end; task++) {
            long long image = task / heads, head = task % heads;
            const VALUE* rows = value + (image * tokens * heads + head) * D;
            VALUE* gradients = grad_value + (image * tokens * heads + head) * D;
            auto for_queries = [&](auto run, auto* from, REAL* to, int stride) {
                for (int query = 0; query < queries; query++) {
                    long long item = (image * queries + query) * heads + head;
                    if (query + LATER < queries) {
                        long long later = item + LATER * heads;
                        prefetch(locations + later * POINTS * 2, POINTS * 2);
                        prefetch(weights + later * POINTS, POINTS);
                        prefetch(grad_output + later * D, D);
                        if (from) prefetch(grad_locations + later * POINTS * 2, POINTS * 2);
                        if (from) prefetch(grad_weights + later * POINTS, POINTS);
                    }
                    run(from, *levels, locations + item * POINTS * 2, weights + item * POINTS,
                        grad_output + item * D, to, grad_locations + item * POINTS * 2,
                        grad_weights + item * POINTS, nullptr, stride, 0, corners[0]);
                }
            };
            if (apart) {
                if (gathered) {
                    gather(rows, buffer.data(), tokens, heads * D);
                    for_queries(backward_head<false, true, REAL>, buffer.data(), nullptr, D);
                } else {
                    for_queries(backward_head<false, true, VALUE>, rows, nullptr, heads * D);
                }
                std::fill(buffer.data(), buffer.data() + (size_t)tokens * D, (REAL)0);
                for_queries(backward_head<true, false, REAL>, (const REAL*)nullptr, buffer.data(), D);
                scatter(buffer.data(), gradients, tokens, heads * D);
            } else {
                for_queries(backward_head<true, true, VALUE>, rows, (REAL*)gradients, heads * D);
            }
        }
    });
}
