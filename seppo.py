"""SePPO: Semi-Policy Preference Optimization (Zhang et al., arXiv 2410.05255), in one file.

SePPO aligns a diffusion model using only images people like: it needs no losing images and no reward model. An earlier
checkpoint of the run, the reference, generates the sample that takes the place of DPO's loser. An anchor criterion
decides for each sample whether to push away from it or to learn from it as from a second winner.

    python seppo.py                                                            # a toy task: a minute on one CPU core
    python seppo.py --model runwayml/stable-diffusion-v1-5 --data pickapic     # the paper
    python seppo.py --model DIR_OR_ID --data DIR_OR_ID --out runs/mine         # your images; see README.md
    python seppo.py --model DIR_OR_ID --motion-adapter DIR_OR_ID --data CLIPS  # text-to-video

Run the same command again to resume. Sections 1 to 4 implement the paper; 5 to 8 are data, models, toy task and files.
Left out on purpose: SDXL, weight averaging, experiment trackers (metrics.jsonl has all numbers), the safety checker.
"""

import argparse
import bisect
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import av
import diffusers
import huggingface_hub
import pyarrow.dataset
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNetMotionModel
from peft import LoraConfig
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# ---- 1. The objective (the paper's section 3) -----------------------------------------------------------------------
# The winner x^w comes first, the reference sample x^r second. m(x; net) is the mean squared error of a net's estimate
# of the noise in x_t, which is x noised to step t (denoising_error). All four errors share one (t, eps).
#
#     s_w  = m(x^w; theta) - m(x^w; ref)                 winner, policy minus reference
#     s_r  = m(x^r; theta) - m(x^r; ref)                 reference sample, policy minus reference
#     sign = sgn(-s_w)                                   the anchor criterion, at this (t, eps); no gradient
#     L    = -log sigmoid(-beta/2 (s_w - sign s_r))      1/2 replaces the paper's T omega(lambda_t)
#
# Sign +1: the policy has the smaller error on the winner, so x^r is the loser of a DPO pair. Sign -1: the
# reference is the better model here, so its sample counts as a second winner. 0: the errors are equal, because the
# policy and its reference have equal weights; only the winner counts. "(inferred)": not stated in the paper.


def anchor_criterion(policy_w, reference_w):  # sgn(-s_w), from the (B,) errors of x^w
    return torch.sign(reference_w - policy_w).detach()


def seppo_loss(*, policy_w, reference_w, policy_r, reference_r, beta=2000.0, flip="sign", sign=None):
    """SePPO's loss (arXiv 2410.05255, with Diffusion-DPO's 1/2 for T omega(lambda_t)), one value per pair.
    policy_w, reference_w, policy_r, reference_r: (B,) mean squared errors >= 0, each named by net and sample
    (reference_w: the reference's error on x^w), keyword-only, because other code orders them otherwise. Compute all
    with the same dtype, kernels and batch shape, and pass them in fp32, because beta multiplies rounding errors.
    flip: how the sign is used. `sign`: the paper's Anchor-based Adaptive Flipper. `indicator` (sspo): -1 becomes 0,
    only the winner counts. `none`: x^r always loses, as in Diffusion-DPO and SPIN-Diffusion. Else: ValueError.
    sign: (B,) signs that Trainer.anchor_sign has decided, or None to compute them here. `flip` is applied either way.
    Returns the (B,) losses (the log-sigmoid is taken per pair: average afterwards) and a dict of detached (B,)
    tensors: the `sign` used, `logit`, the implicit rewards `reward_w`, `reward_r`."""
    s_w, s_r = policy_w - reference_w, policy_r - reference_r
    sign = anchor_criterion(policy_w, reference_w) if sign is None else sign
    if flip == "indicator":
        sign = sign.clamp(min=0)
    elif flip == "none":
        sign = torch.ones_like(sign)
    elif flip != "sign":
        raise ValueError(f"flip must be sign, indicator or none, got {flip!r}")
    logit = -0.5 * beta * (s_w - sign * s_r)
    rewards = {"reward_w": -0.5 * beta * s_w.detach(), "reward_r": -0.5 * beta * s_r.detach()}
    return -F.logsigmoid(logit), {"sign": sign, "logit": logit.detach()} | rewards


def choose_reference(k, rule, generator=None):
    """Which of k checkpoints becomes the reference: an index from 0 (the base model) to k-1.
    rule: `random` is uniform (SePPO) and draws from `generator` (a torch.Generator), `latest` is k-1 (SPIN-Diffusion),
    `initial` is 0 (Diffusion-DPO). Raises ValueError for k < 1 or another rule."""
    if k < 1 or rule not in ("random", "latest", "initial"):
        raise ValueError(f"k must be >= 1, got {k}, and rule random, latest or initial, got {rule!r}")
    if rule == "random":
        return int(torch.randint(k, (), generator=generator))
    return k - 1 if rule == "latest" else 0


METHODS = {  # six methods: where x^r comes from, which checkpoint is the reference, how the sign is used
    "seppo": dict(loser="generated", reference="random", flip="sign"),
    "sspo": dict(loser="generated", reference="random", flip="indicator"),  # arXiv version 2 of the paper (inferred)
    "spin": dict(loser="generated", reference="latest", flip="none"),
    "ditto": dict(loser="generated", reference="initial", flip="none"),
    "dpo": dict(loser="data", reference="initial", flip="none"),
    "sft": dict(loser="none", reference="initial", flip="none"),  # no x^r: reference, flip are unused
}


def predict(unet, x_t, t, context):
    """The net's prediction for x_t, in fp32. A clip has one caption; diffusers expects one per frame."""
    if x_t.ndim == 5:
        context = context.repeat_interleave(x_t.shape[2], dim=0)
    return unet(x_t, t, encoder_hidden_states=context).sample.float()


def denoising_error(unet, scheduler, x_0, eps, t, context):
    """m(x_0; unet): (B,) fp32 mean squared errors of the net's prediction of eps (of v, for a v-prediction model).
    x_0, eps: (B, C, h, w) fp32 latents and noise, or (B, C, F, h, w) for clips. t: (B,) integer timesteps.
    context: (B, tokens, width), the encoded captions. scheduler: from diffusers, with abar and prediction type."""
    x_t = scheduler.add_noise(x_0, eps, t)  # sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target = scheduler.get_velocity(x_0, eps, t) if scheduler.config.prediction_type == "v_prediction" else eps
    return (predict(unet, x_t, t, context) - target).square().flatten(1).mean(1)


def batch_loss(policy, reference, scheduler, x_w, eps, t, context, x_r=None, sign=None, beta=2000.0, flip="sign"):
    """Returns the summed loss of B pairs, ready for backward(), and {statistic: (B,) values}.
    x_w, x_r: (B, C, h, w) latents of winners, reference samples (dpo: losers). eps, t, context: see denoising_error.
    reference None: SFT, whose loss is the winner's error itself.
    sign: (B,) signs decided before x_r was generated, or None. Where one is 0, x_r is a placeholder equal to x_w; it
    enters neither the loss nor the statistics of pairs."""
    if reference is None:
        errors = denoising_error(policy, scheduler, x_w, eps, t, context)
        return errors.sum(), {"winners": torch.ones_like(errors), "loss": errors.detach(), "policy_w": errors.detach()}
    x = torch.cat([x_w, x_r])  # (2 B, C, h, w): both in one batch
    eps, t, context = (torch.cat([v, v]) for v in (eps, t, context))
    policy_w, policy_r = denoising_error(policy, scheduler, x, eps, t, context).chunk(2)
    with torch.no_grad():
        reference_w, reference_r = denoising_error(reference, scheduler, x, eps, t, context).chunk(2)
    errors = dict(policy_w=policy_w, reference_w=reference_w, policy_r=policy_r, reference_r=reference_r)
    losses, d = seppo_loss(**errors, beta=beta, flip=flip, sign=sign)
    ones = torch.ones_like(losses)
    pairs = ones if sign is None else sign.abs()
    stats = {"winners": ones, "loss": losses, "logit": d["logit"], "policy_w": policy_w, "reference_w": reference_w}
    stats |= {"sign_pos": d["sign"] > 0, "sign_neg": d["sign"] < 0, "sign_zero": d["sign"] == 0}
    stats |= {"pairs": pairs, "policy_r": pairs * policy_r, "reference_r": pairs * reference_r}
    stats |= {"implicit_acc": pairs * (1 + torch.sign(d["reward_w"] - d["reward_r"])) / 2}  # a tie counts half
    return losses.sum(), {name: value.detach() for name, value in stats.items()}


# ---- 2. The sampler -------------------------------------------------------------------------------------------------
# Reference samples stay latents (our choice; the paper does not say): decoding and encoding them would add errors.

SOLVERS = {  # all deterministic; none clips latents; "trailing" spacing starts at the last timestep
    "dpm++": (diffusers.DPMSolverMultistepScheduler, dict(algorithm_type="dpmsolver++", timestep_spacing="trailing")),
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False, timestep_spacing="trailing")),
    "pndm": (diffusers.PNDMScheduler, dict(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)),  # SD 1.5's
}
SCHEDULE_KEYS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr".split()


def make_solver(scheduler, solver):  # the model's own scheduler gives only noise schedule and prediction type
    kind, settings = SOLVERS[solver]
    return kind.from_config({name: scheduler.config[name] for name in (*SCHEDULE_KEYS, "prediction_type")}, **settings)


