"""Where clips come from.

The toy world: procedural clips, 14 frames of 128x128 at 7 fps, in which everything of the paper can be run in
minutes. One to three textured shapes on a textured background move, turn and bounce off the borders. Their
speed is the clip's motion bucket. **The first frame does not tell where they go**, so one image has many
futures: a one-step teacher answers with their blurred mean, 25 steps with one sharp future. Closing that gap
is what the paper is about.

    toy_clips(seed, indices)  ->  ToyClips: frames, motion buckets, what is in the scene, where the shapes are
    toy_latents(...)          ->  Latents: the same clips encoded once, as training takes them
    contact_sheet(frames)     ->  one picture, a row of frames per clip

A clip is a pure function of (seed, index): no state, the same on every device and in any split into batches.
To look at the first eight clips:

    python -c "import data, PIL.Image; sheet = data.contact_sheet(data.toy_clips(0, range(8)).frames); \\
        PIL.Image.fromarray(sheet.numpy()).save('toy.png')"
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import model

# ---- The toy world --------------------------------------------------------------------------------------

# The world is 128 units wide whatever the picture's size. A kind is (corners, notch, size): the outline runs
# straight from an outer corner at radius 1 to an inner one at radius `notch`, half a turn / corners further
# on, and so forth. Regular polygons are stars whose inner corners lie on the chord; a disc has many sides.
WORLD = 128.0
KINDS = {"disc": (32, 1.0, 0.95), "square": (4, math.cos(math.pi / 4), 1.15),
         "triangle": (3, math.cos(math.pi / 3), 1.25), "star": (5, 0.5, 1.3)}
COLOURS = ((0.93, 0.26, 0.27), (0.98, 0.53, 0.16), (0.98, 0.80, 0.22), (0.42, 0.75, 0.31),
           (0.10, 0.68, 0.66), (0.22, 0.50, 0.93), (0.54, 0.33, 0.85), (0.93, 0.38, 0.66))
DARK, LIGHT = (0.07, 0.08, 0.15), (1.00, 0.97, 0.90)         # a background is its hue, mixed with one of them
MAX_SHAPES, LAYOUTS, CELLS, HEADINGS, SPEEDS = 3, 8, 4, 8, 8
FPS = 7
CHUNK = 2**24                                       # pixels rendered at a time: bounds the temporaries
HELD_OUT = 1_000_000                                # added to a seed: a world that nothing was trained on

NUM_STATIC = len(KINDS) * (len(COLOURS) + CELLS * CELLS) + len(COLOURS)
NUM_ATTRIBUTES = NUM_STATIC + len(KINDS) * (HEADINGS + 2) + SPEEDS


class ToyClips(NamedTuple):
    frames: Tensor                  # b f c h w, [-1, 1]
    motion_bucket_id: Tensor  # b        , 1 to 255; the speed is bucket / 127 * 4 pixels per frame at 128x128
    attributes: Tensor         # b k      , 0 or 1: first the NUM_STATIC that frame 0 shows, then the motion's
    centres: Tensor                 # b f n 2  , (x, y) in pixels
    present: Tensor                 # b n      , bool: is there an n-th shape?
    kind_map: Tensor                # b f h w  , int8: 0 is background, else 1 + the kind that is on top there


def uniforms(seed: int, indices: Tensor, stream: int, n: int) -> Tensor:
    """Stateless randomness, [b n] in [0, 1): a hash of (seed, stream, index, column), in wrapping int64."""
    def mix(x):                                                  # SplitMix64's finaliser (Steele et al. 2014)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor     # >> copies the sign bit: mask it away
        return x ^ (x >> 31 & (1 << 33) - 1)
    x = mix(mix(torch.full_like(indices, seed) + 1) + stream + 1)       # b
    x = mix(x ^ mix(indices + 0x632BE59BD9B4E019))                      # b
    x = mix(x[:, None] + mix(torch.arange(1, n + 1, device=indices.device)))            # b n
    return (x >> 40 & (1 << 24) - 1).float() / 2**24                   # 24 bits are exact in fp32, so never 1


@cache
def constants(device):
    """The tables above as tensors, made once per device: each copy to a GPU waits until it has finished."""
    return *torch.tensor(list(KINDS.values()), device=device).T, *(
        torch.tensor(table, device=device) for table in (COLOURS, DARK, LIGHT))


@torch.no_grad()
def toy_clips(seed: int, indices: Tensor, num_frames: int = 14, size: int = 128, device="cpu",
              motion_seed: int | None = None) -> ToyClips:
    """Clips `indices` [b] of the world `seed`. Another motion_seed: the same first frames, other futures."""
    indices = torch.as_tensor(indices, dtype=torch.int64, device=device)                # b
    chunk = max(1, CHUNK // (num_frames * size * size))
    if len(indices) > chunk:
        parts = (toy_clips(seed, i, num_frames, size, device, motion_seed) for i in indices.split(chunk))
        return ToyClips(*map(torch.cat, zip(*parts)))

    # ---- the scene: named columns of one table of random numbers
    n = MAX_SHAPES
    static = uniforms(seed, indices, 0, 7 + 8 * n + 2 * n * LAYOUTS)                    # b u
    count, backdrop, tone, waves, kind, colour, radius, angle, check, period, phase, place = static.split(
        [1, 1, 1, 4, n, n, n, n, n, n, 2 * n, 2 * n * LAYOUTS], dim=1)
    # Everything that the first frame must not show comes from a second stream.
    motion = uniforms(seed if motion_seed is None else motion_seed, indices, 1, 1 + 2 * n)          # b u
    bucket, heading, spin = motion.split([1, n, n], dim=1)

    corners, notch, scale, palette, dark, light = constants(device)                     # k each, p c, c, c
    present = torch.arange(n, device=device) < 1 + (count * n).long()                   # b n
    kind, backdrop = (kind * len(KINDS)).long(), (backdrop * len(COLOURS)).long()       # b n, b 1
    # A shape never has the background's colour.
    colour = (backdrop + 1 + (colour * (len(COLOURS) - 1)).long()) % len(COLOURS)       # b n
    radius = (15 + 8 * radius) * scale[kind]                                            # b n
    bucket = 1 + (bucket * 255).long()                                                  # b 1
    speed = bucket / 127                                                                # b 1

    # Of a few random layouts, the one whose shapes are farthest apart: frame 0 should show them all.
    margin = radius[:, None, :, None]                                                   # b 1 n 1
    place = margin + rearrange(place, "b (l n xy) -> b l n xy", n=n, xy=2) * (WORLD - 2 * margin)
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(n, dtype=torch.bool, device=device)    # b n n
    gaps = (place[:, :, :, None] - place[:, :, None]).norm(dim=-1)                      # b l n n
    best = gaps.masked_fill(~pairs[:, None], WORLD).amin((2, 3)).argmax(1)              # b
    place = place[torch.arange(len(place), device=device), best]                # b n 2

    # Straight motion folded back at the borders, a triangle wave: a position needs no history.
    time = torch.arange(num_frames, device=device)[:, None]                             # f 1
    heading = heading * 2 * math.pi                                                     # b n
    step = 4 * speed[..., None] * torch.stack((heading.cos(), heading.sin()), dim=-1)   # b n 2
    path = place[:, None] + step[:, None] * time[..., None] - margin                    # b f n 2
    span = WORLD - 2 * margin
    centres = margin + span - (path.remainder(2 * span) - span).abs()                   # b f n 2
    turn = torch.where(spin < 0.5, -0.12, 0.12) * speed                               # b n, radians per frame
    angle = angle[:, None] * 2 * math.pi + turn[:, None] * time                         # b f n

    # ---- what a label says: kinds with their colour, cell, heading, spin; the background's colour; the speed
    kinds = F.one_hot(kind, len(KINDS)) * present[..., None]                            # b n k
    bins = lambda x, num: F.one_hot((x * num).long().clamp(0, num - 1), num)
    with_kind = lambda x: (kinds[..., None] * x[:, :, None]).amax(dim=1).flatten(1)     # b n v -> b (k v)
    cell = bins(place / WORLD, CELLS)                                                   # b n 2 v
    cell = rearrange(cell[:, :, 1, :, None] * cell[:, :, 0, None], "b n y x -> b n (y x)")
    attributes = torch.cat((
        with_kind(F.one_hot(colour, len(COLOURS))), with_kind(cell), F.one_hot(backdrop[:, 0], len(COLOURS)),
        with_kind(bins(heading / (2 * math.pi), HEADINGS)), with_kind(bins(spin, 2)),
        bins((bucket[:, 0] - 1) / 255, SPEEDS)), dim=1).float()                         # b a

    # ---- the background: two soft waves between a darker and a lighter partner of its hue
    pixel = (torch.arange(size, device=device) + 0.5) * (WORLD / size)                  # w
    y, x = pixel[:, None], pixel[None]                                                  # h 1, 1 w
    per_pixel = lambda v: v[..., None, None]                                            # .. -> .. 1 1
    tilt = 2 * math.pi * waves[:, 0]                                                    # b
    along = per_pixel(tilt.cos()) * x + per_pixel(tilt.sin()) * y                       # b h w
    across = per_pixel(tilt.cos()) * y - per_pixel(tilt.sin()) * x                      # b h w
    wavelength = per_pixel(50 + 50 * waves[:, 1])
    ripple = 0.5 + 0.25 * ((along / wavelength + per_pixel(waves[:, 2])) * 2 * math.pi).sin() \
                 + 0.25 * ((across / wavelength * 0.7 + per_pixel(waves[:, 3])) * 2 * math.pi).sin()   # b h w
    hue = palette[backdrop[:, 0]]                                                       # b c
    ground = torch.where(tone < 0.6, dark, light)                                       # b c
    background = per_pixel(ground) + per_pixel(hue - ground) * (0.12 + 0.3 * ripple[:, None])       # b c h w
    image = background[:, None].repeat(1, num_frames, 1, 1, 1)                          # b f c h w
    kind_map = torch.zeros(len(indices), num_frames, size, size, dtype=torch.int8, device=device)    # b f h w

    # ---- the shapes, later ones in front
    for i in range(n):
        of_clip = lambda v: v[:, None, None, None]                                      # b -> b 1 1 1
        dx, dy = x - per_pixel(centres[:, :, i, 0]), y - per_pixel(centres[:, :, i, 1])     # b f 1 w, b f h 1
        cos, sin = per_pixel(angle[:, :, i].cos()), per_pixel(angle[:, :, i].sin())     # b f 1 1
        u, v = cos * dx + sin * dy, cos * dy - sin * dx                       # b f h w, the shape's own frame

        # Signed distance: fold the plane into the wedge between an outer corner and an inner one; there the
        # outline is one straight line. Exact but outside of corners, where only the soft shadow sees it.
        half, r, inner = math.pi / corners[kind[:, i]], radius[:, i], notch[kind[:, i]]             # b each
        normal_x, normal_y = inner * half.sin(), 1 - inner * half.cos()                             # b each
        length = torch.hypot(normal_x, normal_y)
        fold = (torch.atan2(v, u) + of_clip(half)).remainder(of_clip(2 * half)) - of_clip(half)     # b f h w
        rho = torch.hypot(u, v)
        distance = (rho * fold.cos() - of_clip(r)) * of_clip(normal_x / length) \
            + rho * fold.abs().sin() * of_clip(normal_y / length)                                   # b f h w

        # Soft stripes or checks of a light and a dark partner, a darker rim, and a soft shadow all around.
        tau = 2 * math.pi / (20 + 10 * of_clip(period[:, i]))
        shift = 2 * math.pi * phase[:, 2 * i:2 * i + 2]                                             # b 2
        stripes, crossing = (u * tau + of_clip(shift[:, 0])).sin(), (v * tau + of_clip(shift[:, 1])).sin()
        shade = 0.5 + 0.5 * (2 * torch.where(of_clip(check[:, i]) < 0.5, stripes, stripes * crossing)).tanh()
        shade = (0.66 + 0.34 * shade) * (1 - 0.3 * (distance / 4).clamp(-1, 0).add(1))             # b f h w
        paint = per_pixel(palette[colour[:, i]][:, None]) * shade[:, :, None]                      # b f c h w
        shown = of_clip(present[:, i])
        cover = (0.5 - distance * (size / WORLD)).clamp(0, 1) * shown                               # b f h w
        shadow = 1 - 0.35 * (-distance.clamp(min=0) / 2.5).exp() * shown                             # b f h w
        image = (image * shadow[:, :, None]).lerp(paint, cover[:, :, None])                        # b f c h w
        kind_map = torch.where(cover > 0.5, (1 + of_clip(kind[:, i])).to(torch.int8), kind_map)
    return ToyClips(image * 2 - 1, bucket[:, 0], attributes, centres * (size / WORLD), present, kind_map)


class Latents(NamedTuple):
    """Encoded clips. What every training step would compute anew is computed once and kept, in bf16."""

    x0: Tensor                      # n f 4 h w  scaled: unit variance
    image_embeds: Tensor            # n 1 d
    image_latents: Tensor           # n 4 h w    unscaled; the same on each frame, so kept once
    time_ids: Tensor                # n 3

    def take(self, index: Tensor):
        """Clips number `index` [b], counted round and round -> x0 [b f 4 h w] and their model.Cond, fp32."""
        x0, embeds, image, ids = (x[index.to(x.device) % len(x)].float() for x in self)
        return x0, model.Cond(embeds, repeat(image, "b c h w -> b f c h w", f=x0.shape[1]), ids)


@torch.no_grad()
def toy_latents(vae, image_encoder, seed: int, num_clips: int, num_frames: int = 14, size: int = 128,
                device="cpu", batch_size: int = 64) -> Latents:
    """Render and encode clips 0 .. num_clips - 1 of the world `seed`. The noise on the condition image has
    the strength SVD was trained with, ln N(-3, 0.5^2), drawn once per clip."""
    generator, cache = torch.Generator(device), []
    for start in tqdm(range(0, num_clips, batch_size), "latents", disable=None):
        numbers = torch.arange(start, min(start + batch_size, num_clips))
        batch = toy_clips(seed, numbers, num_frames, size, device)
        image, frames = batch.frames[:, 0], batch.frames.flatten(0, 1)                  # b 3 H W, (b f) 3 H W
        generator.manual_seed(seed * 1_000_003 + start)
        strength = (-3 + 0.5 * torch.randn(len(image), generator=generator, device=device)).exp()      # b
        noise = torch.randn(image.shape, generator=generator, device=device)
        noisy = image + strength[:, None, None, None] * noise                           # b 3 H W
        latents, image_latents = vae.encode(torch.cat((frames, noisy))).tensor_split([len(frames)])
        latents = rearrange(latents * vae.config["scaling_factor"], "(b f) c h w -> b f c h w", f=num_frames)
        fps = torch.full_like(strength, FPS - 1)
        ids = torch.stack((fps, batch.motion_bucket_id, strength), dim=1)               # b 3
        embeds = model.embed_image(image_encoder, image)                                # b 1 d
        cache.append((latents.bfloat16(), embeds, image_latents.bfloat16(), ids))
    return Latents(*map(torch.cat, zip(*cache)))


def contact_sheet(frames: Tensor, gap: int = 2) -> Tensor:
    """Clips [n f 3 h w] in [-1, 1] -> one uint8 picture [H W 3]: a row per clip, frames left to right."""
    frames = F.pad(frames.detach().float().cpu().clamp(-1, 1), (gap, 0, gap, 0), value=1.0)        # n f c h w
    sheet = F.pad(rearrange(frames, "n f c h w -> c (n h) (f w)"), (0, gap, 0, gap), value=1.0)     # c H W
    return rearrange((sheet * 127.5 + 127.5).round().byte(), "c h w -> h w c")
