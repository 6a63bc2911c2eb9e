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
# # {{n}}. Published weights
#
# You will be able to
# - **read** a state dict as a map of the model,
# - **translate** names between this library, the official code and Hugging Face, strictly,
# - **compare** two implementations layer by layer with hooks, and find where they part,
# - **change** the number of classes, and say which tensors survive,
# - **refuse** a file that would run code, and know what was published and how to repeat it.
#
# You should know: {{chapter matching_and_loss}} and {{chapter refinement}}.
#
# {{measured}}
#
# {{map}}

# %% [markdown]
# Training the multi-scale Deformable DETR on COCO takes more than three hundred GPU hours (the table at the end of this
# chapter has the figures). Nobody should have to do that twice, so the weights are published. A file of weights is a
# list of names and numbers. Two questions decide whether it is of any use: do its names **fit** the model, and is the
# model **right**, in every detail of the forward pass? The first question is answered by tables of names, and the
# second by running the model and comparing its outputs.

# %% tags=["hide-input"]
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import DeformableDetrForObjectDetection
from transformers.utils import logging as transformers_logging

from deformable_detr import Batch, DeformableDETR, DeformableDETRConfig
from deformable_detr.exercises import check
from deformable_detr.weights.formats import to_huggingface, to_official
from deformable_detr.weights.published import load_pretrained, save_pretrained

plt.style.use("book.mplstyle")
transformers_logging.disable_progress_bar()
_ = torch.manual_seed(0)

# %% [markdown]
# ## {{n}}.1 The state dict as a map
#
# A model's `state_dict()` lists all its tensors by name, and so it is a map of the model. The paper's base model has
# 40 million parameters. Where are they? The next cell makes it on PyTorch's `meta` device, where a model has names
# and shapes but takes no memory, and counts by the first word of each name.

# %%
with torch.device("meta"):
    base = DeformableDETR(DeformableDETRConfig())
sizes = Counter()
for name, parameter in base.named_parameters():
    sizes[name.split(".")[0]] += parameter.numel()
for part, size in sizes.most_common():
    print(f"{part:>17} {size:>11,}")
print(f"{'all':>17} {sizes.total():>11,}")

# %% [markdown]
# The `neck` projects the backbone's maps to the width of the transformer and adds the embedding of their levels.
# `query_embed` holds the learned queries, and `reference_points` is the layer that makes a reference point out of each.
#
# A count is a first test of whether a model is the published one. The three multi-scale models of the official code have
# 40,069,665, 40,849,660 and 41,181,529 parameters. If ours had one more or one less, it would be another model.

# %%
published = {"base": 40_069_665, "refinement": 40_849_660, "two stages": 41_181_529}
options = {
    "base": {},
    "refinement": {"refine": True},
    "two stages": {"refine": True, "two_stage": True},
}
for name, option in options.items():
    with torch.device("meta"):
        variant = DeformableDETR(DeformableDETRConfig(**option))
    count = sum(p.numel() for p in variant.parameters())
    print(f"{name:>10} {count:,}", len(to_official(variant)), "tensors")
    assert count == published[name]

# %% [markdown]
# (The last column counts tensors in a file. They include more than the parameters: a frozen batch norm has no
# parameters but four buffers, and a head that several layers share is stored once for each layer.)
#
# How much of it is deformable attention? The next figure counts it apart from the rest of the encoder
# and the decoder.

# %% mystnb={"image": {"alt": "Horizontal bars of the number of parameters by part of the model: the backbone has more than half; the neck (the projections of its maps), the rest of encoder and decoder, and deformable attention follow; heads and queries are thin lines."}}
attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
bars = Counter()
for name, parameter in base.named_parameters():
    part = name.split(".")[0]
    part = f"rest of {part}" if part in ("encoder", "decoder") else part
    part = "deformable attention" if any(a in name for a in attention) else part
    bars[part] += parameter.numel()
share_of_attention = bars["deformable attention"] / sum(bars.values())
assert 0.06 < share_of_attention < 0.08
figure, axis = plt.subplots(figsize=(7, 2.9))
parts = bars.most_common()[::-1]
axis.barh([name for name, _ in parts], [size / 1e6 for _, size in parts])
axis.set(xlabel="million parameters")
plt.show()

# %% [markdown]
# *Figure {{n}}.1. Deformable attention has 7 % of the parameters. More than half of all parameters are the ResNet's.*
#
# And how much of it decides *where to look*? The sampling offsets come from a linear layer with $C$ inputs and
# $2 M L K$ outputs. With $C = 256$, $M = 8$ heads and $L = K = 4$, these are $(C + 1) \cdot 2 M L K = 65{,}792$ numbers
# in each of the twelve layers.

