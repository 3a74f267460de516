"""Rows that ask a model for what stands far above: needles in text of the corpus, in the style of RULER
(arXiv 2404.06654, section 3.1).

A needle is a sentence, "The magic number of amber falcon is 48273." At the end of the row the sentence begins
again and its number is asked for. An answer counts when each of its tokens is the most probable one after the
right tokens before it, in one forward without a cache: exactly then greedy decoding writes the answer, since
it goes on from its own tokens, and those are the right ones as long as all were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

PROMPT, END = "\nThe magic number of {key} is", "."
TOKENS_PER_OTHER_KEY = 256
MAX_OTHER_KEYS = 512
_ADJECTIVES = (
    "amber ashen bitter brave calm clever damp dusty eager early faded fancy gentle grand hollow humble icy "
    "jolly kind lucky mellow narrow olive proud quiet rusty silent tidy upset vivid windy young"
)
_NOUNS = (
    "anchor arrow basket bridge cactus candle desert dragon ember engine falcon fossil garden glacier hammer "
    "harbor island jacket kettle ladder meadow needle orchard pencil quarry ribbon saddle tunnel urchin "
    "valley walnut yogurt"
)
KEYS = tuple(" ".join(pair) for pair in product(_ADJECTIVES.split(), _NOUNS.split()))

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question.

    Args:
        asks_all: A row has a needle at each depth and asks for all of them, one after another, with the right
            answers between. Else it has one needle, and there is a row for each depth.
        has_other_keys: Needles that nobody asks for stand among the text, one for each `TOKENS_PER_OTHER_KEY`
            tokens.
    """

    name: str
    asks_all: bool
    has_other_keys: bool


TASKS = (
    Task(name="one needle", asks_all=False, has_other_keys=False),
    Task(name="several needles", asks_all=True, has_other_keys=False),
    Task(name="many keys", asks_all=True, has_other_keys=True),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Where an answer stands: the tokens [start, end) of its row.

    Args:
        depth: Where its needle is: 0: before all text, 1: behind it.
    """

    start: int
    end: int
    depth: float


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


def recall_rows(
    task: Task,
    *,
    num_tokens: int,
    depths: Sequence[float],
    text: Sequence[int],
    encode: Encode,
    start: Sequence[int] = (),
    seed: str,
) -> list[RecallRow]:
    """The rows of one trial, of `num_tokens` tokens each.

    Args:
        text: Token ids of the corpus; a row takes a part that begins anywhere.
        encode: The ids of a text, without those that begin or end a sequence. The pieces of a needle are
            encoded one by one, so that its tokens are the same where it stands and where it is asked for.
        start: What a sequence begins with.
        seed: Rows of the same seed are the same.

    Raises:
        ValueError: needles and questions take more tokens than there are, or the text is too short.
    """
    rng = random.Random(f"{seed} {task.name} {num_tokens}")
    num_others = min(num_tokens // TOKENS_PER_OTHER_KEY, MAX_OTHER_KEYS) if task.has_other_keys else 0
    parts = [tuple(depths)] if task.asks_all else [(depth,) for depth in depths]
    return [_row(part, num_others, num_tokens, text, encode, start, rng) for part in parts]


def _row(
    depths: Sequence[float],
    num_others: int,
    num_tokens: int,
    text: Sequence[int],
    encode: Encode,
    start: Sequence[int],
    rng: random.Random,
) -> RecallRow:
    keys = rng.sample(KEYS, len(depths) + num_others)
    facts = [(encode(PROMPT.format(key=key)), encode(f" {rng.randrange(10**4, 10**5)}")) for key in keys]
    end = encode(END)
    asked = [(depth, *fact) for depth, fact in zip(depths, facts, strict=False)]
    rng.shuffle(asked)
    num_needles = sum(len(prompt) + len(answer) + len(end) for prompt, answer in facts)
    num_asked = sum(len(prompt) + len(answer) + len(end) for _, prompt, answer in asked)
    room = num_tokens - len(start) - num_needles - num_asked
    if room < 0:
        raise ValueError(
            f"{num_tokens} tokens are too few for {len(facts)} needle(s) and {len(asked)} question(s), which "
            f"take {num_tokens - room}: write longer --lengths, or fewer --depths"
        )
    if room > len(text):
        raise ValueError(
            f"a row of {num_tokens:,} tokens needs {room:,} of text, the data has {len(text):,}: write "
            "shorter --lengths, or more data"
        )
    first = rng.randrange(len(text) - room + 1)
    places = [(round(depth * room), prompt, answer) for depth, prompt, answer in asked]
    places += [(rng.randint(0, room), *fact) for fact in facts[len(depths) :]]
    ids, done, questions = list(start), 0, []
    for place, prompt, answer in sorted(places, key=lambda found: found[0]):
        ids += [*text[first + done : first + place], *prompt, *answer, *end]
        done = place
    ids += text[first + done : first + room]
    for depth, prompt, answer in asked:
        ids += prompt
        questions.append(Question(start=len(ids), end=len(ids) + len(answer), depth=depth))
        ids += [*answer, *end]
    return RecallRow(ids=tuple(ids), questions=tuple(questions))
