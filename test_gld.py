# SPDX-License-Identifier: MIT
"""Every test: python -m pytest -q. No GPU and no network are needed; golden files are used where present."""

import argparse
import contextlib
import functools
import glob
import io
import json
import math
import os
import pickle
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():  # before Triton is imported: the kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
import torchvision
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as TF

import eval_knn
import gld
import matching_kernels
from matching_kernels import geometric_matches, head_cross_entropy, local_cross_entropy, similarity_matches

HERE = Path(__file__).resolve().parent
with warnings.catch_warnings():  # the mark is registered nowhere, as there is no file for settings
    warnings.simplefilter("ignore")
    bench = pytest.mark.bench
GOLDEN = Path(os.environ.get("GLD_GOLDEN", HERE.parent / "shared" / "golden"))
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
torch.set_num_threads(2)
gld.draw_shapes = functools.cache(gld.draw_shapes)  # drawn once for all tests


def run(command, cwd, processes=1):
    """Run a script as a user does: returncode, stdout, stderr. A single process runs in this one, to save its start."""
    words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    words += [] if "--device" in words else ["--device", "cpu"]  # bits and two processes are tested there
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.run(
            [*launcher, HERE / words[0], *words[1:]], cwd=cwd, text=True, capture_output=True, timeout=600
        )
    out, err, before, handlers = io.StringIO(), io.StringIO(), os.getcwd(), {n: signal.getsignal(n) for n in (2, 15)}
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = {"gld.py": gld, "eval_knn.py": eval_knn}[words[0]].main(words[1:])
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return argparse.Namespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def launch(words, cwd, processes=1, restarts=0, **how):
    """Start a script for good, as processes of its own that can be killed; its output and errors in one stream."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher += [f"--max-restarts={restarts}"]
    words = [str(word) for word in (words.split() if isinstance(words, str) else words)] + ["--device", "cpu"]
    command = [sys.executable, "-u", *(launcher if processes > 1 else []), HERE / words[0], *words[1:]]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) | how
    return subprocess.Popen(command, cwd=cwd, **how)


def wait_for(process, words):
    """Read the output of a process until it says `words`; returns what it said. It is killed if it does not."""
    said, patience = "", threading.Timer(200, process.kill)
    patience.start()
    while words not in said:
        line = process.stdout.readline()
        assert line, f"ended without {words!r}:\n{said}"
        said += line
    patience.cancel()
    return said


def children(pid):
    """Process ids of the children of a process, the oldest first."""
    found = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
    parents = {int(p): re.search(r"\) \S (\d+)", text) for p in found if (text := read_or_nothing(f"/proc/{p}/stat"))}
    return sorted(child for child, parent in parents.items() if int(parent[1]) == pid)


def read_or_nothing(path):
    with contextlib.suppress(OSError):
        return Path(path).read_text()


def config(*arguments):
    return gld.parse_arguments(["--workers", "0", *map(str, arguments)])


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True, map_location="cpu")


def random_boxes(*shape, size=500, seed=0):
    """Boxes with fractional sides, so that no centre lies exactly on a border; about half of them flipped."""
    g = torch.Generator().manual_seed(seed)
    top, left, height, width = (torch.rand(*shape, generator=g) * size + low for low in (0, 0, 20, 20))
    return torch.stack([top, left, height, width, (torch.rand(*shape, generator=g) < 0.5).float()], -1)


def centres(box, grid):
    """Brute force: (rows * cols, 2) y and x of every patch centre, float64, one box at a time."""
    top, left, height, width, flip = box.double().tolist()
    out = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            shown = grid[1] - 1 - c if flip else c
            out.append((top + (r + 0.5) * height / grid[0], left + (shown + 0.5) * width / grid[1]))
    return torch.tensor(out, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    "s_grid,t_grid",
    [
        ((7, 7), (7, 7)),
        ((3, 3), (7, 7)),
        ((1, 1), (7, 7)),
        ((3, 3), (1, 1)),
        ((2, 5), (4, 3)),
        ((6, 2), (1, 9)),
        ((1, 1), (1, 1)),
    ],
)
def test_geometric_match_equals_brute_force(s_grid, t_grid):
    student, teacher = random_boxes(60, seed=1), random_boxes(60, seed=2)
    index, weight = geometric_matches(student, teacher, s_grid, t_grid)
    _, ones = geometric_matches(student, teacher, s_grid, t_grid, hinge=False)
    assert index.dtype == torch.int64 and weight.dtype == torch.float32 and (ones == 1).all()
    halfdiag2 = [
        (b[:, 2].double() / g[0] / 2) ** 2 + (b[:, 3].double() / g[1] / 2) ** 2
        for b, g in ((student, s_grid), (teacher, t_grid))
    ]
    limit = torch.maximum(*halfdiag2)
    for i in range(60):
        dist2 = torch.cdist(centres(student[i], s_grid), centres(teacher[i], t_grid)).square()
        nearest, argmin = dist2.min(1)
        chosen = dist2.gather(1, index[i][:, None])[:, 0]
        torch.testing.assert_close(chosen, nearest, rtol=1e-6, atol=1e-6)
        clear = dist2.topk(min(2, dist2.shape[1]), largest=False)[0]
        clear = clear[:, -1] - clear[:, 0] > 1e-6 if dist2.shape[1] > 1 else torch.ones(len(dist2), dtype=bool)
        assert (index[i] == argmin)[clear].all()
        assert ((nearest < limit[i]) == (weight[i] > 0))[(nearest - limit[i]).abs() > 1e-6].all()
    if t_grid == (7, 7) and s_grid != (1, 1):
        assert 0 < weight.mean() < 1


def test_ties_go_to_the_lower_and_right_cell_and_broadcasting_adds_nothing():
    box = torch.tensor([10.0, 20, 60, 60, 0])
    assert geometric_matches(box, box, (1, 1), (2, 2))[0].tolist() == [3]
    for size in range(1, 600, 7):  # thirds, sevenths: an exact tie stays one in floating point
        box = torch.tensor([5.0, 3, size, size, 0])
        assert geometric_matches(box, box, (3, 3), (6, 6))[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    student, teacher = random_boxes(3, 1, 4), random_boxes(1, 2, 4, seed=3)
    index, weight = geometric_matches(student, teacher, (2, 3), (3, 2))
    assert index.shape == weight.shape == (3, 2, 4, 6)
    one, one_weight = geometric_matches(student[2, 0, 1], teacher[0, 1, 1], (2, 3), (3, 2))
    assert torch.equal(index[2, 1, 1], one) and torch.equal(weight[2, 1, 1], one_weight)


def test_flipping_a_view_mirrors_its_matches():
    student, teacher = random_boxes(50, seed=4), random_boxes(50, seed=5)
    student[:, 4] = teacher[:, 4] = 0
    mirrored_s, mirrored_t = student.clone(), teacher.clone()
    mirrored_s[:, 4] = mirrored_t[:, 4] = 1
    index, weight = (x.view(50, 3, 4) for x in geometric_matches(student, teacher, (3, 4), (5, 6)))
    flipped, flipped_weight = (x.view(50, 3, 4) for x in geometric_matches(mirrored_s, teacher, (3, 4), (5, 6)))
    assert torch.equal(flipped.flip(-1), index) and torch.equal(flipped_weight.flip(-1), weight)
    other = geometric_matches(student, mirrored_t, (3, 4), (5, 6))[0].view(50, 3, 4)
    assert torch.equal(other // 6, index // 6) and torch.equal(5 - other % 6, index % 6)


def test_similarity_match_is_the_argmax_of_the_cosine():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(3, 1, 2, 5, 8, generator=g), torch.randn(1, 2, 2, 7, 8, generator=g)
    index = similarity_matches(s, 10 * t * torch.rand(7, 1, generator=g))
    assert index.shape == (3, 2, 2, 5)
    for v, q, b, n in np.ndindex(3, 2, 2, 5):
        cosine = F.cosine_similarity(s[v, 0, b, n][None], t[0, q, b], dim=1)
        assert index[v, q, b, n] == cosine.argmax()
    with pytest.raises(ValueError, match=r"\(5, 8\).*\(7, 9\)"):
        similarity_matches(torch.zeros(5, 8), torch.zeros(7, 9))


# ------------------------------------------------------------------------------------------------ the loss


def oracle(
    s,
    t,
    center,
    student_boxes=None,
    teacher_boxes=None,
    student_grid=None,
    teacher_grid=None,
    hinge=True,
    index=None,
    skip_same_view=False,
    student_temp=0.1,
    teacher_temp=0.04,
):
    """The definition of the loss in float64, one patch at a time."""
    s, t, center = s.double(), t.detach().double(), center.double()
    (V, B, Ns, _), Q = s.shape, len(t)
    loss = 0
    for v, q, b in np.ndindex(V, Q, B):
        if skip_same_view and v == q:
            continue
        if student_boxes is not None:
            dist2 = (
                torch.cdist(centres(student_boxes[v, b], student_grid), centres(teacher_boxes[q, b], teacher_grid)) ** 2
            )
            near, match = dist2.min(1)
            sides = [
                (box[2:4].double() / torch.tensor(grid, device=box.device) / 2).square().sum()
                for box, grid in ((student_boxes[v, b], student_grid), (teacher_boxes[q, b], teacher_grid))
            ]
            weight = (near < max(sides)) | (not hinge)
        else:
            match = index[v, q, b] if index is not None else torch.zeros(Ns, dtype=torch.int64)
            weight = torch.ones(Ns)
        p = torch.softmax((t[q, b][match] - center) / teacher_temp, -1)
        log_p = torch.log_softmax(s[v, b] / student_temp, -1)
        loss = loss - (weight * (p * log_p).sum(-1)).sum() / (B * Ns)
    return loss


def case(V=3, Q=2, B=2, s_grid=(3, 3), t_grid=(4, 2), K=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    Ns, Nt = math.prod(s_grid), math.prod(t_grid)
    return (
        torch.randn(V, B, Ns, K, generator=g) / 2,
        torch.randn(Q, B, Nt, K, generator=g) / 4,
        torch.randn(K, generator=g) / 4,
    ), dict(
        student_boxes=random_boxes(V, B, seed=seed + 1, size=60),
        teacher_boxes=random_boxes(Q, B, seed=seed + 2, size=60),
        student_grid=s_grid,
        teacher_grid=t_grid,
    )


@pytest.mark.parametrize("hinge,skip", [(True, False), (True, True), (False, True)])
def test_loss_and_gradient_equal_the_definition(hinge, skip):
    (s, t, c), boxes = case()
    for how in (boxes | dict(hinge=hinge), dict(index=torch.randint(0, 8, (3, 2, 2, 9)))):
        a, b = s.clone().requires_grad_(), s.double().requires_grad_()
        loss = local_cross_entropy(a, t, c, skip_same_view=skip, **TEMPS, **how)
        truth = oracle(b, t, c, skip_same_view=skip, **TEMPS, **how)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(3 * loss, a)[0].double(), torch.autograd.grad(3 * truth, b)[0], rtol=1e-4, atol=1e-7
        )
        with torch.no_grad():
            assert torch.equal(local_cross_entropy(s, t, c, skip_same_view=skip, **TEMPS, **how), loss)


def test_image_level_loss_needs_no_matches():
    (s, t, c), _ = case(s_grid=(1, 1), t_grid=(1, 1))
    whole = local_cross_entropy(s, t, c, skip_same_view=True, **TEMPS)
    torch.testing.assert_close(whole.double(), oracle(s, t, c, skip_same_view=True), rtol=1e-5, atol=0)


def test_loss_edge_cases():
    (s, t, c), boxes = case()
    far = boxes | dict(teacher_boxes=boxes["teacher_boxes"] + torch.tensor([1e4, 1e4, 0, 0, 0]))
    s.requires_grad_()
    nothing = local_cross_entropy(s, t, c, **TEMPS, **far)
    assert nothing == 0 and (torch.autograd.grad(nothing, s)[0] == 0).all()
    none = local_cross_entropy(s[:, :0], t[:, :0], c, index=torch.zeros(3, 2, 0, 9, dtype=torch.int64), **TEMPS)
    assert none == 0
    # a prototype that both leave out with -inf adds nothing; a NaN stays a NaN
    masked_s, masked_t = s.detach().clone(), t.clone()
    masked_s[..., 5] = masked_t[..., 5] = -math.inf
    masked_s.requires_grad_()
    loss = local_cross_entropy(masked_s, masked_t, c, **TEMPS, **boxes)
    keep = torch.arange(37) != 5
    torch.testing.assert_close(loss, local_cross_entropy(s[..., keep], t[..., keep], c[keep], **TEMPS, **boxes))
    assert torch.autograd.grad(loss, masked_s)[0].isfinite().all()
    for bad in (s, t):
        broken = bad.detach().clone()
        broken[0, 0, :, 3] = math.nan
        args = (broken, t, c) if bad is s else (s, broken, c)
        assert local_cross_entropy(*args, **TEMPS, **boxes | dict(hinge=False)).isnan()


def test_loss_dtypes_gradient_flow_and_repeated_backward():
    (s, t, c), boxes = case()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        leaf = s.to(dtype).requires_grad_()
        loss = local_cross_entropy(leaf, t.to(dtype), c, **TEMPS, **boxes)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.autograd.grad(loss, leaf)[0].dtype == dtype
        torch.testing.assert_close(loss.double(), oracle(leaf, t.to(dtype), c, **boxes), rtol=1e-5, atol=0)
    leaves = [x.clone().requires_grad_() for x in (s, t, c)]
    before = [x.detach().clone() for x in leaves]
    loss = local_cross_entropy(*leaves, **TEMPS, **boxes)
    first, *none = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    assert none == [None, None]
    assert torch.equal(torch.autograd.grad(loss, leaves[0])[0], first)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before))


def test_loss_holds_one_gathered_target_at_a_time():
    """What autograd keeps for the backward pass must not grow by (B, Ns, K) for every pair."""
    kept = []
    (s, t, c), _ = case(V=2, Q=1, t_grid=(1, 1), s_grid=(8, 8))
    for Q in (1, 6):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.__setitem__(x.untyped_storage().data_ptr(), x.numel()) or x, lambda x: x
        ):
            local_cross_entropy(
                s.clone().requires_grad_(),
                t.expand(Q, -1, -1, -1),
                c,
                **TEMPS,
                index=torch.zeros(2, Q, 2, 64, dtype=torch.int64),
            )
        kept.append(sum(saved.values()))
    assert kept[1] - kept[0] < s[0].numel(), kept


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(teacher=torch.zeros(2, 2, 8, 36)), "differ in B or K.*36"),
        (dict(teacher=torch.zeros(2, 3, 8, 37)), "differ in B"),
        (dict(student=torch.zeros(2, 9, 37)), r"\(V, B, Ns, K\).*\(2, 9, 37\)"),
        (dict(center=torch.zeros(36)), "center.*36"),
        (dict(student_boxes=torch.zeros(3, 2, 4)), r"student_boxes must be \(3, 2, 5\).*\(3, 2, 4\)"),
        (dict(student_grid=(3, 4)), "student_grid"),
        (dict(student_grid=(-3, -3)), "student_grid"),
        (dict(teacher=torch.zeros(0, 2, 8, 37)), "Q or K is 0"),
        (dict(teacher_grid=(9, 1)), "teacher_grid"),
        (dict(teacher_grid=None), "all or none"),
        (dict(index=torch.zeros(3, 2, 2, 9, dtype=torch.int64)), "index"),
        (dict(student_temp=0), "student_temp 0"),
        (dict(student=torch.zeros(3, 2, 9, 37, dtype=torch.int64)), "floating"),
        (dict(impl="fast"), "fast"),
    ],
)
def test_loss_refuses_what_does_not_fit(change, words):
    (s, t, c), boxes = case()
    arguments = dict(student=s, teacher=t, center=c, **boxes, **TEMPS) | change
    with pytest.raises(ValueError, match=words):
        local_cross_entropy(arguments.pop("student"), arguments.pop("teacher"), arguments.pop("center"), **arguments)
    with pytest.raises(ValueError, match="which patches match"):
        local_cross_entropy(s, t, c, **TEMPS)
    with pytest.raises(ValueError, match="index must be"):
        local_cross_entropy(s, t, c, index=torch.zeros(3, 2, 9, dtype=torch.int64), **TEMPS)
    with pytest.raises(ValueError, match="integers"):
        local_cross_entropy(s, t, c, index=torch.zeros(3, 2, 2, 9), **TEMPS)


def golden(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"no golden file {path}")
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) if file[k].dtype.kind in "fib" else str(file[k]) for k in file.files}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["distance_hinge.npz", "distance_nohinge.npz", "similarity.npz"])
def test_golden_outputs_of_the_official_loss(name, impl):
    """The whole loss of gld.py: head weights that are the identity turn its bottlenecks into the golden logits."""
    if impl == "triton" and DEVICE == "cuda":
        pytest.skip("in float32 in the interpreter; heads are float16 on a GPU")
    g = golden(name)
    boxes = torch.cat([g["boxes"].float(), g["flips"][..., None].float()], -1)
    (V, B), K, grids = boxes.shape[:2], g["student_patch"].shape[1], g["grids"].tolist()
    s_patch, s_cls = (g[k].clone().requires_grad_() for k in ("student_patch", "student_cls"))
    views = [(len(list(same)), side) for side, same in groupby(grids)]

    def split(x):
        parts = x.split([v * B * side**2 for v, side in views])
        return [part.view(v, B, side**2, -1) for part, (v, side) in zip(parts, views)]

    eye = torch.eye(K)
    student = gld.Outputs(s_cls.view(V, B, 1, K), split(s_patch), split(g["student_feat"]), eye, eye)
    teacher = gld.Outputs(
        *(
            g[k].view(2, B, -1, g[k].shape[1]) if k == "teacher_cls" else [g[k].view(2, B, grids[0] ** 2, -1)]
            for k in ("teacher_cls", "teacher_patch", "teacher_feat")
        ),
        eye,
        eye,
    )
    centers = torch.cat([g["center_cls"], g["center_patch"]])
    assert math.isclose(g["student_temp"], gld.STUDENT_TEMP, rel_tol=1e-6)
    whole, local = gld.distillation_loss(
        student,
        teacher,
        centers,
        boxes,
        [(side, side) for _, side in views],
        teacher_temp=float(g["teacher_temp"]),
        matching={"distance": "geometric"}.get(g["matching"], g["matching"]),
        hinge=bool(g["hinge"]),
        impl=impl,
    )
    for term, leaf, value, grad in (
        (whole, s_cls, "loss_view", "grad_student_cls"),
        (local, s_patch, "loss_region", "grad_student_patch"),
    ):
        assert abs(term.item() / g[value].item() - 1) < 1e-5
        found = torch.autograd.grad(term, leaf)[0]
        assert (found - g[grad]).norm() < 1e-4 * g[grad].norm() and (found - g[grad]).abs().max() < 1e-4 * g[
            grad
        ].abs().max()
    centers.lerp_(gld.mean_logits(teacher, gld.teacher_means(teacher)), 1 - gld.CENTER_MOMENTUM)
    torch.testing.assert_close(centers, torch.cat([g["new_center_cls"], g["new_center_patch"]]), rtol=1e-4, atol=1e-6)


def test_without_matching_the_loss_is_dinos():
    (s, t, c), _ = case(V=4, s_grid=(1, 1), t_grid=(1, 1))
    eye = torch.eye(37)
    whole, local = gld.distillation_loss(
        gld.Outputs(s, [], [], eye, None),
        gld.Outputs(t, [], [], eye, None),
        c[None],
        None,
        [],
        teacher_temp=0.04,
        matching="none",
    )
    assert local == 0
    pairs = [(q, v) for q in range(2) for v in range(4) if q != v]
    mean = sum(
        -(torch.softmax((t[q, :, 0] - c) / 0.04, -1) * torch.log_softmax(s[v, :, 0] / 0.1, -1)).sum(-1).mean()
        for q, v in pairs
    ) / len(pairs)
    torch.testing.assert_close(whole, mean)


# ------------------------------------------------------------------------------------------------ Triton kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(matching_kernels.triton is None, reason="no Triton here")
HALF = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def small_case(**change):
    """(s, t, c), boxes: few rows, since the interpreter takes some 20 ms for each."""
    (s, t, c), boxes = case(**dict(V=2, B=1, s_grid=(2, 2), t_grid=(2, 2)) | change)
    return [x.to(DEVICE) for x in (s, t, c)], {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in boxes.items()}


def check_triton(s, t, c, how, upstream=1.0, skip=False):
    """Errors of Triton's loss and gradient against float64: plain torch's and a rounding are allowed, no more."""
    exact = s.detach().double().requires_grad_()
    cpu = {k: v.cpu() if torch.is_tensor(v) else v for k, v in how.items()}
    truth = oracle(exact.cpu(), t.cpu(), c.cpu(), skip_same_view=skip, **cpu)
    truth_grad = torch.autograd.grad(truth, exact)[0] * upstream if truth.requires_grad else torch.zeros_like(exact)
    errors = {}
    for impl in ("torch", "triton"):
        leaf = s.detach().clone().requires_grad_()
        loss = local_cross_entropy(leaf, t, c, skip_same_view=skip, impl=impl, **TEMPS, **how)
        grad = torch.autograd.grad(loss, leaf, torch.tensor(float(upstream), device=loss.device))[0]
        assert grad.dtype == s.dtype and grad.shape == s.shape and loss.dtype == torch.float32
        errors[impl] = abs(loss.item() - truth.item()), (grad.double() - truth_grad).abs().max().item()
    print({"loss and worst gradient error": errors, "loss": truth.item(), "gradient": truth_grad.abs().max().item()})
    rounding = 2e-6 if t.dtype == torch.float32 else 5e-4  # half: probabilities are stored to 2^-11
    for (mine, theirs), size in zip(
        zip(errors["triton"], errors["torch"]), (truth.abs().item(), truth_grad.abs().max().item())
    ):
        assert mine <= 1.1 * theirs + rounding * size, errors


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("K", [1, 7, 127, 1000, 4097] + [65536, 65537] * (DEVICE == "cuda"))
def test_triton_error_is_no_worse_than_torchs(K, dtype):
    (s, t, c), boxes = small_case(K=K, seed=K)
    check_triton(s.to(dtype), t.to(dtype), c, boxes, upstream=2.0, skip=True)


@needs_triton
@pytest.mark.parametrize(
    "s_grid,t_grid,V,Q",
    [
        ((1, 1), (7, 7), 3, 2),
        ((3, 3), (1, 1), 1, 2),
        ((2, 5), (3, 4), 2, 1),
        ((7, 7), (2, 5), 1, 1),
        ((1, 1), (1, 1), 2, 5),
    ],
)
def test_triton_grids_flips_and_numbers_of_views(s_grid, t_grid, V, Q):
    (s, t, c), boxes = small_case(V=V, Q=Q, s_grid=s_grid, t_grid=t_grid, seed=3, K=19)
    check_triton(s, t, c, boxes, skip=V > 1)
    boxes["student_boxes"], boxes["teacher_boxes"] = (
        boxes[k].round() for k in ("student_boxes", "teacher_boxes")
    )  # ties
    index, weight = geometric_matches(boxes["student_boxes"][:, None], boxes["teacher_boxes"][None], s_grid, t_grid)
    loss = local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes)
    torch.testing.assert_close(loss, local_cross_entropy(s, t, c, impl="torch", **TEMPS, **boxes), rtol=1e-5, atol=1e-6)


@needs_triton
def test_triton_matches_by_index_one_patch_everything_and_nothing():
    (s, t, c), boxes = small_case(seed=5)
    index = torch.tensor([3, 0, 2, 2], device=DEVICE).expand(2, 2, 1, 4)
    check_triton(s, t, c, dict(index=index), skip=True)
    check_triton(s, t, c, dict(index=index.int()))
    check_triton(s, t, c, boxes | dict(hinge=False))
    far = boxes | dict(teacher_boxes=boxes["teacher_boxes"] + torch.tensor([1e4, 1e4, 0, 0, 0], device=DEVICE))
    leaf = s.clone().requires_grad_()
    loss = local_cross_entropy(leaf, t, c, impl="triton", **TEMPS, **far)
    assert loss == 0 and (torch.autograd.grad(loss, leaf)[0] == 0).all()
    check_triton(s[:, :, :1], t[:, :, :1], c, {}, skip=True)


@needs_triton
def test_triton_upstream_gradients_layouts_and_repetition():
    (s, t, c), boxes = small_case(seed=6)
    for upstream in (0.5, 65536.0):
        check_triton(s, t, c, boxes, upstream=upstream)
    leaf = s.clone().requires_grad_()
    before = [x.detach().clone() for x in (leaf, t, c)]
    loss = local_cross_entropy(leaf, t, c, impl="triton", **TEMPS, **boxes)
    again = local_cross_entropy(leaf, t, c, impl="triton", **TEMPS, **boxes)
    first = torch.autograd.grad(loss, leaf, torch.ones(1, device=DEVICE).expand(3)[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first) and torch.equal(loss, again)
    assert torch.equal(torch.autograd.grad(again, leaf)[0], first)
    assert all(torch.equal(x, y) for x, y in zip((leaf, t, c), before))
    with torch.no_grad():
        assert torch.equal(local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes), loss)
    wide = torch.zeros(2, 4, 1, 50, device=DEVICE)  # another order of the axes, and a slice
    wide[..., 3:40] = s.transpose(1, 2)
    strided = wide.requires_grad_()[..., 3:40].transpose(1, 2)
    assert not strided.is_contiguous()
    other = local_cross_entropy(
        strided, t.flip(-1).flip(-1)[:1].expand(2, -1, -1, -1), c, impl="triton", **TEMPS, **boxes
    )
    reference = local_cross_entropy(leaf, t[:1].expand(2, -1, -1, -1), c, impl="torch", **TEMPS, **boxes)
    torch.testing.assert_close(other, reference)
    torch.testing.assert_close(
        torch.autograd.grad(other, wide)[0][..., 3:40].transpose(1, 2),
        torch.autograd.grad(reference, leaf)[0],
        rtol=1e-5,
        atol=1e-7,
    )
    moving = {k: v.clone() if torch.is_tensor(v) else v for k, v in boxes.items()}
    loss = local_cross_entropy(leaf, t, c, impl="triton", **TEMPS, **moving)
    moving["teacher_boxes"] += 1000  # a buffer that is used again before the backward
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    none = local_cross_entropy(
        s[:, :0].requires_grad_(),
        t[:, :0],
        c,
        impl="triton",
        **TEMPS,
        index=torch.zeros(2, 2, 0, 4, dtype=torch.int64, device=DEVICE),
    )
    assert none == 0
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes), loss)
    compiled = torch.compile(
        lambda s: 2 * local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes), backend="eager"
    )
    assert torch.equal(compiled(s), 2 * loss)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_infinities_nans_and_extreme_rows():
    (s, t, c), boxes = small_case(seed=7)
    how = boxes | dict(hinge=False)
    masked_s, masked_t = s.clone(), t.clone()
    masked_s[..., 5] = masked_t[..., 5] = -math.inf
    check_triton(s[..., :36].contiguous(), t[..., :36].contiguous(), c[:36], how)
    keep = torch.arange(37, device=DEVICE) != 5
    torch.testing.assert_close(
        local_cross_entropy(masked_s, masked_t, c, impl="triton", **TEMPS, **how),
        local_cross_entropy(s[..., keep], t[..., keep], c[keep], impl="torch", **TEMPS, **how),
    )
    for change in (lambda x: torch.full_like(x, 3.0), lambda x: x + 1e4, lambda x: x - 1e4, lambda x: 1e4 * x):
        a = change(s).requires_grad_()
        mine, theirs = (local_cross_entropy(a, change(t), c, impl=impl, **TEMPS, **how) for impl in ("triton", "torch"))
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=0.05)  # float32 at 1e5: a step of 0.008
        torch.testing.assert_close(*(torch.autograd.grad(x, a)[0] for x in (mine, theirs)), rtol=0.02, atol=0.02)
    for which in (0, 1):
        broken = [s.clone(), t.clone()]
        broken[which][0, 0, 1, 3] = math.nan
        a = broken[0].requires_grad_()
        loss = local_cross_entropy(
            a,
            broken[1],
            c,
            impl="triton",
            **TEMPS,
            **how | (dict(student_boxes=boxes["teacher_boxes"][:2]) if which else {}),
        )
        assert loss.isnan() and torch.autograd.grad(loss, a)[0].isnan().any()
    assert local_cross_entropy(torch.full_like(s, -math.inf), t, c, impl="triton", **TEMPS, **how).isnan()


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("matches", ["boxes", "index", "single"])
def test_head_loss_equals_the_loss_of_its_logits(impl, matches):
    side = 1 if matches == "single" else 2
    (_, _, c), boxes = small_case(B=3, s_grid=(side, 1), t_grid=(side, 1))
    g = torch.Generator().manual_seed(0)
    z, tz = (F.normalize(torch.randn(2, 3, side, 16, generator=g), dim=-1).to(DEVICE) for _ in range(2))
    w, tw = (torch.randn(37, 16, generator=g).to(DEVICE) for _ in range(2))
    how = dict(
        boxes=boxes, index=dict(index=torch.randint(0, side, (2, 2, 3, side), generator=g).to(DEVICE)), single={}
    )[matches]
    leaves = [x.clone().requires_grad_() for x in (z, w, tz, tw, c)]
    truth = local_cross_entropy(
        leaves[0] @ leaves[1].T, tz @ tw.T, c, skip_same_view=True, impl="torch", **TEMPS, **how
    )
    expected = torch.autograd.grad(3 * truth, leaves[:2])
    off = 1e-4 if DEVICE == "cpu" or impl == "torch" else 1e-2  # on a GPU: float16 logits, bfloat16 gradients

    def close(mine, theirs):
        assert (mine - theirs).norm() <= off * theirs.norm()

    for max_bytes in (512 * 2**20, 1, 2 * 4 * 37 * 4 * side):  # all images at once, one, two at a time
        loss = head_cross_entropy(*leaves, skip_same_view=True, impl=impl, max_bytes=max_bytes, **TEMPS, **how)
        close(loss, truth)
        found = torch.autograd.grad(3 * loss, leaves, allow_unused=True, retain_graph=True)
        assert found[2:] == (None, None, None)
        for mine, theirs in zip(found, expected):
            close(mine, theirs)
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(
                head_cross_entropy(*leaves, skip_same_view=True, impl=impl, max_bytes=max_bytes, **TEMPS, **how), loss
            )
    only = torch.autograd.grad(
        head_cross_entropy(z, leaves[1], tz, tw, c, skip_same_view=True, impl=impl, **TEMPS, **how), leaves[1]
    )
    close(3 * only[0], expected[1])
    with pytest.raises(ValueError, match=r"student_weight \(37, D\).*\(37, 15\)"):
        head_cross_entropy(z, w[:, :15], tz, tw, c, **TEMPS)
    with pytest.raises(ValueError, match="differ in B or K"):
        head_cross_entropy(z, w, tz[:, :2], tw, c, **TEMPS)


@needs_triton
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    (s, t, c), boxes = case(B=1)
    monkeypatch.setattr(matching_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl='triton' needs"):
        local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes)
    local_cross_entropy(s, t, c, impl="auto", **TEMPS, **boxes)
    with pytest.raises(ValueError, match="float64"):
        monkeypatch.setattr(matching_kernels, "INTERPRETED", True)
        local_cross_entropy(s.double(), t, c, impl="triton", **TEMPS, **boxes)


@pytest.mark.skipif(True, reason="needs Triton 3.3")
def test_kernels_compile_for_every_gpu_without_spills():
    """Out of the interpreter, so in a process of its own; no GPU is needed."""
    script = """
