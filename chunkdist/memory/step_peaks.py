"""The moments at which a step may have its peak, each a sum of terms: bytes by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chunkdist.config import ChunkConfig
from chunkdist.memory.allgather_bytes import Parts
from chunkdist.memory.model_sizes import ModelSizes, Weights
from chunkdist.memory.sharded import Engine


class StepMoments:
    """The moments of one forward and backward."""

    def __init__(
        self,
        sizes: ModelSizes,
        config: ChunkConfig,
        num_tokens: int,
        num_rows: int,
        engine: Engine,
        num_micro_batches: int,
    ) -> None:
        self.sizes, self.config, self.engine = sizes, config, engine
        self.tokens, self.keys = num_tokens * num_rows, num_tokens
        size = min(int(config.chunk_size), num_tokens)
        self.num_rows, self.chunk_tokens = num_rows, size * num_rows
        self.num_chunks = -(-num_tokens // size)
        num_layers = len(sizes.cells)
        height = num_layers if config.layers_per_group == "all" else int(config.layers_per_group)
        self.groups = [range(i, min(i + height, num_layers)) for i in range(0, num_layers, height)]
        self.on_host = config.offload == "host"
        retained = 0 if config.retained_chunks == "auto" else config.retained_chunks
        self.num_retained = min(retained, self.num_chunks)
        self.keeps_kv = not config.rebuilds_kv and self.num_chunks > 1
        rerun = max(0, num_tokens - self.num_retained * size)
        self.rerun_tokens = rerun * num_rows
        """Tokens of the chunks that are run again."""
        self.keeps_gradients = num_micro_batches > 1
        self.gathered = engine.gathered(sizes)
        self.hidden = sizes.stream.hidden_bytes * self.tokens
        self.positions = sizes.stream.arguments_bytes * self.tokens

    def moments(self) -> Iterator[tuple[str, Parts]]:
        """By name, several of one name: the largest counts."""
        for group in range(len(self.groups)):
            yield "a group's forward", self.forward(group)
        yield from self.loss()
        for group in range(len(self.groups)):
            yield from self.backward(group)
        yield "the embedding", self.embedding()

    def host(self) -> Parts:
        """What waits on the host from the forward to the backward."""
        if not self.on_host:
            return {}
        leaving = range(self.groups[-1].start)  # the last group's stay
        return {
            "group inputs on the host": (len(self.groups) - 1) * self.hidden,
            "K/V on the host": self._kv(leaving) if self.keeps_kv else 0,
            "states on the host": self._states(leaving),
            "attention's outputs on the host": self._outputs(leaving, self.rerun_tokens),
        }

    def forward(self, group: int) -> Parts:
        layers = self.groups[group]
        cell = max(self.sizes.cells[i].forward.at(self.chunk_tokens) for i in layers)
        # A cell that is counted has made its own layer's copies.
        casts = self._casts([self.sizes.layers[i] for i in layers])
        casts -= max(self._casts([self.sizes.layers[i]]) for i in layers)
        return {
            **self._kept(group, forward=True),
            "hidden states": self.hidden,
            "one cell": cell,
            **self.gathered.forward(layers, cell),
            "narrow weights": casts + self._retained_casts(range(layers.start)),
            "gradients": self._gradients([]),
        }

    def loss(self) -> Iterator[tuple[str, Parts]]:
        sizes, last = self.sizes, len(self.groups) - 1
        tokens = self.tokens
        if sizes.head_tile_tokens is not None:
            tokens = min(sizes.head_tile_tokens, tokens)
        # Of a tile: log-probabilities, their gradient and that of the logits, in fp32.
        logits = tokens * sizes.head_width
        numbers = sizes.stream.hidden_bytes // sizes.element_bytes
        # The final norm runs as a cell, too: it saves its input in fp32, and what its weight multiplies.
        norm = self.chunk_tokens * numbers * (4 + 2 * sizes.element_bytes)
        working = self.chunk_tokens * numbers * (5 * 4 + sizes.element_bytes)
        kept = {
            **self._kept(last, forward=True),
            "keys and values": self._kept(last, forward=True)["keys and values"] if self.keeps_kv else 0,
            "retained cells": self._retained(range(self.groups[-1].stop), self.num_retained)["retained cells"]
            + self.num_retained * norm,
            "hidden states": 3 * self.hidden,
            "narrow weights": self._retained_casts(range(self.groups[-1].stop)),
        }
        head = sizes.embedding if sizes.is_tied else sizes.head
        narrow = self._casts([head]) if sizes.head_numbers_trained else 0
        weight, grads = sizes.head_numbers_trained, self._gradients([])
        # Its gradient is summed in fp32; that of a tile comes when its logits are only in their dtype.
        gathered = self.gathered.loss(12 * logits)
        stages = [(12 * logits, 4), (sizes.element_bytes * logits, 4 + sizes.element_bytes)]
        if narrow:  # it comes in autocast's dtype, and is cast before it is added
            stages.append((0, 8 + sizes.element_bytes))
        tiles = {**kept, **gathered, "narrow weights": kept["narrow weights"] + narrow}
        for tile, weight_bytes in stages:
            yield "the loss", {**tiles, "loss tile": tile, "gradients": grads + weight * weight_bytes}
        doubled = grads + 2 * weight * sizes.element_bytes
        yield "the loss", {**kept, **self.gathered.loss_backward(), "gradients": doubled}
        done = self._gradients([self._head])
        yield "the norm", {**kept, **self.gathered.norm(), "one cell": working, "gradients": done}

    def backward(self, group: int) -> Iterator[tuple[str, Parts]]:
        sizes, layers = self.sizes, self.groups[group]
        # ZeRO-3 reduces a layer in a hook on its input.
        has_grad = group > 0 or sizes.embedding_is_trained or self.engine.name == "zero3"
        trained = [sizes.layers[i] for i in layers]
        # Summed over chunks in at least fp32.
        sums = sum(
            w.num_trainable * max(4, w.whole_trainable_bytes // max(1, w.num_trainable)) for w in trained
        )
        common = {
            **self._kept(group, forward=False),
            "hidden states": self.hidden * (2 if has_grad else 1),
            **self.gathered.backward(layers),
            "narrow weights": self._casts(trained) + self._retained_casts(range(layers.start)),
            "gradients": self._gradients([*sizes.layers[layers.stop :], self._head]) + sums,
        }
        below = range(layers.start)
        running = {**common, **self._retained(below, self.num_retained)}
        if self.num_retained:
            retained = self._retained(below, self.num_retained)["retained cells"]
            retained += self._retained(layers, self.num_retained - 1)["retained cells"]
            yield from self._cells({**common, "retained cells": retained}, layers)
        if self.num_retained < self.num_chunks:
            yield from self._cells(running, layers, rerun=True)
        copies = sum(w.whole_trainable_bytes for w in trained)
        parts = {name: size for name, size in common.items() if name != "K/V gradients"}
        parts |= self._retained(below, self.num_retained)
        yield "a group's gradients", {**parts, "gradients": parts["gradients"] + copies}

    def embedding(self) -> Parts:
        """The embedding's backward. With tied weights the head's gradient waits, and its sum with the
        embedding's is a
        third tensor."""
        sizes = self.sizes
        weight = sizes.embedding.num_trainable * sizes.element_bytes
        grads = self._gradients(sizes.layers if sizes.is_tied else [*sizes.layers, sizes.head])
        hidden = self.hidden if sizes.embedding_is_trained else 0
        if sizes.is_tied:
            hidden, weight = max(hidden, weight), 2 * weight
        return {
            "positions": self.positions,
            "hidden states": hidden,
            **self.gathered.embedding(),
            "gradients": grads + weight,
        }

    def _cells(self, common: Parts, layers: range, *, rerun: bool = False) -> Iterator[tuple[str, Parts]]:
        """A cell of the running group in its backward, from its last layer down. The graph of a cell that is
        run again shares what attention has returned with what is kept."""
        grads = self._kv_grads(layers)
        for layer in reversed(layers):
            cell, c = self.sizes.cells[layer], self.chunk_tokens
            under = sum(self._graph(i) for i in range(layers.start, layer))
            is_shared = rerun and not (self.on_host and layers != self.groups[-1])
            under -= self._outputs(range(layers.start, layer + 1), self.chunk_tokens) if is_shared else 0
            unpacked = self.sizes.layers[layer]
            extra = unpacked.largest_bytes if unpacked.is_quantised else 0
            later = {**common, "K/V gradients": grads} if self.num_chunks > 1 else common
            yield "a cell", {**later, "one cell": under + cell.elsewhere.at(c) + extra}
            if not cell.kv_bytes:
                continue
            graph = under + cell.attention.at(c) + cell.workspace.at(c // self.num_rows)
            # In the first cell, with all keys, the gradients of this layer and those above are there.
            first = range(layer, layers.stop)
            yield (
                "attention",
                self._attention(common, cell_bytes=graph, layer=layer, keys=self.keys, grads=first),
            )
            if self.num_chunks > 1:
                keys = self.keys - c // self.num_rows
                yield (
                    "attention",
                    self._attention(common, cell_bytes=graph, layer=layer, keys=keys, grads=layers),
                )

    def _attention(self, common: Parts, *, cell_bytes: int, layer: int, keys: int, grads: range) -> Parts:
        workspace = self.sizes.cells[layer].keys_workspace(keys, self.chunk_tokens // self.num_rows)
        return {
            **common,
            "K/V gradients": self._kv_grads(grads),
            "attention's backward": workspace,
            "one cell": cell_bytes,
        }

    def _kept(self, group: int, *, forward: bool) -> Parts:
        """What waits for the backward, while a group runs; and what its layers read."""
        layers, below = self.groups[group], range(self.groups[group].stop)
        states = self._states(below)
        inputs = (group + 1) * self.hidden
        kv = self._kv(below if self.keeps_kv else layers)
        outputs = self._outputs(below, self.rerun_tokens)
        if self.on_host:
            is_last = group == len(self.groups) - 1
            chunk = self.sizes.stream.hidden_bytes * self.chunk_tokens
            inputs = self.hidden if forward or is_last else 2 * chunk
            kv, states = self._kv(layers), self._states(layers)
            if not is_last:
                states = 2 * states // max(1, self.num_chunks - 1)  # of the running chunk and the next one
                outputs = self._outputs(layers, self.chunk_tokens)  # on its way
            else:
                outputs = self._outputs(layers, self.rerun_tokens)
        return {
            "group inputs": inputs,
            "keys and values": kv,
            "states": states,
            "attention's outputs": outputs,
            "positions": self.positions,
            "router logits": self.sizes.router_bytes * self.tokens,
        }

    def _graph(self, layer: int) -> int:
        """Graph of a layer below others in its cell, whose output is not kept."""
        output = self.sizes.stream.hidden_bytes * self.chunk_tokens
        return self.sizes.cells[layer].saved.at(self.chunk_tokens) - output

    def _kv(self, layers: range) -> int:
        return self.tokens * sum(self.sizes.cells[i].kv_bytes for i in layers)

    def _kv_grads(self, layers: range) -> int:
        numbers = sum(self.sizes.cells[i].kv_numbers for i in layers)
        return self.tokens * numbers * self.sizes.kv_grad_bytes

    def _outputs(self, layers: range, num_tokens: int) -> int:
        """What attention has returned of so many tokens, where it is kept."""
        cells = [self.sizes.cells[i] for i in layers]
        return num_tokens * sum(cell.kept_bytes(self.config, self.keys) for cell in cells)

    def _states(self, layers: range) -> int:
        return sum(self.sizes.cells[i].state_bytes for i in layers) * (self.num_chunks - 1) * self.num_rows

    def _retained(self, layers: range, num_chunks: int) -> Parts:
        """Graphs of the retained chunks of whole groups."""
        last = {group[-1] for group in self.groups}
        saved = sum(
            self.sizes.cells[i].saved.at(self.chunk_tokens) if i in last else self._graph(i) for i in layers
        )
        return {"retained cells": saved * num_chunks}

    def _casts(self, weights: Sequence[Weights]) -> int:
        """Copies of trained weights in autocast's dtype, which it keeps for a group's forward, and for its
        backward."""
        casts = [w.num_trainable * self.sizes.element_bytes for w in weights]
        return sum(c for c, w in zip(casts, weights, strict=True) if c < w.whole_trainable_bytes)

    def _retained_casts(self, layers: range) -> int:
        """Casts of the layers whose graphs wait."""
        return self._casts([self.sizes.layers[i] for i in layers]) if self.num_retained else 0

    @property
    def _head(self) -> Weights:
        """What the loss leaves a gradient of."""
        return self.sizes.embedding if self.sizes.is_tied else self.sizes.head

    def _gradients(self, done: Sequence[Weights]) -> int:
        """Gradients that have been reduced: those of `done`, or all where they are summed over
        micro-batches."""
        parts = [self.sizes.all_weights] if self.keeps_gradients else done
        return self.engine.gradients(self.sizes, parts, are_summed=self.keeps_gradients)
