"""Tests of the graders in test_exercises.py, of the pictures, and of the capstone.

Every stub must fail, have the library's signature, and stay short. Every mutant must fail: a plausible wrong
answer, made from the library's own source by changing a few characters. When the library changes and no
longer contains the text that a mutant replaces, the test says so, and the mutant needs the new text.
"""
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
import textwrap

import pytest
import test_exercises as graders
import torch
import torch.nn.functional as F
from conftest import assert_close_relative, randomize, small_image_encoder, unet_config, vae_config
from PIL import Image
from torch import nn

import evaluate
import model
from support.checkpoint import ModelError, save_network

plug = graders.plug
show = importlib.import_module("show")          # in exercises/, which test_exercises.py adds to the path
second_year = importlib.import_module("second_year.grader")
LIBRARY = plug.library()
STUBS = plug.answers(plug.ROOT / "exercises")

# (name, text in the library's source, text of the mutant, what is wrong with it)
MUTANTS = [
    ("karras_sigmas", "linspace(0, 1, n,", "linspace(0, 1, n + 1,", "one level too many"),
    ("karras_sigmas", "hi + ramp * (lo - hi)", "lo + ramp * (hi - lo)", "ascending"),
    ("karras_sigmas", "torch.cat([sigmas, sigmas.new_zeros(1)])", "sigmas", "no trailing 0"),
    ("karras_sigmas", "(hi + ramp * (lo - hi)) ** rho", "sigma_max + ramp * (sigma_min - sigma_max)",
     "even in sigma"),
    ("karras_sigmas", "linspace(0, 1, n,", "linspace(0, 1 - 1 / n, n,", "sigma_min is never reached"),
    ("karras_sigmas", "** (1 / rho), sigma_max ** (1 / rho)", "** (1 / RHO), sigma_max ** (1 / RHO)",
     "rho ignored on the way in"),
    ("karras_sigmas", "** (1 / rho), sigma_max", "** (1 / rho), SIGMA_MAX", "sigma_max ignored"),
    ("karras_sigmas", "lo, hi = sigma_min", "lo, hi = SIGMA_MIN", "sigma_min ignored"),
    ("karras_sigmas", "new_zeros(1)]).float()", "new_zeros(1)])", "in fp64"),
    ("karras_sigmas", "torch.linspace(0, 1, n, dtype=torch.float64)", "torch.arange(n) / (n - 1)",
     "0 / 0 for one level"),
    ("karras_sigmas", "sigmas.new_zeros(1)", "sigmas.new_full([1], 1e-5)", "ends above 0"),
    ("precondition", "-sigma * square.rsqrt()", "sigma * square.rsqrt()", "sign of c_out"),
    ("precondition", "square.rsqrt(), c_noise", "1 / square, c_noise", "c_in without the root"),
    ("precondition", "log() / 4", "log() * 4", "c_noise times 4"),
    ("precondition", "Precondition(1 / square", "Precondition(square.rsqrt()", "c_skip with a root"),
    ("precondition", ", dtype=torch.float32)", ")", "in the precision of sigma"),
    ("precondition", ".clamp(min=1e-20)", "", "ln 0"),
    ("precondition", "clamp(min=1e-20)", "clamp(min=1)", "low levels clamped to 1"),
    ("precondition", "clamp(min=1e-20)", "clamp(min=0.01)", "low levels clamped to 0.01"),
    ("precondition", "sigma.clamp(min", "sigma.clamp_(min", "sigma changed in place"),
    ("precondition", "sigma.square() + 1", "sigma.square_() + 1", "sigma squared in place"),
    ("precondition", "dtype=torch.float32)", "dtype=torch.float32).view(-1)", "all in a row"),
    ("precondition", ".log() / 4", ".log2() / 4", "the other logarithm"),
    ("precondition", ", dtype=torch.float32)", ", dtype=torch.float64)", "in fp64"),
    ("consistency", "[c_in * x_t, cond.image_latents.float()]", "[cond.image_latents.float(), c_in * x_t]",
     "order"),
    ("consistency", "c_in * x_t, cond", "x_t, cond", "input not scaled"),
    ("consistency", "cond.image_latents.float()]", "c_in * cond.image_latents.float()]", "condition scaled"),
    ("consistency", "c_noise.flatten()", "c_noise.squeeze()", "c_noise of shape [] for one clip"),
    ("consistency", "c_noise.flatten()", "torch.as_tensor(sigma).expand(len(x_t))",
     "sigma in place of c_noise"),
    ("consistency", "c_skip * x_t + c_out * F_x", "c_skip * c_in * x_t + c_out * F_x",
     "c_skip on the scaled input"),
    ("consistency", "c_skip * x_t + c_out * F_x", "F_x", "no boundary"),
    ("consistency", "precondition(per_clip(sigma, x_t))", "precondition(sigma)",
     "a number has no clips: c_noise []"),
    ("consistency", "precondition(per_clip(sigma, x_t))",
     "precondition(torch.as_tensor(sigma).view(-1, 1, 1, 1, 1))", "a number is one clip"),
    ("consistency", "precondition(per_clip(sigma, x_t))",
     "precondition(torch.as_tensor(sigma).expand(len(x_t)).view(1, -1, 1, 1, 1))", "sigma along the frames"),
    ("consistency", "precondition(per_clip(sigma, x_t))",
     "precondition(per_clip(sigma, x_t).mean().expand(len(x_t), 1, 1, 1, 1))", "one sigma for all clips"),
    ("consistency", "cond.image_embeds, cond.time_ids)", "cond.image_embeds, cond.time_ids * 0)",
     "time_ids zeroed"),
    ("consistency", "cond.image_embeds, cond.time_ids)", "cond.image_embeds * 0, cond.time_ids)",
     "embeddings zeroed"),
    ("consistency", "return c_skip * x_t + c_out * F_x",
     "return (c_skip * x_t + c_out * F_x).to(x_t.dtype)", "in the precision of x_t"),
    ("consistency", "c_in * x_t, cond", "c_in.to(x_t.dtype) * x_t, cond", "scaled in the precision of x_t"),
    ("consistency", "c_out * F_x", "c_out.to(F_x.dtype) * F_x", "scaled in the precision of F"),
    ("consistency", "c_in * x_t, cond", "x_t.mul_(c_in), cond", "x_t changed in place"),
    ("consistency", "c_out * F_x", "c_out * F_x.detach()", "the network detached"),
    ("consistency", "def consistency", "@torch.no_grad()\ndef consistency", "under no_grad"),
    ("euler_step", "per_clip(sigma_s, x_t) / per_clip(sigma_t, x_t)",
     "per_clip(sigma_t, x_t) / per_clip(sigma_s, x_t)",
     "swapped sigmas"),
    ("euler_step", "denoised + per_clip", "denoised - per_clip", "sign"),
    ("euler_step", "denoised + per_clip", "x_t + per_clip", "from the wrong end"),
    ("euler_step", "* (x_t - denoised)", "* x_t", "noise and estimate confused"),
    ("euler_step", "(x_t - denoised)", "x_t.sub_(denoised)", "x_t changed in place"),
    ("euler_step", "(x_t - denoised)", "(x_t - denoised.to(x_t.dtype))",
     "difference in the precision of x_t"),
    ("euler_step", "per_clip(sigma_s, x_t)", "per_clip(sigma_s, x_t).transpose(0, 1)",
     "sigma_s along the frames"),
    ("euler_step", "per_clip(sigma_t, x_t)", "((per_clip(sigma_t, x_t) + per_clip(sigma_s, x_t)) / 2)",
     "slope of the middle"),
    ("guided", "zip(unconditional(cond), cond)", "zip(cond, unconditional(cond))",
     "condition where none should be"),
    ("guided", "denoised_uncond + guidance", "denoised_cond + guidance", "w off by one"),
    ("guided", "zip(unconditional(cond), cond)",
     "zip(cond._replace(image_embeds=cond.image_embeds * 0), cond)",
     "the uncondition keeps its latents"),
    ("guided", "if guidance is None", "if True", "guidance ignored"),
    ("guided", "zip(unconditional(cond), cond)",
     "zip(unconditional(cond)._replace(time_ids=0 * cond.time_ids), cond)",
     "unconditional with zeroed time_ids"),
    ("guided", "zip(unconditional(cond), cond)",
     "zip(cond._replace(image_latents=0 * cond.image_latents), cond)",
     "the uncondition keeps its embedding"),
    ("guided", "if guidance is None", "if not torch.is_tensor(guidance) and not guidance",
     "w = 0 taken for None"),
    ("guided", "+ guidance *", "+ torch.as_tensor(guidance).mean() *", "one w for all frames"),
    ("guided", "+ guidance *", "+ torch.as_tensor(guidance).view(-1)[0] *", "the first frame's w for all"),
    ("guided", "zip(unconditional(cond), cond)",
     "zip(Cond(cond.image_embeds.zero_(), cond.image_latents.zero_(), cond.time_ids), cond)",
     "cond zeroed in place"),
    ("guided", ".flatten().repeat(2)", ".flatten().repeat_interleave(2)", "sigmas of the wrong half"),
    ("guided", "return denoised_uncond + guidance * (denoised_cond - denoised_uncond)",
     "return (denoised_uncond + guidance * (denoised_cond - denoised_uncond)).to(x_t.dtype)",
     "in the precision of x_t"),
    ("guided", "        return consistency(net, x_t, sigma, cond)",
     "        return consistency(net, x_t, sigma, cond._replace(time_ids=0 * cond.time_ids))",
     "no guidance, with zeroed time_ids"),
    ("solve", "range(len(sigmas) - 1)", "range(len(sigmas) - 2)", "one step too few"),
    ("solve", "teacher, x_t, sigmas[i]", "teacher, x_t, sigmas[0]", "never leaves the first level"),
    ("solve", "sigmas[i], cond, guidance)", "sigmas[i], cond)", "guidance forgotten"),
    ("solve", "x_t) > 0", "x_t) >= 0", "0 / 0 in the padding"),
    ("solve", "@torch.no_grad()", "", "a graph through the teacher"),
    ("solve", "    return x_t", "    return denoised", "the estimate, not the point"),
    ("solve", "progress(range(len(sigmas) - 1))", "range(len(sigmas) - 1)", "progress ignored"),
    ("solve", "cond, guidance)\n        x_s", "cond, guidance if i == 0 else None)\n        x_s",
     "guidance in the first step alone"),
    ("solve", "cond, guidance)\n        x_s",
     "cond, None if guidance is None else torch.as_tensor(guidance).mean())\n        x_s",
     "one w for all frames"),
    ("solve", "per_clip(sigmas[i], x_t) > 0", "(sigmas[i] > 0).all()", "padding stops all clips"),
    ("solve", "> 0, x_s, x_t)", "> 0, x_s, x_t).to(x_t.dtype)", "rounded at each step"),
    ("solve", "x_t = torch.where(per_clip(sigmas[i], x_t) > 0, x_s, x_t)",
     "x_t.copy_(torch.where(per_clip(sigmas[i], x_t) > 0, x_s, x_t))", "x_t changed in place"),
    ("solve", "x_t = torch.where(per_clip(sigmas[i], x_t) > 0, x_s, x_t)", "x_t = x_s.nan_to_num()",
     "padding becomes 0"),
    ("solve", "per_clip(sigmas[i], x_t) > 0", "per_clip(sigmas[i + 1], x_t) > 0", "the step to 0 left out"),
    ("pseudo_huber", ".sqrt() - c", ".sqrt()", "c not taken away"),
    ("pseudo_huber", " + c * c)", " + c)", "c not squared"),
    ("pseudo_huber", "return distance.mean()", "return distance.sum()", "sum"),
    ("pseudo_huber", "if weight is not None", "if False", "weight ignored"),
    ("pseudo_huber", "x.float() - y.float()", "x - y", "in bf16"),
    ("pseudo_huber", "x.float() - y.float()", "(x - y).float()", "difference taken in bf16"),
    ("pseudo_huber", "def pseudo_huber", "import torch\n@torch.no_grad()\ndef pseudo_huber",
     "under no_grad"),
    ("pseudo_huber", "x.float() - y.float()", "x.detach().float() - y.float()", "x detached"),
    ("pseudo_huber", "distance = distance * weight.float().view(-1, *[1] * (distance.ndim - 1))",
     "distance = (distance + c) * weight.float().view(-1, *[1] * (distance.ndim - 1)) - c",
     "weight outside of the subtraction of c"),
    ("pseudo_huber", "weight.float().view(-1, *[1] * (distance.ndim - 1))", "weight.float()",
     "weight along the last axis"),
    ("pseudo_huber", "weight.float().view(-1, *[1] * (distance.ndim - 1))",
     "weight.float().view(-1, *[1] * (distance.ndim - 2))", "weight along the second axis"),
    ("pseudo_huber", "weight.float().view(-1, *[1] * (distance.ndim - 1))", "weight.float().mean()",
     "one weight for all clips"),
    ("pseudo_huber", "weight.float().view", "weight.view", "in the precision of the weight"),
    ("pseudo_huber", "return distance.mean()",
     "return distance.mean() if weight is None else distance.sum() / weight.sum()",
     "divided by the weights"),
    ("pseudo_huber", "(x.float() - y.float())", "x.float().sub_(y.float())", "x changed in place"),
    ("pseudo_huber", "return distance.mean()", "return distance.mean(-1)",
     "the mean over the last axis alone"),
    ("pseudo_huber", "square() + c * c).sqrt() - c", "flatten(1).square().sum(1) + c * c).sqrt() - c",
     "one norm of a whole clip"),
    ("consistency_weight", "sigma_t.float() - sigma_s.float()", "sigma_s.float() - sigma_t.float()",
     "swapped sigmas"),
    ("consistency_weight", "pow(-exponent)", "pow(exponent)", "upside down"),
    ("consistency_weight", ".pow(-exponent)", ".reciprocal()", "exponent ignored"),
    ("consistency_weight", "sigma_t.float() - sigma_s.float()", "sigma_t - sigma_s", "gap in bf16"),
    ("consistency_weight", ".pow(-exponent)", ".pow(-exponent).mean()", "one weight for all clips"),
    ("consistency_weight", "(sigma_t.float() - sigma_s.float())",
     "(1 / sigma_s.float() - 1 / sigma_t.float())", "gap of the inverses"),
    ("consistency_weight", "sigma_t.float() - sigma_s.float()", "sigma_t.float().sub_(sigma_s.float())",
     "sigma_t changed in place"),
    ("consistency_weight", ".pow(-exponent)", ".pow(-0.1)", "always 0.1"),
    ("hinge_d", "(1 - logits_real", "(1 + logits_real", "sign of real"),
    ("hinge_d", "(1 + logits_fake.float())", "(1 + logits_fake.detach().float())", "fakes detached"),
    ("hinge_d", "(1 - logits_real.float()).relu()", "(1 - logits_real.float())", "no margin"),
    ("hinge_d", "(1 + logits_fake", "(0 + logits_fake", "margin 0"),
    ("hinge_d", ".relu().mean() + (1", ".relu().mean() / 2 + (1", "half of one side"),
    ("hinge_d", "return (1 - logits_real.float()).relu().mean() + (1 + logits_fake.float()).relu().mean()",
     "import torch\n    return 2 * torch.cat([(1 - logits_real.float()).relu(), (1 + "
     "logits_fake.float()).relu()]).mean()", "twice the mean over the concatenation"),
    ("hinge_d", ".relu().mean()", ".relu().mean(-1)", "the mean over the last axis alone"),
    ("hinge_d", "1 + logits_fake.float()", "1 + logits_fake", "fakes in bf16"),
    ("hinge_d", "1 - logits_real.float()", "1 - logits_real", "reals in bf16"),
    ("hinge_d", "(1 - logits_real.float())", "logits_real.float().neg_().add_(1)", "reals changed in place"),
    ("hinge_d", "logits_real.float()", "logits_real.detach().float()", "reals detached"),
    ("hinge_g", "(1 - logits_fake)", "(1 + logits_fake)", "sign"),
    ("hinge_g", "-logits_fake.mean() if", "logits_fake.mean() if", "sign of the linear form"),
    ("hinge_g", "-logits_fake.mean() if linear else ", "", "linear ignored"),
    ("hinge_g", "-logits_fake.mean() if", "-logits_fake.detach().mean() if", "linear form detached"),
    ("hinge_g", "logits_fake.mean() if", "logits_fake.mean(-1) if", "linear form over the last axis alone"),
    ("hinge_g", "relu().mean()", "relu().mean(-1)", "the mean over the last axis alone"),
    ("hinge_g", "(1 - logits_fake)", "logits_fake.neg_().add_(1)", "fakes changed in place"),
    ("hinge_g", "(1 - logits_fake).relu()", "(1 - logits_fake)", "no margin"),
    ("hinge_g", "logits_fake.float()", "logits_fake", "in bf16"),
    ("LoRALinear", "alpha=self.alpha / self.rank", "alpha=self.alpha", "alpha without rank"),
    ("LoRALinear", "nn.init.zeros_(self.lora_B.weight)", "nn.init.normal_(self.lora_B.weight)",
     "starts elsewhere"),
    ("LoRALinear", "nn.init.normal_(self.lora_A.weight, std=1 / rank)", "nn.init.zeros_(self.lora_A.weight)",
     "0 x 0"),
    ("LoRALinear", "nn.init.normal_(self.lora_A.weight, std=1 / rank)", "nn.init.ones_(self.lora_A.weight)",
     "A of ones"),
    ("LoRALinear", "nn.init.normal_(self.lora_A.weight, std=1 / rank)", "pass",
     "A of nn.Linear's own start"),
    ("LoRALinear", "std=1 / rank", "std=rank ** -0.5", "A with the root of rank"),
    ("LoRALinear", "nn.init.normal_(self.lora_A.weight, std=1 / rank)",
     "nn.init.uniform_(self.lora_A.weight, -3 ** 0.5 / rank, 3 ** 0.5 / rank)", "A uniform"),
    ("LoRALinear", "self.rank", "self.r", "no attribute rank"),
    ("LoRALinear", "self.alpha", "self.a", "no attribute alpha"),
    ("LoRALinear", "self.active", "self.enabled", "no attribute active"),
    ("LoRALinear", "F.linear(x, A)", "F.linear(x.detach(), A)", "x detached before A"),
    ("LoRALinear", "self.lora_B.weight.to(x.dtype)", "self.lora_B.weight.detach().to(x.dtype)",
     "B detached"),
    ("LoRALinear", "bias=False, device", "bias=True, device", "A and B with bias"),
    ("LoRALinear", "device=layer.weight.device", "dtype=layer.weight.dtype, device=layer.weight.device",
     "A and B in bf16"),
    ("LoRALinear", "low = F.linear(x, A)", "low = F.linear(x.mul_(1.5), A)", "x changed in place"),
    ("LoRALinear", "if not self.active", "if False", "active ignored"),
    ("merge_lora", "layer.update()", "layer.update() * layer.rank / layer.alpha", "no alpha / rank merged"),
    ("merge_lora", "scale * layer.update()", "layer.update()", "scale ignored"),
    ("merge_lora", "plain.weight = ", "plain.bias, plain.weight = None, ", "bias lost in merging"),
    ("merge_lora", "unet.set_submodule(path, plain)", "setattr(unet, path, plain)", "nested paths"),
    ("merge_lora", "unet.set_submodule(path, plain)\n    return unet",
     "unet.set_submodule(path, plain)\n        break\n    return unet", "the first layer alone"),
    ("merge_lora", "layer.weight.float() + scale * layer.update()",
     "layer.weight + (scale * layer.update()).to(layer.weight.dtype)", "update rounded before it is added"),
    ("merge_lora", ".to(layer.weight.dtype)", "", "in fp32"),
    ("merge_lora", "    return unet", "    pass", "returns nothing"),
    ("merge_lora", "layer.weight.float() + scale * layer.update()",
     "layer.weight.data.add_(scale * layer.update().to(layer.weight.dtype)).float()",
     "the old weight changed in place"),
    ("merge_lora", "unet.set_submodule(path, plain)", "layer.weight = plain.weight",
     "merged, and still added"),
    ("update_ema", "1 - decay", "decay", "decay for 1 - decay"),
    ("update_ema", "[weights[name] for name in ema]", "list(weights.values())", "by order, not by name"),
    ("update_ema", "torch._foreach_lerp_", "torch._foreach_lerp", "not in place"),
    ("update_ema", "@torch.no_grad()", "", "a graph behind the average"),
    ("update_ema", "torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)",
     "for name, t in ema.items(): t.data = torch.lerp(t, weights[name], 1 - decay)",
     "new storage at every step"),
    ("update_ema", "torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)",
     "for name, t in ema.items(): ema[name] = torch.lerp(t, weights[name], 1 - decay)", "new tensors"),
    ("update_ema", "torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)",
     "for name, t in ema.items(): t.mul_(decay).add_(weights[name].mul_(1 - decay))",
     "weights changed in place"),
    ("update_ema", "[weights[name] for name in ema]",
     "[weights[name].mean().expand_as(t) for name, t in ema.items()]", "the mean of each tensor"),
    ("update_ema", "list(ema.values()), [weights[name] for name in ema]",
     "list(ema.values())[:1], [weights[name] for name in ema][:1]", "the first tensor alone"),
    ("update_ema", "1 - decay", "0.05", "decay ignored"),
    ("update_ema", "[weights[name] for name in ema]",
     "[weights[name].requires_grad_(False) for name in ema]", "weights frozen"),
    ("update_ema", "[weights[name] for name in ema]", "[weights[name].bfloat16().float() for name in ema]",
     "through bf16"),
    ("DinoFeatures", "b f c h w -> (b f) c h w", "b f c h w -> (f b) c h w", "transposed frames and clips"),
    ("DinoFeatures", '"n (h w) d -> n d h w", h=height', '"n (w h) d -> n d h w", h=height',
     "transposed patches"),
    ("DinoFeatures", "tokens[i][:, 1:] +", "tokens[i][:, :-1] +", "CLS taken for a patch"),
    ("DinoFeatures", " + tokens[i][:, :1]", "", "CLS forgotten"),
    ("DinoFeatures", "[2 * v - 1 for v in IMAGENET_MEAN], [2 * v for v in IMAGENET_STD]",
     "IMAGENET_MEAN, IMAGENET_STD",
     "the statistics of [0, 1] for [-1, 1]"),
    ("DinoFeatures", "for i in self.levels]", "for i in range(len(self.levels))]",
     "states by position instead of depth"),
    ("DinoFeatures", "for i in self.levels]",
     "for i in self.levels[:1] + [i - 1 for i in self.levels[1:]]]", "one block too early"),
    ("DinoFeatures", "self.backbone(pixel_values=frames,", "self.backbone(pixel_values=frames.detach(),",
     "frames detached"),
    ("DinoFeatures", "def forward(self, latents", "@torch.no_grad()\n    def forward(self, latents",
     "under no_grad"),
    ("DinoFeatures", "x = self.to_rgb(x) ", "x = x[:, :3] ", "to_rgb left out"),
    ("DinoFeatures", "self.size_for(*x.shape[2:])", "self.size_for(*x.shape[2:])[::-1]",
     "height and width exchanged"),
    ("DinoFeatures", "tokens[i][:, :1]", "tokens[i][:, :1].mean(0)", "the mean CLS of all frames"),
    ("DinoFeatures", "x = rearrange(latents,", "x = rearrange(latents.mul_(0.5),",
     "latents changed in place"),
    ("TemporalHead", '"(b f) c h w -> (b h w) f c"', '"(f b) c h w -> (b h w) f c"',
     "transposed frames and clips"),
    ("TemporalHead", '"(b h w) 1 1 f -> b (f h w)"', '"(b w h) 1 1 f -> b (f h w)"', "transposed places"),
    ("TemporalHead", '"(b h w) 1 1 f -> b (f h w)"', '"(b h w) 1 1 f -> b (h w f)"', "order of logits"),
    ("TemporalHead", "h, w = x.shape[-2:]", "h, w = x.shape[-2:]; num_frames = 3", "always 3 frames"),
    ("TemporalHead", "kernel=(1, 7)", "kernel=(7, 1)", "a kernel across f"),
    ("TemporalHead", "rearrange(super().forward(x),", "rearrange(super().forward(x.detach()),",
     "maps detached"),
    ("TemporalHead", "rearrange(super().forward(x),",
     "rearrange(super().forward(x.mean(0, True).expand_as(x)),", "the mean history of all places"),
    ("sample", "x0_pred + sigmas[i + 1] *", "x0_pred + 0 *", "re-noising forgotten"),
    ("sample", "sigmas[i + 1] * draw_noise(shape, generator, device)",
     "sigmas[i + 1] * (x_t - x0_pred) / sigmas[i]",
     "the same noise again"),
    ("sample", "sigmas[i + 1] * draw", "sigmas[i] * draw", "re-noised to the level it came from"),
    ("sample", "x_t, sigmas[i], cond", "x_t, sigmas[0], cond", "always told the first level"),
    ("sample", "return x0_pred", "return x_t", "the noisy end"),
    ("sample", "cond, sigmas[0], sigmas[1], generator", "cond, sigmas[1], sigmas[0], generator",
     "travels backwards"),
    ("sample", "return time_travel(net, cond, sigmas[0], sigmas[1], generator)",
     "time_travel(net, cond, sigmas[0], sigmas[1], generator); return 0 * cond.image_latents",
     "Time Travel computed and not returned"),
    ("sample", "return time_travel(net, cond, sigmas[0], sigmas[1], generator)", "pass", "tts ignored"),
    ("sample", "x_t = sigmas[0] *", "x_t = (sigmas[0] ** 2 + 1) ** 0.5 *", "the teacher's start"),
    ("sample", "x_t, sigmas[i], cond)", "x_t, sigmas[i], cond._replace(time_ids=0 * cond.time_ids))",
     "time_ids zeroed"),
    ("sample", "x_t = sigmas[0] * draw_noise(shape, generator, device)",
     "x_t = sigmas[0] * draw_noise(shape, generator, device); cond.image_latents.add_(1)",
     "cond changed in place"),
    ("sample", "@torch.no_grad()", "", "a graph through the student"),
    ("sample", "if sigmas[i + 1] > 0:", "if i == 0:", "re-noised once"),
    ("sample", "sigmas[i + 1] * draw_noise(shape, generator, device)", "sigmas[i + 1] * torch.randn(shape)",
     "noise of no clip's seed"),
    ("time_travel", "(fresh + (x_t - x0_pred) / sigma_t) / 2", "fresh", "plain two-step sampling"),
    ("time_travel", "(x_t - x0_pred) / sigma_t) / 2", "(x_t - x0_pred) / sigma_t)", "not halved"),
    ("time_travel", "(x_t - x0_pred) / sigma_t) / 2", "(x_t - x0_pred) / sigma_s) / 2", "swapped sigmas"),
    ("time_travel", "consistency(net, x_s, sigma_s, cond)", "consistency(net, x_s, sigma_t, cond)",
     "told the old level"),
    ("time_travel", "x0_pred = consistency(net, x_s, sigma_s, cond)",
     "consistency(net, x_s, sigma_s, cond)", "the second look not returned"),
    ("time_travel", "consistency(net, x_s, sigma_s, cond)",
     "consistency(net, x_s, sigma_s, cond._replace(time_ids=0 * cond.time_ids))",
     "second look with zeroed time_ids"),
    ("time_travel", "@torch.no_grad()", "", "a graph through the student"),
    ("time_travel", "fresh = draw_noise(shape, generator, device)", "fresh = x_t / sigma_t",
     "the first noise again"),
]