@torch.no_grad()
def sample(unet, scheduler, noise, context, empty, solver="dpm++", steps=20, guidance=7.5):
    """(B, C, h, w) or (B, C, F, h, w) fp32 noise -> clean fp32 latents, with classifier-free guidance (1: none).
    context: (B, tokens, width) captions; empty: (1, tokens, width), the encoded "". solver: a key of SOLVERS."""
    stepper = make_solver(scheduler, solver)
    stepper.set_timesteps(steps)
    guided, dtype, x = guidance != 1, next(unet.parameters()).dtype, noise * stepper.init_noise_sigma
    if guided:
        context = torch.cat([empty.expand_as(context), context])  # both halves in one call
    for t, t_there in zip(stepper.timesteps, stepper.timesteps.to(x.device)):  # a CPU t avoids a GPU sync
        x_in = stepper.scale_model_input(torch.cat([x, x]) if guided else x, t)
        out = predict(unet, x_in.to(dtype), t_there, context.to(dtype))
        if guided:
            without, with_caption = out.chunk(2)
            out = without + guidance * (with_caption - without)
        x = stepper.step(out, t, x).prev_sample
    return x


# ---- 3. One update (the paper's algorithm, its inner loop) ----------------------------------------------------------
# Gradients of summed losses add up over micro-batches, chunks and devices; step() divides them once by the batch size.

WARMUP, MAX_NORM = 0.25, 1.0  # share of all updates in which the learning rate rises (inferred); gradient clipping
ADAMW = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, fused=True)
OF_WINNERS = ("loss", "logit", "policy_w", "reference_w", "sign_pos", "sign_neg", "sign_zero")  # averaged over winners
OF_PAIRS = ("policy_r", "reference_r", "implicit_acc")  # averaged over winners that have an x^r
REMEDY = "use a lower --lr, or --dtype fp32, in a new --out"  # advice when gradients are not finite


class Trainer:
    """Policy, reference and one update; each device handles its share of the batch. o: the options. codec: the rest of
    the model (VAE, text encoder, noise schedule). Updates count from 0; metrics.jsonl counts them from 1."""

    def __init__(self, o, policy, codec):
        self.o, self.policy, self.codec = o, policy, codec
        self.reference, self.reference_index, self.half_copy = None, None, None
        if o.loser != "none":  # a copy that shares the frozen weights: deepcopy does not copy objects in its memo
            frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
            self.reference = copy.deepcopy(policy, frozen).requires_grad_(False)
        if o.dtype == "fp16" and (self.reference or o.part != "unet"):
            self.half_copy = copy.deepcopy(policy).half().requires_grad_(False)  # precise enough for generating
            # Autocast rounds all matrices anyway, so the nets share one fp16 copy of the frozen ones. Saved as fp32.
            for net in filter(None, (self.reference, policy if o.part != "unet" else None)):
                for own, copied in zip(net.modules(), self.half_copy.modules()):
                    if type(own) in (torch.nn.Linear, torch.nn.Conv2d) and not own.weight.requires_grad:
                        own.weight, own.bias = copied.weight, copied.bias
        net = self.half_copy or self.reference
        self.sampling_net = torch.compile(net) if o.compile else net  # denoising_error is not compiled (rounding)
        if o.gradient_checkpointing:  # after copying, or copies would call the policy's methods
            policy.enable_gradient_checkpointing()
            checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
            for block in policy.modules():
                if type(block).__name__ == "AnimateDiffTransformer3D":  # diffusers does not checkpoint this block
                    block.forward = functools.partial(checkpointed, block.forward)
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.gradients = lambda: [p.grad for p in self.trained.values() if p.grad is not None]  # None: unused weights
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=o.lr, **ADAMW)
        self.state = dict(self.trained)  # with self.progress, everything needed to resume
        for name, p in self.trained.items():  # allocate Adam's moments now, so a too small GPU fails at once
            moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=p.new_zeros(()))
            self.optimizer.state[p] = moments
            self.state |= {f"{name} {moment}": tensor for moment, tensor in moments.items()}
        side = o.resolution // codec.factor
        self.shape = (codec.channels, o.frames, side, side) if o.frames else (codec.channels, side, side)  # of latents
        self.empty = codec.encode_text([""])  # (1, tokens, width)
        # fp16's loss scale. Gradient at each of N predicted elements: beta/2 * 2/N * residual * sigmoid(-logit).
        # The scale makes it 8 * residual * sigmoid(-logit), mid-range in fp16 for any beta, N. Trained weights: fp32.
        full = 4 * math.prod(self.shape) / (0.5 * o.beta if self.reference else 1)
        self.full_scale = full if o.dtype == "fp16" else 1.0  # times progress["scale"], which overflow lowers
        self.progress = {"scale": 1.0, "skipped_rows": 0, "skipped_updates": 0, "in_a_row": 0}
        self.autocast = functools.partial(torch.autocast, o.device.type, torch.float16, enabled=o.dtype == "fp16")
        self.sums, self.overflow = Counter(), False  # of this update: {statistic: sum}; Counter.update adds
        self.latest_pairs = deque(maxlen=12 if o.model in MINI else 4)  # (caption, x_w, x_r, sign)

    def set_reference(self, update):  # same draw for a whole interval (inferred): seeded by k, not update
        k = update // self.o.save_every + 1
        index = choose_reference(k, self.o.reference, torch.Generator().manual_seed(key(self.o.seed, "reference", k)))
        if index != self.reference_index:
            file = LORA_FILE if self.o.part == "lora" else f"{self.o.part}/diffusion_pytorch_model.safetensors"
            named = lambda name: "unet." + name.replace(".default.", ".") if file == LORA_FILE else name
            weights = {named(name): p for name, p in self.reference.named_parameters() if name in self.trained}
            fill(weights, self.o.out / f"checkpoint-{index * self.o.save_every}" / file)
            if self.half_copy:
                self.half_copy.load_state_dict(self.reference.state_dict())
            self.reference_index = index

    def check_numeric_path(self):  # at equal weights s_w and s_r must be near 0: beta amplifies rounding
        o, nets, context = self.o, (self.policy, self.reference), self.empty.expand(self.o.micro_batch, -1, -1)
        t, _, eps, x_w, x_r = (v.to(o.device) for v in draws("check", range(o.micro_batch), self.shape, 1000, 0))
        with self.autocast():  # noise stands in for latents
            _, errors = batch_loss(*nets, self.codec.scheduler, x_w, eps, t, context, x_r)
        gaps = torch.cat([errors[f"policy_{x}"] - errors[f"reference_{x}"] for x in "wr"])
        logit = 0.5 * o.beta * gaps.abs().max().item()
        print(f"Self-check: at equal weights, policy and reference differ by {logit:.2g} in the logit (limit: 0.3).")
        need(logit < 0.3, f"self-check: rounding moves the logit by {logit:.2g}, so signs are noise: try --dtype fp32")

    @torch.no_grad()
    def anchor_sign(self, batch, texts, noise_r):  # assets/study.py overrides it; its rules use texts and noise_r too
        """(B,) signs decided before x^r is generated: 1 (x^r loses), 0 (no x^r needed). None: the loss decides."""
        if self.o.flip != "indicator":
            return None
        signs, nets = [], (self.policy, self.reference)
        for micro in zip(*(v.split(self.o.micro_batch) for v in batch.values())):  # x_w, eps, t, context
            with self.autocast():
                errors = [denoising_error(net, self.codec.scheduler, *micro) for net in nets]
            signs.append(anchor_criterion(*errors).clamp(min=0))
        return torch.cat(signs)

    def generate(self, net, noise, encoded):  # encoded captions -> the net's samples, as clean latents
        o, batches = self.o, zip(*(v.split(self.o.generate_batch) for v in (noise, encoded)))
        rest = self.empty, o.solver, o.sampler_steps, o.guidance
        with self.autocast(enabled=o.dtype == "fp16" and net is not self.sampling_net):
            return torch.cat([sample(net, self.codec.scheduler, *batch, *rest) for batch in batches])

    def sample_images(self, captions):  # -> (n, 3, [F,] R, R) images of the policy, always from the same noise
        *_, noise = draws("samples", range(len(captions)), self.shape, 1, 0)
        latents = self.generate(self.policy, noise.to(self.o.device), self.codec.encode_text(captions))
        return self.codec.decode(latents).cpu()

    def gradient(self, rows):  # accumulates the gradient and the statistics of these rows
        o, codec, is_first = self.o, self.codec, not self.sums
        positions, texts, winners, losers, skipped = zip(*rows)
        self.sums["skipped_rows"] += torch.tensor(float(sum(skipped)), device=o.device)
        if self.overflow:
            return
        chance = draws(o.seed, positions, self.shape, codec.scheduler.config.num_train_timesteps, o.caption_dropout)
        t, dropped, eps, noise_w, noise_r = (v.to(o.device) for v in chance)  # noise_r: where x^r starts
        encoded = codec.encode_text(texts)  # (B, tokens, width)
        context = torch.where(dropped[:, None, None], self.empty, encoded)  # the same in all four errors
        x_w = codec.encode(torch.stack(winners).to(o.device), noise_w)  # (B, C, h, w)
        batch = {"x_w": x_w, "eps": eps, "t": t, "context": context}
        if o.loser == "data":
            batch["x_r"] = codec.encode(torch.stack(losers).to(o.device), noise_r)
        elif o.loser == "generated":
            sign = self.anchor_sign(batch, texts, noise_r)
            batch |= {"sign": sign} if sign is not None else {}
            i = batch.get("sign", torch.ones_like(t)).nonzero()[:, 0]  # 0: no x^r is needed
            batch["x_r"] = x_w.clone()
            if len(i):
                batch["x_r"][i] = self.generate(self.sampling_net, noise_r[i], encoded[i])  # no caption dropout
        for first in range(0, len(t), o.micro_batch):
            some = slice(first, first + o.micro_batch)
            micro = {name: value[some] for name, value in batch.items()} | {"beta": o.beta, "flip": o.flip}
            with self.autocast():
                loss, statistics = batch_loss(self.policy, self.reference, codec.scheduler, **micro)
            (self.full_scale * self.progress["scale"] * loss).backward()
            if self.reference:
                signs = statistics["sign_pos"].int() - statistics["sign_neg"].int()
                self.latest_pairs.extend(zip(texts[some], x_w[some], batch["x_r"][some], signs))
            self.sums.update({name: value.sum().float() for name, value in statistics.items()})
        if is_first:  # catch non-finite gradients before generating the rest
            finite = torch.stack([gradient.isfinite().all() for gradient in self.gradients()]).all().float()
            self.overflow = not over_all(finite, op=dist.ReduceOp.MIN)

    def step(self, update):  # adds up all devices' gradients, clips them, updates the weights, returns the log entry
        o, progress, totals = self.o, self.progress, torch.stack([*self.sums.values()])
        over_all(totals, *self.gradients())  # once per update: overlapping it with backward() would gain nothing
        for gradient in self.gradients():
            gradient /= self.full_scale * progress["scale"] * o.batch_size
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_NORM).item()
        sums = dict(zip(self.sums, totals.tolist()))
        means = {name: sums[name] / sums["winners"] for name in OF_WINNERS if name in sums}
        means |= {name: sums[name] / sums["pairs"] for name in OF_PAIRS if sums.get("pairs")}
        warmup = max(1, round(WARMUP * o.steps))
        decay = (o.steps - update) / max(1, o.steps - warmup) if o.lr_schedule == "linear" else 1.0
        lr = self.optimizer.param_groups[0]["lr"] = o.lr * min(1.0, (update + 1) / warmup, decay)
        progress["skipped_rows"] += int(sums["skipped_rows"])
        if math.isfinite(norm):
            self.optimizer.step()
            progress["in_a_row"] = 0
            progress["scale"] = min(1.0, 1.1 * progress["scale"])
        else:  # no step, nulls in the log; in fp16 the next updates use a smaller scale
            progress["in_a_row"] += 1
            progress["skipped_updates"] += 1
            progress["scale"] /= 16 if o.dtype == "fp16" else 1
            need(progress["in_a_row"] < 3, f"updates {update - 1} to {update + 1} had non-finite gradients: {REMEDY}")
            means, norm = {}, None
        self.optimizer.zero_grad()  # before anything is saved: it frees a fifth of the memory
        self.sums, self.overflow = Counter(), False
        logged = {"update": update + 1} | dict.fromkeys(OF_WINNERS + OF_PAIRS) | means
        logged |= {"reference": self.reference_index, "grad_norm": norm, "lr": lr}
        return logged | {name: progress[name] for name in ("skipped_rows", "skipped_updates")}


