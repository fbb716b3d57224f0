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

Read from top to bottom. After "the paper ends here" come processes, image files, checkpoints, log and error handling.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
import traceback
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

ARCHS = ("conv_tiny", "vit_tiny", "vit_small", "vit_base", "swin_t", "swin_s", "swin_b", "resnet50")
STUDENT_TEMP = 0.1
CENTER_MOMENTUM = 0.9
PIXEL_MEAN = (0.485, 0.456, 0.406)      # of ImageNet
PIXEL_STD = (0.229, 0.224, 0.225)

class Option(NamedTuple):
    """A command-line flag."""
    name: str
    small: object                       # default of --preset small
    paper: object                       # default of --preset paper
    allowed: tuple                      # names, or (lowest, highest), or None
    meaning: str
    resumable: bool = False             # may change when a run is resumed

    def flag(self):
        return "--" + self.name.replace("_", "-")

NOT_NEGATIVE = (0, 1e9)
FRACTION = (1e-9, 1)
WORKERS = min(os.cpu_count() or 1, 10)
OPTIONS = (
    Option("data", "shapes", "shapes", None, "folder of images, or a built-in dataset: shapes, cifar10"),
    Option("data_fraction", 1.0, 1.0, FRACTION, "use this fraction of each class, always the same images"),
    # views
    Option("global_size", 32, 224, (1, 9999), "side of a global view, pixels"),
    Option("local_size", 16, 96, (1, 9999), "side of a local view, pixels"),
    Option("local_views", 4, 8, (0, 99), "L, number of local views per image"),
    Option("global_scale", [0.4, 1.0], [0.4, 1.0], FRACTION, "crop scale of a global view (fraction of the area)"),
    Option("local_scale", [0.1, 0.4], [0.05, 0.4], FRACTION, "crop scale of a local view (fraction of the area)"),
    Option("blur_sigma", [0.1, 0.5], [0.1, 2.0], (1e-9, 99), "range of the Gaussian blur's sigma, pixels"),
    # networks
    Option("arch", "conv_tiny", "swin_t", ARCHS, "backbone: " + ", ".join(ARCHS)),
    Option("patch_size", 8, 16, (1, 999), "patch size of a ViT, pixels"),
    Option("drop_path", 0.0, -1.0, (-1, 0.999), "student's stochastic depth; -1: 0.2 for swin_s, swin_b, else 0.1"),
    Option("out_dim", 256, 65536, (2, 1e9), "K, output dimension of a head"),
    Option("head_hidden", 128, 2048, (1, 1e6), "hidden width of a head"),
    Option("head_bottleneck", 64, 256, (1, 1e6), "D, width before the last layer of a head"),
    Option("norm_last_layer", True, False, None, "fix the weight-norm magnitude of the last layer at 1"),
    Option("init_from", "", "", None, "start from the weights in this file: gld.py's, or any that eval_knn.py reads"),
    # the loss
    Option("matching", "geometric", "geometric", ("geometric", "similarity", "none"),
           "which patches match: geometric, similarity, or none (no patch loss: DINO)"),
    Option("hinge", True, True, None, "geometric matching: mask patches without a teacher patch close by"),
    Option("teacher_temp", 0.04, 0.07, (1e-6, 1e6), "teacher temperature"),
    Option("warmup_teacher_temp", 0.04, 0.04, (1e-6, 1e6), "teacher temperature at the start"),
    Option("warmup_teacher_temp_epochs", 0, 30, NOT_NEGATIVE, "epochs of linear warm-up of the teacher temperature"),
    # optimisation
    Option("epochs", 10, 300, (1, 1e9), "passes over the data"),
    Option("batch_size", 32, 256, (1, 1e6), "images per step, over all processes"),
    Option("lr", 1.6e-2, 5e-4, (0, 1e6), "learning rate per 256 images of the batch"),
    Option("min_lr", 1e-6, 1e-6, (0, 1e6), "learning rate at the end (cosine)"),
    Option("warmup_epochs", 1.0, 10.0, NOT_NEGATIVE, "linear warm-up of the learning rate"),
    Option("weight_decay", 0.04, 0.04, (0, 1e6), "weight decay at the start"),
    Option("weight_decay_end", 0.4, 0.4, (0, 1e6), "weight decay at the end (cosine)"),
    Option("clip_grad", 3.0, 3.0, NOT_NEGATIVE, "largest gradient norm of each parameter; 0: any"),
    Option("freeze_last_layer", 0, 1, NOT_NEGATIVE, "epochs in which the last layer of the heads is frozen"),
    Option("teacher_momentum", 0.99, 0.996, (0, 1), "momentum of the EMA teacher at the start (cosine to 1)"),
    Option("seed", 0, 0, (0, 2 ** 32), "random seed"),
    # the run: these may change when it is resumed
    Option("output", "output", "output", None, "folder for checkpoint.pt, backbone.pt and log.jsonl", True),
    Option("resume", True, True, None, "resume from OUTPUT/checkpoint.pt if it exists", True),
    Option("save_every", 1, 1, (1, 1e9), "epochs between checkpoints", True),
    Option("eval_every", -1, -1, (-1, 1e9), "epochs between k-NN evaluations; 0: none; -1: 1 for shapes, else 0", True),
    Option("max_steps", 0, 0, NOT_NEGATIVE, "stop after this many steps, on the schedule of --epochs; 0: all", True),
    Option("workers", WORKERS, WORKERS, (0, 999), "DataLoader workers per process", True),
    Option("precision", "auto", "auto", ("auto", "bf16", "fp16", "fp32"), "network compute dtype", True),
    Option("compile", False, False, None, "torch.compile the networks", True),
    Option("impl", "auto", "auto", ("auto", "triton", "torch"), "code path of the loss, see matching_kernels.py", True),
    Option("device", "auto", "auto", ("auto", "cpu", "cuda"), "auto: cuda if available", True),
)

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