# %%
share = (
    sum(p.numel() for n, p in base.named_parameters() if "sampling_offsets" in n) / sizes.total()
)
print(f"all sampling offsets together: {share:.1%}")
assert sizes["backbone"] / sizes.total() > 0.5 and share < 0.03
assert round(share * sizes.total()) == 12 * (256 + 1) * 2 * 8 * 4 * 4 == 12 * 65_792

# %% [markdown]
# So what makes the attention deformable, the layers that decide where to sample, takes 2 % of the parameters.
#
# ## {{n}}.2 Three dialects
#
# The official code, Hugging Face and this library have named the same tensors differently. A file can be read by all of
# them if, for each format, there is a table of names between the file and the model.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three kinds of files, official, Hugging Face and ours, each connected through a table of names with one model. Below the model: missing, left over, other shape are errors."}}
from schematics.published_weights import parting, three_dialects

three_dialects()

# %% [markdown]
# *Figure {{n}}.2. One model, three formats. Each table works in both directions, and is strict.*
#
# Here is the same tensor in the three dialects, the value projection in the third layer of the encoder. (`to_official`
# returns a model's tensors under their official names; `to_huggingface` does the same for Hugging Face, and returns the
# model's configuration as well.)

# %%
official = list(to_official(base))
hub = list(to_huggingface(base)[0])
ours = list(base.state_dict())
end = "encoder.layers.2.self_attn.value_proj.weight"
print("ours        ", next(x for x in ours if x.endswith("layers.2.attention.value_proj.weight")))
print("official    ", next(x for x in official if x.endswith(end)))
print("Hugging Face", next(x for x in hub if x.endswith(end)))

# %% [markdown]
# The last part, `value_proj.weight`, is the same in all three. So are `sampling_offsets`, `attention_weights` and
# `output_proj`: the names inside the attention module come from the first published code, and everybody kept them. For
# all the rest the table says which words stand for which: for example, the official `self_attn` is our `attention`. With
# one exception, only names change and no numbers. The exception is the decoder's self-attention: the official code and
# ours keep queries, keys and values in one tensor with $3C$ rows (`in_proj`), and Hugging Face keeps three tensors.

# %% [markdown]
# ## Exercise {{n}}.1  Translate
#
# *difficulty ●●○ · 15 minutes · 6 lines*
#
# Translate the official names of encoder layers into ours. `transformer.` goes away; `self_attn` becomes
# `attention` and `norm1` becomes `norm`; `linear1`, `linear2` and `norm2` move into `ffn`, where `norm2` is
# called `norm`. What follows after these words stays as it is. If a name is not of this kind, do not guess: raise a
# ValueError.


# %% tags=["exercise"]
def our_name(official):
    """For example transformer.encoder.layers.3.linear1.bias -> encoder.layers.3.ffn.linear1.bias."""
    # BEGIN SOLUTION
    parts = {"self_attn": "attention", "norm1": "norm", "norm2": "ffn.norm"}
    parts |= {"linear1": "ffn.linear1", "linear2": "ffn.linear2"}
    match official.split("."):
        case ["transformer", "encoder", "layers", layer, part, *rest] if part in parts:
            return ".".join(["encoder", "layers", layer, parts[part], *rest])
    raise ValueError(f"not a tensor of an encoder layer: {official}")
    # END SOLUTION


check("published_weights.1", our_name)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Split at the dots. The fifth part decides.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A dict from `norm1` to `norm`, `norm2` to `ffn.norm` and so on. What is not in it is refused.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A chain of `str.replace` also changes names that it should not know, and raises no error for the others.
#
# </details>
#
# {{solution}}

# %% [markdown]
# Why strict? Many scripts load with `load_state_dict(strict=False)`, which passes over every name that does not fit. The
# layer then keeps its random numbers, and the only sign of it is an AP that is too low. Here a tensor that is missing,
# left over or of another shape is an error that names it. The next cell writes a small model in the official format, adds
# a tensor that no model has, and loads the file.

# %%
small = DeformableDETRConfig(
    num_classes=5, num_queries=7, backbone="resnet18", embed_dim=32, num_heads=4, num_points=2,
    num_levels=3, encoder_layers=3, decoder_layers=2, ffn_dim=48, dropout=0.0,
)  # fmt: skip
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


def randomised(model):
    """Random numbers in all parameters: zeros and ones would hide mistakes."""
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


