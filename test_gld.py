# SPDX-License-Identifier: MIT
"""All tests: python -m pytest -q. No GPU and no network are needed. Sections: helpers, matching, loss, Triton kernels,
CUDA without a GPU, views, images, networks, training, faults, bad input, evaluation, README."""
import os
os.environ["OMP_NUM_THREADS"] = "1"     # also in subprocesses: threads that share a core wait for each other
import argparse
import concurrent.futures
import contextlib
import copy
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
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
if not torch.cuda.is_available():       # before Triton is imported: the kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
import torchvision
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
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
each_impl = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
SIMULATED = "ttsem" in sys.modules      # python -m ttsem.sanitize pytest: tensors on the CPU say that they are on a GPU
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, or one that ttsem simulates")
needs_fake_gpu = pytest.mark.skipif(DEVICE == "cpu" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
                                    reason="a gradient of a fake CUDA tensor asks for a driver in this torch")
torch.set_num_threads(1)
gld.draw_shapes = functools.cache(gld.draw_shapes)     # drawn once for all tests

# ------------------------------------------------------------------------------------------------ helpers

def variables_of_ranks(processes):
    """What torchrun, or the Slurm script in NOTES.md, sets for each of several processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]

def run(command, cwd, processes=1, last=""):
    """Run a script as a user does: returncode, stdout, stderr. One process runs in this one; several are forked, and
    the last one gets the words of `last`, too."""
    if processes > 1:
        return run_forked([command] * (processes - 1) + [f"{command} {last}"], cwd)
    script, *words = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = {"gld.py": gld, "eval_knn.py": eval_knn}[script].main(["--device", "cpu", *words])
    return argparse.Namespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

def run_as(variables, command, cwd):
    """`run` in a forked process."""
    signal.alarm(120)                   # ends it, if it waits for another one without end
    os.environ.update(variables)
    return run(command, cwd)

def run_forked(commands, cwd):
    """`run` for several processes at once; also their `codes`."""
    if DEVICE == "cuda":
        pytest.skip("a process that used autograd on a GPU cannot fork others that use autograd")
    world = len(commands)
    with concurrent.futures.ProcessPoolExecutor(world, multiprocessing.get_context("fork")) as pool:
        done = list(pool.map(run_as, variables_of_ranks(world), commands, [cwd] * world))
    codes = [process.returncode for process in done]
    out, err = ("".join(getattr(process, name) for process in done) for name in ("stdout", "stderr"))
    return argparse.Namespace(returncode=max(codes), codes=codes, stdout=out, stderr=err)

def train_ok(options, cwd, processes=1):
    """gld.py with QUICK and these options must succeed. Returns: the finished run."""
    done = run(f"gld.py {QUICK} {options}", cwd, processes)
    assert done.returncode == 0, options + done.stdout + done.stderr
    return done

def launch(words, cwd, processes=1, restarts=0, **kwargs):
    """Start a script, under torchrun if there are several processes; its output and errors are one stream."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --max-restarts={restarts}".split()
    script, *words = words.split()
    command = [sys.executable, "-u", *(torchrun if processes > 1 else []), HERE / script, *words, "--device", "cpu"]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, **kwargs)

def wait_for(process, words):
    """Read the output of a process until it holds `words`."""
    said = ""
    patience = threading.Timer(200, process.kill)
    patience.daemon = True              # else pytest would wait for it at its end, if this fails
    patience.start()
    while words not in said:
        line = process.stdout.readline()
        assert line, f"ended without {words!r}:\n{said}"
        said += line
    patience.cancel()

def children(pid):
    """Process ids of the children of a process, the oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

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
    assert torch.equal(a["centers"], b["centers"])
    assert a["step"] == b["step"]

def save_pictures(folder, n, size=(40, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")

def save_classes(folder, n):
    """A labelled set: n images in each of two classes, to train on and to evaluate."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        save_pictures(folder / name, n)

def random_boxes(*shape, size=500, seed=0):
    """Boxes with fractional sides, so that no midpoint lies exactly on a border; about half of them flipped."""
    g = torch.Generator().manual_seed(seed)
    top, left, height, width = (torch.rand(*shape, generator=g) * size + low for low in (0, 0, 20, 20))
    flip = (torch.rand(*shape, generator=g) < 0.5).float()
    return torch.stack([top, left, height, width, flip], -1)

# ------------------------------------------------------------------------------------------------ matching

def exact_matches(student_boxes, teacher_boxes, student_grid, teacher_grid, hinge=True):
    """The definition in gld.py, in float64: index and weight (V, Q, B, Ns) for boxes (V, B, 5) and (Q, B, 5)."""
    student, teacher = student_boxes.cpu().double(), teacher_boxes.cpu().double()
    shape = len(student), len(teacher), student.shape[1], -1
    found = [
        gld.nearest_patches(s, t, student_grid, teacher_grid, hinge)
        for of_view in student
        for of_teacher in teacher
        for s, t in zip(of_view, of_teacher)
    ]
    index, weight = (torch.stack(parts).view(shape).to(DEVICE) for parts in zip(*found))
    return index, weight

@pytest.mark.parametrize("hinge", [True, False])
@pytest.mark.parametrize(
    "s_grid,t_grid",
    [
        ((7, 7), (7, 7)),
        ((3, 3), (7, 7)),
        ((6, 2), (1, 9)),
        ((1, 1), (1, 1)),
    ],
)
def test_geometric_match_equals_the_definition(s_grid, t_grid, hinge):
    student = random_boxes(1, 60, seed=1)
    teacher = random_boxes(1, 60, seed=2)
    index, weight = geometric_matches(student, teacher, s_grid, t_grid, hinge)
    exact_index, exact_weight = exact_matches(student, teacher, s_grid, t_grid, hinge)
    assert torch.equal(index, exact_index[0].cpu())
    assert torch.equal(weight, exact_weight[0].cpu().float())
    if hinge:
        assert 0 < weight.mean() < 1

def test_ties_and_leading_shapes():
    for size in range(1, 600, 7):       # thirds, sevenths: an exact tie stays one in floating point
        box = torch.tensor([5.0, 3, size, size, 0])
        index, _ = geometric_matches(box, box, (3, 3), (6, 6))
        assert index.tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]             # the lower and right one of two cells
    grids = (2, 3), (3, 2)
    student = random_boxes(3, 1, 4)
    teacher = random_boxes(1, 2, 4, seed=3)
    index, weight = geometric_matches(student, teacher, *grids)
    assert index.shape == weight.shape == (3, 2, 4, 6)
    one = geometric_matches(student[2, 0, 1], teacher[0, 1, 1], *grids)
    assert_close((index[2, 1, 1], weight[2, 1, 1]), one)

@each_impl
def test_midpoints_at_exactly_half_a_diagonal_do_not_match(impl):
    """Such ties are common in integer boxes. Rounding decided these: the first in Triton, the other in torch."""
    boxes = dict(
        student_boxes=torch.tensor([[[4.0, 5, 21, 11, 0], [33, 12, 25, 36, 0]]], device=DEVICE),
        teacher_boxes=torch.tensor([[[21.0, 4, 11, 24, 0], [12, 39, 31, 7, 0]]], device=DEVICE),
        student_grid=(1, 1),
        teacher_grid=(1, 1),
    )
    _, weight = geometric_matches(**boxes)
    assert (weight == 0).all()
    zeros = torch.zeros(1, 2, 1, 2, device=DEVICE)
    loss = local_cross_entropy(zeros, zeros, zeros[0, 0, 0], **TEMPS, **boxes, impl=impl)
    assert loss == 0

def test_similarity_match_is_the_argmax_of_the_cosine():
    s = torch.randn(3, 1, 2, 5, 8)                      # (V, 1, B, Ns, C)
    t = torch.randn(2, 2, 7, 8)                         # (Q, B, Nt, C)
    cosine = F.cosine_similarity(s[..., None, :], t[:, :, None], dim=-1)
    index = similarity_matches(s, 10 * t * torch.rand(7, 1))
    assert torch.equal(index, cosine.argmax(-1))
    close = F.normalize(1 + torch.randn(50, 64) / 50, dim=-1)
    with torch.autocast("cpu", torch.bfloat16):         # in 16 bits, close features would be one
        assert torch.equal(similarity_matches(close, close), torch.arange(50))

# ------------------------------------------------------------------------------------------------ the loss

def oracle(s, t, center, skip_same_view=False, index=None, weight=None, **boxes):
    """The definition of the loss in float64. Boxes are matched by the definition in gld.py."""
    if boxes:
        index, weight = exact_matches(**boxes)
    if index is None:
        index = torch.zeros(len(s), len(t), *s.shape[1:3], dtype=torch.int64, device=s.device)
    if weight is None:
        weight = torch.ones_like(index)
    weight = weight.double() * (index >= 0)
    if skip_same_view:
        for v in range(min(weight.shape[:2])):
            weight[v, v] = 0
    logits = s.double(), t.double(), center.double()
    return reference_cross_entropy(*logits, *TEMPS.values(), index=index.long().clamp(min=0), weight=weight)

def case(V=2, Q=2, B=1, s_grid=(2, 2), t_grid=(2, 2), K=37, seed=0):
    """Logits, a center, boxes and grids. Few rows, since the interpreter takes some 20 ms for each."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(V, B, math.prod(s_grid), K, generator=g) / 2
    t = torch.randn(Q, B, math.prod(t_grid), K, generator=g) / 4
    center = torch.randn(K, generator=g) / 4
    boxes = dict(
        student_boxes=random_boxes(V, B, seed=seed + 1, size=60).to(DEVICE),
        teacher_boxes=random_boxes(Q, B, seed=seed + 2, size=60).to(DEVICE),
        student_grid=s_grid,
        teacher_grid=t_grid)
    return [x.to(DEVICE) for x in (s, t, center)], boxes

def loss_and_grad(s, t, center, upstream=1.0, **options):
    """Of local_cross_entropy, with the gradient of upstream * loss with respect to the student's logits."""
    leaf = s.detach().clone().requires_grad_()
    loss = local_cross_entropy(leaf, t, center, **TEMPS, **options)
    upstream = torch.tensor(upstream, device=s.device, dtype=loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]

@pytest.mark.parametrize("hinge", [True, False])
def test_losses_equal_the_definition_in_gld(hinge):
    """The whole sum over pairs of views, as a reader finds it in part I. The views are given in two parts. Numbers of
    other types are taken, too."""
    g = torch.Generator().manual_seed(0)
    V, B, K, grid = 5, 3, 11, np.array([3, 2])
    boxes = random_boxes(V, B, size=60)
    student = torch.randn(V, B, 6, K, generator=g).double()
    teacher = torch.randn(2, B, 6, K, generator=g).double()
    center = torch.randn(K, generator=g).double()
    eye = torch.eye(K).double()
    wanted = gld.patch_loss_definition(student, teacher, center, boxes.double(), V * [grid], 0.04, hinge)
    common = dict(
        center=center,
        student_temp=np.float64(0.1),
        teacher_temp=torch.tensor(0.04, dtype=torch.float64),
        student_boxes=boxes,
        teacher_boxes=boxes[:2],
        student_grid=[grid, grid],
        teacher_grid=grid,
        hinge=hinge,
        skip_same_view=True,
    )
    for counts in ((1, 4), (2, 3)):
        parts = student.split(counts)
        by_logits = local_cross_entropy(parts, teacher, **common)
        by_head = head_cross_entropy(parts, eye, teacher, eye, **common)
        assert_close(by_logits / (2 * (V - 1)), wanted)
        assert_close(by_head, by_logits)

@pytest.mark.parametrize("hinge,skip", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_loss_and_gradient_equal_the_definition(hinge, skip, dtype):
    (s, t, c), boxes = case(V=3, B=2, s_grid=(3, 3), t_grid=(4, 2))
    s, t = s.to(dtype), t.to(dtype)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 8, (3, 2, 2, 9), generator=g).to(DEVICE)
    weight = (300 * torch.rand(3, 2, 2, 9, generator=g) - 50).clamp(min=0).to(DEVICE)
    for matches in (
        boxes | dict(hinge=hinge),
        dict(index=index),
        dict(index=index, weight=weight),
    ):
        matches["skip_same_view"] = skip
        loss, grad = loss_and_grad(s, t, c, upstream=3.0, impl="torch", **matches)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert grad.dtype == dtype
        exact = s.double().requires_grad_()
        truth = oracle(exact, t, c, **matches)
        assert_close(loss.double(), truth, rtol=1e-5, atol=0)
        (wanted,) = torch.autograd.grad(3 * truth, exact)
        allowed = 1e-5 + torch.finfo(dtype).eps / 2
        assert (grad - wanted).abs().max() < allowed * wanted.abs().max()

@each_impl
def test_nothing_matched_and_empty_sizes(impl):
    (s, t, c), boxes = case()
    loss_of = functools.partial(loss_and_grad, impl=impl)
    far_away = boxes | dict(teacher_boxes=boxes["teacher_boxes"] + 1e4)
    unmatched = torch.full((2, 2, 1, 4), -1, device=DEVICE)
    for nothing in (far_away, dict(index=unmatched)):
        loss, grad = loss_of(s, t, c, **nothing)
        assert loss == 0
        assert (grad == 0).all()
    # no images, no patches, no pair of views
    loss, grad = loss_of(s[:, :0], t[:, :0], c, index=unmatched[:, :, :0])
    assert loss == 0
    assert grad.shape == (2, 0, 4, 37)
    w = torch.eye(37, device=DEVICE)
    no_patches = dict(index=unmatched[..., :0], impl=impl, **TEMPS)
    assert head_cross_entropy(s[:, :, :0], w, t, w, c, **no_patches) == 0
    loss, _ = loss_of(s[:1, :, :1], t[:1, :, :1], c, skip_same_view=True)
    assert loss == 0
    # a loss that rounds to 0 has a gradient
    sure = torch.tensor([5.0, 0], device=DEVICE).expand(1, 1, 1, 2)
    _, grad = loss_of(sure, sure, torch.zeros(2, device=DEVICE))
    assert_close(grad[0, 0, 0, 1].item(), 10 * math.exp(-50), rtol=1e-3, atol=0)

@each_impl
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinities_and_nans(impl):
    (s, t, c), boxes = case()
    every = boxes | dict(hinge=False)
    loss_of = functools.partial(loss_and_grad, impl=impl)
    # a prototype that student and teacher give -inf adds nothing
    keep = torch.arange(37, device=DEVICE) != 5
    masked_s = s.where(keep, -math.inf)
    masked_t = t.where(keep, -math.inf)
    without = loss_and_grad(s[..., keep], t[..., keep], c[keep], impl="torch", **every)
    loss, grad = loss_of(masked_s, masked_t, c, **every)
    assert_close((loss, grad[..., keep]), without)
    assert (grad[..., 5] == 0).all()
    # one that only the student gives -inf
    loss, _ = loss_of(masked_s, t, c, **every)
    assert loss == math.inf
    # a NaN of a matched row stays a NaN, wherever it stands, and so do float16 logits that overflowed
    for k, bad, which in itertools.product((0, 3, slice(None)), (math.nan, math.inf), (0, 1)):
        broken = [s.clone(), t.clone()]
        broken[which][0, 0, :, k] = bad
        loss, grad = loss_of(*broken, c, **every)
        assert loss.isnan()
        assert grad.isnan().any()
    # a NaN of an unmatched row, and of a teacher row that only unmatched rows point to, is ignored
    index = torch.tensor([-1, 1, 0, 1], device=DEVICE).expand(2, 2, 1, 4)
    broken = [s.clone(), t.clone()]
    broken[0][:, :, 0] = math.nan
    broken[1][:, :, 2:] = math.nan
    assert_close(loss_of(*broken, c, index=index), loss_of(s, t, c, index=index))

@each_impl
def test_layouts_repetition_and_what_the_loss_leaves_alone(impl):
    (s, t, c), boxes = case(seed=6)
    loss_of = functools.partial(local_cross_entropy, impl=impl, **TEMPS, **boxes)
    grad_of = functools.partial(torch.autograd.grad, allow_unused=True, retain_graph=True)
    leaves = [x.clone().requires_grad_() for x in (s, t, c)]
    loss = loss_of(*leaves)
    again = loss_of(*leaves)
    first, *none = grad_of(loss, leaves)
    assert none == [None, None]
    assert torch.equal(loss, again)
    for x in (loss, again):
        assert torch.equal(grad_of(x, leaves)[0], first)
    for leaf, x in zip(leaves, (s, t, c)):
        assert torch.equal(leaf, x)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(loss_of(s, t, c[None]), loss)                # DINO's center is (1, K)
    # another order of the axes, and a slice
    wide = torch.zeros(2, 4, 1, 50, device=DEVICE)
    wide[..., 3:40] = s.transpose(1, 2)
    view = wide.requires_grad_()[..., 3:40].transpose(1, 2)
    shared = t[:1].expand(2, -1, -1, -1)
    loss = loss_of(view, shared, c)
    (grad,) = grad_of(loss, view)
    wanted = loss_and_grad(s, shared, c, impl="torch", **boxes)
    assert_close((loss, grad), wanted, rtol=1e-5, atol=1e-6)

