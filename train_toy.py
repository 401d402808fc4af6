"""Makes the embedded default from nothing: five small networks with SVD's architecture and file layout,
trained on the toy world of data.py. What they are for, in the order in which they are trained:

    vae             pixels <-> latents, 8x smaller, with a temporal decoder
    image_encoder   CLIP's architecture; here it learns to list what the first frame shows
    dinov2          DINOv2's architecture, for the discriminator (see the honest note)
    i3d             a video classifier, whose logits the toy FVD compares
    unet            the teacher: EDM v-prediction on cached latents, the image dropped 1 time in 10
    report          no training: how good all of it is, as JSON, and pictures to look at

    python train_toy.py                                     # everything, into assets/toy
    python train_toy.py --quick --output_dir /tmp/toy       # the same code in a CPU minute, to see it run
    python train_toy.py --stages unet report --overwrite    # one stage anew
    torchrun --standalone --nproc_per_node=2 train_toy.py   # two GPUs share unet's clips and batches

Stop it (Ctrl-C, --time_limit) and start it again as you like: a batch is a pure function of (seed, step) and,
of several processes, which one it is; a checkpoint holds all there is, and a stage whose folder is written is
not trained again. With little memory, lower the batch sizes.

The honest note: the network in dinov2/ has DINOv2's architecture but not its self-distillation. It is taught
what the renderer knows: the CLS token lists the scene, and each patch token tells which shapes cover it, its
mean colour and its local contrast, on pictures half of which are blurred, so that its features feel blur.
"""
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
from transformers.utils import logging

import data
import engine
import evaluate
import model
import solver
from clip import CLIP_SIZE, clip_pixels

# ---- config ---------------------------------------------------------------------------------------------

STEPS = {"vae": (10000, 48, 1e-3), "image_encoder": (8000, 256, 1e-3), "dinov2": (6000, 256, 1e-3),
         "i3d": (5000, 64, 1e-3), "unet": (12000, 128, 5e-4)}        # steps, batch size, peak learning rate
QUICK = dict(size=64, num_frames=6, vae_channels=[32] * 4, unet_channels=[32, 32], num_clips=32,
             report_clips=8, log_every=5, vae_batch_size=8, image_encoder_batch_size=8, dinov2_batch_size=4,
             i3d_batch_size=4, unet_batch_size=4) | {f"{stage}_steps": 12 for stage in STEPS}

parser = engine.command_line("Train the toy checkpoints from scratch.")
flag = parser.add_argument
flag("--output_dir", type=Path, default="assets/toy", help="pipeline folder to write; checkpoints in .train/")
flag("--stages", nargs="+", choices=[*STEPS, "report"], default=[*STEPS, "report"], help="done in this order")
flag("--quick", action="store_true", help="tiny networks, few steps, useless results; other flags win")
flag("--overwrite", action="store_true", help="train the chosen stages anew, whatever is there of them")
flag("--seed", type=int, default=0, help="of the world and of all that is drawn; held-out clips have another")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
flag("--size", type=int, default=128, help="height and width of the clips")
flag("--num_frames", type=int, default=14, help="frames per clip")
flag("--vae_channels", type=int, nargs=4, default=[32, 64, 96, 96], help="per level, multiples of 32")
flag("--unet_channels", type=int, nargs="+", default=[128, 96], help="per level, multiples of 32")
flag("--unet_attention", type=int, nargs="+", default=[0, 1], help="per level: 1 has transformers, 0 none")
for stage, (steps, batch_size, lr) in STEPS.items():
    flag(f"--{stage}_steps", type=int, default=steps, help=f"optimisation steps of {stage}")
    flag(f"--{stage}_batch_size", type=int, default=batch_size, help="clips (frames, for vae) per step")
    flag(f"--{stage}_lr", type=float, default=lr, help="peak learning rate")
flag("--num_clips", type=int, default=40000, help="clips that unet is trained on, rendered and encoded once")
flag("--unet_init", help="unet: go on from that of this pipeline folder, in its size")
flag("--ema_decay", type=float, default=0.999, help="of the weight average, which is what gets saved")
flag("--log_every", type=int, default=50, help="steps between log lines")
flag("--checkpoint_every", type=int, default=500, help="steps between checkpoints")
flag("--time_limit", type=float, default=math.inf, help="seconds until it saves and exits with status 3")
flag("--train_log", type=Path,
     help="JSON lines: stage, step, loss, seconds (default: OUTPUT_DIR/train_log.jsonl)")
