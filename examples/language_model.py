"""Train Bengio's neural language model on Python's own help, with and without its direct connections.

The next word's scores are y = b + Wx + U tanh(d + Hx), where x holds the features C(w) of the words before it, side by
side. The output layer sees [x; tanh(d + Hx)], features of two depths, and its weight is [W U]. The direct connections
Wx are a skip by concatenation: without them the output layer sees the hidden layer only.

python examples/language_model.py

The table has the perplexity on held-out sections as training goes on; rare words count as one word. With the defaults,
direct connections learn faster and end at a slightly higher perplexity.

Source: Bengio, Ducharme, Vincent and Janvin 2003, A Neural Probabilistic Language Model,
https://www.jmlr.org/papers/v3/bengio03a.html. Here Adam and dropout replace plain gradient descent and early stopping.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shared import terminal

if __name__ == "__main__":
    terminal.begin()  # before the slow imports

import torch
import torch.nn.functional as F
from options import Defaults, dropout, natural, positive, rate, share
from text import PADDING, Section, Vocabulary, load_sections, split_sections
from torch import Tensor, nn

_ROWS = 8  # of the table, if there are that many steps
_WEIGHT_DECAY = 0.1


class LanguageModel(nn.Module):
    """Scores y = b + Wx + U tanh(d + Hx) of the next word; without `direct` y = b + U tanh(d + Hx).

    Args:
        words: the size of the vocabulary.
        context: how many words before the next one are seen.
        features: of each word, the columns of C.
        hidden: the units of the hidden layer.
        direct: whether x is put beside the hidden layer.
        dropped: the share of x and of the hidden layer that dropout removes in training; the paper has none.
    """

    def __init__(
        self, words: int, context: int, features: int, hidden: int, direct: bool = True, dropped: float = 0.0
    ) -> None:
        super().__init__()
        self.direct = direct
        self.features = nn.Embedding(words, features)
        self.hidden = nn.Linear(context * features, hidden)
        self.output = nn.Linear((context * features if direct else 0) + hidden, words)
        self.dropout = nn.Dropout(dropped)

    def forward(self, context: Tensor) -> Tensor:
        """Return the scores (N, words) after contexts (N, context) of word numbers, the nearest word last."""
        x = self.dropout(self.features(context).flatten(1))
        hidden = self.dropout(torch.tanh(self.hidden(x)))
        return self.output(torch.cat([x, hidden], 1) if self.direct else hidden)


@dataclass(frozen=True)
class Words:
    """Every word of a text, (N,), with the words before it, (N, context)."""

    contexts: Tensor
    nexts: Tensor


def words_with_contexts(sections: Iterable[Section], vocabulary: Vocabulary, context: int) -> Words:
    """Return the words of all passages; a passage starts after padding."""
    windows: list[Tensor] = []
    for section in sections:
        for passage in section.passages:
            numbers = [number for sentence in passage for number in vocabulary.numbers(sentence)]
            windows.append(torch.tensor([PADDING] * context + numbers).unfold(0, context + 1, 1))
    every = torch.cat(windows)
    return Words(every[:, :-1], every[:, -1])


def frequency_perplexity(learnt: Words, held: Words, words: int) -> float:
    """Return the perplexity of held-out words if each is guessed by its frequency (plus one) in the learnt text."""
    counts = torch.bincount(learnt.nexts, minlength=words).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[held.nexts].mean()))


@torch.no_grad()
def perplexity(model: nn.Module, held: Words) -> float:
    """Return exp(mean of −log P(word | the words before it))."""
    model.eval()
    scores = (model(part) for part in held.contexts.split(4096))
    losses = [F.cross_entropy(y, t, reduction="none") for y, t in zip(scores, held.nexts.split(4096), strict=True)]
    return float(torch.cat(losses).double().mean().exp())


def checkpoints(steps: int) -> list[int]:
    """Return the steps after which the perplexity is measured."""
    rows = min(_ROWS, steps)
    return [steps * row // rows for row in range(1, rows + 1)]


def train(args: argparse.Namespace, learnt: Words, held: Words, words: int, direct: bool, seed: int) -> list[float]:
    """Train one model; return its held-out perplexity after each of the `checkpoints`."""
    torch.manual_seed(seed)
    model = LanguageModel(words, args.context, args.features, args.hidden, direct, args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=_WEIGHT_DECAY)
    order = torch.Generator().manual_seed(seed)  # its own, so that both models see the same batches
    measured, found = set(checkpoints(args.steps)), []
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(learnt.nexts), (args.batch,), generator=order)
        model.train()
        loss = F.cross_entropy(model(learnt.contexts[chosen]), learnt.nexts[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in measured:
            found.append(perplexity(model, held))
    return found


def verdict(steps: Sequence[int], hidden_only: Sequence[float], direct: Sequence[float], frequency: float) -> str:
    """Say in sentences what the first and the last row show."""

    def effect(row: int) -> str:
        return f"{'helped' if direct[row] < hidden_only[row] else 'did not help'} after {steps[row]} steps"

    best = min(direct[-1], hidden_only[-1])
    return (
        f"Direct connections {effect(0)}, and {effect(-1)}.\n"
        f"The better model ends at {best:.1f}, guessing by frequency at {frequency:.1f}."
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="language_model.py",
        description="Train Bengio's neural language model on Python's own help, with and without direct connections.",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("text").add_argument
    add("--least", type=positive, default=3, help="how often a word must occur; rarer words are one unknown word")
    add("--holdout", type=share, default=0.15, help="share of the sentences to hold out, in whole sections")
    add("--split-seed", type=natural, default=0, help="seed of that split, the same for every run")

    add = parser.add_argument_group("network").add_argument
    add("--context", type=positive, default=4, help="words that are seen before the next one")
    add("--features", type=positive, default=30, help="features of a word")
    add("--hidden", type=positive, default=60, help="units of the hidden layer")
    add("--dropout", type=dropout, default=0.3, help="share of the features that is dropped in training")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=1600, help="steps of the optimizer")
    add("--batch", type=positive, default=256, help="words per step")
    add("--lr", type=rate, default=2e-3, help="learning rate of AdamW")
    add("--seed", type=natural, default=0, help="the first seed of weights, batches and dropout")
    add("--seeds", type=positive, default=2, help="how many seeds; the table has the means")
    add("--threads", type=positive, default=1, help="threads; one is fast enough for layers of this size")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train all models and print the table."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    sections, held_sections = split_sections(load_sections(), args.holdout, args.split_seed)
    vocabulary = Vocabulary((sentence for section in sections for sentence in section.sentences), args.least)
    learnt, held = (words_with_contexts(part, vocabulary, args.context) for part in (sections, held_sections))
    words = len(vocabulary)
    print(f"{len(learnt.nexts)} words to learn from, {len(held.nexts)} held out, a vocabulary of {words}")
    frequency = frequency_perplexity(learnt, held, words)
    print(f"Held-out perplexity of guessing by frequency: {frequency:.1f}")

    columns = []
    for direct in (False, True):
        runs = [train(args, learnt, held, words, direct, seed) for seed in range(args.seed, args.seed + args.seeds)]
        columns.append([statistics.fmean(row) for row in zip(*runs, strict=True)])
    steps = checkpoints(args.steps)
    print(f"Held-out perplexity of the networks, mean over {args.seeds} seed(s), by what the output layer sees:")
    print(f"{'step':>8} {'tanh(d + Hx)':>14} {'[x; tanh(d + Hx)]':>19}")
    for step, hidden_only, both in zip(steps, *columns, strict=True):
        print(f"{step:>8} {hidden_only:>14.1f} {both:>19.1f}")
    print(verdict(steps, *columns, frequency))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "language_model.py"))
