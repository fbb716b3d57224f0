# SPDX-License-Identifier: MIT
"""Global-Local Self-Distillation (GLSD, WACV 2023): views, networks, loss and training.

    python gld.py                                                             # the built-in dataset: 1-2 minutes
    python eval_knn.py                                                        # how good are the features?
    python gld.py --data PATH/TO/IMAGES --arch vit_small --batch-size 64      # your images, one GPU
    torchrun --nproc_per_node=8 gld.py --matching geometric --data IMAGENET   # the paper (geometric is the default)

A student network learns without labels from a teacher network. The teacher's weights are an exponential moving average
(EMA) of the student's. Both see views (random crops) of an image. The student sees all V views: 2 large ones, called
global, and L small ones, called local. The teacher sees the Q = 2 global views only. From one view, the student learns
to predict the teacher's output for another view of the same image. The image loss does this for whole views, as in
DINO. The patch loss does it for patches: from a patch of its view, the student learns to predict the teacher's output
for the matching patch of the other view. Which patch matches? `--matching` says it:

    geometric     the patch that shows the same place of the image: what GLSD proposes
    similarity    the patch with the most similar features: what EsViT proposed before
    none          there is no patch loss: DINO

A patch is a token of a ViT, or a cell of the last feature map of another backbone. Letters in shapes:

    B    images of one step in one process           N    patches of a view, row by row; Ns, Nt: of student, teacher
    V    student views, the 2 global ones first      C    width of the backbone's features
    Q    teacher views: the 2 global ones            D    width of z, the output of a head's MLP
    G    views of one size: 2 global or L local      K    logits that a head's last layer makes of z: "prototypes"
    box  where a view was cropped: (top, left, height, width, flip), pixels of the original image; flip is 0 or 1
    S    side of a view, pixels                      grid   rows and columns of its patches (swin_t: 7 x 7 or 3 x 3)

Hyperparameters of --preset small (the default for built-in datasets) and of --preset paper (the default for a folder).
Batch size: of all processes together. The learning rate is lr * batch size / 256. `--help` shows all options.

    --arch                conv_tiny    swin_t
    --global-size         32           224
    --local-size          16           96
    --local-views         4            8
    --out-dim             256          65536
    --epochs              10           300
    --batch-size          32           256
    --lr                  0.016        0.0005
    --teacher-momentum    0.99         0.996
    --teacher-temp        0.04         0.07

Part I is the paper: read it from top to bottom. Part II is what it calls. matching_kernels.py computes the loss fast.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from numpy.random import default_rng
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.models.swin_transformer import (ShiftedWindowAttention, SwinTransformerBlock,
                                                 shifted_window_attention)
from torchvision.ops import StochasticDepth
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from matching_kernels import geometric_matches, head_cross_entropy, similarity_matches

STUDENT_TEMP = 0.1
CENTER_MOMENTUM = 0.9                   # of the running mean of the teacher's logits, the center
MAX_OVERFLOWS = 20                      # steps in a row in which float16 gradients may overflow

# ==================================================================================== part I: the paper starts here
# ------------------------------------------------------------------------------------------------ views and boxes

class Views(NamedTuple):
    """The G views of one size of one image, and how to flip and augment them. `load_batch` does that for a batch: it
    gives pixels (G, B, 3, S, S) for each of the two sizes, and the boxes (V, B, 5) of both together."""
    crops: torch.Tensor             # (G, 3, S, S) uint8, cropped and resized, not yet flipped or augmented
    boxes: torch.Tensor             # (G, 5) top, left, height, width, flip
    jitter: torch.Tensor            # (G, 4) factors of brightness, contrast, saturation (1: no change), hue shift (0)
    order: torch.Tensor             # (G, 4) the order of these four operations, a permutation of 0..3
    grey: torch.Tensor              # (G,) True: convert to greyscale
    sigma: torch.Tensor             # (G,) of the Gaussian blur, pixels; 0: no blur
    solarise: torch.Tensor          # (G,) True: invert the pixels above one half

def crop_views(image, cfg):
    """One image (3, height, width) uint8 -> a list: its global `Views` and, if there are any, its local `Views`."""
    draw_global = partial(draw_view, image, cfg.global_size, cfg.global_scale, cfg.blur_sigma)
    draw_local = partial(draw_view, image, cfg.local_size, cfg.local_scale, cfg.blur_sigma)
    global_views = [draw_global(blur_p=1.0, solarise_p=0.0), draw_global(blur_p=0.1, solarise_p=0.2)]
    local_views = [draw_local(blur_p=0.5, solarise_p=0.0) for _ in range(cfg.local_views)]
    return [stack_views(views) for views in (global_views, local_views) if views]

def stack_views(views):
    """A list of single views -> one `Views`, field by field."""
    return Views(*(torch.stack(field) for field in zip(*views)))

def draw_view(image, size, scale, blur_sigma, blur_p, solarise_p):
    """One view with DINO's random parameters: a `Views` without the axis G. blur_p, solarise_p: probabilities. (The
    dataset seeds torch's generator before.)"""
    flip_u, jitter_u, grey_u, sigma_u, blur_u, solarise_u = torch.rand(6).tolist()          # uniform in [0, 1)
    box = RandomResizedCrop.get_params(image, scale, ratio=(3 / 4, 4 / 3))                  # top, left, height, width
    order, *factors = ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * sigma_u
    return Views(
        crops=TF.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True),
        boxes=torch.tensor([*box, float(flip_u < 0.5)]),
        jitter=torch.tensor(factors if jitter_u < 0.8 else [1.0, 1.0, 1.0, 0.0]),
        order=order,
        grey=torch.tensor(grey_u < 0.2),
        sigma=torch.tensor(sigma if blur_u < blur_p else 0.0),
        solarise=torch.tensor(solarise_u < solarise_p))

# ------------------------------------------------------------------------------------------------ networks

class Head(nn.Module):
    """An MLP to unit vectors z, and a last layer without bias: the logits are z @ weight().T. forward returns z. The
    loss computes the logits, for a few images at a time: those of all patches would take gigabytes (K = 65536)."""

    def __init__(self, width, cfg):
        super().__init__()
        hidden = cfg.head_hidden
        D = cfg.head_bottleneck
        K = cfg.out_dim
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, D))
        self.direction = nn.Parameter(torch.empty(K, D).uniform_(-1, 1) / D ** 0.5)
        self.gain = nn.Parameter(torch.ones(K, 1), requires_grad=not cfg.norm_last_layer)       # fixed, or learned
        for layer in self.mlp[::2]:                                             # the linear ones
            nn.init.trunc_normal_(layer.weight, std=0.02 * (2048 / hidden) ** 0.5)      # DINO: 2048 and 0.02
            nn.init.zeros_(layer.bias)

    def weight(self):
        """(K, D). Weight normalisation: the direction of each row and its length, the gain, are separate parameters."""
        return self.gain * F.normalize(self.direction, dim=-1)

    def forward(self, x):                                                       # (..., C) -> (..., D)
        return F.normalize(self.mlp(x).float(), dim=-1)

class Outputs(NamedTuple):
    """What the loss needs of a network. N depends on the size of the views: hence the lists, of one tensor for each
    size. (The teacher sees one size only, and Q views in place of V.)"""
    image_z: torch.Tensor           # (V, B, 1, D) of the image head: a whole view counts as one patch
    patch_z: list                   # (G, B, N, D) of the patch head
    features: list                  # (G, B, N, C), the backbone's patch features
    image_weight: torch.Tensor      # (K, D) last layer of the image head
    patch_weight: torch.Tensor      # (K, D) last layer of the patch head, or None

