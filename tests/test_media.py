"""support/media.py: pictures in, videos and contact sheets out."""
import av
import numpy as np
import pytest
import torch
from PIL import Image

from support import media
from support.media import find_images, fit_image, load_image, save_video

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


@pytest.mark.parametrize("size", [(1, 1), (5000, 40), (40, 5000), (128, 128), (1000, 1000)])
def test_any_size_is_cut_at_the_centre_without_distortion(size):
    image = Image.new("RGB", size, "black")
    pixels, kept = fit_image(image, 128, 64)
    assert pixels.shape == (3, 64, 128) and pixels.min() == pixels.max() == -1
    width, height = size[0] * kept[0], size[1] * kept[1]
    assert max(kept) == pytest.approx(1) and width / height == pytest.approx(2)


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


def test_gif_has_the_frame_rate(tmp_path):
    save_video(colour_clip(), tmp_path / "out.gif", fps=7)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 14
        durations = []
        for i in range(14):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert sum(durations) == 2000


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