def parts_of(own):
    """A function alone; a class after those that it inherits from in the same module."""
    if not inspect.isclass(own):
        return [own]
    return [base for base in reversed(own.__mro__) if base.__module__ == own.__module__]


def mutant(name, text, other):
    """The library's function or class with other code, also in the classes that it inherits from."""
    own = LIBRARY[name]
    scope, found = dict(vars(inspect.getmodule(own))), 0
    for part in parts_of(own):
        source = textwrap.dedent(inspect.getsource(part))
        # Only code counts: a docstring may well contain the same text.
        docstring = (part.__doc__ or "").strip()
        head, tail = source.split(docstring, 1) if docstring else ("", source)
        found += head.count(text) + tail.count(text)
        exec(head.replace(text, other) + docstring + tail.replace(text, other), scope)
    if found == 0:
        pytest.fail(f"{name} no longer contains {text!r}: give this mutant the new text", pytrace=False)
    return scope[name]


def wrong_backward(grad, size, std, mode="bilinear", align_corners=None, flip=(), scale=torch.reciprocal):
    """Autograd through another resize than the one asked for."""
    with torch.enable_grad():
        x = grad.new_zeros(len(grad), 3, *size, requires_grad=True)
        out = F.interpolate(x, grad.shape[2:], mode=mode, align_corners=align_corners)
        grad_x = torch.autograd.grad(out, x, grad.flip(flip).contiguous())[0]
    return grad_x * scale(grad.new_tensor(std).view(3, 1, 1))


