"""Samplers, and the command line that turns a picture into a video.

    $ python sampler.py --image in.png                                 # the toy world, on any computer
    $ python sampler.py --image in.png --teacher --steps 25            # the teacher instead of the student
    $ python sampler.py --image in.png --model stabilityai/stable-video-diffusion-img2vid
    $ python sampler.py --image in.png --num_videos 8 --gallery seeds.png      # one picture, eight futures

    draw_noise          standard normal noise, one generator per clip
    sample              a student: 1 step, k steps, or (tts=True) the Time Travel Sampler
    time_travel         the Time Travel Sampler, with a choice of readouts
    sample_teacher      the guided ODE solver; SVD uses 25 steps
    decode              latents -> frames
    Sheets              sample pictures of a training run
    main                the command line

A sampler is a function of a network, a condition and noise levels. Noise is drawn on the CPU with one
generator per clip. A seed therefore gives the same noise on every device and in every batch.

OSV, arXiv 2409.11367, section 4.3 (Time Travel Sampler). Versions 1 and 2 of the paper print different
equations for it; see time_travel.
"""
import itertools
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import model
from lora import load_student, lora_file
from solver import NUM_SIGMAS, consistency, karras_sigmas, precondition, solve, strided
from support import checkpoint
from support.checkpoint import ASSETS, DTYPES, SVD, write_safetensors
from support.engine import choose_device, command_line, cuda_graph, fail, peak_memory
from support.kernels import fast
from support.media import find_images, fit_image, load_images, save_sheet, save_video

TOY = ASSETS / "toy"
STUDENT = TOY / "student.safetensors"

# ---------------------------------------------------------------------------------------------------------
# Samplers


