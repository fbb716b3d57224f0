# SPDX-License-Identifier: MIT
"""Global-Local Self-Distillation (GLSD, WACV 2023) in one file.

    python gld.py                                             # trains on the built-in dataset `shapes`: 1-2 minutes
    python eval_knn.py                                        # how good are the features?
    python gld.py --data PATH/TO/IMAGES --arch vit_small      # your images, one GPU
    torchrun --nproc_per_node=8 gld.py --matching geometric --data IMAGENET/train       # the paper's run

A student network learns from its own EMA teacher, without labels. The student sees V views (crops) of an image, the
teacher only the Q = 2 global ones. For a whole view, the student learns to predict the teacher's output for another
view of the same image; this is DINO. For every patch, it also learns to predict the teacher's output for the matching
patch of that view. Which patch matches? `geometric`: the patch that shows the same place of the image. `similarity`
(EsViT): the patch with the most similar features. `none`: no patch matching; this is plain DINO.

    B       images in the batch of one process       C    width of the backbone's features
    V, Q    student views (2 global + L local), teacher views (the 2 global ones)
    N       patches of one view (grid rows x cols, row-major)
    D, K    width of a head's bottleneck z, output dimension of a head ("prototypes")
    box     where a view was cropped: (top, left, height, width, flip), pixels of the original image

Read from top to bottom: options, views, networks, loss, training. After "the paper ends here" come data files,
checkpoints, logging and error handling.
"""
import argparse
import contextlib
import difflib
import functools
import io
import json
import math
import os
import signal
import sys
import tarfile
import time
import traceback
import warnings
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
from torch.profiler import record_function
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock
from torchvision.ops import StochasticDepth
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

try:
    import fcntl                        # Windows has neither of these two
    import resource
except ImportError:
    fcntl = resource = None

from matching_kernels import geometric_matches, head_cross_entropy, similarity_matches

ARCHS = ("conv_tiny", "vit_tiny", "vit_small", "vit_base", "swin_t", "swin_s", "swin_b", "resnet50")
STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)           # of ImageNet

OPTIONS = {  # group: (flag, value of --preset small, of --preset paper, choices or (lowest, highest), meaning)
    "data": (
        ("data", "shapes", "shapes", None, "folder of images, .tar of one, or a built-in dataset: shapes, cifar10"),
        ("data-fraction", 1.0, 1.0, (1e-9, 1), "use this fraction of each class, always the same images"),
    ),
    "views": (
        ("global-size", 32, 224, (1, 9999), "side of a global view, pixels"),
        ("local-size", 16, 96, (1, 9999), "side of a local view, pixels"),
        ("local-views", 4, 8, (0, 99), "L, number of local views per image"),
        ("global-scale", [0.4, 1.0], [0.4, 1.0], (1e-9, 1), "crop scale of a global view (fraction of the area)"),
        ("local-scale", [0.1, 0.4], [0.05, 0.4], (1e-9, 1), "crop scale of a local view (fraction of the area)"),
        ("blur-sigma", [0.1, 0.5], [0.1, 2.0], (1e-9, 99), "range of the Gaussian blur's sigma, pixels"),
    ),
    "model": (
        ("arch", "conv_tiny", "swin_t", ARCHS, "backbone: " + ", ".join(ARCHS)),
        ("patch-size", 8, 16, (1, 999), "patch size of a ViT, pixels"),
        ("drop-path", 0.0, -1.0, (0, 0.999), "stochastic depth of the student; -1: 0.2 for swin_s, swin_b, else 0.1"),
        ("out-dim", 256, 65536, (2, 1e9), "K, output dimension of a head"),
        ("head-hidden", 128, 2048, (1, 1e6), "hidden width of a head"),
        ("head-bottleneck", 64, 256, (1, 1e6), "D, width before the last layer of a head"),
        ("norm-last-layer", True, False, None, "fix the weight-norm magnitude of the last layer at 1"),
        ("init-from", "", "", None, "initialise student and teacher from this checkpoint.pt"),
    ),
    "loss": (
        ("matching", "geometric", "geometric", ("geometric", "similarity", "none"),
         "which patches match: geometric, similarity, or none (no patch matching, DINO)"),
        ("hinge", True, True, None, "geometric matching: mask patches without a teacher patch close by"),
        ("teacher-temp", 0.04, 0.07, (1e-6, 1e6), "teacher temperature"),
        ("warmup-teacher-temp", 0.04, 0.04, (1e-6, 1e6), "teacher temperature at the start"),
        ("warmup-teacher-temp-epochs", 0, 30, (0, 1e9), "epochs of linear warm-up of the teacher temperature"),
    ),
    "optimisation": (
        ("epochs", 10, 300, (1, 1e9), "passes over the data"),
        ("batch-size", 32, 32, (1, 1e6), "images per process"),
        ("lr", 1.6e-2, 5e-4, (0, 1e6), "learning rate per 256 images of the total batch"),
        ("min-lr", 1e-6, 1e-6, (0, 1e6), "learning rate at the end (cosine)"),
        ("warmup-epochs", 1.0, 10.0, (0, 1e9), "linear warm-up of the learning rate"),
        ("weight-decay", 0.04, 0.04, (0, 1e6), "weight decay at the start"),
        ("weight-decay-end", 0.4, 0.4, (0, 1e6), "weight decay at the end (cosine)"),
        ("clip-grad", 3.0, 3.0, (0, 1e9), "largest gradient norm of each parameter; 0: no clipping"),
        ("freeze-last-layer", 0, 1, (0, 1e9), "epochs in which the last layer of the heads is frozen"),
        ("teacher-momentum", 0.99, 0.996, (0, 1), "momentum of the EMA teacher at the start (cosine to 1)"),
        ("seed", 0, 0, (0, 2 ** 32), "random seed"),
    ),
    "run (may change when a run is resumed)": (
        ("output", "output", "output", None, "folder for checkpoint.pt, backbone.pt and log.jsonl"),
        ("resume", True, True, None, "resume from OUTPUT/checkpoint.pt if it exists"),
        ("save-every", 1, 1, (1, 1e9), "epochs between checkpoints"),
        ("eval-every", -1, -1, (0, 1e9), "epochs between k-NN evaluations; 0: none; -1: 1 for shapes, else 0"),
        ("max-steps", 0, 0, (1, 1e9), "stop after this many steps; the schedules still follow --epochs (0: do not)"),
        ("profile", 0, 0, (1, 1e6), "report time per phase of N steps, and save no checkpoint"),
        ("workers", min(os.cpu_count() or 1, 10), min(os.cpu_count() or 1, 10), (0, 999), "DataLoader workers per GPU"),
        ("precision", "auto", "auto", ("auto", "bf16", "fp16", "fp32"), "network compute dtype"),
        ("compile", False, False, None, "torch.compile the networks"),
        ("impl", "auto", "auto", ("auto", "triton", "torch"), "implementation of the loss, see matching_kernels.py"),
        ("device", "auto", "auto", ("auto", "cpu", "cuda"), "auto: cuda if available"),
    ),
}


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
    """One image (3, H, W) uint8 -> [global Views, local Views (if any)]. This is all that a DataLoader worker does."""
    # per view: probability of blur, probability of solarisation
    sizes = ((cfg.global_size, cfg.global_scale, [(1.0, 0.0), (0.1, 0.2)]),
             (cfg.local_size, cfg.local_scale, [(0.5, 0.0)] * cfg.local_views))
    return [draw_views(image, size, scale, cfg.blur_sigma, views) for size, scale, views in sizes if views]