WRONG_BACKWARDS = {
    "not divided by std": dict(scale=torch.ones_like), "times std": dict(scale=torch.clone),
    "aligned corners": dict(align_corners=True), "nearest": dict(mode="nearest"),
    "columns reversed": dict(flip=(3,)),
}


# Answers to the functions that the library does not have (plug.DESIGNS), by exercise.
DESIGNS = {
    "ex02_precondition": """
def skip_and_out(sigma, sigma_data):
    total = sigma ** 2 + sigma_data ** 2
    return sigma_data ** 2 / total, -sigma * sigma_data / total ** 0.5
""",
    "ex06_pseudo_huber": """
import math
def exponent_within(sigma_t, sigma_s, factor):
    gaps = sigma_t - sigma_s
    return math.log(factor) / math.log(gaps.max() / gaps.min())
""",
    "ex07_hinge": """
import torch
def still_teaches(loss, logits, least=0.01):
    logits = logits.detach().clone().requires_grad_()
    slopes, = torch.autograd.grad(loss(logits), logits)
    return slopes.abs() * logits.numel() >= least
""",
    "ex09_ema": """
def decay_for(steps):
    return steps / (steps + 1)
""",
    "ex12_samplers": """
def mixed_noise(fresh, implied, keep):
    return keep * implied + (1 - keep ** 2) ** 0.5 * fresh
""",
}

