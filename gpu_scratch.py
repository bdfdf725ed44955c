"""Train the CNN or ResNet-18 from scratch on a GPU: kernels of this file, cuBLAS for matrix products, no cuDNN.

The layers are those of common.py with their work handed to CUDA kernels that each do all that can be done while a value
is in a register: bias, ReLU and pooling; batch normalisation, ReLU and the residual; softmax, loss, gradient and hit
counts; the whole optimizer. 3x3 convolutions are Winograd's, with batched matrix products by cuBLAS, or im2col. Data
set and augmentation live on the GPU. A step needs nothing from the host and no new memory, so --graph captures it once
and launches it as a whole; the result of a step is read while the next one runs. Without a GPU the same training loop
runs on NumPy and gives the numbers of serial_cnn.py.

    python gpu_scratch.py
    python gpu_scratch.py --device cuda --graph --batch-size 512 --lr 0.05
    python gpu_scratch.py --model resnet18 --batch-size 64 --graph --augment on --epochs 2
    python gpu_scratch.py --device cpu --dtype float64 --dataset synthetic --subset 1000 --epochs 1
    python gpu_scratch.py --checkpoint results/gpu.ckpt.npz              # Ctrl-C, then add --resume

The kernels' arithmetic is tested on any machine, compiled as C++. The script has not yet been run on a GPU.
"""

import ctypes
import functools
import math
import sys
import time
import uuid

import numpy as np

from common import (
    MEAN,
    MIB,
    MODELS,
    PAD,
    SGD,
    STD,
    Adam,
    BatchNorm2D,
    Conv2D,
    Dense,
    Flatten,
    GlobalAvgPool,
    InputError,
    Layer,
    Model,
    Run,
    TrainingError,
    Winograd,
    array_module,
    augment,
    blas_warning,
    count_correct,
    draw_augmentation,
    epoch_order,
    get_arrays,
    limit_blas_threads,
    load_batch,
    load_cifar10,
    make_model,
    make_optimizer,
    make_parser,
    run_main,
    set_arrays,
    softmax_cross_entropy,
)

# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------

THREADS = 256  # of a block of a kernel that has one thread for each element
COLUMNS, ROWS = (
    32,
    16,
)  # of a block of a kernel that sums over rows: neighbours read neighbouring channels
WORKSPACE = 32 * MIB  # of cuBLAS, as NVIDIA advises for the largest GPUs
LARGEST = 2**30  # elements of an array: kernels count in 32 bits

