r"""Stage 2: adversarial consistency latent distillation. The student jumps to the end of the teacher's ODE.
OSV (arXiv 2409.11367), Eqs. 8 to 10.

    $ python train_stage2.py                                    # after train_stage1.py; toy world
    $ python train_stage2.py --stage1 none --adv_weight 0 --num_solver_steps 1 --train all \
          --output_dir out/lcm                                      # AnimateLCM
    $ python train_stage2.py --preset one_gpu --data OpenVid-1M.csv --dry_run       # hours, memory, disk

Roles: theta = net, theta^- = ema, phi = teacher_weights, psi = disc. The first three are one UNet in memory,
into which engine.use_weights puts the few weights that differ. The teacher takes m Euler steps from x_t to
x_s. Real is f_theta^-(x_s, sigma_s), or x0 with --real data. Fake is f_theta(x_t, sigma_t).

Writes to --output_dir: checkpoints, metrics.jsonl and sample sheets. At the end: student.safetensors and
disc.safetensors for `train_stage2.py --stage1`, and merged/, a UNet folder for `sampler.py --student`. If
only LoRA trains, pytorch_lora_weights.safetensors has it for other tools. The same command again resumes.
`diff train_stage1.py train_stage2.py` shows what stage 2 does differently.
"""
from collections import namedtuple
from pathlib import Path

import torch

import data
import lora
import model
import sampler
from discriminator import Discriminator, load_features
from losses import consistency_weight, hinge_d, hinge_g, pseudo_huber
from solver import NUM_SIGMAS, consistency, karras_sigmas, solve
from support import checkpoint, dryrun, engine, kernels

# ---- Configuration --------------------------------------------------------------------------------------

PRESETS = {
    # Small enough for a laptop CPU: losses fall in a few minutes, samples stay blurry.
    "toy_cpu": dict(batch_size=2, num_clips=64, max_train_steps=40, learning_rate=1e-4, lr_d=2e-4,
                    warmup_steps=5, lora_rank=16, validation_steps=30, checkpointing_steps=30, log_steps=10,
                    validation_teacher_steps=8),
    # The settings of assets/toy/student.safetensors: minutes on one GPU.
    "toy": dict(batch_size=64, num_clips=20000, max_train_steps=2100, learning_rate=2e-4, lr_d=1e-3,
                warmup_steps=50, lr_scheduler="cosine", lora_rank=24, lora_convs=True, guidance=[1, 1, 3, 3],
                real="data", cuda_graph=True, validation_steps=300, checkpointing_steps=300, log_steps=50),
    # The paper's setting in version 1: SVD on 2 GPUs, with your own --data. docs/decisions.md explains the
    # values that the paper does not give.
    "paper": dict(model="stabilityai/stable-video-diffusion-img2vid", dino="facebook/dinov2-small", data=None,
                  width=576, height=320, batch_size=2, max_train_steps=20000, learning_rate=5e-6, lr_d=1e-5,
                  warmup_steps=100, lora_rank=64, gradient_checkpointing=True, cuda_graph=True,
                  validation_steps=500, checkpointing_steps=500, log_steps=10),
}
# The same on one GPU: the gradients of two clips add up, one clip after the other. one_gpu allocates 22 GB,
# one_gpu_24gb 20 GB. It has no CUDA graphs. With them stage 2 runs out of 23 GiB, even if it keeps no
# activations.
PRESETS["one_gpu"] = PRESETS["paper"] | dict(gradient_accumulation_steps=2, keep_activations=True)
PRESETS["one_gpu_24gb"] = PRESETS["one_gpu"] | dict(cuda_graph=False)

parser = engine.training_flags(__doc__.splitlines()[0], PRESETS)
flag = parser.add_argument
flag("--stage1", default="out/stage1", help="output folder of stage 1 to start from, or none")
flag("--output_dir", type=Path, default="out/stage2", help="everything is written here")
flag("--train", choices=("lora", "temporal", "lora+temporal", "all"), default="lora+temporal",
     help="weights to train")
flag("--adv_weight", default=0.1, help="lambda of Eq. 10; 0 trains without a discriminator")
flag("--real", choices=("ema", "data"), default="ema", help="real clips of the discriminator: the output of "
     "theta^- for x_s, as in the paper, or x0 as in stage 1")
