# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # {{n}}. Fewer tokens: Sparse DETR, Lite DETR
#
# You will be able to
# - **compute** how much of each token a decoder has read, and **train** a scorer to guess it beforehand,
# - **build** an encoder that updates a few tokens and looks at all, and **show** when it is the dense encoder,
# - **count** what that saves, and **measure** what it does not save,
# - **build** an encoder that updates fine tokens seldom, and attention whose weights look at the keys,
# - **judge** what both cost in AP here, beside what their papers report.
#
# You should know: {{chapter many_scales}}, {{chapter refinement}} and {{chapter groups_and_queries}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Deformable attention made the encoder affordable: each token reads a few points. But there are still many
# tokens, every one of them is updated in every layer, and most of them show background. Two detectors save
# work here. **Sparse DETR** {cite}`roh2022sparse` updates only the tokens that will matter. **Lite DETR**
# {cite}`li2023lite` updates the many fine tokens seldom and the few coarse ones always.

# %% tags=["hide-input"]
import csv
import dataclasses
import itertools
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from schematics import fewer_tokens as draw
from schematics.groups_and_queries import seeds_and_costs
from torch import nn

from deformable_detr import ms_deform_attn
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.coco import CocoDataset, collate
from deformable_detr.data.transforms import digits_eval_transform
from deformable_detr.evaluation.coco import evaluate
from deformable_detr.evaluation.complexity import complexity
from deformable_detr.evaluation.intervals import interval, verdict
from deformable_detr.exercises import check
from deformable_detr.layers.attention import MSDeformAttn
from deformable_detr.layers.key_aware_attention import KeyAwareAttention
from deformable_detr.layers.reading import tokens_read
from deformable_detr.look.sampling import record_sampling
from deformable_detr.losses import SetCriterion
from deformable_detr.models import MODELS
from deformable_detr.models.encoder import EncoderLayer, rows
from deformable_detr.models.sparse_encoder import Scorer
from deformable_detr.models.tokens import token_centres
from deformable_detr.models.two_stage import TwoStage
from deformable_detr.ops import sampled_products
from deformable_detr.ops.reference import sample_levels
from deformable_detr.structures import Queries, Tokens
from deformable_detr.weights.ours import load_model

plt.style.use("book.mplstyle")
_ = torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 Most tokens are background
#
# How many tokens lie on an object? We take the shipped detector and the 24 sample pictures, and count the
# tokens whose centre is inside a true box.

# %%
model, _ = load_model("../data/checkpoints/digits.safetensors")
model.eval()
samples = Path("../data/samples")
dataset = CocoDataset(samples, samples / "annotations.json", digits_eval_transform())
batch = collate([dataset[i] for i in range(len(dataset))])
with torch.no_grad():
    tokens = model.tokens(batch)
shapes, S = tokens.spatial_shapes, tokens.features.shape[1]
centres = token_centres(shapes, tokens.valid_ratios)  # (24, S, 2)


def on_an_object(image):
    """(S,) True where a token's centre lies in a true box of this picture."""
    boxes = cxcywh_to_xyxy(batch.targets[image].boxes)
    centre = centres[image].unsqueeze(1)
    return ((centre > boxes[:, :2]) & (centre < boxes[:, 2:])).all(-1).any(-1)


inside = torch.stack([on_an_object(i) for i in range(len(dataset))])
print(f"{S} tokens; on a digit: {inside.float().mean():.0%} in all pictures, ", end="")
print(f"{inside[9].float().mean():.0%} in that of the seven")

# %% tags=["hide-input"] mystnb={"image": {"alt": "The picture of the seven three times, with the token centres of levels 0, 1 and 2. Most are small grey dots; those in the box of the seven are larger and coloured: a patch of the finest level, fewer on the next, and a handful on the coarsest."}}
draw.on_and_off(inside[9], shapes)

# %% [markdown]
# *Figure {{n}}.1. What to see: the tokens of each level, coloured where they lie in the seven's box, and their
# number. All others are background.*
#
# And how much of the work is the encoder's? At full size, 800 × 1110 pixels, about half:

# %%
kind, detector = MODELS["deformable_detr"]
with torch.device("meta"):  # sizes without numbers
    large = detector(kind(refine=True, two_stage=True))
parts = complexity(large, repeats=0).parts
print({name: f"{value / sum(parts.values()):.0%}" for name, value in parts.items()})

# %% [markdown]
# ## {{n}}.2 Which tokens are read?
#
# So the idea is to update only tokens that matter. But matter to whom? Not all tokens on an object are needed,
# and some background around it may be. The authors of Sparse DETR ask the decoder {cite}`roh2022sparse`: **a
# token matters as much as the decoder's cross-attention reads it.**
#
# With dense attention we would add up columns of the attention map. Deformable attention has no such map, since
# it reads between tokens. But each sample is a blend of four tokens ({{chapter sampling}}), so its attention
# weight can be shared out among these four in the same proportions. By hand, in one map of 3 × 5 tokens:


# %%
def read_by_hand(points, weights, height, width):
    """points: (x, y) in [0, 1] of each sample. Returns the weight that each token got, (H, W)."""
    total = torch.zeros(height, width)
    for (x, y), weight in zip(points, weights, strict=True):
        x, y = x * width - 0.5, y * height - 0.5  # in units of tokens, whose centres are whole
        for row in (int(y // 1), int(y // 1) + 1):
            for column in (int(x // 1), int(x // 1) + 1):
                if 0 <= row < height and 0 <= column < width:
                    total[row, column] += weight * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


by_hand = read_by_hand([(0.3, 0.5), (0.44, 0.6)], [0.75, 0.25], 3, 5)
print((100 * by_hand).round().int().tolist())

# %% [markdown]
# The first sample lies on the centre of a token, which gets its whole weight. The second one is shared out
# among four. There is a shorter way. What attention returns is a sum of tokens times these shares. So **the
# shares are its derivative with respect to the tokens**, and the operator's backward pass computes that already:

# %%
value = torch.zeros(1, 15, 1, 1, requires_grad=True)  # (B, S, M, D)
places = torch.tensor([[0.3, 0.5], [0.44, 0.6]]).view(1, 1, 1, 1, 2, 2)  # (B, Q, M, L, K, 2)
result = ms_deform_attn(value, [(3, 5)], places, torch.tensor([0.75, 0.25]).view(1, 1, 1, 1, 2))
(shares,) = torch.autograd.grad(result.sum(), value)
assert torch.allclose(shares.view(3, 5), by_hand, atol=1e-6)
print("the same")

# %% [markdown]
# The library's `tokens_read` does this for all queries, heads and layers at once. What has the decoder of the
# shipped detector read? It has 3 layers of 30 queries with 4 heads, and the weights of a head sum to 1, so 360
# in all, less what was read outside the picture:

# %%
with torch.no_grad(), record_sampling(model) as record:
    output = model(batch)
read = tokens_read(record.decoder)  # (24, S)
print(f"all that was read of the seven's picture: {read[9].sum():.0f}")
for rho in (0.1, 0.3):
    best = read.topk(int(S * rho) + 1).values.sum(1) / read.sum(1)
    print(f"the {rho:.0%} of tokens that are read most have {best.mean():.0%} of it, on average")

# %% tags=["hide-input"] mystnb={"image": {"alt": "The picture of the seven, and beside it three maps of how much the decoder read of each token, for levels 0, 1 and 2. On levels 1 and 2 the tokens of the seven are somewhat brighter than the dark rest, on level 0 hardly. By far the brightest are other places, where queries have their boxes."}}
draw.read_maps(read[9], shapes)

# %% [markdown]
# *Figure {{n}}.2. What to see: how much was read of each token of the three levels (bright: much; square roots,
# so that little is seen too), and the share of each level. The decoder reads the seven, but only one query has its box
# there. It reads other places more, because most queries have their boxes there and have to find out that they
# contain no digit.*
#
# **The target of the scorer.** An encoder that updates the share $\rho$ of the tokens should update those that
# are read most. Their target is 1, that of all others 0.
#
# ## Exercise {{n}}.1  The target
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Pictures in a batch may have padding, which is `absent`. A picture with $n$ tokens that are not padding keeps
# $\lfloor n\rho \rfloor + 1$ of them, but not more than $n$.


# %% tags=["exercise"]
def target(read, absent, rho):
    """read: (B, S). absent: (B, S) bool. Returns (B, S): 1 at the tokens that are read most."""
    # BEGIN SOLUTION
    wanted = torch.zeros_like(read)
    for row, was_read, padding in zip(wanted, read, absent, strict=True):
        n = int((~padding).sum())
        keep = min(int(n * rho) + 1, n)
        row[was_read.masked_fill(padding, -1).topk(keep).indices] = 1
    return wanted
    # END SOLUTION


check("fewer_tokens.1", target)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Go through the pictures one by one: each has a number of its own to keep.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# What was read is never negative. So `masked_fill(padding, -1)` puts padding last, and `topk(keep).indices` are
# the places.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The share is one of the tokens that are not padding. `int(S * rho) + 1` of all would be too many in a picture
# with padding.
#
# </details>
#
# {{solution}}

# %% [markdown]
# **Half a cell.** In the official code, the samples are shared out from $x \cdot W$ in place of
# $x \cdot W - \frac12$: half a token further to the right and below than where they were read. Does it matter?
# We make both targets, and count how many of the chosen tokens are the same:

# %%
displaced = tokens_read(record.decoder, half_cell=True)
for rho in (0.1, 0.3):
    wanted, official = (
        torch.zeros_like(x).scatter(1, x.topk(int(S * rho) + 1).indices, 1)
        for x in (read, displaced)
    )
    print(f"rho {rho}: {(wanted * official).sum() / wanted.sum():.0%} of the tokens are the same")

# %% [markdown]
# So half a cell changes the target visibly. (What it costs in AP was not measured.) The library draws the target where it was read; the other
# form is an option (`half_cell`), for published weights, which were trained with it.
#
# ## {{n}}.3 A scorer that guesses it
#
# The decoder comes after the encoder, so the encoder cannot ask it. A small network has to guess: the
# **scorer** sees a token before the encoder and says how likely it is to be among those that are read most.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A flow chart. Tokens go to a scorer; over an arrow crossed by two red bars, no gradient, its scores decide to keep the best rho S. The encoder updates these; a line above shows that all tokens can be looked at. The decoder reads all. In purple, the way back: what was read of each token becomes 1 for the rho S read most and 0 for all others, and the scorer's loss leads to the scorer."}}
draw.sparse_flow()

# %% [markdown]
# *Figure {{n}}.3. What to see: above, what happens in a forward pass; below (purple), how the scorer learns.
# The choice itself passes no gradient (red).*
#
# Half of the scorer's features describe the token itself. The other half is their mean over all tokens, which tells
# what kind of picture it is. (Its input has passed the first stage's projection, as proposals do in
# {{chapter refinement}}.)


# %%
class MyScorer(nn.Module):
    """(B, S, C) to (B, S) logits, for pictures without padding."""

    def __init__(self, C):
        super().__init__()
        self.features = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU())
        widths, layers = (C, C // 2, C // 4, 1), []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.GELU()]
        self.score = nn.Sequential(*layers[:-1])

    def forward(self, tokens):
        own, shared = self.features(tokens).chunk(2, -1)
        shared = shared.mean(1, keepdim=True).expand_as(own)
        return self.score(torch.cat([own, shared], -1)).squeeze(-1)


mine, library = MyScorer(64), Scorer(64)
mine.load_state_dict(library.state_dict())
with torch.no_grad():
    located = dataclasses.replace(tokens, features=tokens.features + tokens.position)
    features, _ = model.first_stage.prepare(located)  # (24, S, C)
    torch.testing.assert_close(mine(features), library(features, None))
print("as the library's,", sum(p.numel() for p in mine.parameters()), "parameters")

# %% [markdown]
# Can this be learned? In Sparse DETR the scorer is trained together with the detector. Here we train it
# alone, for the finished detector, in a few seconds. We do so three times: each scorer learns from 16 of the pictures
# and guesses for the 8 others. So the guesses for a picture are those of a scorer that has not seen it. The loss is the
# binary cross-entropy, token by token.

# %%
images = torch.arange(len(dataset))


def guesses(rho, steps=60):
    """(24, S) scores, each picture's by a scorer that was trained on 16 others."""
    wanted = torch.zeros_like(read).scatter(1, read.topk(int(S * rho) + 1).indices, 1)
    scores = torch.empty_like(read)
    for fold in range(3):
        torch.manual_seed(fold)
        seen, scorer = images[images % 3 != fold], MyScorer(64)
        optimiser = torch.optim.AdamW(scorer.parameters(), 3e-3)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(scorer(features[seen]), wanted[seen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            scores[images % 3 == fold] = scorer(features[images % 3 == fold])
    return scores


# %% [markdown]
# **Before you run**: a random choice of a tenth of the tokens would find a tenth of those that are read most.
# How many will the scorer find?

# %%
chosen, shares_found = {}, {}
for rho in (0.1, 0.3):
    keep = int(S * rho) + 1
    places = {"read most": read.topk(keep).indices, "scorer": guesses(rho).topk(keep).indices}
    places["random"] = torch.rand_like(read).topk(keep).indices
    chosen |= {(rho, name): place for name, place in places.items()}
    wanted = torch.zeros_like(read).scatter(1, places["read most"], 1)
    shares_found[rho] = wanted.gather(1, places["scorer"]).mean().item()
    print(f"rho {rho}: the scorer finds {shares_found[rho]:.1f} of the tokens that are read most")
assert shares_found[0.1] > 0.3 and shares_found[0.3] > 0.5

# %% tags=["hide-input"] mystnb={"image": {"alt": "The picture of the seven four times with the kept tokens of three levels as blue dots, orange and green circles. The first and the third panel show the tenth and the three tenths that are read most: in the first mostly in other places and a few on the seven, in the third on both. The second and the fourth show those that the scorer keeps."}}
marks = {}
for rho in (0.1, 0.3):
    for name in ("read most", "scorer"):
        kept_here = torch.zeros(S, dtype=torch.bool)
        kept_here[chosen[rho, name][9]] = True
        marks[f"{name}, ρ = {rho}"] = kept_here
draw.kept(marks, shapes)

# %% [markdown]
# *Figure {{n}}.4. What to see: which tokens of the seven's picture are kept (blue dots: level 0, orange and
# green circles: levels 1 and 2). "Read most" is the target; the scorer has not seen this picture in training.
# It finds the seven. What it keeps far from any digit is what it learned to keep in other pictures.*
#
# ## {{n}}.4 Update a few, look at all
#
# The encoder itself changes little. The chosen tokens are gathered and are the only queries. They may look at
# all tokens, since all stay in the memory as values. After each layer they are written back to their places (`rows`
# gathers tokens; the library's encoder takes a set of places for each of its layers):


# %%
def sparse_encoder(layers, tokens, places):
    """The features (B, S, C) after these layers, which update the tokens at places (B, N) only."""
    centres = token_centres(tokens.spatial_shapes, tokens.valid_ratios)
    wide = places.unsqueeze(-1).expand(-1, -1, tokens.features.shape[-1])
    for layer in layers:
        asking = Queries(*(rows(x, places) for x in (tokens.features, tokens.position, centres)))
        features = tokens.features.scatter(1, wide, layer(asking, tokens))
        tokens = dataclasses.replace(tokens, features=features)
    return tokens.features


with torch.no_grad():
    some = sparse_encoder(model.encoder.layers, tokens, chosen[0.1, "scorer"])
    theirs = model.encoder(tokens, [chosen[0.1, "scorer"]] * 2).features
    torch.testing.assert_close(some, theirs, atol=1e-5, rtol=1e-5)
changed = (some != tokens.features).any(-1)
print("as the library's;", int(changed[9].sum()), "of", S, "tokens have changed")

# %% [markdown]
# The case with a known answer: at $\rho = 1$ every token is updated, and it must be the dense encoder, in
# whatever order the tokens stand.

# %%
with torch.no_grad():
    everyone = torch.rand_like(read).argsort(1)  # all tokens, in random order
    shuffled = sparse_encoder(model.encoder.layers, tokens, everyone)
    torch.testing.assert_close(shuffled, model.encoder(tokens).features, atol=1e-4, rtol=1e-4)
print("all tokens in random order: the dense encoder")

# %% [markdown]
# The same holds for the whole detector. We compare the library's Sparse DETR at $\rho = 1$, small and
# untrained, with a two-stage detector that has the same first stage and a plain encoder:

# %%
kind, detector = MODELS["sparse_detr"]
SMALL = {"num_classes": 10, "num_queries": 30, "backbone": "small", "num_levels": 3}
SMALL |= {"embed_dim": 64, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 3}
SMALL |= {"ffn_dim": 256, "dropout": 0.0, "anchor_size": 0.1}


class Dense(TwoStage):
    """Sparse DETR without its encoder."""

    make_first_stage = detector.make_first_stage


two = collate([dataset[9], dataset[8]])
sparse = detector(kind(**SMALL, rho=1.0)).eval()
plain = Dense(kind(**SMALL)).eval()
plain.load_state_dict(sparse.state_dict(), strict=False)  # no scorer, no heads in the encoder
with torch.no_grad():
    torch.testing.assert_close(sparse(two).logits, plain(two).logits, atol=1e-4, rtol=1e-4)
print("Sparse DETR with rho = 1 is the dense detector")

# %% [markdown]
# What happens to a detector whose encoder updates fewer tokens? We try it on the shipped one, which was *not*
# trained for it: with the tokens that are read most (which one cannot know beforehand), with those of our
# scorers, and with random ones. AP on the 24 pictures:


# %%
def ap_with(places=None):
    """AP where the encoder updates these tokens of the 24 pictures; None: all."""
    at = iter(images.split(8))  # as `evaluate` makes its batches
    if places is not None:
        model.encode = lambda tokens: (model.encoder(tokens, [places[next(at)]] * 2), {})
    found = evaluate(model, dataset, batch_size=8, progress=False).ap
    model.__dict__.pop("encode", None)
    return found


aps = {key: ap_with(places) for key, places in chosen.items()}
print(f"all tokens: {ap_with():.2f}")
for rho in (0.1, 0.3):
    print(f"rho {rho}:", ", ".join(f"{n} {ap:.2f}" for (r, n), ap in aps.items() if r == rho))
assert aps[0.3, "random"] < 0.5 * aps[0.3, "scorer"] and aps[0.3, "scorer"] > 0.75

# %% [markdown]
# So it matters very much which tokens they are. Three tenths of the tokens nearly suffice if they are the right
# ones, even in a detector that has never met such an encoder; with as many random ones more than half of the AP
# is lost. (The pictures are few, so the second digit says little.)
#
# ### How the scorer learns, and how not
#
# An article about this family says that Sparse DETR uses *reinforcement learning* to choose *sampling points*.
# It does neither. It chooses tokens, and it learns by a plain cross-entropy with a target, as above. Which
# losses reach the scorer?

# %%
torch.manual_seed(0)
sparse = detector(kind(**SMALL, rho=0.3)).train()
losses = SetCriterion()(sparse(two), two.targets)
own = losses.pop("loss_scorer")
for name, loss in (
    ("all losses of boxes and classes", sum(losses.values())),
    ("its own loss", own),
):
    gradients = torch.autograd.grad(
        loss, list(sparse.scorer.parameters()), retain_graph=True, allow_unused=True
    )
    print(f"{name:32} reach the scorer:", any(g is not None and g.any() for g in gradients))

# %% [markdown]
# There is one more loss. With few tokens to update, the encoder can afford that its layers, all but the last,
# predict boxes and classes from the updated tokens, with heads of their own, as the decoder's layers do. These
# **encoder losses** are used in training only:

# %%
print("in training:", [name for name in losses if "encoder" in name])
for encoder_losses in (False, True):
    with torch.device("meta"):
        large = detector(kind(rho=0.1, encoder_losses=encoder_losses))
    parameters = sum(p.numel() for p in large.parameters())
    print(f"at full size, heads in the encoder {encoder_losses}: {parameters:,} parameters")

# %% [markdown]
# The second number is that of the published models. At inference the encoder's five pairs of heads are thrown
# away.
#
# ## {{n}}.5 What a smaller share saves
#
# The multiply-adds at full size, with six layers in the encoder:

# %%
RHOS = (1.0, 0.5, 0.3, 0.1)
counted = []
for rho in RHOS:
    with torch.device("meta"):
        large = detector(kind(rho=rho))
    found = complexity(large, repeats=0)
    counted.append(found.parts["encoder"])
    print(f"rho {rho}: encoder {counted[-1] / 1e9:3.0f} G, all {found.multiply_adds / 1e9:.0f} G")

# %% [markdown]
# A tenth of the updates still costs about a fifth. The reason is the values: every layer projects *all* tokens
# by $W'$, because any of them may be read. (Below 1, the totals agree with the paper's table to within 1 G.)
#
# And the clock? We time one layer of full width, for a picture of 400 × 533 pixels, and its parts: the
# projection of values, and the operator itself, forward and backward. (The folded cell has the details.)

# %%
levels = [(50, 67), (25, 34), (13, 17), (7, 9)]
N = sum(height * width for height, width in levels)
layer = EncoderLayer(MSDeformAttn(), embed_dim=256, ffn_dim=1024, dropout=0.0)

# %% tags=["hide-input"]
x, nobody = torch.randn(1, N, 256), torch.zeros(1, N, dtype=torch.bool)
everything = Tokens(x, torch.randn(1, N, 256), nobody, levels, torch.ones(1, 4, 2))
middle = token_centres(levels, everything.valid_ratios)


def fastest(call, repeats=3):
    """Milliseconds of one core."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return 1000 * min(taken)


def parts_of_layer(rho):
    """What a layer that updates this share of the tokens takes, and its parts."""
    places = torch.rand(1, N).topk(int(N * rho)).indices.sort().values
    asking = Queries(*(rows(each, places) for each in (x, everything.position, middle)))
    value = x.view(1, N, 8, 32).clone().requires_grad_()
    with torch.no_grad():
        where = layer.attention.sampling(asking.content, asking.references.unsqueeze(2), levels)
    parts = value, levels, where.locations, where.weights
    result = ms_deform_attn(*parts)
    ones = torch.ones_like(result)
    with torch.no_grad():
        return {
            "whole layer": fastest(lambda: layer(asking, everything)),
            "values": fastest(lambda: layer.attention.value_proj(x)),
            "operator, forward": fastest(lambda: ms_deform_attn(*parts)),
            "operator, backward": fastest(
                lambda: torch.autograd.grad(result, value, ones, retain_graph=True)
            ),
        }


# %% [markdown]
# **Before you run**: which of these will fall where fewer tokens are updated, and which will not?

# %%
# NBVAL_IGNORE_OUTPUT
timed = [parts_of_layer(rho) for rho in RHOS]
for name in timed[0]:
    print(f"{name:20}", "  ".join(f"{each[name]:5.1f} ms" for each in timed))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels over the share rho from 0.1 to 1, costs as a part of that at rho 1. Left, the count of the encoder falls along a straight line that ends near 0.2 at rho of 0.1, above the dotted line of proportion. Right, times: the values' line is flat; those of the whole layer and of the operator fall with rho."}}
# NBVAL_IGNORE_OUTPUT
by_part = {name: [each[name] for each in timed] for name in timed[0]}
draw.cost_against_rho(RHOS, counted, by_part)

# %% [markdown]
# *Figure {{n}}.5. What to see: costs as a part of that at ρ = 1. Left, the count ends at nearly twice what
# would be in proportion (dotted). Right, by the clock: projecting the values (blue) takes about the same time
# whatever ρ is. The operator falls nearly in proportion, and the whole layer does not fall to a tenth.*
#
# So updating a tenth of the tokens does not make an encoder ten times as fast. In the whole detector, backbone
# and decoder come on top. The authors report 26.5 pictures per second at $\rho = 0.1$ against 18.2 for their
# dense detector, at 105 against 177 G.
#
# ## {{n}}.6 Lite DETR: fine tokens seldom
#
# Sparse DETR asks which tokens matter in *this* picture. Lite DETR {cite}`li2023lite` asks nothing: it divides
# the tokens by level. With four levels, three quarters of all tokens are on the finest one:

# %%
sizes = [height * width for height, width in levels]
print("tokens by level:", [f"{size / N:.1%}" for size in sizes])

# %% [markdown]
# So most of the work is spent on tokens that cover a few pixels each. Lite DETR therefore puts the layers of the
# encoder into blocks: all layers of a block update the **coarse** tokens, and only its last one updates the **fine**
# tokens too. Each updated token may look at all tokens.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three encoders of six layers as rows of four cells, one per level, the finest widest. Dense: all cells are green. H3L1-(2+1)x3: in layers 2, 4 and 6 all cells are green, in the others the finest is white. H2L2-(2+1)x3: in layers 1, 3 and 5 the two finest are white."}}
every, coarse = [True] * 4, [False, True, True, True]
plans = {"dense": [every] * 6, "H3L1-(2+1)x3": [coarse, every] * 3}
plans["H2L2-(2+1)x3"] = [[False, False, True, True], every] * 3
draw.interleaved(plans)

# %% [markdown]
# *Figure {{n}}.6. What to see: which levels each layer updates (green). The names are the paper's: H3L1 has
# three coarse ("high") levels and one fine ("low") one.*
#
# What does (2+1)x3 mean? Three blocks, and in each of them two updates of the coarse tokens and one of all. It
# is easy to read this as three layers per block, nine in all. But the last layer of a block does both, so there are six, as
# the number of parameters of the published models will show.
#
# By hand, with layers of the base:


# %%
def interleaved(layers, tokens, block, fine_levels=1):
    """The features (B, S, C): each layer updates coarse tokens, the last of a block all."""
    B, S, _ = tokens.features.shape
    fine = sum(height * width for height, width in tokens.spatial_shapes[:fine_levels])
    for index, layer in enumerate(layers):
        first = 0 if (index + 1) % block == 0 else fine
        places = torch.arange(first, S).expand(B, -1)
        tokens = dataclasses.replace(tokens, features=sparse_encoder([layer], tokens, places))
    return tokens.features


kind, detector = MODELS["lite_detr"]
plain_parts = {"key_aware": False, "small_ffn": False}
lite = detector(kind(**SMALL | {"encoder_layers": 4}, **plain_parts)).eval()
with torch.no_grad():
    start = lite.tokens(two)
    theirs, _ = lite.encode(start)
    torch.testing.assert_close(interleaved(lite.encoder.layers, start, 2), theirs.features)
    dense = lite.encoder(start).features
    torch.testing.assert_close(
        interleaved(lite.encoder.layers, start, 1), dense, atol=1e-5, rtol=1e-5
    )
print("blocks of two layers: as the library's; blocks of one layer: the dense encoder")

# %% [markdown]
# ## Exercise {{n}}.2  The schedule
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# How many token updates does an encoder make, compared with the dense one? Return the share. The very last
# layer must update all tokens, also where the last block is shorter than the others.


# %% tags=["exercise"]
def updates(sizes, layers, block, fine_levels):
    """sizes: tokens of each level, finest first. Returns updates, as a share of layers * S."""
    # BEGIN SOLUTION
    everyone, coarse = sum(sizes), sum(sizes[fine_levels:])
    whole = [(i + 1) % block == 0 or i + 1 == layers for i in range(layers)]
    done = sum(everyone if all_of_them else coarse for all_of_them in whole)
    return done / (layers * everyone)
    # END SOLUTION


check("fewer_tokens.2", updates)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A layer updates either all tokens or the coarse ones. Decide for each layer which it is, and add up.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Layer `i`, counted from 0, ends a block where `(i + 1) % block == 0`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A block ends where `(i + 1) % block == 0`. With `i % block == 0` and the rule for the last layer, one layer too
# many is whole. With several fine levels, the coarse tokens are `sizes[fine_levels:]`.
#
# </details>
#
# {{solution}}

# %% [markdown]
# One more saving: in the layers that update all tokens, the fine ones have a **small feed-forward part** of
# their own, as wide inside as outside. Now the number of parameters of Lite-DINO, which is Lite's encoder with
# DINO's queries and decoder, in two readings of the paper:

# %%
kind_dino, detector_dino = MODELS["lite_dino"]
readings = {
    "(2+1)x3 as six layers, three blocks": {},
    "(6+1)x1 as six layers, one block": {"block_layers": 6},
    "(2+1)x3 as nine layers": {"encoder_layers": 9, "block_layers": 3},
}
for name, options in readings.items():
    with torch.device("meta"):
        large = detector_dino(kind_dino(**options))
    print(f"{name:36}{sum(p.numel() for p in large.parameters()):>12,}")

# %% [markdown]
# The first two are the sizes of the authors' released configurations, which have six layers.
#
# What does the encoder cost?

# %%
for name, options in {
    "dense": {"block_layers": 1, "small_ffn": False, "key_aware": False},
    "blocks of two": {"small_ffn": False, "key_aware": False},
    "and small feed-forward": {"key_aware": False},
    "and key-aware weights": {},
}.items():
    with torch.device("meta"):
        large = detector(kind(**options))
    print(f"{name:24}{complexity(large, repeats=0).parts['encoder'] / 1e9:5.0f} G")

# %% [markdown]
# With blocks and small feed-forward parts the encoder costs less than half of the dense one. Key-aware weights
# cost a little extra. What are they good for?
#
# ## {{n}}.7 Weights that look at keys
#
# {{chapter deformable_attention}} asked where the keys went: deformable attention says how much each sample
# counts *before* it has seen any sample. Lite DETR's **key-aware deformable attention** takes the offsets as
# before, reads the samples, and then lets the products of the query with the samples decide, as in dense
# attention. Lite DETR uses it in the encoder and in the decoder's cross-attention.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two diagrams. Linear: the query passes a linear layer and a softmax to weights; samples give values; both meet in a sum. Key-aware: the samples also lead, as keys, in orange, to the box in which products with the query and a softmax make the weights."}}
draw.two_kinds_of_weights()

# %% [markdown]
# *Figure {{n}}.7. What to see: on the right the samples serve twice, as values (green) and as keys (orange).
# Where to sample is decided by the query alone in both.*
#
# By hand, for two levels, two heads and three points per level:

# %%
attention = KeyAwareAttention(embed_dim=16, num_levels=2, num_heads=2, num_points=3)
small = [(4, 5), (2, 3)]
memory, query, references = torch.randn(2, 26, 16), torch.randn(2, 7, 16), torch.rand(2, 7, 1, 2)
with torch.no_grad():
    value = attention.value_proj(memory).unflatten(-1, (2, 8))  # (B, S, M, D)
    where = attention.places(query, references, small)  # (B, Q, M, L, K, 2), as ever
    sampled = sample_levels(value, small, where)  # (B, Q, M, L, K, D)
    asked = attention.query_proj(query).view(2, 7, 2, 1, 1, 8)
    products = (asked * sampled).sum(-1) / 8**0.5
    weights = products.flatten(3).softmax(-1).view_as(products)  # over levels and points
    summed = (weights.unsqueeze(-1) * sampled).sum((3, 4)).flatten(2)
    expected = attention(query, references, memory, small)
    torch.testing.assert_close(attention.output_proj(summed), expected, atol=1e-5, rtol=1e-5)
print("sampled keys:", tuple(sampled.shape), "; as the library's")
full_size = 17_821 * 8 * 16 * 32 * 4  # tokens of 800 x 1066 pixels, M, L * K, D, bytes
print(f"in an encoder of full size: {full_size / 1e6:.0f} MB in each layer")

# %% [markdown]
# **Without the samples.** The tensor `sampled` is what makes the authors' code hungry for memory. The library
# does without it, by the trick of section {{n}}.2, with weights in place of tokens. What attention returns is linear in
# its weights, too. So **its derivative with respect to the weight of one sample, with the query as incoming gradient,
# is the product of the query with that sample**:

# %%
weights_in = torch.zeros_like(products, requires_grad=True)  # any weights: it is linear
returned = ms_deform_attn(value, small, where, weights_in)
(by_gradient,) = torch.autograd.grad(returned, weights_in, asked.flatten(2) / 8**0.5)
torch.testing.assert_close(by_gradient, products, atol=1e-5, rtol=1e-5)
in_library = sampled_products(asked.flatten(2) / 8**0.5, value, small, where)
torch.testing.assert_close(in_library, products, atol=1e-5, rtol=1e-5)
print("products of queries with samples, from the operator's backward pass")

# %% [markdown]
# ### A task with a known answer
#
# Does it matter that weights see keys? We make a task in which they must. A map has cells of random hues, and
# each cell carries a message of four numbers. A query stands on a cell, is given a hue, and wants the message
# of that one of the eight neighbours that has this hue (the folded cell makes maps and queries). Both kinds of
# attention get the eight neighbours as their points, fixed, and learn all the rest.


# %% tags=["hide-input"]
AROUND = torch.tensor([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)])


def hues(pictures=32, height=6, width=7, asked=9):
    """Queries (B, 9, 8), references, a map (B, HW, 8), the messages wanted, and details to draw."""
    hue = torch.rand(pictures, height * width)
    angle = 2 * torch.pi * hue.unsqueeze(-1)
    code = 2 * torch.cat([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], -1)
    cells = torch.cat([code, torch.randn(pictures, height * width, 4)], -1)
    column = torch.randint(1, width - 1, (pictures, asked))
    row = torch.randint(1, height - 1, (pictures, asked))
    x, y = AROUND[torch.randint(8, (pictures, asked))].unbind(-1)
    wanted = rows(cells, (row + y) * width + column + x)
    query = torch.cat([wanted[..., :4], torch.zeros_like(wanted[..., 4:])], -1)
    centre = torch.stack([(column + 0.5) / width, (row + 0.5) / height], -1)
    return query, centre.unsqueeze(2), cells, wanted[..., 4:], (hue, row, column)


# %%
torch.manual_seed(1)
kinds = {"linear": MSDeformAttn, "key-aware": KeyAwareAttention}
trained, errors = {}, {}
for name, attention_kind in kinds.items():
    module, head = attention_kind(8, 1, 1, 8), nn.Linear(8, 4)
    module.sampling_offsets.bias.data.copy_(AROUND.flatten())
    module.sampling_offsets.requires_grad_(False)
    learned = [p for p in (*module.parameters(), *head.parameters()) if p.requires_grad]
    optimiser = torch.optim.Adam(learned, 5e-3)
    for _ in range(600):
        query, centre, cells, message, _ = hues()
        loss = (head(module(query, centre, cells, [(6, 7)])) - message).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained[name], errors[name] = module, loss.item()
    print(f"{name:10} squared error {loss.item():.1f} (an answer of 0 has 1.0)")
assert errors["key-aware"] < 0.4 < 0.8 < errors["linear"]

# %% tags=["hide-input"] mystnb={"image": {"alt": "Twice the same map of coloured cells. In the middle a framed cell with a question mark in the hue that is asked for; on its eight neighbours white discs, larger for larger weights. Left, linear: eight discs of similar size. Right, key-aware: one large disc on the neighbour of that hue, the others tiny."}}
torch.manual_seed(4)
query, centre, cells, _, (hue, row, column) = hues(1)
with torch.no_grad():
    linear = trained["linear"].sampling(query, centre, [(6, 7)]).weights.flatten(2)
    aware = trained["key-aware"]
    asked = aware.query_proj(query) / 8**0.5
    where = aware.places(query, centre, [(6, 7)])
    keys = aware.value_proj(cells).unsqueeze(2)
    aware = sampled_products(asked, keys, [(6, 7)], where).flatten(2).softmax(-1)
one = int(aware[0].amax(-1).argmax())
angle = torch.atan2(query[0, one, 1], query[0, one, 0]).item() / (2 * torch.pi) % 1
place = int(row[0, one]), int(column[0, one])
draw.neighbours(
    hue.view(6, 7), place, angle, {"linear": linear[0, one], "key-aware": aware[0, one]}
)

# %% [markdown]
# *Figure {{n}}.8. What to see: the query (framed; of nine, the one whose weights are sharpest) asks for the
# message of the neighbour of its hue. Linear weights (left) cannot know which neighbour that is, so they
# spread. Key-aware weights (right) go to it.*
#
# This task was made for keys. In a trained detector things are less clear, since there the query has itself
# seen its surroundings. The README of the authors' repository says that switching key-awareness off changes
# little.
#
# ## Exercise {{n}}.3  Key-aware weights
#
# *difficulty ●●● · 30 minutes · 6 lines*
#
# Write the weights without ever making a tensor of samples. `ms_deform_attn(value, shapes, places, weights)` is
# all that you need, and `torch.autograd.grad`. The function is worth keeping: it gives any model with this
# operator weights that look at keys. A sample outside the map is a key of zeros, and takes part in the softmax.


# %% tags=["exercise"]
def key_aware_weights(asked, value, shapes, places):
    """asked: (B, Q, M, D). value: (B, S, M, D). places: (B, Q, M, L, K, 2).

    Returns (B, Q, M, L, K): the softmax over L and K of products with the samples, over root D.
    """
    # BEGIN SOLUTION
    weights = torch.zeros(places.shape[:-1], requires_grad=True)
    result = ms_deform_attn(value, shapes, places, weights)
    incoming = asked.flatten(2) / value.shape[-1] ** 0.5
    (products,) = torch.autograd.grad(result, weights, incoming)
    softmax = products.flatten(3).softmax(-1)
    return softmax.view_as(products)
    # END SOLUTION


check("fewer_tokens.3", key_aware_weights)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The operator's result is linear in `weights`. Its derivative by one weight is the sample itself, so with the
# query as incoming gradient it is their product.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.autograd.grad(result, weights, asked.flatten(2))`, where `result` is (B, Q, M · D). Divide by
# $\sqrt D$, not by $\sqrt C$.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has one level. With several, one softmax goes over all levels and points together: flatten the
# last two axes first.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.8 What it costs in AP
#
# As in {{chapter groups_and_queries}}: 300 steps on the digits, the same pictures, seeds and learning rates for all,
# nothing tuned (`python experiments/members.py`, not run here). These detectors have two levels and two layers
# in the encoder. Sparse DETR has $\rho = 0.3$, Lite DETR one block, whose first layer leaves the fine tokens
# alone. We compare both with Deformable DETR in two stages, and Lite-DINO with DINO ({{chapter denoising}}).


# %% tags=["hide-input"]
def finished(study):
    """The rows of a study's finished trainings."""
    with Path(f"../data/results/{study}.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["status"] == "done"]


STUDIES = ("members", "sparse", "member_costs", "member_rates", "tuned_members", "as_long")
RATES = ("0.0005", "0.001", "0.002")
tables = {study: finished(study) for study in STUDIES}


def values(name, metric, split="test", at="300", study="members"):
    """Of each seed."""
    wanted = (name, split, metric, at)
    columns = ("configuration", "split", "metric", "at")
    found = [row for row in tables[study] if tuple(row[c] for c in columns) == wanted]
    return [float(row["value"]) for row in found]


def judged(ours, theirs, sign=1):
    """What the seeds of both show; sign: -1 where less is better."""
    pair = [[sign * value for value in each] for each in (ours, theirs)]
    return verdict(*pair) if min(map(len, pair)) > 1 else "too few trainings to say"


def compare(ours, base, metric="ap", split="test", sign=1):
    """Two members."""
    return judged(*(values(name, metric, split) for name in (ours, base)), sign)


def spent(name, metric, split="inference", at="1"):
    """By a step of training on 8 pictures, or an inference of one."""
    return values(name, metric, split, at, "member_costs")[0]


# %% tags=["hide-input"]
BASE = "Deformable DETR, two stages"
PAIRS = {"Sparse DETR": BASE, "Lite DETR": BASE, "Lite-DINO": "DINO"}
cost = {name: spent(name, "multiply_adds") / 1e6 for name in (BASE, *PAIRS, "DINO")}
for name, count in cost.items():
    print(f"{name:28}{count:4.0f} M multiply-adds, AP {interval(values(name, 'ap'))}")
for ours, base in PAIRS.items():
    print(f"{ours} against {base}: {compare(ours, base)}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "AP on test over multiply-adds per picture for Deformable DETR in two stages, Sparse DETR, Lite DETR, DINO and Lite-DINO. Dots are seeds, vertical bars intervals of the mean."}}
seeds_and_costs(
    {name: (values(name, "ap"), count) for name, count in cost.items()},
    "M multiply-adds per picture, at inference",
)

# %% [markdown]
# *Figure {{n}}.9. What to see: AP over the cost of inference; one dot per seed, a bar for the interval of the
# mean. Better is up and to the left. (Where costs are nearly equal, bars are moved apart to be told from each other.)*
#
# Do small objects suffer, whose tokens are the fine ones?

# %% tags=["hide-input"]
for ours, base in PAIRS.items():
    for size in ("small", "large"):
        means = [interval(values(name, f"ap_{size}")).mean for name in (ours, base)]
        print(f"{ours:12}{size:6}{means[0]:.3f} against {means[1]:.3f}: ", end="")
        print(compare(ours, base, f"ap_{size}"))

# %% [markdown]
# And do key-aware weights go to fewer samples, as in the task above? A token of the encoder's last layer has 8
# samples. We measure over how many of them it spreads its weights (the exponential of their entropy; "better" means fewer):

# %% tags=["hide-input"]
for ours, base in (("Lite DETR", BASE), ("Lite-DINO", "DINO")):
    asked_for = "encoder_effective_keys", "val"
    means = [interval(values(name, *asked_for)).mean for name in (ours, base)]
    print(f"{ours:12}{means[0]:.1f} against {means[1]:.1f}: ", end="")
    print(compare(ours, base, *asked_for, sign=-1))

# %% [markdown]
# Three hundred steps show which detector learns faster at the beginning, not which is better in the end. And two levels with
# two layers leave little to save: at full size the encoder has six layers and half of all work.
#
# ### AP by the share of updated tokens
#
# Section {{n}}.5 counted what a smaller share $\rho$ saves. What does it cost in AP, if the detector is trained with it
# (`python experiments/sparse.py`)? At $\rho = 1$ the encoder is the dense one, with a scorer that decides nothing. All
# else is the same, so here the share alone differs. (Not so above: there the base has other queries and another first
# stage, so part of that difference can be theirs.) Beside AP we put what is spent (`python
# experiments/member_costs.py`, one core): by an inference of one picture, and by a step of training on eight.

# %% tags=["hide-input"]
NAMES = {1.0: "rho 1", 0.5: "rho 0.5", 0.3: "rho 0.3", 0.1: "rho 0.1"}
KNOWN = NAMES | {0.3: "Sparse DETR"}  # in the table of costs
by_share = {rho: values(name, "ap", study="sparse") for rho, name in NAMES.items()}
PARTS = {
    "inference, multiply-adds": ("multiply_adds", "inference", "1"),
    "inference, time": ("milliseconds", "inference", "1"),
    "step, time": ("milliseconds", "step", "8"),
    "step, memory": ("peak_bytes", "step", "8"),
}
spent_on = {part: [spent(KNOWN[rho], *of) for rho in RHOS] for part, of in PARTS.items()}
for rho, found in by_share.items():
    print(f"rho {rho}: AP {interval(found) if len(found) > 1 else found or 'not finished'}", end="")
    print(f"; against rho 1: {judged(found, by_share[1.0])}" if rho < 1 else "")
print("spent at rho 0.1, of that at rho 1:")
for part, each in spent_on.items():
    print(f"    {part:26}{each[-1] / each[0]:.0%}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels over the share rho from 0.1 to 1. Left, AP on test: a dot per seed and a bar for the interval of the mean. Right, what is spent, as a part of that at rho 1: multiply-adds and memory fall to about three quarters at a tenth, times fall less."}}
draw.trained_by_share(by_share, spent_on)

# %% [markdown]
# *Figure {{n}}.10. What to see: left, AP after 300 steps, one dot per seed, a bar for the interval of the mean. Right,
# what is spent, dense = 1; far above the dotted line of proportion at ρ = 0.1.*
#
# ### The family at equal multiply-adds
#
# Equal images are not equal work. Noised objects ({{chapter denoising}}) and groups ({{chapter groups_and_queries}}) make
# a step of training more expensive, and the encoders of this chapter make it cheaper. What does each member of the family spend?

# %% tags=["hide-input"]
FAMILY = dict.fromkeys(row["configuration"] for row in tables["members"])
UNITS = {"multiply_adds": 1e6, "milliseconds": 1, "peak_bytes": 2**20}
print(f"{'':28}step: M     ms    MiB   inference: M     ms   MiB")
for name in FAMILY:
    step = [spent(name, metric, "step", "8") / unit for metric, unit in UNITS.items()]
    once = [spent(name, metric) / unit for metric, unit in UNITS.items()]
    print(f"{name:28}{step[0]:7.0f}{step[1]:7.0f}{step[2]:7.0f}", end="")
    print(f"{once[0]:15.0f}{once[1]:7.1f}{once[2]:6.1f}")

# %% [markdown]
# (M: million multiply-adds per picture. A step is on eight pictures, with its backward pass.) Groups make the most expensive
# step, and at inference they cost nothing. Sparse DETR and Lite DETR save nearly a fifth of the multiply-adds, and on
# these small pictures no time: choosing, gathering and writing back tokens take time but no multiply-adds, and key-aware
# weights run the operator once more.
#
# Now equal work. For as many multiply-adds as 300 steps of a member, how many steps could the two-stage base make, and
# what would it reach? This is read, seed by seed, between trainings of the base of 225, 300, 375 and 450 steps, each
# with a learning rate that ends at 0 (`python experiments/lengths.py`, then `equal_cost.py`).

# %% tags=["hide-input"]
equal = json.loads(Path("../data/results/equal_cost.json").read_text())["members"]
for name in FAMILY:
    if name != BASE:
        print(f"{name}: against {equal[name]['steps of the base']:.0f} steps of the base")
        print(f"    equal images:        {compare(name, BASE)}")
        found = equal[name]["ap"]["verdict"] if "ap" in equal[name] else "too few trainings to say"
        print(f"    equal multiply-adds: {found}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "A row for each member of the family: in blue the interval of its AP after 300 steps, in grey that of the base after as many multiply-adds. A dotted line marks the base after 300 steps. Grey marks lie to the right of the line for Group DETR, DINO and DN-DETR, whose steps are more expensive, and to its left for Sparse DETR and Lite DETR."}}
draw.at_equal_cost({name: equal[name] for name in FAMILY if name != BASE}, values(BASE, "ap"))

# %% [markdown]
# *Figure {{n}}.11. What to see: AP of a member after 300 steps (blue), and of the base after as many multiply-adds
# (grey; its steps in brackets), with 95 % intervals. Dotted: the base after 300 steps, its mean. A member with expensive
# steps has a harder opponent here than at equal images, and one with cheap steps an easier one.*
#
# ### Each member with a rate of its own
#
# All members used one learning rate so far, 0.001. Half of it and twice of it were tried for each, with one seed, and
# judged by AP without classes on val (`python experiments/member_rates.py`). With the best of the three, each was trained
# again with three seeds, the base too (`python experiments/tuned_members.py`):

# %% tags=["hide-input"]
tuned = {name: values(name, "ap", study="tuned_members") for name in FAMILY}
for name, found in tuned.items():
    tried = {r: values(f"{name}, {r}", "object_ap", "val", study="member_rates") for r in RATES}
    best = max(RATES, key=lambda rate: tried[rate] or [0])
    print(f"{name:28} rate {best}: AP {interval(found) if len(found) > 1 else 'not finished'}")
    if name != BASE:
        print(f"{'':28} against the base: {judged(found, tuned[BASE])}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "A row for each member of the family: in grey the interval of its AP with the common learning rate, in blue with its own. A dotted line marks the base with its own. Blue lies to the right of grey in every row; that of Efficient DETR alone lies to the right of the line."}}
draw.tuned({name: (values(name, "ap"), tuned[name]) for name in FAMILY}, BASE)

# %% [markdown]
# *Figure {{n}}.12. What to see: AP on test of each member with the common learning rate (grey) and with its own (blue), means
# and 95 % intervals. Dotted: the base with its own, its mean.*
#
# A comparison at one rate is one of rates too: all want more than 0.001, and with its own rate Efficient DETR is better
# than the base, and Sparse DETR and Lite DETR no longer worse. The best rate is the largest that was tried. A
# larger one might be better still, and all of this is about 300 steps. Does Efficient DETR stay ahead? It was trained
# once for as many epochs as the digits' detector in its first round (`python experiments/as_long.py`):

# %% tags=["hide-input"]
rounds = json.loads(Path("../data/results/digits_training.json").read_text())["runs"]
seeds = [run for run in rounds if run["round"] == 0]
(long,) = values("Efficient DETR", "ap", at=str(seeds[0]["epochs"]), study="as_long")
print(f"AP on test after {seeds[0]['epochs']} epochs: Efficient DETR {long:.3f},", end=" ")
print("the base", " and ".join(f"{run['test']['ap']:.3f}" for run in seeds))

# %% [markdown]
# It ends no further ahead than the two seeds of the base are apart, with three encoder layers and one decoder layer against
# two and three.
#
# ### Beside the papers' figures
#
# | on COCO, ResNet-50 | AP | G, all | G, encoder |
# |:--|:--|:--|:--|
# | Sparse DETR's dense counterpart (its queries, its first stage) | 46.0 | 177 | |
# | Sparse DETR, ρ = 0.1 / 0.3 / 0.5 | 45.3 / 46.0 / 46.3 | 105 / 121 / 136 | |
# | Deformable DETR in Lite DETR's recipe | 46.8 | 177 | 90 |
# | Lite-Deformable, H3L1-(2+1)x3 | 46.7 | 123 | 39 |
# | DINO, 36 epochs | 50.9 | | |
# | Lite-DINO, H2L2-(2+1)x3 / H3L1-(6+1)x1 / H3L1-(2+1)x3 | 49.9 / 50.2 / 50.4 | | |
#
# Sources: {cite}`roh2022sparse` and {cite}`li2023lite`, with their repositories; G counts multiply-adds.
# Neither detector aims at a higher AP. By these tables they are about as good as their counterparts, at about two
# thirds of the work. Lite DETR's authors make no claim of speed on real hardware: their key-aware attention has no
# kernel of its own.
#
# ## Summary
#
# - Most tokens are background. How much the decoder reads of each is a derivative, which the operator's
#   backward pass computes.
# - Sparse DETR's scorer learns to guess what will be read, by cross-entropy; the choice passes no gradient.
# - The encoder updates a share ρ and looks at all: ρ = 1 is the dense encoder, and the values' projection is
#   never saved.
# - Lite DETR updates fine tokens once per block, with a small feed-forward part: half of the encoder's
#   multiply-adds.
# - Key-aware weights compare the query with its samples. They answer what linear weights cannot; the products
#   need no tensor of samples.
#
# > **Differs from the paper.** Sparse DETR's paper calls the target a map of the decoder's attention; it does not say
# > how a sample between tokens is shared out among them (the half cell). Lite DETR's (A+1)xB is read as A layers per block, as the
# > released models have it.
# >
# > **Differs from the official code.** Sparse DETR's target is drawn half a cell to the right and below there,
# > and padding is counted in the scorer's mean; both are options here (`half_cell`, `scored_padding`). Lite
# > DETR's code runs only if an option is set that no configuration has (`key_aware`), and builds the tensor of all
# > samples.
#
# ## Further reading
#
# - {cite}`roh2022sparse`: the map of the decoder's attention, and what else was tried as a target.
# - {cite}`li2023lite`: how the tokens are spread over the levels, and which of them matter.
# - {cite}`yao2021efficient`: the queries that Sparse DETR took over.
# - {cite}`zhao2024rtdetr`: another answer, an encoder that attends on the coarsest map only.
