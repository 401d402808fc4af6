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
- The matrix product, the machine's limit: median of torch.utils.benchmark, many products per reading of the
  clock.
- memory is one run of the process; train takes the last 5 steps of a run.

Single kernels and layers are measured by tests/kernel_speed.py.
"""
import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import timeit
from functools import partial
from importlib import metadata, util
from pathlib import Path

import torch
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

import model
import sampler
from evaluate import ROOT, parse_sampler, record
from support import checkpoint, engine, kernels, media

# ---------------------------------------------------------------------------------------------------------
# Timing


def matmul_ceiling(device, dtype):
    """TFLOP/s of a large matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    product = benchmark.Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / product.blocked_autorange(min_run_time=0.5).median / 1e12


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
    on_gpu = args.device.type == "cuda"
    own = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    others = torch.cuda.memory_allocated() - own
    try:
        with FlopCounterMode(display=False) as counter:
            (counted or fn)()
        # PyTorch's timer waits for the GPU, then reads the clock. The peak memory is that of the last call.
        seconds = timeit.repeat(fn, setup=torch.cuda.reset_peak_memory_stats if on_gpu else "pass",
                                timer=benchmark.timer, repeat=args.warmup + args.repeats, number=1)
    except torch.cuda.OutOfMemoryError:
        return tell(name, error="out of memory")
    ms, tflop = statistics.median(seconds[args.warmup:]) * 1e3, counter.get_total_flops() / 1e12
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


@torch.no_grad()
def nets(args):
    """Yields the rows of the UNet, forward and backward, and of the VAE."""
    f = args.num_frames
    for variant in ["ours", "plain"] + ["diffusers"] * args.diffusers:
        unet, vae, cond = load_networks(args, variant)
        cuda_graph = args.cuda_graph and variant == "ours"
        x = torch.cat([cond.image_latents] * 2, dim=2)                                      # 1 f 8 h w
        frames = torch.randn(f, 3, args.height, args.width).to(x)
        forward = partial(unet, x, torch.ones(1).to(args.device), cond.image_embeds, cond.time_ids)

        @torch.enable_grad()
        def backward():
            forward()[0].square().mean().backward()     # [0]: the clip, or the only output of diffusers
            unet.zero_grad()

        row = lambda what, fn, net: measure(f"{variant}: {what}", fn, args, net)
        yield row("UNet forward", forward, unet)
        if cuda_graph:
            yield row("UNet forward, recorded", engine.cuda_graph(forward), unet)
        yield row(f"VAE encode, {f} frames", partial(vae.encode, frames), vae)
        yield row(f"VAE decode, {f} frames", partial(vae.decode, cond.image_latents[0], f), vae)
        unet.requires_grad_(True)
        yield row("UNet forward + backward", backward, unet)
        unet.zero_grad()                                # in case it ran out of memory
        unet.enable_gradient_checkpointing() if variant == "diffusers" else unet.set_checkpointing()
        yield row("the same, checkpointed", backward, unet)
        if cuda_graph:
            yield row("the same, checkpointed and recorded", engine.cuda_graph(backward), unet)


@torch.no_grad()
def sample(args):
    """Yields the rows of sampling one clip, from the image to decoded frames, without the image encoder."""
    image = torch.zeros(1, 3, args.height, args.width, device=args.device)
    unet, vae, cond = load_networks(args, "ours")

    def ours(draw, net):
        latents = vae.encode(image)[:, None].expand_as(cond.image_latents)
        x0 = draw(net, cond._replace(image_latents=latents), generator=torch.Generator().manual_seed(0))
        return sampler.decode(vae, x0)

    for what, name, is_teacher in (
            ("1 step", "1", False), ("1 step + TTS", "tts", False), ("25 guided", "25", True)):
        *_, draw = parse_sampler(name, is_teacher, guidance=(1.0, 3.0))
        plain = partial(ours, draw, unet)
        fn = partial(ours, draw, engine.cuda_graph(unet)) if args.cuda_graph else plain
        graph = ", recorded" * bool(args.cuda_graph)
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
        for name, net in (("unet", model.UNet()), ("vae", model.VAE()),
                          ("image_encoder", model.ImageEncoder(**checkpoint.CLIP))):
            checkpoint.save_network(net, folder / name, torch.float16)
    model.save_configs(folder)
    dino = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518))
    dino.save_pretrained(folder / "dinov2")
    return folder


