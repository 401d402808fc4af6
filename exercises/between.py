"""Between two futures: the last frames of a video whose noise goes, in even steps, from one draw to another.

    $ python exercises/between.py                                     # 7 minutes on a CPU
    $ python exercises/between.py --clips 1 --places 5 --num_frames 4  # to see it run

The teacher's solver follows an ODE that parts the futures: it turns from one to the next between two places
that are close together. A student has to do at once what takes the ODE many steps, and a network changes
about as evenly as its input does: on the way it answers with both. Three rows a clip: the teacher,
the student in one step, the student with the Time Travel Sampler, which looks at its first answer once more.

Prints, and writes beside the picture as JSON, how uneven the ways are: the largest change between neighbours
over the mean change, averaged over clips. 1 is as even as can be; 12 means all 12 steps' change is in one.
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import engine  # noqa: E402
import model  # noqa: E402
import sampler  # noqa: E402
import solver  # noqa: E402

parser = engine.command_line("What lies between two futures.")
flag = parser.add_argument
flag("--out", type=Path, default="between.png", help="the picture, .png or .jpg; figures go beside it, .json")
flag("--clips", type=engine.positive, default=4, help="pictures with one shape, of the first held-out ones")
flag("--shown", type=engine.positive, default=3, help="how many of them are in the picture")
flag("--places", type=engine.positive, default=13, help="on the way from one draw of noise to the other")
flag("--solver_steps", type=engine.positive, default=8, help="of the teacher, without guidance")
flag("--num_frames", type=engine.positive, default=14, help="of each video, of which the last is shown")
args = parser.parse_args()
if args.places < 3:
    parser.error(f"--places {args.places}: a way has two ends and something between them")
if args.out.suffix not in (".png", ".jpg") or not args.out.parent.is_dir():
    parser.error(f"--out {args.out}: the name must end in .png or .jpg, in a folder that is there")

vae, image_encoder, teacher, unet = (load(sampler.TOY) for load in (
    model.load_vae, model.load_image_encoder, model.load_unet, model.load_unet))
student = model.load_student(sampler.STUDENT, unet)
sigmas = solver.karras_sigmas(solver.NUM_SIGMAS)
sigma_t, sigma_s, _ = solver.strided(sigmas, 2)
numbers = torch.arange(10 * args.clips)
numbers = numbers[data.toy_clips(data.HELD_OUT, numbers, num_frames=1).present.sum(1) == 1][:args.clips]
angle = torch.linspace(0, math.pi / 2, args.places).view(-1, 1, 1, 1, 1)                    # p 1 1 1 1
frames, uneven = [], []
for number in numbers.tolist():
    clip = data.toy_clips(data.HELD_OUT, torch.tensor([number]), args.num_frames)
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
        x_s = once + sigma_s * (fresh + (x_t - once) / sigma_t) / 2     # as sampler.time_travel
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
data.save_sheet(torch.cat(frames[:args.shown]), args.out)
model.write_json(args.out.with_suffix(".json"), result)
print(f"mean of {len(numbers)}: teacher {mean[0]:.2f}, one step {mean[1]:.2f}, Time Travel {mean[2]:.2f}; "
      f"wrote {args.out}")
