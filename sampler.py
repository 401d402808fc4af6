"""From an image to a video.

    $ python sampler.py --image in.png                                 # the toy world, on any computer
    $ python sampler.py --image in.png --teacher --steps 25            # the teacher, not a one-step student
    $ python sampler.py --image in.png --model stabilityai/stable-video-diffusion-img2vid
    $ python sampler.py --image in.png --num_videos 8 --gallery seeds.png      # one picture, eight futures

    sample              a student: 1 step, k steps, or (tts=True) the Time Travel Sampler
    sample_teacher      the m-step ODE solver with guidance, 25 steps as SVD is used
    decode              latents -> frames
    Sheets              the pictures of a training run
    load_image, save_video, and the command line

A sampler is a function of a network, a condition and noise levels. Noise is drawn on the CPU, one generator
a clip, so a seed gives the same video on every device and whatever else is in the batch.
OSV, arXiv 2409.11367: section 4.3 (Time Travel Sampler); v1 and v2 print it differently, see time_travel.
"""
import argparse
import io
import sys
import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import model
from data import save_sheet
from engine import fail, peak_memory, recorder
from model import SVD, ModelError, default_size, load_student, replacing
from solver import NUM_SIGMAS, consistency, karras_sigmas, precondition, solve, strided

TOY = model.ASSETS / "toy"
STUDENT = TOY / "student.safetensors"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 150_000_000                # of an input image; more is taken for a decompression bomb

# ---------------------------------------------------------------------------------------------------------
# Samplers