flag("--report", type=Path, help="JSON; pictures go beside it (default: OUTPUT_DIR/.train/report.json)")
flag("--report_clips", type=int, default=512, help="held-out clips that the report measures")
if parser.parse_known_args()[0].quick:
    parser.set_defaults(**QUICK)
args = parser.parse_args()

world, start = engine.start_world(args.device), time.time()
device = world.device
if args.unet_batch_size % world.size:
    parser.error(f"--unet_batch_size {args.unet_batch_size} does not divide by {world.size} processes")
work = args.output_dir / ".train"
log_file = args.train_log or args.output_dir / "train_log.jsonl"
report_file = args.report or work / "report.json"
log_file.parent.mkdir(parents=True, exist_ok=True)
held_out = args.seed + data.HELD_OUT
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
half = torch.bfloat16 if device.type == "cuda" else torch.float32          # what networks compute in
logging.disable_progress_bar()

stop = []                                   # a signal asks; the loop ends the step it is in, saves, and exits
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: (stop.append(number), signal.signal(number, signal.SIG_DFL)))


def log(**entry):
    if world.rank:
        return
    with open(log_file, "a") as file:
        file.write(json.dumps({**entry, "seconds": round(time.time() - start, 2)}) + "\n")


# ---- what the stages share ------------------------------------------------------------------------------


def wanted(stage):
    if stage in args.stages and args.overwrite:
        (work / f"{stage}.safetensors").unlink(missing_ok=True)
    torch.manual_seed(args.seed)            # a stage's first weights do not depend on which stages ran before
    return stage in args.stages and (args.overwrite or not (args.output_dir / stage / "config.json").exists())


def load(loader, folder=args.output_dir, **how):
    """A network that is there; else the script ends with what is wrong."""
    with engine.refusing():
        return loader(folder, device=device, **how)


