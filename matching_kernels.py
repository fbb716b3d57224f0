# SPDX-License-Identifier: MIT
"""Which patches match, and the cross-entropy over the matches: the patch loss of Global-Local Self-Distillation.

    loss = local_cross_entropy(student_logits, teacher_logits, center, student_temp=0.1, teacher_temp=0.04, index=index)
    loss = head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, ...the same...)

The second includes the last layers, so that the (rows x K) logits never exist as a whole. To use them, copy this file.

    B       images                      V, Q    student views, teacher views
    K       prototypes                  Ns, Nt  patches of a student / teacher view: grid rows x cols, row-major
    box     where a view was cropped: (top, left, height, width, flip) in pixels of the original image; flip 0 or 1
    match   for a student patch: the index of its teacher patch, and a weight >= 0 (geometry gives 1, or 0: masked)
"""
import itertools
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

    The teacher's patches tile its box. So the nearest midpoint of a teacher patch is found without distances: it is
    that of the cell that holds the student patch's midpoint, clamped to the grid. (On a border: the lower or right
    cell.) With `hinge`, a match has weight 1 if the two midpoints are closer than half a diagonal of the larger patch,
    else 0. Without it, every weight is 1.

    Args: student_boxes, teacher_boxes (..., 5); the leading shapes broadcast. student_grid, teacher_grid (rows, cols).
    Returns: index (..., Ns) int64 into the teacher's Nt patches, weight (..., Ns) float32. Raises: ValueError for a
    wrong shape or grid, and, on the CPU, for boxes that are not finite or have no area. Source: the official code.
    """
    _check_geometry((student_boxes, teacher_boxes), (student_grid, teacher_grid))
    s_top, s_left, s_height, s_width, s_flip = student_boxes.double().unsqueeze(-2).unbind(-1)   # each (..., 1)
    t_top, t_left, t_height, t_width, t_flip = teacher_boxes.double().unsqueeze(-2).unbind(-1)
    (s_rows, s_cols), (t_rows, t_cols) = student_grid, teacher_grid

    def nearest_cell(cell, s_start, s_size, s_cells, t_start, t_size, t_cells):
        """Along one axis: the teacher cell that holds a student cell's midpoint; the distance of the two midpoints."""
        # in teacher cells from t_start; one division in float64, so that integer boxes give exact ties
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
    """EsViT: the index (..., Ns) of the teacher patch (..., Nt, C) with the largest cosine to a student patch's."""
    with torch.no_grad(), torch.autocast(student_features.device.type, enabled=False):      # @ would round to 16 bits
        student, teacher = (F.normalize(x.float(), dim=-1) for x in (student_features, teacher_features))
        return (student @ teacher.mT).argmax(-1)

def reference_cross_entropy(student_logits, teacher_logits, center, student_temp, teacher_temp, index, weight):
    """The definition of the loss, pair by pair as in the official code, for tests. index, weight: (V, Q, B, Ns)."""
    target, loss = F.softmax((teacher_logits - center) / teacher_temp, dim=-1).detach(), 0
    for v, q in itertools.product(range(len(student_logits)), range(len(target))):
        matched = target[q].gather(1, index[v, q, ..., None].expand(-1, -1, target.shape[-1]))    # (B, Ns, K)
        cross_entropy = -(matched * F.log_softmax(student_logits[v] / student_temp, dim=-1)).sum(-1)
        loss = loss + (weight[v, q] * cross_entropy).mean()
    return loss

