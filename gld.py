# SPDX-License-Identifier: MIT
"""Global-Local Self-Distillation (GLSD, WACV 2023) in one file.

    python gld.py                                                     # a laptop learns the built-in `shapes`: 3 minutes
    python eval_knn.py                                                # how good are the features?
    python gld.py --data PATH/TO/IMAGES --arch vit_small              # your images, one GPU
    torchrun --nproc_per_node=8 gld.py --matching geometric --data IMAGENET/train           # the paper's run

A student network sees V views of an image; a teacher, a slow moving average of the student, sees the Q = 2 large ones.
The student learns to give for a whole view what the teacher gives for another view of the same image (that is DINO),
and for every patch what the teacher gives for the matching patch of that view. Which patch matches? With `geometric`,
the one that shows the same place of the image; with `similarity`, the one with the most similar features; with `none`,
no patch is compared.

    B       images in the batch of one process       C    width of the backbone's features
    V, Q    student views (2 global + L local), teacher views (the 2 global ones)
    N       patches of one view (grid rows x cols, row-major)
    D, K    width of a head's bottleneck, its outputs ("prototypes")
    box     where a view was cut: (top, left, height, width, flip), pixels of the original image

Reading order: options, views, networks, loss, training. Below "the paper ends here" stands what is not the method.
"""
import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torchvision.ops import StochasticDepth
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

try:
    import resource                     # peak memory on CPUs; Windows has none
except ImportError:
    resource = None

from matching_kernels import geometric_matches, head_cross_entropy, similarity_matches

ARCHS = ("conv_tiny", "vit_tiny", "vit_small", "vit_base", "swin_t", "swin_s", "swin_b", "resnet50")
STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
PIXELS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)          # mean and standard deviation of ImageNet's

OPTIONS = (  # flag, value of --preset small, value of --preset paper, meaning
    ("matching", "geometric", "geometric", "which patches must agree: geometric, similarity or none (DINO)"),
    ("hinge", True, True, "geometric: leave out patches whose nearest teacher patch is too far away"),
    ("arch", "conv_tiny", "swin_t", "backbone: " + ", ".join(ARCHS)),
    ("patch-size", 8, 16, "patch size of a ViT, pixels"),
    ("drop-path", 0.0, 0.1, "stochastic depth of the student"),
    ("out-dim", 256, 65536, "K, outputs of a head"),
    ("head-hidden", 128, 2048, "hidden width of a head"),
    ("head-bottleneck", 64, 256, "D, width before the last layer of a head"),
    ("norm-last-layer", True, False, "keep the gain of the last layer at 1"),
    ("freeze-last-layer", 0, 1, "epochs in which the last layer of the heads stays as it is"),
    ("global-size", 32, 224, "side of a global view, pixels"),
    ("local-size", 16, 96, "side of a local view, pixels"),
    ("local-views", 4, 8, "L, local views per image"),
    ("global-scale", (0.4, 1.0), (0.4, 1.0), "share of the image that a global view covers"),
    ("local-scale", (0.1, 0.4), (0.05, 0.4), "share of the image that a local view covers"),
    ("blur-sigma", (0.1, 0.5), (0.1, 2.0), "range of the Gaussian blur's sigma, pixels"),
    ("epochs", 10, 300, "passes over the data"),
    ("batch-size", 32, 32, "images per process"),
    ("lr", 1.6e-2, 5e-4, "learning rate per 256 images of the total batch"),
    ("min-lr", 1e-6, 1e-6, "learning rate at the end (cosine)"),
    ("warmup-epochs", 1.0, 10.0, "linear warm-up of the learning rate"),
    ("weight-decay", 0.04, 0.04, "weight decay at the start"),
    ("weight-decay-end", 0.4, 0.4, "weight decay at the end (cosine)"),
    ("clip-grad", 3.0, 3.0, "largest gradient norm of one parameter tensor; 0: no clipping"),
    ("teacher-momentum", 0.99, 0.996, "of the teacher's moving average, at the start (cosine to 1)"),
    ("teacher-temp", 0.04, 0.07, "temperature of the teacher"),
    ("warmup-teacher-temp", 0.04, 0.04, "temperature of the teacher at the start"),
    ("warmup-teacher-temp-epochs", 0, 30, "epochs of linear warm-up of the teacher's temperature"),
)


# --------------------------------------------------------------------------- views that remember where they came from

def draw_view(image, scale, blur_sigma, blur, solarise):
    """Draw one view of an image (3, H, W) as DINO does, from torch's generator: (box, colour parameters).

    Colour: factors of brightness, contrast, saturation (1: leave); hue shift (0: leave); the order of the first three,
    and how many of them come before the hue; greyscale 0 or 1; sigma of the blur (0: none); solarise 0 or 1.
    """
    chance = torch.rand(6).tolist()
    box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
    order, *jitter = ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
    order = order.tolist()
    hue_at = order.index(3)
    jitter = jitter if chance[1] < 0.8 else (1, 1, 1, 0)
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * chance[3] if chance[4] < blur else 0
    return (*box, chance[0] < 0.5), (*jitter, *order[:hue_at], *order[hue_at + 1:], hue_at, chance[2] < 0.2, sigma,
                                     chance[5] < solarise)


def cut_views(image, cfg):
    """One image (3, H, W) uint8 -> its views, cut and resized, not yet flipped or coloured. All that a worker does.

    Returns: global views (2, 3, G, G) uint8, local views (L, 3, l, l) uint8, boxes (V, 5), colour (V, 11), float32.
    """
    probabilities = [(1.0, 0.0), (0.1, 0.2)] + [(0.5, 0.0)] * cfg.local_views               # of blur and solarisation
    drawn = [draw_view(image, cfg.global_scale if view < 2 else cfg.local_scale, cfg.blur_sigma, *p)
             for view, p in enumerate(probabilities)]
    boxes, colour = (torch.tensor(part, dtype=torch.float32) for part in zip(*drawn))

    def cut(boxes, size):
        out = torch.empty(len(boxes), 3, size, size, dtype=torch.uint8)
        for view, box in zip(out, boxes.int().tolist()):
            view[:] = TF.resized_crop(image, *box[:4], [size, size], TF.InterpolationMode.BICUBIC, antialias=True)
        return out

    return cut(boxes[:2], cfg.global_size), cut(boxes[2:], cfg.local_size), boxes, colour