@each_impl
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.skipif(SIMULATED, reason="torch.compile asks for a driver")
def test_compiled_losses_take_other_batch_sizes_and_temperatures(impl, head):
    """Without a break in the graph of the torch path."""
    w = torch.eye(5, device=DEVICE) if head else None

    def loss_and_gradient(function, s, *arguments):
        loss = function(s, *arguments)
        return loss, torch.autograd.grad(loss, s)[0]

    def loss_of(s, t, c, temp, boxes):
        return head_cross_entropy(s, w, t, w, c, student_temp=0.1, teacher_temp=temp, impl=impl, **boxes)

    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend="eager", fullgraph=impl == "torch")
    for B, temp in ((2, 0.04), (3, 0.05), (5, 0.06)):
        (s, *rest), boxes = case(B=B, K=5)
        arguments = s.requires_grad_(), *rest, temp, boxes
        found = loss_and_gradient(compiled, *arguments)
        assert_close(found, loss_and_gradient(loss_of, *arguments), rtol=0, atol=0)

INDEX = torch.zeros(3, 2, 2, 9).long()
NO_BOXES = dict.fromkeys(["student_boxes", "student_grid", "teacher_boxes", "teacher_grid"])
BAD_ARGUMENTS = [                       # of local_cross_entropy
    (dict(center=torch.zeros(36)), r"center must be \(37,\) on cpu, got \(36,\) on cpu"),
    (dict(teacher_logits=torch.zeros(2, 3, 8, 37)), r"student_logits must be \(V, 3, Ns, 37\).*got \(3, 2, 9, 37\)"),
    (dict(student_boxes=torch.zeros(3, 2, 5)), "student_boxes must be .* finite, with height and width above 0"),
    (dict(teacher_boxes=None), "teacher_boxes must be .*NoneType"),
    (dict(student_grid=(3, 4)), r"student_grid must be .* 9 patches, got \(3, 4\)"),
    (dict(student_grid=(1.8, 5)), "student_grid"),
    (dict(index=INDEX), "boxes or an index"),
    (dict(weight=torch.ones(3, 2, 2, 9)), "a weight needs an index"),
    (dict(student_temp=0), "student_temp must be a number > 0, and finite, got 0"),
    (dict(teacher_temp=math.nan), "teacher_temp must be a number > 0, and finite, got nan"),
    (dict(impl="fast"), "fast"),
    (dict(impl="triton", student_logits=torch.zeros(3, 2, 9, 37).double()), "no float64"),
    (NO_BOXES, "which patches match"),
    (NO_BOXES | dict(index=INDEX.float()), "integers"),
    (NO_BOXES | dict(index=INDEX.bool()), "integers"),
    (NO_BOXES | dict(index=INDEX + 8), r"index must be in \[0, 8\)"),
    (NO_BOXES | dict(index=INDEX, weight=INDEX - 1.0), "weight must be .* >= 0"),
    (NO_BOXES | dict(index=INDEX, weight=INDEX + math.inf), "weight must be finite")]
BAD_HEADS = [                           # of head_cross_entropy, with D = 5
    (dict(max_bytes="x"), "max_bytes must be a number > 0, and finite, got 'x'"),
    (dict(student_weight=torch.zeros(5, 37)), r"student_weight must be \(K, 5\) on cpu, got \(5, 37\)"),
    (dict(student_weight=torch.nn.Linear(5, 37)), "student_weight must be .* got Linear"),
    (dict(teacher_weight=torch.zeros(30, 5)), r"teacher_weight must be \(37, 5\).*\(30, 5\)"),
    (dict(student_z=[]), "no views"),
    (dict(student_z=[torch.zeros(2, 2, 9, 5)], student_grid=[]), "one length")]

@each_impl
@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on the CPU")
def test_loss_refuses_what_does_not_fit(impl, monkeypatch):
    (s, t, c), boxes = case(V=3, B=2, s_grid=(3, 3), t_grid=(4, 2))
    z = torch.zeros(2, 2, 9, 5)
    w = torch.zeros(37, 5)
    logits = dict(student_logits=s, teacher_logits=t, center=c, **boxes, **TEMPS)
    head = dict(student_z=z, student_weight=w, teacher_z=z, teacher_weight=w, center=c, **TEMPS)
    calls = [(local_cross_entropy, logits | change, words) for change, words in BAD_ARGUMENTS]
    calls += [(head_cross_entropy, head | change, words) for change, words in BAD_HEADS]
    for function, arguments, words in calls:
        with pytest.raises(ValueError, match=words):
            function(**dict(impl=impl) | arguments)
    with pytest.raises(TypeError, match="local_cross_entropy.*students_temp"):
        local_cross_entropy(**logits, students_temp=0.1)
    monkeypatch.setattr(mk, "INTERPRETED", False, raising=False)
    local_cross_entropy(**logits)
    with pytest.raises(ValueError, match="impl='triton' needs"):
        local_cross_entropy(**logits, impl="triton")

@pytest.mark.parametrize("name", ["distance_hinge.npz", "distance_nohinge.npz", "similarity.npz"])
def test_recorded_outputs_of_the_official_loss(name):
    """The whole loss of gld.py: last layers that are the identity turn its bottlenecks into the given logits."""
    if not (GOLDEN / name).exists():
        pytest.skip(f"no recorded outputs {GOLDEN / name}")
    with np.load(GOLDEN / name) as file:
        g = {
            k: torch.from_numpy(file[k]) if file[k].dtype.kind in "fib" else str(file[k])
            for k in file.files
        }
    boxes = torch.cat([g["boxes"].float(), g["flips"][..., None].float()], -1)
    V, B, _ = boxes.shape
    K = g["student_patch"].shape[1]
    sizes = [(len(list(same)), side) for side, same in itertools.groupby(g["grids"].tolist())]

    def split(x):
        parts = x.split([v * B * side ** 2 for v, side in sizes])
        return [part.view(v, B, side ** 2, -1) for part, (v, side) in zip(parts, sizes)]

    eye = torch.eye(K)
    s_cls = g["student_cls"].requires_grad_()
    s_patch = g["student_patch"].requires_grad_()
    student = gld.Outputs(
        image_z=s_cls.view(V, B, 1, K),
        patch_z=split(s_patch),
        features=split(g["student_feat"]),
        image_weight=eye,
        patch_weight=eye,
    )
    teacher = gld.Outputs(
        image_z=g["teacher_cls"].view(2, B, 1, K),
        patch_z=[g["teacher_patch"].view(2, B, -1, K)],
        features=[g["teacher_feat"].unflatten(0, (2, B, -1))],
        image_weight=eye,
        patch_weight=eye,
    )
    centers = torch.cat([g["center_cls"], g["center_patch"]])
    assert math.isclose(g["student_temp"], gld.STUDENT_TEMP, rel_tol=1e-6)
    loss, image_loss, patch_loss = gld.distillation_loss(
        student,
        teacher,
        centers,
        boxes,
        grids=[(side, side) for _, side in sizes],
        teacher_temp=float(g["teacher_temp"]),
        matching={"distance": "geometric"}.get(g["matching"], g["matching"]),
        hinge=bool(g["hinge"]),
    )
    assert_close(loss, (image_loss + patch_loss) / 2)
    for term, leaf, value, grad in (
        (image_loss / 2, s_cls, "loss_view", "grad_student_cls"),
        (patch_loss / 2, s_patch, "loss_region", "grad_student_patch"),
    ):
        assert abs(term.item() / g[value].item() - 1) < 1e-5
        error = torch.autograd.grad(term, leaf)[0] - g[grad]
        assert error.norm() < 1e-4 * g[grad].norm()
        assert error.abs().max() < 1e-4 * g[grad].abs().max()
    centers.lerp_(gld.mean_logits(teacher), 1 - gld.CENTER_MOMENTUM)
    assert_close(centers, torch.cat([g["new_center_cls"], g["new_center_patch"]]), rtol=1e-4, atol=1e-6)

def dinos_loss(student, teacher, center, V):
    """DINO's own loop over pairs of views. student: (V * B, K). teacher: (2 * B, K)."""
    student = (student / 0.1).chunk(V)
    teacher = F.softmax((teacher - center) / 0.04, dim=-1).detach().chunk(2)
    total = 0
    for q, v in itertools.product(range(2), range(V)):
        if v != q:
            total += torch.sum(-teacher[q] * F.log_softmax(student[v], dim=-1), dim=-1).mean()
    return total / (2 * (V - 1))