# ---- 4. The run (the paper's algorithm, its outer loop) -------------------------------------------------------------


def train(o, kind=Trainer):
    """Runs the training that the options describe, or resumes it if it was started before."""
    data = open_data(o)
    trainer = kind(o, *load_models(o))
    begin(o, data, trainer)
    if trainer.reference:
        trainer.check_numeric_path()
    captions = CAPTIONS * 10 if o.model in MINI else [data[i][1] for i in range(4 if o.rank == 0 else 0)]
    base = trainer.sample_images(captions) if o.rank == 0 else None  # images of the policy before it is trained
    done = resume(o, trainer)
    if 0 < done < o.steps:
        print(f"Resuming after update {done} of {o.steps}.")
    if done == 0:
        save(o, trainer, captions, base, 0)  # the base model counts as checkpoint 0
    share = o.batch_size // o.world  # winners per device and update
    chunk = max(o.generate_batch, o.micro_batch)  # winners per call of Trainer.gradient
    chunk *= 4 if o.flip == "indicator" else 1  # only about half need an x^r: keep the sampler's batches full
    positions = [u * o.batch_size + o.rank * share + i for u in range(done, o.steps) for i in range(share)]
    rows, saved = data.fetch(positions, ahead=2 * chunk), -math.inf  # -inf: save after one update, to see a full disk
    total, log = o.steps * o.batch_size, o.out / "metrics.jsonl"
    with tqdm(initial=done * o.batch_size, total=total, unit="winner", smoothing=0, disable=o.rank > 0) as bar:
        for update in range(done, o.steps):
            start = time.perf_counter()
            if trainer.reference:
                trainer.set_reference(update)
            for first in range(0, share, chunk):
                n = min(chunk, share - first)
                trainer.gradient([next(rows) for _ in range(n)])
                bar.update(n * o.world)
                if (update, first, o.rank) == (done, 0, 0):  # restart tqdm's clock: the first chunk also opened files
                    bar.initial, bar.start_t = bar.n, bar.last_print_t
            entry, seconds = trainer.step(update), time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated(o.device) / 1e9 if o.device.type == "cuda" else None
            entry |= {"seconds": seconds, "winners_per_second": o.batch_size / seconds, "peak_gb": peak}
            if o.rank == 0:
                with explained(f"{log} cannot be written", ROOM), open(log, "a") as file:
                    print(json.dumps(entry), file=file)
            bar.set_postfix({name: f"{entry[name]:.3g}" for name in SHOWN if entry[name] is not None}, refresh=False)
            interval_ends = (update + 1) % o.save_every == 0 or update + 1 == o.steps
            if interval_ends or time.monotonic() - saved > SAVE_SECONDS:
                save(o, trainer, captions, base, update + 1, interval_ends)
                saved = time.monotonic()
    if data.unusable:
        print(f"{len(data.unusable)} unusable rows were replaced:", "; ".join([*data.unusable][:9]))
    need(not trainer.progress["in_a_row"], f"the last update was skipped (non-finite gradients): {REMEDY}")
    print(f"Done. {o.out}/samples/step-{o.steps}.png shows images of the base model and of the trained model.")
    if o.model in MINI and o.rank == 0 and (o.out / "resume.safetensors").exists():  # else still the base model
        before, after = (mini_score(pixels, captions) for pixels in (base, trainer.sample_images(captions)))
        better = f"better for {100 * (after > before).float().mean():.0f} % of {len(captions)} images"
        print(f"Mean score {before.mean():.2f} -> {after.mean():.2f} (1 is flawless, 0 is plain grey), {better}.")
        print("Next: python eval.py evaluates the run; README.md says how to train on your own images.")
    print(how_to_load(o))


# ---- 5. The data ----------------------------------------------------------------------------------------------------
# The n-th winner of a run always has the same row, mirroring and noise, for any micro-batch, devices and resumes.


class UserError(Exception):
    """Something the user can fix: printed as one line, exit code 2."""


