# SPDX-License-Identifier: MIT
"""Which patches match, and the cross-entropy over the matches: the local loss of Global-Local Self-Distillation.

    loss = local_cross_entropy(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04,
                               student_boxes=sb, teacher_boxes=tb, student_grid=(3, 3), teacher_grid=(7, 7))
    loss = head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, ...the same...)

The second includes the last layers, so that the (rows x K) logits never exist as a whole. Copy this file into your
project; it needs torch, and Triton on a GPU. Read the torch functions first. `python matching_kernels.py` times both.

    B       images                      V, Q    student views, teacher views
    K       prototypes                  Ns, Nt  patches of a student / teacher view: grid rows x cols, row-major
    box     where a view was cropped: (top, left, height, width, flip) in pixels of the original image; flip 0 or 1
    match   for a student patch: the index of its teacher patch, and a weight 0 (masked) or 1
"""
import argparse
import itertools
import json
import math

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

    Args: student_boxes, teacher_boxes (..., 5); the leading shapes broadcast. student_grid, teacher_grid (rows, cols).
    Returns: index (..., Ns) int64 into the teacher's Nt patches, weight (..., Ns) float32.
    Raises: ValueError for a wrong shape or grid, and, on the CPU, for boxes that are not finite or have no area.
    Source: the official code's nearest pixel-position map, in closed form.
    """
    _check_geometry("student", student_boxes, student_grid)
    _check_geometry("teacher", teacher_boxes, teacher_grid)
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

    row, col = (torch.arange(cells, device=student_boxes.device) for cells in student_grid)
    col = torch.where(s_flip > 0, s_cols - 1 - col, col)               # a flipped view shows its last column first
    t_row, dy = nearest_cell(row, s_top, s_height, s_rows, t_top, t_height, t_rows)     # (..., rows)
    t_col, dx = nearest_cell(col, s_left, s_width, s_cols, t_left, t_width, t_cols)     # (..., cols)
    t_col = torch.where(t_flip > 0, t_cols - 1 - t_col, t_col)
    index = (t_row[..., :, None] * t_cols + t_col[..., None, :]).flatten(-2).long()     # (..., Ns)
    dist2 = (dy[..., :, None] ** 2 + dx[..., None, :] ** 2).flatten(-2)
    s_halfdiag2 = (s_height / (2 * s_rows)) ** 2 + (s_width / (2 * s_cols)) ** 2
    t_halfdiag2 = (t_height / (2 * t_rows)) ** 2 + (t_width / (2 * t_cols)) ** 2
    return index, ((dist2 < torch.maximum(s_halfdiag2, t_halfdiag2)) | (not hinge)).float()


def similarity_matches(student_features, teacher_features):
    """EsViT's matching: for every student patch, the teacher patch whose backbone features have the largest cosine.
    Args: (..., Ns, C), (..., Nt, C). Returns: index (..., Ns) int64; every match has weight 1."""
    with torch.no_grad():
        student = F.normalize(student_features.float(), dim=-1)
        teacher = F.normalize(teacher_features.float(), dim=-1)
        return (student @ teacher.mT).argmax(-1)


def reference_cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp, index, weight):
    """The definition of the loss, pair by pair as in the official code, for tests. index, weight: (V, Q, B, Ns)."""
    target, loss = F.softmax((teacher_logits - center) / teacher_temp, dim=-1).detach(), 0
    for v, q in itertools.product(range(len(student_logits)), range(len(target))):
        matched = target[q].gather(1, index[v, q, ..., None].expand(-1, -1, target.shape[-1]))    # (B, Ns, K)
        cross_entropy = -(matched * F.log_softmax(student_logits[v] / student_temp, dim=-1)).sum(-1)
        loss = loss + (weight[v, q] * cross_entropy).mean()
    return loss


def local_cross_entropy(student_logits, teacher_logits, center, *, student_temp, teacher_temp, **options):
    """Sum over pairs (student view v, teacher view q) of the mean over B and Ns of weight * cross-entropy, where

        cross-entropy(n) = - sum_k  softmax((t - center) / teacher_temp)[k] * log_softmax(s / student_temp)[k]

    with s the logits of student patch n and t those of the teacher patch that n is matched with. A masked patch
    (weight 0) adds nothing but stays in the mean's denominator.

    Args:
        student_logits: (V, B, Ns, K), or a list with one tensor (v, B, Ns, K) per size of view. The losses of the sizes
            are added, and the teacher's softmax is computed once. V counts the views of all sizes.
        teacher_logits: (Q, B, Nt, K). center: (K,).
        skip_same_view=False: leave out the pairs v = q (student view v and teacher view v are the same crop).
        impl="auto": "triton", "torch", or "auto": Triton for CUDA tensors, torch for others and for float64.
        Which patches match, in one of three ways. For a list of sizes, student_grid and index are lists too.
            student_boxes (V, B, 5), teacher_boxes (Q, B, 5), student_grid, teacher_grid, hinge=True: by geometry;
            index (V, Q, B, Ns), integers in [0, Nt), else undefined on a GPU: these matches, each with weight 1;
            nothing, if Ns = Nt = 1: the loss of whole images.
    Returns: a scalar, float32 (float64 for float64 logits). No gradient flows to the teacher or the centre.
    Raises: ValueError where arguments do not fit; values of boxes and index are checked on the CPU only, as a GPU would
        have to wait. RuntimeError if a Triton loss is differentiated twice; with impl="torch" it can be.
    """
    return head_cross_entropy(student_logits, None, teacher_logits, None, center, student_temp=student_temp,
                              teacher_temp=teacher_temp, **options)


def _torch_loss(groups, student_temp, teacher_temp, images, teacher_z, teacher_weight, center, student_weight,
                *students):
    """The part that a slice of the images has in the loss of all. Without weights (None), z are logits."""
    def logits(z, weight):
        return z[:, images] if weight is None else z[:, images].to(dtype).contiguous() @ weight.to(dtype).T

    dtype = torch.promote_types(students[0].dtype, torch.float32)
    target = F.softmax((logits(teacher_z, teacher_weight).to(dtype) - center.to(dtype)) / teacher_temp, dim=-1)
    loss, image = 0, torch.arange(target.shape[1], device=target.device)[:, None]
    for z, (index, _, same) in zip(students, groups):
        index = index[images]                                          # (B, v, Q, Ns), -1 where masked
        for v, student in enumerate(logits(z, student_weight)):        # (B, Ns, K)
            total = torch.zeros_like(student, dtype=dtype)
            any_match = torch.zeros_like(student[..., :1], dtype=torch.bool)
            # cross-entropy is linear in its target: add up the targets of all teacher views, then one product for all
            for q in range(len(target)):
                if v - q != same:
                    match = index[:, v, q, :, None] >= 0               # (B, Ns, 1)
                    total += torch.where(match, target[q][image, index[:, v, q].long()], 0)
                    any_match |= match
            # where, not a product with 0: a masked row may hold NaN, and -inf is allowed where the target is 0
            log_p = F.log_softmax(torch.where(any_match, student.to(dtype), 0) / student_temp, dim=-1)
            loss = loss - torch.where(total == 0, 0, total * log_p).sum() / max(1, any_match.numel())
    return loss * (len(image) / max(1, teacher_z.shape[1]))            # the share of these images in the mean


def head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, *, student_temp, teacher_temp,
                       skip_same_view=False, impl="auto", max_bytes=512 * 2 ** 20, **matching):
    """`local_cross_entropy` of the logits z @ weight.T, which are made for a few images at a time.

    Args:
        student_z: (V, B, Ns, D), the input of the last layer, or a list with one tensor (v, B, Ns, D) per size of view.
        teacher_z: (Q, B, Nt, D). student_weight, teacher_weight: (K, D), the last layers. center: (K,).
        max_bytes: limit for the logits in memory (at least one image's are). The others: as in `local_cross_entropy`.
    Returns: a scalar. Gradients flow to student_z and student_weight only.
    Precision: torch: float32 logits. Triton on a GPU: float16 logits (bfloat16's step near 1 would change a teacher
        probability by 10 %) and bfloat16 gradients of logits. So the rows of z and weight should be normalised: a logit
        beyond 65504 becomes NaN. If K is no multiple of 16, the kernels need more than twice the instructions.
    """
    students, groups, fused = _make_groups(student_z, student_weight, teacher_z, teacher_weight, center, skip_same_view,
                                           impl, **matching)
    _require(min(student_temp, teacher_temp) > 0, f"temperatures must be > 0, got {student_temp} and {teacher_temp}")
    B, step = teacher_z.shape[1], max(1, teacher_z.shape[1])            # step: images at a time
    if student_weight is not None:
        rows = sum(z.shape[0] * z.shape[2] for z in (teacher_z, *students))     # of logits, per image
        most = max(1, max_bytes // max(1, rows * len(center) * (2 if fused and teacher_z.is_cuda else 4)))
        step = math.ceil(step / math.ceil(step / most))                 # in chunks of equal size
    teacher = [x if x is None else x.detach() for x in (teacher_z, teacher_weight, center)]
    options = groups, float(student_temp), float(teacher_temp)
    with torch.autocast(teacher_z.device.type, enabled=False), torch.cuda.device_of(teacher_z):
        if fused:
            apply = torch.compiler.disable(_TritonLoss.apply)           # torch.compile breaks its graph here
            return apply(*options, step, torch.is_grad_enabled(), *teacher, student_weight, *students)
        if step >= B:
            return _torch_loss(*options, slice(None), *teacher, student_weight, *students)
        return sum(checkpoint(_torch_loss, *options, slice(start, start + step), *teacher, student_weight, *students,
                              use_reentrant=False, preserve_rng_state=False) for start in range(0, B, step))


def _make_groups(students, student_weight, teacher, teacher_weight, center, skip_same_view, impl, *, student_boxes=None,
                 teacher_boxes=None, student_grid=None, teacher_grid=None, hinge=True, index=None):
    """Check all arguments. Returns: students as a list; a group (table, grids, same) for each; whether to use Triton.

    table: matches (B, v, Q, Ns) int32, -1 if masked; or, for the kernel to find them, boxes (B, v + Q, 5) float32, the
        student's first. It is a copy: the caller may change an index before a checkpoint's backward pass reads it.
    grids: (rows, cols, rows, cols) of the student's and the teacher's patches.
    same: student view v of this size and teacher view q are left out if v - q == same.
    """
    if isinstance(students, torch.Tensor):
        students, student_grid, index = [students], [student_grid], [index]
    students, student_grid, index = ([None] * len(students or [0]) if x is None else x
                                     for x in (students, student_grid, index))
    kind, first, groups = "logits" if student_weight is None else "z", 0, []
    _require(len(students) == len(student_grid) == len(index) > 0,
             f"student_{kind}, student_grid and index must be lists of one length, one entry per size of view")
    _require(all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (*students, teacher)),
             f"student_{kind} and teacher_{kind} must be tensors of 4 axes: views, images, patches, columns")
    (Q, B, Nt, width), V, fused = teacher.shape, sum(map(len, students)), _use_triton(impl, students[0])

    def check(name, x, *shape):
        found = f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        _require(found == f"{shape} on {teacher.device}", f"{name} must be {shape} on {teacher.device}, got {found}")

    check("center", center, width if kind == "logits" else len(student_weight))
    if kind == "z":
        check("student_weight", student_weight, len(center), width)
        check("teacher_weight", teacher_weight, len(center), width)
    _require(min(V, Q, len(center)) > 0, f"no views or no columns: V = {V}, Q = {Q}, K = {len(center)}")
    for student, grid, matches in zip(students, student_grid, index):
        v, _, Ns, _ = student.shape
        table, grids = None, (Ns, 1, Nt, 1)
        check(f"student_{kind}", student, v, B, Ns, width)
        if student_boxes is not None:
            check("student_boxes", student_boxes, V, B, 5)
            check("teacher_boxes", teacher_boxes, Q, B, 5)
            boxes = student_boxes[first:first + v]
            _check_geometry("student", boxes, grid, Ns)
            _check_geometry("teacher", teacher_boxes, teacher_grid, Nt)
            _require(matches is None, "give boxes or an index, not both")
            if fused and hinge:                 # the kernel finds the matches
                table, grids = torch.cat([boxes, teacher_boxes]).float().transpose(0, 1), (*grid, *teacher_grid)
            else:
                matches, weight = geometric_matches(boxes[:, None], teacher_boxes, grid, teacher_grid, hinge)
                matches = matches.where(weight > 0, -1)
        elif matches is None:
            _require(Ns == Nt == 1, f"which patches match? Ns = {Ns}, Nt = {Nt}, and neither student_boxes nor index")
            matches = torch.zeros(v, Q, B, 1, device=teacher.device)
        else:
            check("index", matches, v, Q, B, Ns)
            _require(matches.dtype != torch.bool and not matches.is_floating_point(), "index must hold integers")
            _require(not _has_values(matches) or ((matches >= 0) & (matches < Nt)).all(), f"index must be in [0, {Nt})")
        table = matches.int().movedim(2, 0) if table is None else table
        same = -first if skip_same_view else V                          # v - q is never V
        groups.append((table.clone(memory_format=torch.contiguous_format), grids, same))
        first += v
    return students, groups, fused


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _check_geometry(name, boxes, grid, patches=None):
    valid = isinstance(boxes, torch.Tensor) and boxes.shape[-1:] == (5,)
    valid = valid and (not _has_values(boxes) or bool(boxes.isfinite().all() and (boxes[..., 2:4] > 0).all()))
    _require(valid, f"{name}_boxes must be a tensor (..., 5), finite, with height and width above 0")
    valid = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    _require(valid and patches in (None, math.prod(grid)),
             f"{name}_grid must be (rows, cols) of the {patches or ''} patches of a view, got {grid}")


def _has_values(x):
    """Whether x can be looked at without waiting for a GPU. Fake and traced tensors have no values."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _use_triton(impl, x):
    _require(impl in ("auto", "triton", "torch"), f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    can = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    _require(can or impl != "triton", "impl='triton' needs Triton, tensors on a GPU (or TRITON_INTERPRET=1, set before "
             f"the import) and no float64; got {x.dtype} on {x.device}")
    return impl == "triton" or impl == "auto" and can and x.is_cuda


# ------------------------------------------------------------------------------------------------ Triton kernels
#
# For one student row s (patch n of view v of image b), scaled to x = s / student_temp, and the teacher's probabilities
# p_q of the patches matched with it, of weight w_q, for two teacher views q at a time:
#
#     P = sum_q w_q p_q         W = sum_q w_q         lse = log sum_k exp(x_k)
#     loss = sum_q w_q CE_q = sum_q w_q sum_k p_qk (lse - x_k) = lse * sum_k P_k - sum_k P_k x_k
#     d loss / d s_k = (W exp(x_k - lse) - P_k) / student_temp
#
# One pass over s and both p_q gives the loss, a second pass the gradient. Rows of one image follow each other, so that
# its teacher rows stay in L2.
#
# Probabilities are stored times 2^14 in float16: exact to 2^-11 down to 4e-9, where float16 itself would underflow;
# so is the gradient before its last factor. The loss uses sum_k P_k of the stored values, so that the size of the
# logits does not multiply their rounding. All sums are in float32. Each group of 8 elements, the 16 bytes that a thread
# loads, has its own running maximum, so that no thread waits for another inside the loop; it starts at -3e38, since
# -inf - -inf would be NaN. Exponentials are in base 2: `scale` holds log2(e) / temperature.

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
    def _teacher_kernel(T, CENTER, P, K, scale, BLOCK: tl.constexpr):
        """One teacher row: P = UNIT * softmax((T - CENTER) / temperature). P may be T itself."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        start = tl.program_id(0).to(tl.int64) * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        for k in range(0, K, BLOCK):
            x = _tile(T + start, k + tile, K, float("-inf")) - _tile(CENTER, k + tile, K, 0.0)
            peak, total = _add_exp2(peak, total, x, scale)
        top = tl.max(peak, axis=0)
        lse = top + tl.log2(tl.sum(total * tl.exp2(peak - top), axis=0))
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
    def _matched_row(q, b, v, n, V, Q, B, K, same, TABLE, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                     T_ROWS: tl.constexpr, T_COLS: tl.constexpr):
        """The row of teacher view q matched with student row (v, b, n); how much of it to read: K, or 0 if masked."""
        end = tl.where((q < Q) & (v - q != same), K, 0)
        q = tl.minimum(q, Q - 1)                # an odd number of views has no second one at the end
        if TABLE.dtype.element_ty == tl.int32:
            m = tl.load(TABLE + ((b * V + v) * Q + q).to(tl.int64) * (S_ROWS * S_COLS) + n)
            m = tl.minimum(tl.maximum(m, 0), T_ROWS * T_COLS - 1)       # never another tensor's memory
        else:
            S, T = TABLE + (b * (V + Q) + v) * 5, TABLE + (b * (V + Q) + V + q) * 5
            s_height, s_width, t_height, t_width = tl.load(S + 2), tl.load(S + 3), tl.load(T + 2), tl.load(T + 3)
            row, col = n // S_COLS, n % S_COLS
            col = tl.where(tl.load(S + 4) > 0, S_COLS - 1 - col, col)
            row, dy = _nearest_cell(row, tl.load(S), s_height, S_ROWS, tl.load(T), t_height, T_ROWS)
            col, dx = _nearest_cell(col, tl.load(S + 1), s_width, S_COLS, tl.load(T + 1), t_width, T_COLS)
            col = tl.where(tl.load(T + 4) > 0, T_COLS - 1 - col, col)
            m = (row * T_COLS + col).to(tl.int32)
            y, x, t_y, t_x = s_height / S_ROWS, s_width / S_COLS, t_height / T_ROWS, t_width / T_COLS
            end = tl.where(4 * (dy * dy + dx * dx) < tl.maximum(y * y + x * x, t_y * t_y + t_x * t_x), end, 0)
        return ((q * B + b) * (T_ROWS * T_COLS) + m).to(tl.int64), end

    @triton.jit
    def _student_kernel(S, P, LOSS, DS, q, V, Q, B, K, scale, same, TABLE, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                        T_ROWS: tl.constexpr, T_COLS: tl.constexpr, BLOCK: tl.constexpr):
        """One student row: LOSS and, if there is a DS (it may be S), its gradient times UNIT * student_temp."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        per_image = V * S_ROWS * S_COLS
        b, rest = tl.program_id(0) // per_image, tl.program_id(0) % per_image
        v, n = rest // (S_ROWS * S_COLS), rest % (S_ROWS * S_COLS)
        row = ((v * B + b) * (S_ROWS * S_COLS) + n).to(tl.int64)
        row0, end0 = _matched_row(q, b, v, n, V, Q, B, K, same, TABLE, S_ROWS, S_COLS, T_ROWS, T_COLS)
        row1, end1 = _matched_row(q + 1, b, v, n, V, Q, B, K, same, TABLE, S_ROWS, S_COLS, T_ROWS, T_COLS)
        end = tl.maximum(end0, end1)
        S, P0, P1 = S + row * K, P + row0 * K, P + row1 * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        mass, dot = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
        for k in range(0, end, BLOCK):          # a masked row reads nothing
            s = _tile(S, k + tile, end, float("-inf"))
            p = _tile(P0, k + tile, end0, 0.0) + _tile(P1, k + tile, end1, 0.0)
            mass += p                           # before the exponentials: all loads come first
            dot += p * tl.where(p == 0, 0.0, s)                         # 0 * -inf would be NaN
            peak, total = _add_exp2(peak, total, s, scale)
        top = tl.max(peak, axis=0)
        lse = tl.where(end > 0, top + tl.log2(tl.sum(total * tl.exp2(peak - top), axis=0)), 0.0)
        loss = tl.sum(tl.sum(lse * mass - scale * dot, axis=1), axis=0) * (0.6931471805599453 / UNIT)
        tl.store(LOSS + row, tl.where(end > 0, loss, 0.0))
        if DS is not None:
            weight = UNIT * ((end0 > 0).to(tl.float32) + (end1 > 0).to(tl.float32))
            for k in range(0, K, BLOCK):
                s = _tile(S, k + tile, end, float("-inf"))
                p = _tile(P0, k + tile, end0, 0.0) + _tile(P1, k + tile, end1, 0.0)
                tl.store(DS + row * K + (k + tile), weight * tl.exp2(s * scale - lse) - p, mask=k + tile < K)

    INTERPRETED = not isinstance(_student_kernel, triton.runtime.JITFunction)


LOG2_E = math.log2(math.e)
LAUNCH = dict(BLOCK=2048,               # elements of a tile: 8, or 16 bytes of 16-bit logits, for each of 256 threads
              num_warps=8, enable_fp_fusion=True)       # no autotuning; multiply-adds fused in any Triton


class _TritonLoss(torch.autograd.Function):
    """The loss and its gradient, for `step` images and two teacher views at a time; the backward pass only scales.

    Without weights (None), z are the caller's logits. Else logits are private; their gradient is written over them.
    """

    @staticmethod
    def forward(ctx, groups, student_temp, teacher_temp, step, wanted, teacher_z, teacher_weight, center,
                student_weight, *students):
        (Q, B, _, _), K, head = teacher_z.shape, len(center), student_weight is not None
        needs_weight, *needs = (wanted and needed for needed in ctx.needs_input_grad[8:])
        logit_type, grad_type, center = teacher_z.dtype, None, center.contiguous()
        if head:
            logit_type, grad_type = (torch.float16, torch.bfloat16) if teacher_z.is_cuda else (torch.float32,) * 2
            weight, teacher_weight = student_weight.to(logit_type), teacher_weight.to(logit_type)
        unit = 2 ** 14 if logit_type.itemsize == 2 else 1
        grad_weight = torch.zeros_like(student_weight, dtype=torch.float32) if needs_weight else None
        grads = [torch.zeros_like(z, dtype=torch.float32) if head else None for z in students]
        losses = [z.new_zeros(z.shape[:3], dtype=torch.float32) for z in students]
        ctx.scales = [1 / (unit * student_temp * max(1, loss[0].numel())) for loss in losses]
        for start in range(0, B, step):
            images = slice(start, start + step)
            t = teacher_z[:, images].to(logit_type).contiguous()        # contiguous: one large product, not many
            t = t @ teacher_weight.T if head else t
            p = t if head else torch.empty_like(t, dtype=torch.float16 if unit > 1 else torch.float32)
            _teacher_kernel[(p[..., 0].numel(),)](t, center, p, K, LOG2_E / teacher_temp, **LAUNCH)
            for i, q in itertools.product(range(len(students)), range(0, Q, 2)):
                z, (table, grids, same), ds = students[i][:, images], groups[i], None
                s = z.to(logit_type).contiguous() @ weight.T if head else z.contiguous()    # (v, b, Ns, K)
                if needs_weight or needs[i]:
                    ds = s.view(grad_type) if head else torch.empty_like(s)
                loss = s.new_empty(s.shape[:3], dtype=torch.float32)
                _student_kernel[(loss.numel(),)](s, p, loss, ds, q, len(s), Q, s.shape[1], K, LOG2_E / student_temp,
                                                 same, table[images].clone(), *grids, **LAUNCH)     # clone: aligned
                losses[i][:, images] += loss
                if needs_weight:
                    grad_weight.add_(ds.view(-1, K).T @ z.flatten(0, 2).to(grad_type), alpha=ctx.scales[i])
                if needs[i] and head:
                    grads[i][:, images] += ds @ weight.to(grad_type)
                elif needs[i]:
                    grads[i] = ds if grads[i] is None else grads[i].float() + ds
                del s, ds                       # their memory serves the next product
            del t, p
        ctx.save_for_backward(grad_weight, *grads, *losses)
        return sum(loss.sum() / max(1, loss[0].numel()) for loss in losses)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():             # create_graph=True
            raise RuntimeError("the Triton loss cannot be differentiated twice; impl='torch' is twice differentiable")
        grad_weight, *saved = ctx.saved_tensors
        grads, losses = saved[:len(ctx.scales)], saved[len(ctx.scales):]
        for i, (grad, loss) in enumerate(zip(grads, losses)):
            if grad is not None:                # a row without a match gets 0, also if upstream is NaN
                factor = torch.where(loss == 0, 0, upstream * ctx.scales[i])[..., None]
                grads[i] = torch.mul(grad, factor, out=torch.empty_like(grad))
        return *[None] * 8, None if grad_weight is None else grad_weight * upstream, *grads


def _benchmark(file):
    """Time the local loss of a step with 2 global and 8 local views, last layers included: a JSON object per line."""
    from torch.utils.benchmark import Timer
    cuda, grids, compiled = torch.cuda.is_available(), [(7, 7), (3, 3)], torch.compile(reference_cross_entropy)
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    for B, K in itertools.product((32, 128), (65536, 8192)) if cuda else [(4, 16384)]:
        boxes = torch.rand(10, B, 5, device=device) * 200 + 1
        weight, *z = (F.normalize(torch.randn(*shape, 256, device=device), dim=-1).requires_grad_()
                      for shape in ((K,), (2, B, 49), (8, B, 9)))
        teacher, center = (z[0].detach().flip(1), weight.detach()), torch.zeros(K, device=device)

        def reference(cross_entropy):
            t, loss = teacher[0].to(dtype) @ teacher[1].to(dtype).T, 0
            for x, part, grid in zip(z, boxes.split((2, 8)), grids):
                index, w = geometric_matches(part[:, None], boxes[:2], grid, (7, 7))
                loss = loss + cross_entropy(x.to(dtype) @ weight.to(dtype).T, t, center, 0.1, 0.04, index, w)
            return loss

        def head(impl):
            return head_cross_entropy(
                z, weight, *teacher, center, student_temp=0.1, teacher_temp=0.04, impl=impl, student_boxes=boxes,
                teacher_boxes=boxes[:2], student_grid=grids, teacher_grid=(7, 7))

        losses = dict(reference=(reference, reference_cross_entropy), reference_compiled=(reference, compiled),
                      torch=(head, "torch"), triton=(head, "triton"))
        for name, what in itertools.product(list(losses)[:3 + cuda], ("loss(how)", "grad(loss(how), inputs)")):
            names = dict(zip(("loss", "how"), losses[name]), grad=torch.autograd.grad, inputs=[*z, weight])
            row = dict(B=B, K=K, loss=name, what=what)
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                timer = Timer(what, globals=names, num_threads=torch.get_num_threads())
                row["ms"] = round(1e3 * timer.blocked_autorange(min_run_time=0.5).median, 3)
                row["peak_mib"] = torch.cuda.max_memory_allocated() // 2 ** 20 if cuda else None
            except RuntimeError as error:       # out of memory, or no compiler for torch.compile
                row["ms"] = type(error).__name__
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the loss: forward, forward and backward, peak memory.")
    parser.add_argument("--json", metavar="FILE", nargs="?", type=argparse.FileType("w"), default="-", const="-")
    _benchmark(parser.parse_args().json)