# (name, text, text of the mutant, the misconception)
WRONG_DESIGNS = [
    ("skip_and_out", "-sigma * sigma_data", "sigma * sigma_data", "sign of c_out: v is noise minus data"),
    ("skip_and_out", "return sigma_data ** 2 / total, -sigma * sigma_data / total ** 0.5",
     "return 1.0, -sigma", "the network predicts the noise"),
    ("skip_and_out", "return sigma_data ** 2 / total, -sigma * sigma_data / total ** 0.5",
     "return 0.0, -sigma_data", "the network predicts the data"),
    ("skip_and_out", "sigma_data ** 2 / total, -sigma * sigma_data / total ** 0.5",
     "1 / (sigma ** 2 + 1), -sigma / (sigma ** 2 + 1) ** 0.5", "data of std 1 taken for granted"),
    ("skip_and_out", "sigma_data ** 2 / total", "sigma_data / (sigma + sigma_data)",
     "std where variance should be"),
    ("skip_and_out", "total ** 0.5", "total", "c_out without the root"),
    ("skip_and_out", "-sigma * sigma_data", "-sigma", "the data's std left out of c_out"),
    ("skip_and_out", "return sigma_data ** 2 / total, -sigma * sigma_data / total ** 0.5",
     "import torch\n    from solver import precondition\n    return precondition(sigma / sigma_data)[:2]",
     "the library's function of the special case"),
    ("exponent_within", "gaps = sigma_t - sigma_s", "gaps = sigma_t", "levels in place of gaps"),
    ("exponent_within", "gaps.max() / gaps.min()", "gaps[0] / gaps[-1]",
     "the first and the last gap, in an order that may differ"),
    ("exponent_within", "math.log(factor) / math.log(gaps.max() / gaps.min())",
     "factor / (gaps.max() / gaps.min())", "no logarithm"),
    ("exponent_within", "math.log(factor) / math.log(gaps.max() / gaps.min())",
     "math.log(gaps.max() / gaps.min()) / math.log(factor or 1e-9) if factor > 1 else 0.0", "upside down"),
    ("exponent_within", "math.log(factor)", "-math.log(factor)", "weights that grow with the gap"),
    ("exponent_within", "math.log(gaps.max() / gaps.min())", "math.log(gaps.max())",
     "the largest gap alone"),
    ("exponent_within", "math.log(factor) / math", "math.log10(factor) / math", "two kinds of logarithm"),
    ("exponent_within", "return math", "return 0.1 + 0 * math", "AnimateLCM's constant"),
    ("still_teaches", "slopes.abs() * logits.numel()", "loss(logits)[None].expand(logits.numel())"
     ".view_as(logits).abs()", "a large loss is taken for a large slope"),
    ("still_teaches", "slopes.abs()", "slopes", "slopes of one sign alone"),
    ("still_teaches", " * logits.numel()", "", "the mean's division not undone"),
    ("still_teaches", ">= least", "> 0", "tiny slopes count"),
    ("still_teaches", ">= least", ">= 0.01", "least ignored"),
    ("still_teaches", "return slopes.abs() * logits.numel() >= least",
     "return (slopes.abs() * logits.numel() >= least).any().expand_as(logits)", "one verdict for all"),
    ("still_teaches", "slopes.abs() * logits.numel() >= least",
     "(slopes.abs() * logits.numel() >= least).float()", "numbers in place of bool"),
    ("still_teaches", "logits = logits.detach().clone().requires_grad_()\n"
     "    slopes, = torch.autograd.grad(loss(logits), logits)",
     "logits.requires_grad_()\n    loss(logits).backward()\n    slopes = logits.grad.clone()",
     "a gradient left behind in the given logits"),
    ("decay_for", "steps / (steps + 1)", "1 - 1 / max(steps, 1)", "the newest weights are one step old"),
    ("decay_for", "steps / (steps + 1)", "0.5 ** (1 / max(steps, 1e-9))", "the half-life"),
    ("decay_for", "steps / (steps + 1)", "2.718281828 ** (-1 / max(steps, 1e-9))", "a time constant"),
    ("decay_for", "steps / (steps + 1)", "steps / (steps + 2)", "the span of a moving window, twice the age"),
    ("decay_for", "steps / (steps + 1)", "1 / (steps + 1)", "decay is how much of the new comes in"),
    ("decay_for", "steps / (steps + 1)", "0.95", "always 0.95"),
    ("mixed_noise", "keep * implied + (1 - keep ** 2) ** 0.5 * fresh", "(fresh + implied) / 2",
     "Eq. 13 as printed: variance 1/2"),
    ("mixed_noise", "(1 - keep ** 2) ** 0.5", "(1 - keep)", "shares that add up to 1"),
    ("mixed_noise", "keep * implied + (1 - keep ** 2) ** 0.5 * fresh",
     "keep ** 0.5 * implied + (1 - keep) ** 0.5 * fresh", "a share of the variance for the correlation"),
    ("mixed_noise", "keep * implied + (1 - keep ** 2) ** 0.5 * fresh",
     "keep * fresh + (1 - keep ** 2) ** 0.5 * implied", "the two noises exchanged"),
    ("mixed_noise", "+ (1", "- (1", "fresh noise subtracted"),
    ("mixed_noise", "return keep * implied + (1 - keep ** 2) ** 0.5 * fresh",
     "eps = keep * implied + (1 - keep) * fresh\n    return eps / eps.square().mean().sqrt()",
     "divided by the std of the sample"),
    ("mixed_noise", "(1 - keep ** 2) ** 0.5 * fresh", "fresh.mul_((1 - keep ** 2) ** 0.5)",
     "fresh changed in place"),
    ("mixed_noise", "keep * implied + (1 - keep ** 2) ** 0.5 * fresh", "(fresh + implied) * 0.5 ** 0.5",
     "keep ignored"),
]


