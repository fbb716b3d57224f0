# SPDX-License-Identifier: MIT
"""Global-Local Self-Distillation (GLSD, WACV 2023) in one file.

    python gld.py                                                             # the built-in dataset: 1-2 minutes
    python eval_knn.py                                                        # how good are the features?
    python gld.py --data PATH/TO/IMAGES --arch vit_small --batch-size 64      # your images, one GPU
    torchrun --nproc_per_node=8 gld.py --matching geometric --data IMAGENET   # the paper's settings

A student network learns without labels from a teacher, an exponential moving average (EMA) of its own weights. The
student sees V views (crops) of an image: 2 large ones, called global, and L small ones, called local. The teacher sees
only the Q = 2 global views. From a whole view, the student learns to predict the teacher's output for another view of
the same image: the image loss. This is DINO. From every patch, it also learns to predict the teacher's output for the
matching patch of the other view: the patch loss. Which patch matches? `geometric`: the patch that shows the same place
of the image. `similarity` (EsViT): the patch with the most similar features. `none`: there is no patch loss, and the
method is DINO.

    B       images in the batch of one process       N    patches of one view (grid rows x cols, row-major)
    V, Q    student views, teacher views             C    width of the backbone's features
    v       views of one size: 2 or L                D    width of a head's bottleneck z
    M       crops, v * B of them                     K    output dimension of a head ("prototypes")
    box     where a view was cropped: (top, left, height, width, flip), pixels of the original image

Part I is the paper: views, networks, loss, training. Read it from top to bottom. Part II is what it calls: options,
augmentation, backbones, images, checkpoints, k-NN evaluation, log, processes and errors.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from matching_kernels import geometric_matches, head_cross_entropy, similarity_matches

STUDENT_TEMP = 0.1
CENTER_MOMENTUM = 0.9
MAX_SKIPPED = 20                    # so many steps in a row may overflow in fp16 before the run ends
STOPPED = 75                        # exit code of a run that stopped on request and can be resumed (EX_TEMPFAIL)

# ==================================================================================== part I: the paper starts here
# ------------------------------------------------------------------------------------------------ views and boxes

class Views(NamedTuple):
    """All views of one size of an image: the crops, and how to augment them. The DataLoader adds B in front."""
    crops: torch.Tensor             # (v, 3, S, S) uint8, cropped and resized, not yet flipped or augmented
    boxes: torch.Tensor             # (v, 5) top, left, height, width, flip
    jitter: torch.Tensor            # (v, 4) factors of brightness, contrast, saturation (1: no change), hue shift (0)
    order: torch.Tensor             # (v, 4) the order of these four operations, a permutation of 0..3
    grey: torch.Tensor              # (v,) True: convert to greyscale
    sigma: torch.Tensor             # (v,) of the Gaussian blur, pixels; 0: no blur
    solarise: torch.Tensor          # (v,) True: invert the pixels above one half

def crop_views(image, cfg):
    """One image (3, H, W) uint8 -> [global Views, local Views (if any)]. DataLoader workers do no more."""
    global_views = [draw_view(image, cfg.global_size, cfg.global_scale, cfg.blur_sigma, blur_p, solarise_p)
                    for blur_p, solarise_p in ((1.0, 0.0), (0.1, 0.2))]
    local_views = [draw_view(image, cfg.local_size, cfg.local_scale, cfg.blur_sigma, blur_p=0.5, solarise_p=0.0)
                   for _ in range(cfg.local_views)]
    # a list of views -> one `Views`: field by field, stacked
    return [Views(*map(torch.stack, zip(*views))) for views in (global_views, local_views) if views]

def draw_view(image, size, scale, blur_sigma, blur_p, solarise_p):
    """One view, drawn from torch's random generator with DINO's distribution: `Views` without the axis v."""
    flip_u, jitter_u, grey_u, sigma_u, blur_u, solarise_u = torch.rand(6).tolist()
    box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))            # top, left, height, width
    order, *factors = ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * sigma_u
    return Views(
        crops=TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC, antialias=True),
        boxes=torch.tensor([*box, float(flip_u < 0.5)]),
        jitter=torch.tensor(factors if jitter_u < 0.8 else [1.0, 1.0, 1.0, 0.0]),
        order=order,
        grey=torch.tensor(grey_u < 0.2),
        sigma=torch.tensor(sigma if blur_u < blur_p else 0.0),
        solarise=torch.tensor(solarise_u < solarise_p))

# ------------------------------------------------------------------------------------------------ networks

class Head(nn.Module):
    """Features (..., C) -> unit vectors z (..., D). The logits are z @ weight().T, with a weight-normalised layer."""

    def __init__(self, width, cfg):
        super().__init__()
        hidden, bottleneck = cfg.head_hidden, cfg.head_bottleneck
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.direction = nn.Parameter(torch.empty(cfg.out_dim, bottleneck).uniform_(-1, 1) / bottleneck ** 0.5)
        self.gain = nn.Parameter(torch.ones(cfg.out_dim, 1), requires_grad=not cfg.norm_last_layer)
        for layer in self.mlp[::2]:                                             # the linear ones
            nn.init.trunc_normal_(layer.weight, std=0.02 * (2048 / hidden) ** 0.5)  # official: 0.02, at width 2048
            nn.init.zeros_(layer.bias)

    def weight(self):
        """(K, D): the last layer. Its direction and its magnitude (`gain`) are separate parameters (weight norm)."""
        return self.gain * F.normalize(self.direction, dim=-1)

    def forward(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1)

class Outputs(NamedTuple):
    """What the loss needs of a network."""
    image_z: torch.Tensor           # (V, B, 1, D) bottleneck of the image head (the teacher's: Q views)
    patch_z: list                   # per size of view: (v, B, N, D) bottleneck of the patch head
    features: list                  # per size of view: (v, B, N, C) the backbone's patch features
    image_weight: torch.Tensor      # (K, D) last layer of the image head
    patch_weight: torch.Tensor      # (K, D) last layer of the patch head; None without one

class Network(nn.Module):
    """Backbone, image head and (unless matching is none) patch head. The student is one, the teacher another."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)      # torchvision's, below
        self.image_head = Head(self.backbone.width, cfg)
        self.patch_head = Head(self.backbone.width, cfg) if cfg.matching != "none" else None

    def forward(self, views):
        """views: a list with one tensor (v, B, 3, S, S) per size of view, the global ones first."""
        image_z, patch_z, features = [], [], []
        for x in views:
            image, patches = self.backbone(x.flatten(0, 1))                                 # (M, C), (M, N, C)
            image = image.unflatten(0, x.shape[:2])                                         # (v, B, C)
            patches = patches.unflatten(0, x.shape[:2])                                     # (v, B, N, C)
            image_z.append(self.image_head(image[:, :, None]))                              # (v, B, 1, D)
            if self.patch_head is not None:
                patch_z.append(self.patch_head(patches))                                    # (v, B, N, D)
                features.append(patches.detach())
        patch_weight = self.patch_head.weight() if self.patch_head is not None else None
        return Outputs(torch.cat(image_z), patch_z, features, self.image_head.weight(), patch_weight)

# ------------------------------------------------------------------------------------------------ the loss

def patch_midpoints(box, grid):
    """Where the patches of a view lie: (N, 2), y and x of their midpoints in the original image, pixels."""
    (top, left, height, width, flip), (rows, cols) = box, grid
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")        # (rows, cols) each
    if flip:
        col = cols - 1 - col                                # a flipped view shows its last column first
    y = top + (row + 0.5) * height / rows
    x = left + (col + 0.5) * width / cols
    return torch.stack([y, x], dim=-1).flatten(0, 1)

def nearest_patches(student_box, teacher_box, student_grid, teacher_grid, hinge=True):
    """For each student patch: the index of the teacher patch with the nearest midpoint, and its weight, 1 or 0."""
    distance = torch.cdist(patch_midpoints(student_box, student_grid), patch_midpoints(teacher_box, teacher_grid))
    nearest, match = distance.min(dim=1)                                                    # (Ns,) each
    half_diagonals = [torch.hypot(box[2] / rows, box[3] / cols) / 2
                      for box, (rows, cols) in ((student_box, student_grid), (teacher_box, teacher_grid))]
    weight = nearest < max(half_diagonals) if hinge else torch.ones_like(nearest)
    return match, weight.to(distance.dtype)

