# SPDX-License-Identifier: MIT
"""All tests: python -m pytest -q. They need no GPU and no network; the official reference outputs are used if present.

Sections: helpers, matching, loss, Triton kernels, the CUDA path without a GPU, views, images, networks, training,
faults, bad input, evaluation, README.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"     # also in subprocesses: threads that share a core wait for each other
import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
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
import weakref
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():       # before Triton is imported: the kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
import torchvision
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

import eval_knn
import gld
import matching_kernels as mk
from matching_kernels import (geometric_matches, head_cross_entropy, local_cross_entropy, reference_cross_entropy,
                              similarity_matches)

HERE = Path(__file__).resolve().parent
with warnings.catch_warnings():         # the mark is not registered, as there is no file for settings
    warnings.simplefilter("ignore")
    bench = pytest.mark.bench
GOLDEN = Path(os.environ.get("GLD_GOLDEN", HERE.parent / "shared" / "golden"))
TEMPS = dict(student_temp=0.1, teacher_temp=0.04)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = ("--data-fraction 0.1 --batch-size 8 --workers 0 --epochs 1 --warmup-epochs 0 --local-views 1 --out-dim 16 "
         "--head-hidden 16 --eval-every 0")            # 30 steps, where learning is not the point
needs_triton = pytest.mark.skipif(mk.triton is None, reason="no Triton here")
torch.set_num_threads(1)
gld.draw_shapes = functools.cache(gld.draw_shapes)     # drawn once for all tests


# ------------------------------------------------------------------------------------------------ helpers

def run(command, cwd, processes=1):
    """Run a script as a user does: returncode, stdout, stderr. One process runs in this one; several are forked.

    Forked processes find each other by the variables that torchrun sets. Returns the output of all of them.
    """
    words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    words += [] if "--device" in words else ["--device", "cpu"]
    script = {"gld.py": gld, "eval_knn.py": eval_knn}[words[0]]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        files = [tempfile.TemporaryFile("w+") for _ in range(2)]
        def work(rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost",
                              MASTER_PORT=str(port))
            os.chdir(cwd)
            for file, number in zip(files, (1, 2)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = script.main(words[1:])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

        started = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(processes)]
        [process.start() for process in started]
        [process.join(120) for process in started]
        [process.kill() for process in started]
        for file in files:
            file.seek(0)
        return argparse.Namespace(returncode=max(process.exitcode for process in started), stdout=files[0].read(),
                                  stderr=files[1].read(), codes=[process.exitcode for process in started])
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = script.main(words[1:])
    finally:
        os.chdir(before)
    return argparse.Namespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def train_ok(options, cwd, processes=1):
    """gld.py with QUICK and these options must succeed. Returns: the finished run."""
    done = run(f"gld.py {QUICK} {options}", cwd, processes)
    assert done.returncode == 0, options + done.stdout + done.stderr
    return done


def launch(words, cwd, processes=1, restarts=0, **kwargs):
    """Start a script, under torchrun if there are several processes; its output and errors are one stream."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += [f"--max-restarts={restarts}"]
    words = [*words.split(), "--device", "cpu"]
    command = [sys.executable, "-u", *(torchrun if processes > 1 else []), HERE / words[0], *words[1:]]
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) | kwargs
    return subprocess.Popen(command, cwd=cwd, **kwargs)


def wait_for(process, words):
    """Read the output of a process until it holds `words`; returns what was read."""
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
    found = {}
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit():
                found[int(path.name)] = int(re.search(r"\) \S (\d+)", (path / "stat").read_text())[1])
    return sorted(child for child, parent in found.items() if parent == pid)


def config(*arguments):
    return gld.parse_arguments(["--workers", "0", *map(str, arguments)])


def checkpoint(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True, map_location="cpu")


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same_weights(a, b):
    """Both networks and the centres of two checkpoints are equal, bit for bit."""
    for name in ("student", "teacher"):
        for key, value in a[name].items():
            assert torch.equal(value, b[name][key]), f"{name}.{key}"
    assert torch.equal(a["centers"], b["centers"]) and a["step"] == b["step"]