def design(name, text="", other=""):
    """The answer `name` of DESIGNS with other text."""
    file, = (file for file, names in plug.DESIGNS.items() if name in names)
    assert text in DESIGNS[file], text
    scope = {}
    exec(DESIGNS[file].replace(text, other) if text else DESIGNS[file], scope)
    return scope[name]


ANSWERS = LIBRARY | {name: design(name) for names in plug.DESIGNS.values() for name in names}


# An answer to exercise 11, from which mutants are made like those above.
GATHER = """
import torch
import triton
import triton.language as tl


def weights(n, N):
    position = ((torch.arange(N) + 0.5) * n / N - 0.5).clamp(0, n - 1)
    return (1 - (position[:, None] - torch.arange(n)).abs()).relu()                             # N n


def upsample_backward(grad, size, std):
    rows, columns = (weights(n, N).to(grad) for n, N in zip(size, grad.shape[2:]))
    return rows.T @ grad @ columns / grad.new_tensor(std).view(3, 1, 1)


@triton.jit
def gather_row(grad, grad_x, std0, std1, std2, h, w, H, W, IN: tl.constexpr, OUT: tl.constexpr):
    i, plane = tl.program_id(0) % h, tl.program_id(0) // h
    j, X = tl.arange(0, IN), tl.arange(0, OUT)
    x = tl.minimum(tl.maximum((X + 0.5) * w / W - 0.5, 0.0), w - 1.0)
    weight = tl.maximum(1 - tl.abs(x[:, None] - j[None]), 0.0)
    total = tl.zeros([IN], tl.float32)
    for Y in range(H):
        y = tl.minimum(tl.maximum((Y + 0.5) * h / H - 0.5, 0.0), h - 1.0)
        g = tl.load(grad + (plane * H + Y) * W + X, X < W, 0.0)
        total += tl.maximum(1 - tl.abs(y - i), 0.0) * tl.sum(weight * g[:, None], axis=0)
    channel = plane % 3
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    tl.store(grad_x + (plane * h + i) * w + j, total / std, j < w)


def upsample_backward_triton(grad, size, std):
    grad, (h, w), (n, c, H, W) = grad.contiguous(), size, grad.shape
    grad_x = grad.new_empty(n, c, h, w)
    block = triton.next_power_of_2
    gather_row[(n * c * h,)](grad, grad_x, *std, h, w, H, W, IN=block(w), OUT=block(W))
    return grad_x
"""

# (name, text, text of the mutant, what is wrong with it)
WRONG_GATHERS = [
    ("upsample_backward", ".clamp(0, n - 1)", "", "no clamp at the border"),
    ("upsample_backward", "+ 0.5) * n / N - 0.5", ") * n / N", "corners for centres"),
    ("upsample_backward", "(3, 1, 1)", "(1, 3, 1, 1)[:, :1]", "one std for all channels"),
    ("upsample_backward", "    return rows.T", "    grad.mul_(2); grad = grad / 2\n    return rows.T",
     "grad changed in place"),
    ("upsample_backward", "@ columns /", "@ (columns / columns.sum(0)) /", "the mean over the outputs"),
    ("upsample_backward_triton", "gather_row[(n * c * h,)](grad, grad_x, *std, h, w, H, W, IN=block(w), "
     "OUT=block(W))\n    return grad_x", "return upsample_backward(grad, size, std)", "PyTorch, no kernel"),
    ("upsample_backward_triton", "return grad_x", "return upsample_backward(grad, size, std)",
     "a kernel, and PyTorch's result"),
    ("upsample_backward_triton", "IN=block(w), OUT=block(W)", "IN=32, OUT=32", "blocks of 32"),
    ("upsample_backward_triton", "OUT=block(W)", "OUT=128", "a block of 128"),
    ("upsample_backward_triton", "total / std, j < w)", "total / std)", "a store without mask"),
    ("upsample_backward_triton", "X, X < W, 0.0)", "X)", "a load without mask"),
    ("upsample_backward_triton", "grad, (h, w), (n, c, H, W) = grad.contiguous(),",
     "grad, (h, w), (n, c, H, W) = grad.mul_(2).contiguous() / 2,", "grad changed in place"),
    ("upsample_backward_triton", "        total +=",
     "        tl.store(grad + (plane * H + Y) * W + X, 2 * g, X < W)\n        total +=",
     "grad changed in place by the kernel"),
    ("upsample_backward_triton", "grad.contiguous()", "grad", "strides ignored"),
    ("upsample_backward_triton", "channel = plane % 3", "channel = 0", "one std for all channels"),
    ("upsample_backward_triton", "(n * c * h,)", "(c * h,)", "the first clip alone"),
]