def need(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def explained(what, advice, kinds=(OSError, ValueError, LookupError, RuntimeError, SafetensorError)):
    """Errors in the user's files become one line. kinds: give Exception for library calls; they raise anything."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise UserError(f"{what}: {reason} ({advice})") from error


def over_all(*tensors, op=dist.ReduceOp.SUM):  # reduces them over all processes, in place, and returns the first
    with explained("another process of this run has ended", "its message says why"):
        for tensor in tensors if dist.is_initialized() else ():
            dist.all_reduce(tensor, op)
    return tensors[0]


def key(*parts):  # a 63-bit seed from any printable values, the same in every process
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def draws(seed, positions, shape, timesteps, dropout):
    """The objective's random draws for B winners: (B,) t, (B,) whether the caption is dropped, and three (B, *shape)
    noises: eps, one for the winner's VAE posterior, and the start of x^r (or one for the loser's posterior)."""
    columns = []
    for position in positions:
        g = torch.Generator().manual_seed(key(seed, "sample", position))
        t, dropped = torch.randint(timesteps, (), generator=g), torch.rand((), generator=g) < dropout
        columns.append((t, dropped, *(torch.randn(shape, generator=g) for _ in range(3))))
    return [torch.stack(column) for column in zip(*columns)]


class Winners:
    """Indexed by position in the run. Each epoch shuffles the row groups and their rows. groups: [(n, read)],
    where read() gives n rows: (caption, winner, loser or None) or, for a tie, None. An image is bytes, a path, pixels,
    or the reason why there is none. pauses: the seconds after which an unreadable group is tried again."""

    def __init__(self, o, source, groups, pauses=()):
        self.o, self.source, self.groups, self.total, self.unusable = o, source, [], 0, {}
        self.pauses, self.stop = pauses, threading.Event()
        for n, read in groups:
            n = min(n, (o.max_winners or n + self.total) - self.total)
            self.groups += [(n, read, threading.Lock())] if n else []
            self.total += n
        need(self.total, f"--data {o.data} has no rows")

    @functools.lru_cache(6)  # groups kept in memory: 3 GB of Pick-a-Pic
    def group(self, g):  # its rows, without the ties; if the network fails, it waits and tries again
        n, read, _ = self.groups[g]
        for pause in (*self.pauses, None):
            try:
                rows = [row for row in read()[:n] if row]
                return rows or [("a tie", "its row group holds only ties", None)]
            except UserError as error:
                if pause is None or self.stop.is_set():
                    self.stop.set()  # the other threads need not wait as long again
                    raise
                tqdm.write(f"{error}; next attempt in {pause} s")
            self.stop.wait(pause)

    @functools.lru_cache(8)
    def shuffled(self, n, *names):
        return random.Random(key(self.o.seed, *names)).sample(range(n), n)

    def row(self, position):  # (caption, winner, loser), not decoded; another row of the group replaces a tie
        epoch, place = divmod(position, self.total)
        order = self.shuffled(len(self.groups), "groups", epoch)
        ends = [*itertools.accumulate(self.groups[g][0] for g in order)]
        g = order[at := bisect.bisect(ends, place)]
        with self.groups[g][2]:  # one thread reads a group, the others wait for it
            rows = self.group(g)
        return rows[self.shuffled(len(rows), "rows", epoch, g)[(place - ends[at]) % len(rows)]]

    def __getitem__(self, position):
        """-> position, caption, winner (3, [F,] R, R) in [-1, 1], loser (or None), how many rows were skipped."""
        rng, candidate = random.Random(key(self.o.seed, "flip", position)), position
        mirror, start = rng.random() < 0.5, rng.random()
        for attempt in range(1, 101):
            caption, winner, loser = row = self.row(candidate)
            try:
                need(isinstance(caption, str) and caption.strip(), "no caption")
                caption.encode()  # fails on lone surrogates here rather than somewhere in the tokenizer
                winner = to_pixels(winner, self.o, mirror, start)
                loser = to_pixels(loser, self.o, mirror, start) if self.o.loser == "data" else None
                return position, caption, winner, loser, attempt - 1
            except (UserError, ValueError) as error:
                name = row[1].name if isinstance(row[1], Path) else f"{row[0]!r:.40}"
                self.unusable[reason := f"{name}: {str(error)[:200]}"] = True
            candidate = random.Random(key(self.o.seed, "row", position, attempt)).randrange(self.total)
        raise UserError(f"--data {self.source}: 100 tries found no usable row, the last: {reason}")

    def fetch(self, positions, ahead):
        """Yields rows in order, read and decoded by threads while the GPU works. Groups are read even earlier."""
        reader, pool, waiting = ThreadPoolExecutor(1), ThreadPoolExecutor(min(8, os.cpu_count() or 1)), deque()
        lead = min(128, 2 * self.total // len(self.groups))  # few groups are kept in memory
        try:
            for i, position in enumerate(positions):
                reader.submit(self.row, positions[min(i + lead, len(positions) - 1)])
                waiting.append(pool.submit(self.__getitem__, position))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            yield from (row.result() for row in waiting)
        finally:
            self.stop.set()
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some other formats run programs or follow paths
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in KINDS}
VIDEO_ENDINGS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".gif"}
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,gif"  # no playlists


def to_pixels(picture, o, mirror=False, start=0.0):
    """Bytes or a path -> (3, R, R) in [-1, 1]; a video -> (3, F, R, R). Tensor: only mirrored. Failure: ValueError."""
    if not isinstance(picture, torch.Tensor):
        try:
            need(not isinstance(picture, str), picture)  # text says why there is no picture
            need(not isinstance(picture, Path) or picture.is_file(), "no file")  # a pipe would block
            pictures = read_clip(picture, o.frames, start) if o.frames else [read_picture(picture)]
            fitted = [ImageOps.fit(frame, (o.resolution, o.resolution), Image.BILINEAR) for frame in pictures]
            need(len(fitted) == (o.frames or 1), f"{len(fitted)} frames, --frames is {o.frames}")
        except Exception as error:  # untrusted bytes can make a decoder raise anything
            raise ValueError(f"no readable picture: {str(error).partition(' <_io.')[0]}") from error  # drops "0x..."
        values = torch.frombuffer(bytearray().join(frame.tobytes() for frame in fitted), dtype=torch.uint8)
        picture = values.view(-1, o.resolution, o.resolution, 3).permute(3, 0, 1, 2) / 127.5 - 1  # (3, F, R, R)
        picture = picture if o.frames else picture[:, 0]
    return picture.flip(-1) if mirror else picture


def read_picture(picture):
    """Bytes, a Path (never a str: paths named in a Parquet file are not opened), or a dict as in `datasets`."""
    picture = picture["bytes"] if isinstance(picture, dict) else picture
    need(picture is not None, "jpg_0 or jpg_1 has no bytes: store the image itself, not a path, in the Parquet")
    with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture), formats=KINDS) as image:
        need(image.width * image.height <= 64e6, f"{image.width * image.height / 1e6:.0f} megapixels, the limit is 64")
        image.load()  # before the metadata, which may be malformed
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would turn it white
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        need(image.mode not in ("I", "F"), f"pixels of mode {image.mode} have no known scale")
        if image.has_transparency_data:  # put on white, as viewers do
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def read_clip(path, frames, start, stride=4):  # AnimateDiff's stride
    """Yields `frames` frames of a video, `stride` apart or closer, the first chosen by `start` in [0, 1)."""
    allowed = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    opened = functools.partial(av.open, str(path.absolute()), options=allowed)
    with opened() as film:  # the container's own count is often missing
        n = sum(packet.size > 0 and not packet.is_discard for packet in film.demux(video=0))
    length = min(n, (frames - 1) * stride + 1)
    first = int(start * (n - length + 1))
    indices = [first + i * (length - 1) // (frames - 1) for i in range(frames)]
    with opened() as film:
        for i, frame in enumerate(itertools.islice(film.decode(video=0), indices[-1] + 1)):
            if i in indices:
                image, matrix = frame.to_image(), bytes(frame.side_data.get("DISPLAYMATRIX", bytes(36)))
                a, b, _, c, d, *_ = memoryview(matrix).cast("i")  # how it is shown; a determinant below 0 mirrors it
                yield (ImageOps.flip(image) if a * d < b * c else image).rotate(frame.rotation, expand=True)


PICKAPIC = ("liuhuohuo2/pick-a-pic-v2", "Pulkit996/pick-a-pic-v2")  # mirrors: yuvalkirstain/pickapic_v2 was removed
PAUSES = 5, 10, 20, 40, 75, 150  # seconds until the hub is asked again: five minutes in all
COLUMNS = ["caption", "jpg_0", "jpg_1", "label_0"]  # label_0: 1 = jpg_0 wins, 0 = jpg_1 wins, 0.5 = a tie


def open_data(o):
    """--data: the toy task's data, a folder of captioned pictures or clips, or Parquet (file, folder or hub id)."""
    if o.data in MINI_DATA:
        seeds = range(512 if o.data == "mini-mixture" else 1)  # the base model hardly sees a picture twice
        return Winners(o, o.data, [(2048, functools.partial(mini_rows, o.data, 2048, seed)) for seed in seeds])
    if os.path.isdir(o.data) and o.loser != "data":  # captioned files win over Parquet in the same folder
        with explained(f"--data {o.data} cannot be read", "metadata.jsonl needs file_name, text; or 1.txt for 1.jpg"):
            rows = folder_rows(Path(o.data), VIDEO_ENDINGS if o.frames else IMAGE_ENDINGS)
        if rows:
            return Winners(o, o.data, [(len(rows), lambda: rows)])
    need(not o.frames, f"--data {o.data} is not a folder of captioned clips; --motion-adapter needs one")
    old = recorded(o)
    source = old.get("source", "")  # hub id and revision of the first start, kept on resume
    same = o.data in (old.get("data"), source.partition("@")[0])
    return Winners(o, *parquet_groups(source if same else o.data))


def files_below(folder):  # sorted; no hidden files or run folders; linked folders are followed, each once
    files, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        is_run, real = "checkpoint-0" in folders and Path(where) != folder, os.path.realpath(where)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen and not is_run)
        files += [Path(where, name) for name in names if name[0] != "." and real not in seen and not is_run]
        seen.add(real)
    return sorted(file for file in files if file.is_file())


def json_lines(path, text):  # the values of a JSON list, or of lines of JSON; an error names its line
    for i, part in enumerate([text] if text.lstrip()[:1] == "[" else [f"[{line}]" for line in text.split("\n")]):
        try:
            yield from json.loads(part)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {i + error.lineno}: {error.msg}") from None


def folder_rows(folder, endings):  # metadata.jsonl (file_name and text per line), or name.txt beside name.jpg
    def read(path):  # UTF-8, or UTF-16 with a BOM; other bytes become lone surrogates, so that the row is replaced
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")
        return re.sub("[\0-\x08\x0e-\x1f\ufffd]", "\ud800", text)

    files, named = files_below(folder), []
    tables = of_train(folder, [str(file.relative_to(folder)) for file in files if file.name == "metadata.jsonl"])
    for table in (folder / name for name in tables):
        for line in json_lines(table, read(table)):
            fits = isinstance(line, dict) and {"file_name", "text"} <= {*line}
            need(fits, f"{table} has {str(line)[:99]}, not the keys file_name and text")
            file = Path(os.path.normpath(table.parent / str(line["file_name"])))
            file = file if folder in file.parents else file.resolve()  # the folder's name may be a link
            need(folder in file.parents, f"{table} names {file}, outside the folder")
            named.append((line["text"], file))
    if not tables:
        texts = {file.with_suffix(""): read(file) for file in files if file.suffix.lower() == ".txt"}
        named = [(texts[file.with_suffix("")], file) for file in files if file.with_suffix("") in texts]
    rows = [(text, file, None) for text, file in named if file.suffix.lower() in endings and file.is_file()]
    used = {file.with_suffix("") for _, file, _ in rows}  # 0.txt and 0.json beside 0.jpg count as used
    lost = [file for _, file in named if file.with_suffix("") not in used]
    lost += [file for file in files if file.suffix.lower() in endings and file.with_suffix("") not in used]
    message = f"--data {folder}: {len(lost)} files without caption or picture: {', '.join(map(str, lost[:3]))}"
    need(rows or not (tables and lost), message)
    if lost:
        print(f"{message} (left out)")
    return rows


