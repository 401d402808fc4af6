"""How fast is it, and how far from what the machine can do? So far: the kernel that feeds the discriminator.

    $ python bench.py kernel --report results/kernel.json        # upsample + normalise, on a CUDA GPU
    $ python bench.py kernel --device cpu                        # the same checks, small, without Triton

Each row is a median over repeats after warm-up, with rotating inputs so that no run finds its data in a
cache; "backward" is forward and backward together, less forward. The floor is the time to move the bytes
that have to be moved (each input read once, each output written once) at the copy bandwidth measured in the
same run.
"""
import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from discriminator import IMAGENET_MEAN, IMAGENET_STD, upsample_normalize

# frames, latent height and width, output height and width
SHAPES = {
    "8 clips of 14 frames, 72x128 -> 518x518": (112, 72, 128, 518, 518),
    "14 frames, 72x128 -> 224x224": (14, 72, 128, 224, 224),
    "14 frames, 72x128 -> 518x518": (14, 72, 128, 518, 518),
    "14 frames, 40x72 -> 518x518": (14, 40, 72, 518, 518),
}
SMALL = {"14 frames, 8x8 -> 42x42": (14, 8, 8, 42, 42)}


def median_ms(fn, inputs, device, budget=0.3):
    """Median milliseconds of fn(input) over about `budget` seconds, inputs in rotation.

    On a GPU a round through all inputs is recorded once as a CUDA graph and replayed: what is timed is the
    GPU's work, not Python's way to it."""
    for x in inputs * 2:
        fn(x)
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in inputs:
                fn(x)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times, began = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - began < budget:
        if device.type == "cuda":
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(inputs))
        else:
            before = time.perf_counter()
            fn(inputs[len(times) % len(inputs)])
            times.append((time.perf_counter() - before) * 1e3)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device):
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    source = torch.empty(2 ** (30 if device.type == "cuda" else 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(target.copy_, [source], device) * 1e3


@cache
def constants(device, dtype):
    """Of ImageNet: on the device before a graph is recorded, in which nothing may come from the host."""
    return [torch.tensor(v, device=device, dtype=dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]


def eager(x, size, dtype):
    mean, std = constants(x.device, x.dtype)
    return ((F.interpolate(x, size, mode="bilinear") - mean) / std).to(dtype)


def fused(x, size, dtype):
    return upsample_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def kernel(args):
    device, dtype = torch.device(args.device), torch.bfloat16
    bandwidth, rows = copy_bandwidth(device), []
    for name, (n, h, w, height, width) in (SHAPES if device.type == "cuda" else SMALL).items():
        size = (height, width)
        bytes_moved = n * 3 * (height * width + h * w) * 2                      # bf16, either direction
        count = max(2, min(8, int(2e8 / bytes_moved)))                          # beyond any cache
        inputs = [torch.randn(n, 3, h, w, device=device, dtype=dtype).requires_grad_() for _ in range(count)]
        grads = [torch.randn(n, 3, *size, device=device, dtype=dtype) for _ in range(count)]
        exact_x = inputs[0].detach()[:2].double().requires_grad_()
        exact = eager(exact_x, size, torch.float64)
        exact_gradient, = torch.autograd.grad(exact, exact_x, grads[0][:2].double())
        variants = {"eager": eager, "fused": fused}
        if device.type == "cuda":
            torch._dynamo.reset()
            variants["compiled"] = torch.compile(eager, dynamic=False)
        row = {"shape": name, "floor_ms": bytes_moved / bandwidth * 1e3}
        for variant, fn in variants.items():
            def both(i):
                return torch.autograd.grad(fn(inputs[i], size, dtype), inputs[i], grads[i])[0]

            forward = median_ms(lambda i: fn(inputs[i].detach(), size, dtype), list(range(count)), device)
            back = median_ms(both, list(range(count)), device) - forward
            row[variant] = {
                "forward_ms": forward, "forward_share": row["floor_ms"] / forward,
                "backward_ms": back, "backward_share": row["floor_ms"] / back,
                "repeatable": torch.equal(both(0), both(0)),
                "error": relative(fn(inputs[0].detach(), size, dtype)[:2], exact),
                "gradient_error": relative(both(0)[:2], exact_gradient)}
        rows.append(row)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    print(" " * 40 + "".join(f"{head:>{width}}" for head, width in (
        ("forward", 11), ("of floor", 9), ("backward", 11), ("of floor", 9), ("repeats", 8), ("error", 9),
        ("of grad", 9))))
    for row in rows:
        print(f"{row['shape']:40}{row['floor_ms'] * 1e3:8.0f} us    floor")
        for variant in ("eager", "compiled", "fused"):
            if variant in row:
                r = row[variant]
                print(f"{variant:>40}{r['forward_ms'] * 1e3:8.0f} us{r['forward_share']:9.0%}"
                      f"{r['backward_ms'] * 1e3:8.0f} us{r['backward_share']:9.0%}{r['repeatable']!s:>8}"
                      f"{r['error']:9.1e}{r['gradient_error']:9.1e}")
    return {"copy_bandwidth": bandwidth, "rows": rows}


parser = argparse.ArgumentParser(description="Measure speed.", allow_abbrev=False)
parser.error = lambda message: sys.exit(print(f"bench.py: {message}", file=sys.stderr) or 2)
parser.add_argument("what", choices=["kernel"], help="what to measure")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                    help="where to run (default: %(default)s)")
parser.add_argument("--report", type=Path, help="JSON file to write")

if __name__ == "__main__":
    args = parser.parse_args()
    result = {"kernel": kernel}[args.what](args)
    if args.report:
        device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps({
            "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "device": device,
            "torch": torch.__version__, **result}, indent=2) + "\n")
