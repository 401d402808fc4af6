"""Measures the kernels one by one on a CUDA GPU. Run by hand, not by pytest:

    $ python tests/kernel_speed.py upsample --report results/kernel.json      # two minutes
    $ python tests/kernel_speed.py layers --report results/layers.json        # half a minute

upsample: support/upsample.py forward and backward, beside PyTorch, eager and compiled. do_bench times the
replay of a CUDA graph that calls the kernel on several inputs, because a call can take less time than its
launch. do_bench empties the L2 cache before each replay. "Backward" is the time of forward + backward minus
that of forward. The floor is the time to read each input and write each output once, at the copy bandwidth.

layers: the layers of support/kernels.py beside those of model.py, forward, bf16, at the sizes of SVD's finest
level, 14 frames of 1024x576. The fast layers get channels-last tensors, as they do in the networks.
"""
import copy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import model  # noqa: E402
from discriminator import IMAGENET_MEAN, IMAGENET_STD, upsample_normalize  # noqa: E402
from support import checkpoint, engine, kernels  # noqa: E402

parser = engine.command_line("Measure the kernels one by one.")
parser.add_argument("what", choices=["upsample", "layers"], help="see the top of this file")
parser.add_argument("--device", choices=["cuda"], default="cuda", help="where it runs")
parser.add_argument("--report", type=Path, help="JSON file to write")
args = parser.parse_args()
median_ms = partial(do_bench, rep=500, return_mode="median")

# ---- upsample ---------------------------------------------------------------------------------------------

# clips of 14 frames, latent height and width, side of the output
SHAPES = [(8, 72, 128, 518), (1, 72, 128, 224), (1, 72, 128, 518), (1, 40, 72, 518)]
CALLS = 8                                       # calls in one CUDA graph, each with its own input


def eager(x, size, stats):
    mean, std = stats                                                                   # 3 1 1 each
    return (F.interpolate(x, size, mode="bilinear") - mean) / std


def fused(x, size, stats):
    return upsample_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD, x.dtype)


def graph_ms(fn):
    """Mean milliseconds of fn(0) to fn(CALLS - 1), all calls in one CUDA graph."""
    def calls():
        for i in range(CALLS):
            fn(i)

    graph = engine.cuda_graph(calls)
    for _ in range(4):                          # the fourth call is recorded, later ones are replays
        graph()
    return median_ms(graph) / CALLS


def copy_bandwidth():
    """Bytes per second of a large copy; read and written bytes both count."""
    source = torch.empty(2 ** 28, device="cuda")                                        # fp32
    target = torch.empty_like(source)
    # A negation, because copy_ uses the copy engine, which is slower than a kernel.
    return 2 * 4 * source.numel() / median_ms(lambda: torch.neg(source, out=target)) * 1e3


def upsample():
    """Times and errors of each shape and variant. Errors are relative to a result in float64."""
    rows, bandwidth = [], copy_bandwidth()
    stats = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64, device="cuda").view(2, 3, 1, 1)
    relative_error = lambda a, exact: ((a - exact).norm() / exact.norm()).item()
    for clips, h, w, side in SHAPES:
        torch._dynamo.reset()                                   # torch.compile limits the recompilations
        name = f"{clips} clips of " * (clips > 1) + f"14 frames, {h}x{w} -> {side}x{side}"
        shape = CALLS, 14 * clips, 3
        x = torch.randn(*shape, h, w, device="cuda", dtype=torch.bfloat16)
        grads = torch.randn(*shape, side, side, device="cuda", dtype=torch.bfloat16)
        inputs = [part.detach().requires_grad_() for part in x]
        exact_x = x[0].double().requires_grad_()
        exact = eager(exact_x, (side, side), stats)
        exact_gradient, = torch.autograd.grad(exact, exact_x, grads[0].double())
        floor_ms = 2 * (x[0].numel() + exact.numel()) / bandwidth * 1e3         # bf16; the same backward
        row = {"shape": name, "floor_ms": floor_ms}
        for variant, function in {"eager": eager, "fused": fused,
                                  "compiled": torch.compile(eager, dynamic=False)}.items():
            fn = partial(function, size=(side, side), stats=stats.bfloat16())
            forward = lambda i: fn(x[i])
            both = lambda i: torch.autograd.grad(fn(inputs[i]), inputs[i], grads[i])[0]
            forward_ms = graph_ms(forward)
            backward_ms = graph_ms(both) - forward_ms
            row[variant] = {
                "forward_ms": forward_ms, "forward_share": floor_ms / forward_ms,
                "backward_ms": backward_ms, "backward_share": floor_ms / backward_ms,
                "repeatable": torch.equal(both(0), both(0)),
                "error": relative_error(forward(0), exact),
                "gradient_error": relative_error(both(0), exact_gradient)}
            print(f"{name:40} {variant:9} forward {forward_ms * 1e3:7.1f} us, backward "
                  f"{backward_ms * 1e3:7.1f} us, floor {floor_ms * 1e3:5.1f} us", flush=True)
        rows.append(row)
    return {"copy_bandwidth": bandwidth, "rows": rows}