def local_cross_entropy(student_logits, teacher_logits, center, *, student_temp, teacher_temp, **matching):
    """Sum over pairs (student view v, teacher view q) of the mean over B and Ns of weight * cross-entropy, where

        cross-entropy(n) = - sum_k  softmax((t - center) / teacher_temp)[k] * log_softmax(s / student_temp)[k]

    with s the logits of student patch n and t those of its teacher patch. Masked patches (weight 0) stay in the mean.

    Args:
        student_logits: (V, B, Ns, K), or a list, one (v, B, Ns, K) per size of view: losses add up, V counts all views.
        teacher_logits: (Q, B, Nt, K). center: (K,); of DINO's (1, K) give center.flatten().
        skip_same_view=False: leave out the pairs v = q. The first Q student views must be the teacher's, in order.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors, torch for others and for float64.
        Which patches match, in one of three ways. For a list of sizes, student_grid, index and weight are lists too.
            student_boxes (V, B, 5), teacher_boxes (Q, B, 5), student_grid, teacher_grid, hinge=True: by geometry;
            index (V, Q, B, Ns), integers in [0, Nt), -1: masked; and weight (V, Q, B, Ns), floats >= 0, default 1;
            nothing, if Ns = Nt = 1: the loss of whole images, as in DINO.
        iBOT: index n where patch n is masked and v = q, else -1, and weight Ns / (masked patches of the view). Masked
            tokens alone, in a number that varies, go into B, with Ns = Nt = 1.
    Returns: a scalar, float32 (float64 for float64 logits). No gradient flows to the teacher or the centre.
    Raises: ValueError where arguments do not fit; on a GPU, which would have to wait, values are not looked at.
    """
    return head_cross_entropy(student_logits, None, teacher_logits, None, center, student_temp=student_temp,
                              teacher_temp=teacher_temp, **matching)

# The torch path. As targets p_m sum to 1 and logits z_n . w_k are linear in the prototypes w_k, the cross-entropy is
#     - sum_k p_mk (z_n . w_k / temp - lse_n) = lse_n - z_n . u_m / temp,        u_m = sum_k p_mk w_k
# with lse_n = logsumexp_k(z_n . w_k / temp), which knows of no match. u_m is made once for a teacher patch, so a match
# touches D numbers, not K. Matches of weights c_m add up in sum_m c_m and sum_m c_m u_m.

def _torch_loss(chunk, groups, student_temp, teacher_temp, teacher_z, teacher_weight, center, student_weight,
                *students):
    """The part that a chunk (a slice) of the images has in the loss of all. Without weights (None), z are logits."""
    dtype = torch.promote_types(students[0].dtype, torch.float32)
    u = teacher_z[:, chunk].to(dtype) / teacher_temp
    u = u if teacher_weight is None else u @ teacher_weight.to(dtype).T
    u = torch.softmax(u.sub_(center.to(dtype) / teacher_temp), dim=-1, out=u)                       # (Q, b, Nt, K)
    u = u if student_weight is None else u @ student_weight.to(dtype)                               # (Q, b, Nt, D)
    u = F.pad(u, (0, 0, 0, 1))                                         # index -1 points to zeros behind the last patch
    image = torch.arange(u.shape[1], device=u.device)[:, None]
    loss, rows = 0, []                                                 # rows: z / temp, target, weight, view by view
    for z, (index, weight, _, _) in zip(students, groups):
        index = index[chunk].movedim(0, 2).long()                      # (v, Q, b, Ns), -1 where masked
        weight = weight[chunk].movedim(0, 2).to(dtype) / max(1, teacher_z.shape[1] * z.shape[2])    # of a mean
        for view, m, w in zip(z[:, chunk].to(dtype).unbind(), index, weight):
            target = sum(w[q, ..., None] * u[q][image, m[q]] for q in range(len(u)))                # (b, Ns, D)
            w = w.sum(0)                                               # (b, Ns)
            x = torch.where(w[..., None] > 0, view, 0) / student_temp  # where: a masked row may hold NaN
            if student_weight is None:                                 # a logit may be -inf where the target is 0
                loss = loss - (target * torch.where(target == 0, 0, F.log_softmax(x, dim=-1))).sum()
            else:
                rows.append((x.flatten(0, 1), target.flatten(0, 1), w.flatten()[:, None]))
    if rows:
        x, target, w = map(torch.cat, zip(*rows))                      # few large matrix products
        loss = (w * _LinearLogSumExp.apply(x, student_weight.to(dtype))).sum() - (x * target).sum()
    return loss

