"""Train ESIM to tell whether one sentence of Python's help follows another, with and without its enhancement.

ESIM reads sentences a and b by a BiLSTM and aligns each word with the other sentence:

    e_ij = aᵢᵀ bⱼ,  ãᵢ = Σⱼ softmaxⱼ(e_ij) bⱼ,  b̃ⱼ = Σᵢ softmaxᵢ(e_ij) aᵢ

The enhancement puts features of two depths side by side, m = [a; ã; a − ã; a⊙ã], and a second BiLSTM composes ReLU(Wm).
Its averages and maxima over both sentences, side by side again, enter an MLP. Compared are m = [ã] and m = [a; ã].

python examples/sentence_pairs.py

A sentence is the first of as many pairs that follow as of pairs that do not, and likewise the second. So no sentence
alone can tell. The second sentence of a wrong pair is from another section of the help. Whole sections are held out,
and no sentence stands in two sections.

On the text of Python 3.11, with --seed and --split-seed 0, 1 and 2, all four parts side by side reach 72 to 74 % after
two epochs, the others 50 to 65 %. After six epochs they are 2 to 4 points ahead of [a; ã]. With more epochs the others
come closer.

Source: Chen, Zhu, Ling, Wei, Jiang and Inkpen 2017, Enhanced LSTM for Natural Language Inference,
https://arxiv.org/abs/1609.06038. Its GloVe vectors are replaced by vectors from the sentences to learn from.
"""

import argparse
import math
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

from shared import terminal

if __name__ == "__main__":
    terminal.begin()  # before the slow imports

import numpy as np
import torch
import torch.nn.functional as F
from options import Defaults, dropout, natural, positive, rate, share
from text import PADDING, Section, Vocabulary, load_sections, split_sections
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

# The features that m puts side by side, from encoded words x and their aligned values.
ENHANCEMENTS = {
    "[ã]": lambda x, aligned: [aligned],
    "[a; ã]": lambda x, aligned: [x, aligned],
    "[a; ã; a − ã; a⊙ã]": lambda x, aligned: [x, aligned, x - aligned, x * aligned],
}


def align(x: Tensor, other: Tensor, other_words: Tensor) -> Tensor:
    """Return Σⱼ softmaxⱼ(xᵢᵀ otherⱼ) otherⱼ for x (N, L, D), other (N, M, D) and its mask (N, M), True at words."""
    return F.scaled_dot_product_attention(x, other, other, attn_mask=other_words[:, None, :], scale=1.0)


