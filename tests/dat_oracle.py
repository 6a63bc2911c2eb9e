"""DAT by another way, in float64: loops over the paper's formulas; and the authors' model (v1) of
one size, from their tensors, with the bias by explicit weights and torchvision's windows."""

import itertools
import math

import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import shifted_window_attention


def g(a, b):
    """Eq. 8's weight of pixel b at place a."""
    return max(0.0, 1.0 - abs(a - b))


def key_places(query, tensors, groups, stride, offset_range):
    """(B, G, N, 2) as (y, x) in [-1, 1]. query: (B, H, W, C). tensors: of the offset network, by
    the authors' names."""
    B, C = query.shape[0], query.shape[3]
    width = C // groups
    found = []
    for b, group in itertools.product(range(B), range(groups)):
        x = query[b, :, :, group * width : (group + 1) * width].permute(2, 0, 1)[None]
        kernel = tensors["conv_offset.0.weight"]
        padding = kernel.shape[-1] // 2
        x = F.conv2d(x, kernel, tensors["conv_offset.0.bias"], stride, padding, groups=width)
        Hk, Wk = x.shape[2:]
        x = x[0].permute(1, 2, 0)
        norm = tensors["conv_offset.1.norm.weight"], tensors["conv_offset.1.norm.bias"]
        x = F.layer_norm(x, (width,), *norm)
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = (x @ tensors["conv_offset.3.weight"].flatten(1).t()).tanh()  # (Hk, Wk, 2)
        for i, j in itertools.product(range(Hk), range(Wk)):
            y0, x0 = 2 * (i + 0.5) / Hk - 1, 2 * (j + 0.5) / Wk - 1
            found.append([y0 + offset_range / Hk * x[i, j, 0], x0 + offset_range / Wk * x[i, j, 1]])
    return torch.tensor(found, dtype=query.dtype).view(B, groups, -1, 2)


