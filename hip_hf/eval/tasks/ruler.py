"""The RULER families, in the texts of lm-eval's own RULER tasks (Hsieh et al. 2024): needles,
variables, words.

Each `render_*` writes a prompt from its ingredients; the tests hand it those of lm-eval's documents
and get the same prompts. The texts are read from the lm-eval that is installed rather than repeated
here. Its modules are not imported for that: they download NLTK data and list every pair of an
adjective and a noun first.
"""

from __future__ import annotations

import ast
import functools
import itertools
import math
import random
import string
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hip_hf.eval.tasks.common import Prompt, build, draw_sentences, insert, read_plan, scatter

# Generation budgets of lm-eval's tasks; the YAML files repeat them as `max_gen_toks`.
NEEDLE_TOKENS, VARIABLE_TOKENS, COMMON_TOKENS, FREQUENT_TOKENS = 128, 30, 120, 50

NEEDLE_KIND = "numbers"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@functools.cache
def text_of(module: str, name: str) -> Any:
    """A constant of one of lm-eval's RULER modules."""
    spec = find_spec("lm_eval.tasks")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "ruler" / f"{module}.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=known)], value=value) if known == name:
                return ast.literal_eval(value)
    raise ImportError(f"{source} has no {name}: this version of lm-eval is not known to hip_hf")


@functools.cache
def words(*categories: str) -> list[str]:
    """English words of the categories `noun`, `adjective` or `verb`, sorted."""
    from wonderwords import RandomWord

    kinds = [RandomWord().filter(include_categories=[category]) for category in categories]
    return sorted({word for kind in kinds for word in kind})


def draw_key(rng: random.Random) -> str:
    """An adjective and a noun."""
    return f"{rng.choice(words('adjective'))}-{rng.choice(words('noun'))}"


def digits(rng: random.Random) -> str:
    """A value of seven digits."""
    return str(rng.randrange(10**6, 10**7))


def needle(key: str, value: str) -> str:
    return text_of("prepare_niah", "NEEDLE").format(type_needle_v=NEEDLE_KIND, key=key, value=value)


def render_needles(context: str, keys: Sequence[str], values: Sequence[str]) -> Prompt:
    """The question for `keys`, whose `values` all stand in `context`."""
    template, kind, verb = text_of("niah_utils", "TEMPLATE"), NEEDLE_KIND, "are"
    if len(values) == 1:
        kind, verb = NEEDLE_KIND.removesuffix("s"), "is"
        template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    prefix = f"The special magic {kind} for {query} mentioned in the provided text {verb}"
    text = template.format(type_needle_v=kind, context=context, query=query)
    return Prompt(text, prefix, list(values))


def needles(
    task: str, metadata: dict[str, Any], noise: str, keys: int = 1, values: int = 1, asked: int = 1
) -> dict[str, Any]:
    """`keys` keys with `values` values each are hidden, and `asked` of the keys asked for. `noise`:
    what they are hidden in, `repeat` (the same five sentences), `needles` (keys nobody asks for) or
    `text` (the haystack)."""
    haystack = read_plan(metadata).haystack

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        facts: dict[str, list[str]] = {}
        while len(facts) < keys:
            facts[draw_key(rng)] = [digits(rng) for _ in range(values)]
        names = list(facts)
        hidden = [needle(name, value) for name in names for value in facts[name]]
        rng.shuffle(hidden)
        wanted = rng.sample(names, asked)
        if noise == "repeat":
            units = [NOISE] * size
        elif noise == "needles":
            units = [needle(draw_key(rng), digits(rng)) for _ in range(size)]
        else:
            units = [" ".join(sentence.split()) for sentence in draw_sentences(haystack, rng, size)]
        parts = insert(units, hidden, scatter(rng, size, len(hidden)))
        context = (" " if noise == "text" else "\n").join(parts)
        return render_needles(context, wanted, [value for name in wanted for value in facts[name]])

    return build(task, make, NEEDLE_TOKENS, metadata)


def niah_single(**metadata: Any) -> dict[str, Any]:
    """RULER's `niah_single_1`."""
    return needles("niah_single", metadata, "repeat")


def niah_multikey(**metadata: Any) -> dict[str, Any]:
    """RULER's `niah_multikey_2`."""
    return needles("niah_multikey", metadata, "needles")


