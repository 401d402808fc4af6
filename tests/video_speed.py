"""Measures how fast clips are decoded from videos, on the CPU, in one minute. Run by hand, not by pytest:

    $ python tests/video_speed.py --report results/videos.json

Decodes clips of 14 frames at random start times of a 1080p H.264 video with 30 frames per second; the unit is
clips per second and process. For comparison, it decodes the whole video in order. It also opens a list of a
million rows.
"""
import sys
import tempfile
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
from support import checkpoint, engine, media  # noqa: E402
from tools import bench  # noqa: E402

parser = engine.command_line("Measure how fast clips are decoded from videos.")
parser.add_argument("--num_frames", type=engine.positive, default=14, help="frames per clip")
parser.add_argument("--seconds", type=engine.positive, default=6, help="length of the video")
parser.add_argument("--clips", type=engine.positive, default=16, help="clips decoded at each size")
parser.add_argument("--device", choices=["cpu"], default="cpu", help="where it runs")
parser.add_argument("--report", type=Path, help="JSON file to write")
args = parser.parse_args()
rows = []

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    pattern = F.interpolate(255 * torch.rand(1, 3, 27, 48), (1080, 1920), mode="bilinear")[0]
    pattern = pattern.byte().permute(1, 2, 0)                                               # H W 3
    frames = torch.stack([pattern.roll((i, 7 * i), (0, 1)) for i in range(30 * args.seconds)])
    media.write_mp4(frames.numpy(), folder / "video.mp4", 30)
    before = time.perf_counter()
    with av.open(str(folder / "video.mp4")) as container:
        container.streams.video[0].codec_context.thread_count = 1
        count = sum(1 for _ in container.decode(video=0))
    rows.append(bench.tell("1080p H.264, plain decode from beginning to end, one thread",
                           frames_per_s=count / (time.perf_counter() - before)))
    for width, height in ((576, 320), (1024, 576)):
        clips = data.Clips(data.open_files(folder), 0, args.num_frames, width, height, workers=1)
        clips.clip(0)                                                   # starts the process
        before = time.perf_counter()
        for number in range(1, args.clips + 1):
            clips.clip(number)
        per_second = args.clips / (time.perf_counter() - before)
        latent = args.num_frames * 4 * (height // 8) * (width // 8) * 2
        rows.append(bench.tell(f"1080p H.264 -> {args.num_frames} frames of {width}x{height}",
                               clips_per_s_and_process=per_second,
                               encoded_mb_per_1000_clips=latent * (1 + 1 / args.num_frames) / 1e3))
    with open(folder / "list.csv", "w") as file:
        file.write("video,caption,motion score\n")
        file.writelines(f"clip_{i}.mp4,{'some words ' * 50},{i % 20}\n" for i in range(1_000_000))
    before = time.perf_counter()
    files = data.open_files(folder / "list.csv", [("motion score", 2, 20)])
    rows.append(bench.tell(f"list of 1,000,000 rows, {len(files):,d} left", s=time.perf_counter() - before))

if args.report:
    checkpoint.write_json(args.report, {**evaluate.record(args), "videos": rows})