import matching_kernels as mk
for part in ("teacher", "forward", "backward", "both"):
    for target in (("cuda", 100, 32), ("hip", "gfx942", 64)):
        mk._compile(part, target)
    for change in (dict(logits="fp32", UNIT=1.0), dict(logits="bf16", MODE="index", SKIP=-1),
                   dict(MODE="single", Q=1, EVEN=False)):
        mk._compile(part, ("cuda", 90, 32), **change)
for row in [*mk._report(80), *mk._report(90)]:
    print(row)
    assert row["spills"] == 0 and row["loads_16_byte"] >= 3, row
    assert row["kernel"] != "forward" or max(row["loops_instructions_per_element"]) <= 16, row
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_triton_beyond_two_to_the_31_elements():
    K, rows = 65536, 33000
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("not enough memory")
    s = torch.randn(1, rows, 1, K, dtype=torch.float16, device=DEVICE).requires_grad_()
    t = torch.randn(1, rows, 1, K, dtype=torch.float16, device=DEVICE)
    loss = local_cross_entropy(s, t, torch.zeros(K, device=DEVICE), impl="triton", **TEMPS)
    (grad,) = torch.autograd.grad(loss * rows, s)
    tail = s.detach()[:, -50:].requires_grad_()
    other = local_cross_entropy(tail, t[:, -50:], torch.zeros(K, device=DEVICE), impl="torch", **TEMPS)
    torch.testing.assert_close(grad[:, -50:], torch.autograd.grad(other * 50, tail)[0], rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------------ views

LEAVE = [1, 1, 1, 0, 0, 1, 2, 0, 0, 0, 0]  # colour parameters that change nothing


def colour_one(x, **change):
    """colour_views on float images x (N, 3, H, W) in [0, 1], with these columns changed; returns [0, 1] again."""
    names = dict(
        brightness=0, contrast=1, saturation=2, hue=3, order=slice(4, 7), hue_at=7, grey=8, sigma=9, solarise=10
    )
    colour = torch.tensor(LEAVE, dtype=torch.float32).repeat(len(x), 1)
    flip = torch.as_tensor(change.pop("flip", 0.0)).expand(len(x))
    for name, value in change.items():
        colour[:, names[name]] = torch.as_tensor(value, dtype=torch.float32)
    boxes = F.pad(flip[:, None].float(), (4, 0))
    out = gld.colour_views((x * 255).round().byte()[None].transpose(0, 1), boxes[:, None], colour[:, None])[0]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return out * std + mean


def pictures(n=6, size=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g)
    x[0] = x[0].mean()  # a grey picture: no hue
    return (x * 255).round() / 255


def test_every_colour_op_equals_torchvisions_image_by_image():
    x, close = pictures(), dict(rtol=0, atol=2e-5)
    factor = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.3, 1.4])
    shift = torch.tensor([-0.1, -0.05, 0.02, 0.04, 0.1, 0.07])
    each = zip(("brightness", "contrast", "saturation", "hue"), (factor, factor, factor, shift))
    for name, values in each:
        expected = [getattr(TF, f"adjust_{name}")(image, v.item()) for image, v in zip(x, values)]
        torch.testing.assert_close(colour_one(x, **{name: values}), torch.stack(expected), **close)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.3])
    expected = [TF.gaussian_blur(image, [13, 13], [s.item()] * 2) for image, s in zip(x, sigma)]
    torch.testing.assert_close(colour_one(x, sigma=sigma), torch.stack(expected), **close)
    half = torch.tensor([1.0, 0, 1, 0, 1, 0])
    pick = half.view(-1, 1, 1, 1) > 0
    grey = TF.rgb_to_grayscale(x, 3)
    torch.testing.assert_close(colour_one(x, grey=half), torch.where(pick, grey, x), **close)
    torch.testing.assert_close(colour_one(x, flip=half), torch.where(pick, TF.horizontal_flip(x), x), **close)
    solarised = TF.solarize((x * 255).round().byte(), 128).float() / 255
    torch.testing.assert_close(colour_one(x, solarise=half), torch.where(pick, solarised, x), **close)
    torch.testing.assert_close(colour_one(x), x, **close)
    for size in (1, 2, 4):  # a blur wider than the image stays a weighted mean
        assert torch.allclose(colour_one(torch.full((1, 3, size, size), 0.4), sigma=2.0), torch.tensor(0.4), atol=1e-5)


