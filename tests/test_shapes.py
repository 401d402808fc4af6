"""toy/shapes.py: no defect in clips of the renderer, and the right one in damaged clips."""
import pytest
import torch

from support.media import to_bytes
from toy import shapes, world

SEED = 7


@pytest.fixture(scope="module")
def clips():
    """Scene, Motion and another Motion of eight clips with two shapes, at least 1 unit per frame fast."""
    numbers = torch.arange(64)
    start = world.scene(SEED, numbers)
    bucket = world.paths(start, SEED, numbers, 1).bucket
    numbers = numbers[start.present.all(1) & (bucket > 32)][:8]
    start = world.scene(SEED, numbers)
    return start, *(world.paths(start, SEED, numbers, 14, motion_seed) for motion_seed in (None, SEED + 1))


@pytest.fixture(scope="module")
def damaged(clips):
    """{damage: frames} of these clips."""
    return {name: to_bytes(frames) for name, frames in shapes.damages(*clips, 128).items()}


def share(frames, start, bucket):
    return {name: x.float().mean().item() for name, x in shapes.inspect(frames, start, bucket).items()}


def test_clips_of_the_renderer_have_no_defect():
    """Slow and fast ones, with one shape and two. Also other futures of the same scenes."""
    numbers = torch.arange(20)
    start = world.scene(SEED, numbers)
    for motion_seed in (None, SEED + 1):
        real = world.toy_clips(SEED, numbers, motion_seed=motion_seed)
        found = shapes.inspect(to_bytes(real.frames), start, real.motion_bucket_id)
        moved = found.pop("moved")
        assert set(found) == {*shapes.DEFECTS, "astray"} and not torch.stack([*found.values()]).any(), found
        true = real.centres.diff(dim=1).norm(dim=-1).mean(dim=1)                            # b n
        true = (true * real.present).sum(1) / real.present.sum(1)
        assert (moved - true).abs().max() < 0.5 and torch.corrcoef(torch.stack((moved, true)))[0, 1] > 0.999


def test_centres_are_found(clips):
    """To half a pixel, and to two pixels where up to 0.3 of a shape are hidden."""
    start, motion, _ = clips
    pixels = world.painting(start, motion, 128)[0] / 2 + 0.5
    centres = shapes.fit(shapes.segment(pixels, start), start)
    distance = (centres - motion.centres).norm(dim=-1)
    visible = shapes.in_front(shapes.outlines(motion.centres, start, 128)).sum((3, 4))
    whole = (shapes.outlines(motion.centres, start, 128) < 0).sum((3, 4))
    assert distance[visible == whole].max() < 0.5 and distance[visible > 0.7 * whole].max() < 2


@pytest.mark.parametrize("name, expected", [
    ("kind", "kind"), ("squash", "size"), ("melt", "colour"), ("split", "parts"), ("ghost", "kind"),
    ("drift", "colour"), ("freeze", "astray"), ("jump", "astray")])
def test_damage_is_found(name, expected, clips, damaged):
    start, motion, _ = clips
    found = share(damaged[name], start, motion.bucket)
    assert found[expected] >= 0.75, found
    if name in ("freeze", "jump"):                      # whole shapes that move wrongly
        assert not any(found[defect] for defect in shapes.DEFECTS), found


def test_a_clip_that_moves_at_another_speed_is_astray(clips):
    start, motion, _ = clips
    frames = to_bytes(world.painting(start, motion, 128)[0])
    fast = share(frames, start, (motion.bucket * 2.5).long())
    slow = share(frames, start, motion.bucket * 0)
    assert fast["astray"] >= 0.75 and slow["astray"] >= 0.75


def test_shapes_that_vanish_have_no_size(clips):
    start, _, _ = clips
    pixel = torch.arange(128) + 0.5
    empty = world.background(start, pixel[None], pixel[:, None])[:, None].expand(-1, 14, -1, -1, -1)
    assert share(to_bytes(empty * 2 - 1), start, torch.full((len(empty),), 100))["size"] == 1


def test_verdicts_do_not_depend_on_the_batch(clips, damaged, monkeypatch):
    (start, motion, _), frames = clips, damaged["ghost"]
    whole = shapes.inspect(frames, start, motion.bucket)
    monkeypatch.setattr(shapes, "CHUNK", 3 * 14 * 128 * 128)
    parts = shapes.inspect(frames, start, motion.bucket)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_clips_may_be_short(num_frames):
    clips = world.toy_clips(SEED, torch.arange(2), num_frames)
    found = shapes.inspect(to_bytes(clips.frames), world.scene(SEED, torch.arange(2)), clips.motion_bucket_id)
    assert not any(x.any() for name, x in found.items() if name != "moved")