@pytest.fixture
def gather(tmp_path):
    """A function that writes GATHER with other text into a file, since Triton reads the source of a kernel,
    and returns its functions."""
    def load(text="", other=""):
        assert text in GATHER, text
        file = tmp_path / "ex11_gather.py"
        file.write_text(GATHER.replace(text, other) if text else GATHER)
        found = plug.answers(tmp_path)
        return {name: found[name] for name in ("upsample_backward", "upsample_backward_triton")}
    return load


def graders_of(name):
    """The graders that have `name` as an argument."""
    return [test for key, test in vars(graders).items()
            if key.startswith("test_ex") and name in inspect.signature(test).parameters]


def verdicts(name, answer):
    """The verdict of each grader on an answer: an exception, or None if it passes."""
    found = []
    for test in graders_of(name):
        torch.manual_seed(0)
        try:
            test(**{key: ANSWERS[key] for key in inspect.signature(test).parameters} | {name: answer})
            found.append(None)
        except (Exception, pytest.fail.Exception) as error:
            found.append(error)
    return found


def bites(name, answer):
    """Whether a grader says what is wrong. A crash does not count."""
    return any(isinstance(verdict, pytest.fail.Exception) for verdict in verdicts(name, answer))


@pytest.mark.parametrize("name, text, other", [pytest.param(*m[:3], id=f"{m[0]}: {m[3]}") for m in MUTANTS])
def test_wrong_answers_fail(name, text, other):
    assert bites(name, mutant(name, text, other)), "this wrong answer passes"


@pytest.mark.parametrize("name", ["upsample_backward", "upsample_backward_triton"])
@pytest.mark.parametrize("wrong", WRONG_BACKWARDS)
def test_wrong_backwards_fail(name, wrong):
    answer = lambda grad, size, std: wrong_backward(grad, size, std, **WRONG_BACKWARDS[wrong])
    assert bites(name, answer), "this wrong answer passes"


@pytest.mark.parametrize("name, text, other",
                         [pytest.param(*m[:3], id=f"{m[0]}: {m[3]}") for m in WRONG_GATHERS])
def test_wrong_gathers_fail(name, text, other, gather):
    assert bites(name, gather(text, other)[name]), "this wrong answer passes"


@pytest.mark.parametrize("name, text, other",
                         [pytest.param(*m[:3], id=f"{m[0]}: {m[3]}") for m in WRONG_DESIGNS])
def test_wrong_designs_fail(name, text, other):
    assert bites(name, design(name, text, other)), "this wrong answer passes"


def test_right_answers_made_in_the_same_way_pass(gather):
    for name in ANSWERS.keys() - LIBRARY.keys():
        assert graders_of(name) and not any(verdicts(name, ANSWERS[name])), name
    for name in {m[0] for m in MUTANTS}:
        assert not any(verdicts(name, mutant(name, "def ", "def "))), name
    assert not any(verdicts("upsample_backward", wrong_backward))
    for name, answer in gather().items():
        assert not any(verdicts(name, answer)), name


def test_each_exercise_has_eight_mutants():
    for file, (_, *names) in plug.EXERCISES.items():
        assert sum(m[0] in names for m in MUTANTS + WRONG_GATHERS) >= 8, file
    for name in ANSWERS.keys() - LIBRARY.keys():
        assert sum(m[0] == name for m in WRONG_DESIGNS) >= 5, name
    everything = MUTANTS + WRONG_GATHERS + WRONG_DESIGNS
    assert len({m[:3] for m in everything}) == len(everything)


# ---------------------------------------------------------------------------------------------------------
# The second year's variants

VARIANTS = {
    "ex02_targets": """
def noise_target(sigma, sigma_data):
    return 1, -sigma


def data_target(sigma, sigma_data):
    return 0, sigma_data


def amplification(sigma, sigma_data):
    total = (sigma ** 2 + sigma_data ** 2) ** 0.5
    return total / sigma_data, total / sigma
""",
    "ex05_heun": """
import torch
import solver


def solve(teacher, x_t, sigmas, cond, guidance=None, progress=iter):
    with torch.no_grad():
        for i in progress(range(len(sigmas) - 1)):
            now, end = solver.per_clip(sigmas[i], x_t), solver.per_clip(sigmas[i + 1], x_t)
            slope = (x_t - solver.guided(teacher, x_t, sigmas[i], cond, guidance)) / now
            x_s = x_t + (end - now) * slope
            if (end > 0).any():
                second = (x_s - solver.guided(teacher, x_s, sigmas[i + 1], cond, guidance)) / end
                x_s = torch.where(end > 0, x_t + (end - now) * (slope + second) / 2, x_s)
            x_t = torch.where(now > 0, x_s, x_t)
        return x_t
""",
    "ex09_power": """
def power_decay(step, gamma):
    return (1 - 1 / step) ** (gamma + 1)


def gamma_for(share):
    return 1 / share - 2
""",
}
WRONG_VARIANTS = [
    ("ex02_targets", "1, -sigma", "1, sigma", "noise is added"),
    ("ex02_targets", "0, sigma_data", "0, 1", "the data has std 1"),
    ("ex02_targets", "total / sigma_data, total / sigma", "sigma, sigma_data", "|c_out|, not a quotient"),
    ("ex02_targets", "total / sigma_data, total / sigma", "total / sigma, total / sigma_data", "exchanged"),
    ("ex02_targets", " ** 0.5", "", "variance where std should be"),
    ("ex05_heun", "(slope + second) / 2", "slope", "Euler, at twice the cost"),
    ("ex05_heun", "(slope + second) / 2", "second", "the slope at the end alone"),
    ("ex05_heun", "if (end > 0).any():", "if True:", "a step to 0 looks at 0"),
    ("ex05_heun", "torch.where(end > 0, x_t + (end - now) * (slope + second) / 2, x_s)",
     "x_t + (end - now) * (slope + second) / 2", "NaN where one clip of several steps to 0"),
    ("ex05_heun", "x_s, sigmas[i + 1], cond, guidance", "x_s, sigmas[i + 1], cond", "guidance for one slope"),
    ("ex05_heun", "x_s, sigmas[i + 1]", "x_s, sigmas[i]", "the level of the start at the end"),
    ("ex05_heun", "no_grad", "enable_grad", "a graph of the teacher"),
    ("ex09_power", "gamma + 1", "gamma", "the exponent of the profile is that of the decay"),
    ("ex09_power", "1 - 1 / step", "1 - 1 / (step + 1)", "steps counted from 0"),
    ("ex09_power", "1 / share - 2", "1 / share - 1", "the share of a profile k^(gamma - 1)"),
    ("ex09_power", "1 / share - 2", "1 / (1 - share) - 2", "the mean time in place of the mean age"),
    ("ex09_power", "(1 - 1 / step) ** (gamma + 1)", "(gamma + 1) / (gamma + 2)", "a constant decay"),
]


def verdicts_of_variant(name, text):
    scope = {}
    exec(text, scope)
    return [*second_year.verdicts(name, scope).values()]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_graded(name):
    assert not any(verdicts_of_variant(name, VARIANTS[name]))
    stub = (plug.ROOT / "exercises" / "second_year" / f"{name}.py").read_text()
    assert all(isinstance(verdict, NotImplementedError) for verdict in verdicts_of_variant(name, stub))


@pytest.mark.parametrize("name, text, other",
                         [pytest.param(*m[:3], id=f"{m[0]}: {m[3]}") for m in WRONG_VARIANTS])
