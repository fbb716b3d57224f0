# SPDX-License-Identifier: MIT
"""How good are frozen features? Weighted k-nearest neighbours and a linear probe on a backbone that gld.py trained.

    python eval_knn.py                                                # output/checkpoint.pt, on what it was trained on
    python eval_knn.py --checkpoint run/checkpoint.pt --data IMAGENET --linear        # IMAGENET/train and IMAGENET/val
    torchrun --nproc_per_node=8 eval_knn.py --checkpoint backbone.pt --data IMAGENET    # processes share the images

`--checkpoint` also takes a backbone.pt, a torchvision state dict of the same networks, and an official (or EsViT) Swin
checkpoint. Images: shorter side to 256/224 of the view size, centre crop, no augmentation. Features: the image-level
output, unit length. k-NN: the k most similar training images vote with weight exp(similarity / temperature).
"""
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from gld import (ARCHS, BadInput, Backbone, Parser, run_script, load_file, load_images, load_strictly,
                 normalise, start_processes)

EACH_RUNS_OWN = ("seed", "output", "resume", "workers", "device", "save_every")    # not alike in runs to average
CHUNK_BYTES = 2 ** 28                   # of similarities at a time, so that memory does not grow with the test set


def parse_arguments(argv=None):
    parser = Parser("eval_knn.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", nargs="+", default=["output/checkpoint.pt"], help="or backbone.pt, torchvision, official Swin")
    add("--data", help="folder or .tar with train/ and val/, shapes, cifar10 (default: what it was trained on)")
    add("--untrained", action="store_true", help="also score the first network before training, and raw pixels")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the neighbours' votes")
    add("--weights", choices=("teacher", "student"), default="teacher", help="which network of a checkpoint.pt")
    add("--linear", action="store_true", help="also train a linear classifier on the same features")
    add("--batch-size", type=int, default=128, help="images per process")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 10), help="processes that read images")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", metavar="FILE", help="write settings and figures there too")
    cfg = parser.parse_args(argv)
    if cfg.json and not os.access(Path(cfg.json).absolute().parent, os.W_OK):
        raise BadInput(f"--json {cfg.json}: cannot be written there")
    if min(cfg.k) < 1 or not cfg.temperature > 0 or cfg.batch_size < 1 or cfg.workers < 0:
        raise BadInput("--k and --batch-size must be at least 1, --temperature > 0, --workers not negative")
    return cfg