model = randomised(DeformableDETR(small))
path = folder / "official.pth"
save_pretrained(model, path, format="official")
content = torch.load(path, weights_only=True)
content["model"]["transformer.encoder.layers.1.linear9.weight"] = torch.zeros(3)
torch.save(content, folder / "strange.pth")
try:
    load_pretrained(folder / "strange.pth")
except ValueError as error:
    print(str(error).replace(f"{folder}/", ""))

# %% [markdown]
# The tables work in both directions. So a model that is written and read again has to be the same, bit for bit.

# %%
for kind, place in (("official", path), ("huggingface", folder / "hub"), ("ours", folder / "own")):
    save_pretrained(model, place, format=kind)
    again = load_pretrained(place).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    print(f"{kind:>11}: the same bits")

# %% [markdown]
# ## {{n}}.3 Is it the same model?
#
# All names can match while the numbers come out wrong, because an axis is swapped or a norm comes at another place in
# the layer. So one has to run two implementations with the same weights on the same images, and compare. Hugging Face's
# detector is an independent implementation. Here it is loaded from the folder that we have just written, and gets the
# same two images. They have different sizes, so that the treatment of padding is tested as well.

# %%
theirs = DeformableDetrForObjectDetection.from_pretrained(folder / "hub").eval()
images = [torch.randn(3, 96, 128), torch.randn(3, 80, 112)]  # two sizes: padding must be right too
batch = Batch.from_images(images)
with torch.no_grad():
    mine = model(batch)
    other = theirs(pixel_values=batch.images, pixel_mask=(~batch.mask).long())
differences = {
    "logits": (mine.logits - other.logits).abs().max().item(),
    "boxes": (mine.boxes - other.pred_boxes).abs().max().item(),
}
for name, difference in differences.items():
    print(f"{name} agree to 1e-4: {difference < 1e-4}")
assert max(differences.values()) < 1e-4

# %% [markdown]
# ## {{n}}.4 Layer by layer, with hooks
#
# They agree. But suppose that they did not: where would you look? The outputs only say *that* two models differ. To see
# *where*, compare them after every layer. PyTorch can call a function of ours each time a module has computed its output;
# such a function is called a **hook**. The next cell hangs one on every layer of encoder and decoder, in both models.


# %%
def outputs_of(model, layers, run):
    """The first output of each of these modules while run() goes through the model."""
    kept = []

    def keep(module, arguments, output):
        kept.append((output[0] if isinstance(output, tuple) else output).detach())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return kept


def compare(mine, other):
    """The largest difference after each encoder and decoder layer."""
    layers = [*mine.encoder.layers, *mine.decoder.layers]
    first = outputs_of(mine, layers, lambda: mine(batch))
    layers = [*other.model.encoder.layers, *other.model.decoder.layers]
    mask = (~batch.mask).long()
    second = outputs_of(other, layers, lambda: other(pixel_values=batch.images, pixel_mask=mask))
    return [(a - b).abs().max().item() for a, b in zip(first, second, strict=True)]


agreement = compare(model, theirs)
print([x < 1e-4 for x in agreement])

# %% [markdown]
# Now suppose that a conversion script has swapped x and y in the sampling offsets of the second encoder layer. The shapes
# fit, the names fit, and nothing complains. Before you run: after which of the five layers will the two models differ?

