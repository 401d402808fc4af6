"""Shows why guidance ruins a student: its video with the picture, its video without, and points on the line
through the two.

    $ python exercises/guidance.py                                     # a minute on a CPU
    $ python exercises/guidance.py --clips 1 --num_frames 4            # to see it run

Six rows per clip: the real clip; the student in one step; the student with the same noise and without the
picture; guidance of 1.5 and of 3, that is f_u + w (f_c - f_u); the teacher in 8 steps, without the picture.

At a low noise level, a denoiser's answers with and without the picture show the same scene, and their
difference is what the picture adds. In one step from pure noise they are two different scenes, and a point
on the line through two scenes is no scene of the toy world. Prints how far apart the two answers are, the
norm of f_c - f_u divided by that of f_c, for the student in one step and for the teacher at each of its
noise levels.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import solver  # noqa: E402
from lora import load_student  # noqa: E402
from support import engine  # noqa: E402
from support.checkpoint import check_writable  # noqa: E402
from support.kernels import fast  # noqa: E402
from support.media import save_sheet  # noqa: E402
from toy.world import toy_clips  # noqa: E402

parser = engine.command_line("Show why guidance ruins a student.")
flag = parser.add_argument
flag("--out", type=Path, default="guidance.png", help="the picture, .png or .jpg")
flag("--clips", type=engine.positive, default=2, help="number of held-out clips")
flag("--solver_steps", type=engine.positive, default=8, help="steps of the teacher")
flag("--num_frames", type=engine.positive, default=14, help="frames per video")
args = parser.parse_args()
if args.out.suffix not in (".png", ".jpg"):
    parser.error(f"--out {args.out}: give a name that ends in .png or .jpg")
check_writable(args.out)

vae, image_encoder, teacher, unet = (load(sampler.TOY) for load in (
    model.load_vae, model.load_image_encoder, model.load_unet, model.load_unet))
student = load_student(sampler.STUDENT, unet)
vae, teacher, student = fast(vae), fast(teacher), fast(student)
clips = toy_clips(data.HELD_OUT, torch.arange(args.clips), args.num_frames)
generators = lambda seed: [torch.Generator().manual_seed(seed + i) for i in range(args.clips)]
apart = lambda f_c, f_u: ((f_c - f_u).norm() / f_c.norm()).item()

with torch.no_grad():
    image = clips.frames[:, 0]                                                              # b 3 H W
    cond = model.encode_condition(
        vae, image_encoder, image, sampler.draw_noise(image.shape, generators(100), image.device),
        num_frames=args.num_frames, fps=data.FPS, motion_bucket_id=clips.motion_bucket_id,
        noise_aug_strength=0.02)
    blind = model.unconditional(cond)
    one_step = solver.strided(solver.karras_sigmas(solver.NUM_SIGMAS), 1)
    f_c, f_u = (sampler.sample(student, c, one_step, generators(0)) for c in (cond, blind))     # b f c h w
    print(f"student, sigma {one_step[0]:8.3f}: {apart(f_c, f_u):.2f}")
    sigmas = solver.karras_sigmas(args.solver_steps)
    x_t = sigmas[0] * sampler.draw_noise(f_c.shape, generators(0), f_c.device)
    for sigma_t, sigma_s in zip(sigmas, sigmas[1:]):
        answers = [solver.consistency(teacher, x_t, sigma_t, c) for c in (cond, blind)]
        print(f"teacher, sigma {sigma_t:8.3f}: {apart(*answers):.2f}")
        x_t = solver.euler_step(x_t, answers[0], sigma_t, sigma_s)
    without = sampler.sample_teacher(teacher, blind, sigmas, generators(0))
    rows = [f_c, f_u, *(f_u + w * (f_c - f_u) for w in (1.5, 3.0)), without]
    rows = [clips.frames, *(sampler.decode(vae, x0) for x0 in rows)]                        # b f 3 H W each
save_sheet(torch.stack([clip for clips in zip(*rows) for clip in clips]), args.out, shrink=2)
print(f"wrote {args.out}: {len(rows)} rows for each of {args.clips} clips")
