# SPDX-License-Identifier: MIT
"""Which patches match, and the cross-entropy over the matches: the local loss of Global-Local Self-Distillation.

    loss = local_cross_entropy(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04,
                               student_boxes=sb, teacher_boxes=tb, student_grid=(3, 3), teacher_grid=(7, 7))

or, with the last layer of the heads included, so that the (rows x K) logits never exist as a whole,

    loss = head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, ...the same...)

Copy this file into your project: it needs torch, and Triton on a GPU. Read the torch functions first; the kernels
compute the same. `python matching_kernels.py` times both, and reports what the kernels compile to.


    B       images                      V, Q    student views, teacher views
    Ns, Nt  patches of one student / teacher view (grid rows x cols, row-major)
    K       output dimension ("prototypes")
    box     where a view was cut: (top, left, height, width, flip) in pixels of the original image, flip 0 or 1
            (mirrored left-right after the cut)
    match   for a student patch: the index of its teacher patch, and a weight 0 or 1
"""
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

    The teacher's patches tile its box, so the nearest teacher centre needs no distance matrix: per axis it is the cell
    that holds the student patch's centre, clamped to the grid. A centre exactly on the border of two cells goes to
    the lower or right one. With `hinge`, a match counts (weight 1) only if the two centres are closer than half a
    diagonal of the larger patch: dist2 < max(halfdiag2); without it every weight is 1.

    Args:
        student_boxes, teacher_boxes: (..., 5) top, left, height, width, flip; the leading shapes broadcast.
        student_grid, teacher_grid: (rows, cols) of a view's patches; Ns and Nt are their products.
    Returns: index (..., Ns) int64 into the teacher's Nt patches, weight (..., Ns) float32.
    Raises: ValueError where a last dimension is not 5 or a grid is not two positive integers.
    Source: the official code's nearest pixel-position map, in closed form.
    """
    for name, boxes, grid in (("student", student_boxes, student_grid), ("teacher", teacher_boxes, teacher_grid)):
        if boxes.shape[-1:] != (5,):
            raise ValueError(f"{name}_boxes must be (..., 5): top, left, height, width, flip; got {tuple(boxes.shape)}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"{name}_grid must be (rows, cols), both at least 1; got {grid}")
    # boxes are few: float64 costs nothing and leaves only exact ties to chance
    s_top, s_left, s_height, s_width, s_flip = student_boxes.double().unsqueeze(-2).unbind(-1)   # each (..., 1)
    t_top, t_left, t_height, t_width, t_flip = teacher_boxes.double().unsqueeze(-2).unbind(-1)
    (s_rows, s_cols), (t_rows, t_cols) = student_grid, teacher_grid

    def nearest_cell(cell, s_start, s_size, s_cells, t_start, t_size, t_cells):
        """Along one axis: the teacher cell that holds a student cell's centre, and how far apart the centres are."""
        # (centre - t_start) in units of teacher cells, with one division: whole numbers stay whole, so ties are exact
        at = ((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells / (2 * s_cells * t_size)
        nearest = at.floor().clamp(0, t_cells - 1)
        return nearest, (at - nearest - 0.5) * t_size / t_cells

    row = torch.arange(s_rows, device=student_boxes.device)
    col = torch.arange(s_cols, device=student_boxes.device)
    col = torch.where(s_flip > 0, s_cols - 1 - col, col)               # a mirrored view shows its last column first
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
    """For every student patch, the teacher patch whose backbone features look most alike (EsViT's matching).

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


def local_cross_entropy(student_logits, teacher_logits, center, *, student_temp, teacher_temp, student_boxes=None,
                        teacher_boxes=None, student_grid=None, teacher_grid=None, hinge=True, index=None,
                        skip_same_view=False, impl="auto"):
    """Sum over pairs (student view v, teacher view q) of the mean over B and Ns of weight * cross-entropy, where

        cross-entropy(n) = - sum_k  softmax((t - center) / teacher_temp)[k] * log_softmax(s / student_temp)[k]

    with s the logits of student patch n and t those of the teacher patch that n is matched with. A patch without a
    match (weight 0) adds nothing but stays in the mean's denominator. The image-level loss is this function with
    Ns = Nt = 1; there, neither boxes nor index are needed.

    Args:
        student_logits: (V, B, Ns, K). teacher_logits: (Q, B, Nt, K). center: (K,).
        student_boxes (V, B, 5), teacher_boxes (Q, B, 5), student_grid, teacher_grid, hinge: see `geometric_matches`.
        index: (V, Q, B, Ns) integers in [0, Nt): these matches instead, each with weight 1.
        skip_same_view: leave out the pairs v = q (student view v and teacher view v are the same cut).
        impl: "triton", "torch", or "auto": Triton for CUDA tensors, torch for others and for float64.
    Returns: a scalar, float32 (float64 for float64 logits). No gradient flows to the teacher or the centre.
    Raises: ValueError, naming the argument and the shapes, where shapes, dtypes or devices do not fit.
    """
    _check_arguments(student_logits, teacher_logits, center, student_temp, teacher_temp, student_boxes, teacher_boxes,
                     student_grid, teacher_grid, index)
    V, B, Ns, K = student_logits.shape
    Q, _, Nt, _ = teacher_logits.shape
    if _use_triton(impl, student_logits):
        student = student_logits.contiguous()
        pairs = [_run(_LocalCrossEntropy, student, teacher_logits[q:q + 2].detach(), center.detach(), teacher_temp,
                      _how(Ns, Nt, q, student_temp, student_boxes, teacher_boxes, student_grid, teacher_grid, hinge,
                           index, skip_same_view)) for q in range(0, Q, 2)]
        return sum(pairs[1:], pairs[0])
    if student_boxes is not None:
        index, weight = geometric_matches(student_boxes[:, None], teacher_boxes[None], student_grid, teacher_grid,
                                          hinge)
    else:
        index = student_logits.new_zeros(V, Q, B, Ns, dtype=torch.int64) if index is None else index.long()
        weight = torch.ones_like(index, dtype=torch.float32)                                       # (V, Q, B, Ns)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    target = F.softmax((teacher_logits.detach().to(dtype) - center.detach().to(dtype)) / teacher_temp, dim=-1)

    def pair_loss(log_p, target, index, weight):                       # (B, Ns, K), (B, Nt, K), (B, Ns), (B, Ns)
        matched = target.gather(1, index[..., None].expand(-1, -1, K))                             # (B, Ns, K)
        # a prototype the teacher gives no mass adds nothing, even where log_p is -inf; a NaN stays a NaN
        cross_entropy = -torch.where(matched == 0, 0, matched * log_p).sum(-1)                     # (B, Ns)
        return torch.where(weight > 0, cross_entropy, 0).sum() / max(B * Ns, 1)

    loss = student_logits[..., :0].sum().to(dtype)                     # 0, and part of the graph where no pair is
    for v in range(V):
        log_p = F.log_softmax(student_logits[v].to(dtype) / student_temp, dim=-1)                  # (B, Ns, K)
        for q in range(Q):
            if not (skip_same_view and v == q):
                # checkpointed: the gathered target is made again in the backward pass, so there is never more than one
                loss = loss + checkpoint(pair_loss, log_p, target[q], index[v, q], weight[v, q], use_reentrant=False,
                                         preserve_rng_state=False)
    return loss


def head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, *, student_temp, teacher_temp,
                       student_boxes=None, teacher_boxes=None, student_grid=None, teacher_grid=None, hinge=True,
                       index=None, skip_same_view=False, impl="auto", max_bytes=512 * 2 ** 20):
    """`local_cross_entropy` on the logits z @ weight.T, made for a few images at a time in a buffer of `max_bytes`.

    Args:
        student_z (V, B, Ns, D), teacher_z (Q, B, Nt, D): bottlenecks. student_weight, teacher_weight (K, D).
        max_bytes: for the logits of the images at hand (at least one image's). The others: see `local_cross_entropy`.
    Returns: a scalar, float32. Gradients flow to student_z and student_weight only.
    Raises: ValueError as `local_cross_entropy`.
    Precision: torch: float32 logits. Triton on a GPU: float16 logits (their step near 1 is 2^-11; bfloat16's would
        change a teacher probability by 10 %) and bfloat16 gradients of logits, which would underflow float16.
    """
    K = len(student_weight)
    for name, weight, z in (("student", student_weight, student_z), ("teacher", teacher_weight, teacher_z)):
        if z.ndim != 4 or tuple(weight.shape) != (K, z.shape[-1]):
            raise ValueError(f"{name}_z must be (views, B, patches, D) and {name}_weight ({K}, D); "
                             f"got {tuple(z.shape)} and {tuple(weight.shape)}")
    (V, B, Ns, _), (Q, _, Nt, _) = student_z.shape, teacher_z.shape
    logits = [z.new_empty(()).expand(*z.shape[:3], K) for z in (student_z, teacher_z)]     # shapes, no memory
    _check_arguments(*logits, center, student_temp, teacher_temp, student_boxes, teacher_boxes, student_grid,
                     teacher_grid, index)
    fused = _use_triton(impl, student_z)
    itemsize = 2 if fused and student_z.is_cuda else 4
    step = max(1, min(B, max_bytes // max(1, (V * Ns + Q * Nt) * K * itemsize)))           # images at a time

    def images(x, start, dim=1):
        return None if x is None else x.narrow(dim, start, min(step, B - start))

    def which(start):
        return dict(student_boxes=images(student_boxes, start), teacher_boxes=images(teacher_boxes, start),
                    student_grid=student_grid, teacher_grid=teacher_grid, hinge=hinge, index=images(index, start, 2),
                    skip_same_view=skip_same_view)

    def chunk_loss(student_z, student_weight, start):
        return student_z.shape[1] / max(B, 1) * local_cross_entropy(
            student_z.float() @ student_weight.float().T,
            images(teacher_z, start).detach().float() @ teacher_weight.detach().float().T,
            center, student_temp=student_temp, teacher_temp=teacher_temp, impl="torch", **which(start))

    with torch.autocast(student_z.device.type, enabled=False):              # the precision is chosen here
        if fused:
            wanted = torch.is_grad_enabled() and (student_z.requires_grad or student_weight.requires_grad)
            return _run(_HeadCrossEntropy, student_z, student_weight, teacher_z.detach(), teacher_weight.detach(),
                        center.detach(), teacher_temp, step,
                        lambda start, q: _how(Ns, Nt, q, student_temp, **which(start)), wanted)
        if step >= B:
            return chunk_loss(student_z, student_weight, 0)
        return sum(checkpoint(chunk_loss, images(student_z, start), student_weight, start, use_reentrant=False,
                              preserve_rng_state=False) for start in range(0, B, step))


def _check_arguments(student, teacher, center, student_temp, teacher_temp, student_boxes, teacher_boxes, student_grid,
                     teacher_grid, index):
    """One clear ValueError instead of a wrong loss or a crash inside a kernel."""
    shapes = f"student_logits {tuple(student.shape)}, teacher_logits {tuple(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4:
        raise ValueError(f"logits must be student (V, B, Ns, K) and teacher (Q, B, Nt, K); got {shapes}")
    (V, B, Ns, K), (Q, _, Nt, _) = student.shape, teacher.shape
    if teacher.shape[1] != B or teacher.shape[3] != K or min(K, Q) < 1:
        raise ValueError(f"student_logits and teacher_logits differ in B or K, or Q or K is 0: {shapes}")
    expected = {"student_logits": (student, (V, B, Ns, K)), "teacher_logits": (teacher, (Q, B, Nt, K)),
                "center": (center, (K,)), "student_boxes": (student_boxes, (V, B, 5)),
                "teacher_boxes": (teacher_boxes, (Q, B, 5)), "index": (index, (V, Q, B, Ns))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} to go with {shapes}; got {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, student_logits on {student.device}")
        if name in ("student_logits", "teacher_logits", "center") and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if index is not None and (index.is_floating_point() or index.dtype == torch.bool):
        raise ValueError(f"index must hold integers, got {index.dtype}")
    if not (student_temp > 0 and teacher_temp > 0):
        raise ValueError(f"temperatures must be > 0: student_temp {student_temp}, teacher_temp {teacher_temp}")
    geometry = (student_boxes, teacher_boxes, student_grid, teacher_grid)
    if any(g is not None for g in geometry):
        if any(g is None for g in geometry) or index is not None:
            raise ValueError("give student_boxes, teacher_boxes, student_grid, teacher_grid, all or none, or an index")
        for name, grid, n in (("student_grid", student_grid, Ns), ("teacher_grid", teacher_grid, Nt)):
            if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != n:
                raise ValueError(f"{name} {tuple(grid)} does not have the {n} patches of {shapes}")
    elif index is None and (Ns, Nt) != (1, 1):
        raise ValueError(f"which patches match? Give boxes and grids, or index, unless Ns = Nt = 1: {shapes}")


def _use_triton(impl, tensor):
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "auto":
        return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64
    if impl == "triton" and (triton is None or not (tensor.is_cuda or INTERPRETED)):
        raise ValueError("impl='triton' needs Triton and CUDA tensors (or TRITON_INTERPRET=1, set before the import); "
                         f"got tensors on {tensor.device}")
    if impl == "triton" and tensor.dtype == torch.float64:
        raise ValueError("impl='triton' computes in float32; for float64 use impl='torch'")
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
# so one pass over s and both p_q gives the loss, and a second one the gradient; the pairs never need to be seen apart.
#
# Traffic at B = 32, K = 65536, 2 + 8 views of 49 and 9 patches: the student's logits are 5440 rows (0.71 GB in 16
# bits), the teacher's 3136 (0.41 GB). Eager torch gathers 242 teacher rows per image and keeps log-softmax, products
# and copies: about 45 GB. Here the teacher is read and written once as probabilities; then the forward reads both, and
# the backward reads both again and writes ds. One image's programs follow each other: its teacher rows stay in L2.
#
# Probabilities are stored times 2^14 in float16: exact to 2^-11 down to 4e-9, where float16 itself would underflow at
# K = 65536. With sum_k P_k of the stored values in the loss, their rounding cannot act on the size of the logits, only
# on CE's terms. All sums are in float32. Each group of 8 elements, the 16 bytes that a thread loads, has a running
# maximum, so that no thread waits for another inside the loop; it starts at -3e38, since -inf - -inf would be NaN.
# Exponentials are in base 2: `scale` holds log2(e).

if triton is not None:
    @triton.jit
    def _tile(ROW, cols, end, other, EVEN: tl.constexpr):
        """Load a tile of a row as float32; `other` from column `end` on. EVEN: it is a whole tile, or `end` is 0."""
        mask = end > 0 if EVEN else cols < end
        return tl.load(ROW + cols, mask=mask, other=other).to(tl.float32)

    @triton.jit
    def _add_exp2(peak, total, x, scale):
        """Take x * scale, x (G, 8), into a running log-sum-exp per group: total * 2^peak, both (G,)."""
        top = tl.maximum(peak, tl.max(x, axis=1) * scale)
        return top, total * tl.exp2(peak - top) + tl.sum(tl.exp2(x * scale - top[:, None]), axis=1)

    @triton.jit
    def _log2_sum(peak, total):
        """Running sums of all groups -> the row's log2 of the sum."""
        top = tl.max(peak, axis=0)
        return top + tl.log2(tl.sum(total * tl.exp2(peak - top), axis=0))

    @triton.jit
    def _teacher_kernel(T, CENTER, P, K, scale, EVEN: tl.constexpr, BLOCK: tl.constexpr):
        """One teacher row: P = UNIT * softmax((T - CENTER) / temperature). P may be T itself."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        start = tl.program_id(0).to(tl.int64) * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        for k in range(0, K, BLOCK):
            x = _tile(T + start, k + tile, K, float("-inf"), EVEN) - _tile(CENTER, k + tile, K, 0.0, EVEN)
            peak, total = _add_exp2(peak, total, x, scale)
        lse = _log2_sum(peak, total)
        for k in range(0, K, BLOCK):
            x = _tile(T + start, k + tile, K, float("-inf"), EVEN) - _tile(CENTER, k + tile, K, 0.0, EVEN)
            tl.store(P + start + (k + tile), tl.exp2(x * scale - lse) * UNIT, mask=None if EVEN else k + tile < K)

    @triton.jit
    def _nearest_cell(cell, s_start, s_size, s_cells, t_start, t_size, t_cells):
        """As in `geometric_matches`; whole numbers below 2^24 stay exact, so ties fall as they do there."""
        at = tl.div_rn(((2 * cell + 1) * s_size + 2 * s_cells * (s_start - t_start)) * t_cells, 2 * s_cells * t_size)
        nearest = tl.minimum(tl.maximum(tl.floor(at), 0.0), t_cells - 1.0)
        return nearest, (at - nearest - 0.5) * t_size / t_cells

    @triton.jit
    def _matched_row(MATCH, q, v, b, n, V, B, Q: tl.constexpr, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                     T_ROWS: tl.constexpr, T_COLS: tl.constexpr, MODE: tl.constexpr, SKIP: tl.constexpr):
        """The teacher row (q, b, m) matched with student row (v, b, n), and whether there is one."""
        m, matched = 0, v >= 0
        if MODE == "index":
            m = tl.load(MATCH + ((v * Q + q) * B + b).to(tl.int64) * (S_ROWS * S_COLS) + n).to(tl.int32)
            m = tl.minimum(tl.maximum(m, 0), T_ROWS * T_COLS - 1)       # no index reads another's memory
        elif MODE != "single":
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
                matched = dy * dy + dx * dx < tl.maximum(y * y + x * x, t_y * t_y + t_x * t_x)
        if SKIP >= 0:
            matched = matched & (v != q + SKIP)
        return ((q * B + b) * (T_ROWS * T_COLS) + m).to(tl.int64), matched

    @triton.jit
    def _student_kernel(S, P, LOSS, LSE, UPSTREAM, DS, V, B, K, scale, MATCH, S_ROWS: tl.constexpr,
                        S_COLS: tl.constexpr, T_ROWS: tl.constexpr, T_COLS: tl.constexpr, MODE: tl.constexpr,
                        SKIP: tl.constexpr, Q: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
        """One student row: writes LOSS and LSE where there is a LOSS, and DS where there is one; DS may be S itself."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        per_image = V * S_ROWS * S_COLS
        b, rest = tl.program_id(0) // per_image, tl.program_id(0) % per_image
        v, n = rest // (S_ROWS * S_COLS), rest % (S_ROWS * S_COLS)
        row = ((v * B + b) * (S_ROWS * S_COLS) + n).to(tl.int64)
        row0, matched0 = _matched_row(MATCH, 0, v, b, n, V, B, Q, S_ROWS, S_COLS, T_ROWS, T_COLS, MODE, SKIP)
        row1, matched1 = row0, matched0 & (v < 0)
        if Q == 2:
            row1, matched1 = _matched_row(MATCH, 1, v, b, n, V, B, Q, S_ROWS, S_COLS, T_ROWS, T_COLS, MODE, SKIP)
        any_match = matched0 | matched1
        end, end0, end1 = tl.where(any_match, K, 0), tl.where(matched0, K, 0), tl.where(matched1, K, 0)
        S, P0, P1 = S + row * K, P + row0 * K, P + row1 * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]

        if LOSS is None:
            lse = tl.load(LSE + row)
        else:
            peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
            mass, dot = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
            for k in range(0, end, BLOCK):                              # a row without a match reads nothing
                s = _tile(S, k + tile, end, float("-inf"), EVEN)
                p = _tile(P0, k + tile, end0, 0.0, EVEN)
                if Q == 2:
                    p += _tile(P1, k + tile, end1, 0.0, EVEN)
                peak, total = _add_exp2(peak, total, s, scale)
                mass += p
                dot += p * tl.where(p == 0, 0.0, s)                     # 0 * -inf would be NaN
            lse = tl.where(any_match, _log2_sum(peak, total), 0.0)
            loss = tl.sum(tl.sum(lse * mass - scale * dot, axis=1), axis=0) * (0.6931471805599453 / UNIT)
            tl.store(LOSS + row, tl.where(any_match, loss, 0.0))
            tl.store(LSE + row, lse)
        if DS is not None:
            factor = tl.load(UPSTREAM) * scale * 0.6931471805599453 / (B * S_ROWS * S_COLS)
            weight = matched0.to(tl.float32) + matched1.to(tl.float32)
            for k in range(0, K, BLOCK):
                s = _tile(S, k + tile, end, float("-inf"), EVEN)
                p = _tile(P0, k + tile, end0, 0.0, EVEN)
                if Q == 2:
                    p += _tile(P1, k + tile, end1, 0.0, EVEN)
                ds = factor * (weight * tl.exp2(s * scale - lse) - p * (1.0 / UNIT))
                tl.store(DS + row * K + (k + tile), ds, mask=None if EVEN else k + tile < K)

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
                                                 EVEN=K % BLOCK == 0, BLOCK=BLOCK, **LAUNCH)
    return out


def _how(Ns, Nt, q, student_temp, student_boxes, teacher_boxes, student_grid, teacher_grid, hinge, index,
         skip_same_view):
    """`_student_kernel`'s arguments scale to SKIP for the teacher views q, q + 1; copies: a backward may come late."""
    match, grids, mode = None, (Ns, 1, Nt, 1), "single"
    if index is not None:
        match, mode = index[:, q:q + 2].clone(memory_format=torch.contiguous_format), "index"
    elif student_boxes is not None:
        match = torch.cat([student_boxes, teacher_boxes[q:q + 2]]).float()
        grids, mode = (*student_grid, *teacher_grid), "hinge" if hinge else "nearest"
    return LOG2_E / float(student_temp), match, *grids, mode, q if skip_same_view else -1


def _student_rows(s, p, how, lse=None, ds=None, upstream=None):
    """Launch `_student_kernel` on s (V, B, Ns, K), p (1 or 2, B, Nt, K): fills ds; makes loss, lse if lse is None."""
    (V, B, Ns, K), loss = s.shape, None
    if lse is None:
        loss, lse = s.new_empty(2, V, B, Ns, dtype=torch.float32)
    if lse.numel():
        with torch.cuda.device_of(s):
            _student_kernel[(lse.numel(),)](s, p, loss, lse, upstream, ds, V, B, K, *how, Q=len(p),
                                            EVEN=K % BLOCK == 0, BLOCK=BLOCK, **LAUNCH)
    return loss, lse


@torch.compiler.disable                 # torch.compile breaks its graph here and changes nothing
def _run(function, *arguments):
    return function.apply(*arguments)


class _LocalCrossEntropy(torch.autograd.Function):
    """Forward and backward are a launch each; nothing of the caller's is written to, so backward may run again."""

    @staticmethod
    def forward(ctx, student, teacher, center, teacher_temp, how):
        p = _teacher_probabilities(teacher, center, teacher_temp)
        loss, lse = _student_rows(student, p, how)
        ctx.save_for_backward(student, p, lse)
        ctx.how = how
        return loss.sum() / max(1, student.shape[1] * student.shape[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        student, p, lse = ctx.saved_tensors
        ds = torch.empty_like(student)
        _student_rows(student, p, ctx.how, lse, ds, upstream.float())
        return ds, None, None, None, None


class _HeadCrossEntropy(torch.autograd.Function):
    """Logits, loss and gradient of a few images at a time, all in one private buffer; the backward only scales."""

    @staticmethod
    def forward(ctx, student_z, student_weight, teacher_z, teacher_weight, center, teacher_temp, step, how, needs_grad):
        logit_type, grad_type = (torch.float16, torch.bfloat16) if student_z.is_cuda else (torch.float32, torch.float32)
        (_, B, Ns, _), (K, D) = student_z.shape, student_weight.shape
        weights = [w.to(logit_type) for w in (student_weight, teacher_weight)]
        grad_weight = weights[0].to(grad_type)
        buffers = [w.new_empty(z.shape[0] * step * z.shape[2], K) for z, w in zip((student_z, teacher_z), weights)]
        grads = [torch.zeros_like(x, dtype=torch.float32) if needs_grad else None for x in (student_z, student_weight)]
        one, total = torch.ones(1, device=student_z.device), torch.zeros((), device=student_z.device)
        for start in range(0, B, step):
            zs = [z[:, start:start + step].to(logit_type) for z in (student_z, teacher_z)]
            s, t = (torch.mm(z.reshape(-1, D), w.T, out=buffer[:z.numel() // D]).view(*z.shape[:3], K)
                    for z, w, buffer in zip(zs, weights, buffers))
            pairs = _teacher_probabilities(t, center, teacher_temp, in_place=True).split(2)
            for i, p in enumerate(pairs):
                # the last launch may write over the logits; with more than two teacher views the earlier ones may not
                ds = s.view(grad_type) if i == len(pairs) - 1 else torch.empty_like(s, dtype=grad_type)
                loss, _ = _student_rows(s, p, how(start, 2 * i), ds=ds if needs_grad else None, upstream=one)
                total += loss.sum() / max(1, B * Ns)
                if needs_grad:
                    d, share = ds.view(-1, K), s.shape[1] / B
                    grads[0][:, start:start + step].add_((d @ grad_weight).view(zs[0].shape), alpha=share)
                    grads[1].add_(d.T @ zs[0].reshape(-1, D).to(grad_type), alpha=share)
        ctx.save_for_backward(*grads)
        ctx.types = student_z.dtype, student_weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        return *((g * upstream).to(t) for g, t in zip(ctx.saved_tensors, ctx.types)), *[None] * 7


# ------------------------------------------------------------------------------------------------ benchmark

def _official_eager(student, teacher, center, student_temp, teacher_temp, index, weight):
    """What the official code computes: per pair, a gathered target, a log-softmax and their product, all kept."""
    target, loss = F.softmax((teacher - center) / teacher_temp, dim=-1), 0
    for q in range(len(teacher)):
        for v in range(len(student)):
            gathered = target[q].gather(1, index[v, q, ..., None].expand(-1, -1, target.shape[-1]))
            log_p = F.log_softmax(student[v] / student_temp, dim=-1)
            loss = loss + (weight[v, q] * -(gathered * log_p).sum(-1)).mean()
    return loss


# before 3.3, triton.compile took other arguments
CAN_REPORT = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def _compile(part, target, logits="fp16", **changes):
    """A kernel as launched at K = 65536, for a GPU that need not be here. part: teacher, forward, backward or both."""
    kernel = _teacher_kernel if part == "teacher" else _student_kernel
    constants = dict(Q=2, S_ROWS=7, S_COLS=7, T_ROWS=7, T_COLS=7, MODE="hinge", SKIP=0, EVEN=True, BLOCK=BLOCK)
    constants |= dict.fromkeys({"forward": ("UPSTREAM", "DS"), "backward": ("LOSS",)}.get(part, ())) | changes
    kinds = dict(S=f"*{logits}", T=f"*{logits}", DS=f"*{logits}", P="*fp32" if logits == "fp32" else "*fp16",
                 V="i32", B="i32", K="i32", scale="fp32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind.startswith("*") or name == "K" and constants["EVEN"]}
    source = triton.compiler.ASTSource(kernel, signature, attrs=aligned, constexprs={
        (i,): constants[name] for i, name in enumerate(signature) if name in constants})
    return triton.compile(source, target=triton.backends.compiler.GPUTarget(*target), options=LAUNCH).asm


def _report(arch):
    """What the kernels become on sm_`arch`: registers, spills, 16-byte loads, instructions per element of each loop."""
    import os, re, subprocess, tempfile  # noqa: E401
    cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    for part in ("teacher", "forward", "backward", "both"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(_compile(part, ("cuda", arch, 32))["cubin"]), file.flush()
            sass = subprocess.run([cuobjdump, "-res-usage", "-sass", file.name], capture_output=True, text=True).stdout
        # a line is "/*1900*/ @!P0 BRA 0x1140 ;" and a loop ends in a jump back; an instruction is 16 bytes
        code = re.findall(r"/\*(\w{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(?:[^;]*\b(0x[0-9a-f]+))?[^;]*;", sass)
        loops = [(int(at, 16) - int(to, 16)) // 16 + 1 for at, op, to in code if op.startswith("BRA") and to]
        yield dict(kernel=part, arch=arch, registers=int(re.search(r"REG:(\d+)", sass)[1]),
                   spills=sum(op[:3] in ("LDL", "STL") for _, op, _ in code),
                   loads_16_byte=sum("LDG" in op and "128" in op for _, op, _ in code),
                   loops_instructions_per_element=[round(n / 8, 1) for n in loops if n > 9])


def _benchmark(path):
    import json
    from functools import partial
    from itertools import product
    from torch.utils.benchmark import Timer
    cuda, rows = torch.cuda.is_available(), []
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)

    def show(**row):
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def measure(call):
        """(median ms, peak MB above what was there) of a call."""
        timer = Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
        ms = 1e3 * timer.blocked_autorange(min_run_time=0.3).median
        if not cuda:
            return ms, None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return ms, (torch.cuda.max_memory_allocated() - before) / 2 ** 20

    block = torch.empty(2 ** (30 if cuda else 26), dtype=torch.uint8, device=device)
    copy = 2 * block.numel() / 1e6 / measure(block.clone)[0]
    show(torch=torch.__version__, triton=getattr(triton, "__version__", None),
         device=torch.cuda.get_device_name() if cuda else "cpu", copy_gb_s=copy)
    sizes = product((32, 128), (65536, 8192)) if cuda else [(4, 2048)]
    for (B, K), (V, grid) in product(sizes, ((2, (7, 7)), (8, (3, 3)))):    # a step: global views, then local views
        boxes, Ns = torch.rand(V + 2, B, 5, device=device) * 200 + 1, grid[0] * grid[1]
        zs, zt = (F.normalize(torch.randn(n, B, p, 256, device=device), dim=-1) for n, p in ((V, Ns), (2, 49)))
        weight, center = F.normalize(torch.randn(K, 256, device=device), dim=-1), torch.zeros(K, device=device)
        s, t = (z.to(dtype) @ weight.to(dtype).T for z in (zs, zt))
        for leaf in (s, zs, weight):
            leaf.requires_grad_()
        how = dict(student_boxes=boxes[:V], teacher_boxes=boxes[V:], student_grid=grid, teacher_grid=(7, 7),
                   student_temp=0.1, teacher_temp=0.04)
        matches = geometric_matches(boxes[:V, None], boxes[None, V:], grid, (7, 7))
        torch.compiler.reset()              # else it would give up after 8 shapes, and time eager code
        losses = {"official, eager": partial(_official_eager, s, t, center, 0.1, 0.04, *matches),
                  "torch, compiled": partial(torch.compile(local_cross_entropy), s, t, center, impl="torch", **how)}
        for impl in ("torch", "triton") if cuda else ("torch",):
            losses[impl] = partial(local_cross_entropy, s, t, center, impl=impl, **how)
            losses[f"head, {impl}"] = partial(head_cross_entropy, zs, weight, zt, weight, center, impl=impl, **how)
        for (name, loss), backward in product(losses.items(), (False, True)):
            def call():
                with torch.set_grad_enabled(backward):
                    return torch.autograd.grad(loss(), [zs, weight] if "head" in name else s) if backward else loss()

            row = dict(B=B, K=K, views=V, name=name, what="forward+backward" if backward else "forward")
            try:
                ms, peak = measure(call)
            except torch.OutOfMemoryError:
                show(**row, out_of_memory=True)
                continue
            speed = ((1 + backward) * s.numel() + t.numel()) * s.element_size() / 1e6 / ms
            show(**row, ms=ms, peak_mb=peak, gb_s=speed, of_copy=speed / copy)  # bytes: s, t read once, ds written once
    for arch in (80, 90) if CAN_REPORT and not INTERPRETED else ():
        for row in _report(arch):
            show(**row)
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    import argparse
    parser = argparse.ArgumentParser(description="Times the loss, and reports what the kernels compile to.")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    _benchmark(parser.parse_args().json)