@each_impl
def test_the_losses_of_other_code(impl):
    """The calls in the docstring of local_cross_entropy against the definitions in DINO, iBOT and DINOv2."""
    V, B, N, K = 4, 3, 4, 19
    M, n = 7, 5
    g = torch.Generator().manual_seed(0)
    loss_of = functools.partial(local_cross_entropy, impl=impl, student_temp=0.1)

    def logits(*shape):
        return torch.randn(*shape, K, generator=g).to(DEVICE) / 4

    # DINO
    student = logits(V * B)
    teacher = logits(2 * B)
    center = logits(1)
    s = student.unflatten(0, (V, B))[:, :, None]
    t = teacher.unflatten(0, (2, B))[:, :, None]
    loss = loss_of(s, t, center, teacher_temp=0.04, skip_same_view=True)
    assert_close(loss / (2 * (V - 1)), dinos_loss(student, teacher, center, V))
    # iBOT: the masked patches of the two global views; an image may have none
    s = logits(2, B, N)
    t = logits(2, B, N)
    mask = (torch.rand(2, B, N, generator=g) < 0.5).to(DEVICE)
    mask[0, 0] = False
    target = F.softmax((t - center) / 0.04, dim=-1)
    cross_entropy = -(target * F.log_softmax(s / 0.1, dim=-1)).sum(-1)
    ibot = ((cross_entropy * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    index = torch.full((2, 2, B, N), -1, device=DEVICE)
    index[[0, 1], [0, 1]] = torch.where(mask, torch.arange(N, device=DEVICE), -1)
    weight = (N / mask.sum(-1).clamp(min=1))[:, None, :, None].expand(2, 2, B, N)
    loss = loss_of(s, t, center, teacher_temp=0.04, index=index, weight=weight)
    assert_close(loss / 2, ibot)
    # DINOv2: M masked tokens of n images, with Sinkhorn-Knopp
    s = logits(M)
    t = logits(M)
    masks_weight = torch.rand(M, generator=g).to(DEVICE)
    p = (t / 0.04).exp().T
    r = torch.ones(K, device=DEVICE)
    p, r = p / p.sum(), r / p.sum()
    for _ in range(3):
        factor = 1 / (p.sum(1) * K)                     # each prototype gets the same share
        p = p * factor[:, None]
        r = r * factor
        p = p / (p.sum(0) * M)                          # each token's probabilities add up to 1 / M
    p = (p * M).T
    dinov2 = -((p * F.log_softmax(s / 0.1, dim=-1)).sum(-1) * masks_weight).sum() / n
    weight = (masks_weight * M / n).view(1, 1, M, 1)
    s, t, log_p = (x.view(1, M, 1, K) for x in (s, t, p.log()))
    by_center = loss_of(s, t, -0.04 * r.log(), teacher_temp=0.04, weight=weight)
    by_log = loss_of(s, log_p, torch.zeros_like(r), teacher_temp=1, weight=weight)
    assert_close((by_center, by_log), (dinov2, dinov2))

# ------------------------------------------------------------------------------------------------ Triton kernels

def check_triton(s, t, c, matches, upstream=1.0, skip=False, truth=None):
    """Errors of Triton's loss and gradient against float64: plain torch's and a rounding are allowed, no more."""
    exact = s.double().requires_grad_()
    loss = oracle(exact, t, c, skip_same_view=skip, **truth or matches)
    wanted = loss.detach(), torch.autograd.grad(loss, exact)[0] * upstream
    found_by = functools.partial(loss_and_grad, s, t, c, upstream, skip_same_view=skip, **matches)
    torchs = found_by(impl="torch")
    mine = found_by(impl="triton")
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == s.dtype and mine[1].shape == s.shape
    # 16 bits: probabilities are stored to 2^-11; bfloat16 gradients are rounded when stored, and when scaled
    rounding = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[t.dtype]
    # logits over the temperature, times log2(e), and their log-sum-exp are rounded: with K = 1, where loss and gradient
    # are 0, nothing else is left
    of_loss = 2 * torch.finfo(torch.float32).eps * s.abs().max().item() / 0.1
    of_grad = of_loss * upstream / 0.1 / s[0, ..., 0].numel()
    for exact, torchs, mine, absolute in zip(wanted, torchs, mine, (of_loss, of_grad)):
        error = (mine.double() - exact).abs().max()
        allowed = (torchs.double() - exact).abs().max()
        assert error <= 1.1 * allowed + rounding * exact.abs().max() + absolute, (error, allowed)

@needs_triton
@pytest.mark.parametrize(
    "dtype,change",
    [
        (torch.float32, dict(K=1)),
        (torch.float16, dict(K=127)),
        (torch.float32, dict(K=4097)),
        (torch.float32, dict(V=1, Q=1, s_grid=(2, 5), t_grid=(3, 4))),
        (torch.float32, dict(Q=5, s_grid=(1, 1))),
    ]
    + [(torch.float32, dict(K=65537)), (torch.bfloat16, dict(K=65536))] * (DEVICE == "cuda"),
)
def test_triton_error_is_no_worse_than_torchs(dtype, change):
    """Sizes of K, grids, flips, and numbers of views."""
    (s, t, c), boxes = case(**dict(K=19, seed=3) | change)
    check_triton(s.to(dtype), t.to(dtype), c, boxes, upstream=2.0, skip=len(s) > 1)

@needs_triton
@pytest.mark.parametrize("s_grid,t_grid", [((1, 1), (7, 7)), ((3, 3), (1, 1)), ((2, 5), (3, 4))])
def test_triton_finds_the_matches_of_rounded_and_of_far_boxes(s_grid, t_grid):
    """Rounded boxes have ties. Maps have offsets of 1e6 and more, where float32 steps are as large as a patch; there,
    boxes of two dtypes must not meet in float32."""
    (s, t, c), boxes = case(V=3, K=19, s_grid=s_grid, t_grid=t_grid)
    offset = torch.tensor([3e7, 5e7, 0, 0, 0], dtype=torch.float64, device=DEVICE)
    far = torch.tensor([2 ** 24, 2 ** 24, 0, 0, 0], device=DEVICE)
    places = boxes["student_boxes"], boxes["teacher_boxes"]
    whole = [x.round().long() for x in places]
    mixed = whole[0] + far, (whole[1] // 2 * 2 + far).float()
    for student, teacher in (whole, [x + offset for x in places], mixed):
        index, weight = geometric_matches(student[:, None], teacher, s_grid, t_grid)
        changed = boxes | dict(student_boxes=student, teacher_boxes=teacher)
        check_triton(s, t, c, changed, truth=dict(index=index, weight=weight))

@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_matches_by_index_and_extreme_rows():
    (s, t, c), boxes = case(seed=5)
    index = torch.tensor([-1, 0, 2, -1], device=DEVICE, dtype=torch.int32).repeat(2, 2, 1, 1)
    index[0, 1] = 1
    weight = torch.tensor([0, 0.25, 50, 7], device=DEVICE).expand(2, 2, 1, 4)       # 50 * 2^14 is no float16
    check_triton(s, t, c, dict(index=index), skip=True)
    check_triton(s, t, c, dict(index=index), upstream=65536.0)
    check_triton(s, t, c, dict(index=index, weight=weight))
    check_triton(s.half(), t.half(), c, dict(index=index, weight=weight.half()))
    check_triton(s[:, :, :1], t[:, :, :1], c, {}, skip=True)
    every = boxes | dict(hinge=False)
    for extreme in ((s + 1e4, t + 1e4), (s * 1e4, t * 1e4)):
        loss, grad = loss_and_grad(*extreme, c, impl="triton", **every)
        torchs, torch_grad = loss_and_grad(*extreme, c, impl="torch", **every)
        assert_close(loss, torchs, rtol=2e-3, atol=0.05)                # float32 at 1e5: a step of 0.008
        assert_close(grad, torch_grad, rtol=0.02, atol=0.02)

def for_each_size(options, *counts):
    """What a call for all sizes of views is given, with so many views of each, as one dict for each size."""
    parts = {name: options[name] for name in ("student_grid", "index", "weight") if name in options}
    if "student_boxes" in options:
        parts["student_boxes"] = options["student_boxes"].split(counts)
    return [options | {name: part[i] for name, part in parts.items()} for i in range(len(counts))]

map_tensors = functools.partial(torch.utils._pytree.tree_map_only, torch.Tensor)

def head_case(matches, B, K, D, grids):
    """z of two sizes of views, last layers, center, and matches. Many prototypes compete for each patch, with logits
    near 0.9, where bfloat16 logits would be too coarse."""
    g = torch.Generator().manual_seed(0)
    Q = 2 + (matches == "index")
    Nt, Ns = map(math.prod, grids)

    def close_to(x, noise):
        step = F.normalize(torch.randn(x.shape, generator=g), dim=-1)
        return F.normalize(x + noise * step, dim=-1)

    groups = close_to(torch.zeros(Q * B * Nt, D), 1)
    teacher_z = close_to(groups.view(Q, B, Nt, D), 0.3)
    z = [
        close_to(teacher_z, 0.5),
        close_to(groups[:B * Ns].view(1, B, Ns, D), 0.5),
    ]
    student_weight, teacher_weight = (close_to(groups.repeat(K, 1)[:K], 0.3) for _ in range(2))
    center = torch.randn(K, generator=g) / 50
    boxes = random_boxes(Q + 1, B, size=60)
    index = [torch.randint(-1, Nt, (len(x), Q, B, x.shape[2]), generator=g).int() for x in z]
    weight = [3 * torch.rand(x.shape, generator=g) for x in index]
    options = {
        "boxes": dict(student_boxes=boxes, teacher_boxes=boxes[:Q], student_grid=grids, teacher_grid=grids[0]),
        "index": dict(index=index),
        "index and weight": dict(index=index, weight=weight),
        "single": {},
    }[matches]
    inputs = [*z, student_weight, teacher_z, teacher_weight, center]
    return map_tensors(lambda x: x.to(DEVICE), (inputs, options))

@each_impl
@pytest.mark.parametrize("matches", ["boxes", "index", "index and weight", "single"])
def test_head_loss_equals_the_definition(impl, matches):
    """Student views of two sizes in one call. Triton on a GPU: float16 logits, bfloat16 gradients over them."""
    half = impl == "triton" and DEVICE == "cuda"
    B, K, D, grids = 2, 23, 16, [(2, 1), (1, 1)]
    if DEVICE == "cuda":
        K, D, grids = 4096, 256, [(4, 4), (2, 2)]
    if matches == "single":
        grids = [(1, 1), (1, 1)]
    leaves, together = head_case(matches, B, K, D, grids)
    apart = for_each_size(together, len(leaves[0]), 1)
    exact = [x.double().requires_grad_() for x in leaves]
    logits = [x @ exact[2].T for x in exact[:2]]
    teacher = exact[3] @ exact[4].T, exact[5]
    first = oracle(logits[0], *teacher, skip_same_view=True, **apart[0])
    truth = first + oracle(logits[1], *teacher, **apart[1])
    of_first = torch.autograd.grad(first, exact[:3], retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(3 * truth, exact[:3])
    off = 6e-3 if half else 1e-4
    most = 1e-3 if half and matches == "single" else 2e-5               # errors average out, but not over few rows
    for x in leaves:
        x.requires_grad_()
    loss_of = functools.partial(head_cross_entropy, skip_same_view=True, impl=impl, **TEMPS)
    for max_bytes in (512 * 2 ** 20, 1):                                # all images at once, one at a time
        center, matches = map_tensors(torch.clone, (leaves[5].detach(), together))
        loss = loss_of(leaves[:2], *leaves[2:5], center, max_bytes=max_bytes, **matches)
        map_tensors(torch.zero_, (center, matches))                     # used again before the backward pass
        found = torch.autograd.grad(3 * loss, leaves, allow_unused=True, retain_graph=True)
        assert found[3:] == (None, None, None)
        assert abs(loss.item() / truth.item() - 1) < most
        for grad, wanted in zip(found, expected):
            assert (grad - wanted).norm() < off * wanted.norm()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            assert_close(loss_of(leaves[:2], *leaves[2:], max_bytes=max_bytes, **together), loss)
    for which in (0, 2):                # a single tensor; only one of the two needs a gradient
        one = [x if i == which else x.detach() for i, x in enumerate(leaves) if i != 1]
        (grad,) = torch.autograd.grad(loss_of(*one, **apart[0]), leaves[which])
        assert (grad - of_first[which]).norm() <= off * of_first[which].norm()

def test_the_gradient_of_half_precision_weights_is_rounded_once():
    """Though it is a sum of large parts, of other images, too."""
    z, w = F.normalize(torch.randn(2, 64, 16), dim=-1).bfloat16()

    def gradient(dtype):
        s, weight = z.to(dtype).view(2, 32, 1, 16), w.to(dtype).requires_grad_()
        head_cross_entropy(s, weight, s.flip(0), weight, torch.zeros(64), max_bytes=1, **TEMPS).backward()
        return weight.grad
    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() < 0.002 * exact.norm()

@each_impl
@pytest.mark.parametrize("head", [True, False])
def test_second_derivatives_and_torch_func(impl, head):
    """They are right in torch, also those of the last layer, and refused in Triton."""
    (s, t, c), boxes = case(K=5)
    w = torch.randn(5, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    teacher_w = w.detach().clone()

    def loss(z, w):
        weights = [x.to(z.dtype) if head else None for x in (w, teacher_w)]
        return head_cross_entropy(z, weights[0], t.to(z.dtype), weights[1], c, impl=impl, **TEMPS, **boxes)

    leaf = s.clone().requires_grad_()
    if impl == "torch":
        assert torch.autograd.gradgradcheck(loss, (s.double().requires_grad_(), w))
        by_func = torch.func.grad(loss)(s, teacher_w)
        assert_close(by_func, torch.autograd.grad(loss(leaf, w), leaf)[0])
    else:
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(loss(leaf, w), leaf, create_graph=True)

@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="in the interpreter")
def test_offsets_beyond_two_to_the_31(monkeypatch):
    """A few rows of tensors of 8.6 GB, of which only the pages that are touched exist."""
    interpreter = mk.triton.runtime.interpreter
    launch = dict(UNIT=mk.UNIT, BLOCK=2048)
    monkeypatch.setattr(torch.UntypedStorage, "copy_", lambda self, other: self)    # it copies its arguments to itself
    B, K = 32769, 65536
    s, ds = (torch.empty(2 ** 32 + 2 * K, dtype=torch.float16)[2 ** 31:] for _ in range(2))    # wrapped offsets: inside

    def rows(x):
        return torch.stack([x[:K], x[B * K:][:K]]).double()

    def fill(values):
        s[:K], s[B * K:][:K] = values

    logits = torch.randn(2, K, generator=torch.Generator().manual_seed(0)).half()
    fill(logits)
    last_row = interpreter.TensorHandle(np.array([B], np.int32), mk.tl.int32)
    with mock.patch.object(interpreter.InterpreterBuilder, "create_get_program_id", lambda *args: last_row):
        mk._teacher_kernel[(1,)](s, torch.zeros(K), ds, K, mk.LOG2_E, **launch)
    p = logits.double().softmax(1)
    assert_close(rows(ds)[1] / mk.UNIT, p[1], rtol=1e-3, atol=0)
    # student rows and teacher rows are the same memory: probabilities times 2^14, and logits
    fill(p * mk.UNIT)
    leaf = rows(s).requires_grad_()
    truth = -(leaf.detach().sum(0) / mk.UNIT * leaf.log_softmax(1)).sum(1)
    loss = torch.zeros(2, B)
    index = torch.zeros(4 * B, dtype=torch.int32)
    weight = torch.ones(4 * B)
    sizes = dict(q=0, V=2, Q=2, B=B, K=K, skip=2, S_ROWS=1, S_COLS=1, T_ROWS=1, T_COLS=1)
    mk._student_kernel[(2,)](s, s, loss, ds, None, index, weight, scale=mk.LOG2_E, **sizes, **launch)
    assert_close(loss[:, 0].double(), truth)
    grad = torch.autograd.grad(truth.sum(), leaf)[0]
    assert (rows(ds) / mk.UNIT - grad).norm() < 1e-2 * grad.norm()

def head_inputs(B, K=65536, D=256):
    """The inputs of the patch head's loss at the paper's size: 2 global and 8 local views."""
    z = [F.normalize(torch.randn(v, B, n, D), dim=-1).requires_grad_() for v, n in ((2, 49), (8, 9))]
    weight = F.normalize(torch.randn(K, D), dim=-1).requires_grad_()
    boxes = torch.rand(10, B, 5) + 1
    geometry = dict(
        student_boxes=boxes,
        teacher_boxes=boxes[:2],
        student_grid=[(7, 7), (3, 3)],
        teacher_grid=(7, 7),
    )
    return (z, weight, z[0].detach().flip(1), weight.detach(), torch.zeros(K)), geometry

def head_reference(inputs, geometry, dtype, loss_of=reference_cross_entropy):
    """The loss of `head_inputs` by its definition, from all logits."""
    z, weight, teacher_z, teacher_weight, c = inputs
    teacher, loss = teacher_z.to(dtype) @ teacher_weight.to(dtype).T, 0
    for x, part in zip(z, for_each_size(geometry, 2, 8)):
        boxes = part["student_boxes"][:, None], part["teacher_boxes"]
        matches = geometric_matches(*boxes, part["student_grid"], part["teacher_grid"])
        loss += loss_of(x.to(dtype) @ weight.to(dtype).T, teacher, c, *TEMPS.values(), *matches)
    return loss

def peak_memory(work):
    """The most bytes that are allocated while work() runs."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with Peak() as peak:
        work()
    return peak.peak

def measure(ways, leaves, rounds=8):
    """Of each loss with its gradients: median milliseconds (they take turns), and the most bytes (0: not counted)."""
    steps = {name: lambda loss_of=loss_of: torch.autograd.grad(loss_of(), leaves) for name, loss_of in ways.items()}
    times, peaks = {name: [] for name in ways}, dict.fromkeys(ways, 0)
    for name, step in steps.items():
        step()
        if DEVICE == "cuda" or "compiled" not in name:
            peaks[name] = peak_memory(step)
    for _, (name, step) in itertools.product(range(rounds), steps.items()):
        began = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times[name].append(1e3 * (time.perf_counter() - began))
    return {name: (np.median(times[name]), peaks[name]) for name in ways}

@pytest.fixture
def report(request, capsys):
    """For a benchmark, which runs with -m bench only: a `print` that pytest lets through."""
    if request.config.getoption("markexpr") != "bench":
        pytest.skip("run it with -m bench")

    def say(line):
        with capsys.disabled():
            print("\n" + line, end="")

    return say

@bench
def test_speed_and_memory_of_the_loss(report):
    """The patch loss of a step with 2 global and 8 local views, last layers and gradients included. It only prints."""
    cuda = DEVICE == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    for B, K in itertools.product((32, 128), (65536, 8192)) if cuda else [(4, 16384)]:
        with torch.device(DEVICE):
            inputs, geometry = head_inputs(B, K)
        reference = functools.partial(head_reference, inputs, geometry, dtype)
        ours = functools.partial(head_cross_entropy, *inputs, **geometry, **TEMPS)
        ways = {
            "reference": reference,
            "reference, compiled": functools.partial(reference, torch.compile(reference_cross_entropy)),
            "torch": functools.partial(ours, impl="torch"),
        }
        if cuda:
            ways["triton"] = functools.partial(ours, impl="triton")
        for name, (ms, size) in measure(ways, [*inputs[0], inputs[1]]).items():
            report(f"B = {B}, K = {K}: {name:20} {ms:8.2f} ms, {size / 2 ** 20:.0f} MiB (0: not counted)")

@bench
@pytest.mark.parametrize("V,B,K", [(8, 8, 65536), (10, 32, 16384)])
def test_ready_logits_take_no_more_memory_than_dinos_loop(report, V, B, K):
    """And prints the times."""
    student = torch.randn(V * B, K, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2 * B, K, device=DEVICE)
    center = torch.zeros(K, device=DEVICE)

    def ours():
        s = student.unflatten(0, (V, B))[:, :, None]
        t = teacher.unflatten(0, (2, B))[:, :, None]
        return local_cross_entropy(s, t, center, skip_same_view=True, **TEMPS) / (2 * (V - 1))

    ways = {"DINO": functools.partial(dinos_loss, student, teacher, center, V), "ours": ours}
    (ms, size), (our_ms, our_size) = measure(ways, student).values()
    report(f"V = {V}, B = {B}, K = {K}: {our_ms / ms:.2f} of DINO's time, {our_size / size:.2f} of its memory")
    assert our_size <= size

# ------------------------------------------------------------------------------------------------ CUDA without a GPU

COMPILE = r"""
import os, re, subprocess, tempfile
import triton
import matching_kernels as mk

LEFT_OUT = {"teacher": (), "loss": ("DS", "INDEX", "WEIGHT"), "loss and gradient": ("INDEX", "WEIGHT"),
            "index and weight": ("BOXES",)}

def compiled(part, target):
    '''A kernel as it is launched at K = 65536, for a GPU that need not be here.'''
    kernel = mk._teacher_kernel if part == "teacher" else mk._student_kernel
    constants = dict(S_ROWS=7, S_COLS=7, T_ROWS=7, T_COLS=7, UNIT=mk.UNIT, BLOCK=mk.LAUNCH["BLOCK"])
    constants |= dict.fromkeys(LEFT_OUT[part])
    kinds = dict(S="*fp16", T="*fp16", DS="*bf16", P="*fp16", INDEX="*i32", scale="fp32") | dict.fromkeys("VQBK", "i32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name.isupper() else "i32")
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or name == "K"}
    source = triton.compiler.ASTSource(kernel, signature, attrs=aligned, constexprs={
        (i,): constants[name] for i, name in enumerate(signature) if name in constants})
    options = {name: value for name, value in mk.LAUNCH.items() if name != "BLOCK"}
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(*target), options=options).asm

def check(part, arch):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled(part, ("cuda", arch, 32))["cubin"]), file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        sass = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True).stdout
    # a line is "/*1900*/ @!P0 BRA 0x1140 ;"; a loop ends in a jump back; an instruction is 16 bytes
    code = re.findall(r"/\*(\w{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(?:[^;]*\b(0x[0-9a-f]+))?[^;]*;", sass)
    jumps = [(int(to, 16), int(at, 16)) for at, op, to in code if op.startswith("BRA") and to]
    loops, registers = [(to, at) for to, at in jumps if at - to > 150], int(re.search(r"REG:(\d+)", sass)[1])
    elements = [((end - start) // 16 + 1) / 8 for start, end in loops]
    print(f"sm_{arch} {part}: registers {registers}, instructions per element", elements)
    assert not any(op[:3] in ("LDL", "STL") for _, op, _ in code), "spills"
    assert registers <= 48 and max(elements) <= 16, "registers, instructions"
    for start, end in loops:
        ops = [op for at, op, _ in code if start <= int(at, 16) <= end]
        memory = [op for op in ops if op[:3] in ("LDG", "STG")]
        assert len(memory) >= 3 and all("128" in op for op in memory), "16 bytes at a time"
        loads = [i for i, op in enumerate(ops) if op.startswith("LDG")]
        assert max(loads) < min(i for i, op in enumerate(ops) if "EX2" in op), "all loads before the exponentials"

for part in ("teacher", "loss", "loss and gradient"):
    for arch in (80, 90):
        check(part, arch)
    compiled(part, ("cuda", 100, 32))
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5):       # before, this needed ROCm's linker
        compiled(part, ("hip", "gfx942", 64))
compiled("index and weight", ("cuda", 90, 32))
"""

@needs_triton
def test_kernels_compile_without_spills():
    """In a process of its own, since this one has the interpreter. Prints the figures of the README's table."""
    subprocess.run([sys.executable, "-c", COMPILE], cwd=HERE, env=os.environ | dict(TRITON_INTERPRET="0"), check=True)

class NoLaunch(list):
    """In the place of a kernel: a list of the rows of each launch, which checks the devices and computes nothing."""
    current = None                      # the device that torch.cuda.device_of made the current one

    def __getitem__(self, grid):
        self.append(grid[0])
        return self.check

    def check(self, *args, **kwargs):
        devices = {x.device for x in args if isinstance(x, torch.Tensor)}
        if devices != {self.current}:   # a real launch would read another device's memory
            raise RuntimeError(f"launched on {self.current} with tensors on {sorted(map(str, devices))}")

@pytest.fixture
def without_kernels(monkeypatch):
    """The launch path on tensors of any device, without launches. Returns: teacher and student kernel."""
    kernels = NoLaunch(), NoLaunch()
    monkeypatch.setattr(mk, "_teacher_kernel", kernels[0], raising=False)
    monkeypatch.setattr(mk, "_student_kernel", kernels[1], raising=False)
    monkeypatch.setattr(mk, "_use_triton", lambda impl, x: impl != "torch")
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: mock.patch.object(NoLaunch, "current", x.device))
    return kernels

def flops_of(*args, **kwargs):
    """Of the forward pass of the head's loss, in units of one row of logits. Triton's path makes no small products."""
    with FlopCounterMode(display=False) as counter:
        head_cross_entropy(*args, **TEMPS, **kwargs)
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.mm] or kwargs["impl"] == "torch"
    return counter.get_total_flops() / (2 * 65536 * 256)

