# SPDX-License-Identifier: MIT
"""How good are frozen features? k-NN, a linear probe, where similar patches lie, and a picture of the matches.

    python eval_knn.py                                                # output/checkpoint.pt, on its own data set
    python eval_knn.py --checkpoint run/checkpoint.pt --data IMAGENET --linear        # IMAGENET/train and IMAGENET/val
    python eval_knn.py --data PHOTO.jpg --show-matches matches.png    # which patches of two crops match
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint backbone.pt --data IMAGENET    # processes share the images

`--checkpoint` also takes a backbone.pt, a torchvision state dict, an official (or EsViT) Swin, a DINO or timm ViT.
Images: shorter side to 256/224 of the crop size, centre crop, no augmentation. Features: the image-level output, unit
length. k-NN: the k most similar training images vote with weight exp(similarity / temperature).
"""
import json
import os
import re
import sys
import textwrap
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from gld import (ARCHS, BadInput, Backbone, Parser, blame, ignore_signals, load_file, load_images, normalise,
                 run_script, start_processes, stride_of)
from matching_kernels import geometric_matches, similarity_matches

DEFAULT_CHECKPOINT = "output/checkpoint.pt"
NOT_THE_METHOD = ("seed", "output", "resume", "workers", "device", "save_every", "eval_every")  # differ between seeds
CHUNK_BYTES = 2 ** 28                   # of similarities at a time, so that memory does not grow with the test set
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)         # of crops, where no checkpoint tells the run's own
MATCH_COLUMNS = ("same position", "correspondence accuracy", "both", "neither", "geometry: same position")


def parse_arguments(argv=None):
    parser = Parser("eval_knn.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="FILE", help=f"({DEFAULT_CHECKPOINT}); other people's weights: see the file")
    add("--data", help="folder or .tar with train/ and val/, shapes, cifar10 (default: the checkpoint's data set)")
    add("--untrained", action="store_true", help="also evaluate random initialisation, and raw pixels")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="temperature of the neighbours' votes")
    add("--weights", choices=("teacher", "student"), default="teacher", help="which network of a checkpoint.pt")
    add("--linear", action="store_true", help="also train a linear classifier on the frozen features")
    add("--matches", action="store_true", help="also tell where the most similar patch of another crop lies")
    add("--show-matches", metavar="FILE.png", help="draw which patches of one image match, and end")
    add("--batch-size", type=int, default=128, help="images per process")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 10), help="DataLoader workers per process")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", metavar="FILE", help="also write settings and results to this file")
    cfg = parser.parse_args(argv)
    for flag, path in (("--json", cfg.json), ("--show-matches", cfg.show_matches)):
        if path and not os.access(Path(path).absolute().parent, os.W_OK):
            raise BadInput(f"{flag} {path}: cannot be written there")
    if min(*cfg.k, cfg.batch_size) < 1 or not cfg.temperature > 0 or cfg.workers < 0:
        raise BadInput("--k and --batch-size must be at least 1, --temperature > 0, --workers >= 0")
    if cfg.checkpoint is None:              # a picture of geometric matching needs no network
        cfg.checkpoint = [] if cfg.show_matches and not Path(DEFAULT_CHECKPOINT).exists() else [DEFAULT_CHECKPOINT]
    return cfg


