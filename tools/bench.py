"""Measures speed and memory of the networks, of sampling and of training.

    $ python -m tools.bench nets sample --cuda_graph --report results/bench.json    # SVD's size
    $ python -m tools.bench memory                                      # GPU memory of sampler.py
    $ python -m tools.bench train                                       # steps of both stages
    $ python -m tools.bench nets sample --size toy --device cpu         # the toy networks, on any computer

    nets        UNet forward, forward + backward, VAE encode and decode
    sample      image to decoded frames in 1 step, in 1 step with the Time Travel Sampler, in 25 guided steps
    memory      sampler.py as a process, with fewer frames decoded at a time, and with --offload
    train       train_stage1.py, once for each of --discriminators (may be empty), and train_stage2.py, as
                processes

--cuda_graph replays the UNet of nets and sample from a CUDA graph; for train, the default is the preset's.

`nets` compares three variants: "plain" is model.py as written, "ours" has the layers of support/kernels.py
put in, "diffusers" is the reference implementation, if it is installed. Weights are random.

How the figures are timed:
- Networks and samplers: median wall time of a synchronised call over --repeats, after a warm-up, launch
  overhead included. TFLOP are counted on the first call; the share is relative to the matrix product.
- The matrix product, the machine's limit: median of triton.testing.do_bench on a GPU, wall time on a CPU.
- memory is one run of the process; train takes the last 5 steps of a run.

Single kernels and layers are measured by tests/kernel_speed.py.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata, util
from pathlib import Path

import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

import model
import sampler
from evaluate import ROOT, record
from solver import NUM_SIGMAS, karras_sigmas, strided
from support import checkpoint, engine, kernels, media

# ---------------------------------------------------------------------------------------------------------
# Timing


def wall_ms(fn, repeats):
    """Median milliseconds of a synchronised call of fn(), launch overhead included."""
    times = []
    for _ in range(repeats):
        began = timer()                                         # waits for the GPU, then reads the clock
        fn()
        times.append(timer() - began)
    return sorted(times)[repeats // 2] * 1e3


def matmul_ceiling(device, dtype):
    """TFLOP/s of a large matrix product."""
    n = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    if device == "cpu":
        ms = wall_ms(lambda: a @ b, repeats=10)
    else:
        from triton.testing import do_bench
        ms = do_bench(lambda: a @ b, rep=500, return_mode="median")
    return 2 * n ** 3 / ms / 1e9


def tell(what, **figures):
    """Prints a row of a report and returns it."""
    shown = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
    print(f"{what:58}", ", ".join(shown), flush=True)
    return {"what": what, **figures}


# ---------------------------------------------------------------------------------------------------------
# Networks and samplers


def measure(name, fn, args, *networks, counted=None):
    """Times fn() -> a row: TFLOP, median milliseconds, share of the matrix product, peak memory in GiB.

    The memory is that of `networks` and of all tensors that fn makes; anything else on the GPU is subtracted.
    counted: a function with the same arithmetic, whose operations are counted instead of those of fn, because
    replays of a CUDA graph hide theirs. If the memory does not suffice, the row says so.
    """
    on_gpu = args.device != "cpu"
    own = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    others = torch.cuda.memory_allocated() - own
    try:
        with FlopCounterMode(display=False) as counter:
            (counted or fn)()
        for _ in range(args.warmup):
            fn()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        ms = wall_ms(fn, args.repeats)
    except torch.cuda.OutOfMemoryError:
        return tell(name, error="out of memory")
    tflop = counter.get_total_flops() / 1e12
    memory_gib = (torch.cuda.max_memory_allocated() - others) / 2**30 if on_gpu else None
    return tell(name, tflop=tflop, ms=ms, share=tflop / ms * 1e3 / args.ceiling, memory_gib=memory_gib)


def load_networks(args, variant):
    """UNet and VAE of args.model as "ours", "plain" or "diffusers", and a random condition of one clip."""
    if variant == "diffusers":
        import diffusers
        unet = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(args.model / "unet")
        vae = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(args.model / "vae")
    else:
        unet, vae = model.load_unet(args.model), model.load_vae(args.model)
    for net in (unet, vae):
        net.to(args.device, args.dtype).eval().requires_grad_(False)
        if variant == "ours":
            kernels.fast(net)
    latents = torch.randn(1, args.num_frames, 4, args.height // 8, args.width // 8)
    cond = torch.randn(1, 1, unet.config["cross_attention_dim"]), latents, torch.tensor([[6.0, 127.0, 0.02]])
    return unet, vae, model.Cond(*(x.to(args.device, args.dtype) for x in cond))


def nets(args):
    """Yields the rows of the UNet, forward and backward, and of the VAE."""
    no_grad, f = torch.no_grad(), args.num_frames
    for variant in ["ours", "plain"] + ["diffusers"] * args.diffusers:
        unet, vae, cond = load_networks(args, variant)
        cuda_graph = args.cuda_graph and variant == "ours"
        x = torch.cat([cond.image_latents] * 2, dim=2)                                      # 1 f 8 h w
        inputs = x, torch.tensor([1.6], device=args.device), cond.image_embeds, cond.time_ids
        latents = cond.image_latents[0]                                                     # f 4 h w
        frames = torch.randn(f, 3, args.height, args.width).to(latents)
        forward = partial(unet, *inputs)

        def backward():
            forward()[0].square().mean().backward()     # [0]: the clip, or the only output of diffusers
            unet.zero_grad()

        yield measure(f"{variant}: UNet forward", no_grad(forward), args, unet)
        if cuda_graph:
            recorded = no_grad(partial(engine.cuda_graph(unet), *inputs))
            yield measure(f"{variant}: UNet forward, recorded", recorded, args, unet)
        for what, fn in (("encode", lambda: vae.encode(frames)), ("decode", lambda: vae.decode(latents, f))):
            yield measure(f"{variant}: VAE {what}, {f} frames", no_grad(fn), args, vae)
        unet.requires_grad_(True)
        yield measure(f"{variant}: UNet forward + backward", backward, args, unet)
        unet.zero_grad()                                # in case it ran out of memory
        unet.enable_gradient_checkpointing() if variant == "diffusers" else unet.set_checkpointing()
        yield measure(f"{variant}: the same, checkpointed", backward, args, unet)
        if cuda_graph:
            recorded = engine.cuda_graph(backward)
            yield measure(f"{variant}: the same, checkpointed and recorded", recorded, args, unet)


def sample(args):
    """Yields the rows of sampling one clip, from the image to decoded frames, without the image encoder."""
    image = torch.zeros(1, 3, args.height, args.width, device=args.device)
    graph = ", recorded" * bool(args.cuda_graph)
    unet, vae, cond = load_networks(args, "ours")

    @torch.no_grad()
    def ours(draw, sigmas, net):
        latents = vae.encode(image)[:, None].expand_as(cond.image_latents)
        x0 = draw(net, cond._replace(image_latents=latents), sigmas, torch.Generator().manual_seed(0))
        return sampler.decode(vae, x0)

    for what, draw, sigmas in (
            ("1 step", sampler.sample, strided(karras_sigmas(NUM_SIGMAS), 1)),
            ("1 step + TTS", partial(sampler.sample, tts=True), strided(karras_sigmas(NUM_SIGMAS), 2)),
            ("25 guided", partial(sampler.sample_teacher, guidance=(1.0, 3.0)), karras_sigmas(25))):
        plain = partial(ours, draw, sigmas, unet)
        fn = partial(ours, draw, sigmas, engine.cuda_graph(unet)) if args.cuda_graph else plain
        yield measure(f"ours{graph}: image to frames, {what}", fn, args, unet, vae, counted=plain)
    if not args.diffusers:
        return

    from diffusers import StableVideoDiffusionPipeline
    unet, vae, _ = load_networks(args, "diffusers")
    pipe = StableVideoDiffusionPipeline.from_pretrained(
        args.model, unet=unet, vae=vae, image_encoder=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    # Neither side runs the image encoder.
    pipe._encode_image = lambda image, device, n, guided: cond.image_embeds.repeat(1 + guided, 1, 1)
    for what, steps, high in (("1 step", 1, 1.0), ("25 steps guided", 25, 3.0)):
        fn = partial(pipe, image, args.height, args.width, args.num_frames, num_inference_steps=steps,
                     min_guidance_scale=1.0, max_guidance_scale=high, output_type="pt")
        yield measure(f"diffusers: image to frames, {what}", fn, args, unet, vae)


# ---------------------------------------------------------------------------------------------------------
# Scripts


def random_pipeline(folder, device):
    """Writes a pipeline to `folder` and returns it: SVD with random weights, and a DINOv2 ViT-S."""
    from transformers import Dinov2Config, Dinov2Model
    with torch.device(device):
        clip = model.ImageEncoder(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            image_size=224, patch_size=14, projection_dim=1024, hidden_act="gelu")
        for name, net in (("unet", model.UNet()), ("vae", model.VAE()), ("image_encoder", clip)):
            checkpoint.save_network(net, folder / name, torch.float16)
    model.save_configs(folder)
    dino = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))
    dino.save_pretrained(folder / "dinov2")
    return folder


def run(what, read, *command):
    """Runs a script -> a row with the figures that read(its output) returns, or with its error message."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        message = re.search(r"^\S*(Error|\.py): .*", done.stderr, re.MULTILINE)
        return tell(what, error=message[0] if message else done.stderr)
    return tell(what, **read(done.stdout))


