"""`output_hidden_states` of a chunked forward: the states between the layers that exist anyway.

transformers (5.23) collects them in forward hooks on the decoder's layers, or in the decoder's own loop, as
what each layer returns. A layer of a group of several returns what it was given, all but the last one: so
with a graph, hidden states are those between groups; without one, each layer runs as a group of its own.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from chunkdist.config import ChunkConfig

ARGUMENT = "output_hidden_states"


def refuse_hidden_states(asked: Any, decoder: Any, config: ChunkConfig) -> None:
    """Raises where hidden states are asked for, in a forward with a graph, that no group begins or ends with.

    Args:
        asked: What was passed: `True`, or the indices of some; 0 is the first layer's input.
        config: Without `"auto"`.

    Raises:
        ValueError: they would not be those of the plain model, or their gradient would be wrong.
    """
    num_layers = decoder.config.get_text_config().num_hidden_layers
    height = num_layers if config.layers_per_group == "all" else int(config.layers_per_group)
    indices = _indices(asked, decoder, num_layers)
    wrong = [index for index in indices if index % height and index != num_layers]
    if wrong:
        raise ValueError(
            f"{ARGUMENT}={asked!r} while training, but with layers_per_group={height} the hidden states "
            f"inside of a group exist for one chunk at a time only: write layers_per_group=1, or {ARGUMENT}="
            "-1 for the last ones, where the model can select them"
        )
    if config.sampler is not None and any(index != num_layers for index in indices):
        raise ValueError(
            f"{ARGUMENT}={asked!r} while training with a sampler, which weighs the gradient at the end of "
            f"the last layer only: write {ARGUMENT}=-1 where the model can select them, or sampler=None"
        )


def _indices(asked: Any, decoder: Any, num_layers: int) -> set[int]:
    every = set(range(num_layers + 1))
    can_select = "hidden_states" in _CAN_RECORD_REGISTRY.get(decoder)
    if isinstance(asked, bool) or not can_select:
        return every
    indices = [asked] if isinstance(asked, int) else list(asked)
    return {index % (num_layers + 1) for index in indices} & every
