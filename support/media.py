"""Pictures in, videos and contact sheets out.

    find_images         the pictures that a command line names: files, folders, stdin
    load_image          one picture file -> PIL image, RGB; load_images: several, without the unreadable ones
    fit_image           PIL image -> tensor of the size and range that the networks take
    to_bytes            pixels in [-1, 1] -> uint8
    save_video          frames -> .mp4 (by write_mp4), .gif, or .png (contact sheet)
    save_sheet          clips -> one picture file with a row per clip; contact_sheet returns its pixels

A video is [f 3 H W] and a picture [3 H W], with values in [-1, 1]. A file appears under its name only when it
is complete, so an interrupted write leaves an earlier file as it was.
"""
import io
import sys
import warnings
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from support.checkpoint import ModelError, replacing, require_file

MAX_PIXELS = 150_000_000                # of an input picture; a larger one is refused as a decompression bomb
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".tga")
# PIL reads more formats, whatever the suffix, and starts another program for one of them (PostScript).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "TGA")

# ---------------------------------------------------------------------------------------------------------
# Pictures in


def find_images(paths):
    """[(name, path)] of the pictures in `paths`, which are pictures, folders of pictures, or "-" for stdin.

    The order is that of `paths`, and alphabetical inside a folder, where the suffix tells which files are
    pictures. A name is the file's stem, with a number added if an earlier picture has that name; names that
    differ only in case count as equal, as in some file systems. Raises ModelError.
    """
    files = []
    for path in paths:
        if "://" in path:
            raise ModelError(f"{path}: a URL; download it and give the file, or pipe it into --image -")
        found = [Path(path)]
        if Path(path).is_dir():
            found = sorted(file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ModelError(f"{path}: no pictures in this folder ({' '.join(IMAGE_SUFFIXES)})")
            print(f"{path}: {len(found)} pictures of {len([*Path(path).iterdir()])} files", file=sys.stderr)
        files += found
    named = {}                                              # name in lower case -> (name, path)
    for file in files:
        names = (file.stem + f"_{n}" * (n > 0) for n in range(len(files)))
        name = next(name for name in names if name.casefold() not in named)
        named[name.casefold()] = name, file
    return list(named.values())


def load_images(paths):
    """Yields (index, path, picture) of the files `paths`, see load_image, one at a time. A picture that
    cannot be read is left out and named on stderr. Raises ModelError if none can be read."""
    num_left_out = 0
    for i, path in enumerate(paths):
        try:
            yield i, path, load_image(path)
        except ModelError as error:
            num_left_out += 1
            if num_left_out == len(paths):
                raise
            print(f"left out: {error}", file=sys.stderr)


def load_image(path):
    """The picture in a file (- for stdin) as a PIL image in sRGB, turned upright as its EXIF data says, with
    transparent parts on white. Raises ModelError if it cannot be read or is too large."""
    source = path
    if str(path) == "-":
        path, source = "standard input", io.BytesIO(sys.stdin.buffer.read() if sys.stdin else b"")
    require_file(Path(path))
    try:
        # PIL warns of damaged metadata, and of large pictures: MAX_PIXELS is the limit here.
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=IMAGE_FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"more than {MAX_PIXELS // 10 ** 6} million pixels")
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:                  # PIL's decoders raise errors of any kind for damaged files
        # PIL's own message for a file of no known format names the object that it read from.
        reason = f"not {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise ModelError(f"{path}: cannot be read as a picture ({reason})") from error
    profile = io.BytesIO(image.info.get("icc_profile", b""))
    if image.mode[0] in "IF":               # 16-bit or floating-point grey: convert("RGB") would clip it
        scale = 1 / 257 if image.mode != "F" else 255 if image.getextrema()[1] <= 1 else 1
        image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
    # In a BMP or TGA file, an alpha channel of zeros is an unused byte per pixel.
    unused = file.format in ("BMP", "TGA") and image.getextrema()[-1] == (0, 0)
    if image.has_transparency_data and not unused:
        mode = "L" if image.mode[0] == "L" else "RGB"
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    image = image if image.mode in ("L", "CMYK") else image.convert("RGB")
    with suppress(ImageCms.PyCMSError):                 # no profile, a damaged one, or one for another mode
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def fit_image(image, width, height):
    """PIL image of any size -> (pixels [3 H W] in [-1, 1], kept).

    The picture is cropped at the centre to the aspect ratio of width x height, then resized. kept: the
    fractions of its width and of its height that remain after the crop.
    """
    scale = max(width / image.width, height / image.height)
    kept = width / scale / image.width, height / scale / image.height
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return rearrange(pixels, "h w c -> c h w").float() / 127.5 - 1, kept