def draw_views(image, size, scale, blur_sigma, probabilities):
    """Views of one size, drawn from torch's random generator with DINO's distribution; probabilities: per view."""
    views = []
    for blur_probability, solarise_probability in probabilities:
        flip, jittered, grey, strength, blurred, solarised = torch.rand(6).tolist()
        box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))        # top, left, height, width
        order, *jitter = ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
        sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * strength
        views.append((TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BICUBIC, antialias=True),
                      [*box, float(flip < 0.5)],
                      jitter if jittered < 0.8 else [1.0, 1.0, 1.0, 0.0],
                      order.tolist(),
                      grey < 0.2,
                      sigma if blurred < blur_probability else 0.0,
                      solarised < solarise_probability))
    crops, *parameters = zip(*views)
    return Views(torch.stack(crops), *map(torch.tensor, parameters))


@torch.no_grad()
def augment(views, max_sigma):
    """Flip and colour augmentation, on the training device, for all views of one size at once.

    Args: views: `Views` with B in front of each shape. max_sigma: the largest sigma of the blur, pixels.
    Returns: (v, B, 3, S, S) float32, normalised.
    """
    B, v = views.crops.shape[:2]
    crops, boxes, jitter, order, grey, sigma, solarise = (x.transpose(0, 1).flatten(0, 1) for x in views)  # (v*B, ...)
    flip, grey, solarise = (x.view(-1, 1, 1, 1) > 0 for x in (boxes[:, 4], grey, solarise))
    x = crops.float() / 255                                                                 # (v*B, 3, S, S)
    x = torch.where(flip, x.flip(-1), x)
    x = jitter_colours(x, jitter, order)
    x = torch.where(grey, TF.rgb_to_grayscale(x), x)
    x = blur(x, sigma, radius=math.ceil(3 * max_sigma))
    x = torch.where(solarise & (x >= 0.5), 1 - x, x)
    return normalise(x).unflatten(0, (v, B))


def jitter_colours(x, factors, order):
    """Brightness, contrast, saturation and hue of x (N, 3, H, W) by factors (N, 4), in each image's order (N, 4)."""
    for op in order.T:                                                                      # (N,) 0, 1, 2 or 3
        factor, op = factors.gather(1, op[:, None]).view(-1, 1, 1, 1), op.view(-1, 1, 1, 1)
        grey = TF.rgb_to_grayscale(x)
        # the first three blend the image with something: with black, with its mean grey, with its own grey
        other = torch.where(op == 2, grey, torch.where(op == 1, grey.mean((2, 3), keepdim=True), 0))
        blended = (factor * x + (1 - factor) * other).clamp(0, 1)
        x = torch.where(op == 3, shift_hue(x, factors[:, 3]), blended)
    return x


def shift_hue(x, shift):
    """Rotate the hue of x (N, 3, H, W) in [0, 1] by shift (N,), in full circles: RGB -> HSV -> RGB."""
    value, low = x.amax(1), x.amin(1)                                                       # (N, H, W)
    chroma = value - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    # the hue in sixths of a circle: red is 0, green 2, blue 4
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift[:, None, None]
    # back to RGB: k is the hue, shifted so that each channel has its maximum, value, from k = 4 to 6 and its minimum,
    # value - chroma, from k = 1 to 3, with linear ramps between them
    k = torch.stack([hue + 5, hue + 3, hue + 1], 1) % 6                                     # (N, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x, sigma, radius):
    """Gaussian blur of x (N, 3, H, W) with a sigma (N,) per image: a convolution along rows, one along columns."""
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2, dim=1)      # (N, taps)
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]                                  # (3N, 1, 1, taps)
    padded = F.pad(x.flatten(0, 1)[None], [radius] * 4, "reflect")                          # (1, 3N, H + 2r, W + 2r)
    rows = F.conv2d(padded, kernel, groups=len(kernel))
    return F.conv2d(rows, kernel.mT, groups=len(kernel)).view_as(x)


@functools.cache
def per_channel(values, device):
    """(3, 1, 1). Cached, since a copy to the GPU would wait for everything that is queued there."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(x):
    """x (N, 3, H, W) in [0, 1] -> zero mean and unit variance over ImageNet's pixels."""
    return (x - per_channel(PIXEL_MEAN, x.device)) / per_channel(PIXEL_STD, x.device)


# ------------------------------------------------------------------------------------------------ networks

def stride_of(arch, patch_size):
    """Side of a patch, pixels."""
    return patch_size if arch.startswith("vit") else 8 if arch == "conv_tiny" else 32