flag("--num_solver_steps", default=5, help="m: Euler steps of the teacher from x_t to x_s")
flag("--guidance", nargs=4, default=[1.0, 1.5, 2.0, 2.5], metavar=("A", "B", "C", "D"),
     help="the teacher's guidance: drawn in A..B for the first frame and in C..D for the last; 1 1 1 1: none")
flag("--weight_exponent", default=0.1, help="e of lambda(t_n) = (1 / (sigma_t - sigma_s)) ^ e")
flag("--ema_decay", default=0.95, help="decay of theta^-; 0: theta^- is the student itself")
args, world = engine.start_training(parser, PRESETS)
checkpoint.refuse_overwriting([args.output_dir], [args.stage1])
device, dtype = world.device, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
# In each step, this process trains on `clips_per_rank` clips, in `num_parts` micro-batches.
clips_per_rank, num_parts = args.batch_size // world.size, args.gradient_accumulation_steps
micro_batch = clips_per_rank // num_parts                           # clips in one forward pass
# One forward pass of the student serves the D step and the G step, unless gradients accumulate over several
# micro-batches: keeping the activations of all of them can cost the memory that accumulation saves.
one_forward = num_parts == 1 or args.keep_activations
fast = (lambda network: network) if args.plain else kernels.fast
torch.manual_seed(args.seed)                                        # initial weights of LoRA and heads

# ---- Networks and data ----------------------------------------------------------------------------------

vae = fast(model.load_vae(args.model, dtype=dtype, device=device))
image_encoder = model.load_image_encoder(args.model, dtype=dtype, device=device)
unet = model.load_unet(args.model, device=device)
features = load_features(args.discriminator, args.model, args.dino, vae)
# latents: the training clips. shown: (x0, cond) of the four clips on the sample sheets.
latents, shown = data.open_training_data(args, vae, image_encoder, unet, clips_per_rank, world.rank)
sigmas = karras_sigmas(NUM_SIGMAS).to(device)                       # n + 1, descending, trailing 0

# ---- Trainable weights ----------------------------------------------------------------------------------

if "lora" in args.train:
    lora.add_lora(unet, args.lora_rank, targets=lora.LORA_CONVS if args.lora_convs else lora.LORA_TARGETS)
net = fast(unet).to(dtype)
theta = engine.MasterWeights(net, engine.trained_names(net, args.train))
teacher_weights = {name: p.detach().clone() for name, p in theta.net_weights.items()}

disc = fast(Discriminator(features, args.heads)).to(device)
psi = {name: p for name, p in disc.named_parameters() if p.requires_grad}
# The singular vectors of spectral norm. Buffers of the features are taken to be frozen, and are not saved.
psi_buffers = dict(disc.heads.named_buffers())

if world.rank == 0:                                                 # net is still the teacher, drawn here
    sheets = sampler.Sheets(net, vae, *shown, args.validation_teacher_steps, args.seed)
net.set_checkpointing(args.gradient_checkpointing)

if args.stage1 != "none":                                           # theta and psi start where stage 1 ended
    groups = {"student": theta.masters} | ({"disc": psi | psi_buffers} if args.adv_weight else {})
    checkpoint.load_stage1(Path(args.stage1), groups)
ema = {name: p.clone() for name, p in theta.tensors().items()}      # theta^- in fp32

# ---- Optimisers and resume ------------------------------------------------------------------------------

opt = torch.optim.Adam(theta.masters.values(), lr=args.learning_rate, fused=device.type == "cuda")
# betas[0] = 0: no momentum, as is usual for discriminators.
opt_d = torch.optim.Adam(psi.values(), lr=args.lr_d, betas=(0.0, 0.999), fused=device.type == "cuda")
# The whole state of a run. Noise and the order of clips are functions of seed and clip number.
state = {"theta": theta.masters, "ema": ema, "psi": psi, "buffer": psi_buffers}
run = engine.Run(args, world, state, {"opt": opt, "opt_d": opt_d},
                 save_sheet=lambda folder, step: sheets.save(folder, step, data.FPS))
