"""upsample_normalize: bilinear resize and per-channel normalisation, fused into one Triton kernel.

What is computed. The discriminator enlarges frames of 3 channels [n 3 h w], made from latents, to the input
size of its backbone [n 3 H W]:
F.interpolate(mode="bilinear", align_corners=False), then (value - mean) / std with a mean and a std per
channel. The function is at the end of this file, with the PyTorch expression for devices without Triton.

Why one kernel. An output pixel costs a handful of operations, so memory traffic decides the time, and the
output is many times larger than the input. PyTorch writes it for the resize, then reads and writes it again
for `- mean` and for `/ std`. The fused kernel reads the small input and writes the output once.

The weights. Output row Y samples the input at y = (Y + 1/2) h / H - 1/2. Let i = floor(y) and lam = y - i:

    out[Y] = (1 - lam) row[i] + lam row[i + 1]          rows outside of the input repeat its border row

Columns follow the same formula, and the weight of a pixel is the product of its row's and its column's
weight. Call "interval i" the output rows that sample between the input rows i and i + 1. There are h + 1
intervals: interval -1 lies above the centre of row 0, and interval h - 1 below the centre of row h - 1.

Forward. A program takes one channel of one frame (a plane), a block of output columns and a band of
intervals. It loads each input row once, interpolates it along the columns, and normalises it. Each output row
of an interval is then a mixture of two such rows: one multiplication, one addition and one write per pixel.
Normalising first gives the same result, since the two weights of a mixture add up to 1.

Backward. The gradient of an input pixel is a weighted sum over all output pixels that used it. If output
pixels scattered their parts, several programs would add to one address: slow, and in a random order. Here
each input pixel gathers instead, and the order of every sum is fixed, so results are bitwise repeatable.
Row i is used by interval i - 1, with weight lam, and by interval i, with weight 1 - lam. One pass down the
output rows yields both sums of an interval, sum g and sum lam g; the second is carried to the next row. The
columns follow once per input row, with the weight max(0, 1 - |x - j|) that output position x gives column j.
"""
import math

import torch
import torch.nn.functional as F

from support.fused import has_kernels, tl, triton  # None without Triton: upsample_normalize uses PyTorch

# ---------------------------------------------------------------------------------------------------------
# Triton kernels
#
# h w is the input size, H W the output size; scale is h / H or w / W. VEC divides W. The width of a row is
# written W_by_VEC * VEC: the compiler then knows it as a multiple of VEC and uses wider loads and stores.

