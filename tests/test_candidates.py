"""Candidates of the GEMM-shaped Triton kernels fit the GPU; a problem's are computed once, for any number of rows."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from fusedres.kernels.conv_dgrad import configs as conv_dgrad
from fusedres.kernels.conv_fprop import configs as conv_fprop
from fusedres.kernels.conv_wgrad import configs as conv_wgrad
from fusedres.kernels.gram import configs as gram
from fusedres.kernels.one_pass_tail import configs as one_pass_tail
from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import H100, Gpu, record_launches
from fusedres.ops.launch import launches
from fusedres.values import DENSE, Centred, Folded, Gated, Gradient, Raw, ShortcutInput

# Only one test uses each of these GPUs, because results that are computed without the interpreter stay in caches.
GPUS = {"sm_80": Gpu(80, 41, 166_912), "sm_89": Gpu(89, 41, 101_376), "sm_90": Gpu(90, 41, 232_448)}
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
CHANNELS = (3, 64, 100, 128, 256, 1024)


@pytest.fixture
def compiled(monkeypatch):
    """Make configs as if without the interpreter."""
    for module in (conv_dgrad, conv_fprop, conv_wgrad, gram, one_pass_tail):
        monkeypatch.setattr(module, "INTERPRETED", False)


def _weight(k, c, taps):
    return SimpleNamespace(shape=(k, c, taps, taps))


def _tensor(dtype, *shape):
    return SimpleNamespace(dtype=dtype, shape=shape, device=torch.device("meta"), is_cpu=False)


def _everything(gpu, dtype, k, c, extra):
    """Yield each kernel, a function for the bytes of its operands in shared memory, and its candidates."""
    size = dtype.itemsize
    flags = (extra, not extra)

    def operands(rows, columns, depth, more=0):
        return lambda f: f.num_stages * (f[rows] * (1 + more) + f[columns]) * f[depth] * size

    x, y = _tensor(dtype, 8, c, 56, 56), _tensor(dtype, 8, k, 56, 56)
    for taps, stride in product((1, 3), (1, 2)):
        y = _tensor(dtype, 8, k, 56 // stride, 56 // stride)
        arguments = (x, _weight(k, c, taps), y, (stride, stride), (taps // 2, taps // 2), extra)
        yield "conv_fprop", operands("BLOCK_M", "BLOCK_K", "BLOCK_C"), conv_fprop.candidates(*arguments)
        on_load = extra and taps == 1
        found = conv_dgrad.candidates(y, _weight(k, c, taps), (stride, stride), on_load)
        yield "conv_dgrad", operands("BLOCK_M", "BLOCK_N", "BLOCK_K", on_load), found
    for h, dy, gate in product((False, True), flags, flags):
        found = conv_wgrad.conv_wgrad(k, c, dtype, h, dy, gate and dy, gpu)
        yield "conv_wgrad", operands("BLOCK_K", "BLOCK_C", "BLOCK_M", dy), found
    yield "gram", operands("BLOCK_A", "BLOCK_B", "BLOCK_M"), gram.tiles(c, dtype, gpu)
    yield "tail", operands("BLOCK_M", "BLOCK_K", "BLOCK_C"), one_pass_tail.tail(k, c, extra, dtype, gpu)
    columns = (c, 2 * c if extra else 0)
    yield "reduce", operands("BLOCK_K", "BLOCK_C", "BLOCK_M"), one_pass_tail.reduce(k, columns, dtype, gpu)
    yield "dgrad", operands("BLOCK_M", "BLOCK_C", "BLOCK_K"), one_pass_tail.dgrad(k, c, dtype, gpu)


@pytest.fixture(params=["ieee", "tf32"])
def _precision(request):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("compiled", "_precision")
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_candidates_fit_the_shared_memory(monkeypatch, gpu):
    """Every problem also has at least one candidate."""
    monkeypatch.setattr(launching, "assumed", gpu)
    for dtype, k, c, extra in product(DTYPES, CHANNELS, CHANNELS, (False, True)):
        for kernel, shared_bytes, found in _everything(gpu, dtype, k, c, extra):
            case = f"{kernel} {dtype} K={k} C={c} {extra}"
            assert isinstance(found, tuple) and found, case
            assert max(map(shared_bytes, found)) <= gpu.shared_memory, case


@pytest.mark.usefixtures("compiled", "_precision")
@pytest.mark.parametrize("_precision", ["ieee"], indirect=True)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_true_float32_runs_in_four_warps_over_taps(monkeypatch, gpu):
    """Elsewhere, eight warps were seen to compute wrong sums in a flat loop over taps (pytorch#173068)."""
    monkeypatch.setattr(launching, "assumed", gpu)
    for k, c, extra in product(CHANNELS, CHANNELS, (False, True)):
        for kernel, _, found in _everything(gpu, torch.float32, k, c, extra):
            if kernel.startswith("conv"):
                assert {config.num_warps for config in found} == {4}, (kernel, k, c)


@pytest.mark.usefixtures("compiled", "_precision")
@pytest.mark.parametrize("_precision", ["tf32"], indirect=True)
def test_what_spills_in_tf32_is_left_out(monkeypatch):
    """These are 128 columns in four warps, in the phases of a stride."""
    monkeypatch.setattr(launching, "assumed", GPUS["sm_90"])
    for stride, offered in (((1, 1), True), ((2, 2), False)):
        grad, weight = _tensor(torch.float32, 8, 128, 28, 28), _weight(128, 128, 3)
        found = conv_dgrad.candidates(grad, weight, stride, False)
        assert any(config["BLOCK_N"] == 128 and config.num_warps == 4 for config in found) is offered


@pytest.mark.usefixtures("compiled")
def test_what_spills_without_wgmma_is_left_out(monkeypatch):
    bf16 = torch.bfloat16
    for gpu, most in ((GPUS["sm_80"], 128), (GPUS["sm_90"], 256)):
        assert max(config["BLOCK_B"] for config in gram.tiles(512, bf16, gpu)) == most
        assert one_pass_tail.reduce(1024, (256, 0), bf16, gpu)[0]["BLOCK_C"] == most
    for config in one_pass_tail.tail(256, 64, False, bf16, GPUS["sm_80"]):
        assert config["BLOCK_K"] < 128 or config.num_warps == 8
    monkeypatch.setattr(launching, "assumed", GPUS["sm_80"])
    for stride in ((1, 1), (2, 2)):
        found = conv_dgrad.candidates(_tensor(bf16, 8, 512, 14, 14), _weight(512, 512, 1), stride, False)
        tiles = [(config["BLOCK_N"], config["BLOCK_M"], config["BLOCK_K"]) for config in found]
        assert len(found) >= 4 and max(tiles)[0] == 128 and (128, 128, 32) not in tiles


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(major=8, minor=9, multi_processor_count=128, shared_memory_per_block_optin=101_376)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 99)
    found = {launching.gpu(device) for _ in range(3)}
    assert found == {Gpu(89, 128, 101_376)} and not found.pop().has_wgmma
    assert (launching.multiprocessors(device), launching.shared_memory(device)) == (128, 101_376)
    assert asked == [device]
    assert launching.gpu(torch.device("meta")) == H100 and H100.has_wgmma