def grids_of(cfg):
    """(rows, cols) of the patches of a global and of a local view."""
    return [(size // stride_of(cfg.arch, cfg.patch_size),) * 2 for size in (cfg.global_size, cfg.local_size)]


class SwinAttention(ShiftedWindowAttention):
    """Shifts its window also on grids that are not larger than the window, as the official Swin does (and torchvision's
    does not). This matters for local views: at 96 px the third stage has 6 x 6 patches and windows of 7 x 7."""

    def forward(self, x):                                                                   # (N, rows, cols, C)
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
    """torchvision's `arch` without its classifier. forward: x (N, 3, H, W) -> global (N, C), patches (N, P, C)."""

    def __init__(self, arch, image_size=224, patch_size=16, drop_path=0.0):
        super().__init__()
        self.arch, self.patch_size = arch, patch_size
        if arch == "conv_tiny":
            self.width, self.net = 128, nn.Sequential()
            for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 1), (128, 128, 2), (128, 128, 1)):
                self.net.extend([nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after),
                                 nn.ReLU()])
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
            self.width, self.net.head = self.net.head.in_features, nn.Identity()
            for block in self.net.features[7]:                                  # official: no shift in the last stage
                block.attn.shift_size = [0, 0]
        else:
            self.net = getattr(torchvision.models, arch)()
            self.width = self.net.fc.in_features
            self.net.avgpool = self.net.fc = nn.Identity()
        depths = [module for module in self.net.modules() if isinstance(module, StochasticDepth)]
        for i, depth in enumerate(depths):                                      # grows linearly from block to block
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
            block.dropout = block.mlp[4] = StochasticDepth(0.0, "row")

    def forward(self, x):
        net = self.net
        if self.arch.startswith("vit"):
            x = net.conv_proj(x)                                                            # (N, C, rows, cols)
            position = self.position_embedding(*x.shape[2:])                                # (1, 1 + P, C)
            x = torch.cat([net.class_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + position
            x = net.encoder.ln(net.encoder.layers(x))                                       # (N, 1 + P, C)
            return x[:, 0], x[:, 1:]
        if self.arch.startswith("swin"):
            patches = net.norm(net.features(x)).flatten(1, 2)                               # (N, P, C)
        else:
            for layer in net.children():
                x = layer(x)                                                                # (N, C, rows, cols)
            patches = x.flatten(2).mT
        return patches.mean(1), patches

    def position_embedding(self, rows, cols):
        """The ViT's position embedding (1, 1 + P, C), its grid resized to rows x cols."""
        embedding = self.net.encoder.pos_embedding
        side = math.isqrt(embedding.shape[1] - 1)
        if (rows, cols) == (side, side):
            return embedding
        grid = embedding[:, 1:].mT.unflatten(2, (side, side))                               # (1, C, side, side)
        grid = F.interpolate(grid.float(), size=(rows, cols), mode="bicubic")               # as the official code
        return torch.cat([embedding[:, :1], grid.flatten(2).mT.to(embedding.dtype)], 1)


class Head(nn.Module):
    """Features (..., C) -> unit vectors z (..., D). The logits are z @ weight().T, with a weight-normalised layer."""

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
        """(K, D): the last layer. Its direction and its magnitude (`gain`) are separate parameters (weight norm)."""
        return self.gain * F.normalize(self.direction, dim=-1)

    def forward(self, x):
        return F.normalize(self.mlp(x).float(), dim=-1)


class Outputs(NamedTuple):
    """What the loss needs of a network."""
    global_z: torch.Tensor          # (V, B, 1, D) bottleneck of the global head (the teacher's: Q views)
    local_z: list                   # per size of view: (v, B, N, D) bottleneck of the local head
    features: list                  # per size of view: (v, B, N, C) the backbone's patch features
    global_weight: torch.Tensor     # (K, D) last layer of the global head
    local_weight: torch.Tensor      # (K, D) last layer of the local head; None without one


class Network(nn.Module):
    """Backbone, global head and (unless matching is none) local head. Student and teacher are one of these each."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)
        self.global_head = Head(self.backbone.width, cfg)
        self.local_head = Head(self.backbone.width, cfg) if cfg.matching != "none" else None

    def forward(self, views):
        """views: a list with one tensor (v, B, 3, S, S) per size of view, the global ones first."""
        global_z, local_z, features = [], [], []
        for x in views:
            image, patches = (y.unflatten(0, x.shape[:2]) for y in self.backbone(x.flatten(0, 1)))
            global_z.append(self.global_head(image[:, :, None]))                            # (v, B, 1, D)
            if self.local_head is not None:
                local_z.append(self.local_head(patches))                                    # (v, B, N, D)
                features.append(patches.detach())
        local_weight = self.local_head.weight() if self.local_head is not None else None
        return Outputs(torch.cat(global_z), local_z, features, self.global_head.weight(), local_weight)


# ------------------------------------------------------------------------------------------------ the loss

def distillation_loss(student, teacher, centers, boxes, grids, *, teacher_temp, matching, hinge=True, impl="auto"):
    """The loss of the paper, a pure function: global_loss, local_loss. The student minimises their sum.

        global_loss = 1/2 * mean over pairs of views (q, v) of CE(T(q), S(v))
        local_loss = 1/2 * mean over pairs of views (q, v) and patches n of w_n * CE(T(q, m(n)), S(v, n))

    T = softmax((teacher logits - centre) / teacher_temp), S = softmax(student logits / 0.1), CE(t, s) = -sum t * log s.
    A pair is a teacher view q and a student view v of the same image, v not q. m(n) is the teacher patch that matches
    student patch n. With geometric matching, it is the patch whose centre is nearest in the image; n is masked
    (w_n = 0, but it still counts in the mean) if that centre is further away than half the diagonal of the larger of
    the two patches. See `geometric_matches`.

    Args:
        student, teacher: Outputs for all V views, and for the Q = 2 global ones.
        centers: (2, K) of the global and of the local teacher logits. boxes: (V, B, 5).
        grids: (rows, cols) of the patches, per size of view.
    """
    pairs = 2 * (len(student.global_z) - 1)
    loss_weight = 1 if matching == "none" else 0.5                  # the official DINO loss has no 1/2
    options = dict(student_temp=STUDENT_TEMP, teacher_temp=teacher_temp, impl=impl, skip_same_view=True)
    global_loss = loss_weight / pairs * head_cross_entropy(student.global_z, student.global_weight, teacher.global_z,
                                                           teacher.global_weight, centers[0], **options)
    if matching == "none":
        return global_loss, torch.zeros_like(global_loss)
    if matching == "geometric":
        match_args = dict(student_boxes=boxes, teacher_boxes=boxes[:2], student_grid=grids[:len(student.local_z)],
                          teacher_grid=grids[0], hinge=hinge)
    else:
        match_args = dict(index=[similarity_matches(features[:, None], teacher.features[0][None])   # (v, Q, B, N)
                                 for features in student.features])
    local_loss = loss_weight / pairs * head_cross_entropy(student.local_z, student.local_weight, teacher.local_z[0],
                                                          teacher.local_weight, centers[1], **match_args, **options)
    return global_loss, local_loss


def teacher_means(teacher):
    """(heads, D): the mean bottleneck of the teacher, for the global and (if there is one) the local head."""
    return torch.stack([z.mean((0, 1, 2)) for z in (teacher.global_z, *teacher.local_z[:1])])


def mean_logits(teacher, means):
    """(heads, K): the teacher's mean logits, for the centres. The last layer is linear, so it may follow the mean."""
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
    progress = epoch / max(1, cfg.warmup_teacher_temp_epochs - 1)
    return cfg.warmup_teacher_temp + progress * (cfg.teacher_temp - cfg.warmup_teacher_temp)


def clip_gradients(parameters, max_norm):
    """Scale the gradient of each parameter to at most max_norm (0: do not). Returns: their total norm, before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1)))
    return norms.norm()


def load_batch(batches, device, cfg, log):
    """The next batch, on the device and augmented, or None. Returns: a list with one tensor (v, B, 3, S, S) per size of
    view, boxes (V, B, 5), and the numbers of the images that could not be read."""
    with record_function("data"):
        began = time.perf_counter()
        batch = next(batches, None)
        log.sums["waiting"] += time.perf_counter() - began
    if batch is None:
        return None
    with record_function("views"):
        views = [Views(*(x.to(device, non_blocking=True) for x in part)) for part in batch[0]]
        boxes = torch.cat([part.boxes for part in views], 1).transpose(0, 1)
        return [augment(part, cfg.blur_sigma[1]) for part in views], boxes, [i for i in batch[1].tolist() if i >= 0]


def async_to_host(x):
    """Start copying x to the host. Returns: a function that waits for this copy, but not for work queued after it."""
    if x.device.type != "cuda":
        return x.tolist
    host, copied = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True), torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host.tolist()


def train(cfg):
    """Train a student and its EMA teacher; under torchrun, as one of several processes. Returns the exit code."""
    rank, world, device = start_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    total_batch = cfg.batch_size * world
    steps_per_epoch = len(images) // total_batch
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
    identity = dict(vars(cfg), images_per_step=total_batch, images=[len(images), images.checksum()])
    start = restore(cfg, run, centers, identity)
    if all_mean(torch.tensor(start, dtype=torch.float64, device=device)).item() != start:
        raise BadInput(f"--output {cfg.output}: the processes see different checkpoints; the folder must be shared")
    knn = make_knn(cfg, rank, world, device)
    if cfg.compile:
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs eagerly, with a warning
        student.compile(), teacher.compile()
    ddp = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    log = Log(cfg, rank, device, start, stop_at, total_batch, steps_per_epoch)
    log.say(f"{cfg.matching} matching, preset {cfg.preset}, {cfg.arch} on {device.type}; {images}: {steps} steps of "
            f"{total_batch} images, from step {start}; output in {cfg.output}/")
    if cfg.preset == "paper" and device.type == "cpu":
        log.say("no GPU found: --preset paper takes about 17 GiB and more than a minute per step; try --preset small")
    loader = make_loader(images, cfg, rank, world, range(start, stop_at), steps_per_epoch)
    if start >= stop_at:
        log.say(f"nothing left to do: {start} steps are done, and --epochs or --max-steps asks for no more")
    with stop_on_signal(world) as signals, profile(cfg, device, log, total_batch) as next_step:
        batches = iter(loader)
        batch, done, saved = load_batch(batches, device, cfg, log), start, True
        for step in range(start, stop_at):
            epoch = step // steps_per_epoch
            lr = cosine(cfg.lr * total_batch / 256, cfg.min_lr, step, steps, int(cfg.warmup_epochs * steps_per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = group["decay"] * cosine(cfg.weight_decay, cfg.weight_decay_end, step, steps)
            momentum = cosine(cfg.teacher_momentum, 1, step, steps)
            teacher_temp = teacher_temp_at(epoch, cfg)
            # for stochastic depth: a resumed run draws the same
            torch.manual_seed(int(np.random.default_rng((cfg.seed, step, rank)).integers(2 ** 62)))

            views, boxes, unreadable = batch
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                with torch.no_grad(), record_function("teacher"):
                    teacher_out = teacher(views[:1])
                with record_function("student"):
                    student_out = ddp(views)
            with record_function("loss"):
                global_loss, local_loss = distillation_loss(
                    student_out, teacher_out, centers, boxes, grids, teacher_temp=teacher_temp, matching=cfg.matching,
                    hinge=cfg.hinge, impl=cfg.impl)
            with record_function("backward"):
                optimizer.zero_grad()
                scaler.scale(global_loss + local_loss).backward()
            with record_function("update"):
                scaler.unscale_(optimizer)
                if epoch < cfg.freeze_last_layer:
                    for p in last_layers:                   # after DDP has averaged the gradients, which it must
                        p.grad = None
                grad_norm = clip_gradients(parameters, cfg.clip_grad)
                # one all-reduce for all else that the processes share; a NaN in one process becomes a NaN in all
                means = teacher_means(teacher_out)
                counts = torch.tensor([len(signals), len(unreadable)], dtype=torch.float32)
                reduced = all_mean(torch.cat([global_loss.detach()[None], local_loss.detach()[None],
                                              counts.to(device, non_blocking=True), means.flatten()]))
                metrics = async_to_host(torch.cat([reduced[:4], reduced[4:].sum()[None], grad_norm[None]]))
            batch = load_batch(batches, device, cfg, log)   # the GPU augments the next batch while we wait for metrics
            with record_function("update"):
                global_value, local_value, stop, unread, teacher_value, norm_value = metrics()      # waits for the GPU
                for name, value in {"global loss": global_value, "local loss": local_value, "teacher": teacher_value,
                                    "gradient": norm_value}.items():
                    # with fp16, the scaler skips steps whose gradient is not finite
                    if not math.isfinite(value) and not (name == "gradient" and scaler.is_enabled()):
                        log.say(f"gld.py: stopped: the {name} is {value} at step {step}, lr {lr:.3g}; the last "
                                "checkpoint is unchanged; a lower --lr may help", error=True)
                        return 1
                scaler.step(optimizer)
                scaler.update()
                with torch.no_grad():
                    # the centres are an EMA of the mean teacher logits, over images, views, patches and processes
                    centers.lerp_(mean_logits(teacher_out, reduced[4:].view_as(means)), 1 - CENTER_MOMENTUM)
                    # the EMA teacher; its batch norm statistics (if any) are its own
                    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)

            done = step + 1
            epoch_ended = done % steps_per_epoch == 0
            metrics = dict(loss_global=global_value, loss_local=local_value, grad_norm=norm_value)
            if log.step(metrics, round(unread * world), [images.name(i) for i in unreadable]):
                record = dict(epoch=epoch, lr=lr, **diagnose(teacher_out, centers, boxes, grids, teacher_temp, cfg))
                if knn and epoch_ended and (epoch + 1) % cfg.eval_every == 0:
                    record["knn"] = knn(teacher.backbone)
                log.report(record)
            if (stop or done == stop_at or (epoch_ended and (epoch + 1) % cfg.save_every == 0)) and not cfg.profile:
                saved = save(cfg, run, centers, done, identity, rank, log)
            next_step()
            if stop:
                break
    if not saved:
        return 1
    if done < stop_at:
        log.say(f"stopped on request: saved at step {done}; rerun the same command to resume")
        return STOPPED
    return 0


# ======================================================================================= the paper ends here
# What follows is not the method: arguments, processes and signals, images, checkpoints, log, main.

NAMED_SETS = ("shapes", "cifar10")
STOPPED = 75                        # exit code of a run that stopped on request and can be resumed (EX_TEMPFAIL)


class BadInput(Exception):
    """What the user has to change, in one line. `run_script` prints it and exits with code 2."""


@contextlib.contextmanager
def blame(what):
    """Any error in this block becomes a BadInput that begins with `what`, the flag or file at fault."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:                              # decoders and torch.load raise all kinds
        raise BadInput(f"{what}: {' '.join(str(error).split())[:300]}") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = difflib.get_close_matches(flag.replace("_", "-"), self._option_string_actions, 1)
        raise BadInput(f"{message}; did you mean {close[0]}?" if flag.startswith("--") and close else message)


def parse_arguments(argv=None):
    """Command line -> namespace in which every option is set, by the user or by the preset. Raises BadInput."""
    def number_type(kind, low, high):
        def number(text):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
            return kind(text)
        return number

    parser = Parser("gld.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=("small", "paper"), help="which defaults; small unless --data is a path")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, small, paper, allowed, text in options:
            if isinstance(paper, bool):
                kwargs = dict(action=argparse.BooleanOptionalAction)
            elif isinstance(paper, str):
                kwargs = dict(choices=allowed, metavar="NAME")
            elif isinstance(paper, list):
                kwargs = dict(type=number_type(float, *allowed), nargs=2, metavar=("LOW", "HIGH"))
            else:
                kwargs = dict(type=number_type(type(paper), *allowed), metavar="N" if isinstance(paper, int) else "X")
            defaults = small if small == paper else f"small: {small}, paper: {paper}"
            group.add_argument(f"--{flag}", default=small, help=f"{text} ({defaults})", **kwargs)
    cfg = parser.parse_args(argv)
    preset = cfg.preset or ("small" if cfg.data in NAMED_SETS else "paper")
    if preset == "paper":
        parser.set_defaults(**{flag.replace("-", "_"): paper
                               for options in OPTIONS.values() for flag, _, paper, *_ in options})
    parser.set_defaults(preset=preset)
    cfg = parser.parse_args(argv)
    if cfg.drop_path < 0:
        cfg.drop_path = 0.2 if cfg.arch in ("swin_s", "swin_b") else 0.1
    if cfg.eval_every < 0:
        cfg.eval_every = 1 if cfg.data == "shapes" else 0
    if cfg.profile:
        cfg.max_steps, cfg.resume, cfg.eval_every = PROFILE_WARMUP + cfg.profile + 1, False, 0

    stride, radius = stride_of(cfg.arch, cfg.patch_size), math.ceil(3 * cfg.blur_sigma[1])
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    folder = next(path for path in (Path(cfg.output), *Path(cfg.output).absolute().parents) if path.exists())
    sizes = {"global-size": cfg.global_size} | ({"local-size": cfg.local_size} if cfg.local_views else {})
    ranges = {"global-scale": cfg.global_scale, "local-scale": cfg.local_scale, "blur-sigma": cfg.blur_sigma}
    problems = [(size % stride, f"--{flag} must be a multiple of {stride} for {cfg.arch}, got {size}")
                for flag, size in sizes.items()]
    problems += [(low > high, f"--{flag} must be LOW HIGH with LOW <= HIGH, got {low} {high}")
                 for flag, (low, high) in ranges.items()]
    problems += [
        (radius >= min(sizes.values()), f"--blur-sigma {cfg.blur_sigma[1]:g}: the blur, {radius} pixels to each side, "
                                        f"does not fit a view of {min(sizes.values())} pixels"),
        (cfg.warmup_epochs > cfg.epochs, f"--warmup-epochs {cfg.warmup_epochs:g} exceeds --epochs {cfg.epochs}"),
        (not folder.is_dir() or not os.access(folder, os.W_OK), f"--output {cfg.output}: not a writable folder"),
        (cfg.device == "cuda" and not gpu, "--device cuda: torch finds no CUDA GPU"),
        (cfg.precision == "fp16" and not gpu, "--precision fp16 needs a CUDA GPU"),
        (cfg.impl == "triton" and not gpu and os.getenv("TRITON_INTERPRET") != "1", "--impl triton needs a CUDA GPU"),
    ]
    for problem, message in problems:
        if problem:
            raise BadInput(message)
    return cfg


def start_processes(cfg):
    """Join the other processes of torchrun, if there are any. Returns: rank, number of processes, device."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if world > 1 and missing:
        raise BadInput(f"WORLD_SIZE is {world}, but {', '.join(sorted(missing))} is not set; start with torchrun")
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
    """The compute dtype of the networks; weights, EMA teacher, loss and centres are float32 in any case."""
    name = cfg.precision
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


@contextlib.contextmanager
def stop_on_signal(world):
    """Within this block, SIGTERM, SIGHUP and Ctrl-C ask for a stop after the current step. Yields: a list, empty until
    a signal comes. A second Ctrl-C quits now, unless under torchrun, which passes each Ctrl-C on a second time."""
    received, previous = [], {}

    def request(number, frame):
        if number == signal.SIGINT and received and world == 1:
            raise KeyboardInterrupt
        if not received and world == 1:
            os.write(2, b"stopping after this step; Ctrl-C again quits now\n")  # print is not safe in a signal handler
        received.append(number)

    with contextlib.suppress(ValueError):                   # only the main thread may set handlers
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) not in (signal.SIG_IGN, request):       # nohup ignores SIGHUP: leave it so
                previous[number] = signal.signal(number, request)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


WORKER_GRACE = 30                   # seconds


def ignore_signals(worker):
    """In a DataLoader worker: a signal to the whole job is for the main process; the worker goes on for WORKER_GRACE.

    It may not ignore SIGTERM for ever: with it, Python ends the workers that are left when a program exits.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):                           # Windows has neither SIGHUP nor SIGALRM
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))


