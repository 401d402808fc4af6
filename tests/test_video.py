"""Videos (data.py, support/decode.py): clips have the right frames, bad files are skipped, encoding resumes.

A frame tells its number by its grey level, so that a test sees which frames a clip is made of.
"""
import csv
import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file

import data
import model
from support import checkpoint, decode, engine
from support.checkpoint import ModelError
from support.media import save_video

W, H, N, FPS = 64, 48, 14, 7


def level(i):
    return 20 + i * 8 % 208                                         # 26 levels, far enough apart


def grey(i, size=(W, H)):
    return np.full((*size[::-1], 3), level(i), np.uint8)


def write(path, times, codec="libx264", pix_fmt="yuv420p", size=(W, H), paint=grey, gop=12, options=None,
          **settings):
    """Writes a video of frames paint(i) at `times` in seconds. bitexact: otherwise a Matroska file contains
    random identifiers, whose length varies."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.gop_size = gop
        stream.time_base = stream.codec_context.time_base = Fraction(1, 12000 if codec != "mpeg4" else 30)
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(paint(i), "rgb24").reformat(format=pix_fmt)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time / frame.time_base)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def at_rate(rate, seconds=3.0):
    return [i / rate for i in range(round(seconds * float(rate)))]


def read(path, start=0.0, num_frames=N, width=W, height=H, fps=FPS):
    return decode.read_clip(str(path), start, num_frames, width, height, fps)


def expected(times, begin, num_frames=N, fps=FPS):
    """The levels of the frames that a player shows: at each time, the last frame presented until then."""
    moments = [begin + i / fps + decode.TOLERANCE for i in range(num_frames)]
    return [level(max(i for i, time in enumerate(times) if time <= moment)) for moment in moments]


def assert_shows(path, times, tolerance=4):
    for start in (0.0, 0.31, 0.77):
        frames, facts = read(path, start)
        middle = frames[:, H // 2, W // 2].astype(int)              # f 3
        wanted = expected(times, times[0] + facts["start"])
        assert np.abs(middle - np.array(wanted)[:, None]).max() <= tolerance, (start, middle[:, 0], wanted)
        assert (facts["start"] > 0) == (start > 0)


# ---- Frame rates and seeking ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [7, 24, Fraction(30000, 1001), 60])
def test_constant_rates(tmp_path, rate):
    times = at_rate(rate)
    assert_shows(write(tmp_path / "a.mp4", times), times)
    assert_shows(write(tmp_path / "a.mkv", times), times)           # which rounds times to milliseconds


def test_variable_rate(tmp_path):
    steps = np.random.default_rng(0).choice([1 / 60, 1 / 30, 1 / 8, 0.4], 40)
    times = [0.0, *np.cumsum(steps).round(3).tolist()]
    assert_shows(write(tmp_path / "a.mp4", times), times)
    assert_shows(write(tmp_path / "a.mkv", times), times)


@pytest.mark.parametrize("name, codec, pix_fmt", [
    ("a.webm", "libvpx-vp9", "yuv420p"), ("a.mp4", "libx265", "yuv420p"), ("a.avi", "mpeg4", "yuv420p"),
    ("a.mov", "mjpeg", "yuvj420p"), ("a.mkv", "ffv1", "yuv444p"), ("ten-bit.mp4", "libx264", "yuv420p10le"),
    ("ten-bit.mkv", "libx265", "yuv420p10le"), ("grey.mkv", "ffv1", "gray")])
def test_codecs_and_depths(tmp_path, name, codec, pix_fmt):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    times = at_rate(30)
    settings = {"gray": {"color_range": 2}, "yuv420p": {"bit_rate": 4_000_000}}.get(pix_fmt, {})
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    assert_shows(write(tmp_path / name, times, codec, pix_fmt, options=options, **settings), times)


def test_the_first_frame_need_not_be_at_zero(tmp_path):
    times = [2.5 + time for time in at_rate(24)]
    assert_shows(write(tmp_path / "a.mp4", times), times)


def test_clips_that_are_just_long_enough(tmp_path):
    """14 frames, as sampler.py writes them. The last frame may have no duration."""
    for name in ("a.mp4", "a.mkv", "a.webm"):
        times = at_rate(7, 2.0)
        path = write(tmp_path / name, times, "libvpx-vp9" if "webm" in name else "libx264")
        assert read(path, 0.9)[0][:, 9, 9, 0].tolist() == pytest.approx(expected(times, 0.0), abs=4)
        with pytest.raises(decode.BadVideo, match="14 frames of 15"):
            read(path, num_frames=15)


def test_key_frames_that_are_no_clean_start(tmp_path):
    """In open groups of pictures the first frames depend on earlier ones: decoding has to begin earlier."""
    times = at_rate(30, 8.0)
    options = {"x265-params": "open-gop=1:log-level=none"}
    path = write(tmp_path / "a.mp4", times, "libx265", gop=15, options=options)
    for start in np.linspace(0.05, 0.95, 10).tolist():
        frames, facts = read(path, start)
        assert facts["start"] == pytest.approx(start * (8 - 13 / 7), abs=0.02)
        assert np.abs(frames[:, 20, 20, 0].astype(int) - expected(times, facts["start"])).max() <= 4


def test_only_what_the_clip_needs_is_decoded(tmp_path, monkeypatch):
    path, decoded = write(tmp_path / "long.mp4", at_rate(30, 60.0), gop=15), []
    original = decode.on_display
    monkeypatch.setattr(decode, "on_display", lambda frames, *rest: original(
        (decoded.append(frame.time) or frame for frame in frames), *rest))
    for start in (0.0, 0.5, 0.9):
        decoded.clear()
        _, facts = read(path, start)
        assert facts["start"] == pytest.approx(start * (60 - 13 / 7), abs=0.02)
        assert 13 / 7 * 30 < len(decoded) <= 13 / 7 * 30 + 15 + 2           # of 1800
        assert facts["start"] - 0.5 <= decoded[0] <= facts["start"] + 0.002


def binary(i):
    """A picture whose 8 blocks of 16x24 pixels are the bits of i."""
    bits = np.array([i >> k & 1 for k in range(8)], np.uint8).reshape(2, 4)
    return np.repeat(np.kron(bits * 235 + 10, np.ones((24, 16), np.uint8))[..., None], 3, 2)


@pytest.mark.parametrize("bframes", [0, 1, 2, 3])
@pytest.mark.parametrize("name, codec", [
    *((name, "libx264") for name in "mp4 mov m4v 3gp 3g2 f4v mkv ts mts m2ts flv".split()),
    *((name, "libx264") for name in "avi asf wmv mpg vob".split()), ("avi", "mpeg2video"),
    *((name, "mpeg4") for name in "mp4 mkv ts avi asf mpg".split()), ("vob", "mpeg2video")])
def test_b_frames(tmp_path, name, codec, bframes):
    """Every frame is the one asked for, whatever the order in which frames are stored, or the file is
    refused: H.264 has no times in an MPEG program stream."""
    path = tmp_path / f"a.{name}"
    assert path.suffix in data.SUFFIXES
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=25, width=64, height=48, bit_rate=3_000_000)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, bframes
        stream.options = {"b-adapt": "0"} if codec == "libx264" else {}
        for i in range(72):
            frame = av.VideoFrame.from_ndarray(binary(i), "rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for start in (0.0, 0.1, 0.3, 0.5, 0.77, 1.0):
        try:
            frames, facts = read(path, start)
        except decode.BadVideo as error:
            assert "without a time" in str(error) and codec == "libx264" and name in ("mpg", "vob")
            continue
        bits = frames[:, 12::24, 8::16, 0].reshape(N, 8) > 127
        times = facts["start"] + np.arange(N) / FPS + decode.TOLERANCE
        for shown, t in zip(bits @ (1 << np.arange(8)), times):             # start is rounded to milliseconds
            assert shown in {int((t - 0.0006) * 25), int((t + 0.0006) * 25)}, (start, facts, shown, t)


def test_times_that_run_backwards_are_refused(good_video):
    frames = [SimpleNamespace(time=time, duration=1, time_base=0.1) for time in (0.0, 0.2, 0.1)]
    with pytest.raises(decode.BadVideo, match="run backwards"):
        list(decode.on_display(frames, False, None, 14, 7))


# ---- Rotation, size, colour ------------------------------------------------------------------------------


def corners(size):
    """Red above left, green above right, blue below left, white below right."""
    w, h = size
    image = np.full((h, w, 3), 235, np.uint8)
    image[:h // 2, :w // 2], image[:h // 2, w // 2:] = (220, 30, 30), (30, 200, 30)
    image[h // 2:, :w // 2] = 30, 30, 220
    return lambda i: image


def colours(picture):
    h, w, _ = picture.shape
    names = {(220, 30, 30): "r", (30, 200, 30): "g", (30, 30, 220): "b", (235, 235, 235): "w"}
    points = [picture[y, x].astype(int) for y in (h // 6, h - h // 6) for x in (w // 6, w - w // 6)]
    return "".join(names[min(names, key=lambda name: np.abs(point - name).sum())] for point in points)


def rotated(path, degrees, mirrored=False):
    """Writes the display matrix into the track header of an mp4. mirrored: upside down before rotation."""
    content = bytearray(Path(path).read_bytes())
    start = content.index(b"tkhd") + 4 + 40                         # the matrix follows version, flags, ..
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    down = -1 if mirrored else 1                                    # where the second row sends the y axis
    matrix = [cos, sin, 0, -sin * down, cos * down, 0, 0, 0, 0x4000]
    content[start:start + 36] = struct.pack(">9i", *(value * 0x10000 for value in matrix))
    Path(path).write_bytes(content)


@pytest.mark.parametrize("degrees, mirrored, upright", [
    (0, False, "rgbw"), (90, False, "brwg"), (180, False, "wbgr"), (270, False, "gwrb"),
    (0, True, "bwrg"), (90, True, "rbgw"), (180, True, "grwb"), (270, True, "wgbr")])
def test_rotation(tmp_path, degrees, mirrored, upright):
    path = write(tmp_path / "a.mp4", at_rate(8), size=(96, 64), paint=corners((96, 64)))
    rotated(path, degrees, mirrored)                                # clockwise, as a phone writes it
    for size in ((48, 64), (64, 48)):
        frames, _ = read(path, width=size[0], height=size[1])
        assert frames.shape == (N, size[1], size[0], 3) and colours(frames[0]) == upright


def test_odd_sizes_and_aspect(tmp_path):
    def circle(w, h, stretch=1):
        y, x = np.mgrid[:h, :w]
        inside = ((x - w / 2) * stretch) ** 2 + (y - h / 2) ** 2 < (min(w * stretch, h) / 4) ** 2
        return lambda i: np.repeat(np.where(inside, 230, 20).astype(np.uint8)[..., None], 3, 2)

    def assert_round(frames, w, h):                                 # in 96x64, which w x h covers
        rows, columns = np.nonzero(frames[0, :, :, 0] > 125)
        diameters = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert max(abs(d - min(w, h) / 2 * max(96 / w, 64 / h)) for d in diameters) <= 2, diameters
    for w, h, codec, fmt in ((321, 181, "ffv1", "yuv444p"), (213, 480, "libx264", "yuv444p")):
        path = write(tmp_path / f"{w}.mkv", at_rate(8), codec, fmt, size=(w, h), paint=circle(w, h))
        frames, facts = read(path, width=96, height=64)
        assert facts["size"] == [w, h]
        assert_round(frames, w, h)
    squeezed = write(tmp_path / "sar.mp4", at_rate(8), size=(90, 120), paint=circle(90, 120, 2),
                     sample_aspect_ratio=Fraction(2, 1))            # pixels twice as wide as high
    assert_round(read(squeezed, width=96, height=64)[0], 180, 120)


@pytest.mark.parametrize("aspect, left, above", [
    (Fraction(1, 3), 1, 0), (Fraction(3), 0, 1),                    # one side is cut to a third
    (Fraction(1, 4), 1, 1), (Fraction(10, 3), 1, 1), (Fraction(1, 99), 1, 1)])
def test_absurd_aspects_of_pixels_count_as_one(tmp_path, aspect, left, above):
    """The left third of the video is red and the upper third is green. left, above: thirds of the clip."""
    thirds = np.full((120, 120, 3), 20, np.uint8)
    thirds[:, :40, 0] = thirds[:40, :, 1] = 220
    path = write(tmp_path / "a.mp4", at_rate(8), size=(120, 120), paint=lambda i: thirds,
                 sample_aspect_ratio=aspect)
    frames, _ = read(path, width=60, height=60)
    shown = (frames[0] > 120).mean((0, 1))
    assert shown[:2] == pytest.approx([left / 3, above / 3], abs=0.05)


def test_a_gif_with_an_absurd_aspect(tmp_path):
    Image.fromarray(corners((64, 48))(0)).save(tmp_path / "a.gif")
    content = bytearray((tmp_path / "a.gif").read_bytes())
    content[12] = 1                                                 # the aspect is (1 + 15) / 64
    (tmp_path / "a.gif").write_bytes(content)
    frames, _ = read(tmp_path / "a.gif", num_frames=1)
    assert np.abs(frames[0].astype(int) - corners((64, 48))(0)).max() <= 4


def test_resizing_is_antialiased(tmp_path):
    board = np.indices((384, 512)).sum(0) % 2 * 255
    fine = np.repeat(board.astype(np.uint8)[..., None], 3, 2)
    path = write(tmp_path / "a.mkv", at_rate(7), "ffv1", "yuv444p", size=(512, 384), paint=lambda i: fine)
    frames, _ = read(path)
    assert np.abs(frames.astype(int) - 127).max() <= 12             # the mean, not single pixels


def flat(path, colour, pix_fmt, full, size, matrix):
    """Writes a video of one colour, whose Y, U and V are computed here. matrix: 1 is BT.709, 5 is BT.601."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[matrix]
    r, g, b = np.array(colour) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    values = (255 * y, 128 + 255 * u, 128 + 255 * v) if full else (16 + 219 * y, 128 + 224 * u, 128 + 224 * v)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", 7, width=size[0], height=size[1], pix_fmt=pix_fmt,
                                      color_range=1 + full, colorspace=matrix)
        for i in range(2):
            frame = av.VideoFrame(*size, pix_fmt)
            for plane, value in zip(frame.planes, values):
                plane.update(bytes([min(255, round(value))]) * plane.buffer_size)
            frame.pts, frame.color_range, frame.colorspace = i, 1 + full, matrix
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv411p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5])
def test_levels(tmp_path, pix_fmt, full, matrix):
    """Flat colours keep their levels, at even and odd widths, of the video and of the clip."""
    for colour in ((255, 255, 255), (128, 128, 128), (0, 0, 0), (200, 60, 40), (40, 180, 60), (30, 50, 210)):
        for size in ((64, 48), (97, 49)):
            path = flat(tmp_path / "a.mkv", colour, pix_fmt, full, size, matrix)
            for width in (32, 33, size[0]):
                frames, _ = read(path, num_frames=2, width=width, height=32)
                assert np.abs(frames.astype(int) - colour).max() <= 1, (colour, size, width, frames[0, 9, 9])


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_levels_of_the_videos_that_are_written(tmp_path, size):
    for colour in ((255, 255, 255), (128, 128, 128), (0, 0, 0), (200, 60, 40)):
        pixels = torch.tensor(colour).view(3, 1, 1).expand(3, *size[::-1]) / 127.5 - 1
        save_video(pixels.expand(2, -1, -1, -1), tmp_path / "a.mp4", 7)
        frames, _ = read(tmp_path / "a.mp4", num_frames=2)
        assert np.abs(frames.astype(int) - colour).max() <= 1, (colour, frames[0, 9, 9])