def normalise(x):
    """x (M, 3, H, W) in [0, 1] -> zero mean and unit variance over ImageNet's pixels."""
    return torch.stack([(x[:, c] - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)], 1)

# ------------------------------------------------------------------------------------------------ networks

def stride_of(arch, patch_size):
    """Side of a patch, pixels."""
    return patch_size if arch.startswith("vit") else 8 if arch == "conv_tiny" else 32

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
            x = net.conv_proj(x)                                                            # (M, C, rows, cols)
            position = self.position_embedding(*x.shape[2:])                                # (1, 1 + N, C)
            x = torch.cat([net.class_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + position
            x = net.encoder.ln(net.encoder.layers(x))                                       # (M, 1 + N, C)
            return x[:, 0], x[:, 1:]
        if self.arch.startswith("swin"):
            patches = net.norm(net.features(x)).flatten(1, 2)                               # (M, N, C)
        else:
            for layer in net.children():
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
    image_z: torch.Tensor           # (V, B, 1, D) bottleneck of the image head (the teacher's: Q views)
    patch_z: list                   # per size of view: (v, B, N, D) bottleneck of the patch head
    features: list                  # per size of view: (v, B, N, C) the backbone's patch features
    image_weight: torch.Tensor      # (K, D) last layer of the image head
    patch_weight: torch.Tensor      # (K, D) last layer of the patch head; None without one

class Network(nn.Module):
    """Backbone, image head and (unless matching is none) patch head. The student is one, the teacher another."""

    def __init__(self, cfg, drop_path=0.0):
        super().__init__()
        self.backbone = Backbone(cfg.arch, cfg.global_size, cfg.patch_size, drop_path)
        self.image_head = Head(self.backbone.width, cfg)
        self.patch_head = Head(self.backbone.width, cfg) if cfg.matching != "none" else None

    def forward(self, views):
        """views: a list with one tensor (v, B, 3, S, S) per size of view, the global ones first."""
        image_z, patch_z, features = [], [], []
        for x in views:
            image, patches = (y.unflatten(0, x.shape[:2]) for y in self.backbone(x.flatten(0, 1)))
            image_z.append(self.image_head(image[:, :, None]))                              # (v, B, 1, D)
            if self.patch_head is not None:
                patch_z.append(self.patch_head(patches))                                    # (v, B, N, D)
                features.append(patches.detach())
        patch_weight = self.patch_head.weight() if self.patch_head is not None else None
        return Outputs(torch.cat(image_z), patch_z, features, self.image_head.weight(), patch_weight)

# ------------------------------------------------------------------------------------------------ the loss

def distillation_loss(student, teacher, centers, boxes, grids, *, teacher_temp, matching, hinge=True, impl="auto"):
    """The loss of the paper, a pure function. Returns: loss, image_loss, patch_loss.

        image_loss = mean over pairs of views (q, v) of CE(T(q), S(v))
        patch_loss = mean over pairs of views (q, v) and patches n of w_n * CE(T(q, m(n)), S(v, n))
        loss = (image_loss + patch_loss) / 2; with matching none, loss = image_loss

    T = softmax((teacher logits - centre) / teacher_temp), S = softmax(student logits / 0.1), CE(t, s) = -sum t * log s.
    A pair is a teacher view q and another student view v of the same image. m(n) is the teacher patch that matches
    student patch n. With geometric matching, it is the patch whose midpoint is nearest in the image. w_n is 1 if the
    two midpoints are closer than half the diagonal of the larger of the two patches, or without `hinge`. Otherwise n
    is masked: w_n is 0, but n still counts in the mean. See `geometric_matches`. With similarity matching, w_n is 1.

    The centre is a running mean of the teacher's logits. Without it, one prototype could get the highest probability
    for every image. The low teacher temperature prevents the other collapse, a uniform output for every image.

    Args:
        student, teacher: Outputs for all V views, and for the Q = 2 global ones.
        centers: (2, K), of the image head and of the patch head (K,) each; with matching none (1, K).
        boxes: (V, B, 5). grids: (rows, cols) of the patches, per size of view. impl: see matching_kernels.py.
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
        return start * step / max(1, warmup - 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def teacher_temp_at(epoch, cfg):
    """Linear from --warmup-teacher-temp to --teacher-temp in --warmup-teacher-temp-epochs, then constant."""
    if epoch >= cfg.warmup_teacher_temp_epochs:
        return cfg.teacher_temp
    progress = epoch / max(1, cfg.warmup_teacher_temp_epochs - 1)
    return cfg.warmup_teacher_temp + progress * (cfg.teacher_temp - cfg.warmup_teacher_temp)

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

def train(cfg):
    """Train a student and its EMA teacher; under torchrun, as one of several processes. Returns the exit code.

    A resumed run ends with the same bits as an uninterrupted one, because every random draw is a function of the seed
    and of what it is drawn for. The order of the images depends on seed and epoch. The views of an image depend on
    seed, epoch and image. Stochastic depth depends on seed, step and process. So a checkpoint holds no state of a
    random generator. It holds the step, networks, optimizer, scaler and centres. (The same bits need the same machine,
    the same number of processes and threads, and operations that repeat their bits, as those of the CPU do.)
    """
    rank, world, device = start_processes(cfg)
    images = load_images(cfg.data, "train", cfg.data_fraction)
    if cfg.batch_size % world:
        raise BadInput(f"--batch-size {cfg.batch_size} cannot be shared equally by {world} processes; the next size "
                       f"that can is {math.ceil(cfg.batch_size / world) * world}")
    steps_per_epoch = len(images) // cfg.batch_size
    if not steps_per_epoch:
        raise BadInput(f"--batch-size {cfg.batch_size}: {cfg.data} has only {len(images)} images")
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
    optimizer = torch.optim.AdamW([{"params": [p for p in parameters if p.ndim > 1], "decay": 1},     # weights
                                   {"params": [p for p in parameters if p.ndim <= 1], "decay": 0}],   # biases, norms
                                  lr=0, weight_decay=0, fused=True)
    # the networks compute in this dtype; the weights of both, the loss and the centres are float32 in any case
    precision = cfg.precision
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    centers = torch.zeros(1 if cfg.matching == "none" else 2, cfg.out_dim, device=device)
    sizes = [cfg.global_size, cfg.local_size] if cfg.local_views else [cfg.global_size]
    grids = [(size // stride_of(cfg.arch, cfg.patch_size),) * 2 for size in sizes]                  # rows, cols

    modules = dict(student=student, teacher=teacher, optimizer=optimizer, scaler=scaler)
    options = dict(vars(cfg), images=[len(images), zlib.crc32(np.ascontiguousarray(images.items))])
    start = resume(cfg, modules, centers, options)
    if all_mean(torch.tensor(start, dtype=torch.float64, device=device)).item() != start:
        raise BadInput(f"--output {cfg.output}: the processes see different checkpoints; the folder must be shared")
    source = initialise(cfg, student, teacher) if cfg.init_from and start == 0 else ""
    if cfg.eval_every:
        import eval_knn                                     # here, since it imports this file
        labelled_parts = eval_knn.labelled(cfg.data, cfg.data_fraction)
    if cfg.compile:
        torch._dynamo.config.suppress_errors = True         # what cannot be compiled runs eagerly, with a warning
        student.compile()
        teacher.compile()
    ddp = nn.parallel.DistributedDataParallel(student) if world > 1 else student

    log = Log(cfg, rank, start, stop_at)
    log.say(f"{cfg.matching} matching, preset {cfg.preset}, {cfg.arch} on {device.type}{source}; {len(images)} images "
            f"of {images.root}: {steps} steps of {cfg.batch_size} images, from step {start}; output in {cfg.output}/")
    if cfg.preset == "paper" and device.type == "cpu":
        log.say("on a CPU, --preset paper takes minutes per step; try --preset small")
    signals = stop_on_signal(world)
    batches = iter(make_loader(images, cfg, rank, world, range(start, stop_at), steps_per_epoch))
    done = start
    saved = True
    sums = Counter()                                        # over the epoch, for the log
    reported = set()                                        # images that could not be read
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
        global_views, *_ = views
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                teacher_out = teacher([global_views])
            student_out = ddp(views)
        loss, image_loss, patch_loss = distillation_loss(
            student_out, teacher_out, centers, boxes, grids, teacher_temp=teacher_temp, matching=cfg.matching,
            hinge=cfg.hinge, impl=cfg.impl)

        # 2. gradients: backward, where DDP averages them over the processes; freeze; clip each parameter by itself
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if epoch < cfg.freeze_last_layer:
            for p in last_layers:
                p.grad = None                               # the optimizer leaves these parameters alone
        norms = [nn.utils.clip_grad_norm_(p, cfg.clip_grad or math.inf) for p in parameters if p.grad is not None]
        grad_norm = torch.stack(norms).norm()

        # 3. agree with the other processes before anything changes: all get the same means, so a NaN in one of them
        # ends the run in all, and a signal to one of them stops all
        batch_center = all_mean(mean_logits(teacher_out))
        counts = torch.tensor([len(signals), len(unreadable)], dtype=torch.float32).to(device, non_blocking=True)
        shared = all_mean(torch.cat([image_loss.detach()[None], patch_loss.detach()[None], counts]))
        numbers = torch.cat([shared, batch_center.sum()[None], grad_norm[None]])
        # tolist() waits until the GPU has done all this; so load the next batch first, while the GPU is busy
        batch = load_batch(batches, device, cfg)
        image_value, patch_value, stop, unread, center_value, norm_value = numbers.tolist()
        if scaler.is_enabled() and not math.isfinite(norm_value):
            norm_value = 0.0                                # fp16: the scaler skips this step and lowers its scale
        if not all(map(math.isfinite, (image_value, patch_value, center_value, norm_value))):
            log.say(f"gld.py: stopped at step {step}, lr {lr:.3g}: image loss {image_value:.3g}, patch loss "
                    f"{patch_value:.3g}, teacher {center_value:.3g}, gradient {norm_value:.3g}; the last checkpoint is "
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
        for i in set(unreadable) - reported:
            print(f"cannot be read, replaced by another image: {images.name(i)}", flush=True)
        reported |= set(unreadable)
        sums.update(steps=1, seconds=time.perf_counter() - began, waiting=waited, unreadable=round(unread * world),
                    loss_image=image_value, loss_patch=patch_value, grad_norm=norm_value)
        if sums["unreadable"] > max(1, steps_per_epoch * cfg.batch_size // 100):
            raise BadInput(f"--data {cfg.data}: more than 1 % of the images of an epoch cannot be read")
        if step == start or epoch_ended or done == stop_at or time.perf_counter() - log.reported > 30:
            record = dict(epoch=epoch, step=done, lr=lr)
            record |= diagnose(teacher_out, centers, boxes, grids, teacher_temp, cfg)
            if cfg.eval_every and epoch_ended and (epoch + 1) % cfg.eval_every == 0:
                teacher.eval()
                record["knn"] = eval_knn.top1_of_20nn(teacher.backbone, *labelled_parts, cfg, device, rank, world)
                teacher.train()
            log.report(record, sums, epoch_ended, run_ended=done == stop_at)
        if epoch_ended:
            sums.clear()
        if stop or done == stop_at or (epoch_ended and (epoch + 1) % cfg.save_every == 0):
            saved = save(cfg, modules, centers, done, options, rank, log)
        if stop:
            break
        began = time.perf_counter()

    if not saved:
        return 1
    if done < stop_at:
        log.say(f"stopped on request: saved at step {done}; rerun the same command to resume")
        return STOPPED
    return 0

# ======================================================================================= the paper ends here

NAMED_SETS = ("shapes", "cifar10")
STOPPED = 75                        # exit code of a run that stopped on request and can be resumed (EX_TEMPFAIL)

class BadInput(Exception):
    """What the user has to change, in one line, for exit code 2. A second argument: only this process knows of it."""

@contextlib.contextmanager
def blame(what):
    """Any error in this block becomes a BadInput that begins with `what`, the flag or file at fault."""
    try:
        yield
    except Exception as error:                              # decoders and torch.load raise all kinds
        raise BadInput(f"{what}: {' '.join(str(error).split())[:300]}") from None

class Parser(argparse.ArgumentParser):
    def error(self, message):                               # one line, without the usage of all flags
        raise BadInput(message)

def parse_arguments(argv=None):
    """Command line -> namespace in which every option is set, by the user or by the preset. Raises BadInput."""
    parser = Parser("gld.py", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=("small", "paper"), help="which defaults; small unless --data is a path")
    for option in OPTIONS:
        if isinstance(option.paper, bool):
            kwargs = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(option.paper, str):
            kwargs = dict(choices=option.allowed, metavar="NAME")
        elif isinstance(option.paper, list):
            kwargs = dict(type=float, nargs=2, metavar=("LOW", "HIGH"))
        else:
            kwargs = dict(type=type(option.paper), metavar="N")
        default = option.small if option.small == option.paper else f"small: {option.small}, paper: {option.paper}"
        parser.add_argument(option.flag(), help=f"{option.meaning} ({default})", **kwargs)
    given = vars(parser.parse_args(argv))                   # only what the user gave
    preset = given.get("preset") or ("small" if given.get("data", "shapes") in NAMED_SETS else "paper")
    defaults = {option.name: getattr(option, preset) for option in OPTIONS}
    cfg = argparse.Namespace(**dict(preset=preset) | defaults | given)
    for option in OPTIONS:
        values = np.atleast_1d(getattr(cfg, option.name))
        if values.dtype.kind in "if":
            low, high = option.allowed
            if not low <= values[0] <= values[-1] <= high:  # NaN is refused, too
                order = ", the lower value first" if len(values) > 1 else ""
                raise BadInput(f"{option.flag()} must be from {low:g} to {high:g}{order}, got {values.tolist()}")
    stride = stride_of(cfg.arch, cfg.patch_size)
    sizes = [cfg.global_size, cfg.local_size] if cfg.local_views else [cfg.global_size]
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    if any(size % stride for size in sizes):
        raise BadInput(f"--global-size and --local-size must be multiples of {stride} for {cfg.arch}, got {sizes}")
    if cfg.warmup_epochs > cfg.epochs:
        raise BadInput(f"--warmup-epochs {cfg.warmup_epochs:g} exceeds --epochs {cfg.epochs}")
    triton = cfg.impl == "triton" and os.getenv("TRITON_INTERPRET") != "1"
    if (cfg.device == "cuda" or cfg.precision == "fp16" or triton) and not gpu:
        raise BadInput("--device cuda, --precision fp16 and --impl triton need a CUDA GPU")
    if cfg.drop_path < 0:
        cfg.drop_path = 0.2 if cfg.arch in ("swin_s", "swin_b") else 0.1
    if cfg.eval_every < 0:
        cfg.eval_every = 1 if cfg.data == "shapes" else 0
    return cfg

def start_processes(cfg):
    """Join the other processes of torchrun, if there are any. Returns: rank, number of processes, device."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if cfg.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
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

def stop_on_signal(world):
    """From now on, SIGTERM and Ctrl-C ask for a stop after the current step. Returns: a list, empty until one comes.
    A second signal ends the program at once, but not under torchrun, which passes each Ctrl-C on a second time."""
    received = []
    def request(number, frame):
        received.append(number)
        if world == 1:
            os.write(2, b"stopping after this step; Ctrl-C again quits now\n")  # print is not safe in a signal handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, request)
    signal.signal(signal.SIGINT, request)
    return received

def ignore_signals(worker):
    """In a DataLoader worker: a signal to the whole job is for the main process, which needs this worker until the end
    of the step. Python ends workers by SIGTERM when a program exits. So SIGTERM ends this worker, after 30 seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))

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
        return os.path.join(self.root, os.fsdecode(self.items[i]) if self.items.ndim == 1 else f"image {i}")

    def read(self, i):
        """(3, H, W) uint8. Raises OSError and others if the file cannot be read or is not an image."""
        return decode(self.name(i)) if self.items.ndim == 1 else torch.from_numpy(self.items[i]).permute(2, 0, 1)

def load_images(data, split, fraction=1.0, must_split=False):
    """The `Images` of --data: a built-in set, or a folder. Of a folder that holds `split`/, only that is used."""
    if data == "shapes":
        images = Images(*draw_shapes(2400 if split == "train" else 1200, seed=("train", "val").index(split)), data)
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
        raise BadInput(f"--data {data}: not a folder (unpack archives first), and not {' or '.join(NAMED_SETS)}")
    if (root / split).is_dir():
        root = root / split
    elif must_split:
        raise BadInput(f"--data {data}: must hold train/ and val/, or be one of {', '.join(NAMED_SETS)}")
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

def make_loader(images, cfg, rank, world, steps, steps_per_epoch):
    """Batches of this process for these steps. All processes together get the same images whatever their number."""
    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng((cfg.seed, epoch)).permutation(len(images))

    def keys():
        share = cfg.batch_size // world
        for step in steps:
            epoch, position = divmod(step, steps_per_epoch)
            first = position * cfg.batch_size + rank * share
            yield [(epoch, i) for i in order(epoch)[first:first + share].tolist()]

    return torch.utils.data.DataLoader(ViewDataset(images, cfg), batch_sampler=keys(), num_workers=cfg.workers,
                                       pin_memory=cfg.device != "cpu" and torch.cuda.is_available(),
                                       worker_init_fn=ignore_signals)

# ------------------------------------------------------------------------------------------------ checkpoints

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

def resume(cfg, modules, centers, options):
    """Load OUTPUT/checkpoint.pt, if it exists. Returns: the first step to do.

    options: those of this run, and a checksum of the images (pixels, or file names). Only options marked as resumable
    may differ from the checkpoint's; some of them change last bits. Raises BadInput.
    """
    path = Path(cfg.output, "checkpoint.pt")
    if not cfg.resume or not path.exists():
        return 0
    content = load_file(path, "--output")
    before = content.get("options", {})
    new_run = "to start a new run, give another --output or --no-resume"
    if before.get("images") != options["images"]:
        raise BadInput(f"--data {cfg.data}: not the images of {path} ({before.get('data')}); {new_run}")
    free = {option.name for option in OPTIONS if option.resumable} | {"data"}
    for name in options:
        if name not in free and before.get(name) != options[name]:
            raise BadInput(f"--{name.replace('_', '-')}: {options[name]} here, but {path} was made with "
                           f"{before.get(name)}; {new_run}" + f", and --init-from {path}" * (name == "epochs"))
    with blame(f"--output {path}: was not written by this gld.py"):
        for name, module in modules.items():
            if content[name]:                               # the gradient scaler has no state unless fp16 is used
                module.load_state_dict(content[name])
        centers.copy_(content["centers"])
        return content["step"]

def initialise(cfg, student, teacher):
    """--init-from: both backbones from any file that eval_knn.py reads, strictly; the heads only from a checkpoint of
    gld.py, if they fit. Returns: what was loaded, for the log. Raises BadInput."""
    import eval_knn                                         # here, since it imports this file
    content = load_file(cfg.init_from, "--init-from")
    for name, network in (("student", student), ("teacher", teacher)):
        weights = name if content.get(name) else "teacher"
        backbone, *_ = eval_knn.load_backbone(cfg.init_from, weights, "--init-from", content)
        state = backbone.net.state_dict()
        if "encoder.pos_embedding" in state:
            side = cfg.global_size // cfg.patch_size
            state["encoder.pos_embedding"] = backbone.position_embedding(side, side)
        with blame(f"--init-from {cfg.init_from}: a {backbone.arch} does not fit --arch {cfg.arch} or --patch-size"):
            network.backbone.net.load_state_dict(state)
        heads = {key: x for key, x in content.get(name, {}).items() if "_head." in key}
        own = {key: x.shape for key, x in network.state_dict().items() if "_head." in key}
        if fit := own == {key: x.shape for key, x in heads.items()}:
            network.load_state_dict(heads, strict=False)
    return f", weights from {cfg.init_from} ({'with its heads' if fit else 'new heads'})"

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

def save(cfg, modules, centers, step, options, rank, log):
    """Write checkpoint.pt and backbone.pt. Returns, on all processes: whether that worked. If not (the disk is full,
    say), training can go on."""
    failed = torch.zeros(1, device=centers.device)
    if rank == 0:
        content = {name: module.state_dict() for name, module in modules.items()}
        content |= dict(centers=centers, step=step, options=options)
        backbone = {name: x.cpu() for name, x in modules["teacher"].backbone.net.state_dict().items()}
        try:
            os.makedirs(cfg.output, exist_ok=True)
            replace_file(Path(cfg.output, "checkpoint.pt"), functools.partial(torch.save, content))
            replace_file(Path(cfg.output, "backbone.pt"), functools.partial(torch.save, backbone))
        except (OSError, RuntimeError) as error:            # torch reports a full disk by a RuntimeError
            log.say(f"gld.py: cannot write {cfg.output}/ at step {step} ({' '.join(str(error).split())[:100]}); the "
                    "previous file is kept, and the next save tries again", file=sys.stderr)
            failed += 1
    return not all_mean(failed).item()

# ------------------------------------------------------------------------------------------------ log

@torch.no_grad()
def diagnose(teacher, centers, boxes, grids, teacher_temp, cfg):
    """Measures of the last batch of this process that tell a healthy run from a collapsed one."""
    logits = teacher.image_z @ teacher.image_weight.T - centers[0]
    log_p = F.log_softmax(logits / teacher_temp, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    z = teacher.image_z.flatten(0, 2)                                                       # (Q*B, D), unit length
    spread = 1 - z.mean(0).square().sum().item()            # the variance of z: 0 if all images give the same
    matched = float(cfg.matching == "similarity")           # the share of patches that are not masked
    if cfg.matching == "geometric":
        first, second, *_ = boxes
        weights = [geometric_matches(first, second, grids[0], grids[0], cfg.hinge)[1],
                   geometric_matches(second, first, grids[0], grids[0], cfg.hinge)[1],
                   geometric_matches(boxes[2:, None], boxes[:2], grids[-1], grids[0], cfg.hinge)[1]]
        matched = torch.cat([w.flatten() for w in weights]).mean().item()
    return dict(matched=matched, entropy=entropy, center_norm=centers[0].norm().item(), spread=spread)

def signs_of_collapse(records, cfg, run_ended):
    """What in the records of the log (one per epoch) looks like a collapse, in words; "" if nothing does."""
    last, highest = records[-1], math.log(cfg.out_dim)
    healthy = 0.01 * highest <= last["entropy"] <= 0.99 * highest and last["spread"] > 1e-3
    if not healthy and last["epoch"] >= cfg.warmup_epochs:
        return (f"WARNING: looks collapsed: the teacher's entropy is {last['entropy']:.2f} (ln K = {highest:.2f}), the "
                f"variance of z {last['spread']:.4f}; try a lower --lr, or a smaller --batch-size")
    knn = [record["knn"] for record in records if record.get("knn") is not None]
    if run_ended and knn and knn[-1] < knn[0]:
        return f"WARNING: the features got worse: 20-NN fell from {knn[0]:.1f} to {knn[-1]:.1f} %; try a lower --lr"
    return ""

class Log:
    """Messages, and log.jsonl with one record per epoch. Only process 0 writes."""

    def __init__(self, cfg, rank, start, stop_at):
        self.cfg, self.rank, self.stop_at = cfg, rank, stop_at
        self.path = Path(cfg.output, "log.jsonl")
        self.reported = time.perf_counter()                 # the last time
        self.records = []
        with blame(f"--output {cfg.output}"):
            os.makedirs(cfg.output, exist_ok=True)
            if self.path.exists():                          # keep the records of the steps that are not done again
                records = map(json.loads, self.path.read_text().splitlines())
                self.records = [record for record in records if record["step"] <= start]

    def say(self, message, file=None):
        if self.rank == 0 and message:
            print(message, file=file, flush=True)

    def report(self, record, sums, epoch_ended, run_ended):
        """Print the record and the means over the epoch so far; at the end of epoch or run, add them to log.jsonl."""
        self.reported = time.perf_counter()
        speed = sums["steps"] * self.cfg.batch_size / sums["seconds"]
        record |= {name: sums[name] / sums["steps"] for name in ("loss_image", "loss_patch", "grad_norm")}
        record |= dict(images_per_second=speed, waiting=sums["waiting"] / sums["seconds"],
                       unreadable=sums["unreadable"], gpu_gib=torch.cuda.max_memory_allocated() / 2 ** 30)
        left = timedelta(seconds=int((self.stop_at - record["step"]) * self.cfg.batch_size / speed))
        knn = f"20-NN {record['knn']:.1f} %, " if record.get("knn") is not None else ""
        self.say("epoch {epoch} step {step} | loss image {loss_image:.3f} patch {loss_patch:.3f} matched {matched:.0%} "
                 "entropy {entropy:.2f} lr {lr:.1e} | {knn_text}{images_per_second:.0f} images/s, {waiting:.0%} "
                 "waiting for data, GPU {gpu_gib:.1f} GiB, {left} left".format(**record, knn_text=knn, left=left))
        if not epoch_ended and not run_ended:
            return
        self.records.append(record)
        self.say(signs_of_collapse(self.records, self.cfg, run_ended))
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        if self.rank == 0:
            with contextlib.suppress(OSError):              # the disk may be full: `save` says so
                replace_file(self.path, lambda file: file.write(lines.encode()))

# ------------------------------------------------------------------------------------------------ main

def run_script(script, work):
    """Exit code of work(): its own; 2 for bad input, 130 for Ctrl-C, each with one line on stderr. Other errors are
    not the user's input: they keep their traceback, and the code is 1."""
    try:
        code = work()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except BadInput as error:
        message, *only_here = error.args                    # else all processes meet it: say it once per node
        if only_here or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{script}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()       # here: Python's own would keep the DataLoader, and its workers, until it exits
        return 1

def main(argv=None):
    """Returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped on request after saving, 130 interrupted."""
    return run_script("gld.py", lambda: train(parse_arguments(argv)))

if __name__ == "__main__":
    from gld import main            # eval_knn imports gld: run that very module, or its classes would exist twice
    sys.exit(main())