def patch_loss_definition(student, teacher, center, boxes, grids, teacher_temp, hinge=True):
    """The patch loss with geometric matching, written as the paper defines it, to be read and to test others against.

    Args: student: V logits (B, N, K), one per view. teacher: Q logits (B, N, K). center: (K,). boxes: (V, B, 5).
    grids: V pairs (rows, cols).
    """
    pairs = [(q, v) for q in range(len(teacher)) for v in range(len(student)) if v != q]
    losses = []
    for q, v in pairs:
        target = F.softmax((teacher[q] - center) / teacher_temp, dim=-1)                    # (B, Nt, K)
        log_p = F.log_softmax(student[v] / STUDENT_TEMP, dim=-1)                            # (B, Ns, K)
        for b in range(len(target)):
            match, weight = nearest_patches(boxes[v, b], boxes[q, b], grids[v], grids[q], hinge)
            cross_entropy = -(target[b, match] * log_p[b]).sum(-1)                          # (Ns,)
            losses.append((weight * cross_entropy).mean())
    return sum(losses) / len(losses)

def distillation_loss(student, teacher, centers, boxes, grids, *, teacher_temp, matching, hinge=True, impl="auto"):
    """The loss of the paper, a pure function. Returns: loss, image_loss, patch_loss.

        image_loss = mean over pairs of views (q, v) of CE(T(q), S(v))
        patch_loss = mean over pairs of views (q, v) and patches n of w_n * CE(T(q, m(n)), S(v, n))
        loss = (image_loss + patch_loss) / 2; with matching none, loss = image_loss

    T = softmax((teacher logits - centre) / teacher_temp), S = softmax(student logits / 0.1), CE(t, s) = -sum t * log s.
    A pair is a teacher view q and another student view v of the same image. m(n) is the teacher patch that matches
    student patch n. With geometric matching, it is the patch whose midpoint is nearest in the image. w_n is 1 if the
    two midpoints are closer than half the diagonal of the larger of the two patches. Otherwise n is masked: w_n is 0,
    but n still counts in the mean. See `geometric_matches`. With similarity matching, w_n is 1.

    The centre is a running mean of the teacher's logits. Without it, one prototype could get the highest probability
    for every image. The low teacher temperature prevents the other collapse, a uniform output for every image.

    Args:
        student, teacher: Outputs for all V views, and for the Q = 2 global ones.
        centers: (2, K), of the image head and of the patch head (K,) each; with matching none (1, K).
        boxes: (V, B, 5). grids: (rows, cols) of the patches, per size of view. impl: see matching_kernels.py.
        hinge: False: no patch is masked, every w_n is 1. (The official code's name for this hard 0/1 mask.)
    """
    pairs = 2 * (len(student.image_z) - 1)          # each of the 2 teacher views with all views but itself
    common = dict(student_temp=STUDENT_TEMP, teacher_temp=teacher_temp, impl=impl, skip_same_view=True)
    image_loss = head_cross_entropy(student.image_z, student.image_weight, teacher.image_z, teacher.image_weight,
                                    centers[0], **common) / pairs
    if matching == "none":
        return image_loss, image_loss, torch.zeros_like(image_loss)
    if matching == "geometric":
        match_by = dict(student_boxes=boxes, student_grid=grids[:len(student.patch_z)],
                        teacher_boxes=boxes[:2], teacher_grid=grids[0], hinge=hinge)
    else:
        match_by = dict(index=[similarity_matches(features[:, None], teacher.features[0][None])     # (v, Q, B, N)
                               for features in student.features])
    patch_loss = head_cross_entropy(student.patch_z, student.patch_weight, teacher.patch_z[0], teacher.patch_weight,
                                    centers[1], **match_by, **common) / pairs
    return (image_loss + patch_loss) / 2, image_loss, patch_loss

@torch.no_grad()
def mean_logits(teacher):
    """(heads, K): the teacher's mean logits over views, images and patches, for the centres. The last layer is linear,
    so the mean is taken before it, where it is cheap."""
    means = [teacher.image_weight @ teacher.image_z.mean((0, 1, 2))]
    if teacher.patch_z:
        means.append(teacher.patch_weight @ teacher.patch_z[0].mean((0, 1, 2)))
    return torch.stack(means)

# ------------------------------------------------------------------------------------------------ training

def cosine(start, end, step, steps, warmup=0):
    """A schedule at `step`: linear from 0 to `start` over `warmup` steps, then half a cosine to `end` at `steps`."""
    if step < warmup:
        return start * step / max(1, warmup - 1)            # as np.linspace(0, start, warmup): the last is `start`
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def teacher_temp_at(epoch, cfg):
    """Linear from --warmup-teacher-temp to --teacher-temp in --warmup-teacher-temp-epochs, then constant."""
    if epoch >= cfg.warmup_teacher_temp_epochs:
        return cfg.teacher_temp
    progress = epoch / max(1, cfg.warmup_teacher_temp_epochs - 1)               # as np.linspace, too
    return cfg.warmup_teacher_temp + progress * (cfg.teacher_temp - cfg.warmup_teacher_temp)

@torch.no_grad()
def clip_gradients(grads, limit):
    """Scale each gradient by itself to a norm of at most `limit` (0: any), in place. The same values as those of
    `clip_grad_norm_`, called for one parameter after another, with an eighth of its launches on a GPU. Returns: the
    norm of all gradients together before that, a scalar tensor."""
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        factors = (limit / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, factors.unbind())
    return norms.norm()

