"""Models with state between tokens under the engines: gradients are those of one process."""

from __future__ import annotations

import pytest

from chunkdist.engine import probe
from tests.distributed.cases import Case, Errors, errors_of
from tests.distributed.ranks import Ranks

DELTA_RULE, CONVOLUTION = "Qwen3_5ForCausalLM", "Lfm2ForCausalLM"
CASES = [
    Case(engine="ddp", hybrid=DELTA_RULE),
    Case(engine="fsdp2", hybrid=DELTA_RULE, layers_per_group="all", retained_chunks=2),
    Case(engine="fsdp2 groups", hybrid=CONVOLUTION, layers_per_group="all"),
    Case(engine="zero3", hybrid=DELTA_RULE),
]


def name_of(case: Case) -> str:
    return f"{case.engine}-{case.hybrid}-group{case.layers_per_group}"


def check(errors: Errors) -> None:
    """The models compute state, norms and rotary embeddings in fp32, whatever their dtype."""
    assert errors.gradients < 1e-5
    assert errors.loss < 1e-6
    assert errors.updates < 1e-4


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_ranks(two_ranks: Ranks, case: Case) -> None:
    for errors in two_ranks.run(errors_of, case):
        check(errors)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.hybrid == DELTA_RULE and case.engine != "ddp"], ids=name_of
)
def test_probed(two_ranks: Ranks, case: Case) -> None:
    """The layers of an unknown class are asked while their weights are gathered, and the step is the same."""
    found = two_ranks.run(errors_of_unknown, case)
    for errors, _ in found:
        check(errors)
    assert [num_layers for _, num_layers in found] == [0, 2], "the first rank's 3 tokens show nothing"


def errors_of_unknown(case: Case) -> tuple[Errors, int]:
    """Runs on every rank."""
    probes: list[probe.LayerProbe] = []
    init = probe.LayerProbe.__init__

    def noted(self: probe.LayerProbe) -> None:
        init(self)
        probes.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "CLASSES", frozenset())
        patch.setattr(probe.LayerProbe, "__init__", noted)
        errors = errors_of(case)
    return errors, sum(len(one.passed) for one in probes)