def test_jitter_applies_its_ops_in_the_drawn_order():
    x = pictures(24, seed=1)
    ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    orders = [torch.randperm(4, generator=torch.Generator().manual_seed(i)).tolist() for i in range(24)]
    values = (1.3, 0.7, 0.6, 0.08)
    expected = x.clone()
    for i, order in enumerate(orders):
        for op in order:
            expected[i] = ops[op](expected[i], values[op])
    hue_at = [order.index(3) for order in orders]
    rest = [[op for op in order if op != 3] for order in orders]
    found = colour_one(x, brightness=1.3, contrast=0.7, saturation=0.6, hue=0.08, order=rest, hue_at=hue_at)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)


def test_drawn_parameters_have_dinos_distribution():
    torch.manual_seed(0)
    image, n = torch.zeros(3, 375, 500, dtype=torch.uint8), 4000
    for scale, blur, solarise in (((0.4, 1.0), 1.0, 0.0), ((0.4, 1.0), 0.1, 0.2), ((0.05, 0.4), 0.5, 0.0)):
        drawn = [gld.draw_view(image, scale, (0.1, 2.0), blur, solarise) for _ in range(n)]
        box, colour = (torch.tensor(part, dtype=torch.float64) for part in zip(*drawn))
        top, left, height, width, flip = box.T
        assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
        crop = torchvision.transforms.RandomResizedCrop(224, scale)
        other = torch.tensor([crop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)], dtype=torch.float64).T
        for mine, theirs in (
            (height * width, other[2] * other[3]),
            (width / height, other[3] / other[2]),
            (top, other[0]),
        ):
            error = 4 * (mine.var() / n + theirs.var() / n).sqrt()
            assert (mine.mean() - theirs.mean()).abs() < error and 0.9 < mine.std() / theirs.std() < 1.1

        def share(hits, expected):
            assert abs(hits.double().mean() - expected) < 4 * math.sqrt(max(expected * (1 - expected), 1e-9) / n) + 1e-9

        share(flip, 0.5), share(colour[:, 8], 0.2), share(colour[:, 9] > 0, blur), share(colour[:, 10], solarise)
        jittered = colour[:, 3] != 0
        share(jittered, 0.8)
        for column, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
            values = colour[jittered, column]
            assert low <= values.min() and values.max() <= high
            assert abs(values.mean() - (low + high) / 2) < 0.02 and abs(values.std() - (high - low) / 12**0.5) < 0.02
        sigma = colour[colour[:, 9] > 0, 9]
        assert 0.1 <= sigma.min() and sigma.max() <= 2.0 and abs(sigma.mean() - 1.05) < 0.1
        for op in range(4):  # every op is first, second, ... equally often
            order = torch.cat([colour[:, 4:7], torch.full((n, 1), 9.0)], 1)
            place = colour[:, 7] if op == 3 else (order == op).double().argmax(1)
            if op < 3:
                place = place + (place >= colour[:, 7])
            for at in range(4):
                share(place == at, 0.25)