def draw_noise(shape, generator, device):
    """Standard normal noise [b ...] on `device`.

    generator: a CPU generator for all clips, or a list with one per clip. Drawing on the CPU makes the noise
    of a seed the same on every device.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * shape[0]
    assert len(generators) == shape[0], f"{len(generators)} generators for {shape[0]} clips"
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)


@torch.no_grad()
def sample(net, cond, sigmas, generator, tts=False):
    """A student's samples x0 [b f 4 h w] (scaled latents), by multistep consistency sampling
    (consistency models, arXiv 2303.01469, Algorithm 1).

    sigmas [k + 1] is descending with a trailing 0, usually `strided(karras_sigmas(NUM_SIGMAS), k)`. Each of
    the k network evaluations jumps to the end of the ODE; fresh noise then leads to the next noise level.
    tts: use the Time Travel Sampler instead. It needs k = 2: the second level is its look-ahead level.
    """
    if tts:
        assert len(sigmas) == 3, f"the Time Travel Sampler takes 2 levels and 0, not {len(sigmas)} values"
        return time_travel(net, cond, sigmas[0], sigmas[1], generator)
    shape, device = cond.image_latents.shape, cond.image_latents.device
    x_t = sigmas[0] * draw_noise(shape, generator, device)                      # b f 4 h w
    for i in range(len(sigmas) - 1):
        x0_pred = consistency(net, x_t, sigmas[i], cond)                        # OSV Eq. 4
        if sigmas[i + 1] > 0:
            x_t = x0_pred + sigmas[i + 1] * draw_noise(shape, generator, device)
    return x0_pred


@torch.no_grad()
def time_travel(net, cond, sigma_t, sigma_s, generator, readout="look_ahead"):
    """The Time Travel Sampler, in place of one step: 2 network evaluations, the first at sigma_t, the second
    at the lower look-ahead level sigma_s. Returns x0 [b f 4 h w]. OSV v2, Eq. 13:

        f = f_theta(x_t, sigma_t)                       first estimate of the clean latent
        eps = (eps_0 + (x_t - f) / sigma_t) / 2         mean of fresh noise and the noise that f implies
        f' = f_theta(f + sigma_s eps, sigma_s)          second estimate, from the look-ahead level

    readout selects what is returned:
        "look_ahead"    f', the default.
        "printed"       Eq. 13 as printed. It weights the second raw output with the scalings of sigma_t. This
                        leaves the error -c_skip(sigma_s) x_s, visible as noise unless sigma_s is large.
        "v1"            Eq. 11 of version 1 of the paper, which adds no noise between the evaluations. The
                        first evaluation gets sigma_s although its input has noise level sigma_t; the second
                        gets sigma_t although its input is the first estimate, without noise.
    """
    shape, device = cond.image_latents.shape, cond.image_latents.device
    x_t = sigma_t * draw_noise(shape, generator, device)                        # b f 4 h w
    if readout == "v1":
        return consistency(net, consistency(net, x_t, sigma_s, cond), sigma_t, cond)    # OSV v1, Eq. 11
    x0_pred = consistency(net, x_t, sigma_t, cond)                              # Eq. 4: f
    fresh = draw_noise(shape, generator, device)                                # Eq. 13: eps_0
    x_s = x0_pred + sigma_s * (fresh + (x_t - x0_pred) / sigma_t) / 2           # Eq. 13: f + sigma_s eps
    x0_pred = consistency(net, x_s, sigma_s, cond)                              # Eq. 13: f'
    if readout == "look_ahead":
        return x0_pred
    at_s, at_t = precondition(sigma_s), precondition(sigma_t)
    F_x = (x0_pred - at_s.c_skip * x_s) / at_s.c_out                            # Eq. 4, solved for F
    eps = (fresh + (x_s - x0_pred) / sigma_s) / 2
    return at_t.c_skip * (x0_pred + sigma_t * eps) + at_t.c_out * F_x           # Eq. 13 as printed


@torch.no_grad()
def sample_teacher(net, cond, sigmas, generator, guidance=None, progress=iter):
    """A teacher's samples x0 [b f 4 h w]: the guided Euler solver (OSV Eq. 8), starting from noise.

    SVD is used with sigmas = karras_sigmas(25). guidance: None, a number, a tensor (see solver.guided), or
    (low, high), to grow linearly from the first frame to the last. progress: wraps the loop (tqdm).
    """
    shape, device = cond.image_latents.shape, cond.image_latents.device
    if isinstance(guidance, tuple):
        guidance = torch.linspace(*guidance, shape[1], device=device).view(1, -1, 1, 1, 1)     # 1 f 1 1 1
    # Data of unit variance plus noise of variance sigma^2 has variance sigma^2 + 1.
    x_t = (sigmas[0] ** 2 + 1) ** 0.5 * draw_noise(shape, generator, device)    # b f 4 h w
    return solve(net, x_t, sigmas, cond, guidance, progress)                    # OSV Eq. 8


@torch.no_grad()
def decode(vae, x0, decode_chunk_size=None, progress=iter):
    """Scaled latents x0 [b f 4 h w] -> frames [b f 3 H W] in [-1, 1].

    decode_chunk_size: frames decoded together (default: whole clips, small ones several at a time). Smaller
    chunks need less memory. The temporal layers of the decoder do not see across a cut, so frames near one
    change slightly.
    """
    num_frames = x0.shape[1]
    latents = rearrange(x0 / vae.config["scaling_factor"], "b f c h w -> (b f) c h w")
    if decode_chunk_size:
        parts = [part for clip in latents.split(num_frames) for part in clip.split(decode_chunk_size)]
    else:                               # several small clips together, up to the size of one SVD clip
        clips_together = max(1, 14 * 72 * 128 // x0[0, :, 0].numel())
        parts = latents.split(clips_together * num_frames)
    frames = torch.cat([vae.decode(part, min(len(part), num_frames)).float() for part in progress(parts)])
    return rearrange(frames.clamp(-1, 1), "(b f) c h w -> b f c h w", f=num_frames)


class Sheets:
    """Sample pictures of a training run. Each row shows the same clips: real, from the teacher, from one step
    of the student, and from one step with the Time Travel Sampler.

    net must be the teacher when the object is made and the student when `save` is called. x0 [n f 4 h w] and
    cond: real clips. seed: of the first clip; later clips use the next numbers.
    """

    def __init__(self, net, vae, x0, cond, teacher_steps, seed):
        self.net, self.vae, self.cond, self.seed = net, vae, cond, seed
        teacher = self.draw(sample_teacher, karras_sigmas(teacher_steps), guidance=(1.0, 3.0))
        self.fixed_rows = [decode(vae, x).cpu() for x in (x0, teacher)]         # n f 3 H W each

    def draw(self, sampler, sigmas, **options):
        """Samples x0 [n f 4 h w], one clip at a time, so that memory does not grow with n."""
        samples = []
        for i, cond in enumerate(zip(*(tensor.split(1) for tensor in self.cond))):
            generator = torch.Generator().manual_seed(self.seed + i)
            samples.append(sampler(self.net, model.Cond(*cond), sigmas, generator, **options))
        return torch.cat(samples)

    def save(self, folder, step, fps):
        """Writes sample-STEP.png (a contact sheet) and sample-STEP.mp4 (all clips in a grid). Returns the
        PSNR of one step against the real clips, in dB. Frames of 512 pixels and more are written at about
        256, because a sheet has 16 clips."""
        sigmas = karras_sigmas(NUM_SIGMAS)
        students = self.draw(sample, strided(sigmas, 1)), self.draw(sample, strided(sigmas, 2), tts=True)
        rows = torch.cat(self.fixed_rows + [decode(self.vae, x0).cpu() for x0 in students])
        shrink = max(1, rows.shape[-1] // 256)
        small = F.avg_pool3d(rows, (1, shrink, shrink))                                 # (rows n) f 3 h w
        save_sheet(small, folder / f"sample-{step:06d}.png")
        grid = rearrange(small, "(rows n) f c h w -> f c (rows h) (n w)", rows=4)
        save_video(grid, folder / f"sample-{step:06d}.mp4", fps)
        real, _, one_step, _ = rows.chunk(4)                                            # n f 3 H W each
        return 10 * (4 / F.mse_loss(one_step, real)).log10().item()                     # pixels in [-1, 1]


# ---------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The flags, with --model and --student of the toy model filled in."""
    parser = command_line("Turn a picture into a video.", usage="%(prog)s --image IN [--out OUT] [options]",
                          memory_hint="try --decode_chunk_size 2, --offload, or smaller --width and --height")

    flag = parser.add_argument_group("what").add_argument
    flag("--image", nargs="+", required=True, metavar="IN", help="pictures, folders of them, or - for stdin")
    flag("--out", type=Path, default="out.mp4", help=".mp4, .gif, .png; picture and seed added if several")
    flag("--num_videos", default=1, help="videos per picture, with consecutive seeds")
    flag("--gallery", type=Path, metavar="PNG", help="also write one contact sheet with a row per video")
    flag("--save_latents", action="store_true", help="also write the latents, as .safetensors")
    flag("--num_frames", help="length (default: what the model was trained for)")
    flag("--width", help="pixels (default: 1024 for SVD, 128 in the toy world)")
    flag("--height", help="pixels (default: 576 or 128); multiples of 64, toy: 16")
    flag("--fps", default=7, help="frames per second")
    flag("--motion_bucket_id", default=127, help="amount of motion, 1 to 255")
    flag("--noise_aug_strength", default=0.02, help="noise on the picture")
    flag("--seed", default=0, help="of the first video; + 1 for each later one")

    flag = parser.add_argument_group("with which model").add_argument
    flag("--model", default="toy", help=f"toy, a folder in the diffusers layout, or a hub id such as {SVD}")
    flag("--variant", help="weights to read, e.g. fp16 for *.fp16.safetensors")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--student", metavar="PATH", help="distilled UNet (folder, hub id, file) or LoRA (folder, file)")
    flag("--teacher", action="store_true", help="use the model's own UNet, even if there is a student")

    flag = parser.add_argument_group("how").add_argument
    flag("--steps", help="solver steps (default: 1 for a student, 25 for a teacher)")
    flag("--tts", action="store_true", default=None, help="Time Travel Sampler (default: on with --steps 1)")
    flag("--no_tts", dest="tts", action="store_false", default=None, help="one step, one network evaluation")
    flag("--min_guidance_scale", default=1.0, help="of the teacher, first frame")
    flag("--max_guidance_scale", default=3.0, help="and its last frame; neither above 1: off")
    flag("--decode_chunk_size", help="frames at once; fewer save memory (default: all)")
    flag("--offload", action="store_true", help="keep each network on the GPU only while it runs")
    flag("--cuda_graph", action="store_true", help="record the UNet as a CUDA graph; fast after 4 calls")
    flag("--plain", action="store_true", help="use the layers of model.py, without support/kernels.py")
    flag("--dtype", choices=DTYPES, help="of the networks (default: bf16 on GPUs that have it, else fp32)")
    flag("--device", help="cuda, mps or cpu (default: the first of these that is available)")

    args = parser.parse_args(argv)
    for file, suffixes in ((args.out, (".mp4", ".gif", ".png")), (args.gallery, (".png",))):
        if file and file.suffix not in suffixes:
            fail(f"{file}: the name must end in {' or '.join(suffixes)}")
    if args.teacher and args.student:
        fail("--teacher does not go with --student: leave one of them out")
    if args.offload and args.cuda_graph:
        fail("--offload does not go with --cuda_graph: a recorded graph needs the weights to stay in place")
    if args.model == "toy":
        args.model = TOY
        args.student = args.student or (STUDENT if STUDENT.is_file() and not args.teacher else None)
    if args.tts and (not args.student or args.steps not in (None, 1)):
        fail("--tts: the Time Travel Sampler is for a student, in place of one step")
    if args.student and (args.steps or 1) > NUM_SIGMAS:
        fail(f"--steps {args.steps}: a student has {NUM_SIGMAS} noise levels, and so at most as many steps")
    return args


