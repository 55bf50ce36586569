"""Checkpoints that cross methods: what the class's name and the shared state are for."""

import pytest
import torch
from composer.algorithms import LayerFreezing

from composer_sassha import MSAM, SAM, LookSAM, Sassha, ignore_own_entries
from composer_sassha.optim.counters import COUNTERS
from tests.helpers import assert_same, copied, everything, trainer
from tests.methods import adamw, sassha, sgd


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def without_counters(state):
    for group in state["optimizer"]["param_groups"]:
        for counter in COUNTERS:
            group.pop(counter, None)
    return state


@pytest.mark.filterwarnings("ignore:SAM is not in the state_dict")
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("sam_first", [True, False])
def test_a_plain_run_continues_under_sam_and_back_momentum_included(optimizer, sam_first, tmp_path):
    # A perturbation of radius 0 changes nothing, so the mixed run must end as the plain one.
    plain = trainer(optimizer)
    plain.fit()
    expected = without_counters(everything(plain))
    plain.close()

    methods = [[SAM(rho=0.0)], []] if sam_first else [[], [SAM(rho=0.0)]]
    first = trainer(
        optimizer, methods[0], max_duration="5ba", save_folder=str(tmp_path), save_filename="half.pt"
    )
    first.fit()
    first.close()
    second = trainer(optimizer, methods[1], load_path=str(tmp_path / "half.pt"))
    second.fit()
    assert_same(expected, without_counters(everything(second)))
    second.close()


@pytest.mark.filterwarnings("ignore:LookSAM is not in the state_dict")
@pytest.mark.parametrize("optimizer", [sgd, adamw, plain_sgd])
@pytest.mark.parametrize("looksam_first", [True, False])
def test_a_plain_run_continues_under_looksam_and_back(optimizer, looksam_first, tmp_path):
    # LookSAM keeps a vector of its own in the state. Without displacement and alpha it changes nothing.
    plain = trainer(optimizer)
    plain.fit()
    expected = without_counters(everything(plain))
    plain.close()

    methods = [[LookSAM(rho=0.0, alpha=0.0, interval=2)], []]
    methods = methods if looksam_first else methods[::-1]
    first = trainer(
        optimizer, methods[0], max_duration="5ba", save_folder=str(tmp_path), save_filename="half.pt"
    )
    first.fit()
    first.close()
    second = trainer(optimizer, methods[1], load_path=str(tmp_path / "half.pt"))
    second.fit()
    ours = without_counters(everything(second))
    for state in ours["optimizer"]["state"].values():
        assert state.pop("looksam_g_v").abs().sum() >= 0
    ours["optimizer"]["state"] = {key: state for key, state in ours["optimizer"]["state"].items() if state}
    assert_same(expected, ours)
    second.close()


def test_what_looksam_keeps_is_in_the_checkpoint(tmp_path):
    run = trainer(sgd, [LookSAM(rho=0.1, interval=3)], max_duration="2ba")
    run.fit()
    run.save_checkpoint(str(tmp_path / "a.pt"))
    expected = copied(run.state.optimizers[0].state_dict())
    run.close()
    loaded = trainer(sgd, [LookSAM(rho=0.1, interval=3)], load_path=str(tmp_path / "a.pt"))
    assert_same(expected, copied(loaded.state.optimizers[0].state_dict()))
    assert all(state["looksam_g_v"].abs().sum() > 0 for state in loaded.state.optimizers[0].state.values())
    loaded.close()


@pytest.mark.filterwarnings("ignore:MSAM is not in the state_dict")
def test_msam_looks_again_at_the_momentum_that_a_checkpoint_brings(tmp_path):
    plain = trainer(plain_sgd, max_duration="1ba")
    plain.fit()
    plain.save_checkpoint(str(tmp_path / "plain.pt"))
    plain.close()
    run = trainer(sgd, [MSAM(rho=0.1)], load_path=str(tmp_path / "plain.pt"))
    with pytest.raises(ValueError, match="MSAM: SGD keeps no momentum"):
        run.fit()
    run.close()


def test_saving_before_the_first_step_changes_nothing(tmp_path):
    # Not so with torch.optim.SGD and weight decay, wrapped or not: torch steps it once to have its momentum
    # made.
    ends = []
    for save in (False, True):
        run = trainer(sassha, [Sassha(rho=0.1)])
        if save:
            run.save_checkpoint(str(tmp_path / "start.pt"))
        run.fit()
        ends.append(everything(run))
        run.close()
    resumed = trainer(sassha, [Sassha(rho=0.1)], load_path=str(tmp_path / "start.pt"))
    resumed.fit()
    ends.append(everything(resumed))
    resumed.close()
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_curvature_is_in_the_checkpoint(tmp_path):
    run = trainer(
        sassha, [Sassha(rho=0.1)], max_duration="3ba", save_folder=str(tmp_path), save_filename="a.pt"
    )
    run.fit()
    expected = copied(run.state.optimizers[0].state_dict())
    run.close()
    loaded = trainer(sassha, [Sassha(rho=0.1)], load_path=str(tmp_path / "a.pt"))
    assert_same(expected, copied(loaded.state.optimizers[0].state_dict()))
    assert any(state["exp_hessian"].abs().sum() > 0 for state in loaded.state.optimizers[0].state.values())
    loaded.close()
    weights_only = trainer(
        sassha,
        [Sassha(rho=0.1)],
        load_path=str(tmp_path / "a.pt"),
        load_weights_only=True,
        max_duration="2ba",
    )
    weights_only.fit()
    assert weights_only.state.optimizers[0].steps_taken == 2
    weights_only.close()


@pytest.mark.parametrize("loaded", [{}, {"state": {}}, {"state": {"optimizers": None}}])
def test_there_may_be_nothing_to_ignore(loaded):
    # As where rank 0 alone has read the checkpoint.
    before = copied(loaded)
    ignore_own_entries(loaded)
    assert loaded == before


def test_a_run_whose_layers_were_frozen_on_the_way_says_that_it_cannot_be_saved(tmp_path):
    run = trainer(sgd, [SAM(), LayerFreezing(freeze_start=0.0, freeze_level=1.0)])
    run.fit()
    with pytest.raises(
        RuntimeError, match=r"taken out of the optimizer's groups \(LayerFreezing does\)"
    ) as error:
        run.save_checkpoint(str(tmp_path / "frozen.pt"))
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]
    run.close()