# ---- layers -----------------------------------------------------------------------------------------------

FRAMES, TOKENS = (14, 320, 72, 128), (1, 14, 9216, 320)         # b f c h w as (b f) c h w; b f s c
VAE_FRAMES = (5, 128, 576, 1024)                                # frames that the VAE encodes together


def layers():
    """Milliseconds of each layer, plain and fast."""
    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    emb, context = random(1, 1280), random(1, 1, 1024)
    cases = [                                                   # layer, shape of its input, other arguments
        ("GroupNorm", nn.GroupNorm(32, 320), FRAMES, ()),
        ("LayerNorm", nn.LayerNorm(320), TOKENS, ()),
        ("GEGLU", model.GEGLU(320, 1280), TOKENS, ()),
        ("TemporalAttention", model.TemporalAttention(320, num_heads=5), TOKENS, ()),
        ("SpatialTransformerBlock", model.SpatialTransformerBlock(320, 5, 1024), TOKENS, (context,)),
        ("TemporalTransformerBlock", model.TemporalTransformerBlock(320, 5, 1024), TOKENS, (context,)),
        ("ResBlock", model.ResBlock(320, 320, 1280), FRAMES, (emb,)),
        ("SpatioTemporalResBlock", model.SpatioTemporalResBlock(320, 320, 1280), FRAMES, (14, emb)),
        ("Downsample", model.Downsample(320, padding=1), FRAMES, ()),
        ("Upsample", model.Upsample(640), (14, 640, 36, 64), ()),
        ("ResBlock of the VAE", model.ResBlock(128, 128), VAE_FRAMES, ()),
        ("SpatioTemporalResBlock of the VAE", model.SpatioTemporalResBlock(128, 128),
         (14, *VAE_FRAMES[1:]), (14,)),
        ("Downsample of the VAE", model.Downsample(128, padding=0), VAE_FRAMES, ()),
        ("Upsample of the VAE", model.Upsample(256), (14, 256, 288, 512), ())]
    rows = []
    with torch.no_grad():
        for name, plain, shape, others in cases:
            plain = plain.to("cuda", torch.bfloat16)
            fast = kernels.fast(copy.deepcopy(plain))
            if name == "Upsample of the VAE":
                fast.__class__ = kernels.FoldedUpsample         # which fast() chooses inside a decoder
            x = random(*shape)
            x_fast = x if shape == TOKENS else x.contiguous(memory_format=torch.channels_last)
            row = {"layer": name, "shape": shape, "plain_ms": median_ms(lambda: plain(x, *others)),
                   "fast_ms": median_ms(lambda: fast(x_fast, *others))}
            print(f"{name:34} plain {row['plain_ms']:8.3f} ms  fast {row['fast_ms']:8.3f} ms", flush=True)
            rows.append(row)
    return {"rows": rows}


result = {**evaluate.record(args), **{"upsample": upsample, "layers": layers}[args.what]()}
if args.report:
    checkpoint.write_json(args.report, result)
