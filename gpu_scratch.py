"""Train the CNN or ResNet-18 from scratch on a GPU: own CUDA kernels and cuBLAS, no cuDNN.

The layers are those of common.py, computed by CUDA kernels that each do all that can be done while
a value is in a register: bias, ReLU and pooling; batch normalisation, ReLU and the residual;
softmax, loss, gradient and hit counts; the whole optimizer. 3x3 convolutions are Winograd's or
im2col, with matrix products by cuBLAS. The data set is on the GPU and augmented there, so that a
training step needs nothing from the host.

The ladder, two ways to run the same step:
1. (default) the host launches the kernels one by one;
2. --graph: the host captures the step once as a CUDA graph and launches it as a whole.

    python gpu_scratch.py
    python gpu_scratch.py --device cuda --graph --batch-size 512 --lr 0.05
    python gpu_scratch.py --model resnet18 --batch-size 64 --graph --augment on --epochs 2
    python gpu_scratch.py --device cpu --dtype float64 --dataset synthetic --subset 1000 --epochs 1
    python gpu_scratch.py --checkpoint results/gpu.ckpt.npz              # Ctrl-C, then add --resume

Without a GPU the same training loop runs on NumPy and gives the numbers of serial_cnn.py. The
kernels' arithmetic is tested on any machine, compiled as C++. The script has not yet been run on a
GPU.
"""

import contextlib
import ctypes
import functools
import math
import sys
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common import (
    IMAGE_SHAPE,
    MEAN,
    MIB,
    MODELS,
    OUTPUT_STD,
    PAD,
    SGD,
    STD,
    WINOGRAD_AT,
    WINOGRAD_BT,
    WINOGRAD_G,
    Adam,
    BatchNorm2D,
    Checkpoint,
    Conv2D,
    Dense,
    Flatten,
    GlobalAvgPool,
    InputError,
    Layer,
    Model,
    RunLog,
    StopSignal,
    TrainingError,
    blas_warning,
    check_network_size,
    count_correct,
    draw_augmentation,
    epoch_order,
    limit_blas_threads,
    load_batch,
    load_dataset,
    make_model,
    make_optimizer,
    make_parser,
    require_finite,
    run_main,
    save_and_stop,
    softmax_cross_entropy,
    winograd_fits,
)

# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------

# A kernel is a C function that many GPU threads run at once. Threads come in blocks, the blocks of
# one launch form its grid, and a thread finds its element from blockIdx, blockDim and threadIdx.
# Two things make the kernels here fast:
#   - Memory is slow, registers are fast: a kernel does all that can be done while a value is in a
#     register.
#   - The 32 threads of a warp read memory together if they read neighbours: arrays are NHWC, and
#     neighbouring threads have neighbouring channels.

THREADS = 256  # threads in a block of a kernel that has one thread for each element
COLUMNS = 32  # threads along the channels in a block of a kernel that sums over rows
ROWS = 16  # threads along the rows in such a block
BUSY_BLOCKS = 256  # blocks of a matrix product that keep a whole GPU busy
MAX_ELEMENTS = 2**30  # in an array, because kernels count in 32 bits

