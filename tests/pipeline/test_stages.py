"""Stages of models whose layers differ in kind: exact wherever they are cut, or refused by name."""

from __future__ import annotations

import json

import pytest

from chunkdist.models.exact_classes import CLASSES, TRANSFORMERS_VERSION
from tests.helpers.model_zoo import tiny_model
from tests.helpers.sweep import difference, double_precision
from tests.pipeline.stages_here import FILE, outcomes, staged_step, whole_step

MIXED_KINDS = {
    "Qwen3_5ForCausalLM": ["linear_attention", "full_attention", "linear_attention"],
    "Lfm2ForCausalLM": ["conv", "full_attention", "conv"],
    "NemotronHForCausalLM": None,  # layers of attention, of state and of an MLP alone
    "MiMoV2FlashForCausalLM": None,  # windows and full attention, of other head dims
    "BambaForCausalLM": None,  # layers return pairs, which the decoder takes apart
    "CTRLLMHeadModel": None,  # multiplies in place what it is given as embeddings
}


@pytest.mark.parametrize("name", MIXED_KINDS)
def test_every_cut_is_exact(name: str) -> None:
    with double_precision():
        model = tiny_model(name, MIXED_KINDS[name])
    found = outcomes(name, model)
    assert found
    assert set(found) == {"exact"}, found


@pytest.mark.parametrize(("retained", "lengths"), [(0, (23, 12, 7, 5)), (3, (16, 2))])
def test_retained_chunks_of_layers_with_state(retained: int, lengths: tuple[int, ...]) -> None:
    with double_precision():
        model = tiny_model("Qwen3_5ForCausalLM", MIXED_KINDS["Qwen3_5ForCausalLM"])
        found = staged_step(
            model, [range(1), range(1, 3)], lengths=lengths, chunk_size=2, retained_chunks=retained
        )
        assert difference(whole_step(model, lengths), found) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("MllamaForCausalLM", "MllamaForCausalLM skips layers of the stage"),
        ("Gemma4UnifiedForConditionalGeneration", "looks at its embeddings on every stage"),
    ],
)
def test_what_no_cut_computes_is_refused(name: str, said: str) -> None:
    found = outcomes(name)
    assert found
    assert all(outcome.startswith("refused: ") and said in outcome for outcome in found), found


def test_the_page_has_the_committed_figures() -> None:
    """All classes are asked by `python -m tests.pipeline.stages_here`."""
    result = json.loads(FILE.read_text(encoding="utf-8"))
    assert result["transformers"] == TRANSFORMERS_VERSION
    assert set(result["classes"]) == CLASSES
    exact = [name for name, found in result["classes"].items() if found == ["exact"]]
    refused = [name for name, found in result["classes"].items() if all("refused: " in x for x in found)]
    assert len(exact) + len(refused) == len(CLASSES), "some cuts are wrong, or only some are refused"
    page = " ".join((FILE.parents[1] / "pipeline.md").read_text(encoding="utf-8").split())
    assert f"Of the {len(CLASSES)} classes that" in page
    assert f"{len(exact)} are exact in a pipeline" in page
    assert f"{len(refused)} are refused" in page