# Arrays are NHWC; `real` is float or double. A kernel with `int n` first has a thread for each of n elements, channels
# fastest, so that neighbouring threads touch neighbouring memory. A pointer may be null where "or null" is said.
KERNELS = r"""
#define EACH(i, n) int i = blockIdx.x * blockDim.x + threadIdx.x; if (i >= n) return
#define KERNEL extern "C" __global__ void
typedef unsigned char byte;

// --- data ------------------------------------------------------------------------------------------------------------

// x (batch, 32, 32, 3) = the images at `index`, cropped and flipped as `draws` (or null) says, normalised; y = labels.
KERNEL load_images(int n, const byte *images, const byte *labels, const int *index, const byte *draws, real *x, byte *y)
{
    EACH(i, n);
    int c = i % 3, column = i / 3 % 32, row = i / 96 % 32, image = i / 3072, source = index[image], value = 0;
    if (i % 3072 == 0) y[image] = labels[source];
    if (draws) {
        int draw = draws[source];
        column = (draw / 81 ? 31 - column : column) + draw % 9 - PAD;
        row += draw / 9 % 9 - PAD;
    }
    if (0 <= row && row < 32 && 0 <= column && column < 32) value = images[((source * 32 + row) * 32 + column) * 3 + c];
    const real scale[] = SCALE, shift[] = SHIFT;
    x[i] = value * scale[c] - shift[c];
}

// --- convolution by im2col -------------------------------------------------------------------------------------------

// col (batch, oh, ow, k, k, c): the receptive field of each position of the output; zero outside the image. A thread
// has one channel of a position, since the divisions that find it take longer than the copies. n = batch oh ow c
KERNEL im2col(int n, const real *x, int h, int w, int c, int k, int stride, int padding, int oh, int ow, real *col)
{
    EACH(i, n);
    int channel = i % c, position = i / c, image = position / ow / oh;
    int column = position % ow * stride - padding, row = position / ow % oh * stride - padding;
    x += ((image * h + row) * w + column) * c + channel;
    col += position * k * k * c + channel;
    for (int a = 0; a < k; a++)
        for (int b = 0; b < k; b++) {
            bool inside = 0 <= row + a && row + a < h && 0 <= column + b && column + b < w;
            col[(a * k + b) * c] = inside ? x[(a * w + b) * c] : 0;
        }
}

// dx (batch, h, w, c) = the sum of the elements of dcol that are copies of it, + add (or null).
KERNEL col2im(int n, const real *dcol, const real *add, int h, int w, int c, int k, int stride, int padding, int oh,
              int ow, real *dx)
{
    EACH(i, n);
    int channel = i % c, column = i / c % w + padding, row = i / c / w % h + padding, image = i / c / w / h;
    real sum = add ? add[i] : 0;
    for (int a = row % stride; a < k; a += stride) {
        int r = (row - a) / stride;
        if (row < a || r >= oh) continue;
        for (int b = column % stride; b < k; b += stride) {
            int q = (column - b) / stride;
            if (column < b || q >= ow) continue;
            sum += dcol[((((image * oh + r) * ow + q) * k + a) * k + b) * c + channel];
        }
    }
    dx[i] = sum;
}

// max(value, 0), but what is not a number stays so
__device__ __forceinline__ real rectified(real value) { return value < 0 ? 0 : value; }

// out (batch, h, w, c) = ReLU(the largest of a 2x2 window of y + bias); which: the first of the largest, 0 to 3.
__device__ __forceinline__ real largest(real y0, real y1, real y2, real y3, byte *which)
{
    real upper = y0 >= y1 ? y0 : y1, lower = y2 >= y3 ? y2 : y3;
    *which = upper >= lower ? (y0 >= y1 ? 0 : 1) : (y2 >= y3 ? 2 : 3);
    return upper >= lower ? upper : lower;
}

KERNEL bias_relu_pool(int n, const real *y, const real *bias, int h, int w, int c, real *out, byte *which)
{
    EACH(i, n);
    int channel = i % c, column = i / c % w, row = i / c / w, width = 2 * w * c;
    const real *corner = y + 2 * row * width + 2 * column * c + channel;
    real value = largest(corner[0], corner[c], corner[width], corner[width + c], which + i) + bias[channel];
    out[i] = rectified(value);
}

KERNEL bias_relu_pool_backward(int n, const real *dout, const real *out, const byte *which, int h, int w, int c,
                               real *dy)
{
    EACH(i, n);
    int channel = i % c, column = i / c % w, row = i / c / w, width = 2 * w * c;
    real *corner = dy + 2 * row * width + 2 * column * c + channel, d = out[i] > 0 ? dout[i] : 0;
    for (int place = 0; place < 4; place++)
        corner[place / 2 * width + place % 2 * c] = which[i] == place ? d : 0;
}

// --- convolution by Winograd's F(4x4, 3x3) ---------------------------------------------------------------------------

// A thread has one tile of one channel. Transformed tiles are (36, batch * h/4 * w/4, c): 36 matrices for cuBLAS.
// out (OUT, OUT) = L in (IN, IN) L^T, for the matrix L of the struct `Matrix`.
template <class Matrix, int IN, int OUT> __device__ __forceinline__ void transform(const real *in, real *out)
{
    real half[OUT * IN];
#pragma unroll
    for (int j = 0; j < IN; j++) Matrix::times(in + j, IN, half + j, IN);
#pragma unroll
    for (int i = 0; i < OUT; i++) Matrix::times(half + i * IN, 1, out + i * OUT, 1);
}

#define TILE int channel = i % c, tile = i / c, tiles_w = w / 4, tiles_h = h / 4, column = tile % tiles_w, \
    row = tile / tiles_w % tiles_h, image = tile / tiles_w / tiles_h

// U (36, c_in, c_out) = G w G^T, w (3, 3, c_in, c_out); n = c_in c_out
KERNEL filter_tiles(int n, const real *weights, real *U)
{
    EACH(i, n);
    real g[9], u[36];
#pragma unroll
    for (int k = 0; k < 9; k++) g[k] = weights[k * n + i];
    transform<G, 3, 6>(g, u);
#pragma unroll
    for (int k = 0; k < 36; k++) U[k * n + i] = u[k];
}

// dw (3, 3, c_in, c_out) = G^T dU G, dU (36, parts, c_in, c_out) to be summed over its parts; n = c_in c_out
KERNEL filter_tiles_backward(int n, const real *dU, int parts, real *dweights)
{
    EACH(i, n);
    real u[36], g[9];
#pragma unroll
    for (int k = 0; k < 36; k++) {
        u[k] = 0;
        for (int part = 0; part < parts; part++) u[k] += dU[(k * parts + part) * n + i];
    }
    transform<GT, 6, 3>(u, g);
#pragma unroll
    for (int k = 0; k < 9; k++) dweights[k * n + i] = g[k];
}

// V = B^T d B of the 6x6 tiles of x (batch, h, w, c), 4 apart, zero outside the image
KERNEL input_tiles(int n, const real *x, int h, int w, int c, real *V)
{
    EACH(i, n);
    TILE;
    real d[36], v[36];
#pragma unroll
    for (int k = 0; k < 36; k++) {
        int r = 4 * row - 1 + k / 6, q = 4 * column - 1 + k % 6;
        d[k] = 0 <= r && r < h && 0 <= q && q < w ? x[((image * h + r) * w + q) * c + channel] : 0;
    }
    transform<BT, 6, 6>(d, v);
#pragma unroll
    for (int k = 0; k < 36; k++) V[k * n + i] = v[k];
}

// y (batch, h, w, c) = A^T M A
KERNEL output_tiles(int n, const real *M, int h, int w, int c, real *y)
{
    EACH(i, n);
    TILE;
    real m[36], out[16];
#pragma unroll
    for (int k = 0; k < 36; k++) m[k] = M[k * n + i];
    transform<AT, 6, 4>(m, out);
#pragma unroll
    for (int k = 0; k < 16; k++) y[((image * h + 4 * row + k / 4) * w + 4 * column + k % 4) * c + channel] = out[k];
}

// The same followed by bias_relu_pool: out and which (batch, h/2, w/2, c); y itself is never stored.
KERNEL output_tiles_pool(int n, const real *M, const real *bias, int h, int w, int c, real *out, byte *which)
{
    EACH(i, n);
    TILE;
    real m[36], y[16];
#pragma unroll
    for (int k = 0; k < 36; k++) m[k] = M[k * n + i];
    transform<AT, 6, 4>(m, y);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int r = k / 2, q = k % 2, place = ((image * h / 2 + 2 * row + r) * (w / 2) + 2 * column + q) * c + channel;
        const real *corner = y + 8 * r + 2 * q;
        real value = largest(corner[0], corner[1], corner[4], corner[5], which + place) + bias[channel];
        out[place] = rectified(value);
    }
}

// dM = A dy A^T, dy (batch, h, w, c)
KERNEL output_tiles_backward(int n, const real *dy, int h, int w, int c, real *dM)
{
    EACH(i, n);
    TILE;
    real d[16], m[36];
#pragma unroll
    for (int k = 0; k < 16; k++) d[k] = dy[((image * h + 4 * row + k / 4) * w + 4 * column + k % 4) * c + channel];
    transform<A, 4, 6>(d, m);
#pragma unroll
    for (int k = 0; k < 36; k++) dM[k * n + i] = m[k];
}

// The same from the gradient of the pooled values, dout (batch, h/2, w/2, c): dy is never stored.
KERNEL output_tiles_pool_backward(int n, const real *dout, const real *out, const byte *which, int h, int w, int c,
                                  real *dM)
{
    EACH(i, n);
    TILE;
    real d[16], m[36];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int r = k / 2, q = k % 2, place = ((image * h / 2 + 2 * row + r) * (w / 2) + 2 * column + q) * c + channel;
        real value = out[place] > 0 ? dout[place] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) d[8 * r + 2 * q + j / 2 * 4 + j % 2] = which[place] == j ? value : 0;
    }
    transform<A, 4, 6>(d, m);
#pragma unroll
    for (int k = 0; k < 36; k++) dM[k * n + i] = m[k];
}

// dx (batch, h, w, c) = the sum of the overlapping tiles B dV B^T, + add (or null). A tile reaches one pixel into its
// neighbours, and that pixel's row of B has one entry: so a thread needs its own 36 values and 28 of its neighbours'.
KERNEL input_tiles_backward(int n, const real *dV, const real *add, int h, int w, int c, real *dx)
{
    EACH(i, n);
    TILE;
    real v[64], d[16];
#pragma unroll
    for (int k = 0; k < 64; k++) {
        int a = k / 8, b = k % 8, up = a == 7 ? 1 : a == 0 ? -1 : 0, right = b == 7 ? 1 : b == 0 ? -1 : 0;
        int place = (a == 7 ? 0 : a == 0 ? 5 : a - 1) * 6 + (b == 7 ? 0 : b == 0 ? 5 : b - 1);
        bool inside = 0 <= row + up && row + up < tiles_h && 0 <= column + right && column + right < tiles_w;
        v[k] = inside ? dV[place * n + i + (up * tiles_w + right) * c] : 0;
    }
    transform<Overlap, 8, 4>(v, d);
#pragma unroll
    for (int k = 0; k < 16; k++) {
        int place = ((image * h + 4 * row + k / 4) * w + 4 * column + k % 4) * c + channel;
        dx[place] = add ? d[k] + add[place] : d[k];
    }
}

// --- sums over rows: blocks of COLUMNS x ROWS threads, gridDim.y parts -----------------------------------------------

#define EACH_ROW(row, rows) for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS)
#define PLACE (threadIdx.y * COLUMNS + threadIdx.x)

// The sum over the block's rows, in every thread.
__device__ __forceinline__ real sum_block(real value, real *shared)
{
    shared[PLACE] = value;
    for (unsigned half = ROWS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) shared[PLACE] += shared[PLACE + half * COLUMNS];
    }
    __syncthreads();
    value = shared[threadIdx.x];
    __syncthreads();
    return value;
}

// parts (gridDim.y, c) of the sums over the rows of a (rows, c), where mask (or null) is positive
KERNEL sum_rows(const real *a, const real *mask, int rows, int c, real *parts)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real sum = 0;
    if (channel < c) EACH_ROW(row, rows) {
        int i = row * c + channel;
        if (!mask || mask[i] > 0) sum += a[i];
    }
    sum = sum_block(sum, shared);
    if (channel < c && threadIdx.y == 0) parts[blockIdx.y * c + channel] = sum;
}

// sums (n) = parts (count, n) summed over count
KERNEL sum_parts(int n, const real *parts, int count, real *sums)
{
    EACH(i, n);
    real sum = 0;
    for (int part = 0; part < count; part++) sum += parts[part * n + i];
    sums[i] = sum;
}

// --- batch normalisation ---------------------------------------------------------------------------------------------

// Count, mean and sum of squared deviations, and how two such are one: Chan et al., 1979, as in common.py.
struct Moments { real count, mean, squares; };

__device__ __forceinline__ Moments merge(Moments a, Moments b)
{
    real count = a.count + b.count;
    if (count == 0) return a;
    real difference = b.mean - a.mean, share = b.count / count;
    real squares = a.squares + b.squares + difference * difference * a.count * share;
    Moments both = {count, a.mean + difference * share, squares};
    return both;
}

__device__ __forceinline__ Moments merge_block(Moments mine, Moments *shared)
{
    shared[PLACE] = mine;
    for (unsigned half = ROWS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) shared[PLACE] = merge(shared[PLACE], shared[PLACE + half * COLUMNS]);
    }
    __syncthreads();
    return shared[threadIdx.x];
}

// parts (gridDim.y, 3, c): the moments of the channels of x (rows, c)
KERNEL norm_moments(const real *x, int rows, int c, real *parts)
{
    __shared__ Moments shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    Moments m = {0, 0, 0};
    if (channel < c) EACH_ROW(row, rows) {
        real value = x[row * c + channel], difference = value - m.mean;
        m.count += 1;
        m.mean += difference / m.count;
        m.squares += difference * (value - m.mean);
    }
    m = merge_block(m, shared);
    if (channel < c && threadIdx.y == 0) {
        real *part = parts + blockIdx.y * 3 * c + channel;
        part[0] = m.count, part[c] = m.mean, part[2 * c] = m.squares;
    }
}

// From the parts: mean, inverse deviation, and the step of the running statistics. One block for COLUMNS channels.
KERNEL norm_statistics(const real *parts, int count, int c, real eps, real momentum, real *running_mean,
                       real *running_var, real *mean, real *inverse)
{
    __shared__ Moments shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    Moments m = {0, 0, 0};
    if (channel < c) for (int p = threadIdx.y; p < count; p += ROWS) {
        const real *part = parts + p * 3 * c + channel;
        Moments other = {part[0], part[c], part[2 * c]};
        m = merge(m, other);
    }
    m = merge_block(m, shared);
    if (channel < c && threadIdx.y == 0) {
        mean[channel] = m.mean;
        inverse[channel] = 1 / sqrt(m.squares / m.count + eps);
        running_mean[channel] += momentum * (m.mean - running_mean[channel]);
        running_var[channel] += momentum * (m.squares / (m.count - 1) - running_var[channel]);
    }
}

// inverse (n) deviation from running variances, for evaluation
KERNEL norm_inverse(int n, const real *var, real eps, real *inverse)
{
    EACH(i, n);
    inverse[i] = 1 / sqrt(var[i] + eps);
}

// out = gamma (x - mean) inverse + beta, + add (or null), then ReLU if asked for
KERNEL norm_forward(int n, const real *x, const real *mean, const real *inverse, const real *gamma, const real *beta,
                    const real *add, int relu, int c, real *out)
{
    EACH(i, n);
    int channel = i % c;
    real value = (x[i] - mean[channel]) * inverse[channel] * gamma[channel] + beta[channel];
    if (add) value += add[i];
    out[i] = relu ? rectified(value) : value;
}

// parts (gridDim.y, 2, c) of dgamma and dbeta. out: the output, if it went through a ReLU, or null
KERNEL norm_backward_sums(const real *dout, const real *out, const real *x, const real *mean, const real *inverse,
                          int rows, int c, real *parts)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real dgamma = 0, dbeta = 0;
    if (channel < c) {
        real m = mean[channel], inv = inverse[channel];
        EACH_ROW(row, rows) {
            int i = row * c + channel;
            real d = !out || out[i] > 0 ? dout[i] : 0;
            dgamma += d * (x[i] - m) * inv;
            dbeta += d;
        }
    }
    dgamma = sum_block(dgamma, shared);
    dbeta = sum_block(dbeta, shared);
    if (channel < c && threadIdx.y == 0) {
        real *part = parts + blockIdx.y * 2 * c + channel;
        part[0] = dgamma, part[c] = dbeta;
    }
}

// dgamma and dbeta from their parts. One block for COLUMNS channels.
KERNEL norm_backward_finish(const real *parts, int count, int c, real *dgamma, real *dbeta)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real sums[2] = {0, 0};
    if (channel < c) for (int p = threadIdx.y; p < count; p += ROWS)
        for (int k = 0; k < 2; k++) sums[k] += parts[(2 * p + k) * c + channel];
    for (int k = 0; k < 2; k++) sums[k] = sum_block(sums[k], shared);
    if (channel < c && threadIdx.y == 0) dgamma[channel] = sums[0], dbeta[channel] = sums[1];
}

// dx, and dadd (or null), the gradient of what was added
KERNEL norm_backward(int n, const real *dout, const real *out, const real *x, const real *mean, const real *inverse,
                     const real *gamma, const real *dgamma, const real *dbeta, int c, real *dx, real *dadd)
{
    EACH(i, n);
    int channel = i % c;
    real d = !out || out[i] > 0 ? dout[i] : 0, normal = (x[i] - mean[channel]) * inverse[channel];
    real share = (real)1 / (n / c);
    if (dadd) dadd[i] = d;
    dx[i] = gamma[channel] * inverse[channel] * (d - (dbeta[channel] + normal * dgamma[channel]) * share);
}

// --- the head --------------------------------------------------------------------------------------------------------

// out (batch, c): the mean of x (batch, positions, c)
KERNEL average(int n, const real *x, int positions, int c, real *out)
{
    EACH(i, n);
    const real *first = x + i / c * positions * c + i % c;
    real sum = 0;
    for (int p = 0; p < positions; p++) sum += first[p * c];
    out[i] = sum / positions;
}

KERNEL average_backward(int n, const real *dout, int positions, int c, real *dx)
{
    EACH(i, n);
    dx[i] = dout[i / (positions * c) * c + i % c] / positions;
}

KERNEL add_bias(int n, real *y, const real *bias, int relu, int c)
{
    EACH(i, n);
    real value = y[i] + bias[i % c];
    y[i] = relu ? rectified(value) : value;
}

KERNEL relu_backward(int n, real *dout, const real *out)
{
    EACH(i, n);
    if (!(out[i] > 0)) dout[i] = 0;
}

// dlogits (batch, classes), and to sums[3] the summed loss and how many labels are the largest and among the five
// largest logits; added if `add`. One block.
KERNEL softmax_cross_entropy(const real *logits, const byte *labels, int batch, int classes, int add, real *dlogits,
                             double *sums)
{
    __shared__ double shared[3][THREADS];
    double mine[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < batch; i += THREADS) {
        const real *row = logits + i * classes;
        int label = labels[i], above = 0, equal_before = 0;
        real correct = row[label], most = row[0], sum = 0;
        for (int k = 0; k < classes; k++) {
            if (!(row[k] <= most)) most = row[k];
            above += row[k] > correct;
            equal_before += k < label && row[k] == correct;
        }
        for (int k = 0; k < classes; k++) sum += exp(row[k] - most);
        for (int k = 0; k < classes; k++) dlogits[i * classes + k] = exp(row[k] - most) / sum - (k == label);
        mine[0] += log(sum) - (correct - most);
        mine[1] += above + equal_before == 0;
        mine[2] += above < 5;
    }
    for (int k = 0; k < 3; k++) shared[k][threadIdx.x] = mine[k];
    for (unsigned half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            for (int k = 0; k < 3; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        for (int k = 0; k < 3; k++) sums[k] = (add ? sums[k] : 0) + shared[k][0];
}

// --- the optimizer, over the flat buffers ----------------------------------------------------------------------------

KERNEL sgd(int n, real *w, const real *grads, real *velocity, real lr, real momentum, real weight_decay, real scale,
           double *steps)
{
    EACH(i, n);
    real v = momentum * velocity[i] + (grads[i] * scale + weight_decay * w[i]);
    velocity[i] = v;
    w[i] -= lr * v;
    if (i == 0) steps[0] += 1;
}

// steps: the number of steps, 1 - beta1^steps, sqrt(1 - beta2^steps). One thread: all others need it.
KERNEL adam_begin(int n, double beta1, double beta2, double *steps)
{
    EACH(i, n);
    steps[0] += 1;
    steps[1] = 1 - pow(beta1, steps[0]);
    steps[2] = sqrt(1 - pow(beta2, steps[0]));
}

KERNEL adam(int n, real *w, const real *grads, real *m, real *v, real lr, real beta1, real beta2, real eps,
            real weight_decay, real scale, const double *steps)
{
    EACH(i, n);
    real g = grads[i] * scale + weight_decay * w[i];
    m[i] = beta1 * m[i] + (1 - beta1) * g;
    v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    w[i] -= lr / (real)steps[1] * (m[i] / (sqrt(v[i]) / (real)steps[2] + eps));
}
"""