def plan_videos(args):
    """[(picture, seed, output file)], all videos of a picture in a row. Raises ModelError if a file would
    overwrite an input, OSError if no file can be written there."""
    images, videos = find_images(args.image), []
    for name, path in images:
        for _ in range(args.num_videos):
            seed = args.seed + len(videos)
            suffix = f"_{name}" * (len(images) > 1) + f"_{seed}" * (args.num_videos > 1)
            videos.append((path, seed, args.out.with_stem(args.out.stem + suffix)))
    files = [file for _, _, file in videos]
    latents = [file.with_suffix(".safetensors") for file in files if args.save_latents]
    folders = "", "unet", "vae", "image_encoder"
    networks = [Path(path, name) for path in (args.model, args.student) if path for name in folders]
    checkpoint.refuse_overwriting([*files, *latents, args.gallery], [path for _, path in images] + networks)
    checkpoint.check_writable(*files, *latents, args.gallery)
    return videos


def load_networks(args, dtype):
    """(UNet, VAE, image encoder) of --model. With --student, the UNet is the student."""
    if args.model == TOY:
        print("toy model: it knows moving shapes, not photographs. For Stable Video Diffusion itself add "
              f"--model {SVD} (9 GB; non-commercial licence of Stability AI)", file=sys.stderr)
    source = dict(variant=args.variant, revision=args.revision)
    # The VAE overflows in fp16.
    vae = model.load_vae(args.model, dtype=torch.float32 if dtype == torch.float16 else dtype, **source)
    image_encoder = model.load_image_encoder(args.model, dtype=dtype, **source)
    # A LoRA is merged in fp32: in bf16 the sum would lose small updates.
    merges = args.student and lora_file(args.student).is_file()
    unet = model.load_unet(args.model, dtype=torch.float32 if merges else dtype, **source)
    if args.student:
        unet = load_student(args.student, unet, args.variant).to(dtype)
    checkpoint.check_fit(unet, vae, image_encoder)
    if not args.plain:
        unet, vae = fast(unet), fast(vae)
    return unet, vae, image_encoder


