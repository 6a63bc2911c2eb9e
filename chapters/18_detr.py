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
# # {{n}}. DETR, and why it is slow
#
# You will be able to
# - **build** DETR from parts that you know, and show that it equals the library's,
# - **compute** its class loss, in which "no object" is a class of its own with a small weight,
# - **measure** at the start of training how widely attention and its gradient spread,
# - **watch** how DETR's queries move in the first steps of training, and how often their objects change,
# - **tell** which explanations of its slow start were measured here, and which were not.
#
# You should know: {{chapter attention}}, {{chapter pixels_to_boxes}} and {{chapter matching_and_loss}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Deformable DETR was made to solve a problem, and this chapter is about the problem. DETR {cite}`carion2020detr` was
# the first detector made of nothing but a backbone, a transformer and a matching, and it needed 500 epochs on COCO to
# become as good as the detectors of its time. Before we can judge whether deformable attention helps, we need DETR
# itself. So we build it, check that it is right, and then look for the reasons of its slow start. The next chapter,
# {{chapter ten_times_faster}}, measures how much faster Deformable DETR learns.

# %% tags=["hide-input"] mystnb={"image": {"alt": "DETR as a row of blocks. Image, backbone, one map at stride 32, tokens with place codes, an encoder in which every token looks at every token, and a decoder in which 100 learned queries look at each other and at every token. After each decoder layer the same two heads give 92 logits and a box, each with a loss. Four red notes say where Deformable DETR differs: several maps, a few samples, reference points, sigmoids."}}
import matplotlib.pyplot as plt
from schematics import detr as draw

plt.style.use("book.mplstyle")
draw.the_whole()

# %% [markdown]
# *Figure {{n}}.1. What to see: DETR from left to right, in the sizes of the paper. The four red notes say what
# Deformable DETR has instead. Everything else you have met in earlier chapters.*

# %% tags=["hide-input"]
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import generalized_box_iou_loss

from deformable_detr import Batch, DeformAttn
from deformable_detr.backbones import build_backbone
from deformable_detr.boxes import cxcywh_to_xyxy
from deformable_detr.data.coco import CocoDataset, collate, find_split
from deformable_detr.evaluation.intervals import interval
from deformable_detr.exercises import check
from deformable_detr.layers.feed_forward import FeedForward
from deformable_detr.layers.position import SinePositionEncoding, sine_embedding
from deformable_detr.look.attention import record_attention
from deformable_detr.look.sampling import record_sampling
from deformable_detr.losses.criterion import SetCriterion
from deformable_detr.losses.matcher import HungarianMatcher
from deformable_detr.losses.scoring import SoftmaxScoring
from deformable_detr.models import DETR, MODELS, DETRConfig
from deformable_detr.models.heads import BoxHead
from deformable_detr.training.optimiser import parameter_groups
from deformable_detr.training.recipe import load_recipe

_ = torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## {{n}}.1 DETR in sixty lines
#
# An encoder layer lets every token look at every token. The place codes are added to what becomes queries and keys,
# but not to the values ({{chapter attention}}). `FeedForward` is the second half of every layer, with its norm; you
# built it in {{chapter pixels_to_boxes}}.


# %%
class EncoderLayer(nn.Module):
    """Every token looks at every token."""

    def __init__(self, C, heads, ffn):
        super().__init__()
        self.attention = nn.MultiheadAttention(C, heads, batch_first=True)
        self.norm, self.ffn = nn.LayerNorm(C), FeedForward(C, ffn, dropout=0)

    def forward(self, x, place, padding):
        """x, place: (B, S, C). padding: (B, S), True on padding. Returns (B, S, C)."""
        update, _ = self.attention(x + place, x + place, x, key_padding_mask=padding)
        return self.ffn(self.norm(x + update))


# %% [markdown]
# A decoder layer does this twice: the queries look at each other, then at all tokens. A query consists of
# **content**, which starts at zero and is what the layers update, and of a learned **position** that never changes
# within an image. The position is all that distinguishes one query from another.