class _LinearLogSumExp(torch.autograd.Function):
    """logsumexp_k(z_n . w_k) of z (N, D) and w (K, D). Its backward pass is matrix products, without a pass over K."""
    @staticmethod
    def forward(ctx, z, w):
        p = z @ w.T
        top, k = p.max(-1, keepdim=True)
        torch.softmax(p, dim=-1, out=p)
        ctx.save_for_backward(z, w, p)
        return top - p.gather(-1, k).log()                             # (N, 1)

    @staticmethod
    def backward(ctx, upstream):
        z, w, p = ctx.saved_tensors
        p = F.softmax(z @ w.T, dim=-1) if torch.is_grad_enabled() else p        # create_graph=True: p with its graph
        return upstream * (p @ w), p.T @ (upstream * z)

def head_cross_entropy(student_z, student_weight, teacher_z, teacher_weight, center, *, student_temp, teacher_temp,
                       skip_same_view=False, impl="auto", student_boxes=None, teacher_boxes=None, student_grid=None,
                       teacher_grid=None, hinge=True, index=None, weight=None, max_bytes=512 * 2 ** 20):
    """`local_cross_entropy` of the logits z @ weight.T, which are made for a few images at a time.

    Args:
        student_z: (V, B, Ns, D), the input of the last layer, or a list with one tensor (v, B, Ns, D) per size of view.
        teacher_z: (Q, B, Nt, D). student_weight, teacher_weight: (K, D), the last layers. center: (K,).
        max_bytes: limit for the logits in memory (at least one image's are). The others: as in `local_cross_entropy`.
    Returns: a scalar. Gradients flow to student_z and student_weight only.
    Precision: torch: float32 logits. Triton on a GPU: float16 logits (bfloat16's step near 1 would change a teacher
        probability by 10 %) and bfloat16 gradients of logits. So normalise the rows of z and weight: at a logit of 100,
        float16's step is a factor of 4.8 in a teacher's probability (at temperature 0.04). Best: K a multiple of 16.
    In DINO's code: `nn.utils.weight_norm` leaves `last_layer.weight` stale and fails at the second step: use
        `nn.utils.parametrizations.weight_norm`. DistributedDataParallel(find_unused_parameters=True) does not go with a
        weight used outside `forward`. The centre's update needs teacher_weight @ teacher_z.mean((0, 1, 2)) only.
    Until `backward`, change neither teacher_z nor teacher_weight in place, and make no input in inference mode: the
        torch path may compute all twice. A NaN in a masked row of z may reach student_weight's gradient.
    """
    # first check the arguments, and bring the matches into the form that both paths read
    for name, x in dict(student_temp=student_temp, teacher_temp=teacher_temp, max_bytes=max_bytes).items():
        _require(isinstance(x, (int, float, torch.Tensor)) and x > 0, f"{name} must be > 0, got {x!r}")
    if not isinstance(student_z, (list, tuple)):
        student_z, student_grid, index, weight = [student_z], [student_grid], [index], [weight]
    student_grid, index, weight = ([None] * len(student_z) if x is None else x for x in (student_grid, index, weight))
    kind = "logits" if student_weight is None else "z"
    _require(len(student_z) == len(student_grid) == len(index) == len(weight) > 0,
             f"student_{kind}, student_grid, index and weight must be lists of one length")
    _require(all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (*student_z, teacher_z)),
             f"student_{kind} and teacher_{kind} must be tensors of 4 axes: views, images, patches, K or D")
    (Q, B, Nt, width), V, device = teacher_z.shape, sum(map(len, student_z)), teacher_z.device
    def check(name, x, *shape):
        found = f"{tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        _require(found == f"{shape} on {device}", f"{name} must be {shape} on {device}, got {found}")
    check("center", center, width if student_weight is None else len(student_weight))
    if student_weight is not None:
        check("student_weight", student_weight, len(center), width)
        check("teacher_weight", teacher_weight, len(center), width)
    _require(min(V, Q, len(center)) > 0, f"no views or no prototypes: V = {V}, Q = {Q}, K = {len(center)}")
    # table, factor: copies of the matches (B, v, Q, Ns) int32, -1 if masked, and of their weights; or, if the kernel
    # finds them, boxes (B, v + Q, 5), the student's first, and None. The views v and q with v - q == skip do not pair.
    first, groups, fused = 0, [], _use_triton(impl, student_z[0])
    for student, grid, matches, factor in zip(student_z, student_grid, index, weight):
        v, _, Ns, _ = student.shape
        table, grids, skip = None, (Ns, 1, Nt, 1), -first if skip_same_view else V      # v - q is never V
        check(f"student_{kind}", student, v, B, Ns, width)
        geometry = any(x is not None for x in (student_boxes, teacher_boxes, grid, teacher_grid))
        _require(geometry + (matches is not None) == 1 or not geometry and Ns == Nt == 1,
                 f"which patches match? give boxes or an index, or neither if Ns = Nt = 1; Ns = {Ns}, Nt = {Nt}")
        _require(factor is None or matches is not None, "weight needs index")
        if geometry:
            check("student_boxes", student_boxes, V, B, 5)
            check("teacher_boxes", teacher_boxes, Q, B, 5)
            boxes = student_boxes[first:first + v]
            _check_geometry((boxes, teacher_boxes), (grid, teacher_grid), (Ns, Nt))
            if fused and hinge:
                table, grids = torch.cat([boxes, teacher_boxes]).float().transpose(0, 1), (*grid, *teacher_grid)
            else:
                matches, factor = geometric_matches(boxes[:, None], teacher_boxes, grid, teacher_grid, hinge)
        elif matches is None:
            matches = torch.zeros(v, Q, B, 1, dtype=torch.int64, device=device)
        if table is None:
            check("index", matches, v, Q, B, Ns)
            _require(matches.dtype != torch.bool and not matches.is_floating_point(), "index must hold integers")
            matches = matches.long()            # -1 is no uint8
            factor = torch.ones(matches.shape, device=device) if factor is None else factor.detach()
            check("weight", factor, v, Q, B, Ns)
            if _has_values(matches):
                _require(((matches >= -1) & (matches < Nt)).all(), f"index must be in [0, {Nt}), or -1")
                _require(((factor >= 0) & (factor < math.inf)).all(), "weight must be finite and >= 0")
            offset = torch.arange(v, device=device)[:, None] - torch.arange(Q, device=device)
            used = (matches >= 0) & (factor > 0) & (offset != skip)[..., None, None]
            table = matches.int().where(used, -1).movedim(2, 0)
            factor = factor.where(used, 0).movedim(2, 0).contiguous()
        groups.append((table.contiguous(), factor, grids, skip))
        first += v

    step = max(1, B)                                                    # then compute, for so many images at a time
    if student_weight is not None:
        # the Triton path makes and frees the logits of one size after the other
        rows = Q * Nt + (max if fused else sum)(z.shape[0] * z.shape[2] for z in student_z)
        most = max(1, max_bytes // max(1, rows * len(center) * (2 if fused and teacher_z.is_cuda else 4)))
        step = math.ceil(step / math.ceil(step / most))                 # chunks of about equal size
    teacher = [x if x is None else x.detach() for x in (teacher_z, teacher_weight, center.clone())]
    arguments = groups, float(student_temp), float(teacher_temp), *teacher, student_weight, *student_z
    with torch.autocast(device.type, enabled=False):
        if fused:
            with torch.cuda.device_of(teacher_z):                       # torch.compile breaks its graph here
                return torch.compiler.disable(_TritonLoss.apply)(step, torch.is_grad_enabled(), *arguments)
        if step >= B:
            return _torch_loss(slice(None), *arguments)
        return sum(checkpoint(_torch_loss, slice(start, start + step), *arguments, use_reentrant=False,
                              preserve_rng_state=False) for start in range(0, B, step))

def _require(condition, message):
    if not condition:
        raise ValueError(message)

def _check_geometry(all_boxes, grids, patches=(None, None)):
    for name, boxes, grid, n in zip(("student", "teacher"), all_boxes, grids, patches):
        valid = isinstance(boxes, torch.Tensor) and boxes.shape[-1:] == (5,)
        valid = valid and (not _has_values(boxes) or bool(boxes.isfinite().all() and (boxes[..., 2:4] > 0).all()))
        _require(valid, f"{name}_boxes must be a tensor (..., 5), finite, with height and width above 0")
        valid = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(x, int) and x > 0 for x in grid)
        _require(valid and n in (None, math.prod(grid)), f"{name}_grid must be (rows, cols) of {n} patches, got {grid}")