@functools.cache
def of_channels(values, device):
    """A number for each channel, (3, 1, 1). Made once: to copy it to a GPU is to wait for all that is queued there."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def to_grey(x):
    """(N, 3, H, W) -> (N, 1, H, W) luma."""
    return (x * of_channels((0.2989, 0.587, 0.114), x.device)).sum(1, keepdim=True)


def shift_hue(x, shift):
    """Turn the hue of x (N, 3, H, W) in [0, 1] by shift (N,), in full circles: RGB -> HSV -> RGB."""
    value, low = x.amax(1), x.amin(1)                                                       # (N, H, W)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (hue + 6 * shift[:, None, None])[:, None] + of_channels((5.0, 3.0, 1.0), x.device)  # (N, 3, H, W)
    k = k % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def jitter_colours(x, factors, hue, order, hue_at):
    """Brightness, contrast, saturation by factors (N, 3) in order (N, 3); after hue_at (N,) of them, the hue (N,)."""
    for before_hue in (True, False):
        for slot in range(3):
            op = order[:, slot]                                                             # (N,) 0, 1 or 2
            factor = factors.gather(1, op[:, None])[:, 0]
            factor = torch.where((slot < hue_at) == before_hue, factor, 1).view(-1, 1, 1, 1)
            grey, op = to_grey(x), op.view(-1, 1, 1, 1)
            # each op blends the image with something: with black, with its mean grey, with its own grey
            other = torch.where(op == 2, grey, torch.where(op == 1, grey.mean((2, 3), keepdim=True), 0))
            x = (factor * x + (1 - factor) * other).clamp(0, 1)
        if before_hue:
            x = torch.where((hue != 0).view(-1, 1, 1, 1), shift_hue(x, hue), x)
    return x


def blur(x, sigma, radius=6):
    """Gaussian blur of x (N, 3, H, W) with a sigma (N,) per image, as two products with banded matrices."""
    taps = torch.arange(-radius, radius + 1, device=x.device)
    weight = torch.softmax(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2, dim=1)      # (N, taps); sigma 0: as is

    def matrix(size):
        """(N, size, size): row i holds the weights of the pixels around i, mirrored at the edges."""
        at = torch.arange(size, device=x.device)[:, None] + taps
        at = (size - 1 - (at.abs() - (size - 1)).abs()).clamp(0, size - 1)                  # (size, taps)
        return (weight @ F.one_hot(at, size).to(x.dtype).transpose(0, 1).flatten(1)).unflatten(1, (size, size))

    return matrix(x.shape[2])[:, None] @ x @ matrix(x.shape[3])[:, None].mT


@torch.no_grad()
def colour_views(cut, boxes, colour):
    """The rest of the augmentation, on the training device, for all views of one size at once.

    Args: cut (B, v, 3, H, W) uint8, boxes (B, v, 5), colour (B, v, 11), as `cut_views` gives them, stacked.
    Returns: (v, B, 3, H, W) float32.
    """
    B, v = cut.shape[:2]
    x = cut.transpose(0, 1).flatten(0, 1).float() / 255                                     # (v·B, 3, H, W)
    flip, colour = boxes[..., 4].T.reshape(-1), colour.transpose(0, 1).flatten(0, 1)        # (v·B,), (v·B, 11)
    factors, hue, order, hue_at, grey, sigma, solarise = colour.split((3, 1, 3, 1, 1, 1, 1), dim=1)
    flip, grey, solarise = (y.view(-1, 1, 1, 1) > 0 for y in (flip, grey, solarise))
    x = torch.where(flip, x.flip(-1), x)
    x = jitter_colours(x, factors, hue[:, 0], order.long(), hue_at[:, 0])
    x = torch.where(grey, to_grey(x), x)
    x = blur(x, sigma[:, 0])
    x = torch.where(solarise & (x >= 0.5), 1 - x, x)
    return normalise(x).unflatten(0, (v, B))


def normalise(x):
    """x (N, 3, H, W) in [0, 1] -> zero mean and unit variance over ImageNet's pixels."""
    mean, std = (of_channels(values, x.device) for values in PIXELS)
    return (x - mean) / std


# ------------------------------------------------------------------------------------------------ networks

def stride_of(arch, patch_size):
    """Side of a patch, pixels."""
    return patch_size if arch.startswith("vit") else 8 if arch == "conv_tiny" else 32


