// Multi-scale deformable attention, forward and backward: the inner sums of Eq. 3 in
// "Deformable DETR" (Zhu et al., 2021). Chapters cuda_kernel and making_it_fast read this file
// line by line.
//
// The one source of every kernel. NVRTC builds it for a GPU; a C++ compiler builds the same text for
// a CPU, either fast (cpu.cpp) or with one operating-system thread for every CUDA thread
// (cuda_threads.cpp). The build sets, as macros:
//
//   VALUE    type of value and output: float, double, Half or BFloat16
//   REAL     type of coordinates, weights, sums and gradients: float, or double where VALUE is
//   OFFSET   int, or long long where one image's value has 2^31 elements or more
//   D        channels of a head
//   POINTS   samples of a query and head, L * K
//   VECTOR   channels that are loaded at once; divides D
//   VECTORS  vectors of a lane that are summed at once
//   LANES    lanes (threads) that share a head; a power of two, at most 32
//   GROUPS   heads in a block of LANES * GROUPS threads
//
// Two phases. In the first a lane takes a point: where are its four corners, and what are their
// weights? In the second a lane takes a vector of channels, and runs over all points. So a head's
// lanes compute no point twice, and side by side read one corner's channels as one piece of memory.
// Backward has a third, again a lane a point, for the gradients of locations and weights.

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define KEEP_LOOP _Pragma("unroll 1")  // unrolled, points need registers that there are not

__device__ float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

#ifndef RECORD  // cuda_threads.cpp writes down who touches which address
#define RECORD(pointer, bytes, kind)
#endif
#ifndef KEEP_LOOP
#define KEEP_LOOP
#endif
#ifndef LOOK_AHEAD  // cpu.cpp asks for a later point's rows; a GPU has other warps to run meanwhile
#define LOOK_AHEAD(rows, p)
#endif

// ---- A vector of channels, held in registers. cpu.cpp has the machine's own. ----

#ifndef NATIVE_VECTOR
#define WHOLE_WARP 0xffffffffu

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};
__device__ float to_real(float x) { return x; }
__device__ double to_real(double x) { return x; }
__device__ float to_real(Half x) { return half_to_float(x.bits); }
__device__ float to_real(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void from_real(float x, float& y) { y = x; }
__device__ void from_real(double x, double& y) { y = x; }
__device__ void from_real(float x, Half& y) { y.bits = float_to_half(x); }
__device__ void from_real(float x, BFloat16& y) {
    unsigned bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y.bits = nan ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}

struct Vector {
    REAL channel[VECTOR];
};
struct alignas(sizeof(VALUE) * VECTOR) Packed {
    VALUE channel[VECTOR];
};

// One load of sizeof(VALUE) * VECTOR bytes.
__device__ Vector load(const VALUE* pointer) {
    RECORD(pointer, sizeof(Packed), 'r');
    Packed packed = *(const Packed*)pointer;
    Vector vector;
    UNROLL
    for (int i = 0; i < VECTOR; i++) vector.channel[i] = to_real(packed.channel[i]);
    return vector;
}

__device__ void store(VALUE* pointer, const Vector& vector) {
    RECORD(pointer, sizeof(Packed), 'w');
    Packed packed;
    UNROLL
    for (int i = 0; i < VECTOR; i++) from_real(vector.channel[i], packed.channel[i]);
#ifdef __CUDACC__  // an assignment would be a store for every channel of the 16 bytes
    if (sizeof(packed) == 16) return __stwb((uint4*)pointer, *(const uint4*)&packed);
#endif
    *(Packed*)pointer = packed;
}

__device__ Vector zeros() {
    Vector vector;
    UNROLL
    for (int i = 0; i < VECTOR; i++) vector.channel[i] = 0;
    return vector;
}

// sum += factor * vector
__device__ void add(Vector& sum, REAL factor, const Vector& vector) {
    UNROLL
    for (int i = 0; i < VECTOR; i++) sum.channel[i] += factor * vector.channel[i];
}

// sum += one * other, channel by channel
__device__ void add(Vector& sum, const Vector& one, const Vector& other) {
    UNROLL
    for (int i = 0; i < VECTOR; i++) sum.channel[i] += one.channel[i] * other.channel[i];
}

__device__ REAL total(const Vector& vector) {
    REAL sum = 0;
    UNROLL
    for (int i = 0; i < VECTOR; i++) sum += vector.channel[i];
    return sum;
}

// ---- Adding to memory that other threads add to: the gradient of value. ----

#ifdef FIXED_POINT
// Sums of integers do not depend on their order: the deterministic mode. *scale is a power of two.
typedef unsigned long long GRADIENT;
__device__ void accumulate(GRADIENT* pointer, REAL factor, const Vector& vector, const double* scale) {
    RECORD(pointer, sizeof(GRADIENT) * VECTOR, 'a');
    UNROLL
    for (int i = 0; i < VECTOR; i++)
        atomicAdd(pointer + i, (GRADIENT)llrint((double)(factor * vector.channel[i]) * *scale));
}
#else
typedef REAL GRADIENT;
__device__ void accumulate(GRADIENT* pointer, REAL factor, const Vector& vector, const double*) {
    RECORD(pointer, sizeof(GRADIENT) * VECTOR, 'a');
#ifdef VECTOR_REDUCTION  // sm_90 and later, float: four channels in one instruction
    UNROLL
    for (int i = 0; i < VECTOR; i += 4)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pointer + i),
                     "f"(factor * vector.channel[i]), "f"(factor * vector.channel[i + 1]),
                     "f"(factor * vector.channel[i + 2]), "f"(factor * vector.channel[i + 3])
                     : "memory");
