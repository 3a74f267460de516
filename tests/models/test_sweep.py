"""Every causal LM class of the installed transformers is exact or refused, and so is every image-text class
with images; docs/models.md says which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers

import chunkdist.attention.function as attention_function
import chunkdist.attention.node as attention_node
import chunkdist.models.layers as model_layers
from chunkdist import ChunkConfig, UnsupportedModelError, chunk_model
from chunkdist.engine.layout import DecoderCall
from chunkdist.engine.probe import LayerProbe
from chunkdist.models.exact_classes import CLASSES, IMAGE_CLASSES, TRANSFORMERS_VERSION
from chunkdist.stores.kv_store import KVStore
from chunkdist.stores.state_relay import StateStore
from chunkdist.stream.stream import Chunk
from tests.helpers.image_sweep import run_image_class
from tests.helpers.image_zoo import image_class_names
from tests.helpers.model_zoo import OVERRIDES, class_names, tiny_model
from tests.helpers.sweep import CHUNK_SIZE, run_class
from tests.helpers.sweep_table import read_table

REQUIRED = {
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
}

REQUIRED_WITH_IMAGES = {
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
}
ANEW = "write docs/models.md anew: python -m tests.helpers.sweep_table --write docs/models.md"

VERSION, DOCUMENTED, DOCUMENTED_WITH_IMAGES = read_table()


@pytest.mark.parametrize("name", class_names())
def test_exact_or_refused(name: str) -> None:
    record = run_class(name)
    assert record.outcome in ("exact", "refused", "not built"), record
    if name in REQUIRED:
        assert (record.outcome, record.reason) == ("exact", ""), record
    if transformers.__version__ == VERSION:
        assert DOCUMENTED.get(name) == record, ANEW


@pytest.mark.parametrize("name", image_class_names())
def test_exact_or_refused_with_images(name: str) -> None:
    record = run_image_class(name)
    assert record.outcome in ("exact", "refused", "not built"), record
    if name in REQUIRED_WITH_IMAGES:
        assert record.outcome == "exact", record
    if transformers.__version__ == VERSION:
        assert DOCUMENTED_WITH_IMAGES.get(name) == record, ANEW


@pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"docs/models.md is about transformers {VERSION}"
)
def test_table_is_complete() -> None:
    assert set(DOCUMENTED) == set(class_names())
    assert set(DOCUMENTED_WITH_IMAGES) == set(image_class_names())
    exact = [record for record in DOCUMENTED.values() if record.outcome == "exact"]
    with_images = [record for record in DOCUMENTED_WITH_IMAGES.values() if record.outcome == "exact"]
    not_built = [record for record in DOCUMENTED.values() if record.outcome == "not built"]
    assert len(exact) >= 75
    assert len(with_images) >= 40
    assert {record.name for record in exact} == CLASSES
    assert {record.name for record in with_images} == IMAGE_CLASSES
    assert TRANSFORMERS_VERSION == VERSION
    assert len(not_built) <= 5


# Each of these makes a model wrong. The sweep must say so: otherwise its "exact" means nothing.


def test_sees_a_missed_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_function, "_window_in", lambda stream, window: None)
    assert run_class("MistralForCausalLM").outcome == "wrong"
    assert run_class("PhimoeForCausalLM").outcome == "wrong"  # its window is nowhere but in the mask


def test_sees_missed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    visible = attention_node.visible
    monkeypatch.setattr(attention_node, "visible", lambda *args: visible(*args[:-1], None))
    monkeypatch.setitem(OVERRIDES, "Llama4ForCausalLM", {"attn_temperature_tuning": False})
    monkeypatch.setattr(model_layers, "_counts_tokens", lambda kind: False)
    assert run_class("Llama4ForCausalLM").outcome == "wrong"


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "Llama4ForCausalLM", {"attn_temperature_tuning": False})
    monkeypatch.setattr(model_layers, "_counts_tokens", lambda kind: False)
    assert run_class("Llama4ForCausalLM").outcome == "exact"


def test_sees_positions_counted_inside_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_layers, "_counts_tokens", lambda kind: False)
    assert run_class("Llama4ForCausalLM").outcome == "refused", "by the probe"
    monkeypatch.setattr(LayerProbe, "check", lambda *args: None)
    assert run_class("Llama4ForCausalLM").outcome == "wrong"


def test_sees_segments_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "chunkdist.stream.from_inputs._starts_from_positions",
        lambda position_ids, is_part, num_rows: ((0,),) * num_rows,
    )
    record = run_class("LlamaForCausalLM")
    assert record.outcome == "wrong"
    assert record.reason.startswith("packed streams")


def test_sees_a_lost_gradient_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    grads_from = KVStore.grads_from

    @contextmanager
    def without_prefix(
        self: KVStore, reader: Chunk, row: int, start: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with grads_from(self, reader, row, start) as grads:
            dk, dv = (grad.clone() for grad in grads)
            yield dk, dv
            for grad, found in zip(grads, (dk, dv), strict=True):
                grad[-CHUNK_SIZE:] = found[-CHUNK_SIZE:]

    monkeypatch.setattr(KVStore, "grads_from", without_prefix)
    assert run_class("LlamaForCausalLM").outcome == "wrong"


def test_sees_images_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids alone: the images are left out on the way to the decoder."""
    from transformers.models.llava.modeling_llava import LlavaModel

    forward = LlavaModel.forward
    monkeypatch.setattr(
        LlavaModel, "forward", lambda self, *args, pixel_values, **kwargs: forward(self, *args, **kwargs)
    )
    assert run_image_class("LlavaForConditionalGeneration").outcome == "wrong"


def test_sees_state_that_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateStore, "keep", lambda self, position, states: None)
    assert run_class("FalconH1ForCausalLM").outcome == "wrong"  # attention and an SSM in each layer


def test_a_decoder_that_is_passed_by_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "chunkdist.engine.chunked_model.running",
        lambda context, decoder, args, kwargs, **_: nullcontext(DecoderCall(args, kwargs)),
    )
    record = run_class("LlamaForCausalLM")
    assert record.outcome == "refused"
    assert "something else than the forward of its decoder" in record.reason


@pytest.mark.parametrize("kept_layers", [(1, 0, 1, 1), (0, 1, 1, 1), (1, 1, 1, 0)])
def test_a_skipped_layer_is_refused(monkeypatch: pytest.MonkeyPatch, kept_layers: tuple[int, ...]) -> None:
    """LayerDrop leaves out layers: in a group, the others would never run."""
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_attention_heads=4,
        num_hidden_layers=4,
        layerdrop=0.5,
        dropout=0.0,
    )
    model = chunk_model(transformers.OPTForCausalLM(config), ChunkConfig(chunk_size=7, layers_per_group=2))
    input_ids = torch.randint(8, 64, (1, 20))
    kept = iter(kept_layers)
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(1.0 if next(kept) else 0.0))
    with pytest.raises(UnsupportedModelError, match="layers_per_group=1"):
        model.train()(input_ids=input_ids, labels=input_ids)


def test_the_zoo_is_in_double() -> None:
    assert {x.dtype for x in tiny_model("LlamaForCausalLM").parameters()} == {torch.float64}