def grids_of(cfg):
    """(rows, cols) of the patches of a global and of a local view."""
    return [(size // stride_of(cfg.arch, cfg.patch_size),) * 2 for size in (cfg.global_size, cfg.local_size)]


class MeanOfAll(torch.autograd.Function):
    """Mean over all processes; its gradient is again the mean of theirs."""

    @staticmethod
    def forward(ctx, x):
        return all_mean(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_mean(grad.clone())


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, also on CPUs, where torch's SyncBatchNorm does not run."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        mean = MeanOfAll.apply(x.mean((0, 2, 3), keepdim=True))                             # (1, C, 1, 1)
        var = MeanOfAll.apply((x - mean).square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * (var + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


class Backbone(nn.Module):
    """torchvision's `arch` without its classifier. forward: x (N, 3, H, W) -> image level (N, C), patches (N, P, C)."""

    def __init__(self, arch, image_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        self.arch, self.patch_size = arch, patch_size
        if arch == "conv_tiny":
            widths, strides = (3, 32, 64, 128, 128, 128), (2, 2, 1, 2, 1)
            self.net, self.width = nn.Sequential(), widths[-1]
            for i, stride in enumerate(strides):
                self.net.extend([nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False),
                                 BatchNorm(widths[i + 1]), nn.ReLU()])
        elif arch.startswith("vit"):
            self.width, heads = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}[arch]
            self.net = torchvision.models.VisionTransformer(image_size, patch_size, 12, heads, self.width,
                                                            4 * self.width)
            self.net.heads = nn.Identity()
            for i, block in enumerate(self.net.encoder.layers):    # stochastic depth, in place of the unused dropout
                block.dropout = block.mlp[4] = StochasticDepth(drop_path * i / 11, "row")
        elif arch.startswith("swin"):
            self.net = getattr(torchvision.models, arch)()
            self.width, self.net.head = self.net.head.in_features, nn.Identity()
            depths = [m for m in self.net.modules() if isinstance(m, StochasticDepth)]
            for i, depth in enumerate(depths):                     # one in a block, for its attention and its MLP
                depth.p = drop_path * i / (len(depths) - 1)
        else:
            self.net = getattr(torchvision.models, arch)()
            self.width, self.net.fc = self.net.fc.in_features, nn.Identity()

    def forward(self, x):
        net = self.net
        if self.arch.startswith("vit"):
            x = net.conv_proj(x)                                                            # (N, C, rows, cols)
            x = torch.cat([net.class_token.expand(len(x), -1, -1),
                           x.flatten(2).mT], 1) + self.position_embedding(*x.shape[2:])     # (N, 1 + P, C)
            x = net.encoder.ln(net.encoder.layers(x))
            return x[:, 0], x[:, 1:]
        if self.arch.startswith("swin"):
            patches = net.norm(net.features(x)).flatten(1, 2)                               # (N, P, C)
        elif self.arch == "conv_tiny":
            patches = net(x).flatten(2).mT
        else:
            for name, layer in net.named_children():
                x = x if name in ("avgpool", "fc") else layer(x)
            patches = x.flatten(2).mT
        return patches.mean(1), patches

    def position_embedding(self, rows, cols):
        """The ViT's position embedding (1, 1 + P, C), its grid resized to rows x cols."""
        embedding = self.net.encoder.pos_embedding
        side = math.isqrt(embedding.shape[1] - 1)
        if (rows, cols) == (side, side):
            return embedding
        grid = embedding[:, 1:].mT.unflatten(2, (side, side))                               # (1, C, side, side)
        grid = F.interpolate(grid.float(), size=(rows, cols), mode="bicubic", antialias=True)
        return torch.cat([embedding[:, :1], grid.flatten(2).mT.to(embedding.dtype)], 1)


class Head(nn.Module):
    """Features (..., C) -> unit vectors z (..., D). The logits z @ weight().T are cosines times a gain each."""

    def __init__(self, width, cfg):
        super().__init__()
        hidden, bottleneck = cfg.head_hidden, cfg.head_bottleneck
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.direction = nn.Parameter(torch.empty(cfg.out_dim, bottleneck).uniform_(-1, 1) / bottleneck ** 0.5)
        self.gain = nn.Parameter(torch.ones(cfg.out_dim, 1), requires_grad=not cfg.norm_last_layer)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02 * (2048 / hidden) ** 0.5)  # official: 0.02, at width 2048
            nn.init.zeros_(layer.bias)

    def weight(self):
        """(K, D): the weight-normalised last layer."""
        return self.gain * F.normalize(self.direction, dim=-1)

    def forward(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1)


class Outputs(NamedTuple):
    image: torch.Tensor             # (V, B, 1, D) bottleneck of the global head (the teacher's: Q views)
    patches: list                   # per size of view: (v, B, N, D) bottleneck of the local head
    features: list                  # per size of view: (v, B, N, C) the backbone's patches
    global_weight: torch.Tensor     # (K, D)
    local_weight: torch.Tensor      # (K, D); None without a local head


class Network(nn.Module):
    """Backbone, global head and (unless matching is none) local head. Student and teacher are one of these each."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)
        self.global_head = Head(self.backbone.width, cfg)
        self.local_head = Head(self.backbone.width, cfg) if cfg.matching != "none" else None

    def forward(self, views):
        """views: a list with one tensor (v, B, 3, H, W) per size of view, the global ones first."""
        image, patches, features = [], [], []
        for x in views:
            whole, parts = (y.unflatten(0, x.shape[:2]) for y in self.backbone(x.flatten(0, 1)))
            image.append(self.global_head(whole[:, :, None]))                               # (v, B, 1, D)
            if self.local_head is not None:
                patches.append(self.local_head(parts))                                      # (v, B, N, D)
                features.append(parts.detach())
        local_weight = self.local_head.weight() if self.local_head is not None else None
        return Outputs(torch.cat(image), patches, features, self.global_head.weight(), local_weight)


# ------------------------------------------------------------------------------------------------ the loss

def distillation_loss(student, teacher, centers, boxes, grids, *, teacher_temp, matching, hinge=True, impl="auto"):
    """The loss of the paper, a pure function: (global term, local term); their sum is what the student minimises.

    Args:
        student, teacher: Outputs for all V views, and for the Q = 2 global ones.
        centers: (2, K) of the global and of the local teacher logits. boxes: (V, B, 5).
        grids: (rows, cols) of the patches, per size of view.
    """
    pairs = 2 * (len(student.image) - 1)          # student view v with teacher view q, never a view with itself
    share = 1 if matching == "none" else 0.5      # the official DINO loss has no 1/2

    options = dict(student_temp=STUDENT_TEMP, teacher_temp=teacher_temp, impl=impl)
    whole = share / pairs * head_cross_entropy(student.image, student.global_weight, teacher.image,
                                               teacher.global_weight, centers[0], skip_same_view=True, **options)
    local = torch.zeros_like(whole)
    first = 0
    for z, features, grid in zip(student.patches, student.features, grids):                 # global views, local views
        # geometric: a patch is left out (but stays in the mean's denominator) if the nearest teacher patch's centre is
        # farther away than half a diagonal of the larger of the two; see matching_kernels.py
        if matching == "geometric":
            which = dict(student_boxes=boxes[first:first + len(z)], teacher_boxes=boxes[:2], student_grid=grid,
                         teacher_grid=grids[0], hinge=hinge)
        else:
            which = dict(index=similarity_matches(features[:, None], teacher.features[0][None]))   # (v, Q, B, N)
        local = local + share / pairs * head_cross_entropy(z, student.local_weight, teacher.patches[0],
                                                           teacher.local_weight, centers[1],
                                                           skip_same_view=first == 0,       # only global views recur
                                                           **which, **options)
        first += len(z)
    return whole, local


def teacher_means(teacher):
    """(heads, D): the mean of the teacher's rows, for the global and (if there is one) the local head."""
    return torch.stack([z.mean((0, 1, 2)) for z in (teacher.image, *teacher.patches[:1])])


def mean_logits(teacher, means):
    """(heads, K): the mean of the teacher's logits. The last layer is linear, so it can come after the mean."""
    weights = (teacher.global_weight, teacher.local_weight)
    return torch.stack([weight @ mean for weight, mean in zip(weights, means)])


# ------------------------------------------------------------------------------------------------ training

def cosine(start, end, step, steps, warmup=0):
    """A schedule at `step`: linear from 0 to `start` over `warmup` steps, then half a cosine to `end` at `steps`."""
    if step < warmup:
        return start * step / max(1, warmup - 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def teacher_temp_at(epoch, cfg):
    """Linear from --warmup-teacher-temp to --teacher-temp in --warmup-teacher-temp-epochs, then constant."""
    if epoch >= cfg.warmup_teacher_temp_epochs:
        return cfg.teacher_temp
    rise = epoch / max(1, cfg.warmup_teacher_temp_epochs - 1)
    return cfg.warmup_teacher_temp + rise * (cfg.teacher_temp - cfg.warmup_teacher_temp)


def clip_gradients(parameters, max_norm):
    """Scale each parameter's gradient to at most max_norm (0: do not). Returns the norm of all together, before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def views_on(device, loader, lap=lambda phase: None):
    """The loader's batches, on the device: (views, a list with one tensor (v, B, 3, H, W) per size; boxes (V, B, 5);
    the numbers of the images that could not be read)."""
    for *batch, unreadable in loader:
        lap("data")
        global_cut, local_cut, boxes, colour = (x.to(device, non_blocking=True) for x in batch)
        views = [colour_views(global_cut, boxes[:, :2], colour[:, :2])]
        if local_cut.numel():
            views.append(colour_views(local_cut, boxes[:, 2:], colour[:, 2:]))
        lap("views")
        yield views, boxes.transpose(0, 1), [i for i in unreadable.tolist() if i >= 0]


def read_later(x):
    """Start to copy x to the host. Returns: a function that waits for it, but for nothing that was queued after it."""
    if x.device.type != "cuda":
        return x.tolist
    host, copied = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host.tolist()


def train(cfg, make_batches=None, observer=None):
    """Train a student and its teacher; under torchrun, as one of several processes. Returns the exit code.

    The last two arguments, by default `make_loader` and `Progress`, are for --benchmark to put its own in their place.
    """
    asked_to_stop = listen_for_signals()
    rank, world, device = start_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    total_batch = cfg.batch_size * world
    steps_per_epoch = len(images) // total_batch
    options = vars(cfg) | {"images in all": len(images), "images per step (--batch-size x processes)": total_batch}
    if not steps_per_epoch:
        raise BadInput(f"--batch-size {cfg.batch_size} x {world} processes: {cfg.data} has only {len(images)} images")
    steps = cfg.epochs * steps_per_epoch
    stop_at = min(steps, cfg.max_steps or steps)

    torch.manual_seed(cfg.seed)
    student, teacher = (Network(cfg, p).to(device, memory_format=torch.channels_last) for p in (cfg.drop_path, 0.0))
    if world > 1 and device.type == "cuda":
        student, teacher = map(nn.SyncBatchNorm.convert_sync_batchnorm, (student, teacher))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    grids = grids_of(cfg)
    centers = torch.zeros(1 if cfg.matching == "none" else 2, cfg.out_dim, device=device)
    parameters = [p for p in student.parameters() if p.requires_grad]
    last_layers = [p for name, p in student.named_parameters() if name.endswith(("head.direction", "head.gain"))]
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1], "decay": 1},     # weights
                                   {"params": [p for p in parameters if p.ndim <= 1], "decay": 0}],   # biases, norms
                                  lr=0, weight_decay=0, fused=True)
    precision = choose_precision(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    run = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)
    start = restore(cfg, run, centers, options)
    if all_mean(torch.tensor(start, dtype=torch.float64, device=device)).item() != start:
        raise BadInput(f"--output {cfg.output}: not all processes see the same checkpoint there; it must be shared")
    if cfg.compile:
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs as it is, and torch says so
        student.compile(), teacher.compile()
    ddp = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    progress = (observer or Progress)(cfg, images, rank, device, total_batch, start, steps, steps_per_epoch)
    if start >= stop_at:
        progress.say(f"nothing left to do: {start} steps are done, and --epochs or --max-steps asks for no more")
    loader = (make_batches or make_loader)(images, cfg, rank, world, range(start, stop_at), steps_per_epoch)
    batches = views_on(device, loader, progress.lap)
    batch, done, saved = next(batches, None), start, True
    for step in range(start, stop_at):
        epoch = step // steps_per_epoch
        lr = cosine(cfg.lr * total_batch / 256, cfg.min_lr, step, steps, int(cfg.warmup_epochs * steps_per_epoch))
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = group["decay"] * cosine(cfg.weight_decay, cfg.weight_decay_end, step, steps)
        momentum = cosine(cfg.teacher_momentum, 1, step, steps)
        teacher_temp = teacher_temp_at(epoch, cfg)
        torch.manual_seed(hash((cfg.seed, step, rank)))     # stochastic depth is a function of these, not of history

        views, boxes, unreadable = batch
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            with torch.no_grad():
                teacher_out = teacher(views[:1])
            progress.lap("teacher")
            student_out = ddp(views)
            progress.lap("student")
        whole, local = distillation_loss(student_out, teacher_out, centers, boxes, grids, teacher_temp=teacher_temp,
                                         matching=cfg.matching, hinge=cfg.hinge, impl=cfg.impl)
        progress.lap("loss")
        optimizer.zero_grad()
        scaler.scale(whole + local).backward()
        progress.lap("backward")
        scaler.unscale_(optimizer)
        if epoch < cfg.freeze_last_layer:
            for p in last_layers:                           # dropped after all processes have reduced it, so none waits
                p.grad = None
        norm = clip_gradients(parameters, cfg.clip_grad)

        # what the processes must know of each other besides gradients and batch norm, in one message: losses, stop, the
        # number of unreadable images, the teacher's mean rows; a NaN of one becomes a NaN of all
        means = teacher_means(teacher_out)
        told = torch.tensor([len(asked_to_stop), len(unreadable)], dtype=torch.float32).to(device, non_blocking=True)
        told = all_mean(torch.cat([torch.stack([whole.detach(), local.detach()]), told, means.flatten()]))
        figures = read_later(torch.cat([told[:4], told[4:].sum()[None], norm[None]]))
        progress.lap("update")
        batch = next(batches, None)                         # the GPU has the next views to colour while we wait here:
        whole, local, stop, lost, mean, norm = figures()    # the only wait for the GPU
        for term, value in {"global loss": whole, "local loss": local, "teacher": mean, "gradient": norm}.items():
            if not math.isfinite(value) and not (term == "gradient" and scaler.is_enabled()):   # fp16 skips such steps
                progress.say(f"gld.py: stopped: the {term} is {value} at step {step}, lr {lr:.3g}; the last checkpoint "
                             "is as it was, a lower --lr may help", file=sys.stderr)
                return 1

        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            # the centres follow this step's mean teacher logits, over all images, global views, patches and processes
            centers.lerp_(mean_logits(teacher_out, told[4:].view_as(means)), 1 - CENTER_MOMENTUM)
            # the teacher follows the student; batch norm's statistics (if any) are the teacher's own
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
        progress.lap("update")

        done = step + 1
        progress.update(done, dict(loss_global=whole, loss_local=local, grad_norm=norm), lr, round(lost * world),
                        unreadable, lambda: diagnose(teacher_out, centers, boxes, grids, teacher_temp, cfg))
        if (stop or done == stop_at or done % (cfg.save_every * steps_per_epoch) == 0) and not cfg.benchmark:
            saved = save(cfg, run, centers, done, options, rank, progress.say)
        if stop:
            break
    if not saved:
        return 1
    if done < stop_at:
        progress.say(f"asked to stop: saved at step {done}; the same command continues there")
    return CONTINUE_ME if done < stop_at else 0


# ======================================================================================= the paper ends here
# What follows is not the method: arguments, processes, images, checkpoints, progress, benchmark, picture, main.

NAMED_SETS = ("shapes", "cifar10")
CONTINUE_ME = 75                    # exit code of a run that was asked to stop and can go on (sysexits' EX_TEMPFAIL)
# What may differ between a run and its continuation; all else would change the numbers
FREE_OPTIONS = {"data", "preset", "output", "resume", "init_from", "save_every", "max_steps", "workers", "compile",
                "impl", "device", "batch_size", "precision"}


class BadInput(Exception):
    """What the user has to change, in one line; `main` prints it and exits with code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_arguments(argv=None):
    """Command line -> namespace in which every option is set, by the user or by the preset, and checked."""
    parser = Parser("gld.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", default="shapes", help="folder of images (in class folders or not), .tar of one, shapes or cifar10")
    add("--data-fraction", type=float, default=1.0, help="use this share of every class, always the same images")
    add("--preset", choices=("small", "paper"), help="which defaults; small unless --data is a path")
    for flag, small, paper, text in OPTIONS:
        how = dict(action=switch) if isinstance(paper, bool) else dict(type=type(paper))
        if isinstance(paper, tuple):
            how = dict(type=float, nargs=2, metavar=("LOW", "HIGH"))
        choices = {"matching": ("geometric", "similarity", "none"), "arch": ARCHS}.get(flag)
        add("--" + flag, default=argparse.SUPPRESS, help=f"{text} (small: {small}, paper: {paper})",
            **how, **(dict(choices=choices, metavar="NAME") if choices else {}))
    add("--output", default="output", help="folder for checkpoint.pt, backbone.pt and log.jsonl (output)")
    add("--resume", action=switch, default=True, help="continue OUTPUT/checkpoint.pt if it is there (yes)")
    add("--init-from", metavar="FILE", help="start from the student and teacher of this checkpoint.pt")
    add("--save-every", type=int, default=1, help="epochs between checkpoints (1)")
    add("--benchmark", type=int, metavar="N", help="measure N steps, tell where their time goes, save nothing")
    add("--show-matches", metavar="FILE.png", help="draw which patches match in the first image, and end")
    add("--max-steps", type=int, help="stop after so many steps; the schedules stay as long as --epochs says")
    add("--seed", type=int, default=0, help="of the first weights and of all that is drawn (0)")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 10), help="processes that cut views, for each GPU")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the networks (auto)")
    add("--compile", action=switch, default=False, help="torch.compile the networks (no)")
    add("--impl", choices=("auto", "triton", "torch"), default="auto", help="of the loss, see matching_kernels.py")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    cfg = parser.parse_args(argv)
    cfg.preset = cfg.preset or ("small" if cfg.data in NAMED_SETS else "paper")
    for flag, small, paper, _ in OPTIONS:
        name = flag.replace("-", "_")
        value = getattr(cfg, name, small if cfg.preset == "small" else paper)
        setattr(cfg, name, tuple(value) if isinstance(value, list) else value)
    check_arguments(cfg)
    return cfg


def check_arguments(cfg):
    """Every option is checked here, before any work. Raises BadInput."""
    folder = next(path for path in (Path(cfg.output), *Path(cfg.output).absolute().parents) if path.exists())
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    at_least = {"patch_size out_dim head_hidden head_bottleneck batch_size epochs save_every max_steps benchmark": 1,
                "local_views workers seed freeze_last_layer warmup_teacher_temp_epochs lr min_lr weight_decay "
                "weight_decay_end clip_grad warmup_epochs": 0, "teacher_temp warmup_teacher_temp": 1e-6}
    checks = [(getattr(cfg, name) is None or low <= getattr(cfg, name) < math.inf,
               f"--{name.replace('_', '-')} must be finite and at least {low:g}, got {getattr(cfg, name)}")
              for names, low in at_least.items() for name in names.split()]
    for name in ("global", "local"):
        size, stride = getattr(cfg, f"{name}_size"), max(1, stride_of(cfg.arch, cfg.patch_size))
        low, high = getattr(cfg, f"{name}_scale")
        checks += [(size > 0 and size % stride == 0,
                    f"--{name}-size must be a multiple of {stride} for {cfg.arch}, got {size}"),
                   (0 < low <= high <= 1, f"--{name}-scale must be LOW HIGH, 0 < LOW <= HIGH <= 1, got {low} {high}")]
    checks += [
        (0 < cfg.blur_sigma[0] <= cfg.blur_sigma[1] < 99, "--blur-sigma must be LOW HIGH with 0 < LOW <= HIGH < 99"),
        (0 < cfg.data_fraction <= 1, f"--data-fraction must be in (0, 1], got {cfg.data_fraction}"),
        (0 <= cfg.teacher_momentum <= 1, f"--teacher-momentum must be in [0, 1], got {cfg.teacher_momentum}"),
        (0 <= cfg.drop_path < 1, f"--drop-path must be in [0, 1), got {cfg.drop_path}"),
        (cfg.warmup_epochs <= cfg.epochs, f"--warmup-epochs {cfg.warmup_epochs:g} exceeds --epochs {cfg.epochs}"),
        (folder.is_dir() and os.access(folder, os.W_OK), f"--output {cfg.output}: not a folder that can be written"),
        (cfg.device != "cuda" or gpu, "--device cuda: torch sees no CUDA GPU here"),
        (cfg.precision != "fp16" or gpu, "--precision fp16 needs a CUDA GPU"),
        (cfg.impl != "triton" or gpu or os.getenv("TRITON_INTERPRET") == "1", "--impl triton needs a CUDA GPU"),
    ]
    for passed, message in checks:
        if not passed:
            raise BadInput(message)


def start_processes(cfg):
    """Join the other processes of torchrun, if there are any. Returns: rank, number of processes, device."""
    rank, world, local = (int(os.environ.get(name, fallback)) for name, fallback in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cfg.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise BadInput(f"{local + 1} processes on a machine with {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return rank, world, device


def all_mean(x):
    """Mean of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def choose_precision(cfg, device):
    """What the networks compute in; weights, teacher, loss and centres are float32 in any case."""
    name = cfg.precision
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def outlive_signals(worker):
    """A signal to the whole job is for the main process to answer, so a loader's worker works on for 30 s after it.

    It may not ignore SIGTERM for good: that is also how Python ends the workers that are left when a program exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):                          # Windows has none
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def listen_for_signals():
    """SIGTERM and Ctrl-C ask for a stop after the step at hand. Returns: a list, empty until one of them came."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


# ------------------------------------------------------------------------------------------------ images

def decode(data):
    """An image file's bytes -> (3, H, W) uint8 RGB, turned as its EXIF says. Raises OSError or others if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # remarks on odd but readable files
        image = Image.open(io.BytesIO(data))                # reads the header only
        if image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and hasattr(torchvision.io, "decode_image"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            rgb = torchvision.io.ImageReadMode.RGB
            decoded = torchvision.io.decode_image(encoded, rgb, apply_exif_orientation=True)
            if decoded.dtype == torch.uint8:
                return decoded
        image = ImageOps.exif_transpose(image)              # CMYK, palettes, WebP, 16 bits, transparency
        if image.mode.startswith("I"):                      # 16 bits: convert("RGB") would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@functools.cache
def open_archive(path):
    return os.open(path, os.O_RDONLY)


@dataclass
class Images:
    """Images in memory, (n, H, W, 3) uint8, or the names of their files in a folder or .tar, an array of bytes; and
    their labels (n,), for files places in `classes`, the names of the class folders.

    A list of a million str would be copied into every worker as its reference counts change; an array is shared.
    """
    items: np.ndarray
    labels: np.ndarray
    root: str = ""                                          # the folder or .tar
    classes: np.ndarray = None
    spans: np.ndarray = None                                # (n, 2) int64: offset and size of each file in the .tar

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.items[i])) if self.items.ndim == 1 else f"image {i}"

    def read(self, i):
        """(3, H, W) uint8. Raises OSError and others if the file cannot be read or is no image."""
        if self.items.ndim > 1:
            return torch.from_numpy(self.items[i]).permute(2, 0, 1)
        if self.spans is not None:
            offset, size = self.spans[i].tolist()
            return decode(os.pread(open_archive(self.root), size, offset))
        return decode(Path(self.name(i)).read_bytes())


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def list_archive(path):
    """The regular files of an uncompressed .tar: [(name, offset, size)]. Nothing is unpacked. Raises BadInput."""
    found = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members.clear()                     # it would remember all of them, a kilobyte each
                if member.isreg() and not member.issparse():
                    found.append((os.fsencode(member.name), member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"--data {path}: no whole, uncompressed .tar ({error})") from None
    return found


def load_images(data, split, fraction=1.0, must_split=False):
    """The `Images` of --data: a name, or a folder or .tar, of which the part below `split`/ if there is one.

    Raises BadInput; with must_split also if there is no such part.
    """
    root = Path(data)
    if data == "shapes":
        images = Images(*draw_shapes(2400 if split == "train" else 1200, seed=("train", "val").index(split)))
    elif data == "cifar10":
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"--data cifar10: neither in ./data nor to be downloaded ({error})") from None
        images = Images(found.data, np.array(found.targets))
    elif root.exists():
        if root.suffix.lower() in IMAGE_SUFFIXES:
            files, top = [(os.fsencode(root.name), 0, 0)], b""
            root = root.parent
        elif root.is_dir():
            part = root / split if (root / split).is_dir() else root
            files = [(os.fsencode(os.path.relpath(os.path.join(folder, name), root)), 0, 0)
                     for folder, _, names in os.walk(part, followlinks=True) for name in names]
            top = b""
        else:
            files = list_archive(root)
            names = [name for name, _, _ in files] or [b""]
            top = os.path.commonprefix([min(names), max(names)])                            # folders that hold all
            top = top[:top.rfind(b"/") + 1]
        below = top + split.encode() + b"/"
        if any(name.startswith(below) for name, _, _ in files):
            top = below
        elif must_split:
            raise BadInput(f"--data {data}: must hold train/ and val/, or be one of {', '.join(NAMED_SETS)}")
        suffixes = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
        files = sorted(file for file in files if file[0].startswith(top) and file[0].lower().endswith(suffixes))
        if not files:
            raise BadInput(f"--data {root}: no images ({' '.join(IMAGE_SUFFIXES)}) in it")
        names, *spans = zip(*files)
        classes = [name[len(top):].rpartition(b"/")[0].partition(b"/")[0] for name in names]   # first folder, or none
        classes, labels = np.unique(classes, return_inverse=True)
        images = Images(np.array(names), labels, str(root), classes, None if root.is_dir() else np.array(spans).T)
    else:
        raise BadInput(f"--data {data}: there is no such folder or .tar, and the names are {', '.join(NAMED_SETS)}")
    if fraction < 1:
        rng = np.random.default_rng(0)
        classes = [rng.permutation(np.flatnonzero(images.labels == c)) for c in np.unique(images.labels)]
        keep = np.sort(np.concatenate([c[:math.ceil(fraction * len(c))] for c in classes]))
        images = replace(images, items=images.items[keep], labels=images.labels[keep],
                         spans=None if images.spans is None else images.spans[keep])
    return images


def draw_shapes(n, seed, size=48):
    """The built-in set: images (n, size, size, 3) uint8 and labels (n,) of 12 classes.

    The class is the shape that tiles the image. Place, scale, turn, colours (each a slow gradient) and which of shape
    and ground is the lighter one are drawn, so that no pixel gives the class away.
    """
    shapes = (                                              # of u, v in [-1, 1] and r, the distance from the centre
        lambda u, v, r: r < 0.7,                                                            # disks
        lambda u, v, r: (r > 0.45) & (r < 0.85),                                            # rings
        lambda u, v, r: np.maximum(abs(u), abs(v)) < 0.6,                                   # squares
        lambda u, v, r: abs(np.maximum(abs(u), abs(v)) - 0.68) < 0.18,                      # frames
        lambda u, v, r: np.maximum(v, 0.87 * abs(u) - v / 2) < 0.45,                        # triangles
        lambda u, v, r: np.minimum(abs(u), abs(v)) < 0.22,                                  # a lattice
        lambda u, v, r: abs(v) < 0.4,                                                       # lying stripes
        lambda u, v, r: abs(u) < 0.4,                                                       # standing stripes
        lambda u, v, r: abs(abs(u) - abs(v)) < 0.25,                                        # crosses
        lambda u, v, r: abs(u) + abs(v) < 0.75,                                             # diamonds
        lambda u, v, r: (u > 0) == (v > 0),                                                 # checks
        lambda u, v, r: abs(v - abs(u) + 0.4) < 0.3,                                        # zigzags
    )
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    blend = np.stack([y * x, y * (size - x), (size - y) * x, (size - y) * (size - x)], -1) / size ** 2
    images, labels = np.empty((n, size, size, 3), np.uint8), np.arange(n) % len(shapes)
    for image, label in zip(images, labels):
        pitch, turn, shift = rng.uniform(7, 16), rng.uniform(-0.6, 0.6), rng.uniform(0, 2, 2)
        u = (2 * (x * np.cos(turn) + y * np.sin(turn)) / pitch + shift[0]) % 2 - 1
        v = (2 * (y * np.cos(turn) - x * np.sin(turn)) / pitch + shift[1]) % 2 - 1
        dark, light = blend @ rng.uniform(0, 0.5, (4, 3)), blend @ rng.uniform(0.5, 1, (4, 3))  # between four corners
        inside = shapes[label](u, v, np.hypot(u, v)) ^ (rng.uniform() < 0.5)
        image[:] = (255 * np.where(inside[..., None], light, dark) + rng.normal(0, 12, image.shape)).clip(0, 255)
    return images, labels


class ViewDataset(torch.utils.data.Dataset):
    """(epoch, i) -> `cut_views` of image i, and -1; or those of another image, and i, if i cannot be read.

    All of it is a function of the seed, the epoch and i, not of the process or of what it did before.
    """

    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.cfg.seed, epoch, i))
        image, unreadable = None, -1
        for _ in range(100):
            try:
                image = self.images.read(i)
                break
            except Exception:                               # decoders raise all kinds of errors for broken files
                unreadable = i if unreadable < 0 else unreadable
                i = int(rng.integers(len(self.images)))
        if image is None:
            raise BadInput(f"--data: 100 files in a row cannot be read, the first is {self.images.name(unreadable)}")
        state = torch.get_rng_state()                       # of the CPU; torch.manual_seed would start the GPU
        torch.default_generator.manual_seed(int(rng.integers(2 ** 62)))
        views = cut_views(image, self.cfg)
        torch.set_rng_state(state)
        return *views, unreadable


