"""How fast is it, how much memory does it take, and how far is it from what the machine can do?

    $ python bench.py kernel --report results/kernel.json       # upsample + normalise, on a CUDA GPU
    $ python bench.py nets sample --report results/bench.json   # SVD at full size, random weights
    $ python bench.py nets sample --compile                     # and with torch.compile
    $ python bench.py memory                                    # what sampler.py needs, and can do with less
    $ python bench.py train                                     # iterations of both stages
    $ python bench.py all --size toy --device cpu               # the toy networks, anywhere

`nets` are UNet forward, forward + backward, VAE encode and decode; `sample` is an image to decoded frames in
one step, in one with the Time Travel Sampler, and in 25 guided steps. If diffusers is installed it is
measured beside them. --profile prints which kernels the time goes to. Weights are random: it does not matter.

Each figure is a median over repeats after warm-up. Of the kernel: inputs rotate so that no run finds its data
in a cache, "backward" is forward and backward together, less forward, and the floor is the time to move the
bytes that have to be moved (each input read once, each output written once) at the copy bandwidth measured in
the same run. Of the networks: TFLOP are counted on the first call, and the share is that of a large bf16
matrix product, measured in the same run.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import engine
import evaluate
import model
import sampler
import solver
from discriminator import IMAGENET_MEAN, IMAGENET_STD, upsample_normalize

# clips of 14 frames, latent height and width, output height and width
SHAPES = [(8, 72, 128, 518, 518), (1, 72, 128, 224, 224), (1, 72, 128, 518, 518), (1, 40, 72, 518, 518)]
SMALL = [(1, 8, 8, 42, 42)]


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
    source = torch.empty(2 ** (28 if device.type == "cuda" else 23), device=device)     # fp32
    target = torch.empty_like(source)
    copy = partial(torch.neg, out=target)                # in a CUDA graph, copy_ is another, slower engine's
    return 2 * 4 * source.numel() / median_ms(copy, [source], device) * 1e3


@cache
def constants(device, dtype):
    """Of ImageNet: on the device before a graph is recorded, in which nothing may come from the host."""
    return [torch.tensor(v, device=device, dtype=dtype).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]


def eager(x, size, dtype):
    mean, std = constants(x.device, x.dtype)
    return ((F.interpolate(x, size, mode="bilinear") - mean) / std).to(dtype)


relative = lambda a, b: ((a - b).norm() / b.norm()).item()


def kernel(args):
    device, dtype = torch.device(args.device), torch.bfloat16
    bandwidth, rows = copy_bandwidth(device), []
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    print(" " * 40 + "    forward of floor   backward of floor repeats    error  of grad")
    for clips, h, w, height, width in SHAPES if device.type == "cuda" else SMALL:
        name = f"{clips} clips of " * (clips > 1) + f"14 frames, {h}x{w} -> {height}x{width}"
        n, size = 14 * clips, (height, width)
        bytes_moved = n * 3 * (height * width + h * w) * 2                      # bf16, either direction
        count = max(2, min(8, int(2e8 / bytes_moved)))                          # beyond any cache
        inputs = [torch.randn(n, 3, h, w, device=device, dtype=dtype).requires_grad_() for _ in range(count)]
        grads = [torch.randn(n, 3, *size, device=device, dtype=dtype) for _ in range(count)]
        exact_x = inputs[0].detach()[:2].double().requires_grad_()
        exact = eager(exact_x, size, torch.float64)
        exact_gradient, = torch.autograd.grad(exact, exact_x, grads[0][:2].double())
        fused = lambda x, size, dtype: upsample_normalize(x, size, IMAGENET_MEAN, IMAGENET_STD, dtype)
        variants = {"eager": eager, "fused": fused}
        if device.type == "cuda":
            torch._dynamo.reset()
            variants["compiled"] = torch.compile(eager, dynamic=False)
        row = {"shape": name, "floor_ms": bytes_moved / bandwidth * 1e3}
        print(f"{name:40}{row['floor_ms'] * 1e3:8.0f} us    floor", flush=True)
        for variant, fn in variants.items():
            def both(i):
                return torch.autograd.grad(fn(inputs[i], size, dtype), inputs[i], grads[i])[0]

            forward = median_ms(lambda i: fn(inputs[i].detach(), size, dtype), list(range(count)), device)
            back = median_ms(both, list(range(count)), device) - forward
            row[variant] = r = {
                "forward_ms": forward, "forward_share": row["floor_ms"] / forward,
                "backward_ms": back, "backward_share": row["floor_ms"] / back,
                "repeatable": torch.equal(both(0), both(0)),
                "error": relative(fn(inputs[0].detach(), size, dtype)[:2], exact),
                "gradient_error": relative(both(0)[:2], exact_gradient)}
            print(f"{variant:>40}{forward * 1e3:8.0f} us{r['forward_share']:9.0%}{back * 1e3:8.0f} us"
                  f"{r['backward_share']:9.0%}{r['repeatable']!s:>8}{r['error']:9.1e}"
                  f"{r['gradient_error']:9.1e}", flush=True)
        rows.append(row)
    return {"copy_bandwidth": bandwidth, "rows": rows}


# ---- networks and samplers ------------------------------------------------------------------------------


def measure(name, fn, args, *networks, counted=None):
    """fn() -> a row: median milliseconds, TFLOP, share of the matmul ceiling, peak memory: of the networks it
    needs and of all that it makes, not of what else is there. Too little memory is a result, too. counted:
    the same as fn, where fn's arithmetic cannot be counted."""
    cuda, row, times = args.device.startswith("cuda"), {"what": name}, []
    wait = torch.cuda.synchronize if cuda else lambda: None
    own = sum(p.numel() * p.element_size() for net in networks for p in net.parameters())
    others = torch.cuda.memory_allocated() - own if cuda else 0
    try:
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            (counted or fn)()
        for i in range(args.warmup + args.repeats):
            if i == args.warmup and cuda:
                torch.cuda.reset_peak_memory_stats()
            wait()
            before = time.perf_counter()
            fn()
            wait()
            times.append((time.perf_counter() - before) * 1e3)
    except torch.cuda.OutOfMemoryError:
        print(f"{name:58} out of memory", flush=True)
        return row | {"error": "out of memory"}
    row["tflop"] = counter.get_total_flops() / 1e12
    row["ms"] = sorted(times[args.warmup:])[args.repeats // 2]
    row["share"] = row["tflop"] / row["ms"] * 1e3 / args.ceiling
    row["memory_gib"] = (torch.cuda.max_memory_allocated() - others) / 2**30 if cuda else None
    print(f"{name:58}{row['ms']:9.1f} ms {row['tflop']:8.2f} TFLOP {row['share']:5.0%}"
          + (f" {row['memory_gib']:6.1f} GiB" if cuda else ""), flush=True)
    if args.profile:
        with torch.profiler.profile() as profile:
            fn()
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90))
    return row


