"""Gradients of a pipeline are those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.pipeline.pipeline_steps import (
    IGNORED,
    PipelineCase,
    StepResult,
    one_process,
    pipeline_step,
    probed_step,
    refusals,
    unsupported,
)

MIXED = (70, 30, 16, 9, 5, 3, 3, 2)
"""1 to 9 chunks of 8 tokens; the short ones fill the last chunks of the long ones, or share one."""
QV = ("q_proj", "v_proj")
TWO_RANKS = [
    PipelineCase(lengths=MIXED, retained_chunks=0),
    PipelineCase(lengths=MIXED, retained_chunks=1),
    PipelineCase(lengths=MIXED, retained_chunks=2, forwards_ahead=2),
    PipelineCase(lengths=MIXED, retained_by_stage=(4, 0)),
    PipelineCase(lengths=MIXED, lora=True),
    PipelineCase(lengths=MIXED, lora_targets=QV, lora_layers=(0,), lora=True),
    PipelineCase(lengths=MIXED, lora_targets=QV, lora_layers=(2,), lora=True),
    PipelineCase(lengths=MIXED, tied=True, num_steps=2),
    PipelineCase(lengths=(5,)),
    PipelineCase(lengths=(17,), retained_chunks=0, chunk_size=32),
]
FOUR_RANKS = [
    PipelineCase(lengths=MIXED, num_layers=5, tied=True),
    PipelineCase(lengths=MIXED, num_layers=4, lora=True, retained_chunks=2, forwards_ahead=2),
    PipelineCase(lengths=MIXED, num_replicas=2, tied=True, num_steps=2),
    PipelineCase(lengths=MIXED, num_replicas=2, lora=True, retained_chunks=0),
    PipelineCase(lengths=MIXED, num_replicas=2, shards_weights=True, tied=True, num_steps=2),
    PipelineCase(lengths=(70, 9), num_replicas=2, shards_weights=True, lora=True, retained_chunks=2),
    PipelineCase(lengths=(30, 9), num_replicas=2, lora_targets=QV, lora_layers=(0,), lora=True),
    PipelineCase(
        lengths=(30, 9), num_replicas=2, shards_weights=True, lora_targets=QV, lora_layers=(2,), lora=True
    ),
]
"""docs/support.md says what is in these two."""


def _check(case: PipelineCase, ranks: Ranks, tolerance: float = 1e-10) -> list[StepResult]:
    expected, results = one_process(case), ranks.run(pipeline_step, case)
    assert {name for result in results for name in result.grads} == set(expected.grads)
    for result in results:
        assert result.loss == pytest.approx(expected.loss, rel=1e-6)
        for name, grad in result.grads.items():
            error = (grad - expected.grads[name]).norm() / expected.grads[name].norm()
            assert error.item() < tolerance, name
    return results


@pytest.mark.parametrize("case", TWO_RANKS, ids=str)
def test_two_stages_have_the_gradients_of_one_process(case: PipelineCase, two_ranks: Ranks) -> None:
    first, last = _check(case, two_ranks)
    shared = {"model.embed_tokens.weight"} if case.tied else set()
    assert first.grads.keys() & last.grads.keys() == shared


@pytest.mark.parametrize("case", FOUR_RANKS, ids=str)
def test_four_ranks_have_the_gradients_of_one_process(case: PipelineCase, four_ranks: Ranks) -> None:
    _check(case, four_ranks)


@pytest.mark.parametrize("model", ["granite", "gemma3"])
def test_stages_are_cut_without_code_for_the_model(model: str, two_ranks: Ranks) -> None:
    """Their norms compute in fp32, and so the comparison is one of fp32."""
    _check(PipelineCase(lengths=MIXED, model=model), two_ranks, tolerance=1e-5)


def test_layers_hand_their_state_on_within_a_stage(two_ranks: Ranks) -> None:
    case = PipelineCase(lengths=(30, 17, 9, 3), model="delta rule", retained_chunks=2, forwards_ahead=2)
    _check(case, two_ranks)


def test_layers_of_an_unknown_class_are_probed(two_ranks: Ranks) -> None:
    case = PipelineCase(lengths=(30, 17), model="delta rule")
    expected = one_process(case)
    for result, num_kinds in two_ranks.run(probed_step, case):
        assert num_kinds == (2 if "model.layers.0.mlp.up_proj.weight" in result.grads else 1)
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_models_that_a_pipeline_would_compute_wrongly_are_refused(two_ranks: Ranks) -> None:
    _, said = two_ranks.run(unsupported)
    assert said["tokens"].startswith("LlamaForCausalLM passes its layers position_embeddings, made of the")
    assert "rope_type=dynamic" in said["dynamic"]
    assert "rope_type=dynamic" in said["filler"], "what fills a chunk up counts, too"


def test_a_rerun_draws_the_dropout_of_its_forward(two_ranks: Ranks) -> None:
    """Nothing retained, and everything: the same numbers are drawn in the forwards, and no others count."""
    found = []
    for retained, dropout in ((0, 0.3), (9, 0.3), (9, 0.0)):
        case = PipelineCase(lengths=MIXED, lora=True, lora_dropout=dropout, retained_chunks=retained)
        found.append(two_ranks.run(pipeline_step, case))
    for rerun, kept, without in zip(*found, strict=True):
        assert rerun.grads.keys() == kept.grads.keys()
        for name, grad in rerun.grads.items():
            torch.testing.assert_close(grad, kept.grads[name], rtol=1e-10, atol=1e-14)
            assert (grad - without.grads[name]).norm() > 0.1 * grad.norm(), "nothing was dropped"


def test_settings_without_a_pipeline_are_refused(two_ranks: Ranks) -> None:
    _, said = two_ranks.run(refusals)
    assert said["three stages"].startswith("3 stages for 2 ranks: cut the model into as many stages")
    assert said["other layers"].startswith("layers=range(2, 3), but the model has 2")
    for name, value in IGNORED.items():
        assert said[name].startswith(f"{name}={value!r}, but "), name
    assert said["one token"].startswith("chunk_size=1, but Qwen3_5ForCausalLM has layers with state")
    assert said["learned positions"].startswith("GPT2LMHeadModel has transformer.wpe.weight outside of")
    assert said["chunked"].startswith("the model is chunked already")
    assert said["peft"].startswith("PeftModelForCausalLM is not a transformers model")