# ---------------------------------------------------------------------------------------------------------
# Videos and contact sheets out


def to_bytes(x):
    """x in [-1, 1] as uint8. A uint8 tensor is returned unchanged."""
    return x if x.dtype == torch.uint8 else (x.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


def save_video(frames, file, fps):
    """Writes frames [f 3 H W] in [-1, 1] as .mp4, .gif or .png (contact sheet), by the suffix of `file`.
    A gif plays at no more than 50 fps."""
    if file.suffix == ".png":
        return save_sheet(frames[None], file)
    pixels = to_bytes(rearrange(frames, "f c h w -> f h w c")).cpu().numpy()
    with replacing(file) as part:
        if file.suffix == ".mp4":
            return write_mp4(pixels, part, fps)
        # One palette for all frames: if each frame had its own, still parts would flicker.
        palette = Image.fromarray(rearrange(pixels, "f h w c -> (f h) w c")).quantize(256)
        images = [Image.fromarray(frame).quantize(palette=palette) for frame in pixels]
        # A gif counts time in 1/100 s. Rounding the start times of frames keeps the average rate exact.
        # Players show a delay below 2/100 s as 10/100 s, so the rate is at most 50 fps.
        starts = [round(100 * i / min(fps, 50)) for i in range(len(images) + 1)]
        durations = [10 * (end - start) for start, end in zip(starts, starts[1:])]              # milliseconds
        images[0].save(part, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def write_mp4(pixels, file, fps):
    """Writes pixels [f H W 3] uint8 as an mp4 that common players accept: H.264, 4:2:0, in the BT.709 colour
    space, which the file declares. Without the declaration players guess the colour matrix from the size."""
    import av
    with av.open(str(file), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(          # 1 is BT.709; as a range, 1 is 16 to 235
            "libx264", Fraction(fps), {"crf": "16", "preset": "slow"}, pix_fmt="yuv420p", color_range=1,
            height=pixels.shape[1], width=pixels.shape[2], colorspace=1, color_primaries=1, color_trc=1)
        for frame in pixels:
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def contact_sheet(frames, gap=2):
    """Clips [n f 3 h w] in [-1, 1], or uint8 -> one uint8 picture [H W 3]: a row per clip, its frames from
    left to right, with `gap` white pixels around each frame."""
    frames = F.pad(to_bytes(frames).cpu(), (gap, 0, gap, 0), value=255)                         # n f c h w
    sheet = F.pad(rearrange(frames, "n f c h w -> c (n h) (f w)"), (0, gap, 0, gap), value=255)  # c H W
    return rearrange(sheet, "c h w -> h w c")


def save_sheet(clips, file, shrink=1):
    """Writes the contact sheet of clips [n f 3 h w], reduced by the integer factor `shrink`, as a JPEG if
    `file` ends in .jpg, else as a PNG."""
    content = io.BytesIO()                      # on a full disk, PIL would write half a JPEG without an error
    sheet = Image.fromarray(contact_sheet(clips).numpy()).reduce(shrink)
    sheet.save(content, "JPEG" if file.suffix == ".jpg" else "PNG", quality=90)
    with replacing(file) as part:
        part.write_bytes(content.getvalue())