if triton:

    @triton.jit
    def _first_output(position, scale):
        """The first output row (or column) that samples the input at `position` or beyond."""
        return tl.maximum(tl.ceil((position + 0.5) / scale - 0.5).to(tl.int32), 0)

    @triton.jit
    def _interval_outputs(interval, h, H, scale):
        """The output rows of an interval: its first row, and the row after its last."""
        first = tl.where(interval < 0, 0, _first_output(interval, scale))
        end = tl.where(interval == h - 1, H, tl.minimum(_first_output(interval + 1, scale), H))
        return first, end

    @triton.jit
    def _of_channel(plane, a, b, c):
        """a, b or c, by the channel of a plane."""
        channel = plane % 3
        return tl.where(channel == 0, a, tl.where(channel == 1, b, c))

    @triton.jit
    def _load_pair(row, x0, x1, inside):
        """The values of an input row left and right of each output column."""
        return tl.load(row + x0, inside, 0.0), tl.load(row + x1, inside, 0.0)

    @triton.jit
    def _forward_kernel(x, out, h, w, H, W, W_by_VEC, scale_y, scale_x, mean0, mean1, mean2, std0, std1, std2,
                        BAND: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
        """One program writes BAND intervals, BLOCK columns wide, of one plane. The blocks of a row belong to
        consecutive programs: a block may end inside a 32-byte sector of memory, and the cache then joins the
        two parts of the sector."""
        blocks, bands = tl.cdiv(W, BLOCK), tl.cdiv(h + 1, BAND)
        program = tl.program_id(0)
        band, plane = program // blocks % bands, program // blocks // bands
        mean, std = _of_channel(plane, mean0, mean1, mean2), _of_channel(plane, std0, std1, std2)
        x += plane.to(tl.int64) * h * w                         # offsets in a plane fit 32 bits, this may not
        out += plane.to(tl.int64) * (H * W_by_VEC) * VEC
        X = program % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = X // VEC < W_by_VEC
        position = tl.clamp((X + 0.5) * scale_x - 0.5, 0.0, w - 1.0)
        x0 = position.to(tl.int32)
        x1, lam = tl.minimum(x0 + 1, w - 1), position - x0
        top = band * BAND - 1
        left, right = _load_pair(x + tl.maximum(top, 0) * w, x0, x1, inside)
        below = (left.to(tl.float32) * (1 - lam) + right.to(tl.float32) * lam - mean) / std
        left, right = _load_pair(x + tl.minimum(top + 1, h - 1) * w, x0, x1, inside)
        for k in range(0, tl.minimum(BAND, h - top)):
            interval = top + k
            above = below
            below = (left.to(tl.float32) * (1 - lam) + right.to(tl.float32) * lam - mean) / std
            # The next interval's row is requested now, so that it arrives while this one is written.
            left, right = _load_pair(x + tl.minimum(interval + 2, h - 1) * w, x0, x1, inside)
            slope = below - above
            first, end = _interval_outputs(interval, h, H, scale_y)
            for row in range(0, end - first):
                Y = first + row
                value = above + slope * ((Y + 0.5) * scale_y - 0.5 - interval)
                tl.store(out + Y * W_by_VEC * VEC + X, value.to(out.dtype.element_ty), inside)

    @triton.jit
    def _backward_kernel(grad, grad_x, h, w, H, W, W_by_VEC, scale_y, scale_x, std0, std1, std2, STEP,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
                         VEC: tl.constexpr, UNROLL: tl.constexpr):
        """One program: the gradient of ROWS rows and STEP columns of one input plane. It sums down the BLOCK
        output columns that its input columns need; neighbouring threads read neighbouring addresses.
        Then, for each input row, it sums TAPS of these columns into each input column."""
        blocks, bands = tl.cdiv(w, STEP), tl.cdiv(h, ROWS)
        program = tl.program_id(0)
        band, plane = program // blocks % bands, program // blocks // bands
        grad += plane.to(tl.int64) * (H * W_by_VEC) * VEC
        grad_x += plane.to(tl.int64) * h * w
        start = program % blocks * STEP
        base = tl.where(start == 0, 0, _first_output(start - 1, scale_x)) // VEC * VEC
        X = base + tl.arange(0, BLOCK)
        # Output positions in (j - 1, j + 1) use column j. Their weight falls from 1 at j to 0 at both ends.
        j = start + tl.arange(0, COLUMNS)
        first = tl.where(j == 0, 0, _first_output(j - 1, scale_x))
        taps = first[None] + tl.arange(0, TAPS)[:, None]                                # TAPS COLUMNS
        position = tl.clamp((taps + 0.5) * scale_x - 0.5, 0.0, w - 1.0)
        weight = tl.maximum(1 - tl.abs(position - j[None]), 0.0) / _of_channel(plane, std0, std1, std2)
        weight = tl.where(taps < W, weight, 0.0)
        taps = tl.reshape(tl.minimum(taps - base, BLOCK - 1), [TAPS * COLUMNS])
        own_columns = (j < start + STEP) & (j < w)
        top = band * ROWS
        carry = tl.zeros([BLOCK], tl.float32)                   # sum lam g of the previous interval
        for k in range(0, tl.minimum(ROWS, h - top) + 1):
            interval = top - 1 + k
            first_row, end_row = _interval_outputs(interval, h, H, scale_y)
            # lam = lam_first + row * scale_y, so sum lam g follows from sum g and sum row * g.
            sum_g, sum_row_g = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for done in range(0, end_row - first_row, UNROLL):
                for i in tl.static_range(UNROLL):               # unrolled: UNROLL loads are in flight at once
                    row = done + i
                    inside = X // VEC < tl.where(first_row + row < end_row, W_by_VEC, 0)
                    g = tl.load(grad + (first_row + row) * W_by_VEC * VEC + X, inside, 0.0).to(tl.float32)
                    sum_g += g
                    sum_row_g += row * g
            lam_first = (first_row + 0.5) * scale_y - 0.5 - interval
            sum_lam_g = tl.where(interval == h - 1, 0.0, lam_first * sum_g + scale_y * sum_row_g)
            sum_lam_g = tl.where(interval < 0, sum_g, sum_lam_g)            # above row 0, all goes to row 0
            total, carry = carry + sum_g - sum_lam_g, sum_lam_g
            gathered = tl.reshape(tl.gather(total, taps, 0), [TAPS, COLUMNS])
            value = tl.sum(gathered * weight, axis=0).to(grad_x.dtype.element_ty)
            tl.store(grad_x + interval * w + j, value, own_columns & (k > 0))


class FusedUpsampleNormalize(torch.autograd.Function):
    """The kernels as an autograd function: on CUDA tensors, or in Triton's interpreter on a CPU (for tests).
    See upsample_normalize for the arguments."""

    @staticmethod
    def forward(ctx, x, size, mean, std, dtype):
        (n, c, h, w), (H, W) = x.shape, size
        assert c == 3 and max(h * w, H * W) < 2 ** 31, f"{c} x {h}x{w} -> {H}x{W}: not 3 planes below 2^31"
        ctx.shape, ctx.dtype, ctx.size, ctx.std = x.shape, x.dtype, size, std
        out = x.new_empty((n, c, H, W), dtype=dtype)
        vec, block, band = math.gcd(W, 8), 256, 8
        _forward_kernel[(n * c * triton.cdiv(h + 1, band) * triton.cdiv(W, block),)](
            x.contiguous(), out, h, w, H, W, W // vec, h / H, w / W, *mean, *std,
            BAND=band, BLOCK=block, VEC=vec, num_warps=1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (n, c, h, w), (H, W) = ctx.shape, ctx.size
        grad_x = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        vec, rows = math.gcd(W, 8), 8
        most_taps = 2 * W // w + 1                              # integers in an interval of length 2 W / w
        block = max(256, triton.next_power_of_2(most_taps + vec))
        step = min(w, 128, (block - vec) * w // W - 1)          # step columns need (step + 1) W / w outputs
        step = triton.cdiv(w, triton.cdiv(w, step))             # the same number of columns in each program
        _backward_kernel[(n * c * triton.cdiv(h, rows) * triton.cdiv(w, step),)](
            grad.contiguous(), grad_x, h, w, H, W, W // vec, h / H, w / W, *ctx.std, step, ROWS=rows,
            COLUMNS=triton.next_power_of_2(step), TAPS=triton.next_power_of_2(most_taps), BLOCK=block,
            VEC=vec, UNROLL=8, num_warps=2)
        return grad_x, None, None, None, None


# ---------------------------------------------------------------------------------------------------------
# The function


def upsample_normalize(x, size, mean, std, dtype=None):
    """Bilinear resize (align_corners=False, no antialiasing) to size (H, W), then (value - mean) / std.

    x [n 3 h w] in fp32, fp16 or bf16, with any strides -> [n 3 H W], contiguous, in `dtype` (default: x's).
    mean, std: three numbers each. Any sizes, larger or smaller. The arithmetic is fp32. CUDA tensors use one
    Triton kernel forward and one backward, both bitwise repeatable; others use PyTorch, see has_kernels.
    """
    dtype = dtype or x.dtype
    if has_kernels(x):
        return FusedUpsampleNormalize.apply(x, tuple(size), tuple(mean), tuple(std), dtype)
    compute = torch.promote_types(x.dtype, torch.float32)
    mean, std = (torch.tensor(v, dtype=compute, device=x.device).view(3, 1, 1) for v in (mean, std))
    return ((F.interpolate(x.to(compute), tuple(size), mode="bilinear") - mean) / std).to(dtype)