class Network(nn.Module):
    """Backbone, image head and, unless matching is none, patch head. The student is one Network, the teacher another.
    drop_path: the rate of stochastic depth (the teacher's is 0)."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)      # a torchvision network
        self.image_head = Head(self.backbone.width, cfg)
        self.patch_head = Head(self.backbone.width, cfg) if cfg.matching != "none" else None

    def forward(self, pixels):
        """pixels: a list with one tensor (G, B, 3, S, S) for each size of view, the global ones first."""
        image_z, patch_z, features = [], [], []
        for x in pixels:
            # the backbone gives features of the image (a ViT's class token, else the mean of its patches) and patches
            image, patches = self.backbone(x.flatten(0, 1))                                 # (G * B, C), (G * B, N, C)
            image = image.unflatten(0, x.shape[:2])                                         # (G, B, C)
            patches = patches.unflatten(0, x.shape[:2])                                     # (G, B, N, C)
            image_z.append(self.image_head(image[:, :, None]))                              # (G, B, 1, D)
            if self.patch_head is not None:
                patch_z.append(self.patch_head(patches))                                    # (G, B, N, D)
                features.append(patches.detach())
        patch_weight = self.patch_head.weight() if self.patch_head is not None else None
        return Outputs(torch.cat(image_z), patch_z, features, self.image_head.weight(), patch_weight)

# ------------------------------------------------------------------------------------------------ the loss
# First its definition, in plain steps. Training does not call it: the tests compare the fast loss below with it.

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
    """Geometric matching. For each student patch: the index of the nearest teacher patch, and a weight: 1 if their
    distance is less than half the diagonal of the larger patch, else 0, since the teacher does not see this place.
    ("Hinge" is the official code's name for this rule of the paper. Without it, every weight is 1.)"""
    distance = torch.cdist(patch_midpoints(student_box, student_grid), patch_midpoints(teacher_box, teacher_grid))
    nearest_distance, match = distance.min(dim=1)                                           # (Ns,) each
    diagonals = [torch.hypot(box[2] / rows, box[3] / cols)                                  # of one patch
                 for box, (rows, cols) in ((student_box, student_grid), (teacher_box, teacher_grid))]
    weight = torch.ones_like(nearest_distance)
    if hinge:
        weight[nearest_distance >= max(diagonals) / 2] = 0
    return match, weight

def patch_loss_definition(student_logits, teacher_logits, center, boxes, view_grids, teacher_temp, hinge=True):
    """The patch loss with geometric matching. The logits: lists of V and of Q tensors (B, N, K). center: (K,).
    boxes: (V, B, 5). view_grids: a list of V pairs (rows, cols).

    The center is a running mean of the teacher's logits; `train` updates it in each step. Without it, the networks
    could collapse to one prototype for every image. The low teacher temperature prevents the other collapse, to equal
    probabilities of all prototypes.
    """
    # all pairs of a teacher view q and another view v; the first Q views of the student are those of the teacher
    pairs = [(q, v) for q in range(len(teacher_logits)) for v in range(len(student_logits)) if v != q]
    losses = []
    for q, v in pairs:
        target = F.softmax((teacher_logits[q] - center) / teacher_temp, dim=-1)             # (B, Nt, K)
        log_p = F.log_softmax(student_logits[v] / STUDENT_TEMP, dim=-1)                     # (B, Ns, K)
        for b in range(len(target)):
            match, weight = nearest_patches(boxes[v, b], boxes[q, b], view_grids[v], view_grids[q], hinge)
            cross_entropy = -(target[b, match] * log_p[b]).sum(dim=-1)                      # (Ns,)
            losses.append((weight * cross_entropy).mean())          # patches of weight 0 add nothing, but count
    return sum(losses) / len(losses)

def distillation_loss(student, teacher, centers, boxes, grids, *, teacher_temp, matching, hinge=True, impl="auto"):
    """The loss of the paper, a pure function. Returns: loss, image_loss, patch_loss.

    patch_loss is `patch_loss_definition`. With similarity matching, the match of a student patch is instead the teacher
    patch whose backbone features have the largest cosine with its own, and every weight is 1. image_loss is the same
    for whole views: each counts as one patch, of weight 1. loss is the mean of both; with matching none, image_loss.

    `head_cross_entropy` computes, fast, a mean over images and patches for each pair of views, adds them up, and never
    holds all logits in memory. It gets the last layers, and z: a tensor, or a list with one for each size of view. It
    gets the matches as `index` (similarity), finds them from boxes and grids (geometric), or needs none (image loss).
    Args:
        student, teacher: `Outputs` for all V views, and for the Q = 2 global ones.
        centers: (2, K), of the image head and of the patch head. With matching none: (1, K).
        boxes: (V, B, 5). grids: (rows, cols) of the patches for each size of view: one or two pairs.
        impl: "triton", "torch" or "auto", see matching_kernels.py.
    """
    Q = len(teacher.image_z)
    V = len(student.image_z)
    n_pairs = Q * (V - 1)
    common = dict(student_temp=STUDENT_TEMP, teacher_temp=teacher_temp, impl=impl, skip_same_view=True)
    image_loss = head_cross_entropy(student.image_z, student.image_weight, teacher.image_z, teacher.image_weight,
                                    centers[0], **common) / n_pairs
    if matching == "none":
        return image_loss, image_loss, torch.zeros_like(image_loss)
    if matching == "geometric":                     # the teacher's views have one size, and so one grid
        match_by = dict(student_boxes=boxes, student_grid=grids, teacher_boxes=boxes[:Q], teacher_grid=grids[0],
                        hinge=hinge)
    else:
        # of each student view (G, 1, B, N, C) with each teacher view (Q, B, N, C): indices (G, Q, B, Ns)
        match_by = dict(index=[similarity_matches(x[:, None], teacher.features[0]) for x in student.features])
    patch_loss = head_cross_entropy(student.patch_z, student.patch_weight, teacher.patch_z[0], teacher.patch_weight,
                                    centers[1], **match_by, **common) / n_pairs
    return (image_loss + patch_loss) / 2, image_loss, patch_loss

@torch.no_grad()
def mean_logits(teacher):
    """(heads, K): the mean of the teacher's logits over views, images and patches. The last layer is linear: so the
    mean of z is taken first, and one vector is multiplied by the weight."""
    means = [teacher.image_weight @ teacher.image_z.mean((0, 1, 2))]
    if teacher.patch_z:
        means.append(teacher.patch_weight @ teacher.patch_z[0].mean((0, 1, 2)))
    return torch.stack(means)

# ------------------------------------------------------------------------------------------------ training

def cosine(value, end, step, steps, warmup=0):
    """A schedule at `step`: linear from 0 to `value` over `warmup` steps, then half a cosine to `end` at `steps`."""
    if step < warmup:
        return value * step / max(1, warmup - 1)            # as in DINO: the warm-up begins at 0, and ends at `value`
    return end + (value - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def teacher_temp_at(epoch, cfg):
    """Linear from --warmup-teacher-temp to --teacher-temp in --warmup-teacher-temp-epochs, then constant."""
    if epoch >= cfg.warmup_teacher_temp_epochs:
        return cfg.teacher_temp
    progress = epoch / max(1, cfg.warmup_teacher_temp_epochs - 1)               # as in `cosine`
    return cfg.warmup_teacher_temp + progress * (cfg.teacher_temp - cfg.warmup_teacher_temp)

@torch.no_grad()
def clip_gradients(grads, limit):
    """Clip the gradient of each parameter separately to a norm of at most `limit`, in place; 0: clip none. The same as
    `clip_grad_norm_` for one parameter after another. Returns: the norm of all gradients together, before clipping."""
    norms = torch.stack(torch._foreach_norm(grads))
    if limit:
        factors = (limit / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(grads, factors.unbind())
    return norms.norm()

def make_state(cfg, device):
    """All that training changes, and that a checkpoint holds, as a dict: the state before the first step."""
    student = Network(cfg, cfg.drop_path).to(device, memory_format=torch.channels_last)
    teacher = Network(cfg).to(device, memory_format=torch.channels_last)
    teacher.load_state_dict(student.state_dict())           # it starts with the student's weights
    teacher.requires_grad_(False)                           # and learns by its moving average alone
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "decay": 1},    # 1-D: biases and norms, no decay
              {"params": [p for p in parameters if p.ndim <= 1], "decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=0, weight_decay=0, fused=True)     # both are set in each step
    # scales the loss up, so that small gradients survive float16; with other dtypes it does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype(cfg) == torch.float16)
    centers = torch.zeros(1 if cfg.matching == "none" else 2, cfg.out_dim, device=device)       # a row for each head
    return dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler, centers=centers)

def train(cfg):
    """Train a student and its teacher; under torchrun, as one of several processes. Returns: the exit code.

    A resumed run ends with the same bits as one that was never stopped (on a CPU, with as many processes and threads).
    For that, random draws do not depend on earlier ones: the order of the images is drawn from seed and epoch, the
    views of an image from seed, epoch and image, stochastic depth from seed, step and process.
    """
    rank, world, device = join_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    check_run(cfg, images, world)                           # all processes must have the same options and images
    steps_per_epoch = len(images) // cfg.batch_size
    steps = cfg.epochs * steps_per_epoch
    stop_at = min(steps, cfg.max_steps or steps)
    dtype = compute_dtype(cfg)                              # for autocast; weights, loss and centers are float32

    torch.manual_seed(cfg.seed)
    state = make_state(cfg, device)
    student, teacher, optimizer, scaler, centers = state.values()
    log = Log(cfg)
    start = resume(cfg, state)                              # loads a checkpoint, in place; returns its step, or 0
    log.drop_after(start)                                   # records of steps that are done again
    labelled_images = labelled(cfg.data, cfg.data_fraction) if cfg.eval_every else None
    run_student = prepare(cfg, student, teacher, world)     # compile both; average gradients over processes (DDP)
    say(describe(cfg, images, steps, start))
    stop_requests = catch_signals(world)                    # a list that is empty until a signal asks to stop
    batches = iter(make_loader(images, cfg, rank, world, range(start, stop_at), steps_per_epoch))
    batch, waited = load_batch(batches, device, cfg)        # waited: seconds, for the log

    for step in range(start, stop_at):
        began = time.perf_counter()
        pixels, boxes, problems = batch                     # problems: images that could not be read
        epoch = step // steps_per_epoch
        lr = cosine(cfg.lr * cfg.batch_size / 256, cfg.min_lr, step, steps, int(cfg.warmup_epochs * steps_per_epoch))
        weight_decay = cosine(cfg.weight_decay, cfg.weight_decay_end, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay * group["decay"]
        momentum = cosine(cfg.teacher_momentum, 1, step, steps)
        teacher_temp = teacher_temp_at(epoch, cfg)
        torch.manual_seed(draw_seed(cfg.seed, step, rank))  # for stochastic depth

        # 1. both networks, one loss; the teacher sees the global views only
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                teacher_out = teacher(pixels[:1])           # a list with the global views alone
            student_out = run_student(pixels)
        loss, image_loss, patch_loss = distillation_loss(
            student_out, teacher_out, centers, boxes, cfg.grids, teacher_temp=teacher_temp, matching=cfg.matching,
            hinge=cfg.hinge, impl=cfg.impl)

        # 2. gradients: backward; freeze the last layers at first, as DINO does; clip, parameter by parameter
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if epoch < cfg.freeze_last_layer:                   # a number of epochs
            for name, p in student.named_parameters():
                if name.endswith(("head.direction", "head.gain")):
                    p.grad = None                           # the optimizer leaves these parameters alone
        scaler.unscale_(optimizer)
        grad_norm = clip_gradients([p.grad for p in student.parameters() if p.grad is not None], cfg.clip_grad)

        # 3. agree with the other processes before anything changes: a NaN or a signal in one of them stops all
        batch_center = all_mean(mean_logits(teacher_out))
        shared = share_values(image_loss, patch_loss, grad_norm, batch_center, problems, stop_requests)  # a number each
        next_batch, waited = load_batch(batches, device, cfg)       # while the GPU is busy; None after the last batch
        values = dict(zip(STEP_VALUES, shared.tolist()))    # this waits for the GPU; of the center, it is the sum
        if log.diverged(values, step, lr, scaler):          # a NaN, or too many float16 overflows in a row
            return 1

        # 4. update: the student; the centers, for the next step; the teacher, towards the student's new weights
        scaler.step(optimizer)                              # skipped if a float16 gradient overflowed
        scaler.update()
        centers.lerp_(batch_center, 1 - CENTER_MOMENTUM)
        with torch.no_grad():
            # parameters, not buffers: each network, in training mode, has its own batch norm statistics (conv_tiny)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

        # 5. log, evaluate, save
        done = step + 1
        epoch_ended = done % steps_per_epoch == 0
        run_ended = done == stop_at
        log.add(values, problems, time.perf_counter() - began, waited, steps_per_epoch * cfg.batch_size)
        if epoch_ended or run_ended or time.perf_counter() - log.reported > 30:
            record = dict(epoch=epoch, step=done, lr=lr)
            record |= diagnose(teacher_out, centers[0], boxes, teacher_temp, cfg)       # signs of a collapse
            if cfg.eval_every and epoch_ended and (epoch + 1) % cfg.eval_every == 0:
                record["knn"] = top1_of_20nn(teacher.backbone, labelled_images, cfg, device, rank, world)
            log.report(record, stop_at - done, epoch_ended or run_ended)
        if values["stop"] or run_ended or (epoch_ended and (epoch + 1) % cfg.save_every == 0):
            if not save(cfg, state, done):
                return 1
        if values["stop"] and not run_ended:
            say(f"stopped on request: saved at step {done}; rerun the same command to resume")
            return STOPPED                                  # an exit code
        batch = next_batch
    say(f"the weights are in {cfg.output}/; next, on labelled images: "
        f"python eval_knn.py --checkpoint {cfg.output}/checkpoint.pt")
    return 0

# ======================================================================================= the paper ends here
# ------------------------------------------------------------------------------------------------ options

ARCHS = ("conv_tiny", "vit_tiny", "vit_small", "vit_base", "swin_t", "swin_s", "swin_b", "resnet50")
BUILT_IN_SETS = ("shapes", "cifar10")
NOT_NEGATIVE = (0, 1e10)
POSITIVE = (1e-9, 1e9)
AT_LEAST_1 = (1, 1e9)
FRACTION = (1e-9, 1)
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

class Option(NamedTuple):
    """A command-line flag with its default in --preset small and, where it differs, in --preset paper."""
    name: str
    type: type                          # bool, int, float or str
    small: object                       # a list of two numbers: an interval; None: see `parse_arguments`
    meaning: str
    allowed: tuple = None               # (lowest, highest) of a number, None: NOT_NEGATIVE; names that a str may have
    paper: object = None                # None: as small

# These may change when a run is resumed. (A folder may move; its images are compared.)
RUN_OPTIONS = [Option(*row) for row in (
    ("data", str, "shapes", "folder of images, or a built-in dataset: shapes, cifar10"),
    ("output", str, "output", "folder for checkpoint.pt, backbone.pt and log.jsonl"),
    ("resume", bool, True, "resume from OUTPUT/checkpoint.pt if it exists"),
    ("save_every", int, 1, "epochs between checkpoints", AT_LEAST_1),
    ("eval_every", int, None, "epochs between k-NN evaluations, 0: none (shapes: 1, else 0)"),
    ("max_steps", int, 0, "stop after this many steps, on the schedule of --epochs; 0: all"),
    ("workers", int, min(PROCESSORS, 10), "DataLoader workers per process"),
    ("precision", str, "auto", "network compute dtype", ("auto", "bf16", "fp16", "fp32")),
    ("compile", bool, False, "torch.compile the networks"),
    ("impl", str, "auto", "code path of the loss, see matching_kernels.py", ("auto", "triton", "torch")),
    ("device", str, "auto", "auto: cuda if available", ("auto", "cpu", "cuda")),
)]
# These make the result: they stay the same when a run is resumed.
RESULT_OPTIONS = [Option(*row) for row in (
    ("data_fraction", float, 1.0, "use this fraction of each class, always the same images", FRACTION),
    # views
    ("global_size", int, 32, "side of a global view, pixels", AT_LEAST_1, 224),
    ("local_size", int, 16, "side of a local view, pixels", AT_LEAST_1, 96),
    ("local_views", int, 4, "L, number of local views per image", NOT_NEGATIVE, 8),
    ("global_scale", float, [0.4, 1.0], "area of a global view, as a fraction of the image's", FRACTION),
    ("local_scale", float, [0.1, 0.4], "the same of a local view", FRACTION, [0.05, 0.4]),
    ("blur_sigma", float, [0.1, 0.5], "range of the Gaussian blur's sigma, pixels", POSITIVE, [0.1, 2.0]),
    # networks
    ("arch", str, "conv_tiny", "backbone", ARCHS, "swin_t"),
    ("patch_size", int, 8, "patch size of a ViT, pixels", AT_LEAST_1, 16),
    ("drop_path", float, None, "stochastic depth (small: 0, paper: 0.1, but 0.2 for swin_s and swin_b)", (0, 0.999)),
    ("out_dim", int, 256, "K, output dimension of a head", (2, 1e9), 65536),
    ("head_hidden", int, 128, "hidden width of a head", AT_LEAST_1, 2048),
    ("head_bottleneck", int, 64, "D, width before the last layer of a head", AT_LEAST_1, 256),
    ("norm_last_layer", bool, True, "fix the weight-norm gain of the last layer at 1", None, False),
    ("init_from", str, "", "start from the weights in this file: gld.py's, or any that eval_knn.py reads"),
    # the loss
    ("matching", str, "geometric", "which patches match; none: DINO", ("geometric", "similarity", "none")),
    ("hinge", bool, True, "geometric matching: leave out patches without a teacher patch close by"),
    ("teacher_temp", float, 0.04, "teacher temperature", POSITIVE, 0.07),
    ("warmup_teacher_temp", float, 0.04, "teacher temperature at the start", POSITIVE),
    ("warmup_teacher_temp_epochs", int, 0, "epochs of its linear warm-up", NOT_NEGATIVE, 30),
    # optimisation
    ("epochs", int, 10, "passes over the data", AT_LEAST_1, 300),
    ("batch_size", int, 32, "images per step, over all processes", AT_LEAST_1, 256),
    ("lr", float, 1.6e-2, "learning rate per 256 images of the batch", NOT_NEGATIVE, 5e-4),
    ("min_lr", float, 1e-6, "learning rate at the end (cosine)"),
    ("warmup_epochs", float, 1.0, "epochs of linear warm-up of the learning rate", NOT_NEGATIVE, 10.0),
    ("weight_decay", float, 0.04, "weight decay at the start"),
    ("weight_decay_end", float, 0.4, "weight decay at the end (cosine)"),
    ("clip_grad", float, 3.0, "largest gradient norm of each parameter; 0: any"),
    ("freeze_last_layer", int, 0, "epochs in which the last layer of the heads is frozen", NOT_NEGATIVE, 1),
    ("teacher_momentum", float, 0.99, "the EMA's momentum at the start (cosine to 1)", (0, 1), 0.996),
    ("seed", int, 0, "random seed"),
)]
OPTIONS = RUN_OPTIONS + RESULT_OPTIONS

def flag(name):
    return "--" + name.replace("_", "-")

def add_option(parser, option):
    """Add the flag of an option, without its default: which preset's it is, is known only after parsing."""
    kwargs = dict(type=option.type)
    if option.type is bool:
        kwargs = dict(action=argparse.BooleanOptionalAction)
    elif option.type is str:
        kwargs = dict(choices=option.allowed)
    elif isinstance(option.small, list):
        kwargs["nargs"] = 2
    default = "" if option.small in (None, "") else f" ({option.small})"        # else `meaning` tells it
    if option.paper is not None:
        default = f" (small: {option.small}, paper: {option.paper})"
    parser.add_argument(flag(option.name), help=option.meaning + default, **kwargs)

def check_range(option, value):
    """Raises BadInput for a number, or an interval, outside of what is allowed."""
    low, high = option.allowed or NOT_NEGATIVE
    values = value if isinstance(value, list) else [value]
    if not low <= values[0] <= values[-1] <= high:          # NaN is refused, too
        order = ", the lower value first" if len(values) > 1 else ""
        raise BadInput(f"{flag(option.name)} must be from {low:g} to {high:g}{order}, got {values}")

def parse_arguments(argv=None):
    """Command line -> namespace in which every option is set, by the user or by the preset, and which holds the `grids`
    (rows, cols) of the patches for each size of view. Raises BadInput."""
    parser = Parser("gld.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=("small", "paper"), help="which defaults; small unless --data is a path")
    for option in OPTIONS:
        add_option(parser, option)
    given = vars(parser.parse_args(argv))                   # only what the user gave
    built_in = given.get("data", "shapes") in BUILT_IN_SETS
    cfg = argparse.Namespace(preset=given.get("preset", "small" if built_in else "paper"))
    for option in OPTIONS:
        default = option.paper if cfg.preset == "paper" and option.paper is not None else option.small
        value = given.get(option.name, default)
        setattr(cfg, option.name, value)
        if option.type in (int, float) and value is not None:
            check_range(option, value)

    # what follows from other options
    cfg.device = choose_device(cfg.device)
    if cfg.eval_every is None:
        cfg.eval_every = 1 if cfg.data == "shapes" else 0
    if cfg.drop_path is None:
        paper_rate = 0.2 if cfg.arch in ("swin_s", "swin_b") else 0.1
        cfg.drop_path = paper_rate if cfg.preset == "paper" else 0.0
    sizes = [cfg.global_size, cfg.local_size] if cfg.local_views else [cfg.global_size]
    stride = stride_of(cfg.arch, cfg.patch_size)
    cfg.grids = [(size // stride, size // stride) for size in sizes]

    # what does not go together
    if any(size % stride for size in sizes):
        raise BadInput(f"{cfg.arch}: sizes of views must be multiples of {stride}, for example --global-size "
                       f"{2 * stride} --local-size {stride}; got {sizes}")
    if cfg.warmup_epochs > cfg.epochs:
        raise BadInput(f"--warmup-epochs {cfg.warmup_epochs:g} exceeds --epochs {cfg.epochs}")
    triton = cfg.impl == "triton" and os.getenv("TRITON_INTERPRET") != "1"
    if cfg.device == "cpu" and (cfg.precision == "fp16" or triton):
        raise BadInput("--precision fp16 and --impl triton need a CUDA GPU")
    if cfg.device == "cpu" and not built_in and "preset" not in given and os.path.exists(cfg.data):
        raise BadInput(f"--data {cfg.data} without a GPU needs --preset: --preset small trains here (conv_tiny, views "
                       "of 32 and 16 pixels); --preset paper (Swin-T, 224 pixels) takes minutes per step")
    return cfg

def choose_device(wanted):
    """The value of --device -> cuda or cpu. Nothing else asks whether there is a GPU. Raises BadInput."""
    gpu = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not gpu:
        raise BadInput("--device cuda needs a CUDA GPU")
    return "cuda" if gpu else "cpu"

def compute_dtype(cfg):
    """The dtype that the networks compute in."""
    precision = cfg.precision
    if precision == "auto" and cfg.device == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision, torch.float32)

# ------------------------------------------------------------------------------------------------ augmentation

@torch.no_grad()
def augment(views, max_sigma):
    """Flip and colour augmentation, on the training device, for all views of one size at once.

    Args: views: `Views` with B in front of each shape. max_sigma: the largest sigma of the blur, pixels.
    Returns: (G, B, 3, S, S) float32, normalised. In between, all M = G * B crops are one batch.
    """
    B, G = views.crops.shape[:2]
    views = Views(*(field.transpose(0, 1).flatten(0, 1) for field in views))                # (M, ...)
    flip = views.boxes[:, 4, None, None, None] > 0                                          # (M, 1, 1, 1) each
    grey = views.grey[:, None, None, None]
    solarise = views.solarise[:, None, None, None]
    x = views.crops.float() / 255                                                           # (M, 3, S, S)
    x = torch.where(flip, x.flip(-1), x)
    x = jitter_colours(x, views.jitter, views.order)
    x = torch.where(grey, TF.rgb_to_grayscale(x), x)
    x = blur(x, views.sigma, radius=min(math.ceil(3 * max_sigma), x.shape[-1] - 1))
    x = torch.where(solarise & (x >= 0.5), 1 - x, x)
    return normalise(x).unflatten(0, (G, B))

def jitter_colours(x, factors, order):
    """Brightness, contrast, saturation and hue of x (M, 3, S, S) by factors (M, 4), in each image's order (M, 4). In
    each of four rounds, all four are computed for all images, and each image takes the one whose turn it is."""
    for op in order.T:                                                                      # (M,) 0, 1, 2 or 3
        factor = factors.gather(1, op[:, None])[:, :, None, None]                           # (M, 1, 1, 1)
        op = op[:, None, None, None]
        grey = TF.rgb_to_grayscale(x)
        # the first three blend the image with something: with black, with its mean grey, with its own grey
        other = torch.where(op == 1, grey.mean((2, 3), keepdim=True), 0)
        other = torch.where(op == 2, grey, other)
        blended = (factor * x + (1 - factor) * other).clamp(0, 1)
        x = torch.where(op == 3, shift_hue(x, factors[:, 3]), blended)
    return x

def shift_hue(x, shift):
    """Rotate the hue of x (M, 3, S, S) in [0, 1] by shift (M,), in full circles: RGB -> HSV -> RGB."""
    value = x.amax(1)                                                                       # (M, S, S)
    chroma = value - x.amin(1)
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    # the hue in sixths of a circle: red is 0, green 2, blue 4
    hue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, hue)
    hue = hue + 6 * shift[:, None, None]
    # back to RGB: k is the hue, shifted so that each channel has its maximum, value, from k = 4 to 6 and its minimum,
    # value - chroma, from k = 1 to 3, with linear ramps between them
    k = torch.stack([hue + 5, hue + 3, hue + 1], 1) % 6                                     # (M, 3, S, S)
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[:, None] - chroma[:, None] * ramp

def blur(x, sigma, radius):
    """Gaussian blur of x (M, 3, S, S) with a sigma (M,) per image: a convolution along rows, one along columns."""
    taps = torch.arange(-radius, radius + 1, device=x.device)
    width = sigma.clamp(min=1e-3)[:, None]                                  # sigma 0: all weight on the middle, no blur
    kernel = torch.softmax(-0.5 * (taps / width) ** 2, dim=1)                               # (M, taps)
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]                                  # (3M, 1, 1, taps)
    padded = F.pad(x.flatten(0, 1)[None], [radius] * 4, "reflect")                          # (1, 3M, S + 2r, S + 2r)
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel)).view_as(x)

PIXEL_MEAN = (0.485, 0.456, 0.406)      # of ImageNet's red, green, blue
PIXEL_STD = (0.229, 0.224, 0.225)

def normalise(x):
    """x (M, 3, S, S) in [0, 1] -> zero mean and unit variance over ImageNet's pixels."""
    # channel by channel: a tensor of three means would have to be copied to the GPU in each call
    return torch.stack([(x[:, c] - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)], 1)

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
        mask = -100.0 * (region[:, None] != region)                                         # as in the official code
        x = shifted_window_attention(x, self.qkv.weight, self.proj.weight, self.get_relative_position_bias() + mask,
                                     self.window_size, self.num_heads, shift_size=[0, 0], qkv_bias=self.qkv.bias,
                                     proj_bias=self.proj.bias)
        return x.roll((shift, shift), (1, 2))[:, :rows, :cols]

class Backbone(nn.Module):
    """torchvision's `arch` without its classifier (conv_tiny: five convolutions). forward: x (M, 3, S, S) -> image
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
                block=partial(SwinTransformerBlock, attn_layer=SwinAttention),
                norm_layer=partial(nn.LayerNorm, eps=1e-6))           # official; torchvision's has 1e-5
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
        grid = F.interpolate(grid, size=(rows, cols), mode="bicubic")                       # as the official code
        return torch.cat([embedding[:, :1], grid.flatten(2).mT], 1)

# ------------------------------------------------------------------------------------------------ images

SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .ppm .pgm .tif .tiff".split()
IMAGE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix in Image.registered_extensions())
SPLITS = {"train", "val", "valid", "validation", "test"}                # names of folders that are no classes

def decode(path):
    """An image file -> (3, height, width) uint8 RGB, turned as its EXIF says. 16-bit pixels are divided by 257. Raises
    OSError and others."""
    with Image.open(path) as image:
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("float or 32-bit pixels, whose range is not known")
        image.load()
        with contextlib.suppress(Exception):                # odd metadata over good pixels
            image.getexif()                                 # is kept, also without `info`,
            image.info = {}                                 # which exif_transpose would write anew
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16 bits: convert("RGB") would clip, not scale
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

@dataclass
class Images:
    """A labelled set of images: pixels in memory, or files in a folder.

    File names are one array of bytes: every DataLoader worker would get its own copy of a list of a million str.
    """
    items: np.ndarray                                       # (n, height, width, 3) uint8, or (n,) file names
    labels: np.ndarray                                      # (n,)
    root: str                                               # the folder, or the name of the set
    classes: np.ndarray = None                              # names of the class folders; None: a built-in set
    skipped: int = 0                                        # files that are no images

    def __len__(self):
        return len(self.labels)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.items[i]))

    def read(self, i):
        """(3, height, width) uint8. Raises OSError and others if the file cannot be read or is not an image."""
        if self.classes is None:                            # a built-in set
            return torch.from_numpy(self.items[i]).permute(2, 0, 1)
        return decode(self.path(i))

def load_images(data, split, fraction=1.0, must_split=False):
    """The `Images` of --data: a built-in set, or a folder. Of a folder that holds `split`/, only that is used."""
    if data == "shapes":
        n, seed = (2400, 0) if split == "train" else (1200, 1)
        images = Images(*draw_shapes(n, seed), data)
    elif data == "cifar10":
        with blame("--data cifar10: not in ./data, and the download failed"):
            os.makedirs("data", exist_ok=True)
            with open("data/.lock", "w") as lock:           # the first process downloads, the others wait
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        images = Images(found.data, np.array(found.targets), data)
    else:
        images = load_folder(data, split, must_split)
    if fraction < 1:
        rng = default_rng(0)
        classes = [rng.permutation(np.flatnonzero(images.labels == c)) for c in np.unique(images.labels)]
        keep = np.sort(np.concatenate([c[:math.ceil(fraction * len(c))] for c in classes]))
        images = replace(images, items=images.items[keep], labels=images.labels[keep])
    return images

def files_below(folder, ancestors=()):
    """Paths of all files below a folder. Names with a dot first are skipped. Links are followed, except to a folder
    that they lie in. Raises OSError for a folder that cannot be listed, or a link to no file."""
    here = os.path.realpath(folder)
    if here in ancestors:
        return
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        link = entry.is_symlink()                           # only links need a look at the disk
        if link and not is_image(entry.path):
            os.stat(entry.path)                             # raises OSError: what leads nowhere could be a class
        if os.path.isdir(entry.path) if link else entry.is_dir():
            yield from files_below(entry.path, (*ancestors, here))
        else:
            yield entry.path

def is_image(path):
    return path.lower().endswith(IMAGE_SUFFIXES)

def load_folder(data, split, must_split):
    """`load_images` for a folder. The label of a file is the first folder of its path. Raises BadInput, also where it
    is not clear what the training images are."""
    root = Path(data)
    if not os.path.isdir(data):                             # "" is none, though Path("") is
        problem = "not a folder (unpack archives first)" if root.exists() else "no such file or folder"
        raise BadInput(f"--data {data}: {problem}, and not {' or '.join(BUILT_IN_SETS)}")
    with blame(f"--data {data}"):
        if (root / split).is_dir():
            if split == "train" and not (root / "val").is_dir():
                for other in root.glob("[!.]*"):
                    if not other.is_file() and other.name not in SPLITS and any(map(is_image, files_below(other))):
                        raise BadInput(f"is train/ a class, as {other.name}/ is? Rename it, or give {root / split}")
            root = root / split
        elif must_split:
            raise BadInput(f"must hold train/ and val/, or be one of {', '.join(BUILT_IN_SETS)}")
        files = [os.path.relpath(path, root) for path in files_below(root)]
        found = [path for path in files if is_image(path)]
        if not found:
            raise BadInput(f"no images ({' '.join(IMAGE_SUFFIXES)}) in it")
        mixed = SPLITS & {folder.lower() for path in found for folder in path.split("/")[:-1]}
        if mixed and split == "train" and root.name != "train":
            raise BadInput(f"would also train on {min(mixed)}/; give a folder that holds train/ and val/, or the "
                           "folder of training images itself")
    names = sorted(map(os.fsencode, found))
    classes, labels = np.unique([os.path.dirname(name).split(b"/")[0] for name in names], return_inverse=True)
    return Images(np.array(names), labels, str(root), classes, skipped=len(files) - len(names))

def shape_masks(u, v):
    """The shapes that tile the plane: is the point inside? u and v run from -1 to 1 within one tile."""
    a, b, r = abs(u), abs(v), np.hypot(u, v)
    return [
        r < 0.7,                                            # disks
        (r > 0.45) & (r < 0.85),                            # rings
        np.maximum(a, b) < 0.6,                             # squares
        abs(np.maximum(a, b) - 0.68) < 0.18,                # frames
        np.maximum(v, 0.87 * a - v / 2) < 0.45,             # triangles
        np.minimum(a, b) < 0.22,                            # lattice
        b < 0.4,                                            # rows
        a < 0.4,                                            # columns
        abs(a - b) < 0.25,                                  # crosses
        a + b < 0.75,                                       # diamonds
        (u > 0) == (v > 0),                                 # chess
        abs(v - a + 0.4) < 0.3,                             # zigzags
    ]

def draw_shapes(n, seed, size=48):
    """The built-in dataset: images (n, size, size, 3) uint8 and labels (n,) of 12 classes.

    The class is the shape that tiles the image. Position, scale, rotation, colours (slow gradients) and which of shape
    and background is lighter are random, so that no single pixel tells the class.
    """
    rng = default_rng(seed)
    y, x = np.mgrid[:size, :size]
    # colours run between four corners: the share of each corner, (size, size, 4)
    blend = np.stack([y * x, y * (size - x), (size - y) * x, (size - y) * (size - x)], -1) / size ** 2
    images = np.empty((n, size, size, 3), np.uint8)
    labels = np.arange(n) % 12
    for image, label in zip(images, labels):
        pitch = rng.uniform(7, 16)
        angle = rng.uniform(-0.6, 0.6)
        shift = rng.uniform(0, 2, 2)
        u = (2 * (x * np.cos(angle) + y * np.sin(angle)) / pitch + shift[0]) % 2 - 1
        v = (2 * (y * np.cos(angle) - x * np.sin(angle)) / pitch + shift[1]) % 2 - 1
        dark = blend @ rng.uniform(0, 0.5, (4, 3))
        light = blend @ rng.uniform(0.5, 1, (4, 3))
        inside = shape_masks(u, v)[label] ^ (rng.uniform() < 0.5)               # sometimes inverted
        pixels = 255 * np.where(inside[..., None], light, dark)
        image[:] = (pixels + rng.normal(0, 12, image.shape)).clip(0, 255)
    return images, labels

class ViewDataset(Dataset):
    """(epoch, i) -> `crop_views` of image i, and "". If image i cannot be read: those of another image, and the reason.
    The result is a function of seed, epoch and i only, not of the process or of what was drawn before."""

    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        epoch, i = key
        seed = draw_seed(self.cfg.seed, epoch, i)
        others = default_rng(seed).integers(len(self.images), size=20)
        problem = ""
        for attempt in (i, *others):
            try:
                image = self.images.read(attempt)
                break
            except Exception as error:                      # decoders raise all kinds of errors for broken files
                problem = problem or f"{self.images.path(i)}: {one_line(error)}"
        else:
            image = torch.zeros(3, 64, 64, dtype=torch.uint8)               # the last resort
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)       # torch.manual_seed would seed a GPU, too
            return crop_views(image, self.cfg), problem

def make_loader(images, cfg, rank, world, steps, steps_per_epoch):
    """Batches of this process for these steps. All processes together get the same images whatever their number."""
    share = cfg.batch_size // world

    def keys():
        for step in steps:
            epoch, position = divmod(step, steps_per_epoch)
            if position == 0 or step == steps.start:
                order = default_rng((cfg.seed, epoch)).permutation(len(images))
            first = position * cfg.batch_size + rank * share
            yield [(epoch, i) for i in order[first:first + share].tolist()]

    return DataLoader(ViewDataset(images, cfg), batch_sampler=keys(), num_workers=cfg.workers,
                      pin_memory=cfg.device == "cuda", worker_init_fn=leave_process_group)

def load_batch(batches, device, cfg):
    """Returns: the next batch on the device, None after the last one; the seconds that it waited for the DataLoader.

    A batch is a tuple: the augmented views, a list with one tensor (G, B, 3, S, S) for each size of view; their boxes
    (V, B, 5); a list of "PATH: REASON" of the images that could not be read.
    """
    began = time.perf_counter()
    views, problems = next(batches, (None, None))
    waited = time.perf_counter() - began
    if views is None:
        return None, waited
    views = [Views(*(field.to(device, non_blocking=True) for field in part)) for part in views]
    pixels = [augment(part, cfg.blur_sigma[1]) for part in views]
    boxes = torch.cat([part.boxes for part in views], 1).transpose(0, 1)                    # B comes second from here
    return (pixels, boxes, list(filter(None, problems))), waited

# ------------------------------------------------------------------------------------------------ weights

def load_file(path, flag):
    """A checkpoint as data: no code in it is run. Raises BadInput for what is not a complete checkpoint."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{flag} {path}: a folder; do you mean {path / 'checkpoint.pt'}?")
    if not path.exists():
        raise BadInput(f"{flag} {path}: file not found")
    if path.suffix == ".safetensors":
        raise BadInput(f"{flag} {path}: convert it: torch.save(safetensors.torch.load_file({path.name!r}), 'file.pt')")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):            # in the official checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # torch raises many kinds for a foreign file
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = f"damaged, or not a checkpoint: {one_line(error)}"
        if code:
            problem = f"holds Python objects ({code[1]}), which could run code; save tensors alone"
        raise BadInput(f"{flag} {path}: {problem}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{flag} {path}: not a checkpoint, but a {type(content).__name__}")
    return content