def train(stage, net, loss_of):
    """Adam with warm-up and cosine on loss_of(step, generator), which must depend on nothing but the weights
    and its arguments. On a GPU the network computes in bf16, in a copy of the fp32 weights that Adam moves.
    Leaves the averaged weights in `net`. Resumes from, and may exit after, a checkpoint."""
    steps, batch_size, lr = (getattr(args, f"{stage}_{name}") for name in ("steps", "batch_size", "lr"))
    weights = engine.Weights(net, [name for name, _ in net.named_parameters()])
    average = {name: p.clone() for name, p in weights.tensors().items()}
    net.to(half)
    optimizer = torch.optim.Adam(weights.masters.values(), lr, (0.9, 0.99), fused=device.type == "cuda")
    evolving, optimizers = {"net": weights.masters, "ema": average}, {"adam": optimizer}
    settings = str([args.seed, args.size, args.num_frames, args.num_clips, args.ema_decay, steps, batch_size,
                    lr, world.size, [tuple(p.shape) for p in average.values()]])
    checkpoint, first, metadata = work / f"{stage}.safetensors", 0, {}
    if checkpoint.exists():
        tensors = dict(model.read_safetensors([checkpoint], metadata))
        if metadata["settings"] != settings:
            parser.error(f"{checkpoint} has other settings: repeat them, or start over with --overwrite")
        first = int(metadata["step"])
        engine.restore(evolving, optimizers, tensors)
        weights.push()

    generator, warmup = torch.Generator(device), max(1, min(200, steps // 10))
    losses = torch.zeros((), device=device)
    net.train()
    for step in tqdm(range(first, steps), stage, initial=first, total=steps, disable=world.rank > 0 or None,
                     mininterval=1):
        number = (args.seed * 1_000_003 + step) * len(STEPS) + list(STEPS).index(stage)
        generator.manual_seed(number * world.size + world.rank)
        engine.schedule(optimizer, lr, step, warmup, steps)
        loss = loss_of(step, generator)
        loss.backward()
        weights.pull()
        engine.finite_step(optimizer, weights.masters.values(), max_norm=1.0)
        weights.push()
        # A short average at first: forget the random weights.
        engine.update_ema(average, weights.tensors(), min(args.ema_decay, (step + 1) / (step + 10)))

        losses += loss.detach()
        if (step + 1) % args.log_every == 0:
            log(stage=stage, step=step + 1, loss=losses.item() / args.log_every)
            losses.zero_()
        stopping = engine.any_rank(stop or time.time() - start > args.time_limit, device)
        if (stopping or (step + 1) % args.checkpoint_every == 0 or step + 1 == steps) and world.rank == 0:
            tensors = engine.collect(evolving, optimizers)
            model.write_safetensors(checkpoint, tensors, {"step": str(step + 1), "settings": settings})
        if stopping:
            if world.rank == 0:
                print(f"{stage}: stopped after step {step + 1} of {steps}; the same command goes on")
            engine.any_rank(False, device)                          # the others wait until it is written
            engine.leave(3)
            raise SystemExit(3)
    net.float()
    engine.restore({"ema": weights.copies}, {}, {f"ema.{name}": p for name, p in average.items()})
    net.eval()


def record(net, *example):
    """On a GPU: the launches of a training step of `net` become one, a CUDA graph, made with tensors like its
    arguments. The layers are small, and a GPU is done with one before a processor can ask for the next."""
    if device.type == "cuda":                           # some parameters may have no influence: attn2.to_q
        torch.cuda.make_graphed_callables(net.to(half).train(), example, allow_unused_input=True)


def publish(stage, save, **metrics):
    """Put a finished stage where it belongs, whole or not at all; its checkpoint has done its duty."""
    part, folder = work / f"{stage}.part", args.output_dir / stage
    if world.rank == 0:
        save(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        (work / f"{stage}.safetensors").unlink(missing_ok=True)
        print(f"{stage}: finished at {time.time() - start:.0f} s,", metrics, flush=True)
    log(stage=stage, finished=True, **metrics)
    engine.any_rank(False, device)                                  # the others wait until it is there


def clips(seed, first, count, num_frames=args.num_frames):
    """Clips `first`, `first` + 1, ... of a world, on the device."""
    return data.toy_clips(seed, torch.arange(count, device=device) + first, num_frames, args.size, device)


def f1(logits, labels):
    """Harmonic mean of precision and recall, over all yes-or-no answers together."""
    yes, labels = logits > 0, labels > 0
    return (2 * (yes & labels).sum() / (yes.sum() + labels.sum()).clamp(min=1)).item()


def psnr(decoded, frames):
    """In dB, for values in [-1, 1]."""
    return 10 * math.log10(4 / (decoded.float().clamp(-1, 1) - frames).square().mean().item())


# ---- vae ------------------------------------------------------------------------------------------------

if wanted("vae"):
    vae = model.VAE(
        block_out_channels=args.vae_channels, layers_per_block=1, sample_size=args.size).to(device)
    with torch.no_grad():                               # begin with little noise on the latents
        vae.quant_conv.bias[vae.config["latent_channels"]:] = -6

    def vae_loss(step, generator):
        # Single frames fill a batch with the most scenes; the temporal decoder learns from whole clips.
        num_frames = (1, 1, min(8, args.num_frames), 1, 1, args.num_frames)[step % 6]
        count = max(1, args.vae_batch_size // num_frames)
        first = step * args.vae_batch_size
        frames = clips(args.seed, first, count, num_frames).frames.flatten(0, 1)            # (b f) 3 H W
        mean, logvar = vae.moments(frames)                                                  # (b f) 4 h w each
        noise = torch.randn(mean.shape, generator=generator, device=device)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise, num_frames)               # (b f) 3 H W
        error = decoded - frames
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()      # what a mean blurs first
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 4 * error.square().mean() + 2 * edges + 1e-5 * kl

    train("vae", vae, vae_loss)
    with torch.no_grad():                               # the factor gives diffusion its unit variance
        frames = clips(held_out, 0, 16).frames.flatten(0, 1)                                # (b f) 3 H W
        quality = psnr(vae.decode(vae.encode(frames), args.num_frames), frames)
        latents = vae.encode(clips(args.seed, 0, 64).frames.flatten(0, 1))
    vae.config["scaling_factor"] = round(1 / latents.std().item(), 5)
    publish("vae", lambda folder: model.save_vae(vae, folder, torch.float16), psnr=quality,
            scaling_factor=vae.config["scaling_factor"])

# ---- image_encoder and dinov2 ---------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # what DINOv2 expects
EMBED_DIM = 64                                          # of the image embedding, the UNet's cross-attention
GRID, PATCH = 9, 14


class Pupil(nn.Module):
    """A vision transformer and two heads that teach it and are not kept. From its summary: what the scene
    holds. From each patch: which kind of shape covers it, or none, its mean colour, and its contrast."""

    def __init__(self, backbone, summary_dim):
        super().__init__()
        self.backbone = backbone
        self.scene = nn.Linear(summary_dim, data.NUM_STATIC)
        self.patch = nn.Linear(backbone.config.hidden_size, 1 + len(data.KINDS) + 3 + 1)

    def forward(self, pixels):                          # b 3 H W -> b k, b p k
        out = self.backbone(pixel_values=pixels.to(self.scene.weight.dtype))
        summary = out.image_embeds if "image_embeds" in out else out.last_hidden_state[:, 0]
        return self.scene(summary), self.patch(out.last_hidden_state[:, 1:])


def lesson(pupil, pixels, images, batch):
    """pixels are what `pupil` gets of images [b 3 H W], the first frames of `batch`."""
    scene, patches = (x.float() for x in pupil(pixels))                                 # b k, b p k
    grid = math.isqrt(patches.shape[1])
    kinds, looks = rearrange(patches, "b (h w) k -> b k h w", h=grid).split([1 + len(data.KINDS), 4], dim=1)
    edges = F.pad(images.diff(dim=3).abs(), (0, 1)) + F.pad(images.diff(dim=2).abs(), (0, 0, 0, 1))
    contrast = 5 * edges.mean(dim=1, keepdim=True)                                     # b 1 H W, about 0 to 1
    covers = F.one_hot(batch.kind_map[:, 0].long(), 1 + len(data.KINDS))                # b H W k
    covers = F.adaptive_avg_pool2d(rearrange(covers.float(), "b h w k -> b k h w"), grid)
    weight = 1.1 - covers[:, :1]                        # empty patches count less: they are many and easy
    return 5 * F.binary_cross_entropy_with_logits(scene, batch.attributes[:, :data.NUM_STATIC]) \
        - (covers * kinds.log_softmax(dim=1) * weight).sum() / weight.sum() \
        + F.l1_loss(looks, F.adaptive_avg_pool2d(torch.cat((images, contrast), dim=1), grid))


def teach(stage, backbone, summary_dim, see, prepare):
    """see: pictures [b 3 H W] -> what the backbone gets of them, after prepare(pictures, generator)."""
    pupil, batch_size = Pupil(backbone, summary_dim).to(device), getattr(args, f"{stage}_batch_size")
    record(pupil, see(torch.zeros(batch_size, 3, args.size, args.size, device=device)))

    def loss(step, generator):
        batch = clips(args.seed, step * batch_size, batch_size, num_frames=1)
        images = prepare(batch.frames[:, 0], generator)                                 # b 3 H W
        return lesson(pupil, see(images), images, batch)

    train(stage, pupil, loss)
    # How much of held-out pictures it tells: of everything, and of the colours of shapes.
    batch, colours = clips(held_out, 0, args.report_clips, num_frames=1), len(data.COLOURS)
    with torch.no_grad():
        scene = torch.cat([pupil(see(images))[0] for images in batch.frames[:, 0].split(64)])           # b k
    publish(stage, lambda folder: backbone.half().save_pretrained(folder),
            f1=f1(scene, batch.attributes[:, :data.NUM_STATIC]),
            f1_colours=f1(scene[:, :colours], batch.attributes[:, :colours]))


if wanted("image_encoder"):
    teach("image_encoder", CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, hidden_act="gelu",
        image_size=CLIP_SIZE, patch_size=16, projection_dim=EMBED_DIM)), EMBED_DIM,
        clip_pixels, lambda images, generator: images)

if wanted("dinov2"):
    dino = Dinov2Model(Dinov2Config(hidden_size=96, num_hidden_layers=12, num_attention_heads=3,
                                    image_size=GRID * PATCH, patch_size=PATCH))
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def see(images):
        pixels = F.interpolate(images, (GRID * PATCH,) * 2, mode="bilinear", antialias=True)
        return (pixels / 2 + 0.5 - mean) / std

    def half_blurred(images, generator):
        """Half of them as blurred, more or less, as latents are that were made larger."""
        coarse = F.interpolate(F.avg_pool2d(images, 8), images.shape[-2:], mode="bilinear")
        amount = torch.rand(len(images), generator=generator, device=device) * 2 - 1
        return images.lerp(coarse, amount.clamp(min=0)[:, None, None, None])

    teach("dinov2", dino, 96, see, half_blurred)

# ---- i3d ------------------------------------------------------------------------------------------------

if wanted("i3d"):
    detector = evaluate.VideoClassifier(data.NUM_ATTRIBUTES, size=args.size).to(device)

    def i3d_loss(step, generator):
        batch = clips(args.seed, step * args.i3d_batch_size, args.i3d_batch_size)
        logits = detector(rearrange(batch.frames, "b f c h w -> b c f h w"), rescale=False)
        return F.binary_cross_entropy_with_logits(logits.float(), batch.attributes)

    train("i3d", detector, i3d_loss)
    publish("i3d", lambda folder: evaluate.save_detector(detector, folder, torch.float16))

# ---- unet -----------------------------------------------------------------------------------------------

if wanted("unet"):
    vae, image_encoder = (load(loader, dtype=half) for loader in (model.load_vae, model.load_image_encoder))
    unet = load(model.load_unet, args.unet_init) if args.unet_init else model.UNet(
        block_out_channels=args.unet_channels, layers_per_block=1, cross_attention_dim=EMBED_DIM,
        down_block_types=["CrossAttn" * on + "DownBlockSpatioTemporal" for on in args.unet_attention],
        up_block_types=["CrossAttn" * on + "UpBlockSpatioTemporal" for on in args.unet_attention[::-1]],
        num_attention_heads=[c // 32 for c in args.unet_channels], addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96, num_frames=args.num_frames,
        sample_size=args.size // 8).to(device)

    num_clips, b = args.num_clips // world.size, args.unet_batch_size // world.size
    latents = data.toy_latents(vae, image_encoder, args.seed, num_clips, args.num_frames, args.size, device,
                               first=world.rank * num_clips)
    del vae, image_encoder
    if device.type == "cuda":                               # many small layers: fuse them
        torch._dynamo.config.recompile_limit = 256          # of all blocks together; equal ones share code
        for block in unet.modules():
            if isinstance(block, (model.SpatioTemporalResBlock, model.SpatioTemporalTransformer)):
                block.compile(dynamic=False)
    x0, cond = latents.take(torch.arange(b))
    record(unet, torch.cat((x0, cond.image_latents), dim=2), torch.zeros(b, device=device), cond.image_embeds,
           cond.time_ids)

    def unet_loss(step, generator):
        x0, cond = latents.take(torch.randint(num_clips, (b,), generator=generator, device=device))
        normal = torch.randn(b, generator=generator, device=device)                         # b
        ramp, coin, keep = torch.rand(3, b, generator=generator, device=device)             # b each
        # Most noise levels where the future is decided; the rest cover the grid: sampling starts at its top.
        low, high = solver.SIGMA_MIN ** (1 / solver.RHO), solver.SIGMA_MAX ** (1 / solver.RHO)
        on_grid = (high + ramp * (low - high)) ** solver.RHO                                # b
        sigma = torch.where(coin < 0.8, (1.4 * normal).exp(), on_grid)[:, None, None, None, None]
        c_skip, c_out, c_in, c_noise = solver.precondition(sigma)
        x_t = x0 + sigma * torch.randn(x0.shape, generator=generator, device=device)

        keep = (keep > 0.1).float()[:, None, None]      # else no image at all: what guidance compares with
        image = cond.image_latents * keep[..., None, None]                                  # b f c h w
        F_x = unet(torch.cat((c_in * x_t, image), dim=2), c_noise.flatten(), cond.image_embeds * keep,
                   cond.time_ids)                                                           # b f c h w
        # A plain mean on the raw output is SVD's weight (1 + sigma^2) / sigma^2 on the denoised latent.
        return F.mse_loss(F_x, (x0 - c_skip * x_t) / c_out)

    train("unet", unet, unet_loss)
    publish("unet", lambda folder: model.save_unet(unet, folder, torch.float16))
    del latents

model.save_configs(args.output_dir)

# ---- report ---------------------------------------------------------------------------------------------


def batched(function, *tensors):
    batch_size = 128 if device.type == "cuda" else 16               # few launches there, little memory here
    with torch.no_grad():
        return torch.cat([function(*parts) for parts in zip(*(x.split(batch_size) for x in tensors))])


if "report" in args.stages and world.rank == 0:
    vae, unet, image_encoder = (
        load(loader, dtype=half) for loader in (model.load_vae, model.load_unet, model.load_image_encoder))
    detector = load(evaluate.load_detector, args.output_dir / "i3d")
    f, num, scaling_factor = args.num_frames, args.report_clips, vae.config["scaling_factor"]
    to_clips = lambda x: rearrange(x.float(), "(b f) c h w -> b f c h w", f=f)
    encode = lambda frames: to_clips(vae.encode(frames.flatten(0, 1))) * scaling_factor            # b f 4 h w
    decode = lambda x: to_clips(vae.decode(x.flatten(0, 1) / scaling_factor, f)).clamp(-1, 1)      # b f 3 H W
    sharpness = lambda frames: frames[:, -1].diff(dim=-1).abs().mean().item()
    fvd = lambda frames: evaluate.frechet_distance(features_real, evaluate.video_features(detector, frames))
    picture = lambda name, frames: data.save_sheet(
        frames, report_file.with_name(f"{report_file.stem}_{name}.jpg"), shrink=2)

    generator = torch.Generator(device).manual_seed(args.seed)
    draw = lambda x: torch.randn(x.shape, generator=generator, device=device)
    real = clips(held_out, 0, num)
    decoded = batched(decode, batched(encode, real.frames))                                        # b f 3 H W
    with torch.no_grad():
        cond = model.encode_condition(
            vae, image_encoder, real.frames[:, 0], draw(real.frames[:, 0]), num_frames=f, fps=data.FPS,
            motion_bucket_id=real.motion_bucket_id, noise_aug_strength=0.02)
    features_real = evaluate.video_features(detector, real.frames)
    scene, motion = (f1(*pair) for pair in zip(*(x.tensor_split([data.NUM_STATIC], dim=1)
                                                 for x in (features_real, real.attributes))))
    report = {"clips": num, "vae_psnr": psnr(decoded, real.frames), "scaling_factor": scaling_factor,
              "i3d_f1": {"scene": scene, "motion": motion}, "fvd_real": fvd(clips(held_out, num, num).frames),
              "fvd_reconstructed": fvd(decoded), "teacher": []}
    picture("reconstructions", torch.stack((real.frames[:6], decoded[:6]), dim=1).flatten(0, 1))

    rows = [decoded[:4]]                            # per clip: real, three of its futures in 25 steps, 1 step
    guided = torch.linspace(1, 2, f, device=device)[:, None, None, None]                            # f 1 1 1
    for steps, guidance in ((25, None), (8, None), (2, None), (1, None), (25, guided), (8, guided)):
        sigmas, samples = solver.strided(solver.karras_sigmas(solver.NUM_SIGMAS), steps), []
        for seed in range(3 if rows[1:] == [] else 2):
            generator.manual_seed(seed)
            x0 = batched(lambda noise, *cond: solver.solve(
                unet, noise * sigmas[0], sigmas, model.Cond(*cond), guidance),
                draw(cond.image_latents), *cond)                                                   # b f 4 h w
            samples.append(batched(decode, x0))                                                    # b f 3 H W
        report["teacher"].append({
            "steps": steps, "guidance": guidance is not None and "1 to 2", "fvd": fvd(samples[0]),
            "sharpness": sharpness(samples[0]) / sharpness(decoded),
            "seed_difference": (samples[0] - samples[1]).abs().mean().item()})
        print(report["teacher"][-1], flush=True)
        if guidance is None and steps in (25, 1):
            rows += [x[:4] for x in samples[:3 if steps > 1 else 1]]
    picture("samples", torch.stack(rows, dim=1).flatten(0, 1))
    # What the stages found out about themselves; their heads are gone.
    entries = [json.loads(line) for line in log_file.read_text().splitlines()] if log_file.exists() else []
    report["stages"] = {entry.pop("stage"): entry for entry in entries if entry.get("finished")}
    model.write_json(report_file, {**evaluate.record(args), **report})

if world.rank == 0:
    files = sorted(args.output_dir.glob("*/*.safetensors"))
    for file in files:
        numbers = sum(tensor.numel() for _, tensor in model.read_safetensors([file]))
        print(f"{file.parent.name:15s} {numbers:11,d} parameters {file.stat().st_size / 1e6:8.2f} MB")
    print(f"{'together':15s} {'':22s} {sum(file.stat().st_size for file in files) / 1e6:8.2f} MB")
engine.leave(0)