# `real` is float or double. `int n` as the first parameter is the number of elements of a kernel
# that has one thread for each of them. A pointer may be null where "or null" is said.
KERNELS = r"""
#define KERNEL extern "C" __global__ void
typedef unsigned char byte;

// The element i of this thread. The last block may have more threads than elements are left.
#define ELEMENT_INDEX(i, n) \
    int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= n) return

// === 1. Data =================================================================================

// x (batch, HEIGHT, WIDTH, CHANNELS) = the images at `index`, augmented and normalised; y (batch) =
// their labels.
// aug_params: 81 flip + 9 dy + dx for each image of the data set, or null for no augmentation.
// The sizes are constants, those of the data set: dividing by a constant is a multiplication.
KERNEL load_images(int n, const byte *images, const int *labels, const int *index,
                   const byte *aug_params, real *x, int *y)
{
    ELEMENT_INDEX(i, n);
    int c = i % CHANNELS;
    int column = i / CHANNELS % WIDTH;
    int row = i / (WIDTH * CHANNELS) % HEIGHT;
    int image = i / (HEIGHT * WIDTH * CHANNELS);
    int source = index[image];
    if (i % (HEIGHT * WIDTH * CHANNELS) == 0) y[image] = labels[source];
    if (aug_params) {
        int params = aug_params[source];
        column = (params / 81 ? WIDTH - 1 - column : column) + params % 9 - PAD;
        row += params / 9 % 9 - PAD;
    }
    int value = 0;  // a crop may reach beyond the image, where pixels are black
    if (0 <= row && row < HEIGHT && 0 <= column && column < WIDTH)
        value = images[((source * HEIGHT + row) * WIDTH + column) * CHANNELS + c];
    const real scale[] = SCALE;
    const real shift[] = SHIFT;
    x[i] = value * scale[c] - shift[c];
}

// === 2. Convolution by im2col, ReLU and pooling ==============================================

// col (batch, oh, ow, k, k, c): the receptive field of each position of the output, zero outside
// the image. A thread copies one channel of one position, n = batch oh ow c: the divisions that
// find the position take longer than the k*k copies.
KERNEL im2col(int n, const real *x, int h, int w, int c, int k, int stride, int padding, int oh,
              int ow, real *col)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    int position = i / c;
    int image = position / ow / oh;
    int column = position % ow * stride - padding;
    int row = position / ow % oh * stride - padding;
    x += ((image * h + row) * w + column) * c + channel;
    col += position * k * k * c + channel;
    for (int a = 0; a < k; a++)
        for (int b = 0; b < k; b++) {
            bool inside = 0 <= row + a && row + a < h && 0 <= column + b && column + b < w;
            col[(a * k + b) * c] = inside ? x[(a * w + b) * c] : 0;
        }
}

// dx (batch, h, w, c) = the sum of the elements of dcol that are copies of it, + add (or null).
// A thread gathers the copies of its own element: no two threads write to one place, so that no
// atomic addition is needed and the sum is the same in every run.
KERNEL col2im(int n, const real *dcol, const real *add, int h, int w, int c, int k, int stride,
              int padding, int oh, int ow, real *dx)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    int column = i / c % w + padding;
    int row = i / c / w % h + padding;
    int image = i / c / w / h;
    real sum = add ? add[i] : 0;
    for (int a = row % stride; a < k; a += stride) {
        int r = (row - a) / stride;  // the row of the output that has this pixel at offset a
        if (row < a || r >= oh) continue;
        for (int b = column % stride; b < k; b += stride) {
            int q = (column - b) / stride;
            if (column < b || q >= ow) continue;
            sum += dcol[((((image * oh + r) * ow + q) * k + a) * k + b) * c + channel];
        }
    }
    dx[i] = sum;
}

// ReLU that propagates NaN: a training that diverges must show it in its loss. fmax(NaN, 0) is 0.
__device__ __forceinline__ real relu(real value) { return value < 0 ? 0 : value; }

// The maximum of a 2x2 window; argmax: the first place, 0 to 3, that has it. NaN if all four are,
// as after an update that has diverged.
__device__ __forceinline__ real window_max(real y0, real y1, real y2, real y3, byte *argmax)
{
    real upper = y0 >= y1 ? y0 : y1;
    real lower = y2 >= y3 ? y2 : y3;
    *argmax = upper >= lower ? (y0 >= y1 ? 0 : 1) : (y2 >= y3 ? 2 : 3);
    return upper >= lower ? upper : lower;
}

// out (batch, h, w, c) = ReLU(the maximum of each 2x2 window of y (batch, 2h, 2w, c), + bias).
// max(ReLU(y + b)) = ReLU(max(y) + b), so bias and ReLU work on a quarter of the values.
KERNEL bias_relu_pool(int n, const real *y, const real *bias, int h, int w, int c, real *out,
                      byte *argmax)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    int column = i / c % w;
    int row = i / c / w;  // of all images, one below the other
    int width = 2 * w * c;
    const real *corner = y + 2 * row * width + 2 * column * c + channel;
    real value = window_max(corner[0], corner[c], corner[width], corner[width + c], argmax + i);
    out[i] = relu(value + bias[channel]);
}

// dy (batch, 2h, 2w, c): dout at the place of each window's maximum, if the ReLU let it pass.
KERNEL bias_relu_pool_backward(int n, const real *dout, const real *out, const byte *argmax,
                               int h, int w, int c, real *dy)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    int column = i / c % w;
    int row = i / c / w;
    int width = 2 * w * c;
    real *corner = dy + 2 * row * width + 2 * column * c + channel;
    real d = out[i] > 0 ? dout[i] : 0;
    for (int place = 0; place < 4; place++)
        corner[place / 2 * width + place % 2 * c] = argmax[i] == place ? d : 0;
}

// === 3. Convolution by Winograd's F(4x4, 3x3) ================================================
//
// Forward, for each 4x4 tile of the output (backward is the same, transposed, from right to left):
//
//   g (3, 3)  weights          -> U = G g G^T    (6, 6) --+
//                                                         +-> M = sum over c_in of V * U
//   d (6, 6)  tile of x, with  -> V = B^T d B    (6, 6) --+   (6, 6) -> y = A^T M A  (4, 4)
//             a border of one
//
// V * U is a product of single elements: 36 multiplications in place of 9 * 16 = 144. All tiles
// and channels together, M = V U is 36 matrix products, which cuBLAS does in one call:
//   V (36, tiles, c_in), U (36, c_in, c_out), M (36, tiles, c_out), tiles = batch * h/4 * w/4.
// A thread transforms one tile of one channel, all of it in registers. Its loops are unrolled: only
// an array whose indices the compiler knows can be in registers.

#define UNROLL _Pragma("unroll")

// Element i of each of COUNT arrays (COUNT, n), to registers and from registers
template <int COUNT>
__device__ __forceinline__ void load(real *registers, const real *arrays, int n, int i)
{
    UNROLL for (int k = 0; k < COUNT; k++) registers[k] = arrays[k * n + i];
}

template <int COUNT>
__device__ __forceinline__ void store(real *arrays, const real *registers, int n, int i)
{
    UNROLL for (int k = 0; k < COUNT; k++) arrays[k * n + i] = registers[k];
}

// out (OUT, OUT) = L in (IN, IN) L^T, for the matrix L of the struct `Matrix`
template <class Matrix, int IN, int OUT>
__device__ __forceinline__ void transform(const real *in, real *out)
{
    real half[OUT * IN];  // L in
    UNROLL for (int j = 0; j < IN; j++) Matrix::times(in + j, IN, half + j, IN);
    UNROLL for (int i = 0; i < OUT; i++) Matrix::times(half + i * IN, 1, out + i * OUT, 1);
}

// The place of pixel k of a thread's 4x4 tile in an image (batch, h, w, c)
#define PIXEL(k) (((image * h + 4 * row + (k) / 4) * w + 4 * column + (k) % 4) * c + channel)

// The place of pooling window k of the tile's four in the pooled image (batch, h/2, w/2, c)
#define WINDOW(k) \
    (((image * h / 2 + 2 * row + (k) / 2) * (w / 2) + 2 * column + (k) % 2) * c + channel)

#define TILE_INDEX(i) \
    int channel = i % c; \
    int tile = i / c; \
    int tiles_w = w / 4; \
    int tiles_h = h / 4; \
    int column = tile % tiles_w; \
    int row = tile / tiles_w % tiles_h; \
    int image = tile / tiles_w / tiles_h

// U (36, c_in, c_out) = G g G^T of the weights (3, 3, c_in, c_out); n = c_in c_out
KERNEL filter_tiles(int n, const real *weights, real *U)
{
    ELEMENT_INDEX(i, n);
    real g[9], u[36];
    load<9>(g, weights, n, i);
    transform<G, 3, 6>(g, u);
    store<36>(U, u, n, i);
}

// dweights (3, 3, c_in, c_out) = G^T dU G, where dU (36, splits, c_in, c_out) is first summed over
// its splits; n = c_in c_out
KERNEL filter_tiles_backward(int n, const real *dU, int splits, real *dweights)
{
    ELEMENT_INDEX(i, n);
    real u[36], g[9];
    UNROLL for (int k = 0; k < 36; k++) {
        u[k] = 0;
        for (int split = 0; split < splits; split++) u[k] += dU[(k * splits + split) * n + i];
    }
    transform<GT, 6, 3>(u, g);
    store<9>(dweights, g, n, i);
}

// V = B^T d B of the 6x6 tiles d of x (batch, h, w, c), 4 apart, zero outside the image
KERNEL input_tiles(int n, const real *x, int h, int w, int c, real *V)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real d[36], v[36];
    UNROLL for (int k = 0; k < 36; k++) {
        int r = 4 * row - 1 + k / 6, q = 4 * column - 1 + k % 6;
        d[k] = 0 <= r && r < h && 0 <= q && q < w ? x[((image * h + r) * w + q) * c + channel] : 0;
    }
    transform<BT, 6, 6>(d, v);
    store<36>(V, v, n, i);
}

// y (batch, h, w, c) = A^T M A
KERNEL output_tiles(int n, const real *M, int h, int w, int c, real *y)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real m[36], out[16];
    load<36>(m, M, n, i);
    transform<AT, 6, 4>(m, out);
    UNROLL for (int k = 0; k < 16; k++) y[PIXEL(k)] = out[k];
}

// The same followed by bias_relu_pool: out and argmax are (batch, h/2, w/2, c). A tile has four
// whole pooling windows, so y itself is never stored.
KERNEL output_tiles_pool(int n, const real *M, const real *bias, int h, int w, int c, real *out,
                         byte *argmax)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real m[36], y[16];
    load<36>(m, M, n, i);
    transform<AT, 6, 4>(m, y);
    UNROLL for (int k = 0; k < 4; k++) {
        int place = WINDOW(k);
        const real *corner = y + 8 * (k / 2) + 2 * (k % 2);
        real value = window_max(corner[0], corner[1], corner[4], corner[5], argmax + place);
        out[place] = relu(value + bias[channel]);
    }
}

// dM = A dy A^T of dy (batch, h, w, c)
KERNEL output_tiles_backward(int n, const real *dy, int h, int w, int c, real *dM)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real d[16], m[36];
    UNROLL for (int k = 0; k < 16; k++) d[k] = dy[PIXEL(k)];
    transform<A, 4, 6>(d, m);
    store<36>(dM, m, n, i);
}

// The same from the gradient of the pooled values, dout (batch, h/2, w/2, c): dy is never stored.
KERNEL output_tiles_pool_backward(int n, const real *dout, const real *out, const byte *argmax,
                                  int h, int w, int c, real *dM)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real d[16], m[36];
    UNROLL for (int k = 0; k < 4; k++) {
        int place = WINDOW(k);
        real *corner = d + 8 * (k / 2) + 2 * (k % 2);
        real value = out[place] > 0 ? dout[place] : 0;
        UNROLL for (int j = 0; j < 4; j++)
            corner[j / 2 * 4 + j % 2] = argmax[place] == j ? value : 0;
    }
    transform<A, 4, 6>(d, m);
    store<36>(dM, m, n, i);
}

// dx (batch, h, w, c) = the sum of the overlapping 6x6 tiles B dV B^T, + add (or null).
// As in col2im, a thread gathers: it writes the 4x4 pixels of its own tile. Each neighbour reaches
// one pixel into them, and that pixel's row of B has only one entry. So a thread needs the 36
// values of its own tile and a frame of 28 of its neighbours': v (8, 8). Of its rows (and columns),
// 1 to 6 are the own tile's, 0 is the last row of the tile above, 7 the first row of the one below.
__device__ __forceinline__ int frame_tile(int k) { return k == 0 ? -1 : k == 7 ? 1 : 0; }
__device__ __forceinline__ int frame_place(int k) { return k == 0 ? 5 : k == 7 ? 0 : k - 1; }

KERNEL input_tiles_backward(int n, const real *dV, const real *add, int h, int w, int c, real *dx)
{
    ELEMENT_INDEX(i, n);
    TILE_INDEX(i);
    real v[64], d[16];
    UNROLL for (int k = 0; k < 64; k++) {
        int down = frame_tile(k / 8), right = frame_tile(k % 8);
        int place = 6 * frame_place(k / 8) + frame_place(k % 8);
        bool inside = 0 <= row + down && row + down < tiles_h
                      && 0 <= column + right && column + right < tiles_w;
        v[k] = inside ? dV[place * n + i + (down * tiles_w + right) * c] : 0;
    }
    transform<Overlap, 8, 4>(v, d);
    UNROLL for (int k = 0; k < 16; k++) {
        int place = PIXEL(k);
        dx[place] = add ? d[k] + add[place] : d[k];
    }
}

// === 4. Sums over the rows of (rows, c) ======================================================
//
// Two launches: first gridDim.y blocks for each COLUMNS channels write partial sums, then these
// few are summed. An atomic addition would need one launch only, but adds in another order in
// every run, and no two runs would agree bit for bit.
// Within a block of COLUMNS x ROWS threads, a thread first sums rows of its channel in a register;
// then the block's threads add up in shared memory, half of them at each step (a tree).

#define EACH_ROW(row, rows) \
    for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS)
#define PLACE (threadIdx.y * COLUMNS + threadIdx.x)

// The sum of `value` over the block's rows, returned to every thread.
__device__ __forceinline__ real block_sum(real value, real *shared)
{
    shared[PLACE] = value;
    for (unsigned half = ROWS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) shared[PLACE] += shared[PLACE + half * COLUMNS];
    }
    __syncthreads();
    value = shared[threadIdx.x];
    __syncthreads();  // all have read it before the next call overwrites it
    return value;
}

// partials (gridDim.y, c) of the sums over the rows of a, of those where mask (or null) is positive
KERNEL sum_rows(const real *a, const real *mask, int rows, int c, real *partials)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real sum = 0;
    if (channel < c) EACH_ROW(row, rows) {
        int i = row * c + channel;
        if (!mask || mask[i] > 0) sum += a[i];
    }
    sum = block_sum(sum, shared);
    if (channel < c && threadIdx.y == 0) partials[blockIdx.y * c + channel] = sum;
}

// sums (n) = partials (count, n) summed over count
KERNEL sum_partials(int n, const real *partials, int count, real *sums)
{
    ELEMENT_INDEX(i, n);
    real sum = 0;
    for (int p = 0; p < count; p++) sum += partials[p * n + i];
    sums[i] = sum;
}

// === 5. Batch normalisation ==================================================================

// Moments of a set of values: their number, mean, and sum of squared deviations from the mean.
// E x^2 - (E x)^2 would take one pass too, but loses all digits where the mean is large.
struct Moments { real count, mean, squares; };

// The moments of two sets together: Chan et al., "Updating Formulae and a Pairwise Algorithm for
// Computing Sample Variances", 1979, as in common.py.
__device__ __forceinline__ Moments merge(Moments a, Moments b)
{
    real count = a.count + b.count;
    if (count == 0) return a;
    real difference = b.mean - a.mean;
    real weight = b.count / count;
    real squares = a.squares + b.squares + difference * difference * a.count * weight;
    Moments both = {count, a.mean + difference * weight, squares};
    return both;
}

// The merged moments of the block's rows, returned to every thread.
__device__ __forceinline__ Moments block_merge(Moments moments, Moments *shared)
{
    shared[PLACE] = moments;
    for (unsigned half = ROWS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half)
            shared[PLACE] = merge(shared[PLACE], shared[PLACE + half * COLUMNS]);
    }
    __syncthreads();
    return shared[threadIdx.x];
}

// partials (gridDim.y, 3, c): the moments of the channels of x (rows, c)
KERNEL norm_moments(const real *x, int rows, int c, real *partials)
{
    __shared__ Moments shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    Moments m = {0, 0, 0};
    if (channel < c) EACH_ROW(row, rows) {
        real value = x[row * c + channel];
        real difference = value - m.mean;
        m.count += 1;
        m.mean += difference / m.count;
        m.squares += difference * (value - m.mean);
    }
    m = block_merge(m, shared);
    if (channel < c && threadIdx.y == 0) {
        real *partial = partials + blockIdx.y * 3 * c + channel;
        partial[0] = m.count;
        partial[c] = m.mean;
        partial[2 * c] = m.squares;
    }
}

// From the partials (count, 3, c): the batch's mean and inv_std = 1 / sqrt(var + eps); moves the
// running statistics towards the batch's. One block for COLUMNS channels.
KERNEL norm_statistics(const real *partials, int count, int c, real eps, real momentum,
                       real *running_mean, real *running_var, real *mean, real *inv_std)
{
    __shared__ Moments shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    Moments m = {0, 0, 0};
    if (channel < c) for (int p = threadIdx.y; p < count; p += ROWS) {
        const real *partial = partials + p * 3 * c + channel;
        Moments other = {partial[0], partial[c], partial[2 * c]};
        m = merge(m, other);
    }
    m = block_merge(m, shared);
    if (channel < c && threadIdx.y == 0) {
        mean[channel] = m.mean;
        inv_std[channel] = 1 / sqrt(m.squares / m.count + eps);
        running_mean[channel] += momentum * (m.mean - running_mean[channel]);
        running_var[channel] += momentum * (m.squares / (m.count - 1) - running_var[channel]);
    }
}

// inv_std (n) from running variances, for evaluation
KERNEL norm_inv_std(int n, const real *var, real eps, real *inv_std)
{
    ELEMENT_INDEX(i, n);
    inv_std[i] = 1 / sqrt(var[i] + eps);
}

// out = gamma x_hat + beta, + add (or null), then ReLU if asked for; x_hat = (x - mean) inv_std
KERNEL norm_forward(int n, const real *x, const real *mean, const real *inv_std, const real *gamma,
                    const real *beta, const real *add, int relu_too, int c, real *out)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    real value = (x[i] - mean[channel]) * inv_std[channel] * gamma[channel] + beta[channel];
    if (add) value += add[i];
    out[i] = relu_too ? relu(value) : value;
}

// partials (gridDim.y, 2, c) of dgamma = the sum of dout x_hat, and dbeta = the sum of dout.
// out: the output, if it went through a ReLU, or null
KERNEL norm_param_gradients(const real *dout, const real *out, const real *x, const real *mean,
                            const real *inv_std, int rows, int c, real *partials)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real dgamma = 0;
    real dbeta = 0;
    if (channel < c) {
        real m = mean[channel];
        real inv = inv_std[channel];
        EACH_ROW(row, rows) {
            int i = row * c + channel;
            real d = !out || out[i] > 0 ? dout[i] : 0;
            dgamma += d * (x[i] - m) * inv;
            dbeta += d;
        }
    }
    dgamma = block_sum(dgamma, shared);
    dbeta = block_sum(dbeta, shared);
    if (channel < c && threadIdx.y == 0) {
        real *partial = partials + blockIdx.y * 2 * c + channel;
        partial[0] = dgamma;
        partial[c] = dbeta;
    }
}

// dgamma and dbeta (c) from their partials (count, 2, c). One block for COLUMNS channels.
KERNEL norm_sum_gradients(const real *partials, int count, int c, real *dgamma, real *dbeta)
{
    __shared__ real shared[ROWS * COLUMNS];
    int channel = blockIdx.x * COLUMNS + threadIdx.x;
    real sums[2] = {0, 0};
    if (channel < c) for (int p = threadIdx.y; p < count; p += ROWS)
        for (int k = 0; k < 2; k++) sums[k] += partials[(2 * p + k) * c + channel];
    for (int k = 0; k < 2; k++) sums[k] = block_sum(sums[k], shared);
    if (channel < c && threadIdx.y == 0) {
        dgamma[channel] = sums[0];
        dbeta[channel] = sums[1];
    }
}

// dx, and dadd (or null), the gradient of what was added. The mean depends on x and so does the
// variance: that is what dbeta and dgamma, as means over the batch, take away from dout.
KERNEL norm_input_gradient(int n, const real *dout, const real *out, const real *x,
                           const real *mean, const real *inv_std, const real *gamma,
                           const real *dgamma, const real *dbeta, int c, real *dx, real *dadd)
{
    ELEMENT_INDEX(i, n);
    int channel = i % c;
    real d = !out || out[i] > 0 ? dout[i] : 0;
    real x_hat = (x[i] - mean[channel]) * inv_std[channel];
    real fraction = (real)1 / (n / c);
    if (dadd) dadd[i] = d;
    dx[i] = gamma[channel] * inv_std[channel]
            * (d - (dbeta[channel] + x_hat * dgamma[channel]) * fraction);
}

// === 6. The head: average pooling, dense layers, loss ========================================

// out (batch, c): the mean of x (batch, positions, c)
KERNEL average(int n, const real *x, int positions, int c, real *out)
{
    ELEMENT_INDEX(i, n);
    const real *first = x + i / c * positions * c + i % c;
    real sum = 0;
    for (int p = 0; p < positions; p++) sum += first[p * c];
    out[i] = sum / positions;
}

KERNEL average_backward(int n, const real *dout, int positions, int c, real *dx)
{
    ELEMENT_INDEX(i, n);
    dx[i] = dout[i / (positions * c) * c + i % c] / positions;
}

KERNEL add_bias(int n, real *y, const real *bias, int relu_too, int c)
{
    ELEMENT_INDEX(i, n);
    real value = y[i] + bias[i % c];
    y[i] = relu_too ? relu(value) : value;
}

KERNEL relu_backward(int n, real *dout, const real *out)
{
    ELEMENT_INDEX(i, n);
    if (!(out[i] > 0)) dout[i] = 0;
}

// dlogits (batch, classes) = softmax - one-hot label, and in sums[3] the summed loss and how many
// labels are the largest and among the five largest logits; `add`: added to what is there. One
// block, a thread for each image: that is little work, and so the sums need no second launch.
KERNEL softmax_cross_entropy(const real *logits, const int *labels, int batch, int classes,
                             int add, real *dlogits, double *sums)
{
    __shared__ double shared[3][THREADS];
    double local[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < batch; i += THREADS) {
        const real *row = logits + i * classes;
        int label = labels[i];
        int above = 0;  // classes with a larger logit than the label's
        int equal_before = 0;  // classes that argmax would take first
        real correct = row[label];
        real largest = row[0];
        real sum = 0;
        for (int k = 0; k < classes; k++) {
            if (!(row[k] <= largest)) largest = row[k];  // a NaN too: the loss must show it
            above += row[k] > correct;
            equal_before += k < label && row[k] == correct;
        }
        // Less the largest logit, which changes nothing in the result, exp cannot overflow.
        for (int k = 0; k < classes; k++) sum += exp(row[k] - largest);
        for (int k = 0; k < classes; k++)
            dlogits[i * classes + k] = exp(row[k] - largest) / sum - (k == label);
        local[0] += log(sum) - (correct - largest);
        local[1] += above + equal_before == 0;
        local[2] += above < 5;
    }
    for (int k = 0; k < 3; k++) shared[k][threadIdx.x] = local[k];
    for (unsigned half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            for (int k = 0; k < 3; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        for (int k = 0; k < 3; k++) sums[k] = (add ? sums[k] : 0) + shared[k][0];
}

// === 7. Optimizers, over the model's flat buffers ============================================
//
// scale: 1 / the number of images, since gradients are sums over the batch. counters[0] is the
// number of steps; it is kept on the GPU because a captured graph cannot be given a new one.

KERNEL sgd(int n, real *w, const real *grads, real *velocity, real lr, real momentum,
           real weight_decay, real scale, double *counters)
{
    ELEMENT_INDEX(i, n);
    real v = momentum * velocity[i] + (grads[i] * scale + weight_decay * w[i]);
    velocity[i] = v;
    w[i] -= lr * v;
    if (i == 0) counters[0] += 1;
}

// counters: the number of steps, 1 - beta1^steps, sqrt(1 - beta2^steps). One thread, in a launch
// of its own, because all threads of the next kernel need them.
KERNEL adam_begin(int n, double beta1, double beta2, double *counters)
{
    ELEMENT_INDEX(i, n);
    counters[0] += 1;
    counters[1] = 1 - pow(beta1, counters[0]);
    counters[2] = sqrt(1 - pow(beta2, counters[0]));
}

KERNEL adam(int n, real *w, const real *grads, real *m, real *v, real lr, real beta1, real beta2,
            real eps, real weight_decay, real scale, const double *counters)
{
    ELEMENT_INDEX(i, n);
    real g = grads[i] * scale + weight_decay * w[i];
    m[i] = beta1 * m[i] + (1 - beta1) * g;
    v[i] = beta2 * v[i] + (1 - beta2) * g * g;
    w[i] -= lr / (real)counters[1] * (m[i] / (sqrt(v[i]) / (real)counters[2] + eps));
}
"""