def test_matched_patches_show_the_same_place_through_the_real_pipeline():
    """An image whose colours are its coordinates: what a patch shows says where it is."""
    cfg = config(
        "--preset", "paper", "--global-size", 112, "--local-size", 96, "--local-views", 6, "--arch", "vit_tiny"
    )
    H, W = 240, 330
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    image = torch.stack([y / H * 255, x / W * 255, torch.zeros(H, W)]).round().byte()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    flips, matches = set(), 0
    for seed in range(12):
        torch.manual_seed(seed)
        cut, small, boxes, colour = gld.cut_views(image, cfg)
        assert cut.dtype == torch.uint8 and cut.shape == (2, 3, 112, 112) and small.shape == (6, 3, 96, 96)
        plain = torch.tensor(LEAVE, dtype=torch.float32).expand(1, 8, 11)
        shown, grids = [], []  # per view: (patches, 2) the coordinates that its patches show
        for part, first in ((cut, 0), (small, 2)):
            views = (
                gld.colour_views(part[None], boxes[None, first : first + len(part)], plain[:, : len(part)])[:, 0] * std
                + mean
            )
            cells = F.avg_pool2d(views[:, :2], 16).flatten(2).mT * torch.tensor([H, W])
            shown += list(cells)
            grids += [(part.shape[-1] // 16,) * 2] * len(part)
        for v in range(8):
            assert (shown[v] - centres(boxes[v], grids[v])).abs().max() < 1.5  # 8 bits of colour, and the image's edges
            for q in range(2):
                index, weight = geometric_matches(boxes[v], boxes[q], grids[v], grids[q])
                cells = torch.stack([boxes[v, 2:4] / grids[v][0], boxes[q, 2:4] / grids[q][0]])
                low, high = boxes[q, :2], boxes[q, :2] + boxes[q, 2:4]
                inside = ((shown[v] > low + 2) & (shown[v] < high - 2)).all(1)
                apart = (shown[v] - shown[q][index]).abs()
                # 3: twice the 1.5 of above
                assert (apart[inside] <= cells[1] / 2 + 3).all() and (weight[inside] > 0).float().sum() >= len(
                    apart[inside]
                ) - 1
                assert (apart[weight > 0].norm(dim=1) < (cells / 2).norm(dim=1).max() + 5).all()
                apart = apart[weight > 0]
                flips.add((v < 2, bool(boxes[v, 4]), bool(boxes[q, 4])))
                matches += len(apart)
    assert len(flips) == 8 and matches > 4000


def test_views_depend_on_seed_epoch_and_image_only():
    cfg = config()
    data = gld.ViewDataset(gld.Images(*gld.draw_shapes(8, 0)), cfg)
    first = data[(3, 5)]
    torch.rand(7)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, data[(3, 5)]))
    for other in (data[(4, 5)], data[(3, 6)], gld.ViewDataset(data.images, config("--seed", 1))[(3, 5)]):
        assert not torch.equal(first[2], other[2])
    images, batches = data.images, []
    for world in (1, 2, 4):  # the same global batches whatever the number of processes
        cfg = config("--batch-size", 4 // world)
        loaders = [gld.make_loader(images, cfg, rank, world, range(1, 4), 2) for rank in range(world)]
        batches.append([torch.cat([part[2] for part in step]) for step in zip(*loaders)])
    assert all(torch.equal(a, b) for other in batches[1:] for a, b in zip(batches[0], other)) and len(batches[0]) == 3


# ------------------------------------------------------------------------------------------------ images


def save_odd_images(folder):
    """One file of each awkward kind, all of the same picture; returns the picture (48, 64, 3)."""
    y, x = np.mgrid[:48, :64]
    rgb = np.stack([4 * y, 3 * x, 255 - 2 * x], -1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: shown after a quarter turn clockwise
    picture.save(folder / "plain.png")
    picture.save(folder / "plain.jpg", quality=95)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.save(folder / "plain.webp", lossless=True)
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(180)])
    picture.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    picture.convert("L").save(folder / "grey.jpg", quality=95)
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    return rgb


def test_every_kind_of_image_decodes_to_rgb(tmp_path):
    rgb = save_odd_images(tmp_path).astype(float)
    grey = np.asarray(Image.fromarray(rgb.astype(np.uint8)).convert("L"), float)[..., None].repeat(3, 2)
    for path in sorted(tmp_path.iterdir()):
        image = gld.decode(path.read_bytes())
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8, path.name
        expected = grey if path.stem in ("grey", "deep") else rgb
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 6, path.name


