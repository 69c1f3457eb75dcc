"""The examples on text: the equations of both models, the splits, and short runs from the command line."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import HANG

pytest.importorskip("sklearn", reason="sentence_pairs.py makes word vectors with scikit-learn")
pytest.importorskip("matplotlib", reason="the fixture imports every example")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def output(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / command[0], *command[1:]],
        capture_output=True,
        text=True,
        timeout=HANG,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(table: str) -> list[list[float]]:
    """Return the rows of numbers of a table."""
    lines = [line.split() for line in table.splitlines() if re.fullmatch(r"[ \d.]+", line)]
    return [[float(cell) for cell in line] for line in lines]


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors]


# The text

TOPIC = """Title of the topic
******************

First of all, this is a *sentence*.  It isn't the
only one here.

   Indented prose is read (as this is).

   >>> code("is not read.")

+-----+
| nor |
+-----+

Part
====

See above.  It isn't the only one here.  This one follows
"a.sentence()" of another section.
"""


def test_prose_is_found_and_repetitions_are_left_out(example: SimpleNamespace) -> None:
    first, second = example.text.load_sections({"topic": TOPIC, "copy": TOPIC[:80]})
    assert (first.topic, second.topic) == ("topic", "topic")
    assert [" ".join(sentence) for sentence in first.sentences] == [
        "first of all , this is a sentence .",
        "it isn't the only one here .",
        "indented prose is read ( as this is ) .",
    ]
    assert len(first.passages) == 1
    assert [" ".join(sentence) for sentence in second.sentences] == [
        "this one follows a . sentence ( ) of another section ."
    ]


def test_a_passage_ends_at_a_repetition(example: SimpleNamespace) -> None:
    long = "The first sentence is here. It is said twice. The last sentence is here."
    sections = example.text.load_sections(
        {"a": f"{long} Nothing else is said here.", "b": f"Hm, no, and so on. {long}"}
    )
    assert [[len(passage) for passage in section.passages] for section in sections] == [[4], [1]]
    other = long.replace("first", "1st").replace("last", "final")
    sections = example.text.load_sections({"a": f"{long} Nothing else is said here.", "b": other})
    assert [[len(passage) for passage in section.passages] for section in sections] == [[4], [1, 1]]


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_both_learnt_from_and_held_out(example: SimpleNamespace, seed: int) -> None:
    sections = example.text.load_sections()
    learnt, held = example.text.split_sections(sections, 0.2, seed)
    assert sorted(map(id, [*learnt, *held])) == sorted(map(id, sections))
    sentences, held_sentences = ([s for section in part for s in section.sentences] for part in (learnt, held))
    every = [*sentences, *held_sentences]
    assert len(set(every)) == len(every) > 1000
    assert 0.2 <= len(held_sentences) / len(every) < 0.4
    again = example.text.split_sections(sections, 0.2, seed)
    assert (learnt, held) == again
    assert (learnt, held) != example.text.split_sections(sections, 0.2, seed + 10)


def test_rare_words_are_one_word(example: SimpleNamespace) -> None:
    vocabulary = example.text.Vocabulary([("a", "b", "a"), ("b", "c", "a")], least=2)
    assert vocabulary.numbers(("a", "b", "c", "new")) == [2, 3, example.text.UNKNOWN, example.text.UNKNOWN]
    assert len(vocabulary) == 4


# Bengio's language model


@pytest.mark.parametrize("direct", [True, False])
def test_language_model_is_the_papers_equation(example: SimpleNamespace, direct: bool) -> None:
    words, context, features, hidden = 11, 3, 4, 5
    model = example.language_model.LanguageModel(words, context, features, hidden, direct).double()
    state = model.state_dict()
    C, H, d = state["features.weight"], state["hidden.weight"], state["hidden.bias"]
    both, b = state["output.weight"], state["output.bias"]
    before = torch.randint(words, (7, context))
    for numbers, y in zip(before.tolist(), model(before), strict=True):
        x = torch.cat([C[number] for number in numbers])
        if direct:
            W, U = both[:, : context * features], both[:, context * features :]
            expected = b + W @ x + U @ torch.tanh(d + H @ x)
        else:
            expected = b + both @ torch.tanh(d + H @ x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_contexts_are_the_words_before(example: SimpleNamespace) -> None:
    sections = example.text.load_sections({"a": "One two three four. Five six seven eight."})
    vocabulary = example.text.Vocabulary(sections[0].sentences, least=1)
    found = example.language_model.words_with_contexts(sections, vocabulary, 3)
    numbers = [number for sentence in sections[0].sentences for number in vocabulary.numbers(sentence)]
    assert found.nexts.tolist() == numbers
    padded = [example.text.PADDING] * 3 + numbers
    assert found.contexts.tolist() == [padded[i : i + 3] for i in range(len(numbers))]


def test_perplexity_of_equal_scores_is_the_number_of_words(example: SimpleNamespace) -> None:
    module = example.language_model
    held = module.Words(torch.zeros(5000, 2, dtype=torch.long), torch.arange(5000) % 7)
    model = torch.nn.Sequential(torch.nn.Embedding(1, 7), torch.nn.Flatten(), torch.nn.Linear(14, 7))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert module.perplexity(model, held) == pytest.approx(7)
    learnt = module.Words(torch.zeros(6, 2, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1, 2]))
    one = module.Words(torch.zeros(2, 2, dtype=torch.long), torch.tensor([0, 2]))
    assert module.frequency_perplexity(learnt, one, 4) == pytest.approx((4 / 10 * 2 / 10) ** -0.5)


def test_language_model_learns(example: SimpleNamespace) -> None:
    out = output("language_model.py", "--steps", "160", "--seeds", "1", "--lr", "5e-3", "--hidden", "16")
    frequency = float(re.search(r"by frequency: ([\d.]+)", out)[1])
    table = rows(out)
    assert [row[0] for row in table] == example.language_model.checkpoints(160)
    for column in (1, 2):
        values = [row[column] for row in table]
        assert values[-1] < values[0]
        assert values[-1] < frequency


def test_a_seed_gives_the_same_table(example: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for seed in ("3", "3", "4"):
        assert example.language_model.main(["--steps", "3", "--seeds", "1", "--seed", seed]) == 0
        tables.append(rows(capsys.readouterr().out))
    assert len(tables[0]) == 3
    assert tables[0] == tables[1] != tables[2]


def test_verdict_of_language_models(example: SimpleNamespace) -> None:
    text = example.language_model.verdict([10, 20], [50.0, 30.0], [40.0, 35.0], 45.0)
    assert text.splitlines() == [
        "Direct connections helped after 10 steps, and did not help after 20 steps.",
        "The better model ends at 30.0, guessing by frequency at 45.0.",
    ]


# ESIM

SENTENCES = [torch.tensor(numbers) for numbers in ([3, 1, 4], [1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7], [9], [3, 2, 3, 8])]


def esim(example: SimpleNamespace, enhancement: str) -> torch.nn.Module:
    return example.sentence_pairs.ESIM(torch.randn(10, 6), 4, enhancement).double()


def lstm(model: torch.nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """Run an LSTM word by word, forward and back: the plain equations."""
    results = []
    for suffix, order in (("", range(len(x))), ("_reverse", reversed(range(len(x))))):
        weights = [getattr(model, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h = c = torch.zeros(model.hidden_size, dtype=x.dtype)
        of_words: dict[int, torch.Tensor] = {}
        for t in order:
            i, f, g, o = (weights[0] @ x[t] + weights[2] + weights[1] @ h + weights[3]).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = of_words[t] = o.sigmoid() * c.tanh()
        results.append(torch.stack([of_words[t] for t in range(len(x))]))
    return torch.cat(results, 1)


@pytest.mark.parametrize(
    ("enhancement", "parts"),
    [
        ("[ã]", lambda x, y: [y]),
        ("[a; ã]", lambda x, y: [x, y]),
        ("[a; ã; a − ã; a⊙ã]", lambda x, y: [x, y, x - y, x * y]),
    ],
    ids=["aligned", "both", "enhanced"],
)
def test_esim_is_the_papers_equations_without_padding(example: SimpleNamespace, enhancement: str, parts) -> None:
    model = esim(example, enhancement)
    scores = model(SENTENCES[:3], SENTENCES[3:])
    for first, second, y in zip(SENTENCES[:3], SENTENCES[3:], scores, strict=True):
        a, b = (lstm(model.encoder, model.vectors.weight[numbers]) for numbers in (first, second))
        e = a @ b.T
        aligned_a = torch.stack([sum(w * v for w, v in zip(row, b, strict=True)) for row in e.softmax(1)])
        aligned_b = torch.stack([sum(w * v for w, v in zip(row, a, strict=True)) for row in e.T.softmax(1)])
        pooled = []
        for x, aligned in ((a, aligned_a), (b, aligned_b)):
            m = torch.cat(parts(x, aligned), 1)
            v = lstm(model.composition, (m @ model.projection.weight.T + model.projection.bias).relu())
            pooled += [v.mean(0), v.max(0).values]
        torch.testing.assert_close(y, model.classifier(torch.cat(pooled)), rtol=1e-10, atol=1e-10)


def test_esim_gives_a_batch_the_scores_and_gradients_of_its_pairs(example: SimpleNamespace) -> None:
    model = esim(example, "[a; ã; a − ã; a⊙ã]")
    weights = torch.randn(3, 2, dtype=torch.double)
    model(SENTENCES[:3], SENTENCES[3:]).mul(weights).sum().backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for i in range(3):
        model(SENTENCES[i : i + 1], SENTENCES[3 + i : 4 + i]).mul(weights[i]).sum().backward()
    for parameter, expected in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_no_sentence_alone_tells_whether_a_pair_follows(example: SimpleNamespace) -> None:
    module = example.sentence_pairs
    learnt, held = example.text.split_sections(example.text.load_sections(), 0.2, 0)
    vocabulary = example.text.Vocabulary((s for section in learnt for s in section.sentences), 2)
    for part in (learnt, held):
        found = module.neighbours(part, vocabulary)
        section_of = {id(sentence): each.section for each in found for sentence in (each.first, each.second)}
        drawn = [module.make_pairs(found, random.Random(seed)) for seed in (0, 0, 1)]
        assert [list(map(id, pair)) for pair in drawn[0]] == [list(map(id, pair)) for pair in drawn[1]]
        assert [list(map(id, pair)) for pair in drawn[0]] != [list(map(id, pair)) for pair in drawn[2]]
        follows, others = ([pair for pair in drawn[0] if pair[2] == label] for label in (1, 0))
        assert len(follows) == len(others) == len(found)
        for side in (0, 1):
            assert sorted(id(pair[side]) for pair in follows) == sorted(id(pair[side]) for pair in others)
        assert all(section_of[id(a)] == section_of[id(b)] for a, b, _ in follows)
        assert all(section_of[id(a)] != section_of[id(b)] for a, b, _ in others)


def test_wrong_pairs_join_two_sections_unless_one_is_too_long(example: SimpleNamespace) -> None:
    module = example.sentence_pairs
    found = [module.Neighbours(i // 2, torch.tensor([i]), torch.tensor([i])) for i in range(4)]
    with pytest.raises(ValueError, match="one section has more than half"):
        module.make_pairs(found[:3], random.Random(0))
    for seed in range(20):
        pairs = module.make_pairs(found, random.Random(seed))
        assert len(pairs) == 8
        assert all((int(a) // 2 == int(b) // 2) == follows for a, b, follows in pairs)


def test_a_missing_package_is_said(
    example: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.sentence_pairs, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example.sentence_pairs.main([])
    assert capsys.readouterr().err.endswith("error: a package is missing: run pip install scikit-learn\n")


def test_every_pair_is_in_one_batch(example: SimpleNamespace) -> None:
    pairs = [(torch.full((1 + i % 5,), i), torch.full((1 + i % 7,), i), i % 2) for i in range(50)]
    seen = [
        (int(a[0]), int(b[0]), int(label))
        for first, second, labels in example.sentence_pairs.batches(pairs, 8, random.Random(0))
        for a, b, label in zip(first, second, labels, strict=True)
    ]
    assert sorted(seen) == [(i, i, i % 2) for i in range(50)]


def test_word_vectors_are_near_for_words_of_the_same_sentences(example: SimpleNamespace) -> None:
    sentences = [[1, 2, 3], [2, 3, 1], [4, 5, 6], [6, 5, 4]] * 3
    vectors = example.sentence_pairs.word_vectors(sentences, 7, 2)
    torch.testing.assert_close(vectors[1:].square().mean(1), torch.ones(6))
    cosines = vectors[1:] @ vectors[1:].T / 2
    assert cosines[:3, :3].min() > 0.99 and cosines[3:, 3:].min() > 0.99
    assert cosines[:3, 3:].abs().max() < 0.01


def test_esim_learns(example: SimpleNamespace) -> None:
    out = output("sentence_pairs.py", "--epochs", "2", "--hidden", "16")
    table = rows(out)
    assert [row[0] for row in table] == [1, 2]
    assert table[-1][-1] > 60  # % with the whole enhancement; chance is 50


def test_a_seed_gives_the_same_accuracies(example: SimpleNamespace) -> None:
    module = example.sentence_pairs
    _, held = example.text.split_sections(example.text.load_sections(), 0.2, 0)
    vocabulary = example.text.Vocabulary((s for section in held for s in section.sentences), 2)
    found = module.neighbours(held, vocabulary)
    pairs = module.make_pairs(found, random.Random(0))
    args = module.parser().parse_args(["--epochs", "1", "--hidden", "8"])
    vectors = torch.randn(len(vocabulary), 16)
    losses = []
    for _ in range(2):
        args.seed = 5
        losses.append(module.train(args, vectors, found, pairs, "[a; ã]"))
    assert losses[0] == losses[1]


def test_verdict_of_pairs(example: SimpleNamespace) -> None:
    text = example.sentence_pairs.verdict({"x": [0.6, 0.7], "y": [0.7, 0.65], "xy": [0.5, 0.8]}, 400)
    assert text.splitlines() == ["xy ends at 80.0 ± 2.0 % (one standard error), x at 70.0 %.", "Chance is 50 %."]


@pytest.mark.parametrize("script", ["language_model", "sentence_pairs"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "argument --seed: must not be negative, got -1"),
        (["--batch", "0"], "argument --batch: must be at least 1, got 0"),
        (["--batch", "many"], "argument --batch: invalid positive value: 'many'"),
        (["--lr", "nan"], "argument --lr: must be positive and finite, got nan"),
        (["--holdout", "1"], "argument --holdout: must lie between 0 and 1, got 1"),
        (["--dropout", "1"], "argument --dropout: must be at least 0 and below 1, got 1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_wrong_options_end_in_one_sentence(
    example: SimpleNamespace, capsys: pytest.CaptureFixture[str], script: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ending:
        getattr(example, script).main(arguments)
    assert ending.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"{script}.py: error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--holdout", "0.001"], "one section has more than half of the sentences on its side of the split"),
        (["--holdout", "0.999"], "one section has more than half of the sentences on its side of the split"),
        (["--features", "100000"], "--features must be below the size of the vocabulary"),
    ],
)
def test_too_little_text_is_said(
    example: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ending:
        example.sentence_pairs.main(arguments)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