def kernel_source(dtype, image_shape=IMAGE_SHAPE, mean=MEAN, std=STD) -> str:
    """The kernels for float32 or float64, after the constants that they are compiled with.

    image_shape: (H, W, C); mean, std: one number for each channel. All three are the data set's.
    """
    std = np.array(std)
    h, w, c = image_shape
    constants = {
        "real": {4: "float", 8: "double"}[np.dtype(dtype).itemsize],
        "PAD": PAD,
        "THREADS": THREADS,
        "COLUMNS": COLUMNS,
        "ROWS": ROWS,
        "HEIGHT": h,
        "WIDTH": w,
        "CHANNELS": c,
        "SCALE": _array_literal(1 / (255 * std)),
        "SHIFT": _array_literal(np.array(mean) / std),
    }
    source = "".join(f"#define {name} {value}\n" for name, value in constants.items())

    # For input_tiles_backward: the four rows of B that belong to a tile's own pixels, and the one
    # entry each by which the tile before and the tile after reach into them.
    B = WINOGRAD_BT.T
    overlap = np.zeros((4, 8))
    overlap[:, 1:7] = B[1:5]
    overlap[0, 0] = B[5, 5]
    overlap[3, 7] = B[0, 0]

    source += _unrolled_product("BT", WINOGRAD_BT)
    source += _unrolled_product("G", WINOGRAD_G)
    source += _unrolled_product("GT", WINOGRAD_G.T)
    source += _unrolled_product("AT", WINOGRAD_AT)
    source += _unrolled_product("A", WINOGRAD_AT.T)
    source += _unrolled_product("Overlap", overlap)
    return source + KERNELS