def matmul_ceiling(device, dtype):
    """TFLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ceiling = 2 * n ** 3 / median_ms(lambda _: a @ b, [None], device) / 1e9
    print(f"matrix product {ceiling:.0f} TFLOP/s")
    return ceiling


def networks(args, device, dtype):
    """UNet and VAE of SVD's size, with random weights of a sensible scale, or the toy's, and their inputs."""
    with torch.device(device):
        unet, vae = (model.load_unet(sampler.TOY), model.load_vae(sampler.TOY)) if args.size == "toy" \
            else (model.UNet(), model.VAE())
        for net in (unet, vae):
            net.to(device, dtype).eval().requires_grad_(False)
        b, f, h, w = args.batch_size, args.num_frames, args.height // 8, args.width // 8
        cond = model.Cond(torch.randn(b, 1, unet.config["cross_attention_dim"]), torch.randn(b, f, 4, h, w),
                          torch.tensor([[6.0, 127.0, 0.02]]).repeat(b, 1))
    return unet, vae, cond


def theirs(unet, vae):
    """The same networks by diffusers, with the same weights."""
    import diffusers
    weight = next(unet.parameters())
    with weight.device:
        twins = (diffusers.UNetSpatioTemporalConditionModel(**unet.config),
                 diffusers.AutoencoderKLTemporalDecoder(**vae.config))
    for twin, net in zip(twins, (unet, vae)):
        twin.load_state_dict(net.state_dict())
        twin.to(weight.device, weight.dtype).eval().requires_grad_(False)
    return twins


def nets(args):
    device, dtype = torch.device(args.device), args.dtype
    unet, vae, cond = networks(args, device, dtype)
    x = torch.cat([cond.image_latents] * 2, dim=2).to(dtype)                    # b f 8 h w
    c_noise = torch.full((args.batch_size,), 1.6, device=device)
    rest = cond.image_embeds.to(dtype), cond.time_ids.to(dtype)
    latents, f = cond.image_latents.flatten(0, 1).to(dtype), args.num_frames    # (b f) 4 h w
    frames = torch.randn(len(latents), 3, args.height, args.width, device=device, dtype=dtype)
    variants = {"ours": (unet, vae, lambda unet: unet(x, c_noise, *rest), vae.encode)}
    if args.diffusers:
        their_unet, their_vae = theirs(unet, vae)
        variants["diffusers"] = (
            their_unet, their_vae, lambda unet: unet(x, c_noise[0], *rest, return_dict=False)[0],
            lambda frames: their_vae.encode(frames).latent_dist.mode())

    def backward(unet, forward):
        forward(unet).square().mean().backward()
        unet.zero_grad()

    for name, (unet, vae, forward, encode) in variants.items():
        name, no_grad = name + " compiled" * args.compile, torch.no_grad()
        if args.compile:
            for net in (unet, vae.encoder, vae.decoder):
                net.compile(dynamic=False)
        yield measure(f"{name}: UNet forward", no_grad(lambda: forward(unet)), args, unet)
        if args.cuda_graph and name.startswith("ours"):
            yield measure(f"{name}: UNet forward, recorded",
                          no_grad(partial(forward, engine.recorder(True)(unet))), args, unet)
        yield measure(f"{name}: VAE encode, {f} frames", no_grad(lambda: encode(frames)), args, vae)
        yield measure(f"{name}: VAE decode, {f} frames", no_grad(lambda: vae.decode(latents, f)), args, vae)
        if args.compile:                                # training does not
            continue
        unet.requires_grad_(True)
        yield measure(f"{name}: UNet forward + backward", lambda: backward(unet, forward), args, unet)
        if name.startswith("ours"):
            unet.set_checkpointing(True)
        else:
            unet.enable_gradient_checkpointing()
            unet.train()
        yield measure(f"{name}: the same, checkpointed", lambda: backward(unet, forward), args, unet)
        if args.cuda_graph and name.startswith("ours"):
            yield measure(f"{name}: the same, checkpointed and recorded",
                          engine.recorder(True)(partial(backward, unet, forward)), args, unet)


def sample(args):
    """From an encoded condition to decoded frames."""
    device, dtype, f = torch.device(args.device), args.dtype, args.num_frames
    args.batch_size = 1
    unet, vae, cond = networks(args, device, dtype)
    if args.compile:
        unet.compile(dynamic=False), vae.decoder.compile(dynamic=False)
    image = torch.zeros(args.batch_size, 3, args.height, args.width, device=device)

    def ours(draw, k, net):
        sigmas = solver.karras_sigmas(25) if k == 25 else solver.strided(solver.karras_sigmas(100), k)
        latents = vae.encode(image)[:, None].expand_as(cond.image_latents)
        x0 = draw(net, cond._replace(image_latents=latents), sigmas, torch.Generator().manual_seed(0))
        return sampler.decode(vae, x0, args.decode_chunk_size)

    for name, draw, k in (("1 step", sampler.sample, 1),
                          ("1 step + TTS", partial(sampler.sample, tts=True), 2),
                          ("25 guided", partial(sampler.sample_teacher, guidance=(1.0, 3.0)), 25)):
        how = " compiled" * args.compile + ", recorded" * bool(args.cuda_graph)
        plain, recorded = (partial(torch.no_grad()(ours), draw, k, net)
                           for net in (unet, engine.recorder(args.cuda_graph)(unet)))
        yield measure(f"ours{how}: image to frames, {name}", recorded, args, unet, vae, counted=plain)
    if args.diffusers:
        from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
        scheduler = EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True,
            sigma_min=solver.SIGMA_MIN, sigma_max=solver.SIGMA_MAX)
        their_unet, their_vae = theirs(unet, vae)
        pipe = StableVideoDiffusionPipeline(
            unet=their_unet, vae=their_vae, scheduler=scheduler, image_encoder=None, feature_extractor=None)
        pipe.set_progress_bar_config(disable=True)
        embeds = cond.image_embeds.to(dtype)              # the image encoder is left out on both sides
        for k, high in ((1, 1.0), (25, 3.0)):
            given = embeds if k == 1 else torch.cat([torch.zeros_like(embeds), embeds])
            pipe._encode_image = lambda *_, given=given: given
            yield measure(
                f"diffusers: image to frames, {k} step{'s guided' * (k > 1)}", lambda k=k, high=high: pipe(
                    image, args.height, args.width, f, num_inference_steps=k, min_guidance_scale=1.0,
                    max_guidance_scale=high, output_type="pt",
                    decode_chunk_size=args.decode_chunk_size or f), args, their_unet, their_vae)


def tell(what, **figures):
    print({"what": what, **figures}, flush=True)
    return {"what": what, **figures}


# ---- the scripts themselves -----------------------------------------------------------------------------


def random_pipeline(folder, args):
    """The folder, with SVD's architecture, random weights, and a DINOv2 ViT-S. For --size toy the toy's."""
    if args.size == "toy":
        return sampler.TOY
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
    unet, vae, _ = networks(args, torch.device(args.device), torch.float16)
    model.save_unet(unet, folder / "unet", torch.float16)
    model.save_vae(vae, folder / "vae", torch.float16)
    model.save_configs(folder)
    with torch.device(args.device):
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
            patch_size=14, projection_dim=1024, hidden_act="gelu"))
    clip.half().save_pretrained(folder / "image_encoder")
    Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)).save_pretrained(
        folder / "dinov2")
    return folder


def run(*command):
    """Runs a script -> (what it printed, {}), or (None, {"error": the first line that complains})."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          cwd=Path(__file__).parent)
    complaint = re.search(r"^\S*(Error|\.py): .*", done.stderr, re.MULTILINE)
    error = complaint[0] if complaint else done.stderr
    return (None, {"error": error}) if done.returncode else (done.stdout, {})