def load_backbone(path, weights="teacher", flag="--checkpoint", content=None):
    """A `Backbone` with the weights of a file: of gld.py, torchvision, an official GLSD or EsViT Swin, a DINO or timm
    ViT, DINOv2's ViT-S/14 or ViT-B/14.

    Not MoCo-v3's ViT-S: it has 12 heads of width 32. Its file does not tell that, so it would load as one of 6 heads.
    Args: path, or `content` if the file is loaded already. weights: "teacher" or "student". flag: for the message.
    Returns: the backbone in evaluation mode, image size in pixels, the options of its run, {} if they are not known.
    Raises: BadInput, which names `flag`, if a key does not fit.
    """
    state = content or load_file(path, flag)
    options = state.get("options", {})
    for key in (weights, "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    with blame(f"{flag} {path}"):
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise BadInput("holds no state dict of a network")
        state = plain_keys(state)
        arch, patch_size, image_size = guess_arch(state)
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
    """Keys of torchvision's network without heads, from those of gld.py and of other people's checkpoints. Raises
    BadInput for networks that are like ours, but others."""
    state = {re.sub(r"^(module\.|backbone\.|net\.|_orig_mod\.)+|_orig_mod\.", "", key): x for key, x in state.items()}
    is_vit = "cls_token" in state
    if is_vit and "pos_embed" not in state:
        raise BadInput("a ViT without position embedding (DINOv3?) is no --arch of gld.py")
    for part, what in (("register_tokens", "register tokens"), (".w12.", "SwiGLU layers")):
        if any(part in key for key in state):
            raise BadInput(f"a network with {what} is no --arch of gld.py")
    for key in [key for key in state if key.endswith(("ls1.gamma", "ls2.gamma"))]:
        # DINOv2's LayerScale multiplies the output of a layer: the same as multiplying its weight and bias
        layer = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        gamma = state.pop(key).float()                                          # (C,)
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    out = {}
    for key, value in state.items():
        for theirs, ours in (VIT_KEYS if is_vit else SWIN_KEYS).items():
            key = key.replace(theirs, ours)
        # an official Swin counts blocks and downsampling of a stage as one; torchvision's `features` counts each
        key = re.sub(r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
        if key.endswith("relative_position_index"):
            value = value.flatten()
        if not re.match(r"\w*head|fc\.|mask_token|.*attn_mask", key):
            out[key] = value
    return out

def guess_arch(state):
    """(arch, patch size, image size) of plain keys. Raises BadInput if they belong to no network of gld.py."""
    patch, image_size = 16, 224
    if "conv_proj.weight" in state and "encoder.pos_embedding" in state:
        width, _, _, patch = state["conv_proj.weight"].shape
        image_size = patch * math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
        arch = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(width)
    elif "features.0.0.weight" in state:
        width = len(state["features.0.0.weight"])
        deep = "features.5.17.norm1.weight" in state                            # the third stage has 18 blocks, not 6
        arch = {(96, False): "swin_t", (96, True): "swin_s", (128, True): "swin_b"}.get((width, deep))
    elif "layer4.2.conv3.weight" in state:
        arch = "resnet50"
    elif "12.weight" in state:
        arch, image_size = "conv_tiny", 32
    else:
        raise BadInput(f"no --arch of gld.py has keys like {', '.join(list(state)[:3])}")
    if arch is None:
        raise BadInput(f"width {width} is no --arch of gld.py")
    return arch, patch, image_size

def initialise(cfg, student, teacher):
    """--init-from: both backbones from any file that `load_backbone` reads; the heads only from a checkpoint of gld.py,
    if they fit. Raises BadInput."""
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
    say(f"weights from {cfg.init_from} ({'with its heads' if fit else 'new heads'})")

# ------------------------------------------------------------------------------------------------ checkpoints

def resume(cfg, state):
    """Load OUTPUT/checkpoint.pt into `state` if it exists, else --init-from. Returns: the first step to do. Raises
    BadInput if the checkpoint was made with other images or options that make the result."""
    start, path = 0, Path(cfg.output, "checkpoint.pt")
    if cfg.resume and path.exists():
        content = load_file(path, "--output")
        before = content.get("options", {})
        new_run = "to start a new run, give another --output or --no-resume"
        if before.get("images") != cfg.images:
            raise BadInput(f"--data {cfg.data}: not the images of {path} ({before.get('data')}); {new_run}")
        for name in ("preset", *(option.name for option in RESULT_OPTIONS)):
            now = getattr(cfg, name)
            if before.get(name) != now:
                raise BadInput(f"{flag(name)}: {now} here, but {path} was made with {before.get(name)}; {new_run}, and "
                               f"--init-from {path} to start from its weights")
        with blame(f"--output {path}: was not written by this gld.py"):
            for name, part in state.items():
                if name == "centers":
                    part.copy_(content[name])
                elif content[name]:                         # the gradient scaler has no state unless fp16 is used
                    part.load_state_dict(content[name])
            start = content["step"]
    elif cfg.init_from:
        initialise(cfg, state["student"], state["teacher"])
    require_equal({"--output: the step of checkpoint.pt (is the folder shared?)": start})
    return start

def save(cfg, state, step):
    """Process 0 writes checkpoint.pt and backbone.pt. Returns, on all processes: whether that worked."""
    def write():
        content = {name: part if name == "centers" else part.state_dict() for name, part in state.items()}
        content |= dict(step=step, options=vars(cfg))
        backbone = {name: x.cpu() for name, x in state["teacher"].backbone.net.state_dict().items()}
        # in this order: if it ends in between, the rerun does these steps again, and writes both
        write_file(Path(cfg.output, "backbone.pt"), backbone)
        write_file(Path(cfg.output, "checkpoint.pt"), content)

    problem = on_first_process(write)
    if problem:
        say(f"gld.py: cannot write {cfg.output}/ at step {step} ({problem}); the last checkpoint is kept", sys.stderr)
    return not problem

def write_file(path, content):
    """torch.save, which replaces a file only when the new one is complete and on disk. Raises OSError, RuntimeError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
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
            return f"--data: {images.path(i)} cannot be read: {one_line(error)}"
        image = TF.resize(image, [round(size * 256 / 224)], InterpolationMode.BICUBIC, antialias=True)
        crops.append(TF.center_crop(image, size))
    return torch.stack(crops)

@torch.no_grad()
def extract(network, images, size, cfg, device, rank, world):
    """Features (n, C) float16, unit length, of all images, on every process; `network`: (M, 3, S, S) -> (M, C)."""
    share = math.ceil(len(images) / world)
    mine = [i % len(images) for i in range(rank * share, (rank + 1) * share)]   # as many in all processes
    loader = DataLoader(mine, cfg.batch_size, num_workers=cfg.workers, worker_init_fn=leave_process_group,
                        collate_fn=partial(center_crops, images, size))
    rows = []
    for x in loader:
        if isinstance(x, str):
            raise BadInput(x, "only here")
        features = network(normalise(x.to(device).float() / 255)).float()
        rows.append(F.normalize(features, dim=1).half())
    rows = torch.cat(rows)
    if world > 1:
        parts = [torch.empty_like(rows) for _ in range(world)]
        dist.all_gather(parts, rows)
        rows = torch.cat(parts)[:len(images)]
    if not rows.isfinite().all():
        raise BadInput("the features are not finite: the weights are damaged, or training failed")
    return rows

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
    """20-NN top-1 accuracy in percent, while training, of `labelled` images."""
    if world > 1:
        for buffer in backbone.buffers():   # batch norm statistics differ on CPUs: evaluate those that are saved
            dist.broadcast(buffer, src=0)
    vectors = []
    backbone.eval()
    for images in parts:
        vectors.append(extract(lambda x: backbone(x)[0], images, cfg.global_size, cfg, device, rank, world))
        vectors.append(torch.as_tensor(images.labels, device=device))
    backbone.train()
    return knn(*vectors, [20], 0.07)[20][0]

# ------------------------------------------------------------------------------------------------ log

def say(message, file=None, everywhere=False):
    """Print a line, on process 0 only unless `everywhere`. A terminal that lacks a letter, a full disk or a reader that
    is gone does not end the run."""
    file = file or sys.stdout
    if file is None or not (everywhere or process_numbers()[0] == 0):
        return
    encoding = file.encoding or "utf-8"
    try:
        print(message.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except OSError:                                         # what is buffered would make Python's exit fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

@torch.no_grad()
def diagnose(teacher, center, boxes, teacher_temp, cfg):
    """Measures of the last batch of this process that tell a healthy run from a collapsed one."""
    logits = (teacher.image_z @ teacher.image_weight.T - center) / teacher_temp
    weight = torch.ones(1)
    if cfg.matching == "geometric":                         # of the patches of each global view in the other one
        weight = geometric_matches(boxes[:2], boxes[:2].flip(0), cfg.grids[0], cfg.grids[0], cfg.hinge)[1]
    measures = dict(
        matched=weight.mean(),
        entropy=torch.distributions.Categorical(logits=logits).entropy().mean(),
        center_norm=center.norm(),
        spread=1 - teacher.image_z.mean((0, 1, 2)).square().sum())      # the variance of z; 0 if all are the same
    return {name: value.item() for name, value in measures.items()}

def looks_collapsed(record, cfg):
    """At the start, all outputs may be alike; later, they must neither be uniform, nor sure, nor all the same."""
    highest = math.log(cfg.out_dim)
    healthy = 0.01 * highest <= record["entropy"] <= 0.99 * highest and record["spread"] > 1e-3
    return record["epoch"] >= cfg.warmup_epochs and not healthy

class Log:
    """log.jsonl, with one record per epoch, and sums over the epoch so far. Process 0 writes and prints.

    It holds a lock on the file while it lives, so that no other run writes to the folder. (Not `flock`: a DataLoader
    worker would inherit it, and hold it for some seconds after its run was killed.)
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.sums = Counter()
        self.named = set()                                  # images that could not be read
        self.overflows = 0                                  # steps in a row in which a float16 gradient overflowed
        self.reported = -math.inf                           # when a line was last printed
        problem = on_first_process(self.open)
        if problem:
            raise BadInput(f"--output {cfg.output}: {problem}")

    def open(self):
        os.makedirs(self.cfg.output, exist_ok=True)
        tempfile.TemporaryFile(dir=self.cfg.output).close()             # raises OSError if nothing can be written
        self.file = open(Path(self.cfg.output, "log.jsonl"), "ab+", buffering=0)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput("another run writes to it")
        except OSError:
            pass                                            # a file system without locks

    def drop_after(self, step):
        """Drop the records of steps that are done again, and all from a damaged line on (cut by a kill, say)."""
        def drop():
            self.file.seek(0)
            size = 0
            for line in self.file:
                record = re.match(rb'{.*"step": (\d+).*}\n', line)
                if not record or int(record[1]) > step:
                    break
                size += len(line)
            self.file.truncate(size)

        on_first_process(drop)

    def diverged(self, values, step, lr, scaler):
        """True, after a line that says why, if a loss, the teacher's output or a gradient is NaN or infinite. A float16
        gradient may overflow, but not in more than MAX_OVERFLOWS steps in a row: the scaler skips such a step, and its
        norm becomes 0 here."""
        self.overflows += 1
        if math.isfinite(values["grad_norm"]) or not scaler.is_enabled():
            self.overflows = 0
        elif self.overflows <= MAX_OVERFLOWS:
            values["grad_norm"] = 0.0
        if all(map(math.isfinite, values.values())):
            return False
        say(f"gld.py: stopped at step {step}, lr {lr:.3g}: image loss {values['loss_image']:.3g}, patch loss "
            f"{values['loss_patch']:.3g}, teacher {values['center_sum']:.3g}, gradient {values['grad_norm']:.3g}; the "
            "last checkpoint is unchanged; a lower --lr may help", sys.stderr)
        return True

    def add(self, values, problems, seconds, waited, images_per_epoch):
        """Count one step: its STEP_VALUES, its seconds, and how many of them it waited for the DataLoader. Name each
        image that could not be read once. Raises BadInput if they are more than 1 % of an epoch."""
        self.sums.update(values, steps=1, seconds=seconds, waiting=waited)
        for problem in set(problems) - self.named:
            say(f"cannot be read, replaced by another image: {problem}", everywhere=True)
        self.named.update(problems)
        if self.sums["unreadable"] > max(1, images_per_epoch // 100):
            raise BadInput(f"--data {self.cfg.data}: more than 1 % of the images of an epoch cannot be read")

    def report(self, record, steps_left, ended):
        """Add the means over the epoch so far to a record, and print it. If epoch or run has ended: write it, too."""
        self.reported = time.perf_counter()
        steps, seconds = self.sums["steps"], self.sums["seconds"]
        record |= {name: self.sums[name] / steps for name in ("loss_image", "loss_patch", "grad_norm")}
        record |= dict(
            images_per_second=steps * self.cfg.batch_size / seconds,
            waiting=self.sums["waiting"] / seconds,
            unreadable=round(self.sums["unreadable"]))
        line = f"epoch {record['epoch']} step {record['step']} | loss image {record['loss_image']:.3f} "
        if self.cfg.matching != "none":
            line += f"patch {record['loss_patch']:.3f} matched {record['matched']:.0%} "
        line += f"entropy {record['entropy']:.2f} lr {record['lr']:.1e} | "
        if "knn" in record:
            line += f"20-NN {record['knn']:.1f} %, "
        line += f"{record['images_per_second']:.0f} images/s, {record['waiting']:.0%} waiting for data, "
        if self.cfg.device == "cuda":
            record["gpu_gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
            line += f"GPU {record['gpu_gib']:.1f} GiB, "
        say(line + f"{timedelta(seconds=int(steps_left * seconds / steps))} left")
        if not ended:
            return
        if looks_collapsed(record, self.cfg):
            say(f"WARNING: looks collapsed: the teacher's entropy is {record['entropy']:.2f} (ln K = "
                f"{math.log(self.cfg.out_dim):.2f}), the variance of z {record['spread']:.4f}; try a lower --lr, or a "
                "smaller --batch-size")
        self.sums.clear()
        on_first_process(lambda: self.file.write(json.dumps(record).encode() + b"\n"))  # if it fails, `save` says so

# ------------------------------------------------------------------------------------------------ processes

STOPPED = 75                            # exit code of a run that stopped on request and can be resumed (EX_TEMPFAIL)

def process_numbers():
    """Rank, number of processes, rank on this node: as torchrun or Slurm's script sets them, else 0, 1, 0."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    return tuple(int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))

def join_processes(cfg):
    """Join the other processes, if there are any. Returns: rank, number of processes, device."""
    rank, world, local_rank = process_numbers()
    device = torch.device(cfg.device)
    if cfg.device == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return rank, world, device

def draw_seed(*what):
    """A seed that is a function of some integers."""
    return int(default_rng(what).integers(2 ** 62))

def all_mean(x):
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def on_first_process(work):
    """Call work() on process 0, while the others wait. Returns, on all: the error that it raised, in words, or ""."""
    problem = [""]
    if process_numbers()[0] == 0:
        try:
            work()
        except (BadInput, OSError, RuntimeError) as error:  # torch reports a full disk by a RuntimeError
            problem = [one_line(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
    return problem[0]

def require_equal(values):
    """Raises BadInput, in all processes, if one has another value under the same name. (Each node gets its own command,
    and may have its own files. Processes that differ would wait for each other without end, or train apart.)"""
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    for name, value in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other[name] != value:
                raise BadInput(f"{name}: {value} in process 0, but {other[name]} in process {rank}")

def check_run(cfg, images, world):
    """Raises BadInput, in all processes, if their options or images differ, or if --batch-size does not fit."""
    options = {flag(name): value for name, value in vars(cfg).items() if name not in ("data", "output", "workers")}
    cfg.images = [len(images), zlib.crc32(np.ascontiguousarray(images.items))]      # of pixels or file names
    require_equal(options | {"--data (number of images, checksum)": cfg.images})
    if cfg.batch_size % world:
        raise BadInput(f"--batch-size {cfg.batch_size} cannot be shared equally by {world} processes; the next size "
                       f"that can is {math.ceil(cfg.batch_size / world) * world}")
    if len(images) < cfg.batch_size:
        hint = "; --preset small takes 32" if cfg.preset == "paper" else ""
        raise BadInput(f"--batch-size {cfg.batch_size}: {cfg.data} has only {len(images)} images{hint}")

def describe(cfg, images, steps, start):
    """The first line of a run."""
    skipped = f" ({images.skipped} other files skipped)" if images.skipped else ""
    return (f"{cfg.matching} matching, preset {cfg.preset}, {cfg.arch} on {cfg.device}; {len(images)} images of "
            f"{images.root}{skipped}: {steps} steps of {cfg.batch_size} images, from step {start}; output in "
            f"{cfg.output}/")

def prepare(cfg, student, teacher, world):
    """Compile the networks, and synchronise their batch norm over GPUs, if asked to. Returns: the student to call."""
    for network in (student, teacher):
        if world > 1 and cfg.device == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if cfg.compile:
            torch._dynamo.config.suppress_errors = True     # what cannot be compiled runs eagerly, with a warning
            network.compile()
    return nn.parallel.DistributedDataParallel(student) if world > 1 else student

# what all processes know of a step: means over them and, of the last two, sums
STEP_VALUES = (
    "loss_image",
    "loss_patch",
    "grad_norm",
    "center_sum",                       # of the mean logits of the teacher: NaN if one of them is
    "unreadable",                       # images that could not be read
    "stop",                             # signals that ask to stop
)

def share_values(loss_image, loss_patch, grad_norm, batch_center, problems, stop_requests):
    """The numbers named in STEP_VALUES, as a tensor. This does not wait for the GPU; its tolist() does."""
    counts = [grad_norm.new_full((), len(x) * process_numbers()[1]) for x in (problems, stop_requests)]
    return all_mean(torch.stack([loss_image.detach(), loss_patch.detach(), grad_norm, batch_center.sum(), *counts]))

def catch_signals(world):
    """From now on, SIGTERM, SIGHUP and Ctrl-C ask for a stop after the current step. Returns: a list, empty until one
    comes. The next Ctrl-C ends the program at once, but not under torchrun, which passes each one on a second time."""
    received = []

    def request(number, frame):
        received.append(number)
        if world == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(Exception):            # print is not safe in a signal handler
                os.write(sys.stderr.fileno(), b"stopping after this step; Ctrl-C again quits now\n")

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:   # nohup ignores it
        signal.signal(signal.SIGHUP, request)
    return received

def leave_process_group(worker):
    """In a DataLoader worker: a signal to the group (Ctrl-C, a closed terminal, torchrun's SIGTERM) is then for the
    main process alone, which needs this worker until the end of the step."""
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
    try:
        code = work()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except BadInput as error:
        message, *only_here = error.args                    # else all processes meet it: say it once per node
        if only_here or process_numbers()[2] == 0:
            say(f"{script}: error: {message}", sys.stderr, everywhere=True)
        return 2
    except KeyboardInterrupt:
        say(f"{script}: interrupted", sys.stderr, everywhere=True)
        return 130

def main(argv=None):
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped on request after saving, 130 interrupted."""
    return run_script("gld.py", lambda: train(parse_arguments(argv)))

if __name__ == "__main__":
    sys.exit(main())