# %%
class DecoderLayer(nn.Module):
    """Queries look at each other, then at every token."""

    def __init__(self, C, heads, ffn):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(C, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(C, heads, batch_first=True)
        self.self_norm, self.cross_norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.ffn = FeedForward(C, ffn, dropout=0)

    def forward(self, content, position, memory, place, padding):
        """content, position: (B, Q, C). memory, place: (B, S, C). Returns (B, Q, C)."""
        located = content + position
        update, _ = self.self_attention(located, located, content)
        content = self.self_norm(content + update)
        update, _ = self.cross_attention(
            content + position, memory + place, memory, key_padding_mask=padding
        )
        return self.ffn(self.cross_norm(content + update))


# %% [markdown]
# Around these layers, DETR has a backbone of which only the last map is used, a 1 x 1 convolution to $C$ channels,
# and two heads. The heads are the same for all decoder layers, and they see a layer's content through one more norm.
# A box is the sigmoid of what the box head says. **There is no reference point to start from.**


# %%
class MyDETR(nn.Module):
    """DETR; defaults as in the paper's base model, for COCO."""

    def __init__(
        self, backbone="resnet50", C=256, heads=8, ffn=2048, layers=(6, 6), Q=100, classes=91
    ):
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], C, 1)
        self.place = SinePositionEncoding(C // 2, centre=1.0)
        self.encoder = nn.ModuleList(EncoderLayer(C, heads, ffn) for _ in range(layers[0]))
        self.decoder = nn.ModuleList(DecoderLayer(C, heads, ffn) for _ in range(layers[1]))
        self.decoder_norm = nn.LayerNorm(C)
        self.query_embed = nn.Embedding(Q, C)
        self.class_head = nn.Linear(C, classes + 1)  # the last one is "no object"
        self.box_head = BoxHead(C)

    def forward(self, images, mask):
        """images: (B, 3, H, W). mask: (B, H, W), True on padding. A list of (logits, boxes)."""
        x = self.input_proj(self.backbone(images)[-1])
        mask = F.interpolate(mask[None].float(), x.shape[-2:])[0].bool()
        place, padding = self.place(mask).flatten(2).transpose(1, 2), mask.flatten(1)
        memory = x.flatten(2).transpose(1, 2)  # (B, S, C)
        for layer in self.encoder:
            memory = layer(memory, place, padding)
        position = self.query_embed.weight.expand(len(images), -1, -1)
        content, found = torch.zeros_like(position), []
        for layer in self.decoder:
            content = layer(content, position, memory, place, padding)
            seen = self.decoder_norm(content)
            found.append((self.class_head(seen), self.box_head(seen).sigmoid()))
        return found


# %% [markdown]
# Is it DETR? The library's tests compare its `DETR` with Hugging Face's, weights and outputs. So it is enough to
# compare ours with the library's. We give ours the library's weights, under our shorter names, and two images of
# different sizes, so that there is padding.

# %%
small = DETRConfig(
    num_classes=10, num_queries=7, backbone="small", embed_dim=32, num_heads=4, ffn_dim=48,
    encoder_layers=2, decoder_layers=3, dropout=0.0,
)  # fmt: skip
theirs = DETR(small).eval()
mine = MyDETR("small", C=32, heads=4, ffn=48, layers=(2, 3), Q=7, classes=10).eval()
RENAMED = {"encoder.layers": "encoder", "decoder.layers": "decoder", "decoder.norm": "decoder_norm"}
RENAMED |= {"neck.": "", "class_heads.0": "class_head", "box_heads.0": "box_head"}


def renamed(name):
    """The library's name of a parameter as ours."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


mine.load_state_dict({renamed(name): value for name, value in theirs.state_dict().items()})
batch = Batch.from_images([torch.randn(3, 96, 128), torch.randn(3, 64, 160)])
with torch.no_grad():
    output, found = theirs(batch), mine(batch.images, batch.mask)
for layer, (logits, boxes) in zip([*output.auxiliary, output], found, strict=True):
    torch.testing.assert_close(logits, layer.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(boxes, layer.boxes, atol=1e-5, rtol=1e-5)
print(
    len(found), "decoder layers, logits", tuple(logits.shape), "and boxes: equal to the library's"
)

# %% [markdown]
# And in full size? The official model of the paper has 41,524,768 parameters. (On torch's device "meta" tensors have
# shapes but no memory, so counting is free.)

# %%
with torch.device("meta"):
    full = MyDETR()
    assert sum(p.numel() for p in DETR(DETRConfig()).parameters()) == 41_524_768
parts = {name: sum(p.numel() for p in part.parameters()) for name, part in full.named_children()}
for name, count in parts.items():
    print(f"{name:13} {count:>11,}" if count else "", end="\n" if count else "")
print(f"{'in all':13} {sum(parts.values()):>11,}")
assert sum(parts.values()) == 41_524_768

# %% [markdown]
# The backbone holds more than half of the parameters, the 100 queries only 25,600.
#
# ## {{n}}.2 No object is a class
#
# DETR reads its logits with one softmax over all classes and a last one, "no object". Most queries of an image must
# answer with it: with 100 queries and seven objects, 93. If all counted alike, these 93 would outweigh the seven, so
# their loss has the weight 0.1. (Deformable DETR has a sigmoid per class instead, and the focal loss,
# {{chapter matching_and_loss}}.)

# %%
Q, objects, weight = 100, 7, 0.1
print(
    f"weights: objects {objects * 1.0:.1f}, no object {(Q - objects) * weight:.1f}, not {Q - objects}"
)
scores = torch.tensor([2.0, -1.0, 0.5, 3.0]).softmax(0)  # three classes and, last, no object
print(
    "detection's score:",
    round(scores[:-1].max().item(), 3),
    "of class",
    scores[:-1].argmax().item(),
)

# %% [markdown]
# A detection's score is the probability of the best *real* class, so the last one is dropped before the maximum is
# taken. Here the query would rather say "no object", and its detection has a low score.
#
# ## Exercise {{n}}.1  DETR's class loss
#
# *difficulty ●●○ · 12 minutes · 7 lines*
#
# The loss is the cross-entropy of every query, weighted by the class that it should have, and divided by **the sum of
# the weights**, not by the number of queries. Where `labels` is -1 the query should say "no object", which is the
# last logit. (`F.cross_entropy` with `reduction="none"` gives each query's own loss.)


# %% tags=["exercise"]
def class_loss(logits, labels, no_object=0.1):
    """logits: (B, Q, classes + 1). labels: (B, Q), -1 where there is no object. Returns a number."""
    # BEGIN SOLUTION
    nothing = logits.shape[-1] - 1
    empty = labels < 0
    wanted = labels.masked_fill(empty, nothing)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    weights = torch.ones_like(loss)
    weights[empty.flatten()] = no_object
    return (weights * loss).sum() / weights.sum()
    # END SOLUTION


check("detr.1", class_loss)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Replace -1 by the index of the last logit, compute each query's cross-entropy, then the weighted mean.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `logits.flatten(0, 1)` is (B * Q, classes + 1), as `F.cross_entropy` wants it. The weights are 1, and `no_object`
# where `labels < 0`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The first check has only queries with objects, whose weights are all 1. With others, the divisor matters: it is the
# sum of the weights. A plain mean over queries is several times smaller. Deformable DETR divides all three terms of
# its loss by the number of boxes; DETR does so for the two terms of the boxes only.
#
# </details>
#
# {{solution}}

# %% [markdown]
# The whole loss has three terms, as in Deformable DETR: class, L1 with weight 5, GIoU with weight 2. It is
# computed after **every** decoder layer, with a matching of its own; DETR calls the earlier layers' terms auxiliary
# losses. By hand, next to the library's criterion:

# %%
data = find_split(Path("../data/digits"), "val")
recipe = load_recipe("digits-detr")
val = CocoDataset(*data, recipe.eval_transform())
batch = collate([val[i] for i in range(32)])
with torch.no_grad():
    output = DETR(small).eval()(batch)
number = sum(len(target.labels) for target in batch.targets)
total, scoring = 0.0, SoftmaxScoring()
for layer in [*output.auxiliary, output]:
    matches = HungarianMatcher()(layer, batch.targets, scoring)
    labels = torch.full(layer.boxes.shape[:2], -1)
    for i, ((queries, objects), target) in enumerate(zip(matches, batch.targets, strict=True)):
        labels[i, queries] = target.labels[objects]
        boxes, wanted = layer.boxes[i, queries], target.boxes[objects]
        total += 5 * (boxes - wanted).abs().sum() / number
        corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted)
        total += 2 * generalized_box_iou_loss(*corners, reduction="sum") / number
    total += scoring.loss(layer.logits, labels, number)
theirs = sum(SetCriterion()(output, batch.targets).values())
torch.testing.assert_close(total, theirs, atol=1e-3, rtol=1e-4)
print(f"by hand {total:.3f}, the library's {theirs:.3f}")

# %% [markdown]
# ## {{n}}.3 How slow?
#
# On COCO, as the README of the official repository of {cite}`zhu2021deformable` reports, DETR reaches an AP of 42.0
# in 500 epochs. Its finer variant DETR-DC5 (stride 16) reaches 43.3 in 500 epochs and 35.3 in 50. Deformable DETR
# reaches 44.5 in 50. So DETR gets there in the end: it is slow, not weak.
#
# We compare two small detectors on small pictures. Both of our detectors use **one** map, at stride 16,
# which for a picture of 128 pixels is 8 x 8 tokens. Both have 30 learned queries, 2 + 3 layers of width 64 and the same
# pretrained backbone. Neither refines boxes or has two stages. They differ in three of the four red notes of Figure
# {{n}}.1, all but the maps: attention, reference points, and what the heads say. We call them *DETR* and
# *one map*, because the Deformable DETR of other chapters reads several maps.


# %%
ONE_MAP = ("model.num_levels=1", "model.refine=false", "model.two_stage=false")
RECIPES = {"DETR": recipe, "one map": load_recipe("digits").changed(ONE_MAP)}
BACKBONE = load_file("../data/checkpoints/digits_backbone.safetensors")


def build(name, seed=0):
    """A new detector with the pretrained backbone."""
    torch.manual_seed(seed)
    settings = RECIPES[name].model
    _, model = MODELS[settings.get("name", "deformable_detr")]
    model = model(RECIPES[name].model_config(num_classes=10))
    model.backbone.load_state_dict(BACKBONE)
    return model


for name in RECIPES:
    print(f"{name:8} {sum(p.numel() for p in build(name).parameters()):,} parameters")

# %% [markdown]
# Three explanations have been given for the slow start. We look at them one by one.
#
# ## {{n}}.4 Explanation one: attention starts everywhere
#
# This is the explanation of the Deformable DETR paper (section 3). Before training, scores are small random numbers, so
# each of $N_k$ keys gets a weight of about $1/N_k$. {{chapter attention}} showed what follows: the gradient that should
# tell one key from the others is spread over all of them, and falls as $N_k$ grows.
#
# How do we say how widely weights are spread, in one number? Take the entropy $H$ of the weights. Then $e^H$ is the number of
# keys that, weighted equally, would be spread as widely. We call it the **effective keys**: $N_k$ when all weights are
# equal, 1 when one key has all of it.
#
# ## Exercise {{n}}.2  Effective keys
#
# *difficulty ●○○ · 8 minutes · 3 lines*
#
# Compute $e^H$ with $H = -\sum_k A_k \ln A_k$ for each head and query, and return the mean of these over heads, queries
# and images. Padded keys have a weight of exactly 0, and $0 \cdot \ln 0$ counts as 0.


# %% tags=["exercise"]
def effective_keys(weights):
    """weights: (B, M, Q, S), which sum to 1 over the last axis. Returns a number from 1 to S."""
    # BEGIN SOLUTION
    logarithms = weights.clamp(min=1e-30).log()
    entropy = -(weights * logarithms).sum(-1)
    return entropy.exp().mean()
    # END SOLUTION


check("detr.2", effective_keys)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `torch.log(0)` is minus infinity, and 0 times that is not a number. Clamp before the logarithm.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Sum over the keys, then the exponential of each query's entropy, then the mean.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The order of the last two steps. The exponential of the mean entropy is not the mean of the exponentials.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Before you run: an untrained DETR looks at a picture of 64 tokens. How many effective keys has a query of the decoder?
# And how many samples has one of the deformable detector, with four points per head?


# %%
def looked(model, batch):
    """The weights of the decoder's last cross-attention, (B, M, Q, S) or (B, M, Q, K)."""
    with torch.no_grad():
        if isinstance(model, DETR):
            with record_attention(model) as record:
                model(batch)
            return record[f"decoder.layers.{len(model.decoder.layers) - 1}.cross_attention"].weights
        with record_sampling(model) as record:
            model(batch)
        return record.decoder[-1].weights.flatten(-2).transpose(1, 2)


for name in RECIPES:
    weights = looked(build(name).eval(), batch)
    entropy = torch.special.entr(weights).sum(-1)
    print(f"{name:8} {entropy.exp().mean():5.1f} effective keys of {weights.shape[-1]}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "The running example, a green seven on wood, twice. Left, with an 8 by 8 grid whose cells are all about equally tinted: one query's attention in the untrained DETR. Right, four orange dots in a row beside a blue cross: one query's samples in the untrained deformable detector."}}
samples = CocoDataset(
    "../data/samples", "../data/samples/annotations.json", recipe.eval_transform()
)
seven = collate([samples[9]])
dense = looked(build("DETR").eval(), seven)[0, 0, 0]
model = build("one map").eval()
with torch.no_grad(), record_sampling(model) as record:
    place = model(seven).references[0, 0]
points = record.decoder[-1].locations[0, 0, 0, 0]
draw.one_query_of_each(dense.view(8, 8), points, place)

# %% [markdown]
# *Figure {{n}}.2. What to see: where one head of one query of an untrained decoder looks. DETR's looks at all 64
# cells (left; the darker the tint, the larger the weight). No cell stands out: an even share would be 1/64 =
# 0.016. The deformable one has a place (right, blue cross) and looks at four points beside it.*
#
# A study measured this for five seeds and three sizes of picture (`python experiments/initialisation.py`, on images of
# noise). It also took the gradient of one token's output of the encoder's first layer, with respect to all tokens that
# enter the layer. The size of the gradient at each token, divided by the sum of the sizes, is a weight too. So $e^H$
# says over how many tokens the gradient is spread.


# %%
def read(name):
    """The finished rows of a study's table."""
    with open(f"../data/results/{name}.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "done"]
    return [row | {"at": int(row["at"]), "value": float(row["value"])} for row in rows]


start = read("initialisation")


def at_start(configuration, metric, side):
    """The values of all seeds."""
    wanted = configuration, metric, side
    return [r["value"] for r in start if (r["configuration"], r["metric"], r["at"]) == wanted]


for side in (128, 256, 512):
    tokens = at_start("dense", "tokens", side)[0]
    print(f"{side} pixels, {tokens:.0f} tokens")
    for metric in ("encoder_effective_keys", "decoder_effective_keys", "encoder_gradient_tokens"):
        pair = [interval(at_start(c, metric, side)) for c in ("dense", "deformable, one map")]
        print(f"  {metric:24} dense {pair[0].mean:6.1f}, deformable {pair[1].mean:4.1f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, both axes logarithmic, over 64, 256 and 1,024 tokens. Left, effective keys in the decoder: dense attention lies on the diagonal, nearly at the number of tokens; deformable attention stays at 4. Right, tokens that the gradient reaches: dense again on the diagonal, deformable flat between 10 and 15. Each has five dots, one per seed, nearly on top of each other."}}
draw.at_the_start(start)

# %% [markdown]
# *Figure {{n}}.3. What to see: one dot per seed. Dense attention and its gradient are spread over nearly all tokens,
# however many there are (dashed: all of them). Deformable attention has 4 samples for any size of picture. Its gradient
# reaches a few more tokens than that, since a sample blends up to four cells and there are four heads.*

# %% tags=["hide-input"]
for side in (128, 256, 512):
    tokens = at_start("dense", "tokens", side)[0]
    assert min(at_start("dense", "decoder_effective_keys", side)) > 0.85 * tokens
    assert min(at_start("dense", "encoder_gradient_tokens", side)) > 0.95 * tokens
    assert max(at_start("deformable, one map", "encoder_gradient_tokens", side)) < 20
print("dense: over 85 % of the tokens; its gradient: over 95 %; deformable: fewer than 20 tokens")

# %% [markdown]
# So the first half of the explanation holds: at the start, dense attention is nearly uniform. The second half says
# that it learns slowly *because* of this. No measurement at the start can show that. Section {{n}}.7 tests it with an
# experiment in which nothing but the attention differs.
#
# ## {{n}}.5 Explanation two: all queries say the same
#
# A deformable query has a reference point, and its box is predicted relative to it. A DETR query has
# only a learned vector, which the layers have not yet learned to read. Let us see what both predict before the first
# step.

# %%
with torch.no_grad():
    outputs = {name: build(name).eval()(seven) for name in RECIPES}
for name, output in outputs.items():
    centres, sizes = output.boxes[0, :, :2], output.boxes[0, :, 2:]
    print(f"{name:8} centres differ by {centres.std(0).mean():.3f}, sides about {sizes.mean():.2f}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "The running example twice, each with the 30 boxes of an untrained detector. Left, DETR, in red: all thirty lie on top of each other, one square in the middle with half the picture's side. Right, one map, in blue: thirty small squares all over the picture."}}
draw.all_boxes({name: output.boxes[0] for name, output in outputs.items()})

# %% [markdown]
# *Figure {{n}}.4. What to see: all 30 boxes of each untrained detector. DETR's are one and the same box (left): its
# head says about 0 for all four numbers, and the sigmoid of 0 is 0.5. The deformable detector's boxes stand all over
# the picture, before it has learned anything (right).*
#
# To divide the objects of a picture among themselves, DETR's queries must first learn to differ. How long does that
# take? The training below shows it, and the third explanation at work as well, so that one comes first.
#
# ## {{n}}.6 Explanation three: the matching is not stable
#
# The matching gives each object to a query that fits it well. If two queries fit about equally well, a small
# change of the weights hands the object from one to the other, and now the second has to learn what the first was
# learning. The authors of DN-DETR {cite}`li2022dn` measured this between epochs, and propose denoising as the remedy
# ({{chapter denoising}}).

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two matrices of queries and objects at two steps. At one moment, query 2 has object A and query 4 has object B. A few steps later, query 3 has object A and query 4 still has object B. The moved match is red. At the right: 1 of 2 objects has changed."}}
draw.a_match_that_moves()

# %% [markdown]
# *Figure {{n}}.5. What to see: costs of four queries for two objects, at two moments of training. Queries 2 and 3 cost
# nearly the same for object A, and a small change moves the match (red). One of two objects has changed its query.*
#
# ## Exercise {{n}}.3  Instability
#
# *difficulty ●○○ · 10 minutes · 5 lines*
#
# Return the share of **objects**, of all images together, whose query is another one than before. A match is the pair
# `(queries, objects)` of one image, two tensors of equal length: query `queries[i]` has object `objects[i]`. The matcher
# sorts its pairs by query, not by object.


# %% tags=["exercise"]
def instability(before, now):
    """before, now: for each image a match. Returns a number from 0 to 1."""
    # BEGIN SOLUTION
    changed = []
    for match, later in zip(before, now, strict=True):
        first, second = (queries[objects.argsort()] for queries, objects in (match, later))
        changed.append(first != second)
    return torch.cat(changed).float().mean().item()
    # END SOLUTION


check("detr.3", instability)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Bring both matches of an image into the order of their objects, then compare the queries one by one.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `queries[objects.argsort()]` is the query of object 0, of object 1, and so on. Collect the comparisons of all images
# with `torch.cat` and take one mean.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# You compare the queries in the order in which the matcher returns them. Two queries that swap their objects are both
# in both lists, but both objects have changed hands.
#
# </details>
#
# {{solution}}

# %% [markdown]
# How near to each other *are* the two best queries of an object? We compare their matching costs in both untrained
# detectors:

# %%
for name in RECIPES:
    model = build(name).eval()
    with torch.no_grad():
        output = model(batch)
    gaps = []
    for logits, boxes, target in zip(output.logits, output.boxes, batch.targets, strict=True):
        cost = HungarianMatcher().cost(logits, boxes, target, model.scoring)  # (Q, objects)
        best, second = cost.sort(0).values[:2]
        gaps.append(second - best)
    print(f"{name:8} the second best query costs {torch.cat(gaps).median():.3f} more")

# %% [markdown]
# In DETR the best query wins by next to nothing, because all its boxes are the same. With reference points there is a
# nearest query.
#
# Now we train both, with the loop of {{chapter training}} and their own recipes. (Learning rates: DETR 0.0002, one map
# 0.001. Each rises from 0 in the first 100 steps.) Every 20 steps we look at three things, on 32 pictures of *val*:
# how far the centres of a picture's boxes are spread; how far each matched box is from its object (L1 over the four
# numbers); and for how many objects the match has changed since the last look.

# %%
train = CocoDataset(*find_split(Path("../data/digits"), "train"), recipe.train_transform())


def look(model):
    """The spread of centres, the matched boxes' L1 distance, and the matches, on 32 pictures."""
    with torch.no_grad():
        output = model.eval()(batch)
    matches = HungarianMatcher()(output, batch.targets, model.scoring)
    pairs = zip(output.boxes, batch.targets, matches, strict=True)
    far = torch.cat([(b[q] - t.boxes[o]).abs().sum(-1) for b, t, (q, o) in pairs])
    return output.boxes[..., :2].std(1).mean().item(), far.mean().item(), matches


# %%
def first_steps(name, steps=200, every=20, warm_up=100):
    """What `look` sees every so many steps of a training."""
    model, options, seen = build(name), RECIPES[name].train, []
    optimizer, criterion = torch.optim.AdamW(parameter_groups(model, options)), SetCriterion()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps + 1):
        if step % every == 0:
            seen.append((step, *look(model)))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / warm_up)
        chosen = torch.randint(len(train), (options.batch_size,), generator=generator)
        images = collate([train[i] for i in chosen.tolist()])
        loss = sum(criterion(model.train()(images), images.targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
    return seen


# %% tags=["hide-input"]
# NBVAL_IGNORE_OUTPUT
def moved(before, now):
    """The share of objects with another query, as in exercise 3."""
    pairs = [(q[o.argsort()], p[n.argsort()]) for (q, o), (p, n) in zip(before, now, strict=True)]
    return torch.cat([a != b for a, b in pairs]).float().mean().item()


def print_steps(name):
    """A line for each look."""
    print(f"{name}\n step  spread  distance  changed")
    for i, (step, spread, far, matches) in enumerate(live[name]):
        share = f"{moved(live[name][i - 1][3], matches):8.0%}" if i else ""
        print(f"{step:5}  {spread:6.3f}  {far:8.3f} {share}")


live = {"one map": first_steps("one map")}
print_steps("one map")

# %% [markdown]
# Before you run: DETR's boxes start on top of each other. How many steps will it take until they are spread about as
# widely as those in the table above?

# %%
# NBVAL_IGNORE_OUTPUT
live["DETR"] = first_steps("DETR")
print_steps("DETR")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three panels over 200 training steps, DETR in red and one map in blue. Spread of centres: DETR stays near zero for 60 steps and then rises to about 0.23, one map stays near 0.27. Distance of matched boxes: DETR falls from 1.1 to about 0.25, one map starts at 0.3 and falls to 0.2. Share of objects whose query changed in 20 steps: DETR between 0.55 and 0.95, one map between 0.05 and 0.45."}}
draw.the_first_steps(live, moved)

# %% [markdown]
# *Figure {{n}}.6. What to see: DETR (red) needs about two hundred steps to spread its boxes over the picture. By then
# they are as near to their objects as those of the deformable detector (blue) were before the first step. Meanwhile
# more than half of its objects change their query within 20 steps. (One seed each, trained in this notebook.)*

# %% tags=["hide-input"]
spread, far = ({name: [look[k] for look in seen] for name, seen in live.items()} for k in (1, 2))
changes = {n: [moved(a[3], b[3]) for a, b in itertools.pairwise(s)] for n, s in live.items()}
assert spread["DETR"][0] < 0.01 and spread["one map"][0] > 0.2
assert far["DETR"][0] > 3 * far["one map"][0] and far["DETR"][-1] < 1.2 * far["one map"][0]
assert max(spread["DETR"][:4]) < 0.1 and spread["DETR"][-1] > 0.5 * spread["one map"][-1]
assert np.mean(changes["DETR"]) > 2 * np.mean(changes["one map"])
print("DETR's mean share of changed matches is more than twice that of one map")

# %% [markdown]
# What happens after these two hundred steps? A study trained both detectors for 1,500, each at three learning rates
# (`python experiments/rates.py`; the next chapter chooses among them). Every 500 steps it compared the matches of 64
# pictures of *val* with those of 500 steps before, and measured the object AP, which is AP without classes:

# %%
rates, pairs = read("rates"), []


def at_rate(side, rate, metric, step):
    """The mean on val over the seeds that are finished."""
    wanted = (f"{side}, {rate}", metric, step, "val")
    keys = ("configuration", "metric", "at", "split")
    return np.mean([r["value"] for r in rates if tuple(r[key] for key in keys) == wanted])


print("rate   step  changed: DETR, one map  object AP: DETR, one map")
for rate in ("0.0002", "0.0005", "0.001"):
    for step in (1000, 1500):
        share = [at_rate(side, rate, "instability", step) for side in RECIPES]
        ap = [at_rate(side, rate, "object_ap", step) for side in RECIPES]
        pairs.append(share[0] > share[1])
        print(f"{rate:6} {step} {share[0]:14.0%} {share[1]:8.0%} {ap[0]:17.3f} {ap[1]:8.3f}")
print(
    f"DETR's matches change more in {sum(pairs)} of {len(pairs)} lines;",
    f"seeds: {len({r['seed'] for r in rates})}",
)

# %% [markdown]
# First, the AP. DETR's boxes are spread from about step 200 on, and yet its AP after 1,500 steps is a small fraction of
# one map's. So equal boxes at the start cannot be the whole story.
#
# Second, the matches. Even if DETR's change more in every row, this does not show that the changes make DETR slow. A
# detector may change its matches *because* its boxes are poor. To tell cause from effect, one has to train without the
# unstable matching. DN-DETR does so for a part of its queries, and {{chapter denoising}} tries it.
#
# ## {{n}}.7 One attention module, nothing else
#
# Back to the first explanation: does spread-out attention learn slowly? Here is an experiment small enough to leave
# everything else out. Every cell of a map holds a number. A query stands on a cell, and must answer with the number
# that is **two cells to its right and one down**. Looking at a certain place relative to oneself is what a layer of an
# encoder often has to learn. The map has 4 x 4, 6 x 6 or 8 x 8 cells, and the task is the same for all.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A map of 6 by 6 cells. A blue cross stands in one cell; an orange ring is two cells to its right and one down. A dashed arrow leads from the cross to the ring: the query must answer with the number in that cell."}}
draw.the_task()

# %% [markdown]
# *Figure {{n}}.7. The task. The query (blue) knows its own place only; the rule "two right, one down" has to be learned.*
#
# Both learners have four heads of width 8. The dense one gets DETR's place codes: those of the cells in its keys, that
# of the query's own cell in the query. The deformable one gets the query's cell as its reference point. Each of its
# heads starts as always, with four points in a row, and each head in a direction of its own.

# %%
C, RIGHT, DOWN = 32, 2, 1


def codes(places):
    """(..., 2) to (..., C), the sine codes of places in [0, 1]."""
    return sine_embedding(places * 2 * math.pi, C // 2)


class Learner(nn.Module):
    """One attention module and a linear layer to one number."""

    def __init__(self, dense):
        super().__init__()
        self.dense, self.out = dense, nn.Linear(C, 1)
        self.attention = (
            nn.MultiheadAttention(C, 4, batch_first=True) if dense else DeformAttn(C, 4, 4)
        )

    def forward(self, marks, cells, features, side):
        """marks: (B, Q, 2). cells: (B, S, 2). features: (B, S, C). Returns (B, Q, 1)."""
        if self.dense:
            keys = features + codes(cells)
            read, _ = self.attention(codes(marks), keys, features, need_weights=False)
        else:
            read = self.attention(codes(marks), marks, features, (side, side))
        return self.out(read)


# %%
def new_maps(side, lift, generator, B=4, Q=16):
    """Places of Q queries on each of B maps, all cells' features, and the numbers wanted."""
    numbers = torch.randn(B, side * side, 1, generator=generator)
    column = torch.randint(side - RIGHT, (B, Q), generator=generator)
    row = torch.randint(side - DOWN, (B, Q), generator=generator)
    target = (row + DOWN) * side + column + RIGHT
    marks = (torch.stack([column, row], -1) + 0.5) / side
    return marks, numbers * lift, numbers.gather(1, target.unsqueeze(-1))


def cells_of(side):
    """(side * side, 2): the centres of all cells, row after row."""
    y, x = torch.meshgrid(*2 * [(torch.arange(side) + 0.5) / side], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], -1)


# %% [markdown]
# Whoever always answers 0 has a mean squared error of 1. We count the steps until the error (smoothed over about ten
# steps) is below one half, and give up after 1,500. For each learner the learning rate was chosen among 0.001, 0.003
# and 0.01, with two other seeds; it was 0.003 for both.


# %%
def steps_needed(dense, side, seed, rate=3e-3, most=1500):
    """Steps of Adam until the error is below a half; `most` if it never is."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    lift, cells = torch.randn(C, generator=generator), cells_of(side).expand(4, -1, -1)
    learner, smooth = Learner(dense), 1.0
    optimizer = torch.optim.Adam(learner.parameters(), rate)
    for step in range(1, most + 1):
        marks, features, wanted = new_maps(side, lift, generator)
        loss = (learner(marks, cells, features, side) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth = 0.9 * smooth + 0.1 * loss.item()
        if smooth < 0.5:
            return step
    return most


# %%
# NBVAL_IGNORE_OUTPUT
SIDES, SEEDS, MOST = (4, 6, 8), (2, 3, 4), 1500
needed = {}


def measure(side):
    """Both learners on maps of one size, all seeds."""
    for dense in (True, False):
        found = needed[dense, side] = [steps_needed(dense, side, seed) for seed in SEEDS]
        words = [f"over {MOST}" if steps == MOST else steps for steps in found]
        print(f"{side * side:3} cells, {'dense' if dense else 'deformable':10}", *words)


measure(4)

# %% [markdown]
# Before you run: which of the two needs more steps on a map of 36 cells than on this one of 16, and how many more?

# %%
# NBVAL_IGNORE_OUTPUT
measure(6)

# %% [markdown]
# And on 64 cells?

# %%
# NBVAL_IGNORE_OUTPUT
measure(8)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Steps needed against the number of cells, 16, 36 and 64, logarithmic, one dot per seed. Dense attention in red: some hundred steps at 16 cells, about a thousand at 36, and at 64 cells on the dashed line where we gave up. Deformable attention in blue: from some tens to some hundreds of steps at every size, one seed on the dashed line."}}
draw.steps_and_cells(needed, MOST)

# %% [markdown]
# *Figure {{n}}.8. What to see: one dot per seed. The dense learner (red) needs more steps the more cells there are; on
# the dashed line are those that had not learned the task after 1,500. The deformable one (blue) does not slow
# down with the size of the map, but depends on luck: most seeds need some tens of steps, a few need hundreds, or are
# stuck.*

# %% tags=["hide-input"]
# NBVAL_IGNORE_OUTPUT
assert max(needed[True, 4]) < MOST and min(needed[True, 6]) > min(needed[True, 4])
assert min(needed[True, 8]) > 10 * min(needed[False, 8])
stuck = sum(steps == MOST for (dense, _), found in needed.items() if not dense for steps in found)
print("the fastest seeds at 64 cells: dense", min(needed[True, 8]), "steps or more", end=", ")
print("deformable", min(needed[False, 8]))
print(f"{stuck} of {3 * len(SIDES)} deformable learners got stuck")

# %% [markdown]
# So with nothing else changed, dense attention does slow down as the map grows. The deformable learner has two
# advantages by design: its points start near the right cell, and a small step of a point reaches the next cell. Dense
# attention must learn both from place codes, which hardly differ between neighbours. Even the fastest wave of these
# codes has one period over the whole picture: on a map of 8 x 8 cells, neighbours differ by an eighth of a period in
# it, and by less in all others. DETR's codes have more channels, but the same fastest wave. So two things change with
# the map, and this experiment does not separate them: more keys share the gradient, and their codes are more alike.
#
# The design has a price, too. A point's gradient comes from the few cells around it ({{chapter sampling}}). On a map of
# pure noise these say nothing about where the right cell is, so points that have moved in the wrong direction come back
# late or never. (The maps of a backbone are smoother.)
#
# ### The other way round
#
# What helps in one task may hurt in another. Now one cell of the map carries a **mark**, and the query must
# answer with that cell's number. The query is always in the middle of the map, so it says nothing about where the mark
# is.

# %%
# NBVAL_IGNORE_OUTPUT


def search_error(dense, side, seed, steps=400, B=16):
    """The mean squared error in the last 50 steps of learning to find the marked cell."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    lift, mark = torch.randn(2, C, generator=generator)
    learner, losses = Learner(dense), []
    middle, cells = torch.full((B, 1, 2), 0.5), cells_of(side).expand(B, -1, -1)
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    for _ in range(steps):
        numbers = torch.randn(B, side * side, 1, generator=generator)
        target = torch.randint(side * side, (B, 1, 1), generator=generator)
        features = (numbers * lift).scatter_add(1, target.expand(-1, -1, C), mark.expand(B, 1, C))
        loss = (learner(middle, cells, features, side) - numbers.gather(1, target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-50:]))


errors = {dense: [search_error(dense, 6, seed) for seed in SEEDS] for dense in (True, False)}
for dense, found in errors.items():
    print("dense:     " if dense else "deformable:", *(f"{error:.2f}" for error in found))

# %% tags=["hide-input"]
assert max(errors[True]) < 0.5 and min(errors[False]) > 0.8
print("dense learns it, and deformable stays at the error of answering 0")

# %% [markdown]
# Dense attention learns this within a few hundred steps. Deformable attention cannot: its points follow
# from the query alone, so it looks at the same places whatever the map holds ({{chapter deformable_attention}}, "Where
# are the keys?"). So it is not simply the better attention. It assumes that what matters about a place is near that
# place, and in detection this is mostly so. (This last sentence is an argument, not a measurement.)
#
# ## {{n}}.8 What was shown, and what was not
#
# | explanation | measured here | what is missing |
# |:--|:--|:--|
# | attention and its gradient start everywhere | yes: five seeds, up to 1,024 tokens | in a whole detector, a change of this alone |
# | queries must learn where to look | yes: at the start, and in 200 steps of one seed | what it costs later on |
# | the matching is unstable | yes: by a study and live | whether it is a cause: {{chapter denoising}} |
# | dense attention learns more slowly on a larger map | yes: in one layer, three seeds | more keys or closer codes? And in a whole detector? |
#
# Others have looked for the main cause. {cite}`sun2021tspfcos` find that cross-attention in the decoder is the slow part,
# and that unstable matching matters early in training. {cite}`meng2021conditional` give DETR's queries a reference point
# and split content from place in its dense cross-attention; they report training 6.7 to 10 times as fast. So
# reference points help even where attention stays dense, which speaks for explanation two.
#
# ## Summary
#
# - DETR: one map, dense attention, learned queries without places, plain sigmoid boxes, one softmax with a class
#   "no object" of weight 0.1, and a loss after every decoder layer.
# - At the start dense attention and its gradient are spread over nearly all tokens; deformable attention has 4 samples.
# - At the start all queries of DETR predict the same box, so tiny differences decide the matching. Reference points
#   spread the boxes before the first step; DETR needs two hundred steps for it, and then is still slow.
# - With nothing else changed, dense attention needs more steps as the map grows; deformable attention does not. But it
#   cannot search.
#
# > **Differs from the paper.** The detectors that we trained are small, and take the map of stride 16 of a picture of 128
# > pixels. They train for minutes, with a cosine schedule and larger learning rates.
# >
# > **Differs from the official code.** Ours and the library's DETR equal the official one in parameters and names; only
# > dropout, 0.1 there, is left out of the code above.
#
# ## Further reading
#
# - {cite}`carion2020detr`: sections 3 and A.3 of the appendix.
# - {cite}`zhu2021deformable`: section 3 has the explanation that we tested first.
# - {cite}`sun2021tspfcos`: which part of DETR is the slow one.
# - {cite}`meng2021conditional`: DETR's queries with reference points.
# - {cite}`li2022dn`: instability, and denoising as its cure.