theta.copy_to_net()                                                 # the masters may be those of a checkpoint
ema_weights = {name: p.to(dtype) for name, p in ema.items()}        # theta^- in the dtype of the network
run.announce(net, theta.masters, psi)
run = dryrun.DryRun(run, latents) if args.dry_run else run          # ends the loop after a few steps

# ---- One step -------------------------------------------------------------------------------------------

# x_t: noised clips, x_real: clips that the discriminator should call real, x_target: the student's target
# (each b f c h w). sigma_t: noise levels, weight: of the distance to x_target (each b). cond: model.Cond.
# numbers: of the clips [b], for the noise of UNetFeatures; None for other discriminators.
Batch = namedtuple("Batch", "x_t sigma_t cond x_real x_target weight numbers")


@torch.no_grad()
def make_target(x_t, grid, guidance, cond):
    """x_target [b f c h w]: the teacher solves from x_t to x_s along the noise levels `grid` [m+1 b], then
    theta^- maps x_s to the clean latent. Where sigma_s is 0, the result is x_s itself."""
    with engine.use_weights(theta.net_weights, teacher_weights), lora.without_lora(net):
        x_s = solve(net, x_t, grid, cond, guidance)                             # b f c h w, Eq. 8
    with engine.use_weights(theta.net_weights, ema_weights):
        return consistency(net, x_s, grid[-1], cond)                            # b f c h w, Eq. 4


@torch.no_grad()
def prepare(numbers):
    """Draws clips `numbers` [b], noise levels and noise, all functions of seed and number -> Batch."""
    x0, cond = latents.take(numbers)                                            # b f c h w
    u, v_first, v_last = engine.uniforms(args.seed, numbers, stream=11, n=3).to(device).T       # b each
    steps = torch.arange(args.num_solver_steps + 1, device=device)[:, None]     # m+1 1
    # The m + 1 levels from sigma_t down to sigma_s. Where fewer are left, 0 is repeated, see solver.solve.
    grid = sigmas[((u * NUM_SIGMAS).long() + steps).clamp(max=NUM_SIGMAS)]      # m+1 b
    sigma_t, sigma_s = grid[0], grid[-1]                                        # b each
    noise = engine.normal(args.seed, numbers, 12, x0.shape[1:], device)         # b f c h w
    x_t = x0 + sigma_t.view(-1, 1, 1, 1, 1) * noise                             # b f c h w
    # The guidance w of a clip: uniform in a..b at the first frame and in c..d at the last, linear in between.
    a, b, c, d = args.guidance
    w_first, w_last = (a + (b - a) * v_first)[:, None], (c + (d - c) * v_last)[:, None]         # b 1 each
    ramp = torch.linspace(0, 1, x0.shape[1], device=device)                     # f
    guidance = (w_first + (w_last - w_first) * ramp)[:, :, None, None, None]    # b f 1 1 1
    # clone: a recorded make_target overwrites what it returned for the micro-batch before
    x_target = make_target(x_t, grid, None if set(args.guidance) == {1} else guidance, cond).clone()
    x_real = x0 if args.real == "data" else x_target
    weight = consistency_weight(sigma_t, sigma_s, args.weight_exponent)         # b, lambda(t_n) of Eq. 10
    numbers = numbers.to(device) if args.discriminator == "unet" else None
    return Batch(x_t, sigma_t, cond, x_real, x_target, weight, numbers)


def d_step(batch):
    """Adds a micro-batch's share to the discriminator's gradients. x0_pred is detached in its loss, so the
    student gets none. Returns x0_pred for the G step (None if that computes it again), the loss, and the mean
    logits of real and fake."""
    with torch.set_grad_enabled(one_forward):
        x0_pred = consistency(net, batch.x_t, batch.sigma_t, batch.cond)        # b f c h w, Eq. 4
    logits_real = disc(batch.x_real, batch.cond, batch.numbers)                 # b k
    logits_fake = disc(x0_pred.detach(), batch.cond, batch.numbers)             # b k
    loss_d = hinge_d(logits_real, logits_fake)                                  # Eq. 9
    (loss_d / num_parts).backward()
    real, fake = logits_real.detach().mean(), logits_fake.detach().mean()
    return x0_pred if one_forward else None, loss_d.detach(), real, fake