def test_matrix_products_of_the_teacher_and_of_frozen_weights(without_kernels):
    """The teacher's are computed once for both sizes of views; those of a gradient only where one is wanted."""
    teacher_rows, student_rows = without_kernels
    with FakeTensorMode():
        (z, weight, *teacher), geometry = head_inputs(B=1)
        assert flops_of(z, weight, *teacher, **geometry, impl="triton") == 98 + 3 * 170
        assert (teacher_rows, student_rows) == ([98], [98, 72])
        for z_learns, weight_learns, products in (
            (False, True, 2),
            (True, False, 2),
            (False, False, 1),
        ):
            z = [x.detach().requires_grad_(z_learns) for x in z]
            weight = weight.detach().requires_grad_(weight_learns)
            assert flops_of(z, weight, *teacher, **geometry, impl="triton") == 98 + products * 170
        assert flops_of(z, weight, *teacher, **geometry, impl="torch") <= 98 + 2 * 170
        inputs, geometry = head_inputs(B=8)
        teacher_rows.clear()
        flops_of(*inputs, **geometry, impl="triton", max_bytes=4 * 196 * 65536 * 4)
        assert teacher_rows == [4 * 98, 4 * 98]                         # 98 + 98 rows: 4 images fit

class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Follows allocations: the bytes of each live storage, and the most at one time."""
    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.live:
                storage = x.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.peak = max(self.peak, sum(self.live.values()))
                weakref.finalize(storage, self.live.pop, storage._cdata)
        return out

@needs_fake_gpu
def test_memory_of_the_heads_loss_does_not_grow_with_the_batch(without_kernels):
    """Forward and backward at K = 65536, followed on fake tensors: ours as on a GPU, with float16 logits; the reference
    on the CPU, since autograd needs a driver for other devices. Prints the figures of the README's table."""
    ours, reference = [], []
    for B in (32, 64, 128):
        with FakeTensorMode(), torch.device("cuda:0"):
            inputs, geometry = head_inputs(B)
            with Peak() as peak:
                loss = head_cross_entropy(*inputs, **TEMPS, **geometry)
                with torch.no_grad():
                    mk._TritonLoss.backward(loss.grad_fn, torch.ones(()))
        ours.append(peak.peak / 2 ** 30)
        with FakeTensorMode():
            inputs, geometry = head_inputs(B)
            with Peak() as peak:
                head_reference(inputs, geometry, torch.float16).backward()
        reference.append(peak.peak / 2 ** 30)
    print("GiB:", ours, reference)
    assert max(ours) < 0.8
    assert reference[-1] > 20

@needs_fake_gpu
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("arch", ["swin_t", "vit_small", "resnet50"])
def test_a_step_on_a_cuda_device_that_is_not_there(arch, without_kernels, monkeypatch):
    """Fake tensors raise where two devices meet. Gradients are made by hand, since autograd needs a driver."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **kwargs: x)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)       # it looks at values
    cfg = config("--data", ".", "--preset", "paper", "--arch", arch, "--out-dim", "1024", "--local-views", "2")
    B, v, device = 2, 2, torch.device("cuda", 0)
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()), device:
        student = gld.Network(cfg, cfg.drop_path)
        teacher = gld.Network(cfg)
        views = [
            gld.Views(
                crops=torch.zeros(B, v, 3, side, side, dtype=torch.uint8),
                boxes=torch.rand(B, v, 5) + 1,
                jitter=torch.ones(B, v, 4),
                order=torch.zeros(B, v, 4, dtype=torch.int64),
                grey=torch.zeros(B, v, dtype=bool),
                sigma=torch.ones(B, v),
                solarise=torch.zeros(B, v, dtype=bool),
            )
            for side in (224, 96)
        ]
        boxes = torch.cat([part.boxes for part in views], 1).transpose(0, 1)
        images = [gld.augment(part, 2.0) for part in views]
        with torch.autocast("cuda", torch.bfloat16):
            outputs = student(images), teacher(images[:1])
        centers = torch.zeros(2, 1024)
        loss = functools.partial(gld.distillation_loss, *outputs, boxes=boxes, grids=cfg.grids, teacher_temp=0.04)
        for matching in ("none", "similarity", "geometric"):
            for x in loss(centers=centers, matching=matching):
                assert (x.device, x.shape) == (device, ())
        with pytest.raises((RuntimeError, ValueError), match="cpu"):       # a tensor that was left behind is noticed
            loss(centers=centers.cpu(), matching="geometric")
        gld.diagnose(outputs[1], centers[0], boxes, 0.04, cfg)
        parameters = [p for p in student.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        assert gld.clip_gradients([p.grad for p in parameters], 3.0).device == device
        torch.optim.AdamW(parameters, fused=True).step()
        with torch.no_grad():
            centers.lerp_(gld.mean_logits(outputs[1]), 0.1)
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.1)
        # features, and neighbours
        network = teacher.backbone.eval()
        crops = torch.zeros(B, 3, 224, 224, dtype=torch.uint8, device="cpu")
        monkeypatch.setattr(gld, "DataLoader", lambda *args, **kwargs: [crops, crops])
        monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: mock.Mock(all=lambda: True))     # fake: no values
        features = gld.extract(lambda x: network(x)[0], range(2 * B), 224, cfg, device, 0, 1)
        assert (features.device, features.shape) == (device, (2 * B, network.width))
        labels = torch.zeros(2 * B, dtype=torch.int64)
        monkeypatch.setattr(gld, "max", lambda *numbers: 10, raising=False)     # fake labels have no maximum
        gld.knn(features, labels, features, labels, [10, 20], 0.07)

@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_triton_training_has_the_losses_of_the_cpu(precision, monkeypatch, tmp_path):
    """Two epochs of 6 steps, against the torch path in float32. ttsem takes 3 ms for a patch: so views have few."""
    autocast = torch.autocast
    if SIMULATED:       # tensors for "cuda" are on the CPU: what needs a driver does nothing, autocast is the CPU's
        monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *args: x)
        monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    tiny = "--data-fraction 0.02 --epochs 2 --global-size 16 --local-size 8 --blur-sigma 0.1 0.3"
    losses, norms = {}, {}
    for device, options in (("cpu", "--impl torch --precision fp32"), ("cuda", f"--precision {precision}")):
        train_ok(f"{tiny} --output {device} --device {device} {options}", tmp_path)
        log = log_of(tmp_path / device)
        losses[device] = np.array([[row["loss_image"], row["loss_patch"]] for row in log])
        norms[device] = log[1]["grad_norm"]         # not of epoch 1: a step that overflows in float16 counts as 0
    print(losses, norms)
    bound = 0.03                                    # a bfloat16 step is 0.8 %
    assert (abs(losses["cuda"] / losses["cpu"] - 1) < bound).all()
    assert abs(norms["cuda"] / norms["cpu"] - 1) < 0.1
    assert (abs(losses["cpu"][1] / losses["cpu"][0] - 1) > 2 * bound).all()         # training matters

# ------------------------------------------------------------------------------------------------ views

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)                        # of ImageNet's red, green and blue
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
JITTER = ("brightness", "contrast", "saturation", "hue")

def unchanged(crops, boxes):
    """Views (G, ...) of one image that are flipped as their boxes say, but not changed in colour."""
    n = len(crops)
    no = torch.zeros(n, dtype=torch.bool)
    plain = torch.tensor([1.0, 1, 1, 0])
    return gld.Views(crops, boxes, plain.expand(n, 4), torch.arange(4).expand(n, 4), no, torch.zeros(n), no)

def augmented(views):
    """gld.augment of the views (G, ...) of one image; returns [0, 1]."""
    return gld.augment(gld.Views(*(field[None] for field in views)), 2.0)[:, 0] * STD + MEAN

def augment_one(x, **change):
    """Images x (n, 3, H, W) in [0, 1], as views with these parameters; returns [0, 1] again."""
    return augmented(unchanged((x * 255).round().byte(), torch.zeros(len(x), 5))._replace(**change))

def random_pixels(n):
    return torch.randint(256, (n, 3, 20, 20), generator=torch.manual_seed(0)) / 255

assert_near = functools.partial(assert_close, rtol=0, atol=3e-5)

def test_colour_jitter_equals_torchvisions():
    """24 images, each with its own factors and in its own order of the four operations."""
    x = random_pixels(24)
    x[0] = 0.4                          # a grey picture: it has no hue
    factors = torch.rand(24, 4) * torch.tensor([0.8, 0.8, 0.8, 0.2]) + torch.tensor([0.6, 0.6, 0.6, -0.1])
    orders = list(itertools.permutations(range(4)))
    expected = []
    for image, order, factor in zip(x, orders, factors.tolist()):
        for op in order:
            image = getattr(TF, f"adjust_{JITTER[op]}")(image, factor[op])
        expected.append(image)
    assert_near(augment_one(x, order=torch.tensor(orders), jitter=factors), torch.stack(expected))

def test_grey_blur_solarisation_and_flip_equal_torchvisions():
    """Each alone, in every other image; then together, in the order of DINO."""
    x = random_pixels(6)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.3])
    blurred = [TF.gaussian_blur(image, [13, 13], [s, s]) for image, s in zip(x, sigma.tolist())]
    assert_near(augment_one(x, sigma=sigma), torch.stack(blurred))
    half = torch.tensor([True, False] * 3)
    solarised = TF.solarize((x * 255).round().byte(), 128) / 255
    for change, changed in (
            (dict(grey=half), TF.rgb_to_grayscale(x, 3)),
            (dict(solarise=half), solarised),
            (dict(boxes=F.pad(half[:, None], (4, 0))), x.flip(-1))):
        assert_near(augment_one(x, **change), torch.where(half.view(-1, 1, 1, 1), changed, x))
    expected = TF.rgb_to_grayscale(TF.adjust_brightness(x, 1.4), 3)
    expected = TF.solarize(TF.gaussian_blur(expected, [13, 13], [0.5, 0.5]), 0.5)
    everywhere = torch.ones(6) > 0
    brighter = torch.tensor([1.4, 1, 1, 0]).expand(6, 4)
    found = augment_one(x, jitter=brighter, grey=everywhere, sigma=torch.full((6,), 0.5), solarise=everywhere)
    assert_near(found, expected, atol=1e-4)

def assert_share(hits, expected):
    """So many are True, up to four standard deviations."""
    chance = math.sqrt(expected * (1 - expected) / len(hits))
    assert abs(hits.double().mean() - expected) <= 4 * chance + 1e-9

def assert_uniform(values, low, high):
    span = high - low
    assert low <= values.min() and values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.05 * span
    assert abs(values.std() - span / 12 ** 0.5) < 0.05 * span

def crop_statistics(boxes):
    top, left, height, width = boxes.double().T[:4]
    return torch.stack([height * width, width / height, top, left])

def test_the_views_of_an_image_have_dinos_sizes_and_distribution():
    """As crop_views draws them with the paper's options, each role by itself."""
    torch.manual_seed(0)
    image = torch.randint(256, (3, 75, 100), dtype=torch.uint8)
    cfg = config("--preset", "paper")
    for part, number, size in zip(gld.crop_views(image, cfg), (2, 8), (224, 96)):
        box = part.boxes[1, :4].int().tolist()
        assert part.crops.shape == (number, 3, size, size)
        assert torch.equal(part.crops[1], TF.resized_crop(image, *box, [size] * 2, TF.InterpolationMode.BICUBIC))
    n = 3000
    cfg.global_size = cfg.local_size = cfg.local_views = 2                      # small views cost little
    draws = [gld.crop_views(image, cfg) for _ in range(n)]
    large, local = (gld.Views(*map(torch.stack, zip(*size))) for size in zip(*draws))           # (n, v, ...)
    roles = (large, 0, (0.4, 1), 1.0, 0.0), (large, 1, (0.4, 1), 0.1, 0.2), (local, 1, (0.05, 0.4), 0.5, 0.0)
    for size, v, scale, blur, solarise in roles:
        views = gld.Views(*(field[:, v] for field in size))
        crop = torchvision.transforms.RandomResizedCrop
        official = torch.tensor([crop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)])
        ours, theirs = crop_statistics(views.boxes), crop_statistics(official)
        chance = ((ours.var(1) + theirs.var(1)) / n).sqrt()
        assert ((ours.mean(1) - theirs.mean(1)).abs() < 4 * chance).all()
        jittered = views.jitter[:, 3] != 0
        assert_share(views.boxes[:, 4], 0.5)
        assert_share(jittered, 0.8)
        assert_share(views.grey, 0.2)
        assert_share(views.sigma > 0, blur)
        assert_share(views.solarise, solarise)
        assert_share(views.order[:, 0] == 3, 0.25)
        assert (views.jitter[~jittered] == torch.tensor([1.0, 1, 1, 0])).all()
        ranges = (0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)
        for values, (low, high) in zip(views.jitter[jittered].T, ranges):
            assert_uniform(values, low, high)
        assert_uniform(views.sigma[views.sigma > 0], 0.1, 2.0)

def test_matched_patches_show_the_same_place_through_the_real_pipeline():
    """An image whose colours are its coordinates: what a patch shows says where it is."""
    cfg = config(*"--preset paper --global-size 112 --local-size 96 --local-views 6 --arch vit_tiny".split())
    H, W = 240, 330
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    image = torch.stack([y / H * 255, x / W * 255, torch.zeros(H, W)]).round().byte()
    flips = set()
    matches = 0
    for seed in range(10):
        torch.manual_seed(seed)
        views = []
        for part, grid in zip(gld.crop_views(image, cfg), cfg.grids):
            pixels = augmented(unchanged(part.crops, part.boxes))
            places = F.avg_pool2d(pixels[:, :2], 16).flatten(2).mT * torch.tensor([H, W])       # (v, N, 2)
            views += [(place, grid, box) for place, box in zip(places, part.boxes)]
        for place, grid, box in views:
            assert (place - gld.patch_midpoints(box, grid)).abs().max() < 1.5   # 8 bits of colour, and the edges
            for other_place, other_grid, other in views[:2]:
                index, weight = geometric_matches(box, other, grid, other_grid)
                cell, other_cell = box[2:4] / torch.tensor(grid), other[2:4] / torch.tensor(other_grid)
                apart = (place - other_place[index])[weight > 0].norm(dim=1)
                half_diagonal = max(cell.norm(), other_cell.norm()) / 2
                assert (apart < half_diagonal + 5).all()
                flips.add((box[4].item(), other[4].item()))
                matches += int((weight > 0).sum())
    assert len(flips) == 4 and matches > 3500

def test_views_depend_on_seed_epoch_and_image_only():
    images = gld.Images(*gld.draw_shapes(8, 0), "shapes")
    data = gld.ViewDataset(images, config())
    state = torch.get_rng_state()
    first, _ = data[(3, 5)]
    assert torch.equal(torch.get_rng_state(), state)    # that of the caller is left alone
    torch.rand(7)
    again, _ = data[(3, 5)]
    for views, same in zip(first, again):
        assert all(map(torch.equal, views, same))
    other_seed = gld.ViewDataset(images, config("--seed", 1))
    for other, _ in (data[(4, 5)], data[(3, 6)], other_seed[(3, 5)]):
        assert not torch.equal(first[0].boxes, other[0].boxes)

