"""What costs not arithmetic but reading and writing memory, as kernels that read and write less.

    GroupNorm, GroupNormSiLU    nn.GroupNorm, its parameters and their names; and silu of the result
    LayerNorm                   nn.LayerNorm likewise
    residual, add_tokens        x + scale * (y + bias), what a residual block ends in; the same for tokens
    geglu                       the gate of the feed-forwards: half the columns times gelu of the other half
    frame_attention             attention among the frames of each pixel
    Fused..                     the kernels of each; has_kernels says where they are used

In channels-last memory a tensor n c h w is, for each n, a table of h w rows of c numbers. So the norm that
sees each frame alone, (b f) c h w, and the one that sees all frames of a clip, b c f s with s the pixels, are
the same to a kernel: N tables of L rows, one after the other. A group is a few neighbouring columns of them.

The kernels of GroupNorm cut a table into chunks of rows, and know nothing of groups while they read: a
program sums each column of its chunk by itself, and what is left, one row per chunk, is put together per
group afterwards. So one clip of 32 groups keeps a whole GPU busy, and the order of each sum is fixed. What
is added to whole columns in front of the norm, such as a convolution's bias, is added to their means
instead.

To the others all tokens or pixels are rows of one table. A tile of the result takes the same tile of what
goes in, for geglu two, for LayerNorm a tile of whole rows, and nothing else. In PyTorch these are several
passes, slow ones where a number or a row is added to all: that is why the convolutions in model.py leave
their biases to what follows them. Attention among few frames is one tile per pixel and head, gathered from
where the frames are.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:                                 # not on this platform: the PyTorch expression does it all
    triton = tl = None

PROGRAMS = 2112                 # a table is cut so that there are about so many: 16 for each SM of an H100
BLOCK = 128                     # at most so many columns per program: whole cache lines
TILE = 2048                     # numbers of a tile, 16 for each thread
AT_ONCE = 4                     # tiles whose reads are under way together
MAX_FRAMES = 32                 # whose attention to each other is one program's

if triton:

    @triton.jit
    def _piece(program, L, C, rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """What a program works on: number of the table, first row, number of rows, columns. And where that
        begins, the rows of its first tile, and the places of that tile from there on. Programs next to each
        other share rows, and with them pages of memory."""
        blocks = C // BLOCK
        n, first = program // blocks // chunks, program // blocks % chunks * rows
        c, row = program % blocks * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)[:, None]
        n, at = n.to(tl.int64), row * C + c[None]
        start = (n * L + first) * C                             # in 64 bits, as n is
        return n, first, tl.minimum(rows, L - first), c, start, row, at

    @triton.jit
    def _shift(shift, n, c, C):
        """What is added to the columns of table n before all else; a kernel given None leaves it out."""
        return 0.0 if shift is None else tl.load(shift + n * C + c).to(tl.float32)

    @triton.jit
    def _moments_kernel(x, shift, moments, L, C, rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                        AT_ONCE: tl.constexpr):
        """Each column of a chunk: its mean, which the shift moves, and C further on the sum of squared
        deviations from it, which stays. Sums are of deviations from a pivot, the mean of the first rows, so
        that nothing cancels where the mean is large."""
        n, first, count, c, start, row, at = _piece(tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        pivot = tl.load(x + at, row < count, 0.0).to(tl.float32)
        pivot = tl.sum(pivot, axis=0) / tl.minimum(count, ROWS)
        total, square = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for done in range(0, count, ROWS * AT_ONCE):
            for more in tl.static_range(AT_ONCE):
                there = row < count - done - more * ROWS
                value = tl.load(x + more * ROWS * C + at, there, 0.0).to(tl.float32)
                value = tl.where(there, value - pivot[None], 0.0)
                total += value
                square += value * value
            x += ROWS * AT_ONCE * C
        total, square = tl.sum(total, axis=0), tl.sum(square, axis=0)
        moments += (n * chunks + first // rows) * 2 * C + c
        tl.store(moments, pivot + total / count + _shift(shift, n, c, C))
        tl.store(moments + C, square - total * total / count)

    @triton.jit
    def _rows_of(chunk, column, L, rows, chunks, size):
        """Which columns of which chunks there are, and how many rows they have, else 0."""
        there = column < tl.where(chunk < chunks, size, 0)
        return there, tl.where(there, tl.minimum(rows, L - chunk * rows), 0)

    @triton.jit
    def _statistics_kernel(moments, statistics, eps, L, C, rows, chunks, size,
                           CHUNKS: tl.constexpr, SIZE: tl.constexpr):
        """One program: the mean of a group, `size` columns, and behind those of all groups one over its
        standard deviation, from the moments of the chunks. Again about a pivot first; then the mean of all
        is known."""
        program, groups = tl.program_id(0), C // size
        moments += (program // groups).to(tl.int64) * chunks * 2 * C + program % groups * size
        chunk, column = tl.arange(0, CHUNKS)[:, None], tl.arange(0, SIZE)[None]
        pivot = tl.load(moments)
        total, square = tl.zeros([CHUNKS, SIZE], tl.float32), tl.zeros([CHUNKS, SIZE], tl.float32)
        for done in range(0, chunks, CHUNKS):
            there, count = _rows_of(done + chunk, column, L, rows, chunks, size)
            total += count * (tl.load(moments + (done + chunk) * 2 * C + column, there, 0.0) - pivot)
        centre = pivot + tl.sum(total) / L / size
        for done in range(0, chunks, CHUNKS):
            there, count = _rows_of(done + chunk, column, L, rows, chunks, size)
            of_chunk = moments + (done + chunk) * 2 * C + column
            away = tl.load(of_chunk, there, 0.0) - centre
            square += tl.load(of_chunk + C, there, 0.0) + count * away * away
        variance = tl.maximum(tl.sum(square) / L / size, 0.0)
        statistics += program // groups * groups + program
        tl.store(statistics, centre)
        tl.store(statistics + groups, 1 / tl.sqrt(variance + eps))

    @triton.jit
    def _of_columns(values, n, c, C, size):
        """Two numbers per group -> those of each column, 1 BLOCK each."""
        values += n * 2 * (C // size) + c // size
        return tl.load(values)[None], tl.load(values + C // size)[None]

    @triton.jit
    def _normalisation(shift, weight, bias, statistics, n, c, C, size):
        """Of each column, 1 BLOCK: what to subtract, what to multiply by, weight, bias."""
        mean, rstd = _of_columns(statistics, n, c, C, size)
        weight, bias = tl.load(weight + c).to(tl.float32)[None], tl.load(bias + c).to(tl.float32)[None]
        return mean - _shift(shift, n, c, C), rstd, weight, bias

    @triton.jit
    def _forward_kernel(x, shift, weight, bias, statistics, out, L, C, rows, chunks, size,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
        """Last chunk first: it is what the moments' kernel has left in the cache."""
        n, first, count, c, start, row, at = _piece(
            tl.num_programs(0) - 1 - tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        out += start
        centre, scale, weight, bias = _normalisation(shift, weight, bias, statistics, n, c, C, size)
        for done in range(0, count, ROWS):
            there = row < count - done
            value = (tl.load(x + at, there, 0.0).to(tl.float32) - centre) * (scale * weight) + bias
            if SILU:
                value = value / (1 + tl.exp(-value))
            tl.store(out + at, value.to(out.dtype.element_ty), there)
            x += ROWS * C
            out += ROWS * C

    @triton.jit
    def _before(x, grad, centre, rstd, weight, bias, SILU: tl.constexpr):
        """The normalised input, and the gradient in front of the SiLU, whose derivative is s (1 + z (1 - s))
        with s = sigmoid(z)."""
        x, grad = (x.to(tl.float32) - centre) * rstd, grad.to(tl.float32)
        if SILU:
            z = x * weight + bias
            s = 1 / (1 + tl.exp(-z))
            grad = grad * s * (1 + z * (1 - s))
        return x, grad

    @triton.jit
    def _sums_kernel(x, grad, shift, weight, bias, statistics, sums, L, C, rows, chunks, size,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, SILU: tl.constexpr):
        """Each column of a chunk: the sum of the gradient in front of the SiLU, and C further on the sum of
        it times the normalised input."""
        n, first, count, c, start, row, at = _piece(tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        grad += start
        centre, scale, weight, bias = _normalisation(shift, weight, bias, statistics, n, c, C, size)
        plain, times_x = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
        for done in range(0, count, ROWS * AT_ONCE):
            for more in tl.static_range(AT_ONCE):
                there = row < count - done - more * ROWS
                value, g = _before(tl.load(x + more * ROWS * C + at, there, 0.0),
                                   tl.load(grad + more * ROWS * C + at, there, 0.0),
                                   centre, scale, weight, bias, SILU)
                plain += g                                      # 0 where there is no row
                times_x += g * value
            x += ROWS * AT_ONCE * C
            grad += ROWS * AT_ONCE * C
        sums += (n * chunks + first // rows) * 2 * C + c
        tl.store(sums, tl.sum(plain, axis=0))
        tl.store(sums + C, tl.sum(times_x, axis=0))

    @triton.jit
    def _backward_kernel(x, grad, shift, weight, bias, statistics, of_group, grad_x, L, C, rows, chunks, size,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr):
        """The gradient of the input. of_group: a group's two sums, weights included. What the gradient loses
        because mean and standard deviation move with the input."""
        n, first, count, c, start, row, at = _piece(
            tl.num_programs(0) - 1 - tl.program_id(0), L, C, rows, chunks, ROWS, BLOCK)
        x += start
        grad += start
        grad_x += start
        centre, scale, weight, bias = _normalisation(shift, weight, bias, statistics, n, c, C, size)
        plain, times_x = _of_columns(of_group, n, c, C, size)
        plain, times_x = plain / L / size, times_x / L / size
        for done in range(0, count, ROWS):
            there = row < count - done
            value, g = _before(tl.load(x + at, there, 0.0), tl.load(grad + at, there, 0.0),
                               centre, scale, weight, bias, SILU)
            value = scale * (g * weight - plain - value * times_x)
            tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), there)
            x += ROWS * C
            grad += ROWS * C
            grad_x += ROWS * C

    @triton.jit
    def _normalised_rows(x, at, there, eps, C):
        """A tile of whole rows, normalised, 0 where nothing is, and one over their standard deviations."""
        x = tl.load(x + at, there, 0.0).to(tl.float32)
        x = tl.where(there, x - tl.sum(x, axis=1)[:, None] / C, 0.0)
        rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        return x * rstd, rstd

    @triton.jit
    def _layer_norm_kernel(x, weight, bias, out, eps, L, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """ROWS rows per program; WIDTH is the power of two that C fits in."""
        row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None]
        first, at = tl.program_id(0) * ROWS, row * C + c
        there, start = (row < L - first) & (c < C), first.to(tl.int64) * C
        value, _ = _normalised_rows(x + start, at, there, eps, C)
        value = value * tl.load(weight + c, c < C, 0.0).to(tl.float32)
        value += tl.load(bias + c, c < C, 0.0).to(tl.float32)
        tl.store(out + start + at, value.to(out.dtype.element_ty), there)

    @triton.jit
    def _layer_norm_backward_kernel(x, grad, weight, grad_x, sums, eps, L, C, rows, ROWS: tl.constexpr,
                                    WIDTH: tl.constexpr):
        """Row by row, which has all that it needs. If the weights train: over the `rows` rows of a program
        the sums of the gradient of each column, and of that times the normalised input."""
        row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None]
        weight = tl.load(weight + c, c < C, 0.0).to(tl.float32)
        plain, times_x = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for done in range(0, rows, ROWS):
            first, at = tl.program_id(0) * rows + done, row * C + c
            there, start = (row < L - first) & (c < C), first.to(tl.int64) * C
            value, rstd = _normalised_rows(x + start, at, there, eps, C)
            g = tl.load(grad + start + at, there, 0.0).to(tl.float32)
            if sums is not None:
                plain += g
                times_x += g * value
            g *= weight
            g = g - tl.sum(g, axis=1)[:, None] / C - value * (tl.sum(g * value, axis=1)[:, None] / C)
            tl.store(grad_x + start + at, (rstd * g).to(grad_x.dtype.element_ty), there)
        if sums is not None:
            sums += tl.program_id(0) * C + c
            tl.store(sums, tl.sum(plain, axis=0)[None], c < C)
            tl.store(sums + tl.num_programs(0) * C, tl.sum(times_x, axis=0)[None], c < C)

    @triton.jit
    def _residual_kernel(x, y, bias, scale, out, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """x + scale * (y + bias), a tile of a table per program, a row of bias per table, None is nothing."""
        n, _, count, c, start, row, at = _piece(tl.program_id(0), L, C, ROWS, tl.cdiv(L, ROWS), ROWS, BLOCK)
        there = row < count
        value = tl.load(y + start + at, there, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + n * C + c).to(tl.float32)[None]
        if scale is not None:
            value *= tl.load(scale).to(tl.float32)
        if x is not None:
            value += tl.load(x + start + at, there, 0.0).to(tl.float32)
        tl.store(out + start + at, value.to(out.dtype.element_ty), there)

    @triton.jit
    def _halves(x, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """A program's tile of a table x of L rows of 2 C numbers: what is in their left halves, what in the
        right ones, the gates. And where that is in rows of C and of 2 C, from `start` or twice that on."""
        _, _, count, c, start, row, at = _piece(tl.program_id(0), L, C, ROWS, tl.cdiv(L, ROWS), ROWS, BLOCK)
        wide, there = row * 2 * C + c[None], row < count
        value = tl.load(x + 2 * start + wide, there, 0.0).to(tl.float32)
        gate = tl.load(x + 2 * start + wide + C, there, 0.0).to(tl.float32)
        return value, gate, start, at, wide, there

    @triton.jit
    def _normal_cdf(x):
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476))

    @triton.jit
    def _geglu_kernel(x, out, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        value, gate, start, at, _, there = _halves(x, L, C, ROWS, BLOCK)
        value = value * (gate * _normal_cdf(gate))
        tl.store(out + start + at, value.to(out.dtype.element_ty), there)

    @triton.jit
    def _geglu_backward_kernel(x, grad, grad_x, L, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """gelu is z P(z), P the normal distribution, and its derivative P(z) + z p(z), p its density."""
        value, gate, start, at, wide, there = _halves(x, L, C, ROWS, BLOCK)
        grad = tl.load(grad + start + at, there, 0.0).to(tl.float32)
        below = _normal_cdf(gate)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        of_value, of_gate = grad * (gate * below), grad * value * (below + gate * density)
        grad_x += 2 * start
        tl.store(grad_x + wide, of_value.to(grad_x.dtype.element_ty), there)
        tl.store(grad_x + wide + C, of_gate.to(grad_x.dtype.element_ty), there)

    @triton.jit
    def _one_head(b_s_a, F, S, C, FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        """Where the frames of one pixel have WIDTH channels, one head, in b F S C, and which there are."""
        heads, frame = C // WIDTH, tl.arange(0, FRAMES)[:, None]
        b, s, a = b_s_a // heads // S, b_s_a // heads % S, b_s_a % heads
        rows = (b.to(tl.int64) * F + frame) * S + s
        return rows * C + a * WIDTH + tl.arange(0, WIDTH)[None], frame < F

    @triton.jit
    def _attention_weights(q, k, F, scale, FRAMES: tl.constexpr):
        """The softmax over the frames of k, of which F are real. FRAMES FRAMES, fp32."""
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(tl.arange(0, FRAMES)[None] < F, scores, -float("inf"))
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        return weights / tl.sum(weights, axis=1)[:, None]

    @triton.jit
    def _attention_kernel(q, k, v, out, scale, F, S, C, FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        at, there = _one_head(tl.program_id(0), F, S, C, FRAMES, WIDTH)
        q, k, v = tl.load(q + at, there, 0.0), tl.load(k + at, there, 0.0), tl.load(v + at, there, 0.0)
        weights = _attention_weights(q, k, F, scale, FRAMES).to(v.dtype)
        value = tl.dot(weights, v, input_precision="ieee")
        tl.store(out + at, value.to(out.dtype.element_ty), there)

    @triton.jit
    def _attention_backward_kernel(q, k, v, grad, grad_q, grad_k, grad_v, scale, F, S, C,
                                   FRAMES: tl.constexpr, WIDTH: tl.constexpr):
        """The weights are computed again. The gradient g in front of a softmax w is w (g - sum of w g)."""
        at, there = _one_head(tl.program_id(0), F, S, C, FRAMES, WIDTH)
        q, k, v = tl.load(q + at, there, 0.0), tl.load(k + at, there, 0.0), tl.load(v + at, there, 0.0)
        grad, weights = tl.load(grad + at, there, 0.0), _attention_weights(q, k, F, scale, FRAMES)
        value = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee")
        tl.store(grad_v + at, value.to(grad_v.dtype.element_ty), there)
        g = tl.dot(grad, tl.trans(v), input_precision="ieee")
        g = weights * (g - tl.sum(weights * g, axis=1)[:, None]) * scale
        g = g.to(q.dtype)
        tl.store(grad_q + at, tl.dot(g, k, input_precision="ieee").to(grad_q.dtype.element_ty), there)
        value = tl.dot(tl.trans(g), q, input_precision="ieee")
        tl.store(grad_k + at, value.to(grad_k.dtype.element_ty), there)


class Kernels(torch.autograd.Function):
    """Kernels forward and backward. `run` is `apply`, but where no gradient is wanted it is forward alone:
    what PyTorch notes down for the way back takes a processor about 10 us a call."""

    @classmethod
    def run(cls, *args):
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(NoContext(), *args)


class NoContext:
    """The ctx of a forward that has no way back: it keeps nothing."""

    needs_input_grad = [False] * 7                  # as many as the longest list of arguments has

    def save_for_backward(self, *tensors):
        pass


def has_kernels(x, channels_last=False):
    """Whether x is computed on by the kernels, or else by the PyTorch expression."""
    return (triton and not torch.compiler.is_compiling() and x.is_cuda and x.dtype != torch.float64
            and (not channels_last or x.is_contiguous(memory_format=torch.channels_last)))


def cdiv(a, b):
    """a / b rounded up. triton.cdiv takes a processor 4 us, and it is there for each launch."""
    return -(-a // b)


def power_of_2(n):
    """The smallest that n fits in."""
    return 1 << (n - 1).bit_length()


def cut(x):
    """How the tables of x are cut: columns per program, rows per tile, rows per chunk, chunks per table."""
    n, c, h, w = x.shape
    block = min(c & -c, BLOCK)                      # the largest power of two that divides c
    tile = TILE // block
    chunks = max(1, PROGRAMS // max(1, n * c // block))
    rows = cdiv(cdiv(h * w, chunks), tile) * tile
    return block, tile, rows, cdiv(h * w, rows)


class FusedGroupNorm(Kernels):
    """The kernels, on channels-last CUDA tensors (and on CPU tensors in Triton's interpreter, as CI runs
    them). x is read twice forward, x and the gradient twice backward. The arithmetic is fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu, shift=None):                # shift: n c
        (n, c, h, w), (block, tile, rows, chunks) = x.shape, cut(x)
        assert x.is_contiguous(memory_format=torch.channels_last), f"strides {x.stride()}: not channels-last"
        L, size, grid = h * w, c // groups, (n * chunks * (c // block),)
        shift = None if shift is None else shift.contiguous()
        wide = power_of_2(size)
        together = min(power_of_2(chunks), max(1, 4 * TILE // wide))
        moments = x.new_empty(n, chunks, 2, c, dtype=torch.float32)
        statistics, out = x.new_empty(n, 2, groups, dtype=torch.float32), torch.empty_like(x)
        _moments_kernel[grid](x, shift, moments, L, c, rows, chunks, ROWS=tile, BLOCK=block, AT_ONCE=AT_ONCE)
        _statistics_kernel[n * groups,](
            moments, statistics, eps, L, c, rows, chunks, size,
            CHUNKS=together, SIZE=wide, num_warps=max(1, min(8, together * wide // 128)))
        _forward_kernel[grid](x, shift, weight, bias, statistics, out, L, c, rows, chunks, size,
                              ROWS=2 * tile, BLOCK=block, SILU=silu)
        columns = None
        if shift is not None and ctx.needs_input_grad[6]:           # their means; the last chunk is shorter
            means = moments[:, :, 0]                                                        # n chunks c
            columns = (rows * means.sum(1) - (rows * chunks - L) * means[:, -1]) / L        # n c
        ctx.save_for_backward(x, shift, weight, bias, statistics, columns)
        ctx.silu = silu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, shift, weight, bias, statistics, columns = ctx.saved_tensors
        (n, c, h, w), groups, (block, tile, rows, chunks) = x.shape, statistics.shape[2], cut(x)
        L, size, grid = h * w, c // groups, (n * chunks * (c // block),)
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums, grad_x = x.new_empty(n, chunks, 2, c, dtype=torch.float32), torch.empty_like(x)
        _sums_kernel[grid](x, grad, shift, weight, bias, statistics, sums, L, c, rows, chunks, size,
                           ROWS=tile, BLOCK=block, AT_ONCE=AT_ONCE, SILU=ctx.silu)
        sums = sums.sum(1)                                                      # n 2 c
        weighted = (sums * weight).view(n, 2, groups, size)
        of_group = weighted.sum(3)                                              # n 2 groups
        _backward_kernel[grid](x, grad, shift, weight, bias, statistics, of_group, grad_x, L, c, rows,
                               chunks, size, ROWS=tile, BLOCK=block, SILU=ctx.silu)
        grad_bias, grad_weight, grad_shift = None, None, None
        if any(ctx.needs_input_grad[1:3]):
            grad_bias, grad_weight = sums.sum(0).to(weight.dtype)                           # c each
        if columns is not None:                     # the sums of grad_x, from what is known of its columns
            mean, rstd = statistics.unsqueeze(3).unbind(1)                                  # n groups 1
            plain, times_x = of_group.unsqueeze(3).unbind(1)
            away = (columns.view(n, groups, size) - mean) * rstd
            grad_shift = rstd * (weighted[:, 0] - (plain + away * times_x) / size)         # n groups size
            grad_shift = grad_shift.view(n, c).to(shift.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, grad_shift


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm of x [n c h w], or of x + shift [n c]. Channels-last on CUDA it is the kernels, which add
    the shift on the way; elsewhere, in fp64 and in another layout it is the PyTorch expression, and for
    torch.compile, which fuses it with what stands around it."""

    silu = False

    def forward(self, x, shift=None):
        last = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        if last and has_kernels(x):
            settings = self.num_groups, self.eps, self.silu
            return FusedGroupNorm.run(x, self.weight, self.bias, *settings, shift)
        x = x if shift is None else x + shift[:, :, None, None]
        x = super().forward(x.contiguous())         # on a CPU, PyTorch's own lets squares cancel otherwise
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return F.silu(x) if self.silu else x


class GroupNormSiLU(GroupNorm):
    """silu(group norm), which is rounded once where the kernels compute it."""

    silu = True


def launch(kernel, size, C, *tensors, tables=1):
    """One program for each tile of `tables` tables, `size` numbers together, rows of C."""
    block = min(C & -C, BLOCK)                      # the largest power of two that divides C
    L, rows = size // C // tables, TILE // block
    kernel[tables * cdiv(L, rows) * (C // block),](*tensors, L, C, ROWS=rows, BLOCK=block)


class FusedResidual(Kernels):
    """The kernel, on channels-last tensors n c h w: tables of rows of c numbers. Nothing is kept for the way
    back, unless the scale trains. The arithmetic is fp32."""

    @staticmethod
    def forward(ctx, x, y, bias, scale):
        last = dict(memory_format=torch.channels_last)
        assert y.is_contiguous(**last) and (x is None or x.is_contiguous(**last)), "not channels-last"
        out, ctx.bias_per_table = torch.empty_like(y), bias is not None and bias.ndim == 2
        launch(_residual_kernel, y.numel(), y.shape[1], x, y, bias if bias is None else bias.contiguous(),
               scale, out, tables=len(y) if ctx.bias_per_table else 1)
        ctx.save_for_backward(scale, *((y, bias) if ctx.needs_input_grad[3] else ()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        scale, *others = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_y, grad_bias, grad_scale = grad, None, None
        if scale is not None:
            grad_y = FusedResidual.run(None, grad, None, scale)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_y.sum((2, 3) if ctx.bias_per_table else (0, 2, 3))         # n c, or c
        if others:
            grad_scale = (grad * FusedResidual.run(None, *others, None)).sum().view_as(scale)
        return grad if ctx.needs_input_grad[0] else None, grad_y, grad_bias, grad_scale


def add_tokens(x, y, row):
    """x + y + row for tokens x and y [b f s c] and a row [b c] that is the same for all of a clip: residual,
    which sees tokens as channels-last."""
    return residual(x.movedim(-1, 1), y.movedim(-1, 1), row).movedim(1, -1)


def residual(x, y, bias=None, scale=None):
    """x + scale * (y + bias), with x and y [n c h w], bias [c] or [n c] and scale [1], where they are given.
    It is one pass over memory where has_kernels says so, and else the PyTorch expression."""
    if has_kernels(y, channels_last=True) and (x is None or has_kernels(x, channels_last=True)):
        return FusedResidual.run(x, y, bias, scale)
    y = y if bias is None else y + bias[..., None, None]
    if scale is None:
        return y if x is None else x + y
    return scale * y if x is None else torch.addcmul(x, y, scale)


class FusedLayerNorm(Kernels):
    """The kernels. A program holds whole rows, so x is read once each way, and nothing else is kept. The
    arithmetic is fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        x = x.contiguous()
        out, (L, C, tile) = torch.empty_like(x), FusedLayerNorm.table(x)
        _layer_norm_kernel[cdiv(L, tile["ROWS"]),](x, weight, bias, out, eps, L, C, **tile)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), grad_bias, grad_weight, sums = ctx.saved_tensors, None, None, None
        grad_x, (L, C, tile) = torch.empty_like(x), FusedLayerNorm.table(x)
        rows = cdiv(cdiv(L, PROGRAMS), tile["ROWS"]) * tile["ROWS"]
        programs = cdiv(L, max(1, rows))
        if any(ctx.needs_input_grad[1:]):
            sums = x.new_empty(2, programs, C, dtype=torch.float32)
        _layer_norm_backward_kernel[programs,](
            x, grad.contiguous(), weight, grad_x, sums, ctx.eps, L, C, rows, **tile)
        if sums is not None:
            grad_bias, grad_weight = sums.sum(1)                                # c each
        return grad_x, grad_weight, grad_bias, None

    @staticmethod
    def table(x):
        """Number of rows, numbers of each, and what a program takes at once."""
        width = power_of_2(x.shape[-1])
        return x.shape[:-1].numel(), x.shape[-1], dict(ROWS=max(1, TILE // width), WIDTH=width)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of x [.. c]: the kernels where has_kernels says so, and else the PyTorch expression."""

    def forward(self, x):
        if has_kernels(x):
            return FusedLayerNorm.run(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class FusedGEGLU(Kernels):
    """The kernels, on CUDA (or on CPU tensors in Triton's interpreter). x is read once forward, x and the
    gradient once backward, and nothing but x is kept in between. The arithmetic is fp32."""

    @staticmethod
    def forward(ctx, x):
        assert x.shape[-1] % 2 == 0, f"shape {tuple(x.shape)}: rows have no halves"
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        launch(_geglu_kernel, out.numel(), out.shape[-1], x, out)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        launch(_geglu_backward_kernel, grad.numel(), grad.shape[-1], x, grad.contiguous(), grad_x)
        return grad_x


def geglu(x):
    """x [.. 2d] -> its first half times gelu of the second, [.. d]. On CUDA it is the kernels; elsewhere, in
    fp64 and for torch.compile the PyTorch expression."""
    if has_kernels(x):
        return FusedGEGLU.run(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


class FusedFrameAttention(Kernels):
    """The kernels: softmax(q k^T / sqrt(c)) v among the frames of each pixel, q, k, v [b f s (a c)] as they
    are in memory. A program takes one head of one pixel, all of it at once. The arithmetic is fp32, but that
    factors of matrix products are as precise as q."""

    @staticmethod
    def forward(ctx, q, k, v, num_heads):
        q, k, v = [tensor.contiguous() for tensor in (q, k, v)]
        out, ctx.num_heads = torch.empty_like(q), num_heads
        FusedFrameAttention.launch(_attention_kernel, num_heads, q, k, v, out)
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in "qkv"]
        FusedFrameAttention.launch(_attention_backward_kernel, ctx.num_heads, *ctx.saved_tensors,
                                   grad.contiguous(), *gradients)
        return *gradients, None

    @staticmethod
    def launch(kernel, num_heads, q, *others):
        (b, f, s, c), width = q.shape, q.shape[3] // num_heads
        kernel[b * s * num_heads,](q, *others, width ** -0.5, f, s, c, WIDTH=width, num_warps=1,
                                   FRAMES=max(16, power_of_2(f)))       # of a matrix product


def frame_attention(q, k, v, num_heads):
    """Attention among the frames of each pixel, q, k, v [b f s (a c)] with a heads -> [b f s (a c)]. Where
    has_kernels says so, frames are few and heads have no odd size it is the kernels, else the PyTorch
    expression."""
    if has_kernels(q) and q.shape[1] <= MAX_FRAMES and q.shape[3] // num_heads in (16, 32, 64):
        return FusedFrameAttention.run(q, k, v, num_heads)
    b = len(q)
    q, k, v = (rearrange(x, "b f s (a c) -> (b s) a f c", a=num_heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "(b s) a f c -> b f s (a c)", b=b)