def _has_values(x):                     # that can be read without waiting for a GPU; fake and traced tensors have none
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()

def _use_triton(impl, x):
    _require(impl in ("auto", "triton", "torch"), f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    can = triton is not None and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64
    _require(can or impl != "triton", "impl='triton' needs Triton, a GPU (or TRITON_INTERPRET=1) and no float64")
    return impl == "triton" or impl == "auto" and can and x.is_cuda

# ------------------------------------------------------------------------------------------------ Triton kernels
#
# For one student row s (patch n of view v of image b), scaled to x = s / student_temp, and the teacher's probabilities
# p_q of the patches matched with it, of weight w_q, for two teacher views q at a time:
#     P = sum_q w_q p_q         W = sum_q w_q         lse = log sum_k exp(x_k)
#     loss = sum_q w_q CE_q = sum_q w_q sum_k p_qk (lse - x_k) = lse * sum_k P_k - sum_k P_k x_k
#     d loss / d s_k = (W exp(x_k - lse) - P_k) / student_temp
# One pass over s and both p_q gives the loss, a second the gradient. Rows of one image follow each other, so that its
# teacher rows stay in L2. Probabilities are stored times 2^14 in float16 (exact to 2^-11 down to 4e-9), and so is the
# gradient before its last factor. The loss uses sum_k P_k of the stored values: then the size of the logits does not
# multiply their rounding. Sums are in float32. Each group of 8 elements, the 16 bytes that a thread loads, has its own
# running maximum, so that no thread waits for another inside the loop; it starts at -3e38, since -inf - -inf would be
# NaN. Exponentials are in base 2: `scale` holds log2(e) / temperature.

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
    def _matched_row(q, b, v, n, V, Q, B, K, skip, TABLE, WEIGHT, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                     T_ROWS: tl.constexpr, T_COLS: tl.constexpr):
        """The row of teacher view q matched with student row (v, b, n); how much to read (K; masked: 0); weight."""
        end = tl.where((q < Q) & (v - q != skip), K, 0)
        q = tl.minimum(q, Q - 1)                # an odd number of views has no second one at the end
        if TABLE.dtype.element_ty == tl.int32:
            at = ((b * V + v) * Q + q).to(tl.int64) * (S_ROWS * S_COLS) + n
            m = tl.load(TABLE + at)
            end = tl.where(m < 0, 0, end)
            m = tl.minimum(tl.maximum(m, 0), T_ROWS * T_COLS - 1)       # never another tensor's memory
            weight = tl.load(WEIGHT + at).to(tl.float32)
        else:
            S, T = TABLE + (b * (V + Q) + v) * 5, TABLE + (b * (V + Q) + V + q) * 5
            s_height, s_width, t_height, t_width = tl.load(S + 2), tl.load(S + 3), tl.load(T + 2), tl.load(T + 3)
            row, col = n // S_COLS, n % S_COLS
            col = tl.where(tl.load(S + 4) > 0, S_COLS - 1 - col, col)
            row, dy = _nearest_cell(row, tl.load(S), s_height, S_ROWS, tl.load(T), t_height, T_ROWS)
            col, dx = _nearest_cell(col, tl.load(S + 1), s_width, S_COLS, tl.load(T + 1), t_width, T_COLS)
            col = tl.where(tl.load(T + 4) > 0, T_COLS - 1 - col, col)
            m = (row * T_COLS + col).to(tl.int32)
            weight = 1.0                        # a constant: to multiply by it costs no instruction
            y, x, t_y, t_x = s_height / S_ROWS, s_width / S_COLS, t_height / T_ROWS, t_width / T_COLS
            end = tl.where(4 * (dy * dy + dx * dx) < tl.maximum(y * y + x * x, t_y * t_y + t_x * t_x), end, 0)
        return ((q * B + b) * (T_ROWS * T_COLS) + m).to(tl.int64), end, weight

    @triton.jit
    def _student_kernel(S, P, LOSS, DS, q, V, Q, B, K, scale, skip, TABLE, S_ROWS: tl.constexpr, S_COLS: tl.constexpr,
                        T_ROWS: tl.constexpr, T_COLS: tl.constexpr, BLOCK: tl.constexpr, WEIGHT=None):
        """One student row: LOSS and, if there is a DS (it may be S), its gradient times UNIT * student_temp."""
        UNIT: tl.constexpr = 1.0 if P.dtype.element_ty == tl.float32 else 16384.0
        per_image = V * S_ROWS * S_COLS
        b, rest = tl.program_id(0) // per_image, tl.program_id(0) % per_image
        v, n = rest // (S_ROWS * S_COLS), rest % (S_ROWS * S_COLS)
        row = ((v * B + b) * (S_ROWS * S_COLS) + n).to(tl.int64)
        row0, end0, w0 = _matched_row(q, b, v, n, V, Q, B, K, skip, TABLE, WEIGHT, S_ROWS, S_COLS, T_ROWS, T_COLS)
        row1, end1, w1 = _matched_row(q + 1, b, v, n, V, Q, B, K, skip, TABLE, WEIGHT, S_ROWS, S_COLS, T_ROWS, T_COLS)
        end = tl.maximum(end0, end1)
        S, P0, P1 = S + row * K, P + row0 * K, P + row1 * K
        tile = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        peak, total = tl.full([BLOCK // 8], -3e38, tl.float32), tl.zeros([BLOCK // 8], tl.float32)
        mass, dot = tl.zeros([BLOCK // 8, 8], tl.float32), tl.zeros([BLOCK // 8, 8], tl.float32)
        for k in range(0, end, BLOCK):          # a masked row reads nothing
            s = _tile(S, k + tile, end, float("-inf"))
            p = w0 * _tile(P0, k + tile, end0, 0.0) + w1 * _tile(P1, k + tile, end1, 0.0)
            mass += p                           # before the exponentials: all loads come first
            dot += p * tl.where(p == 0, 0.0, s)                         # 0 * -inf would be NaN
            peak, total = _add_exp2(peak, total, s, scale)
        top = tl.max(peak, axis=0)
        lse = tl.where(end > 0, top + tl.log2(tl.sum(total * tl.exp2(peak - top), axis=0)), 0.0)
        tl.store(LOSS + row, tl.sum(tl.sum(lse * mass - scale * dot, axis=1), axis=0) * (0.6931471805599453 / UNIT))
        if DS is not None:
            weight = UNIT * (tl.where(end0 > 0, w0, 0.0) + tl.where(end1 > 0, w1, 0.0))
            for k in range(0, K, BLOCK):
                s = _tile(S, k + tile, end, float("-inf"))
                p = w0 * _tile(P0, k + tile, end0, 0.0) + w1 * _tile(P1, k + tile, end1, 0.0)
                tl.store(DS + row * K + (k + tile), weight * tl.exp2(s * scale - lse) - p, mask=k + tile < K)
    INTERPRETED = not isinstance(_student_kernel, triton.runtime.JITFunction)

LOG2_E = math.log2(math.e)
LAUNCH = dict(BLOCK=2048,               # elements of a tile: 8, or 16 bytes of 16-bit logits, for each of 256 threads
              num_warps=8, enable_fp_fusion=True)       # no autotuning; multiply-adds fused in any Triton

class _TritonLoss(torch.autograd.Function):
    """The loss and its gradient, for `step` images and two teacher views at a time; the backward pass only scales.
    Without weights (None), z are the caller's logits. Else logits are private; their gradient is written over them."""
    @staticmethod
    def forward(ctx, step, wanted, groups, student_temp, teacher_temp, teacher_z, teacher_weight, center,
                student_weight, *students):
        (Q, B, _, _), K, head, center = teacher_z.shape, len(center), student_weight is not None, center.contiguous()
        needs_weight, *needs = (wanted and needed for needed in ctx.needs_input_grad[-1 - len(students):])
        logit_type, grad_type, grad_weight = teacher_z.dtype, None, None
        if head:
            logit_type, grad_type = (torch.float16, torch.bfloat16) if teacher_z.is_cuda else (torch.float32,) * 2
            weight, teacher_weight = student_weight.to(logit_type), teacher_weight.to(logit_type)
            weight_for_grad = student_weight.to(grad_type) if any(needs) else None
            grad_weight = torch.zeros_like(student_weight, dtype=torch.float32) if needs_weight else None
        unit = 2 ** 14 if logit_type.itemsize == 2 else 1
        grads = [torch.zeros_like(z, dtype=torch.float32) if head else None for z in students]
        ctx.scales = [1 / (unit * student_temp * max(1, B * z.shape[2])) for z in students]         # mean over B and Ns
        total = teacher_z.new_zeros((), dtype=torch.float32)
        for start in range(0, max(1, B), step):
            chunk = slice(start, start + step)
            t = teacher_z[:, chunk].to(logit_type).contiguous()         # contiguous: one large matrix product, not many
            t = t @ teacher_weight.T if head else t
            p = t if head else torch.empty_like(t, dtype=torch.float16 if unit > 1 else torch.float32)
            _teacher_kernel[(p[..., 0].numel(),)](t, center, p, K, LOG2_E / teacher_temp, **LAUNCH)
            for i, q in itertools.product(range(len(students)), range(0, Q, 2)):
                z, ds, (table, factor, grids, skip) = students[i][:, chunk], None, groups[i]
                table, factor = (x if x is None else x[chunk].clone() for x in (table, factor))     # clone: aligned
                s = z.to(logit_type).contiguous() @ weight.T if head else z.contiguous()            # (v, b, Ns, K)
                if needs_weight or needs[i]:    # ready logits: a match's weight may be too large for float16 gradients
                    ds_type = s.dtype if factor is None else torch.float32
                    ds = s.view(grad_type) if head else torch.empty_like(s, dtype=ds_type)
                loss = s.new_empty(s.shape[:3], dtype=torch.float32)
                _student_kernel[(loss.numel(),)](s, p, loss, ds, q, len(s), Q, s.shape[1], K, LOG2_E / student_temp,
                                                 skip, table, *grids, WEIGHT=factor, **LAUNCH)
                total += loss.sum() * (ctx.scales[i] * unit * student_temp)
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
        grad_weight, *grads = ctx.saved_tensors
        grads = [grad if grad is None else torch.mul(grad, (upstream * scale)[None], out=torch.empty_like(grad))
                 for grad, scale in zip(grads, ctx.scales)]             # out: a small factor is no float16
        grad_weight = None if grad_weight is None else grad_weight * upstream
        return *[None] * (len(ctx.needs_input_grad) - 1 - len(grads)), grad_weight, *grads
