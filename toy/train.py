"""Trains the networks of assets/toy from scratch: small, but with SVD's architecture and file layout.

In the order in which they are trained, each in its own sub-folder:

    vae             pixels <-> latents, 8x smaller, with a temporal decoder
    image_encoder   CLIP's architecture; learns to list what the first frame shows
    dinov2          DINOv2's architecture, for the discriminator (see below)
    i3d             a video classifier; toy-FVD compares its logits
    unet            the teacher: EDM v-prediction on latents; 1 in 10 clips has no image condition
    report          no training: measures the networks, writes JSON and pictures

    $ python -m toy.train                                       # everything, into assets/toy
    $ python -m toy.train --quick --output_dir /tmp/toy         # the same code in one minute of a CPU
    $ python -m toy.train --stages unet report --overwrite      # one stage again
    $ torchrun --standalone --nproc_per_node=2 -m toy.train     # two GPUs share the clips and batches of unet

Training can be stopped (Ctrl-C, --time_limit) and continued by the same command. A batch is a pure function
of (seed, step, rank), a checkpoint holds everything that changes, and finished stages are skipped. If memory
runs out, lower the batch sizes.

dinov2/ has DINOv2's architecture, but it is not trained by DINOv2's self-distillation. It learns the
renderer's own labels: the CLS token lists what the scene holds, each patch token tells which shapes cover the
patch, its mean colour and its local contrast. Half of its training pictures are blurred, so that its features
depend on blur.

Letters in shape comments: b clips, f frames, k labels, p patches, c h w latents, H W frame size.
"""
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

import data
import evaluate
import model
import sampler
import solver
from discriminator import IMAGENET_MEAN, IMAGENET_STD
from support import checkpoint, engine, kernels, media
from toy.world import KINDS, NUM_ATTRIBUTES, NUM_STATIC, toy_clips

# ---- Flags ----------------------------------------------------------------------------------------------

STEPS = {"vae": (10000, 48, 1e-3), "image_encoder": (8000, 256, 1e-3), "dinov2": (6000, 256, 1e-3),
         "i3d": (5000, 64, 1e-3), "unet": (12000, 128, 5e-4)}        # steps, batch size, peak learning rate

parser = engine.command_line("Train the toy networks from scratch.")
flag = parser.add_argument
flag("--output_dir", type=Path, default="assets/toy", help="pipeline folder to write; checkpoints in .train/")
flag("--stages", nargs="+", choices=[*STEPS, "report"], default=[*STEPS, "report"], help="stages to run")
flag("--quick", action="store_true", help="other defaults, for a test run: tiny networks, few steps")
flag("--overwrite", action="store_true", help="train the chosen stages again, from scratch")
flag("--seed", default=0, help="seed of world and random numbers; held-out clips have another")
flag("--device", help="where to train (default: cuda if available)")
flag("--size", default=128, help="height and width of the clips")
flag("--num_frames", type=engine.number(2, 1000), default=14, help="frames per clip")
flag("--vae_channels", nargs=4, default=[32, 64, 96, 96], help="channels by level, multiples of 32")
flag("--unet_channels", nargs="+", default=[128, 96], help="channels by level, multiples of 32")
flag("--unet_attention", nargs="+", type=int, choices=(0, 1), default=[0, 1], help="by level: transformers?")
for stage, (steps, batch_size, lr) in STEPS.items():
    flag(f"--{stage}_steps", type=engine.positive, default=steps, help=f"optimisation steps of {stage}")
    flag(f"--{stage}_batch_size", type=engine.positive, default=batch_size, help="clips (vae: frames) a step")
    flag(f"--{stage}_lr", type=engine.number(0.0, 1.0), default=lr, help="peak learning rate")
flag("--num_clips", default=40000, help="clips that unet trains on, rendered and encoded once")
flag("--unet_log_sigma", nargs=2, type=engine.number(-10.0, 10.0), default=[0.9, 1.2],
     metavar=("MEAN", "STD"), help="of the normal distribution of ln sigma, for 4 of 5 clips of unet")
