"""support/media.py: pictures in, videos and contact sheets out."""
import io
import itertools
import os
import struct
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from support import media
from support.checkpoint import ModelError
from support.media import find_images, fit_image, load_image, load_images, save_video

# ---- pictures in ----------------------------------------------------------------------------------------


def picture(width=30, height=20):
    """Red left half, blue right half."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :width // 2], pixels[:, width // 2:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("suffix, mode", [
    ("png", "RGB"), ("png", "P"), ("png", "RGBA"), ("webp", "RGB"),
    ("bmp", "RGB"), ("gif", "P"), ("tiff", "CMYK"), ("jpg", "CMYK")])
def test_colours_survive_every_format(tmp_path, suffix, mode):
    file = tmp_path / f"in.{suffix}"
    picture().convert(mode).save(file)
    image = load_image(file)
    assert image.mode == "RGB" and image.size == (30, 20)
    left, right = np.asarray(image, float)[5, 5], np.asarray(image, float)[5, 25]
    assert np.abs(left - (255, 0, 0)).max() < 16 and np.abs(right - (0, 0, 255)).max() < 16


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey_pictures_keep_their_brightness(tmp_path, mode):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(64, 0)
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "in.png")
    loaded = np.asarray(load_image(tmp_path / "in.png"), float)
    assert loaded.shape == (64, 64, 3) and np.abs(loaded[..., 0].mean() - 127) < 8
    if mode != "1":
        assert np.abs(loaded[0, :, 0] - ramp[0]).max() <= 1


def test_rotated_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # camera turned by 90 degrees
    picture().save(tmp_path / "in.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "in.jpg")
    assert image.size == (20, 30)
    top, bottom = np.asarray(image, float)[3, 10], np.asarray(image, float)[26, 10]
    assert top[0] > 200 and bottom[2] > 200                                     # red on top, blue below


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "in.png")
    assert np.asarray(load_image(tmp_path / "in.png")).min() == 255


def bmp(pixels):
    """The bytes of a 32-bit BMP with BITFIELDS and pixels [h w 4] in RGBA."""
    height, width = pixels.shape[:2]
    masks = [0xFF0000, 0xFF00, 0xFF, 0xFF000000]
    info = struct.pack("<I2i2H6i4I52x", 124, width, -height, 1, 32, 3, 0, 0, 0, 0, 0, *masks)
    start = 14 + len(info)
    header = struct.pack("<2sI4xI", b"BM", start + pixels.nbytes, start)
    return header + info + pixels[..., [2, 1, 0, 3]].tobytes()


@pytest.mark.parametrize("suffix", ["bmp", "tga"])
def test_an_unused_alpha_byte_is_not_transparency(tmp_path, suffix):
    """Programs that know no alpha write zeros there. If any pixel is opaque, the channel counts."""
    pixels = np.dstack([np.asarray(picture()), np.zeros((20, 30), np.uint8)])
    for alpha, right in ((0, (0, 0, 255)), (255, (255, 255, 255))):
        pixels[:, :15, 3] = alpha
        if suffix == "bmp":
            (tmp_path / "in.bmp").write_bytes(bmp(pixels))
        else:
            Image.fromarray(pixels).save(tmp_path / "in.tga")
        image = load_image(tmp_path / f"in.{suffix}")
        assert image.getpixel((5, 5)) == (255, 0, 0) and image.getpixel((25, 5)) == right


def xyz(*values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def icc(space, gamma, **colorants):
    """The bytes of an ICC profile, version 2. colorants: a tag's name and its XYZ under D50."""
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    tags = {name: xyz(*value) for name, value in colorants.items()}
    tags |= {"kTRC": curve} if space == "GRAY" else {"rTRC": curve, "gTRC": curve, "bTRC": curve}
    tags["wtpt"] = white = xyz(0.9642, 1, 0.8249)
    start, table = 132 + 12 * len(tags), struct.pack(">I", len(tags))
    for name, tag in tags.items():
        table += struct.pack(">4s2I", name.encode(), start, len(tag))
        start += len(tag)
    header = struct.pack(">I4xI4s4s4s12x4s28x12s48x", start, 0x2400000, b"mntr", space.ljust(4).encode(),
                         b"XYZ ", b"acsp", white[8:])
    return header + table + b"".join(tags.values())


