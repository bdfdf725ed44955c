"""Exercise 11: the transpose of a matrix as a CUDA kernel."""

import numpy as np

KERNEL = r"""
extern "C" __global__ void transpose(int rows, int cols, const float *in, float *out)
{
    int col = blockIdx.x * 32 + threadIdx.x;
    int row = blockIdx.y * 32 + threadIdx.y;
    if (row < rows && col < cols)
        out[col * rows + row] = in[row * cols + col];  // TODO: by way of shared memory
}
"""


def main():
    import cupy  # needs an NVIDIA GPU: docs/gpu.md

    kernel = cupy.RawKernel(KERNEL, "transpose")
    rows, cols = 8192, 4096
    matrix = cupy.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    out = cupy.empty((cols, rows), np.float32)
    grid = (-(-cols // 32), -(-rows // 32))
    seconds = []
    for _ in range(20):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel(grid, (32, 32), (np.int32(rows), np.int32(cols), matrix, out))
        end.record()
        end.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(start, end) / 1000)
    assert (out == matrix.T).all()
    print(f"{2 * matrix.nbytes / min(seconds) / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