class BiLSTM(nn.LSTM):
    """A bidirectional LSTM of padded sentences; padding changes no word's result, and its own results are zero."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Return (N, L, 2·hidden) for x (N, L, inputs) and the number of words of each sentence, (N,)."""
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(super().forward(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class ESIM(nn.Module):
    """Scores (N, 2) of pairs of sentences; see the head of this file.

    Args:
        vectors: the first word vectors, (words, features); they are trained too.
        hidden: the units of each LSTM and of the MLP.
        enhancement: a key of ENHANCEMENTS.
        dropped: the share that dropout removes before each layer in training.
    """

    def __init__(self, vectors: Tensor, hidden: int, enhancement: str, dropped: float = 0.0) -> None:
        super().__init__()
        self.enhance = ENHANCEMENTS[enhancement]
        parts = len(self.enhance(torch.zeros(1), torch.zeros(1)))
        self.vectors = nn.Embedding.from_pretrained(vectors.clone(), freeze=False, padding_idx=PADDING)
        self.encoder = BiLSTM(vectors.shape[1], hidden)
        self.projection = nn.Linear(parts * 2 * hidden, hidden)
        self.composition = BiLSTM(hidden, hidden)
        self.dropout = nn.Dropout(dropped)
        self.classifier = nn.Sequential(
            nn.Dropout(dropped), nn.Linear(8 * hidden, hidden), nn.Tanh(), nn.Dropout(dropped), nn.Linear(hidden, 2)
        )

    def forward(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Return the scores of "b does not follow a" and "b follows a" for sentences of word numbers."""
        numbers = pad_sequence([*a, *b], batch_first=True, padding_value=PADDING)
        words = numbers != PADDING
        lengths = words.sum(1)
        x = self.encoder(self.dropout(self.vectors(numbers)), lengths)
        aligned = align(x, x.roll(len(a), 0), words.roll(len(a), 0))  # rolled by half, each meets its partner
        projected = F.relu(self.projection(torch.cat(self.enhance(x, aligned), 2)))
        composed = self.composition(self.dropout(projected), lengths)
        average = composed.sum(1) / lengths[:, None]  # the results of padding are zero
        largest = composed.masked_fill(~words[:, :, None], -math.inf).amax(1)
        of_a, of_b = torch.cat([average, largest], 1).split(len(a))
        return self.classifier(torch.cat([of_a, of_b], 1))


def word_vectors(sentences: Iterable[Sequence[int]], words: int, features: int) -> Tensor:
    """Return a vector (words, features) of each word, by the company it keeps in sentences of word numbers.

    They are the singular vectors of max(0, log(P(v, w) / (P(v) P(w)))), where P(v, w) is how often words v and w are in
    one sentence (Levy and Goldberg 2014, Neural Word Embedding as Implicit Matrix Factorization). Their mean square
    is 1.
    """
    from sklearn.decomposition import TruncatedSVD

    counts = np.array([np.bincount(sentence, minlength=words) for sentence in sentences], dtype=np.float32)
    together = counts.T @ counts
    of_word = together.sum(1, keepdims=True)
    expected = of_word @ of_word.T / together.sum()
    information = np.log(np.divide(together, expected, out=np.ones_like(together), where=together > 0)).clip(min=0)
    vectors = torch.from_numpy(TruncatedSVD(features, random_state=0).fit_transform(information)).float()
    return F.normalize(vectors) * math.sqrt(features)


@dataclass(frozen=True)
class Neighbours:
    """Two sentences that follow each other, as word numbers, and the number of their section."""

    section: int
    first: Tensor
    second: Tensor


Pair = tuple[Tensor, Tensor, int]  # two sentences, and whether the second follows the first
Batch = tuple[list[Tensor], list[Tensor], Tensor]  # the same, of many pairs


def neighbours(sections: Iterable[Section], vocabulary: Vocabulary) -> list[Neighbours]:
    """Return all neighbours of all passages, section by section."""
    return [
        Neighbours(number, torch.tensor(vocabulary.numbers(first)), torch.tensor(vocabulary.numbers(second)))
        for number, section in enumerate(sections)
        for passage in section.passages
        for first, second in pairwise(passage)
    ]


def make_pairs(found: Sequence[Neighbours], rng: random.Random) -> list[Pair]:
    """Return the neighbours as pairs that follow, and as many that do not, with the same second sentences.

    The sections stand one after the other. So a shift by at least the length of the longest one, in either direction
    of the circle, gives every first sentence a second sentence of another section, and each of them once.

    Raises:
        ValueError: a section has more than half of all neighbours.
    """
    longest = max(Counter(each.section for each in found).values(), default=1)
    if len(found) < 2 * longest:
        raise ValueError("one section has more than half of the sentences on its side of the split: change --holdout")
    shuffled = sorted(rng.sample(found, len(found)), key=lambda each: each.section)
    shift = rng.randint(longest, len(found) - longest)
    shifted = shuffled[shift:] + shuffled[:shift]
    follows = [(each.first, each.second, 1) for each in found]
    return follows + [(one.first, other.second, 0) for one, other in zip(shuffled, shifted, strict=True)]


def batches(pairs: Sequence[Pair], size: int, rng: random.Random) -> Iterator[Batch]:
    """Yield batches in random order, each of sentences of similar lengths, so that little of it is padding."""
    by_length = sorted(rng.sample(pairs, len(pairs)), key=lambda pair: max(len(pair[0]), len(pair[1])))
    parts = [by_length[start : start + size] for start in range(0, len(pairs), size)]
    for part in rng.sample(parts, len(parts)):
        first, second, follows = zip(*part, strict=True)
        yield list(first), list(second), torch.tensor(follows)


@torch.no_grad()
def accuracy(model: nn.Module, pairs: Sequence[Pair]) -> float:
    """Return the share of the pairs that are told rightly."""
    model.eval()
    right = [model(a, b).argmax(1) == follows for a, b, follows in batches(pairs, 64, random.Random(0))]
    return float(torch.cat(right).double().mean())


def train(
    args: argparse.Namespace, vectors: Tensor, learnt: Sequence[Neighbours], held: Sequence[Pair], enhancement: str
) -> list[float]:
    """Train one model; return its held-out accuracy after each epoch, which draws new pairs that do not follow."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model = ESIM(vectors, args.hidden, enhancement, args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    found = []
    for _ in range(args.epochs):
        model.train()
        for a, b, follows in batches(make_pairs(learnt, rng), args.batch, rng):
            loss = F.cross_entropy(model(a, b), follows)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        found.append(accuracy(model, held))
    return found


def verdict(accuracies: dict[str, list[float]], pairs: int) -> str:
    """Say in sentences where the whole enhancement ends, and where the best of the others does."""
    last = {name: row[-1] for name, row in accuracies.items()}
    *others, whole = last
    best = max(others, key=lambda name: last[name])
    deviation = math.sqrt(last[whole] * (1 - last[whole]) / pairs)
    return (
        f"{whole} ends at {100 * last[whole]:.1f} ± {100 * deviation:.1f} % (one standard error), "
        f"{best} at {100 * last[best]:.1f} %.\nChance is 50 %."
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="sentence_pairs.py",
        description="Train ESIM to tell whether one sentence of Python's help follows another.",
        formatter_class=Defaults,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("text").add_argument
    add("--least", type=positive, default=2, help="how often a word must occur; rarer words are one unknown word")
    add("--holdout", type=share, default=0.2, help="share of the sentences to hold out, in whole sections")
    add(
        "--split-seed", type=natural, default=0, help="seed of that split, and of the held-out pairs that do not follow"
    )

    add = parser.add_argument_group("network").add_argument
    add("--features", type=positive, default=64, help="features of a word")
    add("--hidden", type=positive, default=32, help="units of each LSTM and direction, and of the MLP")
    add("--dropout", type=dropout, default=0.1, help="share of the features that is dropped in training")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=6, help="passes over the neighbours")
    add("--batch", type=positive, default=32, help="pairs per step")
    add("--lr", type=rate, default=4e-3, help="learning rate of AdamW")
    add("--seed", type=natural, default=0, help="seed of weights, pairs, batches and dropout")
    add("--threads", type=positive, default=1, help="threads; more are slower for LSTMs of this size")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train all models and print the table."""
    command = parser()
    args = command.parse_args(argv)
    if find_spec("sklearn") is None:
        command.error("a package is missing: run pip install scikit-learn")
    torch.set_num_threads(args.threads)
    learnt_sections, held_sections = split_sections(load_sections(), args.holdout, args.split_seed)
    sentences = [sentence for section in learnt_sections for sentence in section.sentences]
    vocabulary = Vocabulary(sentences, args.least)
    learnt, held_neighbours = neighbours(learnt_sections, vocabulary), neighbours(held_sections, vocabulary)
    try:
        make_pairs(learnt, random.Random(0))
        held = make_pairs(held_neighbours, random.Random(args.split_seed))
    except ValueError as error:
        command.error(str(error))
    if args.features >= len(vocabulary):
        command.error(f"--features must be below the size of the vocabulary, {len(vocabulary)}, got {args.features}")
    vectors = word_vectors(map(vocabulary.numbers, sentences), len(vocabulary), args.features)
    print(f"{len(learnt)} neighbours to learn from, {len(held)} held-out pairs, a vocabulary of {len(vocabulary)}")

    accuracies = {name: train(args, vectors, learnt, held, name) for name in ENHANCEMENTS}
    print("Held-out accuracy in %, by the features that are side by side:")
    print(f"{'epoch':>6}" + "".join(f"{name:>20}" for name in ENHANCEMENTS))
    for epoch, row in enumerate(zip(*accuracies.values(), strict=True), start=1):
        print(f"{epoch:>6}" + "".join(f"{100 * value:>20.1f}" for value in row))
    print(verdict(accuracies, len(held)))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "sentence_pairs.py"))
