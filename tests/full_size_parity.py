"""SVD at its full size, random weights, beside diffusers: the same numbers? Needs diffusers and a GPU with
about 60 GB; takes about a minute. Run by hand, not by pytest:

    $ python tests/full_size_parity.py --report results/full_size_parity.json

Both get the same weights. In fp32 (without TF32) the difference is rounding; in bf16 each is compared with
diffusers' own fp32 result, so a figure like diffusers' means that nothing was lost on our side.
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

parser = argparse.ArgumentParser(description="Compare full-size networks with diffusers on random weights.")
parser.add_argument("--report", type=Path, help="JSON file to write")
parser.add_argument("--device", default="cuda", help="where to run (default: %(default)s)")
parser.add_argument("--width", type=int, default=1024, help="pixels (default: %(default)s)")
parser.add_argument("--height", type=int, default=576, help="pixels (default: %(default)s)")
args = parser.parse_args()

torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
device, f, h, w = args.device, 14, args.height // 8, args.width // 8


def randomise(net):
    """Weights of variance 1 / fan_in; random norms, biases, mixing weights: no layer is without effect."""
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)


with torch.device(device):
    x, c_noise = torch.randn(1, f, 8, h, w), torch.tensor([1.6])
    embeds, ids = torch.randn(1, 1, 1024), torch.tensor([[6.0, 127.0, 0.02]])
    frames, latents = torch.rand(2, 3, args.height, args.width) * 2 - 1, torch.randn(f, 4, h, w)

rows = {}
for name in ("unet", "vae"):
    with torch.device(device):
        if name == "unet":
            theirs, ours = diffusers.UNetSpatioTemporalConditionModel(), model.UNet()
        else:
            ours = model.VAE()
            theirs = diffusers.AutoencoderKLTemporalDecoder(**ours.config)
    theirs.to(device)                           # its mixing weights are made on the CPU whatever the default
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    if name == "unet":
        calls = {
            "UNet": (
                lambda dtype: theirs(x.to(dtype), c_noise[0], embeds.to(dtype), ids.to(dtype)).sample,
                lambda dtype: ours(x, c_noise, embeds, ids))}
    else:
        calls = {
            "VAE encode, 2 frames": (
                lambda dtype: theirs.encode(frames.to(dtype)).latent_dist.mode(),
                lambda dtype: ours.encode(frames)),
            "VAE decode, 14 frames": (
                lambda dtype: theirs.decode(latents.to(dtype), num_frames=f).sample,
                lambda dtype: ours.decode(latents, f))}
    reference = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = theirs.to(dtype).eval(), ours.to(dtype).eval()
        for what, (call_theirs, call_ours) in calls.items():
            y_theirs, y_ours = call_theirs(dtype).float(), call_ours(dtype).float()
            y = reference.setdefault(what, y_theirs)                    # diffusers in fp32

            def error(a, b):
                return ((a - b).norm() / b.norm()).item()
            rows[f"{what}, {str(dtype).removeprefix('torch.')}"] = {
                "ours_vs_diffusers": error(y_ours, y_theirs), "ours_vs_fp32": error(y_ours, y),
                "diffusers_vs_fp32": error(y_theirs, y)}
    theirs = ours = None                                # the next pair needs the memory
print(f"{'relative difference of norms':36}"
      f"{'ours : diffusers':>18}{'ours : fp32':>14}{'diffusers : fp32':>18}")
for what, row in rows.items():
    print(f"{what:36}"
          f"{row['ours_vs_diffusers']:18.2e}{row['ours_vs_fp32']:14.2e}{row['diffusers_vs_fp32']:18.2e}")
if args.report:
    args.report.parent.mkdir(exist_ok=True)
    args.report.write_text(json.dumps({
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
        "size": [args.width, args.height, f],
        "device": torch.cuda.get_device_name() if device == "cuda" else device, "torch": torch.__version__,
        "diffusers": diffusers.__version__, "rows": rows}, indent=2) + "\n")