def make_loader(images, cfg, rank, world, steps, steps_per_epoch):
    """Batches of this process for these steps. All processes together get the same images however many they are."""
    def keys():
        order, ordered = None, -1
        for step in steps:
            epoch, at = divmod(step, steps_per_epoch)
            if epoch != ordered:
                order, ordered = np.random.default_rng((cfg.seed, epoch)).permutation(len(images)), epoch
            first = (at * world + rank) * cfg.batch_size
            yield [(epoch, i) for i in order[first:first + cfg.batch_size].tolist()]

    pin = cfg.device != "cpu" and torch.cuda.is_available()
    return torch.utils.data.DataLoader(ViewDataset(images, cfg), batch_sampler=keys(), num_workers=cfg.workers,
                                       pin_memory=pin, worker_init_fn=outlive_signals)


# ------------------------------------------------------------------------------------------------ checkpoints

def load_file(path, flag):
    """A checkpoint as data: nothing in it is run. Raises BadInput for a file that is no whole, harmless checkpoint."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):                # the official checkpoints hold one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{flag} {path}: there is no such file") from None
    except Exception:                                       # torch raises many kinds for a file that is not its own
        raise BadInput(f"{flag} {path}: damaged, no checkpoint, or one that would run code when loaded") from None
    if not isinstance(content, dict):
        raise BadInput(f"{flag} {path}: holds a {type(content).__name__}, not the state of a network")
    return content


def load_strictly(module, state, what):
    """load_state_dict whose complaint, the keys that do not fit, is one line. Raises BadInput."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise BadInput(f"{what}: {' '.join(str(error).split())[:300]}") from None


