"""What spatial and temporal heads can detect: discriminators with both kinds of heads, or with one kind,
learn to tell real clips of the toy world from two kinds of fakes.

    $ python exercises/heads.py --report results/heads.json            # minutes of a GPU
    $ python exercises/heads.py --steps 2 --train_clips 8 --held_out 4 # to see it run

The fakes are one-step samples of the teacher, which are blurred, and real clips with shuffled frames, in
which each single frame is real. Prints, and writes as JSON, the hinge loss and the accuracy on held-out
clips. A discriminator that has learned nothing has a loss of 2 and an accuracy of 50 %.
"""
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import solver  # noqa: E402
from discriminator import DinoFeatures, Discriminator, load_dino  # noqa: E402
from support import engine  # noqa: E402
from support.checkpoint import check_writable, write_json  # noqa: E402
from support.kernels import fast  # noqa: E402

parser = engine.command_line("Show what the heads of a discriminator can detect.")
flag = parser.add_argument
flag("--model", default=os.fspath(sampler.TOY), help="pipeline folder, with a dinov2/ inside")
flag("--steps", type=engine.positive, default=300, help="training steps of each discriminator")
flag("--batch_size", type=engine.positive, default=16, help="real clips per step, and as many fakes")
flag("--learning_rate", default=1e-3, help="learning rate of the discriminators")
flag("--train_clips", type=engine.positive, default=1024, help="clips to train on")
flag("--held_out", type=engine.positive, default=256, help="clips to measure on")
flag("--seed", default=0, help="seed of clips, noise and weights")
flag("--device", help="cuda, mps or cpu (default: the first of these that is available)")
flag("--report", type=Path, help="JSON file to write")
args = parser.parse_args()
device = args.device = engine.choose_device(args.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
check_writable(args.report)

# ---- Real clips and their fakes: a set to train on and a set to measure on

vae, image_encoder, unet = (load(args.model, dtype=dtype, device=device) for load in (
    model.load_vae, model.load_image_encoder, model.load_unet))
vae, unet = fast(vae), fast(unet)
generator = torch.Generator(device).manual_seed(args.seed)
one_step = solver.strided(solver.karras_sigmas(solver.NUM_SIGMAS), 1)                       # sigma_max, 0
sets = []
for seed, count in ((args.seed, args.train_clips), (args.seed + data.HELD_OUT, args.held_out)):
    latents = data.toy_latents(vae, image_encoder, seed, count, unet.config["num_frames"],
                               8 * unet.config["sample_size"], device)
    blurred = []
    for numbers in torch.arange(count).split(32):
        cond = latents.take(numbers)[1]
        noise = [torch.Generator().manual_seed(seed + number) for number in numbers.tolist()]
        blurred.append(sampler.sample(unet, cond, one_step, noise))
    real = latents.take(torch.arange(count))[0]                                             # n f c h w
    order = torch.rand(real.shape[:2], generator=generator, device=device).argsort(dim=1)   # n f
    shuffled = torch.stack([clip[i] for clip, i in zip(real, order)])
    sets.append({"real": real, "one-step teacher": torch.cat(blurred), "shuffled frames": shuffled})
train, test = sets

# ---- Discriminators

rows = []
for fake in ("one-step teacher", "shuffled frames"):
    for heads in (("spatial", "temporal"), ("spatial",), ("temporal",)):
        torch.manual_seed(args.seed)
        features = DinoFeatures(load_dino(Path(args.model) / "dinov2").to(device, dtype))
        disc = Discriminator(features, heads).to(device)
        weights = [p for p in disc.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=args.learning_rate, betas=(0.0, 0.99))
        for _ in range(args.steps):
            pick = torch.randint(args.train_clips, (2, args.batch_size), generator=generator, device=device)
            loss = losses.hinge_d(disc(train["real"][pick[0]]), disc(train[fake][pick[1]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        disc.eval()
        with torch.no_grad():
            logits = [torch.cat([disc(x) for x in test[kind].split(32)]) for kind in ("real", fake)]     # n k
        right = ((logits[0].mean(1) > 0).float().mean() + (logits[1].mean(1) < 0).float().mean()) / 2
        rows.append({"fake": fake, "heads": " + ".join(heads), "hinge": losses.hinge_d(*logits).item(),
                     "accuracy": right.item()})
        print(f"{fake:20}{rows[-1]['heads']:22}hinge {rows[-1]['hinge']:.2f}   "
              f"accuracy {rows[-1]['accuracy']:.0%}", flush=True)
if args.report:
    write_json(args.report, {**evaluate.record(args), "rows": rows})
