"""Tasks of the accuracy study of sparse attention: what stands where, and what can be told from it."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from benchmarks import sparse_tasks as tasks

CONTEXT = 1280


@pytest.fixture
def text() -> Tensor:
    """Nothing that a line has."""
    return torch.randint(ord("a"), ord("z") + 1, (2**14,), generator=Generator().manual_seed(0)).short()


def generator() -> Generator:
    return Generator().manual_seed(3)


def starts(tokens: Tensor, mark: int) -> list[int]:
    return (tokens == mark).nonzero().flatten().tolist()


def told(tokens: list[int], at: int) -> int:
    """What a model of nothing but lookups expects at a place: what follows the longest of the strings that
    end before it and are found earlier, where it is found last."""
    for length in range(min(at, 24), 0, -1):
        end = tokens[at - length : at]
        for i in range(at - length - 1, -1, -1):
            if tokens[i : i + length] == end:
                return tokens[i + length]
    return -1


@pytest.mark.parametrize("name", tasks.EXAMS)
def test_exam(text: Tensor, name: str) -> None:
    batch = tasks.exam(text, name, 3, CONTEXT, generator())
    _, lengths, groups = tasks.EXAMS[name]
    facts = groups(CONTEXT) * (tasks.STEPS if name == "variables" else 1)
    assert batch.tokens.shape == (3, CONTEXT + 1) and batch.answers.shape == (3, CONTEXT)
    assert not (batch.answers & ~batch.planted).any()
    for tokens, answers, planted in zip(batch.tokens, batch.answers, batch.planted, strict=True):
        (question,) = starts(tokens, tasks.ASK)
        assert len(starts(tokens, tasks.FACT)) == facts and max(starts(tokens, tasks.FACT)) < question
        assert tokens[0] == tasks.DOCUMENT and tokens[-1] == ord("\n")
        assert planted[question - 1 :].all() and int(answers.nonzero()[-1]) == CONTEXT - 2
        assert not planted[(tokens[1:] >= ord("a")) & (tokens[1:] <= ord("z"))].any()
        want = tokens[1:][answers].tolist()
        assert [told(tokens.tolist(), at + 1) for at in answers.nonzero().flatten().tolist()] == want
        assert len(want) == {"variables": 2 * lengths.name + lengths.value,
                             "copy": lengths.passage - lengths.prompt}.get(name, lengths.value)  # fmt: skip


def test_exams_repeat_and_differ(text: Tensor) -> None:
    one, other = (tasks.exam(text, "needle", 2, CONTEXT, generator()) for _ in range(2))
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens[0], one.tokens[1])


@pytest.mark.parametrize("context", [256, CONTEXT])
def test_lesson(text: Tensor, context: int) -> None:
    """Each task has its sequences, and each question something behind it to be told by."""
    each = 2
    batch = tasks.lesson(text, each * (len(tasks.LESSONS) + 1) + 1, context, generator())
    assert not batch.planted[-each - 1 :].any() and (batch.tokens[:, 0] == tasks.DOCUMENT).all()
    for row, (task, lengths) in enumerate(list(tasks.LESSONS.values())):
        lengths = lengths if context >= tasks.LONG_FROM else tasks.SHORT
        for tokens, answers in zip(
            *(x[row * each :][:each] for x in (batch.tokens, batch.answers)), strict=True
        ):
            facts, questions = starts(tokens, tasks.FACT), starts(tokens, tasks.ASK)
            assert len(facts) == len(questions) * (tasks.STEPS if task is tasks.chains else 1)
            assert questions and min(facts) < min(questions)
            flags = task((1, 1), lengths, generator())[1]
            assert int(answers.sum()) == len(questions) * int(flags.sum())
            for at in range(questions[0], questions[0] + flags.shape[1]):
                assert not answers[at - 1] or told(tokens.tolist(), at) == tokens[at]


def test_no_room(text: Tensor) -> None:
    with pytest.raises(ValueError, match="no room"):
        tasks.exam(text, "variables", 2, 512, generator())


def test_scores(text: Tensor) -> None:
    """Right everywhere, wrong in a byte that is no answer, wrong in one that is."""
    batch = tasks.exam(text, "copy", 3, CONTEXT, generator())
    logits = 9.0 * torch.nn.functional.one_hot(batch.tokens[:, 1:].long(), tasks.VOCABULARY)
    logits[1, 5] = 0.0
    logits[2, int(batch.answers[2].nonzero()[7])] = 0.0
    assert tasks.solved(logits, batch).tolist() == [True, True, False]
    assert float(tasks.losses_of(logits, batch)[0].max()) < 0.05
    plain = tasks.plain(text, 4, 500)
    assert plain.tokens.shape == (4, 501) and not plain.planted.any()
    assert torch.equal(plain.tokens[1, 1:], text[502:1002])


def test_learned(text: Tensor) -> None:
    batch = tasks.lesson(text, 2 * (len(tasks.LESSONS) + 1), CONTEXT, generator())
    logits = 9.0 * torch.nn.functional.one_hot(batch.tokens[:, 1:].long(), tasks.VOCABULARY)
    logits[:2] = 0.0  # of the first task
    found = tasks.learned(logits, tasks.losses_of(logits, batch), batch)
    assert found.pop("code") > 0 and list(found.values()) == [0.0, 100.0, 100.0, 100.0]


def test_sources_are_apart(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are trained on or held out, whole; a file that is there twice is read once."""
    for number in range(40):
        (tmp_path / f"p{number}").mkdir()
        for file in "ab":
            (tmp_path / f"p{number}" / f"{file}.py").write_text(f"x{number}{file}")
        (tmp_path / f"p{number}" / "same.py").write_text("the same")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    found = tasks.source()
    pieces = []
    for part in (found.train, found.held):
        whole = "".join(chr(x) if x < 256 else "\0" for x in part.tolist())
        pieces.append([piece for piece in whole.split("\0") if piece])
    assert sum(len(part) for part in pieces) == 81 and all(pieces)
    folders = [{piece.strip("xab") for piece in part if piece != "the same"} for part in pieces]
    assert not folders[0] & folders[1]