def test_each_epoch_and_seed_has_its_own_order_of_all_images():
    """The same whatever the number of processes, and from the middle on. The brightness of an image is its number."""
    pixels = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None, None], (8, 8, 8, 3)).copy()
    images = gld.Images(pixels, np.zeros(8), "plain")

    def order(first=0, world=1, seed=0):
        cfg = config("--batch-size", 4, "--seed", seed)
        loaders = [gld.make_loader(images, cfg, rank, world, range(first, 6), 2) for rank in range(world)]
        batches = [batch[0][0].crops[:, 0, 0, 0, 0] for step in zip(*loaders) for batch in step]
        return torch.cat(batches).tolist()
    whole = order()
    epochs = [whole[:8], whole[8:16], whole[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(seed=1)[:8] not in epochs
    assert order(world=2) == whole
    assert order(first=3) == whole[12:]

# ------------------------------------------------------------------------------------------------ images

# orientation 6 (shown after a quarter turn clockwise) beside tags of types that Pillow does not expect
ODD_EXIF = (b"Exif\0\0II*\0\x08\0\0\0\x03\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\x90\x09\0\x01\0\0\0\xfb\xff\xff\xff"
            b"\0\x01\x06\0\x01\0\0\0\xff\0\0\0\0\0\0\0")
BROKEN_EXIF = ODD_EXIF[:20]

def training_images(folder):
    return gld.load_images(str(folder), "train")

def test_every_kind_of_image_decodes_to_rgb_and_trains(tmp_path):
    """One file of each awkward kind, all of the same picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    y, x = np.mgrid[:48, :64]
    rgb = np.stack([4 * y, 3 * x, 255 - 2 * x], -1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    turned = picture.rotate(90, expand=True)
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.save(folder / "plain.webp", lossless=True)
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(180)])
    turned.save(folder / "turned.jpg", exif=ODD_EXIF, quality=95)
    picture.save(folder / "broken_exif.jpg", exif=BROKEN_EXIF, quality=95)
    grey.save(folder / "grey.jpg", quality=95)
    for suffix in ("png", "tif", "pgm"):
        deep.save(folder / f"grey16.{suffix}")
    for path in folder.iterdir():
        image = gld.decode(path)
        assert image.shape == (3, 48, 64) and image.dtype == torch.uint8, path.name
        expected = np.asarray(grey)[..., None] if "grey" in path.stem else rgb
        assert np.abs(image.permute(1, 2, 0).numpy() - expected.astype(float)).mean() < 6, path.name
    for size in ((1, 5000), (5000, 1), (1, 1)):
        save_pictures(folder / f"{size}", 1, size)
    (folder / "notes.txt").write_text("no image")
    done = train_ok("--data data --preset small --data-fraction 1 --batch-size 7 --epochs 2", tmp_path)
    assert re.search(r"13 images of data \(1 other files? skipped\)", done.stdout)
    assert not any(row["unreadable"] for row in log_of(tmp_path / "output"))

def test_images_are_turned_as_their_exif_says(tmp_path):
    path = tmp_path / "photograph.png"
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(path, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert np.array_equal(gld.decode(path).permute(1, 2, 0), expected), orientation

def test_folders_their_classes_and_what_is_skipped(tmp_path):
    """Links are followed, but a folder is not entered inside itself."""
    used = {"a/2.PNG": 0, "a/deep/3.png": 0, "a/to_b/1.jfif": 0, "b/1.jfif": 1, "b/to_a/2.PNG": 1,
            "b/to_a/deep/3.png": 1, "c/5.JPE": 2}
    for name in (*used, "a/notes.txt", "a/._2.png", ".cache/x.png", "a/.hidden/4.png", "d/6.avif"):
        path = tmp_path / "set" / name.replace("c/", "../c/")
        if "to_" not in name:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, format="png")
    for link, target in {"c": "../c", "a/to_b": "../b", "b/to_a": "../a", "c/self": "."}.items():
        (tmp_path / "set" / link).symlink_to(target)
    images = training_images(tmp_path / "set")
    if ".avif" in Image.registered_extensions():
        used["d/6.avif"] = 3
    assert dict(zip(map(os.fsdecode, images.items), images.labels.tolist())) == used
    assert images.items.dtype.kind == "S"               # one array: each worker would copy a million Python strings
    (tmp_path / "set/lost").symlink_to("nowhere")       # a class?
    with pytest.raises(gld.BadInput, match="lost"):
        training_images(tmp_path / "set")

def test_a_folder_that_cannot_be_listed_is_named():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as data:         # not tmp_path, which is closed to other users
        locked = Path(data, "locked")
        save_pictures(Path(data, "open"), 1)
        save_pictures(locked, 1)
        Path(data).chmod(0o755)
        locked.chmod(0)
        if user == 0:
            with contextlib.suppress(OSError):
                os.seteuid(65534)                       # root may read everything
        try:
            if os.access(locked, os.R_OK, effective_ids=True):
                pytest.skip("this user may read everything")
            with pytest.raises(gld.BadInput, match="^--data .*locked"):
                training_images(data)
        finally:
            os.seteuid(user)

@pytest.mark.parametrize("parts,data,refused", [
    (("Train", "Val"), "", True),
    (("imagenet/train", "imagenet/val"), "", True),
    (("val",), "", True),
    (("train/test",), "", False),
    (("train", "val"), "", False),
    (("train", "val"), "train", False),
    (("train", "val"), "val", False),
    (("train", "bus"), "", True),
    (("train", "val", "bus"), "", False),
    (("train/train", "train/bus"), "train", True)])
def test_of_a_folder_with_splits_only_the_training_images_are_used(tmp_path, parts, data, refused):
    """If that is not clear, it is refused: also a class that is called train."""
    for part, name in itertools.product(parts, "ab"):
        save_pictures(tmp_path / "data" / part / name, 1)
    with pytest.raises(gld.BadInput, match="^--data ") if refused else contextlib.nullcontext():
        assert len(training_images(tmp_path / "data" / data)) == 2

def test_data_fraction_is_balanced_and_shapes_are_reproducible():
    whole = training_images("shapes")
    part = gld.load_images("shapes", "train", 0.1)
    val = gld.load_images("shapes", "val")
    assert zlib.crc32(whole.items[:24]) == 170560585    # the pixels, which all recorded results depend on
    assert np.bincount(part.labels).tolist() == [20] * 12
    assert np.array_equal(part.items, gld.load_images("shapes", "train", 0.1).items)
    assert not {x.tobytes() for x in whole.items} & {x.tobytes() for x in val.items}

def test_unreadable_files_are_named_counted_and_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    save_pictures(folder, 720)
    whole = (folder / "0000.png").read_bytes()
    (folder / "0001.png").write_bytes(whole[:len(whole) // 2])
    (folder / "0002.png").write_bytes(b"")
    (folder / "0003.png").write_text("text")
    (folder / "link.png").symlink_to("nowhere")
    for name, dtype in (("float.tif", np.float32), ("int.tif", np.int32)):
        Image.fromarray(np.ones((8, 8), dtype)).save(folder / name)
    Image.new("RGB", (90, 90)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    reasons = {"0001.png": "truncated", "0002.png": "cannot identify", "0003.png": "cannot identify",
               "link.png": "No such file",
               "float.tif": "32-bit pixels", "int.tif": "32-bit pixels", "huge.png": "bomb"}
    done = train_ok("--data data --preset small --data-fraction 1 --epochs 2 --batch-size 40 --local-views 0 "
                    "--workers 2", tmp_path)
    named = re.findall("cannot be read, replaced by another image: data/(.+?): (.+)", done.stdout)
    assert sorted(name for name, _ in named) == sorted(reasons)                 # once each, not once in each epoch
    for name, reason in named:
        assert reasons[name] in reason
    assert [row["unreadable"] for row in log_of(tmp_path / "output")] == [7, 7]

@pytest.mark.parametrize("processes,good", [(1, 90), (2, 90), (1, 0)])
def test_more_than_one_percent_of_unreadable_files_end_the_run(tmp_path, processes, good):
    save_pictures(tmp_path / "data", good)
    for i in range(10):
        (tmp_path / "data" / f"text{i}.jpg").write_text("not an image")
    options = f"--data data --preset small --data-fraction 1 --batch-size {good // 5 + 2} --workers {processes % 2}"
    done = run(f"gld.py {QUICK} {options}", tmp_path, processes)
    assert_refused(done, "more than 1 %")

def test_one_process_at_a_time_downloads_cifar10(tmp_path, monkeypatch):
    def download(root, **kwargs):
        busy = tmp_path / "busy"
        busy.touch(exist_ok=False)      # fails if the other process is here, too
        time.sleep(0.3)
        busy.unlink()
        return argparse.Namespace(data=np.zeros((16, 32, 32, 3), np.uint8), targets=[0] * 16)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", download)
    train_ok("--data cifar10 --data-fraction 1 --max-steps 1", tmp_path, processes=2)

# ------------------------------------------------------------------------------------------------ networks

@pytest.mark.parametrize("arch", gld.ARCHS)
def test_every_backbone_at_both_sizes(arch):
    small = arch == "conv_tiny"
    sizes = (32, 16) if small else (224, 96)
    with torch.device("meta"):
        backbone = gld.Backbone(arch, sizes[0], drop_path=0.1)
        for size in sizes:
            patches = (size // gld.stride_of(arch, 16)) ** 2
            image, local = backbone(torch.randn(2, 3, size, size))
            assert image.shape == (2, backbone.width)
            assert local.shape == (2, patches, backbone.width)
    if arch.startswith(("swin", "vit")):
        depths = [module.p for module in backbone.modules() if isinstance(module, gld.StochasticDepth)]
        assert depths[0] == 0 and math.isclose(depths[-1], 0.1) and depths == sorted(depths)
        official = 0.2 if arch in ("swin_s", "swin_b") else 0.1
        assert config("--preset", "paper", "--arch", arch).drop_path == official

@torch.no_grad()
def test_swin_equals_torchvisions_on_large_grids():
    ours = gld.Backbone("swin_t").eval()
    theirs = torchvision.models.swin_t().eval()
    theirs.head = torch.nn.Identity()
    theirs.load_state_dict(ours.net.state_dict())
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    for size in (224, 160):
        x = torch.randn(1, 3, size, size)
        assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-5)

@torch.no_grad()
def test_swin_equals_the_official_one_on_small_grids():
    """The official block: pad 6 x 6 to 7 x 7, shift by 3, mask by regions made of slices, shift back."""
    heads, C = 12, 384
    attention = gld.Backbone("swin_t").eval().net.features[5][1].attn
    attention.relative_position_bias_table.normal_()
    x = torch.randn(2, 6, 6, C)
    padded = torch.roll(F.pad(x, (0, 0, 0, 1, 0, 1)), (-3, -3), (1, 2)).view(2, 49, C)
    line = torch.tensor([0, 0, 0, 0, 1, 1, 1])          # a window of 7: what follows row 4 has come round
    regions = (2 * line[:, None] + line).view(49)
    mask = torch.where(regions[None] == regions[:, None], 0.0, -100.0)
    q, k, v = attention.qkv(padded).view(2, 49, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[attention.relative_position_index].view(49, 49, heads)
    similarity = q * (C // heads) ** -0.5 @ k.mT
    weights = (similarity + bias.permute(2, 0, 1) + mask).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 49, C)).view(2, 7, 7, C)
    expected = torch.roll(expected, (3, 3), (1, 2))[:, :6, :6]
    assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)

def test_vit_starts_with_the_official_statistics():
    torch.manual_seed(0)
    net = gld.Backbone("vit_tiny").net
    for name, x in net.named_parameters():
        if x.ndim == 2 or "class_token" in name or "pos_embedding" in name:
            few = "class_token" in name
            assert abs(x.std() / 0.02 - 1) < (0.2 if few else 0.05), name
        elif "bias" in name and "conv_proj" not in name:
            assert (x == 0).all(), name
    limit = 1 / (3 * 16 * 16) ** 0.5                    # torch's default for a convolution: uniform
    assert_uniform(net.conv_proj.weight.detach(), -limit, limit)

def test_a_vits_position_embedding_is_resized_to_other_grids():
    backbone = gld.Backbone("vit_tiny", 64, 16)
    embedding = backbone.net.encoder.pos_embedding
    assert torch.equal(backbone.position_embedding(4, 4), embedding)
    grid = embedding[0, 1:].T.view(1, 192, 4, 4)
    resized = F.interpolate(grid, size=(2, 3), mode="bicubic", antialias=False)
    assert_close(backbone.position_embedding(2, 3)[:, 1:], resized.flatten(2).mT)

def test_heads_give_unit_vectors_and_a_weight_normalised_layer():
    for norm in ("--norm-last-layer", "--no-norm-last-layer"):
        head = gld.Head(24, config(norm, "--out-dim", 20))
        assert_close(head(torch.randn(5, 24)).norm(dim=1), torch.ones(5))
        assert_close(head.weight().norm(dim=1), torch.ones(20))
        assert head.gain.requires_grad == (norm == "--no-norm-last-layer")

def test_stochastic_depth_is_the_students_only():
    cfg = config("--arch", "vit_tiny", "--drop-path", 0.5, "--local-views", 0)
    networks = gld.make_state(cfg, torch.device("cpu"))
    x = [torch.randn(2, 4, 3, 32, 32)]
    for name in ("student", "teacher"):
        network = networks[name]
        assert torch.equal(network(x).image_z, network(x).image_z) == (name == "teacher")

# ------------------------------------------------------------------------------------------------ training

def test_the_table_of_hyperparameters_holds_the_defaults():
    rows = re.findall(r"^    (--\S+) +(\S.*?) {2,}(\S.*?) *$", gld.__doc__, re.M)
    assert len(rows) == 10
    for flag, *cells in rows:
        for preset, value in zip(("small", "paper"), cells):
            assert config("--preset", preset, flag, *value.split()) == config("--preset", preset), (flag, preset)

def watch_state(monkeypatch):
    """What the next run trains: a dict that is filled when it starts."""
    state = {}

    def make_state(*args, make=gld.make_state):
        state.update(make(*args))
        return state
    monkeypatch.setattr(gld, "make_state", make_state)
    return state

def recorded_steps(options, cwd, monkeypatch):
    """Train. Returns: for each step what made it (a namespace of values before its update), and the checkpoint."""
    state, steps = watch_state(monkeypatch), []

    def loss(student, teacher, centers, *args, loss=gld.distillation_loss, **kwargs):
        losses = loss(student, teacher, centers, *args, **kwargs)
        trained = {name: x for name, x in state["student"].named_parameters() if x.requires_grad}
        grads = torch.autograd.grad(losses[0], list(trained.values()), retain_graph=True)
        steps.append(argparse.Namespace(
            student_out=student, teacher_out=teacher, image_loss=losses[1], teacher_temp=kwargs["teacher_temp"],
            centers=centers.clone(), student=copy.deepcopy(state["student"].state_dict()),
            teacher=copy.deepcopy(state["teacher"].state_dict()), grads=dict(zip(trained, grads))))
        return losses

    def before_update(optimizer, args, kwargs):
        steps[-1].groups = [dict(group) for group in optimizer.param_groups]
        named = state["student"].named_parameters()
        steps[-1].clipped = {name: x.grad.clone() for name, x in named if x.grad is not None}

    monkeypatch.setattr(gld, "distillation_loss", loss)
    with register_optimizer_step_pre_hook(before_update):
        train_ok(options, cwd)
    return steps, checkpoint(cwd / "output")

def half_cosine(start, end, n):
    return end + (start - end) * (1 + np.cos(np.pi * np.arange(n) / n)) / 2

def test_each_step_does_what_the_paper_says(tmp_path, monkeypatch):
    """12 steps in 4 epochs. Each number of the method is computed here again and compared with the one that is used."""
    images, labels = gld.draw_shapes(24, 0)
    monkeypatch.setattr(gld, "draw_shapes", lambda n, seed: (images, labels))
    limit = 0.1
    steps, end = recorded_steps(
        "--data-fraction 1 --epochs 4 --warmup-epochs 1 --local-views 2 --no-norm-last-layer --freeze-last-layer 1 "
        f"--clip-grad {limit} --teacher-temp 0.07 --warmup-teacher-temp-epochs 3", tmp_path, monkeypatch)
    assert len(steps) == 12
    top = 0.016 * 8 / 256               # the rate of a batch of 8
    lr = [*np.linspace(0, top, 3), *half_cosine(top, 1e-6, 9)]
    decay = half_cosine(0.04, 0.4, 12)
    momentum = half_cosine(0.99, 1, 12)
    temps = np.repeat([0.04, 0.055, 0.07, 0.07], 3)
    assert all(torch.equal(steps[0].student[name], steps[0].teacher[name]) for name in steps[0].grads)
    assert not steps[0].centers.any()
    last = argparse.Namespace(**{name: end[name] for name in ("student", "teacher", "centers")})
    clipped = 0
    for i, (now, after) in enumerate(zip(steps, [*steps[1:], last])):
        # schedules; weight decay spares biases and norms
        matrices, vectors = now.groups
        assert all(x.ndim > 1 for x in matrices["params"]) and all(x.ndim == 1 for x in vectors["params"])
        assert vectors["weight_decay"] == 0
        found = [matrices["lr"], vectors["lr"], matrices["weight_decay"], now.teacher_temp]
        np.testing.assert_allclose(found, [lr[i], lr[i], decay[i], temps[i]], rtol=1e-6)

        # the student sees all views, the teacher the two global ones; the image loss is that of DINO
        s = now.student_out.image_z @ now.student_out.image_weight.T
        t = now.teacher_out.image_z @ now.teacher_out.image_weight.T
        assert len(s) == 4 and len(t) == 2
        target = F.softmax((t - now.centers[0]) / temps[i], -1)
        log_p = F.log_softmax(s / 0.1, -1)
        pairs = [-(target[q] * log_p[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]
        assert_close(now.image_loss, sum(pairs) / 6, rtol=1e-4, atol=0)

        # each gradient is clipped by itself; the last layers are frozen in the first epoch
        for name, grad in now.grads.items():
            if i < 3 and name.endswith(("head.direction", "head.gain")):
                assert name not in now.clipped and torch.equal(after.student[name], now.student[name])
                continue
            wanted = grad * min(1, limit / (grad.norm() + 1e-6))
            assert_close(now.clipped[name], wanted, rtol=1e-4, atol=1e-8)
            clipped += grad.norm() > limit
            assert i == 0 or not torch.equal(after.student[name], now.student[name])

        # the teacher follows the new student; the centre moves a tenth of the way to the teacher's mean logits
        for name in now.grads:
            wanted = momentum[i] * now.teacher[name] + (1 - momentum[i]) * after.student[name]
            assert_close(after.teacher[name], wanted, rtol=1e-5, atol=1e-8)
        patch_logits = now.teacher_out.patch_z[0] @ now.teacher_out.patch_weight.T
        means = torch.stack([logits.flatten(0, 2).mean(0) for logits in (t, patch_logits)])
        assert_close(after.centers, 0.9 * now.centers + 0.1 * means, rtol=1e-4, atol=1e-7)
    assert 20 < clipped < 0.9 * 12 * len(now.grads)

@pytest.mark.parametrize("limit", [3.0, 0])
def test_clipping_is_for_each_parameter_and_the_norm_is_of_all(limit):
    grads = [scale * torch.randn(7, 5) for scale in (0, 1e-3, 0.5, 0.6, 10)]
    clipped = [grad.clone() for grad in grads]
    assert_close(gld.clip_gradients(clipped, limit), torch.cat(grads).norm())
    for before, after in zip(grads, clipped):
        assert_close(after, before * min(1, (limit or math.inf) / (before.norm() + 1e-6)))

@pytest.mark.parametrize("matching", ["geometric", "similarity"])
def test_two_processes_equal_one_with_the_same_command(tmp_path, matching):
    """On a network without batch norm. A batch that they cannot share is refused."""
    options = f"--matching {matching} --arch vit_tiny --drop-path 0 --batch-size 4 --max-steps 1"
    train_ok(f"{options} --output one", tmp_path)
    done = train_ok(f"{options} --output two", tmp_path, processes=2)
    assert done.stdout.count("step 1 ") == 1            # one prints
    one, two = (log_of(tmp_path / name)[0] for name in ("one", "two"))
    for key in ("lr", "loss_image", "loss_patch", "grad_norm"):
        assert math.isclose(one[key], two[key], rel_tol=1e-5, abs_tol=1e-9), key
    a, b = (checkpoint(tmp_path / name)["centers"] for name in ("one", "two"))
    assert_close(a, b, rtol=1e-5, atol=1e-6)
    done = run(f"gld.py {QUICK} --batch-size 5", tmp_path, processes=2)
    assert_refused(done, "--batch-size 5 cannot be shared equally by 2 processes; the next size that can is 6")

def test_processes_with_other_options_images_or_checkpoints_are_refused(tmp_path):
    """As where the command is typed on each node, before anything can hang."""
    save_pictures(tmp_path / "a", 33)
    save_pictures(tmp_path / "b", 32)
    command = "--data a --preset small --data-fraction 1 --max-steps 1"
    train_ok(f"{command} --output ahead", tmp_path)
    for last, message in {
            "--lr 0.1": "--lr: 0.016 in process 0, but 0.1 in process 1",
            "--batch-size 4": "--batch-size: 8 in process 0, but 4 in process 1",
            "--max-steps 2": "--max-steps: 1 in process 0, but 2 in process 1",
            "--data b": "--data.*33.* in process 0, but .*32.* in process 1",
            "--output ahead": "--output.* 0 in process 0, but 1 in process 1"}.items():
        done = run(f"gld.py {QUICK} {command}", tmp_path, 2, last)
        assert_refused(done)
        assert re.search(message, done.stderr), done.stderr
        assert done.codes == [2, 2]

@pytest.mark.parametrize("stop,end,options", [
    (3, 40, ""), (30, 40, ""), (37, 40, ""), (2, 4, "--arch vit_tiny --drop-path 0.5 --local-views 0 --batch-size 2")])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop, end, options):
    """Stopped in the middle of an epoch of 30 steps, at its end, in the next one; and with layers dropped at random."""
    options = f"--epochs 2 {options}"
    whole = tmp_path.parent / f"whole{end}"
    if not whole.exists():
        train_ok(f"{options} --max-steps {end} --output {whole}", tmp_path)
    train_ok(f"{options} --max-steps {stop} --workers 1", tmp_path)
    assert f"from step {stop}" in train_ok(f"{options} --max-steps {end} --workers 1", tmp_path).stdout
    same_weights(checkpoint(whole), checkpoint(tmp_path / "output"))
    assert [row["step"] for row in log_of(tmp_path / "output")] == sorted({stop, min(30, end), end})

@pytest.mark.parametrize("options", [
    "--local-views 0 --matching none", "--local-size 8 --global-size 8", "--matching similarity --local-size 8",
    "--arch vit_tiny --clip-grad 0 --no-hinge --local-views 0", "--blur-sigma 0.1 9",           # wider than a view
    "--batch-size 240 --warmup-epochs 1"])                                      # of one step
def test_no_local_views_one_patch_grids_and_other_corners(tmp_path, options):
    train_ok(f"--max-steps 1 {options}", tmp_path)

def top1_of_20nn(options, cwd):
    """What eval_knn.py prints: for the checkpoint, without training, of raw pixels."""
    done = run(f"eval_knn.py --k 20 --workers 0 {options}", cwd)
    return [float(top1) for top1 in re.findall(r"20-NN (\S+)", done.stdout)]

def test_knn_while_training_is_eval_knns_and_changes_nothing(tmp_path, monkeypatch):
    """With two processes, too, whose batch norm statistics differ: the second one has strange images."""
    def augment(*args, augment=gld.augment):
        return augment(*args) + 9 * int(os.environ.get("RANK", 0))
    monkeypatch.setattr(gld, "augment", augment)
    monkeypatch.setattr(gld, "draw_shapes", lambda n, seed, f=gld.draw_shapes: f(n // 10, seed))
    options = "--data-fraction 1 --epochs 2 --eval-every"       # 240 images, and 120 to evaluate
    train_ok(f"{options} 2 --output one", tmp_path)
    train_ok(f"{options} 2 --output two", tmp_path, processes=2)
    train_ok(f"{options} 0 --output without", tmp_path)
    same_weights(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "without"))
    for name in ("one", "two"):
        first, last = log_of(tmp_path / name)
        expected, *_ = top1_of_20nn(f"--checkpoint {name}/checkpoint.pt", tmp_path)
        assert first.get("knn") is None and math.isclose(last["knn"], expected, abs_tol=0.06)

def test_the_built_in_run_learns_and_does_not_warn(tmp_path):
    """A shortened version of the README's first two commands is far above the untrained network and raw pixels."""
    done = run("gld.py --epochs 4 --eval-every 0 --workers 1", tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stdout
    trained, *others = top1_of_20nn("", tmp_path)
    assert len(others) == 2 and trained > max(others) + 3, (trained, others)

def test_a_collapse_is_seen(tmp_path):
    said = train_ok("--lr 30 --epochs 2", tmp_path).stdout
    assert said.count("WARNING: looks collapsed: the teacher's entropy is ") == 2           # after each epoch
    cfg = config("--warmup-epochs", 1, "--out-dim", 256)
    fine = dict(epoch=1, entropy=4.0, spread=0.5)
    assert not gld.looks_collapsed(fine, cfg)
    for sign in (dict(entropy=5.52), dict(entropy=0.05), dict(spread=0.0), dict(entropy=math.nan)):
        assert gld.looks_collapsed(fine | sign, cfg), sign
        assert not gld.looks_collapsed(fine | sign | dict(epoch=0), cfg)        # at the start, all may be alike

def let_gradients_overflow(monkeypatch, of, spared=None):
    """On a CPU, too: a run in fp16, in which the gradient of a part of the student's outputs is infinite or NaN."""
    steps = itertools.count()

    def loss(student, *args, loss=gld.distillation_loss, **kwargs):
        if next(steps) != spared:
            getattr(student, of).register_hook(lambda grad: grad * math.inf)
        return loss(student, *args, **kwargs)
    monkeypatch.setattr(gld, "compute_dtype", lambda cfg: torch.float16)
    monkeypatch.setattr(gld, "distillation_loss", loss)

def test_fp16_ends_after_twenty_steps_in_a_row_without_a_finite_gradient(tmp_path, monkeypatch):
    """Steps 0 to 19 overflow and are skipped, step 20 is fine, the others overflow."""
    let_gradients_overflow(monkeypatch, "image_z", spared=20)
    done = run(f"gld.py {QUICK} --global-size 16 --local-views 0 --batch-size 2", tmp_path)
    assert done.returncode == 1 and re.search("stopped at step 4[01],", done.stderr), done.stderr

def test_fp16_does_not_skip_a_step_for_a_frozen_layer(tmp_path, monkeypatch):
    let_gradients_overflow(monkeypatch, "image_weight")
    train_ok("--freeze-last-layer 1 --max-steps 2", tmp_path)
    assert checkpoint(tmp_path / "output")["scaler"]["scale"] == 65536

def test_compiled_networks_train_and_save_the_same(tmp_path, monkeypatch):
    """With the eager backend, since compiling takes minutes: are both networks captured, and saved as ever?"""
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="eager")
    monkeypatch.setattr(gld.Network, "compile", compile_eagerly)
    for flag in ("compile", "no-compile"):
        train_ok(f"--{flag} --max-steps 3 --output {flag}", tmp_path)
    same_weights(checkpoint(tmp_path / "compile"), checkpoint(tmp_path / "no-compile"))
    assert len(compiled) == 2

@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("add", ["", "--precision fp16", "--compile", "--arch swin_t --global-size 64 --local-size 32"])
def test_training_and_evaluation_run_on_a_gpu(tmp_path, add):
    for steps in (3, 6):
        train_ok(f"--device cuda --local-views 2 --workers 2 --max-steps {steps} {add}", tmp_path)
    log = log_of(tmp_path / "output")
    assert len(log) == 2 and all(math.isfinite(row["loss_image"] + row["loss_patch"]) for row in log)
    assert run("eval_knn.py --device cuda --k 5 --linear", tmp_path).returncode == 0

# ------------------------------------------------------------------------------------------------ faults

def assert_refused(done, *words):
    """A run ended with exit code 2 and one line, which holds these words."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr

@contextlib.contextmanager
def full_disk():
    """No file may grow past 50 kB, as if the disk were full there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL to the process, not to its worker, at two random moments. 15 steps are an epoch."""
    options = "--batch-size 16 --epochs 3 --output"
    train_ok(f"{options} whole", tmp_path)
    parts = tmp_path / "parts"
    for words, workers in (("step 1 ", 1), ("from step", 0)):
        process = launch(f"gld.py {QUICK} {options} parts --workers {workers}", tmp_path)
        wait_for(process, words)
        time.sleep(np.random.default_rng().uniform(0, 1))
        process.kill()
        process.wait()                  # the worker may live on for some seconds: the next run starts all the same
        process.stdout.close()
        (parts / "checkpoint.tmp").write_bytes(b"half of a checkpoint")         # as if killed while it wrote
        with open(parts / "log.jsonl", "a") as log:
            log.write("{\n")
    train_ok(f"{options} parts", tmp_path)
    same_weights(checkpoint(tmp_path / "whole"), checkpoint(parts))
    assert {file.name for file in parts.iterdir()} == {"backbone.pt", "checkpoint.pt", "log.jsonl"}
    assert [row["step"] for row in log_of(parts)] == [15, 30, 45]               # no line twice

@pytest.mark.parametrize("processes,number", [(1, signal.SIGINT), (1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_signal_saves_after_the_step_and_the_run_resumes(tmp_path, processes, number):
    """Ctrl-C, a closed terminal, the end of a Slurm job: to whole process groups. Several processes stop at one step.
    Workers hold the pipe that is read here, so they are gone at its end."""
    command = f"gld.py {QUICK} --workers 1 --epochs 50"
    variables = variables_of_ranks(2) if processes == 2 else [{}]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # for those that are started here, also under nohup
    started = [launch(command, tmp_path, env=os.environ | added) for added in variables]
    wait_for(started[0], "step 1 ")
    for process in started:
        os.killpg(process.pid, number)
    said = started[0].communicate(timeout=60)[0]
    assert {process.wait(60) for process in started} == {gld.STOPPED} == {75}
    step = checkpoint(tmp_path / "output")["step"]
    assert 1 <= step < 1500 and "Traceback" not in said
    assert said.count(f"stopped on request: saved at step {step}; rerun the same command") == 1
    assert said.count("stopping after this step; Ctrl-C again quits now") == (processes == 1)
    assert f"from step {step}" in train_ok(f"--epochs 50 --max-steps {step + 1}", tmp_path).stdout

def test_torchrun_restarts_after_a_death_and_stops_on_ctrl_c(tmp_path):
    # torchrun's shared store gives new processes the addresses of the dead ones, which they then wait for
    environment = os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    command = f"gld.py {QUICK} --batch-size 16 --epochs 50"
    process = launch(command, tmp_path, processes=2, restarts=1, env=environment)
    wait_for(process, "epoch 1 step 30")                # the first checkpoint, at step 15, is there
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    wait_for(process, "from step")
    wait_for(process, "| loss")
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    step = checkpoint(tmp_path / "output")["step"]
    assert said.count(f"stopped on request: saved at step {step}; rerun the same command") == 1, said
    assert step > 15 and process.returncode != 0

@pytest.mark.parametrize("numbers,handler,code", [
    ([signal.SIGINT, signal.SIGINT], signal.default_int_handler, 130),
    ([signal.SIGHUP], signal.SIG_IGN, 0)], ids=["Ctrl-C twice", "a terminal closed under nohup"])
def test_a_second_ctrl_c_quits_and_what_is_ignored_stays_so(tmp_path, monkeypatch, numbers, handler, code):
    """Signals that come in the middle of each step."""
    def loss_and_signals(*args, loss=gld.distillation_loss, **kwargs):
        for number in numbers:
            os.kill(os.getpid(), number)
        return loss(*args, **kwargs)

    monkeypatch.setattr(gld, "distillation_loss", loss_and_signals)
    before = signal.signal(numbers[0], handler)
    done = run(f"gld.py {QUICK} --max-steps 2", tmp_path)
    signal.signal(numbers[0], before)
    assert done.returncode == code, done.stderr
    assert ("interrupted" in done.stderr) == (code == 130)

@pytest.mark.parametrize("where", ["patch loss", "gradient"])
def test_a_nan_in_one_process_stops_all_before_anything_changes(tmp_path, monkeypatch, where):
    """The loss, or a gradient, at the third step: of one process of two, or of the only one, whose state is seen."""
    state, steps = watch_state(monkeypatch), []

    def poisoned(student, teacher, centers, *args, loss=gld.distillation_loss, **kwargs):
        total, image_loss, patch_loss = loss(student, teacher, centers, *args, **kwargs)
        changing = [centers, *state["student"].parameters(), *state["teacher"].parameters()]
        steps.append((changing, [x.clone() for x in changing]))
        factor = math.nan if len(steps) == 3 and os.environ.get("RANK") != "0" else 1
        if where == "gradient":
            student.image_z.register_hook(lambda grad: grad * factor)
        else:
            patch_loss = patch_loss * factor
        return total, image_loss, patch_loss

    monkeypatch.setattr(gld, "distillation_loss", poisoned)
    done = run(f"gld.py {QUICK}", tmp_path)
    assert "stopped at step 2, lr 0" in done.stderr and f"{where} nan" in done.stderr
    assert done.returncode == 1 and not (tmp_path / "output/checkpoint.pt").exists()
    assert len(steps) == 3 and all(map(torch.equal, *steps[-1]))
    steps.clear()
    assert run(f"gld.py {QUICK}", tmp_path, processes=2).codes == [1, 1]

@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path, processes):
    train_ok("--epochs 2 --max-steps 30", tmp_path, processes)
    before = (tmp_path / "output/checkpoint.pt").read_bytes()
    with full_disk():
        done = run(f"gld.py {QUICK} --epochs 2", tmp_path, processes)
    codes = done.codes if processes > 1 else [done.returncode]
    assert codes == [1] * processes, done.stderr
    assert done.stderr.count("\n") == 1 and "cannot write output/" in done.stderr, done.stderr
    assert (tmp_path / "output/checkpoint.pt").read_bytes() == before
    names = {file.name for file in (tmp_path / "output").iterdir()}
    assert names == {"backbone.pt", "checkpoint.pt", "log.jsonl"}

def test_only_one_run_at_a_time_writes_to_an_output(tmp_path):
    """The second is refused while the first lives, even if it stands still; the first ends well."""
    command = f"gld.py {QUICK} --epochs 2"
    first = launch(command, tmp_path)
    wait_for(first, "step 1 ")
    first.send_signal(signal.SIGSTOP)
    alone, two = (run(command, tmp_path, processes) for processes in (1, 2))
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    for refused in (alone, two):
        assert_refused(refused, "--output output", "another run writes to it")
    assert two.codes == [2, 2]

def test_printing_never_ends_a_run(tmp_path, monkeypatch):
    """In an encoding that lacks ± and a file's name, into a closed pipe or on a full disk."""
    monkeypatch.chdir(tmp_path)
    save_classes(tmp_path / "data", 5)
    save_pictures(tmp_path / "odd", 9)
    (tmp_path / os.fsdecode(b"odd/\xff.png")).write_text("no image")
    train = f"{QUICK} --data odd --preset small --data-fraction 1 --batch-size 10 --no-resume --device cpu"
    evaluate = "--checkpoint 0/checkpoint.pt 1/checkpoint.pt --data data --k 3 --workers 0 --device cpu"
    reader, closed = os.pipe()
    os.close(reader)
    for output in (closed, "/dev/full"):
        with open(output, "w", encoding="ascii") as file, contextlib.redirect_stdout(file):
            for seed in "01":
                assert gld.main(f"{train} --seed {seed} --output {seed}".split()) == 0
            assert eval_knn.main(evaluate.split()) == 0

def test_a_dead_worker_ends_the_run(tmp_path):
    process = launch(f"gld.py {QUICK} --workers 2 --epochs 50", tmp_path)
    wait_for(process, "step 1 ")
    os.kill(children(process.pid)[-1], signal.SIGTERM)          # which workers must not ignore: so they are told to end
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "DataLoader worker" in said, said

def test_a_program_ends_and_its_workers_with_it(tmp_path):
    """Those of a loader that is left over, and those of a run that an error in a worker ends."""
    program = f"""if True:
        import gld, sys
        cfg = gld.parse_arguments(["--workers", "1"])
        left_over = iter(gld.make_loader(gld.load_images("shapes", "train", 0.1), cfg, 0, 1, range(50), 7))
        next(left_over)
        gld.crop_views = None
        sys.exit(gld.main("{QUICK} --workers 2 --device cpu --output {tmp_path}".split()))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "object is not callable" in done.stderr

def test_the_share_of_waiting_and_the_time_left_are_reported(tmp_path, monkeypatch):
    """By a clock that moves on by 1000 s whenever an image is read: one step of 8 images is left."""
    seconds, now = [0], time.perf_counter

    def read_slowly(images, i, read=gld.Images.read):
        seconds[0] += 1000
        return read(images, i)

    monkeypatch.setattr(gld.Images, "read", read_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + seconds[0])
    said = train_ok("--epochs 2 --max-steps 31", tmp_path).stdout
    assert re.search(r"step 30 .* (99|100)% waiting .* 2:1\d:\d\d left", said)
    assert 0.99 < log_of(tmp_path / "output")[0]["waiting"] <= 1

def test_a_run_prints_what_it_has_and_what_to_do_next(tmp_path):
    for _ in range(2):                  # when it ends, and when it is started again
        said = train_ok("--matching none --max-steps 1", tmp_path).stdout
        assert "the weights are in output/" in said
        assert said.endswith("python eval_knn.py --checkpoint output/checkpoint.pt\n")
        assert not re.search("patch|matched|GPU", said)
    said = train_ok("--max-steps 1 --output geometric", tmp_path).stdout
    assert "patch" in said and "matched" in said and "GPU" not in said

# ------------------------------------------------------------------------------------------------ bad input

PICTURES = HERE / ".github"
SMALL_PAPER = "--preset paper --arch conv_tiny --global-size 32 --local-size 16"
REFUSED = {options: options.split()[0] for options in (    # the line must name the flag
    "--matching nearest|--arch vgg|--lr nan|--lr -1|--lr abc|--teacher-temp 0|--out-dim 1|--warmup-teacher-temp -1|"
    "--max-steps -1|--local-scale 0 0.4|--local-size 0|--data-fraction 0|--data-fraction 1.5|--drop-path 1|--unknown|"
    "--warmup-epochs 5 --epochs 3|--batch-size 5000|--precision fp16|--impl triton|--teacher-momentum 1.1|--workers -1|"
    f"--output {__file__}|--output {__file__}/below|--output /proc/nowhere|--output /proc/self|--batch_size 4|"
    "--blur-sigma 0 1|--eval-every -2|--profile 5").split("|")}
REFUSED |= {
    "--epochs 0": "must be from 1 to 1e+09, got [0]",
    "--global-size 33": "multiples of 8",
    "--device cuda": "CUDA",
    "--global-scale 0.9 0.4": "--global-scale must be from 1e-09 to 1, the lower value first, got [0.9, 0.4]",
    "--data nowhere --preset small": "--data nowhere: no such file or folder",
    f"--data {__file__} --preset small": "unpack archives first",
    "--data . --preset small": "no images",
    "--init-from nowhere.pt": "nowhere.pt",
    f"--data {PICTURES}": "--preset small trains here",
    f"--data {PICTURES} --preset small --batch-size 2 --eval-every 1": "must hold train/",
    f"--data {PICTURES} {SMALL_PAPER}": "--preset small"}       # 2 images, and batches of 256

@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, options):
    needs_no_gpu = ("--device cuda", "--precision fp16", "--impl triton", f"--data {PICTURES}")
    if torch.cuda.is_available() and options in needs_no_gpu:
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gld.main(options.split()) == 2
    out = capsys.readouterr()
    assert REFUSED[options] in out.err and out.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))

@pytest.mark.parametrize("arch", ["conv_tiny", "swin_t", "vit_tiny --patch-size 14"])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(tmp_path, arch):
    done = run(f"gld.py --arch {arch} --global-size 90 --local-size 50", tmp_path)
    assert_refused(done, arch.split()[0], "multiples of")
    sizes = re.search(r"--global-size \d+ --local-size \d+", done.stderr)[0]
    assert config(*f"--arch {arch} {sizes}".split()).grids

def test_without_world_size_the_other_variables_mean_nothing(tmp_path, monkeypatch):
    """A shell or a notebook may have them left over."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert_refused(run("gld.py --lr nan", tmp_path), "--lr")
    assert "step 1 " in train_ok("--max-steps 1", tmp_path).stdout

def test_help_tells_names_and_defaults(capsys):
    for script, words in ((gld, "similarity swin_b bf16 triton cuda cifar10 65536 0.016"),
                          (eval_knn, "teacher student cuda 0.07 128 200 output/checkpoint.pt")):
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        said = capsys.readouterr().out
        assert [word for word in words.split() if word not in said] == []
        assert "-1.0" not in said and "()" not in said

def test_by_default_there_is_a_worker_per_processor_that_may_be_used(monkeypatch):
    for usable, workers in ((3, 3), (99, 10)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
        script = {"__name__": "gld_again"}
        exec((HERE / "gld.py").read_text(), script)
        assert script["parse_arguments"]([]).workers == workers

def test_the_paper_preset_and_its_defaults(tmp_path):
    done = train_ok(f"--data {PICTURES} --data-fraction 1 {SMALL_PAPER} --batch-size 2 --max-steps 1", tmp_path)
    assert "preset paper" in done.stdout and "2 images" in done.stdout
    small, paper = config(), config("--preset", "paper")
    assert (small.preset, small.batch_size, small.drop_path, small.eval_every) == ("small", 32, 0, 1)
    assert (paper.preset, paper.batch_size, paper.drop_path) == ("paper", 256, 0.1)
    assert config("--data", "data", "--preset", "small").eval_every == 0

def test_resuming_with_other_settings_is_refused(tmp_path):
    """Images first, then what else differs; nothing is changed."""
    train_ok("--max-steps 1", tmp_path)
    save_pictures(tmp_path / "data", 240)
    before = (tmp_path / "output/checkpoint.pt").read_bytes()
    for options, words in (
            ("--data data --preset small --data-fraction 1", "--data data: not the images"),
            (SMALL_PAPER, "--preset: paper here, but output/checkpoint.pt was made with small"),
            ("--seed 1", "--seed"), ("--matching none", "--matching"), ("--out-dim 128", "--out-dim"),
            ("--batch-size 4", "--batch-size"),
            ("--epochs 2", "another --output or --no-resume, and --init-from output/checkpoint.pt")):
        assert_refused(run(f"gld.py {QUICK} --max-steps 2 {options}", tmp_path), words)
    assert (tmp_path / "output/checkpoint.pt").read_bytes() == before
    for same in ("--max-steps 1", "--max-steps 2 --global-scale 0.4 1.0 --workers 1 --save-every 3"):
        assert "from step 1;" in train_ok(same, tmp_path).stdout                # nothing to do; the same values, given
    train_ok("--max-steps 1 --matching none --no-resume", tmp_path)
    assert len(log_of(tmp_path / "output")) == 1        # a new run has a new log

class Hostile:
    def __reduce__(self):
        return os.system, ("touch harmed",)

def vit_keys(width=384, **others):
    """Some of the weights of a ViT, as DINO and DINOv2 name them."""
    return {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 5, width),
            "patch_embed.proj.weight": torch.zeros(width, 3, 14, 14), "patch_embed.proj.bias": torch.zeros(width),
            "norm.weight": torch.zeros(width)} | others

DINOV3 = vit_keys()
del DINOV3["pos_embed"]
NOT_LOADED = {  # file: what it holds, what is said
    "hostile.pt": ({"student": Hostile()}, "holds Python objects (posix.system)"),
    "module.pt": (torch.nn.Linear(2, 2), "holds Python objects (torch.nn.modules.linear.Linear)"),
    "cut.pt": ({"student": {"weight": torch.zeros(1000)}}, "damaged, or not a checkpoint"),
    "text.pt": ("hello", "damaged, or not a checkpoint"),
    "file.safetensors": ("\2\0\0\0\0\0\0\0{}", "convert it: torch.save(safetensors"),
    "tensor.pt": (torch.zeros(3), ""),
    "numbers.pt": ({"student": 1, "teacher": 2}, "no state dict"),
    "vit_l.pt": (vit_keys(1024), "width 1024 is no --arch of gld.py"),
    "registers.pt": (vit_keys(register_tokens=torch.zeros(1, 4, 384)), "regist"),
    "swiglu.pt": (vit_keys(**{"blocks.0.mlp.w12.weight": torch.zeros(2, 2)}), "SwiGLU"),
    "dinov3.pt": (DINOV3, "position")}

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_is_data_not_code_and_the_reason_is_told(tmp_path):
    (tmp_path / "output").mkdir()
    for name, (content, words) in NOT_LOADED.items():
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)
        if name == "cut.pt":
            os.truncate(path, 2000)
        assert_refused(run(f"eval_knn.py --data shapes --checkpoint {name}", tmp_path), f"--checkpoint {name}: ", words)
        assert_refused(run(f"gld.py {QUICK} --no-resume --init-from {name}", tmp_path), f"--init-from {name}: ", words)
        shutil.copy(path, tmp_path / "output/checkpoint.pt")
        assert_refused(run("gld.py --data-fraction 0.1", tmp_path), "output/checkpoint.pt")
    Path(tmp_path, "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    assert_refused(run("eval_knn.py --checkpoint pickle.pt", tmp_path), "pickle.pt")
    done = run("eval_knn.py --checkpoint output", tmp_path)
    assert_refused(done, "--checkpoint output: a folder; do you mean output/checkpoint.pt?")
    assert not (tmp_path / "harmed").exists()

# ------------------------------------------------------------------------------------------------ evaluation

def knn_definition(train, labels, val, truth, k, temperature):
    """(top-1, top-5) in percent, one query at a time in float64. A class without votes is no answer."""
    top1 = top5 = 0
    for similarities, label in zip(val.double() @ train.double().T, truth):
        similarity, nearest = similarities.topk(min(k, len(train)))
        weight = ((similarity - similarity[0]) / temperature).exp()             # else, at 1e-3, exp overflows
        votes = torch.zeros(9, dtype=torch.float64).index_add(0, labels[nearest], weight)
        ranked = [name for name in votes.argsort(descending=True)[:5] if votes[name] > 0]
        top1 += label == ranked[0]
        top5 += label in ranked
    return 100 * top1 / len(val), 100 * top5 / len(val)

@pytest.mark.parametrize("queries,temperature", [(1, 0.07), (32, 1e-3), (101, 0.07)])
def test_knn_equals_the_definition_in_float64(queries, temperature, monkeypatch):
    """All images look alike, so that similarities differ, but by less than a step of float16."""
    monkeypatch.setattr(gld, "KNN_BYTES", 4 * 300 * 7)          # seven queries at a time
    g = torch.Generator().manual_seed(queries)
    base = torch.randn(64, generator=g)
    train, val = (F.normalize(base + 0.1 * torch.randn(n, 64, generator=g), dim=1).half() for n in (300, queries))
    labels, truth = (torch.randint(0, 9, (n,), generator=g) for n in (300, queries))
    for k, found in gld.knn(train, labels, val, truth, [1, 3, 10, 999], temperature).items():
        expected = knn_definition(train, labels, val, truth, k, temperature)
        assert np.allclose(found, expected, atol=1e-3, rtol=0), k

def test_linear_probe_learns_what_is_linear():
    g = torch.Generator().manual_seed(0)
    train, val = (F.normalize(torch.randn(n, 16, generator=g), dim=1).half() for n in (600, 200))
    top1, top5 = eval_knn.linear_probe(train, train[:, :7].argmax(1), val, val[:, :7].argmax(1))
    assert 85 < top1 < top5 and top5 > 99

def test_differences_pair_equal_seeds_and_settings():
    runs = [(dict(matching="none", seed=2, lr=0.2, output="none"), [0, 0])]     # another lr: not to be paired
    for matching, values in {"geometric": (50, 60, 40), "none": (48, 50)}.items():
        for seed, value in enumerate(values):
            runs.append((dict(matching=matching, seed=seed, lr=0.1, output=matching), [value, value + seed]))
    found = {label: sorted(rows.tolist()) for label, rows in eval_knn.compare_runs(runs)}
    assert found == {"geometric": [[40, 42], [50, 50], [60, 61]],
                     "none": [[48, 48], [50, 51]],
                     "geometric - none": [[2, 2], [10, 10]]}

def test_a_table_of_several_runs_by_one_process_and_by_two(tmp_path):
    save_classes(tmp_path / "data", 10)
    save_pictures(tmp_path / "data/val/a", 11, (40, 44))        # 21 do not come out even; no two are the same
    files = []
    for matching, seed in itertools.product(("geometric", "none"), (0, 1)):
        train_ok(f"--data data --preset small --data-fraction 0.5 --batch-size 5 --matching {matching} --seed {seed} "
                 f"--output {matching}{seed}", tmp_path)
        files.append(f"{matching}{seed}/checkpoint.pt")
    command = f"eval_knn.py --checkpoint {' '.join(files)} --k 5 --linear --matches --untrained --batch-size 4"
    found = []
    for processes in (1, 2):
        done = run(f"{command} --workers 0 --json t.json", tmp_path, processes)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / "t.json").read_text()))
    table = found[0]
    assert table == found[1] and (table["train"], table["val"]) == (10, 21)
    rows = {row.split("  ")[0]: row for row in done.stdout.splitlines()}
    geometric, none = np.reshape([table[file]["linear"][0] for file in files], (2, 2))
    x = geometric - none
    words = f"linear {x.mean():.2f} ± {x.std(ddof=1):.2f} ({x.min():.2f} to {x.max():.2f})"
    assert words in rows["geometric - none, 2 seeds"]
    assert "correspondence accuracy" in done.stdout and "guessed" not in done.stdout
    assert "matches" in table["untrained"] and "matches" not in table["raw pixels"]
    assert "conv_tiny" not in rows["raw pixels"]        # they need no network
    (tmp_path / "data/val/b/0001.png").write_text("no image")
    assert_refused(run(f"{command} --workers 1", tmp_path), "val/b/0001.png cannot be read")

