"""Whether a program touches what the tensor cores of sm90 still work on: a data flow over its PTX.

A `wgmma` runs on while its warps do. Until a wait has retired the group it was committed to,
nothing may read or write its sums, nor write registers that it reads; only another `wgmma` may go
on with the same sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

REGISTER = re.compile(r"%[a-z]+\d+")
LABEL = re.compile(r"^(\$?[\w$]+):")
BRANCH = re.compile(r"^(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$?[\w$]+)")
# How instructions begin whose first operand is no register that they write.
WRITES_NOTHING = re.compile(r"(st|red|bar|cp|wgmma|mbarrier|fence)\.|prefetch|membar|bra|ret")
# Groups in flight that are told apart; older ones count as one.
MOST_GROUPS = 8


@dataclass(frozen=True)
class Product:
    """A `wgmma`: its sums, and the registers of its first factor where that is not in shared
    memory."""

    sums: tuple[str, ...]
    reads: frozenset[str]


# Products of each group that is in flight, the oldest first; the last group is not committed yet.
Groups = tuple[frozenset[Product], ...]


def _instructions(ptx: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a program's kernel, and where its labels are."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in ptx.splitlines():
        text = line.partition("//")[0].strip()
        if label := LABEL.match(text):
            labels[label.group(1)] = len(found)
        elif text and not text.startswith((".", "{", "}", ")")):
            found.append(text)
    return found, labels


def _product(text: str) -> Product:
    """Of the text of a `wgmma.mma_async`."""
    sums, *more = re.findall(r"\{([^}]*)\}", text)
    return Product(tuple(REGISTER.findall(sums)), frozenset(REGISTER.findall("".join(more[:1]))))


def _written(text: str) -> frozenset[str]:
    """Registers that an instruction writes: its first operand, or the list of them that it is."""
    operation, _, operands = re.sub(r"^@!?%p\d+\s+", "", text).replace("\t", " ").partition(" ")
    if WRITES_NOTHING.match(operation):
        return frozenset()
    end = "}" if operands.lstrip().startswith("{") else ","
    return frozenset(REGISTER.findall(operands.partition(end)[0]))


def _after(text: str, groups: Groups) -> Groups:
    """What is in flight after an instruction."""
    if text.startswith("wgmma.mma_async"):
        return (*groups[:-1], groups[-1] | {_product(text)})
    if text.startswith("wgmma.commit_group"):
        groups = (*groups, frozenset())
        if len(groups) > MOST_GROUPS:
            groups = (groups[0] | groups[1], *groups[2:])
    elif text.startswith("wgmma.wait_group"):
        left = int(text.rstrip(";").split()[-1])
        groups = groups[max(0, len(groups) - 1 - left) :]
    return groups


def _touches(text: str, groups: Groups) -> bool:
    """Whether an instruction touches what is in flight."""
    flying = frozenset().union(*groups)
    if not flying or text.startswith(("wgmma.commit_group", "wgmma.wait_group", "wgmma.fence")):
        return False
    named = frozenset(REGISTER.findall(text))
    if text.startswith("wgmma.mma_async"):
        product = _product(text)
        goes_on = {other for other in flying if other.sums == product.sums}
        others = frozenset(register for other in flying - goes_on for register in other.sums)
        sums = frozenset(product.sums)
        return bool(
            named & others or product.reads & sums or any(other.reads & sums for other in flying)
        )
    written = _written(text)
    return any(named & frozenset(other.sums) or written & other.reads for other in flying)


def _next(at: int, text: str, labels: dict[str, int]) -> Iterator[int]:
    """Where a program goes on."""
    branch = BRANCH.match(text)
    if branch:
        yield labels[branch.group(2)]
    if not (text.startswith("ret") or (branch and not branch.group(1))):
        yield at + 1


def touched(ptx: str) -> list[str]:
    """The instructions that touch what a `wgmma` in flight works on, in the order of the program;
    empty if all is well."""
    instructions, labels = _instructions(ptx)
    found: set[int] = set()
    seen: set[tuple[int, Groups]] = set()
    todo: list[tuple[int, Groups]] = [(0, (frozenset(),))]
    while todo:
        at, groups = todo.pop()
        if at >= len(instructions) or (at, groups) in seen:
            continue
        seen.add((at, groups))
        text = instructions[at]
        if _touches(text, groups):
            found.add(at)
        todo += [(to, _after(text, groups)) for to in _next(at, text, labels)]
    return [instructions[at] for at in sorted(found)]
