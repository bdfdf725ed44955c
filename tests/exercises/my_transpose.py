"""A solution of exercise 11: what replaces the sheet's code of the same name."""

KERNEL = r"""
extern "C" __global__ void transpose(int rows, int cols, const float *in, float *out)
{
    __shared__ float tile[32][33];  // 33: the 32 elements of a column are in 32 different banks

    int col = blockIdx.x * 32 + threadIdx.x;
    int row = blockIdx.y * 32 + threadIdx.y;
    if (row < rows && col < cols)
        tile[threadIdx.y][threadIdx.x] = in[row * cols + col];
    __syncthreads();

    // The tile's place in out: blocks change their coordinates, threads do not.
    int out_col = blockIdx.y * 32 + threadIdx.x;
    int out_row = blockIdx.x * 32 + threadIdx.y;
    if (out_row < cols && out_col < rows)
        out[out_row * rows + out_col] = tile[threadIdx.x][threadIdx.y];
}
"""