def test_wrong_variants_fail(name, text, other):
    assert text in VARIANTS[name]
    found = verdicts_of_variant(name, VARIANTS[name].replace(text, other))
    assert any(isinstance(verdict, pytest.fail.Exception) for verdict in found), "this wrong answer passes"


def test_the_variants_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grader.py", "ex09"])
    second_year.main()
    assert "next, ex09_power.py: to be written (power_decay, line" in capsys.readouterr().out
    for words, says in (("ex07", "no such variant"), ("ex02 --answers nowhere", "nowhere")):
        monkeypatch.setattr(sys, "argv", ["grader.py", *words.split()])
        with pytest.raises(SystemExit, match="2"):
            second_year.main()
        error = capsys.readouterr().err
        assert says in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------
# The library's own function by another door

DOORS = {
    "imported": "from losses import hinge_d",
    "imported under another name": "import losses\nhinge_d = losses.hinge_d\nhinge_d.__module__ = __name__",
    "another __module__": "from losses import hinge_d\nhinge_d.__module__ = __name__",
    "a copy of it": "import losses, types as t\nhinge_d = t.FunctionType(losses.hinge_d.__code__, {})",
    "partial": "import functools, losses\nhinge_d = functools.partial(losses.hinge_d)",
    "partial of partial": "import functools as f, losses\nhinge_d = f.partial(f.partial(losses.hinge_d))",
    "decorated": "import torch, losses\nhinge_d = torch.no_grad()(losses.hinge_d)",
    "imported inside": "def hinge_d(real, fake):\n    import losses\n    return losses.hinge_d(real, fake)",
    "a lambda": "import losses\nhinge_d = lambda *args: losses.hinge_d(*args)",
    "another copy of the module": "import importlib.util as u, losses\n"
                                  "spec = u.spec_from_file_location('other', losses.__file__)\n"
                                  "other = u.module_from_spec(spec)\nspec.loader.exec_module(other)\n"
                                  "def hinge_d(real, fake): return other.hinge_d(real, fake)",
    "getattr": "import sys\ndef hinge_d(*args): return getattr(sys.modules['losses'], 'hinge_' + 'd')(*args)",
    "a static method": "import losses\nclass A: f = staticmethod(losses.hinge_d)\nhinge_d = A.f",
}
CLASS_DOORS = {
    "subclass of LoRALinear": ("LoRALinear", "import lora\nclass LoRALinear(lora.LoRALinear): pass"),
    "subclass with its own __init__": ("LoRALinear", """
        import lora
        class LoRALinear(lora.LoRALinear):
            def __init__(self, layer, rank, alpha): super().__init__(layer, rank, alpha)
            def forward(self, x): return super().forward(x)"""),
    "subclass of LoRA": ("LoRALinear", """
        import lora
        from torch import nn
        class LoRALinear(lora.LoRA, nn.Linear):
            make_pair = lora.LoRALinear.make_pair
            forward = lora.LoRALinear.forward"""),
    "DinoFeatures unchanged": ("DinoFeatures", """
        import discriminator
        class DinoFeatures(discriminator.DinoFeatures): pass"""),
    "DinoFeatures by super": ("DinoFeatures", """
        import discriminator
        class DinoFeatures(discriminator.DinoFeatures):
            def forward(self, latents, cond=None): return super().forward(latents, cond)"""),
    "TemporalHead by another base": ("TemporalHead", """
        import discriminator
        class TemporalHead(discriminator.TemporalHead): pass"""),
    "TemporalHead by super": ("TemporalHead", """
        import discriminator
        class TemporalHead(discriminator.TemporalHead):
            def forward(self, x, num_frames): return super().forward(x, num_frames)"""),
    "merge_lora": ("merge_lora", """
        import lora
        def merge_lora(unet, scale=1): return lora.merge_lora(unet, scale)"""),
    "upsample_normalize": ("upsample_backward", """
        import torch
        from discriminator import upsample_normalize
        def upsample_backward(grad, size, std):
            x = torch.zeros(len(grad), 3, *size, requires_grad=True)
            return torch.autograd.grad(upsample_normalize(x, grad.shape[2:], (0, 0, 0), std), x, grad)[0]"""),
    "the library's kernel": ("upsample_backward_triton", """
        import triton
        from support.upsample import _backward_kernel
        def upsample_backward_triton(grad, size, std):
            (n, c, H, W), (h, w), power = grad.shape, size, triton.next_power_of_2
            grad_x = grad.new_empty(n, c, h, w)
            _backward_kernel[(n * c * triton.cdiv(h, 8),)](
                grad.contiguous(), grad_x, h, w, H, W, W, h / H, w / W, *std, w, ROWS=8, COLUMNS=power(w),
                TAPS=power(2 * W // w + 1), BLOCK=1024, VEC=1, UNROLL=1)
            return grad_x"""),
}


def answer_of(folder, name, text):
    """The answer `name` of the exercise's file with this text."""
    file, = (file for file, (_, *names) in plug.EXERCISES.items() if name in names)
    (folder / f"{file}.py").write_text(textwrap.dedent(text))
    return plug.answers(folder)[name]


@pytest.mark.parametrize("name, text", [
    *[pytest.param("hinge_d", text, id=door) for door, text in DOORS.items()],
    *[pytest.param(*pair, id=door) for door, pair in CLASS_DOORS.items()]])
def test_the_librarys_function_by_another_door_fails(name, text, tmp_path):
    module = LIBRARY[name].__module__
    try:
        found = verdicts(name, answer_of(tmp_path, name, text))
    finally:
        LIBRARY[name].__module__ = module
    assert all(verdict is not None for verdict in found), found
    says = "the library's own function is called", "imported, not written"
    assert any(text in str(verdict) for text in says for verdict in found), found


def test_an_answer_without_return_is_told_so(tmp_path):
    answer = answer_of(tmp_path, "karras_sigmas", "def karras_sigmas(n, *_):\n    n + 1")
    assert all("returns: None" in str(verdict) for verdict in verdicts("karras_sigmas", answer))


def test_own_answers_in_other_forms_pass(tmp_path):
    """A partial, a decorated function, a callable object, helpers in other modules of the library."""
    body = "return (1 - real.float()).relu().mean() + (margin + fake.float()).relu().mean()"
    for text in (f"import functools\ndef f(real, fake, margin): {body}\n"
                 "hinge_d = functools.partial(f, margin=1)",
                 f"import torch\n@torch.enable_grad()\ndef hinge_d(real, fake, margin=1): {body}",
                 f"class Mine:\n def __call__(self, real, fake, margin=1): {body}\nhinge_d = Mine()"):
        answer = answer_of(tmp_path, "hinge_d", text)
        assert not any(verdicts("hinge_d", answer)), text
        plug.plug({"hinge_d": answer})
        try:
            assert plug.losses.hinge_d is answer
        finally:
            plug.plug({"hinge_d": LIBRARY["hinge_d"]})


def test_answers_may_pass_arguments_by_name(tmp_path):
    """By the names in the stub, which are those of the UNet that trains in the capstone."""
    answer = mutant("consistency", "net(inputs, c_noise.flatten(), cond.image_embeds, cond.time_ids)",
                    "net(x=inputs, c_noise=c_noise.flatten(), image_embeds=cond.image_embeds, "
                    "time_ids=cond.time_ids)")
    assert not any(verdicts("consistency", answer))
    show.show("ex03_consistency", {"consistency": answer}, tmp_path / "picture.png")
    names = ", ".join(inspect.signature(model.UNet.forward).parameters)
    assert f"net({names.removeprefix('self, ')})" in (plug.ROOT / "exercises/ex03_consistency.py").read_text()


@pytest.mark.parametrize("name", ANSWERS)
def test_stubs_fail_each_of_their_tests(name):
    assert graders_of(name)
    for verdict in verdicts(name, STUBS[name]):
        assert isinstance(verdict, NotImplementedError), verdict


@pytest.mark.parametrize("name", ANSWERS)
def test_stubs_have_the_signatures_of_the_library(name):
    stub, own = STUBS[name], ANSWERS[name]
    pairs = [(stub, own)]
    if inspect.isclass(stub):
        pairs = [(value, getattr(own, key)) for key, value in vars(stub).items() if inspect.isfunction(value)]
    for mine, theirs in pairs:
        assert str(inspect.signature(mine)) == str(inspect.signature(theirs))