flag("--unet_init", help="pipeline folder whose UNet the stage unet starts from, at its size")
flag("--ema_decay", default=0.999, help="decay of the averaged weights, which are saved")
flag("--log_every", default=50, help="steps between log lines")
flag("--checkpoint_every", default=500, help="steps between checkpoints")
flag("--time_limit", type=float, default=float("inf"), help="seconds until it saves, then exit status 3")
flag("--train_log", type=Path, help="JSON lines of steps and losses (default: OUTPUT_DIR/train_log.jsonl)")
flag("--report", type=Path, help="JSON; pictures go beside it (default: OUTPUT_DIR/.train/report.json)")
flag("--report_clips", type=engine.number(2, 10 ** 9), default=512, help="clips that the report measures")
if parser.parse_known_args()[0].quick:
    parser.set_defaults(size=64, num_frames=6, vae_channels=[32] * 4, unet_channels=[32, 32], num_clips=32,
                        report_clips=8, log_every=5, **{f"{stage}_steps": 12 for stage in STEPS},
                        **{f"{stage}_batch_size": 4 for stage in STEPS})
args = parser.parse_args()

world, start = engine.start_world(args.device), time.time()
device, args.device = world.device, str(world.device)
levels = len(args.unet_channels)
stride = 8 * 2 ** (levels - 1)                              # pixels per element of the UNet's smallest map
if args.size % stride:
    parser.error(f"--size must be a multiple of {stride}")
if any(channels % 32 for channels in args.vae_channels + args.unet_channels):
    parser.error("channels must be multiples of 32")
if len(args.unet_attention) != levels:
    parser.error(f"--unet_attention must have {levels} values, as --unet_channels")
if args.unet_batch_size % world.size:
    parser.error(f"--unet_batch_size {args.unet_batch_size} does not divide by {world.size} processes")
work = args.output_dir / ".train"
log_file = args.train_log or args.output_dir / "train_log.jsonl"
report_file = args.report or work / "report.json"
if world.rank == 0:
    checkpoint.check_writable(log_file, report_file, args.output_dir / "model_index.json")
held_out = args.seed + data.HELD_OUT
torch.backends.cudnn.benchmark = True
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32          # inside the networks

stop = []                                           # signals: training ends after the current step


def stop_after_step(number, frame):
    """Handles a signal. A second one of its kind ends the process at once, without a checkpoint."""
    stop.append(number)
    signal.signal(number, signal.SIG_DFL)


signal.signal(signal.SIGINT, stop_after_step)
signal.signal(signal.SIGTERM, stop_after_step)

# ---- Training loop, shared by all stages ----------------------------------------------------------------


def log(**entry):
    if world.rank == 0:
        with checkpoint.writing(log_file), open(log_file, "a") as file:
            file.write(checkpoint.to_json({**entry, "seconds": round(time.time() - start, 2)}))