def g_step(x0_pred, batch):
    """Adds a micro-batch's share to the student's gradients. They pass through the discriminator, whose own
    weights are frozen. Returns the distance and the adversarial loss."""
    if x0_pred is None:
        x0_pred = consistency(net, batch.x_t, batch.sigma_t, batch.cond)        # b f c h w, Eq. 4
    loss_huber = pseudo_huber(x0_pred, batch.x_target, args.huber_c, batch.weight)      # d(x0_pred, x_target)
    loss_adv = torch.zeros_like(loss_huber)
    if args.adv_weight:
        logits_fake = disc(x0_pred, batch.cond, batch.numbers)                  # b k
        loss_adv = hinge_g(logits_fake, args.linear_g)                          # relu(1 - D(x0_pred))
    loss_g = args.adv_weight * loss_adv + loss_huber                            # Eq. 10
    (loss_g / num_parts).backward()
    return loss_huber.detach(), loss_adv.detach()


# One function per micro-batch. Without CUDA graphs all are the same. With --keep_activations each is a CUDA
# graph of its own, because its activations stay in the memory of that graph until the G step.
d_steps, g_steps = [d_step] * num_parts, [g_step] * num_parts
power_iteration = lambda: engine.power_iteration(disc)
if args.cuda_graph and device.type == "cuda":
    make_target = engine.cuda_graph(make_target)
    power_iteration = engine.cuda_graph(power_iteration)
    d_steps = engine.cuda_graphs(d_step, psi.values(), num_parts, shared=not one_forward)
    g_steps = engine.cuda_graphs(g_step, theta.net_weights.values(), num_parts, shared=not one_forward)

# ---- Loop -----------------------------------------------------------------------------------------------

decay_steps = args.max_train_steps if args.lr_scheduler == "cosine" else None
while run.step < args.max_train_steps and not run.stopped:
    # ---- Draw: each step and rank has its own clip numbers
    engine.set_learning_rate(opt, args.learning_rate, run.step, args.warmup_steps, decay_steps)
    engine.set_learning_rate(opt_d, args.lr_d, run.step, args.warmup_steps, decay_steps)
    first = run.step * args.batch_size + world.rank * clips_per_rank
    batches = [prepare(numbers) for numbers in torch.arange(first, first + clips_per_rank).split(micro_batch)]

    # ---- D step: learn to tell x_real from x0_pred
    x0_preds, norm_d, finite_d = [None] * num_parts, torch.zeros((), device=device), True
    if args.adv_weight:                                         # otherwise these three stay as they are
        power_iteration()                                       # leaves disc in eval mode
        for i, batch in enumerate(batches):
            x0_preds[i], loss_d, real, fake = d_steps[i](batch)
            run.log.add(loss_d=loss_d, logits_real=real, logits_fake=fake)
        norm_d, finite_d = engine.finite_step(opt_d, psi.values(), args.max_grad_norm)

    # ---- G step: x0_pred comes closer to x_target and looks more real
    disc.requires_grad_(False)                                  # the loss passes through it, psi stays
    for i, batch in enumerate(batches):
        loss_huber, loss_adv = g_steps[i](x0_preds[i], batch)
        run.log.add(loss_huber=loss_huber, loss_adv=loss_adv)
        theta.grads_to_masters()
    disc.requires_grad_(True)
    norm, finite = engine.finite_step(opt, theta.masters.values(), args.max_grad_norm)
    theta.copy_to_net()

    # ---- EMA: theta^- <- decay theta^- + (1 - decay) theta; the decay is 1 if theta's step was skipped
    engine.update_ema(ema, theta.tensors(), args.ema_decay if finite else 1)
    torch._foreach_copy_(list(ema_weights.values()), list(ema.values()))

    run.after_step(finite and finite_d, grad_norm=norm, grad_norm_d=norm_d)

# ---- Final weights, for stage 2 and the sampler ---------------------------------------------------------

if world.rank == 0 and run.step >= args.max_train_steps:
    engine.publish(args.output_dir, args.model, theta, psi | psi_buffers, lora=args.train == "lora")
engine.end_world(world)