def test_a_size_is_guessed_or_given_and_features_are_finite(tmp_path):
    save_classes(tmp_path / "data", 2)
    weights = gld.Backbone("conv_tiny").net.state_dict()
    torch.save(weights, tmp_path / "plain.pt")
    command = "eval_knn.py --checkpoint plain.pt --data data --k 1 --workers 0"
    guessed, given = (run(f"{command} {option}", tmp_path).stdout for option in ("", "--size 48"))
    assert "32 px (crop of 37; size guessed, --size sets it)" in guessed
    assert "48 px (crop of 55)" in given
    next(iter(weights.values())).mul_(math.nan)
    torch.save(weights, tmp_path / "plain.pt")
    assert_refused(run(command, tmp_path), "features are not finite")
    if not torch.cuda.is_available():
        assert_refused(run(f"{command} --device cuda", tmp_path), "--device cuda")

@pytest.mark.parametrize("train,val,words", [
    ("a b", "a .", "images in val/ itself"),           # as distributed
    ("a b", "A c d e", r"val/A/, val/c/, val/d/; .*A is not a"), ("a", "a", "needs labels"), ("a b c", "c", "")])
def test_classes_that_train_lacks_are_refused(tmp_path, train, val, words):
    for split, names in (("train", train), ("val", val)):
        for name in names.split():
            save_pictures(tmp_path / split / name, 2)
    with pytest.raises(gld.BadInput, match=words) if words else contextlib.nullcontext():
        found = gld.labelled(str(tmp_path), 1)
        assert [images.labels.tolist() for images in found] == [[0, 0, 1, 1, 2, 2], [2, 2]]