def kernel_source(dtype):
    """The kernels for float32 or float64, with the constants of common.py: normalisation and Winograd's matrices."""
    B = Winograd.BT.T
    overlap = np.zeros(
        (4, 8)
    )  # one pixel of the tile before, the tile's own six rows, one pixel of the tile after
    overlap[:, 1:7], overlap[0, 0], overlap[3, 7] = B[1:5], B[5, 5], B[0, 0]
    matrices = {
        "BT": Winograd.BT,
        "G": Winograd.G,
        "GT": Winograd.G.T,
        "AT": Winograd.AT,
        "A": Winograd.AT.T,
        "Overlap": overlap,
    }
    std = np.array(STD)
    constants = {
        "real": {4: "float", 8: "double"}[np.dtype(dtype).itemsize],
        "PAD": PAD,
        "THREADS": THREADS,
        "COLUMNS": COLUMNS,
        "ROWS": ROWS,
        "SCALE": _braces(1 / (255 * std)),
        "SHIFT": _braces(np.array(MEAN) / std),
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return defines + "".join(_unrolled(*item) for item in matrices.items()) + KERNELS


def _braces(values):
    return "{" + ", ".join(f"(real){value!r}" for value in values.tolist()) + "}"


def _unrolled(name, matrix):
    """A struct whose times() multiplies the matrix by a vector, zeros left out."""
    lines = []
    for i, row in enumerate(matrix.tolist()):
        terms = [f"(real){value!r} * in[{j} * step]" for j, value in enumerate(row) if value]
        lines.append(f"        out[{i} * out_step] = {' + '.join(terms)};\n")
    return (
        f"struct {name} {{\n    static __device__ __forceinline__ void times(const real *in, int step, real *out, "
        f"int out_step)\n    {{\n{''.join(lines)}    }}\n}};\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Devices: NumPy on the CPU, CuPy on a GPU
# ----------------------------------------------------------------------------------------------------------------------


class Cpu:
    """The training steps on NumPy, with the layers of common.py: what serial_cnn.py does."""

    name, overlaps, uuid = "cpu", False, None  # overlaps: works while the host goes on

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)

    def make_model(self, name, seed):
        return make_model(name, seed, self.dtype)

    def make_optimizer(self, model, args):
        return make_optimizer(model, args)

    def put(self, array):
        return array

    get = put

    def load(self, images, labels, index, draws=None):
        """x (n, 32, 32, 3) and labels (n,) at `index`, augmented as draws (of all images) says, normalised."""
        if draws is None:
            return load_batch(images, labels, index, self.dtype)
        return load_batch(
            augment(images[index], draws[index]), labels[index], slice(None), self.dtype
        )

    def loss(self, logits, labels, sums=None):
        """dlogits and [summed loss, top-1, top-5], added to `sums` if given."""
        loss, dlogits = softmax_cross_entropy(logits, labels)
        result = np.array([loss, *count_correct(logits, labels)])
        return dlogits, result if sums is None else np.add(sums, result, out=sums)

    def mark(self):
        """A point in time, for seconds()."""
        return time.perf_counter()

    def read(self, sums):
        """A function that returns the sums as floats."""
        return lambda: sums.tolist()

    def seconds(self, since, until):
        return until - since

    def memory(self):
        return {}


class Kernels:
    """What the layers below need of a device: kernels by name, matrix products, arrays that are kept between steps.

    launch() and gemm() are Gpu's. A test that has NumPy and a C++ compiler gives its own.
    """

    FILL = 256  # blocks of a matrix product that keep a GPU busy

    def __init__(self, xp, dtype):
        self.xp, self.dtype, self.rooms = xp, np.dtype(dtype), {}

    def room(self, key, shape, dtype=None):
        """An array for `key`, whose memory later calls with the same key share; it grows where it must."""
        size = math.prod(shape)
        if size > LARGEST:
            raise InputError(
                f"an array of {size:,} values would be needed: give a smaller --batch-size"
            )
        kept = self.rooms.get(key)
        if kept is None or kept.size < size:
            self.rooms[key] = kept = None  # freed before more is asked for
            kept = self.rooms[key] = self.xp.empty(size, dtype or self.dtype)
        return kept[:size].reshape(shape)

    def argument(self, value):
        """A kernel's argument as C has it: int, real, a null pointer; arrays and NumPy's scalars as they are."""
        if value is None:
            return np.uintp(0)
        if isinstance(value, np.generic) or not isinstance(value, (int, float)):
            return value
        return self.dtype.type(value) if isinstance(value, float) else np.int32(value)

    def each(self, name, n, *args):
        """Run a kernel that has a thread for each of n elements."""
        self.launch(name, (-(-n // THREADS),), (THREADS,), n, *args)

    def sum_rows(self, name, rows, c, values, *args):
        """Run a kernel over the rows of (rows, c); returns its parts, (parts, values, c), and their number."""
        columns = -(-c // COLUMNS)
        count = max(1, min(rows // (4 * ROWS), 512 // columns))
        parts = self.room("parts", (count, values, c))
        self.launch(name, (columns, count), (COLUMNS, ROWS), *args, rows, c, parts)
        return parts, count

    def sum_columns(self, name, c, *args):
        """Run a kernel with a block for every COLUMNS channels."""
        self.launch(name, (-(-c // COLUMNS),), (COLUMNS, ROWS), *args)

    def bias_gradient(self, dout, db, mask=None):
        """db (c,) = the sum of dout (..., c), where `mask` is positive."""
        c = db.size
        parts, count = self.sum_rows("sum_rows", dout.size // c, c, 1, dout, mask)
        self.each("sum_parts", c, parts, count, db)

    def product_of_rows(self, a, b, shape):
        """aᵀ b, summed over the rows of (k, rows, m) and (k, rows, n), as (k, parts, m, n) that are to be summed.

        A product with few results and long sums would leave most of a GPU idle: the sums are cut into parts.
        """
        (k, rows, m), n = shape[:2] + a.shape[-1:], b.shape[-1]
        tiles, parts = k * -(-m // 64) * -(-n // 64), 1
        while parts * tiles < self.FILL and rows % (2 * parts) == 0 and rows // (2 * parts) >= 64:
            parts *= 2
        out = self.room("products", (k, parts, m, n))
        self.gemm(
            a.reshape(k * parts, -1, m),
            b.reshape(k * parts, -1, n),
            out.reshape(-1, m, n),
            transpose_a=True,
        )
        return out, parts

    def make_model(self, name, seed):
        model = Model(
            {"cnn": cnn_layers, "resnet18": resnet18_layers}[name](seed, self.dtype), self.xp
        )
        for layer in model.layers:
            for leaf in layer.leaves():
                leaf.gpu = self
        return model

    def make_optimizer(self, model, args):
        optimizer = make_optimizer(model, args, FusedSGD, FusedAdam)
        optimizer.gpu = self
        return optimizer

    def load(self, images, labels, index, draws=None):
        x, y = (
            self.room("x", (len(index), *images.shape[1:])),
            self.room("y", (len(index),), np.uint8),
        )
        self.each("load_images", x.size, images, labels, index, draws, x, y)
        return x, y

    def loss(self, logits, labels, sums=None):
        result = self.room("sums", (3,), np.float64) if sums is None else sums
        dlogits = self.room("dlogits", logits.shape)
        self.launch(
            "softmax_cross_entropy",
            (1,),
            (THREADS,),
            logits,
            labels,
            *logits.shape,
            sums is not None,
            dlogits,
            result,
        )
        return dlogits, result


class Gpu(Kernels):
    """The same on the GPU that CuPy uses."""

    overlaps = True

    def __init__(self, dtype, tf32=False):
        import cupy

        super().__init__(cupy, dtype)
        self.stream = own_stream()
        number = cupy.cuda.Device().id
        self.name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        self.uuid = gpu_uuid(number)
        self.module = cupy.RawModule(code=kernel_source(dtype), options=("--std=c++14",))
        self.functions = {}
        self.one, self.zero = np.ones(1, dtype), np.zeros(1, dtype)
        self._open_cublas(tf32)

    def _open_cublas(self, tf32):
        """cuBLAS itself, since CuPy refuses to call it while a stream is captured (cupy/cupy #6290)."""
        library, letter = load_cublas(), {4: "S", 8: "D"}[self.dtype.itemsize]
        pointer, integer, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
        begin = [
            pointer,
            *[integer] * 5,
            pointer,
        ]  # handle, transposed or not twice, m, n, k, alpha
        single, stacked = (
            library[f"cublas{letter}gemm_v2"],
            library[f"cublas{letter}gemmStridedBatched"],
        )
        single.argtypes = [*begin, *[pointer, integer] * 2, pointer, pointer, integer]
        stacked.argtypes = [
            *begin,
            *[pointer, integer, stride] * 2,
            pointer,
            pointer,
            integer,
            stride,
            integer,
        ]
        self.products, self.handle = (single, stacked), pointer()
        self.workspace = self.xp.empty(
            WORKSPACE, np.uint8
        )  # its own would be taken anew within a graph
        self._check(library.cublasCreate_v2(ctypes.byref(self.handle)))
        self._check(library.cublasSetStream_v2(self.handle, pointer(self.stream.ptr)))
        workspace = pointer(self.workspace.data.ptr), ctypes.c_size_t(WORKSPACE)
        self._check(library.cublasSetWorkspace_v2(self.handle, *workspace))
        self._check(
            library.cublasSetMathMode(self.handle, 3 if tf32 else 0)
        )  # CUBLAS_TF32_TENSOR_OP_MATH, DEFAULT

    def _check(self, status):
        if status:
            raise TrainingError(f"cuBLAS failed with status {status}")

    def launch(self, name, grid, block, *args):
        function = self.functions.get(name) or self.functions.setdefault(
            name, self.module.get_function(name)
        )
        function(grid, block, tuple(map(self.argument, args)))

    def gemm(self, a, b, out, transpose_a=False, transpose_b=False):
        """out = a @ b for matrices, or stacks of them, that lie in memory row by row."""
        (m, n), k, stacked = out.shape[-2:], a.shape[-2 if transpose_a else -1], out.ndim == 3
        # to cuBLAS, which reads column by column, each is its transpose: outᵀ = bᵀ aᵀ
        start = (self.handle, int(transpose_b), int(transpose_a), n, m, k, self.one.ctypes.data)
        if stacked and len(out) > 1:
            status = self.products[1](
                *start,
                b.data.ptr,
                b.shape[2],
                b.shape[1] * b.shape[2],
                a.data.ptr,
                a.shape[2],
                a.shape[1] * a.shape[2],
                self.zero.ctypes.data,
                out.data.ptr,
                n,
                m * n,
                len(out),
            )
        else:
            status = self.products[0](
                *start,
                b.data.ptr,
                b.shape[-1],
                a.data.ptr,
                a.shape[-1],
                self.zero.ctypes.data,
                out.data.ptr,
                n,
            )
        self._check(status)

    def put(self, array):
        return self.xp.asarray(np.ascontiguousarray(array))

    def get(self, array):
        return self.xp.asnumpy(array)

    def mark(self):
        event = self.xp.cuda.Event()
        event.record(self.stream)
        return event

    def seconds(self, since, until):
        return self.xp.cuda.get_elapsed_time(since, until) / 1000

    def read(self, sums):
        """Start to copy the sums; returns a function that waits for them, and for all that was launched before."""
        import cupyx

        host = cupyx.empty_pinned(sums.shape, sums.dtype)
        sums.get(stream=self.stream, out=host, blocking=False)
        copied = self.mark()
        return lambda: (copied.synchronize(), host.tolist())[1]

    def capture(self, function):
        """A function that runs what function() launches, as one CUDA graph."""
        self.stream.begin_capture()
        function()
        return self.stream.end_capture().launch

    def memory(self):
        """MiB: what this process's arrays take, what CuPy's pool has reserved for them, all of the GPU's in use."""
        pool, (free, total) = self.xp.get_default_memory_pool(), self.xp.cuda.runtime.memGetInfo()
        return {
            "gpu_arrays_mb": pool.used_bytes() / MIB,
            "gpu_pool_mb": pool.total_bytes() / MIB,
            "gpu_device_mb": (total - free) / MIB,
        }


@functools.cache
def own_stream():
    """The stream of all that this process does on a GPU, since the default stream cannot be captured."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    return stream


def gpu_uuid(number):
    """A GPU's name for NVML, from the driver, since CuPy's ends at the first byte that is zero."""
    octets = (ctypes.c_ubyte * 16)()
    status = ctypes.CDLL("libcuda.so.1").cuDeviceGetUuid(octets, number)
    return None if status else f"GPU-{uuid.UUID(bytes=bytes(octets))}"


def load_cublas():
    """The cuBLAS that belongs to CuPy's CUDA."""
    from cupy_backends.cuda.api import runtime
    from cupy_backends.cuda.libs import cublas  # noqa: F401 (CuPy knows where the library is, and loads it)

    return ctypes.CDLL(f"libcublas.so.{runtime.runtimeGetVersion() // 1000}")


def missing_for_gpu():
    """What stands in the way of a GPU, in words with what to do; None if nothing does."""
    try:
        import cupy
    except ImportError as error:
        if getattr(error, "name", None) == "cupy":
            driver = "" if _has_driver() else "no NVIDIA driver is found, and "
            return f"{driver}CuPy is not installed: python -m pip install -r requirements-gpu.txt"
        return f"CuPy cannot be imported ({' '.join(str(error).split())}): install it again"
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError:
        devices, driver, needed = 0, runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if not driver:
            return "no NVIDIA driver is found"
        if driver // 1000 < needed // 1000:
            return (
                f"the NVIDIA driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, this CuPy needs "
                f"CUDA {needed // 1000}: update the driver"
            )
    if not devices:
        return "the NVIDIA driver finds no GPU that this process may use (is CUDA_VISIBLE_DEVICES set?)"
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        load_cublas()
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return (
            f"a CUDA library is missing ({reason}): python -m pip install -r requirements-gpu.txt"
        )
    return None


def _has_driver():
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


def choose_device(args):
    """The Gpu or Cpu that --device asks for."""
    missing = missing_for_gpu() if args.device != "cpu" else None
    if missing and args.device == "cuda":
        raise InputError(f"--device cuda: {missing}")
    if args.device == "cpu" and (args.graph or args.tf32 == "on"):
        raise InputError("--graph and --tf32 need a GPU: leave them out, or --device cpu")
    if missing:
        print(f"Training on the CPU with NumPy: {missing}", file=sys.stderr)
    if args.device == "cpu" or missing:
        args.graph, args.tf32 = False, "off"  # what the sidecar will say
        limit_blas_threads(1)
        if warning := blas_warning():
            print(warning, file=sys.stderr)
        return Cpu(args.dtype)
    return Gpu(args.dtype, args.tf32 == "on")


# ----------------------------------------------------------------------------------------------------------------------
# Layers: those of common.py, done by the kernels
# ----------------------------------------------------------------------------------------------------------------------


class GpuLayer(Layer):
    """What the layers below share. `gpu` is set by make_model()."""

    gpu = None

    def room(self, name, shape, dtype=None):
        """An array of this layer's own, kept between calls. gpu.room() has those that layers may share."""
        return self.gpu.room((id(self), name), shape, dtype)


class Im2col(GpuLayer, Conv2D):
    """Conv2D without bias, by im2col and one matrix product. backward(dout, add): `add` is added to dx."""

    dx_name = "dx"  # of the shared array that dx is written to

    def forward(self, x):
        self.x_shape, y = x.shape, self.room("out", self._out_shape(x.shape))
        self._multiply(x, y)
        return y

    def backward(self, dout, add=None):
        self._weight_gradient(dout)
        if self.needs_dx:
            return self._input_gradient(dout, add)

    def _out_shape(self, x_shape):
        n, h, w, _ = x_shape
        k, s, p = self.kernel_size, self.stride, self.padding
        return (n, (h + 2 * p - k) // s + 1, (w + 2 * p - k) // s + 1, self.b.size)

    def _geometry(self, out_shape):
        return (*self.x_shape[1:], self.kernel_size, self.stride, self.padding, *out_shape[1:3])

    def _multiply(self, x, y):
        rows, window = y.size // self.b.size, self.W.size // self.b.size
        self.col = self.room("col", (rows, window))
        self.gpu.each("im2col", rows * x.shape[3], x, *self._geometry(y.shape), self.col)
        self.gpu.gemm(self.col, self.W.reshape(window, -1), y.reshape(rows, -1))

    def _weight_gradient(self, dy):
        rows = len(self.col)
        products, parts = self.gpu.product_of_rows(self.col, dy.reshape(rows, -1), (1, rows))
        self.gpu.each("sum_parts", self.dW.size, products, parts, self.dW)

    def _input_gradient(self, dy, add):
        dcol = self.gpu.room("dcol", self.col.shape)
        self.gpu.gemm(
            dy.reshape(len(dcol), -1), self.W.reshape(dcol.shape[1], -1), dcol, transpose_b=True
        )
        dx = self.gpu.room(self.dx_name, self.x_shape)
        self.gpu.each("col2im", dx.size, dcol, add, *self._geometry(dy.shape), dx)
        return dx


class Im2colReLUPool(Im2col):
    """ConvReLUPool: bias, ReLU and pooling in one kernel."""

    def forward(self, x):
        self.x_shape = x.shape
        n, h, w, c = self._out_shape(x.shape)
        y = self.gpu.room("y of pool", (n, h, w, c))
        self._multiply(x, y)
        pooled = (n, h // 2, w // 2, c)
        self.out, self.which = self.room("out", pooled), self.room("which", pooled, np.uint8)
        self.gpu.each(
            "bias_relu_pool", self.out.size, y, self.b, *self.out.shape[1:], self.out, self.which
        )
        return self.out

    def backward(self, dout, add=None):
        n, h, w, c = self.out.shape
        dy = self.gpu.room("y of pool", (n, 2 * h, 2 * w, c))
        self.gpu.each(
            "bias_relu_pool_backward", self.out.size, dout, self.out, self.which, h, w, c, dy
        )
        self.gpu.bias_gradient(dout, self.db, self.out)
        return super().backward(dy, add)


class WinogradConv(Im2col):
    """WinogradConv2D without bias: the 36 matrix products are one call. H and W must be multiples of 4."""

    def forward(self, x):
        self.x_shape, y = x.shape, self.room("out", self._out_shape(x.shape))
        self.gpu.each("output_tiles", y.size // 16, self._multiply_tiles(x), *y.shape[1:], y)
        return y

    def backward(self, dout, add=None):
        dM = self.gpu.room("M", (36, dout.size // 16 // self.b.size, self.b.size))
        self.gpu.each("output_tiles_backward", dout.size // 16, dout, *dout.shape[1:], dM)
        return self._backward_tiles(dM, add)

    def _multiply_tiles(self, x):
        """M (36, tiles, C_out) from x; keeps V and U."""
        gpu, tiles, (c_in, c_out) = self.gpu, x.size // 16 // x.shape[3], self.W.shape[2:]
        self.U, self.V = self.room("U", (36, c_in, c_out)), self.room("V", (36, tiles, c_in))
        gpu.each("filter_tiles", c_in * c_out, self.W, self.U)
        gpu.each("input_tiles", tiles * c_in, x, *x.shape[1:], self.V)
        M = gpu.room("M", (36, tiles, c_out))
        gpu.gemm(self.V, self.U, M)
        return M

    def _backward_tiles(self, dM, add):
        gpu, (_, tiles, c_in) = self.gpu, self.V.shape
        dU, parts = gpu.product_of_rows(self.V, dM, (36, tiles))
        gpu.each("filter_tiles_backward", self.W.size // 9, dU, parts, self.dW)
        if self.needs_dx:
            dV, dx = gpu.room("dV", self.V.shape), gpu.room(self.dx_name, self.x_shape)
            gpu.gemm(dM, self.U, dV, transpose_b=True)
            gpu.each("input_tiles_backward", tiles * c_in, dV, add, *self.x_shape[1:], dx)
            return dx


class WinogradConvReLUPool(WinogradConv):
    """WinogradReLUPool: bias, ReLU and pooling on the tiles, while they are in registers."""

    def forward(self, x):
        self.x_shape, (n, h, w, c) = x.shape, self._out_shape(x.shape)
        pooled = (n, h // 2, w // 2, c)
        self.out, self.which = self.room("out", pooled), self.room("which", pooled, np.uint8)
        self.gpu.each(
            "output_tiles_pool",
            n * h * w * c // 16,
            self._multiply_tiles(x),
            self.b,
            h,
            w,
            c,
            self.out,
            self.which,
        )
        return self.out

    def backward(self, dout, add=None):
        n, h, w, c = self._out_shape(self.x_shape)
        dM = self.gpu.room("M", (36, n * h * w // 16, c))
        self.gpu.each(
            "output_tiles_pool_backward", dM.size // 36, dout, self.out, self.which, h, w, c, dM
        )
        self.gpu.bias_gradient(dout, self.db, self.out)
        return self._backward_tiles(dM, add)


class Norm(GpuLayer, BatchNorm2D):
    """BatchNorm2D, then + `add`, then ReLU if `relu`. After backward() `dadd` is the gradient of `add`."""

    def __init__(self, channels, relu=False, *, dtype=np.float32):
        super().__init__(channels, dtype=dtype)
        self.relu = relu

    def forward(self, x, add=None):
        gpu, c = self.gpu, x.shape[3]
        self.x, self.out, self.added = x, self.room("out", x.shape), add is not None
        self.mean, self.inverse = self.room("mean", (c,)), self.room("inverse", (c,))
        mean = self.mean if self.training else self.running_mean
        if self.training:
            parts, count = gpu.sum_rows("norm_moments", x.size // c, c, 3, x)
            gpu.sum_columns(
                "norm_statistics",
                c,
                parts,
                count,
                c,
                self.eps,
                self.momentum,
                self.running_mean,
                self.running_var,
                self.mean,
                self.inverse,
            )
        else:
            gpu.each("norm_inverse", c, self.running_var, self.eps, self.inverse)
        gpu.each(
            "norm_forward",
            x.size,
            x,
            mean,
            self.inverse,
            self.gamma,
            self.beta,
            add,
            self.relu,
            c,
            self.out,
        )
        return self.out

    def backward(self, dout):
        gpu, c, x, out = self.gpu, self.gamma.size, self.x, self.out if self.relu else None
        parts, count = gpu.sum_rows(
            "norm_backward_sums", x.size // c, c, 2, dout, out, x, self.mean, self.inverse
        )
        gpu.sum_columns("norm_backward_finish", c, parts, count, c, self.dgamma, self.dbeta)
        dx, self.dadd = gpu.room("dy", x.shape), gpu.room("dadd", x.shape) if self.added else None
        gpu.each(
            "norm_backward",
            x.size,
            dout,
            out,
            x,
            self.mean,
            self.inverse,
            self.gamma,
            self.dgamma,
            self.dbeta,
            c,
            dx,
            self.dadd,
        )
        return dx


class Block(Layer):
    """BasicBlock. Gradients of activations live in arrays that all blocks share: "dx", "dy", "dadd" and "dshortcut"."""

    def __init__(self, in_channels, out_channels, stride=1, *, rng=None, dtype=np.float32):
        options = {"bias": False, "rng": rng, "dtype": dtype}
        self.conv1 = (WinogradConv if stride == 1 else Im2col)(
            in_channels, out_channels, stride=stride, **options
        )
        self.norm1 = Norm(out_channels, relu=True, dtype=dtype)
        self.conv2 = WinogradConv(out_channels, out_channels, **options)
        self.norm2 = Norm(out_channels, relu=True, dtype=dtype)
        self.shortcut = []
        if stride != 1 or in_channels != out_channels:
            conv = Im2col(in_channels, out_channels, 1, stride, 0, **options)
            conv.dx_name = "dshortcut"
            self.shortcut = [conv, Norm(out_channels, dtype=dtype)]

    def leaves(self):
        yield from (self.conv1, self.norm1, self.conv2, self.norm2, *self.shortcut)

    def forward(self, x):
        shortcut = x
        for part in self.shortcut:
            shortcut = part.forward(shortcut)
        y = self.norm1.forward(self.conv1.forward(x))
        return self.norm2.forward(self.conv2.forward(y), add=shortcut)

    def backward(self, dout):
        dx = self.conv2.backward(self.norm2.backward(dout))
        dshortcut = self.norm2.dadd
        for part in reversed(self.shortcut):
            dshortcut = part.backward(dshortcut)
        return self.conv1.backward(self.norm1.backward(dx), add=dshortcut)


class AvgPool(GpuLayer, GlobalAvgPool):
    def forward(self, x):
        self.x_shape, (n, h, w, c) = x.shape, x.shape
        out = self.room("out", (n, c))
        self.gpu.each("average", out.size, x, h * w, c, out)
        return out

    def backward(self, dout):
        dx, (_, h, w, c) = self.gpu.room("dx", self.x_shape), self.x_shape
        self.gpu.each("average_backward", dx.size, dout, h * w, c, dx)
        return dx


class DenseReLU(GpuLayer, Dense):
    """Dense, then ReLU if `relu`. backward() overwrites dout."""

    def __init__(self, in_features, out_features, relu=False, *, rng=None, dtype=np.float32):
        super().__init__(in_features, out_features, rng=rng, dtype=dtype)
        self.relu = relu

    def forward(self, x):
        self.x, self.out = x, self.room("out", (len(x), self.b.size))
        self.gpu.gemm(x, self.W, self.out)
        self.gpu.each("add_bias", self.out.size, self.out, self.b, self.relu, self.b.size)
        return self.out

    def backward(self, dout):
        if self.relu:
            self.gpu.each("relu_backward", dout.size, dout, self.out)
        self.gpu.bias_gradient(dout, self.db)
        self.gpu.gemm(self.x, dout, self.dW, transpose_a=True)
        dx = self.room("dx", self.x.shape)
        self.gpu.gemm(dout, self.W, dx, transpose_b=True)
        return dx


def cnn_layers(seed, dtype):
    """The layers of common.make_cnn(), with the same weights from the same seed."""
    rng = np.random.default_rng(seed)
    return [
        Im2colReLUPool(3, 32, rng=rng, dtype=dtype),
        WinogradConvReLUPool(32, 64, rng=rng, dtype=dtype),
        Flatten(),
        DenseReLU(64 * 8 * 8, 256, relu=True, rng=rng, dtype=dtype),
        DenseReLU(256, 10, rng=rng, dtype=dtype),
    ]


def resnet18_layers(seed, dtype):
    """The layers of common.make_resnet18(), with the same weights from the same seed."""
    rng = np.random.default_rng(seed)
    layers, channels = (
        [Im2col(3, 64, bias=False, rng=rng, dtype=dtype), Norm(64, relu=True, dtype=dtype)],
        64,
    )
    for width in (64, 128, 256, 512):
        for stride in (1 if width == 64 else 2, 1):
            layers.append(Block(channels, width, stride, rng=rng, dtype=dtype))
            channels = width
    return [*layers, AvgPool(), DenseReLU(512, 10, rng=rng, dtype=dtype)]


class Fused:
    """An optimizer whose step is one kernel. `steps` is counted on the device, where a captured step counts too."""

    gpu = None

    @property
    def steps(self):
        return int(self._steps[0])

    @steps.setter
    def steps(self, steps):
        if not hasattr(self, "_steps"):
            self._steps = array_module(self.model.params).zeros(3)
        self._steps[0] = steps


class FusedSGD(Fused, SGD):
    def step(self, count):
        w, options = (
            self.model.params,
            (float(self.lr), float(self.momentum), float(self.weight_decay), 1 / count),
        )
        self.gpu.each(
            "sgd", w.size, w, self.model.grads, self.slots["velocity"], *options, self._steps
        )


class FusedAdam(Fused, Adam):
    def step(self, count):
        w, m, v = self.model.params, self.slots["m"], self.slots["v"]
        self.gpu.each("adam_begin", 1, *map(np.float64, self.betas), self._steps)
        self.gpu.each(
            "adam",
            w.size,
            w,
            self.model.grads,
            m,
            v,
            float(self.lr),
            *self.betas,
            self.eps,
            float(self.weight_decay),
            1 / count,
            self._steps,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train_step(device, model, optimizer, x, labels, mark=lambda: None):
    """One step on one batch. Returns [summed loss, top-1, top-5] on the device and the marks around its two passes."""
    started = mark()
    logits = model.forward(x)
    dlogits, sums = device.loss(logits, labels)
    forward = mark()
    model.backward(dlogits)
    backward = mark()
    optimizer.step(len(labels))
    return sums, (started, forward, backward)


def make_steps(device, model, optimizer, data, args):
    """{batch size: step(x, labels)} for all sizes of an epoch, as one CUDA graph each with --graph.

    On a GPU each size is trained once, which compiles and reserves memory; what that has changed is put back.
    """
    n = len(data.y_train)
    sizes = sorted({min(args.batch_size, n), n % args.batch_size} - {0}, reverse=True)
    steps = dict.fromkeys(
        sizes, lambda *batch: train_step(device, model, optimizer, *batch, device.mark)
    )
    if not device.overlaps:
        return steps
    before = {name: device.get(array) for name, array in get_arrays(model, optimizer).items()}
    batches = {
        size: lambda size=size: device.load(
            data.x_train, data.y_train, device.put(np.arange(size, dtype="i4"))
        )
        for size in sizes
    }
    for size in (
        sizes
    ):  # all before the first graph, which knows arrays by their place: none may grow after it
        steps[size](*batches[size]())
    set_arrays(model, optimizer, before)
    for size in sizes if args.graph else ():
        steps[size] = captured_step(device, model, optimizer, *batches[size]())
    return steps


def captured_step(device, model, optimizer, x, labels):
    """step(x, labels) as one launch; x and labels are where they were when it was captured."""
    results = []
    launch = device.capture(lambda: results.extend(train_step(device, model, optimizer, x, labels)))

    def step(*_):
        launch()
        return results[0], None

    return step


def train(device, model, optimizer, data, args, run, steps):
    """Train for args.epochs epochs on data; everything measured goes to run.

    A GPU works behind the host's back: a batch is counted when the one after it has been launched, except where its
    end is waited for because a checkpoint or the end of the run is due.
    """
    n, size = len(data.y_train), args.batch_size
    for epoch in range(run.epoch, args.epochs + 1):
        order = device.put(epoch_order(n, args.seed, epoch).astype(np.int32))
        draws = device.put(draw_augmentation(n, args.seed, epoch)) if args.augment == "on" else None
        running = None
        run.start_epoch(epoch, math.ceil(n / size))
        for batch in range(run.batch, math.ceil(n / size)):
            started = device.mark()
            x, labels = device.load(
                data.x_train, data.y_train, order[batch * size : (batch + 1) * size], draws
            )
            loaded = device.mark()
            sums, phases = steps[len(labels)](x, labels)
            launched = (len(labels), device.read(sums), (started, loaded), phases)
            if running:
                end_batch(device, run, *running, more=True)
            running = launched
            if run.due() or not device.overlaps:
                running = end_batch(device, run, *running)
        if running:
            end_batch(device, run, *running)
        run.end_training()
        run.end_epoch(*evaluate(device, model, data.x_test, data.y_test, size))


def end_batch(device, run, images, result, loading, phases, more=False):
    """Wait for a step and count it."""
    loss, top1, top5 = result()
    seconds = {}
    if phases:
        started, forward, backward = phases
        seconds = {
            "forward": device.seconds(started, forward),
            "backward": device.seconds(forward, backward),
        }
    run.end_batch(
        images, loss, int(top1), int(top5), device.seconds(*loading), more=more, **seconds
    )


def evaluate(device, model, images, labels, batch_size):
    """Mean loss, top-1 and top-5 accuracy, seconds spent loading batches; summed on the device, read once."""
    model.train(False)
    n, sums, loading = len(labels), device.put(np.zeros(3)), []
    index = device.put(np.arange(n, dtype=np.int32))
    for start in range(0, n, batch_size):
        started = device.mark()
        x, y = device.load(images, labels, index[start : start + batch_size])
        loading.append((started, device.mark()))
        device.loss(model.forward(x), y, sums)
    model.train(True)
    result = device.read(sums)()
    return *(value / n for value in result), sum(device.seconds(*marks) for marks in loading)


def parse_args(argv=None):
    parser = make_parser("gpu_scratch", __doc__, MODELS)
    add = parser.add_argument
    add("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    add(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: a GPU if CuPy finds one, else NumPy (default: %(default)s)",
    )
    add(
        "--tf32",
        choices=("on", "off"),
        default="off",
        help="let tensor cores round the factors of products to 11 bits (default: %(default)s)",
    )
    add("--graph", action="store_true", help="capture the training step as a CUDA graph")
    add(
        "--augment",
        choices=("on", "off"),
        default="off",
        help="random crops and flips (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    data = load_cifar10(args.data_dir, args.dataset, args.subset, args.seed)
    arrays = {
        name: device.put(getattr(data, name)) for name in ("x_train", "y_train", "x_test", "y_test")
    }
    data = data._replace(**arrays)
    model = device.make_model(args.model, args.seed)
    optimizer = device.make_optimizer(model, args)
    steps = make_steps(device, model, optimizer, data, args)
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # run stops at the first loss that is not finite
        with Run(
            args,
            "gpu_scratch",
            data,
            lambda: {
                name: device.get(array) for name, array in get_arrays(model, optimizer).items()
            },
            lambda arrays: set_arrays(model, optimizer, arrays),
            {"device": device.name, "tf32": args.tf32, "graph": args.graph},
            gpu_uuid=device.uuid,
        ) as run:
            train(device, model, optimizer, data, args, run, steps)
            run.totals.update(device.memory())
            run.finish()


if __name__ == "__main__":
    run_main(main)
