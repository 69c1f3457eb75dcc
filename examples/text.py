"""Real text for language_model.py and sentence_pairs.py: the topics of Python's own help, from pydoc_data.

The topics repeat each other: "compound" contains all of "with". A sentence is therefore kept only where it is met
first, and the text is split by section, so that no sentence is both learnt from and held out.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

Sentence = tuple[str, ...]  # its words in lower case, and its punctuation

PADDING, UNKNOWN = 0, 1  # the numbers of the two entries of a vocabulary that are no words
_SHORTEST = 4  # words of a sentence
_UNDERLINE = re.compile(r"([*=\-~^])\1{2,}")
_PROSE = re.compile(r'["A-Z(].*[.:)]')
_BETWEEN_SENTENCES = re.compile(r'(?<=[.:?])\s+(?=["A-Z(])')
_WORD = re.compile(r"\w+(?:['’][a-z]+)?|[.,:;()?]")


@dataclass(frozen=True)
class Section:
    """A section of a topic: passages of sentences that follow each other in the text."""

    topic: str
    passages: tuple[tuple[Sentence, ...], ...]

    @property
    def sentences(self) -> list[Sentence]:
        """All sentences in their order."""
        return [sentence for passage in self.passages for sentence in passage]


def words_of(sentence: str) -> Sentence:
    """Return the words of a sentence in lower case, with numbers and punctuation as words of their own."""
    return tuple(_WORD.findall(sentence.lower()))


def prose(text: str) -> Iterator[list[Sentence]]:
    """Yield the sentences of each section of a topic, without headings, tables, code and lists."""
    section: list[Sentence] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):  # a heading
            yield section
            section, lines = [], lines[2:]
        joined = " ".join(lines)
        if _PROSE.fullmatch(joined) and ">>>" not in joined:
            section += map(words_of, _BETWEEN_SENTENCES.split(joined))
    yield section


def load_sections(text: dict[str, str] = topics) -> list[Section]:
    """Return the sections of all topics, the longest topic first, with every sentence once.

    A passage ends where a sentence of another section is left out, so that its sentences are neighbours in the text.
    """
    seen: set[Sentence] = set()
    sections: list[Section] = []
    for topic in sorted(text, key=lambda name: (-len(text[name]), name)):
        for section in prose(text[topic]):
            passages: list[list[Sentence]] = [[]]
            for sentence in section:
                if len(sentence) < _SHORTEST:
                    continue
                if sentence in seen:
                    passages.append([])
                    continue
                seen.add(sentence)
                passages[-1].append(sentence)
            kept = tuple(tuple(passage) for passage in passages if passage)
            if kept:
                sections.append(Section(topic, kept))
    return sections


def split_sections(sections: Sequence[Section], holdout: float, seed: int) -> tuple[list[Section], list[Section]]:
    """Return sections (to learn from, held out): at least the share `holdout` of the sentences is held out.

    At least one section is left to learn from.
    """
    shuffled = random.Random(seed).sample(sections, len(sections))
    wanted = holdout * sum(len(section.sentences) for section in sections)
    held: list[Section] = []
    while len(shuffled) > 1 and sum(len(section.sentences) for section in held) < wanted:
        held.append(shuffled.pop())
    return shuffled, held


class Vocabulary:
    """The words that occur at least `least` times; all others are one word, UNKNOWN."""

    def __init__(self, sentences: Iterable[Sentence], least: int) -> None:
        counts = Counter(word for sentence in sentences for word in sentence)
        kept = sorted(word for word, count in counts.items() if count >= least)
        self._numbers = {word: number for number, word in enumerate(kept, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self._numbers) + UNKNOWN + 1

    def numbers(self, sentence: Sentence) -> list[int]:
        """Return the number of each word."""
        return [self._numbers.get(word, UNKNOWN) for word in sentence]