def test_hd_colours_without_a_label(tmp_path):
    """HD video without a colour space is in BT.709, as players assume."""
    colour = np.empty((720, 1280, 3), np.uint8)
    colour[:] = (40, 180, 60)
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=7, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for _ in range(14):
            frame = av.VideoFrame.from_ndarray(colour, "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="itu709")
            frame.colorspace = 2
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    frames, _ = read(path)
    assert np.abs(frames[0, 20, 20].astype(int) - (40, 180, 60)).max() <= 6


@pytest.mark.parametrize("curve, name", [(16, "SMPTE2084"), (18, "ARIB_STD_B67")])
def test_hdr_is_refused(tmp_path, curve, name):
    path = write(tmp_path / "a.mkv", at_rate(8), "libx265", "yuv420p10le", color_trc=curve, colorspace=9,
                 options={"x265-params": f"log-level=none:transfer={curve}:colormatrix=9"})
    with pytest.raises(decode.BadVideo, match=f"HDR video .{name}.: convert it to SDR"):
        read(path)


def test_interlaced_frames_show_one_moment(tmp_path):
    """Odd lines are of a later time. Shown together with the even lines, moving edges look like combs."""
    def two_moments(i):
        image = np.full((96, 128, 3), 30, np.uint8)
        image[::2, 40:60] = image[1::2, 70:90] = 220                # the bar has moved in between
        return image
    path = write(tmp_path / "a.mp4", at_rate(25), size=(128, 96), paint=two_moments,
                 options={"x264-params": "tff=1", "crf": "10"})
    with av.open(path) as container:
        assert next(container.decode(video=0)).interlaced_frame
    frames, _ = read(path, width=128, height=96)
    bar = frames[0, :, :, 0].astype(int)
    assert bar[:, 44:56].mean() > 150 and bar[:, 74:86].mean() < 80


# ---- Bad files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_video(tmp_path_factory):
    return Path(write(tmp_path_factory.mktemp("good") / "good.mp4", at_rate(24)))


def bad_files(folder, good):
    """Writes files that cannot be used -> {name: part of the reason}."""
    content = good.read_bytes()
    for name, damaged in (("empty", b""), ("text", b"not a video\n" * 99),
                          ("half", content[:len(content) // 2]),
                          ("playlist", b"#EXTM3U\n#EXTINF:9,\n" + os.fsencode(good) + b"\n"),
                          ("script", b"ffconcat version 1.0\nfile '" + os.fsencode(good) + b"'\n")):
        (folder / f"{name}.mp4").write_bytes(damaged)
    write(folder / "short.mp4", at_rate(24, 1.0))
    write(folder / "one-frame.mkv", [0.0])
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
        sound.rate = 44100
        container.mux([*stream.encode(sound), *stream.encode()])
    (folder / "dangling.mp4").symlink_to(folder / "nothing")
    return {"empty.mp4": "nvalid", "text.mp4": "nvalid", "half.mp4": "nvalid", "playlist.mp4": "nvalid",
            "script.mp4": "nvalid", "short.mp4": "shorter", "one-frame.mkv": "shorter",
            "sound.mp4": "no video", "dangling.mp4": "No such file"}


def test_reasons(tmp_path, good_video):
    for name, reason in bad_files(tmp_path, good_video).items():
        for start in (0.0, 0.5):
            with pytest.raises(decode.BadVideo, match=reason):
                read(tmp_path / name, start)


def test_frames_of_absurd_size(tmp_path, monkeypatch):
    for size in ((640, 480), (8, 320)):                             # the second after resizing to cover 64x48
        paint = lambda i, size=size: grey(i, size)
        path = write(tmp_path / "a.mkv", at_rate(7, 2.5), "ffv1", size=size, paint=paint)
        monkeypatch.setattr(decode, "MAX_PIXELS", 640 * 480)
        read(path)
        monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 2560 - 1)
        with pytest.raises(decode.BadVideo, match=f"{size[0]}x{size[1]}"):
            read(path)


def test_damage_never_shows(tmp_path):
    """Files cut at every tenth, or with random bits flipped: clips have the right frames or are refused."""
    noise = np.random.default_rng(1)
    texture = noise.integers(0, 16, (H, W, 1)).astype(np.uint8)     # data that can be damaged
    times = at_rate(24)
    path = Path(write(tmp_path / "good.mkv", times, paint=lambda i: np.clip(grey(i) + texture, 0, 255),
                      options={"crf": "4"}, thread_count=1))        # with more threads, the file varies
    content, whole = path.read_bytes(), 0
    damaged = [content[:len(content) * i // 10] for i in range(10)]
    for _ in range(30):
        flipped = bytearray(content)
        for place in noise.integers(0, len(content), 2):
            flipped[place] ^= 1 << noise.integers(8)
        damaged.append(bytes(flipped))
    for i, content in enumerate(damaged):
        (tmp_path / "bad.mkv").write_bytes(content)
        try:
            frames, facts = read(tmp_path / "bad.mkv", 0.6 * (i % 2))
        except decode.BadVideo:
            continue
        whole += 1
        middle = frames[:, H // 2 - 8:H // 2 + 8, W // 2 - 8:W // 2 + 8].mean((1, 2, 3)) - texture.mean()
        # A flipped bit that the decoder does not notice may change pixels until the next key frame.
        wrong = sum(abs(a - b) > 6 for a, b in zip(middle, expected(times, facts["start"])))
        assert wrong <= 8 * (i >= 10), (i, middle, expected(times, facts["start"]))
    assert 5 < whole < len(damaged)


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """A decoder that some files crash or hang, as some real files do -> function that lists its requests."""
    script, asked = tmp_path / "fragile.py", tmp_path / "asked"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from support import decode
decode.TIMEOUT, original = 1, decode.read_clip
def read_clip(path, start, **shape):
    with open({str(asked)!r}, "a") as file:
        print(os.path.basename(path), round(start, 3), file=file)
    if "crash" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path:
        time.sleep(60)
    if "middle" in path and start > 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "memory" in path:
        bytearray(8 * 2**30)
    if "unlucky" in path and not os.path.exists(path + ".killed"):
        open(path + ".killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, start, **shape)
decode.read_clip = read_clip
decode.serve()
""")
    monkeypatch.setattr(data, "DECODER", [sys.executable, str(script)])
    return lambda: asked.read_text().split("\n")[:-1]


def test_a_file_that_kills_its_decoder_costs_that_file(tmp_path, good_video, fragile):
    videos, skip_list = tmp_path / "videos", tmp_path / "skipped.jsonl"
    videos.mkdir()
    names = ("a.mp4", "b.mp4", "crash.mp4", "hang.mp4", "memory.mp4", "middle.mp4", "unlucky.mp4")
    for name in names:
        os.link(good_video, videos / name)
    clips = data.Clips(data.open_files(videos), 0, N, W, H, workers=2, skip_list=skip_list)
    assert clips.take(torch.arange(14)).shape == (14, N, H, W, 3)           # two epochs
    clips.threads.close()
    clips.threads.join()
    found = [json.loads(line) for line in skip_list.read_text().splitlines()]
    reasons = {Path(row["path"]).stem: row["reason"] for row in found}
    assert len(found) == 3, found                                   # each once
    assert "SIGSEGV" in reasons["crash"] and "too long" in reasons["hang"]
    assert "MemoryError" in reasons["memory"]
    # The first decoder of this file was killed for another reason: the clip is the same as without the kill.
    number = next(i for i in range(7) if "unlucky" in clips.clip(i)[1]["path"])
    start = engine.uniforms(0, torch.tensor([number]), 21, 2)[0, 0].item()
    assert torch.equal(clips.clip(number)[0], torch.from_numpy(read(good_video, start)[0].copy()))
    # If the middle of a file cannot be decoded, the clip is its beginning.
    number = next(i for i in range(7) if "middle" in clips.clip(i)[1]["path"])
    assert clips.clip(number)[1]["start"] == 0
    # Known bad files are not opened again.
    before = [line for line in fragile() if "crash" in line]
    again = data.Clips(data.open_files(videos), 5, N, W, H, workers=1, skip_list=skip_list)
    for number in range(7):
        again.clip(number)
    assert [line for line in fragile() if "crash" in line] == before and len(before) == 3
    assert len(skip_list.read_text().splitlines()) == 3


def test_damaged_lines_of_a_skip_list_are_left_out(tmp_path, folder, capsys):
    files, known = data.open_files(folder), tmp_path / "skipped.jsonl"
    line = json.dumps({"path": files[0], "reason": "known"}).encode()
    known.write_bytes(line + b'\n{"path": "x"}\n\xff\n' + bytes(9) + b'\n["path"]\n{"path": "y", "rea')
    clips = data.Clips(files, 0, N, W, H, workers=1, skip_list=known)
    assert list(clips.bad) == [files[0]] and capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_does_not_wait_for_a_decoder_that_hangs():
    code = """
import sys, data, torch
data.DECODER = [sys.executable, "-c", "import time; time.sleep(12)"]                # it never answers
clips = data.Clips(["a.mp4"], 0, 14, 64, 48, workers=2)
clips.threads.apply_async(print, ["waiting"], {"flush": True})
clips.take(torch.arange(1))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"waiting\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


def test_a_killed_decoder_is_replaced(tmp_path, good_video):
    os.link(good_video, tmp_path / "a.mp4")
    clips = data.Clips(data.open_files(tmp_path), 0, N, W, H, workers=1)
    first, _ = clips.clip(0)
    clips.local.process.send_signal(signal.SIGKILL)                 # as the kernel does when memory runs out
    second, _ = clips.clip(0)
    assert torch.equal(first, second) and not clips.bad


def test_bad_files_are_replaced_and_noted_once(tmp_path, good_video, capfd):
    videos = tmp_path / "videos"
    videos.mkdir()
    reasons = bad_files(videos, good_video)
    for name in ("a.mp4", "b.mp4", "c.MP4"):
        os.link(good_video, videos / name)
    (videos / "deep").mkdir()
    os.link(good_video, videos / "deep" / "d.mp4")
    (videos / "deep" / "loop").symlink_to(videos)
    (videos / "notes.txt").write_text("not looked at")
    files = data.open_files(videos)
    assert len(files) == len(reasons) + 4
    clips = data.Clips(files, 0, N, W, H, workers=2, skip_list=tmp_path / "skipped.jsonl")
    paths = [Path(clips.clip(number)[1]["path"]).name for number in range(2 * len(files))]
    assert set(paths[:len(files)]) == {"a.mp4", "b.mp4", "c.MP4", "d.mp4"}
    noted = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in noted) == sorted(reasons.keys() - {"dangling.mp4"})
    assert all(reasons[Path(row["path"]).name] in row["reason"] for row in noted)


def test_files_that_cannot_be_read_now_are_tried_again(tmp_path, good_video, capfd):
    """An unmounted disk: no file is listed, one warning is printed, the files are used once it is back."""
    known, disk = tmp_path / "skipped.jsonl", tmp_path / "disk"
    files = [str(disk / name) for name in ("a.mp4", "b.mp4", "c.mp4")]
    clips = data.Clips(files, 0, N, W, H, workers=1, skip_list=known)
    with pytest.raises(ModelError, match="No such file or directory.*each of the others$"):
        clips.clip(0)
    disk.mkdir()
    for file in files[:2]:
        os.link(good_video, file)
    Path(files[2]).symlink_to(tmp_path / "nothing")
    used = [clips.clip(number)[1]["path"] for number in range(6)]
    assert set(used) == set(files[:2]) and not known.exists()
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "tried again later" in error
    Path(files[2]).unlink()
    os.link(good_video, files[2])
    assert set(clips.clip(number)[1]["path"] for number in range(6, 9)) == set(files)


@pytest.mark.parametrize("code, temporary", [
    (errno.EIO, True), (errno.EACCES, True), (errno.EMFILE, True), (errno.ESTALE, True),
    (errno.EPERM, False),                                           # FFmpeg says so of damaged ASF and GIF
    (errno.EINVAL, False), (av.error.InvalidDataError, False)])
def test_errors_of_the_system_are_temporary(monkeypatch, code, temporary):
    def fails(*arguments, **options):
        if isinstance(code, int):
            av.error.err_check(-code)
        raise code(-1, "damaged")
    answer = io.BytesIO()
    monkeypatch.setattr(decode.av, "open", fails)
    monkeypatch.setattr(decode.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(decode.signal, "signal", lambda *_: None)
    request = {"path": "a.mp4", "start": 0.5, "num_frames": N, "width": W, "height": H, "fps": FPS}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=[json.dumps(request)]))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=answer))
    decode.serve()
    facts = json.loads(answer.getvalue())
    assert facts["path"] == "a.mp4" and facts["reason"] and facts.get("temporary", False) == temporary


def test_the_skip_list_is_named_if_all_videos_are_in_it(tmp_path):
    known = tmp_path / "skipped.jsonl"
    known.write_text(json.dumps({"path": "a.mp4", "reason": "damaged"}) + "\n")
    clips = data.Clips(["a.mp4"], 0, N, W, H, workers=1, skip_list=known)
    with pytest.raises(ModelError, match=f"a.mp4: damaged.*delete {known} to try"):
        clips.clip(0)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_bad_files_that_follow_each_other_are_replaced_by_different_ones(n, monkeypatch):
    files = [str(i) for i in range(n)]
    clips = data.Clips(files, 0, N, W, H, workers=1)
    order, asked = [files[i] for i in data.shuffled(0, 0, n)], []
    bad = set(order[10:20])
    facts = {path: {"path": path, "reason": "bad"} if path in bad else {"path": path} for path in files}
    monkeypatch.setattr(clips, "read", lambda path, start: (None, facts[path]))
    used = [clips.clip(number)[1]["path"] for number in range(n)]
    assert all(path == own for path, own in zip(used, order) if own not in bad)
    if n == 40:
        assert len(set(used[10:20])) >= 7                           # 1 if the next good file replaces all
    for number in range(n):                                         # every file is tried once
        asked.clear()
        monkeypatch.setattr(clips, "read", lambda path, start: (asked.append(path), {"reason": ""}))
        with pytest.raises(ModelError, match="none of"):
            clips.clip(number)
        assert asked[0] == order[number] and sorted(asked) == sorted(files)


def test_nothing_but_bad_files_ends_with_a_sentence(tmp_path, good_video):
    bad_files(tmp_path, good_video)
    clips = data.Clips(data.open_files(tmp_path), 0, N, W, H, workers=2)
    with pytest.raises(ModelError, match="none of 9 videos is good.*python data.py check"):
        clips.take(torch.arange(2))


def test_a_decoder_that_does_not_start_blames_no_file(tmp_path, good_video, monkeypatch):
    os.link(good_video, tmp_path / "a.mp4")
    monkeypatch.setattr(data, "DECODER", [sys.executable, "-c", "raise SystemExit(1)"])
    clips = data.Clips(data.open_files(tmp_path), 0, N, W, H, workers=1, skip_list=tmp_path / "skipped.jsonl")
    with pytest.raises(ModelError, match="is PyAV installed"):
        clips.take(torch.arange(1))
    assert not (tmp_path / "skipped.jsonl").exists()


# ---- Order ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos whose levels differ."""
    folder = tmp_path_factory.mktemp("seven")
    for k in range(7):
        paint = lambda i, k=k: np.full((H, W, 3), 30 * k + i, np.uint8)
        write(folder / f"{k}.mp4", at_rate(8, 3.0), paint=paint)
    return folder


def test_order_is_a_function_of_seed_and_number(folder):
    files = data.open_files(folder)
    whole = data.Clips(files, 3, N, W, H, workers=2).take(torch.arange(16))
    for rank in range(2):                                           # of two processes, resumed at 8
        mine = data.Clips(files, 3, N, W, H, workers=1, clips_per_rank=4, batch_size=8)
        first = 8 + 4 * rank
        for part in torch.arange(first, first + 4).split(2):
            assert torch.equal(mine.take(part), whole[part])
    assert not torch.equal(data.Clips(files, 4, N, W, H, workers=2).take(torch.arange(7)), whole[:7])


def test_each_file_once_per_epoch():
    for epoch in range(3):
        assert sorted(data.shuffled(1, epoch, 1000).tolist()) == list(range(1000))
    assert not torch.equal(data.shuffled(1, 0, 1000), data.shuffled(1, 1, 1000))
    assert not torch.equal(data.shuffled(1, 0, 1000), data.shuffled(2, 0, 1000))


def test_what_comes_next_is_decoded_ahead(folder):
    clips = data.Clips(data.open_files(folder), 0, N, W, H, workers=2, clips_per_rank=2, batch_size=6)
    clips.take(torch.tensor([2, 3]))
    assert sorted(clips.pending) == [8, 9, 14, 15]                  # the next clips of rank 1 of 3


def test_flip(tmp_path):
    write(tmp_path / "a.mp4", at_rate(8), paint=corners((W, H)))
    clips = data.Clips(data.open_files(tmp_path), 0, N, W, H, workers=1, flip=True)
    seen = [colours(clips.clip(number)[0][0].numpy()) for number in range(12)]
    assert set(seen) == {"rgbw", "grwb"} and seen == [colours(clips.clip(i)[0][9].numpy()) for i in range(12)]
    mirrored = (engine.uniforms(0, torch.arange(1000), 21, 2)[:, 1] < 0.5).float().mean()
    assert 0.45 < mirrored < 0.55


# ---- Lists ----------------------------------------------------------------------------------------------

OPENVID = ("video", "caption", "aesthetic score", "motion score", "temporal consistency score",
           "camera motion", "frame", "fps", "seconds")


def openvid(file, rows):
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(OPENVID)
        for i in range(rows):
            caption = f'A "quoted", long\ncaption {i}' if i % 3 else "A plain caption of some length " * 4
            writer.writerow((f"clip_{i}.mp4", caption, 4 + i % 3, i % 10, 0.99, "static", i, 24.0, i % 7))
    return file


def test_openvid(tmp_path):
    """OpenVid-1M's layout: a CSV beside a folder video/, with limits on the CSV's columns."""
    (tmp_path / "video").mkdir()
    file = openvid(tmp_path / "OpenVid-1M.csv", 200)
    files = data.open_files(file)
    assert len(files) == 200 and files[199] == str(tmp_path / "video" / "clip_199.mp4")
    some = data.open_files(file, [("motion score", 2, 5), ("seconds", "3", "inf"), ("aesthetic score", 5, 9)])
    wanted = [i for i in range(200) if 2 <= i % 10 <= 5 and i % 7 >= 3 and i % 3 >= 1]
    assert some == [str(tmp_path / "video" / f"clip_{i}.mp4") for i in wanted]


def test_lists_of_paths(tmp_path):
    (tmp_path / "a.csv").write_text("\ufeffpath,seconds\nx/1.mp4,5\n/abs/2.mp4,\n3.mp4\n\n4.mp4,7\n")
    assert data.open_files(tmp_path / "a.csv") == [
        str(tmp_path / "x/1.mp4"), "/abs/2.mp4", str(tmp_path / "3.mp4"), str(tmp_path / "4.mp4")]
    assert len(data.open_files(tmp_path / "a.csv", [("seconds", 0, "inf")])) == 2       # no empty fields
    odd = 'a "b",\u00e9\n.mp4'
    (tmp_path / "b.jsonl").write_text(json.dumps({"file": odd, "n": 1}) + '\n\n{"n": 2}\n')
    assert data.open_files(tmp_path / "b.jsonl") == [str(tmp_path / odd)]


@pytest.mark.parametrize("name, text, where, message", [
    ("a.csv", "name,score\nx,1\n", (), "no column path, only name, score"),
    ("a.csv", "path,score\nx,1\n", [("scores", 1, 2)], "no column scores"),
    ("a.csv", "path,score\nx,1,an extra cell\n", [("n", 1, 2)], "no column n, only path, score"),
    ("a.csv", "path,score\n,1\n", (), "no videos"),               # not the folder of the list
    ("a.csv", "path,score\nx,1\n", [("score", 2, 3)], "none within the limits"),
    ("a.csv", "path,score\nx,1\n", [("score", "two", 3)], "^--where: .*'two': MIN and MAX are numbers"),
    ("a.csv", "", (), "no videos"), ("a.csv", "path\n", (), "no videos"),
    ("a.jsonl", "{}\n", (), "no column path"), ("a.jsonl", "[1]\n", (), "no column path|cannot be read"),
    ("a.jsonl", '{"path": "x"}\n{"path"', (), "cannot be read"), ("a.txt", "x.mp4\n", (), "nor a folder")])
def test_lists_that_are_none(tmp_path, name, text, where, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        data.open_files(tmp_path / name, where)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"path": "x", "n": ' + "[" * 100_000, "\0\0\n", "1" * 5000])
def test_lists_that_are_not_json(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ModelError, match="a.jsonl: cannot be read"):
        data.open_files(tmp_path / "a.jsonl")


def test_odd_values_of_lists(tmp_path, good_video, monkeypatch, capsys):
    """Lone surrogates and numbers beyond a float: such videos are bad or outside the limits."""
    rows = [r'{"path": "\ud800.mp4", "n": 1}', r'{"path": "\udc80.mp4", "n": 1}',
            '{"path": "y", "n": 1' + "0" * 400 + "}", json.dumps({"path": str(good_video), "n": 1})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    out = ("--out", tmp_path / "good.jsonl")
    run(monkeypatch, "check", tmp_path / "a.jsonl", *out, "--where", "n", 0, 2, *SIZE)
    assert "1 videos are good" in capsys.readouterr().out


def test_a_list_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ModelError, match="no .csv or .jsonl list"):
        data.open_files(tmp_path / "a.jsonl")


def test_half_a_million_rows(python):
    """A list of as many rows opens in seconds. Its paths stay in memory, the rest of the rows does not."""
    row = 'clip_%d.mp4,"a caption, of some length, about this and that",5.1,4.2,0.99,static,100,24.0,4.1\n'
    with tempfile.TemporaryDirectory() as folder:           # whose name, part of each path, is short
        with open(f"{folder}/a.csv", "w") as file:
            file.write(",".join(OPENVID) + "\n")
            file.writelines(row % i for i in range(500_000))
        code = f"""
import re, time, data, torch
# Anonymous memory only: how much of a library's file is mapped depends on the system's cache.
kilobytes = lambda: int(re.search(r"RssAnon:\\s*(\\d+)", open("/proc/self/status").read())[1])
before, start = kilobytes(), time.process_time()
files = data.open_files("{folder}/a.csv", [("motion score", 4, 5)])
opened = time.process_time() - start
order = data.shuffled(0, 0, len(files))
print(len(files), files[order[5]].endswith(f"clip_{{order[5]}}.mp4"), opened, kilobytes() - before)"""
        output = subprocess.check_output([python, "-c", code], cwd=ROOT, text=True)
    print(output)                                   # processor seconds to open it, then kilobytes
    count, right, seconds, kilobytes = output.split()
    assert (count, right) == ("500000", "True") and float(seconds) < 7.5 and int(kilobytes) < 70 * 1024


# ---- Latents and shards ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(pipeline_folder):
    return model.load_vae(pipeline_folder), model.load_image_encoder(pipeline_folder)


def flags(folder, **others):
    """The flags that data.open_data reads."""
    defaults = dict(data=folder, where=(), seed=0, num_frames=4, width=W, height=H, fps=FPS, flip=False,
                    workers=1, motion_bucket_id=None)
    return SimpleNamespace(**defaults | others)


def test_latents_of_videos(folder, nets):
    latents = data.open_data(flags(folder, workers=2), *nets)
    x0, cond = latents.take(torch.arange(3))
    assert x0.shape == (3, 4, 4, H // 8, W // 8) and x0.dtype == torch.float32
    assert cond.image_embeds.shape == (3, 1, 24) and cond.image_latents.shape == x0.shape
    assert cond.time_ids.shape == (3, 3) and (cond.time_ids[:, 0] == data.FPS - 1).all()
    alone, _ = latents.take(torch.tensor([2]))
    assert torch.equal(alone[0], x0[2])
    frames = data.Clips(data.open_files(folder), 0, 4, W, H, workers=1).take(torch.tensor([2])) / 127.5 - 1
    with torch.no_grad():
        wanted = nets[0].encode(frames[0].permute(0, 3, 1, 2)) * nets[0].config["scaling_factor"]
    torch.testing.assert_close(x0[2], wanted, rtol=1e-2, atol=1e-2)


UNET = {"block_out_channels": [32, 32], "cross_attention_dim": 24, "in_channels": 8}


def test_data_of_another_model_is_refused(tmp_path, folder, nets):
    """Its image embeddings have another length than those that the UNet was trained with."""
    args = flags(folder, workers=1, output_dir=tmp_path, batch_size=1)
    unet = SimpleNamespace(config=UNET | {"sample_size": 16, "num_frames": 4, "cross_attention_dim": 1024})
    with pytest.raises(ModelError, match=r"channels \[24, 8\], the UNet takes \[1024, 8\]"):
        data.open_training_data(args, *nets, unet, 1, 0)


def test_default_size_of_training_clips(tmp_path, monkeypatch):
    """Without --width and --height, clips have the size that the UNet was trained for: SVD's is 1024x576."""
    sizes = []

    def open_data(args, *nets, **options):
        sizes.append((args.width, args.height))
        x0 = torch.zeros(4, 14, 4, 1, 1)
        return SimpleNamespace(take=lambda numbers: (x0, model.Cond(torch.zeros(4, 1, 24), x0, None)))
    monkeypatch.setattr(data, "open_data", open_data)
    args = {"output_dir": tmp_path, "seed": 0, "batch_size": 1, "height": None, "data": "toy"}
    for sample_size, width in ((96, None), (16, None), (96, 512)):
        unet = SimpleNamespace(config=UNET | {"sample_size": sample_size, "num_frames": 14})
        data.open_training_data(SimpleNamespace(**args, width=width), None, None, unet, 1, 0)
    assert sizes[::2] == sizes[1::2] == [(1024, 576), (128, 128), (512, 576)]       # training, validation


def test_validation_clips_share_the_decoders_of_training(tmp_path, folder, nets, monkeypatch):
    opened, original = [], data.Clips.__init__

    def count(self, *arguments, **options):
        opened.append(self)
        original(self, *arguments, **options)
    monkeypatch.setattr(data.Clips, "__init__", count)
    args = flags(folder, workers=2, output_dir=tmp_path, batch_size=1)
    unet = SimpleNamespace(config=UNET | {"sample_size": 16, "num_frames": 4})
    latents, (x0, cond) = data.open_training_data(args, *nets, unet, 1, 0)
    assert len(opened) == 1 and x0.shape == (4, 4, 4, H // 8, W // 8) and cond.time_ids.shape == (4, 3)
    numbers = data.HELD_OUT * 720_720 + torch.arange(4)
    clips = [latents.clips.clip(number)[1]["path"] for number in numbers.tolist()]
    assert len(set(clips)) == 4 and torch.equal(latents.take(numbers)[0], x0)


def test_motion_bucket(tmp_path, nets):
    for name, step in (("still", 0), ("slow", 1), ("fast", 9)):
        (tmp_path / name).mkdir()
        paint = lambda i, step=step: np.full((H, W, 3), 60 + step * i, np.uint8)
        write(tmp_path / name / "a.mp4", at_rate(7), paint=paint)

    def bucket(name, **others):
        latents = data.open_data(flags(tmp_path / name, num_frames=N, **others), *nets)
        return latents.take(torch.arange(1))[1].time_ids[0, 1].item()
    still, slow, fast = map(bucket, ("still", "slow", "fast"))
    assert still == 1 and 10 < slow < 40
    assert fast == pytest.approx(255 - 254 * np.exp(-9 / 127.5 / data.MOTION_SCALE), abs=3)
    assert bucket("still", motion_bucket_id=127) == 127


def run(monkeypatch, *arguments):
    """Runs data.py with these arguments, in this process. Errors go through its sys.excepthook."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)          # data.py replaces it
    try:
        data.main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        raise
    finally:                                                        # as the end of a process would
        while checkpoint.LOCKS:
            checkpoint.LOCKS.pop().close()


SIZE = ("--num_frames", 4, "--width", W, "--height", H, "--workers", 1)


def test_encode_resumes_and_notices_damage(tmp_path, folder, nets, pipeline_folder, monkeypatch, capsys):
    how = ("--model", pipeline_folder, "--shard_size", 2, "--num_clips", 7, *SIZE)
    run(monkeypatch, "encode", folder, "--out", tmp_path / "whole", *how)

    class Killed(BaseException):
        pass

    def dies_at_the_third(file, tensors, metadata=None):
        if "000002" in file.name:
            file.with_name(f".{file.name}.part").write_bytes(b"half")
            raise Killed
        write_safetensors(file, tensors, metadata)
    write_safetensors = checkpoint.write_safetensors
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(data, "write_safetensors", dies_at_the_third)
        run(monkeypatch, "encode", folder, "--out", tmp_path / "parts", *how)
    with pytest.raises(checkpoint.ModelError):
        data.ShardLatents(tmp_path / "parts", 0, "cpu")             # unfinished
    kept = tmp_path / "parts" / "shard-000000.safetensors"
    before = kept.stat().st_mtime_ns
    run(monkeypatch, "encode", folder, "--out", tmp_path / "parts", *how)
    assert kept.stat().st_mtime_ns == before
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) == 4
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name

    # Read by a trainer: each clip once per epoch, equal to the clip encoded in the step.
    shards = data.open_data(flags(tmp_path / "whole", seed=9), *nets)
    videos = data.open_data(flags(folder), *nets)
    x0, cond = shards.take(torch.arange(7))
    wanted, wanted_cond = videos.take(data.shuffled(9, 0, 7))
    assert torch.equal(x0, wanted) and all(map(torch.equal, cond, wanted_cond))
    assert not torch.equal(shards.take(torch.arange(7, 14))[0], x0)
    with pytest.raises(ModelError, match="has num_frames 4, not 5: give other flags"):
        data.open_data(flags(tmp_path / "whole", num_frames=5), *nets)

    # Other settings are refused, damage is found.
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, "encode", folder, "--out", tmp_path / "parts", *how, "--seed", 1)
    assert problem.value.code == 2
    run(monkeypatch, "check", tmp_path / "parts")
    content = bytearray(kept.read_bytes())
    content[-5] ^= 4
    kept.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, "check", tmp_path / "parts")
    error = capsys.readouterr().err.strip().splitlines()
    assert problem.value.code == 2 and "shard-000000.safetensors: damaged" in error[-1]
    kept.unlink()
    with pytest.raises(checkpoint.ModelError, match="shard-000000"):
        data.ShardLatents(tmp_path / "parts", 0, "cpu")
    run(monkeypatch, "encode", folder, "--out", tmp_path / "parts", *how)
    assert kept.read_bytes() == (tmp_path / "whole" / kept.name).read_bytes()
    index = tmp_path / "parts" / "index.json"
    index.write_text(index.read_text().replace('"num_clips": 7', '"num_clips": 8'))
    with pytest.raises(ModelError, match="checksum"):
        data.ShardLatents(tmp_path / "parts", 0, "cpu")


@pytest.fixture
def shards(tmp_path, folder, pipeline_folder, monkeypatch):
    """The output of encode: seven clips, two per shard."""
    run(monkeypatch, "encode", folder, "--out", tmp_path / "shards", "--model", pipeline_folder,
        "--shard_size", 2, "--num_clips", 7, *SIZE)
    return tmp_path / "shards"


def test_flags_that_shards_or_the_toy_world_would_ignore_are_refused(shards, nets):
    sign(shards, fps=10, flip=True, motion_bucket_id=90, where=[["n", "0", "1"]])
    same = dict(fps=10, flip=True, motion_bucket_id=90, where=[["n", "0", "1"]])
    for given in ({}, same):                                        # not given, or as in `encode`
        assert data.open_data(flags(shards, **given), *nets).index["num_clips"] == 7
    for name, value, made in (("fps", 8, 10), ("motion_bucket_id", 5, 90), ("where", [["m", "0", "1"]], ""),
                              ("num_frames", 5, 4), ("width", W + 8, W), ("height", H + 8, H)):
        with pytest.raises(ModelError, match=f"shards has {name} .*{made}.*, not "):
            data.open_data(flags(shards, **{name: value}), *nets)
    sign(shards, flip=False)
    with pytest.raises(ModelError, match="flip not set, not True"):
        data.open_data(flags(shards, flip=True), *nets)
    toy = dict(num_clips=1, width=64, height=64)
    assert len(data.open_data(flags("toy", **toy), *nets).x0) == 1
    for name, value in (("fps", 8), ("flip", True), ("where", [["n", "0", "1"]]), ("width", 128),
                        ("motion_bucket_id", 127)):
        with pytest.raises(ModelError, match=f"--data toy has {name} .*, not "):
            data.open_data(flags("toy", **toy | {name: value}), *nets)
    with pytest.raises(ModelError, match=f"has width {W}, not 72; fps 10, not 8: give"):
        data.open_data(flags(shards, width=72, fps=8), *nets)


def sign(folder, **changes):
    """Changes index.json and signs it again."""
    index = checkpoint.read_json(folder / "index.json") | changes
    index.pop("sha256")
    checkpoint.write_json(folder / "index.json",
                          index | {"sha256": data.digest(json.dumps(index).encode())})


def test_shards_are_what_the_index_says(shards):
    names = list(checkpoint.read_json(shards / "index.json")["shards"])
    data.ShardLatents(shards, 0, "cpu")
    for changes in ({"num_clips": 0}, {"num_clips": -1}, {"num_clips": 9}, {"num_clips": 5},
                    {"shard_size": 0}, {"shard_size": 3}, {"num_frames": 5}, {"width": W + 8},
                    {"height": 0}, {"shards": {}}, {"num_clips": "7"},
                    {"num_clips": None}, {"shards": names}, {"width": 64.0},
                    {"shards": dict.fromkeys(names[:3])},
                    {"shards": dict.fromkeys([*names, "more.safetensors"])}):
        before = (shards / "index.json").read_bytes()
        sign(shards, **changes)
        with pytest.raises(ModelError, match="index.json|safetensors"):
            data.ShardLatents(shards, 0, "cpu")
        (shards / "index.json").write_bytes(before)

    file = shards / names[1]
    tensors = dict(checkpoint.read_safetensors([file]))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    without = {key: tensor for key, tensor in tensors.items() if key != "time_ids"}
    for others in (without, tensors | {"more": torch.zeros(2)}, tensors | {"x0": tensors["x0"][:1]},
                   tensors | {"x0": tensors["x0"][:, :2]}, tensors | {"image_embeds": torch.zeros(2, 24)},
                   tensors | {"image_embeds": torch.tensor(0.0)}, {}):
        checkpoint.write_safetensors(file, others)
        with pytest.raises(ModelError, match="shard-000001.safetensors"):
            data.ShardLatents(shards, 0, "cpu")
    tensors["x0"][1, 0, 0, 0, 0] = float("nan")
    save_file(tensors, file)
    latents = data.ShardLatents(shards, 0, "cpu")
    with pytest.raises(ModelError, match="shard-000001.safetensors: NaN or infinity in clip 1"):
        latents.take(torch.arange(7))


@pytest.mark.parametrize("content", [b"", bytes(64), b"0123abcd", b"\xff"])
def test_a_checksum_left_by_a_killed_writer_is_made_again(shards, folder, pipeline_folder, monkeypatch,
                                                          content):
    file = shards / "shard-000001.sha256"
    before, index = file.read_bytes(), (shards / "index.json").read_bytes()
    file.write_bytes(content)
    (shards / ".shard-000009.safetensors.part").write_bytes(b"half")
    run(monkeypatch, "encode", folder, "--out", shards, "--model", pipeline_folder, "--shard_size", 2,
        "--num_clips", 7, *SIZE)
    assert file.read_bytes() == before and (shards / "index.json").read_bytes() == index
    assert not list(shards.glob(".*.part"))
    run(monkeypatch, "check", shards)


def test_a_checksum_is_written_whole_or_not_at_all(tmp_path, folder, pipeline_folder, monkeypatch):
    def stops(file, text, *rest, **more):
        if "sha256" in file.name:
            with open(file, "w"):
                raise KeyboardInterrupt                             # opened, nothing written
        return original(file, text, *rest, **more)
    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", stops)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "encode", folder, "--out", tmp_path / "out", "--model", pipeline_folder, *SIZE)
    assert (tmp_path / "out" / "shard-000000.safetensors").exists()
    assert not list(tmp_path.glob("out/*.sha256"))


def test_encode_refuses_another_list_of_the_same_length(
        tmp_path, folder, pipeline_folder, monkeypatch, capsys):
    how = ("encode", tmp_path / "list.csv", "--out", tmp_path / "out", "--model", pipeline_folder, *SIZE)
    for name, ends in (("0.mp4", nullcontext()), ("1.mp4", pytest.raises(SystemExit))):
        (tmp_path / "list.csv").write_text(f"path\n{folder / name}\n")
        with ends:
            run(monkeypatch, *how)
    assert "was started with other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, "encode", folder, "--out", folder, "--model", pipeline_folder, *SIZE)
    assert "would overwrite" in capsys.readouterr().err and len(list(folder.iterdir())) == 7


def test_encode_on_two_processes(tmp_path, folder, pipeline_folder, monkeypatch):
    how = ["encode", folder, "--model", pipeline_folder, "--shard_size", 2, "--num_clips", 7, *SIZE]
    run(monkeypatch, *how, "--out", tmp_path / "one")
    for rank in (1, 0):                                             # the processes do not communicate
        assert not (tmp_path / "two" / "index.json").exists()
        world = engine.World(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(engine, "start_world", lambda world=world: world)
        run(monkeypatch, *how, "--out", tmp_path / "two")
    for file in (tmp_path / "one").glob("shard-*"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    index, other = (checkpoint.read_json(tmp_path / name / "index.json") for name in ("one", "two"))
    assert index == other


# ---- Commands -------------------------------------------------------------------------------------------


def test_check_writes_lists(tmp_path, good_video, monkeypatch, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    reasons = bad_files(videos, good_video)
    for name in ("a.mp4", "b.mp4"):
        os.link(good_video, videos / name)
    run(monkeypatch, "check", videos, "--out", tmp_path / "good.jsonl", "--workers", 1)
    run(monkeypatch, "check", videos, "--out", tmp_path / "good.jsonl", "--workers", 1)  # afresh
    assert f"2 videos are good: {tmp_path / 'good.jsonl'}; {len(reasons)} are not" in capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "good.bad.jsonl").read_text().splitlines()]
    assert {Path(row["path"]).name for row in bad} == set(reasons) and len(bad) == len(reasons)
    files = data.open_files(tmp_path / "good.jsonl", [("seconds", 2.9, 3.1)])
    assert [Path(file).name for file in files] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_check_keeps_the_columns_of_a_list(tmp_path, good_video, monkeypatch, suffix):
    """Its own facts replace columns of the same name. A list of bad videos that are good by now loses the
    reasons. More rows than are checked at a time."""
    rows = [{"video": "a.mp4" if i % 3 else "no.mp4", "caption": f'"{i}",\n', "seconds": "99", "score": i,
             "reason": "old"} for i in range(70)]
    os.link(good_video, tmp_path / "a.mp4")
    with open(tmp_path / f"list.{suffix}", "w", newline="") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(map(json.dumps, rows)))
    run(monkeypatch, "check", tmp_path / f"list.{suffix}", "--out", tmp_path / "good.jsonl", "--workers", 1,
        "--where", "score", 1, 69, *SIZE)
    good, bad = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                 for name in ("good.jsonl", "good.bad.jsonl"))
    assert [int(row["score"]) for row in good] == [i for i in range(1, 70) if i % 3]
    assert [int(row["score"]) for row in bad] == [i for i in range(1, 70) if not i % 3]
    for row in good:
        assert row["video"] == "a.mp4" and row["path"] == str(tmp_path / "a.mp4") and "reason" not in row
        assert row["caption"] == f'"{row["score"]}",\n' and 2 < row["seconds"] < 4
    assert all(row["reason"] != "old" and row["path"] == str(tmp_path / "no.mp4") for row in bad)
    assert len(data.open_files(tmp_path / "good.jsonl", [("score", 1, 5)])) == 4         # 1, 2, 4, 5


def test_check_keeps_earlier_lists_until_it_is_done(tmp_path, folder, monkeypatch, capsys):
    good, bad = tmp_path / "good.jsonl", tmp_path / "good.bad.jsonl"
    good.write_text("good before\n")
    bad.write_text("bad before\n")

    def stops(*arguments):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.tqdm, "update", stops)                   # while the lists are written
        run(monkeypatch, "check", folder, "--out", good, *SIZE)
    assert good.read_text() == "good before\n" and bad.read_text() == "bad before\n"
    assert sorted(tmp_path.iterdir()) == [bad, good]


def test_check_without_a_good_video_keeps_earlier_lists(tmp_path, monkeypatch, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text("good before\n")
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, "check", tmp_path, "--out", good, *SIZE)
    error = capsys.readouterr().err.split("\r")[-1]                 # after the progress bar
    assert problem.value.code == 2 and "none of 1 videos is good" in error and "a.mp4: Invalid data" in error
    assert good.read_text() == "good before\n" and sorted(tmp_path.iterdir()) == [tmp_path / "a.mp4", good]


def test_the_input_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """By check. preview writes pictures only, and a link that it writes to is replaced."""
    (tmp_path / "a.jsonl").write_text('{"path": "x.mp4"}\n')
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for name in ("a.jsonl", "link.jsonl", "bad"):
        data_list = tmp_path / "a.jsonl"
        if name == "bad":                                           # the second output is the input
            data_list = (tmp_path / "a.jsonl").rename(tmp_path / "new.bad.jsonl")
        out = tmp_path / ("new.jsonl" if name == "bad" else name)
        with pytest.raises(SystemExit):
            run(monkeypatch, "check", data_list, "--out", out)
        assert "would overwrite" in capsys.readouterr().err
        assert data_list.read_text() == '{"path": "x.mp4"}\n'


def test_what_a_search_passes_over_is_reported(tmp_path, good_video, pipeline_folder, monkeypatch, capsys):
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.MTS", "deep/c.m2ts", "d.3g2", "e.asf", "f.vob", "g.f4v"):
        os.link(good_video, videos / name)                          # FFmpeg looks at the content
    for name in ("x.txt", "y.TXT", "deep/z.jpg", ".mp4", "README"):
        (videos / name).write_text("no video")
    (videos / "link").symlink_to(tmp_path)
    for command, out in (("check", "good.jsonl"), ("preview", "a.png"), ("encode", "shards")):
        run(monkeypatch, command, videos, "--out", tmp_path / out, "--model", pipeline_folder,
            "--num_clips", 1, *SIZE)
        shown = capsys.readouterr().out
        assert "passed over 6 files: (hidden) (linked folder) (no suffix) .jpg .txt\n" in shown
        assert command != "check" or "7 videos are good" in shown
    data.open_files(videos)                                         # as a trainer does
    assert not capsys.readouterr().out


def test_sample_sheets_of_a_run_are_no_training_data(tmp_path):
    """--output_dir inside --data: a resume finds the same videos as the first run."""
    for name in ("run/sample-000050.mp4", "run/sample-1000000.mp4", "run/sample-2.mkv/sample-000050.mp4",
                 "run/sample-a.mp4", "run/mine.mp4", "sample-000050.mp4", "run/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(file, tmp_path) for file in data.open_files(tmp_path)]
    assert sorted(found) == ["run/mine.mp4", "run/sample-2.mkv/sample-000050.mp4", "run/sample-a.mp4",
                             "sample-000050.mp4"]


def test_folders_that_cannot_be_read_are_reported(tmp_path, monkeypatch, capsys):
    """os.scandir is replaced, because a test that runs as root can read every folder."""
    for name in ("a.mp4", "locked/b.mp4", "open/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    locked, scandir = str(tmp_path / "locked"), os.scandir

    def refuse(path):
        if str(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", locked)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert [Path(file).name for file in data.open_files(tmp_path)] == ["a.mp4", "c.mp4"]
    assert capsys.readouterr().err == f"warning: {locked!r}: Permission denied: left out\n"
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, "preview", locked, "--out", tmp_path / "sheet.png")
    error = capsys.readouterr().err
    assert problem.value.code == 2 and error.count("\n") == 1 and f"Permission denied: '{locked}'" in error


def test_preview(tmp_path, folder, monkeypatch, capsys):
    run(monkeypatch, "preview", folder, "--out", tmp_path / "sheet.png", "--num_clips", 3, *SIZE)
    assert Image.open(tmp_path / "sheet.png").size == (4 * (W + 2) + 2, 3 * (H + 2) + 2)
    assert capsys.readouterr().out.count('"path"') == 3


@pytest.mark.parametrize("arguments, message", [
    (("preview", "nothing-here"), "nor a folder"), (("preview", ".", "--width", "100"), "--width 100"),
    (("encode", ".", "--shard_size", "0"), "--shard_size: 0 is not "),
    (("watch", "."), "invalid choice"), (("check", ".", "--sed", "1"), "unrecognized"),
    (("check", "."), "no videos"),
    (("check", ".", "--where", "seconds", "1", "2"), "no .csv or .jsonl list"),
    (("check", ".", "--out", "/dev/null/a.jsonl"), "cannot be written"),
    (("preview", ".", "--out", "/dev/null/a.png"), "cannot be written"),
    (("check", ".", "--out", "good.csv"), "--out good.csv: check writes a .jsonl list"),
    (("check", ".", "--out", "good"), "--out good: check writes a .jsonl list"),
    (("preview", ".", "--out", "p.mp4"), "--out p.mp4: check writes a .jsonl list, preview a .png or .jpg")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert problem.value.code == 2 and error.count("\n") == 1
    assert error.startswith("data.py: ") and message in error
    assert not list(tmp_path.iterdir())


def test_encode_without_a_model_writes_nothing(tmp_path, folder, monkeypatch, capsys):
    with pytest.raises(SystemExit) as problem:
        run(monkeypatch, "encode", folder, "--out", tmp_path / "out", "--model", tmp_path / "none")
    assert problem.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_videos_need_pyav(python):
    code = "import sys; sys.modules['av'] = None; import data; data.toy_clips(0, [1], 2, 16)"
    subprocess.run([python, "-c", code], cwd=ROOT, check=True)
