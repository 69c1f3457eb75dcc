"""Train a torchvision ResNet on real images, with or without fusedres.fuse().

python examples/train.py                                        scikit-learn's handwritten digits, fused
python examples/train.py --compare --seeds 5                    eager against fused from the same seeds
python examples/train.py --data photos/ --arch resnet50 --amp bf16
torchrun --nproc_per_node 2 examples/train.py --data cifar10 --data-root data --download

A killed run continues with --resume, also where torchrun starts it again (--max-restarts). On the CPU, with the
same number of threads and at most two processes, its result then equals that of a run that was never killed bit by bit:
the checkpoint has the weights, the optimizer, the schedule, the loss scaler, every random generator, the position in
the epoch and the sums that metrics need.

Exit codes: 0; 2 if the user must change something, which one sentence on standard error says; 130 after Ctrl-C; 141 if
the reader of the output is gone, as in `... | head -1`.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from shared import files, terminal

if __name__ == "__main__":
    terminal.begin()  # before the slow imports

import torch
import torch.distributed as dist
from compare import Comparison
from data import Data, UsageError, load_data, shown
from options import Defaults, natural, positive, rate, share
from trainer import AMP_TYPES, ARCHITECTURES, SETTINGS, Processes, Trainer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check everything that does not need the data."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a torchvision ResNet on real images, with or without fusedres.fuse().",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("images").add_argument
    add("--data", default="digits", help="digits (scikit-learn's, 8x8), cifar10, or a folder: train/ and val/ in it, "
        "or one sub-folder for each class")  # fmt: skip
    add("--data-root", type=Path, default=Path("data"), help="folder that holds CIFAR-10")
    add("--download", action="store_true", help="fetch CIFAR-10 into --data-root if it is not there")
    add("--image-size", type=positive, help="height and width in pixels (default: digits 8, cifar10 32, folder 224)")
    add("--holdout", type=share, default=0.2, help="share of each class to hold out if the data has no test set")
    add("--split-seed", type=natural, default=0, help="seed of that split, the same for every run")
    add("--workers", type=natural, default=0, help="processes that load images")

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet18", choices=ARCHITECTURES, metavar="ARCH", help=", ".join(ARCHITECTURES)
        + "; resnet10 has one BasicBlock per stage")  # fmt: skip
    add("--fused", action=flag, default=True, help="train through fusedres.fuse()")
    add("--stem", choices=("small", "imagenet"), help="3x3 convolution without pooling, or 7x7 with pooling "
        "(default: small up to 64 pixels)")  # fmt: skip
    add("--channels-last", action=flag, default=True, help="memory format of images and weights")
    add("--amp", choices=("off", *AMP_TYPES), default="off", help="mixed precision; fp16 scales the loss")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=12, help="passes over the training images")
    add("--batch", type=positive, default=64, help="images per step and process")
    add("--lr", type=rate, default=0.02, help="highest learning rate of the one-cycle schedule")
    add("--momentum", type=float, default=0.9, help="Nesterov momentum of SGD")
    add("--weight-decay", type=float, default=5e-4, help="weight decay of SGD")
    add("--seed", type=natural, default=0, help="seed of the weights, the order and the augmentation")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--deterministic", action="store_true", help="deterministic algorithms only (for exact resume on a GPU)")

    add = parser.add_argument_group("comparison").add_argument
    add("--compare", action="store_true", help="train eager and fused from the same seeds")
    add("--seeds", type=positive, default=1, help="with --compare: how many seeds, counted from --seed")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("runs/train"), help="folder of checkpoints and curves")
    add("--resume", action="store_true", help="continue from the checkpoints in --out, if there are any")
    add("--checkpoint-every", type=natural, default=0, metavar="BATCHES", help="save one every BATCHES batches too "
        "(0: only after each epoch)")  # fmt: skip
    add("--json", nargs="?", const="-", metavar="FILE", help="write the results as JSON; without FILE to standard "
        "output, and everything else to standard error")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seeds > 1 and not args.compare:
        parser.error("--seeds needs --compare")
    return args


def start_processes(name: str) -> Processes:
    """Join the processes that torchrun started, if it did: nccl on GPUs, gloo on CPUs."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if name != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UsageError(f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it starts the processes again, and in it the addresses of the dead ones.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return Processes(rank, world, device)


def prepare_data(args: argparse.Namespace, processes: Processes) -> Data:
    """Load the images and fill in the sizes that depend on them; only the first process downloads."""
    download_first = args.download and processes.world > 1
    if download_first and not processes.first:
        dist.barrier()
    data = load_data(
        args.data,
        root=args.data_root,
        download=args.download and processes.first,
        size=args.image_size,
        holdout=args.holdout,
        split_seed=args.split_seed,
    )
    if download_first and processes.first:
        dist.barrier()
    args.image_size = data.size
    args.stem = args.stem or ("small" if data.size <= 64 else "imagenet")
    return data