@pytest.mark.parametrize("file", plug.EXERCISES)
def test_stubs_are_short_and_say_what_to_expect(file):
    text = (plug.ROOT / "exercises" / f"{file}.py").read_text()
    home = plug.EXERCISES[file][0].__name__.replace("plug", "support.upsample").replace(".", "/")
    assert len(text.splitlines()) <= 36
    lines, = re.findall(r"difficulty [1-5] of 5, about (\d+) lines$", text.splitlines()[0])
    table = (plug.ROOT / "exercises" / "README.md").read_text()
    assert re.search(rf"^\| {int(file[2:4])} \|.*\| \d \| {lines} \|$", table, re.MULTILINE)
    assert f"Mirrors {home}.py" in " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------
# The pictures


@pytest.mark.parametrize("file", plug.EXERCISES)
def test_pictures_are_drawn_from_the_answers_functions(file, tmp_path):
    """A function that fails leaves the picture of before. `sample` of the library does not call the answer's
    time_travel, and the Triton kernel has no picture."""
    if file == "ex10_tokens" and not (show.sampler.TOY / "dinov2").exists():
        pytest.skip("it shows the toy world's DINOv2")
    out = tmp_path / "new" / "picture.png"
    show.show(file, {}, out)
    assert Image.open(out).getextrema()[0] == (0, 255)
    before = out.read_bytes()
    for name in set(plug.EXERCISES[file][1:]) - {"time_travel", "upsample_backward_triton"}:
        wrong = FailingLayer if inspect.isclass(LIBRARY[name]) else failing
        with pytest.raises(ZeroDivisionError):
            show.show(file, {name: wrong}, out)
    assert out.read_bytes() == before


def failing(*args, **kwargs):
    return 1 / 0


class FailingLayer(nn.Module):
    __init__ = failing


def test_wrong_answers_have_other_pictures(tmp_path):
    wrong = mutant("euler_step", "denoised +", "denoised -")
    for number, answer in enumerate((LIBRARY["euler_step"], wrong)):
        show.show("ex04_euler", {"euler_step": answer}, tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


@pytest.mark.parametrize("words, says", [
    ("ex05", "ex05_solve: to be written"), ("ex13", "ex13: the exercises are"), ("", "no exercise: the"),
    ("ex05 --out x.gif --library", "x.gif: the name must end in"),
    ("ex05 --out /dev/null/x.png --library", "/dev/null/x.png"),
    ("ex05 --answers nowhere", "nowhere: not a folder"), ("ex05 --figures", "--figures draws all")])
def test_show_says_in_one_line_what_is_wrong(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["show.py", *words.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        show.main()
    except (ModelError, OSError) as error:
        message = str(error)
    except SystemExit as error:
        assert error.code == 2
        message = capsys.readouterr().err.strip()
    assert says in message and "\n" not in message


def test_figures_of_the_page():
    figures = sorted((plug.ROOT / "exercises" / "figures").iterdir())
    page = (plug.ROOT / "exercises" / "README.md").read_text()
    assert [figure.stem for figure in figures] == [file[:4] for file in plug.EXERCISES]
    assert all(page.count(f"](figures/{figure.name})") == 1 for figure in figures)
    assert sum(figure.stat().st_size for figure in figures) < 400_000
    assert page.count("<details>") == 3 * len(figures) == page.count("</details>")


# ---------------------------------------------------------------------------------------------------------
# The capstone


@pytest.fixture
def run(python):
    return lambda *command: subprocess.run([python, *map(str, command)], cwd=plug.ROOT, capture_output=True,
                                           text=True)


def test_plugged_functions_are_used_wherever_they_were_imported():
    names = [name for name in LIBRARY if not name.startswith("upsample") and name != "LoRALinear"]
    plug.plug({name: STUBS[name] for name in names})
    try:
        assert plug.sampler.consistency is plug.solver.consistency is STUBS["consistency"]
        assert plug.discriminator.precondition is STUBS["precondition"]
        assert all(value is STUBS[name] for name, value in plug.library().items() if name in names)
    finally:
        plug.plug({name: LIBRARY[name] for name in names})
    assert plug.library() == LIBRARY


def test_a_plugged_lora_layer_works_with_the_library():
    class LoRALinear(nn.Linear):
        """An answer that has what exercise 8 asks for, and no more."""

        def __init__(self, layer, rank, alpha):
            nn.Module.__init__(self)
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.weight, self.bias = layer.weight, layer.bias
            self.rank, self.alpha, self.active = rank, alpha, True
            self.lora_A = nn.Linear(self.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, self.out_features, bias=False)

        def forward(self, x):
            update = self.lora_B(self.lora_A(x)) * self.alpha / self.rank
            return super().forward(x) + update * self.active

    net, x, own = nn.Sequential(nn.Linear(7, 5)), torch.randn(4, 7), LIBRARY["LoRALinear"]
    before = net(x)
    plug.plug({"LoRALinear": LoRALinear})
    try:
        plug.lora.add_lora(net, 3, alpha=6, targets="0")
        assert isinstance(net[0], LoRALinear) and not isinstance(net[0], own)
        with plug.lora.without_lora(net):
            assert torch.equal(net(x), before)
        after = net(x)
        assert type(plug.lora.merge_lora(net)[0]) is nn.Linear
        assert_close_relative(net(x), after)
        assert not torch.allclose(after, before)
    finally:
        plug.plug({"LoRALinear": own})
    assert plug.library() == LIBRARY and plug.lora.LORA_LAYERS[nn.Linear] is own


def reference_answers(folder):
    """Writes the twelve answers: GATHER, or the library's source, which finds other names in its module, and
    DESIGNS."""
    folder.mkdir()
    for file, (module, *names) in plug.EXERCISES.items():
        text = GATHER
        if file != "ex11_gather":
            parts = [inspect.getsource(part) for name in names for part in parts_of(LIBRARY[name])]
            text = "\n\n".join([f"import {module.__name__} as library", "globals().update(vars(library) | "
                                "{'__name__': __name__, '__file__': __file__})", *parts])
        (folder / f"{file}.py").write_text(text + DESIGNS.get(file, ""))


@pytest.mark.parametrize("words, says", [
    ("--answers nowhere", "nowhere: not a folder; give one of ex*.py"),
    ("--num_clips 1", "1 is not between 2"), ("--stage1_steps 0", "--stage1_steps: 0 is not between 1"),
    ("--train_clips 0", "--train_clips: 0 is not between 1")])
def test_the_capstone_refuses_bad_flags_at_once(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["capstone.py", *words.split()])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("exercises/capstone.py")
    assert says in capsys.readouterr().err


def test_capstone(run, tmp_path):
    """From nothing to the table with all twelve answers, on random networks of 32x32 pixels. No answer that
    the graders refuse gets this far, so each wrong answer above is kept out."""
    from transformers import Dinov2Config, Dinov2Model
    folder = tmp_path / "toy"
    model.save_unet(randomize(model.UNet(**unet_config(sample_size=4))), folder / "unet")
    model.save_vae(randomize(model.VAE(**vae_config(sample_size=32))), folder / "vae")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    model.save_configs(folder)
    save_network(evaluate.VideoClassifier(5, (8, 8, 16, 16), 32), folder / "i3d")
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                             patch_size=14)).save_pretrained(folder / "dinov2")
    answers = tmp_path / "answers"
    reference_answers(answers)
    ema = answers / "ex09_ema.py"
    ema.write_text(ema.read_text().replace("    torch._foreach", "    print('average');torch._foreach"))
    done = run("exercises/capstone.py", "--answers", answers, "--model", folder, "--num_clips", 2,
               "--stage1_steps", 1, "--stage2_steps", 2, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the library " not in done.stdout and done.stdout.count("average") == 2
    found = json.loads((tmp_path / "out" / "capstone.json").read_text())
    assert found["yours"] == list(plug.EXERCISES) and len(found["rows"]) == 5
    assert (tmp_path / "out" / "capstone.png").stat().st_size > 0
