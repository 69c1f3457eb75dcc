"""register(): which forwards are a residual block's, and what is said of the others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from foreign import Named, Nested, Shortcut
from fusion import expect_paths
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, regnet_x_400mf

import fusedres


def other(forward: Callable[[nn.Module, Tensor], object]) -> nn.Module:
    """Return a block with the children of Shortcut and another forward."""
    cls = fusedres.register(type("Mine", (Shortcut,), {"forward": forward}))
    return cls(4, 4)


def twice_used(self: nn.Module, x: Tensor) -> Tensor:
    h = torch.relu(self.bn1(self.conv1(x)))
    return torch.relu(self.bn2(self.conv2(h)) + x + h)


def unused(self: nn.Module, x: Tensor) -> Tensor:
    self.bn1(self.conv1(x))
    return Shortcut.forward(self, x)


def into_input(self: nn.Module, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
    residual = self.shortcut(x)
    residual += out
    return torch.relu(residual)


def preactivated(self: nn.Module, x: Tensor) -> Tensor:
    out = self.conv1(torch.relu(self.bn1(x)))
    return self.conv2(torch.relu(self.bn2(out))) + x


UNFIT: dict[str, tuple[Callable[[nn.Module, Tensor], object], str]] = {
    "without norms": (lambda self, x: torch.relu(self.conv2(torch.relu(self.conv1(x))) + x), "not the BatchNorm of"),
    "scaled": (lambda s, x: torch.relu(0.5 * s.bn2(s.conv2(torch.relu(s.bn1(s.conv1(x))))) + x), "rmul of a tensor"),
    "weighted sum": (
        lambda s, x: torch.relu(torch.add(s.bn2(s.conv2(torch.relu(s.bn1(s.conv1(x))))), x, alpha=2)),
        "calls add",
    ),
    "unused result": (unused, "not in its result"),
    "sum into the input": (into_input, "adds to its input in place"),
    "shape": (lambda s, x: torch.relu(s.bn2(s.conv2(x)) + x) if x.shape[0] else x, "shape of a tensor"),
    "value": (lambda s, x: torch.relu(s.bn2(s.conv2(x)) + x) if x else x, "depends on a tensor's value"),
    "tuple": (lambda s, x: (Shortcut.forward(s, x), x), "returns a tuple"),
    "error": (lambda s, x: s.conv9(x), "cannot be read: AttributeError"),
    "dropout": (
        lambda s, x: torch.relu(s.bn2(s.conv2(nn.functional.dropout(torch.relu(s.bn1(s.conv1(x)))))) + x),
        "calls dropout",
    ),
}


WITH_TAILS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "plain": lambda self, x: torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))),
    "pre-activation": preactivated,
    "without ReLU inside": lambda s, x: torch.relu(s.bn2(s.conv2(s.bn1(s.conv1(x)))) + x),
    "intermediate used twice": twice_used,
}


@pytest.mark.parametrize("what", WITH_TAILS)
def test_another_computation_with_batchnorm_runs_its_tails_fused(what: str) -> None:
    block = other(WITH_TAILS[what])
    assert fusedres.register(block) is block
    twin, x = fusedres.fuse(copy.deepcopy(block), memory="min"), torch.randn(2, 4, 5, 5)
    with expect_paths(tail_forward=2):
        torch.testing.assert_close(twin(x), block(x), rtol=1e-4, atol=1e-5)
    assert [row[1:] for row in fusedres.report(twin)] == [("Mine", True, "")]


@pytest.mark.parametrize("what", UNFIT)
def test_another_computation_stays_as_it_is(what: str) -> None:
    forward, reason = UNFIT[what]
    block = other(forward)
    cls = type(block)
    fusedres.fuse(block)
    assert type(block) is cls
    (row,) = fusedres.report(block)
    assert not row.fused and reason in row.reason, row.reason
    with pytest.raises(ValueError, match=r"register: .*Mine must compute relu\(branch \+ shortcut\), or have tails"):
        fusedres.register(block)


def test_register_returns_its_argument_and_refuses_what_is_no_module() -> None:
    assert fusedres.register(Shortcut) is Shortcut
    block = Shortcut(4, 4)
    assert fusedres.register(block) is block
    with pytest.raises(TypeError, match=r"register: block must be a torch.nn.Module or a class of them, got int"):
        fusedres.register(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="got dict"):
        fusedres.register(dict)  # type: ignore[type-var]


def test_a_class_that_nobody_registered_stays_unfused() -> None:
    plain = type("Unknown", (Shortcut,), {"forward": lambda self, x: Shortcut.forward(self, x)})
    block = plain(4, 4)
    fusedres.fuse(block)
    assert type(block) is plain


def test_a_method_that_a_fused_class_would_hide_keeps_a_block_unfused() -> None:
    for name in ("anatomy", "restored", "_read", "_base"):
        cls = fusedres.register(type("Mine", (Shortcut,), {name: lambda self: 1}))
        block = cls(4, 4)
        with pytest.warns(UserWarning, match=f"with a {name} of its own"):
            fusedres.fuse(block)
        assert type(block) is cls and getattr(block, name)() == 1


def test_known_classes_are_found_by_their_full_name() -> None:
    for module, name in (("mmdet.models.backbones.resnet", "Bottleneck"), ("wespeaker.models.resnet", "BasicBlock")):
        origin = Named if name == "Bottleneck" else Shortcut
        body = {"forward": origin.forward, "__module__": module, "__qualname__": name}
        known = type(name, (origin,), body)
        block = known(16, 4) if origin is Named else known(4, 4)
        assert fusedres.report(fusedres.fuse(block))[0] == ("(model)", name, True, "")
        child = type("Derived", (known,), {})  # a subclass without a forward of its own
        block = child(16, 4) if origin is Named else child(4, 4)
        assert fusedres.report(fusedres.fuse(block))[0].fused


def test_reading_a_block_changes_nothing_and_needs_no_memory() -> None:
    block = Named(16, 4)
    before = {name: set(module.__dict__) for name, module in block.named_modules()}
    classes = {name: type(module) for name, module in block.named_modules()}
    fusedres.report(block)
    assert {name: set(module.__dict__) for name, module in block.named_modules()} == before
    assert {name: type(module) for name, module in block.named_modules()} == classes
    with torch.device("meta"):
        model = nn.Sequential(Nested(4, 8, 2))
    fusedres.register(Nested)
    assert type(fusedres.fuse(model)[0]).__name__ == "FusedNested"


# --- what report() and fuse() say of classes that nobody declared


def unknown(name: str, base: type[nn.Module] = Shortcut, **body: object) -> type[nn.Module]:
    return type(name, (base,), {"forward": lambda self, x: base.forward(self, x), **body})


def test_residual_looking_blocks_of_unknown_classes_have_a_row() -> None:
    """The reason says whether register() helps, or what does not fit. A block inside such a block has no row."""
    fitting, video = unknown("MyBasicBlock"), unknown("VideoBlock")(4, 4)
    video.conv1 = nn.Conv3d(4, 4, 3)

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean()

    class GatedBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gate = unknown("InnerBlock")(4, 4), nn.Sequential(Gate())

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(self.inner(x)) + x

    model = nn.Sequential(fitting(4, 4), video, GatedBlock(), nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)))
    with pytest.warns(UserWarning, match=r"fuse: nothing in Sequential was changed; 0: its class is not known; "):
        fusedres.fuse(model)
    rows = fusedres.report(model)
    assert [(row.name, row.kind, row.fused) for row in rows] == [
        ("0", "MyBasicBlock", False),
        ("1", "VideoBlock", False),
        ("2", "GatedBlock", False),
    ]
    register = f"fusedres.register({fitting.__module__}.MyBasicBlock)"
    assert rows[0].reason == f"its class is not known; {register} lets fuse() switch it"
    assert rows[1].reason == "conv1 is a Conv3d, not a Conv2d"
    assert rows[2].reason.startswith("its class is not known")  # the tails of the block inside
    fusedres.register(fitting)
    fusedres.fuse(model)
    assert fusedres.report(model)[0].fused


def test_fuse_warns_where_it_changed_nothing() -> None:
    with pytest.warns(UserWarning, match="nothing in Linear was changed; it has no residual blocks"):
        fusedres.fuse(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedres.fuse(nn.Linear(2, 2), filter=lambda *_: True)  # the filter may have chosen nothing on purpose
        model = fusedres.fuse(Shortcut(4, 4)) if fusedres.register(Shortcut) else None
        fusedres.fuse(model)


def test_other_networks_of_torchvision() -> None:
    with torch.device("meta"):
        mobile = mobilenet_v3_small()
    with pytest.warns(UserWarning, match="nothing in MobileNetV3 was changed"):
        fusedres.fuse(mobile)
    assert not any(row.fused for row in fusedres.report(mobile))
    rows = fusedres.report(fusedres.fuse(regnet_x_400mf()))
    assert len(rows) == 22 and all(row.fused for row in rows)