def parquet_groups(name):
    """Opens Parquet (the hub's without storing it) -> source, [(n, read) per row group], pauses for Winners."""
    source, root, system = name, Path(name), None
    advice = f"use pickapic ({' or '.join(PICKAPIC)}), captioned pictures, or Parquet with {', '.join(COLUMNS)}"
    with explained(f"--data {source} cannot be read", advice, Exception):
        if root.exists():
            names = [str(file.relative_to(root)) for file in files_below(root)]
        else:
            source, _, revision = source.partition("@")
            info = huggingface_hub.HfApi().dataset_info(source, revision=revision or None, timeout=30)
            source, names = f"{source}@{info.sha}", [file.rfilename for file in info.siblings]
            root = f"datasets/{source}"
            system = huggingface_hub.HfFileSystem(block_size=2**16)  # larger blocks download unneeded data
        names = of_train(source, [file for file in names if file.endswith(".parquet")])
        need(names or os.path.isfile(name), f"--data {source} needs Parquet or (not for dpo) x.txt beside x.jpg")
        files = [f"{root}/{file}" for file in names] or [name]
        files = pyarrow.dataset.dataset(files, filesystem=system, format="parquet").get_fragments()
        with ThreadPoolExecutor(16) as pool:  # the footers of 645 shards
            groups = [group for file in pool.map(lambda file: file.split_by_row_group(), files) for group in file]
    for group in groups:
        missing = {*COLUMNS} - {*group.physical_schema.names}
        need(not missing, f"--data {group.path} lacks Pick-a-Pic's column {', '.join(sorted(missing))}")

    def read(group):
        sides, rows = {1: ("jpg_0", "jpg_1"), 0: ("jpg_1", "jpg_0")}, []
        columns = COLUMNS + ["label_1"] * ("label_1" in group.physical_schema.names)
        with explained(f"--data {group.path} cannot be read", AGAIN, Exception):
            for row in group.to_table(columns=columns).to_pylist():
                labels = {name: math.nan if v is None else v for name, v in row.items() if name[:6] == "label_"}
                label, *other = (float(v if isinstance(v, (int, float)) else str(v)) for v in labels.values())
                winner, loser = sides.get(label if other in ([], [1 - label]) else None, ("", ""))
                found = ", ".join(f"{name} is {v}" for name, v in labels.items())  # the message if there is no winner
                rows.append(None if label == 0.5 else (row["caption"], row.get(winner, found), row.get(loser)))
        return rows

    groups = [(group.row_groups[0].num_rows, functools.partial(read, group)) for group in groups]
    return source, groups, PAUSES if system else ()


def of_train(source, names):  # the files with `train` as a word of their path; all, if no other split is named
    has = lambda name, *words: {*re.split(r"[^a-z]+", name.lower())} & {*words}
    other = [name for name in names if has(name, "validation", "valid", "val", "dev", "test")]
    train = [name for name in sorted(names) if has(name, "train") or not other]
    need(train or not names, f"--data {source} has no split named train: {', '.join(other[:4])}")
    if train != sorted(names):
        print(f"--data {source}: {len(train)} of {len(names)} files are used, those of the split named train")
    return train


# ---- 6. The models --------------------------------------------------------------------------------------------------

FOLDER_OR_ID = "give a hub id or diffusers folder (convert: from_single_file, save_pretrained); runs: use --unet"
LORA_FILE = "pytorch_lora_weights.safetensors"
ANIMATEDIFF = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)  # its noise schedule
ANIMATEDIFF |= dict(trained_betas=None, timestep_spacing="linspace", rescale_betas_zero_snr=False)


class StableDiffusion:  # everything around the UNet: VAE, CLIP text encoder, noise schedule
    def __init__(self, o):
        with explained(f"--model {o.model} cannot be read", FOLDER_OR_ID, Exception):
            text = load_complete(transformers.CLIPTextModel, o.model, "text_encoder", dtype=o.half)
            vae = load_complete(AutoencoderKL, o.model, "vae", torch_dtype=o.half, low_cpu_mem_usage=False)
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(o.model, subfolder="tokenizer")  # maybe empty
            self.scheduler = DDPMScheduler.from_pretrained(o.model, subfolder="scheduler")
        need(9 < len(self.tokenizer) <= text.config.vocab_size, f"--model {o.model} has no tokenizer that fits")
        self.text, self.vae = (net.to(o.device).requires_grad_(False) for net in (text, vae))
        self.vae.enable_slicing()  # one picture at a time: VAE activations are larger than UNet ones
        self.channels, self.width = vae.config.latent_channels, text.config.hidden_size
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # image side / latent side: 8

    def encode_text(self, captions):  # -> (B, 77, 768)
        length = self.text.config.max_position_embeddings
        settings = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return self.text(self.tokenizer(list(captions), **settings).input_ids.to(self.text.device))[0].float()

    def encode(self, pixels, noise):  # (B, 3, 8 h, 8 w) in [-1, 1] -> (B, 4, h, w), a draw from the VAE's posterior
        if pixels.ndim == 5:  # clips (B, 3, F, 8 h, 8 w): each is a batch of frames
            return torch.stack([*map(self.encode, pixels.transpose(1, 2), noise.transpose(1, 2))]).transpose(1, 2)
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    def decode(self, latents):  # the way back, clamped to [-1, 1]
        if latents.ndim == 5:
            return torch.stack([*map(self.decode, latents.transpose(1, 2))]).transpose(1, 2)
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return pixels.float().clamp(-1, 1)


def load_complete(kind, name, subfolder="", **options):
    """kind.from_pretrained, but it refuses a file that lacks weights, which diffusers would leave random."""
    folder = Path(name, subfolder) if Path(name, subfolder).is_dir() else Path(name)
    endings = {file.name.partition(".")[2] for file in folder.glob("*model*.safetensors")}
    options["variant"] = "fp16" if "fp16.safetensors" in endings and "safetensors" not in endings else None
    model, info = kind.from_pretrained(name, subfolder=subfolder, output_loading_info=True, **options)
    missing = sorted({*info["missing_keys"]} & {name for name, _ in model.named_parameters()})  # not buffers
    need(not missing, f"{name} lacks weights of a {kind.__name__}: {', '.join(missing[:2])}, ...")
    for p in model.parameters():  # mmapped weights are unaligned, which changes CPU rounding
        p.data = p.data.clone()
    return model


def load_unet(name, *kinds, fuse=None):
    """A net of a class in `kinds`, in fp32: NAME/unet, NAME/motion_adapter, NAME, or a run's last checkpoint. If
    `fuse` is given and NAME is or holds a LoRA (file, folder or hub id), the result is fuse(LoRA file)."""
    last = sorted(map(str, Path(name).glob("checkpoint-*[0-9]")), key=lambda folder: (len(folder), folder))[-1:]
    lora = [file for file in (Path(name), *(Path(where, LORA_FILE) for where in (name, *last))) if file.is_file()]
    if fuse and lora:
        return fuse(str(lora[0]))
    for where, part in itertools.product((name, *last), ("unet", "motion_adapter", "")):
        with contextlib.suppress(OSError, KeyError):  # config.json of a run is not a model's
            found = UNet2DConditionModel.load_config(where, subfolder=part)["_class_name"]
            break
    else:
        if not fuse or Path(name).exists():
            raise OSError(f"no configuration of a UNet and no {LORA_FILE} there, or the hub cannot be reached")
        return fuse(huggingface_hub.hf_hub_download(name, LORA_FILE))
    need(found in kinds, f"{name} holds a {found}, not a {' or '.join(kinds)}")
    print(f"Loading {found}: {Path(where, part) if Path(where, part).exists() else where}")
    return load_complete(getattr(diffusers, found), where, part, torch_dtype=torch.float32, low_cpu_mem_usage=False)