def restore(cfg, run, centers, options):
    """Continue OUTPUT/checkpoint.pt, or start from --init-from, or from nothing. Returns: the first step to do."""
    path = Path(cfg.output, "checkpoint.pt")
    if not (cfg.resume and path.exists()):
        if cfg.init_from:
            saved = load_file(cfg.init_from, "--init-from")
            for name in ("student", "teacher"):
                if name not in saved:
                    raise BadInput(f"--init-from {cfg.init_from}: holds no {name}; a checkpoint.pt of gld.py does")
                load_strictly(run[name], saved[name], f"--init-from {cfg.init_from}, {name}")
        return 0
    saved = load_file(path, "--output")
    if not isinstance(saved.get("options"), dict) or not {*run, "centers", "step"} <= saved.keys():
        raise BadInput(f"--output {cfg.output}: checkpoint.pt is none of gld.py's; give another, or --no-resume")
    for name, before in saved["options"].items():
        if name not in FREE_OPTIONS and before != options.get(name, before):
            flag = name if " " in name else "--" + name.replace("_", "-")
            raise BadInput(f"{flag}: {options[name]} here, but {path} was made with {before}; give the same to "
                           "continue, or another --output, or --no-resume")
    for name, part in run.items():
        if saved[name]:                                     # there is no scaler's state but for fp16
            load_strictly(part, saved[name], f"{path}, {name}")
    centers.copy_(saved["centers"])
    return saved["step"]


