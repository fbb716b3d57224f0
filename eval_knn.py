# SPDX-License-Identifier: MIT
"""How good are frozen features? k-NN, a linear probe, where similar patches lie, and a picture of the matches.

    python eval_knn.py                                                # output/checkpoint.pt, on its own data set
    python eval_knn.py --checkpoint run/checkpoint.pt --data IMAGENET --linear        # IMAGENET/train and IMAGENET/val
    python eval_knn.py --data PHOTO.jpg --show-matches matches.png    # which patches of two crops match

`--checkpoint` takes gld.py's files, torchvision's weights, an official GLSD or EsViT Swin, a DINO or timm ViT.
Images: shorter side to 256/224 of the crop size, center crop, no augmentation. Features: image-level, unit length.
"""
import json
import os
import re
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from gld import (OPTIONS, BadInput, Backbone, Parser, blame, decode, ignore_signals, load_file, load_images, normalise,
                 run_script, start_processes, stride_of)
from matching_kernels import geometric_matches, similarity_matches

CHUNK_BYTES = 2 ** 28                   # of similarities at a time, so that memory does not grow with the test set
GLOBAL_SCALE = 0.4, 1.0                 # of random crops, where no checkpoint tells the run's own
MATCH_COLUMNS = ("same position", "correspondence accuracy", "both", "neither", "geometry: same position")