# Patterns in the keys of torchvision's networks -> other people's names
SWIN = {r"features\.0\.0": "patch_embed.proj", r"features\.0\.2": "patch_embed.norm",
        r"mlp\.0": "mlp.fc1", r"mlp\.3": "mlp.fc2",
        r"features\.([1357])": lambda m: f"layers.{int(m[1]) // 2}.blocks",
        r"features\.([246])": lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample"}
VIT = {"class_token": "cls_token", r"encoder\.pos_embedding": "pos_embed", "conv_proj": "patch_embed.proj",
       r"encoder\.layers\.encoder_layer_": "blocks.", r"encoder\.ln": "norm", "ln_": "norm",
       r"mlp\.0": "mlp.fc1", r"mlp\.3": "mlp.fc2",
       r"self_attention\.in_proj_": "attn.qkv.", r"self_attention\.out_proj": "attn.proj"}
SMALL = torch.zeros(2, 2)
SWIN_EXTRAS = {"module.backbone.layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
               "module.head_dense.mlp.0.weight": SMALL, "module.head.mlp.0.weight": SMALL}

def checkpoint_of_gld(state):
    """The student is minus the teacher."""
    return dict(teacher=state | {"image_head.last.weight": SMALL}, student={key: -x for key, x in state.items()},
                options=dict(arch="conv_tiny", patch_size=8, global_size=48), centers=SMALL, step=1)

FILES = {  # kind: network, image size, other people's names for its keys, state dict -> what the file holds
    "checkpoint.pt": ("conv_tiny", 48, {"^": "backbone.net."}, checkpoint_of_gld),
    "backbone.pt": ("vit_tiny", 64, {}, dict),
    "torchvision": ("resnet50", 224, {}, lambda state: state | {"fc.weight": SMALL}),
    "GLSD or EsViT Swin": ("swin_t", 224, SWIN | {"^": "module.backbone."}, lambda state: dict(
        teacher=state | SWIN_EXTRAS, student={}, args=argparse.Namespace(arch="swin"))),
    "DINO or timm ViT, compiled": ("vit_tiny", 64, VIT | {"^": "module._orig_mod.backbone."}, lambda state: dict(
        teacher=state | {"module._orig_mod.head.mlp.0.weight": SMALL}, epoch=1))}
FROZEN = "--lr 0 --min-lr 0 --weight-decay 0 --weight-decay-end 0 --teacher-momentum 1"     # nothing moves

def random_backbone(*args):
    """No weight is zero or one, or a mistaken name could go unseen."""
    torch.manual_seed(0)
    backbone = gld.Backbone(*args).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone

def renamed(state, names):
    """A state dict under other people's names."""
    out = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = re.sub(ours, theirs, key)
        out[key] = value.view(49, 49) if key.endswith("position_index") else value
    return out

@pytest.mark.parametrize("kind", FILES)
def test_foreign_weights_load_strictly_and_start_a_run(tmp_path, kind):
    """The views are larger than the file's, so a ViT's position embedding is resized."""
    arch, size, names, wrap = FILES[kind]
    backbone, path, x = random_backbone(arch, 64, 16), tmp_path / "file.pt", torch.randn(2, 3, 64, 64)
    state = renamed(backbone.net.state_dict(), names)
    torch.save(wrap(state), path)
    found, image_size, options = gld.load_backbone(path)
    assert (found.arch, found.patch_size, image_size) == (arch, 16, size)
    assert_close(found(x), backbone(x))

    command = (f"{FROZEN} --patch-size 16 --global-size 96 --local-views 0 --batch-size 2 --max-steps 1 "
               "--init-from file.pt")
    assert "weights from file.pt (new heads)" in train_ok(f"{command} --arch {arch}", tmp_path).stdout
    student = checkpoint(tmp_path / "output")["student"]
    teacher = torch.load(tmp_path / "output/backbone.pt", weights_only=True)    # with torchvision's names
    assert teacher.keys() == backbone.net.state_dict().keys()
    for key, value in backbone.net.named_parameters():
        value = backbone.position_embedding(6, 6) if "pos_embedding" in key else value
        sign = -1 if kind == "checkpoint.pt" else 1
        assert torch.equal(teacher[key], value), key
        assert torch.equal(student[f"backbone.net.{key}"], sign * value), key

    other = "resnet50" if arch.startswith("vit") else "vit_tiny"
    done = run(f"gld.py {QUICK} {command} --arch {other} --output other", tmp_path)
    assert_refused(done, f": error: --init-from file.pt: a {arch} does not fit --arch {other}")
    del state[[key for key in state if key.endswith("weight")][-1]]
    torch.save(wrap(state), path)
    with pytest.raises(gld.BadInput, match=f"^--init-from .*file.pt as {arch}: .*Missing key"):
        gld.load_backbone(path, flag="--init-from")

def test_dinov2s_weights_load_with_their_layer_scale(tmp_path):
    """DINOv2 multiplies what attention and MLP add to the patches by a gamma per channel."""
    backbone, x = random_backbone("vit_tiny", 70, 14), torch.randn(2, 3, 70, 70)
    state = renamed(backbone.net.state_dict(), VIT) | {"mask_token": torch.ones(1, 192)}
    for i, block in enumerate(backbone.net.encoder.layers):
        gamma1, gamma2 = 3 * torch.randn(2, 192)
        state |= {f"blocks.{i}.ls1.gamma": gamma1, f"blocks.{i}.ls2.gamma": gamma2}
        block.self_attention.register_forward_hook(lambda module, _, out, gamma=gamma1: (out[0] * gamma, None))
        block.mlp.register_forward_hook(lambda module, _, out, gamma=gamma2: out * gamma)
    torch.save(state, tmp_path / "dinov2.pth")
    found, *_ = gld.load_backbone(tmp_path / "dinov2.pth")
    assert_close(found(x), backbone(x), rtol=1e-4, atol=1e-5)

def test_a_run_starts_from_the_heads_of_another_if_they_fit(tmp_path):
    train_ok("--max-steps 2 --output a", tmp_path)
    command = f"{FROZEN} --init-from a/checkpoint.pt"
    done = train_ok(f"{command} --max-steps 1 --output b", tmp_path)
    assert "weights from a/checkpoint.pt (with its heads)" in done.stdout
    a, b = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")
    assert b["step"] == 1
    for name in ("student", "teacher"):
        for key, value in a[name].items():
            assert torch.equal(value, b[name][key]) or "running" in key or "num_batches" in key, key
    done = train_ok(f"{command} --max-steps 2 --output b", tmp_path)            # the same command resumes
    assert "from step 1" in done.stdout and "weights from" not in done.stdout
    for options in ("--out-dim 32", "--matching none", "--init-from a/backbone.pt"):
        done = train_ok(f"{command} {options} --max-steps 1 --no-resume --output c", tmp_path)
        assert "(new heads)" in done.stdout

COLUMN, ROW = np.meshgrid(range(200), range(200))
# An image whose red and green tell where a pixel lies; the blue is full
PLACES = torch.from_numpy(np.stack([COLUMN, ROW, 0 * ROW + 255]).astype(np.uint8))
PLACES_30 = gld.Images(PLACES.permute(1, 2, 0).numpy()[None].repeat(30, 0), np.zeros(30, int), "30 times")

def test_the_evaluation_is_dinos():
    """Shorter side to 256/224 of the size, the middle of it, ImageNet's statistics; the temperature of the votes."""
    cfg, seen = eval_knn.parse_arguments(["--workers", "0"]), []
    gld.extract(lambda x: seen.append(x) or x.mean((2, 3)), PLACES_30, 56, cfg, torch.device("cpu"), 0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    pixels = 255 * (seen[0][0] * std + mean)
    middle = ((torch.arange(4, 60) + 0.5) * 200 / 64 - 0.5).expand(56, 56)          # of 64 pixels
    assert (pixels - torch.stack([middle, middle.T, torch.full((56, 56), 255)])).abs().max() < 1.5
    assert (cfg.temperature, cfg.weights) == (0.07, "teacher")

class Knows(torch.nn.Module):
    """A backbone whose patch features tell the patch's position in the crop, or the place that its colours encode."""
    arch, patch_size = "conv_tiny", 16

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        place = F.avg_pool2d(x, 8)[:, :2].flatten(2).mT * 0.45          # (M, N, 2)
        position = torch.eye(place.shape[1]).expand(len(x), -1, -1)
        return x.mean((2, 3)), position if self.what == "position" else torch.cat([place.cos(), place.sin()], -1)

def test_match_shares_of_backbones_that_know_position_or_place(monkeypatch):
    shares = functools.partial(eval_knn.match_shares, images=PLACES_30, size=64, scale=(0.4, 1), device="cpu")
    found = shares(Knows("position"))
    assert found["same position"] == 100 and found["neither"] == 0
    assert 5 < found["correspondence accuracy"] == found["both"] == found["geometry: same position"] < 60
    found = shares(Knows("place"))
    assert found["correspondence accuracy"] > 95 and found["neither"] < 5
    here = torch.arange(64).expand(2, 64)
    # unmatched patches do not count: from patch 20 on, geometry says patch 0
    monkeypatch.setattr(eval_knn, "geometric_matches", lambda *_: (here.where(here < 20, 0), (here < 20).float()))
    assert shares(Knows("position"))["both"] == 100

@pytest.mark.parametrize("what", [None, "place", "position"])
def test_the_picture_joins_patches_that_show_the_same_place(what):
    """What the picture shows inside two joined patches says where they are in the image."""
    picture, lines = eval_knn.show_matches(PLACES, what and Knows(what), 64)
    picture = np.asarray(picture).astype(float)
    n = 8 if what else 7                        # patches in a row

    def place(midpoint):
        x, y, half = round(midpoint[0]), round(midpoint[1]), round(0.3 * 540 / n)
        patch = picture[y - half:y + half, x - half:x + half]
        return np.median(patch.reshape(-1, 3), 0)[:2]           # lines are thin

    for matching in ("geometric", "similarity") if what else ("geometric",):
        joined = [(start, end) for kind, start, end in lines if kind == matching]
        apart = [np.abs(place(start) - place(end)).max() for start, end in joined]
        assert 6 <= len({start for start, _ in joined}) == len(joined) <= 8
        if matching == "similarity" and what == "position":     # wrong ones are shown
            assert max(apart) > 25
        else:
            assert max(apart) < 0.75 * 200 / n, apart
    crops = picture[130:660, [*range(40, 570), *range(645, 1175)], 2]
    assert 0.27 < (crops < 100).mean() < 0.58   # unmatched patches are dark, 30 to 55 %; lines cover little

def test_the_picture_on_the_command_line(tmp_path):
    save_classes(tmp_path / "split", 1)
    torch.save(gld.Backbone("conv_tiny").net.state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "text.png").write_text("no image")
    before = sorted(tmp_path.iterdir())
    for wrong, words in {"a.xyz": "--show-matches",
                         "e.png --data text.png": "--data text.png: cannot be read",
                         "e.png --data nophoto.jpg": "--data nophoto.jpg: no such file or folder"}.items():
        assert_refused(run(f"eval_knn.py --show-matches {wrong}", tmp_path), words)
    assert sorted(tmp_path.iterdir()) == before

    def source(options):
        done = run(f"eval_knn.py --show-matches a.png {options}", tmp_path)
        (tmp_path / "a.png").unlink()
        return done.stdout
    for data in ("split/train", "split", "split/val/a/0000.png"):
        assert "--checkpoint FILE" in source(f"--data {data}")
    assert "similarity by backbone.pt" in source("--checkpoint backbone.pt --data split")
    train_ok("--max-steps 1", tmp_path)
    assert "similarity by output/checkpoint.pt" in source("--data split")       # taken where it exists

# ------------------------------------------------------------------------------------------------ README

README = (HERE / "README.md").read_text()
NOTES = (HERE / ".github/NOTES.md").read_text()
FILLED_IN = {r"runs/\S*-\*/checkpoint.pt": "output/checkpoint.pt", r"\$matching": "none", r"\$\w+": "1",
             r"cifar10|(PATH/TO/)?(IMAGENET|IMAGES)\b": "IMAGES", "PATH/TO/PHOTO.jpg": "IMAGES/val/a/0000.png"}

def readme_commands():
    """The commands in README and NOTES that run gld.py or eval_knn.py; variables and names are filled in."""
    for block in re.findall(r"```sh\n(.*?)```", README + NOTES, re.S):
        for line in block.replace("\\\n", " ").split("\n"):
            line = line.split("#")[0].strip()
            for name, value in FILLED_IN.items():
                line = re.sub(name, value, line)
            if match := re.search(r"\b(gld|eval_knn)\.py\b", line):
                yield line.startswith("torchrun"), line[match.start():].split("&&")[0].rstrip("' ")

def test_the_readmes_commands_run(tmp_path, monkeypatch):
    """Every command at a small size: its options must exist and go together. One torchrun line as two processes."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        save_pictures(tmp_path / "IMAGES" / name, 2)
    monkeypatch.setattr(gld, "draw_shapes", lambda n, seed, draw=gld.draw_shapes: draw(n // 10, seed))
    dinov2 = renamed(gld.Backbone("vit_small", 28, 14).net.state_dict(), VIT)
    torch.save(dinov2, tmp_path / "dinov2_vits14_pretrain.pth")
    commands = sorted(set(readme_commands()), key=lambda command: "eval" in command[1])
    assert len(commands) >= 12
    launched = False
    for torchrun, command in commands:
        size = 28 if "--patch-size 14" in command else 32
        if command.startswith("gld.py"):
            command += (f" --no-resume --batch-size 2 --workers 0 --max-steps 1 --global-size {size} --local-views 1 "
                        f"--local-size {size} --out-dim 16 --head-hidden 16 --eval-every 0")
            if "IMAGES" in command and "--preset" not in command:       # meant for a GPU
                command += " --preset paper"
        else:
            command += " --k 3 --workers 0"
        done = run(command, tmp_path, processes=2 if torchrun and not launched and DEVICE == "cpu" else 1)
        launched |= torchrun
        assert done.returncode == 0, f"{command}\n{done.stderr}"

def test_the_readmes_python_runs_as_pasted(tmp_path, monkeypatch):
    """Block by block. Files that a block names exist: with a Swin-T's weights, or a picture."""
    monkeypatch.chdir(tmp_path)
    backbone, x = gld.Backbone("swin_t").eval(), torch.randn(1, 3, 224, 224)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    for name in re.findall(r'"([\w./-]+\.(?:pt|pth|jpg|png))"', "".join(blocks)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(("pt", "pth")):
            torch.save(backbone.net.state_dict(), name)
        else:
            TF.to_pil_image(PLACES).save(name)
    found = {"step": [], "loss": [], "model": [], "features": []}       # by what a block computes
    for code in blocks:
        names = {}
        exec(code, names)
        found[next(name for name in found if name in names)].append(names)
    assert all(names["step"] == 19 and names["loss"] < 6 for names in found["step"])
    assert all(names["loss"] > 0 and names["loss"].grad_fn for names in found["loss"])
    assert all(names["features"].shape == (1, 768) for names in found["features"])
    for names in found["model"]:
        names["model"].head = torch.nn.Identity()
        with torch.no_grad():
            assert_close(names["model"].eval()(x), backbone(x)[0], rtol=1e-4, atol=1e-5)
    assert all(found.values())

def test_the_readmes_links_to_files_and_headings_exist():
    names = re.findall(r"\]\(((?:\.github/)?[\w.]+)(?:#([\w-]+))?\)", README)
    assert names and all((HERE / name).exists() for name, _ in names)
    headings = NOTES.lower().replace(" ", "-")
    assert all(f"\n##-{heading}\n" in headings for _, heading in names if heading)
