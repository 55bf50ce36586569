"""Sharded training (FSDP2) on two real processes over gloo."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import assert_passed, launch, launches, selected
from tests.distributed.sharded import checks_in, main
from tests.distributed.sharded_checkpoints import ACROSS, loads, save

# A method's state is the same in either kind of checkpoint, so by default each is resumed from one of them.
SLOW = {f"resumes[{name}-sharded]" for name in ("adamw_msam", "sophia")}
SLOW |= {f"resumes[{name}-full]" for name in ("looksam", "sassha", "adahessian")}
SLOW |= {f"changes[{change}-sharded]" for change in ("plain-sam", "sam-plain")}
SLOW |= {f"changes[{change}-full]" for change in ("plain-looksam", "looksam-plain")}
CHECKS = [
    pytest.param(check, id=check, marks=[pytest.mark.slow] if check in SLOW else [])
    for check in checks_in(Path())
]

pytestmark = [
    launches,
    pytest.mark.skipif(
        torch.__version__ < "2.7" and not torch.cuda.is_available(), reason="FSDP2 on a CPU needs torch 2.7"
    ),
]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    for name in ACROSS:
        save(name, out / "from_one" / name)
    return out, launch(main, out, selected(request))


@pytest.mark.timeout(1300)  # the first waits for all
@pytest.mark.parametrize("check", CHECKS)
def test_sharded_on_two_ranks(check, results):
    assert_passed(check, *results)


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("check", [f"saves[{name}]" for name in ACROSS])
def test_one_rank_loads_what_two_have_saved(check, results):
    out, log = results
    assert_passed(check, out, log)
    name = check.removeprefix("saves[").removesuffix("]")
    loads(name, out / "from_two" / name)