def niah_multivalue(**metadata: Any) -> dict[str, Any]:
    """RULER's `niah_multivalue`, in our haystack."""
    return needles("niah_multivalue", metadata, "text", values=4)


def niah_multiquery(**metadata: Any) -> dict[str, Any]:
    """RULER's `niah_multiquery`, in our haystack."""
    return needles("niah_multiquery", metadata, "text", keys=4, asked=4)


def chain(rng: random.Random, hops: int, letters: int) -> tuple[list[str], str]:
    """Names of `hops + 1` variables, each assigned from the one before, and the value of the
    first."""
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names, str(rng.randrange(10000, 99999))


def assignments(names: Sequence[str], value: str) -> list[str]:
    """The sentences of a chain."""
    links = [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    return [f"VAR {names[0]} = {value}", *links]


def render_variables(
    units: Sequence[str], names: Sequence[str], value: str, example: str
) -> Prompt:
    """The question for the variables that hold `value`, after a worked example (empty for none)."""
    texts = text_of("vt_utils", "CONFIG")["variable_tracking"]
    context = " ".join(units).replace(". \n", ".\n")
    prefix = texts["answer_prefix"].format(num_v=len(names), query=value)
    text = example + texts["template"].format(context=context, query=value)
    return Prompt(text, prefix.strip(), list(names))


def variable_tracking(**metadata: Any) -> dict[str, Any]:
    """RULER's `vt`: one chain of four hops, and a worked example (shorter than RULER's) before
    it."""
    noise, hops, example_noise = NOISE + "\n", 4, 5

    def draw(rng: random.Random, size: int, letters: int, example: str) -> Prompt:
        names, value = chain(rng, hops, letters)
        units = insert([noise] * size, assignments(names, value), scatter(rng, size, hops + 1))
        return render_variables(units, names, value, example)

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        shown = draw(rng, example_noise, 3, "")
        example = f"{shown.input} {shown.gen_prefix}  {' '.join(shown.outputs)}\n\n\n\n"
        return draw(rng, size, 5, example)

    return build("variable_tracking", make, VARIABLE_TOKENS, metadata)


def render_words(module: str, context: str, outputs: Sequence[str]) -> Prompt:
    """The question for the most frequent words of `context`, in the words of `cwe_utils` or
    `fwe_utils`."""
    texts = text_of(module, "CONFIG")
    text = texts["template"].format(context=context, query="").strip()
    return Prompt(text, texts["answer_prefix"].strip(), list(outputs))


def common_words(**metadata: Any) -> dict[str, Any]:
    """RULER's `cwe`: ten words are listed thirty times, all others three times; in short prompts
    six times and once."""
    count, short = 10, 4096
    known = words("noun", "adjective", "verb")

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        often, seldom = (6, 1) if length < short else (30, 3)
        drawn = rng.sample(known, count + size)
        listed = drawn[:count] * often + drawn[count:] * seldom
        rng.shuffle(listed)
        context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return render_words("cwe_utils", context, drawn[:count])

    options: dict[str, Any] = dict(delimiter="\n\n", largest=len(known) - count)
    return build("common_words", make, COMMON_TOKENS, metadata, **options)


def frequent_words(**metadata: Any) -> dict[str, Any]:
    """RULER's `fwe`: coded words whose frequencies fall with the square of their rank; the first,
    `...`, is noise."""
    letters, asked = 6, 3
    zeta = math.pi**2 / 6  # of 2: the frequencies sum to one

    def make(rng: random.Random, size: int, length: int) -> Prompt:
        vocabulary = ["..."]
        while len(vocabulary) < max(length // 50, asked + 2):
            word = "".join(rng.choices(string.ascii_lowercase, k=letters))
            if word not in vocabulary:
                vocabulary.append(word)
        counts = [int(size / (zeta * rank**2)) for rank in range(1, len(vocabulary) + 1)]
        coded = [word for word, times in zip(vocabulary, counts, strict=True) for _ in range(times)]
        rng.shuffle(coded)
        return render_words("fwe_utils", " ".join(coded), vocabulary[1 : asked + 1])

    # the third word must occur: more than once, to be told from the fourth
    return build("frequent_words", make, FREQUENT_TOKENS, metadata, smallest=64)