#else
    UNROLL
    for (int i = 0; i < VECTOR; i++) atomicAdd(pointer + i, factor * vector.channel[i]);
#endif
}
#endif

// Adds up what the lanes of a head hold; each of them gets the sum.
__device__ REAL sum_over_lanes(REAL x) {
    UNROLL
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, step, LANES);
    return x;
}

// Replaces sums[c][p], which all lanes have read, by the sum of products[c] over channels and lanes.
__device__ void put_sums(const Vector (&products)[4], REAL (*sums)[POINTS], int p, int lane) {
    REAL sum[4];
    UNROLL
    for (int c = 0; c < 4; c++) sum[c] = sum_over_lanes(total(products[c]));
    __syncwarp();
    UNROLL
    for (int c = 0; c < 4; c++)
        if (lane == 0) sums[c][p] = sum[c];
}
#endif

// ---- The first phase: a lane a point ----

// The level of every point: its size, and its first token among all levels' tokens.
struct Levels {
    int height[POINTS], width[POINTS], start[POINTS];
};

// Corner c of point p, c = 2 * bottom + right: its element in the head's value, and its weight,
// bilinear times attention.
struct Corners {
    OFFSET offset[4][POINTS];
    REAL weight[4][POINTS];
    REAL padding;  // so that the heads of a warp, at one point, read different banks of shared memory
};

// The two pixels beside a coordinate. A pixel outside the map has weight zero and slope zero, and
// stands for the nearest inside, so that every address can be read.
struct Neighbours {
    int low, high;
    REAL weight_low, weight_high;
    REAL slope_low, slope_high;  // derivatives of the weights with respect to the coordinate
};

// coordinate: normalised, 0 is the first pixel's outer edge and 1 the last one's.
__device__ Neighbours neighbours(REAL coordinate, int size) {
    REAL position = coordinate * (REAL)size - (REAL)0.5;
    bool inside = (position > (REAL)-1) & (position < (REAL)size);  // NaN is not
    position = inside ? position : (REAL)0;
    REAL whole = floor(position);
    REAL fraction = position - whole;
    int low = (int)whole, high = low + 1;
    REAL has_low = inside & (low >= 0) ? (REAL)1 : (REAL)0;
    REAL has_high = inside & (high < size) ? (REAL)1 : (REAL)0;
    Neighbours result;
    result.low = low < 0 ? 0 : low;
    result.high = high < size ? high : size - 1;
    result.weight_low = has_low * ((REAL)1 - fraction);
    result.weight_high = has_high * fraction;
    result.slope_low = -has_low * (REAL)size;
    result.slope_high = has_high * (REAL)size;
    return result;
}

