"""Stage 2: adversarial consistency latent distillation. The student learns to end where the teacher ends.
OSV (arXiv 2409.11367), Eqs. 8 to 10.

    $ python train_stage2.py                                    # after train_stage1.py; toy world
    $ python train_stage2.py --stage1 none --adv_weight 0 --num_solver_steps 1 --train all \\
          --output_dir out/lcm                                      # AnimateLCM

Roles: theta = net, theta^- = its average ema, phi = the frozen teacher, psi = disc. The first three are one
UNet in memory: they share whatever does not train, and engine.swapped puts in the few tensors in which they
differ. Real is what ema makes of x_s, the point that the teacher reaches from x_t in m guided Euler steps;
fake is f_theta(x_t, sigma_t). Files as in stage 1. The same command again resumes.
"""
from pathlib import Path

import torch

import data
import engine
import model
import sampler
from discriminator import Discriminator, load_features
from losses import consistency_weight, hinge_d, hinge_g, pseudo_huber
from solver import NUM_SIGMAS, consistency, karras_sigmas, solve

# ---- config ---------------------------------------------------------------------------------------------

PRESETS = {
    # What a laptop's CPU does in a few minutes; falling losses, not yet a good student.
    "toy_cpu": dict(batch_size=2, num_clips=64, max_train_steps=40, learning_rate=1e-4, lr_d=2e-4,
                    warmup_steps=5, lora_rank=16, validation_steps=30, checkpointing_steps=30, log_steps=10,
                    validation_teacher_steps=8),
    # What assets/toy/student.safetensors was made with, in 8 minutes of one GPU.
    "toy": dict(batch_size=64, num_clips=20000, max_train_steps=2100, learning_rate=2e-4, lr_d=1e-3,
                warmup_steps=50, lr_scheduler="cosine", lora_rank=24, lora_convs=True, cuda_graph=True,
                real="data", guidance=[1.0] * 4, validation_steps=300, checkpointing_steps=300, log_steps=50),
    # The paper's setting: SVD on 2 GPUs; --data is yours. Where the paper is silent, see the README.
    "paper": dict(model="stabilityai/stable-video-diffusion-img2vid", dino="facebook/dinov2-small", data=None,
                  width=576, height=320, batch_size=2, max_train_steps=20000, learning_rate=5e-6, lr_d=1e-5,
                  warmup_steps=100, lora_rank=64, gradient_checkpointing=True, cuda_graph=True,
                  validation_steps=500, checkpointing_steps=500, log_steps=10),
}

parser = engine.training_flags("Stage 2 of OSV: consistency distillation.", PRESETS)
flag = parser.add_argument
flag("--stage1", default="out/stage1", help="output folder of stage 1 to start from, or none")
flag("--output_dir", type=Path, default="out/stage2", help="everything is written here")
flag("--train", choices=("lora", "temporal", "lora+temporal", "all"), default="lora+temporal",
     help="what trains")
flag("--adv_weight", type=float, default=0.1, help="lambda of Eq. 10; 0 trains without a discriminator")
flag("--real", choices=("ema", "data"), default="ema", help="what the discriminator takes for real: what "
     "theta^- makes of x_s, as the paper does, or clips as in stage 1")
flag("--num_solver_steps", type=int, default=5, help="m: Euler steps of the teacher from x_t to x_s")
flag("--guidance", type=float, nargs=4, default=[1.0, 1.5, 2.0, 2.5], metavar=("A", "B", "C", "D"),
     help="the teacher's, growing over the frames from one drawn in A..B to one in C..D; 1 1 1 1 is none")
flag("--weight_exponent", type=float, default=0.1, help="e of lambda(t_n) = (1 / (sigma_t - sigma_s)) ^ e")
flag("--ema_decay", type=float, default=0.95, help="of theta^-; 0 is the student itself")
args, world = engine.start_training(parser, PRESETS)
device, dtype = world.device, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
stop = engine.stop_signal()
share = args.batch_size // world.size                           # clips of this process
part = share // args.gradient_accumulation_steps                # clips at a time
torch.manual_seed(args.seed)                                    # initial weights

# ---- what is there: networks, data ----------------------------------------------------------------------

with engine.refusing():
    vae = model.load_vae(args.model, dtype=dtype, device=device)
    image_encoder = model.load_image_encoder(args.model, dtype=dtype, device=device)
    unet = model.load_unet(args.model, device=device)
    features = load_features(args.discriminator, args.model, args.dino, vae)
    latents, shown = data.open_training_data(args, vae, image_encoder, unet, share, world.rank)
sigmas = karras_sigmas(NUM_SIGMAS).to(device)                   # n + 1, descending, trailing 0

# ---- what trains ----------------------------------------------------------------------------------------

if "lora" in args.train:
    model.add_lora(unet, args.lora_rank, targets=model.LORA_CONVS if args.lora_convs else model.LORA_TARGETS)