def _run_everything(n):
    """Launch each GEMM-shaped kernel at least once on n images; return the records."""
    run = launches("triton")
    x, d = (torch.empty((n, c, 14, 14), device="meta").to(memory_format=torch.channels_last) for c in (64, 128))
    weight, state, wide = torch.empty(128, 64, 1, 1), torch.empty(4, 64), torch.empty(4, 128)
    weight, state, wide = (t.to("meta") for t in (weight, state, wide))
    pivot, folded = state[0], weight.flatten(1)
    gate = torch.empty((n, 14, 14, 16), dtype=torch.uint8, device="meta")
    with record_launches() as made:
        run.conv_fprop(Raw(x, state), weight, DENSE, True)
        run.conv_dgrad(Gradient(d, None, d, wide), weight, tuple(x.shape), DENSE)
        partials = run.conv_wgrad(Gradient(d), Raw(x, state), [1, 1], DENSE)
        run.conv_wgrad_finalize([partials], [weight])
        run.gram(x, state, 1)
        run.one_pass_tail(Centred(x, pivot), state, Folded(folded, wide[0]), ShortcutInput(d), None, None, True)
        run.one_pass_reduce(Gated(d, gate), Centred(x, pivot), state)
        run.one_pass_dgrad(Gated(d, gate), Centred(x, pivot), state, folded, folded[:64], pivot, True)
    return made


def test_candidates_are_worked_out_once():
    """Computing them at every launch would cost more than the launch itself."""
    first, second = _run_everything(32), _run_everything(32)
    assert [launch.name for launch in first] == [launch.name for launch in second] and len(first) == 11
    for a, b in zip(first, second, strict=True):
        same = a.candidates == b.candidates if a.name == "conv_fprop_kernel" else a.candidates is b.candidates
        assert same and isinstance(a.candidates, tuple), a.name
    hits = conv_fprop._candidates.cache_info().hits
    _run_everything(32)
    assert conv_fprop._candidates.cache_info().hits > hits


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("wanted", ["gram_tiles", "gram_finalize", "one_pass_reduce", "one_pass_finalize"])
def test_another_number_of_rows_compiles_nothing_again(monkeypatch, wanted):
    """Configs and constants are those of the first batch size; steps and splits are run-time numbers like the rows."""
    monkeypatch.setattr("fusedres.kernels.triton_core.splits.INTERPRETED", False)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    compiled_for = set()
    for n in (300, 301, 333, 399):
        (made,) = (launch for launch in _run_everything(n) if launch.name == f"{wanted}_kernel")
        constant = {name for name, kind in made.kernel.fn.__annotations__.items() if kind == "tl.constexpr"}
        assert {"C", "K"} & constant
        values = {name: str(value) for name, value in made.arguments.items() if name in constant}
        compiled_for.add((made.config.label, *sorted(values.items()), *made.config.blocks.items()))
    assert len(compiled_for) == 1


def test_the_pivot_counts_the_rows_it_reads():
    for size, pixels in (((5, 64, 14, 14), 8), ((5, 64, 3, 5), 10), ((9, 64, 1, 2), 8), ((3, 64, 1, 1), 3)):
        x = torch.empty(size, device="meta").to(memory_format=torch.channels_last)
        with record_launches() as made:
            launches("triton").gram_statistics(x, None, 1)
        assert made[0].name == "gram_pivot_kernel"
        assert made[0].bytes() == 4 * 64 * (pixels + 1)
