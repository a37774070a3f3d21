"""Budgets by hand and as theorems, criteria, and the choice of layers."""

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import nn

from certifiers.errors import InputError
from certprune.pruning import BUDGETS, CRITERIA, kept_counts, prunable_layers, select_layers
from certprune.pruning.criteria import Gradients
from tests.nets import tiny_conv, tiny_residual

CNN_SMALL = [(16, 1, 4, 4), (32, 16, 4, 4), (100, 1568), (10, 100)]


def test_uniform_by_hand():
    # 256, 8192, 156800 and 1000 weights; 1 % of each, rounded to nearest.
    assert kept_counts("uniform", CNN_SMALL, 0.99) == [3, 82, 1568, 10]
    assert kept_counts("uniform", [(10, 5)], 0.99) == [1]  # half a weight: never none
    assert kept_counts("uniform", [(2, 2)], 0.999) == [1]
    assert kept_counts("uniform", CNN_SMALL, 0.0) == [256, 8192, 156800, 1000]


def test_rounding_is_of_the_decimal_number_not_of_its_float():
    # 1 - 0.9 is 0.09999999999999998 in floating point; a tenth of 25 and of 35 are exact halves, and go to
    # even.
    assert kept_counts("uniform", [(5, 5), (5, 7)], 0.9) == [2, 4]


def test_erk_by_hand():
    # Kept counts are proportional to the sums of the shapes: 25, 56, 1668 and 110, in all 1859. 1 % of the
    # 166248 weights rounds to 1662, so the shares are 22.35, 50.06, 1491.23 and 98.34. The floors add up to
    # 1661, and the one left goes to the largest remainder, the first.
    assert kept_counts("erk", CNN_SMALL, 0.99) == [23, 50, 1491, 98]


def test_erk_caps_thin_layers_and_rescales_the_rest():
    # Half of 16 + 400 + 400 = 816 is 408. Sums 8, 40, 40: the scale 408/88 would keep 37 of the first layer's
    # 16, so it stays dense, and the others halve what is left: 196 each.
    assert kept_counts("erk", [(4, 4), (20, 20), (20, 20)], 0.5) == [16, 196, 196]


def test_erk_keeps_one_weight_where_the_share_is_smaller():
    # 10 of 1000 + 4 = 1004 (1 %): shares 10 * 110 / 114 = 9.65 and 0.35; the second layer still keeps one.
    assert kept_counts("erk", [(10, 100), (2, 2)], 0.99) == [9, 1]


def test_erk_of_a_grouped_convolution_counts_the_inputs_of_a_group():
    # Depthwise 8 channels, 3x3: weight (8, 1, 3, 3), sum 15; pointwise (8, 8, 1, 1), sum 18. 33 of 136 kept
    # would be 15 and 18 exactly.
    sparsity = 1 - 33 / 136
    assert kept_counts("erk", [(8, 1, 3, 3), (8, 8, 1, 1)], sparsity) == [15, 18]


@pytest.mark.parametrize("seed", range(30))
def test_erk_meets_the_total_exactly_and_is_proportional_inside_its_limits(seed):
    rng = random.Random(seed)
    shapes = []
    for _ in range(rng.randint(1, 12)):
        linear = rng.random() < 0.4
        kernel = () if linear else (rng.choice([1, 3, 5]),) * 2
        shapes.append((rng.randint(1, 64), rng.randint(1, 64), *kernel))
    sizes = [math.prod(shape) for shape in shapes]
    sparsity = rng.choice([0.0, 0.3, 0.5, 0.8, 0.9, 0.95])
    total = round((1 - Fraction(str(sparsity))) * sum(sizes))
    if total < len(shapes):
        pytest.skip("not enough weights for these layers")
    kept = kept_counts("erk", shapes, sparsity)
    assert sum(kept) == total
    assert all(1 <= count <= size for count, size in zip(kept, sizes, strict=True))
    # One scale explains every layer strictly inside its limits, up to the rounding by less than one weight.
    inside = [(count, sum(shape)) for count, shape, size in zip(kept, shapes, sizes, strict=True) if 1 < count < size]
    low = max(((count - 1) / ratio for count, ratio in inside), default=0)
    high = min(((count + 1) / ratio for count, ratio in inside), default=1)
    assert low < high