def _array_literal(values):
    return "{" + ", ".join(f"(real){value!r}" for value in values.tolist()) + "}"


def _unrolled_product(name, matrix):
    """A struct whose times() multiplies the matrix by a vector: written out, without its zeros."""
    lines = []
    for i, row in enumerate(matrix.tolist()):
        terms = [f"(real){value!r} * in[{j} * step]" for j, value in enumerate(row) if value]
        lines.append(f"        out[{i} * out_step] = {' + '.join(terms)};\n")
    signature = "void times(const real *in, int step, real *out, int out_step)"
    return (
        f"struct {name} {{\n    static __device__ __forceinline__ {signature}\n"
        f"    {{\n{''.join(lines)}    }}\n}};\n"
    )


# --------------------------------------------------------------------------------------------------
# Devices: NumPy on the CPU, CuPy on a GPU
# --------------------------------------------------------------------------------------------------


class Cpu:
    """The training steps on NumPy, with the layers of common.py: what serial_cnn.py does."""

    name = "cpu"
    uuid = None
    asynchronous = False  # whether the device works while the host goes on

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)
        self.mean = MEAN
        self.std = STD

    def put_data(self, data):
        """The data set on the device, which from here on loads images of its size."""
        self.mean = data.mean
        self.std = data.std
        return data

    def make_model(self, name, seed, image_shape=IMAGE_SHAPE, classes=10):
        return make_model(name, seed, self.dtype, image_shape, classes)

    def make_optimizer(self, model, args):
        return make_optimizer(model, args)

    def put(self, array):
        """An array of the host, on the device."""
        return array

    def get(self, array):
        """An array of the device, on the host."""
        return array

    def load(self, images, labels, index, aug_params=None):
        """The batch at `index`: x (n, H, W, C), normalised, and labels (n,).

        aug_params: those of all images, from draw_augmentation(); None for no augmentation.
        """
        return load_batch(images, labels, index, self.dtype, self.mean, self.std, aug_params)

    def loss(self, logits, labels, sums=None):
        """dlogits and [summed loss, top-1, top-5]; the latter added to `sums` if given."""
        loss, dlogits = softmax_cross_entropy(logits, labels)
        result = np.array([loss, *count_correct(logits, labels)])
        if sums is not None:
            sums += result
            result = sums
        return dlogits, result

    def start_read(self, sums):
        """Start to copy sums to the host; returns a function that waits for them, as floats."""
        return sums.tolist

    def mark(self):
        """A point in time, for seconds()."""
        return time.perf_counter()

    def seconds(self, since, until):
        """Seconds between two marks that the device has passed."""
        return until - since

    def memory(self):
        """Totals for the run log: the device's memory in MiB."""
        return {}


