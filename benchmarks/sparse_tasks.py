"""Text for the study of sparse attention: source code, and questions in it that only far tokens answer.

    text = source()                                  tokens to train on, and others held out
    batch = lesson(text.train, 80, 1024, generator)  sequences with facts that are asked for all along
    exam(text.held, "copy", 250, 8192, generator)    one question each, at the end

A task plants lines into windows of source code, in the place of what stood there. Names A, B, C are random
capitals and values V random digits, so nothing can be learned by heart.

    needle        FACT A=V                    ASK A=V      one fact in the window, A is given
    multi-key     FACT A=V                    ASK A=V      a fact for each KiB, one is asked
    variables     FACT A=V, B=A, C=B          ASK C=B=A=V  two chains of three facts, one C is given
    copy          FACT and 144 capitals       ASK and the same, the first 16 are given
    short needle  FACT A=V                    ASK A=V      with 8 bytes each instead of 40 and 96

A question is answered when every byte behind what is given is the most probable one, with the right bytes
before it. Lines are 83 to 221 bytes long, in the order of a block of 128: what a selector sees of a block is
means over parts of it, and a fact much shorter than a block, or a question that is a small part of one, is
lost in them. `short needle` tells how much; it is reported beside the others and not part of their mean.

Everything is made on the CPU from a seeded generator: the same wherever the packages are.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FACT, ASK, DOCUMENT = 256, 257, 258  # beside the 256 bytes: what begins a fact, a question, a file
VOCABULARY = 264  # a multiple of 8, for the sake of products
STEPS = 3  # variables of a chain
SHIFT = 5  # lines stand anywhere in slots that are this much longer
UNCHANGED = -1  # in a line: what stands in the window stays
HELD_OUT = 16  # one folder in as many is not trained on
BYTES = 2**27  # of source code


@dataclass(frozen=True)
class Text:
    train: Tensor  # int16 [any]
    held: Tensor


@dataclass(frozen=True)
class Batch:
    """N tokens and the next ones; flags are of tokens 1 … N, which are to be predicted."""

    tokens: Tensor  # int16 [B, N+1]
    answers: Tensor  # bool [B, N]: bytes that a fact tells
    planted: Tensor  # bool [B, N]: bytes of lines, answers among them

    def part(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], self.answers[rows], self.planted[rows])

    def to(self, device: str) -> Batch:
        return Batch(self.tokens.to(device), self.answers.to(device), self.planted.to(device))


@dataclass(frozen=True)
class Lengths:
    """In bytes."""

    name: int
    value: int
    passage: int  # what is to be copied
    prompt: int  # what is given of it


LONG, SHORT = Lengths(40, 96, 144, 16), Lengths(8, 8, 32, 8)
Tests = dict[tuple[str, int], Batch]  # by name and context
# (B, P), lengths, generator -> lines [B, P, T, L] of P groups of T lines, the question last, and the flags
# [T, L] of answers in them
Task = Callable[[tuple[int, int], Lengths, Generator], tuple[Tensor, Tensor]]


def pairs(shape: tuple[int, int], of: Lengths, generator: Generator) -> tuple[Tensor, Tensor]:
    parts = _letters((*shape, of.name), generator), "=", _digits((*shape, of.value), generator), "\n"
    return _together([_line(shape, mark, *parts) for mark in (FACT, ASK)], given=2 + of.name)


def chains(shape: tuple[int, int], of: Lengths, generator: Generator) -> tuple[Tensor, Tensor]:
    value = _digits((*shape, of.value), generator)
    names = list(_letters((STEPS, *shape, of.name), generator))
    facts = [_line(shape, FACT, a, "=", b, "\n") for a, b in zip(names, [value, *names[:-1]], strict=True)]
    path = [part for name in reversed(names) for part in (name, "=")]
    return _together([*facts, _line(shape, ASK, *path, value, "\n")], given=2 + of.name)


def passages(shape: tuple[int, int], of: Lengths, generator: Generator) -> tuple[Tensor, Tensor]:
    passage = _letters((*shape, of.passage), generator)
    return _together([_line(shape, mark, passage, "\n") for mark in (FACT, ASK)], given=1 + of.prompt)


LESSONS: dict[str, tuple[Task, Lengths]] = {
    "pairs": (pairs, LONG),
    "short": (pairs, SHORT),
    "variables": (chains, LONG),
    "copy": (passages, LONG),
}
# with how many groups of lines there are in a context
EXAMS: dict[str, tuple[Task, Lengths, Callable[[int], int]]] = {
    "needle": (pairs, LONG, lambda context: 1),
    "multi-key": (pairs, LONG, lambda context: max(2, context // 1024)),
    "variables": (chains, LONG, lambda context: 2 if context >= 2048 else 1),
    "copy": (passages, LONG, lambda context: 1),
    "short needle": (pairs, SHORT, lambda context: 1),
}
BESIDE = ("short needle",)  # not part of a mean
LONG_FROM = 1024  # tokens of context; all lines are short below


def lesson(text: Tensor, count: int, context: int, generator: Generator) -> Batch:
    """As many sequences of each task of LESSONS, in their order, and then of plain code. Questions stand
    anywhere behind their facts, a third as many on average as there is room for, and often few."""
    batch, each = _windows(text, count, context, generator), count // (len(LESSONS) + 1)
    for place, (task, lengths) in enumerate(LESSONS.values()):
        lengths = lengths if context >= LONG_FROM else SHORT
        _, _, lines, length = task((1, 1), lengths, generator)[0].shape
        most = context // (length + SHIFT) // lines
        groups = 1 + int((most - 1) * torch.rand((), generator=generator) ** 2)
        written, answers = task((each, groups), lengths, generator)
        places = _places((each, groups, lines), context, length, generator)
        _plant(batch.part(slice(place * each, (place + 1) * each)), written, answers, places)
    return batch


def exam(text: Tensor, name: str, count: int, context: int, generator: Generator) -> Batch:
    """The question about the first group of lines is the end of each sequence."""
    task, lengths, groups = EXAMS[name]
    batch = _windows(text, count, context, generator)
    written, answers = task((count, groups(context)), lengths, generator)
    lines, length = written.shape[2:]
    facts = (count, written.shape[1], lines - 1)
    places = _places(facts, context - length, length, generator)
    _plant(batch, written[:, :, :-1], answers[:-1], places)
    end = torch.full((count, 1, 1), context + 1 - length)
    _plant(batch, written[:, :1, -1:], answers[-1:], end)
    return batch


def plain(text: Tensor, count: int, context: int) -> Batch:
    """The first windows of the text, with nothing planted."""
    tokens = text[: len(text) // (context + 1) * (context + 1)].view(-1, context + 1)[:count].clone()
    tokens[:, 0] = DOCUMENT
    return Batch(tokens, *(torch.zeros(len(tokens), context, dtype=torch.bool) for _ in "ap"))


def tests_of(text: Tensor, contexts: dict[int, int], texts: int) -> Tests:
    """`texts` windows of plain text in the first context, and every exam in each, of so many sequences."""
    generator, first = torch.Generator().manual_seed(1), next(iter(contexts))
    tests: Tests = {("text", first): plain(text, texts, first)}
    for (context, count), name in itertools.product(contexts.items(), EXAMS):
        tests[name, context] = exam(text, name, count, context, generator)
    return tests


def losses_of(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy [B, N] in float32 of logits [B, N, VOCABULARY]."""
    target = batch.tokens[:, 1:].long()
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(target)