def choose_size(args, unet):
    """(width, height) of the video in pixels, multiples of the total downsampling of VAE and UNet."""
    stride, default = model.pixel_stride(unet), model.default_size(unet)
    asked = args.width or default[0], args.height or default[1]
    width, height = (max(stride, round(side / stride) * stride) for side in asked)
    if (width, height) != asked:
        print(f"size {asked[0]}x{asked[1]} becomes {width}x{height}, multiples of {stride}", file=sys.stderr)
    return width, height


def choose_sampler(args, net, device):
    """(draw, its description), where draw(cond, generator=generator) -> x0 [b f 4 h w]."""
    if args.cuda_graph and device.type == "cuda":
        net = cuda_graph(net)
    if args.student:
        steps = args.steps or 1
        tts = steps == 1 if args.tts is None else args.tts
        sigmas = strided(karras_sigmas(NUM_SIGMAS), 2 if tts else steps)
        name = f"{steps}-step student" + " with Time Travel Sampler" * tts
        return partial(sample, net, sigmas=sigmas, tts=tts), f"{name}, network evaluations: {len(sigmas) - 1}"
    steps, guidance = args.steps or 25, (args.min_guidance_scale, args.max_guidance_scale)
    guidance = guidance if max(guidance) > 1 else None
    draw = partial(sample_teacher, net, sigmas=karras_sigmas(steps), guidance=guidance,
                   progress=progress_bar("denoise"))
    return draw, f"{steps}-step teacher, network evaluations: {steps * (2 if guidance else 1)}"


