"""Image to video, end to end: our teacher against diffusers' StableVideoDiffusionPipeline.

Weights, image and noise are the same. After 25 steps in fp32 the latents differ by 2e-6. At high noise the
two agree to 1e-8, because x is almost entirely the shared noise. As sigma falls, the network's output makes
up more of x, and fp32 rounding changes that output by 1e-6 per call.
"""
import diffusers
import numpy as np
import pytest
import torch
from conftest import assert_close_relative, relative_error
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

import model
import solver

diffusers.utils.logging.set_verbosity_error()
TOLERANCE = 1e-5
HEIGHT, WIDTH, FRAMES = 64, 128, 5


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    pipeline = StableVideoDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def networks(pipeline_folder):
    """Our UNet, VAE and image encoder, from the same folder."""
    loaders = model.load_unet, model.load_vae, model.load_image_encoder
    return tuple(load(pipeline_folder) for load in loaders)


def random_images(n=1, height=HEIGHT, width=WIDTH):
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def to_tensor(images):
    """PIL images -> b 3 H W in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1


def run_diffusers(pipeline, images, noise, output_type="latent", **options):
    """noise: a pair (for the pixels, for the latents). The pipeline draws the pixel noise itself, as the
    first use of its generator; make_noise draws the same numbers from a generator with the same seed."""
    return pipeline(images, height=HEIGHT, width=WIDTH, num_frames=FRAMES, latents=noise[1],
                    generator=torch.Generator().manual_seed(1), output_type=output_type, **options).frames


def make_noise(b=1):
    return (torch.randn(b, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)),
            torch.randn(b, FRAMES, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def run_ours(networks, images, noise, guidance=(1.0, 3.0), num_steps=25, fps=7, motion_bucket_id=127,
             noise_aug_strength=0.02):
    unet, vae, image_encoder = networks
    cond = model.encode_condition(vae, image_encoder, to_tensor(images), noise[0], num_frames=FRAMES, fps=fps,
                                  motion_bucket_id=motion_bucket_id, noise_aug_strength=noise_aug_strength)
    sigmas = solver.karras_sigmas(num_steps)
    if guidance is not None:
        guidance = torch.linspace(*guidance, FRAMES).view(1, FRAMES, 1, 1, 1)
    return solver.solve(unet, noise[1] * (sigmas[0] ** 2 + 1).sqrt(), sigmas, cond, guidance)


@pytest.mark.parametrize("low, high, steps", [(1.0, 3.0, 25), (3.0, 3.0, 4), (1, 3, 4)])
def test_guided_teacher_makes_the_latents_of_diffusers(pipeline, networks, low, high, steps):
    """Guidance grows linearly over the frames, from `low` to `high`."""
    images, noise = random_images(), make_noise()
    expected = run_diffusers(pipeline, images[0], noise, num_inference_steps=steps,
                             min_guidance_scale=low, max_guidance_scale=high)
    assert_close_relative(run_ours(networks, images, noise, (low, high), steps), expected, TOLERANCE)


def test_each_frame_has_its_own_guidance(networks):
    """A constant guidance of the same mean, or the reversed ramp, gives other latents. Without this, the test
    above would not notice the difference."""
    images, noise = random_images(), make_noise()
    latents = run_ours(networks, images, noise, (1.0, 3.0), 4)
    for other in ((2.0, 2.0), (3.0, 1.0)):
        assert relative_error(run_ours(networks, images, noise, other, 4), latents) > 1e-2


def test_unguided_teacher_makes_the_latents_of_diffusers(pipeline, networks):
    images, noise = random_images(), make_noise()
    expected = run_diffusers(pipeline, images[0], noise, num_inference_steps=4, max_guidance_scale=1.0)
    assert_close_relative(run_ours(networks, images, noise, None, 4), expected, TOLERANCE)


@pytest.mark.parametrize("options", [{"fps": 25}, {"motion_bucket_id": 1}, {"noise_aug_strength": 0.3}],
                         ids=str)
def test_each_setting_means_what_it_means_in_diffusers(pipeline, networks, options):
    images, noise = random_images(), make_noise()
    expected = run_diffusers(pipeline, images[0], noise, num_inference_steps=4, **options)
    assert_close_relative(run_ours(networks, images, noise, num_steps=4, **options), expected, TOLERANCE)
    # The setting has an effect: with the defaults the latents differ.
    assert relative_error(run_ours(networks, images, noise, num_steps=4), expected) > 1e-3


@pytest.mark.parametrize("steps", [1, 2])
def test_very_few_steps_make_the_latents_of_diffusers(pipeline, networks, steps):
    """A step from sigma = 700 to 0.002 or 0 computes a number of size 1 as the difference of two numbers of
    size 700. fp32 rounds those by 700 * 6e-8 = 4e-5, so that is the tolerance here."""
    images, noise = random_images(), make_noise()
    expected = run_diffusers(pipeline, images[0], noise, num_inference_steps=steps)
    assert_close_relative(run_ours(networks, images, noise, num_steps=steps), expected, 4e-5)


def test_a_batch_of_images_makes_the_latents_of_diffusers(pipeline, networks):
    """Each clip has its own image, and the second clip equals the one that is sampled alone."""
    images, noise = random_images(2), make_noise(2)
    expected = run_diffusers(pipeline, images, noise, num_inference_steps=4)
    actual = run_ours(networks, images, noise, num_steps=4)
    assert_close_relative(actual, expected, TOLERANCE)
    alone = run_ours(networks, images[1:], tuple(tensor[1:] for tensor in noise), num_steps=4)
    assert_close_relative(actual[1:], alone, TOLERANCE)


def test_several_videos_of_one_image_make_the_latents_of_diffusers(pipeline, networks):
    """diffusers adds the same pixel noise to all videos of an image."""
    images, (pixel_noise, _) = random_images(), make_noise()
    noise = pixel_noise, make_noise(2)[1]
    expected = run_diffusers(pipeline, images[0], noise, num_inference_steps=4, num_videos_per_prompt=2)
    actual = run_ours(networks, images * 2, (pixel_noise.repeat(2, 1, 1, 1), noise[1]), num_steps=4)
    assert_close_relative(actual, expected, TOLERANCE)


@pytest.mark.parametrize("chunk", [FRAMES, 2, 1])
@torch.no_grad()
def test_frames_are_those_of_diffusers(pipeline, networks, chunk):
    """From the image to pixels in [0, 1]. The decoder mixes the frames of a chunk, so the chunk size changes
    the result: 5 frames in chunks of 2 are decoded as 2, 2 and 1."""
    images, noise, vae = random_images(), make_noise(), networks[1]
    expected = run_diffusers(pipeline, images[0], noise, "pt", num_inference_steps=4, decode_chunk_size=chunk)
    latents = run_ours(networks, images, noise, num_steps=4)[0] / vae.config["scaling_factor"]
    frames = torch.cat([vae.decode(part, len(part)) for part in latents.split(chunk)])
    assert_close_relative((frames / 2 + 0.5).clamp(0, 1), expected[0], TOLERANCE)
    if chunk < FRAMES:
        assert relative_error(vae.decode(latents, FRAMES), frames) > 1e-2
