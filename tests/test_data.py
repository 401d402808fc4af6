"""toy/world.py: clips are pure functions of (seed, index), values are in range, the motion bucket is the
speed, frame 0 does not show the direction of motion."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import data
import model
from support import engine, media
from toy import world

CLIPS = world.toy_clips(3, torch.arange(12))


def test_a_clip_is_a_function_of_seed_and_index():
    one_by_one = [world.toy_clips(3, torch.tensor([i])) for i in (7, 2)]
    shuffled = world.toy_clips(3, torch.tensor([2, 5, 7]))
    for name in world.ToyClips._fields:
        expected = getattr(CLIPS, name)[[7, 2]]
        assert torch.equal(torch.cat([getattr(clip, name) for clip in one_by_one]), expected), name
        assert torch.equal(getattr(shuffled, name)[[2, 0]], expected), name
    assert not torch.equal(world.toy_clips(4, torch.arange(1)).frames, CLIPS.frames[:1])


def test_large_requests_are_rendered_in_parts(monkeypatch):
    monkeypatch.setattr(world, "CHUNK", 5 * 14 * 128 * 128)
    for parts, whole in zip(world.toy_clips(3, torch.arange(12)), CLIPS):
        assert torch.equal(parts, whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_clips_on_the_gpu():
    gpu = world.toy_clips(3, torch.arange(12), device="cuda")
    assert torch.equal(gpu.motion_bucket_id.cpu(), CLIPS.motion_bucket_id)
    assert torch.equal(gpu.attributes.cpu(), CLIPS.attributes)
    assert (gpu.frames.cpu() - CLIPS.frames).abs().max() < 1e-2     # sin, atan2 and friends round differently


def test_shapes_and_range():
    assert CLIPS.frames.shape == (12, 14, 3, 128, 128) and CLIPS.frames.dtype == torch.float32
    assert CLIPS.frames.min() >= -1 and CLIPS.frames.max() <= 1
    assert CLIPS.frames.std() > 0.2
    assert CLIPS.attributes.shape == (12, world.NUM_ATTRIBUTES)
    assert CLIPS.attributes.dtype == torch.float32 and set(CLIPS.attributes.unique().tolist()) == {0, 1}
    assert CLIPS.centres.shape == (12, 14, world.MAX_SHAPES, 2) and CLIPS.kind_map.shape == (12, 14, 128, 128)
    assert world.toy_clips(0, torch.arange(2), num_frames=5, size=64).frames.shape == (2, 5, 3, 64, 64)


def test_random_numbers_are_uniform_and_independent():
    u = engine.uniforms(0, torch.arange(20000), 0, 4).double()
    assert u.min() >= 0 and u.max() < 1
    for k in range(4):                              # Kolmogorov-Smirnov, 1 in 10,000
        gap = (u[:, k].sort().values - (torch.arange(20000) + 0.5) / 20000).abs().max()
        assert gap < 2.2 / math.sqrt(20000)
    others = (engine.uniforms(1, torch.arange(20000), 0, 2), engine.uniforms(0, torch.arange(20000), 1, 2))
    correlation = torch.corrcoef(torch.cat((u, *others, u[:, :2].roll(1, 0)), dim=1).T) - torch.eye(10)
    assert correlation.abs().max() < 4.5 / math.sqrt(20000)


def test_the_motion_bucket_is_the_speed():
    clips = world.toy_clips(1, torch.arange(120), size=16)
    assert clips.motion_bucket_id.min() >= 1 and clips.motion_bucket_id.max() <= 255
    step = clips.centres.diff(dim=1) * 8                            # in pixels of the 128-pixel world
    turned = (step.diff(dim=1).abs() > 1e-3).any(-1)            # reflected at a border
    straight = ~(F.pad(turned, (0, 0, 1, 0)) | F.pad(turned, (0, 0, 0, 1)))
    speed = (clips.motion_bucket_id / 127 * 4)[:, None, None].expand_as(straight)
    assert straight.float().mean() > 0.5
    torch.testing.assert_close(step.norm(dim=-1)[straight], speed[straight], rtol=1e-3, atol=1e-3)
    assert (step.norm(dim=-1) <= speed + 1e-3).all()                # nothing jumps


def test_shapes_stay_inside():
    clips = world.toy_clips(2, torch.arange(48), size=64)
    where = clips.centres[clips.present[:, None].expand(-1, 14, -1)]
    assert where.min() > 6 and where.max() < 58
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (clips.kind_map[:, :, border] > 0).float().mean() < 0.01     # touched by a corner at most


def test_the_first_frame_does_not_tell_the_future():
    other = world.toy_clips(3, torch.arange(12), motion_seed=99)
    assert torch.equal(other.frames[:, 0], CLIPS.frames[:, 0])
    assert torch.equal(other.attributes[:, :world.NUM_STATIC], CLIPS.attributes[:, :world.NUM_STATIC])
    assert not torch.equal(other.attributes, CLIPS.attributes)
    assert torch.equal(other.motion_bucket_id, CLIPS.motion_bucket_id)              # the same speed
    assert ((other.frames[:, -1] - CLIPS.frames[:, -1]).abs().mean((1, 2, 3)) > 0.01).float().mean() > 0.8


def test_attributes_describe_the_frames():
    clips = world.toy_clips(5, torch.arange(200), num_frames=1, size=64)
    kinds, colours, cells = len(world.KINDS), len(world.COLOURS), world.CELLS ** 2
    colour, kind_cell, backdrop, heading, speed = clips.attributes.split(
        [colours, kinds * cells, colours, kinds * world.HEADINGS, world.SPEEDS], dim=1)
    assert (backdrop.sum(1) == 1).all() and (speed.sum(1) == 1).all()
    there = [x.unflatten(1, (kinds, -1)).amax(2) for x in (kind_cell, heading)]                     # b k each
    pairs = colour.unflatten(1, (-1, 2)).amax(2)[:, [pair for *_, pair in world.KINDS.values()]]     # b k
    assert torch.equal(pairs, there[0])                             # each kind in its own colours
    assert not (colour * backdrop).any()                            # which are not the background's
    assert all(torch.equal(x, there[0]) for x in there)             # the same kinds in each part
    assert (there[0].sum(1) <= clips.present.sum(1)).all() and (there[0].sum(1) >= 1).all()
    seen = torch.stack([(clips.kind_map == 1 + k).flatten(1).sum(1) > 0 for k in range(kinds)], dim=1).float()
    assert (seen == there[0]).float().mean() > 0.99                 # rarely, one hides another
    assert torch.equal(speed.argmax(1), ((clips.motion_bucket_id - 1) * world.SPEEDS // 255))


def test_contact_sheet():
    frames = torch.zeros(2, 3, 3, 8, 8)
    frames[1, 2] = 2.0                                              # out of range is clipped
    sheet = media.contact_sheet(frames, gap=2)
    assert sheet.dtype == torch.uint8 and sheet.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    assert (sheet[2:10, 2:10] == 128).all() and (sheet[12:20, 22:30] == 255).all()
    assert (sheet[:2] == 255).all() and (sheet[:, -2:] == 255).all()


def test_overfit_repeats_the_first_clips(pipeline_folder, tmp_path):
    """--overfit 2: clips 0 and 1 for ever, also on the sheets. Whatever the data, they are encoded once."""
    nets = model.load_vae(pipeline_folder), model.load_image_encoder(pipeline_folder)
    unet = SimpleNamespace(config={"block_out_channels": [32, 32], "cross_attention_dim": 24,
                                   "in_channels": 8, "sample_size": 4, "num_frames": 2})
    args = dict(output_dir=tmp_path, data="toy", seed=0, num_clips=3, batch_size=2, width=None, height=None)
    every, _ = data.open_training_data(SimpleNamespace(**args), *nets, unet, 2, 0)
    few, (x0, cond) = data.open_training_data(SimpleNamespace(**args, overfit=2), *nets, unet, 2, 0)
    repeated = every.take(torch.tensor([0, 1, 0, 1]))
    for found in (few.take(torch.tensor([2, 7, 4, 1])), (x0, cond)):
        assert torch.equal(found[0], repeated[0]) and all(map(torch.equal, found[1], repeated[1]))