ADOBE_RGB = icc("RGB", 2.2, rXYZ=(0.60974, 0.31111, 0.01947), gXYZ=(0.20528, 0.62567, 0.06087),
                bXYZ=(0.14919, 0.06322, 0.74457))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_converted_to_srgb(tmp_path, mode):
    """The linear values are (0.311, 0.157, 0.101) in Adobe RGB, which is (0.372, 0.157, 0.099) in sRGB."""
    image = Image.new("RGB", (8, 8), (150, 110, 90))
    image = image.quantize() if mode == "P" else image.convert(mode)
    image.save(tmp_path / "in.png", icc_profile=ADOBE_RGB)
    right = (164, 110, 88)
    assert np.abs(np.subtract(load_image(tmp_path / "in.png").getpixel((4, 4)), right)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_is_converted_to_srgb(tmp_path, mode):
    """Half of the light is level 188 in sRGB."""
    colour = {"L": 128, "LA": (128, 255), "I;16": 128 * 257}[mode]
    Image.new(mode, (8, 8), colour).save(tmp_path / "in.png", icc_profile=icc("GRAY", 1))
    assert np.abs(np.subtract(load_image(tmp_path / "in.png").getpixel((4, 4)), 188)).max() <= 1


@pytest.mark.parametrize("profile", [
    b"nothing" * 30, ADOBE_RGB[:200], ADOBE_RGB[:-90], ADOBE_RGB.replace(b"RGB ", b"CMYK"), icc("GRAY", 1)])
def test_a_broken_profile_is_ignored(tmp_path, profile):
    Image.new("RGB", (8, 8), (150, 110, 90)).save(tmp_path / "in.png", icc_profile=profile)
    assert load_image(tmp_path / "in.png").getpixel((4, 4)) == (150, 110, 90)


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_grey(tmp_path, top):
    """The values are 0 to 1 or 0 to 255."""
    ramp = np.linspace(0, top, 64, dtype=np.float32)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "in.tiff")
    loaded = np.asarray(load_image(tmp_path / "in.tiff"), float)
    assert np.abs(loaded - ramp[..., None] * 255 / top).max() <= 0.5


@pytest.mark.parametrize("size", [(1, 1), (5000, 40), (40, 5000), (128, 128), (1000, 1000)])
def test_any_size_is_cut_at_the_centre_without_distortion(size):
    image = Image.new("RGB", size, "black")
    pixels, kept = fit_image(image, 128, 64)
    assert pixels.shape == (3, 64, 128) and pixels.min() == pixels.max() == -1
    width, height = size[0] * kept[0], size[1] * kept[1]
    assert max(kept) == pytest.approx(1) and width / height == pytest.approx(2)


@pytest.mark.parametrize("width, height", [(16, 9), (9, 5), (1, 1)])
def test_the_crop_is_inside_the_picture(width, height):
    """For 1024x576, 576x320 and 128x128: their aspect ratios give the same crops. PIL refuses larger ones."""
    result, worst = Image.new("RGB", (width, height)), []

    def resize(size, method, box):
        worst.append(max(-box[0], -box[1], box[2] - image.width, box[3] - image.height))
        assert box[2] - box[0] == pytest.approx(min(image.width, image.height * width / height))
        return result
    for size in itertools.product(range(1, 701), (1, 37, 256, 333, 700)):
        for image_width, image_height in (size, size[::-1]):
            image = SimpleNamespace(width=image_width, height=image_height, size=(image_width, image_height),
                                    mode="RGB", resize=resize)
            fit_image(image, width, height)
    assert len(worst) == 7000 and max(worst) <= 0


@pytest.mark.parametrize("size, width, height", [
    ((500, 333), 576, 320), ((1280, 886), 128, 128), ((197, 256), 1024, 576)])
def test_sizes_whose_crop_was_outside_by_rounding(size, width, height):
    pixels, _ = fit_image(picture(*size), width, height)
    assert pixels.shape == (3, height, width)
    assert pixels[:, 5, 5].tolist() == [1, -1, -1] and pixels[:, -5, -5].tolist() == [-1, -1, 1]


def test_a_picture_of_the_right_size_is_not_touched():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels, _ = fit_image(Image.fromarray(noise), 64, 64)
    assert np.array_equal(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), noise)


def test_pictures_with_one_stem_get_names_of_their_own(tmp_path):
    """So that no video overwrites another. A folder is read in alphabetical order, without other files."""
    (tmp_path / "a").mkdir()
    for name in ("a/in.png", "a/in.jpg", "a/notes.txt", "in.png"):
        (tmp_path / name).touch()
    found = find_images([str(tmp_path / "in.png"), str(tmp_path / "a"), "-"])
    assert [name for name, _ in found] == ["in", "in_1", "in_2", "-"]
    assert [file.name for _, file in found] == ["in.png", "in.jpg", "in.png", "-"]


@pytest.mark.parametrize("files", [("a.png", "a_1.png", "x/a.png"), ("x/a.png", "a.png", "a_1.png"),
                                   ("a.png", "A.png", "a_1.png"), ("a.png",) * 3], ids=str)
def test_numbered_names_are_unique(files):
    """Also of pictures whose own name ends in a number, and in file systems that ignore case."""
    names = [name for name, _ in find_images(files)]
    assert len({name.lower() for name in names}) == 3


def test_folders_are_searched_for_every_format(tmp_path, capsys):
    """And the number of files that were passed over can be seen."""
    suffixes = [suffix for suffix in media.IMAGE_SUFFIXES if suffix != ".avif" or features.check("avif")]
    for suffix in suffixes:
        picture().save(tmp_path / f"in{suffix}")
    (tmp_path / "in.heic").touch()
    found = find_images([str(tmp_path)])
    assert {file.suffix for _, file in found} == set(suffixes) >= {".png", ".jpg", ".webp"}
    assert all(load_image(file).size == (30, 20) for _, file in found)
    assert f"{len(suffixes)} pictures of {len(suffixes) + 1} files" in capsys.readouterr().err


