// One thread a head, channels last: the kernel that chapter making_it_fast starts from.
__global__ void head(const float* value, const int* shapes, const float* locations,
    const float* weights, float* output, int S, int Q, int M, int D, int L, int K) {
    int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= Q * M) return;
    int m = item % M, start = 0;
    for (int l = 0; l < L; l++) {
        int H = shapes[2 * l], W = shapes[2 * l + 1];
        for (int k = 0; k < K; k++) {
            int p = (item * L + l) * K + k;
            float x = locations[2 * p] * W - 0.5f, y = locations[2 * p + 1] * H - 0.5f;
            if (!(x > -1 && x < W && y > -1 && y < H)) continue;
            int left = floorf(x), top = floorf(y);
            for (int corner = 0; corner < 4; corner++) {
                int u = left + corner % 2, v = top + corner / 2;
                if (u < 0 || u >= W || v < 0 || v >= H) continue;
                float weight = weights[p] * (1 - fabsf(x - u)) * (1 - fabsf(y - v));
                int token = start + v * W + u;
                for (int d = 0; d < D; d++)
                    output[item * D + d] += weight * value[(token * M + m) * D + d];
            }
        }
        start += H * W;
    }
}