def train(cfg):
    """Train a student and its EMA teacher; under torchrun, as one of several processes. Returns the exit code.

    A resumed run ends with the same bits as an uninterrupted one, because every random draw is a function of the seed
    and of what it is drawn for. The order of the images depends on seed and epoch. The views of an image depend on
    seed, epoch and image. Stochastic depth depends on seed, step and process. So a checkpoint needs no state of a
    random generator. (The same bits need the same machine, the same number of processes and threads, and operations
    that repeat their bits, as those of the CPU do.)
    """
    rank, world, device = join_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    cfg.images = [len(images), zlib.crc32(np.ascontiguousarray(images.items))]      # pixels or file names
    steps_per_epoch = count_steps(images, cfg, world)
    steps = cfg.epochs * steps_per_epoch
    stop_at = min(steps, cfg.max_steps or steps)

    torch.manual_seed(cfg.seed)
    student = Network(cfg, cfg.drop_path).to(device, memory_format=torch.channels_last)
    teacher = Network(cfg).to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        student, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student, teacher))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    parameters = [p for p in student.parameters() if p.requires_grad]
    last_layers = [p for name, p in student.named_parameters() if name.endswith(("head.direction", "head.gain"))]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]        # biases and norms: without weight decay
    optimizer = torch.optim.AdamW([{"params": matrices, "decay": 1}, {"params": vectors, "decay": 0}],
                                  lr=0, weight_decay=0, fused=True)             # both are set in each step
    dtype = compute_dtype(cfg)                              # of the networks; weights, loss and centres are float32
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    centers = torch.zeros(1 if cfg.matching == "none" else 2, cfg.out_dim, device=device)

    # all that training changes, and that a checkpoint holds
    state = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler, centers=centers)
    require_equal([settings(cfg), cfg.max_steps, cfg.eval_every], "have different options or images", device)
    start = resume(cfg, state)
    require_equal(start, f"see different checkpoints: --output {cfg.output} must be a folder that they share", device)
    source = initialise(cfg, student, teacher) if cfg.init_from and start == 0 else ""
    labelled_images = labelled(cfg.data, cfg.data_fraction) if cfg.eval_every else None
    if cfg.compile:
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs eagerly, with a warning
        student.compile()
        teacher.compile()
    ddp = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    log = Log(cfg, start)
    say(f"{cfg.matching} matching, preset {cfg.preset}, {cfg.arch} on {device.type}{source}; {len(images)} images "
        f"of {images.root}: {steps} steps of {cfg.batch_size} images, from step {start}; output in {cfg.output}/")
    if cfg.preset == "paper" and device.type == "cpu":
        say("on a CPU, --preset paper takes minutes per step; try --preset small")
    stop_requests = catch_signals(world)
    batches = iter(make_loader(images, cfg, rank, world, range(start, stop_at), steps_per_epoch))
    skipped = 0                                             # steps in a row that fp16 overflowed
    named = set()                                           # images that could not be read
    began = time.perf_counter()                             # of the step
    batch = load_batch(batches, device, cfg)
    for step in range(start, stop_at):
        epoch = step // steps_per_epoch
        lr = cosine(cfg.lr * cfg.batch_size / 256, cfg.min_lr, step, steps, int(cfg.warmup_epochs * steps_per_epoch))
        weight_decay = cosine(cfg.weight_decay, cfg.weight_decay_end, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group["decay"]
        momentum = cosine(cfg.teacher_momentum, 1, step, steps)
        teacher_temp = teacher_temp_at(epoch, cfg)
        torch.manual_seed(int(np.random.default_rng((cfg.seed, step, rank)).integers(2 ** 62)))     # stochastic depth
        views, boxes, unreadable, waited = batch

        # 1. both networks, one loss; the teacher sees the global views only
        global_views = views[:1]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                teacher_out = teacher(global_views)
            student_out = ddp(views)
        loss, image_loss, patch_loss = distillation_loss(
            student_out, teacher_out, centers, boxes, cfg.grids, teacher_temp=teacher_temp, matching=cfg.matching,
            hinge=cfg.hinge, impl=cfg.impl)

        # 2. gradients: backward, where DDP averages them over the processes; freeze; clip each parameter by itself
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if epoch < cfg.freeze_last_layer:
            for p in last_layers:
                p.grad = None                               # the optimizer leaves these parameters alone
        grad_norm = clip_gradients([p.grad for p in parameters if p.grad is not None], cfg.clip_grad)

        # 3. agree with the other processes before anything changes: all get the same means, so a NaN in one of them
        # ends the run in all, and a signal to one of them stops all
        batch_center = all_mean(mean_logits(teacher_out))
        counts = torch.tensor([len(stop_requests), len(unreadable)], dtype=torch.float32).to(device, non_blocking=True)
        shared = all_mean(torch.cat([image_loss.detach()[None], patch_loss.detach()[None], counts]))
        numbers = torch.cat([shared, batch_center.sum()[None], grad_norm[None]])
        # tolist() waits until the GPU has done all this; so load the next batch first, while the GPU is busy
        batch = load_batch(batches, device, cfg)
        image_loss, patch_loss, stop, unread, center_sum, grad_norm = numbers.tolist()
        overflow = scaler.is_enabled() and not math.isfinite(grad_norm)
        skipped = skipped + 1 if overflow else 0            # the scaler skips such a step and lowers its scale
        if overflow and skipped <= MAX_SKIPPED:
            grad_norm = 0.0
        if not all(map(math.isfinite, (image_loss, patch_loss, center_sum, grad_norm))):
            say(f"gld.py: stopped at step {step}, lr {lr:.3g}: image loss {image_loss:.3g}, patch loss "
                f"{patch_loss:.3g}, teacher {center_sum:.3g}, gradient {grad_norm:.3g}; the last checkpoint is "
                "unchanged; a lower --lr may help", file=sys.stderr)
            return 1

        # 4. update: the student; the centres, used from the next step on; the EMA teacher, by the student's new weights
        scaler.step(optimizer)
        scaler.update()
        centers.lerp_(batch_center, 1 - CENTER_MOMENTUM)
        with torch.no_grad():                               # parameters only: batch norm statistics are its own
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

        # 5. log, evaluate, save
        done = step + 1
        epoch_ended = done % steps_per_epoch == 0
        run_ended = done == stop_at
        log.sums.update(steps=1, seconds=time.perf_counter() - began, waiting=waited, unreadable=round(unread * world),
                        loss_image=image_loss, loss_patch=patch_loss, grad_norm=grad_norm)
        for i in set(unreadable) - named:
            say(f"cannot be read, replaced by another image: {images.name(i)}", everywhere=True)
        named.update(unreadable)
        if log.sums["unreadable"] > max(1, steps_per_epoch * cfg.batch_size // 100):
            raise BadInput(f"--data {cfg.data}: more than 1 % of the images of an epoch cannot be read")
        if step == start or epoch_ended or run_ended or time.perf_counter() - log.reported > 30:
            record = dict(epoch=epoch, step=done, lr=lr) | diagnose(teacher_out, centers[0], boxes, teacher_temp, cfg)
            if cfg.eval_every and epoch_ended and (epoch + 1) % cfg.eval_every == 0:
                record["knn"] = top1_of_20nn(teacher.backbone, labelled_images, cfg, device, rank, world)
            log.report(record, stop_at - done, epoch_ended or run_ended)
        if stop or run_ended or (epoch_ended and (epoch + 1) % cfg.save_every == 0):
            if not save(cfg, state, done):
                return 1
        if stop and not run_ended:
            say(f"stopped on request: saved at step {done}; rerun the same command to resume")
            return STOPPED
        began = time.perf_counter()
    return 0

# ======================================================================================= the paper ends here
# ------------------------------------------------------------------------------------------------ options

ARCHS = ("conv_tiny", "vit_tiny", "vit_small", "vit_base", "swin_t", "swin_s", "swin_b", "resnet50")
BUILT_IN_SETS = ("shapes", "cifar10")
NOT_NEGATIVE = (0, 1e9)
FRACTION = (1e-9, 1)
WORKERS = min(os.cpu_count() or 1, 10)

class Option(NamedTuple):
    """A command-line flag with its default in --preset small and, where it differs, in --preset paper."""
    name: str
    type: type                          # bool, int, float or str
    small: object                       # a list of two numbers: an interval
    allowed: tuple                      # names, or (lowest, highest) of a number, or None
    meaning: str
    paper: object = None                # None: as small

    def flag(self):
        return "--" + self.name.replace("_", "-")

# These may change when a run is resumed. (--data: a folder may move. Its images are compared.)
RUN_OPTIONS = (
    Option("data", str, "shapes", None, "folder of images, or a built-in dataset: " + ", ".join(BUILT_IN_SETS)),
    Option("output", str, "output", None, "folder for checkpoint.pt, backbone.pt and log.jsonl"),
    Option("resume", bool, True, None, "resume from OUTPUT/checkpoint.pt if it exists"),
    Option("save_every", int, 1, (1, 1e9), "epochs between checkpoints"),
    Option("eval_every", int, -1, (-1, 1e9), "epochs between k-NN evaluations; 0: none; -1: 1 for shapes, else 0"),
    Option("max_steps", int, 0, NOT_NEGATIVE, "stop after this many steps, on the schedule of --epochs; 0: all"),
    Option("workers", int, WORKERS, (0, 999), "DataLoader workers per process"),
    Option("precision", str, "auto", ("auto", "bf16", "fp16", "fp32"), "network compute dtype"),
    Option("compile", bool, False, None, "torch.compile the networks"),
    Option("impl", str, "auto", ("auto", "triton", "torch"), "code path of the loss, see matching_kernels.py"),
    Option("device", str, "auto", ("auto", "cpu", "cuda"), "auto: cuda if available"),
)
# These make the result: they stay the same when a run is resumed, and are the same in all processes.
RESULT_OPTIONS = (
    Option("data_fraction", float, 1.0, FRACTION, "use this fraction of each class, always the same images"),
    # views
    Option("global_size", int, 32, (1, 9999), "side of a global view, pixels", paper=224),
    Option("local_size", int, 16, (1, 9999), "side of a local view, pixels", paper=96),
    Option("local_views", int, 4, (0, 99), "L, number of local views per image", paper=8),
    Option("global_scale", float, [0.4, 1.0], FRACTION, "crop scale of a global view (fraction of the area)"),
    Option("local_scale", float, [0.1, 0.4], FRACTION, "crop scale of a local view (same)", paper=[0.05, 0.4]),
    Option("blur_sigma", float, [0.1, 0.5], (1e-9, 99), "range of the Gaussian blur's sigma, pixels", paper=[0.1, 2.0]),
    # networks
    Option("arch", str, "conv_tiny", ARCHS, "backbone: " + ", ".join(ARCHS), paper="swin_t"),
    Option("patch_size", int, 8, (1, 999), "patch size of a ViT, pixels", paper=16),
    Option("drop_path", float, 0.0, (-1, 0.999), "stochastic depth; -1: 0.2 for swin_s, swin_b, else 0.1", paper=-1.0),
    Option("out_dim", int, 256, (2, 1e9), "K, output dimension of a head", paper=65536),
    Option("head_hidden", int, 128, (1, 1e6), "hidden width of a head", paper=2048),
    Option("head_bottleneck", int, 64, (1, 1e6), "D, width before the last layer of a head", paper=256),
    Option("norm_last_layer", bool, True, None, "fix the weight-norm magnitude of the last layer at 1", paper=False),
    Option("init_from", str, "", None, "start from the weights in this file: gld.py's, or any that eval_knn.py reads"),
    # the loss
    Option("matching", str, "geometric", ("geometric", "similarity", "none"),
           "which patches match: geometric, similarity, or none (no patch loss: DINO)"),
    Option("hinge", bool, True, None, "geometric matching: mask patches without a teacher patch close by"),
    Option("teacher_temp", float, 0.04, (1e-6, 1e6), "teacher temperature", paper=0.07),
    Option("warmup_teacher_temp", float, 0.04, (1e-6, 1e6), "teacher temperature at the start"),
    Option("warmup_teacher_temp_epochs", int, 0, NOT_NEGATIVE, "epochs of its linear warm-up", paper=30),
    # optimisation
    Option("epochs", int, 10, (1, 1e9), "passes over the data", paper=300),
    Option("batch_size", int, 32, (1, 1e6), "images per step, over all processes", paper=256),
    Option("lr", float, 1.6e-2, (0, 1e6), "learning rate per 256 images of the batch", paper=5e-4),
    Option("min_lr", float, 1e-6, (0, 1e6), "learning rate at the end (cosine)"),
    Option("warmup_epochs", float, 1.0, NOT_NEGATIVE, "linear warm-up of the learning rate", paper=10.0),
    Option("weight_decay", float, 0.04, (0, 1e6), "weight decay at the start"),
    Option("weight_decay_end", float, 0.4, (0, 1e6), "weight decay at the end (cosine)"),
    Option("clip_grad", float, 3.0, NOT_NEGATIVE, "largest gradient norm of each parameter; 0: any"),
    Option("freeze_last_layer", int, 0, NOT_NEGATIVE, "epochs in which the last layer of the heads is frozen", paper=1),
    Option("teacher_momentum", float, 0.99, (0, 1), "the EMA's momentum at the start (cosine to 1)", paper=0.996),
    Option("seed", int, 0, (0, 2 ** 32), "random seed"),
)
OPTIONS = RUN_OPTIONS + RESULT_OPTIONS

def parse_arguments(argv=None):
    """Command line -> namespace in which every option is set, by the user or by the preset, and which holds the `grids`
    (rows, cols) of the patches of global and (if there are any) local views. Raises BadInput."""
    parser = Parser("gld.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=("small", "paper"), help="which defaults; small unless --data is a path")
    for option in OPTIONS:
        if option.type is bool:
            kwargs = dict(action=argparse.BooleanOptionalAction)
        elif option.type is str:
            kwargs = dict(choices=option.allowed, metavar="NAME")
        elif isinstance(option.small, list):
            kwargs = dict(type=option.type, nargs=2, metavar=("LOW", "HIGH"))
        else:
            kwargs = dict(type=option.type, metavar="N")
        default = option.small if option.paper is None else f"small: {option.small}, paper: {option.paper}"
        parser.add_argument(option.flag(), help=f"{option.meaning} ({default})", **kwargs)
    given = vars(parser.parse_args(argv))                   # only what the user gave
    built_in = given.get("data", "shapes") in BUILT_IN_SETS
    preset = given.get("preset", "small" if built_in else "paper")
    cfg = argparse.Namespace(preset=preset)
    for option in OPTIONS:
        default = option.small if preset == "small" or option.paper is None else option.paper
        value = given.get(option.name, default)
        setattr(cfg, option.name, value)
        if option.type in (int, float):
            low, high = option.allowed
            values = value if isinstance(value, list) else [value]
            if not low <= values[0] <= values[-1] <= high:  # NaN is refused, too
                order = ", the lower value first" if len(values) > 1 else ""
                raise BadInput(f"{option.flag()} must be from {low:g} to {high:g}{order}, got {values}")
    # -1 stands for a value that follows from another option
    if cfg.drop_path < 0:
        cfg.drop_path = 0.2 if cfg.arch in ("swin_s", "swin_b") else 0.1
    if cfg.eval_every < 0:
        cfg.eval_every = 1 if cfg.data == "shapes" else 0
    sizes = [cfg.global_size, cfg.local_size] if cfg.local_views else [cfg.global_size]
    stride = stride_of(cfg.arch, cfg.patch_size)
    if any(size % stride for size in sizes):
        raise BadInput(f"--global-size and --local-size must be multiples of {stride} for {cfg.arch}, got {sizes}")
    cfg.grids = [(size // stride, size // stride) for size in sizes]
    if cfg.warmup_epochs > cfg.epochs:
        raise BadInput(f"--warmup-epochs {cfg.warmup_epochs:g} exceeds --epochs {cfg.epochs}")
    cfg.device = choose_device(cfg.device)
    triton = cfg.impl == "triton" and os.getenv("TRITON_INTERPRET") != "1"
    if cfg.device == "cpu" and (cfg.precision == "fp16" or triton):
        raise BadInput("--precision fp16 and --impl triton need a CUDA GPU")
    return cfg

def choose_device(wanted):
    """The value of --device -> cuda or cpu. Nothing else asks whether there is a GPU. Raises BadInput."""
    gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not gpu:
        raise BadInput("--device cuda needs a CUDA GPU")
    return "cuda" if gpu else "cpu"

def compute_dtype(cfg):
    """The dtype that the networks compute in."""
    if cfg.precision != "auto":
        return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[cfg.precision]
    if cfg.device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

# ------------------------------------------------------------------------------------------------ augmentation

@torch.no_grad()
def augment(views, max_sigma):
    """Flip and colour augmentation, on the training device, for all views of one size at once.

    Args: views: `Views` with B in front of each shape. max_sigma: the largest sigma of the blur, pixels.
    Returns: (v, B, 3, S, S) float32, normalised.
    """
    B, v = views.crops.shape[:2]
    views = Views(*(field.transpose(0, 1).flatten(0, 1) for field in views))                # (M, ...)
    flip, grey, solarise = (flag[:, None, None, None] > 0 for flag in (views.boxes[:, 4], views.grey, views.solarise))
    x = views.crops.float() / 255                                                           # (M, 3, S, S)
    x = torch.where(flip, x.flip(-1), x)
    x = jitter_colours(x, views.jitter, views.order)
    x = torch.where(grey, TF.rgb_to_grayscale(x), x)
    x = blur(x, views.sigma, radius=min(math.ceil(3 * max_sigma), x.shape[-1] - 1))
    x = torch.where(solarise & (x >= 0.5), 1 - x, x)
    return normalise(x).unflatten(0, (v, B))

def jitter_colours(x, factors, order):
    """Brightness, contrast, saturation and hue of x (M, 3, H, W) by factors (M, 4), in each image's order (M, 4)."""
    for op in order.T:                                                                      # (M,) 0, 1, 2 or 3
        factor = factors.gather(1, op[:, None])[:, :, None, None]                           # (M, 1, 1, 1)
        op = op[:, None, None, None]
        grey = TF.rgb_to_grayscale(x)
        # the first three blend the image with something: with black, with its mean grey, with its own grey
        other = torch.where(op == 2, grey, torch.where(op == 1, grey.mean((2, 3), keepdim=True), 0))
        blended = (factor * x + (1 - factor) * other).clamp(0, 1)
        x = torch.where(op == 3, shift_hue(x, factors[:, 3]), blended)
    return x

def shift_hue(x, shift):
    """Rotate the hue of x (M, 3, H, W) in [0, 1] by shift (M,), in full circles: RGB -> HSV -> RGB."""
    value = x.amax(1)                                                                       # (M, H, W)
    chroma = value - x.amin(1)
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    # the hue in sixths of a circle: red is 0, green 2, blue 4
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift[:, None, None]
    # back to RGB: k is the hue, shifted so that each channel has its maximum, value, from k = 4 to 6 and its minimum,
    # value - chroma, from k = 1 to 3, with linear ramps between them
    k = torch.stack([hue + 5, hue + 3, hue + 1], 1) % 6                                     # (M, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)

def blur(x, sigma, radius):
    """Gaussian blur of x (M, 3, H, W) with a sigma (M,) per image: a convolution along rows, one along columns."""
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2, dim=1)      # (M, taps)
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]                                  # (3M, 1, 1, taps)
    padded = F.pad(x.flatten(0, 1)[None], [radius] * 4, "reflect")                          # (1, 3M, H + 2r, W + 2r)
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel)).view_as(x)

PIXEL_MEAN = (0.485, 0.456, 0.406)      # of ImageNet, red, green, blue
PIXEL_STD = (0.229, 0.224, 0.225)

def normalise(x):
    """x (M, 3, H, W) in [0, 1] -> zero mean and unit variance over ImageNet's pixels."""
    # channel by channel: a tensor of three means would have to be copied to the GPU in each call
    channels = [(x[:, c] - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)]
    return torch.stack(channels, 1)

# ------------------------------------------------------------------------------------------------ backbones

def stride_of(arch, patch_size):
    """Side of a patch, pixels."""
    if arch.startswith("vit"):
        return patch_size
    return 8 if arch == "conv_tiny" else 32

class SwinAttention(ShiftedWindowAttention):
    """Shifts its window also on grids that are not larger than the window, as the official Swin does (and torchvision's
    does not). This matters for local views: at 96 px the third stage has 6 x 6 patches and windows of 7 x 7."""

    def forward(self, x):                                                                   # (M, rows, cols, C)
        rows, cols = x.shape[1:3]
        window, shift = self.window_size[0], self.shift_size[0]
        if shift == 0 or max(rows, cols) > window:
            return super().forward(x)
        x = F.pad(x, (0, 0, 0, window - cols, 0, window - rows)).roll((-shift, -shift), (1, 2))
        # after the shift, patches from opposite ends of the view lie side by side: they must not attend to each other
        wrapped = torch.arange(window, device=x.device) >= window - shift
        region = (2 * wrapped[:, None] + wrapped).flatten()                                 # 0..3 for each patch
        mask = -100.0 * (region[:, None] != region)
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.get_relative_position_bias() + mask                                     # (1, heads, N, N)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2)
        x = self.proj(x).unflatten(1, (window, window)).roll((shift, shift), (1, 2))
        return x[:, :rows, :cols]

class Backbone(nn.Module):
    """torchvision's `arch` without its classifier (conv_tiny: five convolutions). forward: x (M, 3, H, W) -> image
    (M, C), the class token of a ViT or else the mean of the patches; patches (M, N, C)."""

    def __init__(self, arch, image_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        self.arch, self.patch_size = arch, patch_size
        if arch == "conv_tiny":
            self.width = 128
            self.net = nn.Sequential()
            for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1)):
                conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
                self.net.extend([conv, nn.BatchNorm2d(after), nn.ReLU()])
        elif arch.startswith("vit"):
            self.width, heads = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}[arch]
            self.net = torchvision.models.VisionTransformer(image_size, patch_size, 12, heads, self.width,
                                                            4 * self.width)
            self.net.heads = nn.Identity()
            self.init_vit()
        elif arch.startswith("swin"):
            self.net = getattr(torchvision.models, arch)(
                block=functools.partial(SwinTransformerBlock, attn_layer=SwinAttention),
                norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))           # official; torchvision's has 1e-5
            self.width = self.net.head.in_features
            self.net.head = nn.Identity()
            for block in self.net.features[7]:                                  # official: no shift in the last stage
                block.attn.shift_size = [0, 0]
        else:
            self.net = torchvision.models.resnet50()
            self.width = self.net.fc.in_features
            self.net.avgpool = self.net.fc = nn.Identity()
        # stochastic depth grows linearly from block to block; `modules` names a module that is in two places once
        depths = [module for module in self.net.modules() if isinstance(module, StochasticDepth)]
        for i, depth in enumerate(depths):
            depth.p = drop_path * i / (len(depths) - 1)

    def init_vit(self):
        """The official initialisation, in place of torchvision's, and stochastic depth in place of its dropout."""
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for parameter in (self.net.class_token, self.net.encoder.pos_embedding):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.net.conv_proj.reset_parameters()                                   # torch's default
        for block in self.net.encoder.layers:
            nn.init.trunc_normal_(block.self_attention.in_proj_weight, std=0.02)
            depth = StochasticDepth(0.0, "row")                                 # one module, of one rate, for both:
            block.dropout = depth                                               # the end of the attention branch
            block.mlp[4] = depth                                                # the end of the MLP branch

    def forward(self, x):
        net = self.net
        if self.arch.startswith("vit"):
            x = net.conv_proj(x)                                                            # (M, C, rows, cols)
            position = self.position_embedding(*x.shape[2:])                                # (1, 1 + N, C)
            x = torch.cat([net.class_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + position
            x = net.encoder.ln(net.encoder.layers(x))                                       # (M, 1 + N, C)
            return x[:, 0], x[:, 1:]
        if self.arch.startswith("swin"):
            patches = net.norm(net.features(x)).flatten(1, 2)                               # (M, N, C)
        else:
            for layer in net.children():        # torchvision's ResNet makes its layers in the order of its forward pass
                x = layer(x)                                                                # (M, C, rows, cols)
            patches = x.flatten(2).mT
        return patches.mean(1), patches

    def position_embedding(self, rows, cols):
        """The ViT's position embedding (1, 1 + N, C), its grid resized to rows x cols."""
        embedding = self.net.encoder.pos_embedding
        side = math.isqrt(embedding.shape[1] - 1)
        if (rows, cols) == (side, side):
            return embedding
        grid = embedding[:, 1:].mT.unflatten(2, (side, side))                               # (1, C, side, side)
        grid = F.interpolate(grid.float(), size=(rows, cols), mode="bicubic")               # as the official code
        return torch.cat([embedding[:, :1], grid.flatten(2).mT.to(embedding.dtype)], 1)

# ------------------------------------------------------------------------------------------------ images

IMAGE_SUFFIXES = tuple(b".jpg .jpeg .png .webp .bmp .gif .ppm .pgm .tif .tiff".split())

def decode(path):
    """An image file -> (3, H, W) uint8 RGB, rotated as its EXIF says. Raises OSError and others."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16 bits: convert("RGB") would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

@dataclass
class Images:
    """A labelled set of images: pixels in memory, or files in a folder.

    File names are one array of bytes: every DataLoader worker would get its own copy of a list of a million str.
    """
    items: np.ndarray                                       # (n, H, W, 3) uint8, or (n,) file names
    labels: np.ndarray                                      # (n,)
    root: str                                               # the folder, or the name of the set
    classes: np.ndarray = None                              # names of the class folders

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        file = os.fsdecode(self.items[i]) if self.items.ndim == 1 else f"image {i}"
        return os.path.join(self.root, file)

    def read(self, i):
        """(3, H, W) uint8. Raises OSError and others if the file cannot be read or is not an image."""
        return decode(self.name(i)) if self.items.ndim == 1 else torch.from_numpy(self.items[i]).permute(2, 0, 1)

def load_images(data, split, fraction=1.0, must_split=False):
    """The `Images` of --data: a built-in set, or a folder. Of a folder that holds `split`/, only that is used."""
    if data == "shapes":
        n, seed = (2400, 0) if split == "train" else (1200, 1)
        images = Images(*draw_shapes(n, seed), data)
    elif data == "cifar10":
        with blame("--data cifar10: not in ./data, and the download failed"), contextlib.redirect_stdout(sys.stderr):
            found = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        images = Images(found.data, np.array(found.targets), data)
    else:
        images = load_folder(data, split, must_split)
    if fraction < 1:
        rng = np.random.default_rng(0)
        classes = [rng.permutation(np.flatnonzero(images.labels == c)) for c in np.unique(images.labels)]
        keep = np.sort(np.concatenate([c[:math.ceil(fraction * len(c))] for c in classes]))
        images = replace(images, items=images.items[keep], labels=images.labels[keep])
    return images

def load_folder(data, split, must_split):
    """`load_images` for a folder. The label of a file is the first folder of its path. Names with a dot first are
    skipped. Raises BadInput, also where a folder of validation images would be trained on."""
    root = Path(data)
    if not root.is_dir():
        raise BadInput(f"--data {data}: not a folder (unpack archives first), and not {' or '.join(BUILT_IN_SETS)}")
    if (root / split).is_dir():
        root = root / split
    elif must_split:
        raise BadInput(f"--data {data}: must hold train/ and val/, or be one of {', '.join(BUILT_IN_SETS)}")
    names = []
    for folder, folders, files in os.walk(os.fsencode(root), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        names += [os.path.relpath(os.path.join(folder, name), os.fsencode(root)) for name in files
                  if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(b".")]
        mixed = {b"train", b"val", b"valid", b"validation", b"test"} & {name.lower() for name in folders}
        if split == "train" and root.name != "train" and mixed:
            raise BadInput(f"--data {data}: would also train on {os.fsdecode(min(mixed))}/; give a folder that holds "
                           "train/ and val/, or the folder of training images itself")
    if not names:
        raise BadInput(f"--data {data}: no images ({b' '.join(IMAGE_SUFFIXES).decode()}) in it")
    names.sort()
    classes, labels = np.unique([os.path.dirname(name).split(b"/")[0] for name in names], return_inverse=True)
    return Images(np.array(names), labels, str(root), classes)

# the shape that tiles the plane: is the point inside? u and v run from -1 to 1 within one tile
SHAPES = {
    "disks": lambda u, v: np.hypot(u, v) < 0.7,
    "rings": lambda u, v: (np.hypot(u, v) > 0.45) & (np.hypot(u, v) < 0.85),
    "squares": lambda u, v: np.maximum(abs(u), abs(v)) < 0.6,
    "frames": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.68) < 0.18,
    "triangles": lambda u, v: np.maximum(v, 0.87 * abs(u) - v / 2) < 0.45,
    "lattice": lambda u, v: np.minimum(abs(u), abs(v)) < 0.22,
    "rows": lambda u, v: abs(v) < 0.4,
    "columns": lambda u, v: abs(u) < 0.4,
    "crosses": lambda u, v: abs(abs(u) - abs(v)) < 0.25,
    "diamonds": lambda u, v: abs(u) + abs(v) < 0.75,
    "chess": lambda u, v: (u > 0) == (v > 0),
    "zigzags": lambda u, v: abs(v - abs(u) + 0.4) < 0.3,
}

def draw_shapes(n, seed, size=48):
    """The built-in dataset: images (n, size, size, 3) uint8 and labels (n,) of 12 classes.

    The class is the shape that tiles the image. Position, scale, rotation, colours (slow gradients) and which of shape
    and background is lighter are random, so that no single pixel tells the class.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    # colours run between four corners: the share of each corner, (size, size, 4)
    blend = np.stack([y * x, y * (size - x), (size - y) * x, (size - y) * (size - x)], -1) / size ** 2
    images = np.empty((n, size, size, 3), np.uint8)
    labels = np.arange(n) % len(SHAPES)
    for image, label in zip(images, labels):
        pitch, angle, shift = rng.uniform(7, 16), rng.uniform(-0.6, 0.6), rng.uniform(0, 2, 2)
        u = (2 * (x * np.cos(angle) + y * np.sin(angle)) / pitch + shift[0]) % 2 - 1
        v = (2 * (y * np.cos(angle) - x * np.sin(angle)) / pitch + shift[1]) % 2 - 1
        dark = blend @ rng.uniform(0, 0.5, (4, 3))
        light = blend @ rng.uniform(0.5, 1, (4, 3))
        inside = list(SHAPES.values())[label](u, v) ^ (rng.uniform() < 0.5)     # sometimes inverted
        image[:] = (255 * np.where(inside[..., None], light, dark) + rng.normal(0, 12, image.shape)).clip(0, 255)
    return images, labels

class ViewDataset(torch.utils.data.Dataset):
    """(epoch, i) -> `crop_views` of image i, and -1. If image i cannot be read: those of another image, and i.
    The result is a function of seed, epoch and i only, not of the process or of what was drawn before."""

    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.cfg.seed, epoch, i))
        seed = int(rng.integers(2 ** 62))
        unreadable = -1
        for attempt in (i, *rng.integers(len(self.images), size=20).tolist()):
            try:
                image = self.images.read(attempt)
                break
            except Exception:                               # decoders raise all kinds of errors for broken files
                unreadable = i
                image = torch.zeros(3, 64, 64, dtype=torch.uint8)       # the last resort; `train` counts i in any case
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)       # torch.manual_seed would seed a GPU, too
            return crop_views(image, self.cfg), unreadable