def progress_bar(name):
    """A function that adds a progress bar to a sequence, if it has two elements or more, on a terminal."""
    return lambda steps: tqdm(steps, name, leave=False, disable=len(steps) < 2 or None)


@contextmanager
def on_device(net, device, offload):
    """Moves a network to the device inside a with statement, and with `offload` back to the CPU after it."""
    yield net.to(device)
    if offload:
        net.to("cpu")


@torch.no_grad()
def make_video(args, networks, draw, pixels, seed):
    """Picture [3 H W] in [-1, 1] -> latents x0 [f 4 h w] and frames [f 3 H W] in [-1, 1]."""
    unet, vae, image_encoder = networks
    place = partial(on_device, device=pixels.device, offload=args.offload)
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise((1, *pixels.shape), generator, pixels.device)            # 1 3 H W
    with place(vae), place(image_encoder):
        cond = model.encode_condition(
            vae, image_encoder, pixels[None], noise, num_frames=args.num_frames or unet.config["num_frames"],
            fps=args.fps, motion_bucket_id=args.motion_bucket_id, noise_aug_strength=args.noise_aug_strength)
    with place(unet):
        x0 = draw(cond, generator=generator)                                    # 1 f 4 h w
    with place(vae):
        frames = decode(vae, x0, args.decode_chunk_size, progress_bar("decode"))        # 1 f 3 H W
    return x0[0], frames[0]


def main():
    start = time.perf_counter()
    args = parse_args()
    videos = plan_videos(args)
    pictures = load_images([path for path, _, _ in videos[::args.num_videos]])
    first = next(pictures)                          # before the networks: there may be no readable picture
    device = choose_device(args.device)
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = DTYPES[args.dtype or ("bf16" if has_bf16 else "fp32")]
    networks = load_networks(args, dtype)
    unet = networks[0]
    width, height = choose_size(args, unet)
    draw, description = choose_sampler(args, unet, device)

    gallery, num_read = [], 0                                           # f 3 h w each
    for i, path, image in itertools.chain([first], pictures):
        num_read += 1
        pixels, kept = fit_image(image, width, height)                  # 3 H W
        if min(kept) < 0.99:
            print(f"{path}: cut to {kept[0]:.0%} of its width, {kept[1]:.0%} of its height", file=sys.stderr)
        for _, seed, out in videos[i * args.num_videos:(i + 1) * args.num_videos]:
            x0, frames = make_video(args, networks, draw, pixels.to(device), seed)
            if not frames.isfinite().all():
                fail(f"{path}: NaN or infinity in {dtype}: try --dtype fp32, or other weights")
            save_video(frames, out, args.fps)
            if args.save_latents:
                write_safetensors(out.with_suffix(".safetensors"), {"latents": x0})
            if args.gallery:
                gallery.append(F.interpolate(frames, scale_factor=min(1, 256 / width), mode="area").cpu())
            print(f"wrote {out}: {len(frames)} frames of {width}x{height} at {args.fps} fps, seed {seed}, "
                  f"{description}, {time.perf_counter() - start:.1f} s, {peak_memory(device):.1f} GB of "
                  f"{'GPU ' * (device.type == 'cuda')}memory")
            start = time.perf_counter()
    if args.gallery:
        save_sheet(torch.stack(gallery), args.gallery)
        print(f"wrote {args.gallery}: {len(gallery)} videos, one per row")
    if num_left_out := len(videos) // args.num_videos - num_read:
        fail(f"pictures left out, because they cannot be read: {num_left_out}")


if __name__ == "__main__":
    main()