def test_one_unreadable_picture_costs_only_itself(tmp_path, capsys):
    """It is named with the reason. If none is left, the last one's reason is the error."""
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file in files[::2]:
        picture().save(file)
    files[1].write_text("no picture")
    read = list(load_images(files))
    assert [(i, path, image.size) for i, path, image in read] == [
        (0, files[0], (30, 20)), (2, files[2], (30, 20))]
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and f"left out: {files[1]}: cannot be read as a picture" in complaint
    for missing in ([files[1]], [files[1], tmp_path / "nowhere.png"]):
        with pytest.raises(ModelError, match=f"{missing[-1].name}: cannot be read as a picture"):
            list(load_images(missing))
        assert capsys.readouterr().err.count("\n") == len(missing) - 1


def test_only_the_formats_of_pictures_are_opened(tmp_path, monkeypatch):
    """PostScript in a .png file would start ghostscript."""
    (tmp_path / "in.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.init()
    monkeypatch.setitem(Image.OPEN, "EPS", (lambda *_: pytest.fail("PostScript was opened"), None))
    with pytest.raises(ModelError, match="in.png: cannot be read as a picture"):
        load_image(tmp_path / "in.png")


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
def test_a_named_pipe_is_no_picture(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "in.png")
    for path in (tmp_path / "in.png", "/dev/zero", tmp_path):
        with pytest.raises(ModelError, match="a folder, pipe or device, not a file"):
            load_image(path)


@pytest.mark.parametrize("content", [None, b"", b"text"], ids=["closed", "empty", "text"])
def test_no_picture_on_stdin(monkeypatch, content):
    stdin = None if content is None else SimpleNamespace(buffer=io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ModelError, match="^standard input: cannot be read as a picture .not PNG, JPEG"):
        load_image("-")


@pytest.mark.parametrize("error", [IndexError(), KeyError(7), struct.error("size"), OverflowError()])
def test_any_error_of_a_decoder_is_an_unreadable_picture(tmp_path, monkeypatch, error):
    picture().save(tmp_path / "in.png")

    def damaged(self):
        raise error
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", damaged)
    with pytest.raises(ModelError, match="in.png: cannot be read as a picture"):
        load_image(tmp_path / "in.png")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_PIXELS", 100)
    picture().save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="million pixels"):
        load_image(tmp_path / "in.png")


# ---- videos out -----------------------------------------------------------------------------------------


def colour_clip(num_frames=14, size=64):
    """A saturated colour in each corner, fading over the frames."""
    corners = torch.tensor([[[0.9, -0.8, -0.8], [-0.8, 0.9, -0.8]], [[-0.8, -0.8, 0.9], [0.9, 0.9, -0.8]]])
    image = corners.permute(2, 0, 1).repeat_interleave(size // 2, 1).repeat_interleave(size // 2, 2)
    return image * torch.linspace(1, 0.3, num_frames).view(-1, 1, 1, 1)         # f 3 H W


def test_mp4_plays_everywhere(tmp_path):
    frames = colour_clip()
    save_video(frames, tmp_path / "out.mp4", fps=7)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 7 and stream.frames == 14
        decoded = [frame for frame in container.decode(stream)]
        times = [float(frame.pts * stream.time_base) for frame in decoded]
        pixels = np.stack([frame.reformat(src_colorspace="ITU709", format="rgb24").to_ndarray()
                           for frame in decoded])
    assert times == pytest.approx([i / 7 for i in range(14)])
    expected = ((frames + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    middles = np.s_[:, 16::32, 16::32]                  # of the corners; at their edges 4:2:0 smears colour
    assert np.abs(pixels[middles] - expected[middles]).max() < 4        # a mistaken matrix or range gives 20


@pytest.mark.parametrize("fps, total", [(7, 2000), (30, 470), (50, 280), (60, 280), (240, 280)])
def test_gif_has_the_frame_rate(tmp_path, fps, total):
    """Up to 50 fps: players show a frame of less than 20 ms for 100 ms."""
    save_video(colour_clip(), tmp_path / "out.gif", fps=fps)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 14
        durations = []
        for i in range(14):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == total and min(durations) >= 20


def test_png_is_a_contact_sheet(tmp_path):
    save_video(colour_clip(4), tmp_path / "out.png", fps=7)
    width, height = Image.open(tmp_path / "out.png").size
    assert width >= 4 * 64 and 64 <= height < 80


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"earlier")

    def full_disk(pixels, file, fps):
        file.write_bytes(b"half a vid")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(media, "write_mp4", full_disk)
    with pytest.raises(OSError):
        save_video(colour_clip(2), out, fps=7)
    assert out.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [out]