def count_steps(images, cfg, world):
    """Steps of an epoch. Raises BadInput for a --batch-size that does not go with the images or the processes."""
    if cfg.batch_size % world:
        raise BadInput(f"--batch-size {cfg.batch_size} cannot be shared equally by {world} processes; the next size "
                       f"that can is {math.ceil(cfg.batch_size / world) * world}")
    if len(images) < cfg.batch_size:
        raise BadInput(f"--batch-size {cfg.batch_size}: {cfg.data} has only {len(images)} images")
    return len(images) // cfg.batch_size

def make_loader(images, cfg, rank, world, steps, steps_per_epoch):
    """Batches of this process for these steps. All processes together get the same images whatever their number."""
    @functools.lru_cache(maxsize=1)                         # drawn in the first step of an epoch, kept for the others
    def order(epoch):
        return np.random.default_rng((cfg.seed, epoch)).permutation(len(images))

    def keys():
        share = cfg.batch_size // world
        for step in steps:
            epoch, position = divmod(step, steps_per_epoch)
            first = position * cfg.batch_size + rank * share
            yield [(epoch, i) for i in order(epoch)[first:first + share].tolist()]

    return torch.utils.data.DataLoader(ViewDataset(images, cfg), batch_sampler=keys(), num_workers=cfg.workers,
                                       pin_memory=cfg.device == "cuda", worker_init_fn=ignore_signals)

