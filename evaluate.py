"""How good are the videos? Frechet Video Distance.

    VideoClassifier       the toy world's stand-in for I3D: a small 3-D convolutional network, called like it
    load_detector         an I3D TorchScript file, or the folder of a VideoClassifier
    video_features        clips -> the detector's logits, which the distance compares
    frechet_distance      between Gaussians fitted to two sets of features
    heads_table           what spatial and temporal heads of the discriminator can tell apart

    $ python evaluate.py heads --report results/heads.json

FVD (Unterthiner et al., arXiv 1812.01717) is the Frechet distance between real and generated clips in the
space of the 400 logits of an I3D network trained on Kinetics. The toy world has its own classifier, which
train_toy.py trains on what a scene shows and how it moves. Distances by different detectors do not compare.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import model

# ---- The detector ---------------------------------------------------------------------------------------


class VideoClassifier(nn.Module):
    """Multi-label classifier of clips: 3x3x3 convolutions that halve space four times and time twice."""

    def __init__(self, num_classes: int, channels=(32, 64, 96, 128), size: int = 128):
        super().__init__()
        self.config = {"num_classes": num_classes, "channels": list(channels), "size": size}
        c1, c2, c3, c4 = channels
        conv = lambda c_in, c, stride, kernel=(3, 3, 3): nn.Sequential(
            nn.Conv3d(c_in, c, kernel, stride, padding=[k // 2 for k in kernel], bias=False),
            nn.GroupNorm(8, c), nn.SiLU())
        self.stem = conv(3, c1, (1, 2, 2), (3, 5, 5))
        self.stages = nn.Sequential(conv(c1, c2, (1, 2, 2)), conv(c2, c3, (2, 2, 2)), conv(c3, c4, (2, 2, 2)))
        self.mix = conv(c4, c4 // 2, 1)
        self.head = nn.Linear(c4 // 2 * 4 * 4, num_classes)     # a coarse map, not its mean: where counts too

    def forward(self, x: Tensor, rescale=True, resize=True, return_features=True) -> Tensor:
        """x [b 3 f H W] -> logits [b k], or probabilities if not return_features. Called like I3D's script.

        rescale: x is in [0, 255], not in [-1, 1]. resize: bring frames to the size that was trained at.
        """
        if rescale:
            x = x / 127.5 - 1
        if resize and x.shape[-2:] != (self.config["size"], self.config["size"]):
            num_frames, size = x.shape[2], (self.config["size"],) * 2
            x = F.interpolate(rearrange(x, "b c f h w -> (b f) c h w"), size, mode="bilinear", antialias=True)
            x = rearrange(x, "(b f) c h w -> b c f h w", f=num_frames)
        x = x.to(self.head.weight.dtype)
        x = self.mix(self.stages(self.stem(x))).mean(dim=2)                                 # b c h w
        logits = self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))                          # b k
        return logits if return_features else logits.sigmoid()


def save_detector(detector: VideoClassifier, folder, dtype=None):
    tensors = {key: tensor.to(dtype) if dtype else tensor for key, tensor in detector.state_dict().items()}
    model.write_safetensors(Path(folder) / "model.safetensors", tensors)
    model.write_json(Path(folder) / "config.json", {"_class_name": "VideoClassifier", **detector.config})


def load_detector(path, device="cpu"):
    """I3D as a TorchScript file (StyleGAN-V's i3d_torchscript.pt), or a folder that save_detector wrote."""
    if Path(path).is_dir():
        config = model.read_json(Path(path) / "config.json")
        detector = VideoClassifier(**{key: value for key, value in config.items() if not key.startswith("_")})
        tensors = dict(model.read_safetensors([Path(path) / "model.safetensors"]))
        detector.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        return detector.to(device).eval()
    return torch.jit.load(os.fspath(path), map_location=device).eval()


@torch.no_grad()
def video_features(detector, frames: Tensor, batch_size: int = 64) -> Tensor:
    """Clips [b f 3 H W] in [-1, 1] -> features [b k], of the 8-bit pixels that a viewer would see."""
    pixels = lambda x: rearrange((x.float().clamp(-1, 1) * 127.5 + 127.5).round(), "b f c h w -> b c f h w")
    return torch.cat([detector(pixels(part), rescale=True, resize=True, return_features=True).float()
                      for part in frames.split(batch_size)])


# ---- The distance ---------------------------------------------------------------------------------------


def frechet_distance(features_real: Tensor, features_fake: Tensor) -> float:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two sets of features, [n d] each:

        |mu_r - mu_f|^2 + tr(S_r) + tr(S_f) - 2 tr((S_r^1/2 S_f S_r^1/2)^1/2)

    The matrix in the last root is symmetric and has the eigenvalues of S_r S_f, so two symmetric
    eigendecompositions in float64 do, also for singular covariances (fewer clips than features). The estimate
    is biased upwards for few clips: compare only distances of equal n.
    """
    real, fake = features_real.detach().double().cpu(), features_fake.detach().double().cpu()       # n d
    cov_real, cov_fake = torch.cov(real.T, correction=1), torch.cov(fake.T, correction=1)           # d d
    cov_real, cov_fake = torch.atleast_2d(cov_real), torch.atleast_2d(cov_fake)
    values, vectors = torch.linalg.eigh(cov_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                                         # d d
    overlap = torch.linalg.eigvalsh(root @ cov_fake @ root).clamp(min=0).sqrt().sum()
    shift = (real.mean(0) - fake.mean(0)).square().sum()
    return float(shift + cov_real.trace() + cov_fake.trace() - 2 * overlap)


# ---- What the discriminator's heads see -----------------------------------------------------------------


def heads_table(args):
    """Trains discriminators with both, only spatial or only temporal heads to tell real clips of the toy
    world from two kinds of fakes: the teacher's blurred one-step samples, and real clips with their frames
    shuffled, each frame of which is real. Hinge loss and accuracy on held-out clips; knowing nothing gives 2
    and 50 %."""
    import data
    import losses
    import solver
    from discriminator import DinoFeatures, Discriminator, load_dino
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32
    vae, image_encoder, unet = (load(args.model, dtype=dtype, device=device) for load in (
        model.load_vae, model.load_image_encoder, model.load_unet))
    shape = unet.config["num_frames"], 8 * unet.config["sample_size"]
    generator, sets = torch.Generator(device).manual_seed(args.seed), []
    for seed, count in ((args.seed, args.num_clips), (args.seed + data.HELD_OUT, args.held_out)):
        latents = data.toy_latents(vae, image_encoder, seed, count, *shape, device)
        blurred = []
        for numbers in torch.arange(count).split(32):
            x0, cond = latents.take(numbers)                                                # b f c h w
            x_t = solver.SIGMA_MAX * torch.randn(x0.shape, generator=generator, device=device)
            with torch.no_grad():
                blurred.append(solver.consistency(unet, x_t, solver.SIGMA_MAX, cond))
        real = latents.take(torch.arange(count))[0]                                         # n f c h w
        order = torch.rand(real.shape[:2], generator=generator, device=device).argsort(dim=1)       # n f
        shuffled = torch.stack([clip[i] for clip, i in zip(real, order)])
        sets.append({"real": real, "one-step teacher": torch.cat(blurred), "shuffled frames": shuffled})
    train, test = sets

    rows = []
    for fake in ("one-step teacher", "shuffled frames"):
        for heads in (("spatial", "temporal"), ("spatial",), ("temporal",)):
            torch.manual_seed(args.seed)
            features = DinoFeatures(load_dino(Path(args.model) / "dinov2").to(device, dtype))
            disc = Discriminator(features, heads).to(device)
            weights = [p for p in disc.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(weights, lr=args.learning_rate, betas=(0.0, 0.99))
            for _ in range(args.steps):
                pick = torch.randint(args.num_clips, (2, args.batch_size), generator=generator, device=device)
                loss = losses.hinge_d(disc(train["real"][pick[0]]), disc(train[fake][pick[1]]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            disc.eval()
            with torch.no_grad():
                logits = [torch.cat([disc(x) for x in test[kind].split(32)])
                          for kind in ("real", fake)]                                       # n k each
            right = ((logits[0].mean(1) > 0).float().mean() + (logits[1].mean(1) < 0).float().mean()) / 2
            rows.append({"fake": fake, "heads": " + ".join(heads), "hinge": losses.hinge_d(*logits).item(),
                         "accuracy": right.item()})
            print(f"{fake:20}{rows[-1]['heads']:22}hinge {rows[-1]['hinge']:.2f}   "
                  f"accuracy {rows[-1]['accuracy']:.0%}", flush=True)
    return {"rows": rows}


def main():
    parser = argparse.ArgumentParser(description="Measure quality.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: sys.exit(print(f"evaluate.py: {message}", file=sys.stderr) or 2)
    flag = parser.add_argument
    flag("what", choices=["heads"], help="heads: what the heads of the discriminator can tell apart")
    flag("--model", default=os.fspath(Path(__file__).resolve().parent / "assets" / "toy"),
         help="pipeline folder of the toy world")
    flag("--steps", type=int, default=300, help="training steps of each discriminator")
    flag("--batch_size", type=int, default=16, help="real clips per step, and as many fakes")
    flag("--learning_rate", type=float, default=1e-3, help="of the discriminator")
    flag("--num_clips", type=int, default=1024, help="clips to train on")
    flag("--held_out", type=int, default=256, help="clips to measure on")
    flag("--seed", type=int, default=0, help="of everything drawn")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    flag("--report", type=Path, help="JSON file to write")
    args = parser.parse_args()
    try:
        result = {"heads": heads_table}[args.what](args)
    except model.ModelError as problem:
        parser.error(str(problem))
    if args.report:
        model.write_json(args.report, {
            "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "settings": json.loads(json.dumps(vars(args), default=str)), **result})


if __name__ == "__main__":
    main()
