"""Between two futures: the last frames of videos whose noise goes, in even steps, from one draw to another.

    $ python exercises/between.py                                     # 7 minutes on a CPU
    $ python exercises/between.py --clips 1 --places 5 --num_frames 4  # to see it run

The teacher's solver follows an ODE whose paths separate the futures: its video switches from one future to
the other between two noises that are close together. A student does in one network evaluation what the ODE
does in many steps, and the output of a network changes about as evenly as its input: between the two
futures it shows a blend of both. Three rows per clip: the teacher, the student in one step, the student
with the Time Travel Sampler, which evaluates the network once more on its first answer.

Prints, and writes beside the picture as JSON, how unevenly each row changes: the largest change between
neighbours divided by the mean change, averaged over clips. 1 means that all changes are equal; with 12
changes, 12 means that one of them is all the change.
"""
import math
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
from support.checkpoint import check_writable, write_json  # noqa: E402
from support.kernels import fast  # noqa: E402
from support.media import save_sheet  # noqa: E402
from toy.world import toy_clips  # noqa: E402

parser = engine.command_line("Show what lies between two futures.")
flag = parser.add_argument
flag("--out", type=Path, default="between.png", help="the picture, .png or .jpg; figures go beside it, .json")
flag("--clips", type=engine.positive, default=4, help="number of clips, held out, with one shape")
flag("--shown", type=engine.positive, default=3, help="number of clips in the picture")
flag("--places", type=engine.positive, default=13, help="number of noises, from one draw to the other")
flag("--solver_steps", type=engine.positive, default=8, help="steps of the teacher, without guidance")
flag("--num_frames", type=engine.positive, default=14, help="frames per video; the last is shown")
args = parser.parse_args()
if args.places < 3:
    parser.error(f"--places {args.places}: give at least 3, the two ends and one between them")
if args.out.suffix not in (".png", ".jpg"):
    parser.error(f"--out {args.out}: give a name that ends in .png or .jpg")
check_writable(args.out, args.out.with_suffix(".json"))

vae, image_encoder, teacher, unet = (load(sampler.TOY) for load in (
    model.load_vae, model.load_image_encoder, model.load_unet, model.load_unet))
student = load_student(sampler.STUDENT, unet)
vae, teacher, student = fast(vae), fast(teacher), fast(student)
sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
sigma_t, sigma_s, _ = solver.strided(sigmas, 2)
numbers = torch.arange(10 * args.clips)
numbers = numbers[toy_clips(data.HELD_OUT, numbers, num_frames=1).present.sum(1) == 1][:args.clips]
angle = torch.linspace(0, math.pi / 2, args.places).view(-1, 1, 1, 1, 1)                    # p 1 1 1 1
frames, uneven = [], []
for number in numbers.tolist():
    clip = toy_clips(data.HELD_OUT, torch.tensor([number]), args.num_frames)
    draw = lambda seed, shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        image = clip.frames[:, 0]                                                           # 1 3 H W
        cond = model.encode_condition(
            vae, image_encoder, image, draw(0, image.shape), num_frames=args.num_frames, fps=data.FPS,
            motion_bucket_id=clip.motion_bucket_id, noise_aug_strength=0.02)
        cond = model.Cond(*(x.expand(args.places, *x.shape[1:]) for x in cond))             # p ..
        start, end, fresh = (draw(seed, cond.image_latents.shape[1:]) for seed in (1, 2, 3))
        x_t = sigma_t * (angle.cos() * start + angle.sin() * end)                           # p f c h w
        future = solver.solve(teacher, x_t, solver.strided(sigmas, args.solver_steps), cond)
        once = solver.consistency(student, x_t, sigma_t, cond)
        x_s = once + sigma_s * (fresh + (x_t - once) / sigma_t) / 2     # Eq. 13, as in sampler.time_travel
        twice = solver.consistency(student, x_s, sigma_s, cond)
    last = torch.stack([sampler.decode(vae, x)[:, -1] for x in (future, once, twice)])      # 3 p 3 H W
    change = last.diff(dim=1).abs().mean((2, 3, 4))                                         # 3 p-1
    uneven.append(change.amax(1) / change.mean(1))
    frames.append(last)
    print(f"clip {number:3}: " + ", ".join(f"{name} {value:.1f}" for name, value in zip(
        ("teacher", "one step", "Time Travel"), uneven[-1].tolist())), flush=True)

mean = torch.stack(uneven).mean(0).tolist()
result = dict(zip(("teacher", "one_step", "time_travel"), mean)) | {
    "clips": numbers.tolist(), "places": args.places, "solver_steps": args.solver_steps,
    "num_frames": args.num_frames}
save_sheet(torch.cat(frames[:args.shown]), args.out)
write_json(args.out.with_suffix(".json"), result)
print(f"mean of {len(numbers)}: teacher {mean[0]:.2f}, one step {mean[1]:.2f}, Time Travel {mean[2]:.2f}; "
      f"wrote {args.out}")