def attention(x, tensors, heads, groups, stride, offset_range):
    """Eq. 6 to 9 in loops over images, heads, queries, keys and pixels. x: (B, H, W, C)."""
    B, H, W, C = x.shape
    D = C // heads
    project = projections(tensors)
    query = F.linear(x, *project["q"])
    places = key_places(query, tensors, groups, stride, offset_range)
    N, table = places.shape[2], tensors["rpe_table"]
    H0, W0 = (n // 2 + 1 for n in table.shape[1:])  # the map that it is made for
    sampled = x.new_zeros(B, N, C)
    for b, n, c in itertools.product(range(B), range(N), range(C)):
        y, z = places[b, c // (C // groups), n].tolist()
        y, z = (y + 1) / 2 * (H - 1), (z + 1) / 2 * (W - 1)
        for i, j in itertools.product(range(H), range(W)):
            sampled[b, n, c] += g(y, i) * g(z, j) * x[b, i, j, c]
    key, value = F.linear(sampled, *project["k"]), F.linear(sampled, *project["v"])
    mixed = torch.zeros_like(x)
    for b, m, i, j in itertools.product(range(B), range(heads), range(H), range(W)):
        channels = slice(m * D, (m + 1) * D)
        scores = []
        for n in range(N):
            y, z = places[b, m // (heads // groups), n].tolist()
            row = (0.5 * (2 * (i + 0.5) / H - 1 - y) + 1) * (H0 - 1)
            column = (0.5 * (2 * (j + 0.5) / W - 1 - z) + 1) * (W0 - 1)
            bias = sum(
                g(row, r) * g(column, c) * table[m, r, c].item()
                for r in range(math.floor(row), math.floor(row) + 2)
                for c in range(math.floor(column), math.floor(column) + 2)
                if 0 <= r < 2 * H0 - 1 and 0 <= c < 2 * W0 - 1
            )
            product = (query[b, i, j, channels] * key[b, n, channels]).sum().item()
            scores.append(product / math.sqrt(D) + bias)
        weights = torch.tensor(scores, dtype=x.dtype).softmax(0)
        mixed[b, i, j, channels] = (weights[:, None] * value[b, :, channels]).sum(0)
    return F.linear(mixed, *project["out"])


def projections(tensors):
    names = {n: f"proj_{n}" for n in ("q", "k", "v", "out")}
    return {
        n: (tensors[name + ".weight"].flatten(1), tensors[name + ".bias"])
        for n, name in names.items()
    }


def windows(x, tensors, heads, window, shift):
    """Windows on a map of any size, in loops over queries and keys; padding is no key."""
    B, H, W, C = x.shape
    D = C // heads
    q, k, v = F.linear(x, tensors["proj_qkv.weight"], tensors["proj_qkv.bias"]).chunk(3, -1)
    table = tensors["relative_position_bias_table"].view(2 * window - 1, 2 * window - 1, heads)

    def part(place, size):  # which tokens of an axis see each other: a window, between tears
        if size <= window:
            return 0
        padded = -(-size // window) * window
        moved = (place - shift) % padded
        return (moved // window, place < shift)

    mixed = torch.zeros_like(x)
    pixels = list(itertools.product(range(H), range(W)))
    padded = [-(-n // window) * window for n in (H, W)]
    shifts = [shift if n > window else 0 for n in (H, W)]
    for b, (i, j), m in itertools.product(range(B), pixels, range(heads)):
        channels = slice(m * D, (m + 1) * D)
        keys = [p for p in pixels if [part(*a) for a in zip(p, (H, W), strict=True)]
                == [part(i, H), part(j, W)]]  # fmt: skip
        scores = []
        for y, z in keys:
            # inside a window, once the map is moved
            row, column = (
                (a - s) % n % window - (c - s) % n % window + window - 1
                for a, c, s, n in zip((i, j), (y, z), shifts, padded, strict=True)
            )
            product = (q[b, i, j, channels] * k[b, y, z, channels]).sum() / math.sqrt(D)
            scores.append(product + table[row, column, m])
        weights = torch.stack(scores).softmax(0)
        values = torch.stack([v[b, y, z, channels] for y, z in keys])
        mixed[b, i, j, channels] = (weights[:, None] * values).sum(0)
    return F.linear(mixed, tensors["proj_out.weight"], tensors["proj_out.bias"])


# The whole model, of one size


def tents(places, cells):
    """(..., cells): the weight of each cell at each place, in cells."""
    return (1 - (places[..., None] - torch.arange(cells)).abs()).clamp(min=0)


def moved_keys(x, tensors, heads, groups, offset_range=2.0):
    """`attention`, with stride 1, in products of matrices."""
    B, H, W = x.shape[:3]
    N = H * W
    project = projections(tensors)
    query = F.linear(x, *project["q"])
    places = key_places(query, tensors, groups, 1, offset_range)
    y, z = ((places + 1) / 2 * (torch.tensor([H, W]) - 1)).unbind(-1)
    parts = x.view(B, H, W, groups, -1)
    sampled = torch.einsum("bgni,bgnj,bijgc->bngc", tents(y, H), tents(z, W), parts).flatten(2)
    q, k, v = (
        t.reshape(B, N, heads, -1)
        for t in (query, F.linear(sampled, *project["k"]), F.linear(sampled, *project["v"]))
    )
    scores = torch.einsum("bqmd,bnmd->bmqn", q, k) * q.shape[-1] ** -0.5
    cells = [2 * n - 1 for n in (H, W)]
    rows, columns = (
        ((2 * (torch.arange(n) + 0.5) / n - 1 - places[..., axis, None]) / 2 + 1) * (n - 1)
        for axis, n in enumerate((H, W))
    )  # (B, G, N, H) and (B, G, N, W)
    table = tensors["rpe_table"].unflatten(0, (groups, -1))
    bias = torch.einsum(
        "bgnir,gmrc,bgnjc->bgmijn", tents(rows, cells[0]), table, tents(columns, cells[1])
    )
    weights = (scores + bias.reshape(B, heads, N, N)).softmax(-1)
    mixed = torch.einsum("bmqn,bnmd->bqmd", weights, v).reshape(x.shape)
    return F.linear(mixed, *project["out"])


def authors_model(state, images, blocks, heads, groups, window):
    """The authors' v1 on images of the size that its tables are for: logits, and the four stages'
    maps (B, C, H, W). state: their tensors. images: (B, 3, H, W)."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"])

    def patches(x, name, side):
        x = F.conv2d(x, state[f"{name}.0.weight"], state.get(f"{name}.0.bias"), side)
        return norm(x.permute(0, 2, 3, 1), f"{name}.1.norm")

    x, maps = patches(images, "patch_proj", 4), []
    for s, stage in enumerate(blocks):
        if s:
            x = patches(maps[-1], f"down_projs.{s - 1}", 2)
        for d, kind in enumerate(stage):
            start = f"stages.{s}.attns.{d}."
            own = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
            y = norm(x, f"stages.{s}.layer_norms.{2 * d}.norm")
            if kind == "D":
                x = x + moved_keys(y, own, heads[s], groups[s])
            else:
                x = x + swin(y, own, heads[s], window, kind == "S")
            y = norm(x, f"stages.{s}.layer_norms.{2 * d + 1}.norm")
            mlp = f"stages.{s}.mlps.{d}.chunk.linear"
            y = F.gelu(F.linear(y, state[mlp + "1.weight"], state[mlp + "1.bias"]))
            x = x + F.linear(y, state[mlp + "2.weight"], state[mlp + "2.bias"])
        maps.append(x.permute(0, 3, 1, 2))
    pooled = norm(x, "cls_norm.norm").mean((1, 2))
    return F.linear(pooled, state["cls_head.weight"], state["cls_head.bias"]), maps


def swin(x, tensors, heads, window, shifted):
    """torchvision's windows, with -100 between what a shift tears apart."""
    table, index = (tensors[f"relative_position_{n}"] for n in ("bias_table", "index"))
    bias = table[index.flatten()].view(window**2, window**2, heads).permute(2, 0, 1)[None]
    shift = math.ceil(window / 2) if shifted else 0
    return shifted_window_attention(
        x, tensors["proj_qkv.weight"], tensors["proj_out.weight"], bias, [window] * 2, heads,
        [shift] * 2, qkv_bias=tensors["proj_qkv.bias"], proj_bias=tensors["proj_out.bias"],
    )  # fmt: skip