def solved(logits: Tensor, batch: Batch) -> Tensor:
    """Sequences [B] of which every byte of the answers has the largest logit."""
    return ((logits.argmax(-1) == batch.tokens[:, 1:]) | ~batch.answers).all(1)


def learned(logits: Tensor, losses: Tensor, batch: Batch) -> dict[str, float]:
    """Of a lesson: the loss of its code, and how many bytes of the answers are right by task, in percent."""
    found = {"code": round(losses[~batch.planted].mean().item(), 4)}
    right, each = logits.argmax(-1) == batch.tokens[:, 1:], len(logits) // (len(LESSONS) + 1)
    for place, name in enumerate(LESSONS):
        rows = slice(place * each, (place + 1) * each)
        found[name] = round(100 * right[rows][batch.answers[rows]].float().mean().item(), 1)
    return found


def source(limit: int = BYTES) -> Text:
    """Python files beside torch, in the order of their names. Whole folders are held out: files of one folder
    repeat each other. A file that was there before, byte for byte, is left out."""
    root, seen, total = Path(torch.__file__).parents[1], set(), 0
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        data = path.read_bytes()
        if not data or data in seen:
            continue
        seen.add(data)
        held = zlib.crc32(str(path.parent.relative_to(root)).encode()) % HELD_OUT == 0
        parts[held].append(torch.tensor([DOCUMENT], dtype=torch.int16))
        parts[held].append(torch.frombuffer(bytearray(data), dtype=torch.uint8).short())
        total += len(data)
        if total >= limit:
            break
    return Text(*(torch.cat(parts[held]) for held in (False, True)))