// stride: elements from a token to the next, M * D.
__device__ void find_corners(const Levels& levels, const REAL* locations, const REAL* weights,
                             int stride, int lane, Corners& corners) {
    for (int p = lane; p < POINTS; p += LANES) {
        Neighbours x = neighbours(locations[2 * p], levels.width[p]);
        Neighbours y = neighbours(locations[2 * p + 1], levels.height[p]);
        OFFSET top = (OFFSET)y.low * levels.width[p] + levels.start[p];
        OFFSET bottom = (OFFSET)y.high * levels.width[p] + levels.start[p];
        corners.offset[0][p] = (top + x.low) * stride;
        corners.offset[1][p] = (top + x.high) * stride;
        corners.offset[2][p] = (bottom + x.low) * stride;
        corners.offset[3][p] = (bottom + x.high) * stride;
        REAL weight_top = y.weight_low * weights[p], weight_bottom = y.weight_high * weights[p];
        corners.weight[0][p] = weight_top * x.weight_low;
        corners.weight[1][p] = weight_top * x.weight_high;
        corners.weight[2][p] = weight_bottom * x.weight_low;
        corners.weight[3][p] = weight_bottom * x.weight_high;
    }
}

// ---- The second phase: a lane a vector of channels ----

#define STEP (LANES * VECTOR)  // channels that all lanes of a head hold in one vector each
#define PASS (STEP * VECTORS)
// Whether a lane's vector is one of the head's D channels; known when compiling if D fills its passes.
#define EXISTS(channel) (D % PASS == 0 || (channel) < D)

// One query and head. value: the image's, from this head's first channel, as VALUE or as a copy in
// REAL; locations (POINTS, 2); weights (POINTS); output (D).
template <typename ROW>
__device__ void forward_head(const ROW* value, const Levels& levels, const REAL* locations,
                             const REAL* weights, VALUE* output, int stride, int lane,
                             Corners& corners) {
    find_corners(levels, locations, weights, stride, lane, corners);
    __syncwarp();
    for (int first = lane * VECTOR; first < D; first += PASS) {
        Vector sum[VECTORS];
        UNROLL
        for (int v = 0; v < VECTORS; v++) sum[v] = zeros();
        KEEP_LOOP
        for (int p = 0; p < POINTS; p++) {
            LOOK_AHEAD(value, p);
            UNROLL
            for (int c = 0; c < 4; c++) {
                const ROW* row = value + corners.offset[c][p] + first;
                REAL weight = corners.weight[c][p];
                UNROLL
                for (int v = 0; v < VECTORS; v++)
                    if (EXISTS(first + v * STEP)) add(sum[v], weight, load(row + v * STEP));
            }
        }
        UNROLL
        for (int v = 0; v < VECTORS; v++)
            if (EXISTS(first + v * STEP)) store(output + first + v * STEP, sum[v]);
    }
}