def save_pictures(folder, n, size=(40, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")


def pack(path, folder, mode="w"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname="set")
    return str(path)


def random_boxes(*shape, size=500, seed=0):
    """Boxes with fractional sides, so that no centre lies exactly on a border; about half of them flipped."""
    g = torch.Generator().manual_seed(seed)
    top, left, height, width = (torch.rand(*shape, generator=g) * size + low for low in (0, 0, 20, 20))
    return torch.stack([top, left, height, width, (torch.rand(*shape, generator=g) < 0.5).float()], -1)


def centres(box, grid):
    """Brute force: (rows * cols, 2) y and x of every patch centre, float64, one box at a time."""
    top, left, height, width, flip = box.double().tolist()
    out = []
    for r, c in np.ndindex(*grid):
        shown = grid[1] - 1 - c if flip else c
        out.append((top + (r + 0.5) * height / grid[0], left + (shown + 0.5) * width / grid[1]))
    return torch.tensor(out, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ matching

@pytest.mark.parametrize("s_grid,t_grid", [((7, 7), (7, 7)), ((3, 3), (7, 7)), ((1, 1), (7, 7)), ((3, 3), (1, 1)),
                                           ((2, 5), (4, 3)), ((6, 2), (1, 9)), ((1, 1), (1, 1))])
def test_geometric_match_equals_brute_force(s_grid, t_grid):
    student, teacher = random_boxes(60, seed=1), random_boxes(60, seed=2)
    index, weight = geometric_matches(student, teacher, s_grid, t_grid)
    _, ones = geometric_matches(student, teacher, s_grid, t_grid, hinge=False)
    assert index.dtype == torch.int64 and weight.dtype == torch.float32 and (ones == 1).all()
    halfdiag2 = [(b[:, 2].double() / g[0] / 2) ** 2 + (b[:, 3].double() / g[1] / 2) ** 2
                 for b, g in ((student, s_grid), (teacher, t_grid))]
    limit = torch.maximum(*halfdiag2)
    for i in range(60):
        dist2 = torch.cdist(centres(student[i], s_grid), centres(teacher[i], t_grid)).square()
        nearest, argmin = dist2.min(1)
        chosen = dist2.gather(1, index[i][:, None])[:, 0]
        torch.testing.assert_close(chosen, nearest, rtol=1e-6, atol=1e-6)
        two = dist2.topk(min(2, dist2.shape[1]), largest=False)[0]
        clear = two[:, -1] - two[:, 0] > 1e-6 if dist2.shape[1] > 1 else torch.ones(len(dist2), dtype=bool)
        assert (index[i] == argmin)[clear].all()
        assert ((nearest < limit[i]) == (weight[i] > 0))[(nearest - limit[i]).abs() > 1e-6].all()
    if t_grid == (7, 7) and s_grid != (1, 1):
        assert 0 < weight.mean() < 1


def test_ties_go_to_the_lower_and_right_cell_and_leading_shapes_broadcast():
    box = torch.tensor([10.0, 20, 60, 60, 0])
    assert geometric_matches(box, box, (1, 1), (2, 2))[0].tolist() == [3]
    for size in range(1, 600, 7):       # thirds, sevenths: an exact tie stays one in floating point
        box = torch.tensor([5.0, 3, size, size, 0])
        assert geometric_matches(box, box, (3, 3), (6, 6))[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]
    student, teacher = random_boxes(3, 1, 4), random_boxes(1, 2, 4, seed=3)
    index, weight = geometric_matches(student, teacher, (2, 3), (3, 2))
    assert index.shape == weight.shape == (3, 2, 4, 6)
    one, one_weight = geometric_matches(student[2, 0, 1], teacher[0, 1, 1], (2, 3), (3, 2))
    assert torch.equal(index[2, 1, 1], one) and torch.equal(weight[2, 1, 1], one_weight)


def test_flipping_a_view_flips_its_matches():
    student, teacher = random_boxes(50, seed=4), random_boxes(50, seed=5)
    student[:, 4] = teacher[:, 4] = 0
    flipped_s, flipped_t = student.clone(), teacher.clone()
    flipped_s[:, 4] = flipped_t[:, 4] = 1
    index, weight = (x.view(50, 3, 4) for x in geometric_matches(student, teacher, (3, 4), (5, 6)))
    flipped, flipped_weight = (x.view(50, 3, 4) for x in geometric_matches(flipped_s, teacher, (3, 4), (5, 6)))
    assert torch.equal(flipped.flip(-1), index) and torch.equal(flipped_weight.flip(-1), weight)
    other = geometric_matches(student, flipped_t, (3, 4), (5, 6))[0].view(50, 3, 4)
    assert torch.equal(other // 6, index // 6) and torch.equal(5 - other % 6, index % 6)


def test_similarity_match_is_the_argmax_of_the_cosine():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(3, 1, 2, 5, 8, generator=g), torch.randn(1, 2, 2, 7, 8, generator=g)
    index = similarity_matches(s, 10 * t * torch.rand(7, 1, generator=g))
    assert index.shape == (3, 2, 2, 5)
    for v, q, b, n in np.ndindex(3, 2, 2, 5):
        assert index[v, q, b, n] == F.cosine_similarity(s[v, 0, b, n][None], t[0, q, b], dim=1).argmax()
    with pytest.raises(ValueError, match=r"\(5, 8\).*\(7, 9\)"):
        similarity_matches(torch.zeros(5, 8), torch.zeros(7, 9))


# ------------------------------------------------------------------------------------------------ the loss

def oracle(s, t, center, index=None, skip_same_view=False, student_boxes=None, teacher_boxes=None, student_grid=None,
           teacher_grid=None, hinge=True, **temps):
    """The definition of the loss in float64. Matches by boxes are tested against brute force above."""
    if student_boxes is not None:
        index, weight = geometric_matches(student_boxes[:, None], teacher_boxes, student_grid, teacher_grid, hinge)
    else:
        if index is None:
            index = torch.zeros(len(s), len(t), *s.shape[1:3], dtype=torch.int64, device=s.device)
        weight = torch.ones(index.shape, device=s.device)
    if skip_same_view:
        for v in range(min(weight.shape[:2])):
            weight[v, v] = 0
    return reference_cross_entropy(s.double(), t.double(), center.double(), index=index.long(), weight=weight.double(),
                                   **TEMPS | temps)


def case(V=3, Q=2, B=2, s_grid=(3, 3), t_grid=(4, 2), K=37, seed=0):
    """Logits and a centre, and boxes with grids, on the device."""
    g = torch.Generator().manual_seed(seed)
    Ns, Nt = math.prod(s_grid), math.prod(t_grid)
    tensors = (torch.randn(V, B, Ns, K, generator=g) / 2, torch.randn(Q, B, Nt, K, generator=g) / 4,
               torch.randn(K, generator=g) / 4)
    boxes = dict(student_boxes=random_boxes(V, B, seed=seed + 1, size=60).to(DEVICE), student_grid=s_grid,
                 teacher_boxes=random_boxes(Q, B, seed=seed + 2, size=60).to(DEVICE), teacher_grid=t_grid)
    return [x.to(DEVICE) for x in tensors], boxes


def far_away(boxes):
    return boxes | dict(teacher_boxes=boxes["teacher_boxes"] + torch.tensor([1e4, 1e4, 0, 0, 0], device=DEVICE))


def test_the_reference_is_the_definition_patch_by_patch():
    (s, t, c), boxes = case()
    index, weight = geometric_matches(boxes["student_boxes"][:, None], boxes["teacher_boxes"], (3, 3), (4, 2))
    expected = 0
    for v, q, b, n in np.ndindex(3, 2, 2, 9):
        p = torch.softmax((t[q, b, index[v, q, b, n]] - c) / 0.04, -1)
        expected -= weight[v, q, b, n] * (p * torch.log_softmax(s[v, b, n] / 0.1, -1)).sum() / (2 * 9)
    torch.testing.assert_close(reference_cross_entropy(s, t, c, 0.1, 0.04, index, weight), expected)


@pytest.mark.parametrize("hinge,skip", [(True, False), (True, True), (False, True)])
def test_loss_and_gradient_equal_the_definition(hinge, skip):
    (s, t, c), boxes = case()
    index = torch.randint(0, 8, (3, 2, 2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for match_args in (boxes | dict(hinge=hinge), dict(index=index)):
        a, b = s.clone().requires_grad_(), s.double().requires_grad_()
        loss = local_cross_entropy(a, t, c, skip_same_view=skip, impl="torch", **TEMPS, **match_args)
        truth = oracle(b, t, c, skip_same_view=skip, **match_args)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        found, expected = torch.autograd.grad(3 * loss, a)[0].double(), torch.autograd.grad(3 * truth, b)[0]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        with torch.no_grad():
            again = local_cross_entropy(s, t, c, skip_same_view=skip, impl="torch", **TEMPS, **match_args)
        assert torch.equal(again, loss)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_matched_infinities_and_nans(impl):
    (s, t, c), boxes = case(V=2, B=1, s_grid=(2, 2), t_grid=(2, 2))
    loss = functools.partial(local_cross_entropy, impl=impl, **TEMPS)
    leaf = s.clone().requires_grad_()
    nothing = loss(leaf, t, c, **far_away(boxes))
    assert nothing == 0 and (torch.autograd.grad(nothing, leaf)[0] == 0).all()
    assert loss(s[:, :0], t[:, :0], c, index=torch.zeros(2, 2, 0, 4, dtype=torch.int64, device=DEVICE)) == 0
    single = s[:, :, :1].clone().requires_grad_()
    assert loss(single[:1], t[:1, :, :1], c, skip_same_view=True) == 0      # no pair is left
    # a prototype that student and teacher give -inf adds nothing
    every, keep = boxes | dict(hinge=False), torch.arange(37, device=DEVICE) != 5
    masked = [x.clone() for x in (s, t)]
    masked[0][..., 5] = masked[1][..., 5] = -math.inf
    masked[0].requires_grad_()
    found = loss(*masked, c, **every)
    without = local_cross_entropy(s[..., keep], t[..., keep], c[keep], impl="torch", **TEMPS, **every)
    torch.testing.assert_close(found, without)
    assert torch.autograd.grad(found, masked[0])[0].isfinite().all()
    # a NaN of a matched row stays a NaN
    for which in (0, 1):
        broken = [s.clone(), t.clone()]
        broken[which][0, 0, :, 3] = math.nan
        leaf = broken[0].requires_grad_()
        found = loss(leaf, broken[1], c, **every)
        assert found.isnan() and torch.autograd.grad(found, leaf)[0].isnan().any()
    assert loss(torch.full_like(s, -math.inf), t, c, **every).isnan()
    # a NaN of a masked row, and of a teacher row that only masked rows point to, is ignored
    index, weight = geometric_matches(boxes["student_boxes"][:, None], boxes["teacher_boxes"], (2, 2), (2, 2))
    row = (weight.sum((1, 2)) == 0).nonzero()[0].tolist()
    broken, unused = [s.clone(), t.clone()], set(np.ndindex(2, 4))
    broken[0][row[0], 0, row[1]] = math.nan
    unused -= {(q, index[v, q, 0, n].item()) for v, q, n in np.ndindex(2, 2, 4) if weight[v, q, 0, n]}
    assert any((q, index[v, q, 0, n].item()) in unused for v, q, n in np.ndindex(2, 2, 4))
    for q, n in unused:
        broken[1][q, 0, n] = math.nan
    leaf, plain = broken[0].requires_grad_(), s.clone().requires_grad_()
    found, expected = loss(leaf, broken[1], c, **boxes), loss(plain, t, c, **boxes)
    torch.testing.assert_close(found, expected)
    for upstream in (1.0, math.inf, math.nan):          # a masked row's gradient is 0 in any case
        grad = torch.autograd.grad(found, leaf, torch.tensor(upstream, device=DEVICE), retain_graph=True)[0]
        assert (grad[row[0], 0, row[1]] == 0).all()
        if upstream == 1:
            torch.testing.assert_close(grad, torch.autograd.grad(expected, plain)[0])


def test_loss_dtypes_gradient_flow_and_repeated_backward():
    (s, t, c), boxes = case()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        leaf = s.to(dtype).requires_grad_()
        loss = local_cross_entropy(leaf, t.to(dtype), c, impl="torch", **TEMPS, **boxes)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.autograd.grad(loss, leaf)[0].dtype == dtype
        torch.testing.assert_close(loss.double(), oracle(leaf, t.to(dtype), c, **boxes), rtol=1e-5, atol=0)
    leaves = [x.clone().requires_grad_() for x in (s, t, c)]
    before = [x.detach().clone() for x in leaves]
    loss = local_cross_entropy(*leaves, impl="torch", **TEMPS, **boxes)
    first, *none = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    assert none == [None, None]
    assert torch.equal(torch.autograd.grad(loss, leaves[0])[0], first)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before))


BAD_ARGUMENTS = [
    (dict(teacher=torch.zeros(2, 2, 8, 36)), "differ in B or K.*36"),
    (dict(teacher=torch.zeros(2, 3, 8, 37)), "differ in B"),
    (dict(student=torch.zeros(2, 9, 37)), r"\(V, B, Ns, K\).*\(2, 9, 37\)"),
    (dict(student=[[1.0]]), "student_logits"),
    (dict(center=torch.zeros(36)), "center.*36"),
    (dict(center=None), "center"),
    (dict(student_boxes=torch.zeros(3, 2, 4)), r"student_boxes must be \(3, 2, 5\).*\(3, 2, 4\)"),
    (dict(student_boxes=np.ones((3, 2, 5))), "student_boxes"),
    (dict(student_boxes=torch.zeros(3, 2, 5)), "student_boxes must be finite, with height and width above 0"),
    (dict(teacher_boxes=torch.full((2, 2, 5), math.nan)), "teacher_boxes must be finite"),
    (dict(teacher_boxes=torch.full((2, 2, 5), math.inf)), "teacher_boxes must be finite"),
    (dict(student_grid=(3, 4)), "student_grid"),
    (dict(student_grid=3), "student_grid"),
    (dict(student_grid=(-3, -3)), "student_grid"),
    (dict(teacher_grid=(9, 1)), "teacher_grid"),
    (dict(teacher_grid=None), "all or none"),
    (dict(teacher=torch.zeros(0, 2, 8, 37)), "Q or K is 0"),
    (dict(index=torch.zeros(3, 2, 2, 9, dtype=torch.int64)), "index"),
    (dict(student_temp=0), "student_temp 0"),
    (dict(student=torch.zeros(3, 2, 9, 37, dtype=torch.int64)), "floating"),
    (dict(impl="fast"), "fast"),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on the CPU")
def test_loss_refuses_what_does_not_fit():
    (s, t, c), boxes = case()
    for change, words in BAD_ARGUMENTS:
        arguments = dict(student=s, teacher=t, center=c, **boxes, **TEMPS) | change
        with pytest.raises(ValueError, match=words):
            local_cross_entropy(arguments.pop("student"), arguments.pop("teacher"), **arguments)
    for match_args, words in (({}, "which patches match"), (dict(index=torch.zeros(3, 2, 9).long()), "index must be"),
                              (dict(index=torch.zeros(3, 2, 2, 9)), "integers"),
                              (dict(index=torch.full((3, 2, 2, 9), 8)), r"index must be in \[0, 8\)"),
                              (dict(index=torch.full((3, 2, 2, 9), -1)), r"index must be in \[0, 8\)")):
        for impl in ("torch", "auto") + (("triton",) if mk.triton else ()):
            with pytest.raises(ValueError, match=words):
                local_cross_entropy(s, t, c, impl=impl, **match_args, **TEMPS)
    with pytest.raises(TypeError, match="student_box"):
        local_cross_entropy(s, t, c, student_box=1, **TEMPS)
    z, w = torch.randn(2, 2, 9, 5), torch.randn(37, 5)
    heads = dict(student_weight=w, teacher_z=torch.randn(2, 2, 9, 5), teacher_weight=w, center=torch.zeros(37), **TEMPS)
    for change, words in ((dict(student_weight=w[:, :4]), r"student_weight \(37, D\).*\(37, 4\)"),
                          (dict(teacher_z=torch.randn(2, 1, 9, 5)), "differ in B or K"),
                          (dict(student_z=[]), "student_z"), (dict(student_z=[z], student_grid=[]), "one length"),
                          (dict(student_z=[z, z], index=torch.zeros(2, 2, 2, 9).long()), "must be lists")):
        with pytest.raises(ValueError, match=words):
            head_cross_entropy(**dict(student_z=z, **heads) | change)
    with FakeTensorMode():              # the values of fake boxes cannot be looked at
        geometric_matches(torch.zeros(3, 5), torch.zeros(3, 5), (2, 2), (2, 2))


def golden(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"no reference outputs {path}")
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) if file[k].dtype.kind in "fib" else str(file[k]) for k in file.files}


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", ["distance_hinge.npz", "distance_nohinge.npz", "similarity.npz"])
def test_reference_outputs_of_the_official_loss(name, impl):
    """The whole loss of gld.py: last layers that are the identity turn its bottlenecks into the given logits."""
    if impl == "triton" and DEVICE == "cuda":
        pytest.skip("heads are float16 on a GPU; in the interpreter they are float32")
    g = golden(name)
    boxes = torch.cat([g["boxes"].float(), g["flips"][..., None].float()], -1)
    (V, B), K, grids = boxes.shape[:2], g["student_patch"].shape[1], g["grids"].tolist()
    s_patch, s_cls = (g[k].clone().requires_grad_() for k in ("student_patch", "student_cls"))
    views = [(len(list(same)), side) for side, same in groupby(grids)]

    def split(x):
        parts = x.split([v * B * side ** 2 for v, side in views])
        return [part.view(v, B, side ** 2, -1) for part, (v, side) in zip(parts, views)]

    eye = torch.eye(K)
    student = gld.Outputs(s_cls.view(V, B, 1, K), split(s_patch), split(g["student_feat"]), eye, eye)
    teacher = [g[k].view(2, B, -1, g[k].shape[1]) for k in ("teacher_cls", "teacher_patch", "teacher_feat")]
    teacher = gld.Outputs(teacher[0], [teacher[1]], [teacher[2]], eye, eye)
    centers = torch.cat([g["center_cls"], g["center_patch"]])
    assert math.isclose(g["student_temp"], gld.STUDENT_TEMP, rel_tol=1e-6)
    global_loss, local_loss = gld.distillation_loss(
        student, teacher, centers, boxes, [(side, side) for _, side in views], teacher_temp=float(g["teacher_temp"]),
        matching={"distance": "geometric"}.get(g["matching"], g["matching"]), hinge=bool(g["hinge"]), impl=impl)
    for term, leaf, value, grad in ((global_loss, s_cls, "loss_view", "grad_student_cls"),
                                    (local_loss, s_patch, "loss_region", "grad_student_patch")):
        assert abs(term.item() / g[value].item() - 1) < 1e-5
        error = torch.autograd.grad(term, leaf)[0] - g[grad]
        assert error.norm() < 1e-4 * g[grad].norm() and error.abs().max() < 1e-4 * g[grad].abs().max()
    centers.lerp_(gld.mean_logits(teacher, gld.teacher_means(teacher)), 1 - gld.CENTER_MOMENTUM)
    torch.testing.assert_close(centers, torch.cat([g["new_center_cls"], g["new_center_patch"]]), rtol=1e-4, atol=1e-6)


def test_without_matching_the_loss_is_dinos():
    (s, t, c), _ = case(V=4, s_grid=(1, 1), t_grid=(1, 1))
    eye = torch.eye(37, device=DEVICE)
    global_loss, local_loss = gld.distillation_loss(
        gld.Outputs(s, [], [], eye, None), gld.Outputs(t, [], [], eye, None), c[None], None, [], teacher_temp=0.04,
        matching="none", impl="torch")
    pairs = [(q, v) for q in range(2) for v in range(4) if q != v]
    mean = sum(-(torch.softmax((t[q, :, 0] - c) / 0.04, -1) * torch.log_softmax(s[v, :, 0] / 0.1, -1)).sum(-1).mean()
               for q, v in pairs) / len(pairs)
    torch.testing.assert_close(global_loss, mean)
    assert local_loss == 0


# ------------------------------------------------------------------------------------------------ Triton kernels

def check_triton(s, t, c, match_args, upstream=1.0, skip=False):
    """Errors of Triton's loss and gradient against float64: plain torch's and a rounding are allowed, no more."""
    exact = s.detach().double().requires_grad_()
    truth = oracle(exact, t, c, skip_same_view=skip, **match_args)
    truth_grad = torch.autograd.grad(truth, exact)[0] * upstream
    errors = {}
    for impl in ("torch", "triton"):
        leaf = s.detach().clone().requires_grad_()
        loss = local_cross_entropy(leaf, t, c, skip_same_view=skip, impl=impl, **TEMPS, **match_args)
        grad = torch.autograd.grad(loss, leaf, torch.tensor(float(upstream), device=loss.device))[0]
        assert grad.dtype == s.dtype and grad.shape == s.shape and loss.dtype == torch.float32
        errors[impl] = abs(loss.item() - truth.item()), (grad.double() - truth_grad).abs().max().item()
    rounding = 2e-6 if t.dtype == torch.float32 else 5e-4       # half precision: probabilities are stored to 2^-11
    sizes = truth.abs().item(), truth_grad.abs().max().item()
    for mine, torchs, size in zip(errors["triton"], errors["torch"], sizes):
        assert mine <= 1.1 * torchs + rounding * size, (errors, sizes)


def small_case(**change):
    """Few rows, since the interpreter takes some 20 ms for each."""
    return case(**dict(V=2, B=1, s_grid=(2, 2), t_grid=(2, 2)) | change)


@needs_triton
@pytest.mark.parametrize("K,dtype", [(1, torch.float32), (127, torch.float16), (1000, torch.float32),
                                     (4097, torch.float32), (4097, torch.float16)]
                         + [(65537, torch.float32), (65536, torch.bfloat16)] * (DEVICE == "cuda"))
def test_triton_error_is_no_worse_than_torchs(K, dtype):
    (s, t, c), boxes = small_case(K=K, seed=K)
    check_triton(s.to(dtype), t.to(dtype), c, boxes, upstream=2.0, skip=True)


@needs_triton
@pytest.mark.parametrize("s_grid,t_grid,V,Q", [((1, 1), (7, 7), 3, 2), ((3, 3), (1, 1), 1, 2), ((2, 5), (3, 4), 1, 1),
                                               ((1, 1), (1, 1), 2, 5)])
def test_triton_grids_flips_and_numbers_of_views(s_grid, t_grid, V, Q):
    (s, t, c), boxes = small_case(V=V, Q=Q, s_grid=s_grid, t_grid=t_grid, seed=3, K=19)
    check_triton(s, t, c, boxes, skip=V > 1)
    ties = boxes | {name: boxes[name].round() for name in ("student_boxes", "teacher_boxes")}
    losses = [local_cross_entropy(s, t, c, impl=impl, **TEMPS, **ties) for impl in ("torch", "triton")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_matches_by_index_and_extreme_rows():
    (s, t, c), boxes = small_case(seed=5)
    index = torch.tensor([3, 0, 2, 2], device=DEVICE).expand(2, 2, 1, 4)
    check_triton(s, t, c, dict(index=index), skip=True)
    check_triton(s, t, c, dict(index=index.int()), upstream=65536.0)
    check_triton(s[:, :, :1], t[:, :, :1], c, {}, skip=True)
    every = boxes | dict(hinge=False)
    check_triton(s, t, c, every, upstream=0.5)
    for change in (lambda x: torch.full_like(x, 3.0), lambda x: x + 1e4, lambda x: 1e4 * x):
        leaf = change(s).requires_grad_()
        mine, torchs = (local_cross_entropy(leaf, change(t), c, impl=i, **TEMPS, **every) for i in ("triton", "torch"))
        torch.testing.assert_close(mine, torchs, rtol=2e-3, atol=0.05)      # float32 at 1e5: a step of 0.008
        torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (mine, torchs)), rtol=0.02, atol=0.02)


@needs_triton
def test_triton_layouts_repetition_and_what_it_leaves_alone():
    (s, t, c), boxes = small_case(seed=6)
    loss_of = functools.partial(local_cross_entropy, impl="triton", **TEMPS)
    leaf = s.clone().requires_grad_()
    before = [x.detach().clone() for x in (leaf, t, c)]
    loss, again = loss_of(leaf, t, c, **boxes), loss_of(leaf, t, c, **boxes)
    first = torch.autograd.grad(loss, leaf, torch.ones(1, device=DEVICE).expand(3)[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first) and torch.equal(loss, again)
    assert torch.equal(torch.autograd.grad(again, leaf)[0], first)
    assert all(torch.equal(x, y) for x, y in zip((leaf, t, c), before))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(loss_of(s, t, c, **boxes), loss)
    wide = torch.zeros(2, 4, 1, 50, device=DEVICE)      # another order of the axes, and a slice
    wide[..., 3:40] = s.transpose(1, 2)
    strided = wide.requires_grad_()[..., 3:40].transpose(1, 2)
    other = loss_of(strided, t[:1].expand(2, -1, -1, -1), c, **boxes)
    expected = local_cross_entropy(leaf, t[:1].expand(2, -1, -1, -1), c, impl="torch", **TEMPS, **boxes)
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(torch.autograd.grad(other, wide)[0][..., 3:40].transpose(1, 2),
                               torch.autograd.grad(expected, leaf)[0], rtol=1e-5, atol=1e-7)
    moving = {k: v.clone() if torch.is_tensor(v) else v for k, v in boxes.items()}
    loss = loss_of(leaf, t, c, **moving)
    moving["teacher_boxes"] += 1000                     # a buffer that is reused before the backward pass
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    compiled = torch.compile(lambda s: 2 * loss_of(s, t, c, **boxes), backend="eager")
    assert torch.equal(compiled(s), 2 * loss)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("matches", ["boxes", "index", "single"])
def test_head_loss_equals_the_loss_of_its_logits(impl, matches):
    """Student views of two sizes in one call equal one call of local_cross_entropy for each size."""
    g, B, K, grids = torch.Generator().manual_seed(0), 3, 37, [(2, 1), (1, 1)]
    grids = [(1, 1), (1, 1)] if matches == "single" else grids
    z = [F.normalize(torch.randn(v, B, math.prod(grid), 16, generator=g), dim=-1) for v, grid in zip((2, 1), grids)]
    teacher_z = F.normalize(torch.randn(2, B, math.prod(grids[0]), 16, generator=g), dim=-1)
    w, tw, c = torch.randn(K, 16, generator=g), torch.randn(K, 16, generator=g), torch.randn(K, generator=g) / 4
    z, (teacher_z, w, tw, c) = [x.to(DEVICE) for x in z], (x.to(DEVICE) for x in (teacher_z, w, tw, c))
    boxes = random_boxes(3, B, size=60).to(DEVICE)
    index = [torch.randint(0, teacher_z.shape[2], (len(x), 2, B, x.shape[2]), generator=g).to(DEVICE) for x in z]
    together = dict(boxes=dict(student_boxes=boxes, teacher_boxes=boxes[:2], student_grid=grids, teacher_grid=grids[0]),
                    index=dict(index=index), single={})[matches]
    apart = [dict(together, **{name: part for name, part in (
        ("student_boxes", boxes[:2] if i == 0 else boxes[2:]), ("student_grid", grids[i]), ("index", index[i]))
        if name in together}) for i in (0, 1)]
    leaves = [x.clone().requires_grad_() for x in (*z, w, teacher_z, tw, c)]
    truth = sum(local_cross_entropy(x @ leaves[2].T, teacher_z @ tw.T, c, impl="torch", skip_same_view=i == 0, **TEMPS,
                                    **match_args) for i, (x, match_args) in enumerate(zip(leaves[:2], apart)))
    expected = torch.autograd.grad(3 * truth, leaves[:3])
    off = 1e-4 if DEVICE == "cpu" or impl == "torch" else 1e-2  # on a GPU: float16 logits, bfloat16 gradients
    loss_of = functools.partial(head_cross_entropy, skip_same_view=True, impl=impl, **TEMPS)
    for max_bytes in (512 * 2 ** 20, 1):                # all images at once, one at a time
        loss = loss_of(leaves[:2], *leaves[2:], max_bytes=max_bytes, **together)
        assert (loss - truth).abs() <= off * truth.abs()
        found = torch.autograd.grad(3 * loss, leaves, allow_unused=True, retain_graph=True)
        assert found[3:] == (None, None, None)
        for mine, wanted in zip(found, expected):
            assert (mine - wanted).norm() <= off * wanted.norm()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            torch.testing.assert_close(loss_of(leaves[:2], *leaves[2:], max_bytes=max_bytes, **together), loss)
    # a single tensor; only one of the two needs a gradient
    for which in (0, 2):
        inputs = [leaves[0] if which == 0 else z[0], leaves[2] if which == 2 else w, teacher_z, tw, c]
        alone = loss_of(*inputs, **apart[0])
        wanted = torch.autograd.grad(local_cross_entropy(leaves[0] @ leaves[2].T, teacher_z @ tw.T, c, impl="torch",
                                                         skip_same_view=True, **TEMPS, **apart[0]), leaves[which])[0]
        assert (torch.autograd.grad(alone, leaves[which])[0] - wanted).norm() <= off * wanted.norm()


def test_second_derivatives_are_right_or_refused():
    (s, t, c), boxes = small_case(K=5)
    w, z = torch.randn(5, 3, device=DEVICE).requires_grad_(), torch.randn(2, 1, 4, 3, device=DEVICE)
    for impl in ("torch",) + (("triton",) if mk.triton else ()):
        losses = {s: lambda x: local_cross_entropy(x, t, c, impl=impl, **TEMPS, **boxes),
                  w: lambda x: head_cross_entropy(z, x, z[:2], w.detach(), c, impl=impl, **TEMPS, **boxes)}
        for leaf, loss in losses.items():
            leaf = leaf.detach().requires_grad_()
            if impl == "triton":
                with pytest.raises(RuntimeError, match="impl='torch' is twice differentiable"):
                    torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    loss = functools.partial(local_cross_entropy, teacher_logits=t.double(), center=c, impl="torch", **TEMPS, **boxes)
    assert torch.autograd.gradgradcheck(loss, s.double().requires_grad_())


@needs_triton
def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    tensors, boxes = case(B=1)
    s, t, c = (x.cpu() for x in tensors)
    boxes = {k: v.cpu() if torch.is_tensor(v) else v for k, v in boxes.items()}
    monkeypatch.setattr(mk, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl='triton' needs"):
        local_cross_entropy(s, t, c, impl="triton", **TEMPS, **boxes)
    local_cross_entropy(s, t, c, impl="auto", **TEMPS, **boxes)
    monkeypatch.setattr(mk, "INTERPRETED", True)
    with pytest.raises(ValueError, match="float64"):
        local_cross_entropy(s.double(), t, c, impl="triton", **TEMPS, **boxes)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_triton_beyond_two_to_the_31_elements():
    K, rows = 65536, 33000
    if torch.cuda.mem_get_info()[0] < 30 * 2 ** 30:
        pytest.skip("not enough memory")
    s = torch.randn(1, rows, 1, K, dtype=torch.float16, device=DEVICE).requires_grad_()
    t = torch.randn(1, rows, 1, K, dtype=torch.float16, device=DEVICE)
    loss = local_cross_entropy(s, t, torch.zeros(K, device=DEVICE), impl="triton", **TEMPS)
    (grad,) = torch.autograd.grad(loss * rows, s)
    tail = s.detach()[:, -50:].requires_grad_()
    other = local_cross_entropy(tail, t[:, -50:], torch.zeros(K, device=DEVICE), impl="torch", **TEMPS)
    torch.testing.assert_close(grad[:, -50:], torch.autograd.grad(other * 50, tail)[0], rtol=1e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------------ CUDA without a GPU

COMPILE = r"""
import os, re, subprocess, sys, tempfile
import torch, triton
import matching_kernels as mk
from triton.backends.compiler import GPUTarget

def compiled(part, target, logits="fp16", **changes):
    '''A kernel as it is launched at K = 65536, for a GPU that need not be here.'''
    kernel = mk._teacher_kernel if part == "teacher" else mk._student_kernel
    constants = dict(Q=2, S_ROWS=7, S_COLS=7, T_ROWS=7, T_COLS=7, MODE="hinge", SKIP=0, BLOCK=mk.BLOCK)
    constants |= dict.fromkeys({"forward": ("UPSTREAM", "DS"), "backward": ("LOSS",)}.get(part, ())) | changes
    kinds = dict(S=f"*{logits}", T=f"*{logits}", DS="*bf16" if part == "both" else f"*{logits}", V="i32", B="i32",
                 K="i32", P="*fp32" if logits == "fp32" else "*fp16", scale="fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or name == "K"}
    source = triton.compiler.ASTSource(kernel, signature, attrs=aligned, constexprs={
        (i,): constants[name] for i, name in enumerate(signature) if name in constants})
    return triton.compile(source, target=GPUTarget(*target), options=mk.LAUNCH).asm

def check(part, arch):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(part, ("cuda", arch, 32))["cubin"]), file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        sass = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True).stdout
    # a line is "/*1900*/ @!P0 BRA 0x1140 ;"; a loop ends in a jump back; an instruction is 16 bytes
    code = re.findall(r"/\*(\w{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(?:[^;]*\b(0x[0-9a-f]+))?[^;]*;", sass)
    jumps = [(int(to, 16), int(at, 16)) for at, op, to in code if op.startswith("BRA") and to]
    loops = [(to, at) for to, at in jumps if to < at]
    elements = [((end - start) // 16 + 1) / 8 for start, end in loops if end - start > 150]
    print(f"sm_{arch} {part}: registers", re.search(r"REG:(\d+)", sass)[1], "instructions per element", elements)
    assert not any(op[:3] in ("LDL", "STL") for _, op, _ in code), "spills"
    assert sum("LDG" in op and "128" in op for _, op, _ in code) >= 3, "16-byte loads"
    if part == "forward":
        start, end = max(loops, key=lambda loop: loop[1] - loop[0])
        ops = [op for at, op, _ in code if start <= int(at, 16) <= end]
        loads = [i for i, op in enumerate(ops) if "LDG" in op]
        first = min(i for i, op in enumerate(ops) if "EX2" in op)
        assert max(elements) <= 16 and len(loads) == 3 and max(loads) < first, (elements, loads, first)

for part in ("teacher", "forward", "backward", "both"):
    for arch in (80, 90):
        check(part, arch)
    for target in (("cuda", 100, 32), ("hip", "gfx942", 64)):
        compiled(part, target)

class Driver:
    '''Names a GPU; nothing is executed.'''
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")
    def map_python_to_cpp_type(self, kind): return kind

def launch(kernel, grid):
    return lambda *args, **kwargs: launched.add(kernel.run(*args, grid=grid, warmup=True, **kwargs).hash)

triton.runtime.driver.set_active(Driver())
triton.runtime.JITFunction.__getitem__, mk.INTERPRETED, launched = launch, True, set()
temps = dict(student_temp=torch.tensor(0.1), teacher_temp=0.04)
def local(V, Q, B, grid, K, dtype=torch.float16, index=None, **kwargs):
    n = grid[0] * grid[1]
    s, t = torch.zeros(V, B, n, K, dtype=dtype).requires_grad_(), torch.zeros(Q, B, n, K, dtype=dtype)
    boxes = dict(student_boxes=torch.rand(V, B, 5) + 1, teacher_boxes=torch.rand(Q, B, 5) + 1, student_grid=grid,
                 teacher_grid=grid) if index is None else dict(index=torch.zeros(V, Q, B, n, dtype=index))
    mk.local_cross_entropy(s, t, torch.zeros(K), impl="triton", **temps, **boxes, **kwargs).backward()
for K in (1, 16, 37, 2048):
    local(1, 2, 1, (2, 2), K, skip_same_view=True)
local(1, 1, 1, (1, 1), 1)
local(2, 5, 3, (2, 1), 64, skip_same_view=True, hinge=False)
local(2, 2, 3, (2, 2), 64, torch.bfloat16)
local(2, 2, 3, (2, 2), 64, torch.float32)
for index in (torch.int64, torch.int32, torch.uint8):
    local(2, 2, 3, (2, 2), 64, index=index)
z, w = torch.randn(2, 3, 4, 16).requires_grad_(), torch.randn(64, 16).requires_grad_()
mk.head_cross_entropy([z, z[:, :, :1]], w, z[:2], w, torch.zeros(64), impl="triton", skip_same_view=True, **temps,
                      student_boxes=torch.rand(4, 3, 5) + 1, teacher_boxes=torch.rand(2, 3, 5) + 1,
                      student_grid=[(2, 2), (1, 1)], teacher_grid=(2, 2)).backward()
s, p = torch.zeros(8, 32, 9, 64, dtype=torch.float16), torch.zeros(2, 32, 49, 64, dtype=torch.float16)  # as on a GPU
match = torch.rand(10, 32, 5), 3, 3, 7, 7, "hinge", None
mk._student_rows(s, p, 0.1, match, ds=s.view(torch.bfloat16), upstream=torch.ones(1))
print(len(launched), "variants launched")
assert len(launched) >= 20
"""


@needs_triton
def test_kernels_compile_without_spills_and_launch_for_sm_90():
    """In a process of its own, since this one has the interpreter. Prints the figures of the README's table."""
    if tuple(map(int, mk.triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("triton.compile took other arguments before 3.3")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=HERE, env=environment, text=True, capture_output=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


class NoLaunch:
    """In the place of a kernel: counts the rows it is launched for, and computes nothing."""

    def __init__(self):
        self.rows = 0

    def __getitem__(self, grid):
        self.rows += grid[0]
        return lambda *args, **kwargs: None


@pytest.fixture
def without_kernels(monkeypatch):
    """The launch path on tensors of any device, without launches. Returns: teacher and student kernel."""
    kernels = NoLaunch(), NoLaunch()
    monkeypatch.setattr(mk, "_teacher_kernel", kernels[0], raising=False)
    monkeypatch.setattr(mk, "_student_kernel", kernels[1], raising=False)
    monkeypatch.setattr(mk, "_use_triton", lambda impl, x: impl != "torch")
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    gld.per_channel.cache_clear()       # it may not keep fake tensors
    yield kernels
    gld.per_channel.cache_clear()


def head_inputs(B, K=65536, D=256):
    """The inputs of the local head's loss at the paper's size: 2 global and 8 local views."""
    z = [torch.randn(v, B, n, D).requires_grad_() for v, n in ((2, 49), (8, 9))]
    weight, boxes = torch.randn(K, D).requires_grad_(), torch.rand(10, B, 5) + 1
    geometry = dict(student_boxes=boxes, teacher_boxes=boxes[:2], student_grid=[(7, 7), (3, 3)], teacher_grid=(7, 7))
    return (z, weight, torch.randn(2, B, 49, D), weight.detach(), torch.zeros(K)), geometry


def test_the_teacher_is_computed_once_for_all_views(without_kernels):
    """One call for both sizes of views: teacher rows are counted, and products of the forward pass."""
    flops = []
    with FakeTensorMode():
        args, geometry = head_inputs(B=4)
        head_cross_entropy(*args, impl="triton", skip_same_view=True, **TEMPS, **geometry)
        assert without_kernels[0].rows == 2 * 4 * 49 and without_kernels[1].rows == 4 * (2 * 49 + 8 * 9)
        for calls in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                for sizes in calls:
                    boxes = [geometry["student_boxes"][:2], geometry["student_boxes"][2:]][sizes]
                    part = geometry | dict(student_boxes=torch.cat(boxes), student_grid=geometry["student_grid"][sizes])
                    head_cross_entropy(args[0][sizes], *args[1:], impl="torch", **TEMPS, **part)
            flops.append(counter.get_total_flops())
    assert math.isclose(flops[0] / flops[1], (170 + 98) / (170 + 2 * 98), rel_tol=1e-6)


def test_a_frozen_weight_costs_no_product(without_kernels):
    with FakeTensorMode():
        args, geometry = head_inputs(B=2)
        flops = []
        for frozen in ((), (1,), (0,), (0, 1)):
            inputs = [[z.detach() for z in args[0]] if 0 in frozen else args[0],
                      args[1].detach() if 1 in frozen else args[1], *args[2:]]
            with FlopCounterMode(display=False) as counter:
                head_cross_entropy(*inputs, impl="triton", **TEMPS, **geometry)
            flops.append(counter.get_total_flops() / (2 * 2 * 65536 * 256))
    assert flops == [98 + 3 * 170, 98 + 2 * 170, 98 + 2 * 170, 98 + 170]


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Follows allocations: bytes in live storages now, and at most."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.live.pop(key)


def test_memory_of_the_heads_loss_does_not_grow_with_the_batch(without_kernels):
    """Forward and backward at K = 65536, followed on fake tensors. Prints the figures of the README's table."""
    peaks = {}
    for name, B in itertools.product(("reference", "ours"), (32, 64, 128)):
        with FakeTensorMode():
            (z, weight, teacher_z, teacher_weight, c), geometry = head_inputs(B)
            with Peak() as peak:
                if name == "ours":
                    loss = head_cross_entropy(z, weight, teacher_z, teacher_weight, c, **TEMPS, **geometry)
                else:
                    teacher, loss = teacher_z.half() @ teacher_weight.half().T, 0
                    for x, boxes, grid in zip(z, geometry["student_boxes"].split((2, 8)), geometry["student_grid"]):
                        index, w = geometric_matches(boxes[:, None], boxes[:2], grid, (7, 7))
                        loss = loss + reference_cross_entropy(x.half() @ weight.half().T, teacher, c, index=index,
                                                              weight=w, **TEMPS)
                loss.backward()
        peaks[name, B] = round(peak.peak / 2 ** 30, 2)
    print(peaks)
    assert max(peaks["ours", B] for B in (32, 64, 128)) < 0.8 and peaks["reference", 128] > 20
    with FakeTensorMode():              # five teacher views: the buffers still hold max_bytes at most
        z, teacher_z = torch.randn(5, 64, 49, 256).requires_grad_(), torch.randn(5, 64, 49, 256)
        w = torch.randn(65536, 256)
        index = torch.zeros(5, 5, 64, 49, dtype=torch.int64)
        with Peak() as peak:
            head_cross_entropy(z, w, teacher_z, w, torch.zeros(65536), impl="triton", index=index, **TEMPS)
    assert peak.peak < 1.2 * 512 * 2 ** 20 + z.nbytes


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("arch", ["swin_t", "vit_small", "resnet50"])
def test_a_step_on_a_cuda_device_that_is_not_there(arch, without_kernels, monkeypatch):
    """Fake tensors raise where tensors of two devices meet, as on a GPU. The autograd engine needs a driver: gradients
    are made by hand."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **kwargs: x)
    cfg = config("--data", ".", "--arch", arch, "--out-dim", "1024", "--local-views", "2", "--output", "/tmp/none")
    B, device, sizes = 2, torch.device("cuda", 0), ((2, 224), (2, 96))
    shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    with FakeTensorMode(shape_env=shape_env), torch.device(device):
        student, teacher = gld.Network(cfg, cfg.drop_path), gld.Network(cfg)
        views = [gld.Views(torch.zeros(B, v, 3, side, side, dtype=torch.uint8), torch.rand(B, v, 5) + 1,
                           torch.ones(B, v, 4), torch.zeros(B, v, 4, dtype=torch.int64), torch.zeros(B, v, dtype=bool),
                           torch.ones(B, v), torch.zeros(B, v, dtype=bool)) for v, side in sizes]
        boxes = torch.cat([part.boxes for part in views], 1).transpose(0, 1)
        images = [gld.augment(part, 2.0) for part in views]
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                teacher_out = teacher(images[:1])
            student_out = student(images)
        centers = torch.zeros(2, 1024)
        loss = functools.partial(gld.distillation_loss, student_out, teacher_out, boxes=boxes, grids=gld.grids_of(cfg),
                                 teacher_temp=0.04, matching="geometric")
        total = sum(loss(centers=centers))
        assert total.device == device and total.shape == ()
        with pytest.raises((RuntimeError, ValueError), match="cpu"):       # a tensor that was left behind is noticed
            loss(centers=torch.zeros(2, 1024, device="cpu"))
        assert not hasattr(gld.diagnose(teacher_out, centers, boxes, gld.grids_of(cfg), 0.04, cfg)["entropy"], "device")
        parameters = [p for p in student.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        gld.clip_gradients(parameters, 3.0)
        torch.optim.AdamW(parameters, foreach=True).step()
        with torch.no_grad():
            centers.lerp_(gld.mean_logits(teacher_out, gld.teacher_means(teacher_out)), 0.1)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.1)
        features = teacher.backbone.eval()(gld.normalise(views[0].crops[:, 0].float() / 255))[0]
        assert features.device == centers.device == device and features.shape == (B, teacher.backbone.width)