def memory(args):
    """Yields rows with the GPU memory of sampler.py (one step, Time Travel), with flags that reduce it."""
    def read(output):
        seconds, gb = re.search(r"([\d.]+) s, ([\d.]+) GB", output).groups()
        return {"s_with_loading": float(seconds), "memory_gib": float(gb) * 1e9 / 2**30}

    command = ["sampler.py", "--image", "assets/input.png", "--model", args.model, "--device", args.device,
               "--student", args.model / "unet", "--out", args.folder / "out.gif", "--width", args.width,
               "--height", args.height, "--num_frames", args.num_frames]
    for flags in ("", "--decode_chunk_size 2", "--decode_chunk_size 2 --offload"):
        yield run(f"sampler.py {flags}".strip(), read, *command, *flags.split())


def train(args):
    """Yields the rows of training steps of both stages, one clip per process."""
    data = "--preset toy_cpu --num_clips 8"
    if args.size == "full":
        data = f"--preset paper --data {args.folder}/videos"
        noise = torch.nn.Upsample(scale_factor=8)(torch.rand(60, 3, args.height // 8, args.width // 8))
        media.save_video(2 * noise - 1, args.folder / "videos" / "noise.mp4", 24)

    def read(_):
        last = json.loads(Path(out, "metrics.jsonl").read_text().splitlines()[-1])
        return {"ms": last["s_per_step"] * 1e3, "clips_per_s": last["clips_per_s"],
                "memory_gib": last["memory_gb"] * 1e9 / 2**30}

    stages = [(1, kind, args.width, args.height) for kind in args.discriminators]
    stages.append((2, "latent", min(576, args.width), min(320, args.height)))
    for stage, kind, width, height in stages:
        flags = (f"{data} --width {width} --height {height} --batch_size {args.gpus} --discriminator {kind} "
                 "--log_steps 5 --max_train_steps 15 --validation_steps 99 --validation_teacher_steps 1")
        with tempfile.TemporaryDirectory(dir=args.folder) as out:               # 10 GB at full size
            yield run(f"stage {stage}, {width}x{height}, {kind} discriminator, {args.gpus} GPUs", read,
                      *f"-m torch.distributed.run --standalone --nproc_per_node {args.gpus}".split(),
                      f"train_stage{stage}.py", "--model", args.model, "--output_dir", out, *flags.split(),
                      *["--stage1", "none"] * (stage == 2), *["--no-cuda_graph"] * (args.cuda_graph is False))


# ---------------------------------------------------------------------------------------------------------
# Command line

PARTS = {"nets": nets, "sample": sample, "memory": memory, "train": train}


def parse_args():
    parser = engine.command_line("Measure speed and memory: networks, sampling, training.")
    flag = parser.add_argument
    flag("what", nargs="+", choices=PARTS, help="one or several, see the top of this file")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    flag("--size", choices=["full", "toy"], default="full", help="of the networks: SVD's, or the toy world's")
    flag("--width", type=engine.positive, help="width of the clips (default: 1024; toy 128)")
    flag("--height", type=engine.positive, help="height of the clips (default: 576; toy 128)")
    flag("--num_frames", type=engine.positive, default=14, help="of the clips")
    flag("--cuda_graph", action=argparse.BooleanOptionalAction, help="CUDA graphs (train default: preset's)")
    flag("--no_diffusers", dest="diffusers", action="store_false", help="leave out diffusers")
    flag("--discriminators", nargs="*", default="latent subpixel pixel unet".split(), help="of train_stage1")
    flag("--gpus", type=engine.positive, default=1, help="train: processes, one clip each")
    flag("--repeats", type=engine.positive, default=5, help="timed runs")
    flag("--warmup", type=int, default=2, help="untimed runs before the timed ones")
    flag("--report", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.width = args.width or (128 if args.size == "toy" else 1024)
    args.height = args.height or (128 if args.size == "toy" else 576)
    args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    args.diffusers = args.diffusers and util.find_spec("diffusers") is not None
    return args


def main():
    args = parse_args()
    args.ceiling = matmul_ceiling(args.device, args.dtype)
    result = {**record(args), "diffusers": metadata.version("diffusers") if args.diffusers else None,
              "matmul_tflops_per_s": args.ceiling}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.model = random_pipeline(args.folder / "svd", args.device) if args.size == "full" else sampler.TOY
        for part in args.what:
            result[part] = list(PARTS[part](args))
            if args.report:                             # after each part, in case a later one fails
                checkpoint.write_json(args.report, result)


if __name__ == "__main__":
    main()