def draw_noise(shape, generator, device):
    """Standard normal noise [b ...]. generator: one for all clips, or a list with one per clip (CPU)."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * shape[0]
    assert len(generators) == shape[0], f"{len(generators)} generators for {shape[0]} clips"
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


@torch.no_grad()
def sample(net, cond, sigmas, generator, tts=False):
    """A student's samples x0 [b f 4 h w] (scaled latents), from noise at sigmas[0].

    sigmas [k + 1], descending, trailing 0: `strided(karras_sigmas(NUM_SIGMAS), k)`. k network evaluations:
    each jumps to the end of the ODE, then returns to the next noise level with fresh noise (consistency
    models, arXiv 2303.01469, Algorithm 1). tts: the Time Travel Sampler instead; it needs k = 2, of which it
    uses the second level as the place it travels to.
    """
    if tts:
        assert len(sigmas) == 3, f"the Time Travel Sampler takes 2 levels and 0, not {len(sigmas)} values"
        return time_travel(net, cond, sigmas[0], sigmas[1], generator)
    shape, device = cond.image_latents.shape, cond.image_latents.device
    x_t = sigmas[0] * draw_noise(shape, generator, device)                      # b f 4 h w
    for i in range(len(sigmas) - 1):
        x0_pred = consistency(net, x_t, sigmas[i], cond)
        if sigmas[i + 1] > 0:
            x_t = x0_pred + sigmas[i + 1] * draw_noise(shape, generator, device)
    return x0_pred


@torch.no_grad()
def time_travel(net, cond, sigma_t, sigma_s, generator, readout="look_ahead"):
    """The Time Travel Sampler for one step (OSV v2, Eq. 13): 2 network evaluations, from sigma_t through the
    look-ahead level sigma_s.

        f = f_theta(x_t, sigma_t)                       a first guess of the clean latent
        eps = (eps_0 + (x_t - f) / sigma_t) / 2         half fresh noise, half the noise that guess implies
        f' = f_theta(f + sigma_s eps, sigma_s)          the guess again, from the look-ahead level

    readout: "look_ahead" returns f'. "printed" returns what Eq. 13 prints, which weights the second raw
    output with the scalings of sigma_t: it differs by a remainder -c_skip(sigma_s) x_s, visible as noise
    unless sigma_s is large. "v1" is Eq. 11 of the first version of the paper, which does not re-noise: the
    network sees noise level sigma_t and is told sigma_s, then sees its own first guess as if it were x_t.
    Returns x0 [b f 4 h w].
    """
    shape, device = cond.image_latents.shape, cond.image_latents.device
    x_t = sigma_t * draw_noise(shape, generator, device)                        # b f 4 h w
    if readout == "v1":
        return consistency(net, consistency(net, x_t, sigma_s, cond), sigma_t, cond)
    x0_pred = consistency(net, x_t, sigma_t, cond)
    fresh = draw_noise(shape, generator, device)
    x_s = x0_pred + sigma_s * (fresh + (x_t - x0_pred) / sigma_t) / 2
    x0_pred = consistency(net, x_s, sigma_s, cond)
    if readout == "look_ahead":
        return x0_pred
    at_s, at_t = precondition(sigma_s), precondition(sigma_t)
    F_x = (x0_pred - at_s.c_skip * x_s) / at_s.c_out
    eps = (fresh + (x_s - x0_pred) / sigma_s) / 2
    return at_t.c_skip * (x0_pred + sigma_t * eps) + at_t.c_out * F_x


@torch.no_grad()
def sample_teacher(net, cond, sigmas, generator, guidance=None, progress=iter):
    """A teacher's samples x0 [b f 4 h w]: the guided Euler solver (Eq. 8) from noise, as SVD is used with
    karras_sigmas(25). guidance: see solver.guided; (low, high) grows linearly from first to last frame."""
    shape, device = cond.image_latents.shape, cond.image_latents.device
    if isinstance(guidance, tuple):
        guidance = torch.linspace(*guidance, shape[1], device=device).view(1, -1, 1, 1, 1)     # 1 f 1 1 1
    sigma = sigmas[0]
    x_t = (sigma ** 2 + 1) ** 0.5 * draw_noise(shape, generator, device)        # unit-variance data and noise
    return solve(net, x_t, sigmas, cond, guidance, progress)


@torch.no_grad()
def decode(vae, x0, decode_chunk_size=None, progress=iter):
    """x0 [b f 4 h w], scaled latents -> frames [b f 3 H W] in [-1, 1].

    decode_chunk_size: frames at a time; fewer need less memory, but frames on the two sides of a cut no
    longer see each other, so they differ a little from those of a decode in one go (the default).
    """
    num_frames, size = x0.shape[1], decode_chunk_size or x0.shape[1]
    latents = rearrange(x0 / vae.config["scaling_factor"], "b f c h w -> (b f) c h w")
    if size < num_frames:
        parts = [part for clip in latents.split(num_frames) for part in clip.split(size)]
    else:                                       # small clips together, as much at a time as one of SVD is
        together = max(1, 14 * 72 * 128 // x0[0, :, 0].numel())
        parts = latents.split(together * num_frames)
    frames = torch.cat([vae.decode(part, min(len(part), num_frames)).float() for part in progress(parts)])
    return rearrange(frames.clamp(-1, 1), "(b f) c h w -> b f c h w", f=num_frames)


# ---------------------------------------------------------------------------------------------------------
# Pictures in, videos out


def load_image(source):
    """The picture in a file, as people see it: PIL image, RGB, turned upright (EXIF), transparency on white.
    Raises OSError or ValueError with a sentence."""
    from PIL import Image, ImageOps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # we have a limit of our own
        try:
            with Image.open(source) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                image = ImageOps.exif_transpose(file)
                image.load()
        except Image.DecompressionBombError as error:
            raise ValueError(f"more than {MAX_PIXELS // 10 ** 6} million pixels: make it smaller") from error
        except (OSError, SyntaxError, EOFError, ValueError) as error:
            raise ValueError(f"cannot be read as a picture ({error})") from error
    if image.mode.startswith("I"):                                      # 16-bit grey; convert() would clip it
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_image(image, width, height):
    """PIL image of any size -> [3 H W] in [-1, 1], cut at the centre to the aspect ratio, then resized.
    Also returns what was cut: (share of width kept, share of height kept)."""
    from PIL import Image
    scale = max(width / image.width, height / image.height)
    box_w, box_h = width / scale, height / scale
    left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    kept = box_w / image.width, box_h / image.height
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1, kept


def save_video(frames, file, fps):
    """frames [f 3 H W] in [-1, 1] -> .mp4 (H.264, yuv420p), .gif, or .png (contact sheet), by suffix. The
    file appears whole or not at all."""
    from PIL import Image
    if file.suffix == ".png":
        return save_sheet(frames[None], file)
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).byte().cpu()
    pixels = rearrange(pixels, "f c h w -> f h w c").numpy()
    with replacing(file) as part:
        if file.suffix == ".mp4":
            write_mp4(pixels, part, fps)
        else:
            images = [Image.fromarray(frame) for frame in pixels]
            palette = Image.fromarray(rearrange(pixels, "f h w c -> (f h) w c")).quantize(256)
            images = [image.quantize(palette=palette) for image in images]
            # A gif counts time in 1/100 s: rounding the frames' start times keeps the average rate exact.
            starts = [round(100 * i / fps) for i in range(len(images) + 1)]
            durations = [10 * (b - a) for a, b in zip(starts, starts[1:])]
            images[0].save(part, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


class Sheets:
    """Pictures of a training run: the same clips in rows, real, by the teacher, by one step, and by one step
    with the Time Travel Sampler. x0 and cond: real clips; net: the teacher now, the student when `save` is
    called."""

    def __init__(self, net, vae, x0, cond, teacher_steps, seed):
        self.net, self.vae, self.cond, self.seed = net, vae, cond, seed
        teacher = self.draw(sample_teacher, karras_sigmas(teacher_steps), guidance=(1.0, 3.0))
        self.fixed_rows = [decode(vae, x).cpu() for x in (x0, teacher)]

    def draw(self, sampler, sigmas, **how):
        """One clip after the other, each from a seed of its own: memory is that of one -> x0 [n f 4 h w]."""
        clips = enumerate(zip(*(tensor.split(1) for tensor in self.cond)), self.seed)
        return torch.cat([
            sampler(self.net, model.Cond(*cond), sigmas, torch.Generator().manual_seed(seed), **how)
            for seed, cond in clips])

    def save(self, folder, step, fps):
        """Writes sample-STEP.png and .mp4 into the folder."""
        sigmas = karras_sigmas(NUM_SIGMAS)
        latents = [self.draw(sample, strided(sigmas, k), tts=k == 2) for k in (1, 2)]
        rows = self.fixed_rows + [decode(self.vae, x0).cpu() for x0 in latents]             # n f 3 H W each
        save_sheet(torch.cat(rows), folder / f"sample-{step:06d}.png")
        together = rearrange(torch.stack(rows), "rows n f c h w -> f c (rows h) (n w)")
        save_video(together, folder / f"sample-{step:06d}.mp4", fps)


def write_mp4(pixels, file, fps):
    """pixels [f H W 3] uint8 -> an mp4 that plays everywhere: H.264, 4:2:0, BT.709 said and meant."""
    import av
    with av.open(str(file), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16", "preset": "slow"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = 1, 1, 1, 1
        for frame in pixels:
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="sampler.py", description="Turn a picture into a video.", allow_abbrev=False,
        usage="python sampler.py --image IN [--out out.mp4] [options]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110))
    parser.error = fail

    def flag(name, help, **settings):
        shown = " (default: %(default)s)" if settings.get("default") is not None else ""
        group.add_argument(name, help=help + shown, **settings)

    group = parser.add_argument_group("what")
    flag("--image", nargs="+", required=True, metavar="IN",
         help="picture, several, a folder of them, or - for one from stdin")
    flag("--out", type=Path, default=Path("out.mp4"),
         help=".mp4, .gif or .png (contact sheet); of several, picture and seed are in the name")
    flag("--num_videos", type=int, metavar="N", default=1, help="of each picture, with seeds of their own")
    flag("--gallery", type=Path, metavar="PNG", help="also one contact sheet of all videos, a row each")
    flag("--save_latents", action="store_true", help="also the video's latents, beside it as .safetensors")
    flag("--num_frames", type=int, metavar="N",
         help="length of the video (default: what the model was trained for)")
    flag("--width", type=int, metavar="N", help="pixels (default: 1024 for SVD, 128 in the toy world)")
    flag("--height", type=int, metavar="N", help="the same (default: 576, 128); both become multiples of 64")
    flag("--fps", type=int, metavar="N", default=7, help="frames per second")
    flag("--motion_bucket_id", type=int, metavar="N", default=127, help="amount of motion, 1 to 255")
    flag("--noise_aug_strength", type=float, metavar="X", default=0.02,
         help="noise on the picture; more lets the video leave it further behind")
    flag("--seed", type=int, metavar="N", default=0, help="of the first video; the next ones count on")
    group = parser.add_argument_group("with which model")
    flag("--model", default="toy", help=f"toy, a folder in the diffusers layout, or a hub id such as {SVD}")
    flag("--variant", help="weights to read, e.g. fp16 for *.fp16.safetensors")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--student", metavar="PATH",
         help="distilled UNet (folder, hub id, file) or LoRA (folder, file) for its UNet")
    flag("--teacher", action="store_true", help="the model's own UNet, even if there is a student")
    group = parser.add_argument_group("how")
    flag("--steps", type=int, metavar="N", help="solver steps (default: 1 for a student, 25 for a teacher)")
    flag("--tts", action="store_true", default=None,
         help="Time Travel Sampler: a one-step student looks twice (default: on for --steps 1)")
    flag("--no_tts", dest="tts", action="store_false", help="one look only")
    flag("--min_guidance_scale", type=float, metavar="X", default=1.0,
         help="teacher's guidance on the first frame")
    flag("--max_guidance_scale", type=float, metavar="X", default=3.0,
         help="and on the last; 1 and 1 is none, twice as fast")
    flag("--decode_chunk_size", type=int, metavar="N",
         help="frames decoded at a time: fewer save memory and differ a little at the cuts (default: all)")
    flag("--offload", action="store_true", help="keep each network on the GPU only while it runs")
    flag("--cuda_graph", action="store_true",
         help="replay the UNet's launches from its 4th call on: faster where it is small, or the GPU is fast")
    flag("--dtype", choices=("fp32", "bf16", "fp16"),
         help="inside the networks (default: bf16 on GPUs that have it, else fp32)")
    flag("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    args = parser.parse_args(argv)

    for name, low, high in (
            ("num_frames", 1, 1000), ("num_videos", 1, 1000), ("width", 64, 8192), ("height", 64, 8192),
            ("fps", 1, 60), ("motion_bucket_id", 0, 255), ("noise_aug_strength", 0, 10), ("steps", 1, 1000),
            ("decode_chunk_size", 1, 1000), ("seed", 0, 2 ** 63),
            ("min_guidance_scale", 0, 100), ("max_guidance_scale", 0, 100)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name} {value}: not between {low} and {high}")
    if args.out.suffix not in (".mp4", ".gif", ".png"):
        fail(f"--out {args.out}: the name must end in .mp4, .gif or .png")
    if args.gallery and args.gallery.suffix != ".png":
        fail(f"--gallery {args.gallery}: the name must end in .png")
    for name, file in (("out", args.out), ("gallery", args.gallery or args.out)):
        if not file.parent.is_dir():
            fail(f"--{name} {file}: there is no folder {file.parent}")
    if args.teacher and (args.student or args.tts):
        other = "--student" if args.student else "--tts"
        fail(f"--teacher does not go with {other}: that is for distilled UNets")
    if args.offload and args.cuda_graph:
        fail("--offload does not go with --cuda_graph: what is recorded has the weights in one place")
    if args.tts and args.steps not in (None, 1):
        fail(f"--tts --steps {args.steps}: the Time Travel Sampler is for one step")
    return args


def find_images(paths):
    """[(name for the output, path)] of pictures and folders of pictures, in the order given."""
    files = []
    for path in paths:
        if "://" in path:
            fail(f"--image {path}: a URL; download it and give the file, or pipe it into --image -")
        found = [Path(path)]
        if Path(path).is_dir():
            found = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            fail(f"--image {path}: no pictures in this folder ({' '.join(IMAGE_SUFFIXES)})")
        files += found
    stems = [file.stem for file in files]
    return [(f"{stem}_{stems[:i].count(stem)}" if stem in stems[:i] else stem, file)
            for i, (stem, file) in enumerate(zip(stems, files))]


def pick_device(args):
    backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, there in backends.items() if there]
    device = args.device or available[0]
    if device.split(":")[0] not in available:
        fail(f"--device {device}: not available here; use {' or '.join(available)}")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        fail(f"--device {device}: {error}")
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = args.dtype or ("bf16" if has_bf16 else "fp32")
    return device, model.DTYPES[dtype]


@contextmanager
def on_device(net, device, offload):
    yield net.to(device)
    if offload:
        net.to("cpu")


def bar(steps, name):
    return tqdm(steps, name, leave=False, disable=len(steps) < 2 or None)       # None: only on a terminal


def main():
    start = time.perf_counter()
    args = parse_args()
    images = []                                                       # all are read before anything is loaded
    for name, file in find_images(args.image):
        try:
            source = io.BytesIO(sys.stdin.buffer.read()) if str(file) == "-" else file
            images.append((name, file, load_image(source)))
        except (OSError, ValueError) as error:
            fail(f"--image {file}: {error}")
    device, dtype = pick_device(args)

    root = args.model
    if root == "toy":
        root = TOY
        if not (TOY / "unet").is_dir():
            fail(f"the toy networks are not in {TOY}: make them with `python train_toy.py` or give a --model")
        print("toy model: it knows moving shapes, not photographs. For Stable Video Diffusion itself add "
              f"--model {SVD} (9 GB; non-commercial licence of Stability AI)", file=sys.stderr)
    student = args.student or (STUDENT if root == TOY and STUDENT.is_file() else None)
    if args.teacher:
        student = None
    source = dict(variant=args.variant, revision=args.revision)
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype             # the VAE overflows in fp16
    vae = model.load_vae(root, dtype=vae_dtype, **source)
    image_encoder = model.load_image_encoder(root, dtype=dtype, **source)
    unet = model.load_unet(root, dtype=dtype, **source)
    if student:
        unet = load_student(student, unet, args.variant)

    num_frames = args.num_frames or unet.config["num_frames"]
    stride = 8 * 2 ** (len(unet.config["block_out_channels"]) - 1)
    asked = tuple(side or default for side, default in zip((args.width, args.height), default_size(unet)))
    width, height = (max(stride, round(v / stride) * stride) for v in asked)
    if (width, height) != asked:
        print(f"size {asked[0]}x{asked[1]} becomes {width}x{height}: this model needs multiples of {stride}",
              file=sys.stderr)
    steps = args.steps or (1 if student else 25)
    tts = steps == 1 if args.tts is None else args.tts
    guidance = (args.min_guidance_scale, args.max_guidance_scale)
    guidance = None if max(guidance) <= 1 else guidance
    if student:
        sigmas = strided(karras_sigmas(NUM_SIGMAS), 2 if tts else steps)
        evaluations, how = len(sigmas) - 1, f"{steps}-step student" + " with Time Travel Sampler" * tts
    else:
        sigmas = karras_sigmas(steps)
        evaluations, how = steps * (2 if guidance else 1), f"{steps}-step teacher"

    net = recorder(args.cuda_graph and device.type == "cuda")(unet)
    gallery = []                                                                # of f 3 h w
    for i, (name, file, image) in enumerate(image for image in images for _ in range(args.num_videos)):
        seed, (pixels, kept) = args.seed + i, fit_image(image, width, height)
        if min(kept) < 0.99 and i % args.num_videos == 0:
            print(f"{file}: cut to {kept[0]:.0%} of its width and {kept[1]:.0%} of its height, "
                  f"for {width}x{height}", file=sys.stderr)
        tail = f"_{name}" * (len(images) > 1) + f"_{seed}" * (args.num_videos > 1)
        out = args.out.with_stem(args.out.stem + tail)
        generator = torch.Generator().manual_seed(seed)
        pixels = pixels[None].to(device)                                        # 1 3 H W
        noise = draw_noise(pixels.shape, generator, device)
        with (torch.no_grad(), on_device(vae, device, args.offload),
              on_device(image_encoder, device, args.offload)):
            cond = model.encode_condition(
                vae, image_encoder, pixels, noise, num_frames=num_frames, fps=args.fps,
                motion_bucket_id=args.motion_bucket_id, noise_aug_strength=args.noise_aug_strength)
        with on_device(unet, device, args.offload):
            if student:
                x0 = sample(net, cond, sigmas, generator, tts)
            else:
                x0 = sample_teacher(net, cond, sigmas, generator, guidance, lambda r: bar(r, "denoise"))
        with on_device(vae, device, args.offload):
            frames = decode(vae, x0, args.decode_chunk_size, lambda r: bar(r, "decode"))
        if not frames.isfinite().all():
            fail(f"{file}: the networks returned NaN or infinity in {dtype}; try --dtype fp32")
        save_video(frames[0], out, args.fps)
        if args.save_latents:
            model.write_safetensors(out.with_suffix(".safetensors"), {"latents": x0[0]})
        if args.gallery:
            gallery.append(F.interpolate(frames[0], scale_factor=min(1, 256 / width), mode="area").cpu())
        print(f"wrote {out}: {num_frames} frames of {width}x{height} at {args.fps} fps, "
              f"seed {seed}, {how}, {evaluations} network evaluations, "
              f"{time.perf_counter() - start:.1f} s, {peak_memory(device):.1f} GB of "
              + "GPU " * (device.type == "cuda") + "memory")
        start = time.perf_counter()
    if args.gallery:
        save_sheet(torch.stack(gallery), args.gallery)
        print(f"wrote {args.gallery}: {len(gallery)} videos, a row each")


def cli():
    try:
        main()
    except (ModelError, OSError) as problem:
        fail(str(problem))
    except torch.OutOfMemoryError:
        fail("out of GPU memory; try --decode_chunk_size 2, --offload, or a smaller --width and --height")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