def train_one(
    args: argparse.Namespace, data: Data, fused: bool, seed: int, out: Path, processes: Processes, log: TextIO
) -> dict[str, Any]:
    """Train one run from its start, or from its checkpoint with --resume."""
    from tqdm import tqdm

    trainer = Trainer(args, data, fused, seed, out, processes, log)
    if processes.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out: {shown(out)} cannot be made a folder ({error.strerror}): pass another") from error
        try:
            files.require_writable(trainer.path)
        except OSError as error:
            raise UsageError(
                f"--out: {shown(trainer.path)} cannot be written ({error.strerror}): make room there or pass another"
            ) from error
    if args.resume:
        trainer.restore()
    steps = trainer.batches_per_epoch
    with tqdm(
        total=args.epochs * steps,
        initial=trainer.epoch * steps + trainer.batch,
        desc=trainer.name,
        unit="batch",
        leave=False,
        disable=None if processes.first else True,  # None: no bar if standard error is no terminal
    ) as bar:
        history = trainer.run(bar, keep_weights=not args.compare)
    return {
        "variant": "fused" if fused else "eager",
        "seed": seed,
        "blocks_fused": trainer.blocks_fused,
        "final_accuracy": history[-1]["test_accuracy"],
        "seconds": sum(row["seconds"] for row in history),
        "history": history,
    }


def compare(args: argparse.Namespace, data: Data, processes: Processes, log: TextIO) -> dict[str, Any]:
    """Train eager and fused from each seed; print the table and draw the curves."""
    runs: dict[str, list[dict[str, Any]]] = {"eager": [], "fused": []}
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        for variant, done in runs.items():
            out = args.out / f"{variant}-seed{seed}"
            done.append(train_one(args, data, variant == "fused", seed, out, processes, log))
    eager, fused = runs["eager"], runs["fused"]
    comparison = Comparison(
        list(seeds), [run["final_accuracy"] for run in eager], [run["final_accuracy"] for run in fused]
    )
    if processes.first:
        from plots import plot_compare

        print(comparison.table([r["seconds"] for r in eager], [r["seconds"] for r in fused]), file=log)
        print(comparison.verdict(), file=log)
        path = args.out / "compare.png"
        plot_compare([r["history"] for r in eager], [r["history"] for r in fused], comparison, _title(args, data), path)
        print(f"curves: {path}", file=log)
    return {
        "runs": [*eager, *fused],
        "comparison": {
            "mean_difference": comparison.mean_difference,
            "half_width_95": comparison.half_width,
            "equal_within_interval": comparison.equal,
        },
    }


def single(args: argparse.Namespace, data: Data, processes: Processes, log: TextIO) -> dict[str, Any]:
    """Train one variant from one seed; draw its curves."""
    run = train_one(args, data, args.fused, args.seed, args.out, processes, log)
    if processes.first:
        from plots import plot_run

        path = args.out / "curves.png"
        plot_run(run["history"], f"{_title(args, data)}, {run['variant']}, seed {args.seed}", path)
        print(f"checkpoint: {args.out / 'checkpoint.pt'}\ncurves: {path}", file=log)
    return {"runs": [run]}


def _title(args: argparse.Namespace, data: Data) -> str:
    precision = "float32" if args.amp == "off" else args.amp
    return f"{args.arch} on {data.name} ({data.size}x{data.size}), batch {args.batch}, {precision}"


def _check_packages(args: argparse.Namespace) -> None:
    """Report missing packages before anything is trained."""
    wanted = {"tqdm": "tqdm", "matplotlib": "matplotlib"}
    if args.data == "digits":
        wanted["sklearn"] = "scikit-learn"
    if args.compare or args.fused:
        wanted["fusedres"] = "."
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f"a package is missing: run pip install {' '.join(missing)} in the root of the checkout")


def _json_file(name: str) -> Path:
    """Return the file that --json names; for a link to a file return that file, so that the link stays."""
    return Path(name if name.startswith(("/dev/", "/proc/")) else os.path.realpath(name))


def _check_json(path: Path) -> None:
    """Report before anything is trained if the results could not be written."""
    if not os.path.isdir(path.parent):
        raise UsageError(f"--json: there is no folder {shown(path.parent)} to write to")
    with _json_errors(path):
        if os.path.isdir(path) or _replaced(path):
            files.require_writable(path)


def _write_json(text: str, path: Path) -> None:
    with _json_errors(path):
        if _replaced(path):
            files.write(path, text.encode())
        else:
            path.write_text(text)


def _replaced(path: Path) -> bool:
    """Return whether to replace the path as a whole file; a device or a pipe like /dev/stdout is written to instead."""
    return not str(path).startswith(("/dev/", "/proc/")) and (os.path.isfile(path) or not os.path.exists(path))


@contextlib.contextmanager
def _json_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{shown(path)} cannot be written ({error.strerror})"
        raise UsageError(f"--json: {reason}: make room there or pass another") from error


def train(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    _check_packages(args)
    log = sys.stderr if args.json == "-" else sys.stdout
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    json_file = _json_file(args.json) if args.json not in (None, "-") else None
    if json_file is not None:
        _check_json(json_file)
    processes = start_processes(args.device)
    try:
        data = prepare_data(args, processes)
        result = (compare if args.compare else single)(args, data, processes, log)
    finally:
        if processes.world > 1:
            dist.destroy_process_group()
    if args.json and processes.first:
        about = {"torch": torch.__version__, "device": str(processes.device), "processes": processes.world}
        about |= {"threads": torch.get_num_threads(), "settings": {key: getattr(args, key) for key in SETTINGS}}
        text = json.dumps(about | result, indent=2)
        if json_file is None:
            print(text)
        else:
            _write_json(text + "\n", json_file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return 2 if the user must change something."""
    args = parse(argv)
    try:
        train(args)
    except UsageError as error:
        rank = os.environ.get("RANK", "0")
        # The message of an error in a process that loads images starts with the traceback of that process.
        sentence = str(error).strip().splitlines()[-1].removeprefix("data.UsageError: ")
        print(f"train.py: error: {'' if rank == '0' else f'process {rank}: '}{sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "train.py", "interrupted: the same command with --resume continues"))
