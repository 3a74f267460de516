"""Prefixes that sequences share are computed once, and gradients are those of the sequences alone: fp64, all
parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkdist import ChunkConfig, IndependentSampler, chunk_model
from chunkdist.attention import node
from chunkdist.attention.visible import visible
from chunkdist.stream.stream import Chunk, Stream
from tests.helpers.model_zoo import tiny_model
from tests.helpers.models import (
    VOCAB_SIZE,
    gradients,
    gradients_alone,
    largest_difference,
    norms_in_fp64,
    tiny_llama,
    with_lora,
    with_positions,
)
from tests.helpers.sweep import double_precision

Paths = list[list[int]]


def llama(num_layers: int = 3) -> Any:
    """Its own norms would round the gradients of each row to fp32, and so another sum of them."""
    return norms_in_fp64(tiny_llama(num_layers=num_layers))


def draw(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()  # type: ignore[no-any-return]


def completions(prompt: int, *lengths: int) -> Paths:
    shared = draw(prompt, seed=99)
    return [[*shared, seed, *draw(length - 1, seed)] for seed, length in enumerate(lengths)]


def four_levels() -> Paths:
    trunk = draw(17, seed=1)
    left, right = trunk + draw(6, 2), trunk[:12] + draw(7, 3)
    deep = left + draw(9, 4)
    return [
        deep + draw(5, 5),
        deep[:-2] + draw(3, 6),
        left + draw(2, 7),
        right,
        right[:-1] + draw(4, 8),
        trunk,
    ]


PATHS: dict[str, Callable[[], Paths]] = {
    "a prompt with completions": lambda: completions(19, 6, 11, 3),
    "a prefix that ends where a chunk does": lambda: completions(14, 7, 9, 8),
    "four levels": four_levels,
    "branches of one token": lambda: completions(10, 1, 1, 5, 1),
    "equal rows": lambda: [draw(23, 1)] * 3,
    "a row that another begins with": lambda: [draw(30, 1), draw(30, 1)[:12], draw(30, 1)[:13]],
    "two trees": lambda: [*completions(9, 4, 8), *([50, *path] for path in completions(8, 5, 2))],
    "nothing in common": lambda: [[1, *draw(20, 1)], [2, *draw(9, 2)], [3, *draw(15, 3)]],
}


def rows_of(paths: Paths, *, padding: str = "right") -> dict[str, Tensor]:
    """Padded on the right, on the left, or on both sides, with what is behind the first token as labels."""
    num_tokens = max(map(len, paths)) + (5 if padding == "both" else 0)
    ids = torch.full((len(paths), num_tokens), 7)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, path in enumerate(paths):
        room = num_tokens - len(path)
        start = {"right": 0, "left": room, "both": room // 2}[padding]
        tokens = slice(start, start + len(path))
        ids[row, tokens], mask[row, tokens] = torch.tensor(path), 1
        labels[row, tokens] = torch.tensor([-100, *path[1:]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def num_distinct(paths: Paths) -> int:
    return len({tuple(path[: end + 1]) for path in paths for end in range(len(path))})


@lru_cache
def expected(name: str) -> dict[str, Tensor]:
    return gradients_alone(llama(), rows_of(PATHS[name]()))


def error_of(name: str, padding: str = "right", **settings: Any) -> float:
    config = ChunkConfig(**{"chunk_size": 7, "attention": "math", "share_prefixes": True, **settings})
    model = chunk_model(llama(), config)
    return largest_difference(gradients(model, rows_of(PATHS[name](), padding=padding)), expected(name))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize("height", [1, 2, "all"])
def test_groups(name: str, chunk_size: int, height: Any) -> None:
    assert error_of(name, chunk_size=chunk_size, layers_per_group=height) < 1e-10


@pytest.mark.parametrize("name", ["a prompt with completions", "four levels"])
@pytest.mark.parametrize(
    "settings",
    [
        {"retained_chunks": 1},
        {"retained_chunks": 1, "layers_per_group": "all", "chunk_size": 16},
        {"retained_chunks": 100, "layers_per_group": 2},
        {"rebuild_kv": False},
        {"rebuild_kv": True, "layers_per_group": 2},
        {"keep_attention": True},
        {"keep_attention": True, "layers_per_group": "all"},
        {"keep_attention": False, "layers_per_group": 2},
        {"offload": "host"},
        {"offload": "host", "rebuild_kv": False, "keep_attention": True},
        {"offload": "host", "layers_per_group": 2, "retained_chunks": 2},
        {"attention": "cpu_flash"},
        {"attention": "cpu_flash", "layers_per_group": 2, "chunk_size": 16},
    ],
    ids=str,
)
def test_schedules(name: str, settings: dict[str, Any]) -> None:
    assert error_of(name, **settings) < 1e-10


@pytest.mark.parametrize("padding", ["left", "both"])
@pytest.mark.parametrize("name", ["a prompt with completions", "four levels", "nothing in common"])
def test_padding(name: str, padding: str) -> None:
    assert error_of(name, padding) < 1e-10


def test_positions_of_columns_are_shared_where_they_are_equal() -> None:
    """Equal tokens at other positions are other tokens."""
    inputs = rows_of(completions(19, 6, 6, 11), padding="left")
    columns = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    inputs = {**inputs, "position_ids": columns}
    config = ChunkConfig(chunk_size=7, share_prefixes=True)
    model = chunk_model(llama(), config)
    assert count_tokens(model, inputs) == (19 + 6 + 6) + (19 + 11)
    assert largest_difference(gradients(model, inputs), gradients(llama(), inputs)) < 1e-10


@pytest.mark.parametrize("chunk_size", [7, 100])
def test_sequences_of_a_packed_row(chunk_size: int) -> None:
    paths = [*four_levels(), draw(4, 11)]
    ids = torch.tensor([token for path in paths for token in path])[None]
    positions = torch.cat([torch.arange(len(path)) for path in paths])[None]
    inputs = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    model = chunk_model(llama(), ChunkConfig(chunk_size=chunk_size, share_prefixes=True))
    bounds = torch.tensor([0, *(len(path) for path in paths)]).cumsum(0).int()
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 50, "max_length_k": 50}
    truth = gradients(llama(), inputs)
    for told_by in ({}, lengths):
        assert count_tokens(model, {**inputs, **told_by}) == num_distinct(paths)
        assert largest_difference(gradients(model, {**inputs, **told_by}), truth) < 1e-10


def test_lora() -> None:
    inputs = rows_of(four_levels())
    model = chunk_model(with_lora(llama()), ChunkConfig(chunk_size=7, share_prefixes=True))
    assert largest_difference(gradients(model, inputs), gradients_alone(with_lora(llama()), inputs)) < 1e-10


@pytest.mark.parametrize("class_name", ["Gemma2ForCausalLM", "GptOssForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_windows_sinks_and_soft_caps(class_name: str, chunk_size: int) -> None:
    """Windows of 8 tokens, counted along each path, reach into one ancestor, into several, or into none."""
    inputs = rows_of([*four_levels(), *completions(3, 9, 2)])
    alone = chunk_model(tiny_model(class_name), ChunkConfig(chunk_size=1000, attention="math"))
    config = ChunkConfig(chunk_size=chunk_size, attention="math", share_prefixes=True)
    model = chunk_model(tiny_model(class_name), config)
    with double_precision():
        assert largest_difference(gradients(model, inputs), gradients_alone(alone, inputs)) < 1e-10


def test_types_of_tokens_tell_them_apart() -> None:
    """Equal rows, in which the 6th token has another type."""
    inputs = with_positions(rows_of([draw(23, 1)] * 2))
    types = torch.zeros_like(inputs["input_ids"])
    types[1, 5:] = 3
    inputs["token_type_ids"] = types
    model, alone = (tiny_model("GPT2LMHeadModel") for _ in range(2))
    chunk_model(model, ChunkConfig(chunk_size=7, share_prefixes=True, attention="math"))
    with double_precision():
        assert largest_difference(gradients(model, inputs), gradients(alone, inputs)) < 1e-10
    seen = []
    hook = model.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    assert sum(seen) == 5 + 18 + 18


def test_router_logits_and_their_loss() -> None:
    """Tokens count in each row that has them."""

    def model() -> Any:
        moe = tiny_model("MixtralForCausalLM")
        moe.router_aux_loss_coef = 1.0
        return moe

    inputs = {**with_positions(rows_of(four_levels(), padding="left")), "output_router_logits": True}
    with double_precision():
        found = gradients(chunk_model(model(), ChunkConfig(chunk_size=7, share_prefixes=True)), inputs)
        assert largest_difference(found, gradients(model(), inputs)) < 1e-10


def count_tokens(model: Any, inputs: dict[str, Tensor]) -> int:
    """That pass through the first layer in a forward."""
    seen: list[int] = []
    mlp = model.model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize("name", PATHS)
def test_tokens_computed_are_the_distinct_paths(name: str) -> None:
    paths = PATHS[name]()
    model = chunk_model(llama(num_layers=1), ChunkConfig(chunk_size=7, share_prefixes=True))
    assert count_tokens(model, rows_of(paths)) == num_distinct(paths)


def test_auto_shares_a_chunk_or_more() -> None:
    inputs, passed = rows_of(completions(19, 6, 11, 3)), 3 * 19 + 20
    for chunk_size, num in ((19, 19 + 20), (20, passed)):
        model = chunk_model(llama(num_layers=1), ChunkConfig(chunk_size=chunk_size))
        assert count_tokens(model, inputs) == num
    model = chunk_model(llama(num_layers=1), ChunkConfig(chunk_size=5, share_prefixes=False))
    assert count_tokens(model, inputs) == passed


def test_rows_with_nothing_in_common_stay_rows() -> None:
    shapes = []
    inputs = {"input_ids": torch.tensor([[1, *draw(20, 1)], [2, *draw(20, 2)]])}
    model = chunk_model(llama(), ChunkConfig(chunk_size=7, share_prefixes=True))
    model.model.norm.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    model(**inputs)
    assert set(shapes) == {(2, 21)}


def test_logits_are_those_of_each_row() -> None:
    inputs = with_positions(rows_of(four_levels(), padding="left"))
    model = chunk_model(llama(), ChunkConfig(chunk_size=7, share_prefixes=True)).eval()
    with torch.no_grad():
        found, plain = (x(**inputs, use_cache=False).logits for x in (model, llama().eval()))
    is_real = inputs["attention_mask"] == 1
    torch.testing.assert_close(found[is_real], plain[is_real])


def with_dropout(p: float) -> Any:
    return with_lora(llama(), lora_dropout=p)


def with_blocks() -> Any:
    model = llama()
    model.config.attention_chunk_size = 8
    return model


def noisy() -> Any:
    from transformers.integrations.neftune import neftune_post_forward_hook

    model = llama()
    model.model.embed_tokens.neftune_noise_alpha = 5.0
    model.model.embed_tokens.register_forward_hook(neftune_post_forward_hook)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dropout": (lambda: with_dropout(0.1), r"Dropout draws other random numbers for each row \(p=0.1\)"),
    "noise": (noisy, "NEFTune adds other noise"),
    "blocks": (with_blocks, "attends in blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_and_not_taken_by_itself(name: str) -> None:
    make, message = REFUSED[name]
    inputs = rows_of(completions(19, 6, 11, 3))
    del inputs["labels"]
    with pytest.raises(
        ValueError, match=f"share_prefixes=True, but .*{message}.*: write share_prefixes=False"
    ):
        chunk_model(make(), ChunkConfig(chunk_size=5, share_prefixes=True))(**inputs)
    shapes = []
    model = chunk_model(make(), ChunkConfig(chunk_size=5))
    decoder = model.get_decoder()
    decoder.get_input_embeddings().register_forward_hook(lambda _, args, out: shapes.append(out.shape[:2]))
    model(**inputs)
    assert shapes == [(1, 3 * 19 + 20)]


def test_dropout_does_not_matter_in_evaluation() -> None:
    model = chunk_model(with_dropout(0.1), ChunkConfig(chunk_size=7, share_prefixes=True)).eval()
    assert count_tokens(model.base_model.model, rows_of(completions(19, 6, 11, 3))) == 39


def test_a_sampler_excludes_it() -> None:
    with pytest.raises(ValueError, match="share_prefixes=True, but sampler="):
        ChunkConfig(chunk_size=7, share_prefixes=True, sampler=IndependentSampler(budget=2))
    torch.manual_seed(0)
    model = chunk_model(llama(), ChunkConfig(chunk_size=7, sampler=IndependentSampler(budget=100)))
    inputs = rows_of(completions(19, 6, 11, 3))
    assert count_tokens(model, inputs) == 3 * 19 + 20
    assert largest_difference(gradients(model, inputs), gradients_alone(llama(), inputs)) < 1e-10


def test_embeddings_do_not_tell_which_tokens_are_equal() -> None:
    inputs = rows_of(completions(19, 6, 11, 3))
    given = {**inputs, "inputs_embeds": llama().model.embed_tokens(inputs["input_ids"]).detach()}
    del given["input_ids"]
    with pytest.raises(ValueError, match="share_prefixes=True, but inputs_embeds do not tell which tokens"):
        chunk_model(llama(), ChunkConfig(chunk_size=7, share_prefixes=True))(**given)
    model = chunk_model(llama(), ChunkConfig(chunk_size=7))
    assert count_tokens(model, given) == 3 * 19 + 20
    found, truth = gradients(model, given), gradients_alone(llama(), inputs)
    assert largest_difference(found, {name: truth[name] for name in found}) < 1e-10


@pytest.mark.parametrize("broken", ["siblings", "ancestors", "readers", "positions"])
def test_a_fault_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from chunkdist.engine import layout

    if broken == "siblings":  # a branch sees what is before it in the stream

        def all_before(stream: Stream, *args: Any) -> Any:
            alone = Stream(num_tokens=stream.num_tokens, chunks=stream.chunks, segment_starts=((0,),))
            return visible(alone, *args)

        monkeypatch.setattr(node, "visible", all_before)
    elif broken == "ancestors":
        monkeypatch.setattr(node, "visible", lambda *args: visible(*args)[:2])
    elif broken == "readers":
        monkeypatch.setattr(Stream, "is_read_later", lambda self, index, chunks: index + 1 in chunks[-1:])
    else:
        real = layout.in_stream

        def in_stream(arguments: Any, own: Any, mask: Any) -> Any:
            call = real(arguments, own, mask)
            call.kwargs["position_ids"] = torch.arange(own.num_tokens)[None]
            return call

        monkeypatch.setattr("chunkdist.engine.forward.in_stream", in_stream)
    found, truth = {}, expected("four levels")
    try:
        # New memory is filled: what is not rebuilt may else lie where it lay in the forward.
        torch.use_deterministic_algorithms(broken == "readers", warn_only=True)
        model = chunk_model(llama(), ChunkConfig(chunk_size=7, share_prefixes=True))
        found = gradients(model, rows_of(four_levels()))
    except AssertionError:
        assert broken == "readers"
        return
    finally:
        torch.use_deterministic_algorithms(False)
    differences = [(found[name] - truth[name]).norm() / truth[name].norm() for name in truth]
    assert not all(difference <= 1e-4 for difference in differences)


def test_a_single_segment_is_one_part() -> None:
    """Without branches the kernels get what they got: one row for a chunk."""
    stream = Stream(num_tokens=20, chunks=(Chunk(0, 20),), segment_starts=((0, 8),))
    assert len(visible(stream, Chunk(5, 20), 0, None, None)) == 1