class Gpu:
    """The same duties on the GPU that CuPy uses, and what the layers below need of it.

    All work goes to one stream: calls return at once, and the GPU does the work in their order.
    """

    asynchronous = True

    def __init__(self, dtype, tf32=False):
        import cupy

        self.cupy = cupy
        self.dtype = np.dtype(dtype)
        self.workspaces = {}
        self.stream = own_stream()
        number = cupy.cuda.Device().id
        self.name = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()
        self.uuid = gpu_uuid(number)
        self.compile(IMAGE_SHAPE, MEAN, STD)
        self.gemm = Cublas(self.dtype, self.stream, tf32).gemm

    # -- what the training needs, as of Cpu --------------------------------------------------------

    def compile(self, image_shape, mean, std):
        """Compile the kernels for a data set; CuPy does so when the first of them is called."""
        source = kernel_source(self.dtype, image_shape, mean, std)
        self.module = self.cupy.RawModule(code=source, options=("--std=c++14",))
        self.functions = {}

    def put_data(self, data):
        largest = max(data.x_train.size, data.x_test.size)
        if largest >= 2**31:
            raise InputError(
                f"{largest:,} values in the images, the kernels count to 2^31: use a smaller "
                "--subset, or prepare the data with a smaller --image-size"
            )
        self.compile(data.image_shape, data.mean, data.std)
        return data._replace(
            x_train=self.put(data.x_train),
            y_train=self.put(data.y_train.astype(np.int32)),
            x_test=self.put(data.x_test),
            y_test=self.put(data.y_test.astype(np.int32)),
        )

    def make_model(self, name, seed, image_shape=IMAGE_SHAPE, classes=10):
        layers = {"cnn": cnn_layers, "resnet18": resnet18_layers}[name]
        model = GpuModel(layers(seed, self.dtype, image_shape, classes))
        model.to_device(self)
        return model

    def make_optimizer(self, model, args):
        sgd = functools.partial(GpuSGD, self)
        adam = functools.partial(GpuAdam, self)
        return make_optimizer(model, args, sgd, adam)

    def put(self, array):
        return self.cupy.asarray(np.ascontiguousarray(array))

    def get(self, array):
        return self.cupy.asnumpy(array)

    def load(self, images, labels, index, aug_params=None):
        x = self.workspace("x", (len(index), *images.shape[1:]))
        y = self.workspace("y", (len(index),), np.int32)
        self.elementwise("load_images", x.size, images, labels, index, aug_params, x, y)
        return x, y

    def loss(self, logits, labels, sums=None):
        add = sums is not None
        result = sums if add else self.workspace("sums", (3,), np.float64)
        dlogits = self.workspace("dlogits", logits.shape)
        args = (logits, labels, *logits.shape, add, dlogits, result)
        self.launch("softmax_cross_entropy", (1,), (THREADS,), *args)
        return dlogits, result

    def start_read(self, sums):
        import cupyx

        # Only into pinned memory can the GPU copy while the host goes on.
        host = cupyx.empty_pinned(sums.shape, sums.dtype)
        sums.get(stream=self.stream, out=host, blocking=False)
        copied = self.mark()

        def wait():
            copied.synchronize()
            return host.tolist()

        return wait

    def mark(self):
        event = self.cupy.cuda.Event()
        event.record(self.stream)
        return event

    def seconds(self, since, until):
        return self.cupy.cuda.get_elapsed_time(since, until) / 1000

    def memory(self):
        pool = self.cupy.get_default_memory_pool()
        free, total = self.cupy.cuda.runtime.memGetInfo()
        return {
            "gpu_arrays_mb": pool.used_bytes() / MIB,  # this process's arrays
            "gpu_pool_mb": pool.total_bytes() / MIB,  # what CuPy has reserved for them
            "gpu_device_mb": (total - free) / MIB,  # what all processes use of this GPU
        }

    # -- what the layers need ----------------------------------------------------------------------

    def workspace(self, key, shape, dtype=None):
        """An array for `key`, whose memory later calls with the same key share; grows if it must.

        So once the largest batch has been seen, a step allocates nothing and its arrays stay where
        they are. A captured graph needs both.
        """
        size = math.prod(shape)
        if size > MAX_ELEMENTS:
            raise InputError(f"an array would have {size:,} values: use a smaller --batch-size")
        kept = self.workspaces.get(key)
        if kept is None or kept.size < size:
            self.workspaces[key] = kept = None  # freed before more is asked for
            kept = self.allocate(size, dtype or self.dtype)
            self.workspaces[key] = kept
        return kept[:size].reshape(shape)

    def allocate(self, size, dtype):
        return self.cupy.empty(size, dtype)

    def launch(self, name, grid, block, *args):
        """Run a kernel with a grid of blocks of threads."""
        if name not in self.functions:
            self.functions[name] = self.module.get_function(name)
        self.functions[name](grid, block, tuple(map(self.argument, args)))

    def argument(self, value):
        """A kernel's argument as C has it: int, real or null pointer; arrays stay as they are."""
        if value is None:
            return np.uintp(0)
        if isinstance(value, np.generic):  # the caller has chosen the type
            return value
        if isinstance(value, float):
            return self.dtype.type(value)
        if isinstance(value, int):
            return np.int32(value)
        return value

    def elementwise(self, name, n, *args):
        """Run a kernel that has one thread for each of n elements."""
        self.launch(name, (math.ceil(n / THREADS),), (THREADS,), n, *args)

    def reduce_rows(self, name, rows, c, values, *args):
        """Run a kernel that sums `values` values for each channel over the rows of (rows, c).

        Returns its partial sums (count, values, c) and count.
        """
        columns = math.ceil(c / COLUMNS)
        # At least four rows for a thread, and at most 512 blocks in all, enough to fill a GPU.
        count = max(1, min(rows // (4 * ROWS), 512 // columns))
        partials = self.workspace("partials", (count, values, c))
        self.launch(name, (columns, count), (COLUMNS, ROWS), *args, rows, c, partials)
        return partials, count

    def combine_partials(self, name, c, *args):
        """Run a kernel that combines the partial sums of reduce_rows()."""
        self.launch(name, (math.ceil(c / COLUMNS),), (COLUMNS, ROWS), *args)

    def bias_gradient(self, dout, db, mask=None):
        """db (c,) = the sum of dout (..., c) where `mask` is positive."""
        c = db.size
        partials, count = self.reduce_rows("sum_rows", dout.size // c, c, 1, dout, mask)
        self.elementwise("sum_partials", c, partials, count, db)

    def split_gemm(self, a, b):
        """aᵀ b of stacks (count, rows, m), (count, rows, n) → (count, splits, m, n) and splits.

        The products still have to be summed over splits. cuBLAS gives each tile of a product to one
        block. A weight gradient has few tiles, each of them a sum over thousands of rows, and would
        leave most of a GPU idle: so the rows are split ("split-K") until there are enough tiles.
        """
        count, rows, m = a.shape
        n = b.shape[2]
        tiles = count * math.ceil(m / 64) * math.ceil(n / 64)
        splits = 1
        while splits * tiles < BUSY_BLOCKS and rows % (2 * splits) == 0:
            if rows // (2 * splits) < 64:
                break
            splits *= 2
        products = self.workspace("products", (count, splits, m, n))
        a = a.reshape(count * splits, -1, m)
        b = b.reshape(count * splits, -1, n)
        self.gemm(a, b, products.reshape(-1, m, n), transpose_a=True)
        return products, splits


class Cublas:
    """Matrix products by cuBLAS, called directly.

    CuPy refuses to call cuBLAS while a stream is captured (cupy/cupy #6290), though cuBLAS can.
    """

    WORKSPACE = 32 * MIB  # as NVIDIA advises for the largest GPUs

    def __init__(self, dtype, stream, tf32):
        import cupy

        library = load_cublas()
        letter = {4: "S", 8: "D"}[dtype.itemsize]
        pointer = ctypes.c_void_p
        integer = ctypes.c_int
        stride = ctypes.c_longlong

        # The types of C's arguments, which ctypes cannot know. Both functions begin with
        # handle, transpose A, transpose B, m, n, k, alpha.
        begin = [pointer, integer, integer, integer, integer, integer, pointer]

        # cublasSgemm_v2(..., A, lda, B, ldb, beta, C, ldc)
        matrix = [pointer, integer]
        self.single = library[f"cublas{letter}gemm_v2"]
        self.single.argtypes = [*begin, *matrix, *matrix, pointer, *matrix]

        # cublasSgemmStridedBatched(..., A, lda, strideA, B, ldb, strideB, beta, C, ldc, strideC,
        # count): matrix i of a stack begins i strides after its first
        matrix = [pointer, integer, stride]
        self.batched = library[f"cublas{letter}gemmStridedBatched"]
        self.batched.argtypes = [*begin, *matrix, *matrix, pointer, *matrix, integer]

        self.alpha = np.ones(1, dtype)  # out = alpha a b + beta out
        self.beta = np.zeros(1, dtype)
        self.handle = pointer()
        check_cublas(library.cublasCreate_v2(ctypes.byref(self.handle)))
        check_cublas(library.cublasSetStream_v2(self.handle, pointer(stream.ptr)))

        # Within a graph cuBLAS would allocate a workspace for each product: it gets this one.
        self.workspace = cupy.empty(self.WORKSPACE, np.uint8)
        address = pointer(self.workspace.data.ptr)
        size = ctypes.c_size_t(self.WORKSPACE)
        check_cublas(library.cublasSetWorkspace_v2(self.handle, address, size))

        mode = 3 if tf32 else 0  # CUBLAS_TF32_TENSOR_OP_MATH, CUBLAS_DEFAULT_MATH
        check_cublas(library.cublasSetMathMode(self.handle, mode))

    def gemm(self, a, b, out, transpose_a=False, transpose_b=False):
        """out = a @ b, for matrices stored row by row or stacks of them (count, rows, columns).

        cuBLAS expects matrices column by column, and so takes each of ours for its transpose.
        Because outᵀ = bᵀ aᵀ, it computes the right thing without a copy if it is given b first,
        then a, and the shape of outᵀ, (n, m).
        """
        m, n = out.shape[-2:]
        k = a.shape[-2] if transpose_a else a.shape[-1]
        lda = a.shape[-1]  # the leading dimension: how far apart rows of ours begin
        ldb = b.shape[-1]
        alpha = self.alpha.ctypes.data
        beta = self.beta.ctypes.data
        begin = (self.handle, int(transpose_b), int(transpose_a), n, m, k, alpha)
        if out.ndim == 2 or len(out) == 1:
            a_and_b = (b.data.ptr, ldb, a.data.ptr, lda)
            status = self.single(*begin, *a_and_b, beta, out.data.ptr, n)
        else:
            a_and_b = (b.data.ptr, ldb, k * n, a.data.ptr, lda, m * k)
            status = self.batched(*begin, *a_and_b, beta, out.data.ptr, n, m * n, len(out))
        check_cublas(status)


def check_cublas(status):
    if status:
        raise TrainingError(f"cuBLAS failed with status {status}")


def load_cublas():
    """The cuBLAS that belongs to CuPy's CUDA."""
    from cupy_backends.cuda.api import runtime
    from cupy_backends.cuda.libs import cublas  # noqa: F401 (it finds and loads the library)

    return ctypes.CDLL(f"libcublas.so.{runtime.runtimeGetVersion() // 1000}")


@functools.cache
def own_stream():
    """The stream of all that this process does on a GPU: the default stream cannot be captured."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    stream.use()
    return stream


def gpu_uuid(number):
    """A GPU's name for NVML, from the driver: CuPy's ends at the first byte that is zero."""
    octets = (ctypes.c_ubyte * 16)()
    status = ctypes.CDLL("libcuda.so.1").cuDeviceGetUuid(octets, number)
    return None if status else f"GPU-{uuid.UUID(bytes=bytes(octets))}"


def choose_device(args):
    """The Gpu or Cpu that --device asks for."""
    if args.device == "cpu":
        if args.graph or args.tf32 == "on":
            raise InputError("--graph and --tf32 need a GPU: leave them out, or --device cpu")
        return make_cpu(args.dtype)
    missing = missing_for_gpu()
    if missing is None:
        return Gpu(args.dtype, args.tf32 == "on")
    if args.device == "cuda":
        raise InputError(f"--device cuda: {missing}")
    print(f"Training on the CPU with NumPy: {missing}", file=sys.stderr)
    return make_cpu(args.dtype)


def make_cpu(dtype):
    """The Cpu, limited to one core as serial_cnn.py is."""
    limit_blas_threads(1)
    warning = blas_warning()
    if warning:
        print(warning, file=sys.stderr)
    return Cpu(dtype)


def missing_for_gpu() -> str | None:
    """What is missing for training on a GPU, and what to do about it; None if nothing is."""
    install = "python -m pip install -r requirements-gpu.txt"
    no_driver = "" if has_driver() else "no NVIDIA driver is found"
    try:
        import cupy
    except ImportError as error:
        if getattr(error, "name", None) != "cupy":
            return f"CuPy cannot be imported ({one_line(error)}): install it again"
        both = f"{no_driver}, and " if no_driver else ""
        return f"{both}CuPy is not installed: {install}"
    if no_driver:
        return no_driver
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"{one_line(error)}: update the NVIDIA driver, or check CUDA_VISIBLE_DEVICES"
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
        load_cublas()
    except (ImportError, OSError, RuntimeError) as error:
        return f"a CUDA library is missing ({one_line(error)}): {install}"
    return None


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def one_line(error):
    return " ".join(str(error).split())


# --------------------------------------------------------------------------------------------------
# Layers: GpuX is common.py's X, computed by the kernels
# --------------------------------------------------------------------------------------------------

# There are two kinds of memory. self.workspace() has arrays of one layer, which must last from its
# forward() to its backward(). gpu.workspace() has arrays that all layers share, because the next
# kernel or layer uses them up at once: im2col's gradients, Winograd's products, and gradients of
# activations, "dx" of the input of a layer or block, "dy" of the output of a convolution.


class GpuLayer(Layer):
    """What the layers below share. GpuModel.to_device() sets `gpu`."""

    gpu = None

    def workspace(self, name, shape, dtype=None):
        """An array of this layer's own, kept between calls."""
        return self.gpu.workspace((id(self), name), shape, dtype)


class GpuConv2D(GpuLayer, Conv2D):
    """Conv2D without bias, by im2col and one matrix product for the whole batch.

    backward(dout, add): `add` is added to dx, in the kernel that writes it.
    """

    dx_name = "dx"  # the shared array that dx is written to

    def forward(self, x):
        self.x_shape = x.shape
        y = self.workspace("out", self._out_shape(x.shape))
        self._convolve(x, y)
        return y

    def backward(self, dout, add=None):
        self._weight_gradient(dout)
        if not self.requires_input_grad:
            return None
        return self._input_gradient(dout, add)

    def _out_shape(self, x_shape):
        n, h, w, _ = x_shape
        oh = (h + 2 * self.padding - self.kernel_size) // self.stride + 1
        ow = (w + 2 * self.padding - self.kernel_size) // self.stride + 1
        return n, oh, ow, self.b.size

    def _geometry(self, out_shape):
        """The kernels' arguments h, w, c, k, stride, padding, oh, ow."""
        _, oh, ow, _ = out_shape
        return (*self.x_shape[1:], self.kernel_size, self.stride, self.padding, oh, ow)

    def _convolve(self, x, y):
        """y (n, oh, ow, c_out) = col (n·oh·ow, k·k·c_in) @ W (k·k·c_in, c_out); keeps col."""
        self._check_channels(x)
        rows = y.size // self.b.size
        window = self.W.size // self.b.size
        self.col = self.workspace("col", (rows, window))
        self.gpu.elementwise("im2col", rows * x.shape[3], x, *self._geometry(y.shape), self.col)
        self.gpu.gemm(self.col, self.W.reshape(window, -1), y.reshape(rows, -1))

    def _weight_gradient(self, dy):
        """dW (k·k·c_in, c_out) = colᵀ @ dy"""
        rows, window = self.col.shape
        products, splits = self.gpu.split_gemm(
            self.col.reshape(1, rows, window), dy.reshape(1, rows, -1)
        )
        self.gpu.elementwise("sum_partials", self.dW.size, products, splits, self.dW)

    def _input_gradient(self, dy, add):
        """dx from dcol (n·oh·ow, k·k·c_in) = dy @ Wᵀ"""
        rows, window = self.col.shape
        dcol = self.gpu.workspace("dcol", (rows, window))
        self.gpu.gemm(dy.reshape(rows, -1), self.W.reshape(window, -1), dcol, transpose_b=True)
        dx = self.gpu.workspace(self.dx_name, self.x_shape)
        self.gpu.elementwise("col2im", dx.size, dcol, add, *self._geometry(dy.shape), dx)
        return dx


class GpuConvReLUPool(GpuConv2D):
    """ConvReLUPool by im2col: bias, ReLU and pooling in one kernel after the product.

    H and W: even.
    """

    def forward(self, x):
        self.x_shape = x.shape
        n, h, w, c = self._out_shape(x.shape)
        if h % 2 or w % 2:
            raise InputError(
                f"GpuConvReLUPool takes images of 2n x 2m pixels, not {h}x{w}: prepare the data "
                "with an --image-size that is a multiple of 4"
            )
        y = self.gpu.workspace("before pooling", (n, h, w, c))
        self._convolve(x, y)
        pooled = (n, h // 2, w // 2, c)
        self.out = self.workspace("out", pooled)
        self.argmax = self.workspace("argmax", pooled, np.uint8)
        args = (y, self.b, *pooled[1:], self.out, self.argmax)
        self.gpu.elementwise("bias_relu_pool", self.out.size, *args)
        return self.out

    def backward(self, dout, add=None):
        n, h, w, c = self.out.shape
        # y is not needed any more, argmax says enough: dy takes its place.
        dy = self.gpu.workspace("before pooling", (n, 2 * h, 2 * w, c))
        args = (dout, self.out, self.argmax, h, w, c, dy)
        self.gpu.elementwise("bias_relu_pool_backward", self.out.size, *args)
        self.gpu.bias_gradient(dout, self.db, mask=self.out)
        return super().backward(dy, add)


class GpuWinogradConv2D(GpuConv2D):
    """WinogradConv2D without bias: 36 matrix products in one call. H and W: multiples of 4."""

    def forward(self, x):
        self.x_shape = x.shape
        M = self._multiply_tiles(x)
        y = self.workspace("out", self._out_shape(x.shape))
        self.gpu.elementwise("output_tiles", y.size // 16, M, *y.shape[1:], y)
        return y

    def backward(self, dout, add=None):
        n, h, w, c = dout.shape
        dM = self.gpu.workspace("M", (36, n * h * w // 16, c))
        self.gpu.elementwise("output_tiles_backward", dout.size // 16, dout, h, w, c, dM)
        return self._backward_tiles(dM, add)

    def _multiply_tiles(self, x):
        """M (36, tiles, c_out) = V (36, tiles, c_in) @ U (36, c_in, c_out); keeps V and U."""
        self._check_channels(x)
        n, h, w, c_in = x.shape
        c_out = self.b.size
        tiles = n * h * w // 16
        self.U = self.workspace("U", (36, c_in, c_out))
        self.V = self.workspace("V", (36, tiles, c_in))
        self.gpu.elementwise("filter_tiles", c_in * c_out, self.W, self.U)
        self.gpu.elementwise("input_tiles", tiles * c_in, x, h, w, c_in, self.V)
        M = self.gpu.workspace("M", (36, tiles, c_out))
        self.gpu.gemm(self.V, self.U, M)
        return M

    def _backward_tiles(self, dM, add):
        """From dM: dU = Vᵀ @ dM and from it dW; dV = dM @ Uᵀ and from it dx."""
        _, tiles, c_in = self.V.shape
        dU, splits = self.gpu.split_gemm(self.V, dM)
        self.gpu.elementwise("filter_tiles_backward", self.W.size // 9, dU, splits, self.dW)
        if not self.requires_input_grad:
            return None
        dV = self.gpu.workspace("dV", self.V.shape)
        self.gpu.gemm(dM, self.U, dV, transpose_b=True)
        dx = self.gpu.workspace(self.dx_name, self.x_shape)
        args = (dV, add, *self.x_shape[1:], dx)
        self.gpu.elementwise("input_tiles_backward", tiles * c_in, *args)
        return dx


class GpuWinogradReLUPool(GpuWinogradConv2D):
    """WinogradReLUPool: bias, ReLU and pooling while a tile is in registers."""

    def forward(self, x):
        self.x_shape = x.shape
        M = self._multiply_tiles(x)
        n, h, w, c = self._out_shape(x.shape)
        pooled = (n, h // 2, w // 2, c)
        self.out = self.workspace("out", pooled)
        self.argmax = self.workspace("argmax", pooled, np.uint8)
        args = (M, self.b, h, w, c, self.out, self.argmax)
        self.gpu.elementwise("output_tiles_pool", n * h * w * c // 16, *args)
        return self.out

    def backward(self, dout, add=None):
        n, h, w, c = self._out_shape(self.x_shape)
        dM = self.gpu.workspace("M", (36, n * h * w // 16, c))
        args = (dout, self.out, self.argmax, h, w, c, dM)
        self.gpu.elementwise("output_tiles_pool_backward", n * h * w * c // 16, *args)
        self.gpu.bias_gradient(dout, self.db, mask=self.out)
        return self._backward_tiles(dM, add)


class GpuBatchNorm2D(GpuLayer, BatchNorm2D):
    """BatchNorm2D, then + `add`, then ReLU if `relu`. backward() sets `dadd`, add's gradient."""

    def __init__(self, channels, relu=False, *, dtype=np.float32):
        super().__init__(channels, dtype=dtype)
        self.relu = relu

    def forward(self, x, add=None):
        gpu = self.gpu
        c = x.shape[3]
        self.x = x
        self.added = add is not None
        self.mean = self.workspace("mean", (c,))
        self.inv_std = self.workspace("inv_std", (c,))
        if self.training:
            # x is read twice: here for the statistics, below to normalise with them.
            mean = self.mean
            partials, count = gpu.reduce_rows("norm_moments", x.size // c, c, 3, x)
            running = (self.running_mean, self.running_var)
            args = (partials, count, c, self.eps, self.momentum, *running, mean, self.inv_std)
            gpu.combine_partials("norm_statistics", c, *args)
        else:
            mean = self.running_mean
            gpu.elementwise("norm_inv_std", c, self.running_var, self.eps, self.inv_std)
        self.out = self.workspace("out", x.shape)
        args = (x, mean, self.inv_std, self.gamma, self.beta, add, self.relu, c, self.out)
        gpu.elementwise("norm_forward", x.size, *args)
        return self.out

    def backward(self, dout):
        gpu = self.gpu
        c = self.gamma.size
        x = self.x
        # Where the output is 0, the ReLU has stopped the value, and stops the gradient: no mask is
        # kept. x_hat is computed again, which is cheaper than to keep and read it.
        out = self.out if self.relu else None
        saved = (dout, out, x, self.mean, self.inv_std)

        partials, count = gpu.reduce_rows("norm_param_gradients", x.size // c, c, 2, *saved)
        gpu.combine_partials("norm_sum_gradients", c, partials, count, c, self.dgamma, self.dbeta)

        dx = gpu.workspace("dy", x.shape)
        self.dadd = gpu.workspace("dadd", x.shape) if self.added else None
        args = (*saved, self.gamma, self.dgamma, self.dbeta, c, dx, self.dadd)
        gpu.elementwise("norm_input_gradient", x.size, *args)
        return dx


class GpuBasicBlock(Layer):
    """BasicBlock. Its additions, one forward and one backward, are done by the kernel before them.

    conv: the class of the 3x3 convolutions with stride 1.
    "dadd" and "dshortcut" are the gradients at the two ends of the shortcut.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        stride=1,
        conv=GpuWinogradConv2D,
        *,
        rng=None,
        dtype=np.float32,
    ):
        options = {"bias": False, "rng": np.random.default_rng(rng), "dtype": dtype}
        if stride == 1:
            self.conv1 = conv(in_channels, out_channels, **options)
        else:
            self.conv1 = GpuConv2D(in_channels, out_channels, stride=stride, **options)
        self.norm1 = GpuBatchNorm2D(out_channels, relu=True, dtype=dtype)
        self.conv2 = conv(out_channels, out_channels, **options)
        self.norm2 = GpuBatchNorm2D(out_channels, relu=True, dtype=dtype)
        self.shortcut = []
        if stride != 1 or in_channels != out_channels:
            conv = GpuConv2D(in_channels, out_channels, 1, stride, 0, **options)
            conv.dx_name = "dshortcut"  # must last until conv1's backward() adds it to "dx"
            self.shortcut = [conv, GpuBatchNorm2D(out_channels, dtype=dtype)]

    def leaves(self):
        yield from (self.conv1, self.norm1, self.conv2, self.norm2, *self.shortcut)

    def forward(self, x):
        shortcut = x
        for layer in self.shortcut:
            shortcut = layer.forward(shortcut)
        y = self.norm1.forward(self.conv1.forward(x))
        return self.norm2.forward(self.conv2.forward(y), add=shortcut)

    def backward(self, dout):
        # norm2 and norm1 write "dy", conv2 and conv1 read it and write "dx": dout, too, is in "dx",
        # which is free again when norm2 has read it.
        dy = self.conv2.backward(self.norm2.backward(dout))
        dshortcut = self.norm2.dadd
        for layer in reversed(self.shortcut):
            dshortcut = layer.backward(dshortcut)
        return self.conv1.backward(self.norm1.backward(dy), add=dshortcut)


class GpuGlobalAvgPool(GpuLayer, GlobalAvgPool):
    def forward(self, x):
        self.x_shape = x.shape
        n, h, w, c = x.shape
        out = self.workspace("out", (n, c))
        self.gpu.elementwise("average", out.size, x, h * w, c, out)
        return out

    def backward(self, dout):
        _, h, w, c = self.x_shape
        dx = self.gpu.workspace("dx", self.x_shape)
        self.gpu.elementwise("average_backward", dx.size, dout, h * w, c, dx)
        return dx


class GpuDense(GpuLayer, Dense):
    """Dense, then ReLU if `relu`. backward() overwrites dout."""

    def __init__(self, in_features, out_features, relu=False, **options):
        super().__init__(in_features, out_features, **options)
        self.relu = relu

    def forward(self, x):
        self._check_features(x)
        self.x = x
        self.out = self.workspace("out", (len(x), self.b.size))
        self.gpu.gemm(x, self.W, self.out)
        args = (self.out, self.b, self.relu, self.b.size)
        self.gpu.elementwise("add_bias", self.out.size, *args)
        return self.out

    def backward(self, dout):
        if self.relu:
            self.gpu.elementwise("relu_backward", dout.size, dout, self.out)
        self.gpu.bias_gradient(dout, self.db)
        self.gpu.gemm(self.x, dout, self.dW, transpose_a=True)
        dx = self.workspace("dx", self.x.shape)
        self.gpu.gemm(dout, self.W, dx, transpose_b=True)
        return dx


# --------------------------------------------------------------------------------------------------
# Models and optimizers
# --------------------------------------------------------------------------------------------------


def cnn_layers(seed, dtype, image_shape=IMAGE_SHAPE, classes=10):
    """The layers of common.make_cnn(), with the same weights from the same seed.

    image_shape: (H, W, C). For your own network return a list of its layers here.
    """
    check_network_size("cnn", image_shape)
    h, w, channels = image_shape
    conv2 = GpuWinogradReLUPool if winograd_fits(h // 2, w // 2) else GpuConvReLUPool
    rng = np.random.default_rng(seed)
    return [
        GpuConvReLUPool(channels, 32, rng=rng, dtype=dtype),
        conv2(32, 64, rng=rng, dtype=dtype),
        Flatten(),
        GpuDense(64 * (h // 4) * (w // 4), 256, relu=True, rng=rng, dtype=dtype),
        GpuDense(256, classes, std=OUTPUT_STD, rng=rng, dtype=dtype),
    ]


def resnet18_layers(seed, dtype, image_shape=IMAGE_SHAPE, classes=10):
    """The layers of common.make_resnet18(), with the same weights from the same seed."""
    h, w, channels = image_shape
    rng = np.random.default_rng(seed)
    layers = [
        GpuConv2D(channels, 64, bias=False, rng=rng, dtype=dtype),
        GpuBatchNorm2D(64, relu=True, dtype=dtype),
    ]
    channels = 64
    for width in (64, 128, 256, 512):
        first_stride = 1 if width == 64 else 2
        for stride in (first_stride, 1):
            h = -(-h // stride)  # rounded up, as a 3x3 convolution with padding 1 does
            w = -(-w // stride)
            conv = GpuWinogradConv2D if winograd_fits(h, w) else GpuConv2D
            layers.append(GpuBasicBlock(channels, width, stride, conv, rng=rng, dtype=dtype))
            channels = width
    layers.append(GpuGlobalAvgPool())
    layers.append(GpuDense(512, classes, std=OUTPUT_STD, rng=rng, dtype=dtype))
    return layers


class GpuModel(Model):
    """A Model that is built with NumPy, then moved to a GPU. Its state_dict() is on the host."""

    def to_device(self, gpu):
        """Move parameters, gradients and buffers to the GPU, and let the layers use its kernels."""
        self.gpu = gpu
        self.use_memory(gpu.put(self.params), gpu.put(self.grads))
        for leaf in self.leaves():
            leaf.gpu = gpu
            for name in leaf.buffer_names:
                setattr(leaf, name, gpu.put(getattr(leaf, name)))

    def state_dict(self):
        return {name: self.gpu.get(array) for name, array in super().state_dict().items()}

    def load_state_dict(self, state):
        for name, array in super().state_dict().items():
            array[...] = self.gpu.put(state[name])


class GpuOptimizer:
    """What GpuSGD and GpuAdam share: their state is on the GPU. A step is one kernel or two."""

    def __init__(self, gpu, model, *args, **kwargs):
        self.gpu = gpu
        self.counters = gpu.put(np.zeros(3))  # as the kernels describe them
        super().__init__(model, *args, **kwargs)
        self.state = {name: gpu.put(array) for name, array in self.state.items()}

    @property
    def steps(self):
        """The number of steps, read from the GPU, where a captured graph counts too."""
        return int(self.counters[0])

    @steps.setter
    def steps(self, steps):
        self.counters[0] = steps

    def state_dict(self):
        return {name: self.gpu.get(array) for name, array in super().state_dict().items()}

    def load_state_dict(self, state):
        for name, array in self.state.items():
            array[...] = self.gpu.put(state[f"optimizer_{name}"])
        self.steps = int(state["optimizer_steps"])


class GpuSGD(GpuOptimizer, SGD):
    def step(self, count):
        w = self.model.params
        options = (float(self.lr), float(self.momentum), float(self.weight_decay), 1 / count)
        args = (w, self.model.grads, self.state["velocity"], *options, self.counters)
        self.gpu.elementwise("sgd", w.size, *args)


class GpuAdam(GpuOptimizer, Adam):
    def step(self, count):
        w = self.model.params
        beta1, beta2 = self.betas
        begin = (np.float64(beta1), np.float64(beta2), self.counters)
        self.gpu.elementwise("adam_begin", 1, *begin)
        moments = (self.state["m"], self.state["v"])
        options = (float(self.lr), beta1, beta2, self.eps, float(self.weight_decay), 1 / count)
        args = (w, self.model.grads, *moments, *options, self.counters)
        self.gpu.elementwise("adam", w.size, *args)


# --------------------------------------------------------------------------------------------------
# A training step, in two ways
# --------------------------------------------------------------------------------------------------


def untimed(phase):
    """Stands in for PhaseTimer.timed where nothing is to be measured."""
    return contextlib.nullcontext()


# Rung 1, the default: the host launches the kernels one by one, 34 for `cnn`, 287 for `resnet18`.
# It works for any batch, each phase can be timed, and an error shows where it happens. But a launch
# takes the host some microseconds: a GPU that needs less than that for a kernel waits for the host.


def train_step(device, model, optimizer, x, labels, timed=untimed):
    """Train on one batch. Returns [summed loss, top-1, top-5], on the device."""
    with timed("forward"):
        logits = model.forward(x)
        dlogits, sums = device.loss(logits, labels)
    with timed("backward"):
        model.backward(dlogits)
    optimizer.step(len(labels))
    return sums


# Rung 2, --graph: the launches are recorded once and then repeated by a single call, so the GPU
# goes from kernel to kernel without the host, and small batches no longer wait for Python.
# The price: all arguments are frozen, so arrays cannot move and each batch size needs a graph of
# its own; the phases within cannot be timed.


class CapturedStep:
    """train_step() for batches of one size. x and labels: where device.load() puts such a batch."""

    def __init__(self, device, model, optimizer, x, labels):
        self.place = x.data.ptr
        device.stream.begin_capture()  # from here the stream records and runs nothing
        self.sums = train_step(device, model, optimizer, x, labels)
        self.graph = device.stream.end_capture()

    def __call__(self, x, labels, timed=untimed):
        if x.data.ptr != self.place:
            raise TrainingError("the batch is not where the captured graph reads it")
        self.graph.launch()
        return self.sums


def make_steps(device, model, optimizer, data, args):
    """{batch size: step(x, labels, timed)} for the batch sizes of an epoch, captured with --graph.

    A step returns [summed loss, top-1, top-5], on the device. A GPU is warmed up first.
    """
    n = len(data.y_train)
    sizes = {min(args.batch_size, n), n % args.batch_size}  # whole batches, and what is left
    sizes.discard(0)
    if device.asynchronous:
        warm_up(device, model, optimizer, data, sizes)

    steps = {}
    for size in sizes:
        if args.graph:
            x, labels = load_first(device, data, size)
            steps[size] = CapturedStep(device, model, optimizer, x, labels)
        else:
            steps[size] = functools.partial(train_step, device, model, optimizer)
    return steps


def warm_up(device, model, optimizer, data, sizes):
    """Train once on a batch of each size, then put the weights back.

    That compiles the kernels and reserves all memory, before the clock starts. A graph depends on
    it: workspaces may not grow, and so move, once their addresses are in it.
    """
    model_state = model.state_dict()
    optimizer_state = optimizer.state_dict()
    for size in sorted(sizes, reverse=True):  # the largest first: no workspace is made twice
        x, labels = load_first(device, data, size)
        train_step(device, model, optimizer, x, labels)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)


def load_first(device, data, size):
    """The first `size` training images as a batch."""
    index = device.put(np.arange(size, dtype=np.int32))
    return device.load(data.x_train, data.y_train, index)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


class PhaseTimer:
    """Measures the phases of a batch by marks on the device, which are read when it has ended."""

    def __init__(self, device):
        self.device = device
        self.marks = []  # (phase, mark before it, mark after it)

    @contextlib.contextmanager
    def timed(self, phase):
        before = self.device.mark()
        yield
        self.marks.append((phase, before, self.device.mark()))

    def seconds(self):
        """[(phase, seconds)]; the device must have passed all marks."""
        return [(phase, self.device.seconds(*marks)) for phase, *marks in self.marks]


class LaunchedBatch(NamedTuple):
    """A batch that the device may still be working on."""

    images: int
    wait: Callable  # waits for its end; returns [summed loss, top-1, top-5]
    timer: PhaseTimer


def train(device, model, optimizer, data, args, log, checkpoint, stop, steps):
    """Train for args.epochs epochs; everything measured goes to the log.

    A GPU works behind the host's back. So that it never waits for the host, a batch is counted
    only when the next one has been launched.
    """
    n = len(data.y_train)
    batches = math.ceil(n / args.batch_size)
    log.trace_layers(model)  # on a GPU: the host's launches
    for epoch in range(log.epoch, args.epochs + 1):
        order = device.put(epoch_order(n, args.seed, epoch).astype(np.int32))
        aug_params = None
        if args.augment == "on":
            aug_params = device.put(draw_augmentation(n, args.seed, epoch))
        log.start_epoch(epoch, batches)
        running = None  # the batch that has been launched and not counted

        for batch in range(log.batch, batches):
            timer = PhaseTimer(device)
            with timer.timed("loading"):
                index = order[batch * args.batch_size : (batch + 1) * args.batch_size]
                x, labels = device.load(data.x_train, data.y_train, index, aug_params)
            sums = steps[len(labels)](x, labels, timer.timed)
            launched = LaunchedBatch(len(labels), device.start_read(sums), timer)
            if running:
                end_batch(running, log)
            running = launched

            # A checkpoint must hold the weights of just the batches that the log has counted: the
            # running batch has changed them, so it is waited for. NumPy has none that is running.
            if stop.requested or checkpoint.due() or not device.asynchronous:
                end_batch(running, log)
                running = None
                if stop.requested:
                    save_and_stop(checkpoint, log, stop)
                if checkpoint.due():
                    checkpoint.save()

        if running:
            end_batch(running, log)
        log.end_training()
        loss, top1, top5, loading = evaluate(
            device, model, data, args.batch_size, confusion=log.confusion
        )
        log.end_epoch(loss, top1, top5, loading)
        require_finite(loss, "validation loss", log)
        checkpoint.save()
        if stop.requested and epoch < args.epochs:
            save_and_stop(checkpoint, log, stop)


def end_batch(batch, log):
    """Wait for a batch and count it."""
    loss, top1, top5 = batch.wait()
    for phase, seconds in batch.timer.seconds():
        log.add_seconds(phase, seconds)
    log.end_batch(batch.images, loss, int(top1), int(top5))
    require_finite(loss, "loss", log)


def evaluate(device, model, data, batch_size, confusion=None):
    """Mean loss, top-1 and top-5 accuracy on the test images, and seconds spent loading batches.

    Results are summed on the device and read once. confusion: (K, K) zeros on the host, in which
    each image is counted at [its label, predicted class].
    """
    model.train(False)
    n = len(data.y_test)
    batch_size = min(batch_size, len(data.y_train))  # larger ones would make workspaces grow
    sums = device.put(np.zeros(3))
    index = device.put(np.arange(n, dtype=np.int32))
    timer = PhaseTimer(device)
    predicted = []
    for start in range(0, n, batch_size):
        with timer.timed("loading"):
            batch = index[start : start + batch_size]
            x, labels = device.load(data.x_test, data.y_test, batch)
        logits = model.forward(x)
        device.loss(logits, labels, sums)
        predicted.append(logits.argmax(axis=1))
    model.train(True)
    if confusion is not None:
        predicted = np.concatenate([device.get(classes) for classes in predicted])
        np.add.at(confusion, (device.get(data.y_test), predicted), 1)
    loss, top1, top5 = device.start_read(sums)()
    loading = sum(seconds for _, seconds in timer.seconds())
    return loss / n, top1 / n, top5 / n, loading


def parse_args(argv=None):
    parser = make_parser(__file__, __doc__, MODELS)
    add = parser.add_argument
    on_off = ("on", "off")
    device = "auto: a GPU if CuPy finds one, else NumPy (default: %(default)s)"
    tf32 = "let tensor cores round the factors of products to 11 bits (default: %(default)s)"
    graph = "capture the training step as a CUDA graph"
    augment = "random crops and flips (default: %(default)s)"
    add("--dtype", choices=("float32", "float64"), default="float32", help="default: %(default)s")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=device)
    add("--tf32", choices=on_off, default="off", help=tf32)
    add("--graph", action="store_true", help=graph)
    add("--augment", choices=on_off, default="off", help=augment)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    if not device.asynchronous:
        # --device auto has found no GPU: the run metadata records what is done, not what was asked.
        args.graph = False
        args.tf32 = "off"

    # The whole data set, 184 MB of CIFAR-10, goes to the device: no batch waits for the host.
    data = load_dataset(args.data_dir, args.dataset, args.subset, args.seed)
    data = device.put_data(data)
    model = device.make_model(args.model, args.seed, data.image_shape, len(data.classes))
    optimizer = device.make_optimizer(model, args)
    steps = make_steps(device, model, optimizer, data, args)

    info = {"device": device.name, "tf32": args.tf32, "graph": args.graph}
    log = RunLog(args, __file__, data, info, gpu_uuid=device.uuid)
    checkpoint = Checkpoint(args, log, model, optimizer)
    if args.resume:
        checkpoint.load()

    # Overflows need no warning: the run stops at the first loss that is not finite.
    with np.errstate(over="ignore", invalid="ignore"), StopSignal() as stop, log:
        train(device, model, optimizer, data, args, log, checkpoint, stop, steps)
        log.totals.update(device.memory())
        log.finish()


if __name__ == "__main__":
    run_main(main)