def load_batch(batches, device, cfg):
    """The next batch on the device, None after the last. Returns: the augmented views, a list with one (v, B, 3, S, S)
    per size; boxes (V, B, 5); the indices of images that could not be read; the seconds waited for the DataLoader."""
    began = time.perf_counter()
    views, unreadable = next(batches, (None, None))
    waited = time.perf_counter() - began
    if views is None:
        return None
    views = [Views(*(field.to(device, non_blocking=True) for field in part)) for part in views]
    boxes = torch.cat([part.boxes for part in views], 1).transpose(0, 1)
    unreadable = [i for i in unreadable.tolist() if i >= 0]
    return [augment(part, cfg.blur_sigma[1]) for part in views], boxes, unreadable, waited

# ------------------------------------------------------------------------------------------------ weights of others

def load_file(path, flag):
    """A checkpoint as data: no code in it is run. Raises BadInput for a file that is not a complete checkpoint."""
    if not Path(path).exists():
        raise BadInput(f"{flag} {path}: file not found")
    content = None
    safe_globals = torch.serialization.safe_globals([argparse.Namespace])       # in the official checkpoints
    with contextlib.suppress(Exception), safe_globals:      # torch raises many kinds for a foreign file
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise BadInput(f"{flag} {path}: damaged, not a checkpoint, or one that would run code when loaded")
    return content

