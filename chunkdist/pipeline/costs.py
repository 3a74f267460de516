"""What a model's stages cost and have room for, from its sizes alone."""

from __future__ import annotations

from torch import nn

from chunkdist.data.cost import SequenceCost
from chunkdist.memory.model_sizes import ModelSizes
from chunkdist.memory.optimizers import OptimizerMemory
from chunkdist.models.flops import StepFlops, pairs_by_layer
from chunkdist.models.layers import causal_lm_of, find_layers


def layer_costs(model: nn.Module) -> tuple[list[SequenceCost], float]:
    """FLOPs of each layer, and of the output layer by token; forward and backward.

    What is left of the model's FLOPs by token without the output layer is shared out by the layers'
    parameters; experts count as in `StepFlops`, as long as all layers have them.

    Args:
        model: A causal LM, or a PEFT model of one; its weights may be anywhere, or nowhere.
    """
    base = causal_lm_of(model)
    layers = find_layers(base)[2]
    head = 6.0 * base.get_output_embeddings().weight.numel()
    rest = max(0.0, StepFlops.of(model).per_token - head)
    numbers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    pairs = pairs_by_layer(base.config.get_text_config(decoder=True))
    pairs = pairs if len(pairs) == len(layers) else [None] * len(layers)
    costs = [
        SequenceCost(
            per_token=rest * number / sum(numbers),
            per_pair=() if pair is None else ((pair[0], float(pair[1])),),
        )
        for number, pair in zip(numbers, pairs, strict=True)
    ]
    return costs, head


def room_for_graphs(
    sizes: ModelSizes, *, num_layers: int, longest: int, optimizer: str, available_bytes: int
) -> int:
    """Tokens times layers of which a stage may hold graphs: `max_graph_tokens` of `choose_pipeline`. A power
    of two, so that a run that goes on chooses the same with a little less memory.

    What is there beside is estimated for the largest stage: weights, gradients and optimizer states, a tile
    of logits, and of the longest sequence K/V with gradients and, for each token, its hidden states and two
    gradients of them. Another sequence as long may begin while it goes back: its K/V are there as well.

    Args:
        num_layers: Layers of the stage with most of them.
        longest: Tokens of the longest sequence.
        optimizer: As in `TrainingArguments.optim`; the states of one that is not known count nothing.
        available_bytes: Memory of one rank, for everything.

    Returns:
        0: there is no room.
    """
    layer = max(sizes.layers, key=lambda weights: weights.local_bytes)
    states = OptimizerMemory.named(optimizer) or OptimizerMemory()
    fixed = 0
    for weights, count in ((layer, num_layers), (sizes.embedding, 1), (sizes.head, 1)):
        trained = weights.whole_trainable_bytes
        own = states.state_bytes(weights.num_trainable, trained, weights.factored_numbers)
        fixed += count * (weights.local_bytes + (1 + states.update) * trained + own)
    fixed += 12 * (sizes.head_tile_tokens or 0) * sizes.head_width
    kv = max(2 * cell.kv_bytes + cell.kv_numbers * sizes.kv_grad_bytes for cell in sizes.cells)
    sequence = longest * (num_layers * kv + 3 * sizes.stream.hidden_bytes)
    room = (available_bytes - fixed - sequence) / max(cell.saved.per_token for cell in sizes.cells)
    return 0 if room < 1 else 1 << (int(room).bit_length() - 1)