def save(cfg, run, centers, step, options, rank, say):
    """Write checkpoint.pt and backbone.pt; a new file takes the old one's place only once it is whole and on disk.

    Returns, on all processes once it is done: whether that worked. If not (no space, say), training can go on.
    """
    state = {name: part.state_dict() for name, part in run.items()}
    state |= dict(centers=centers, step=step, options=options)
    backbone = {name: x.cpu() for name, x in run["teacher"].backbone.net.state_dict().items()}
    failed = torch.zeros(1, device=centers.device)
    try:
        for name, content in (("checkpoint", state), ("backbone", backbone)) * (rank == 0):
            path = Path(cfg.output, name + ".pt")
            with open(path.with_suffix(".tmp"), "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:                # torch tells of a full disk by a RuntimeError
        say(f"gld.py: cannot write {path} at step {step} ({' '.join(str(error).split())[:100]}); what was there is "
            "kept, and the next save tries again", file=sys.stderr)
        failed += 1
        with contextlib.suppress(OSError):
            path.with_suffix(".tmp").unlink()
    return not all_mean(failed).item()


# ------------------------------------------------------------------------------------------------ progress

@torch.no_grad()
def diagnose(teacher, centers, boxes, grids, teacher_temp, cfg):
    """Figures that tell a healthy run from a collapsed one."""
    log_p = F.log_softmax((teacher.image @ teacher.global_weight.T - centers[0]) / teacher_temp, dim=-1)
    z = teacher.image.flatten(0, 2)                                                         # (Q·B, D), unit length
    matched = float(cfg.matching == "similarity")
    if cfg.matching == "geometric":
        weights = [geometric_matches(boxes[:2].flip(0), boxes[:2], grids[0], grids[0], cfg.hinge)[1],
                   geometric_matches(boxes[2:, None], boxes[None, :2], grids[1], grids[0], cfg.hinge)[1]]
        matched = torch.cat([w.flatten() for w in weights]).mean().item()
    spread = 1 - z.mean(0).square().sum().item()            # the variance of z: 0 where all images give the same
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    return dict(matched=matched, entropy=entropy, center_norm=centers[0].norm().item(), spread=spread)


class Progress:
    """One line that rewrites itself on a terminal, plain lines elsewhere; one object per epoch in log.jsonl."""

    def __init__(self, cfg, images, rank, device, total_batch, start, steps, steps_per_epoch):
        self.cfg, self.images, self.quiet, self.device = cfg, images, rank > 0, device
        self.total_batch, self.start, self.steps, self.steps_per_epoch = total_batch, start, steps, steps_per_epoch
        self.began = self.shown = time.time()
        self.sums, self.count, self.lost, self.named, self.laps, self.waited, self.worked = {}, 0, 0, set(), [], 0, 1e-9
        self.clear = "\r\033[K" if sys.stdout.isatty() else ""            # what rewrites the line, on a terminal
        if not self.quiet:
            try:
                Path(cfg.output).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--output {cfg.output}: {error.strerror}") from None
        self.say(f"{cfg.matching} matching, preset {cfg.preset}, {cfg.arch} on {device.type}, {len(images)} images of "
                 f"{cfg.data}: {steps} steps of {total_batch} images, from step {start}; output in {cfg.output}/")

    def lap(self, phase):
        """Here ends a phase of the step. A GPU notes it by its own clock, so that nobody waits for it."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.laps.append((phase, now))

    def phases(self):
        """{phase: seconds} since this was last asked."""
        seconds = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, begin), (phase, end) in pairwise(self.laps):
            took = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
            seconds[phase] = seconds.get(phase, 0) + took
        self.laps = self.laps[-1:]
        return seconds

    def update(self, done, figures, lr, lost, unreadable, diagnose):
        """Take in the step that is done, in which `lost` images of all processes could not be read, of this process
        those numbered `unreadable`; `diagnose` is called for more figures only if this step is shown."""
        for i in set(unreadable) - self.named:
            print(f"{self.clear}cannot be read, another image takes its place: {self.images.name(i)}", flush=True)
            self.named.add(i)
        self.lost += lost
        if self.lost > max(1, self.steps_per_epoch * self.total_batch // 100):
            raise BadInput(f"--data {self.cfg.data}: {self.lost} images of one epoch cannot be read, more than 1 %")
        self.count += 1
        for name, value in figures.items():                 # fp16 has steps with an infinite gradient, and skips them
            self.sums[name] = self.sums.get(name, 0) + (value if math.isfinite(value) else 0)
        now, ended = time.time(), done % self.steps_per_epoch == 0 or done in (self.steps, self.cfg.max_steps)
        if ended or done == self.start + 1 or now - self.shown > (0.5 if self.clear else 30):
            seconds = self.phases()
            self.waited, self.worked = self.waited + seconds.get("data", 0), self.worked + sum(seconds.values())
            self.shown = now
            if not self.quiet:
                self.show(done, lr, ended, diagnose())
        if ended:
            self.sums, self.count, self.lost, self.waited, self.worked = {}, 0, 0, 0, 1e-9

    def show(self, done, lr, ended, diagnosis):
        cfg, speed = self.cfg, (done - self.start) * self.total_batch / (time.time() - self.began)
        left = timedelta(seconds=int((self.steps - done) * self.total_batch / speed))
        record = {name: value / self.count for name, value in self.sums.items()} | diagnosis
        record |= dict(epoch=(done - 1) // self.steps_per_epoch, step=done, lr=lr, images_per_second=speed,
                       waiting=self.waited / self.worked, unreadable=self.lost, peak_gib=peak_memory(self.device))
        line = ("epoch {epoch} step {step} | loss global {loss_global:.3f} local {loss_local:.3f} matched "
                "{matched:.0%} entropy {entropy:.2f} lr {lr:.1e} | {images_per_second:.0f} images/s, {waiting:.0%} "
                "waiting for data, {peak_gib:.1f} GiB")
        self.say(f"{line.format(**record)}, {left} left", end="\n" if ended or not self.clear else "")
        if not ended:
            return
        record["kl"] = record["loss_global"] / (1 if cfg.matching == "none" else 0.5) - record["entropy"]
        try:
            with open(Path(cfg.output, "log.jsonl"), "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.say(f"gld.py: cannot write to log.jsonl ({error.strerror}); training goes on", file=sys.stderr)
        most = math.log(cfg.out_dim)
        healthy = record["spread"] > 1e-3 < record["entropy"] < 0.999 * most
        if record["epoch"] >= cfg.warmup_epochs and not healthy:
            self.say(f"looks collapsed: teacher entropy {record['entropy']:.3f} of at most {most:.3f}, spread of "
                     f"features {record['spread']:.4f}; try a lower --lr or --teacher-temp, or --norm-last-layer")
        if record["waiting"] > 0.2:
            self.say(f"{record['waiting']:.0%} of the time went by waiting for data: try more --workers (now "
                     f"{cfg.workers}), or smaller images; --benchmark 50 tells what is slow")

    def say(self, message, **how):
        if not self.quiet:
            print(self.clear + message, flush=True, **how)


# ------------------------------------------------------------------------------------------------ measuring, showing

class Measured(Progress):
    """In the place of `Progress`: keeps the laps of all steps but the first few, and says nothing."""
    WARM_UP = 5

    def update(self, done, *_):
        if done == self.start + self.WARM_UP:
            self.phases()
        if done == self.cfg.max_steps:
            self.seconds = self.phases()

    def say(self, message, **how):
        pass


PHASES = {  # of a step: what it is, and what makes it shorter
    "data": ("waiting for data", "more --workers, if cores are idle"),
    "views": ("colours of the views", "fewer --local-views"),
    "teacher": ("teacher", "--precision bf16 or --compile on a GPU, a smaller --arch"),
    "student": ("student, forward", "--precision bf16 or --compile on a GPU, a smaller --arch"),
    "loss": ("loss, forward", "a smaller --out-dim"),
    "backward": ("backward", "--precision bf16 or --compile on a GPU, a smaller --arch or --out-dim"),
    "update": ("clipping, optimizer, averages", "a larger --batch-size"),
}


def benchmark(cfg):
    """--benchmark N: images per second of each part, where the time of a step goes, what to turn. Saves nothing."""
    rank, world, device = start_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    per_step = cfg.batch_size * world
    cfg.resume, cfg.max_steps = False, Measured.WARM_UP + cfg.benchmark
    cfg.epochs = max(cfg.epochs, 1 + cfg.max_steps // max(1, len(images) // per_step))
    rates, observers = {}, []

    def observer(*args):
        observers.append(Measured(*args))
        return observers[-1]

    with tempfile.TemporaryDirectory() as cfg.output:
        if code := train(cfg, observer=observer):
            return code
        loader = iter(make_loader(images, cfg, rank, world, range(cfg.max_steps), max(1, len(images) // per_step)))
        resident = [next(loader) for _ in range(Measured.WARM_UP)][-1]
        began = time.perf_counter()
        rates["data alone"] = sum(len(boxes) for _, _, boxes, _, _ in loader) * world / (time.perf_counter() - began)
        resident = [x.to(device) for x in resident[:4]] + [resident[4]]
        if code := train(cfg, lambda *_: repeat(resident), observer):
            return code
    together, alone = ({phase: 1000 * x.seconds.get(phase, 0) / cfg.benchmark for phase in PHASES} for x in observers)
    rates["views on the device alone"] = 1000 * per_step / alone["views"]
    rates["step without waiting for data"] = 1000 * per_step / sum(alone.values())
    rates["all together"] = 1000 * per_step / sum(together.values())
    slowest = max(together, key=together.get)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = dict(arch=cfg.arch, matching=cfg.matching, processes=world, batch_size=cfg.batch_size, workers=cfg.workers,
                 steps=cfg.benchmark, device=name, torch=torch.__version__, peak_gib=round(peak_memory(device), 2))
    if rank:
        return 0
    print(", ".join(f"{key} {value}" for key, value in found.items()) + "\nimages/s")
    for name, rate in rates.items():
        print(f"  {name:30} {rate:8.0f}" + f"  ({cfg.workers} workers)" * (name == "data alone"))
    print("ms of a step")
    for phase, (name, _) in PHASES.items():
        print(f"  {name:30} {together[phase]:8.1f}  {together[phase] / sum(together.values()):4.0%}")
    print(f"longest: {PHASES[slowest][0]}; shorter with {PHASES[slowest][1]}")
    print(json.dumps(found | dict(images_per_second=rates, milliseconds=together, longest=slowest)))
    return 0


def show_matches(cfg):
    """--show-matches FILE.png: draw which patches of the views of one image, the first of --data, are compared.

    Returns: the picture and its panels, a list of (matching, teacher view, student view, left, top, side). Each row
    has a teacher view, then student views. Number and frame of a patch are those of the teacher patch it matches; a
    patch without a match is dark. Below geometric stands similarity, with the networks of --init-from.
    """
    dataset, grids = ViewDataset(load_images(cfg.data, "train"), cfg), grids_of(cfg)
    batch = torch.utils.data.default_collate([dataset[0, 0]])
    views, boxes, _ = next(views_on(torch.device("cpu"), [batch]))

    def geometric(q, v):
        return geometric_matches(boxes[v, 0], boxes[q, 0], grids[v >= 2], grids[0], cfg.hinge)

    matchings = dict(geometric=geometric)
    if cfg.init_from:
        saved, features = load_file(cfg.init_from, "--init-from"), []
        for name in ("student", "teacher"):
            backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size).eval()
            state = {key[9:]: x for key, x in saved.get(name, {}).items() if key.startswith("backbone.")}
            load_strictly(backbone, state, f"--init-from {cfg.init_from}, {name}")
            with torch.no_grad():
                features.append([x for same in views for x in backbone(same[:, 0])[1]])     # of a view: (N, C)
        matchings["similarity"] = lambda q, v: (similarity_matches(features[0][v], features[1][q]),
                                                torch.ones(len(features[0][v])))

    mean, std = (of_channels(values, boxes.device) for values in PIXELS)
    shown = [x[0] * std + mean for same in views for x in same][:6]                         # (3, S, S) as seen
    outlined = dict(fill="white", stroke_width=1, stroke_fill="black")
    try:
        original = TF.to_pil_image(dataset.images.read(0))
    except Exception:
        raise BadInput(f"--data: {dataset.images.name(0)} cannot be read") from None
    scale = min(700 / original.width, 300 / original.height)
    original = original.resize([max(1, round(scale * side)) for side in original.size])
    draw = ImageDraw.Draw(original)
    for v, (top, left, height, width, flip) in reversed(list(enumerate((scale * boxes[:6, 0]).tolist()))):
        draw.rectangle((left, top, left + width, top + height), outline=frame_colour(v, (2, 3)), width=2)
        draw.text((left + 4, top + 3), f"{v} mirrored" if flip else f"{v}", **outlined)
    canvas = Image.new("RGB", (1200, 340 + 560 * len(matchings)), "white")
    canvas.paste(original, (10, 10))
    legend = ("Where the views were cut: 0 and 1 are global, the others local.\n\n"
              "Below, left: a view as the teacher sees it.\nRight of it: the others, as the student sees them.\n"
              "Number and frame: the teacher patch that a patch\nis compared with. Dark: it is compared with none.")
    ImageDraw.Draw(canvas).text((730, 20), legend, fill="black")
    panels = []
    for row, (name, q) in enumerate((name, q) for name in matchings for q in (0, 1)):
        left, top = 10, 370 + 280 * row
        ImageDraw.Draw(canvas).text((left, top - 30), f"{name} matching with view {q}", fill="black")
        for v in (q, *(v for v in range(len(shown)) if v != q)):
            side, (rows, cols) = 230 if v < 2 else 160, grids[v >= 2]
            index, weight = (range(rows * cols), [1] * rows * cols) if v == q else matchings[name](q, v)
            panel = TF.to_pil_image(shown[v].clamp(0, 1)).resize((side, side), Image.Resampling.NEAREST)
            for n, (match, matched) in enumerate(zip(index, weight)):
                x, y = side * (n % cols) // cols, side * (n // cols) // rows
                patch = (x, y, side * (n % cols + 1) // cols, side * (n // cols + 1) // rows)
                if not matched:
                    panel.paste(panel.crop(patch).point(lambda value: value // 4), patch)
                    continue
                colour = frame_colour(int(match), grids[0])
                ImageDraw.Draw(panel).rectangle((x + 1, y + 1, patch[2] - 2, patch[3] - 2), outline=colour, width=2)
                if side >= 22 * cols:
                    ImageDraw.Draw(panel).text((x + 6, y + 4), str(int(match)), **outlined)
            canvas.paste(panel, (left, top))
            label = f"view {v}" + ", mirrored" * bool(boxes[v, 0, 4]) + ", the teacher's" * (v == q)
            ImageDraw.Draw(canvas).text((left, top - 14), label, fill="black")
            panels.append((name, q, v, left, top, side))
            left += side + 10
    return canvas, panels


def frame_colour(n, grid):
    """A bright colour for patch n of a grid: its column gives the hue, its row the strength."""
    rows, cols = grid
    return f"hsv({360 * (n % cols) // cols}, {100 - 60 * (n // cols) // rows}%, 100%)"


def peak_memory(device):
    """GiB: of the GPU's allocator, or of this process where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "linux" else 2 ** 30)


def guarded(script, work):
    """Exit code of work(): its own, or 2 for bad input, or 1 for a failure of the system, each told in one line."""
    rank = int(os.environ.get("RANK", 0))
    try:
        code = work()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except (BadInput, OSError, RuntimeError) as error:
        # a worker process wraps its error in a traceback, whose last part is the message
        message = str(error).split("BadInput: ")[-1].strip()
        bad_input = isinstance(error, BadInput)
        known = {"DataLoader worker (pid": "a process that cuts views died: too little memory (fewer --workers?) or "
                                           "too little shared memory (docker --shm-size)",
                 "onnection ": "another process of this run died", "imed out": "another process did not answer"}
        for key, text in known.items():
            if key in message and not bad_input and (dist.is_initialized() or "worker" in key):
                message = f"{text}; the same command continues from the last checkpoint"
                break
        else:
            if isinstance(error, RuntimeError):
                raise                                       # a fault of the program: its traceback is wanted
        # bad input that every process meets is told once a node
        if not (bad_input and os.environ.get("LOCAL_RANK", "0") != "0" and "in DataLoader worker" not in str(error)):
            print(f"{script}: error: {f'process {rank}: ' if rank else ''}{message}", file=sys.stderr)
        traceback.clear_frames(error.__traceback__)         # frees a loader in them, which then ends its workers
        return 2 if bad_input else 1


def main(argv=None):
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 75 asked to stop (run it again to continue)."""
    def work():
        cfg = parse_arguments(argv)
        if cfg.show_matches:
            picture, _ = show_matches(cfg)
            try:
                picture.save(cfg.show_matches)
            except (OSError, ValueError) as error:
                raise BadInput(f"--show-matches {cfg.show_matches}: {error}") from None
            return 0
        return benchmark(cfg) if cfg.benchmark else train(cfg)

    return guarded("gld.py", work)


if __name__ == "__main__":
    sys.exit(main())
