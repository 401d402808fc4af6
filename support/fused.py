"""Triton kernels for operations that are limited by memory traffic, with their gradients.

    GroupNorm           nn.GroupNorm, with an optional shift before it and SiLU after it
    LayerNorm           nn.LayerNorm
    residual, Residual  x + scale * (y + bias); add_tokens is the same for tokens
    GEGLU               the gate of the feed-forwards: half the columns times GELU of the other half
    FrameAttention      attention among the frames of each pixel
    has_kernels         whether the kernels can run on a tensor

support/kernels.py puts these into the networks. The arithmetic is fp32 whatever the tensors are, and every
kernel gives the same bits each time.

Layout. In channels-last memory a tensor n c h w is, for each n, a table of h w rows with c numbers each. A
norm over single frames, (b f) c h w, and a norm over all frames of a clip, b c f s with s pixels, look the
same to a kernel: n tables of L rows and C columns. A group is a set of neighbouring columns.

GroupNorm runs in three kernels. (1) Each program sums every column of one chunk of rows. (2) One program per
group combines the chunks to mean and standard deviation. (3) Each program normalises a chunk. So one clip of
32 groups keeps a whole GPU busy, and the order of every sum is fixed. A shift that is the same for all rows,
such as the bias of the convolution in front, is added to the columns' means instead of to all numbers.

The other kernels treat all tokens or pixels as rows of one table: a program reads the tiles it needs and
writes one tile. Attention among few frames is one tile per pixel and head.
"""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                 # there is no Triton for this platform
    triton = tl = None

PROGRAMS = 2112                 # programs that the rows of a sum are divided among: 16 for each SM of an H100
BLOCK = 128                     # columns per program at most: whole cache lines
TILE = 2048                     # numbers in a tile, 16 for each thread
UNROLL = 4                      # tiles whose reads overlap
MAX_FRAMES = 32                 # frames that one program attends among
HEAD_WIDTHS = 16, 32, 64        # channels of a head that FrameAttention takes

# ---------------------------------------------------------------------------------------------------------
# Kernels