# %%
offsets = theirs.model.encoder.layers[1].self_attn.sampling_offsets
with torch.no_grad():
    for tensor in (offsets.weight, offsets.bias):
        tensor.copy_(tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
parted = compare(model, theirs)
for layer, difference in enumerate(parted):
    name = f"encoder {layer}" if layer < 3 else f"decoder {layer - 3}"
    print(f"{name}: {'equal' if difference < 1e-4 else 'different'}")
assert [x < 1e-4 for x in parted] == [True, False, False, False, False]

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rows of five layers. Below, the second encoder layer is marked as wrong. Arrows between the rows: equal after the first layer, unequal after the second and after all that follow."}}
parting()

# %% [markdown]
# *Figure {{n}}.3. The layer with the mistake is the first one that differs; all later layers differ too, because they get
# its output.*
#
# ## Exercise {{n}}.2  The first that differs
#
# *difficulty ●○○ · 10 minutes · 4 lines*
#
# In a model with hundreds of modules you want a name and not a list. Given two dicts of outputs, return the first name, in
# the order of `mine`, at which any element differs by more than the tolerance, or None if there is none. An output that
# holds a NaN (not a number) counts as different, because a broken layer must not pass.


# %% tags=["exercise"]
def first_difference(mine, theirs, tolerance=1e-4):
    """mine, theirs: dicts name -> tensor, the same names. Returns a name or None."""
    # BEGIN SOLUTION
    for name, tensor in mine.items():
        if not torch.allclose(tensor, theirs[name], rtol=0, atol=tolerance):
            return name
    return None
    # END SOLUTION


check("published_weights.2", first_difference)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Dicts keep their order. Walk through one, look up the other.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.allclose` is False where one of them is NaN, as you want. But it also has a relative tolerance: set `rtol=0`.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# `(a - b).abs().max() > tolerance` is False for NaN: a difference that is not a number is one, too.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.5 Other classes
#
# Most people who load published weights want other classes than COCO's. What can be kept then? Everything but the class
# heads: backbone, encoder, decoder and box heads know nothing of classes. The next cell loads the file of five classes and
# seven queries for a model with three classes and nine queries. The loader reports, tensor by tensor, what it kept and
# what it made anew.

# %%
logging.getLogger("deformable_detr").setLevel(logging.ERROR)  # the report is printed below
changed = load_pretrained(path, num_classes=3, num_queries=9)
print(changed.report)
assert len(changed.report.fresh) < 0.1 * len(changed.report.kept)

# %% [markdown]
# The class heads are new. They start with a bias for which every class has the score 0.01 (the prior of
# {{chapter matching_and_loss}}). The seven queries of the file are kept, and the two further ones start with random
# numbers, as in a new model. (A row of `query_embed` has twice the model's width, one half for the position and one
# for the content of the query.)
#
# Where the names of the classes are known, less is lost. A class with the same name keeps its row in the class heads,
# whatever its place or id was. In the next cell the owl moves from the fifth place to the first.

# %%
animals = [{"id": i, "name": name} for i, name in enumerate(("cat", "cow", "dog", "hen", "owl"))]
save_pretrained(model, folder / "animals.safetensors", animals)
others = [{"id": 7, "name": "owl"}, {"id": 30, "name": "elk"}]
named = load_pretrained(folder / "animals.safetensors", categories=others)
print(named.report.classes())
assert torch.equal(named.model.class_heads[0].weight[0], model.class_heads[0].weight[4])

# %% [markdown]
# ## Exercise {{n}}.3  What survives
#
# *difficulty ●●○ · 10 minutes · 2 lines*
#
# Given two state dicts, the file's and the model's, return the sorted names of those tensors of the model that
# can be taken from the file **as they are**, that is, whole. (So the queries above, of which seven rows were kept, would
# not be in the list.)


# %% tags=["exercise"]
def survivors(published, wanted):
    """published, wanted: dicts name -> tensor. Returns a sorted list of names."""
    # BEGIN SOLUTION
    shapes = {name: tensor.shape for name, tensor in published.items()}
    return sorted(name for name, x in wanted.items() if shapes.get(name) == x.shape)
    # END SOLUTION


check("published_weights.3", survivors)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# A tensor survives where the same name has the same shape.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `dict.get` gives None for a name that is not there, and no shape equals None.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# The same number of elements is not enough: (4, 6) and (6, 4) have as many.
#
# </details>
#
# {{solution}}

# %% [markdown]
# ## {{n}}.6 A file that runs code
#
# Weights are data, but the usual format is not only data. `torch.load` reads a *pickle*, and a pickle can call any function
# while it is read. The one in the next cell makes a folder; another one could send your passwords to a stranger. The
# library's loader refuses it.


# %%
class Trap:
    """Pickled, it becomes a call of os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (str(folder / "trapped"),)


torch.save({"model": Trap()}, folder / "trap.pth")
try:
    load_pretrained(folder / "trap.pth")
except ValueError as error:
    print(str(error).replace(f"{folder}/", "").replace(os.mkdir.__module__, "os"))
print("trapped:", (folder / "trapped").exists())
assert not (folder / "trapped").exists()

# %% [markdown]
# A plain load does what the file says:

# %%
torch.load(folder / "trap.pth", weights_only=False)  # what a careless script does
print("trapped by a plain load:", (folder / "trapped").exists())
assert (folder / "trapped").exists()

# %% [markdown]
# So read other people's files in the safetensors format, which holds nothing but names and numbers, or with
# `weights_only=True` on PyTorch 2.6 or newer. (In older versions a crafted file could run code even with
# `weights_only=True`: CVE-2025-32434.)
#
# ## Exercise {{n}}.4  A card for a file
#
# *difficulty ●●○ · 30 minutes · 10 lines*
#
# Before you trust a file you want to know what is in it. Write a function that takes a state dict and returns a dict with
# - `"parameters"`: the number of elements in all floating-point tensors together,
# - `"parts"`: a dict from the first word of each name to the number of its elements, the largest first,
# - `"odd"`: the sorted names of floating-point tensors that hold a NaN or an infinity, or are zero everywhere although
#   they have more than one dimension.
#
# Integer tensors count for nothing. (In a fresh model, some layers are zero on purpose; in a trained file they would be
# odd.) Try it on the files of this chapter when the checks pass.


# %% tags=["exercise"]
def card_of(state):
    """state: a dict name -> tensor. Returns a dict as described above."""
    # BEGIN SOLUTION
    floats = {name: x for name, x in state.items() if x.is_floating_point()}
    parts = Counter()
    for name, tensor in floats.items():
        parts[name.split(".")[0]] += tensor.numel()
    odd = [
        name
        for name, x in floats.items()
        if not x.isfinite().all() or (x.dim() > 1 and not x.any())
    ]
    return {"parameters": parts.total(), "parts": dict(parts.most_common()), "odd": sorted(odd)}
    # END SOLUTION


check("published_weights.4", card_of)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tensor.is_floating_point()`, `tensor.isfinite()`, `tensor.any()` and `tensor.numel()` are all you need of PyTorch.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A `collections.Counter` adds by key; its `most_common()` gives the largest first, and `total()` the sum.
#
# </details>
#
# <details><summary>I pass the first check but fail the second</summary>
#
# A bias of zeros is not odd: it has one dimension. And integer tensors, such as a count of batches, do not count.
#
# </details>
#
# {{solution}}

# %% tags=["hide-input"]
temporary.cleanup()

# %% [markdown]
# ## {{n}}.7 What was published, and how to repeat it
#
# These are the figures of the official repository's README {cite}`zhu2021deformable`: 50 epochs with batches of 32,
# measured on COCO val2017, hours on V100 GPUs. In the last two rows each model has what the one above it has, and more:
# boxes that are refined from layer to layer, and then a first stage that proposes boxes. (DC5: the last stage of the
# ResNet is dilated, so that its map has stride 16 instead of 32.)
#
# | model | AP | small | medium | large | GPU hours | name on the hub, SenseTime/ |
# |:--|--:|--:|--:|--:|--:|:--|
# | single scale | 39.4 | 20.6 | 43.0 | 55.5 | 160 | deformable-detr-single-scale |
# | single scale, DC5 | 41.5 | 24.1 | 45.3 | 56.0 | 215 | deformable-detr-single-scale-dc5 |
# | multi-scale | 44.5 | 27.1 | 47.6 | 59.6 | 325 | deformable-detr |
# | + refinement | 46.2 | 28.3 | 49.2 | 61.5 | 325 | deformable-detr-with-box-refine |
# | ++ two stages | 46.9 | 29.6 | 50.1 | 61.6 | 340 | deformable-detr-with-box-refine-two-stage |
#
# On a machine with a network, COCO and a GPU, the following lines would load one of them, measure it, and
# train one again. **They were not run here.** (`deformable-detr detect` and `explain` need no data set: they
# take any picture.)
#
# ```python
# from deformable_detr import DeformableDETR
#
# model = DeformableDETR.from_pretrained("SenseTime/deformable-detr")
# ```
#
# ```
# deformable-detr evaluate coco --model SenseTime/deformable-detr
# accelerate launch --num_processes 8 -m deformable_detr.cli train coco --recipe paper \
#     --accumulate 2 --output runs/paper  # 8 processes x 2 batches x 2 images = 32
# ```
#
# ## Summary
#
# - A state dict is a map: more than half of the parameters are the ResNet's, and 2 % make the sampling offsets.
# - Names are translated by a table, strictly; a gap is an error, not a random number.
# - Equal names are not enough: compare outputs, then layers, with hooks.
# - New classes cost only rows of the class heads, and those start at the prior.
# - Weights are data. Read them with a loader that cannot run code.
#
# > **Differs from the paper.** The figures above are the repository's. The paper has 43.8, 45.4 and 46.2 for the last
# > three rows, 0.7 or 0.8 lower. **Differs from Hugging Face.** Its model has the right forward pass, and serves as a
# > reference for that. Its training loss (transformers 5) leaves out the terms of the first stage: after a
# > backward pass, the heads of that stage have no gradient.
#
# ## Further reading
#
# - {cite}`zhu2021deformable`: the paper; its repository has the table and the files.