def _windows(text: Tensor, count: int, context: int, generator: Generator) -> Batch:
    """Random places of the text. Every sequence begins as a file does."""
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    tokens = text[starts + torch.arange(context + 1)]
    tokens[:, 0] = DOCUMENT
    return Batch(tokens, *(torch.zeros(count, context, dtype=torch.bool) for _ in "ap"))


def _places(shape: tuple[int, int, int], room: int, length: int, generator: Generator) -> Tensor:
    """Where lines [B, P, T] begin, at 1 … room, in the order of T in each group."""
    count, groups, lines = shape
    slot = length + SHIFT
    if groups * lines > room // slot:
        raise ValueError(f"{room} tokens have no room for {groups * lines} lines of {length}")
    order = torch.rand(count, room // slot, generator=generator).argsort(1)[:, : groups * lines]
    slots = order.view(shape).sort(-1).values
    return 1 + slots * slot + torch.randint(SHIFT, shape, generator=generator)


def _plant(batch: Batch, lines: Tensor, answers: Tensor, places: Tensor) -> None:
    """Write lines [B, P, T, L] at places [B, P, T] of a batch, in place."""
    index = (places.unsqueeze(-1) + torch.arange(lines.shape[-1])).flatten(1)
    new, answers = lines.flatten(1), answers.expand(lines.shape).flatten(1)
    written = torch.where(new == UNCHANGED, batch.tokens.gather(1, index), new)
    batch.tokens.scatter_(1, index, written)
    batch.planted.scatter_(1, index - 1, new != UNCHANGED)
    batch.answers.scatter_(1, index - 1, answers)


def _line(shape: tuple[int, int], *parts: int | str | Tensor) -> Tensor:
    """Tokens [B, P, L]; a number is a token, a letter its byte."""
    codes = [ord(part) if isinstance(part, str) else part for part in parts]
    made = [
        code if isinstance(code, Tensor) else torch.full((*shape, 1), code, dtype=torch.int16)
        for code in codes
    ]
    return torch.cat(made, -1)


def _together(lines: list[Tensor], given: int) -> tuple[Tensor, Tensor]:
    """Lines [B, P, T, L], as long as the last one, of which all is to be answered that is not given, but for
    what every line has: signs of equality, and its end."""
    length = lines[-1].shape[-1]
    padded = [F.pad(x, (0, length - x.shape[-1]), value=UNCHANGED) for x in lines]
    answers = torch.zeros(len(lines), length, dtype=torch.bool)
    answers[-1, given:-1] = lines[-1][0, 0, given:-1] != ord("=")
    return torch.stack(padded, 2), answers


def _letters(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(ord("A"), ord("Z") + 1, shape, generator=generator, dtype=torch.int16)


def _digits(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(ord("0"), ord("9") + 1, shape, generator=generator, dtype=torch.int16)
