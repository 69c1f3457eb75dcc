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
from torch import Tensor, nn

import fusedres
from fusedres import models
from fusedres.analysis import (
    AnalysisError,
    Data,
    Degradation,
    Ensembles,
    Recipe,
    Result,
    Shortcuts,
    degradation,
    ensembles,
    ensembles_of_trained,
    gradient_flow,
    gradient_flow_by_depth,
    highway,
    load,
    shattered,
    shattered_by_depth,
    shortcuts,
    unrolling_of_designs,
)
from fusedres.analysis.degradation import Depth
from fusedres.analysis.ensembles import Ensemble
from fusedres.analysis.highway import networks_of_layers
from fusedres.analysis.lesions import Deletion
from fusedres.analysis.observing import observe
from fusedres.analysis.random_networks import Design, correlation, derivatives, residual_theory
from fusedres.analysis.shattered import NETWORKS, POINTS
from fusedres.analysis.shortcuts import DroppedShortcut, GatedShortcut, ScaledShortcut
from fusedres.analysis.variants import Variant
from fusedres.analysis.work import Run

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
    "shattered": cache(lambda: shattered_by_depth(seeds=4)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_json_with_a_conclusion_of_its_numbers(name: str) -> None:
    result = RESULTS[name]()
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["experiment"] == name == type(result).name
    assert len(found["conclusion"]) > 40 and found["conclusion"].endswith(".")
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


# Autocorrelation of dy/dx at lag 1 and lag 5, as an earlier prototype measured it with 20 networks.
TABLE = {
    ("plain, centred", 10): (0.76, 0.21),
    ("plain, centred", 24): (-0.01, -0.02),
    ("plain, BatchNorm", 24): (-0.01, 0.0),
    ("residual, BatchNorm, β = 1", 10): (0.85, 0.44),
    ("residual, BatchNorm, β = 1", 24): (0.74, 0.19),
    ("residual, BatchNorm, β = 1", 50): (0.64, 0.08),
    ("residual, BatchNorm, β = 0.1", 50): (0.87, 0.55),
    ("plain, not centred, PyTorch's default", 24): (0.96, 0.79),
}


@cache
def measured_derivatives(name: str) -> dict[int, Tensor]:
    design, depths = NETWORKS[name]
    return derivatives(design, depths, POINTS, range(60))


def autocorrelation(values: Tensor, lag: int) -> Tensor:
    centred = values - values.mean(1, keepdim=True)
    return (centred[:, lag:] * centred[:, :-lag]).sum(1) / centred.square().sum(1)


@pytest.mark.parametrize(("name", "depth"), TABLE)
def test_the_autocorrelation_of_derivatives_is_that_of_the_table(name: str, depth: int) -> None:
    for lag, expected in zip((1, 5), TABLE[name, depth], strict=True):
        found = autocorrelation(measured_derivatives(name)[depth].double(), lag)
        error = found.std().item() / math.sqrt(len(found))
        assert found.mean().item() == pytest.approx(expected, abs=0.05 + error)


def test_white_and_brown_noise_have_the_autocorrelation_of_theory() -> None:
    white, brown = shattered_by_depth(seeds=4).networks[:2]
    assert (white.label, brown.label) == ("white noise", "brown noise")
    assert white.lags[0] == pytest.approx(1) and abs(white.lags[5]) < 0.15
    assert brown.lags[1] == pytest.approx(0.9715, abs=0.03)  # the expectation for 256 points, about the mean


def test_the_correlation_falls_by_half_a_plain_layer_and_as_theory_says_over_residual_ones() -> None:
    plain = correlation(Design("BatchNorm"), range(1, 9), range(150), inputs=128)
    for depth, values in plain.items():
        assert values.mean().item() == pytest.approx(2.0**-depth, rel=0.1)
    residual = correlation(Design("BatchNorm", beta=1.0), (10, 50), range(40), inputs=128)
    for depth, measured in ((10, 0.270), (50, 0.096)):
        assert residual[depth].mean().item() == pytest.approx(measured, abs=0.02)
        assert residual[depth].mean().item() == pytest.approx(residual_theory(depth, 1.0), abs=0.02)


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
    assert [each.keeps_input for each in residual.deletions] == [True, False, False]
    assert all(each.keeps_input for each in plain.deletions)
    assert plain.deletions[-1].error > residual.deletions[-1].error + 0.1
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
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    found = ensembles(model, images, labels, trials=2).networks[0].paths
    assert found is not None
    assert [each.paths for each in found.lengths] == [1, 4, 6, 4, 1]
    assert found.difference < 1e-12 and found.mean_length == 2
    first, last = found.carrying(found.sizes)
    assert sum(found.sizes[first : last + 1]) >= 0.95 * sum(found.sizes)
    assert found.carrying([0.01, 1.0, 2.0, 1.0, 0.01]) == (1, 3)
    assert found.share_of_paths(0, 4) == 1 and found.share_of_paths(1, 2) == 10 / 16


def test_branches_that_are_zero_leave_the_shortest_path_alone() -> None:
    torch.manual_seed(0)
    blocks = [fusedres.ReZero(nn.Linear(6, 6)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 4)).double()
    x, labels = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 4
    found = ensembles(model, x, labels, trials=3).networks[0].paths
    assert found is not None and found.carrying(found.sizes) == (0, 0)
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
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(ScaledShortcut(0.5)(x), x / 2)
    gate = GatedShortcut(4, -6.0)
    nn.init.zeros_(gate.gate.weight)
    torch.testing.assert_close(gate(x), x * (1 - torch.sigmoid(torch.tensor(-6.0))))
    dropped = DroppedShortcut()(x)
    assert 0 < (dropped == 0).sum() < x.numel()
    torch.testing.assert_close(dropped[dropped != 0], x[dropped != 0])
    assert torch.equal(DroppedShortcut().eval()(x), x / 2)


def test_shortcuts_are_ordered_by_their_losses() -> None:
    order = [variant.network for variant in RESULTS["shortcuts"]().variants]  # type: ignore[attr-defined]
    assert sorted(order) == sorted(["identity", "x / 2", "gate, b = 0", "gate, b = −6", "1x1 convolution", "dropout"])
    losses = [variant.typical_loss for variant in RESULTS["shortcuts"]().variants]  # type: ignore[attr-defined]
    assert losses == sorted(losses)


def test_highway_layers_that_carry_train_first() -> None:
    carries, half, _ = RESULTS["highway"]().variants  # type: ignore[attr-defined]
    assert (carries.network, half.network) == ("highway, b = −3", "highway, b = 0")
    assert carries.typical_loss < half.typical_loss


def variant(name: str, *losses: float) -> Variant:
    return Variant(name, [Run(name, seed, [2.0, loss], loss, 0.5, 0.5) for seed, loss in enumerate(losses)])


def test_conclusions_say_what_diverged() -> None:
    found = Degradation(
        [Depth("plain", 8, variant("plain 8", 0.1, 0.4)), Depth("plain", 14, variant("plain 14", 0.2, math.nan))]
    )
    assert found.conclusion() == (
        "The training loss of plain networks goes from 0.2 at depth 8 to 0.2, 1 of 2 seeds diverged at depth 14 "
        "(1 times), higher in 2 of 2 seeds."
    )
    gone = Degradation([Depth("plain", 8, variant("plain 8", 0.1)), Depth("plain", 14, variant("plain 14", math.inf))])
    assert "to diverged at depth 14, higher in 1 of 1 seeds" in gone.conclusion()
    ordered = Shortcuts(
        [variant("identity", 1e-9, 0.5), variant("x / 2", 0.5, math.nan), variant("mine", math.inf, 1.0)]
    )
    assert ordered.conclusion() == (
        "Training loss in order, geometric mean over the seeds (2): identity (at most 0.000707) < x / 2 (0.5, 1 of 2 "
        "seeds diverged) < mine (1, 1 of 2 seeds diverged). Each is below the next in 2, 1 of 2 seeds. Test errors of "
        "ResNet-110 on CIFAR-10 (He et al. 2016), in this order: identity: 6.61 %; x / 2: failed."
    )
    for result in (found, gone, ordered):
        assert result.png().startswith(b"\x89PNG")


def test_an_ensemble_without_permutations_and_paths_has_a_conclusion_and_a_picture() -> None:
    found = Ensembles([Ensemble("net", 1.0, 0.25, 0.9, [Deletion("a", True, 1.0, 0.5)], [], None)])
    assert found.conclusion() == (
        "net has 25.0% wrong answers (90% is chance); with one block deleted 50.0% in the median and 50.0% at most (a)."
    )
    assert found.png().startswith(b"\x89PNG")


def test_more_variants_than_colours_are_all_drawn() -> None:
    from matplotlib.figure import Figure

    found = Shortcuts([variant(f"v{index}", 0.1 + index) for index in range(9)])
    figure = Figure()
    found.draw(figure)
    assert len(figure.axes[0].lines) == 18 and len(figure.axes[1].lines) == 9


def test_zero_gradients_are_no_finding() -> None:
    model = models.resnet(8).double()
    nn.init.zeros_(model.fc.weight)
    images, labels = colour().images[:4].double(), colour().labels[:4]
    assert "the gradient is 0 at every block" in gradient_flow(model, images, labels).conclusion()
    assert ensembles(model, images, labels, trials=2).png().startswith(b"\x89PNG")


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(AnalysisError, match="there must be seeds and networks, got 0 and 2"):
        degradation(data(), depths=(8,), seeds=0)
    with pytest.raises(AnalysisError, match="there must be seeds and networks, got 1 and 0"):
        highway(data(), networks={}, seeds=1)
    with pytest.raises(AnalysisError, match="there must be networks, depths and seeds, got 3, 0 and 3"):
        gradient_flow_by_depth(data(), depths=())
    with pytest.raises(AnalysisError, match="there must be seeds, got 0"):
        shattered_by_depth(seeds=0)


def test_numbers_that_are_not_finite_become_null() -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Result):
        name = "broken"
        losses: list[float]

        def conclusion(self) -> str:
            return "None."

        def draw(self, figure: object) -> None: ...

    assert Broken([math.nan, 1.0, math.inf]).to_dict()["losses"] == [None, 1.0, None]