if triton:

    @triton.jit
    def _tile(program, L, C, rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """The part of the tables that a program works on: table number, first row, number of rows, columns;
        the offset of its start; rows and offsets of its first tile, relative to the start. Neighbouring
        programs work on the same rows, and so on the same pages of memory."""
        blocks = C // BLOCK
        n, first = program // blocks // chunks, program // blocks % chunks * rows
        c, row = program % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)[:, None]
        n, offsets = n.to(tl.int64), row * C + c[None]
        start = (n * L + first) * C                             # in 64 bits, as n is
        return n, first, tl.minimum(rows, L - first), c, start, row, offsets

    @triton.jit
    def _load_shift(shift, n, c, C):
        """The shift of the columns of table n; 0 if the kernel was given None."""
        return 0.0 if shift is None else tl.load(shift + n * C + c).to(tl.float32)

    @triton.jit
    def _moments_kernel(x, shift, moments, L, C, rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                        UNROLL: tl.constexpr):
        """For each column of a chunk: its mean, shift included, and the sum of squared deviations from it.
        The sums are of deviations from a pivot, the mean of the first rows, because digits would cancel
        where the mean is large."""
        n, first, count, c, start, row, offsets = _tile(tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        pivot = tl.load(x + offsets, row < count, 0.0).to(tl.float32)
        pivot = tl.sum(pivot, axis=0) / tl.minimum(count, ROWS)
        total, square = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for done in range(0, count, ROWS * UNROLL):
            for i in tl.static_range(UNROLL):
                mask = row < count - done - i * ROWS
                value = tl.load(x + i * ROWS * C + offsets, mask, 0.0).to(tl.float32)
                value = tl.where(mask, value - pivot[None], 0.0)
                total += value
                square += value * value
            x += ROWS * UNROLL * C
        total, square = tl.sum(total, axis=0), tl.sum(square, axis=0)
        moments += (n * chunks + first // rows) * 2 * C + c
        tl.store(moments, pivot + total / count + _load_shift(shift, n, c, C))
        tl.store(moments + C, square - total * total / count)

    @triton.jit
    def _rows_of_chunk(chunk, column, L, rows, chunks, size):
        """A mask of the chunks and columns that exist, and the rows of each, 0 outside of the mask."""
        mask = column < tl.where(chunk < chunks, size, 0)
        return mask, tl.where(mask, tl.minimum(rows, L - chunk * rows), 0)

    @triton.jit
    def _statistics_kernel(moments, statistics, eps, L, C, rows, chunks, size,
                           CHUNKS: tl.constexpr, SIZE: tl.constexpr):
        """One program: mean and 1 / standard deviation of a group of `size` columns, from the moments of its
        chunks. The mean is computed about a pivot; the variance about the mean."""
        program, groups = tl.program_id(0), C // size
        moments += (program // groups).to(tl.int64) * chunks * 2 * C + program % groups * size
        chunk, column = tl.arange(0, CHUNKS)[:, None], tl.arange(0, SIZE)[None]
        pivot = tl.load(moments)
        total, square = tl.zeros([CHUNKS, SIZE], tl.float32), tl.zeros([CHUNKS, SIZE], tl.float32)
        for done in range(0, chunks, CHUNKS):
            mask, count = _rows_of_chunk(done + chunk, column, L, rows, chunks, size)
            total += count * (tl.load(moments + (done + chunk) * 2 * C + column, mask, 0.0) - pivot)
        mean = pivot + tl.sum(total) / L / size
        for done in range(0, chunks, CHUNKS):
            mask, count = _rows_of_chunk(done + chunk, column, L, rows, chunks, size)
            of_chunk = moments + (done + chunk) * 2 * C + column
            deviation = tl.load(of_chunk, mask, 0.0) - mean
            square += tl.load(of_chunk + C, mask, 0.0) + count * deviation * deviation
        variance = tl.maximum(tl.sum(square) / L / size, 0.0)
        statistics += program // groups * groups + program      # means of all groups, then 1 / deviations
        tl.store(statistics, mean)
        tl.store(statistics + groups, 1 / tl.sqrt(variance + eps))

    @triton.jit
    def _expand_groups(values, n, c, C, size):
        """Two numbers per group -> two numbers per column, 1 BLOCK each."""
        values += n * 2 * (C // size) + c // size
        return tl.load(values)[None], tl.load(values + C // size)[None]

    @triton.jit
    def _norm_constants(shift, weight, bias, statistics, n, c, C, size):
        """For each column, 1 BLOCK: mean without the shift, 1 / standard deviation, weight, bias."""
        mean, rstd = _expand_groups(statistics, n, c, C, size)
        weight, bias = tl.load(weight + c).to(tl.float32)[None], tl.load(bias + c).to(tl.float32)[None]
        return mean - _load_shift(shift, n, c, C), rstd, weight, bias

    @triton.jit
    def _normalise_kernel(x, shift, weight, bias, statistics, out, L, C, rows, chunks, size,
                          ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
        """Normalises a chunk. The last one comes first: _moments_kernel has just read it into the cache."""
        n, first, count, c, start, row, offsets = _tile(
            tl.num_programs(0) - 1 - tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        out += start
        mean, rstd, weight, bias = _norm_constants(shift, weight, bias, statistics, n, c, C, size)
        for done in range(0, count, ROWS):
            mask = row < count - done
            value = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - mean) * (rstd * weight) + bias
            if SILU:
                value = value / (1 + tl.exp(-value))
            tl.store(out + offsets, value.to(out.dtype.element_ty), mask)
            x += ROWS * C
            out += ROWS * C

    @triton.jit
    def _before_silu(x, grad, mean, rstd, weight, bias, SILU: tl.constexpr):
        """The normalised input, and the gradient in front of the SiLU. The derivative of SiLU at z is
        s (1 + z (1 - s)) with s = sigmoid(z)."""
        x, grad = (x.to(tl.float32) - mean) * rstd, grad.to(tl.float32)
        if SILU:
            z = x * weight + bias
            s = 1 / (1 + tl.exp(-z))
            grad = grad * s * (1 + z * (1 - s))
        return x, grad

    @triton.jit
    def _gradient_sums(x, grad, shift, weight, bias, statistics, sums, L, C, rows, chunks, size,
                       ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, SILU: tl.constexpr):
        """For each column of a chunk: the sum of the gradient g in front of the SiLU, and the sum of g times
        the normalised input."""
        n, first, count, c, start, row, offsets = _tile(tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        grad += start
        mean, rstd, weight, bias = _norm_constants(shift, weight, bias, statistics, n, c, C, size)
        sum_g, sum_gx = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for done in range(0, count, ROWS * UNROLL):
            for i in tl.static_range(UNROLL):
                mask = row < count - done - i * ROWS
                value, g = _before_silu(tl.load(x + i * ROWS * C + offsets, mask, 0.0),
                                        tl.load(grad + i * ROWS * C + offsets, mask, 0.0),
                                        mean, rstd, weight, bias, SILU)
                sum_g += g                                      # 0 outside of the mask
                sum_gx += g * value
            x += ROWS * UNROLL * C
            grad += ROWS * UNROLL * C
        sums += (n * chunks + first // rows) * 2 * C + c
        tl.store(sums, tl.sum(sum_g, axis=0))
        tl.store(sums + C, tl.sum(sum_gx, axis=0))

    @triton.jit
    def _input_gradient(x, grad, shift, weight, bias, statistics, of_group, grad_x, L, C, rows, chunks, size,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
        """The gradient of the input: rstd (g w - mean(g w) - xhat mean(g w xhat)), means over the group.
        of_group: the sums of g w and of g w xhat of each group."""
        n, first, count, c, start, row, offsets = _tile(
            tl.num_programs(0) - 1 - tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        grad += start
        grad_x += start
        mean, rstd, weight, bias = _norm_constants(shift, weight, bias, statistics, n, c, C, size)
        mean_g, mean_gx = _expand_groups(of_group, n, c, C, size)
        mean_g, mean_gx = mean_g / L / size, mean_gx / L / size
        for done in range(0, count, ROWS):
            mask = row < count - done
            value, g = _before_silu(tl.load(x + offsets, mask, 0.0), tl.load(grad + offsets, mask, 0.0),
                                    mean, rstd, weight, bias, SILU)
            value = rstd * (g * weight - mean_g - value * mean_gx)
            tl.store(grad_x + offsets, value.to(grad_x.dtype.element_ty), mask)
            x += ROWS * C
            grad += ROWS * C
            grad_x += ROWS * C

    @triton.jit
    def _normalised_rows(x, offsets, mask, eps, C):
        """A tile of whole rows, normalised, 0 outside of the mask; and 1 / standard deviation of each row."""
        x = tl.load(x + offsets, mask, 0.0).to(tl.float32)
        x = tl.where(mask, x - tl.sum(x, axis=1)[:, None] / C, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        return x * rstd, rstd

    @triton.jit
    def _layer_norm_kernel(x, weight, bias, out, eps, L, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """Layer norm of ROWS rows per program. WIDTH is the smallest power of two that is at least C."""
        row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None]
        first, offsets = tl.program_id(0) * ROWS, row * C + c
        mask, start = (row < L - first) & (c < C), first.to(tl.int64) * C
        value, _ = _normalised_rows(x + start, offsets, mask, eps, C)
        value = value * tl.load(weight + c, c < C, 0.0).to(tl.float32)
        value += tl.load(bias + c, c < C, 0.0).to(tl.float32)
        tl.store(out + start + offsets, value.to(out.dtype.element_ty), mask)

    @triton.jit
    def _layer_norm_backward_kernel(x, grad, weight, grad_x, sums, eps, L, C, rows, ROWS: tl.constexpr,
                                    WIDTH: tl.constexpr):
        """The gradient of the input, row by row. If the weights train: for each column the sums of the
        gradient, and of the gradient times the normalised input, over the `rows` rows of a program."""
        row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None]
        weight = tl.load(weight + c, c < C, 0.0).to(tl.float32)
        sum_g, sum_gx = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for done in range(0, rows, ROWS):
            first, offsets = tl.program_id(0) * rows + done, row * C + c
            mask, start = (row < L - first) & (c < C), first.to(tl.int64) * C
            value, rstd = _normalised_rows(x + start, offsets, mask, eps, C)
            g = tl.load(grad + start + offsets, mask, 0.0).to(tl.float32)
            if sums is not None:
                sum_g += g
                sum_gx += g * value
            g *= weight
            g = g - tl.sum(g, axis=1)[:, None] / C - value * (tl.sum(g * value, axis=1)[:, None] / C)
            tl.store(grad_x + start + offsets, (rstd * g).to(grad_x.dtype.element_ty), mask)
        if sums is not None:
            sums += tl.program_id(0) * C + c
            tl.store(sums, tl.sum(sum_g, axis=0)[None], c < C)
            tl.store(sums + tl.num_programs(0) * C, tl.sum(sum_gx, axis=0)[None], c < C)

    @triton.jit
    def _residual_kernel(x, y, bias, scale, out, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """x + scale * (y + bias), one tile per program. bias has one row per table; all but y may be None."""
        n, _, count, c, start, row, at = _tile(tl.program_id(0), L, C, ROWS, tl.cdiv(L, ROWS), ROWS, BLOCK)
        mask = row < count
        value = tl.load(y + start + at, mask, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + n * C + c).to(tl.float32)[None]
        if scale is not None:
            value *= tl.load(scale).to(tl.float32)
        if x is not None:
            value += tl.load(x + start + at, mask, 0.0).to(tl.float32)
        tl.store(out + start + at, value.to(out.dtype.element_ty), mask)

    @triton.jit
    def _value_and_gate(x, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """A program's tile of a table x with L rows of 2 C numbers: values from the left halves, gates from
        the right halves. Then its start and offsets in rows of C, and its offsets in rows of 2 C, which are
        relative to twice the start."""
        _, _, count, c, start, row, at = _tile(tl.program_id(0), L, C, ROWS, tl.cdiv(L, ROWS), ROWS, BLOCK)
        wide, mask = row * 2 * C + c[None], row < count
        value = tl.load(x + 2 * start + wide, mask, 0.0).to(tl.float32)
        gate = tl.load(x + 2 * start + wide + C, mask, 0.0).to(tl.float32)
        return value, gate, start, at, wide, mask

    @triton.jit
    def _normal_cdf(x):
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))

    @triton.jit
    def _geglu_kernel(x, out, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        value, gate, start, at, _, mask = _value_and_gate(x, L, C, ROWS, BLOCK)
        value = value * (gate * _normal_cdf(gate))
        tl.store(out + start + at, value.to(out.dtype.element_ty), mask)

    @triton.jit
    def _geglu_backward_kernel(x, grad, grad_x, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """GELU is z P(z), with P the normal distribution. Its derivative is P(z) + z p(z), p the density."""
        value, gate, start, at, wide, mask = _value_and_gate(x, L, C, ROWS, BLOCK)
        grad = tl.load(grad + start + at, mask, 0.0).to(tl.float32)
        cdf = _normal_cdf(gate)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        of_value, of_gate = grad * (gate * cdf), grad * value * (cdf + gate * density)
        grad_x += 2 * start
        tl.store(grad_x + wide, of_value.to(grad_x.dtype.element_ty), mask)
        tl.store(grad_x + wide + C, of_gate.to(grad_x.dtype.element_ty), mask)

    @triton.jit
    def _head_offsets(program, F, S, C, FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        """Offsets in b F S C of one head of one pixel, FRAMES WIDTH, and a mask of the frames that exist."""
        heads, frame = C // WIDTH, tl.arange(0, FRAMES)[:, None]
        b, s, a = program // heads // S, program // heads % S, program % heads
        rows = (b.to(tl.int64) * F + frame) * S + s
        return rows * C + a * WIDTH + tl.arange(0, WIDTH)[None], frame < F

    @triton.jit
    def _attention_weights(q, k, F, scale, FRAMES: tl.constexpr):
        """Softmax over the F frames of k: FRAMES FRAMES, fp32."""
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(tl.arange(0, FRAMES)[None] < F, scores, -float("inf"))
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        return weights / tl.sum(weights, axis=1)[:, None]

    @triton.jit
    def _attention_kernel(q, k, v, out, scale, F, S, C, FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        at, mask = _head_offsets(tl.program_id(0), F, S, C, FRAMES, WIDTH)
        q, k, v = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0), tl.load(v + at, mask, 0.0)
        weights = _attention_weights(q, k, F, scale, FRAMES).to(v.dtype)
        value = tl.dot(weights, v, input_precision="ieee")
        tl.store(out + at, value.to(out.dtype.element_ty), mask)

    @triton.jit
    def _attention_backward_kernel(q, k, v, grad, grad_q, grad_k, grad_v, scale, F, S, C,
                                   FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        """Computes the weights w again. If g is their gradient, that of the scores is w (g - sum of w g)."""
        at, mask = _head_offsets(tl.program_id(0), F, S, C, FRAMES, WIDTH)
        q, k, v = tl.load(q + at, mask, 0.0), tl.load(k + at, mask, 0.0), tl.load(v + at, mask, 0.0)
        grad, weights = tl.load(grad + at, mask, 0.0), _attention_weights(q, k, F, scale, FRAMES)
        value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        tl.store(grad_v + at, value.to(grad_v.dtype.element_ty), mask)
        g = tl.dot(grad, tl.trans(v), input_precision="ieee")
        g = weights * (g - tl.sum(weights * g, axis=1)[:, None]) * scale
        g = g.to(q.dtype)
        tl.store(grad_q + at, tl.dot(g, k, input_precision="ieee").to(grad_q.dtype.element_ty), mask)
        value = tl.dot(tl.trans(g), q, input_precision="ieee")
        tl.store(grad_k + at, value.to(grad_k.dtype.element_ty), mask)


# ---------------------------------------------------------------------------------------------------------
# Launching kernels


def has_kernels(x, channels_last=False):
    """Whether the kernels can run on x: a tensor of the current GPU, not fp64, not under torch.compile (which
    fuses the plain expressions itself) and, if `channels_last`, n c h w with channels last in memory."""
    runs = triton is not None and x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()
    runs = runs and x.device.index == torch.cuda.current_device()           # Triton launches there
    return runs and (not channels_last or x.is_contiguous(memory_format=torch.channels_last))


def cdiv(a, b):
    """a / b rounded up. (triton.cdiv does the same, but takes 4 us of the CPU at each launch.)"""
    return -(-a // b)


def power_of_2(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def launch_tiles(kernel, size, C, *tensors, tables=1):
    """Launches one program for each tile of `tables` tables with rows of C numbers, `size` numbers in all."""
    block = min(C & -C, BLOCK)                      # the largest power of two that divides C
    L, rows = size // C // tables, TILE // block
    kernel[tables * cdiv(L, rows) * (C // block),](*tensors, L, C, ROWS=rows, BLOCK=block)


class Fused(torch.autograd.Function):
    """An autograd function whose forward and backward passes are kernels. `compute` is the forward pass
    alone: it returns the result and what the backward pass needs. run() records a backward pass only if
    gradients are enabled, because recording takes about 10 us of the CPU."""

    @classmethod
    def run(cls, *args):
        return cls.apply(*args) if torch.is_grad_enabled() else cls.compute(*args)[0]


# ---------------------------------------------------------------------------------------------------------
# GroupNorm


class GroupNorm(Fused):
    """x [n c h w] channels-last, weight and bias [c], shift [n c] or None -> group norm of x + shift, then
    SiLU if `silu`."""

    @staticmethod
    def tiling(x):
        """Columns per program, rows per tile, rows per chunk, chunks per table."""
        n, c, h, w = x.shape
        block = min(c & -c, BLOCK)                  # the largest power of two that divides c
        tile = TILE // block
        chunks = max(1, PROGRAMS // max(1, n * c // block))
        rows = cdiv(cdiv(h * w, chunks), tile) * tile
        return block, tile, rows, cdiv(h * w, rows)

    @staticmethod
    def compute(x, weight, bias, groups, eps, silu, shift=None):
        (n, c, h, w), (block, tile, rows, chunks) = x.shape, GroupNorm.tiling(x)
        assert x.is_contiguous(memory_format=torch.channels_last), f"strides {x.stride()}: not channels-last"
        L, size, grid = h * w, c // groups, (n * chunks * (c // block),)
        shift = None if shift is None else shift.contiguous()
        width = power_of_2(size)
        chunks_at_once = min(power_of_2(chunks), max(1, 4 * TILE // width))
        moments = x.new_empty(n, chunks, 2, c, dtype=torch.float32)
        statistics, out = x.new_empty(n, 2, groups, dtype=torch.float32), torch.empty_like(x)
        _moments_kernel[grid](x, shift, moments, L, c, rows, chunks, ROWS=tile, BLOCK=block, UNROLL=UNROLL)
        num_warps = max(1, min(8, chunks_at_once * width // 128))
        _statistics_kernel[n * groups,](moments, statistics, eps, L, c, rows, chunks, size, SIZE=width,
                                        CHUNKS=chunks_at_once, num_warps=num_warps)
        _normalise_kernel[grid](x, shift, weight, bias, statistics, out, L, c, rows, chunks, size,
                                ROWS=2 * tile, BLOCK=block, SILU=silu)
        return out, shift, statistics, moments

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu, shift=None):
        out, shift, statistics, moments = GroupNorm.compute(x, weight, bias, groups, eps, silu, shift)
        column_means = None
        if shift is not None and ctx.needs_input_grad[6]:   # average over chunks; the last may be shorter
            L, (_, _, rows, chunks), means = x[0, 0].numel(), GroupNorm.tiling(x), moments[:, :, 0]
            column_means = (rows * means.sum(1) - (rows * chunks - L) * means[:, -1]) / L               # n c
        ctx.save_for_backward(x, shift, weight, bias, statistics, column_means)
        ctx.silu = silu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, shift, weight, bias, statistics, column_means = ctx.saved_tensors
        (n, c, h, w), groups, (block, tile, rows, chunks) = x.shape, statistics.shape[2], GroupNorm.tiling(x)
        L, size, grid = h * w, c // groups, (n * chunks * (c // block),)
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums, grad_x = x.new_empty(n, chunks, 2, c, dtype=torch.float32), torch.empty_like(x)
        _gradient_sums[grid](x, grad, shift, weight, bias, statistics, sums, L, c, rows, chunks, size,
                             ROWS=tile, BLOCK=block, UNROLL=UNROLL, SILU=ctx.silu)
        sums = sums.sum(1)                                                      # n 2 c
        weighted = (sums * weight).view(n, 2, groups, size)
        of_group = weighted.sum(3)                                              # n 2 groups
        _input_gradient[grid](x, grad, shift, weight, bias, statistics, of_group, grad_x, L, c, rows, chunks,
                              size, ROWS=tile, BLOCK=block, SILU=ctx.silu)
        grad_bias = grad_weight = grad_shift = None
        if any(ctx.needs_input_grad[1:3]):
            grad_bias, grad_weight = sums.sum(0).to(weight.dtype)                           # c each
        if column_means is not None:                # grad_x summed over each column, from the column means
            mean, rstd = statistics.unsqueeze(3).unbind(1)                                  # n groups 1
            sum_g, sum_gx = of_group.unsqueeze(3).unbind(1)                                 # n groups 1
            normalised = (column_means.view(n, groups, size) - mean) * rstd
            grad_shift = rstd * (weighted[:, 0] - (sum_g + normalised * sum_gx) / size)     # n groups size
            grad_shift = grad_shift.view(n, c).to(shift.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, grad_shift


# ---------------------------------------------------------------------------------------------------------
# LayerNorm


class LayerNorm(Fused):
    """x [.. c], weight and bias [c] -> layer norm over c. A program holds whole rows, so x is read once in
    the forward and once in the backward pass."""

    @staticmethod
    def table(x):
        """Number of rows, numbers per row, and the size of a tile."""
        width = power_of_2(x.shape[-1])
        return x.shape[:-1].numel(), x.shape[-1], dict(ROWS=max(1, TILE // width), WIDTH=width)

    @staticmethod
    def compute(x, weight, bias, eps):
        x = x.contiguous()
        out, (L, C, tile) = torch.empty_like(x), LayerNorm.table(x)
        _layer_norm_kernel[cdiv(L, tile["ROWS"]),](x, weight, bias, out, eps, L, C, **tile)
        return out, x

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        (out, x), ctx.eps = LayerNorm.compute(x, weight, bias, eps), eps
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_bias = grad_weight = sums = None
        grad_x, (L, C, tile) = torch.empty_like(x), LayerNorm.table(x)
        rows = cdiv(cdiv(L, PROGRAMS), tile["ROWS"]) * tile["ROWS"]
        programs = cdiv(L, max(1, rows))
        if any(ctx.needs_input_grad[1:3]):
            sums = x.new_empty(2, programs, C, dtype=torch.float32)
        _layer_norm_backward_kernel[programs,](
            x, grad.contiguous(), weight, grad_x, sums, ctx.eps, L, C, rows, **tile)
        if sums is not None:
            grad_bias, grad_weight = sums.sum(1)                                # c each
        return grad_x, grad_weight, grad_bias, None


# ---------------------------------------------------------------------------------------------------------
# Residual connections


class Residual(Fused):
    """x + scale * (y + bias): x and y [n c h w] channels-last, bias [c] or [n c], scale [1]; all but y may
    be None. The backward pass needs y and bias only if the scale trains; else they are not kept."""

    @staticmethod
    def compute(x, y, bias=None, scale=None):
        last = dict(memory_format=torch.channels_last)
        assert y.is_contiguous(**last) and (x is None or x.is_contiguous(**last)), "not channels-last"
        tables = len(y) if bias is not None and bias.ndim == 2 else 1
        out, bias = torch.empty_like(y), None if bias is None else bias.contiguous()
        launch_tiles(_residual_kernel, y.numel(), y.shape[1], x, y, bias, scale, out, tables=tables)
        return out, None

    @staticmethod
    def forward(ctx, x, y, bias=None, scale=None):
        ctx.bias_per_table = bias is not None and bias.ndim == 2
        ctx.save_for_backward(scale, *((y, bias) if scale is not None and ctx.needs_input_grad[3] else ()))
        return Residual.compute(x, y, bias, scale)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        scale, *others = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, grad_bias, grad_scale = grad, None, None
        if scale is not None:
            grad_y = residual(None, grad, None, scale)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum((2, 3) if ctx.bias_per_table else (0, 2, 3))         # n c, or c
        if others:
            grad_scale = (grad * residual(None, *others)).sum().view_as(scale)
        return grad if ctx.needs_input_grad[0] else None, grad_y, grad_bias, grad_scale


def residual(x, y, bias=None, scale=None):
    """x + scale * (y + bias) in one pass over memory, see Residual."""
    return Residual.run(x, y, bias, scale)


def add_tokens(x, y, row):
    """x + y + row for tokens x and y [b f s c] and one row [b c] per clip. `residual` gets the tokens as
    channels-last tensors [b c f s]."""
    return residual(x.movedim(-1, 1), y.movedim(-1, 1), row).movedim(1, -1)


# ---------------------------------------------------------------------------------------------------------
# GEGLU


class GEGLU(Fused):
    """x [.. 2d] -> its first half times GELU of its second half, [.. d]."""

    @staticmethod
    def compute(x):
        assert x.shape[-1] % 2 == 0, f"shape {tuple(x.shape)}: rows have no halves"
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        launch_tiles(_geglu_kernel, out.numel(), out.shape[-1], x, out)
        return out, x

    @staticmethod
    def forward(ctx, x):
        out, x = GEGLU.compute(x)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors                      # read once: under checkpointing each access recomputes it
        grad_x = torch.empty_like(x)
        launch_tiles(_geglu_backward_kernel, grad.numel(), grad.shape[-1], x, grad.contiguous(), grad_x)
        return grad_x


# ---------------------------------------------------------------------------------------------------------
# Attention among the frames of each pixel


class FrameAttention(Fused):
    """softmax(q k^T / sqrt(c)) v among the frames of each pixel; q, k, v [b f s (a c)] with a heads. One
    program computes one head of one pixel. Matrix products take their factors in the precision of q."""

    @staticmethod
    def launch(kernel, num_heads, q, *others):
        (b, f, s, c), width = q.shape, q.shape[3] // num_heads
        kernel[b * s * num_heads,](q, *others, width ** -0.5, f, s, c, WIDTH=width, num_warps=1,
                                   FRAMES=max(16, power_of_2(f)))       # tl.dot needs at least 16

    @staticmethod
    def compute(q, k, v, num_heads):
        q, k, v = [tensor.contiguous() for tensor in (q, k, v)]
        out = torch.empty_like(q)
        FrameAttention.launch(_attention_kernel, num_heads, q, k, v, out)
        return out, q, k, v

    @staticmethod
    def forward(ctx, q, k, v, num_heads):
        (out, *saved), ctx.num_heads = FrameAttention.compute(q, k, v, num_heads), num_heads
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in "qkv"]
        FrameAttention.launch(_attention_backward_kernel, ctx.num_heads, *ctx.saved_tensors,
                              grad.contiguous(), *gradients)
        return *gradients, None