net = unet.to(dtype)
if world.rank == 0:                                             # while nothing has trained yet
    sheets = sampler.Sheets(net, vae, *shown, args.validation_teacher_steps, args.seed)
net.set_checkpointing(args.gradient_checkpointing)
names = [name for name, _ in net.named_parameters() if args.train == "all" or
         "lora" in args.train and ".lora_" in name or
         "temporal" in args.train and ".temporal_transformer_blocks." in name and ".lora_" not in name]
theta = engine.Weights(net, names)
teacher_weights = {name: p.detach().clone() for name, p in theta.copies.items()}

disc = Discriminator(features, args.heads).to(device)
psi = {name: p for name, p in disc.named_parameters() if p.requires_grad}
psi_buffers = {name: b for name, b in disc.heads.named_buffers()}       # spectral norm's power iteration

if args.stage1 != "none":                                       # theta and psi go on where stage 1 ended
    try:
        groups = {"student": theta.masters} | ({"disc": psi | psi_buffers} if args.adv_weight else {})
        for file, group in groups.items():
            for name, tensor in model.read_safetensors([Path(args.stage1) / f"{file}.safetensors"]):
                if name not in group or group[name].shape != tensor.shape:
                    raise model.ModelError(
                        f"{args.stage1}/{file}.safetensors: {name} does not fit; was it made with the same "
                        "--lora_rank, --discriminator and --heads, and nothing trained that is frozen here?")
                group[name].data.copy_(tensor)
    except model.ModelError as problem:
        parser.error(f"{problem}; run train_stage1.py first, or give --stage1 none")
    theta.push()
ema = {name: t.clone() for name, t in theta.tensors().items()}  # fp32, as the masters
ema_copies = {name: t.to(dtype) for name, t in ema.items()}     # what the network computes with

# ---- optimisers, and where the last run stopped ---------------------------------------------------------

opt = torch.optim.Adam(theta.masters.values(), lr=args.learning_rate, fused=device.type == "cuda")
opt_d = torch.optim.Adam(psi.values(), lr=args.lr_d, betas=(0.0, 0.999), fused=device.type == "cuda")
bad_steps, skipped = 0, torch.zeros(())
# Everything that evolves. Noise and order of clips are functions of the step, so nothing else does.
evolving = {"theta": theta.masters, "ema": ema, "psi": psi, "buffer": psi_buffers,
            "count": {"skipped": skipped}}
optimizers = {"opt": opt, "opt_d": opt_d}
step, config = engine.resume(args, world, evolving, optimizers)
theta.push()
if world.rank == 0:
    count = sum(p.numel() for p in net.parameters())
    trained, judge = (sum(p.numel() for p in group.values()) for group in (theta.masters, psi))
    print(f"{trained:,d} of {count:,d} parameters train, {judge:,d} in the discriminator; from step {step}")
log = engine.Log(args.output_dir, world, step, args.batch_size)

# ---- a step ---------------------------------------------------------------------------------------------

record = engine.recorder(args.cuda_graph and device.type == "cuda" and part == share)


# ---- where the teacher's m steps lead, and what theta^- makes of that
@record
@torch.no_grad()
def distil(x_t, grid, guidance, *cond):
    cond = model.Cond(*cond)
    with engine.swapped(theta.copies, teacher_weights), model.without_lora(net):
        x_s = solve(net, x_t, grid, cond, guidance)                             # b f c h w
    with engine.swapped(theta.copies, ema_copies):
        return consistency(net, x_s, grid[-1], cond)                            # b f c h w


@torch.no_grad()
def prepare(numbers):
    """What a step asks the student, and what it gets to see: x_t, sigma_t, cond, real, target, weight."""
    x0, cond = latents.take(numbers)                                            # b f c h w
    i, low, high = data.uniforms(args.seed, numbers, 11, 3).to(device).T        # b each
    i = (i * NUM_SIGMAS).long()
    grid = sigmas[(i + torch.arange(args.num_solver_steps + 1, device=device)[:, None]).clamp(max=NUM_SIGMAS)]
    sigma_t, sigma_s = grid[0], grid[-1]                                        # b each; grid m + 1 b
    noise = engine.normal(args.seed, numbers, 12, x0.shape[1:], device)
    x_t = x0 + sigma_t.view(-1, 1, 1, 1, 1) * noise                             # b f c h w
    a, b, c, d = args.guidance
    ramp = torch.linspace(0, 1, x0.shape[1], device=device)                     # f
    low, high = (a + (b - a) * low)[:, None], (c + (d - c) * high)[:, None]     # b 1 each
    guidance = (low + (high - low) * ramp)[:, :, None, None, None]              # b f 1 1 1
    torch._foreach_copy_(list(ema_copies.values()), list(ema.values()))
    x0_target = distil(x_t, grid, None if max(args.guidance) == 1 else guidance, *cond)
    real = x0 if args.real == "data" else x0_target
    return x_t, sigma_t, cond, real, x0_target, consistency_weight(sigma_t, sigma_s, args.weight_exponent)