def memory(args):
    """sampler.py itself, one step with Time Travel: its GPU memory with less and less of it at hand."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline = random_pipeline(Path(folder), args)
        for flags in ("", "--decode_chunk_size 2", "--decode_chunk_size 2 --offload"):
            said, figures = run(
                "sampler.py", "--image", model.ASSETS / "input.png", "--model", pipeline, "--student",
                pipeline / "unet", "--device", args.device, "--width", args.width, "--height", args.height,
                "--num_frames", args.num_frames, "--out", Path(folder) / "out.gif", *flags.split())
            if said:
                seconds, gb = re.search(r"([\d.]+) s, ([\d.]+) GB", said).groups()
                figures = {"s_with_loading": float(seconds), "memory_gib": float(gb) * 1e9 / 2**30}
            yield tell(f"sampler.py {flags}".strip(), **figures)


def train(args):
    """Iterations of both stages, one clip per process."""
    stages = [(1, kind, args.width, args.height) for kind in args.discriminators]
    stages.append((2, "latent", min(576, args.width), min(320, args.height)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pipeline = random_pipeline(folder, args)
        common = ["--preset", "toy_cpu", "--num_clips", 8]
        if args.size == "full":
            common = ["--preset", "paper", "--data", folder / "videos", "--dino", folder / "dinov2"]
            for i in range(4):
                noise = torch.rand(60, 3, args.height // 8, args.width // 8)
                frames = F.interpolate(noise * 2 - 1, scale_factor=8)                       # f 3 H W
                sampler.save_video(frames, folder / "videos" / f"{i}.mp4", 24)
        for stage, kind, width, height in stages:
            out = folder / f"{stage}-{kind}"
            said, figures = run(
                "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.gpus,
                f"train_stage{stage}.py", *common, "--model", pipeline, "--output_dir", out, "--width", width,
                "--height", height, "--batch_size", args.gpus, "--discriminator", kind, "--log_steps", 5,
                "--max_train_steps", 15, "--validation_steps", 99, "--validation_teacher_steps", 1,
                *["--stage1", "none"] * (stage == 2), *["--no-cuda_graph"] * (args.cuda_graph is False))
            if said:
                last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
                figures = {"ms": last["s_per_step"] * 1e3, "clips_per_s": last["clips_per_s"],
                           "memory_gib": last["memory_gb"] * 1e9 / 2**30}
            shutil.rmtree(out, ignore_errors=True)                      # at full size 10 GB each
            yield tell(f"stage {stage}, {width}x{height}, {kind} discriminator, {args.gpus} GPUs", **figures)


def main():
    parser = engine.command_line("Measure speed and memory: the kernel, networks, sampling, training.")
    flag = parser.add_argument
    parts = {"kernel": kernel, "nets": nets, "sample": sample, "memory": memory, "train": train}
    flag("what", nargs="+", choices=[*parts, "all"], help="one or several, see the top of this file")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    flag("--size", choices=["full", "toy"], default="full", help="of the networks: SVD's, or the toy world's")
    flag("--width", type=engine.positive, help="of the clips (None: 1024; toy 128)")
    flag("--height", type=engine.positive, help="of the clips (None: 576; toy 128)")
    flag("--num_frames", type=engine.positive, default=14, help="of the clips")
    flag("--batch_size", type=engine.positive, default=1, help="nets: clips at a time")
    flag("--decode_chunk_size", type=engine.positive, help="frames decoded at a time (None: all)")
    flag("--compile", action="store_true", help="torch.compile the networks")
    flag("--cuda_graph", action=argparse.BooleanOptionalAction,
         help="nets, sample: the UNet's launches replayed from a recording; train: None is the preset's")
    flag("--profile", action="store_true", help="print where the time goes")
    flag("--no_diffusers", dest="diffusers", action="store_false", help="leave the comparison out")
    flag("--discriminators", nargs="*", default=["latent", "subpixel", "pixel", "unet"],
         help="train: those of stage 1; none is stage 2 alone")
    flag("--gpus", type=engine.positive, default=1, help="train: processes, one clip each")
    flag("--repeats", type=engine.positive, default=5, help="timed runs")
    flag("--warmup", type=engine.positive, default=2, help="runs before them")
    flag("--report", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.width, args.height = (side or default for side, default in zip(
        (args.width, args.height), (128, 128) if args.size == "toy" else (1024, 576)))
    args.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    args.diffusers = args.diffusers and find_spec("diffusers") is not None
    args.ceiling = matmul_ceiling(device, args.dtype) if {"nets", "sample", "all"} & {*args.what} else None
    result = {**evaluate.record(args), "diffusers": version("diffusers") if args.diffusers else None,
              "matmul_tflops_per_s": args.ceiling}
    for name, function in parts.items():
        if name in args.what or "all" in args.what:
            result[name] = function(args) if name == "kernel" else list(function(args))
            if args.report:                                         # what is done is on the disk
                model.write_json(args.report, result)


if __name__ == "__main__":
    main()