def test_budgets_keep_everything_at_sparsity_zero():
    for budget in BUDGETS:
        scores = [torch.rand(shape) for shape in CNN_SMALL]
        assert kept_counts(budget, CNN_SMALL, 0, scores=scores) == [math.prod(shape) for shape in CNN_SMALL]


@pytest.mark.parametrize("sparsity", [1.2, 1.0, -0.1, float("nan"), float("inf"), "0.9", None, True])
def test_sparsity_must_be_a_fraction(sparsity):
    with pytest.raises(InputError, match="fraction of weights removed"):
        kept_counts("uniform", CNN_SMALL, sparsity)


def test_budget_errors():
    with pytest.raises(InputError, match="Did you mean 'uniform'"):
        kept_counts("unifrom", CNN_SMALL, 0.9)
    with pytest.raises(InputError, match="leaves 2 of 200 weights, but 3 layers"):
        kept_counts("erk", [(10, 10), (5, 10), (5, 10)], 0.99)
    with pytest.raises(InputError, match="layers with weights"):
        kept_counts("erk", [(10, 0)], 0.5)
    with pytest.raises(InputError, match="layers with weights"):
        kept_counts("uniform", [], 0.5)


def test_scaled_start_is_hydras():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.25, 4.0, -1.0]])
    scores = CRITERIA["score"].scores(weight, torch.Generator())
    torch.testing.assert_close(scores, math.sqrt(6 / 3) * weight.abs() / 4)
    conv = torch.randn(4, 3, 5, 5)
    fan_in = nn.init._calculate_correct_fan(conv, "fan_in")
    top = CRITERIA["score"].scores(conv, torch.Generator()).max().item()
    assert top == pytest.approx(math.sqrt(6 / fan_in))


def test_scores_of_a_layer_of_zeros_are_finite_and_equal():
    scores = CRITERIA["score"].scores(torch.zeros(2, 3), torch.Generator())
    assert torch.equal(scores, torch.zeros(2, 3))


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_have_the_shape_and_type_of_the_weight(name, dtype):
    weight = torch.randn(3, 2, 4, 4, dtype=dtype)
    before = weight.clone()
    gradients = Gradients(torch.randn_like(weight), torch.rand_like(weight))
    scores = CRITERIA[name].scores(weight, torch.Generator().manual_seed(1), gradients)
    assert (scores.shape, scores.dtype) == (weight.shape, dtype) and torch.isfinite(scores).all()
    assert torch.equal(weight, before)


def test_random_scores_follow_the_seed_alone():
    def draw(seed):
        return CRITERIA["random"].scores(torch.zeros(50), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_layers_are_found_in_order_and_shared_ones_once():
    assert list(prunable_layers(tiny_residual())) == ["stem", "conv1", "conv2", "skip", "head"]
    layer = nn.Linear(4, 4)
    assert list(prunable_layers(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


def test_patterns_choose_layers():
    model = tiny_residual()
    assert list(select_layers(model)) == ["stem", "conv1", "conv2", "skip", "head"]
    assert list(select_layers(model, layers=["conv*", "head"])) == ["conv1", "conv2", "head"]
    assert list(select_layers(model, exclude="head")) == ["stem", "conv1", "conv2", "skip"]
    assert list(select_layers(model, layers="conv?", exclude=["conv2"])) == ["conv1"]


def test_pattern_errors_list_the_layers():
    with pytest.raises(InputError, match="layers: the pattern 'conv' matches no layer.*'stem', 'conv1'"):
        select_layers(tiny_residual(), layers=["conv"])
    with pytest.raises(InputError, match="exclude: the pattern 'fc'"):
        select_layers(tiny_conv(), exclude=["fc"])
    with pytest.raises(InputError, match="leaves no layer"):
        select_layers(tiny_conv(), exclude="*")
    with pytest.raises(InputError, match="nothing to prune"):
        select_layers(nn.Sequential(nn.Flatten(), nn.ReLU()))