// The gradients of one query and head: SUMS adds to value's, PRODUCTS writes the weights' and the
// locations'. These follow, a lane a point again, from dots[c][p] = <grad_output, corner c of point p>,
// which takes the place of that corner's weight once the sums have used it.
template <bool SUMS, bool PRODUCTS, typename ROW>
__device__ void backward_head(const ROW* value, const Levels& levels, const REAL* locations,
                              const REAL* weights, const VALUE* grad_output, GRADIENT* grad_value,
                              REAL* grad_locations, REAL* grad_weights, const double* scale,
                              int stride, int lane, Corners& corners) {
    const int COUNT = (D + STEP - 1) / STEP;
    Vector gradient[COUNT];
    UNROLL
    for (int i = 0; i < COUNT; i++)
        if (EXISTS(lane * VECTOR + i * STEP)) gradient[i] = load(grad_output + lane * VECTOR + i * STEP);
    find_corners(levels, locations, weights, stride, lane, corners);
    __syncwarp();
    for (int p = 0; p < POINTS; p++) {
        if (PRODUCTS) LOOK_AHEAD(value, p);
        if (SUMS) LOOK_AHEAD(grad_value, p);
        Vector products[4];
        UNROLL
        for (int c = 0; c < 4; c++) {
            OFFSET offset = corners.offset[c][p] + lane * VECTOR;
            REAL weight = corners.weight[c][p];
            products[c] = zeros();
            UNROLL
            for (int i = 0; i < COUNT; i++) {
                if (!EXISTS(lane * VECTOR + i * STEP)) continue;
                if (PRODUCTS) add(products[c], gradient[i], load(value + offset + i * STEP));
                if (SUMS) accumulate(grad_value + offset + i * STEP, weight, gradient[i], scale);
            }
        }
        if (PRODUCTS) put_sums(products, corners.weight, p, lane);
    }
    if (!PRODUCTS) return;
    __syncwarp();
    const REAL(*dots)[POINTS] = corners.weight;
    for (int p = lane; p < POINTS; p += LANES) {
        Neighbours x = neighbours(locations[2 * p], levels.width[p]);
        Neighbours y = neighbours(locations[2 * p + 1], levels.height[p]);
        REAL top = x.weight_low * dots[0][p] + x.weight_high * dots[1][p];
        REAL bottom = x.weight_low * dots[2][p] + x.weight_high * dots[3][p];
        REAL left = y.weight_low * dots[0][p] + y.weight_high * dots[2][p];
        REAL right = y.weight_low * dots[1][p] + y.weight_high * dots[3][p];
        grad_weights[p] = y.weight_low * top + y.weight_high * bottom;
        grad_locations[2 * p] = weights[p] * (x.slope_low * left + x.slope_high * right);
        grad_locations[2 * p + 1] = weights[p] * (y.slope_low * top + y.slope_high * bottom);
    }
}

// ---- The kernels: a block holds GROUPS heads of LANES threads; item = (b * Q + q) * M + m ----

#ifndef NATIVE_VECTOR
extern "C" __global__ void __launch_bounds__(LANES* GROUPS)
    forward(const VALUE* __restrict__ value, Levels levels, const REAL* __restrict__ locations,
            const REAL* __restrict__ weights, VALUE* __restrict__ output, long long items,
            int tokens, int queries, int heads) {
    __shared__ Corners corners[GROUPS];
    long long item = (long long)blockIdx.x * GROUPS + threadIdx.y;
    if (item >= items) return;
    long long first = item / heads / queries * tokens * heads + item % heads;
    forward_head(value + first * D, levels, locations + item * POINTS * 2, weights + item * POINTS,
                 output + item * D, heads * D, threadIdx.x, corners[threadIdx.y]);
}

// grad_value must hold zeros.
extern "C" __global__ void __launch_bounds__(LANES* GROUPS)
    backward(const VALUE* __restrict__ value, Levels levels, const REAL* __restrict__ locations,
             const REAL* __restrict__ weights, const VALUE* __restrict__ grad_output,
             GRADIENT* __restrict__ grad_value, REAL* __restrict__ grad_locations,
             REAL* __restrict__ grad_weights, const double* scale, long long items, int tokens,
             int queries, int heads) {
    __shared__ Corners corners[GROUPS];
    long long item = (long long)blockIdx.x * GROUPS + threadIdx.y;
    if (item >= items) return;
    long long first = (item / heads / queries * tokens * heads + item % heads) * D;
    backward_head<true, true>(value + first, levels, locations + item * POINTS * 2,
                              weights + item * POINTS, grad_output + item * D, grad_value + first,
                              grad_locations + item * POINTS * 2, grad_weights + item * POINTS,
                              scale, heads * D, threadIdx.x, corners[threadIdx.y]);
}
#endif
