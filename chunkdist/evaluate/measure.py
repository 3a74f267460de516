"""Loss by position, and recall by depth, of a model that is chunked as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.evaluate.documents import longest_first
from chunkdist.evaluate.recall import TASKS, Encode, Task, recall_rows
from chunkdist.loss.by_position import LossByPosition, PositionSums
from chunkdist.loss.token_losses import TokenLosses

NO_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is evaluated.

    Args:
        lengths: Tokens of a sequence, ascending.
        depths: Where needles stand, from 0 to 1.
        num_rows: Sequences of which the loss is taken, at most.
        num_trials: Questions for each task, length and depth.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_rows: int = 2
    num_trials: int = 2
    seed: int = 0

    @property
    def tail_tokens(self) -> int:
        """The last tokens of each sequence, whose loss is compared between lengths."""
        return self.lengths[0] // 2


@dataclass(frozen=True, kw_only=True)
class LengthLoss:
    """Mean loss (nats a token) of the last `num_tokens` tokens of the same sequences.

    Args:
        by_position: That of each range of positions, as training logs it.
        tail: That of the last `EvalSettings.tail_tokens`, which are the same tokens at every length; `None`:
            they have no labels.
    """

    num_tokens: int
    by_position: dict[str, float]
    tail: float | None


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How many answers of one task, length and depth were right as a whole, and how many of their tokens."""

    task: str
    num_tokens: int
    depth: float
    num_answers: int
    num_right: int
    num_answer_tokens: int
    num_right_tokens: int

    @property
    def share(self) -> float:
        return self.num_right / self.num_answers


@dataclass(kw_only=True)
class Evaluation:
    settings: EvalSettings
    num_rows: int = 0
    num_joined: int = 0
    """Sequences of more than one document."""
    losses: list[LengthLoss] = field(default_factory=list)
    recall: list[Recall] = field(default_factory=list)

    def share(self, task: str, num_tokens: int | None = None, depth: float | None = None) -> float:
        """The share of right answers to a task: all, or those of a length, or a depth."""
        found = [
            x
            for x in self.recall
            if x.task == task and num_tokens in (None, x.num_tokens) and depth in (None, x.depth)
        ]
        return sum(x.num_right for x in found) / sum(x.num_answers for x in found)


@torch.no_grad()
def token_scores(model: nn.Module, ids: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of one sequence, in one forward: the log-probability of each labelled token, and whether it is the most
    probable one. (T,) each, on the CPU; 0 and false where there is no label, and for the first token.

    Args:
        model: With TRL's `add_fused_lm_head(model, outputs=("log_probs", "is_top1"))`, then chunked: logits
            are made in tiles, of labelled tokens only.
    """
    device = next(model.parameters()).device
    ids_1T, labels_1T = (torch.tensor([list(x)], device=device) for x in (ids, labels))
    labels_1T[:, 0] = NO_LABEL
    output = model(input_ids=ids_1T, labels=labels_1T, fused_lm_head=True, use_cache=False)
    log_probs_T, is_top1_T = output.log_probs[0].float().cpu(), output.is_top1[0].cpu()
    has_label_T = (labels_1T[0, 1:] != NO_LABEL).cpu()
    first = torch.zeros(1)
    return (
        torch.cat([first, log_probs_T.where(has_label_T, torch.zeros(()))]),
        torch.cat([first.bool(), is_top1_T.bool() & has_label_T]),
    )


def evaluate(
    model: nn.Module,
    documents: Sequence[tuple[list[int], list[int]]],
    encode: Encode,
    settings: EvalSettings,
    *,
    start: Sequence[int] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Loss by position and recall at each length.

    Args:
        model: As for `token_scores`; left in evaluation mode.
        documents: (ids, labels) each.
        encode, start: As for `recall_rows`.

    Raises:
        ValueError: the documents are too short, or a length for its needles.
    """
    model.eval()
    longest = settings.lengths[-1]
    sequences = longest_first(documents, num_tokens=longest, num_rows=settings.num_rows)
    text = [token for ids, _ in documents for token in ids]

    def rows_of(task: Task, num_tokens: int) -> list[Any]:
        return [
            row
            for trial in range(settings.num_trials)
            for row in recall_rows(
                task,
                num_tokens=num_tokens,
                depths=settings.depths,
                text=text,
                encode=encode,
                start=start,
                seed=f"{settings.seed} {trial}",
            )
        ]

    asked = {(task, n): rows_of(task, n) for n in settings.lengths for task in TASKS}  # refuses at once
    found = Evaluation(settings=settings, num_rows=len(sequences.rows), num_joined=sequences.num_joined)
    for num_tokens in settings.lengths:
        progress(f"loss by position, {num_tokens:,} tokens")
        found.losses.append(_length_loss(model, sequences.rows, num_tokens, start, settings))
    for (task, num_tokens), rows in asked.items():
        progress(f"{task.name}, {num_tokens:,} tokens")
        found.recall += _recall(model, task, num_tokens, rows, settings.depths)
    return found


def _length_loss(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    num_tokens: int,
    start: Sequence[int],
    settings: EvalSettings,
) -> LengthLoss:
    sums, of_tail = PositionSums(), []
    for ids, labels in rows:
        begin, cut = ([], 0) if num_tokens == len(ids) else (list(start), len(ids) - num_tokens + len(start))
        own = [*[NO_LABEL] * len(begin), *labels[cut:]]
        losses_T = -token_scores(model, [*begin, *ids[cut:]], own)[0]
        has_label_T = torch.tensor(own) != NO_LABEL
        places = torch.arange(1, num_tokens)
        sums.add(TokenLosses(losses=losses_T[1:], has_label=has_label_T[1:], positions=places))
        last = slice(num_tokens - settings.tail_tokens, None)
        of_tail.append(losses_T[last][has_label_T[last]])
    tail = torch.cat(of_tail)
    return LengthLoss(
        num_tokens=num_tokens,
        by_position=LossByPosition.of(sums.take(torch.device("cpu"))).means(),
        tail=tail.double().mean().item() if len(tail) else None,
    )


def _recall(
    model: nn.Module, task: Task, num_tokens: int, rows: Sequence[Any], depths: Sequence[float]
) -> list[Recall]:
    right: dict[float, list[Tensor]] = {depth: [] for depth in depths}
    for row in rows:
        labels = [NO_LABEL] * len(row.ids)
        for question in row.questions:
            labels[question.start : question.end] = row.ids[question.start : question.end]
        _, is_top1_T = token_scores(model, row.ids, labels)
        for question in row.questions:
            right[question.depth].append(is_top1_T[question.start : question.end])
    return [
        Recall(
            task=task.name,
            num_tokens=num_tokens,
            depth=depth,
            num_answers=len(answers),
            num_right=sum(bool(answer.all()) for answer in answers),
            num_answer_tokens=sum(len(answer) for answer in answers),
            num_right_tokens=sum(int(answer.sum()) for answer in answers),
        )
        for depth, answers in right.items()
    ]