# ---- D step: learn to tell real from x0_pred, which is detached: the student receives no gradient
def d_step(x_t, sigma_t, real, *cond):
    cond = model.Cond(*cond)
    with torch.set_grad_enabled(part == share):                 # then the G step uses this very forward pass
        x0_pred = consistency(net, x_t, sigma_t, cond)                          # b f c h w
    logits_real = disc(real, cond)
    logits_fake = disc.eval()(x0_pred.detach(), cond)           # one power iteration a step is enough
    loss_d = hinge_d(logits_real, logits_fake)
    (loss_d * (part / share)).backward()
    return x0_pred, loss_d.detach(), logits_real.detach().mean(), logits_fake.detach().mean()


# ---- G step: D is frozen, gradients flow through it into the student
def g_step(x0_pred, x_t, sigma_t, target, weight, *cond):
    cond = model.Cond(*cond)
    if x0_pred is None:
        x0_pred = consistency(net, x_t, sigma_t, cond)                          # b f c h w
    loss_huber = pseudo_huber(x0_pred, target, args.huber_c, weight)
    loss_adv = torch.zeros_like(loss_huber)
    if args.adv_weight:
        loss_adv = hinge_g(disc(x0_pred, cond), args.linear_g)
    ((args.adv_weight * loss_adv + loss_huber) * (part / share)).backward()
    return loss_huber.detach(), loss_adv.detach()


d_step, g_step = record(d_step, psi.values()), record(g_step, theta.copies.values())

# ---- loop -----------------------------------------------------------------------------------------------

while step < args.max_train_steps:
    decay_steps = args.max_train_steps if args.lr_scheduler == "cosine" else None
    engine.schedule(opt, args.learning_rate, step, args.warmup_steps, decay_steps)
    engine.schedule(opt_d, args.lr_d, step, args.warmup_steps, decay_steps)
    # For what draws by itself, the unet discriminator: each process its own.
    torch.manual_seed((args.seed * 1_000_003 + step) * world.size + world.rank)
    first = step * args.batch_size + world.rank * share
    with engine.refusing():                                     # if not one of the videos can be used
        parts = [prepare(numbers) for numbers in torch.arange(first, first + share).split(part)]
    x0_pred, norm_d, good_d = None, torch.zeros((), device=device), True

    if args.adv_weight:
        disc.train()
        for x_t, sigma_t, cond, real, _, _ in parts:
            x0_pred, loss_d, logits_real, logits_fake = d_step(x_t, sigma_t, real, *cond)
            log.add(part / share, loss_d=loss_d, logits_real=logits_real, logits_fake=logits_fake)
        norm_d, good_d = engine.finite_step(opt_d, psi.values(), args.max_grad_norm)

    disc.requires_grad_(False)
    for x_t, sigma_t, cond, _, target, weight in parts:
        loss_huber, loss_adv = g_step(x0_pred if part == share else None, x_t, sigma_t, target, weight, *cond)
        log.add(part / share, loss_huber=loss_huber, loss_adv=loss_adv)
    disc.requires_grad_(True)
    theta.pull()
    norm, good = engine.finite_step(opt, theta.masters.values(), args.max_grad_norm)
    theta.push()
    engine.update_ema(ema, theta.tensors(), args.ema_decay)

    # ---- what follows is a pure function of the step: skipped steps, one log line, samples, checkpoint
    step += 1
    bad_steps = 0 if good and good_d else bad_steps + 1
    skipped += bad_steps > 0
    if bad_steps == 5:
        parser.error(f"gradients were not finite for 5 steps, until step {step}; start over (--resume_from_"
                     "checkpoint none) with a lower --learning_rate, or with --mixed_precision no")
    log.add(grad_norm=norm, grad_norm_d=norm_d)
    if step % args.log_steps == 0:
        log.write(step, skipped=int(skipped))
    if world.rank == 0 and step % args.validation_steps == 0:
        sheets.save(args.output_dir, step, data.FPS)
    stopping = engine.any_rank(stop, device)
    if stopping or step % args.checkpointing_steps == 0 or step == args.max_train_steps:
        if world.rank == 0:
            tensors = engine.collect(evolving, optimizers)
            engine.save_checkpoint(args.output_dir, step, tensors, config, args.checkpoints_total_limit)
        engine.any_rank(False, device)                          # the others wait until it is written
    if stopping:
        break

# ---- what stage 2 and the sampler take ------------------------------------------------------------------

if world.rank == 0 and step < args.max_train_steps:
    print(f"stopped by SIGTERM after step {step}; run the same command again to go on")
elif world.rank == 0:
    engine.publish(args.output_dir, net, theta, psi | psi_buffers, lora=args.train == "lora")
engine.end_world(world)