def test_folders_with_and_without_classes(tmp_path):
    for name in ("b/1.png", "a/2.PNG", "a/deep/3.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / name, format="png")
    images = gld.load_images(str(tmp_path / "classes"), "train")
    assert [os.path.relpath(images.name(i), tmp_path / "classes") for i in range(3)] == [
        "a/2.PNG",
        "a/deep/3.png",
        "b/1.png",
    ]
    assert images.labels.tolist() == [0, 0, 1] and images.items.dtype.kind == "S"
    flat = gld.load_images(str(tmp_path / "classes" / "a" / "deep"), "train")
    assert flat.labels.tolist() == [0]
    with pytest.raises(gld.BadInput, match="no images"):
        gld.load_images(str(HERE / ".ci"), "train")
    with pytest.raises(gld.BadInput, match="no such folder"):
        gld.load_images(str(tmp_path / "nowhere"), "train")


def test_data_fraction_is_balanced_and_always_the_same():
    whole, part = gld.load_images("shapes", "train"), gld.load_images("shapes", "train", 0.1)
    counts, parts = np.bincount(whole.labels), np.bincount(part.labels)
    assert len(parts) == len(counts) >= 10 and (parts == np.ceil(counts * 0.1)).all()
    assert np.array_equal(part.items, gld.load_images("shapes", "train", 0.1).items)


def test_too_many_unreadable_files_end_the_run_in_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(4):
        (tmp_path / "data" / f"{i}.png").write_text("not an image")
    for workers in (0, 1):
        options = f"--data data --preset small --batch-size 2 --epochs 1 --workers {workers}"
        done = run(f"gld.py {options}", tmp_path)
        assert done.returncode == 2 and "cannot be read" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_shapes_are_reproducible_and_their_splits_differ():
    train, again, val = (gld.load_images("shapes", split) for split in ("train", "train", "val"))
    assert np.array_equal(train.items, again.items) and train.items.dtype == np.uint8
    assert not {x.tobytes() for x in train.items} & {x.tobytes() for x in val.items}
    assert np.bincount(val.labels).min() > 50


def save_pictures(folder, n, size=(40, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")


def spoil(folder):
    """Put one file of every kind that cannot be read there; returns their names."""
    save_pictures(folder, 1)
    whole = (folder / "0000.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "vanished.jpg").symlink_to("nowhere")
    (folder / "header.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (folder / "bomb.png").write_bytes(whole[:16] + b"\xff\xff\xff\xf0" * 2 + whole[24:])
    bad = ["truncated.png", "empty.png", "text.jpg", "vanished.jpg", "header.jpg", "bomb.png"]
    if os.geteuid():  # root may read everything
        (folder / "secret.png").write_bytes(whole)
        (folder / "secret.png").chmod(0)
        bad.append("secret.png")
    return bad


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_counted_and_replaced(tmp_path, workers):
    bad = spoil(tmp_path / "data")
    save_pictures(tmp_path / "data", 800 - len(bad))
    options = f"--preset small --epochs 2 --batch-size 40 --local-views 0 --workers {workers}"
    done = run(f"gld.py --data data {options}", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in bad:
        assert done.stdout.count(name) == 1, (name, done.stdout)  # named once, counted in each epoch
    logged = [json.loads(line)["unreadable"] for line in (tmp_path / "output/log.jsonl").read_text().splitlines()]
    assert logged == [len(bad)] * 2


@pytest.mark.parametrize("processes", [1, 2])
def test_more_than_one_percent_of_unreadable_files_end_the_run(tmp_path, processes):
    save_pictures(tmp_path / "data", 90)
    for i in range(10):
        (tmp_path / "data" / f"text{i}.jpg").write_text("not an image")
    done = run("gld.py --data data --preset small --epochs 1 --batch-size 10 --workers 0", tmp_path, processes)
    assert done.returncode == (2 if processes == 1 else 1)
    lines = [line for line in done.stderr.splitlines() if "gld.py: error" in line]
    assert len(lines) == 1 and "more than 1 %" in lines[0], done.stderr


def test_odd_images_train(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    save_odd_images(folder)
    for size in ((1, 5000), (5000, 1), (1, 1)):
        save_pictures(folder / f"{size}", 1, size)
    done = run("gld.py --data data --preset small --epochs 3 --batch-size 6 --workers 0 --warmup-epochs 0", tmp_path)
    assert done.returncode == 0 and "cannot be read" not in done.stdout, done.stdout + done.stderr
    assert not any(json.loads(line)["unreadable"] for line in (tmp_path / "output/log.jsonl").read_text().splitlines())


def pack(path, folder, mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname="set")
    return str(path)


@pytest.mark.parametrize("split", [True, False])
def test_an_archive_is_read_in_place_as_its_folder_would_be(tmp_path, split):
    for name in ("train/a", "train/b", "val/a", "val/b") if split else ("a", "b"):
        save_pictures(tmp_path / "data" / name, 3 + len(name) % 2)
    archive = pack(tmp_path / "data.tar", tmp_path / "data")
    for part in ("train", "val"):
        one, other = (gld.load_images(str(data), part) for data in (tmp_path / "data", archive))
        assert len(one) == len(other) and one.labels.tolist() == other.labels.tolist()
        assert one.classes.tolist() == other.classes.tolist() == [b"a", b"b"]
        for i in range(len(one)):
            assert torch.equal(one.read(i), other.read(i))
            assert other.name(i) == one.name(i).replace(str(tmp_path / "data"), archive + "/set")
    with contextlib.nullcontext() if split else pytest.raises(gld.BadInput, match="must hold train/"):
        gld.load_images(archive, "val", must_split=True)
    for workers in (0, 2):
        options = "--preset small --epochs 1 --batch-size 3 --local-views 1 --warmup-epochs 0"
        for data in (tmp_path / "data", archive):
            out = "tar" if data == archive else "folder"
            done = run(f"gld.py --data {data} {options} --workers {workers} --output {out}{workers}", tmp_path)
            assert done.returncode == 0, done.stderr
        same_weights(checkpoint(tmp_path / f"tar{workers}"), checkpoint(tmp_path / f"folder{workers}"), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data",
        "data.tar",
        "folder0",
        "folder2",
        "tar0",
        "tar2",
    ]


def test_hostile_and_broken_archives(tmp_path):
    save_pictures(tmp_path / "data/train/a", 20)
    picture = (tmp_path / "data/train/a/0000.png").read_bytes()
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as archive:
        for name in ("../outside.png", str(tmp_path / "absolute.png"), "inside.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            archive.addfile(member, io.BytesIO(picture))
        for kind, name in ((tarfile.SYMTYPE, "symbolic.png"), (tarfile.LNKTYPE, "hard.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    images = gld.load_images(str(hostile), "train")
    assert len(images) == 3 and all(images.read(i).shape == (3, 40, 40) for i in range(3))
    plain = Path(pack(tmp_path / "plain.tar", tmp_path / "data")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(plain[: len(plain) // 2 + 100])
    (tmp_path / "text.tar").write_text("hello")
    (tmp_path / "empty.tar").touch()
    before = sorted(tmp_path.iterdir())
    for path in (pack(tmp_path / "zipped.tar.gz", tmp_path / "data", "w:gz"), "cut.tar", "text.tar", "empty.tar"):
        done = run(f"gld.py --data {path} --preset small", tmp_path)
        assert done.returncode == 2 and path in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "zipped.tar.gz"])


def test_a_million_paths_cost_a_worker_little(tmp_path, monkeypatch):
    """Little is copied into a worker that forks, nor sent to one that does not."""
    names = [f"set/n{i // 1300:08}/n{i // 1300:08}_{i:012}_photograph.JPEG".encode() for i in range(10**6)]
    monkeypatch.setattr(gld, "list_archive", lambda path: [(name, 512 * i, 100) for i, name in enumerate(names)])
    (tmp_path / "big.tar").touch()
    images = gld.load_images(str(tmp_path / "big.tar"), "train")
    assert len(images) == 10**6 and images.name(7) == f"{tmp_path}/big.tar/{names[7].decode()}"
    assert len(pickle.dumps(gld.ViewDataset(images, config()))) < 100e6
    reader, writer = os.pipe()
    if not os.fork():  # a worker: it reads every name, and tells how much memory became its own by that
        own = lambda: sum(
            int(x) for x in re.findall(r"Private_\w+: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
        )
        before = own()
        for i in range(0, 10**6, 3):
            images.name(i), images.labels[i], images.spans[i]
        os.write(writer, str(own() - before).encode())
        os._exit(0)
    os.wait()
    assert int(os.read(reader, 99)) < 50_000  # kB


def test_the_picture_joins_patches_that_show_the_same_place(tmp_path, monkeypatch):
    """An image whose colours are its coordinates: in the picture, patches with equal frames show the same place."""
    y, x = np.mgrid[:96, :96]
    Image.fromarray(np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "places.png")
    plain = (1, 1, 1, 0, 0, 1, 2, 3, 0, 0, 0)
    monkeypatch.setattr(gld, "draw_view", lambda *how, draw=gld.draw_view: (draw(*how)[0], plain))
    flips, dark, joined = set(), 0, 0
    for seed in range(6):
        cfg = config("--data", tmp_path / "places.png", "--preset", "small", "--seed", seed, "--global-size", 64)
        picture, panels = gld.show_matches(cfg)
        picture = np.asarray(picture).astype(float)
        boxes = gld.ViewDataset(gld.load_images(cfg.data, "train"), cfg)[0, 0][2]
        assert picture.shape[1] == 1200 and len(panels) == 2 * 6

        def patches(v, left, top, side):
            """Frame colour, and place (x, y) in the image by the colours around its centre, of a panel's patches."""
            n = gld.grids_of(cfg)[v >= 2][0]
            for row in range(n):
                for col in range(n):
                    y, x = top + side * row // n, left + side * col // n
                    near, far = round(0.2 * side / n), round(0.8 * side / n)  # the number stands in the upper left
                    yield (
                        tuple(picture[y + 2, x + 2]),
                        (picture[y + near, x + far] + picture[y + far, x + near])[:2] / 4,
                    )

        teachers = {q: dict(patches(v, *at)) for _, q, v, *at in panels if v == q}
        assert all(len(teacher) == 64 for teacher in teachers.values())  # frames tell the patches apart
        for _, q, v, *at in panels:
            cells = [max(boxes[i, 2:4]) / gld.grids_of(cfg)[i >= 2][0] for i in (q, v)]
            for frame, place in patches(v, *at) if v != q else ():
                if frame not in teachers[q]:
                    dark += 1
                    continue
                assert math.dist(place, teachers[q][frame]) < 0.5**0.5 * max(cells) + 2, (seed, q, v)
                flips.add((bool(boxes[q, 4]), bool(boxes[v, 4])))
                joined += 1
    assert len(flips) == 4 and joined > 700 and dark > 50


def test_the_picture_of_similarity_needs_networks(tmp_path):
    save_pictures(tmp_path / "data", 2)
    options = "gld.py --data data --preset small --workers 0 --show-matches"
    assert run(f"{options} one.png", tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one.png"]
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    assert run(f"{options} two.png --init-from output/checkpoint.pt", tmp_path).returncode == 0
    sizes = [Image.open(tmp_path / name).size for name in ("one.png", "two.png")]
    assert sizes[0][0] == sizes[1][0] == 1200 and sizes[1][1] > sizes[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "one.png", "output", "two.png"]
    for wrong in ("nowhere/a.png", "a.xyz", "one.png --init-from output/backbone.pt", "one.png --arch vit_tiny"):
        options_wrong = (
            f"{options} {wrong} --init-from output/checkpoint.pt" if "arch" in wrong else f"{options} {wrong}"
        )
        done = run(options_wrong, tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (wrong, done.stderr)


def test_waiting_for_data_is_noticed(tmp_path, monkeypatch):
    """By a clock that moves on by 1000 s whenever an image is read."""
    clock, now, read = [0], time.perf_counter, gld.Images.read

    def slowly(images, i):
        clock[0] += 1000
        return read(images, i)

    options = f"gld.py {QUICK} --data-fraction 0.02 --local-views 0"
    fast = run(options, tmp_path)
    monkeypatch.setattr(gld.Images, "read", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + clock[0])
    slow = run(f"{options} --no-resume", tmp_path)
    assert "waiting for data: try more --workers" in slow.stdout and "try more" not in fast.stdout
    shares = [json.loads(line)["waiting"] for line in (tmp_path / "output/log.jsonl").read_text().splitlines()]
    assert 0 < shares[0] < shares[1] and 0.99 < shares[1] < 1


def test_benchmark_measures_and_saves_nothing(tmp_path):
    done = run(f"gld.py {QUICK} --workers 1 --benchmark 3", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["milliseconds"]) == set(gld.PHASES) and all(ms > 0 for ms in found["milliseconds"].values())
    rates = found["images_per_second"]
    assert len(rates) == 4 and rates["all together"] < rates["views on the device alone"]
    step = sum(found["milliseconds"].values())
    assert math.isclose(rates["all together"], 8 * 1000 / step)
    two = run(f"gld.py {QUICK} --benchmark 2 --batch-size 4", tmp_path, processes=2)
    assert two.returncode == 0 and json.loads(two.stdout.splitlines()[-1])["processes"] == 2


@bench
def test_worker_against_pillow(capsys, request):
    """Decode and ten views of photographs, one core: torchvision's transforms on Pillow images, as the official code
    has them, against our worker. Then the .tar against its folder. Reports; asserts nothing about time."""
    from torchvision import transforms as T

    if request.config.getoption("markexpr") != "bench":
        pytest.skip("run it with -m bench -s")
    archive = HERE.parent / "shared/data/imagenet-64.tar"
    torch.set_num_threads(1)
    cfg = config("--data", archive)
    images = gld.load_images(str(archive), "train")

    def views(size, scale, blur, solarise):
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                T.RandomGrayscale(0.2),
                T.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2)))], blur),
                T.RandomSolarize(128, solarise),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    recipe = [views(224, (0.4, 1), 1, 0), views(224, (0.4, 1), 0.1, 0.2)] + [views(96, (0.05, 0.4), 0.5, 0)] * 8

    def pillow(i):
        offset, size = images.spans[i].tolist()
        picture = Image.open(io.BytesIO(os.pread(gld.open_archive(images.root), size, offset))).convert("RGB")
        return [view(picture) for view in recipe]

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        data, from_folder = (gld.ViewDataset(x, cfg) for x in (images, gld.load_images(folder, "train")))
        ways = {"Pillow": pillow, "ours, .tar": lambda i: data[(0, i)], "ours, folder": lambda i: from_folder[(0, i)]}
        times = {name: [] for name in ways}
        for _ in range(3):
            for name, way in ways.items():
                began = time.perf_counter()
                for i in range(len(images)):
                    way(i)
                times[name].append(1000 * (time.perf_counter() - began) / len(images))
    median = {name: sorted(x)[1] for name, x in times.items()}
    with capsys.disabled():
        print(
            "\nms per image, 10 views, one core: "
            + ", ".join(f"{name} {ms:.2f}" for name, ms in median.items())
            + f"; Pillow / ours {median['Pillow'] / median['ours, .tar']:.1f}, "
            f".tar / folder {median['ours, .tar'] / median['ours, folder']:.2f}"
        )


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("arch", gld.ARCHS)
def test_every_backbone_at_both_sizes(arch):
    small = arch == "conv_tiny"
    backbone = gld.Backbone(arch, 32 if small else 224, drop_path=0.1)
    for size in (32, 16) if small else (224, 96):
        rows = cols = size // gld.stride_of(arch, 16)
        image, patches = backbone(torch.randn(2, 3, size, size))
        assert image.shape == (2, backbone.width) and patches.shape == (2, rows * cols, backbone.width)
    assert not any(key.startswith(("head", "fc")) for key in backbone.net.state_dict())


def test_stochastic_depth_is_in_the_student_only():
    torch.manual_seed(0)
    cfg = config(
        "--preset",
        "paper",
        "--arch",
        "vit_tiny",
        "--out-dim",
        16,
        "--head-hidden",
        16,
        "--global-size",
        32,
        "--local-size",
        16,
    )
    x = [torch.randn(2, 4, 3, 32, 32)]
    student, teacher = gld.Network(cfg, drop_path=0.5), gld.Network(cfg)
    assert not torch.equal(student(x).image, student(x).image) and torch.equal(teacher(x).image, teacher(x).image)
    assert student.training and teacher.training and student.state_dict().keys() == teacher.state_dict().keys()


def test_vit_position_embedding_is_interpolated_and_keeps_its_orientation():
    backbone = gld.Backbone("vit_tiny", 64, 16)
    grid = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1).expand(-1, -1, 192)  # the value is the row
    backbone.net.encoder.pos_embedding.data[:, 1:] = grid
    assert torch.equal(backbone.position_embedding(4, 4), backbone.net.encoder.pos_embedding)
    small = backbone.position_embedding(2, 2)[0, 1:, 0]
    assert small[0] == small[1] < small[2] == small[3]


def test_head_gives_unit_vectors_and_normalised_weights():
    torch.manual_seed(0)
    for norm in (True, False):
        cfg = config("--norm-last-layer" if norm else "--no-norm-last-layer", "--out-dim", 20)
        head = gld.Head(24, cfg)
        torch.testing.assert_close(head(torch.randn(5, 24)).norm(dim=1), torch.ones(5))
        torch.testing.assert_close(head.weight().norm(dim=1), torch.ones(20))
        assert head.gain.requires_grad != norm


def test_schedules():
    lr = [gld.cosine(1.0, 0.1, step, 100, 10) for step in range(101)]
    assert lr[0] == 0 and lr[9] == 1 and lr[10] == 1 and math.isclose(lr[100], 0.1) and max(lr) == 1
    assert all(a >= b for a, b in zip(lr[10:], lr[11:])) and math.isclose(lr[55], 0.55)
    assert gld.cosine(0.996, 1, 0, 1) == 0.996 and gld.cosine(1.0, 0.1, 0, 1, 1) == 0
    cfg = argparse.Namespace(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30)
    assert gld.teacher_temp_at(0, cfg) == 0.04 and math.isclose(gld.teacher_temp_at(29, cfg), 0.07)
    assert gld.teacher_temp_at(30, cfg) == gld.teacher_temp_at(299, cfg) == 0.07
    cfg.warmup_teacher_temp_epochs = 0
    assert gld.teacher_temp_at(0, cfg) == 0.07


def test_clipping_is_per_parameter():
    parameters = [
        torch.nn.Parameter(torch.zeros(4)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((4,), 10.0), torch.full((2,), 0.1)
    norm = gld.clip_gradients(parameters, 3.0)
    assert math.isclose(parameters[0].grad.norm(), 3, rel_tol=1e-5) and torch.equal(
        parameters[1].grad, torch.full((2,), 0.1)
    )
    assert math.isclose(norm, math.hypot(20, 0.1 * 2**0.5), rel_tol=1e-5)
    assert gld.clip_gradients(parameters, 0) < 4 and math.isclose(parameters[0].grad.norm(), 3, rel_tol=1e-5)


# ------------------------------------------------------------------------------------------------ training

QUICK = "--data-fraction 0.1 --batch-size 8 --workers 0 --epochs 1 --warmup-epochs 0"


def same_weights(a, b, **close):
    for name in ("student", "teacher"):
        for key, value in a[name].items():
            torch.testing.assert_close(value, b[name][key], **close, msg=lambda m: f"{name}.{key}: {m}")
    torch.testing.assert_close(a["centers"], b["centers"], **close)


@pytest.mark.parametrize("matching", ["geometric", "similarity"])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, matching):
    options = f"--matching {matching} --data-fraction 0.1 --workers 0 --epochs 1 --warmup-epochs 0"
    one = run(f"gld.py {options} --batch-size 8 --max-steps 1 --output one", tmp_path)
    two = run(f"gld.py {options} --batch-size 4 --max-steps 1 --output two", tmp_path, processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two")]
    for key in ("loss_global", "loss_local", "grad_norm"):
        assert math.isclose(logs[0][key], logs[1][key], rel_tol=1e-5, abs_tol=1e-9), key
    a, b = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    torch.testing.assert_close(a["centers"], b["centers"], rtol=1e-5, atol=1e-6)
    for key, state in a["optimizer"]["state"].items():  # after one step, exp_avg is a tenth of the gradient
        torch.testing.assert_close(state["exp_avg"], b["optimizer"]["state"][key]["exp_avg"], rtol=1e-4, atol=1e-6)


def test_stochastic_depth_is_the_same_after_a_stop(tmp_path):
    """What the student drops is drawn in the main process: for each step anew, not from what was drawn before."""
    options = f"gld.py {QUICK} --arch vit_tiny --drop-path 0.5 --local-views 0 --batch-size 2"
    assert run(f"{options} --max-steps 4 --output whole", tmp_path).returncode == 0
    for steps in (2, 4):
        assert run(f"{options} --max-steps {steps} --output parts", tmp_path).returncode == 0
    same_weights(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"), rtol=0, atol=0)


def test_the_teacher_takes_no_part_in_autograd(tmp_path, monkeypatch):
    """Or every step would hang on to the one before, for good."""
    networks = []

    def build(cfg, drop_path=0.0, make=gld.Network):
        networks.append(make(cfg, drop_path))
        return networks[-1]

    monkeypatch.setattr(gld, "Network", build)
    assert run(f"gld.py {QUICK} --max-steps 2", tmp_path).returncode == 0
    student, teacher = networks
    assert all(p.requires_grad for p in student.backbone.parameters())
    assert not any(p.requires_grad or p.grad_fn for p in teacher.parameters())


def test_options_given_again_are_the_same_options(tmp_path):
    """A range comes as a list from the command line, and as a tuple from the defaults."""
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    done = run(f"gld.py {QUICK} --max-steps 2 --global-scale 0.4 1.0 --seed 0", tmp_path)
    assert done.returncode == 0 and "from step 1" in done.stdout, done.stderr


@pytest.mark.parametrize("stop", [3, 30, 37])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    """Stopped in the middle of an epoch, at its end, and in the next one; 30 steps are an epoch."""
    options = "--data-fraction 0.1 --batch-size 8 --workers 1 --epochs 2 --max-steps 40"
    whole = tmp_path.parent / "whole"
    if not whole.exists():
        assert run(f"gld.py {options} --output {whole}", tmp_path).returncode == 0
    first = run(f"gld.py {options.replace('40', str(stop))} --output parts", tmp_path)
    second = run(f"gld.py {options} --output parts", tmp_path)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    a, b = checkpoint(whole), checkpoint(tmp_path / "parts")
    assert a["step"] == b["step"] == 40
    same_weights(a, b, rtol=0, atol=0)


def test_no_local_views_one_patch_grids_and_cosine_at_one_step(tmp_path):
    for i, options in enumerate(
        (
            "--local-views 0",
            "--local-size 8 --global-size 8",
            "--matching similarity --local-size 8",
            "--matching none --local-views 0",
            "--arch vit_tiny --clip-grad 0 --no-hinge",
        )
    ):
        done = run(f"gld.py {QUICK} --max-steps 1 --output {i} {options}", tmp_path)
        assert done.returncode == 0, options + done.stderr


def test_last_layer_is_frozen_teacher_follows_and_is_no_alias(tmp_path):
    options = f"gld.py {QUICK} --no-norm-last-layer --max-steps"
    assert run(f"{options} 3 --freeze-last-layer 1 --output frozen", tmp_path).returncode == 0
    torch.manual_seed(0)
    start = gld.Network(config("--no-norm-last-layer")).state_dict()
    end = checkpoint(tmp_path / "frozen")
    for name, value in start.items():
        frozen = "head.direction" in name or "head.gain" in name
        assert torch.equal(end["student"][name], value) == frozen, name
    assert run(f"{options} 1 --output one", tmp_path).returncode == 0
    end = checkpoint(tmp_path / "one")
    for name, _ in gld.Network(config("--no-norm-last-layer")).named_parameters():
        value = start[name]  # the teacher moved by 1 - 0.99 of the student's step
        moved = end["student"][name] - value
        assert moved.abs().max() > 0
        torch.testing.assert_close(end["teacher"][name], value + 0.01 * moved, rtol=1e-4, atol=1e-8)


def test_centres_move_a_tenth_of_the_way_to_the_teachers_mean(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    cfg = config(*QUICK.split())
    images = gld.load_images("shapes", "train", 0.1)
    batch = next(iter(gld.make_loader(images, cfg, 0, 1, range(1), 30)))
    torch.manual_seed(0)
    teacher = gld.Network(cfg)([gld.colour_views(batch[0], batch[2][:, :2], batch[3][:, :2])])
    logits = (teacher.image @ teacher.global_weight.T, teacher.patches[0] @ teacher.local_weight.T)
    means = torch.stack([x.flatten(0, 2).mean(0) for x in logits])
    torch.testing.assert_close(checkpoint(tmp_path / "output")["centers"], 0.1 * means, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize(
    "more", ["", "--precision fp16", "--compile", "--arch swin_t --global-size 64 --local-size 32"]
)
def test_training_and_evaluation_run_on_a_gpu(tmp_path, more):
    options = f"gld.py {QUICK} --device cuda --local-views 2 --workers 2 {more}"
    assert run(f"{options} --max-steps 3", tmp_path).returncode == 0
    assert run(f"{options} --max-steps 6", tmp_path).returncode == 0  # continued
    log = [json.loads(line) for line in (tmp_path / "output/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(math.isfinite(entry["loss_global"] + entry["loss_local"]) for entry in log)
    assert run(f"{options} --benchmark 3", tmp_path).returncode == 0
    assert run("eval_knn.py --device cuda --k 5 --linear", tmp_path).returncode == 0


def test_compile_without_a_compiler_says_so_and_goes_on(tmp_path):
    """torch.compile fails at the first step here; the run is then the plain one."""
    environment = os.environ | dict(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    process = launch(f"gld.py {QUICK} --max-steps 2 --compile --device cpu --output a", tmp_path, env=environment)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "no-such-compiler" in said, said
    assert run(f"gld.py {QUICK} --max-steps 2 --device cpu --output b", tmp_path).returncode == 0
    same_weights(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"), rtol=0, atol=0)


def test_weight_decay_spares_biases_and_norms(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    groups = checkpoint(tmp_path / "output")["optimizer"]["param_groups"]
    network = gld.Network(config())
    parameters = [p for p in network.parameters() if p.requires_grad]
    assert len(groups[0]["params"]) == sum(p.ndim > 1 for p in parameters) and math.isclose(
        groups[0]["weight_decay"], 0.04
    )
    assert len(groups[1]["params"]) == sum(p.ndim <= 1 for p in parameters) and groups[1]["weight_decay"] == 0


def test_a_nan_stops_every_process_and_keeps_the_checkpoint(tmp_path):
    assert run(f"gld.py {QUICK} --batch-size 4 --max-steps 2", tmp_path).returncode == 0
    path = tmp_path / "output/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["student"]["local_head.mlp.4.bias"][0] = math.nan
    state["options"]["images per step (--batch-size x processes)"] = 8
    torch.save(state, path)
    before = path.read_bytes()
    done = run(f"gld.py {QUICK} --batch-size 4", tmp_path, processes=2)
    assert done.returncode == 1 and "local loss is nan" in done.stderr and path.read_bytes() == before


def test_a_signal_stops_after_the_step_and_the_run_continues(tmp_path):
    """SIGTERM to the whole process group, as a scheduler sends it: the loader's workers must not die of it."""
    options = QUICK.replace("--workers 0", "--workers 1").split()
    command = [sys.executable, str(HERE / "gld.py"), *options, "--epochs", "50"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    line = ""
    while "step 1 " not in line:
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == gld.CONTINUE_ME and "continues" in process.stdout.read()
    step = checkpoint(tmp_path / "output")["step"]
    assert 1 <= step < 1500
    done = run(f"gld.py {QUICK} --epochs 50 --max-steps {step + 1}", tmp_path)
    assert done.returncode == 0 and f"from step {step}" in done.stdout


def test_killed_at_any_moment_a_run_continues_to_the_same_bits(tmp_path):
    """SIGKILL to the process (its workers notice by themselves), at random moments, until it got through."""
    options = QUICK.replace("--workers 0 --epochs 1", "--workers 1 --epochs 8")
    assert run(f"gld.py {options} --output whole", tmp_path).returncode == 0
    moments, said = np.random.default_rng(int(time.time())), ""
    for kill in range(6):
        process = launch(f"gld.py {options} --output parts", tmp_path)
        said += wait_for(process, "from step")
        (tmp_path / "parts").mkdir(exist_ok=True)
        time.sleep(moments.uniform(0, 2))
        process.kill()
        said += process.communicate()[0]
        if kill == 0:  # as if killed while it wrote
            (tmp_path / "parts/checkpoint.tmp").write_bytes(b"half of a checkpoint")
        path = tmp_path / "parts/checkpoint.pt"
        assert not path.exists() or torch.load(path, weights_only=True)["step"] % 30 == 0
    assert run(f"gld.py {options} --output parts", tmp_path).returncode == 0
    print(said)
    same_weights(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"), rtol=0, atol=0)
    assert sorted(x.name for x in (tmp_path / "parts").iterdir()) == ["backbone.pt", "checkpoint.pt", "log.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_processes_together(tmp_path, number):
    """Stopped in the middle of an epoch, all processes at one step; one process ends the job, to the same figures."""
    process = launch(f"gld.py {QUICK} --epochs 50", tmp_path, processes=2)
    wait_for(process, "step 1 ")
    started = [pid for child in children(process.pid) for pid in (child, *children(child))]
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    step = checkpoint(tmp_path / "output")["step"]
    assert said.count(f"asked to stop: saved at step {step}") == 1 and process.returncode, said
    assert len(started) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in started)
    done = run(f"gld.py {QUICK.replace('size 8', 'size 16')} --epochs 50 --max-steps {step + 1}", tmp_path)
    assert done.returncode == 0 and f"from step {step}" in done.stdout, done.stderr


def test_processes_that_slurm_starts_tell_by_their_exit_code_to_come_again(tmp_path):
    """The variables of the README's script, and SIGTERM to every process, workers too: 75 from all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    options = QUICK.replace("--workers 0", "--workers 1")
    processes = []
    for rank in ("0", "1"):
        variables = dict(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, MASTER_ADDR="localhost", MASTER_PORT=port)
        processes.append(launch(f"gld.py {options} --epochs 50", tmp_path, env=os.environ | variables))
    wait_for(processes[0], "step 1 ")
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    said = processes[0].communicate(timeout=60)[0]
    assert [process.wait(60) for process in processes] == [gld.CONTINUE_ME] * 2 and "asked to stop: saved" in said


def test_a_nan_of_one_process_stops_all_before_anything_is_touched(tmp_path):
    """Patched for one process of two: the loss, a gradient. Nothing may have moved since the step before."""
    script = """
import sys, os, torch
sys.path.insert(0, HERE)
import gld
seen, nets, loss, centers = [0], [], gld.distillation_loss, []
def build(cfg, drop_path=0.0, make=gld.Network):
    nets.append(make(cfg, drop_path))
    return nets[-1]
def poisoned(student, teacher, c, *args, **how):
    whole, local = loss(student, teacher, c, *args, **how)
    seen[0] += 1
    if seen[0] == 3:
        state.update({f"{i}.{k}": v.clone() for i, n in enumerate(nets) for k, v in n.named_parameters()}, c=c.clone())
        centers.append(c)
        if os.environ["RANK"] == "1" and WHERE == "gradient":
            student.image.register_hook(lambda g: g * float("nan"))
        elif os.environ["RANK"] == "1":
            local = local * float("nan")
    return whole, local
state, gld.Network, gld.distillation_loss = {}, build, poisoned
code = gld.main(sys.argv[1:])
now = {f"{i}.{k}": v for i, net in enumerate(nets) for k, v in net.named_parameters()} | dict(c=centers[0])
assert seen == [3] and len(state) > 20 and all(torch.equal(now[k], v) for k, v in state.items()), "touched"
os.write(1, b"untouched %d " % code)
sys.exit(code)
"""
    for where, words in (("loss", "local loss is nan at step 2"), ("gradient", "gradient is nan at step 2")):
        source = script.replace("WHERE", repr(where)).replace("HERE", repr(str(HERE)))
        (tmp_path / f"{where}.py").write_text(source)
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{where}.py", *QUICK.split()]
        command += ["--device", "cpu"]
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert words in done.stderr and done.stdout.count("untouched 1") == 2, done.stdout + done.stderr
        assert "lr 0" in done.stderr and not (tmp_path / "output/checkpoint.pt").exists()


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path):
    """No file may grow past 100 kB, as if the disk were full there; then it has room again."""
    options = f"gld.py {QUICK} --epochs 3"
    full = launch(options, tmp_path, preexec_fn=lambda: limit_files(100_000))
    said = full.communicate(timeout=120)[0]
    assert full.returncode == 1 and said.count("cannot write output/checkpoint.pt") == 3 and "Traceback" not in said, (
        said
    )
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["log.jsonl"] and "epoch 2 step 90" in said
    # room for the first checkpoint only: that one stays whole, and is where the run continues
    assert run(f"{options} --max-steps 30", tmp_path).returncode == 0
    before = (tmp_path / "output/checkpoint.pt").read_bytes()
    full = launch(options, tmp_path, preexec_fn=lambda: limit_files(100_000))
    assert "cannot write" in full.communicate(timeout=120)[0] and full.returncode == 1
    assert (tmp_path / "output/checkpoint.pt").read_bytes() == before
    done = run(options, tmp_path)
    assert done.returncode == 0 and "from step 30" in done.stdout and checkpoint(tmp_path / "output")["step"] == 90
    assert run(f"{options} --output whole", tmp_path).returncode == 0
    same_weights(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "output"), rtol=0, atol=0)


def test_a_full_disk_that_gets_room_again(tmp_path, monkeypatch):
    """The second save works where the first did not, and the run ends well."""
    calls, write = [], torch.save

    def full_at_first(content, file):
        calls.append(file)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", full_at_first)
    done = run(f"gld.py {QUICK} --epochs 2", tmp_path)
    assert done.returncode == 0 and done.stderr.count("No space left on device") == 1
    assert checkpoint(tmp_path / "output")["step"] == 60


def test_a_dead_worker_ends_the_run_with_a_line(tmp_path):
    process = launch(f"gld.py {QUICK.replace('--workers 0', '--workers 2')} --epochs 50", tmp_path)
    wait_for(process, "step 1 ")
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "gld.py: error: a process that cuts views died" in said, said
    assert "Traceback" not in said and len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_dead_rank_ends_the_job_or_restarts_it(tmp_path, restarts):
    # torchrun's shared store leaves the addresses of the dead processes to the new ones, who then wait for them
    environment = os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    process = launch(f"gld.py {QUICK} --epochs 4", tmp_path, processes=2, restarts=restarts, env=environment)
    wait_for(process, "epoch 1 step 30")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    if not restarts:
        assert process.returncode == 1 and "error: another process of this run died" in said, said
    else:
        assert process.returncode == 0 and re.search("from step (15|30|45)", said), said
        one = run(f"gld.py {QUICK.replace('size 8', 'size 16')} --epochs 4 --output one", tmp_path)
        assert one.returncode == 0
        assert checkpoint(tmp_path / "one")["step"] == checkpoint(tmp_path / "output")["step"] == 60


def test_a_program_with_a_loader_left_over_ends(tmp_path):
    """Python joins the workers that are left at its exit: they must go when told so, and at once where a run failed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.png").write_text("not an image")
    process = launch("gld.py --data data --preset small --batch-size 1 --workers 1", tmp_path)
    said = process.communicate(timeout=25)[0]
    assert process.returncode == 2 and "cannot be read" in said
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import gld
cfg = gld.parse_arguments(["--workers", "1"])
left = iter(gld.make_loader(gld.load_images("shapes", "train", 0.1), cfg, 0, 1, range(50), 7))
next(left)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=90)


def test_backbone_loads_into_torchvision(tmp_path):
    options = f"gld.py {QUICK} --max-steps 1 --batch-size 2 --global-size 64 --local-size 32 --local-views 1"
    for arch, make, head in (
        ("swin_t", torchvision.models.swin_t, "head."),
        ("resnet50", torchvision.models.resnet50, "fc."),
        ("vit_base", lambda: torchvision.models.VisionTransformer(64, 16, 12, 12, 768, 3072), "heads."),
    ):
        if arch != "vit_base":
            assert run(f"{options} --arch {arch} --output {arch}", tmp_path).returncode == 0
            state = torch.load(tmp_path / arch / "backbone.pt", weights_only=True)
        else:
            state = gld.Backbone(arch, 64, 16).net.state_dict()
        missing, unexpected = make().load_state_dict(state, strict=False)
        assert not unexpected and missing and all(key.startswith(head) for key in missing)


REFUSED = {
    "--matching nearest": "--matching",
    "--arch vgg": "--arch",
    "--epochs 0": "--epochs",
    "--lr nan": "--lr",
    "--lr -1": "--lr",
    "--teacher-temp 0": "--teacher-temp",
    "--warmup-teacher-temp -1": "--warmup-teacher-temp",
    "--global-scale 0.9 0.4": "--global-scale",
    "--local-scale 0 0.4": "--local-scale",
    "--global-size 33": "multiple of 8",
    "--local-size 0": "--local-size",
    "--data-fraction 0": "--data-fraction",
    "--data-fraction 1.5": "--data-fraction",
    "--warmup-epochs 5 --epochs 3": "--warmup-epochs",
    "--batch-size 5000": "--batch-size",
    "--data nowhere": "nowhere",
    "--device cuda": "CUDA",
    "--precision fp16": "fp16",
    "--teacher-momentum 1.1": "--teacher-momentum",
    "--workers -1": "--workers",
    "--init-from nowhere.pt": "nowhere.pt",
    f"--output {__file__}": "not a folder",
    "--max-steps 0": "--max-steps",
    "--unknown": "--unknown",
    "--lr abc": "--lr",
    "--benchmark 0": "--benchmark",
    "--impl triton": "--impl triton",
    "--data .": "no images",
    "--blur-sigma 0 1": "--blur-sigma",
    "--drop-path 1": "--drop-path",
    "--output /proc/nowhere": "--output",
    f"--output {__file__}/below": "--output",
}


@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, options):
    if torch.cuda.is_available() and REFUSED[options] in ("CUDA", "fp16", "--impl triton"):
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gld.main(options.split()) == 2
    out = capsys.readouterr()
    assert REFUSED[options] in out.err and out.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_continuing_with_another_method_is_refused(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    for option, word in (
        ("--matching none", "--matching"),
        ("--out-dim 128", "--out-dim"),
        ("--lr 1", "--lr"),
        ("--batch-size 4", "images per step"),
    ):
        done = run(f"gld.py {QUICK} --max-steps 1 {option}", tmp_path)
        assert (
            done.returncode == 2 and done.stderr.startswith(f"gld.py: error: {word}") and done.stderr.count("\n") == 1
        )
    assert "nothing left" in run(f"gld.py {QUICK} --max-steps 1", tmp_path).stdout
    assert run(f"gld.py {QUICK} --max-steps 1 --matching none --no-resume", tmp_path).returncode == 0


class Hostile:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_checkpoint_is_data_not_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    torch.save({"student": Hostile()}, "output/checkpoint.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Hostile()))
    Path("text.pt").write_text("hello")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"options": {}}, "empty.pt")
    torch.save({"options": {"arch": "os.system", "global_size": 32, "patch_size": 8}, "teacher": {}}, "odd.pt")
    torch.save({"student": 1, "teacher": 2}, "numbers.pt")
    whole = io.BytesIO()
    torch.save({"student": {"weight": torch.zeros(1000)}}, whole)
    Path("cut.pt").write_bytes(whole.getvalue()[:2000])
    assert gld.main([]) == 2 and gld.main(["--init-from", "pickle.pt", "--no-resume"]) == 2
    for name in ("output/checkpoint.pt", "pickle.pt", "text.pt", "tensor.pt", "empty.pt", "odd.pt", "cut.pt"):
        assert eval_knn.main(["--checkpoint", name]) == 2, name
    for name in ("tensor.pt", "empty.pt", "numbers.pt", "cut.pt"):
        assert gld.main(["--init-from", name, "--no-resume", "--output", "other"]) == 2, name
        Path("output/checkpoint.pt").write_bytes(Path(name).read_bytes())
        assert gld.main([]) == 2, name
    assert not Path("harmed").exists()


def test_init_from_takes_both_networks(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 2 --output a", tmp_path).returncode == 0
    assert (
        run(
            f"gld.py {QUICK} --max-steps 1 --output b --init-from a/checkpoint.pt --lr 0 --min-lr 0 --weight-decay 0",
            tmp_path,
        ).returncode
        == 0
    )
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert b["step"] == 1 and all(torch.equal(a["student"][k], b["student"][k]) for k in a["student"] if "head" in k)
    done = run(f"gld.py {QUICK} --max-steps 1 --output c --init-from a/backbone.pt", tmp_path)
    assert done.returncode == 2 and "student" in done.stderr


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("queries", [1, 32, 101])
def test_knn_equals_brute_force(queries, monkeypatch):
    monkeypatch.setattr(eval_knn, "CHUNK_BYTES", 4 * 60 * 7)  # seven queries at a time
    g = torch.Generator().manual_seed(queries)
    train, val = (F.normalize(torch.randn(n, 16, generator=g), dim=1).half() for n in (60, queries))
    labels, truth = torch.randint(0, 9, (60,), generator=g), torch.randint(0, 9, (queries,), generator=g)
    found = eval_knn.knn(train, labels, val, truth, [1, 3, 10, 200], 0.07)
    for k in (1, 3, 10, 200):
        top1 = top5 = 0
        for x, label in zip(val, truth):
            similarity = (train @ x).float()
            votes = {}
            for i in similarity.argsort(descending=True)[:k].tolist():
                votes[labels[i].item()] = votes.get(labels[i].item(), 0) + math.exp(similarity[i] / 0.07)
            ranked = sorted(votes, key=votes.get, reverse=True)[:5]
            top1, top5 = top1 + (ranked[0] == label), top5 + (label.item() in ranked)
        assert math.isclose(found[k][0], 100 * top1 / queries, abs_tol=1e-3), k
        assert math.isclose(found[k][1], 100 * top5 / queries, abs_tol=1e-3), k


def test_linear_probe_learns_what_is_linear():
    g = torch.Generator().manual_seed(0)
    train, val = (F.normalize(torch.randn(n, 16, generator=g), dim=1).half() for n in (600, 200))
    labels, truth = (x[:, :7].argmax(1) for x in (train, val))
    top1, top5 = eval_knn.linear_probe(train, labels, val, truth)
    assert top1 > 85 and top5 > 99


def official_swin(net):
    """The official code's names for torchvision's Swin weights."""
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("features.0.0", "patch_embed.proj").replace("features.0.2", "patch_embed.norm")
        key = re.sub(r"features\.([1357])\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.", key)
        key = re.sub(r"features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.", key)
        key = key.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
        state[f"module.backbone.{key}"] = value.view(49, 49) if key.endswith("position_index") else value
    return state | {
        "module.backbone.layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "module.head.mlp.0.weight": torch.zeros(2, 2),
        "module.head_dense.mlp.0.weight": torch.zeros(2, 2),
    }


def test_foreign_weights_load_strictly(tmp_path):
    x = torch.randn(2, 3, 64, 64)
    swin = gld.Backbone("swin_t")
    torch.save(
        {"teacher": official_swin(swin.net), "args": argparse.Namespace(arch="swin"), "epoch": 1},
        tmp_path / "official.pt",
    )
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "torchvision.pt")
    torch.save(gld.Backbone("vit_tiny", 64, 16).net.state_dict(), tmp_path / "backbone.pt")
    found, size, options = eval_knn.load_backbone(tmp_path / "official.pt")
    assert found.arch == "swin_t" and size == 224 and options == {}
    torch.testing.assert_close(found.eval()(x)[0], swin.eval()(x)[0])
    assert eval_knn.load_backbone(tmp_path / "torchvision.pt")[0].arch == "resnet50"
    vit, size, _ = eval_knn.load_backbone(tmp_path / "backbone.pt")
    assert (vit.arch, vit.patch_size, size) == ("vit_tiny", 16, 64)
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    state["extra.weight"] = state.pop("encoder.ln.weight")
    torch.save(state, tmp_path / "wrong.pt")
    with pytest.raises(gld.BadInput, match="encoder.ln.weight.*extra.weight"):
        eval_knn.load_backbone(tmp_path / "wrong.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "odd.pt")
    with pytest.raises(gld.BadInput, match="none of conv_tiny"):
        eval_knn.load_backbone(tmp_path / "odd.pt")


def test_several_processes_evaluate_as_one(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    evaluate = "eval_knn.py --workers 0 --k 3 20 --json"
    for processes, file in ((1, "one.json"), (2, "two.json")):
        done = run(f"{evaluate} {file}", tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in ("output/checkpoint.pt", "untrained", "raw pixels"))
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two and one["train"] == 240 and one["val"] == 1200


def test_several_checkpoints_in_one_table_with_mean_and_deviation(tmp_path):
    for seed in (0, 1, 2):
        options = f"gld.py {QUICK} --data-fraction 0.02 --seed {seed} --output {seed}"
        assert run(options, tmp_path).returncode == 0
    assert run(f"gld.py {QUICK} --data-fraction 0.02 --matching none --output none", tmp_path).returncode == 0
    files = " ".join(f"{name}/checkpoint.pt" for name in (0, 1, 2, "none"))
    done = run(f"eval_knn.py --checkpoint {files} --k 5 --workers 0 --json table.json", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table.json").read_text())
    top1 = np.array([found[f"{seed}/checkpoint.pt"]["5-NN"][0] for seed in (0, 1, 2)])
    lines = [line for line in done.stdout.splitlines() if "seeds" in line]
    assert len(set(top1)) > 1 and len(lines) == 1 and lines[0].startswith("geometric, 3 seeds")
    assert f"5-NN {top1.mean():.2f} ± {top1.std(ddof=1):.2f}" in lines[0]
    assert all(name in found for name in ("none/checkpoint.pt", "untrained", "raw pixels"))


def test_evaluation_reads_an_archive(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    for split in ("train", "val"):
        for name in ("a", "b"):
            save_pictures(tmp_path / "data" / split / name, 4)
    archive = pack(tmp_path / "data.tar", tmp_path / "data")
    scores = []
    for data, file in ((archive, "tar.json"), (tmp_path / "data", "folder.json")):
        done = run(f"eval_knn.py --data {data} --k 3 --linear --workers 0 --json {file}", tmp_path)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((tmp_path / file).read_text())["output/checkpoint.pt"])
    assert scores[0] == scores[1]
    done = run(f"eval_knn.py --data {pack(tmp_path / 'one.tar', tmp_path / 'data/val')} --k 3", tmp_path)
    assert done.returncode == 2 and "must hold train/" in done.stderr


def test_evaluation_needs_both_splits_and_matches_classes_by_name(tmp_path):
    assert run(f"gld.py {QUICK} --max-steps 1", tmp_path).returncode == 0
    for name, value in (("train/a", 40), ("train/b", 120), ("train/c", 220), ("val/a", 40), ("val/c", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        pixels = np.random.default_rng(value).integers(value - 20, value + 20, (40, 40, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / "1.png")
    done = run("eval_knn.py --data data --k 1 --workers 0 --json knn.json", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "knn.json").read_text())["output/checkpoint.pt"]["1-NN"][0] == 100
    for folder, words in (("data/train", "must hold train/"), ("data/val/a", "must hold train/")):
        done = run(f"eval_knn.py --data {folder}/..".replace("train/..", "train/a"), tmp_path)
        assert done.returncode == 2 and words in done.stderr


def test_the_built_in_run_learns(tmp_path):
    """The README's first two commands, with fewer epochs: far above the untrained network and raw pixels even so."""
    assert run("gld.py --epochs 7", tmp_path).returncode == 0
    assert run("eval_knn.py --k 20 --json knn.json", tmp_path).returncode == 0
    top1 = {
        name: values["20-NN"][0]
        for name, values in json.loads((tmp_path / "knn.json").read_text()).items()
        if name in ("output/checkpoint.pt", "untrained", "raw pixels")
    }
    print(top1)
    trained = top1.pop("output/checkpoint.pt")
    assert trained > top1["untrained"] + 15 and trained > top1["raw pixels"] + 10, (trained, top1)


# ------------------------------------------------------------------------------------------------ README


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    return [line for line in lines if re.search(r"\b(gld|eval_knn)\.py", line)]


def test_the_readmes_commands_run(tmp_path):
    """Every command of the README that names a script, at a small size: its options must exist and go together."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "IMAGES" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "IMAGES" / split / name / f"{i}.png")
    shorter = "--no-resume --batch-size 2 --workers 0 --max-steps 1 --global-size 32 --local-size 32 --local-views 1 --out-dim 64"
    commands = readme_commands()
    assert len(commands) >= 5
    launched = set()
    for command in commands:
        for name, value in {r"\$TINY": "IMAGES", r"\$matching": "none", r"\$\w+": "1"}.items():
            command = re.sub(name, value, command)
        command = re.sub(r"(PATH/TO/)?(IMAGENET|IMAGES)\b", "IMAGES", command).rstrip("'")
        # the first torchrun line of each script as two processes; the others differ in options only
        script = re.search(r"\b(gld|eval_knn)\.py", command)[0]
        processes = 2 if command.startswith("torchrun") and script not in launched else 1
        launched |= {script} if processes == 2 else set()
        words = shlex.split(command[re.search(r"\b(gld|eval_knn)\.py", command).start() :].split("&&")[0])
        words = [name for word in words for name in (sorted(glob.glob(word, root_dir=tmp_path)) or [word])]
        words += shorter.split() if words[0] == "gld.py" else ["--k", "3", "--workers", "0"]
        words += ["--benchmark", "1"] if "--benchmark" in words else []
        if words[0] == "gld.py" and "--data" not in words:
            words += ["--local-size", "16"]
        done = run(words, tmp_path, processes=processes)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