def load_backbone(path, weights="teacher"):
    """File -> (backbone, image size, options of the run or {}). Strict: keys that do not fit raise BadInput."""
    state = load_file(path, "--checkpoint")
    options = state.get("options", {})
    for key in (weights, "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BadInput(f"--checkpoint {path}: holds no state dict of a network")
    if options:
        state = {k.removeprefix("backbone.net."): v for k, v in state.items() if k.startswith("backbone.net.")}
        arch, patch, size = (options.get(name) for name in ("arch", "patch_size", "global_size"))
    else:
        state = plain_keys(state)
        arch, patch, size = guess_arch(state)
    if arch not in ARCHS:
        raise BadInput(f"--checkpoint {path}: none of {', '.join(ARCHS)} has keys like {', '.join(list(state)[:3])}")
    backbone = Backbone(arch, size, patch)
    with blame(f"--checkpoint {path} as {arch}"):
        backbone.net.load_state_dict(state)
    return backbone.eval(), size, options


# Parts of the keys in other people's checkpoints, and in torchvision's networks
SWIN_KEYS = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
VIT_KEYS = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
            "blocks.": "encoder.layers.encoder_layer_", "norm1": "ln_1", "norm2": "ln_2", "norm.": "encoder.ln.",
            "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
            "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}


def plain_keys(state):
    """Keys of a torchvision network without its classifier, from torchvision's, an official Swin's or a DINO ViT's."""
    state = {re.sub(r"^(module\.|backbone\.)+", "", key): value for key, value in state.items()}
    renames, out = VIT_KEYS if "cls_token" in state else SWIN_KEYS, {}
    for key, value in state.items():
        if key.startswith(("head", "fc.")) or key.endswith("attn_mask"):
            continue
        for theirs, ours in renames.items():
            key = key.replace(theirs, ours)
        key = re.sub(r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
        out[key] = value.flatten() if key.endswith("relative_position_index") else value
    return out


def guess_arch(state):
    """(arch, patch size, image size) of plain keys; (None, ...) if they belong to no network of gld.py."""
    if "conv_proj.weight" in state and "encoder.pos_embedding" in state:
        width, patch = state["conv_proj.weight"].shape[0], state["conv_proj.weight"].shape[-1]
        side = round((state["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
        return {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(width), patch, side * patch
    if "features.0.0.weight" in state:
        deep = any(key.startswith("features.5.17.") for key in state)
        return "swin_b" if len(state["features.0.0.weight"]) == 128 else "swin_s" if deep else "swin_t", 16, 224
    arch = "resnet50" if "layer4.2.conv3.weight" in state else "conv_tiny" if "12.weight" in state else None
    return arch, 16, 224 if arch == "resnet50" else 32


# ------------------------------------------------------------------------------------------------ features and scores

def read(images, i):
    try:
        return images.read(i)
    except Exception as error:              # decoders raise all kinds of errors for broken files
        raise BadInput(f"--data: {images.name(i)} cannot be read: {error}") from None


def centre_crops(images, size, indices):
    """Images -> (n, 3, size, size) uint8, resized and cropped at the centre. This is what a DataLoader worker does."""
    resized = [TF.resize(read(images, i), [round(size * 256 / 224)], TF.InterpolationMode.BICUBIC, antialias=True)
               for i in indices]
    return torch.stack([TF.center_crop(image, [size, size]) for image in resized])


@torch.no_grad()
def extract(network, images, size, cfg, device, rank, world):
    """Features (n, C) float16, unit length, of all images, on every process; `network`: (N, 3, H, W) -> (N, C)."""
    loader = torch.utils.data.DataLoader(range(rank, len(images), world), cfg.batch_size, num_workers=cfg.workers,
                                         collate_fn=partial(centre_crops, images, size),
                                         worker_init_fn=ignore_signals)
    rows = []
    for batch, x in enumerate(loader, 1):
        rows.append(F.normalize(network(normalise(x.to(device).float() / 255)).float(), dim=1).half())
        if rank == 0 and sys.stderr.isatty():
            count = f"{batch * cfg.batch_size * world} of {len(images)} images" if batch < len(loader) else ""
            print(f"\r{count}\033[K", end="", file=sys.stderr, flush=True)
    mine = torch.cat(rows) if rows else network(torch.zeros(1, 3, size, size, device=device))[:0].half()
    if world == 1:
        return mine
    most = -(-len(images) // world)
    mine = F.pad(mine, (0, 0, 0, most - len(mine)))
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[:len(images)]        # process r had images r, r + world, ...


def knn(train, train_labels, val, val_labels, ks, temperature):
    """{k: (top-1, top-5)} in percent, of weighted k-NN on unit features (n, C). k is capped at the number of rows."""
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    hits = {k: torch.zeros(2, device=train.device) for k in ks}
    rows = max(1, CHUNK_BYTES // (4 * len(train)))
    bank = train.float().T                  # products of float16 would round to a few values, and rank by chance
    for chunk, labels in zip(val.split(rows), val_labels.split(rows)):
        similarity, nearest = (chunk.float() @ bank).topk(min(max(ks), len(train)), dim=1)          # (rows, k)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()     # a common factor, so that none overflows
        for k in ks:
            votes = torch.zeros(len(chunk), classes, device=train.device)
            votes.scatter_add_(1, train_labels[nearest[:, :k]], weight[:, :k])
            # a class without a vote is no answer, even where fewer than five classes got one
            got, best = votes.topk(min(5, classes), dim=1)
            right = (best == labels[:, None]) & (got > 0)
            hits[k] += torch.stack([right[:, 0].sum(), right.sum()])
    return {k: tuple((100 * h / len(val)).tolist()) for k, h in hits.items()}


def linear_probe(train, train_labels, val, val_labels, epochs=100, batch=256):
    """(top-1, top-5) in percent of a linear classifier: AdamW, cosine schedule, standardised features, fixed seed."""
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    mean, std = train.float().mean(0), train.float().std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(train.shape[1], classes, device=train.device)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).to(train.device).split(batch):
            loss = F.cross_entropy(model((train[rows].float() - mean) / std), train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores = torch.cat([model((x.float() - mean) / std) for x in val.split(4096)])
    right = scores.topk(min(5, classes), dim=1)[1] == val_labels[:, None]
    return 100 * right[:, 0].float().mean().item(), 100 * right.any(1).float().mean().item()


def labelled(data, fraction):
    """Training and validation `Images` of --data, and the labels of both, numbered alike. Raises BadInput."""
    parts = [load_images(data, "train", fraction, must_split=True), load_images(data, "val", must_split=True)]
    if parts[0].classes is None:
        return parts, [images.labels for images in parts]
    train, val = ({os.fsdecode(name) for name in images.classes} for images in parts)
    unknown = [f"val/{name}/" if name else "val/ itself" for name in sorted(val - train)]
    if unknown:                             # images of such a class would silently count as wrong
        raise BadInput(f"--data {data}: train/ has no class for the images in {', '.join(unknown[:3])}"
                       f"{', ...' * (len(unknown) > 3)}; name the folders of val/ as those of train/ (A is not a)")
    if len(train) < 2:
        raise BadInput(f"--data {data}: k-NN needs labels, that is class folders in train/ and val/")
    return parts, [parts[0].labels, np.searchsorted(parts[0].classes, parts[1].classes)[parts[1].labels]]


def top1_of_20nn(backbone, labelled_parts, cfg, device, rank, world):
    """20-NN top-1 accuracy on val/, percent, for gld.py while it trains; None on all processes but the first."""
    parts, labels = labelled_parts
    backbone.eval()
    train, val = (extract(lambda x: backbone(x)[0], part, cfg.global_size, cfg, device, rank, world) for part in parts)
    backbone.train()
    if rank:
        return None
    train_labels, val_labels = (torch.as_tensor(y, device=device) for y in labels)
    return knn(train, train_labels, val, val_labels, [20], 0.07)[20][0]


# ------------------------------------------------------------------------------------------------ matches of patches

def random_box(image, scale):
    """Box (5,) of a random crop, as in training: top, left, height, width in pixels of the image, flip 0 or 1."""
    return torch.tensor([*RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)), torch.rand(()) < 0.5]).float()


def crop(image, box, size):
    """(3, size, size) uint8: the crop, resized and flipped, without colour augmentation."""
    place, sides = box[:4].int().tolist(), [size, size]
    out = TF.resized_crop(image, *place, sides, TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.hflip(out) if box[4] else out


@torch.no_grad()
def matched_crops(image, backbone, size, scale, device, n, seed):
    """Two random crops of an image (3, H, W), and which of their n x n patches match. N = n * n.

    Returns: boxes (2, 5); geometric matches of crop 1 in crop 2 and of crop 2 in crop 1, index (2, N) and weight
    (2, N); patch features (2, N, C) and the similarity matches (N,) of crop 1 in crop 2, or None without a backbone.
    """
    torch.manual_seed(seed)
    boxes = torch.stack([random_box(image, scale) for _ in range(2)])
    index, weight = geometric_matches(boxes, boxes.flip(0), (n, n), (n, n))
    if backbone is None:
        return boxes, index, weight, None, None
    crops = torch.stack([crop(image, box, size) for box in boxes]).to(device)
    features = backbone(normalise(crops.float() / 255))[1].cpu()
    return boxes, index, weight, features, similarity_matches(*features)


def match_shares(backbone, images, size, scale, device):
    """Percent of the patches that geometry matches, in crops of 200 images, whose most similar patch lies at the same
    row and column, where geometry says, both, neither; and how often geometry itself says the same row and column.
    """
    n, hits = size // stride_of(backbone.arch, backbone.patch_size), []
    here = torch.arange(n * n)
    for i in np.linspace(0, len(images) - 1, min(200, len(images))).astype(int).tolist():
        _, index, weight, _, similar = matched_crops(read(images, i), backbone, size, scale, device, n, seed=i)
        same, right = similar == here, similar == index[0]
        hits.append(torch.stack([same, right, same & right, ~(same | right), index[0] == here])[:, weight[0] > 0])
    return dict(zip(MATCH_COLUMNS, (100 * torch.cat(hits, 1).float().mean(1)).tolist()))


SIDE, GAP, EDGE, LINE = 1080, 130, 70, 8        # pixels: a crop, between crops, around all, a line; later halved
COLOURS = [f"hsl({hue}, 90%, 62%)" for hue in (0, 30, 100, 155, 190, 225, 275, 320)]         # of the lines
FRAMES = "#ffffff", "#ffd23f"           # of crop 1 and crop 2
LEGEND = ("Each patch of crop 1 must give the same output as the patch of crop 2 at the end of its line. Dots: the "
          "places of these patches. Faint lines: the other matches.",
          "Dark: masked. The other crop does not show this place.",
          "Thin blue boxes: local crops. They match crops 1 and 2 in the same way.",
          "Thin squares: the right place, where similarity chose another.")


def show_matches(image, backbone=None, size=224, options=None):
    """Draw which patches of two crops of an image match: by geometry and, with a backbone, by similarity.

    Args: image (3, H, W) uint8; size of the backbone's crops, pixels; options of its run, for their scales.
    Returns: the picture (PIL.Image) and its lines, a list of (matching, (x, y), (x, y)): the centres of the patches of
        crop 1 and crop 2 that are joined, pixels of the picture.
    """
    options, n = options or {}, size // stride_of(backbone.arch, backbone.patch_size) if backbone else 7
    scale = options.get("global_scale", GLOBAL_SCALE)
    for seed in range(100):                 # until the crops show both, patches that match and masked ones
        boxes, index, weight, *_ = matched_crops(image, None, size, scale, "cpu", n, seed)
        if 0.45 < weight.mean() < 0.7:
            break
    # kind of matching, title, for every patch of crop 1 that of crop 2, for every patch of both crops: is it matched?
    pairs = [("geometric", "Geometric matching: the patch that shows the same place", index[0], weight > 0)]
    if backbone:
        *_, features, similar = matched_crops(image, backbone, size, scale, "cpu", n, seed)
        right = (similar == index[0])[weight[0] > 0]
        title = f"Similarity matching: the most similar patch, at the same place for {right.sum()} of {len(right)}"
        pairs.append(("similarity", title, similar, weight > -1))

    all_matched = weight[0].nonzero()[:, 0]
    spread = torch.linspace(0, len(all_matched) - 1, min(len(COLOURS), len(all_matched))).round().long()
    chosen = dict(zip(all_matched[spread].tolist(), COLOURS))

    top, lefts, cell = EDGE + 180, [EDGE + i * (SIDE + GAP) for i in range(2 * len(pairs))], SIDE / n
    picture = Image.new("RGB", (lefts[-1] + SIDE + EDGE, top + 2 * SIDE + 150 + EDGE), "#15181d")
    draw, lines = ImageDraw.Draw(picture, "RGBA"), []

    def write(x, y, text, height=48, colour="#f2f2f2"):
        draw.multiline_text((x, y), text, colour, ImageFont.load_default(height), spacing=height // 4)

    def centre(left, k):
        """(x, y) of the centre of patch k of the crop drawn at `left`."""
        return left + (k % n + 0.5) * cell, top + (k // n + 0.5) * cell

    def square(x, y, half=cell / 2):
        return round(x - half), round(y - half), round(x + half) - 1, round(y + half) - 1

    def outline(corners, colour, width):
        draw.rectangle([z + dz for z, dz in zip(corners, (-2, -2, 2, 2))], outline=(0, 0, 0, 160), width=width + 4)
        draw.rectangle(corners, outline=colour, width=width)

    for (kind, title, match, matched), *left in zip(pairs, lefts[::2], lefts[1::2]):
        write(left[0], EDGE - 10, title, 60)
        for i, role in enumerate(("student", "teacher")):
            caption = f"crop {i + 1} ({role})" + ", flipped" * bool(boxes[i, 4])
            write(left[i], top - 75, caption, colour=FRAMES[i])
            picture.paste(TF.to_pil_image(crop(image, boxes[i], SIDE)), (left[i], top))
            outline((left[i] - 8, top - 8, left[i] + SIDE + 8, top + SIDE + 8), FRAMES[i], LINE)
            for k in (~matched[i]).nonzero().flatten().tolist():
                draw.rectangle(square(*centre(left[i], k)), fill=(10, 12, 16, 190))
        ends = [(centre(left[0], k), centre(left[1], int(match[k]))) for k in range(n * n)]
        faint = Image.new("L", picture.size)                        # a mask: lines that cross do not add up
        for k in matched[0].nonzero():
            ImageDraw.Draw(faint).line(ends[k], fill=60, width=3)
        picture.paste("white", mask=faint)
        for rank, (k, colour) in enumerate(chosen.items()):
            a, b = ends[k]
            shift = (rank % 3 - 1) * cell / 4                       # lines along one row stay apart
            line = a[0] + cell / 2, a[1] + shift, b[0] - cell / 2, b[1] + shift
            draw.line(line, fill=(0, 0, 0, 160), width=LINE + 6)
            draw.line(line, fill=colour, width=LINE)
            outline(square(*centre(left[1], int(index[0, k]))), colour, LINE // 2)
            outline(square(*a), colour, LINE)
            outline(square(*b), colour, LINE)
            lines.append((kind, [z / 2 for z in a], [z / 2 for z in b]))

    top += SIDE + 150
    zoom = min(SIDE / image.shape[1], 1.36 * SIDE / image.shape[2])
    whole = TF.to_pil_image(image).resize([round(zoom * side) or 1 for side in image.shape[:0:-1]], Image.BICUBIC)
    picture.paste(whole, (EDGE, top))
    write(EDGE, top - 75, "the image, its crops, and the places of the lines")
    local = [random_box(image, options.get("local_scale", LOCAL_SCALE)) for _ in range(options.get("local_views", 4))]
    for box, colour, width in [*((box, "#8ecbff", 4) for box in local), *zip(boxes, FRAMES, (LINE, LINE))]:
        y, x, dy, dx, _ = (zoom * box).tolist()
        outline((EDGE + x, top + y, EDGE + x + dx, top + y + dy), colour, width)
    for k, colour in chosen.items():
        column = n - 1 - k % n if boxes[0, 4] else k % n
        y, x = (zoom * (boxes[0, :2] + boxes[0, 2:4] * torch.tensor([k // n + 0.5, column + 0.5]) / n)).tolist()
        draw.ellipse(square(EDGE + x, top + y, 18), colour, "black", 4)
    room = (2 * SIDE + GAP - whole.width - 60) // 23                # characters in a line
    legend = "\n\n".join(textwrap.fill(text, room) for text in LEGEND[:2 + len(pairs)])
    write(EDGE + whole.width + 60, top, legend, 46)
    if backbone:
        write(lefts[2], top - 75, "patch features: the first three principal components as red, green and blue")
        points = features.flatten(0, 1) - features.mean((0, 1))                         # (2 * N, C)
        rgb = points @ torch.linalg.svd(points).Vh[:3].T                                # (2 * N, 3)
        low, high = rgb.quantile(torch.tensor([0.02, 0.98]), dim=0)                     # less is black, more is full
        rgb = ((rgb - low) / (high - low + 1e-9)).clamp(0, 1).view(2, n, n, 3)
        for left, colours in zip(lefts[2:], rgb.permute(0, 3, 1, 2)):
            picture.paste(TF.to_pil_image(colours).resize((SIDE, SIDE), Image.NEAREST), (left, top))
    return picture.reduce(2), lines


def save_picture(path, data, name=None, *network):
    """Write `show_matches` of the first image of --data, of its val/ where there is one. network: its arguments."""
    picture, _ = show_matches(read(load_images(data, "val"), 0), *network)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"--show-matches {path}: {error}") from None
    print(f"wrote {path}" + (f" (similarity by {name})" if name else " (--checkpoint FILE adds similarity matching)"))
    return 0


def compare_runs(runs):
    """Runs [(options, scores (columns,))] -> [(matching, scores (seeds, columns))] of runs that differ in their seed
    only, and {"geometric - none": differences (seeds, columns)} between runs that differ in their matching only.
    """
    groups, differences = {}, {}
    for options, scores in runs:
        same = {name: value for name, value in options.items() if name not in (*NOT_THE_METHOD, "matching")}
        by_matching = groups.setdefault(json.dumps(same), {})
        by_matching.setdefault(options["matching"], {})[options["seed"]] = np.array(scores)
    for by_matching in groups.values():
        for a, b in combinations([m for m in ("geometric", "similarity", "none") if m in by_matching], 2):
            for seed in by_matching[a].keys() & by_matching[b].keys():
                differences.setdefault(f"{a} - {b}", []).append(by_matching[a][seed] - by_matching[b][seed])
    equal = [(m, np.stack([*by_seed.values()])) for group in groups.values() for m, by_seed in group.items()]
    return equal, {pair: np.stack(rows) for pair, rows in differences.items()}


def evaluate(cfg):
    rank, world, device = start_processes(cfg)
    networks = [(path, *load_backbone(path, cfg.weights)) for path in cfg.checkpoint]       # all, before any work
    first, size, options = networks[0][1:] if networks else (None, 224, {"data": "shapes"})
    data = cfg.data or options.get("data")
    if not data:
        raise BadInput(f"--data is needed: {cfg.checkpoint[0]} does not say what it was trained on")
    if Path(data).name == "train" and not (Path(data) / "train").exists():
        data = str(Path(data).parent)
    if cfg.show_matches:
        return save_picture(cfg.show_matches, data, *(networks[0] if networks else ()))
    fraction = options.get("data_fraction", 1)
    if any(of.get("data_fraction", 1) != fraction for *_, of in networks):
        raise BadInput("--checkpoint: trained on different --data-fraction; evaluate them one by one")
    images, labels = labelled(data, fraction)
    labels = [torch.as_tensor(y, device=device) for y in labels]
    if cfg.untrained or data == "shapes":
        torch.manual_seed(options.get("seed", 0))
        untrained = Backbone(first.arch, size, first.patch_size).eval()
        networks += [("untrained", untrained, size, {}), ("raw pixels", untrained, size, {})]
    results = dict(data=data, train=len(images[0]), val=len(images[1]), weights=cfg.weights,
                   temperature=cfg.temperature)
    if rank == 0:
        part = f" ({fraction:g} of each class)" if fraction < 1 else ""
        print(f"{data}: {len(images[0])} train{part}, {len(images[1])} val, {len(labels[0].unique())} classes; "
              f"{cfg.weights} weights, temperature {cfg.temperature}; top-1 / top-5 %", flush=True)
    features = []                           # of all networks first: scoring takes the time of process 0 alone
    for name, backbone, size, _ in networks:
        backbone.to(device)
        network = torch.nn.Flatten() if name == "raw pixels" else lambda x: backbone(x)[0]
        features.append([extract(network, part, size, cfg, device, rank, world).cpu() for part in images])
        backbone.cpu()
    if rank:
        return 0

    indent = max(len(name) for name, *_ in networks) + 2
    for (name, backbone, size, options), (train, val) in zip(networks, features):
        args = train.to(device), labels[0], val.to(device), labels[1]
        found = {f"{k}-NN": top for k, top in knn(*args, cfg.k, cfg.temperature).items()}
        found |= {"linear": linear_probe(*args)} if cfg.linear else {}
        results[name] = dict(arch=backbone.arch, size=size, resize=round(size * 256 / 224)) | found
        print(f"{name:{indent}}{backbone.arch} {size} px (crop of {results[name]['resize']})  "
              + "  ".join(f"{method} {a:.1f} / {b:.1f}" for method, (a, b) in found.items()), flush=True)
        if cfg.matches and name != "raw pixels":
            backbone.to(device)
            shares = match_shares(backbone, images[1], size, options.get("global_scale", GLOBAL_SCALE), device)
            results[name]["matches"] = shares
            print(" " * indent + "most similar patch, %: " + ", ".join(f"{k} {v:.1f}" for k, v in shares.items()))

    runs = [(of, [results[path][column][0] for column in found]) for path, *_, of in networks if of]
    equal, differences = compare_runs(runs)
    for matching, scores in equal:
        if len(scores) > 1:
            cells = zip(found, scores.mean(0), scores.std(0, ddof=1))
            cells = (f"{column} {mean:.2f} ± {std:.2f}" for column, mean, std in cells)
            print(f"{f'{matching}, {len(scores)} seeds':{indent}}" + "  ".join(cells) + "  top-1, mean ± std")
    for pair, scores in differences.items():
        cells = dict(zip(found, np.stack([scores.mean(0), scores.min(0), scores.max(0)], 1).tolist()))
        results.setdefault("differences", {})[pair] = {"pairs": len(scores)} | cells
        cells = (f"{column} {mean:+.2f} ({low:+.2f} to {high:+.2f})" for column, (mean, low, high) in cells.items())
        print(f"{pair}, pairs of runs: {len(scores)}  " + "  ".join(cells) + "  top-1, mean (range)")
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def main(argv=None):
    return run_script("eval_knn.py", lambda: evaluate(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
