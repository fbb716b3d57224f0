# SPDX-License-Identifier: MIT
"""Which patches match, and the cross-entropy over the matches: the local loss of Global-Local Self-Distillation.

    loss = local_cross_entropy(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04,
                               student_boxes=sb, teacher_boxes=tb, student_grid=(3, 3), teacher_grid=(7, 7))

or, with the last layer of the heads included, so that the (rows x K) logits never exist as a whole,

    loss = head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, ...the same...)

Copy this file into your project. It needs torch, and Triton on a GPU. Read the torch functions first; the kernels
compute the same. `python matching_kernels.py` times both.

    B       images                      V, Q    student views, teacher views
    Ns, Nt  patches of one student / teacher view (grid rows x cols, row-major)
    K       output dimension ("prototypes")
    box     where a view was cropped: (top, left, height, width, flip) in pixels of the original image; flip is 1 if
            the crop was flipped left-right, else 0
    match   for a student patch: the index of its teacher patch, and a weight 0 (masked) or 1
"""
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:                     # no Triton for this platform: the torch path remains
    triton = None


def geometric_matches(student_boxes, teacher_boxes, student_grid, teacher_grid, hinge=True):
    """For every student patch, the teacher patch that shows the same place of the image.

    The teacher's patches tile its box. So the nearest teacher centre is found without distances: along each axis it is
    the cell that holds the student patch's centre, clamped to the grid. A centre exactly on the border of two cells
    goes to the lower or right one. With `hinge`, the weight of a match is 1 only if the two centres are closer than
    half a diagonal of the larger patch: dist2 < max(halfdiag2). Otherwise it is 0. Without `hinge` every weight is 1.

    Args:
        student_boxes, teacher_boxes: (..., 5) top, left, height, width, flip; the leading shapes broadcast.
        student_grid, teacher_grid: (rows, cols) of a view's patches; Ns and Nt are their products.
    Returns: index (..., Ns) int64 into the teacher's Nt patches, weight (..., Ns) float32.
    Raises: ValueError for a wrong shape or grid, and, on the CPU, for boxes that are not finite or have no area.
    Source: the official code's nearest pixel-position map, in closed form.
    """
    for name, boxes, grid in (("student", student_boxes, student_grid), ("teacher", teacher_boxes, teacher_grid)):
        _check_geometry(name, boxes, grid)
    # boxes are few: float64 costs nothing
    s_top, s_left, s_height, s_width, s_flip = student_boxes.double().unsqueeze(-2).unbind(-1)   # each (..., 1)
    t_top, t_left, t_height, t_width, t_flip = teacher_boxes.double().unsqueeze(-2).unbind(-1)
    (s_rows, s_cols), (t_rows, t_cols) = student_grid, teacher_grid

    def nearest_cell(cell, s_start, s_size, s_cells, t_start, t_size, t_cells):
        """Along one axis: the teacher cell that holds a student cell's centre, and how far apart the centres are."""
        # the centre, s_start + (cell + 1/2) * s_size / s_cells, measured from t_start in teacher cells of size
        # t_size / t_cells; written with one division, so that integer boxes give exact ties
        at = ((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells / (2 * s_cells * t_size)
        nearest = at.floor().clamp(0, t_cells - 1)
        return nearest, (at - nearest - 0.5) * t_size / t_cells

    row = torch.arange(s_rows, device=student_boxes.device)
    col = torch.arange(s_cols, device=student_boxes.device)
    col = torch.where(s_flip > 0, s_cols - 1 - col, col)               # a flipped view shows its last column first
    t_row, dy = nearest_cell(row, s_top, s_height, s_rows, t_top, t_height, t_rows)     # (..., rows)
    t_col, dx = nearest_cell(col, s_left, s_width, s_cols, t_left, t_width, t_cols)     # (..., cols)
    t_col = torch.where(t_flip > 0, t_cols - 1 - t_col, t_col)
    index = (t_row[..., :, None] * t_cols + t_col[..., None, :]).flatten(-2).long()     # (..., Ns)
    if not hinge:
        return index, torch.ones_like(index, dtype=torch.float32)
    dist2 = (dy[..., :, None] ** 2 + dx[..., None, :] ** 2).flatten(-2)
    s_halfdiag2 = (s_height / (2 * s_rows)) ** 2 + (s_width / (2 * s_cols)) ** 2
    t_halfdiag2 = (t_height / (2 * t_rows)) ** 2 + (t_width / (2 * t_cols)) ** 2
    return index, (dist2 < torch.maximum(s_halfdiag2, t_halfdiag2)).float()


def similarity_matches(student_features, teacher_features):
    """For every student patch, the teacher patch whose backbone features are most similar (EsViT's matching).

    Args: student_features (..., Ns, C), teacher_features (..., Nt, C); the leading shapes broadcast.
    Returns: index (..., Ns) int64: the argmax of the cosine similarity. Every match has weight 1.
    Raises: ValueError where the widths C differ.
    """
    s_shape, t_shape = tuple(student_features.shape), tuple(teacher_features.shape)
    if min(len(s_shape), len(t_shape)) < 2 or s_shape[-1] != t_shape[-1]:
        raise ValueError(f"student_features (..., Ns, C), teacher_features (..., Nt, C) differ: {s_shape}, {t_shape}")
    with torch.no_grad():
        student = F.normalize(student_features.float(), dim=-1)
        teacher = F.normalize(teacher_features.float(), dim=-1)
        return (student @ teacher.mT).argmax(-1)


def reference_cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp, index, weight):
    """The definition of the loss, pair by pair, as the official code computes it: for tests and the benchmark.

    Args: student_logits (V, B, Ns, K), teacher_logits (Q, B, Nt, K), center (K,), index and weight (V, Q, B, Ns).
    """
    target = F.softmax((teacher_logits - center) / teacher_temp, dim=-1).detach()
    loss = 0
    for v, q in itertools.product(range(len(student_logits)), range(len(target))):
        matched = target[q].gather(1, index[v, q, ..., None].expand(-1, -1, target.shape[-1]))    # (B, Ns, K)
        cross_entropy = -(matched * F.log_softmax(student_logits[v] / student_temp, dim=-1)).sum(-1)
        loss = loss + (weight[v, q] * cross_entropy).mean()
    return loss


def local_cross_entropy(student_logits, teacher_logits, center, *, student_temp, teacher_temp, skip_same_view=False,
                        impl="auto", **matching):
    """Sum over pairs (student view v, teacher view q) of the mean over B and Ns of weight * cross-entropy, where

        cross-entropy(n) = - sum_k  softmax((t - center) / teacher_temp)[k] * log_softmax(s / student_temp)[k]

    with s the logits of student patch n and t those of the teacher patch that n is matched with. A masked patch
    (weight 0) adds nothing but stays in the mean's denominator.

    Args:
        student_logits: (V, B, Ns, K). teacher_logits: (Q, B, Nt, K). center: (K,).
        skip_same_view: leave out the pairs v = q (student view v and teacher view v are the same crop).
        impl: "triton", "torch", or "auto": Triton for CUDA tensors, torch for others and for float64.
        matching: which patches match, in one of three ways:
            student_boxes (V, B, 5), teacher_boxes (Q, B, 5), student_grid, teacher_grid, hinge=True: as in
                `geometric_matches`;
            index (V, Q, B, Ns), integers in [0, Nt): these matches, each with weight 1;
            nothing, if Ns = Nt = 1: the loss of whole images.
    Returns: a scalar, float32 (float64 for float64 logits). No gradient flows to the teacher or the centre.
    Raises: ValueError, naming the argument, where shapes, dtypes or devices do not fit. The values of boxes and index
        are checked on the CPU only; on a GPU a check would have to wait for them, so there a box without area is
        undefined, and an index outside [0, Nt) is clamped by Triton and an assertion of torch.
        RuntimeError if the gradient of a Triton loss is differentiated again; with impl="torch" it can be.
    """
    (group,) = _make_groups("logits", student_logits, teacher_logits, center, student_temp, teacher_temp,
                            skip_same_view, **matching)
    if _use_triton(impl, student_logits):
        losses = [_run(_LocalCrossEntropy, student_logits.contiguous(), teacher_logits[q:q + 2].detach(),
                       center.detach(), student_temp, teacher_temp, group.kernel_arguments(q))
                  for q in range(0, len(teacher_logits), 2)]
        return sum(losses[1:], losses[0])
    return _torch_loss(student_logits, _torch_target(teacher_logits, center, teacher_temp), group, student_temp)


def _torch_target(logits, center, temp):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.softmax((logits.detach().to(dtype) - center.detach().to(dtype)) / temp, dim=-1)


def _torch_loss(student, target, group, temp):
    """The loss of one size of view: student logits (v, B, Ns, K), teacher probabilities (Q, B, Nt, K)."""
    _, B, Ns, _ = student.shape
    index, weight = group.matches()
    dtype = torch.promote_types(student.dtype, torch.float32)
    images = torch.arange(B, device=student.device)[:, None]
    loss = student[..., :0].sum().to(dtype)                            # 0, and part of the graph where no pair is
    for v, logits in enumerate(student.unbind()):                      # (B, Ns, K)
        teachers = [q for q in range(len(target)) if not (group.skip_same_view and q == group.first + v)]
        matched = weight[v, :, :, :, None] > 0                         # (Q, B, Ns, 1)
        # cross-entropy is linear in its target: add up the targets of all teacher views, then one product for all.
        # where, not a product with 0: a masked row may hold NaN, and -inf is allowed where the teacher gives no mass
        total = torch.zeros_like(logits, dtype=dtype)
        for q in teachers:
            total += torch.where(matched[q], target[q][images, index[v, q]], 0)
        log_p = F.log_softmax(torch.where(matched[teachers].any(0), logits.to(dtype), 0) / temp, dim=-1)
        loss = loss - torch.where(total == 0, 0, total * log_p).sum() / max(B * Ns, 1)
    return loss


def head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, *, student_temp, teacher_temp,
                       skip_same_view=False, impl="auto", max_bytes=512 * 2 ** 20, **matching):
    """`local_cross_entropy` of the logits z @ weight.T, which are made for a few images at a time.

    Student views of several sizes go into one call, so that the teacher's logits and probabilities are made once.

    Args:
        student_z: (V, B, Ns, D), the input of the last layer, or a list with one tensor (v, B, Ns, D) per size of view;
            the losses of the sizes are added. V counts the views of all sizes.
        teacher_z: (Q, B, Nt, D). student_weight, teacher_weight: (K, D), the last layers. center: (K,).
        matching, skip_same_view, impl: as in `local_cross_entropy`. If student_z is a list, student_grid and index are
            lists too; student_boxes remains one tensor (V, B, 5) for all views in order.
        max_bytes: limit for the logits in memory (at least one image's are).
    Returns: a scalar, float32. Gradients flow to student_z and student_weight only.
    Raises: as `local_cross_entropy`.
    Precision: torch: float32 logits. Triton on a GPU: float16 logits (their step near 1 is 2^-11; bfloat16's would
        change a teacher probability by 10 %) and bfloat16 gradients of logits, which would underflow in float16.
        So the rows of z and weight should be normalised: a logit beyond 65504 becomes NaN. K should be a multiple of
        16: otherwise the kernels load 2 bytes at a time and need more than twice the instructions.
    """
    for name, x in (("student_weight", student_weight), ("teacher_weight", teacher_weight), ("teacher_z", teacher_z)):
        _require(isinstance(x, torch.Tensor) and x.is_floating_point(),
                 f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    K = len(student_weight)
    for name, weight in (("student_weight", student_weight), ("teacher_weight", teacher_weight)):
        _require(weight.shape == (K, teacher_z.shape[-1]), f"teacher_z {tuple(teacher_z.shape)} needs {name} ({K}, D) "
                 f"with the same D; got {tuple(weight.shape)}")
    groups = _make_groups("z", student_z, teacher_z, center, student_temp, teacher_temp, skip_same_view, K=K,
                          **matching)
    students = [student_z] if isinstance(student_z, torch.Tensor) else student_z
    fused, (Q, B, Nt, _) = _use_triton(impl, teacher_z), teacher_z.shape
    rows = [z.shape[0] * z.shape[2] for z in students]                  # of logits, per image
    rows = Q * Nt + (max(rows) if fused else sum(rows))
    most = max(1, max_bytes // (rows * K * (2 if fused and teacher_z.is_cuda else 4) or 1))
    step = math.ceil(B / math.ceil(B / most)) if B else 1               # images at a time, in chunks of equal size

    def chunk_loss(start, student_weight, *students):
        images = slice(start, start + step)
        target = _torch_target(teacher_z[:, images].float() @ teacher_weight.detach().float().T, center, teacher_temp)
        return sum(z[:, images].shape[1] / max(B, 1) * _torch_loss(
            z[:, images].float() @ student_weight.float().T, target, group.images(images), student_temp)
            for z, group in zip(students, groups))

    with torch.autocast(teacher_z.device.type, enabled=False):          # the precision is chosen here
        if fused:
            return _run(_HeadCrossEntropy, groups, student_temp, teacher_temp, step, torch.is_grad_enabled(),
                        teacher_z.detach(), teacher_weight.detach(), center.detach(), student_weight, *students)
        if step >= B:
            return chunk_loss(0, student_weight, *students)
        return sum(checkpoint(chunk_loss, start, student_weight, *students, use_reentrant=False,
                              preserve_rng_state=False) for start in range(0, B, step))


class _Group(NamedTuple):
    """How the student views of one size are matched: what both implementations need, checked by `_make_groups`."""
    mode: str                           # "hinge" or "nearest": by boxes, with or without the hinge; "index"
    grids: tuple                        # rows and columns of a student view, then of a teacher view
    tables: tuple                       # boxes of student (v, B, 5) and teacher (Q, B, 5); or index (v, Q, B, Ns)
    first: int                          # the number of the first of these views among all student views
    skip_same_view: bool

    def images(self, images):
        """The same for a slice of the images."""
        return self._replace(tables=tuple(x[..., images, :] for x in self.tables))

    def matches(self):
        """index and weight, both (v, Q, B, Ns)."""
        if self.mode == "index":
            return self.tables[0].long(), torch.ones_like(self.tables[0], dtype=torch.float32)
        student, teacher = self.tables
        return geometric_matches(student[:, None], teacher, self.grids[:2], self.grids[2:], self.mode == "hinge")

    def kernel_arguments(self, q):
        """`_student_kernel`'s MATCH to SKIP, for teacher views q and q + 1. MATCH is a copy: a backward comes later."""
        if self.mode == "index":
            match = self.tables[0][:, q:q + 2].clone(memory_format=torch.contiguous_format)
        else:
            match = torch.cat([self.tables[0], self.tables[1][q:q + 2]]).float()
        return match, *self.grids, self.mode, q - self.first if self.skip_same_view else None


def _make_groups(kind, students, teacher, center, student_temp, teacher_temp, skip_same_view, *, K=None,
                 student_boxes=None, teacher_boxes=None, student_grid=None, teacher_grid=None, hinge=True, index=None):
    """Check all arguments, here and nowhere else. Returns: a _Group per tensor in `students`, one per size of view.

    kind: "logits" or "z", the last word of the tensors' names. K: the output dimension, if it is not their last.
    """
    if isinstance(students, torch.Tensor):
        students, student_grid, index = [students], [student_grid], [index]
    _require(isinstance(students, (list, tuple)), f"student_{kind} must be a tensor, or a list of one per size of view")
    student_grid, index = ([None] * len(students) if x is None else x for x in (student_grid, index))
    _require(all(isinstance(x, (list, tuple)) and len(x) == len(students) > 0 for x in (students, student_grid, index)),
             f"student_{kind}, student_grid and index must be lists of one length, one entry per size of view")
    names, tensors = f"student_{kind} and teacher_{kind}", (*students, teacher)
    found = f"{names} " + ", ".join(str(tuple(getattr(x, "shape", [type(x).__name__]))) for x in tensors)
    _require(all(isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_floating_point() for x in tensors),
             f"{names} must be floating-point tensors (V, B, Ns, K) and (Q, B, Nt, K); got {found}")
    Q, B, Nt, width = teacher.shape
    _require(all(x.shape[1::2] == (B, width) for x in students) and min(width, Q) > 0,
             f"{names} differ in B or K, or Q or K is 0: {found}")
    _require(student_temp > 0 and teacher_temp > 0,
             f"temperatures must be > 0: student_temp {student_temp}, teacher_temp {teacher_temp}")
    geometry = dict(student_boxes=student_boxes, teacher_boxes=teacher_boxes, student_grid=student_grid[0],
                    teacher_grid=teacher_grid)
    given = sum(x is not None for x in geometry.values())
    _require(given in (0, 4) and not (given and index[0] is not None),
             f"give {', '.join(geometry)}, all or none, or an index instead")
    expected = [("center", center, (K or width,))] + [(f"student_{kind}", x, x.shape) for x in students]
    if given:
        expected += [("student_boxes", student_boxes, (sum(map(len, students)), B, 5)),
                     ("teacher_boxes", teacher_boxes, (Q, B, 5))]
    expected += [("index", x, (len(s), Q, B, s.shape[2])) for x, s in zip(index, students) if x is not None]
    for name, x, shape in expected:
        _require(isinstance(x, torch.Tensor) and x.shape == shape and x.device == teacher.device,
                 f"{name} must be {tuple(shape)} on {teacher.device}, to go with {found}; got "
                 f"{type(x).__name__} {tuple(getattr(x, 'shape', ()))} on {getattr(x, 'device', None)}")
    groups, first = [], 0
    for student, grid, matches in zip(students, student_grid, index):
        views, _, Ns, _ = student.shape
        mode, grids = "index", (Ns, 1, Nt, 1)
        if given:
            _check_geometry("student", student_boxes, grid, Ns)
            _check_geometry("teacher", teacher_boxes, teacher_grid, Nt)
            mode, grids = "hinge" if hinge else "nearest", (*grid, *teacher_grid)
            tables = student_boxes[first:first + views], teacher_boxes
        elif matches is not None:
            integer = not matches.is_floating_point() and matches.dtype != torch.bool
            _require(integer, f"index must hold integers, got {matches.dtype}")
            _require(not _has_values(matches) or ((matches >= 0) & (matches < Nt)).all(), f"index must be in [0, {Nt})")
            tables = (matches,)
        else:
            _require(Ns == Nt == 1, f"which patches match? Give boxes and grids, or index, unless Ns = Nt = 1: {found}")
            tables = (torch.zeros(views, Q, B, 1, dtype=torch.int64, device=teacher.device),)
        groups.append(_Group(mode, grids, tables, first, skip_same_view))
        first += views
    return groups


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _check_geometry(name, boxes, grid, patches=None):
    _require(isinstance(boxes, torch.Tensor) and boxes.shape[-1:] == (5,),
             f"{name}_boxes must be a tensor (..., 5): top, left, height, width, flip; "
             f"got {tuple(getattr(boxes, 'shape', [type(boxes).__name__]))}")
    _require(not _has_values(boxes) or boxes.isfinite().all() and (boxes[..., 2:4] > 0).all(),
             f"{name}_boxes must be finite, with height and width above 0")
    valid = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    _require(valid and patches in (None, math.prod(grid)), f"{name}_grid must be (rows, cols), both at least 1, with "
             f"the number of patches of a view{f', {patches}' if patches else ''}; got {grid}")


def _has_values(x):
    """Whether x can be looked at without waiting for a GPU. Fake and traced tensors have no values."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _use_triton(impl, x):
    _require(impl in ("auto", "triton", "torch"), f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "auto":
        return triton is not None and x.is_cuda and x.dtype != torch.float64
    if impl == "triton":
        _require(triton is not None and (x.is_cuda or INTERPRETED), "impl='triton' needs Triton and CUDA tensors (or "
                 f"TRITON_INTERPRET=1, set before the import); got tensors on {x.device}")
        _require(x.dtype != torch.float64, "impl='triton' computes in float32; for float64 use impl='torch'")
    return impl == "triton"


# ------------------------------------------------------------------------------------------------ Triton kernels
#
# For one student row s (patch n of view v of image b), scaled to x = s / student_temp, and the teacher's probabilities
# p_q of the patches matched with it, q = 0, 1, of weight w_q:
#
#     P = sum_q w_q p_q         W = sum_q w_q         lse = log sum_k exp(x_k)
#     loss = sum_q w_q CE_q = sum_q w_q sum_k p_qk (lse - x_k) = lse * sum_k P_k - sum_k P_k x_k
#     d loss / d s_k = (W exp(x_k - lse) - P_k) / student_temp
#
# So one pass over s and both p_q gives the loss, and a second pass the gradient.
#
# Traffic at B = 32, K = 65536, 2 + 8 views of 49 and 9 patches: the student's logits are 5440 rows (0.71 GB in 16
# bits), the teacher's 3136 (0.41 GB). Eager torch gathers 242 teacher rows per image and keeps log-softmax, products
# and copies: about 45 GB. Here the teacher kernel reads each row twice (for the sum, then for the probabilities; a
# model, not a measurement: the rows in flight exceed an H100's L2, so both reads come from memory) and writes it once.
# The forward pass reads student and teacher; the backward pass reads both again and writes the gradient. The programs
# of one image follow each other, so that its teacher rows stay in L2.
#
# Probabilities are stored times 2^14 in float16: exact to 2^-11 down to 4e-9, where float16 itself would underflow at
# K = 65536. As the loss uses sum_k P_k of the stored values, their rounding is not multiplied by the size of the
# logits. All sums are in float32. Each group of 8 elements, the 16 bytes that a thread loads, has its own running
# maximum, so that no thread waits for another inside the loop; it starts at -3e38, since -inf - -inf would be NaN.
# Exponentials are in base 2: `scale` holds log2(e) / temperature.

if triton is not None:
    @triton.jit
    def _tile(ROW, cols, end, other):
        """Load a tile of a row as float32; `other` from column `end` on."""
        return tl.load(ROW + cols, mask=cols < end, other=other).to(tl.float32)

    @triton.jit
    def _add_exp2(peak, total, x, scale):
        """Add x * scale, x (G, 8), to a running log-sum-exp per group: total * 2^peak, both (G,)."""
        top = tl.maximum(peak, tl.max(x, axis=1) * scale)
        return top, total * tl.exp2(peak - top) + tl.sum(tl.exp2(x * scale - top[:, None]), axis=1)

    @triton.jit
    def _log2_sum(peak, total):
        """Running sums of all groups -> the row's log2 of the sum."""
        top = tl.max(peak, axis=0)
        return top + tl.log2(tl.sum(total * tl.exp2(peak - top), axis=0))

    @triton.jit
    def _teacher_kernel(T, CENTER, P, K, scale, BLOCK: tl.constexpr):
        """One teacher row: P = UNIT * softmax((T - CENTER) / temperature). P may be T itself."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        start = tl.program_id(0).to(tl.int64) * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        for k in range(0, K, BLOCK):
            x = _tile(T + start, k + tile, K, float("-inf")) - _tile(CENTER, k + tile, K, 0.0)
            peak, total = _add_exp2(peak, total, x, scale)
        lse = _log2_sum(peak, total)
        for k in range(0, K, BLOCK):
            x = _tile(T + start, k + tile, K, float("-inf")) - _tile(CENTER, k + tile, K, 0.0)
            tl.store(P + start + (k + tile), tl.exp2(x * scale - lse) * UNIT, mask=k + tile < K)

    @triton.jit
    def _nearest_cell(cell, s_start, s_size, s_cells, t_start, t_size, t_cells):
        """As in `geometric_matches`; integers below 2^24 stay exact, so ties fall as they do there."""
        at = tl.div_rn(((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells, 2 * s_cells * t_size)
        nearest = tl.minimum(tl.maximum(tl.floor(at), 0.0), t_cells - 1.0)
        return nearest, (at - nearest - 0.5) * t_size / t_cells

    @triton.jit
    def _matched_row(MATCH, q, v, b, n, V, B, K, Q: tl.constexpr, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                     T_ROWS: tl.constexpr, T_COLS: tl.constexpr, MODE: tl.constexpr, SKIP: tl.constexpr):
        """The teacher row (q, b, m) matched with student row (v, b, n); how much of it to read: K, or 0 if masked."""
        m, end = 0 * n, K + 0 * n               # tensors, also where Triton takes K = 1 as a constant
        if MODE == "index":
            m = tl.load(MATCH + ((v * Q + q) * B + b).to(tl.int64) * (S_ROWS * S_COLS) + n).to(tl.int32)
            m = tl.minimum(tl.maximum(m, 0), T_ROWS * T_COLS - 1)       # never another tensor's memory
        else:
            S, T = MATCH + (v * B + b) * 5, MATCH + ((V + q) * B + b) * 5
            s_height, s_width, t_height, t_width = tl.load(S + 2), tl.load(S + 3), tl.load(T + 2), tl.load(T + 3)
            row, col = n // S_COLS, n % S_COLS
            col = tl.where(tl.load(S + 4) > 0, S_COLS - 1 - col, col)
            row, dy = _nearest_cell(row, tl.load(S), s_height, S_ROWS, tl.load(T), t_height, T_ROWS)
            col, dx = _nearest_cell(col, tl.load(S + 1), s_width, S_COLS, tl.load(T + 1), t_width, T_COLS)
            col = tl.where(tl.load(T + 4) > 0, T_COLS - 1 - col, col)
            m = (row * T_COLS + col).to(tl.int32)
            if MODE == "hinge":
                y, x = s_height / (2 * S_ROWS), s_width / (2 * S_COLS)
                t_y, t_x = t_height / (2 * T_ROWS), t_width / (2 * T_COLS)
                end = tl.where(dy * dy + dx * dx < tl.maximum(y * y + x * x, t_y * t_y + t_x * t_x), K, 0)
        if SKIP is not None:
            end = tl.where(v == q + SKIP, 0, end)
        return ((q * B + b) * (T_ROWS * T_COLS) + m).to(tl.int64), end

    @triton.jit
    def _tiles(S, P0, P1, cols, end, end0, end1, Q: tl.constexpr):
        """A tile of the student's logits, and of its target: the sum of the matched rows of the teacher views."""
        s = _tile(S, cols, end, float("-inf"))
        p = _tile(P0, cols, end0, 0.0)
        if Q == 2:
            p += _tile(P1, cols, end1, 0.0)
        return s, p

    @triton.jit
    def _student_kernel(S, P, LOSS, LSE, UPSTREAM, DS, V, B, K, scale, MATCH, S_ROWS: tl.constexpr,
                        S_COLS: tl.constexpr, T_ROWS: tl.constexpr, T_COLS: tl.constexpr, MODE: tl.constexpr,
                        SKIP: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr):
        """One student row: writes LOSS and LSE where there is a LOSS, and DS where there is one; DS may be S itself."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        per_image = V * S_ROWS * S_COLS
        b, rest = tl.program_id(0) // per_image, tl.program_id(0) % per_image
        v, n = rest // (S_ROWS * S_COLS), rest % (S_ROWS * S_COLS)
        row = ((v * B + b) * (S_ROWS * S_COLS) + n).to(tl.int64)
        row0, end0 = _matched_row(MATCH, 0, v, b, n, V, B, K, Q, S_ROWS, S_COLS, T_ROWS, T_COLS, MODE, SKIP)
        row1, end1 = row0, 0 * end0
        if Q == 2:
            row1, end1 = _matched_row(MATCH, 1, v, b, n, V, B, K, Q, S_ROWS, S_COLS, T_ROWS, T_COLS, MODE, SKIP)
        end = tl.maximum(end0, end1)
        S, P0, P1 = S + row * K, P + row0 * K, P + row1 * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]

        if LOSS is None:
            lse = tl.load(LSE + row)
        else:
            peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
            mass, dot = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
            for k in range(0, end, BLOCK):                              # a masked row reads nothing
                s, p = _tiles(S, P0, P1, k + tile, end, end0, end1, Q)
                mass += p                                               # before the exponentials: all loads come first
                dot += p * tl.where(p == 0, 0.0, s)                     # 0 * -inf would be NaN
                peak, total = _add_exp2(peak, total, s, scale)
            lse = tl.where(end > 0, _log2_sum(peak, total), 0.0)
            loss = tl.sum(tl.sum(lse * mass - scale * dot, axis=1), axis=0) * (0.6931471805599453 / UNIT)
            tl.store(LOSS + row, tl.where(end > 0, loss, 0.0))
            tl.store(LSE + row, lse)
        if DS is not None:
            factor = tl.load(UPSTREAM) * scale * 0.6931471805599453 / (B * S_ROWS * S_COLS)
            factor = tl.where(end > 0, factor, 0.0)                     # a masked row gets 0, also if UPSTREAM is NaN
            weight = (end0 > 0).to(tl.float32) + (end1 > 0).to(tl.float32)
            for k in range(0, K, BLOCK):
                s, p = _tiles(S, P0, P1, k + tile, end, end0, end1, Q)
                ds = factor * (weight * tl.exp2(s * scale - lse) - p * (1.0 / UNIT))
                tl.store(DS + row * K + (k + tile), ds, mask=k + tile < K)

    INTERPRETED = not isinstance(_student_kernel, triton.runtime.JITFunction)


LOG2_E = 1.4426950408889634
BLOCK = 2048                        # elements of a tile: 8, or 16 bytes of 16-bit logits, for each of 256 threads
LAUNCH = dict(num_warps=8, enable_fp_fusion=True)      # fixed, no autotuning; multiply-adds fused in any Triton


def _teacher_probabilities(logits, center, temp, in_place=False):
    """Launch `_teacher_kernel` on logits (Q, B, Nt, K): probabilities in float32, or times 2^14 in float16."""
    logits, K = logits.contiguous(), logits.shape[-1]
    dtype = torch.float16 if logits.element_size() == 2 else torch.float32
    out = logits if in_place else torch.empty_like(logits, dtype=dtype)
    if out.numel():
        with torch.cuda.device_of(out):
            _teacher_kernel[(out.numel() // K,)](logits, center.float().contiguous(), out, K, LOG2_E / float(temp),
                                                 BLOCK=BLOCK, **LAUNCH)
    return out


def _student_rows(s, p, temp, matching, lse=None, ds=None, upstream=None):
    """Launch `_student_kernel` on s (V, B, Ns, K), p (1 or 2, B, Nt, K). Fills ds; makes loss, lse if lse is None."""
    (V, B, Ns, K), loss = s.shape, None
    if lse is None:
        loss, lse = s.new_empty(2, V, B, Ns, dtype=torch.float32)
    if lse.numel():
        with torch.cuda.device_of(s):
            _student_kernel[(lse.numel(),)](s, p, loss, lse, upstream, ds, V, B, K, LOG2_E / float(temp), *matching,
                                            Q=len(p), BLOCK=BLOCK, **LAUNCH)
    return loss, lse


@torch.compiler.disable                 # torch.compile breaks its graph here and changes nothing
def _run(function, *arguments):
    return function.apply(*arguments)


def _refuse_double_backward():
    if torch.is_grad_enabled():         # in a backward pass: create_graph=True
        raise RuntimeError("the Triton loss cannot be differentiated twice (create_graph=True); "
                           "impl='torch' is twice differentiable")


class _LocalCrossEntropy(torch.autograd.Function):
    """Forward and backward are a launch each. The caller's tensors are not written to, so backward may run again."""

    @staticmethod
    def forward(ctx, student, teacher, center, student_temp, teacher_temp, matching):
        p = _teacher_probabilities(teacher, center, teacher_temp)
        loss, lse = _student_rows(student, p, student_temp, matching)
        ctx.save_for_backward(student, p, lse)
        ctx.temp, ctx.matching = student_temp, matching
        return loss.sum() / max(1, student.shape[1] * student.shape[2])

    @staticmethod
    def backward(ctx, upstream):
        _refuse_double_backward()
        student, p, lse = ctx.saved_tensors
        ds = torch.empty_like(student)
        _student_rows(student, p, ctx.temp, ctx.matching, lse, ds, upstream.float())
        return ds, None, None, None, None, None


class _HeadCrossEntropy(torch.autograd.Function):
    """Logits, loss and gradient of a few images at a time, all in one private buffer; the backward only scales."""

    @staticmethod
    def forward(ctx, groups, student_temp, teacher_temp, step, wanted, teacher_z, teacher_weight, center,
                student_weight, *students):
        logit_type, grad_type = (torch.float16, torch.bfloat16) if teacher_z.is_cuda else (torch.float32,) * 2
        (Q, B, Nt, D), K = teacher_z.shape, len(student_weight)
        needs_weight, *needs_z = (wanted and needed for needed in ctx.needs_input_grad[8:])
        weight, teacher_weight = student_weight.to(logit_type), teacher_weight.to(logit_type)
        grad_weight = torch.zeros_like(student_weight, dtype=torch.float32) if needs_weight else None
        grads = [torch.zeros_like(z, dtype=torch.float32) if needed else None for z, needed in zip(students, needs_z)]
        student_buffer = weight.new_empty(step * max(z.shape[0] * z.shape[2] for z in students), K)
        teacher_buffer = weight.new_empty(step * Q * Nt, K)
        total = torch.zeros((), device=teacher_z.device)

        def logits(z, weight, buffer):                                  # (v, b, N, D) -> (v, b, N, K), in the buffer
            z = z.to(logit_type).reshape(-1, D)
            return z, torch.mm(z, weight.T, out=buffer[:len(z)])

        for start in range(0, B, step):
            images = slice(start, start + step)
            _, t = logits(teacher_z[:, images], teacher_weight, teacher_buffer)
            p = _teacher_probabilities(t.view(Q, -1, Nt, K), center, teacher_temp, in_place=True)
            share = torch.full((1,), p.shape[1] / B, device=p.device)   # of these images in the mean
            for i, (z, group) in enumerate(zip(students, groups)):
                for q in range(0, Q, 2):        # two teacher views a launch; its gradient is written over the logits
                    rows, s = logits(z[:, images], weight, student_buffer)
                    needed = needs_weight or needs_z[i]
                    ds = s.view(grad_type) if needed else None
                    loss, _ = _student_rows(s.view(*z[:, images].shape[:3], K), p[q:q + 2], student_temp,
                                            group.images(images).kernel_arguments(q), ds=ds, upstream=share)
                    total += loss.sum() / max(1, B * z.shape[2])
                    if needs_z[i]:
                        grads[i][:, images] += (ds @ weight.to(grad_type)).view(z[:, images].shape)
                    if needs_weight:
                        grad_weight += ds.T @ rows.to(grad_type)
        ctx.save_for_backward(grad_weight, *grads)
        ctx.types = [x.dtype for x in (student_weight, *students)]
        return total

    @staticmethod
    def backward(ctx, upstream):
        _refuse_double_backward()
        # where: a masked row gets 0, also if upstream is NaN or inf
        return *[None] * 8, *(None if grad is None else torch.where(grad == 0, 0, grad * upstream).to(dtype)
                              for grad, dtype in zip(ctx.saved_tensors, ctx.types))


# ------------------------------------------------------------------------------------------------ benchmark

def _benchmark(path):
    """Time the local loss of a step with 2 global and 8 local views, and its gradient, last layers included."""
    import json
    from torch.utils.benchmark import Timer
    cuda, rows = torch.cuda.is_available(), []
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    options, compiled = dict(student_temp=0.1, teacher_temp=0.04), torch.compile(reference_cross_entropy)
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if cuda else 'CPU'}; reference: pair by pair, "
          f"as the official code\n{'':46}forward ms   with gradient ms   peak MiB")
    for B, K in itertools.product((32, 128), (65536, 8192)) if cuda else [(4, 16384)]:
        views, grids = (2, 8), [(7, 7), (3, 3)]
        boxes = torch.rand(10, B, 5, device=device) * 200 + 1
        z = [F.normalize(torch.randn(v, B, height * width, 256, device=device), dim=-1).requires_grad_()
             for v, (height, width) in zip(views, grids)]
        weight = F.normalize(torch.randn(K, 256, device=device), dim=-1).requires_grad_()
        teacher_z, teacher_weight, center = z[0].detach().flip(1), weight.detach(), torch.zeros(K, device=device)

        def logits(x, weight):
            return x.to(dtype) @ weight.to(dtype).T

        def reference(loss):
            matches = [geometric_matches(part[:, None], boxes[:2], grid, (7, 7))
                       for part, grid in zip(boxes.split(views), grids)]
            return sum(loss(logits(x, weight), logits(teacher_z, teacher_weight), center, **options, index=i, weight=w)
                       for x, (i, w) in zip(z, matches))

        def local(impl):
            return sum(local_cross_entropy(
                logits(x, weight), logits(teacher_z, teacher_weight), center, impl=impl, student_boxes=part,
                teacher_boxes=boxes[:2], student_grid=grid, teacher_grid=(7, 7), **options)
                for x, part, grid in zip(z, boxes.split(views), grids))

        def head(impl):
            return head_cross_entropy(z, weight, teacher_z, teacher_weight, center, impl=impl, student_boxes=boxes,
                                      teacher_boxes=boxes[:2], student_grid=grids, teacher_grid=(7, 7), **options)

        losses = {"reference, eager": (reference, reference_cross_entropy),
                  "reference, torch.compile": (reference, compiled)}
        losses |= {f"{loss.__name__}_cross_entropy, {impl}": (loss, impl) for loss in (local, head)
                   for impl in ("torch", "triton")[:1 + cuda]}
        for name, (loss, argument) in losses.items():
            calls = (lambda: loss(argument), lambda: torch.autograd.grad(loss(argument), [*z, weight]))
            try:
                forward, both = (1e3 * Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
                                 .blocked_autorange(min_run_time=0.5).median for call in calls)
                peak = math.nan
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    calls[1]()
                    peak = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
            except torch.OutOfMemoryError:
                forward = both = peak = math.nan
            rows.append(dict(B=B, K=K, name=name, forward_ms=forward, forward_backward_ms=both, peak_mib=peak))
            print(f"B {B:3}  K {K:5}  {name:28}{forward:12.4g}{both:19.4g}{peak:11.4g}", flush=True)
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    import argparse
    parser = argparse.ArgumentParser(description="Times the loss: forward, forward and backward, peak memory.")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    _benchmark(parser.parse_args().json)
