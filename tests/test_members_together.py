"""Members of the family put together: each pair that makes sense is a class of two bases, which
know nothing of each other, and takes one step of training."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from deformable_detr.losses import SetCriterion
from deformable_detr.models import DINO, DNDETR, DINOConfig, DNDETRConfig, LiteDINO, LiteDINOConfig
from deformable_detr.models.denoising import Contrastive, ContrastiveOptions, Denoised
from deformable_detr.models.groups import Grouped, GroupOptions
from deformable_detr.models.learned import LearnedConfig, LearnedQueries
from deformable_detr.models.lite_encoder import LiteEncoded, LiteOptions, WholeLayer
from deformable_detr.models.sparse_encoder import SparselyEncoded, SparseOptions
from tests.members import SIZES, build, make_batch, output_of


@dataclass(frozen=True)
class NoisedGroupsConfig(GroupOptions, DNDETRConfig):
    """Denoising with groups."""


class NoisedGroups(Grouped, DNDETR):
    """Both kinds of further queries in training."""


@dataclass(frozen=True)
class ContrastedGroupsConfig(GroupOptions, ContrastiveOptions, DNDETRConfig):
    """Denoising with a contrast, on learned boxes in groups."""


class ContrastedGroups(Grouped, Contrastive, DNDETR):
    """DN-DETR's queries with DINO's noise."""


@dataclass(frozen=True)
class SparseDINOConfig(SparseOptions, DINOConfig):
    """DINO with a sparse encoder."""


class SparseDINO(SparselyEncoded, DINO):
    """A share of the tokens is updated."""


@dataclass(frozen=True)
class LiteGroupsConfig(LiteOptions, GroupOptions, LearnedConfig):
    """Groups of learned queries, and an encoder that interleaves its updates."""


class LiteGroups(LiteEncoded, Grouped, LearnedQueries):
    """Group DETR with Lite DETR's encoder."""


@dataclass(frozen=True)
class LiteNoisedConfig(LiteOptions, DNDETRConfig):
    """DN-DETR with Lite DETR's encoder."""


class LiteNoised(LiteEncoded, DNDETR):
    """Its decoder's attention is key-aware, too."""


PAIRS = {
    NoisedGroups: (NoisedGroupsConfig, {"groups": 3, "denoising_groups": 2}),
    ContrastedGroups: (ContrastedGroupsConfig, {"groups": 2, "denoising_pairs": 6}),
    LiteDINO: (LiteDINOConfig, {"denoising_pairs": 6}),
    SparseDINO: (SparseDINOConfig, {"rho": 0.3, "denoising_pairs": 6}),
    LiteGroups: (LiteGroupsConfig, {"groups": 3, "refine": True}),
    LiteNoised: (LiteNoisedConfig, {"denoising_groups": 2}),
}
NOISED = [kind for kind in PAIRS if issubclass(kind, Denoised)]
GROUPED = [kind for kind in PAIRS if issubclass(kind, Grouped)]
each_pair = pytest.mark.parametrize("kind", PAIRS)


def trained(kind):
    config, options = PAIRS[kind]
    model = build(config(**SIZES | options), kind).train()
    model.backbone.eval()
    return model


@each_pair
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_a_pair_takes_a_step(kind, counts):
    """Every parameter has a gradient, also from a batch without objects, and the loss falls."""
    model, batch = trained(kind), make_batch(*counts)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = sum(SetCriterion()(output_of(model, batch), batch.targets).values())
    before.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    after = sum(SetCriterion()(output_of(model, batch), batch.targets).values())
    assert after < before or not any(counts)  # a loss of 1e-4 falls by less than float32 shows


@each_pair
def test_it_has_what_both_have(kind):
    model, batch = trained(kind), make_batch(3, 1)
    output = output_of(model, batch)
    losses = SetCriterion()(output, batch.targets)
    noised = {name for name in losses if "denoising" in name}
    assert bool(noised) == issubclass(kind, Denoised)
    assert ("loss_scorer" in losses) == issubclass(kind, SparselyEncoded)
    whole = [isinstance(layer, WholeLayer) for layer in model.encoder.layers]
    assert whole == ([False, True] if issubclass(kind, LiteEncoded) else [False, False])
    if issubclass(kind, Grouped):
        groups = model.config.groups
        assert output.groups == groups and output.logits.shape[1] == groups * 6
    model.eval()
    alone = model(batch)
    assert alone.logits.shape[1] == 6 and alone.groups == 1 and not alone.losses


@pytest.mark.parametrize("kind", NOISED)
def test_nothing_leaks_from_denoising(kind):
    """With other noise, or none, the other queries say the same."""
    model, batch = trained(kind), make_batch(3, 1)
    first, second = (output_of(model, batch, seed=seed) for seed in (5, 6))
    assert not torch.equal(first.others["denoising"].boxes, second.others["denoising"].boxes)
    # float32 sums of as many queries, in one order
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-5)
    quiet = {"denoising_groups": 0} if hasattr(model.config, "denoising_groups") else {}
    quiet |= {"denoising_pairs": 0} if hasattr(model.config, "denoising_pairs") else {}
    model.config = dataclasses.replace(model.config, **quiet)
    none = output_of(model, batch)
    assert "denoising" not in none.others
    torch.testing.assert_close(first.logits, none.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GROUPED)
def test_in_groups_the_first_is_the_model(kind):
    model, batch = trained(kind), make_batch(3, 1)
    many = output_of(model, batch)
    model.eval()
    alone = output_of(model, batch)
    torch.testing.assert_close(many.logits[:, :6], alone.logits, rtol=1e-4, atol=1e-5)