def load_models(o):  # -> the policy's UNet in fp32, and the codec (StableDiffusion or Miniature)
    codec = Miniature(o.device) if o.model in MINI else StableDiffusion(o)
    where = o.unet or (str(MINI_BASE) if o.model == "mini" else o.model)
    need(where != str(MINI_BASE) or MINI_BASE.is_dir(), f"{MINI_BASE} is missing: copy it from the repository")
    kinds = ["UNet2DConditionModel", *["UNetMotionModel"] * bool(o.motion_adapter and o.unet)]
    with explained(f"--{'unet' if o.unet else 'model'} {where} cannot be read", FOLDER_OR_ID, Exception):
        policy = untrained_mini() if where == "mini-untrained" else load_unet(where, *kinds)
    levels, kind = codec.scheduler.config, codec.scheduler.config.prediction_type
    need(kind in ("epsilon", "v_prediction"), f"--model {o.model} predicts {kind}, not epsilon or v_prediction")
    need(o.solver != "pndm" or not levels.rescale_betas_zero_snr, "--solver pndm cannot start at pure noise: use ddim")
    if o.motion_adapter:
        need(policy.mid_block, f"--motion-adapter: the UNet of {where} has no middle block, which an adapter needs")
        if not isinstance(policy, UNetMotionModel):
            with explained(f"--motion-adapter {o.motion_adapter} cannot be read", FOLDER_OR_ID, Exception):
                policy = UNetMotionModel.from_unet2d(policy, load_unet(o.motion_adapter, "MotionAdapter"))
        codec.scheduler = DDPMScheduler.from_config(levels, **ANIMATEDIFF)
        need(o.frames <= (most := policy.config.motion_max_seq_length), f"--frames {o.frames}: the limit is {most}")
        if o.train == "motion":
            policy.freeze_unet2d_params()
    if o.lora_rank:  # only attention adapters train; alpha = rank, as loaders assume
        torch.manual_seed(key(o.seed, "lora"))
        policy.requires_grad_(False)
        where = "motion_modules" if o.train == "motion" else "(attentions|motion_modules)"
        targets = dict(target_modules=rf".*{where}.*\.to_(q|k|v|out\.0)")
        policy.add_adapter(LoraConfig(r=o.lora_rank, lora_alpha=o.lora_rank, **targets))
    policy.to(o.device).eval()  # dropout would make policy and reference differ
    takes, gives = (policy.config.in_channels, policy.config.cross_attention_dim), (codec.channels, codec.width)
    fails = f"--model {o.model} is not SD 1.x: (latent channels, caption width) of UNet: {takes}, of the rest: {gives}"
    with explained(fails, FOLDER_OR_ID, Exception), torch.no_grad():  # a configuration may be wrong: try it
        x = torch.zeros(1, codec.channels, *[1] * bool(o.frames), 8, 8, device=o.device)
        policy(x, 1, encoder_hidden_states=codec.encode_text([""]))
        codec.decode(x), codec.scheduler.add_noise(x, x, torch.tensor([1])), policy.to_json_string()
    return policy, codec


@torch.no_grad()
def fill(tensors, path):  # loads {name: tensor} from a safetensors file, in place, and returns the file's metadata
    with explained(f"{path} cannot be read", RESTORE), safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            loaded = file.get_tensor(name)
            need(loaded.shape == tensor.shape, f"{path}: {name} has the shape of another run: {RESTORE}")
            tensor.copy_(loaded)
        return file.metadata()


# ---- 7. The toy task ------------------------------------------------------------------------------------------------
# Text-to-image on a CPU, with the same code as Stable Diffusion. The 16 x 16 images show captioned shapes with four
# flaws: off-centre, too pale or too strong, blurred, small. Simulated users prefer the best of 16 by `mini_score`.

COLOURS = {"red": (1, -0.8, -0.8), "green": (-0.8, 0.7, -0.8), "blue": (-0.8, -0.6, 1), "yellow": (1, 0.9, -0.8)}
SHAPES = {
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()),
    "disc": lambda x, y: (x.square() + y.square()).sqrt(),
    "diamond": lambda x, y: 0.7 * (x.abs() + y.abs()),
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs(), 2.5 * y.abs()), torch.maximum(2.5 * x.abs(), y.abs())),
}
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
MINI_DATA = ("mini", "mini-mixture")
MINI_BASE = Path(__file__).parent / "assets" / "mini-base"  # train it anew after any change to this section


def draw_mini(captions, flaws):
    """B captions, (B, 5) flaws -> (B, 3, 16, 16) in [-1, 1]. flaws: x and y in [-0.6, 0.6], contrast in [-1, 1] (below
    0 is too pale, above 0 is too strong), blur and smallness in [0, 1]; 0 is flawless."""
    axis = (torch.arange(16) - 7.5) / 5.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    colours, shapes = zip(*(caption.split()[1:] for caption in captions))
    colour = torch.tensor([COLOURS[name] for name in colours])[:, :, None, None]  # (B, 3, 1, 1)
    dx, dy, contrast, blur, small = flaws[:, :, None, None].unbind(1)  # (B, 1, 1) each
    edges = torch.stack([shape(x - dx, y - dy) for shape in SHAPES.values()], 1)  # (B, 4, 16, 16)
    edge = edges[range(len(flaws)), [[*SHAPES].index(name) for name in shapes]] / (1 - 0.4 * small)
    ink = torch.sigmoid((1 - edge) * (12 - 10 * blur))[:, None]
    return (ink * colour - (1 - ink) * 0.9) * (0.6 + 0.36 * contrast[:, None])  # 0.24 pale, 0.6 right, 0.96 strong


def mini_score(pixels, captions):
    """What the simulated users prefer: (B,) scores of (B, 3, 16, 16) pictures. 1 is flawless, 0 is plain grey."""
    ideal = draw_mini(captions, torch.zeros(len(captions), 5)).to(pixels.device)
    return 1 - (pixels - ideal).abs().flatten(1).mean(1) / ideal.abs().flatten(1).mean(1)


@functools.lru_cache(1)
def mini_rows(name, n=2048, seed=0):
    """n rows (caption, picture, loser). `mini`: the preferred picture of 16, and another of the 16 as loser.
    `mini-mixture`: any picture, for the base model."""
    g = torch.Generator().manual_seed(seed)
    captions = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (n,), generator=g)]
    low, high = torch.tensor([-0.6, -0.6, -1, 0, 0]), torch.tensor([0.6, 0.6, 1, 1, 1])
    flaws = torch.rand(16 if name == "mini" else 1, n, 5, generator=g) * (high - low) + low
    pictures = torch.stack([draw_mini(captions, f) for f in flaws])  # (16 or 1, n, 3, 16, 16)
    best = torch.stack([mini_score(p, captions) for p in pictures]).argmax(0)
    losers = pictures[best - 1, range(n)] if name == "mini" else [None] * n
    return [*zip(captions, pictures[best, range(n)], losers)]


class Miniature:  # takes the place of StableDiffusion: latents are rearranged pixels, a caption is four word vectors
    channels, width, factor = 12, 32, 2

    def __init__(self, device):
        self.device = device
        generators = {word: torch.Generator().manual_seed(key(word)) for word in ("", "a", *COLOURS, *SHAPES)}
        self.words = {word: torch.randn(self.width, generator=g) for word, g in generators.items()}
        levels = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
        self.scheduler = DDPMScheduler(prediction_type="v_prediction", **levels)  # eps needs a larger net

    def encode_text(self, captions):  # -> (B, 4, 32)
        words = [(caption.split() + [""] * 4)[:4] for caption in captions]
        return torch.stack([torch.stack([self.words[word] for word in four]) for four in words]).to(self.device)

    def encode(self, pixels, noise):  # (B, 3, 16, 16) -> (B, 12, 8, 8)
        return F.pixel_unshuffle(pixels, self.factor)

    def decode(self, latents):
        return F.pixel_shuffle(latents, self.factor).clamp(-1, 1)


def untrained_mini():
    torch.manual_seed(0)
    size = dict(sample_size=8, in_channels=12, out_channels=12, block_out_channels=(48, 48), layers_per_block=1)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8)
    return UNet2DConditionModel(**size, **blocks, cross_attention_dim=Miniature.width)


# ---- 8. Files and the command line ----------------------------------------------------------------------------------

ROOM = "make room, or choose another --out; existing files are intact"
RESTORE, AGAIN = "restore it, or use another --out; a run's machines must share --out", "retry, or repair it"
LESS_MEMORY = "in this order: a lower --micro-batch, --gradient-checkpointing, a lower --generate-batch, --lora-rank"
SAVE_SECONDS = 600  # a kill loses at most these seconds and the current update
SHOWN = ("policy_w", "reference_w", "implicit_acc", "sign_neg")  # shown on the progress bar
MACHINE = "micro_batch generate_batch gradient_checkpointing compile device dtype half rank world out given".split()
UNNAMED = {"model", "method", *MACHINE} - {"dtype"}  # not appended to the default --out's name


@contextlib.contextmanager
def atomic(path):  # writes a file or folder under a temporary name and then renames it
    temporary = path.with_name(path.name + ".tmp")
    with explained(f"{path} cannot be written", ROOM):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # half a folder, from a kill
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)


def choose_micro_batch(o, room):
    """The largest power of two that divides this device's share and whose activations fit into `room` GB, or 1."""
    each = 2.5 * (o.resolution / 512) ** 2 * (o.frames or 1) * (2 if o.dtype == "fp32" else 1)  # GB per winner
    each *= 0.25 if o.gradient_checkpointing else 1
    most = 65535 // (2 * (o.resolution // 8) ** 2) if o.frames else 64  # limit of CUDA's attention kernels
    fits = lambda n: o.batch_size // o.world % n == 0 and n * each <= room and n <= most
    return max(filter(fits, (2, 4, 8, 16, 32, 64)), default=1)


def recorded(o):  # the options in config.json of --out, none for a new run
    path = o.out / "config.json"
    with explained(f"{path} cannot be read", RESTORE, Exception):
        return {**json.loads(path.read_text())["options"]} if path.exists() else {}