# ------------------------------------------------------------------------------------------------ images

IMAGE_SUFFIXES = tuple(b".jpg .jpeg .png .webp .bmp .gif .ppm .pgm .tif .tiff".split())


def decode(data):
    """An image file's bytes -> (3, H, W) uint8 RGB, rotated as its EXIF says. Raises OSError and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # remarks on odd but readable files
        image = Image.open(io.BytesIO(data))                # reads the header only
        if image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L"):      # torchvision is faster than Pillow
            encoded, rgb = torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision.io.ImageReadMode.RGB
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
    """A labelled set of images: pixels in memory, or files in a folder or .tar.

    File names are one array of bytes. As a list of a million str, every DataLoader worker would get its own copy.
    """
    items: np.ndarray                                       # (n, H, W, 3) uint8, or (n,) file names
    labels: np.ndarray                                      # (n,)
    root: str                                               # the folder, the .tar, or the name of the set
    classes: np.ndarray = None                              # names of the class folders
    spans: np.ndarray = None                                # (n, 2) int64: offset and size of each file in the .tar

    def __len__(self):
        return len(self.labels)

    def __str__(self):
        return f"{len(self):,} images in {len(np.unique(self.labels))} classes of {self.root}"

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.items[i]) if self.items.ndim == 1 else f"image {i}")

    def checksum(self):
        """Of the pixels, or of the file names."""
        return zlib.crc32(np.ascontiguousarray(self.items))

    def read(self, i):
        """(3, H, W) uint8. Raises OSError and others if the file cannot be read or is not an image."""
        if self.items.ndim > 1:
            return torch.from_numpy(self.items[i]).permute(2, 0, 1)
        if self.spans is not None:
            offset, size = self.spans[i].tolist()
            return decode(os.pread(open_archive(self.root), size, offset))
        return decode(Path(self.name(i)).read_bytes())


def list_files(root):
    """All files of a folder or of an uncompressed .tar (not unpacked): [(name, offset, size)]. Raises BadInput."""
    found, seen = [], set()
    if root.is_dir():
        for folder, folders, names in os.walk(root, followlinks=True):
            if os.path.realpath(folder) in seen:            # a symbolic link to a folder that is listed already
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            found += [(os.fsencode(os.path.relpath(os.path.join(folder, name), root)), 0, 0) for name in names]
        return found
    hint = " (gunzip it first)" if root.suffix in (".gz", ".tgz") else ""
    with blame(f"--data {root}: not an uncompressed tar, or truncated{hint}"), tarfile.open(root, "r:") as archive:
        for member in archive:
            archive.members.clear()                         # it would keep all of them, a kilobyte each
            if member.isreg() and not member.issparse():
                found.append((os.fsencode(member.name), member.offset_data, member.size))
    return found


def load_images(data, split, fraction=1.0, must_split=False):
    """The `Images` of --data: a name, or a folder or .tar, of which only `split`/ is used if it exists.

    Raises BadInput; with must_split also if there is no such part.
    """
    if data == "shapes":
        images = Images(*draw_shapes(2400 if split == "train" else 1200, seed=("train", "val").index(split)), data)
    elif data == "cifar10":
        with blame("--data cifar10: not in ./data, and the download failed"), contextlib.redirect_stdout(sys.stderr):
            found = torchvision.datasets.CIFAR10("data", train=split == "train", download=True)
        images = Images(found.data, np.array(found.targets), data)
    elif Path(data).exists():
        images = load_files(Path(data), split, must_split)
    else:
        raise BadInput(f"--data {data}: not found; built-in datasets: {', '.join(NAMED_SETS)}")
    if fraction < 1:
        rng = np.random.default_rng(0)
        classes = [rng.permutation(np.flatnonzero(images.labels == c)) for c in np.unique(images.labels)]
        keep = np.sort(np.concatenate([c[:math.ceil(fraction * len(c))] for c in classes]))
        images = replace(images, items=images.items[keep], labels=images.labels[keep],
                         spans=None if images.spans is None else images.spans[keep])
    return images


def load_files(root, split, must_split):
    """`load_images` for a folder, a .tar or a single image file."""
    if (root / split).is_dir():
        root, top, has_split = root / split, b"", True
        files = list_files(root)
    else:
        is_image = root.suffix.lower().encode() in IMAGE_SUFFIXES
        files = [(os.fsencode(root.name), 0, 0)] if is_image else list_files(root)
        root = root.parent if is_image else root
        top = os.path.commonprefix([name for name, _, _ in (min(files), max(files))] if files else [b""])
        top = b"" if root.is_dir() else top[:top.rfind(b"/") + 1]               # of a .tar: a folder that holds all
        part = top + split.encode() + b"/"
        has_split = any(name.startswith(part) for name, _, _ in files)
        top = part if has_split else top
    if must_split and not has_split:
        raise BadInput(f"--data {root}: must hold train/ and val/, or be one of {', '.join(NAMED_SETS)}")
    files = sorted(file for file in files if file[0].startswith(top) and file[0].lower().endswith(IMAGE_SUFFIXES)
                   and b"/." not in b"/" + file[0].removeprefix(b"./"))         # no hidden files and folders
    if not files:
        raise BadInput(f"--data {root}: no images ({b' '.join(IMAGE_SUFFIXES).decode()}) in it")
    names, *spans = zip(*files)
    for folder in {os.path.dirname(name[len(top):] if has_split else name) for name in names}:
        for word in os.fsdecode(folder).split("/"):
            if split == "train" and word.lower() in ("train", "val", "valid", "validation", "test"):
                raise BadInput(f"--data {root}: would also train on the folder {os.fsdecode(folder)!r}; give a folder "
                               "that holds train/ and val/, or the folder of training images itself")
    classes = [name[len(top):].rpartition(b"/")[0].partition(b"/")[0] for name in names]    # first folder, or none
    classes, labels = np.unique(classes, return_inverse=True)
    return Images(np.array(names), labels, str(root), classes, None if root.is_dir() else np.array(spans).T)


def draw_shapes(n, seed, size=48):
    """The built-in dataset: images (n, size, size, 3) uint8 and labels (n,) of 12 classes.

    The class is the shape that tiles the image. Position, scale, rotation, colours (slow gradients) and which of shape
    and background is lighter are random, so that no single pixel tells the class.
    """
    shapes = (                                              # of a = |u|, b = |v|, u, v in [-1, 1]; r from the centre
        lambda u, v, a, b, r: r < 0.7, lambda u, v, a, b, r: (r > 0.45) & (r < 0.85),                   # disks, rings
        lambda u, v, a, b, r: np.maximum(a, b) < 0.6,                                                   # squares
        lambda u, v, a, b, r: abs(np.maximum(a, b) - 0.68) < 0.18,                                      # frames
        lambda u, v, a, b, r: np.maximum(v, 0.87 * a - v / 2) < 0.45,                                   # triangles
        lambda u, v, a, b, r: np.minimum(a, b) < 0.22,                                                  # a lattice
        lambda u, v, a, b, r: b < 0.4, lambda u, v, a, b, r: a < 0.4,                                   # stripes
        lambda u, v, a, b, r: abs(a - b) < 0.25, lambda u, v, a, b, r: a + b < 0.75,               # crosses, diamonds
        lambda u, v, a, b, r: (u > 0) == (v > 0), lambda u, v, a, b, r: abs(v - a + 0.4) < 0.3,         # chess, zigzags
    )
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    blend = np.stack([y * x, y * (size - x), (size - y) * x, (size - y) * (size - x)], -1) / size ** 2
    images, labels = np.empty((n, size, size, 3), np.uint8), np.arange(n) % len(shapes)
    for image, label in zip(images, labels):
        pitch, angle, shift = rng.uniform(7, 16), rng.uniform(-0.6, 0.6), rng.uniform(0, 2, 2)
        u = (2 * (x * np.cos(angle) + y * np.sin(angle)) / pitch + shift[0]) % 2 - 1
        v = (2 * (y * np.cos(angle) - x * np.sin(angle)) / pitch + shift[1]) % 2 - 1
        dark, light = blend @ rng.uniform(0, 0.5, (4, 3)), blend @ rng.uniform(0.5, 1, (4, 3))  # between four corners
        inside = shapes[label](u, v, abs(u), abs(v), np.hypot(u, v)) ^ (rng.uniform() < 0.5)
        image[:] = (255 * np.where(inside[..., None], light, dark) + rng.normal(0, 12, image.shape)).clip(0, 255)
    return images, labels


class ViewDataset(torch.utils.data.Dataset):
    """(epoch, i) -> `crop_views` of image i, and -1. If image i cannot be read: those of another image, and i.

    The result is a function of seed, epoch and i only, not of the process or of what was drawn before.
    """

    def __init__(self, images, cfg):
        self.images, self.cfg = images, cfg

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.cfg.seed, epoch, i))
        seed = int(rng.integers(2 ** 62))
        for attempt in (i, *rng.integers(len(self.images), size=100).tolist()):
            with contextlib.suppress(Exception):            # decoders raise all kinds of errors for broken files
                image = self.images.read(attempt)
                break
        else:
            raise BadInput(f"--data: 100 files in a row cannot be read, the first is {self.images.name(i)}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)       # torch.manual_seed would initialise the GPU
            return crop_views(image, self.cfg), -1 if attempt == i else i


def make_loader(images, cfg, rank, world, steps, steps_per_epoch):
    """Batches of this process for these steps. All processes together get the same images however many they are."""
    def keys():
        order, ordered = None, -1
        for step in steps:
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != ordered:
                order, ordered = np.random.default_rng((cfg.seed, epoch)).permutation(len(images)), epoch
            first = (position * world + rank) * cfg.batch_size
            yield [(epoch, i) for i in order[first:first + cfg.batch_size].tolist()]

    pin = cfg.device != "cpu" and torch.cuda.is_available()
    return torch.utils.data.DataLoader(ViewDataset(images, cfg), batch_sampler=keys(), num_workers=cfg.workers,
                                       pin_memory=pin, worker_init_fn=ignore_signals)


# ------------------------------------------------------------------------------------------------ checkpoints

def load_file(path, flag):
    """A checkpoint as data: no code in it is run. Raises BadInput for a file that is not a complete checkpoint."""
    if not Path(path).exists():
        raise BadInput(f"{flag} {path}: file not found")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):            # in the official checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                       # torch raises many kinds for a foreign file
        content = None
    if not isinstance(content, dict):
        raise BadInput(f"{flag} {path}: damaged, not a checkpoint, or one that would run code when loaded")
    return content


def restore(cfg, run, centers, identity):
    """Resume from OUTPUT/checkpoint.pt, or initialise from --init-from, or do nothing. Returns: the first step to do.

    identity: the options and the images. A resumed run must have the same, or its results would differ; but options of
    the group "run" may differ (by rounding they can change results). Raises BadInput.
    """
    path = Path(cfg.output, "checkpoint.pt")
    resume = cfg.resume and path.exists()
    if not resume and not cfg.init_from:
        return 0
    path, flag = (path, "--output") if resume else (cfg.init_from, "--init-from")
    saved = load_file(path, flag)
    before = saved.get("options")
    if not isinstance(before, dict) or not {*run, "centers", "step"} <= saved.keys():
        raise BadInput(f"{flag} {path}: was not written by gld.py" + "; give another, or --no-resume" * resume)
    if resume:
        new_run = "to start a new run, give another --output or --no-resume"
        if before.get("images") != identity["images"]:
            raise BadInput(f"--data {cfg.data}: not the images that {path} was trained on ({before.get('data')}); "
                           + new_run)
        free = {flag.replace("-", "_") for group, options in OPTIONS.items() for flag, *_ in options if "run" in group}
        names = [name for name in ("preset", *identity) if name not in free | {"data", "batch_size"}]
    else:
        new_run, names = "both must be the same", ("arch", "matching", "out_dim", "head_hidden", "head_bottleneck")
    for name in names:
        if before.get(name) != identity[name]:
            flag = "--batch-size x processes" if name == "images_per_step" else "--" + name.replace("_", "-")
            longer = f"to train longer, use --init-from {path} and another --output; " if name == "epochs" else ""
            raise BadInput(f"{flag}: {identity[name]} here, but {path} was made with {before.get(name)}; "
                           + longer + new_run)
    for name in run if resume else ("student", "teacher"):
        if saved[name]:                                     # the gradient scaler has no state unless fp16 is used
            with blame(f"{path}, {name}"):
                run[name].load_state_dict(saved[name])
    if resume:
        centers.copy_(saved["centers"])
    return saved["step"] if resume else 0


def save(cfg, run, centers, step, identity, rank, log):
    """Write checkpoint.pt and backbone.pt. A new file replaces the old one only when it is complete and on disk.

    Returns, on all processes: whether that worked. If not (the disk is full, say), training can go on.
    """
    failed = torch.zeros(1, device=centers.device)
    temporary, contents = Path(cfg.output, "checkpoint.tmp"), {}
    if rank == 0:
        state = {name: part.state_dict() for name, part in run.items()}
        contents["checkpoint.pt"] = state | dict(centers=centers, step=step, options=identity)
        contents["backbone.pt"] = {name: x.cpu() for name, x in run["teacher"].backbone.net.state_dict().items()}
    try:
        for name, content in contents.items():
            os.makedirs(cfg.output, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, Path(cfg.output, name))
    except (OSError, RuntimeError) as error:                # torch reports a full disk by a RuntimeError
        log.say(f"gld.py: cannot write {cfg.output}/{name} at step {step} ({' '.join(str(error).split())[:100]}); the "
                "previous file is kept, and the next save tries again", error=True)
        failed += 1
        with contextlib.suppress(OSError):
            temporary.unlink()
    return not all_mean(failed).item()


# ------------------------------------------------------------------------------------------------ log

@torch.no_grad()
def diagnose(teacher, centers, boxes, grids, teacher_temp, cfg):
    """Metrics that tell a healthy run from a collapsed one."""
    log_p = F.log_softmax((teacher.global_z @ teacher.global_weight.T - centers[0]) / teacher_temp, dim=-1)
    matched = float(cfg.matching == "similarity")
    if cfg.matching == "geometric":
        weights = [geometric_matches(boxes[:2].flip(0), boxes[:2], grids[0], grids[0], cfg.hinge)[1],
                   geometric_matches(boxes[2:, None], boxes[None, :2], grids[1], grids[0], cfg.hinge)[1]]
        matched = torch.cat([w.flatten() for w in weights]).mean().item()
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    z = teacher.global_z.flatten(0, 2)                                                      # (Q*B, D), unit length
    spread = 1 - z.mean(0).square().sum().item()            # the variance of z: 0 if all images give the same
    return dict(matched=matched, entropy=entropy, center_norm=centers[0].norm().item(), spread=spread)


def make_knn(cfg, rank, world, device):
    """--eval-every: a function backbone -> 20-NN top-1 accuracy on the val part of --data, percent. Else None."""
    if not cfg.eval_every:
        return None
    import eval_knn                                         # here, since it imports this file
    parts, labels = eval_knn.labelled(cfg.data, cfg.data_fraction)
    labels = [torch.as_tensor(y, device=device) for y in labels]

    def knn(backbone):
        backbone.eval()                                     # all processes extract features, process 0 compares them
        train, val = (eval_knn.extract(lambda x: backbone(x)[0], part, cfg.global_size, cfg, device, rank, world)
                      for part in parts)
        backbone.train()
        return None if rank else eval_knn.knn(train, labels[0], val, labels[1], [20], 0.07)[20][0]

    return knn


class Log:
    """Messages, a progress line, and log.jsonl with one object per epoch. Only process 0 writes."""

    def __init__(self, cfg, rank, device, start, stop_at, total_batch, steps_per_epoch):
        self.cfg, self.rank, self.device, self.done, self.stop_at = cfg, rank, device, start, stop_at
        self.total_batch, self.steps_per_epoch = total_batch, steps_per_epoch
        self.sums, self.named = Counter(), set()            # over the epoch; of images that could not be read
        self.began, self.last_report = time.perf_counter(), -math.inf           # of the epoch; so the first is due
        self.clear = "\r\033[K" if sys.stdout.isatty() else ""                  # to rewrite the line on a terminal
        if rank == 0 and not cfg.profile:
            self.open(start)

    def open(self, start=math.inf):
        """Open log.jsonl, lock it against a second run, and remove the lines of steps that will be done again."""
        with blame(f"--output {self.cfg.output}: not writable, or in use by another run"):
            os.makedirs(self.cfg.output, exist_ok=True)
            self.file = open(Path(self.cfg.output, "log.jsonl"), "a+")
            if fcntl:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            kept = [line for line in self.file if line.endswith("\n") and json.loads(line)["step"] <= start]
            self.file.truncate(0)
            self.file.writelines(kept)
            self.file.flush()

    def say(self, message, error=False, end="\n", all_processes=False):
        """print. If the reader of a pipe has gone (`| head`), output is dropped from then on, and the run goes on."""
        file = sys.stderr if error else sys.stdout
        try:
            if self.rank == 0 or all_processes:
                print(self.clear + message, file=file, end=end, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())

    def step(self, metrics, unread, names):
        """Count a step in which all processes together could not read `unread` images, this one those with these names.

        Returns: whether to report, which is so after the first step, at the end of an epoch, and from time to time.
        """
        cfg, sums = self.cfg, self.sums
        self.done += 1
        for name in set(names) - self.named:
            self.say(f"cannot be read, replaced by another image: {name}", all_processes=True)
        self.named.update(names)
        sums.update({name: value for name, value in metrics.items() if math.isfinite(value)}, unread=unread, steps=1)
        if sums["unread"] > max(1, self.steps_per_epoch * self.total_batch // 100):
            raise BadInput(f"--data {cfg.data}: {sums['unread']} images of one epoch cannot be read, more than 1 %")
        self.ended = self.done % self.steps_per_epoch == 0 or self.done == self.stop_at
        self.now, pause = time.perf_counter(), 0.5 if self.clear else 30
        return self.ended or self.rank == 0 and self.now - self.last_report > pause

    def report(self, record):
        """Print the record and the means over the epoch so far; at the end of an epoch, write them to log.jsonl."""
        cfg, sums = self.cfg, self.sums
        self.last_report, seconds = self.now, self.now - self.began
        speed = sums["steps"] * self.total_batch / seconds
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
            if resource else math.nan)
        means = {name: sums[name] / sums["steps"] for name in ("loss_global", "loss_local", "grad_norm")}
        record = dict(record, **means, step=self.done, images_per_second=speed, waiting=sums["waiting"] / seconds,
                      unreadable=sums["unread"], peak_gib=peak / 2 ** 30)
        record["kl"] = record["loss_global"] * (1 if cfg.matching == "none" else 2) - record["entropy"]
        line = ("epoch {epoch} step {step} | loss global {loss_global:.3f} local {loss_local:.3f} "
                "matched {matched:.0%} entropy {entropy:.2f} lr {lr:.1e} | {images_per_second:.0f} images/s, "
                "{waiting:.0%} waiting for data, {peak_gib:.1f} GiB").format(**record)
        left = timedelta(seconds=int((self.stop_at - self.done) * self.total_batch / speed))
        knn = f", 20-NN {record['knn']:.1f} %" if record.get("knn") is not None else ""
        self.say(f"{line}{knn}, {left} left", end="\n" if self.ended or not self.clear else "")
        if not self.ended:
            return
        self.began = time.perf_counter()
        sums.clear()
        if self.rank > 0 or cfg.profile:
            return
        try:
            if not Path(self.file.name).exists():           # somebody removed the folder
                self.open()
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            self.say(f"gld.py: cannot write to log.jsonl ({error.strerror}); training goes on", error=True)
        highest = math.log(cfg.out_dim)
        if record["epoch"] >= cfg.warmup_epochs and not record["spread"] > 1e-3 < record["entropy"] < 0.999 * highest:
            self.say(f"looks collapsed: teacher entropy {record['entropy']:.3f} (maximum {highest:.3f}), variance of "
                     f"features {record['spread']:.4f}; try a lower --lr or --teacher-temp, or --norm-last-layer")
        if record["waiting"] > 0.2:
            self.say(f"{record['waiting']:.0%} of the time was spent waiting for data: try more --workers (now "
                     f"{cfg.workers}) or smaller images; --profile 50 shows the time per phase")


PHASES, PROFILE_WARMUP = ("data", "views", "teacher", "student", "loss", "backward", "update"), 3


@contextlib.contextmanager
def profile(cfg, device, log, total_batch):
    """--profile N: print the time per phase of N steps, write a trace. Yields: a function to call after each step."""
    if not cfg.profile:
        yield lambda: None
        return

    def show(profiler):
        seconds, times = time.perf_counter() - ends[PROFILE_WARMUP - 1], {x.key: x for x in profiler.key_averages()}
        log.say("phase     CPU ms/step  GPU ms/step")
        for name in PHASES:
            cpu, gpu = times[name].cpu_time_total, times[name].device_time_total
            log.say(f"{name:8}{cpu / 1000 / cfg.profile:13.2f}{gpu / 1000 / cfg.profile:13.2f}")
        profiler.export_chrome_trace(os.path.join(cfg.output, "trace.json"))
        log.say(f"{cfg.profile * total_batch / seconds:.0f} images/s while profiling; wrote {cfg.output}/trace.json")

    ends, schedule = [], torch.profiler.schedule(wait=0, warmup=PROFILE_WARMUP, active=cfg.profile, repeat=1)
    os.makedirs(cfg.output, exist_ok=True)
    # in one thread, the kernels of the backward pass count for the phase that launches them
    with torch.autograd.set_multithreading_enabled(False), \
            torch.profiler.profile(schedule=schedule, on_trace_ready=show) as profiler:
        yield lambda: (ends.append(time.perf_counter()), profiler.step())


# ------------------------------------------------------------------------------------------------ main

def run_script(script, work):
    """Exit code of work(): its own; 2 for bad input, 1 for a failure of the system, 130 for Ctrl-C, each with one line
    on stderr. Other errors are bugs and keep their traceback."""
    known = {"DataLoader worker (pid": "a DataLoader worker died: too little memory (try fewer --workers) or too "
                                       "little shared memory (docker --shm-size)",
             "onnection ": "another process of this run died", "imed out": "another process did not answer"}
    try:
        code = work()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except KeyboardInterrupt as error:
        caught, code, message = error, 130, "interrupted"
    except BadInput as error:
        caught, code, message = error, 2, str(error)
    except (OSError, RuntimeError) as error:
        caught, code, message = error, 1, str(error)
        causes = [text for key, text in known.items() if key in message and (dist.is_initialized() or "worker" in key)]
        if causes:
            message = f"{causes[0]}; rerun the same command to resume from the last checkpoint"
        elif isinstance(error, RuntimeError):
            raise
    # bad input that every process meets is reported once per node; that of a worker ends its traceback
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0" or "in DataLoader worker" in message:
        process = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
        print(f"{script}: error: {process}{message.split('BadInput: ')[-1].strip()}", file=sys.stderr)
    traceback.clear_frames(caught.__traceback__)            # frees a DataLoader in them, which then ends its workers
    return code


def main(argv=None):
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped on request after saving, 130 interrupted."""
    return run_script("gld.py", lambda: train(parse_arguments(argv)))


if __name__ == "__main__":
    sys.modules["gld"] = sys.modules["__main__"]            # eval_knn, for --eval-every, imports this very module
    sys.exit(main())
