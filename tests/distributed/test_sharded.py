"""Sharded training (FSDP2) on two real processes over gloo."""

import pytest
import torch

from tests.distributed.launch import assert_passed, launch
from tests.distributed.sharded import (
    ACROSS,
    CHANGES,
    CURVED,
    ESTIMATED,
    KINDS,
    OTHERS,
    PERTURBED,
    loads,
    main,
    save,
)

CHECKS = [
    *[f"agrees[{name}]" for name in PERTURBED],
    *[f"curvature_agrees[{estimator}-{rho}]" for estimator, rho in ESTIMATED],
    *[f"{check}[{name}]" for name in ACROSS for check in ("loads", "saves")],
    *[f"resumes[{name}-{kind}]" for kind in KINDS for name in ("looksam", "adamw_msam", *CURVED)],
    *[f"changes[{before}-{after}-{kind}]" for kind in KINDS for before, after in CHANGES],
    *[f"an_exception_leaves_the_weights[{at_pass}]" for at_pass in (1, 2)],
    *[check.__name__ for check in OTHERS],
]

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.7" and not torch.cuda.is_available(), reason="FSDP2 on a CPU needs torch 2.7"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    for name in ACROSS:
        save(name, out / "from_one" / name)
    return out, launch(main, out)


@pytest.mark.timeout(1300)  # the first waits for all
@pytest.mark.parametrize("check", CHECKS)
def test_sharded_on_two_ranks(check, results):
    assert_passed(check, *results)


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", ACROSS)
def test_one_rank_loads_what_two_have_saved(name, results):
    out, log = results
    assert_passed(f"saves[{name}]", out, log)
    loads(name, out / "from_two" / name)