def begin(o, data, trainer):  # refuses an --out that holds another experiment, writes config.json, prints the plan
    options = {name: value for name, value in vars(o).items() if name not in MACHINE}
    options |= {"source": data.source, "rows": data.total}
    path, old = o.out / "config.json", recorded(o)
    then = options | dict.fromkeys(o.given, "the default") | old if old else options
    then["data"] = o.data  # may differ: source is compared instead
    changed = ", ".join(f"{name} was {then[name]}, is {now}" for name, now in options.items() if now != then[name])
    need(not changed, f"{o.out} holds a run with other options ({changed}): choose another --out")
    trainer.progress["run"] = options["run"] = old.get("run", "" if old else os.urandom(8).hex())
    config = {"options": options, "machine": f"{o.world} x {o.device}, {o.dtype}"}
    config["sampler"] = dict(make_solver(trainer.codec.scheduler, o.solver).config)
    config["versions"] = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    if o.rank == 0:
        with atomic(path) as file:
            file.write_text(json.dumps(config, indent=1))
    gb = lambda weights: sum({id(p): p.nbytes for p in weights}.values()) / 1e9  # shared weights count once
    nets = filter(None, (trainer.policy, trainer.reference, trainer.half_copy))
    trains = gb(trainer.trained.values())
    static = gb(p for net in nets for p in net.parameters()) + 3 * trains  # the nets, gradients and moments
    gpu = torch.cuda.get_device_properties(o.device).total_memory / 1e9 if o.device.type == "cuda" else 0
    o.micro_batch = o.micro_batch or choose_micro_batch(o, 0.9 * gpu - static - 3.5)
    winners, checkpoints = o.steps * o.batch_size, 1 + math.ceil(o.steps / o.save_every)
    saved = gb(trainer.policy.parameters()) if o.part == "unet" else trains
    disk, free = 6 * trains + checkpoints * saved, shutil.disk_usage(o.out).free / 1e9
    print(
        f"Training on {winners:,} preferred images (winners; repeats count): {winners / data.total:.2g} epochs of"
        f" {data.total} rows of {data.source}, {o.batch_size} per update, {o.micro_batch} at a time, on {o.world} x"
        f" {o.device}.\n{250 * trains:.1f} million weights are trained. Memory: activations plus {static:.3g} GB"
        f"{f', of {gpu:.3g} GB' * bool(gpu)}. Disk: {disk:.3g} of {free:.3g} GB{'. TOO LITTLE!' * (disk > free)}"
    )


def save(o, trainer, captions, base, update, interval_ends=True):
    """Saves images (step-N.png: base model and policy, at every N from the same noise; anchor-N.png: the last pairs),
    then the next checkpoint, then the state, so that a kill in between leaves a run that can resume."""
    if o.rank == 0 and interval_ends:
        rows = {"base model": base} | ({f"update {update}": trainer.sample_images(captions)} if update else {})
        if o.model in MINI:
            rows["ideal"] = draw_mini(captions, torch.zeros(len(captions), 5))
            rows = {f"{k}\nscore {mini_score(pixels, captions).mean():.2f}": pixels for k, pixels in rows.items()}
        draw_rows(o.out / "samples" / f"step-{update}.png", captions[:12], rows)
        if trainer.latest_pairs:
            texts, *latents, signs = zip(*trainer.latest_pairs)
            winners, samples = (trainer.codec.decode(torch.stack(x)).cpu() for x in latents)
            kind = "reference samples" if o.loser == "generated" else "rejected images"
            rows = {"preferred images": winners, f"{kind}\n+1: pushed away\n-1: learned from\n0: not used": samples}
            draw_rows(o.out / "samples" / f"anchor-{update}.png", texts, rows, signs)
        with atomic(o.out / f"checkpoint-{update}") as folder:
            if o.part == "lora":
                adapters = {name.replace(".default.", "."): p.data for name, p in trainer.trained.items()}
                diffusers.StableDiffusionPipeline.save_lora_weights(folder, adapters)
            else:
                write = trainer.policy.save_pretrained if o.part == "unet" else trainer.policy.save_motion_modules
                write(folder / o.part)
    if o.rank == 0 and update > 0:
        with atomic(o.out / "resume.safetensors") as file:
            save_file(trainer.state, file, {"progress": json.dumps(trainer.progress | {"update": update})})
    if interval_ends:
        over_all(torch.zeros((), device=o.device)).item()  # a barrier: the other processes will read the checkpoint


def resume(o, trainer):  # restores the saved state, and returns the number of finished updates
    path, metrics = o.out / "resume.safetensors", o.out / "metrics.jsonl"
    finished, begun = ((o.out / f"checkpoint-{n}").is_dir() for n in (o.steps, max(2, o.save_every)))
    need(path.exists() or finished or not begun, f"{path} is missing, but there are checkpoints: {RESTORE}")
    done = o.steps if finished else 0
    if path.exists():
        with explained(f"{path} cannot be read", RESTORE, Exception):
            progress = json.loads(fill(trainer.state, path)["progress"])
            done, ours = progress.pop("update"), progress.get("run", "") == trainer.progress["run"]
            need(ours and 0 < done <= o.steps, f"{path} is of another run: {RESTORE}")
        trainer.progress |= progress
    ends = over_all(torch.tensor([done, -done], device=o.device), op=dist.ReduceOp.MIN)
    need(not ends.sum(), "the processes began at different updates: all machines must share the folder --out")
    if o.rank == 0 and metrics.exists():
        with atomic(metrics) as file:  # without the lines of updates that will be repeated
            file.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:done]))
    return done