def train(stage, net, loss_of):
    """Trains `net` by Adam, with warm-up and cosine decay, and leaves the averaged weights in it.

    loss_of(step, generator) must depend on the weights and its arguments only. On a GPU the network computes
    in bf16; the optimiser has fp32 master weights. Resumes from a checkpoint; --overwrite deletes it
    first. Exits with status 3 if stopped.
    """
    steps, lr = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_lr")
    weights = engine.MasterWeights(net, [name for name, _ in net.named_parameters()])
    ema = {name: p.clone() for name, p in weights.tensors().items()}
    net.to(dtype).train()
    optimizer = torch.optim.Adam(weights.masters.values(), lr, (0.9, 0.99), fused=device.type == "cuda")
    state = {"net": weights.masters, "ema": ema}, {"adam": optimizer}       # all that a checkpoint holds
    config = {"world_size": world.size} | {name: value for name, value in vars(args).items()
                                           if name.startswith((stage, "seed", "size", "num_", "ema_decay"))}
    if world.rank == 0:
        checkpoint.lock(work / stage)
        for old in (work / stage).glob("[!.]*") if args.overwrite else ():      # all but the lock
            shutil.rmtree(old, ignore_errors=True)
    engine.any_rank(False, device)                  # the other ranks wait until old checkpoints are gone
    first = checkpoint.load_checkpoint(work / stage, "latest", config, partial(checkpoint.restore, *state))

    generator, losses = torch.Generator(device), []
    # disable=None: no progress bar without a terminal.
    for step in tqdm(range(first, steps), stage, initial=first, total=steps, disable=world.rank > 0 or None):
        number = (args.seed * 1_000_003 + step) * len(STEPS) + list(STEPS).index(stage)
        generator.manual_seed(number * world.size + world.rank)
        engine.set_learning_rate(optimizer, lr, step, max(1, min(200, steps // 10)), steps)
        weights.copy_to_net()
        loss = loss_of(step, generator)
        loss.backward()
        weights.grads_to_masters()
        engine.finite_step(optimizer, weights.masters.values(), max_norm=1.0)
        # The average is short at first, so that the random initial weights fade.
        engine.update_ema(ema, weights.tensors(), min(args.ema_decay, (step + 1) / (step + 10)))

        losses.append(loss.detach())
        if (step + 1) % args.log_every == 0:
            log(stage=stage, step=step + 1, loss=torch.stack(losses[-args.log_every:]).mean().item())
        stopping = engine.any_rank(stop or time.time() - start > args.time_limit, device)
        if (stopping or (step + 1) % args.checkpoint_every == 0 or step + 1 == steps) and world.rank == 0:
            checkpoint.save_checkpoint(work / stage, step + 1, checkpoint.collect(*state), config, keep=1)
        if stopping:
            if world.rank == 0:
                print(f"{stage}: stopped after step {step + 1} of {steps}; the same command continues")
            engine.any_rank(False, device)                          # wait until the checkpoint is written
            engine.leave(3)
            raise SystemExit(3)
    net.float().eval().load_state_dict(ema, strict=False)           # not strict: the average has no buffers


def graph_calls(net, *example):
    """Replaces forward and backward of `net` by CUDA graphs, on a GPU. The layers are so small that launch
    overhead on the CPU limits the speed. example: tensors like the arguments of its calls in training."""
    if device.type == "cuda":       # unused inputs: parameters without influence on the output, as attn2.to_q
        torch.cuda.make_graphed_callables(net.to(dtype).train(), example, allow_unused_input=True)


def publish(stage, net, save, **metrics):
    """Writes a finished network in fp16 into its folder, by save(net, folder), completely or not at all, and
    deletes its checkpoint. Until it is there, an earlier network is in its folder, or in .train/STAGE/old."""
    part, old, folder = work / stage / ".finished.part", work / stage / "old", args.output_dir / stage
    if world.rank == 0:
        save(net.half(), part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(work / stage, ignore_errors=True)
        print(f"{stage}: finished at {time.time() - start:.0f} s", metrics, flush=True)
    log(stage=stage, finished=True, **metrics)
    engine.any_rank(False, device)                                  # wait until the folder is written


def clips(seed, first, count, num_frames=args.num_frames):
    """Clips `first` to `first + count - 1` of a world, on the device -> ToyClips."""
    return toy_clips(seed, torch.arange(count, device=device) + first, num_frames, args.size, device)


def f1(logits, labels):
    """The harmonic mean of precision and recall over all labels [b k] together."""
    yes, labels = logits > 0, labels > 0
    return (2 * (yes & labels).sum() / (yes.sum() + labels.sum()).clamp(min=1)).item()


def psnr(decoded, frames):
    """Peak signal-to-noise ratio in dB, of pixels in [-1, 1]."""
    return 10 * (4 / F.mse_loss(decoded.float().clamp(-1, 1), frames)).log10().item()


# ---- vae ------------------------------------------------------------------------------------------------


def train_vae():
    vae = kernels.fast(model.VAE(
        block_out_channels=args.vae_channels, layers_per_block=1, sample_size=args.size).to(device))
    vae.quant_conv.bias.data[vae.config["latent_channels"]:] = -6       # little noise on the latents at first

    def vae_loss(step, generator):
        # Batches of single frames show the most scenes; whole clips train the temporal decoder.
        num_frames = (1, 1, min(8, args.num_frames), 1, 1, args.num_frames)[step % 6]
        count = max(1, args.vae_batch_size // num_frames)
        frames = clips(args.seed, step * args.vae_batch_size, count, num_frames).frames.flatten(0, 1)
        mean, logvar = vae.moments(frames)                                                  # (b f) 4 h w each
        noise = torch.randn(mean.shape, generator=generator, device=device)
        error = vae.decode(mean + (0.5 * logvar).exp() * noise, num_frames) - frames        # (b f) 3 H W
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()     # penalises blur
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 4 * error.square().mean() + 2 * edges + 1e-5 * kl

    train("vae", vae, vae_loss)
    with torch.no_grad():
        frames = clips(held_out, 0, 16).frames.flatten(0, 1)                                # (b f) 3 H W
        quality = psnr(vae.decode(vae.encode(frames), args.num_frames), frames)
        latents = vae.encode(clips(args.seed, 0, 64).frames.flatten(0, 1))                  # (b f) 4 h w
    vae.config["scaling_factor"] = round(1 / latents.std().item(), 5)                       # to unit variance
    publish("vae", vae, model.save_vae, psnr=quality, scaling_factor=vae.config["scaling_factor"])


# ---- image_encoder and dinov2 ---------------------------------------------------------------------------

EMBED_DIM = 64                                          # image embedding, input of the UNet's cross-attention
DINO_SIZE = 9 * 14                                      # side of dinov2's input: 9 patches of 14 pixels


class Classifier(torch.nn.Module):
    """A vision transformer with two heads that train it and are not saved: from its summary token, what the
    scene holds; from each patch, which kind of shape covers it, its mean colour and its contrast."""

    def __init__(self, backbone, summary_dim):
        super().__init__()
        self.backbone = backbone
        self.scene = torch.nn.Linear(summary_dim, NUM_STATIC)
        self.patch = torch.nn.Linear(backbone.config.hidden_size, 1 + len(KINDS) + 3 + 1)

    def forward(self, pixels):                          # b 3 H W -> b k, b p k
        out = self.backbone(pixel_values=pixels.to(self.scene.weight.dtype))
        summary = out.image_embeds if "image_embeds" in out else out.last_hidden_state[:, 0]
        return self.scene(summary), self.patch(out.last_hidden_state[:, 1:])


def train_classifier(stage, backbone, summary_dim, preprocess, augment=lambda images, generator: images):
    """Trains and publishes a vision transformer. preprocess(images [b 3 H W] in [-1, 1]) -> its input;
    augment(images, generator) -> images, in training only."""
    net, batch_size = Classifier(backbone, summary_dim).to(device), getattr(args, f"{stage}_batch_size")
    graph_calls(net, preprocess(torch.zeros(batch_size, 3, args.size, args.size, device=device)))

    def loss(step, generator):
        batch = clips(args.seed, step * batch_size, batch_size, num_frames=1)
        images = augment(batch.frames[:, 0], generator)                                 # b 3 H W
        scene, patches = (x.float() for x in net(preprocess(images)))                   # b k, b p k
        grid = round(patches.shape[1] ** 0.5)
        kinds, looks = rearrange(patches, "b (h w) k -> b k h w", h=grid).split([1 + len(KINDS), 4], dim=1)
        edges = F.pad(images.diff(dim=3).abs(), (0, 1)) + F.pad(images.diff(dim=2).abs(), (0, 0, 0, 1))
        contrast = 5 * edges.mean(dim=1, keepdim=True)                                 # b 1 H W, 0 to about 1
        covers = F.one_hot(batch.kind_map[:, 0].long(), 1 + len(KINDS))                 # b H W k
        covers = F.adaptive_avg_pool2d(rearrange(covers.float(), "b h w k -> b k h w"), grid)
        weight = 1.1 - covers[:, :1]                    # empty patches are many and easy: they count less
        return 5 * F.binary_cross_entropy_with_logits(scene, batch.attributes[:, :NUM_STATIC]) \
            - (covers * kinds.log_softmax(dim=1) * weight).sum() / weight.sum() \
            + F.l1_loss(looks, F.adaptive_avg_pool2d(torch.cat((images, contrast), dim=1), grid))

    train(stage, net, loss)
    batch = clips(held_out, 0, args.report_clips, num_frames=1)
    with torch.no_grad():
        scene = torch.cat([net(preprocess(images))[0] for images in batch.frames[:, 0].split(64)])      # b k
    publish(stage, backbone, type(backbone).save_pretrained, f1=f1(scene, batch.attributes[:, :NUM_STATIC]))


def train_image_encoder():
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, hidden_act="gelu",
        image_size=model.CLIP_SIZE, patch_size=16, projection_dim=EMBED_DIM))
    train_classifier("image_encoder", clip, EMBED_DIM, model.clip_pixels)


def train_dinov2():
    dino = Dinov2Config(hidden_size=96, num_hidden_layers=12, num_attention_heads=3, image_size=DINO_SIZE)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def dino_pixels(images):
        return (F.interpolate(images, DINO_SIZE, mode="bilinear", antialias=True) / 2 + 0.5 - mean) / std

    def blur_half(images, generator):
        """Blurs half of the images, by random amounts, as enlarged latents are blurred."""
        coarse = F.interpolate(F.avg_pool2d(images, 8), images.shape[-2:], mode="bilinear")
        amount = torch.rand(len(images), generator=generator, device=device) * 2 - 1        # b
        return images.lerp(coarse, amount.clamp(min=0)[:, None, None, None])

    train_classifier("dinov2", Dinov2Model(dino), 96, dino_pixels, blur_half)


# ---- i3d ------------------------------------------------------------------------------------------------


def train_i3d():
    detector = evaluate.VideoClassifier(NUM_ATTRIBUTES, size=args.size).to(device)

    def i3d_loss(step, generator):
        batch = clips(args.seed, step * args.i3d_batch_size, args.i3d_batch_size)
        logits = detector(rearrange(batch.frames, "b f c h w -> b c f h w"), rescale=False)      # b k
        return F.binary_cross_entropy_with_logits(logits.float(), batch.attributes)

    train("i3d", detector, i3d_loss)
    publish("i3d", detector, checkpoint.save_network)


# ---- unet -----------------------------------------------------------------------------------------------


def train_unet():
    unet = model.load_unet(args.unet_init, device=device) if args.unet_init else model.UNet(
        block_out_channels=args.unet_channels, cross_attention_dim=EMBED_DIM, num_frames=args.num_frames,
        down_block_types=["CrossAttn" * on + "DownBlockSpatioTemporal" for on in args.unet_attention],
        up_block_types=["CrossAttn" * on + "UpBlockSpatioTemporal" for on in args.unet_attention[::-1]],
        num_attention_heads=[c // 32 for c in args.unet_channels], addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96, layers_per_block=1, sample_size=args.size // 8).to(device)

    # Each process has its own clips and its part of every batch.
    num_clips, b = args.num_clips // world.size, args.unet_batch_size // world.size
    vae = kernels.fast(model.load_vae(args.output_dir, dtype=dtype, device=device))
    image_encoder = model.load_image_encoder(args.output_dir, dtype=dtype, device=device)
    checkpoint.check_fit(unet, vae, image_encoder)          # --unet_init may name another model
    latents = data.toy_latents(vae, image_encoder, args.seed, num_clips, args.num_frames, args.size, device,
                               first=world.rank * num_clips)
    if device.type == "cuda":                               # torch.compile fuses the many small layers
        torch._dynamo.config.recompile_limit = 256          # counted over all blocks of a class
        for block in unet.modules():
            if isinstance(block, (model.SpatioTemporalResBlock, model.SpatioTemporalTransformer)):
                block.compile(dynamic=False)
    x0, cond = latents.take(torch.arange(b))
    graph_calls(unet, torch.cat((x0, x0), dim=2), x0.new_zeros(b), cond.image_embeds, cond.time_ids)

    def unet_loss(step, generator):
        x0, cond = latents.take(torch.randint(num_clips, (b,), generator=generator, device=device))
        normal = torch.randn(b, generator=generator, device=device)                         # b
        ramp, choice, keep = torch.rand(3, b, generator=generator, device=device)           # b each
        # 80 % of the noise levels lie where the future is decided and where shapes break (LOG.md). The others
        # cover the whole grid, because sampling starts at its top.
        mean, std = args.unet_log_sigma
        low, high = solver.SIGMA_MIN ** (1 / solver.RHO), solver.SIGMA_MAX ** (1 / solver.RHO)
        on_grid = (high + ramp * (low - high)) ** solver.RHO                                # b
        sigma = torch.where(choice < 0.8, (mean + std * normal).exp(), on_grid)                 # b
        sigma = sigma[:, None, None, None, None]                                                # b 1 1 1 1
        c_skip, c_out, c_in, c_noise = solver.precondition(sigma)
        x_t = x0 + sigma * torch.randn(x0.shape, generator=generator, device=device)        # b f c h w

        keep = (keep > 0.1).float()[:, None, None]          # image dropout, for classifier-free guidance
        inputs = torch.cat((c_in * x_t, cond.image_latents * keep[..., None, None]), dim=2)       # b f 2c h w
        F_x = unet(inputs, c_noise.flatten(), cond.image_embeds * keep, cond.time_ids)      # b f c h w
        # The mean squared error of F_x weights the error of the denoised latent with SVD's
        # (1 + sigma^2) / sigma^2.
        return F.mse_loss(F_x, (x0 - c_skip * x_t) / c_out)

    train("unet", unet, unet_loss)
    publish("unet", unet, model.save_unet)


# ---- report ---------------------------------------------------------------------------------------------


@torch.no_grad()
def report():
    """Measures the finished networks on held-out clips. Writes JSON, and two pictures beside it."""
    num = args.report_clips
    flags = evaluate.parse_args(["fvd", "--model", str(args.output_dir), "--device", args.device,
                                 "--seed", str(args.seed), "--num_clips", str(num)])
    loaded = evaluate.Report(flags)
    unet, vae, detector = loaded.teacher, loaded.vae, loaded.detector
    world_seed = args.seed + evaluate.UNSEEN                    # the world of the clips in `reference`
    real = clips(world_seed, 0, num)
    x0 = vae.encode(real.frames.flatten(0, 1)) * vae.config["scaling_factor"]               # (b f) 4 h w
    decoded = sampler.decode(vae, x0.unflatten(0, (num, -1)))                               # b f 3 H W
    # Sharpness is measured relative to decoded clips: no sample is sharper than what the VAE can show.
    reference = loaded.reference._replace(ends=media.to_bytes(decoded[:, [0, -1]]).cpu())
    fvd = lambda x: evaluate.frechet_distance(reference.features, evaluate.video_features(detector, x))
    save = lambda name, rows: media.save_sheet(torch.stack(rows, dim=1).flatten(0, 1),
                                         report_file.with_name(f"{report_file.stem}_{name}.jpg"), shrink=2)

    # The first NUM_STATIC labels are the scene's, the others the motion's.
    scene = f1(reference.features[:, :NUM_STATIC], real.attributes[:, :NUM_STATIC])
    motion = f1(reference.features[:, NUM_STATIC:], real.attributes[:, NUM_STATIC:])
    results = {"clips": num, "vae_psnr": psnr(decoded, real.frames), "fvd_reconstructed": fvd(decoded),
               "scaling_factor": vae.config["scaling_factor"], "i3d_f1": {"scene": scene, "motion": motion},
               "fvd_real": fvd(clips(world_seed, num, num).frames), "teacher": []}
    save("reconstructions", [real.frames[:6], decoded[:6]])

    rows = [media.to_bytes(decoded[:4])]    # of each clip: real, three futures in 25 steps, one in 1 step
    for steps, guidance in ((25, None), (8, None), (2, None), (1, None), (25, (1, 3)), (8, (1, 3))):
        *_, draw = evaluate.parse_sampler(str(steps), is_teacher=True, guidance=guidance)
        generate = partial(evaluate.generate_clips, draw, unet, vae, reference)
        _, figures = evaluate.measure(generate, detector, reference, args.seed, flags.batch_size)
        results["teacher"].append({"steps": steps, "guidance": "1 to 3" if guidance else False,
                                   "seed_difference": figures.pop("diversity"), **figures})
        print(results["teacher"][-1], flush=True)
        if guidance is None and steps in (25, 1):
            rows += [generate(torch.arange(len(rows[0])), seed)[0] for seed in range(3 if steps == 25 else 1)]
    save("samples", rows)
    # Each stage has written its own figures into the log.
    entries = checkpoint.read_lines(log_file, stage=str)
    results["stages"] = {entry.pop("stage"): entry for entry in entries if entry.get("finished")}
    checkpoint.write_json(report_file, {**evaluate.record(args), **results})


# ---- Run the stages -------------------------------------------------------------------------------------

for name, train_it in zip(STEPS, (train_vae, train_image_encoder, train_dinov2, train_i3d, train_unet)):
    if name in args.stages and (args.overwrite or not (args.output_dir / name / "config.json").exists()):
        torch.manual_seed(args.seed)                # initial weights do not depend on the stages before
        train_it()
    elif name in args.stages and world.rank == 0:
        print(f"{name}: finished already; --overwrite trains it again")
model.save_configs(args.output_dir)
if "report" in args.stages and world.rank == 0:
    report()
engine.leave(0)
