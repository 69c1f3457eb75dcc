"""The training run of train.py: model, optimizer, schedule, loss scaler, and a checkpoint that resumes exactly."""

import argparse
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import checkpoint
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from data import Data, UsageError, View, shown
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.models.resnet import BasicBlock, ResNet

ARCHITECTURES = (
    *("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Settings that a resumed run must share with the run that it continues.
SETTINGS = (
    *("data", "arch", "image_size", "stem", "amp", "channels_last", "epochs", "batch", "lr", "momentum"),
    *("weight_decay", "holdout", "split_seed", "deterministic"),
)


@dataclass(frozen=True)
class Processes:
    """The rank of this process among those that train together, their number, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def build_model(arch: str, classes: int, channels: int, small_stem: bool) -> ResNet:
    """Build torchvision's ResNet (resnet10 has one BasicBlock per stage); a small stem is just a 3x3 convolution."""
    if arch == "resnet10":
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    else:
        model = torchvision.models.get_model(arch, num_classes=classes)
        assert isinstance(model, ResNet)
    if small_stem:
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.register_module("maxpool", nn.Identity())
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole group of processes: the main process ends those that load images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Delay Ctrl-C until the processes inside are started; the new processes ignore it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


class Trainer:
    """One run: a model, its optimizer and schedule, and the current position."""

    def __init__(
        self, args: argparse.Namespace, data: Data, fused: bool, seed: int, out: Path, processes: Processes, log: TextIO
    ) -> None:
        self.args, self.data, self.fused, self.seed, self.processes, self.log = args, data, fused, seed, processes, log
        self.name = f"{'fused' if fused else 'eager'} seed {seed}"
        self.path = out / "checkpoint.pt"
        self.settings = {key: getattr(args, key) for key in SETTINGS}
        self.settings |= {"fused": fused, "seed": seed, "processes": processes.world, "device": processes.device.type}
        self.settings["images"] = len(data.train_indices)

        checkpoint.seed_all(seed)  # the same initial weights for eager and fused
        model = build_model(args.arch, data.classes, data.channels, args.stem == "small")
        if fused:
            import fusedres

            fusedres.fuse(model)
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(processes.device).to(memory_format=self.memory_format)
        self.blocks_fused = self.count_fused() if fused else 0
        self.replica: nn.Module = self.model
        if processes.world > 1:
            self.replica = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=args.lr, momentum=args.momentum, nesterov=True, weight_decay=args.weight_decay
        )
        self.batches_per_epoch = len(data.train_indices) // processes.world // args.batch
        if self.batches_per_epoch == 0:
            images, needed = len(data.train_indices), args.batch * processes.world
            raise UsageError(f"{images} training images do not fill a batch of {needed}: pass a smaller --batch")
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            args.lr,
            total_steps=args.epochs * self.batches_per_epoch,
            pct_start=0.25,
            cycle_momentum=False,
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        self.history: list[dict[str, Any]] = []
        self.epoch, self.batch = 0, 0  # the position: finished epochs, finished batches of the next one
        self.seconds = 0.0  # spent in the current epoch
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)  # loss, correct answers, images

    def count_fused(self) -> int:
        """Return how many residual blocks and stems run fused; print that, and why others do not."""
        import fusedres

        blocks = list(fusedres.report(self.model))
        done = sum(block.fused for block in blocks)
        reasons = sorted({f"; not fused: {block.reason}" for block in blocks if not block.fused})
        self.say(f"{self.name}: {done} of {len(blocks)} residual blocks and stems fused{''.join(reasons)}")
        return done

    def save(self, weights: bool = True) -> None:
        """Write the checkpoint; without weights it has only the settings and the history of a finished run."""
        own = {"rng": checkpoint.rng_state(self.processes.device), "sums": self.sums.cpu()}
        ranks: list[Any] = [own]
        if self.processes.world > 1:
            ranks = [None] * self.processes.world
            dist.all_gather_object(ranks, own)
        if not self.processes.first:
            return
        state: dict[str, Any] = {"settings": self.settings, "epoch": self.epoch, "history": self.history}
        if weights:
            state |= {
                "batch": self.batch,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ranks": ranks,
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
            }
        checkpoint.save(state, self.path)

    def restore(self) -> None:
        """Continue from the checkpoint if there is one; raises UsageError if it belongs to another run."""
        try:
            os.lstat(self.path)
        except FileNotFoundError:
            return
        except OSError:
            pass  # reading it says why
        state = checkpoint.load(self.path)
        for key, value in self.settings.items():
            if state["settings"].get(key) != value:
                was = state["settings"].get(key)
                raise UsageError(
                    f"{shown(self.path)} was made with {key} = {was}, not {value}: use another --out or omit --resume"
                )
        try:
            self._restore(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UsageError(
                f"{shown(self.path)} was made by another version of this script ({type(error).__name__}): use another "
                "--out or omit --resume"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.history, self.epoch = state["history"], state["epoch"]
        if "model" not in state:
            return
        self.batch, self.seconds = state["batch"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["ranks"][self.processes.rank]
        self.sums.copy_(own["sums"])
        checkpoint.set_rng_state(own["rng"], self.processes.device)
        if (state["threads"], state["torch"]) != (torch.get_num_threads(), str(torch.__version__)):
            self.say(f"{self.name}: another torch or number of threads than before: the last bits may differ")
        self.say(
            f"{self.name}: resumed in epoch {self.epoch + 1} after {self.batch} of {self.batches_per_epoch} batches"
        )

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.processes.first:
            print(line, file=self.log, flush=True)

    def loaded(self, view: View, batches: list[list[int]]) -> Iterator[Any]:
        """Return batches of the view; the loader has its own generator and does not use the global one."""
        loader: DataLoader[Any] = DataLoader(
            view,
            batch_sampler=batches,
            num_workers=self.args.workers,
            pin_memory=self.processes.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
            worker_init_fn=_ignore_interrupts,
        )
        with _interrupts_wait():
            return iter(loader)

    def to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move a batch, the images in the memory format of the model."""
        device = self.processes.device
        return x.to(device, memory_format=self.memory_format, non_blocking=True), y.to(device, non_blocking=True)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the batch, and the sums (loss, correct answers, images)."""
        with torch.autocast(
            self.processes.device.type, AMP_TYPES.get(self.args.amp, torch.bfloat16), enabled=self.args.amp != "off"
        ):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        right = (logits.argmax(1) == y).sum()
        sums = torch.stack([loss.detach().double() * len(y), right.double(), right.new_tensor(len(y)).double()])
        return loss, sums

    def step(self, x: Tensor, y: Tensor) -> None:
        """Do one optimizer step; if the scaler skips it, the schedule does not advance."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, sums = self.forward(self.replica, x, y)
        self.sums += sums
        self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.scheduler.step()

    def train_epoch(self, bar: Any) -> None:
        """Train the rest of the current epoch, with a checkpoint every --checkpoint-every batches."""
        data, world, size = self.data, self.processes.world, self.args.batch
        sampler: DistributedSampler[Any] = DistributedSampler(
            data.train_indices,  # type: ignore[arg-type]
            num_replicas=world, rank=self.processes.rank, seed=self.seed, drop_last=True,
        )  # fmt: skip
        sampler.set_epoch(self.epoch)
        order = [data.train_indices[i] for i in sampler]
        batches = [order[i * size : (i + 1) * size] for i in range(self.batch, self.batches_per_epoch)]
        self.replica.train()
        started = time.perf_counter() - self.seconds
        for x, y in self.loaded(View(data.train, (self.seed, self.epoch)), batches):
            self.step(*self.to_device(x, y))
            self.batch += 1
            bar.update()
            self.seconds = time.perf_counter() - started
            every = self.args.checkpoint_every
            if every and self.batch % every == 0 and self.batch < self.batches_per_epoch:
                self.save()

    @torch.inference_mode()
    def evaluate(self) -> Tensor:
        """Return (loss, correct answers, images), summed over the held-out images of all processes."""
        rank, world, size = self.processes.rank, self.processes.world, self.args.batch
        if world > 1:  # use the running statistics of the first process, as in the checkpoint
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        indices = self.data.test_indices[rank::world]
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        self.model.eval()
        sums = torch.zeros_like(self.sums)
        for x, y in self.loaded(View(self.data.test), batches):
            sums += self.forward(self.model, *self.to_device(x, y))[1]
        return self.total(sums)

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum of these values over all processes."""
        result = sums.clone()
        if self.processes.world > 1:
            dist.all_reduce(result)
        return result

    def run(self, bar: Any, keep_weights: bool = True) -> list[dict[str, Any]]:
        """Train to the end; return the history, with a row for each epoch."""
        while self.epoch < self.args.epochs:
            self.train_epoch(bar)
            loss, right, images = self.total(self.sums).tolist()
            test_loss, test_right, test_images = self.evaluate().tolist()
            row = {"epoch": self.epoch + 1, "train_loss": loss / images, "train_accuracy": right / images}
            row |= {"test_loss": test_loss / test_images, "test_accuracy": test_right / test_images}
            row |= {"learning_rate": self.scheduler.get_last_lr()[0], "seconds": self.seconds}
            self.history.append(row)
            self.epoch, self.batch, self.seconds = self.epoch + 1, 0, 0.0
            self.sums.zero_()
            done = self.epoch == self.args.epochs
            self.save(weights=keep_weights or not done)
            bar.clear()
            self.say(
                f"{self.name}: epoch {row['epoch']:>3}/{self.args.epochs}  loss {row['train_loss']:.4f}  "
                f"held out {row['test_loss']:.4f}  {100 * row['test_accuracy']:.2f}%  {row['seconds']:.1f} s"
            )
        return self.history
