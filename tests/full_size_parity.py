"""Compares networks of SVD's size with diffusers, on the same random weights.

Both variants are compared: "plain", model.py as written, and "fast", with the layers of support/kernels.py.
It needs diffusers and a GPU with about 60 GB, takes about a minute, and is run by hand, not by pytest:

    $ python tests/full_size_parity.py --report results/full_size_parity.json

In fp32 (without TF32) the differences are rounding errors. In bf16 every result is compared with diffusers'
fp32 result; an error as small as that of diffusers in bf16 shows that the variant loses no accuracy.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
from support import kernels  # noqa: E402

parser = argparse.ArgumentParser(description="Compare full-size networks with diffusers on random weights.")
parser.add_argument("--report", type=Path, help="JSON file to write")
parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
parser.add_argument("--width", type=int, default=1024, help="pixels (default: %(default)s)")
parser.add_argument("--height", type=int, default=576, help="pixels (default: %(default)s)")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
device, f, h, w = args.device, 14, args.height // 8, args.width // 8


def randomise(net):
    """Weights of variance 1 / fan_in, random norms, biases and mixing weights: every layer has an effect."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)


def error(a, b):
    """|a - b| / |b|, Euclidean norms."""
    return ((a - b).norm() / b.norm()).item()


with torch.device(device):
    x, c_noise = torch.randn(1, f, 8, h, w), torch.tensor([1.6])
    embeds, ids = torch.randn(1, 1, 1024), torch.tensor([[6.0, 127.0, 0.02]])
    frames, latents = torch.rand(2, 3, args.height, args.width) * 2 - 1, torch.randn(f, 4, h, w)

# {network: {result: (diffusers' call, our call)}}. A call is a function of a network and a dtype.
CALLS = {
    "unet": {"UNet": (
        lambda net, dtype: net(x.to(dtype), c_noise[0], embeds.to(dtype), ids.to(dtype)).sample,
        lambda net, dtype: net(x, c_noise, embeds, ids))},
    "vae": {
        "VAE encode, 2 frames": (
            lambda net, dtype: net.encode(frames.to(dtype)).latent_dist.mode(),
            lambda net, dtype: net.encode(frames)),
        "VAE decode, 14 frames": (
            lambda net, dtype: net.decode(latents.to(dtype), num_frames=f).sample,
            lambda net, dtype: net.decode(latents, f))}}

rows = {}
for name, calls in CALLS.items():
    with torch.device(device):
        if name == "unet":
            theirs, ours = diffusers.UNetSpatioTemporalConditionModel(), model.UNet()
        else:
            ours = model.VAE()
            theirs = diffusers.AutoencoderKLTemporalDecoder(**ours.config)
    theirs.to(device)                           # diffusers creates its mixing weights on the CPU
    randomise(theirs)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}              # fp32
    reference, by_diffusers = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs = theirs.to(dtype).eval()
        for what, (call, _) in calls.items():
            by_diffusers[what, dtype] = call(theirs, dtype).float()
            reference.setdefault(what, by_diffusers[what, dtype])                               # fp32
    theirs = None                               # frees its memory
    for variant in ("plain", "fast"):
        if variant == "fast":                   # fast changes ours in place, so plain is first
            ours = kernels.fast(ours)
        for dtype in (torch.float32, torch.bfloat16):
            ours = ours.to(dtype).eval()
            ours.load_state_dict(weights)       # fp32 weights again, after bf16
            for what, (_, call) in calls.items():
                y, y_diffusers = call(ours, dtype).float(), by_diffusers[what, dtype]
                row = rows.setdefault(f"{what}, {str(dtype).removeprefix('torch.')}", {
                    "diffusers_vs_fp32": error(y_diffusers, reference[what])})
                row |= {f"{variant}_vs_diffusers": error(y, y_diffusers),
                        f"{variant}_vs_fp32": error(y, reference[what])}
    ours = weights = None                       # the VAE needs the memory

COLUMNS = {"plain : diffusers": "plain_vs_diffusers", "fast : diffusers": "fast_vs_diffusers",
           "plain : fp32": "plain_vs_fp32", "fast : fp32": "fast_vs_fp32",
           "diffusers : fp32": "diffusers_vs_fp32"}
print(f"{'relative difference of norms':32}" + "".join(f"{column:>19}" for column in COLUMNS))
for what, row in rows.items():
    print(f"{what:32}" + "".join(f"{row[key]:19.2e}" for key in COLUMNS.values()))
if args.report:
    args.report.parent.mkdir(exist_ok=True)
    args.report.write_text(json.dumps({
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
        "size": [args.width, args.height, f],
        "device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__,
        "diffusers": diffusers.__version__, "rows": rows}, indent=2) + "\n")