def draw_rows(file, captions, rows, signs=()):
    """A PNG: one column per caption, one row per {label: (n, 3, [F,] R, R) pixels}. signs: of the last row."""
    font, sheet = ImageFont.load_default(13), None
    for y, (label, pixels) in enumerate(rows.items()):
        if pixels.ndim == 5:  # (n, 3, F, R, R) -> (n, 3, 4 R, R): four frames, one below the other
            pixels = pixels[:, :, :: max(1, pixels.shape[2] // 4)][:, :, :4].flatten(2, 3)
        pixels = ((pixels + 1) * 127.5).round().byte().movedim(1, -1)  # (n, R, R, 3)
        height, width = (max(1, 64 // pixels.shape[2]) * size for size in pixels.shape[1:3])
        at = lambda x, y: (120 + (width + 2) * x, 40 + (height + 2) * y)  # the top left corner of an image
        sheet = sheet or Image.new("RGB", at(len(captions), len(rows)), "white")
        pen = ImageDraw.Draw(sheet)
        pen.multiline_text((4, at(0, y + 0.5)[1]), label, "black", font, "lm")
        for x, (caption, tile) in enumerate(zip(captions, pixels)):
            text = "\n".join(textwrap.wrap(caption, width // 7, max_lines=2, placeholder=" ...")) if y == 0 else ""
            pen.multiline_text((at(x + 0.5, 0)[0], 20), text, "black", font, "mm", align="center")
            sheet.paste(Image.fromarray(tile.numpy()).resize((width, height), Image.NEAREST), at(x, y))
    for x, sign in enumerate(map(int, signs)):
        (left, top), colour = at(x, y), ("silver", "red", "lime")[sign]
        box = (left, top, left + width - 1, top + height - 1)
        pen.rectangle(box, None if sign else "grey", colour, width=4)
        pen.text((left + 7, top + 5), f"{sign:+d}", colour, font, stroke_width=2, stroke_fill="black")
    with atomic(file) as temporary:
        sheet.save(temporary, "PNG")


def how_to_load(o):  # the last lines of a run: a program that loads what it made
    load = lambda kind, *where: f"diffusers.{kind}.from_pretrained({', subfolder='.join(map(repr, where))})"
    kind = "MotionAdapter" if o.part == "motion_adapter" else "UNetMotionModel" if o.frames else "UNet2DConditionModel"
    folder, lora = f"checkpoint-{o.steps}", o.part == "lora"
    parts = {} if lora else {o.part: load(kind, str(o.out), f"{folder}/{o.part}")}  # parts this run made
    if lora and o.model in MINI:
        return f"To generate images with it: python eval.py --unet {o.out}"
    if o.frames:
        parts.setdefault("motion_adapter", load("MotionAdapter", o.motion_adapter) if lora else "None")
        parts["scheduler"] = f"diffusers.DDIMScheduler(**{ANIMATEDIFF})"
    lines = ["To load it:", "import diffusers", *(f"{name} = {value}" for name, value in parts.items())]
    if o.model not in MINI:
        pipeline = f"diffusers.{'AnimateDiffPipeline' if o.frames else 'StableDiffusionPipeline'}"
        lines.append(f"pipe = {pipeline}.from_pretrained({', '.join([repr(o.model), *(f'{n}={n}' for n in parts)])})")
    lines += [f"pipe.load_lora_weights({str(o.out / folder)!r}, weight_name={LORA_FILE!r})"] if lora else []
    return "\n  ".join(lines)


SMALL = dict(resolution=16, caption_dropout=0.1, batch_size=64, generate_batch=64, sampler_steps=8, guidance=1.0)
MINI = {"mini": SMALL | dict(steps=100, save_every=20, lr=3e-4, beta=5.0)}  # its errors are far larger: own lr, beta
MINI["mini-untrained"] = SMALL | dict(steps=15000, save_every=15000, lr=2e-3, lr_schedule="linear")
MINI["mini-untrained"] |= dict(data="mini-mixture", method="sft")
MOVED = {"pickapic": PICKAPIC[0], "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
CLIPS = dict(frames=16, train="motion", generate_batch=1, gradient_checkpointing=True)  # what --motion-adapter changes


def spelled(name):  # one canonical path per folder; ids that were removed from the hub become those of a mirror
    path = os.path.expanduser(name)
    is_local = name[:1] in "/.~" or name.partition("@")[0].count("/") > 1 or "/" in name and Path(name).parent.is_dir()
    need(os.path.exists(path) or not is_local, f"{name}: no such file or folder")
    return os.path.realpath(path) if os.path.exists(path) and name not in MINI_DATA else MOVED.get(name, name)


def parse_args(argv=None):  # a command line -> all options; raises UserError
    parser = argparse.ArgumentParser(allow_abbrev=False, description="In brackets: defaults; the toy task has others.")
    parser.error = lambda message: need(False, f"{message} (--help lists the options)")
    add = lambda *names, help, **o: parser.add_argument(*names, help=help + " [%(default)s]" * ("default" in o), **o)
    add("--method", default="seppo", choices=METHODS, help="sets the next three options (README.md: table)")
    add("--loser", choices=("generated", "data", "none"), help="where x^r, the loser of a pair, comes from")
    add("--reference", choices=("random", "latest", "initial"), help="which earlier checkpoint is the reference")
    add("--flip", choices=("sign", "indicator", "none"), help="how the anchor criterion's sign is used")
    add("--beta", type=float, default=2000.0, help="higher: the policy stays closer to the reference")
    add("--model", "--pretrained_model_name_or_path", type=spelled, default="mini", help="mini, a folder, or a hub id")
    add("--unet", type=spelled, help="start from this UNet instead of the model's own: a folder, a run, or a hub id")
    add("--motion-adapter", type=spelled, help="a folder or hub id: makes --model a text-to-video model")
    add("--frames", "--num_frames", type=int, help="frames per clip [16]")
    add("--train", choices=("motion", "all"), help="which weights of a text-to-video model to train [motion]")
    add("--lora-rank", "--rank", type=int, default=0, help="train low-rank adapters of the attention only; 0: none")
    add("--data", "--dataset_name", type=spelled, default="mini", help="mini, pickapic, captioned images, or Parquet")
    add("--max-winners", "--max_train_samples", type=int, help="use only the first N rows of the data")
    add("--resolution", type=int, default=512, help="pixels per side, after a centre crop")
    add("--caption-dropout", type=float, default=0.2, help="share of captions replaced by the empty one")
    add("--out", "--output_dir", help="the run's folder [runs/MODEL-METHOD-...]")
    add("--steps", "--max_train_steps", type=int, default=210, help="updates")
    add("--save-every", "--checkpointing_steps", type=int, default=30, help="updates between the run's checkpoints")
    add("--batch-size", type=int, default=2048, help="winners per update, over all devices")
    add("--micro-batch", type=int, help="winners per forward pass: lower it when memory runs out [what fits the GPU]")
    add("--lr", "--learning_rate", type=float, default=2.048e-5, help="rate after warm-up; not scaled by batch size")
    add("--lr-schedule", "--lr_scheduler", default="constant", choices=("constant", "linear"), help="lr after warm-up")
    add("--gradient-checkpointing", "--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--seed", type=int, default=0, help="random seed")
    add("--generate-batch", type=int, default=16, help="reference samples generated at a time")
    add("--solver", default="dpm++", choices=SOLVERS, help="the sampler's solver")
    add("--sampler-steps", "--num_inference_steps", type=int, default=20, help="sampler steps: most of a run's cost")
    add("--guidance", "--guidance_scale", type=float, default=7.5, help="classifier-free guidance scale; 1: none")
    add("--compile", action="store_true", help="compile the net that generates (speed-up not measured)")
    add("--device", help="cpu, cuda or cuda:1 [auto]")
    add("--dtype", "--mixed_precision", choices=("fp16", "fp32", "no"), help="precision; `no` is fp32 [fp16 on a GPU]")
    known, _ = parser.parse_known_args(argv)
    parser.set_defaults(**MINI.get(known.model, CLIPS if known.motion_adapter else {}))
    o = parser.parse_args(argv)
    o.given = {name: value for name, value in vars(o).items() if value != parser.get_default(name)}
    for name, preset in METHODS[o.method].items():
        setattr(o, name, getattr(o, name) or preset)
    join_devices(o)
    complete(o)
    return o


def complete(o):  # derives options and refuses wrong combinations
    o.part = "lora" if o.lora_rank else "motion_adapter" if o.train == "motion" and not o.unet else "unet"  # saved
    named = [f"{name}-{Path(str(value)).resolve().name}" for name, value in o.given.items() if name not in UNNAMED]
    name = "-".join([f"runs/{Path(o.model).resolve().name}", o.method, *named]).replace("_", "-")
    o.out = Path(os.path.expanduser(o.out or name))
    for name, value in vars(o).items():
        if type(value) in (int, float) and name not in ("seed", "caption_dropout", "rank", "lora_rank"):
            need(0 < value < math.inf, f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    need(not (o.lora_rank and o.unet), "--lora-rank and --unet do not combine: use a --model saved with that UNet")
    need(o.sampler_steps < 1000, f"--sampler-steps must be below 1000, got {o.sampler_steps}")
    need(0 <= o.caption_dropout <= 1 and o.lora_rank >= 0, "--caption-dropout must be 0 to 1, --lora-rank 0 or more")
    mini = o.model in MINI
    need(mini == (o.data in MINI_DATA), f"--data {o.data} does not go with --model {o.model}: add --model or --data")
    need(o.resolution == 16 if mini else o.resolution % 64 == 0, "--resolution must be a multiple of 64 (toy: 16)")
    clips = not mini and o.motion_adapter and o.frames > 1
    need(clips or not (o.motion_adapter or o.frames or o.train), "clips need --motion-adapter, and --frames 2 or more")
    o.micro_batch = min(o.micro_batch or 64, max(1, o.batch_size // o.world)) if mini else o.micro_batch
    need(o.batch_size % ((o.micro_batch or 1) * o.world) == 0, "--micro-batch x devices must divide --batch-size")


def join_devices(o):  # sets device, rank and world (from torchrun, or a single process) and dtype
    places = [os.environ.get(name, alone) for name, alone in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010")]
    fits = all(map(str.isdigit, places)) and (places[1] == "1" or {"RANK", "MASTER_ADDR"} <= {*os.environ})
    need(fits, "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR are not as torchrun sets them: use torchrun, or unset them")
    o.rank, o.world, local = map(int, places)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for warning in caught:  # such as an old driver: otherwise the run would silently use the CPU
        print(f"torch finds no usable GPU (see README.md, Memory): {' '.join(str(warning.message).split())}")
    name = o.device or ("cuda" if gpus else "cpu")
    need(re.fullmatch(r"cpu|cuda(:\d\d?)?", name), f"--device {name} must be cpu, cuda or cuda:N")
    o.device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    most = max(local, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1) if name == "cuda" else o.device.index
    need(name == "cpu" or most < gpus, f"--device {name}: torch finds {gpus} GPUs here; --device cpu works")
    if o.device.type == "cuda":
        torch.cuda.set_device(o.device)
        torch.backends.cudnn.allow_tf32 = False  # keep fp32 exact
        torch.backends.cuda.enable_cudnn_sdp(False)  # policy and reference might get different cuDNN kernels
    o.dtype = "fp32" if o.dtype == "no" else o.dtype or ("fp16" if o.device.type == "cuda" else "fp32")
    o.half = torch.float16 if o.dtype == "fp16" else torch.float32  # for modules used only for inference


def run(argv=None):  # all that the command does; one command at a time per folder
    o = parse_args(argv)
    if o.model in MINI:
        torch.set_num_threads(1)  # a second thread gains nothing on so small a net, and starves on a busy machine
    if o.world > 1:  # with a long timeout, as process 0 may write 14 GB to a slow disk
        with explained("the processes cannot find each other", "start them with torchrun", Exception):
            dist.init_process_group("gloo" if o.device.type == "cpu" else "nccl", timeout=timedelta(hours=2))
    with explained(f"{o.out} cannot be written", ROOM):
        o.out.mkdir(parents=True, exist_ok=True)
        lock = open(o.out / "lock", "a")  # closing it unlocks the folder, and so does the end of the process
    try:
        import fcntl

        if o.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        need(False, f"another command is running in {o.out}: wait for it, or choose another --out")
    except (ImportError, OSError):  # Windows, some file systems
        print(f"{o.out} cannot be locked: run only one command in it")
    over_all(torch.zeros((), device=o.device)).item()  # a barrier
    with lock:
        train(o)


def main(argv=None, work=run, program="seppo.py", less=LESS_MEMORY):
    """The command. Returns the exit code: 0, or 2 after one line that says what to do; 130 after Ctrl-C."""
    for library in (diffusers.utils, transformers.utils, huggingface_hub):
        library.logging.set_verbosity(50)  # level CRITICAL: errors are printed below
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    prints = re.fullmatch("0*", os.environ.get("RANK", "0"))
    sys.stdout = sys.stdout if prints else open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the console lacks
    messages = {KeyboardInterrupt: "interrupted; run the same command again to continue"}
    messages |= {torch.OutOfMemoryError: f"out of GPU memory: try {less}"}
    try:
        return work(argv) or 0
    except (UserError, *messages) as error:
        message, code = messages.get(type(error), str(error)), 130 if isinstance(error, KeyboardInterrupt) else 2
    if prints or dist.is_initialized():  # an error that all processes find is printed once
        print(f"{program}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
