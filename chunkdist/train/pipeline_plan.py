"""How the launcher's pipelines run: what its options leave open is chosen by simulation, on the first batches
of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import distributed

from chunkdist.config import ChunkConfig
from chunkdist.memory.auto import USABLE_SHARE, free_bytes
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.models.layers import causal_lm_of, find_layers, layer_states
from chunkdist.pipeline.costs import layer_costs, room_for_graphs
from chunkdist.pipeline.plan import (
    CHUNK_SIZES,
    FORWARDS_AHEAD,
    RETAINED_CHUNKS,
    PipelinePlan,
    choose_pipeline,
    simulate_plan,
    tried_cuts,
)
from chunkdist.pipeline.simulate import Timeline
from chunkdist.train.reports.start_table import step_sizes

ENOUGH_SEQUENCES, MOST_BATCHES = 256, 8
"""Batches are looked at until they have so many sequences: a batch of 256 takes some seconds."""


class PipelineQuestion:
    """What is planned for.

    Args:
        model: A causal LM, or a PEFT model of one, whole; its weights may be nowhere.
        batches: Tokens of the sequences of each step of a pipeline, in the order of training.
        longest: Tokens of the longest sample of all.
        args: The trainer's arguments, with the options of a pipeline.
        device_type: Where graphs will be.
    """

    def __init__(
        self,
        model: Any,
        config: ChunkConfig,
        batches: Sequence[Sequence[int]],
        longest: int,
        args: Any,
        device_type: str,
    ) -> None:
        self.model, self.config, self.args = model, config, args
        self.longest, self._device_type = longest, device_type
        self.batches = []
        for batch in batches[:MOST_BATCHES]:
            self.batches.append(batch)
            if sum(map(len, self.batches)) >= ENOUGH_SEQUENCES:
                break
        self._costs, self._head = layer_costs(model)
        base = causal_lm_of(model)
        states = layer_states(base.config.get_text_config(), find_layers(base)[2])
        self._shares_chunks = not any(state.relays for state in states)

    @property
    def asked(self) -> list[str]:
        """The options that say `auto`."""
        values = {
            "chunk_size": self.config.chunk_size,
            "retained_chunks": self.config.retained_chunks,
            "pipeline_forwards_ahead": self.args.pipeline_forwards_ahead,
        }
        return [name for name, value in values.items() if value == "auto"]

    def room(self, available_bytes: int) -> int:
        """`max_graph_tokens` for a rank's memory."""
        settings = step_sizes(self.args)
        sizes = ModelSizes.for_config(
            self.model,
            self.config,
            device_type=self._device_type,
            activation_bytes=settings.activation_bytes,
        )
        stages, costs, head = self.args.pipeline_stages, self._costs, self._head
        cuts = tried_cuts(self.batches, costs, num_stages=stages, head_per_token=head)
        return room_for_graphs(
            sizes,
            num_layers=max(len(stage) for cut in cuts for stage in cut),
            longest=self.longest,
            optimizer=settings.optimizer,
            available_bytes=available_bytes,
        )

    def answer(self, max_graph_tokens: int | None) -> PipelinePlan:
        """What takes least time. Without an `auto`, only the cut is chosen.

        Raises:
            ValueError: more stages than layers, or no room.
        """
        config, ahead = self.config, self.args.pipeline_forwards_ahead
        if max_graph_tokens == 0:
            raise ValueError(
                f"{', '.join(self.asked)}: auto, but by estimate a stage has no room for a graph: write more "
                "pipeline_stages, a smaller max_length, or numbers in the place of auto"
            )
        return choose_pipeline(
            self.batches,
            self._costs,
            num_stages=self.args.pipeline_stages,
            head_per_token=self._head,
            max_graph_tokens=max_graph_tokens,
            chunk_sizes=CHUNK_SIZES if config.chunk_size == "auto" else (config.chunk_size,),
            retained_chunks=RETAINED_CHUNKS
            if config.retained_chunks == "auto"
            else (config.retained_chunks,),
            forwards_ahead=FORWARDS_AHEAD if ahead == "auto" else (int(ahead),),
            shares_reruns=config.retained_chunks == "auto",
            shares_chunks=self._shares_chunks,
        )

    def timeline(self, plan: PipelinePlan) -> Timeline:
        """Timeline of the first batch."""
        return simulate_plan(
            plan,
            self.batches[0],
            self._costs,
            head_per_token=self._head,
            shares_chunks=self._shares_chunks,
        )

    def table(self, plan: PipelinePlan, max_graph_tokens: int | None, *, num_replicas: int) -> Table:
        """What was chosen, and why; for people to read."""
        table = Table(title="chunkdist pipeline", title_justify="left", header_style="", show_lines=False)
        for column in ("what", "chosen", "why"):
            table.add_column(column, overflow="fold")
        simulated = f"simulated, {len(self.batches)} batch(es) of {len(self.batches[0])} sequences"
        least = f"auto: the least time, {simulated}"
        room = "" if max_graph_tokens is None else f", in room for {max_graph_tokens:,} tokens x layers"

        def why(name: str) -> str:
            return least if name in self.asked else "as configured"

        retained = set(plan.retained_chunks)
        rows = [
            (
                "stages",
                " | ".join(map(_layers, plan.stages)),
                "layers, balanced by cost, output layer included",
            ),
            ("replicas", str(num_replicas), "ranks / pipeline_stages"),
            ("chunk size", f"{plan.chunk_size:,} tokens", why("chunk_size")),
            (
                "retained chunks",
                " | ".join(map(str, plan.retained_chunks if len(retained) > 1 else retained)),
                why("retained_chunks"),
            ),
            ("forwards ahead", str(plan.forwards_ahead), why("pipeline_forwards_ahead")),
            ("graphs at a time", " | ".join(map(str, plan.peak_graphs)), f"by stage{room}"),
            ("bubble", f"{plan.bubble_share:.1%}, reruns {plan.rerun_share:.1%}", f"{simulated}, by FLOPs"),
        ]
        for row in rows:
            table.add_row(*row)
        return table


def least_room(question: PipelineQuestion, device: torch.device) -> int | None:
    """The least room of all ranks in what is free; `None`: nothing is to be chosen. Collective."""
    if not question.asked:
        return None
    share = USABLE_SHARE.get(device.type, min(USABLE_SHARE.values()))
    room = torch.tensor(question.room(int(free_bytes(device) * share)), dtype=torch.int64, device=device)
    distributed.all_reduce(room, op=distributed.ReduceOp.MIN)
    return int(room)


def _layers(stage: range) -> str:
    return f"{stage.start}-{stage.stop - 1}"
