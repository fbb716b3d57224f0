# SPDX-License-Identifier: MIT
"""Which patches match, and the cross-entropy over the matches: the patch loss of Global-Local Self-Distillation.

    loss = local_cross_entropy(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04, index=index)
    loss = head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, ...the same...)

The second includes the last layers, so that the (rows x K) logits never exist as a whole. To use them, copy this file.

    B       images                      V, Q    student views, teacher views
    K       prototypes                  Ns, Nt  patches of a student / teacher view: grid rows x cols, row-major
    box     where a view was cropped: (top, left, height, width, flip) in pixels of the original image; flip 0 or 1
    match   for a student patch: the index of its teacher patch, and a weight >= 0
            (geometry gives the weight 1, or 0: the student patch is unmatched)
"""
import itertools
import math
import numbers
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:                     # no Triton for this platform: the torch path remains
    triton = None

def geometric_matches(student_boxes, teacher_boxes, student_grid, teacher_grid, hinge=True):
    """For every student patch, the teacher patch that shows the same place of the image.

    The match is the teacher patch with the nearest midpoint. The teacher's patches tile its box. So no distances are
    needed: the match is the cell that holds the student patch's midpoint, clamped to the grid.
    With `hinge`, the weight is 1 if the two midpoints are closer than half a diagonal of the larger patch, else 0.
    Without it, every weight is 1.
    Ties: a midpoint on a border goes to the lower or right cell. Midpoints at exactly half a diagonal do not match: the
    squared distance is compared with 0.99999 times the limit, so that rounding does not decide.

    Args:
        student_boxes, teacher_boxes: (..., 5). The leading shapes broadcast.
        student_grid, teacher_grid: (rows, cols).
    Returns: index (..., Ns) int64 into the teacher's Nt patches, weight (..., Ns) float32.
    Raises: ValueError for a wrong shape or grid, and, on the CPU, for boxes that are not finite or have no area.
    Source: the official code.
    """
    s_grid = _check_view("student", student_boxes, student_grid)
    t_grid = _check_view("teacher", teacher_boxes, teacher_grid)
    student = student_boxes.double().unsqueeze(-2)                      # (..., 1, 5)
    teacher = teacher_boxes.double().unsqueeze(-2)

    def nearest_cells(axis):
        """Along y (axis 0) or x (axis 1): the teacher cell that holds the midpoint of each student cell, the distance
        of the two midpoints, and half the size of a student cell and of a teacher cell."""
        s_cells, t_cells = s_grid[axis], t_grid[axis]
        s_start, s_size = student[..., axis], student[..., axis + 2]
        t_start, t_size = teacher[..., axis], teacher[..., axis + 2]
        cell = torch.arange(s_cells, device=student.device)
        if axis == 1:                                                   # a flipped view shows its last column first
            cell = torch.where(student[..., 4] > 0, s_cells - 1 - cell, cell)
        # The midpoint, in teacher cells from t_start:
        #     at = (s_start + (cell + 1/2) * s_size / s_cells - t_start) / (t_size / t_cells)
        # with one division only, in float64, so that integer boxes give exact ties.
        at = ((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells / (2 * s_cells * t_size)
        nearest = at.floor().clamp(0, t_cells - 1)
        distance = (at - nearest - 0.5) * t_size / t_cells
        if axis == 1:
            nearest = torch.where(teacher[..., 4] > 0, t_cells - 1 - nearest, nearest)
        return nearest, distance, s_size / (2 * s_cells), t_size / (2 * t_cells)

    row, dy, s_half_height, t_half_height = nearest_cells(0)            # (..., rows), (..., rows), (..., 1), (..., 1)
    col, dx, s_half_width, t_half_width = nearest_cells(1)              # (..., cols), (..., cols), (..., 1), (..., 1)
    index = (row[..., :, None] * t_grid[1] + col[..., None, :]).flatten(-2).long()                      # (..., Ns)
    distance2 = (dy[..., :, None] ** 2 + dx[..., None, :] ** 2).flatten(-2)
    s_halfdiag2 = s_half_height ** 2 + s_half_width ** 2
    t_halfdiag2 = t_half_height ** 2 + t_half_width ** 2
    close = distance2 < 0.99999 * torch.maximum(s_halfdiag2, t_halfdiag2)
    return index, (close | (not hinge)).float()

def similarity_matches(student_features, teacher_features):
    """EsViT's matches: for each student patch, the index of the teacher patch with the largest cosine.

    Args: student_features (..., Ns, C), teacher_features (..., Nt, C). The leading shapes broadcast: features s of
    V views and t of Q views, (V, B, Ns, C) and (Q, B, Nt, C), give (V, Q, B, Ns) as similarity_matches(s[:, None], t).
    Returns: index (..., Ns) int64.
    """
    with torch.autocast(student_features.device.type, enabled=False):       # @ would round to 16 bits
        student = F.normalize(student_features.float(), dim=-1)
        teacher = F.normalize(teacher_features.float(), dim=-1)
        return (student @ teacher.mT).argmax(-1)

def reference_cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp, index, weight):
    """The definition of the loss, pair by pair as in the official code, for tests. index, weight: (V, Q, B, Ns)."""
    target = F.softmax((teacher_logits - center) / teacher_temp, dim=-1).detach()
    loss = 0
    for (v, s), (q, t) in itertools.product(enumerate(student_logits), enumerate(target)):
        matched = torch.take_along_dim(t, index[v, q, ..., None], dim=1)                                # (B, Ns, K)
        cross_entropy = -(matched * F.log_softmax(s / student_temp, dim=-1)).sum(-1)
        loss = loss + (weight[v, q] * cross_entropy).mean()
    return loss

def local_cross_entropy(student_logits, teacher_logits, center, *, student_temp, teacher_temp,
                        skip_same_view=False, impl="auto",
                        student_boxes=None, teacher_boxes=None,
                        student_grid=None, teacher_grid=None, hinge=True,
                        index=None, weight=None):
    """Sum over pairs (student view v, teacher view q) of the mean over B and Ns of weight * cross-entropy, where

        cross-entropy(n) = - sum_k  softmax((t - center) / teacher_temp)[k] * log_softmax(s / student_temp)[k]

    with s the logits of student patch n and t those of its teacher patch. Unmatched patches stay in the mean. For the
    mean over pairs, divide by their number: V * Q, or (V - 1) * Q with skip_same_view.

    Args:
        student_logits: (V, B, Ns, K), or a list, one (v, B, Ns, K) per size of view: losses add up, V counts all views.
        teacher_logits: (Q, B, Nt, K). center: (K,) or (1, K).
        student_temp, teacher_temp: numbers > 0.
        skip_same_view: leave out the pairs v = q, as DINO does. The first Q student views must be the teacher's.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors, torch for others and for float64.
        Which patches match, in one of three ways. For a list of sizes, student_grid, index and weight are lists too.
            student_boxes (V, B, 5), teacher_boxes (Q, B, 5), student_grid, teacher_grid, hinge: by geometry;
            index (V, Q, B, Ns), integers in [0, Nt), -1: unmatched; and weight (V, Q, B, Ns), floats >= 0, default 1;
            nothing (or a weight), if Ns = Nt = 1: the loss of whole images.
    Returns: a scalar, float32 (float64 for float64 logits). No gradient flows to the teacher or the center.
    Raises: ValueError where arguments do not fit; on a GPU, which would have to wait, values are not looked at.

    The losses of other code, with its names. `...` stands for center, student_temp=0.1, teacher_temp=0.04.
        DINO, logits (V * B, K) and (2 * B, K), view by view:
            s, t = student.unflatten(0, (V, B))[:, :, None], teacher.unflatten(0, (2, B))[:, :, None]
            local_cross_entropy(s, t, ..., skip_same_view=True) / (2 * (V - 1))
        EsViT, patch logits s and t, and features s_f and t_f, as in `similarity_matches`:
            local_cross_entropy(s, t, ..., index=similarity_matches(s_f[:, None], t_f), skip_same_view=True)
        iBOT, patch logits (2, B, N, K), mask (2, B, N). Its masked patches are the ones that count:
            index = torch.full((2, 2, B, N), -1, device=mask.device)
            index[[0, 1], [0, 1]] = torch.where(mask, torch.arange(N, device=mask.device), -1)
            weight = (N / mask.sum(-1).clamp(min=1))[:, None, :, None].expand(2, 2, B, N)
            local_cross_entropy(s, t, ..., index=index, weight=weight) / 2
        DINOv2, M masked tokens of n global crops (two of an image), logits and masks_weight (M, K), (M,):
            s, t, weight = s.view(1, M, 1, K), t.view(1, M, 1, K), (masks_weight * M / n).view(1, 1, M, 1)
            local_cross_entropy(s, t, ..., weight=weight)
        Sinkhorn-Knopp (DINOv2, SwAV) has a center, too: -teacher_temp * log(r), with r (K,) the product of all factors
            that a prototype was multiplied by. Or, from its probabilities: t = p.log(), a zero center, teacher_temp=1.

    Wrong without an error:
        images before views, where B = V = Q; with skip_same_view, local views before the global ones;
        boxes as (x, y, width, height) or as corners; a forgotten flip: a box is
            (*RandomResizedCrop.get_params(...), flip), with the flip of the transform that follows;
        probabilities in place of logits; similarity_matches(s, t) without [:, None]; a grid beside an index, which is
            not looked at; an old teacher_weight.
    """
    return head_cross_entropy(
        student_logits, None, teacher_logits, None, center,
        student_temp=student_temp, teacher_temp=teacher_temp,
        skip_same_view=skip_same_view, impl=impl,
        student_boxes=student_boxes, teacher_boxes=teacher_boxes,
        student_grid=student_grid, teacher_grid=teacher_grid, hinge=hinge,
        index=index, weight=weight)

def head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, *, student_temp, teacher_temp,
                       skip_same_view=False, impl="auto",
                       student_boxes=None, teacher_boxes=None,
                       student_grid=None, teacher_grid=None, hinge=True,
                       index=None, weight=None, max_bytes=512 * 2 ** 20):
    """`local_cross_entropy` of the logits z @ weight.T, which are made for a few images at a time.

    Args:
        student_z: (V, B, Ns, D), the input of the last layer, or a list with one tensor (v, B, Ns, D) per size of view.
        teacher_z: (Q, B, Nt, D). student_weight, teacher_weight: (K, D), the last layers. center: (K,) or (1, K).
        max_bytes: limit for the logits in memory (at least one image's are). The others: as in `local_cross_entropy`.
    Returns: a scalar. Gradients flow to student_z and student_weight only.
    Precision: torch: float32 logits. Triton on a GPU: float16 logits (bfloat16's step near 1 would change a teacher
        probability by 10 %) and bfloat16 gradients of logits. So normalise the rows of z and weight: at a logit of 100,
        float16's step is a factor of 4.8 in a teacher's probability (at temperature 0.04), and logits above 65,504 give
        NaN. Best: K a multiple of 16.
    In DINO's code: the weights are `F.normalize(layer.weight_v, dim=1) * layer.weight_g`, made in each step: an old
        `last_layer.weight` of `nn.utils.weight_norm` is wrong without an error. With
        DistributedDataParallel(find_unused_parameters=True), return the weight from `forward`.
        The center's update needs teacher_weight @ teacher_z.mean((0, 1, 2)) only.
    Autograd: above max_bytes the torch path computes twice: until `backward`, change no input in place, and make none
        in inference mode. torch.func.grad needs impl="torch" and logits within max_bytes. A NaN in an unmatched row of
        z may reach student_weight's gradient.
    """
    _check_positive("student_temp", student_temp)
    _check_positive("teacher_temp", teacher_temp)
    _check_positive("max_bytes", max_bytes)
    if not isinstance(student_z, (list, tuple)):
        student_z, student_grid, index, weight = [student_z], [student_grid], [index], [weight]
    center = _check_inputs(student_z, student_weight, teacher_z, teacher_weight, center)
    fused = _use_triton(impl, student_z[0])
    matches = _prepare(student_z, teacher_z, fused, skip_same_view,
                       student_boxes, teacher_boxes, student_grid, teacher_grid, hinge, index, weight)
    B = step = max(1, teacher_z.shape[1])
    if student_weight is not None:
        step = _images_at_a_time(B, student_z, teacher_z, len(center), fused, max_bytes)
        # here, so that the sum of all parts of its gradient is rounded once
        student_weight = student_weight.to(torch.promote_types(student_z[0].dtype, torch.float32))
    arguments = (matches, float(student_temp), float(teacher_temp),
                 teacher_z, teacher_weight, center.clone(),
                 student_weight, *student_z)
    with torch.autocast(teacher_z.device.type, enabled=False):
        if fused:
            with torch.cuda.device_of(teacher_z):                       # torch.compile breaks its graph here
                return torch.compiler.disable(_TritonLoss.apply)(step, torch.is_grad_enabled(), *arguments)
        if step >= B:
            return _torch_loss(slice(None), *arguments)
        return sum(checkpoint(_torch_loss, slice(start, start + step), *arguments, use_reentrant=False,
                              preserve_rng_state=False) for start in range(0, B, step))

