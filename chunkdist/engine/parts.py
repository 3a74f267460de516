"""The decoder's forward under sequence parallelism: what callers pass of each row, and what the layers get.

The stream is read from whole rows, which all ranks of a group gather: ids, positions and masks are small.
Embeddings and hidden states are exchanged.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chunkdist.engine.hidden_states import ARGUMENT
from chunkdist.errors import UnsupportedModelError
from chunkdist.sharding.sequence import SequenceGroup, TokenExchange
from chunkdist.stream.from_inputs import read_stream
from chunkdist.stream.packed import refuse_segments, rope_parameters, why_right_padding
from chunkdist.stream.padding import ForwardLabels
from chunkdist.stream.stream import Stream

_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask")
"""What a decoder may get, with a dim of tokens."""
_PASSED_ON = ("labels", "shift_labels", "num_items_in_batch")
"""What causal LMs hand on to decoders that do nothing with it."""


class Parts:
    """One rank's part of a forward.

    Args:
        arguments: The decoder's, by name: of this rank's part of the rows.
        labels: The forward's; padding is noted there.

    Raises:
        ValueError: ranks passed different shapes, something that cannot be exchanged, or lengths or chunks
            that the ranks do not divide.
        UnsupportedModelError: the decoder numbers its positions itself.
    """

    def __init__(
        self,
        group: SequenceGroup,
        decoder: nn.Module,
        arguments: dict[str, Any],
        chunk_size: int,
        labels: ForwardLabels,
    ) -> None:
        _refuse_decoder(decoder, arguments)
        given = {name: x for name in _BY_TOKEN if isinstance(x := arguments.get(name), Tensor)}
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        if tokens is None:
            raise ValueError("neither input_ids nor inputs_embeds were passed")
        if chunk_size % group.num_ranks:
            fit = max(1, chunk_size // group.num_ranks) * group.num_ranks
            raise ValueError(
                f"chunk_size={chunk_size} is not a multiple of the {group.num_ranks} ranks that share each "
                f"chunk: write chunk_size={fit}"
            )
        mask = given.get("attention_mask")
        facts = {
            "numbers of rows": tokens.shape[0],
            "numbers of tokens": tokens.shape[1],
            "arguments": sum(2**i * (name in given) for i, name in enumerate(_BY_TOKEN)),
        }
        group.refuse_difference(facts, tokens)
        num_rows, num_own = tokens.shape[:2]
        whole = {name: group.gather(x) for name, x in given.items() if name != "inputs_embeds"}
        if "input_ids" not in whole:
            whole["input_ids"] = torch.empty((num_rows, num_own * group.num_ranks), device="meta")
        of_rows = ForwardLabels()
        stream, _ = read_stream(
            whole,
            chunk_size,
            why_rows=_why_rows,
            why_right_padding=partial(why_right_padding, decoder, has_positions="position_ids" in given),
            labels=of_rows,
        )
        if mask is not None:
            bad = group.total(labels.on_padding(mask).to(tokens.device, torch.int64))
            if bool(bad):
                labels.refuse()
            labels.mask = mask if of_rows.mask is not None else None
        refuse_segments(decoder, stream.longest_sequence)
        self.group = group
        self.stream: Stream = stream.part_of(group.num_ranks)
        """This rank's."""
        self.exchange = TokenExchange(group, stream, tokens.device)
        self.arguments = {**arguments, **self._exchanged(given, whole)}
        """The decoder's, of this rank's parts of the chunks."""

    def _exchanged(self, given: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Any]:
        own = self.exchange.positions
        result: dict[str, Any] = {name: x.index_select(-1, own) for name, x in whole.items() if name in given}
        result.setdefault("position_ids", own[None])
        if "inputs_embeds" in given:
            result["inputs_embeds"] = self.exchange.to_chunks(given["inputs_embeds"])
        if "attention_mask" in result:
            result["attention_mask"] = (
                None  # what is before a sequence is a segment, what is behind, not seen
            )
        return result

    def restored(self, output: Any) -> Any:
        """The decoder's output, with the hidden states of this rank's part of the rows."""
        if isinstance(output, tuple):
            return self.exchange.to_rows(output[0]), *output[1:]
        output["last_hidden_state"] = self.exchange.to_rows(output["last_hidden_state"])
        return output


def _why_rows(num_tokens: int) -> str:
    return "ranks share the tokens of each row, padding too"


def _refuse_decoder(decoder: nn.Module, arguments: dict[str, Any]) -> None:
    name = type(decoder).__name__
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no position_ids: a rank's part of a sequence would be numbered from 0; train it "
            "without sequence parallelism (chunks bound the memory of a sequence)"
        )
    if arguments.get("position_ids") is None and not rope_parameters(decoder):
        raise UnsupportedModelError(
            f"{name} has no rotary embedding, and numbers its positions itself, not always from 0: pass "
            "position_ids of this rank's part of the rows"
        )
    if arguments.get(ARGUMENT, getattr(decoder.config, ARGUMENT, False)):
        raise ValueError(
            f"{ARGUMENT}=True, but under sequence parallelism a layer has this rank's parts of all chunks, "
            f"not its part of the rows: write {ARGUMENT}=False"
        )
    known = (*_BY_TOKEN, *_PASSED_ON)
    if arguments.get("output_router_logits", getattr(decoder.config, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits=True under sequence parallelism: the balance loss of a rank's tokens is "
            "no part of the whole's; write output_router_logits=False (in TRL, router_aux_loss_coef: 0)"
        )
    others = [key for key, x in arguments.items() if isinstance(x, Tensor) and key not in known]
    if others:
        raise ValueError(
            f"{', '.join(others)} was passed to {name} under sequence parallelism, where tokens change "
            "places between ranks: pass input_ids or inputs_embeds, and position_ids that start again with "
            "each packed sequence"
        )
