"""The experiments at a reduced size, against closed forms and what the papers say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from torch import nn

import fusedres
from fusedres import models
from fusedres.analysis import (
    AnalysisError,
    Data,
    Recipe,
    Result,
    degradation,
    ensembles,
    ensembles_of_trained,
    gradient_flow_by_depth,
    highway,
    load,
    shattered,
    shattered_by_depth,
    shortcuts,
    unrolling_of_designs,
)
from fusedres.analysis.highway import networks_of_layers
from fusedres.analysis.observing import observe
from fusedres.analysis.random_networks import Design, correlation, derivatives, residual_theory
from fusedres.analysis.shortcuts import GatedShortcut, ScaledShortcut

SHORT = Recipe(epochs=2, learning_rate=0.1)


@cache
def data() -> Data:
    return load(images=384)


@cache
def colour() -> Data:
    return (
        data()
        .in_colour()
        ._replace(test_images=data().in_colour().test_images[:100], test_labels=data().test_labels[:100])
    )


@cache
def small_ensembles() -> Result:
    networks = {"ResNet-8": lambda: models.resnet(8), "plain-14": lambda: models.plain(14)}
    return ensembles_of_trained(colour(), networks, Recipe(epochs=4, learning_rate=0.1), trials=8)


RESULTS: dict[str, Callable[[], Result]] = {
    "gradient-flow": cache(lambda: gradient_flow_by_depth(colour(), depths=(8, 20), seeds=2)),
    "unrolling": cache(lambda: unrolling_of_designs(colour(), depth=14)),
    "degradation": cache(lambda: degradation(colour(), depths=(8, 14), recipe=SHORT, seeds=2)),
    "shortcuts": cache(lambda: shortcuts(colour(), depth=8, recipe=SHORT, seeds=1)),
    "highway": cache(
        lambda: highway(data(), networks_of_layers(data(), 10), Recipe(epochs=10, learning_rate=0.05), seeds=2)
    ),
    "ensembles": small_ensembles,
    "shattered": cache(lambda: shattered_by_depth(seeds=60)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_json_with_a_conclusion_of_its_numbers(name: str) -> None:
    result = RESULTS[name]()
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["experiment"] == name == type(result).name
    assert found["conclusion"] == result.conclusion() and found["conclusion"].endswith(".")
    assert set(found) == {"experiment", "conclusion", *(field.name for field in dataclasses.fields(result))}


@pytest.mark.parametrize("name", RESULTS)
def test_a_picture_has_titles_labels_and_legends(name: str) -> None:
    from matplotlib.figure import Figure

    result = RESULTS[name]()
    figure = Figure(result.size, layout="constrained")
    result.draw(figure)
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert len(axes) >= 2
    for axis in axes:
        assert axis.get_title() and axis.get_xlabel() and (axis.get_ylabel() or axis.get_yticklabels())
        drawn = axis.lines or axis.images or axis.patches
        assert drawn
    assert any(axis.get_legend() is not None for axis in axes)
    for axis in axes:
        legend = axis.get_legend()
        names = [text.get_text() for text in legend.get_texts()] if legend else []
        assert len(names) == len(set(names))
    assert result.png().startswith(b"\x89PNG")


def test_the_gradient_of_plain_networks_grows_with_depth_and_that_of_residual_ones_less() -> None:
    networks = RESULTS["gradient-flow"]().networks  # type: ignore[attr-defined]
    growth = {(each.network, each.depth): each.growth for each in networks if each.seed == 0}
    assert growth["plain", 20] > 2 * growth["plain", 8]
    assert growth["residual", 20] < growth["plain", 20]
    assert RESULTS["gradient-flow"]().difference < 1e-12  # type: ignore[attr-defined]


# Autocorrelation at lag 1 and lag 5, as it was measured before this code was written.
TABLE = {
    "white noise": (0.0, 0.0),
    "brown noise": (0.97, 0.87),
    "plain, centred, 10 layers": (0.76, 0.21),
    "plain, centred, 24 layers": (-0.01, -0.02),
    "plain, BatchNorm, 24 layers": (-0.01, 0.0),
    "residual, BatchNorm, β = 1, 10 layers": (0.85, 0.44),
    "residual, BatchNorm, β = 1, 24 layers": (0.74, 0.19),
    "residual, BatchNorm, β = 1, 50 layers": (0.64, 0.08),
    "residual, BatchNorm, β = 0.1, 50 layers": (0.87, 0.55),
    "plain, not centred, PyTorch's default, 24 layers": (0.96, 0.79),
}


@pytest.mark.parametrize("label", TABLE)
def test_the_autocorrelation_of_derivatives_is_that_of_the_table(label: str) -> None:
    [found] = [each for each in RESULTS["shattered"]().networks if each.label == label]  # type: ignore[attr-defined]
    assert (found.lags[1], found.lags[5]) == pytest.approx(TABLE[label], abs=0.05)
    assert found.lags[0] == pytest.approx(1)


def test_the_correlation_falls_by_half_a_plain_layer_and_as_theory_says_over_residual_ones() -> None:
    plain = correlation(Design("BatchNorm"), range(1, 9), range(200), inputs=128)
    for depth, values in plain.items():
        assert values.mean().item() == pytest.approx(2.0**-depth, rel=0.1)
    residual = correlation(Design("BatchNorm", beta=1.0), (10, 50), range(60), inputs=128)
    for depth, measured in ((10, 0.270), (50, 0.096)):
        assert residual[depth].mean().item() == pytest.approx(measured, abs=0.012)
        assert residual[depth].mean().item() == pytest.approx(residual_theory(depth, 1.0), abs=0.012)


@pytest.mark.parametrize(
    "design", [Design("BatchNorm"), Design("centring"), Design("BatchNorm", beta=0.5), Design("none")]
)
def test_derivatives_are_autograds_with_constant_statistics(design: Design) -> None:
    """The same network, written for autograd: the seed draws the first layer, then each layer, then the sum."""
    width, points, depth = 20, 40, 3
    found = derivatives(design, (depth,), points, (5,), width)[depth][0].double()
    random = torch.Generator().manual_seed(5)
    x = torch.linspace(-2, 2, points).double().requires_grad_()
    weight, bias = (torch.randn((width, 1), generator=random).double() for _ in range(2))

    def norm(h: torch.Tensor) -> torch.Tensor:
        if design.norm == "none":
            return h
        centred = h - h.mean(1, keepdim=True).detach()
        return (
            centred / centred.square().mean(1, keepdim=True).sqrt().detach() if design.norm == "BatchNorm" else centred
        )

    h = weight * x + bias
    for _ in range(depth):
        layer = torch.randn((width, width), generator=random).double() * math.sqrt(2 / width)
        h = torch.relu(norm(layer @ h)) if design.beta is None else h + design.beta * (layer @ torch.relu(norm(h)))
    last = h if design.beta is None else torch.relu(norm(h))
    y = torch.randn((1, width), generator=random).double() @ last
    expected = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # found is in float32


def test_derivatives_along_a_line_through_a_model() -> None:
    torch.manual_seed(0)
    start, end = colour().images[:1], colour().images[1:2]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    found = shattered(nn.Sequential(linear, nn.Sigmoid()), start, end)
    assert found.networks[0].lags[5] > 0.8  # smooth
    deep = shattered(models.plain(56), start, end).networks[0].lags[1]
    residual = shattered(models.resnet(56), start, end).networks[0].lags[1]
    assert deep < 0.2 < 0.5 < residual
    model = models.resnet(8)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shattered(model, start, end)
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_inputs_that_make_no_line_are_said() -> None:
    with pytest.raises(AnalysisError, match=r"start and end must be of one shape \(1, …\), got \(2, 3\) and \(2, 3\)"):
        shattered(nn.Linear(3, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(AnalysisError, match="points must be at least 30, got 9"):
        shattered(nn.Linear(3, 3), torch.zeros(1, 3), torch.zeros(1, 3), points=9)


def test_deleting_a_block_of_a_plain_network_hurts_and_of_a_residual_one_does_less() -> None:
    residual, plain = small_ensembles().networks  # type: ignore[attr-defined]
    assert residual.error < 0.3 and len(residual.deletions) == 3 and len(plain.deletions) == 4
    assert [each.changes_shape for each in residual.deletions] == [False, True, True]
    assert plain.deletions[-1].error > 0.5 > residual.deletions[-1].error
    assert plain.paths is None


def test_a_deleted_block_leaves_its_shortcut() -> None:
    torch.manual_seed(0)
    model = models.resnet(8).eval()
    found = ensembles(model, colour().test_images, colour().test_labels, trials=4)
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)  # now the branch is 0
    with torch.no_grad():
        logits = model(colour().test_images)
    expected = nn.functional.cross_entropy(logits, colour().test_labels).item()
    assert found.networks[0].deletions[1].loss == pytest.approx(expected, rel=1e-5)


def test_paths_are_binomial_and_their_gradients_add_up() -> None:
    torch.manual_seed(0)
    model = fusedres.fuse(timm.create_model("resnet10t", num_classes=10)).double().eval()
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    found = ensembles(model, images, labels, trials=2).networks[0].paths
    assert found is not None
    assert [each.paths for each in found.lengths] == [1, 4, 6, 4, 1]
    assert found.difference < 1e-12 and found.mean_length == 2
    first, last = found.carrying()
    assert sum(each.paths * each.norm for each in found.lengths[first : last + 1]) >= 0.95 * sum(
        each.paths * each.norm for each in found.lengths
    )
    assert found.share_of_paths(0, 4) == 1


def test_branches_that_are_zero_leave_the_shortest_path_alone() -> None:
    torch.manual_seed(0)
    blocks = [fusedres.ReZero(nn.Linear(6, 6)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 4)).double()
    x, labels = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 4
    found = ensembles(model, x, labels, trials=3).networks[0].paths
    assert found is not None and found.carrying() == (0, 0)
    grad = observe(model, x, labels)[0].grad_x.norm().item()
    assert [each.of_sum for each in found.lengths] == pytest.approx([grad, 0, 0, 0])


def test_swapped_blocks_have_a_lower_tau_and_equal_blocks_change_nothing() -> None:
    torch.manual_seed(0)
    block = fusedres.PreActBasicBlock(8, 8)
    twins = [fusedres.PreActBasicBlock(8, 8) for _ in range(4)]
    for twin in twins:
        twin.load_state_dict(block.state_dict())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *twins, nn.Flatten(), nn.Linear(512, 10)).eval()
    found = ensembles(model, colour().test_images, colour().test_labels, trials=10).networks[0]
    assert any(each.tau < 0.9 for each in found.permutations)
    assert [each.loss for each in found.permutations] == pytest.approx([found.loss] * 10)


def test_every_kind_of_shortcut_is_what_its_name_says() -> None:
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(ScaledShortcut(0.5)(x), x / 2)
    gate = GatedShortcut(4, -6.0)
    nn.init.zeros_(gate.gate.weight)
    torch.testing.assert_close(gate(x), x * (1 - torch.sigmoid(torch.tensor(-6.0))))
    order = [variant.network for variant in RESULTS["shortcuts"]().variants]  # type: ignore[attr-defined]
    assert sorted(order) == sorted(["identity", "x / 2", "gate, b = 0", "gate, b = −6", "1x1 convolution", "dropout"])
    losses = [variant.typical_loss for variant in RESULTS["shortcuts"]().variants]  # type: ignore[attr-defined]
    assert losses == sorted(losses)


def test_highway_layers_that_carry_train_first() -> None:
    carries, half, _ = RESULTS["highway"]().variants  # type: ignore[attr-defined]
    assert (carries.network, half.network) == ("highway, b = −3", "highway, b = 0")
    assert carries.typical_loss < half.typical_loss


def test_numbers_that_are_not_finite_become_null() -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Result):
        name = "broken"
        losses: list[float]

        def conclusion(self) -> str:
            return "None."

    assert Broken([math.nan, 1.0, math.inf]).to_dict()["losses"] == [None, 1.0, None]