# -------------------------------------------------------------------------------------- arguments and matches

class Matches(NamedTuple):
    """The matches of the student views of one size, as both paths read them: boxes, or index and weight; None else."""
    boxes: Tensor                       # (B, v + Q, 5) float32, the student's first: the kernel finds the matches
    index: Tensor                       # (B, v, Q, Ns) int32 into a teacher view's patches, -1: unmatched
    weight: Tensor                      # (B, v, Q, Ns), 0: unmatched
    grids: tuple                        # rows and columns of a student view, then of a teacher view
    skip: int                           # views with v - q = skip are no pair
    rows: int                           # of a student view: the mean is over B * Ns

def _prepare(students, teacher, fused, skip_same_view,
             student_boxes, teacher_boxes, student_grids, teacher_grid, hinge,
             indices, weights):
    """Check what says which patches match, and bring it into one form. Returns: a list, `Matches` of each size."""
    Q, B, Nt, _ = teacher.shape
    V, device = sum(map(len, students)), teacher.device
    lists = [[None] * len(students) if x is None else x for x in (student_grids, indices, weights)]
    if any(len(x) != len(students) for x in lists):
        raise ValueError("student_grid, index and weight must be lists of one length, that of the sizes of views")
    first = 0
    prepared = []
    for student, grid, index, weight in zip(students, *lists):
        v, _, Ns, _ = student.shape
        skip = -first if skip_same_view else V                          # v - q is never V
        grids = Ns, 1, Nt, 1                                            # with an index, only the products count
        boxes = None
        if student_boxes is not None or teacher_boxes is not None:
            if index is not None or weight is not None:
                raise ValueError("which patches match? boxes or an index say it, not both; a weight needs an index")
            _check("student_boxes", student_boxes, (V, B, 5), device)
            _check("teacher_boxes", teacher_boxes, (Q, B, 5), device)
            s_boxes = student_boxes[first:first + v]
            grids = (*_check_view("student", s_boxes, grid, Ns),
                     *_check_view("teacher", teacher_boxes, teacher_grid, Nt))
            if fused and hinge:
                boxes = torch.cat([s_boxes.double(), teacher_boxes.double()])
                boxes[..., :2] -= teacher_boxes[0, :, :2]               # far from the origin, float32 is too coarse
                boxes = boxes.float().transpose(0, 1).contiguous()
            else:
                index, weight = geometric_matches(s_boxes[:, None], teacher_boxes, grids[:2], grids[2:], hinge)
        elif index is None:
            if Ns * Nt != 1:
                raise ValueError(f"which patches match? without boxes or index, Ns = Nt = 1; got Ns = {Ns}, Nt = {Nt}")
            index = teacher.new_zeros(v, Q, B, 1, dtype=torch.int64)
        if boxes is None:
            _check("index", index, (v, Q, B, Ns), device)
            index, weight = _prepare_index(index, weight, Nt, skip)
        prepared.append(Matches(boxes, index, weight, grids, skip, max(1, B * Ns)))
        first += v
    return prepared