def load_backbone(path, weights="teacher", flag="--checkpoint", content=None):
    """File (or its content, if it is loaded already) -> (backbone, image size, options of its run or {}). Raises
    BadInput naming `flag` if a key does not fit."""
    state = content or load_file(path, flag)
    options = state.get("options", {})
    for key in (weights, "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadInput(f"{flag} {path}: holds no state dict of a network")
    state = plain_keys(state)
    arch, patch_size, image_size = guess_arch(state)
    if arch is None:
        raise BadInput(f"{flag} {path}: no --arch of gld.py has keys like {', '.join(list(state)[:3])}")
    backbone = Backbone(arch, image_size, patch_size)
    with blame(f"{flag} {path} as {arch}"):
        backbone.net.load_state_dict(state)
    return backbone.eval(), options.get("global_size", image_size), options

# Parts of the keys in other people's checkpoints, and in torchvision's networks
MLP_KEYS = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
SWIN_KEYS = MLP_KEYS | {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2"}
VIT_KEYS = MLP_KEYS | {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "norm.": "encoder.ln.",
                       "norm1": "ln_1", "norm2": "ln_2", "patch_embed.proj": "conv_proj",
                       "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
                       "blocks.": "encoder.layers.encoder_layer_"}

def plain_keys(state):
    """Keys of torchvision's network without heads, from those of gld.py, torchvision, an official Swin, a DINO ViT."""
    state = {re.sub(r"^(module\.|backbone\.|net\.)+", "", key): value for key, value in state.items()}
    renames = VIT_KEYS if "cls_token" in state else SWIN_KEYS
    out = {}
    for key, value in state.items():
        for theirs, ours in renames.items():
            key = key.replace(theirs, ours)
        # an official Swin counts blocks and downsampling of a stage as one; torchvision's `features` counts each
        key = re.sub(r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
        if key.endswith("relative_position_index"):
            value = value.flatten()
        if not re.match(r"\w*head|fc\.", key) and not key.endswith("attn_mask"):
            out[key] = value
    return out

def guess_arch(state):
    """(arch, patch size, image size) of plain keys; (None, ...) if they belong to no network of gld.py."""
    if "conv_proj.weight" in state and "encoder.pos_embedding" in state:
        width, patch = state["conv_proj.weight"].shape[0], state["conv_proj.weight"].shape[-1]
        side = round((state["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
        return {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(width), patch, side * patch
    if "features.0.0.weight" in state:
        if len(state["features.0.0.weight"]) == 128:
            return "swin_b", 16, 224
        deep = any(key.startswith("features.5.17.") for key in state)           # the third stage has 18 blocks, not 6
        return "swin_s" if deep else "swin_t", 16, 224
    if "layer4.2.conv3.weight" in state:
        return "resnet50", 16, 224
    return "conv_tiny" if "12.weight" in state else None, 16, 32

def initialise(cfg, student, teacher):
    """--init-from: both backbones from any file that eval_knn.py reads, strictly; the heads only from a checkpoint of
    gld.py, if they fit. Returns: what was loaded, for the log. Raises BadInput."""
    content = load_file(cfg.init_from, "--init-from")
    for name, network in (("student", student), ("teacher", teacher)):
        weights = name if content.get(name) else "teacher"
        backbone, *_ = load_backbone(cfg.init_from, weights, "--init-from", content)
        state = backbone.net.state_dict()
        if "encoder.pos_embedding" in state:
            state["encoder.pos_embedding"] = backbone.position_embedding(*cfg.grids[0])
        with blame(f"--init-from {cfg.init_from}: a {backbone.arch} does not fit --arch {cfg.arch} or --patch-size"):
            network.backbone.net.load_state_dict(state)
        heads = {key: x for key, x in content.get(name, {}).items() if "_head." in key}
        shapes = {key: x.shape for key, x in network.state_dict().items() if "_head." in key}
        fit = shapes == {key: x.shape for key, x in heads.items()}
        if fit:
            network.load_state_dict(heads, strict=False)
    return f", weights from {cfg.init_from} ({'with its heads' if fit else 'new heads'})"

# ------------------------------------------------------------------------------------------------ checkpoints

def settings(cfg):
    """What a resumed run, and every process of a run, must have in common."""
    return {name: getattr(cfg, name) for name in ("images", "preset", *(option.name for option in RESULT_OPTIONS))}

def resume(cfg, state):
    """Load OUTPUT/checkpoint.pt into `state`, if it exists. Returns: the first step to do. Raises BadInput if its run
    had other settings."""
    path = Path(cfg.output, "checkpoint.pt")
    if not cfg.resume or not path.exists():
        return 0
    content = load_file(path, "--output")
    before = content.get("options", {})
    new_run = "to start a new run, give another --output or --no-resume"
    for name, value in settings(cfg).items():
        if before.get(name) != value and name == "images":
            raise BadInput(f"--data {cfg.data}: not the images of {path} ({before.get('data')}); {new_run}")
        if before.get(name) != value:
            raise BadInput(f"--{name.replace('_', '-')}: {value} here, but {path} was made with {before.get(name)}; "
                           f"{new_run}, and --init-from {path} to start from its weights")
    with blame(f"--output {path}: was not written by this gld.py"):
        for name, part in state.items():
            if name == "centers":
                part.copy_(content[name])
            elif content[name]:                             # the gradient scaler has no state unless fp16 is used
                part.load_state_dict(content[name])
        return content["step"]

def save(cfg, state, step):
    """Process 0 writes checkpoint.pt and backbone.pt. Returns, on all processes: whether that worked. The others wait:
    torchrun ends all when the first one ends with an error."""
    failed = torch.zeros(1, device=state["centers"].device)
    if os.environ.get("RANK", "0") == "0":
        content = {name: part if name == "centers" else part.state_dict() for name, part in state.items()}
        options = {name: value for name, value in vars(cfg).items() if name != "grids"}         # those follow
        content |= dict(step=step, options=options)
        backbone = {name: x.cpu() for name, x in state["teacher"].backbone.net.state_dict().items()}
        try:
            replace_file(Path(cfg.output, "checkpoint.pt"), functools.partial(torch.save, content))
            replace_file(Path(cfg.output, "backbone.pt"), functools.partial(torch.save, backbone))
        except (OSError, RuntimeError) as error:            # torch reports a full disk by a RuntimeError
            say(f"gld.py: cannot write {cfg.output}/ at step {step} ({one_line(error)}); the last checkpoint is kept",
                file=sys.stderr)
            failed += 1
    return not all_mean(failed).item()

def replace_file(path, write):
    """Replace a file by what write(file) writes, but only when that is complete and on disk. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

# ------------------------------------------------------------------------------------------------ k-NN evaluation

KNN_BYTES = 2 ** 28                     # of similarities at a time, so that memory does not grow with the test set

def center_crops(images, size, indices):
    """Images -> (n, 3, size, size) uint8. If one is broken: the message (a str), as a worker cannot raise BadInput."""
    crops = []
    for i in indices:
        try:
            image = images.read(i)
        except Exception as error:          # decoders raise all kinds of errors for broken files
            return f"--data: {images.name(i)} cannot be read: {one_line(error)}"
        image = TF.resize(image, [round(size * 256 / 224)], TF.InterpolationMode.BICUBIC, antialias=True)
        crops.append(TF.center_crop(image, [size, size]))
    return torch.stack(crops)

@torch.no_grad()
def extract(network, images, size, cfg, device, rank, world):
    """Features (n, C) float16, unit length, of all images, on every process; `network`: (M, 3, H, W) -> (M, C)."""
    rows_each = math.ceil(len(images) / world)
    mine = [(rank + world * i) % len(images) for i in range(rows_each)]         # the last may be a repeat
    loader = torch.utils.data.DataLoader(mine, cfg.batch_size, num_workers=cfg.workers, worker_init_fn=ignore_signals,
                                         collate_fn=functools.partial(center_crops, images, size))
    rows = []
    for x in loader:
        if isinstance(x, str):
            raise BadInput(x, "only here")
        rows.append(F.normalize(network(normalise(x.to(device).float() / 255)).float(), dim=1).half())
    rows = torch.cat(rows)
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows)
    return torch.stack(parts, 1).flatten(0, 1)[:len(images)]

def knn(train, train_labels, val, val_labels, ks, temperature):
    """{k: (top-1, top-5)} in percent, of k-NN on unit features (n, C): votes weigh exp(similarity / temperature)."""
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    hits = {k: torch.zeros(2, device=train.device) for k in ks}
    rows = max(1, KNN_BYTES // (4 * len(train)))
    bank = train.float().T                  # products of float16 would round to a few values, and rank by chance
    for chunk, labels in zip(val.split(rows), val_labels.split(rows)):
        similarity, nearest = (chunk.float() @ bank).topk(min(max(ks), len(train)), dim=1)          # (rows, k)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()     # a common factor, so that none overflows
        for k in ks:
            votes = torch.zeros(len(chunk), classes, device=train.device)
            votes.scatter_add_(1, train_labels[nearest[:, :k]], weight[:, :k])
            got, best = votes.topk(min(5, classes), dim=1)
            right = (best == labels[:, None]) & (got > 0)                   # a class without a vote is no answer
            hits[k] += torch.stack([right[:, 0].sum(), right.sum()])
    return {k: tuple((100 * h / len(val)).tolist()) for k, h in hits.items()}

def labelled(data, fraction):
    """Training and validation `Images` of --data, with labels numbered alike. Raises BadInput."""
    train = load_images(data, "train", fraction, must_split=True)
    val = load_images(data, "val", must_split=True)
    if train.classes is None:               # a built-in set
        return train, val
    unknown = [os.fsdecode(name) for name in val.classes if name not in train.classes]
    if unknown:                             # images of such a class would silently count as wrong
        places = ", ".join(f"val/{name}/" if name else "val/ itself" for name in unknown[:3])
        raise BadInput(f"--data {data}: train/ has no class for the images in {places}; name the folders of val/ as "
                       "those of train/ (A is not a)")
    if len(train.classes) < 2:
        raise BadInput(f"--data {data}: k-NN needs labels, that is class folders in train/ and val/")
    number_in_train = np.searchsorted(train.classes, val.classes)
    return train, replace(val, labels=number_in_train[val.labels])

def top1_of_20nn(backbone, parts, cfg, device, rank, world):
    """20-NN top-1 accuracy in percent, while training, of `labelled` images; None on all processes but the first."""
    backbone.eval()
    train, val = (extract(lambda x: backbone(x)[0], images, cfg.global_size, cfg, device, rank, world)
                  for images in parts)
    backbone.train()
    if rank != 0:
        return None
    train_labels, val_labels = (torch.as_tensor(images.labels, device=device) for images in parts)
    return knn(train, train_labels, val, val_labels, [20], 0.07)[20][0]

# ------------------------------------------------------------------------------------------------ log

def say(message, everywhere=False, file=None):
    """Print a line, on process 0 only unless `everywhere`. If nobody reads any more, that does not end the run."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        try:
            print(message, file=file, flush=True)
        except OSError:                                     # what is buffered would make Python's exit fail, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())

@torch.no_grad()
def diagnose(teacher, center, boxes, teacher_temp, cfg):
    """Measures of the last batch of this process that tell a healthy run from a collapsed one."""
    log_p = F.log_softmax((teacher.image_z @ teacher.image_weight.T - center) / teacher_temp, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    spread = 1 - teacher.image_z.mean((0, 1, 2)).square().sum().item()          # variance of z; 0 if all are the same
    matched = float(cfg.matching == "similarity")           # the share of patches that are not masked,
    if cfg.matching == "geometric":                         # of each global view in the other
        weight = geometric_matches(boxes[:2], boxes[:2].flip(0), cfg.grids[0], cfg.grids[0], cfg.hinge)[1]
        matched = weight.mean().item()
    return dict(matched=matched, entropy=entropy, center_norm=center.norm().item(), spread=spread)

def looks_collapsed(record, cfg):
    """At the start, all outputs may be alike; later, they must neither be uniform, nor sure, nor all the same."""
    share = record["entropy"] / math.log(cfg.out_dim)       # of the largest possible
    return record["epoch"] >= cfg.warmup_epochs and not (0.01 <= share <= 0.99 and record["spread"] > 1e-3)

class Log:
    """The sums over an epoch, and log.jsonl: one record per epoch, without those of steps that are done again."""

    def __init__(self, cfg, start):
        self.cfg, self.path = cfg, Path(cfg.output, "log.jsonl")
        self.sums, self.reported = Counter(), time.perf_counter()
        with blame(f"--output {cfg.output}"):
            os.makedirs(cfg.output, exist_ok=True)
            lines = self.path.read_text().splitlines(True) if self.path.exists() else []
            self.lines = [line for line in lines if json.loads(line)["step"] <= start]

    def report(self, record, steps_left, ended):
        """Add the means over the epoch so far to a record, and print it. If epoch or run has ended: write it, too."""
        self.reported = time.perf_counter()
        mean = {name: total / self.sums["steps"] for name, total in self.sums.items()}
        record |= {name: mean[name] for name in ("loss_image", "loss_patch", "grad_norm")}
        record |= dict(images_per_second=self.cfg.batch_size / mean["seconds"], unreadable=self.sums["unreadable"],
                       waiting=mean["waiting"] / mean["seconds"], gpu_gib=torch.cuda.max_memory_allocated() / 2 ** 30)
        left = timedelta(seconds=int(steps_left * mean["seconds"]))
        knn_text = f"20-NN {record['knn']:.1f} %, " if record.get("knn") is not None else ""
        say("epoch {epoch} step {step} | loss image {loss_image:.3f} patch {loss_patch:.3f} matched {matched:.0%} "
            "entropy {entropy:.2f} lr {lr:.1e} | {knn_text}{images_per_second:.0f} images/s, {waiting:.0%} waiting "
            "for data, GPU {gpu_gib:.1f} GiB, {left} left".format(**record, knn_text=knn_text, left=left))
        if not ended:
            return
        if looks_collapsed(record, self.cfg):
            say(f"WARNING: looks collapsed: the teacher's entropy is {record['entropy']:.2f} (ln K = "
                f"{math.log(self.cfg.out_dim):.2f}), the variance of z {record['spread']:.4f}; try a lower --lr, or a "
                "smaller --batch-size")
        self.sums.clear()
        self.lines.append(json.dumps(record) + "\n")
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):              # the disk may be full: `save` says so
                replace_file(self.path, lambda file: file.write("".join(self.lines).encode()))

# ------------------------------------------------------------------------------------------------ processes

def join_processes(cfg):
    """Join the other processes of torchrun, if there are any. Returns: rank, number of processes, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(cfg.device)
    if cfg.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return rank, world, device

def all_mean(x):
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def require_equal(value, problem, device):
    """Raises BadInput in all processes if one has another value: they would wait for each other without end. (Each node
    gets its own command, and may have its own files.)"""
    checksum = zlib.crc32(json.dumps(value).encode())
    if all_mean(torch.tensor(checksum, dtype=torch.float64, device=device)).item() != checksum:
        raise BadInput(f"the processes {problem}")

def catch_signals(world):
    """From now on, SIGTERM, SIGHUP and Ctrl-C ask for a stop after the current step. Returns: a list, empty until one
    comes. The next one ends the program at once, but not under torchrun, which passes each Ctrl-C on a second time."""
    received = []

    def request(number, frame):
        received.append(number)
        if world == 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(OSError):              # print is not safe in a signal handler
                os.write(2, b"stopping after this step; Ctrl-C again quits now\n")

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:   # nohup ignores it
        signal.signal(signal.SIGHUP, request)
    return received

def ignore_signals(worker):
    """In a DataLoader worker: leave the main process's group, so that a signal to the group (Ctrl-C, a closed terminal,
    torchrun's SIGTERM) is for the main process alone, which needs this worker until the end of the step."""
    os.setpgid(0, 0)

# ------------------------------------------------------------------------------------------------ errors, main

class BadInput(Exception):
    """What the user has to change, in one line. A second argument: only this process knows of it."""

def one_line(error):
    return " ".join(str(error).split())[:300]

@contextlib.contextmanager
def blame(what):
    """Any error in this block becomes a BadInput that begins with `what`, the flag or file at fault."""
    try:
        yield
    except Exception as error:                              # decoders and torch.load raise all kinds
        raise BadInput(f"{what}: {one_line(error)}") from None

class Parser(argparse.ArgumentParser):
    def error(self, message):                               # one line, without the usage of all flags
        raise BadInput(message)

def run_script(script, work):
    """Exit code of work(), or of what ended it in one line. Other errors are not the user's: they get a traceback."""
    if sys.stdout and sys.stdout is sys.__stdout__:         # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")   # a file's name may be no text
    try:
        code = work()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except BadInput as error:
        message, *only_here = error.args                    # else all processes meet it: say it once per node
        if only_here or os.environ.get("LOCAL_RANK", "0") == "0":
            say(f"{script}: error: {message}", everywhere=True, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"{script}: interrupted", everywhere=True, file=sys.stderr)
        return 130

def main(argv=None):
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped on request after saving, 130 interrupted."""
    return run_script("gld.py", lambda: train(parse_arguments(argv)))

if __name__ == "__main__":
    sys.exit(main())