def run(what, read, *command):
    """Runs a script -> a row with the figures that read(its output) returns, or with its error message."""
    # In a session of its own, the script does not get a Ctrl-C, but the SIGTERM below, once: torchrun then
    # ends its processes. They would go on if it were killed, or interrupted while it ends them.
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        output, errors = child.communicate()
    finally:
        child.terminate()
        child.wait()
    if child.returncode:
        message = re.search(r"^\S*(Error|\.py): .*", errors, re.MULTILINE)
        return tell(what, error=message[0] if message else errors)
    return tell(what, **read(output))


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
    data = ["--preset", "toy_cpu", "--num_clips", 8]
    if args.size == "full":
        data = ["--preset", "paper", "--data", args.folder / "videos", "--dino", args.model / "dinov2"]
        noise = torch.nn.Upsample(scale_factor=8)(torch.rand(60, 3, args.height // 8, args.width // 8))
        media.save_video(2 * noise - 1, args.folder / "videos" / "noise.mp4", 24)

    def read(folder, output):
        last = checkpoint.read_lines(Path(folder, "metrics.jsonl"))[-1]
        return {"ms": last["s_per_step"] * 1e3, "clips_per_s": last["clips_per_s"],
                "memory_gib": last["memory_gb"] * 1e9 / 2**30}

    stages = [(1, kind, args.width, args.height) for kind in args.discriminators]
    stages.append((2, "latent", min(576, args.width), min(320, args.height)))
    for stage, kind, width, height in stages:
        # One process without torchrun, which would choose its GPU.
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {args.gpus}" * (args.gpus > 1)
        flags = (f"--width {width} --height {height} --batch_size {args.gpus} --discriminator {kind} "
                 "--log_steps 5 --max_train_steps 15 --validation_steps 99 --validation_teacher_steps 1"
                 + " --stage1 none" * (stage == 2) + " --no-cuda_graph" * (args.cuda_graph is False))
        with tempfile.TemporaryDirectory(dir=args.folder) as out:               # 10 GB at full size
            yield run(f"stage {stage}, {width}x{height}, {kind} discriminator, {args.gpus} GPUs",
                      partial(read, out), *torchrun.split(), f"train_stage{stage}.py", *data, *flags.split(),
                      "--model", args.model, "--device", args.device, "--output_dir", out)


# ---------------------------------------------------------------------------------------------------------
# Command line

PARTS = {"nets": nets, "sample": sample, "memory": memory, "train": train}


def parse_args():
    parser = engine.command_line("Measure speed and memory: networks, sampling, training.")
    flag, kinds = parser.add_argument, ["latent", "subpixel", "pixel", "unet"]
    flag("what", nargs="+", choices=PARTS, help="one or several, see the top of this file")
    flag("--device", help="cuda, cuda:1 or cpu (default: cuda if available)")
    flag("--size", type=str, choices=["full", "toy"], default="full", help="of the networks: SVD's, or toys")
    flag("--width", help="width of the clips (default: 1024; toy 128)")
    flag("--height", help="height of the clips (default: 576; toy 128)")
    flag("--num_frames", default=14, help="of the clips")
    flag("--cuda_graph", action=argparse.BooleanOptionalAction, help="CUDA graphs (train default: preset's)")
    flag("--no_diffusers", dest="diffusers", action="store_false", help="leave out diffusers")
    flag("--discriminators", nargs="*", choices=kinds, default=kinds, help="of train_stage1")
    flag("--gpus", default=1, help="train: processes, one clip each")
    flag("--repeats", default=5, help="timed runs")
    flag("--warmup", default=2, help="untimed runs before the timed ones")
    flag("--report", type=Path, help="JSON file to write")
    args = parser.parse_args()
    args.device = engine.choose_device(args.device)
    # The stride is that of the VAE and the UNet together.
    width, height, stride = (128, 128, 16) if args.size == "toy" else (1024, 576, 64)
    args.width, args.height = args.width or width, args.height or height
    if args.width % stride or args.height % stride:
        parser.error(f"--width {args.width} --height {args.height}: must be multiples of {stride}")
    if args.cuda_graph and args.device.type != "cuda":
        parser.error(f"--cuda_graph: there is none on {args.device}")
    args.dtype = torch.float32 if args.device.type == "cpu" else torch.bfloat16
    args.diffusers = args.diffusers and util.find_spec("diffusers") is not None
    checkpoint.check_writable(args.report)
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