def _prepare_index(index, weight, Nt, skip):
    """Check index and weight (v, Q, B, Ns), mark what is unmatched in both, and put the images first."""
    if index.dtype == torch.bool or index.is_floating_point():
        raise ValueError(f"index must hold integers, got {index.dtype}")
    index = index.long()                                                # -1 is no uint8
    if weight is None:
        weight = torch.ones_like(index, dtype=torch.float32)
    _check("weight", weight, tuple(index.shape), index.device)
    if _has_values(index):
        if ((index < -1) | (index >= Nt)).any():
            raise ValueError(f"index must be in [0, {Nt}), or -1")
        if not ((weight >= 0) & (weight < math.inf)).all():
            raise ValueError("weight must be finite and >= 0")
    matched = (index >= 0) & (weight > 0)
    matched.diagonal(-skip).fill_(False)                                # (Ns, B) of the views that are no pair
    index = index.int().where(matched, -1)
    weight = weight.detach().where(matched, 0)
    return [x.movedim(2, 0).contiguous() for x in (index, weight)]

def _images_at_a_time(B, students, teacher, K, fused, max_bytes):
    """The logits of how many images fit in max_bytes, such that the chunks are of about equal size."""
    *of_students, of_teacher = [z.shape[0] * z.shape[2] for z in (*students, teacher)]
    # the Triton path makes and frees the logits of one size after the other
    rows = of_teacher + (max(of_students) if fused else sum(of_students))
    bytes_per_image = rows * K * (2 if fused and teacher.is_cuda else 4)
    most = max(1, max_bytes // max(1, bytes_per_image))
    return math.ceil(B / math.ceil(B / most))

def _check_inputs(students, student_weight, teacher, teacher_weight, center):
    """Check all tensors but those of the matches. Returns: center as (K,)."""
    kind, last = ("logits", "K") if student_weight is None else ("z", "D")
    device = getattr(teacher, "device", None)
    _check(f"teacher_{kind}", teacher, ("Q", "B", "Nt", last), device)
    Q, B, _, width = teacher.shape
    for z in students:
        _check(f"student_{kind}", z, ("V", B, "Ns", width), device)
    K = width
    if student_weight is not None:
        _check("student_weight", student_weight, ("K", width), device)
        K = len(student_weight)
        _check("teacher_weight", teacher_weight, (K, width), device)
    if isinstance(center, Tensor):
        center = center.flatten()                                       # DINO's center is (1, K)
    _check("center", center, (K,), device)
    V = sum(map(len, students))
    if min(V, Q, K) == 0:
        raise ValueError(f"no views or no prototypes: {V} student views, Q = {Q}, K = {K}")
    return center

# Messages are made only for an error: to format a size would tie what torch.compile traces to this one size.

def _check(name, x, shape, device):
    """x must be a tensor of this shape on this device. A letter in the shape stands for any length."""
    fits = isinstance(x, Tensor) and x.ndim == len(shape) and x.device == device
    fits = fits and all(isinstance(n, str) or n == size for n, size in zip(shape, x.shape))
    if not fits:
        found = f"{tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        shape = str(shape).replace("'", "")
        raise ValueError(f"{name} must be {shape} on {device}, got {found}")

def _check_positive(name, x):
    number = isinstance(x, numbers.Real) or isinstance(x, Tensor) and x.numel() == 1
    if not number or not 0 < x < math.inf:
        raise ValueError(f"{name} must be a number > 0, and finite, got {x!r}")

def _check_view(side, boxes, grid, patches=None):
    """Check the boxes and the grid of the student's or the teacher's views. Returns: rows, cols, Python integers."""
    valid = isinstance(boxes, Tensor) and boxes.shape[-1:] == (5,)
    if valid and _has_values(boxes):
        valid = boxes.isfinite().all() and (boxes[..., 2:4] > 0).all()
    if not valid:
        raise ValueError(f"{side}_boxes must be a tensor (..., 5), finite, with height and width above 0")
    try:
        rows, cols = map(operator.index, grid)
    except (TypeError, ValueError):                                     # not integers, or not two
        rows = cols = 0
    if min(rows, cols) < 1 or patches not in (None, rows * cols):
        raise ValueError(f"{side}_grid must be (rows, cols), integers > 0, of {patches or 'any'} patches, got {grid}")
    return rows, cols

def _has_values(x):
    """Without waiting for a GPU. Fake tensors and those that torch.compile traces have no values."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()

def _use_triton(impl, x):
    possible = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    if impl == "auto":
        return possible and x.is_cuda
    if impl not in ("triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "triton" and not possible:
        raise ValueError("impl='triton' needs Triton, a GPU (or TRITON_INTERPRET=1) and no float64")
    return impl == "triton"

# ------------------------------------------------------------------------------------------------ The torch path
#
# The targets p_m sum to 1, and the logits z_n . w_k are linear in the prototypes w_k. So the cross-entropy of student
# patch n and teacher patch m is
#     - sum_k p_mk (z_n . w_k / temp - lse_n) = lse_n - z_n . u_m / temp,        u_m = sum_k p_mk w_k
# where lse_n = logsumexp_k(z_n . w_k / temp) does not depend on the match. u_m is made once for a teacher patch, so a
# match touches D numbers, not K. With weights c_nm, the loss is
#     sum_n (sum_m c_nm) lse_n - z_n . (sum_m c_nm u_m) / temp

def _torch_loss(images, matches, student_temp, teacher_temp, teacher_z, teacher_weight, center, student_weight,
                *students):
    """The part of the loss that comes from a slice of the images. Without weights (None), z are logits."""
    head = student_weight is not None
    dtype = torch.promote_types(students[0].dtype, torch.float32)
    with torch.no_grad():
        p = teacher_z[:, images].to(dtype) / teacher_temp
        if head:
            p = p @ teacher_weight.to(dtype).T
        p = torch.softmax(p.sub_(center.to(dtype) / teacher_temp), dim=-1, out=p)           # (Q, b, Nt, K)
    u = p @ student_weight if head else p                                                   # (Q, b, Nt, D or K)
    Q, b, Nt, _ = u.shape
    u = F.pad(u.flatten(0, 2), (0, 0, 0, 1))                            # a row of zeros, for what is unmatched
    first_row = Nt * torch.arange(Q * b, device=u.device).view(Q, b, 1)
    loss, parts = 0, []                                                 # parts: z / temp, target, weight, view by view
    for z, match in zip(students, matches):
        index = match.index[images].movedim(0, 2)                       # (v, Q, b, Ns)
        rows = torch.where(index < 0, len(u) - 1, first_row + index)
        weights = match.weight[images].movedim(0, 2).to(dtype) / match.rows
        for view, row, weight in zip(z[:, images].to(dtype), rows, weights):
            total = weight.sum(0)[..., None]                            # (b, Ns, 1)
            x = torch.where(total > 0, view, 0).div_(student_temp)      # an unmatched row may hold NaN
            if head:
                target = sum(w[..., None] * u[r] for w, r in zip(weight, row))              # (b, Ns, D)
                parts.append([part.flatten(0, 1) for part in (x, target, total)])           # (b * Ns, .)
            else:                                                       # in one pass: there are K columns, not D
                target = F.embedding_bag(row.flatten(1).T, u, per_sample_weights=weight.flatten(1).T, mode="sum")
                loss = loss + _CrossEntropy.apply(x, target.view(x.shape), total)[0]
    if head:
        x, target, total = map(torch.cat, zip(*parts))                  # few large matrix products
        loss = (total * _LinearLogSumExp.apply(x, student_weight)[0]).sum() - (x * target).sum()
    return loss

class _WithSaved(torch.autograd.Function):
    """Returns a result, and a tensor that is saved with the first and the last input. (So torch.func.grad works.)"""
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[-1], output[1])

class _LinearLogSumExp(_WithSaved):
    """logsumexp_k(z_n . w_k), (N, 1), of z (N, D) and w (K, D). Its gradient is matrix products, no pass over K."""
    @staticmethod
    def forward(z, w):
        p = z @ w.T
        top, k = p.max(-1, keepdim=True)
        torch.softmax(p, dim=-1, out=p)
        return top - p.gather(-1, k).log(), p

    @staticmethod
    def backward(ctx, upstream, _):
        z, w, p = ctx.saved_tensors
        if torch.is_grad_enabled():                                     # create_graph=True: p with its graph
            p = F.softmax(z @ w.T, dim=-1)
        return upstream * (p @ w), p.T @ (upstream * z)

class _CrossEntropy(_WithSaved):
    """- sum(target * log_softmax(x)), targets (..., K) of sum total (..., 1). In few passes, with the gradient."""
    @staticmethod
    def forward(x, target, total):
        log_s = torch.log_softmax(x, dim=-1)
        grad = log_s.exp().mul_(total).sub_(target)
        loss = -log_s.mul_(target).nansum(-1)                           # 0 * -inf is NaN, and adds nothing
        loss[grad[..., 0].isnan()] = math.nan                           # any other NaN fills its row of the gradient
        return loss.sum(), grad

    @staticmethod
    def backward(ctx, upstream, _):
        x, total, grad = ctx.saved_tensors
        if torch.is_grad_enabled():                                     # create_graph=True: softmax with its graph
            s = F.softmax(x, dim=-1)
            grad = grad + total * (s - s.detach())
        return upstream * grad, None, None

# ------------------------------------------------------------------------------------------------ Triton kernels
#
# For one student row s (patch n of view v of image b), scaled to x = s / student_temp, and the teacher's probabilities
# p_q of the patches matched with it, of weight w_q, for two teacher views q at a time:
#     P = sum_q w_q p_q         W = sum_q w_q         lse = log sum_k exp(x_k)
#     loss = sum_q w_q CE_q = sum_q w_q sum_k p_qk (lse - x_k) = lse * sum_k P_k - sum_k P_k x_k
#     d loss / d s_k = (W exp(x_k - lse) - P_k) / student_temp
# One pass over s and both p_q gives the loss, a second the gradient. Rows of one image follow each other, so that its
# teacher rows stay in L2. Probabilities are stored times UNIT, which is 2^14 in float16 (exact to 2^-11 down to 4e-9)
# and 1 in float32. So is the gradient before its last factor. The loss uses sum_k P_k of the stored values: then the
# size of the logits does not multiply their rounding. Sums are in float32. Each group of 8 elements, the 16 bytes that
# a thread loads, has its own running maximum, so that no thread waits for another inside the loop; it starts at -3e38,
# since -inf - -inf would be NaN. Exponentials are in base 2: `scale` holds log2(e) / temperature.

if triton is not None:
    @triton.jit
    def _load_tile(ROW, cols, end, other=0.0):
        """A tile of a row as float32; `other` from column `end` on."""
        return tl.load(ROW + cols, mask=cols < end, other=other).to(tl.float32)

    @triton.jit
    def _add_exp2(peak, total, x, scale):
        """Add x * scale, x (G, 8), to a running log-sum-exp per group: total * 2^peak, both (G,)."""
        top = tl.maximum(peak, tl.max(x, axis=1) * scale)
        return top, total * tl.exp2(peak - top) + tl.sum(tl.exp2(x * scale - top[:, None]), axis=1)

    @triton.jit
    def _log2_sum(peak, total):
        """Of all groups."""
        top = tl.max(peak)
        return top + tl.log2(tl.sum(total * tl.exp2(peak - top)))

    @triton.jit
    def _start(BLOCK):
        """The columns (G, 8) of the first tile, and a log-sum-exp of nothing."""
        # in this form, since Triton 3.6 does not see through a reshape that 8 elements lie side by side
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)
        return tile, tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)

    @triton.jit
    def _teacher_kernel(T, CENTER, P, K, scale, UNIT: tl.constexpr, BLOCK: tl.constexpr):
        """One teacher row: P = UNIT * softmax((T - CENTER) / temperature). P may be T itself."""
        start = tl.program_id(0).to(tl.int64) * K
        tile, peak, total = _start(BLOCK)
        for k in range(0, K, BLOCK):
            cols = k + tile
            x = _load_tile(T + start, cols, K, float("-inf")) - _load_tile(CENTER, cols, K)
            peak, total = _add_exp2(peak, total, x, scale)
        lse2 = _log2_sum(peak, total)
        for k in range(0, K, BLOCK):
            cols = k + tile
            x = _load_tile(T + start, cols, K) - _load_tile(CENTER, cols, K)
            tl.store(P + start + cols, tl.exp2(x * scale - lse2) * UNIT, mask=cols < K)

    @triton.jit
    def _nearest_cell(cell, S, T, s_cells, t_cells):
        """As in `geometric_matches`; integers below 2^24 stay exact, so ties fall as they do there."""
        s_start, s_size = tl.load(S), tl.load(S + 2)
        t_start, t_size = tl.load(T), tl.load(T + 2)
        at = tl.div_rn(((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells, 2 * s_cells * t_size)
        nearest = tl.minimum(tl.maximum(tl.floor(at), 0.0), t_cells - 1.0)
        return nearest, (at - nearest - 0.5) * t_size / t_cells, s_size / s_cells, t_size / t_cells

    @triton.jit
    def _matched_row(q, b, v, n, V, Q, B, K, skip, BOXES, INDEX, WEIGHT, S_ROWS, S_COLS, T_ROWS, T_COLS):
        """The row of teacher view q matched with student row (v, b, n); how much to read (K; unmatched: 0); weight."""
        end = tl.where((q < Q) & (v - q != skip), K, 0)
        q = tl.minimum(q, Q - 1)                # an odd number of views has no second one at the end
        if INDEX is not None:
            at = ((b * V + v) * Q + q).to(tl.int64) * (S_ROWS * S_COLS) + n
            m = tl.load(INDEX + at)
            end = tl.where(m < 0, 0, end)
            m = tl.minimum(tl.maximum(m, 0), T_ROWS * T_COLS - 1)       # never another tensor's memory
            weight = tl.load(WEIGHT + at).to(tl.float32)
        else:                                   # as in `geometric_matches`
            S = BOXES + (b * (V + Q) + v) * 5
            T = S + (V - v + q) * 5
            row, dy, s_y, t_y = _nearest_cell(n // S_COLS, S, T, S_ROWS, T_ROWS)
            col = tl.where(tl.load(S + 4) > 0, S_COLS - 1 - n % S_COLS, n % S_COLS)
            col, dx, s_x, t_x = _nearest_cell(col, S + 1, T + 1, S_COLS, T_COLS)
            col = tl.where(tl.load(T + 4) > 0, T_COLS - 1 - col, col)
            m = (row * T_COLS + col).to(tl.int32)
            limit = 0.99999 * tl.maximum(s_y * s_y + s_x * s_x, t_y * t_y + t_x * t_x)      # of a diagonal, not half
            end = tl.where(4 * (dy * dy + dx * dx) < limit, end, 0)
            weight = 1.0                        # a constant: to multiply by it costs no instruction
        return ((q * B + b) * (T_ROWS * T_COLS) + m).to(tl.int64), end, weight

    @triton.jit
    def _student_kernel(S, P, LOSS, DS, BOXES, INDEX, WEIGHT, q, V, Q, B, K, scale, skip,
                        S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                        T_ROWS: tl.constexpr, T_COLS: tl.constexpr,
                        UNIT: tl.constexpr, BLOCK: tl.constexpr):
        """One student row: LOSS and, if there is a DS (it may be S), its gradient times UNIT * student_temp."""
        NS: tl.constexpr = S_ROWS * S_COLS
        view = tl.program_id(0) // NS
        n = tl.program_id(0) % NS
        b, v = view // V, view % V
        row = ((v * B + b) * NS + n).to(tl.int64)
        row0, end0, w0 = _matched_row(q, b, v, n, V, Q, B, K, skip, BOXES, INDEX, WEIGHT,
                                      S_ROWS, S_COLS, T_ROWS, T_COLS)
        row1, end1, w1 = _matched_row(q + 1, b, v, n, V, Q, B, K, skip, BOXES, INDEX, WEIGHT,
                                      S_ROWS, S_COLS, T_ROWS, T_COLS)
        end = tl.maximum(end0, end1)
        S += row * K
        P0 = P + row0 * K
        P1 = P + row1 * K
        tile, peak, total = _start(BLOCK)
        mass = tl.zeros([BLOCK // 8, 8], tl.float32)
        dot = mass
        for k in range(0, end, BLOCK):          # an unmatched row reads nothing
            cols = k + tile
            s = _load_tile(S, cols, end, float("-inf"))
            p = w0 * _load_tile(P0, cols, end0) + w1 * _load_tile(P1, cols, end1)
            mass += p                           # before the exponentials: all loads come first
            dot += p * tl.where(p == 0, 0.0, s)                         # 0 * -inf would be NaN
            peak, total = _add_exp2(peak, total, s, scale)
        lse2 = tl.where(end > 0, _log2_sum(peak, total), 0.0)
        loss2 = tl.sum(lse2 * mass - scale * dot)
        tl.store(LOSS + row, loss2 * (0.6931471805599453 / UNIT))       # log(2)
        if DS is not None:
            weight = UNIT * (tl.where(end0 > 0, w0, 0.0) + tl.where(end1 > 0, w1, 0.0))
            for k in range(0, K, BLOCK):
                cols = k + tile
                s = _load_tile(S, cols, end)
                p = w0 * _load_tile(P0, cols, end0) + w1 * _load_tile(P1, cols, end1)
                tl.store(DS + row * K + cols, weight * tl.exp2(s * scale - lse2) - p, mask=cols < K)

    INTERPRETED = not isinstance(_student_kernel, triton.JITFunction)

LOG2_E = math.log2(math.e)
UNIT = 2 ** 14                          # in 16 bits, probabilities and gradients are stored times this
LAUNCH = dict(BLOCK=2048,               # elements of a tile: 8, or 16 bytes of 16-bit logits, for each of 256 threads
              num_warps=8)              # no autotuning

class _TritonLoss(torch.autograd.Function):
    """The loss and its gradient, for `step` images and two teacher views at a time; the backward pass only scales.

    Without weights (None), z are the caller's logits. Else logits are private; their gradient is written over them.
    """
    @staticmethod
    def forward(ctx, step, grad_enabled, matches, student_temp, teacher_temp, teacher_z, teacher_weight, center,
                student_weight, *students):
        Q, B, _, _ = teacher_z.shape
        head = student_weight is not None
        K = len(center)
        needs_weight, *needs = (grad_enabled and x for x in ctx.needs_input_grad[8:])
        logit_type, grad_weight = teacher_z.dtype, None
        if head:
            logit_type, grad_type = (torch.float16, torch.bfloat16) if teacher_z.is_cuda else (torch.float32,) * 2
            weight = student_weight.to(logit_type)
            teacher_weight = teacher_weight.to(logit_type)
            weight_for_grad = student_weight.to(grad_type)
            grad_weight = torch.zeros_like(student_weight, dtype=torch.float32) if needs_weight else None
        unit = UNIT if logit_type.itemsize == 2 else 1
        grads = [torch.zeros_like(z, dtype=torch.float32) if head else None for z in students]
        ctx.scales = [1 / (match.rows * unit * student_temp) for match in matches]
        total = teacher_z.new_zeros((), dtype=torch.float32)
        for start in range(0, max(1, B), step):                         # no images: one round of no programs
            chunk = slice(start, start + step)
            t = teacher_z[:, chunk].to(logit_type).contiguous()         # contiguous: one large matrix product, not many
            if head:
                t = t @ teacher_weight.T
            p = t if head else torch.empty_like(t, dtype=torch.float16 if unit > 1 else torch.float32)
            _teacher_kernel[(p[..., 0].numel(),)](t, center, p, K, LOG2_E / teacher_temp, UNIT=unit, **LAUNCH)
            for i, q in itertools.product(range(len(students)), range(0, Q, 2)):
                z, match = students[i][:, chunk], matches[i]
                ds = None
                # clone: for a pointer that is no multiple of 16 bytes, as a slice's may be, Triton compiles again
                tables = [x if x is None else x[chunk].clone() for x in match[:3]]     # boxes, index, weight
                s = z.to(logit_type).contiguous() @ weight.T if head else z.contiguous()            # (v, b, Ns, K)
                if needs_weight or needs[i]:
                    # ready logits: a match's weight may be too large for float16 gradients
                    ds_type = s.dtype if match.weight is None else torch.float32
                    ds = s.view(grad_type) if head else torch.empty_like(s, dtype=ds_type)
                loss = s.new_empty(s.shape[:3], dtype=torch.float32)
                _student_kernel[(loss.numel(),)](s, p, loss, ds, *tables, q, len(s), Q, s.shape[1], K,
                                                 LOG2_E / student_temp, match.skip, *match.grids, UNIT=unit, **LAUNCH)
                total += loss.sum() / match.rows
                if needs_weight:
                    grad_weight.add_(ds.view(-1, K).T @ z.flatten(0, 2).to(grad_type), alpha=ctx.scales[i])
                if needs[i] and head:
                    grads[i][:, chunk] += ds @ weight_for_grad
                elif needs[i]:
                    grads[i] = ds if grads[i] is None else grads[i].float() + ds
                del s, ds                       # their memory serves the next matrix product
            del t, p
        ctx.save_for_backward(grad_weight, *grads)
        return total

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():             # create_graph=True
            raise RuntimeError("the Triton loss cannot be differentiated twice; impl='torch' can")
        grads = list(ctx.saved_tensors)
        for i, (grad, scale) in enumerate(zip(grads, (1, *ctx.scales))):         # the weight's is scaled already
            if grad is not None:
                # [None]: a vector, so that the product is rounded once, at the end; a small factor is no float16
                grads[i] = torch.mul(grad, (upstream * scale)[None], out=torch.empty_like(grad))
        return *[None] * 8, *grads              # none for the eight arguments before student_weight