def load_backbone(path, weights="teacher"):
    """File -> (backbone, view size, options of the run or {}). Strict: keys that do not fit raise BadInput."""
    state = load_file(path, "--checkpoint")
    options = state.get("options", {}) if isinstance(state, dict) else {}
    if options:
        if options.get("arch") not in ARCHS or not isinstance(state.get(weights), dict):
            raise BadInput(f"--checkpoint {path}: no whole checkpoint of gld.py")
        backbone = Backbone(options["arch"], options["global_size"], options["patch_size"])
        state = {k.removeprefix("backbone."): v for k, v in state[weights].items() if k.startswith("backbone.")}
        load_strictly(backbone, state, f"--checkpoint {path}")
        return backbone, options["global_size"], options
    for key in (weights, "state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BadInput(f"--checkpoint {path}: holds no state dict of a network")
    state = plain_keys(state)
    arch, patch, size = guess_arch(state)
    if arch is None:
        raise BadInput(f"--checkpoint {path}: none of {', '.join(ARCHS)} has keys like {', '.join(list(state)[:3])}")
    backbone = Backbone(arch, size, patch)
    load_strictly(backbone.net, state, f"--checkpoint {path} as {arch}")
    return backbone, size, {}


def plain_keys(state):
    """Keys of a torchvision network without its classifier, from those of torchvision or of the official Swin."""
    state = {re.sub(r"^(module\.|backbone\.)+", "", key): value for key, value in state.items()}
    out = {}
    for key, value in state.items():
        if key.startswith(("head", "fc.")) or key.endswith("attn_mask"):
            continue
        key = key.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
        key = re.sub(r"^layers\.(\d+)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", key)
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", key)
        if key.startswith("features"):
            key = key.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        out[key] = value.flatten() if key.endswith("relative_position_index") else value
    return out


def guess_arch(state):
    """(arch, patch size, image size) of plain keys; (None, ...) if they are no network of gld.py."""
    if "conv_proj.weight" in state and "encoder.pos_embedding" in state:
        width, patch = state["conv_proj.weight"].shape[0], state["conv_proj.weight"].shape[-1]
        side = round((state["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
        return {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(width), patch, side * patch
    if "features.0.0.weight" in state:
        deep = any(key.startswith("features.5.17.") for key in state)
        return "swin_b" if len(state["features.0.0.weight"]) == 128 else "swin_s" if deep else "swin_t", 16, 224
    arch = "resnet50" if "layer4.2.conv3.weight" in state else "conv_tiny" if "12.weight" in state else None
    return arch, 16, 224 if arch == "resnet50" else 32


class CroppedImages(torch.utils.data.Dataset):
    """Image i of this process: (3, size, size) uint8, resized and cropped at the centre."""

    def __init__(self, images, size, rank, world):
        self.images, self.size, self.mine = images, size, range(rank, len(images), world)

    def __len__(self):
        return len(self.mine)

    def __getitem__(self, i):
        try:
            image = self.images.read(self.mine[i])
        except Exception as error:
            raise BadInput(f"--data: {self.images.name(self.mine[i])} cannot be read: {error}") from None
        image = TF.resize(image, [round(self.size * 256 / 224)], TF.InterpolationMode.BICUBIC, antialias=True)
        return TF.center_crop(image, [self.size, self.size])


@torch.no_grad()
def extract(network, images, size, cfg, device, rank, world):
    """Features (n, C) float16, unit length, of all images, on every process; `network`: (N, 3, H, W) -> (N, C)."""
    crops = CroppedImages(images, size, rank, world)
    loader = torch.utils.data.DataLoader(crops, cfg.batch_size, num_workers=cfg.workers)
    rows = [F.normalize(network(normalise(x.to(device).float() / 255)).float(), dim=1).half() for x in loader]
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
    for chunk, labels in zip(val.split(rows), val_labels.split(rows)):
        similarity, nearest = (chunk @ train.T).float().topk(min(max(ks), len(train)), dim=1)       # (rows, k)
        weight, voted = (similarity / temperature).exp(), train_labels[nearest]
        for k in ks:
            votes = torch.zeros(len(chunk), classes, device=train.device).scatter_add_(1, voted[:, :k], weight[:, :k])
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
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-3)
    steps = epochs * -(-len(train) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).to(train.device).split(batch):
            loss = F.cross_entropy(model((train[rows].float() - mean) / std), train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        scores = torch.cat([model((x.float() - mean) / std) for x in val.split(4096)])
    best = scores.topk(min(5, classes), dim=1)[1] == val_labels[:, None]
    return 100 * best[:, 0].float().mean().item(), 100 * best.any(1).float().mean().item()


def labelled(data, fraction):
    """Training and validation `Images` of --data, and the labels of both, numbered alike. Raises BadInput."""
    parts = [load_images(data, "train", fraction, must_split=True), load_images(data, "val", must_split=True)]
    if parts[0].classes is None:
        return parts, [images.labels for images in parts]
    names = np.union1d(parts[0].classes, parts[1].classes)      # val may lack some of the folders
    if len(names) < 2:
        raise BadInput(f"--data {data}: k-NN needs labels, that is class folders in train/ and val/")
    return parts, [np.searchsorted(names, images.classes)[images.labels] for images in parts]


def evaluate(cfg):
    rank, world, device = start_processes(cfg)
    loaded = [(path, *load_backbone(path, cfg.weights)) for path in cfg.checkpoint]         # all, before any work
    _, first, size, options = loaded[0]
    if len({of.get("data_fraction", 1) for *_, of in loaded}) > 1:
        raise BadInput("--checkpoint: trained on different --data-fraction; score them one by one")
    data = cfg.data or options.get("data")
    if not data:
        raise BadInput(f"--data is needed: {cfg.checkpoint[0]} does not say what it was trained on")
    if Path(data).name == "train" and not (Path(data) / "train").exists():
        data = str(Path(data).parent)
    images, labels = labelled(data, options.get("data_fraction", 1))
    labels = [torch.as_tensor(y, device=device) for y in labels]
    networks = [(path, size, backbone, lambda backbone, x: backbone(x)[0]) for path, backbone, size, _ in loaded]
    if cfg.untrained or data == "shapes":
        torch.manual_seed(options.get("seed", 0))
        untrained = Backbone(first.arch, size, first.patch_size)
        networks += [("untrained", size, untrained, lambda backbone, x: backbone(x)[0]),
                     ("raw pixels", size, untrained, lambda backbone, x: x.flatten(1))]
    results = dict(data=data, train=len(images[0]), val=len(images[1]), weights=cfg.weights,
                   temperature=cfg.temperature)
    if rank == 0:
        part = f" ({options['data_fraction']:g} of each class)" if options.get("data_fraction", 1) < 1 else ""
        print(f"{data}: {len(images[0])} train{part}, {len(images[1])} val; {cfg.weights} weights, temperature "
              f"{cfg.temperature}; top-1 / top-5 %")
    features = []                           # of all networks first: scoring takes the time of process 0 alone
    for _, size, backbone, network in networks:
        backbone.to(device).eval()
        features.append([extract(lambda x: network(backbone, x), part, size, cfg, device, rank, world).cpu()
                         for part in images])
        backbone.cpu()
    if rank:
        return 0
    width = max(len(name) for name, *_ in networks) + 2
    for (name, size, backbone, _), (train, val) in zip(networks, features):
        args = train.to(device), labels[0], val.to(device), labels[1]
        found = {f"{k}-NN": top for k, top in knn(*args, cfg.k, cfg.temperature).items()}
        found |= {"linear": linear_probe(*args)} if cfg.linear else {}
        results[name] = dict(arch=backbone.arch, size=size, resize=round(size * 256 / 224)) | found
        print(f"{name:{width}}{backbone.arch} {size} px (crop of {results[name]['resize']})  "
              + "  ".join(f"{method} {a:.1f} / {b:.1f}" for method, (a, b) in found.items()), flush=True)
    runs = {}                               # that differ in their seed only: mean and standard deviation
    for path, _, _, options in loaded:
        same = {name: value for name, value in options.items() if name not in EACH_RUNS_OWN}
        runs.setdefault(json.dumps(same), {})[path] = results[path]
    for same, members in runs.items():
        if len(members) > 1 and same != "{}":
            print(f"{json.loads(same)['matching'] + f', {len(members)} seeds':{width}}" + "  ".join(
                f"{key} {np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}" for key in found
                for top1 in [[member[key][0] for member in members.values()]]) + "  top-1, mean ± std")
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def main(argv=None):
    return run_script("eval_knn.py", lambda: evaluate(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