def parse_arguments(argv=None):
    parser = Parser("eval_knn.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="FILE", help="(output/checkpoint.pt); other people's: see this file")
    add("--data", help="folder with train/ and val/, shapes, cifar10 (default: the checkpoint's data set)")
    add("--untrained", action="store_true", help="also evaluate random init and raw pixels (always for shapes)")
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
    if min(*cfg.k, cfg.batch_size) < 1 or not cfg.temperature > 0 or cfg.workers < 0:
        raise BadInput("--k and --batch-size must be at least 1, --temperature > 0, --workers >= 0")
    cfg.checkpoint = cfg.checkpoint or ([] if cfg.show_matches else ["output/checkpoint.pt"])  # a picture needs none
    return cfg

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
    renames, out = VIT_KEYS if "cls_token" in state else SWIN_KEYS, {}
    for key, value in state.items():
        for theirs, ours in renames.items():
            key = key.replace(theirs, ours)
        key = re.sub(r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
        if not re.match(r"\w*head|fc\.", key) and not key.endswith("attn_mask"):
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

def center_crops(images, size, indices):
    """Images -> (n, 3, size, size) uint8. If one is broken: the message (a str), as a worker cannot raise BadInput."""
    crops = []
    for i in indices:
        try:
            image = images.read(i)
        except Exception as error:          # decoders raise all kinds of errors for broken files
            return f"--data: {images.name(i)} cannot be read: {error}"
        image = TF.resize(image, [round(size * 256 / 224)], TF.InterpolationMode.BICUBIC, antialias=True)
        crops.append(TF.center_crop(image, [size, size]))
    return torch.stack(crops)

@torch.no_grad()
def extract(network, images, size, cfg, device, rank, world):
    """Features (n, C) float16, unit length, of all images, on every process; `network`: (M, 3, H, W) -> (M, C)."""
    mine = [(rank + world * i) % len(images) for i in range(-(-len(images) // world))]      # the last may be a repeat
    loader = torch.utils.data.DataLoader(mine, cfg.batch_size, num_workers=cfg.workers, worker_init_fn=ignore_signals,
                                         collate_fn=partial(center_crops, images, size))
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
    rows = max(1, CHUNK_BYTES // (4 * len(train)))
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

def linear_probe(train, train_labels, val, val_labels, epochs=100, batch=256):
    """(top-1, top-5) in percent of a linear classifier: AdamW, cosine schedule, standardised features, fixed seed."""
    classes = int(max(train_labels.max(), val_labels.max())) + 1
    mean, std = train.float().mean(0), train.float().std(0) + 1e-6
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(classes, train.shape[1], device=train.device, requires_grad=True)
    bias = torch.zeros(classes, device=train.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).to(train.device).split(batch):
            loss = F.cross_entropy(F.linear((train[rows].float() - mean) / std, weight, bias), train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores = torch.cat([F.linear((x.float() - mean) / std, weight, bias) for x in val.split(4096)])
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
        raise BadInput(f"--data {data}: train/ has no class for the images in {', '.join(unknown[:3])}; "
                       "name the folders of val/ as those of train/ (A is not a)")
    if len(train) < 2:
        raise BadInput(f"--data {data}: k-NN needs labels, that is class folders in train/ and val/")
    return parts, [parts[0].labels, np.searchsorted(parts[0].classes, parts[1].classes)[parts[1].labels]]

def top1_of_20nn(backbone, parts, labels, cfg, device, rank, world):
    """20-NN top-1 accuracy on val/ in percent, for gld.py while it trains; None on all processes but the first."""
    train, val = (extract(lambda x: backbone(x)[0], part, cfg.global_size, cfg, device, rank, world) for part in parts)
    vectors = [torch.as_tensor(x, device=device) for x in (train, labels[0], val, labels[1])]
    return None if rank else knn(*vectors, [20], 0.07)[20][0]

# ------------------------------------------------------------------------------------------------ matches of patches

def draw_crops(image, scale, n, seed):
    """Two random crops: boxes (2, 5), and which of their n x n = N patches match: index (2, N), weight (2, N)."""
    torch.manual_seed(seed)
    boxes = [[*RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)), torch.rand(()) < 0.5] for _ in range(2)]
    boxes = torch.tensor(boxes).float()     # (2, 5) top, left, height, width in pixels, flip 0 or 1
    return boxes, *geometric_matches(boxes, boxes.flip(0), (n, n), (n, n))

def cut_crops(image, boxes, size):
    """(2, 3, size, size) uint8: the crops, resized and flipped, without colour augmentation."""
    crops = [TF.resized_crop(image, *box[:4].int().tolist(), [size] * 2, TF.InterpolationMode.BICUBIC) for box in boxes]
    return torch.stack([TF.hflip(crop) if box[4] else crop for crop, box in zip(crops, boxes)])

@torch.no_grad()
def match_shares(backbone, images, size, scale, device):
    """Percent of the patches that geometry matches, in crops of 200 images, whose most similar patch lies at the same
    row and column, where geometry says, both, neither; and how often geometry itself says the same row and column."""
    n = size // stride_of(backbone.arch, backbone.patch_size)
    here, hits = torch.arange(n * n), []
    for i in np.linspace(0, len(images) - 1, min(200, len(images))).astype(int).tolist():
        image = images.read(i)
        boxes, (index, _), (weight, _) = draw_crops(image, scale, n, seed=i)
        crops = cut_crops(image, boxes, size).to(device)
        similar = similarity_matches(*backbone(normalise(crops.float() / 255))[1].cpu())
        same, right = similar == here, similar == index
        hits.append(torch.stack([same, right, same & right, ~(same | right), index == here])[:, weight > 0])
    return dict(zip(MATCH_COLUMNS, (100 * torch.cat(hits, 1).float().mean(1)).tolist()))

SIDE, LOWER, GAP, EDGE, LINE = 1080, 760, 130, 70, 8    # pixels, halved in the end; LOWER: height of the second row
COLOURS = [f"hsl({hue}, 90%, 62%)" for hue in (0, 30, 100, 155, 190, 225, 275, 320)]         # of the lines
FRAMES = {"student": "#ffffff", "teacher": "#ffd23f"}

@torch.no_grad()
def show_matches(image, backbone=None, size=224, scale=GLOBAL_SCALE):
    """Draw which patches of two crops of an image match: by geometry and, with a backbone, by similarity.

    Args: image (3, H, W) uint8; size of the backbone's crops, pixels; their scale (fractions of the image's area).
    Returns: the picture (PIL.Image) and its lines [(matching, (x, y), (x, y))]: the midpoints of the patches of crop 1
        (the student's) and crop 2 (the teacher's) that are joined, pixels of the picture.
    """
    n = size // stride_of(backbone.arch, backbone.patch_size) if backbone else 7
    seeds = (seed for seed in range(100) if 0.45 < draw_crops(image, scale, n, seed)[2].mean() < 0.7)
    boxes, index, weight = draw_crops(image, scale, n, next(seeds, 0))          # patches that match and masked ones
    pairs = [("geometric", "that shows the same place", index[0])]
    if backbone:
        features = backbone(normalise(cut_crops(image, boxes, size).float() / 255))[1]                  # (2, N, C)
        pairs.append(("similarity", "with the most similar features", similarity_matches(*features)))
    matched = weight[0].nonzero().flatten().tolist()
    colours = dict(zip(matched[::-(-len(matched) // len(COLOURS)) or 1], COLOURS))

    cell, top = SIDE // n, EDGE + 180
    side, below = n * cell, top + SIDE + 150
    picture = Image.new("RGB", (2 * EDGE - GAP + 2 * len(pairs) * (side + GAP), below + LOWER + EDGE), "#15181d")
    draw, lines = ImageDraw.Draw(picture, "RGBA"), []
    draw.font = ImageFont.load_default(50)

    def square(left, k):                    # the corners of patch k of the crop drawn at `left`
        x, y = left + k % n * cell, top + k // n * cell
        return x, y, x + cell - 1, y + cell - 1

    for panel, (kind, which, match) in enumerate(pairs):
        lefts = [EDGE + (2 * panel + i) * (side + GAP) for i in range(2)]
        draw.text((lefts[0], EDGE - 10), f"{kind.title()} matching: predict the teacher's output for the patch {which}")
        for i, (left, (role, colour), crop) in enumerate(zip(lefts, FRAMES.items(), cut_crops(image, boxes, side))):
            draw.text((left, top - 80), f"the {role}'s crop" + ", flipped" * bool(boxes[i, 4]), colour)
            picture.paste(ImageOps.expand(TF.to_pil_image(crop), LINE, colour), (left - LINE, top - LINE))
            for k in (weight[i] == 0).nonzero().flatten().tolist() if kind == "geometric" else ():
                draw.rectangle(square(left, k), fill=(10, 12, 16, 190))
        for k in sorted(matched, key=lambda k: k in colours):       # the coloured lines last, over the faint ones
            a, b = square(lefts[0], k), square(lefts[1], match[k].item())
            shift = (k % n + 0.5) * cell / n                        # lines along one row stay apart
            colour, width = (colours[k], LINE) if k in colours else ((255, 255, 255, 70), 3)
            draw.line((a[2], a[1] + shift, b[0], b[1] + shift), colour, width)
            if k in colours:
                draw.rectangle(a, outline=colour, width=LINE)
                draw.rectangle(b, outline=colour, width=LINE)
                lines.append((kind, *(((x1 + x2) / 4, (y1 + y2) / 4) for x1, y1, x2, y2 in (a, b))))

    whole = ImageOps.contain(TF.to_pil_image(image), (2 * side, LOWER))
    left, zoom = EDGE + (2 * side + GAP - whole.width) // 2, whole.height / image.shape[1]
    picture.paste(whole, (left, below))
    draw.text((left, below - 80), "the image and its two crops; what only one shows is masked")
    for box, colour in zip(boxes, FRAMES.values()):
        y, x, height, width, _ = (zoom * box).tolist()
        draw.rectangle((left + x, below + y, left + x + width, below + y + height), outline=colour, width=LINE)
    if backbone:
        draw.text((lefts[0], below - 80), "first three principal components of the patch features as red, green, blue")
        rgb = torch.pca_lowrank(features.flatten(0, 1), 3)[0]                                           # (2 * N, 3)
        rgb = (rgb - rgb.amin(0)) / (rgb.amax(0) - rgb.amin(0) + 1e-9)
        for left, pixels in zip(lefts, rgb.view(2, n, n, 3).permute(0, 3, 1, 2)):
            picture.paste(TF.to_pil_image(pixels).resize((LOWER, LOWER), Image.NEAREST), (left, below))
    return picture.reduce(2), lines

def save_picture(path, data, name, backbone, size, options):
    """Write `show_matches` of --data if it is an image, else of its first image, of val/ where there is one."""
    images = None if Path(data).is_file() else load_images(data, "val")         # raises BadInput itself
    with blame(f"--data {data}: cannot be read"):
        image = images.read(0) if images else decode(data)
    with blame(f"--show-matches {path}"):
        show_matches(image, backbone, size, options.get("global_scale", GLOBAL_SCALE))[0].save(path)
    print(f"wrote {path} " + (f"(similarity by {name})" if name else "(--checkpoint FILE adds similarity matching)"))
    return 0

def compare_runs(runs):
    """Runs [(options, scores (methods,))] -> [(label, scores (seeds, methods))]: first of the runs that differ in their
    seed only; then, seed by seed, the differences between runs that differ in their matching only."""
    groups, differences = {}, {}
    may_differ = {option.name for option in OPTIONS if option.resumable} | {"seed", "matching"}
    for options, scores in runs:
        same = {name: value for name, value in options.items() if name not in may_differ}
        groups.setdefault((json.dumps(same), options["matching"]), {})[options["seed"]] = np.array(scores)
    for (settings, a), (others, b) in combinations(sorted(groups), 2):
        for seed in groups[settings, a].keys() & groups[others, b].keys() if settings == others else ():
            differences.setdefault(f"{a} - {b}", []).append(groups[settings, a][seed] - groups[others, b][seed])
    equal = [(matching, [*by_seed.values()]) for (_, matching), by_seed in groups.items()]
    return [(label, np.stack(rows)) for label, rows in (*equal, *differences.items()) if len(rows) > 1]

def evaluate(cfg):
    rank, world, device = start_processes(cfg)
    networks = [(path, *load_backbone(path, cfg.weights)) for path in cfg.checkpoint]       # all, before any work
    name, first, first_size, first_options = networks[0] if networks else ("", None, 224, {"data": "shapes"})
    data = cfg.data or first_options.get("data")
    if not data:
        raise BadInput(f"--data is needed: {name} does not say what it was trained on")
    if Path(data).name == "train" and not (Path(data) / "train").exists():
        data = str(Path(data).parent)
    if cfg.show_matches:
        return save_picture(cfg.show_matches, data, name, first, first_size, first_options)
    fractions = {options.get("data_fraction", 1) for *_, options in networks}
    if len(fractions) > 1:
        raise BadInput("--checkpoint: trained on different --data-fraction; evaluate them one by one")
    parts, labels = labelled(data, *fractions)
    if cfg.untrained or data == "shapes":
        torch.manual_seed(first_options.get("seed", 0))
        untrained = Backbone(first.arch, first_size, first.patch_size).eval()
        networks += [("untrained", untrained, first_size, {}), ("raw pixels", untrained, first_size, {})]
    results = dict(data=data, train=len(parts[0]), val=len(parts[1]), weights=cfg.weights, temperature=cfg.temperature)
    if rank == 0:
        print(", ".join(f"{key} {value}" for key, value in results.items()) + "; top-1 / top-5 %", flush=True)
    features = []                           # of all networks first: scoring takes the time of process 0 alone
    for name, backbone, size, _ in networks:
        backbone.to(device)
        network = torch.nn.Flatten() if name == "raw pixels" else lambda x: backbone(x)[0]
        features.append([extract(network, part, size, cfg, device, rank, world).cpu() for part in parts])
    if rank:
        return 0
    indent = max(len(name) for name, *_ in networks) + 2
    for (name, backbone, size, options), (train, val) in zip(networks, features):
        vectors = [torch.as_tensor(x, device=device) for x in (train, labels[0], val, labels[1])]
        scores = {f"{k}-NN": score for k, score in knn(*vectors, cfg.k, cfg.temperature).items()}
        scores |= {"linear": linear_probe(*vectors)} if cfg.linear else {}
        results[name] = dict(arch=backbone.arch, size=size, resize=round(size * 256 / 224)) | scores
        print(f"{name:{indent}}{backbone.arch} {size} px (crop of {results[name]['resize']})  "
              + "  ".join(f"{method} {top1:.1f} / {top5:.1f}" for method, (top1, top5) in scores.items()), flush=True)
        if cfg.matches and name != "raw pixels":
            shares = match_shares(backbone, parts[1], size, options.get("global_scale", GLOBAL_SCALE), device)
            results[name]["matches"] = shares
            print(" " * indent + "most similar patch, %: " + ", ".join(f"{k} {v:.1f}" for k, v in shares.items()))
    runs = [(options, [results[name][method][0] for method in scores]) for name, *_, options in networks if options]
    for label, top1 in compare_runs(runs):
        columns = zip(scores, top1.mean(0), top1.std(0, ddof=1), top1.min(0), top1.max(0))
        cells = ("{} {:.2f} ± {:.2f} ({:.2f} to {:.2f})".format(*column) for column in columns)
        print(f"{label}, {len(top1)} seeds  " + "  ".join(cells) + "  top-1, mean ± std (range)")
    if cfg.json:
        with blame(f"--json {cfg.json}"):
            Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0

def main(argv=None):
    return run_script("eval_knn.py", lambda: evaluate(parse_arguments(argv)))

if __name__ == "__main__":
    sys.exit(main())
