"""ESAM's selection of samples through the Trainer."""

import pytest
import torch
from composer.core import DataSpec, Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sassha import ESAM, SAM, LazyHessian
from tests.helpers import Injected, Spy, assert_same, copied, everything, images, network, trainer
from tests.methods import sassha, sgd


def forwarded(algorithm, **settings):
    """The number of samples of every forward of one step, with and without a graph."""
    counts = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(50, 3))

        def forward(self, x):
            counts.append((len(x), torch.is_grad_enabled()))
            return self.net(x)

    model = ComposerClassifier(Counting(), num_classes=3)
    run = trainer(sgd, [algorithm], model=model, max_duration="1ba", batch_size=20, **settings)
    run.fit()
    run.close()
    return counts


def test_how_many_samples_the_passes_see():
    assert forwarded(SAM()) == [(20, True), (20, True)]
    assert forwarded(ESAM(gamma=1.0)) == [(20, True), (20, True)]
    assert forwarded(ESAM(gamma=0.3)) == [(20, True), (20, False), (6, True)]


def test_the_selection_is_over_all_microbatches():
    counts = forwarded(ESAM(gamma=0.3), device_train_microbatch_size=8)
    ascent, look, descent = counts[:3], counts[3:6], counts[6:]
    assert ascent == [(8, True), (8, True), (4, True)]
    assert look == [(8, False), (8, False), (4, False)]
    # A microbatch without a selected sample is run with two, at weight zero.
    assert all(grad and count >= 1 for count, grad in descent) and 6 <= sum(c for c, _ in descent) <= 10


def test_microbatches_make_no_difference_where_samples_are_alone():
    # Without BatchNorm the gradient is that of the selected samples, however they are split.
    ends = []
    for size in (20, 8, 3):
        torch.manual_seed(1)
        model = ComposerClassifier(nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double(), num_classes=3)
        x, y = images(20).tensors
        run = trainer(
            sgd,
            [ESAM(rho=0.5, gamma=0.25)],
            model=model,
            dataset=TensorDataset(x.double(), y),
            batch_size=20,
            max_duration="3ba",
            device_train_microbatch_size=size,
        )
        run.fit()
        run.close()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for end in ends[1:]:
        assert (end - ends[0]).abs().max() < 1e-6  # the Trainer adds up losses in float32


def test_a_retried_batch_is_whole_again():
    # Also where a batch is a list, which Composer changes in place.
    ends = []
    for fail in (False, True):
        failed = []

        def look(event, state, passes, fail=fail, failed=failed):
            if fail and not failed and passes == 2 and event == Event.AFTER_BACKWARD:
                failed.append(True)
                raise Injected

        x, y = images(20).tensors
        samples = [(x[i], y[i]) for i in range(20)]
        loader = DataLoader(
            samples, batch_size=10, collate_fn=lambda s: [torch.stack(part) for part in zip(*s, strict=True)]
        )
        run = trainer(sgd, [ESAM(rho=0.5)], callbacks=[Spy(look)], max_duration="1ba")
        run.state.set_dataloader(loader, "train")
        train_batch = run._train_batch

        def retried(use_grad_scaling, run=run, train_batch=train_batch):
            before = copied(run.state.batch)
            try:
                return train_batch(use_grad_scaling)
            except Injected:
                assert_same(before, run.state.batch)
                return train_batch(use_grad_scaling)

        run._train_batch = retried
        run.fit()
        ends.append(everything(run))
        run.close()
        assert len(failed) == fail
    assert_same(*ends)


def test_the_logged_gap_is_that_of_the_whole_batch():
    # Of the first step: SAM's, when all weights are displaced.
    gaps = []
    for algorithm in (SAM(rho=0.3), ESAM(rho=0.3, beta=1.0, gamma=0.2)):
        log = InMemoryLogger()
        run = trainer(sgd, [algorithm], loggers=[log], max_duration="1ba", device_train_microbatch_size=4)
        run.fit()
        run.close()
        gaps.append(log.data["sharpness/loss_gap"][-1][1])
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)


class Scalar(ComposerModel):
    """A model whose loss knows no samples."""

    def __init__(self, strict):
        super().__init__()
        self.net = nn.Linear(50, 3)
        self.strict = strict

    def forward(self, batch):
        return self.net(batch[0].flatten(1))

    def loss(self, outputs, batch, **kwargs):
        if kwargs and self.strict:
            raise TypeError("unexpected keyword argument")
        return nn.functional.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_losses_of_samples_is_told_what_to_do(strict):
    run = trainer(sgd, [ESAM()], model=Scalar(strict))
    with pytest.raises(ValueError, match=r"ESAM: Scalar.loss.* returns no loss per sample; set gamma=1, or "):
        run.fit()
    run.close()
    run = trainer(sgd, [ESAM(gamma=1.0)], model=Scalar(strict), max_duration="2ba")
    run.fit()
    run.close()


def test_a_model_without_losses_of_samples_is_not_asked_for_keys():
    # Any key would lead to the same end: nobody is to look for one first.
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    tokens = torch.randint(7, (20, 6))
    run = trainer(
        sgd,
        [ESAM()],
        model=HuggingFaceModel(transformers.GPT2LMHeadModel(config)),
        dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    with pytest.raises(ValueError, match=r"HuggingFaceModel.loss.* no loss per sample; set gamma=1") as error:
        run.fit()
    assert "key" not in str(error.value)
    run.close()


class Sloped(ComposerModel):
    """Penalises the slope of its outputs, for which it differentiates in its forward or in its loss."""

    def __init__(self, in_loss, dropout=0.0):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(50, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()
        self.in_loss = in_loss

    def forward(self, batch):
        return batch[0] if self.in_loss else self.differentiate(batch[0])

    def loss(self, outputs, batch, reduction="mean"):
        values, slopes = self.differentiate(outputs) if self.in_loss else outputs
        losses = nn.functional.cross_entropy(values, batch[1], reduction="none")
        losses = losses + 0.1 * slopes.square().flatten(1).sum(dim=1)
        return losses if reduction == "none" else losses.mean()

    def differentiate(self, x):
        x = x.clone().requires_grad_()
        values = self.net(x.flatten(1))
        return values, torch.autograd.grad(values.sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("size", [20, 6])
@pytest.mark.parametrize("in_loss", [False, True])
def test_a_model_that_differentiates_by_itself(in_loss, size):
    x, y = images(20).tensors
    log, model = InMemoryLogger(), Sloped(in_loss)
    run = trainer(
        lambda params: torch.optim.SGD(params, lr=0.1),
        [ESAM(rho=0.5, beta=1.0, gamma=0.25)],
        model=model,
        dataset=TensorDataset(x.double(), y),
        batch_size=20,
        max_duration="1ba",
        device_train_microbatch_size=size,
        loggers=[log],
    )
    run.fit()
    run.close()

    fresh, batch = Sloped(in_loss), (x.double(), y)
    params = list(fresh.parameters())

    def losses():
        return fresh.loss(fresh(batch), batch, reduction="none")

    at_w = losses()
    g = torch.autograd.grad(at_w.mean(), params)
    norm = sum((part**2).sum() for part in g).sqrt()
    before = copied(params)
    with torch.no_grad():
        for p, part in zip(params, g, strict=True):
            p.add_(0.5 * part / norm)
    rise = losses() - at_w
    update = torch.autograd.grad(losses()[rise.topk(5).indices].mean(), params)
    assert log.data["sharpness/loss_gap"][-1][1] == pytest.approx(rise.mean().item(), rel=1e-5)
    for p, w, part in zip(model.parameters(), before, update, strict=True):
        assert (p - (w - 0.1 * part)).abs().max() < 1e-6


def test_a_model_that_differentiates_by_itself_is_looked_at_with_the_same_dropout():
    # At radius 0 no loss has risen, if the masks are the ascent's.
    log = InMemoryLogger()
    x, y = images(20).tensors
    run = trainer(
        sgd,
        [ESAM(rho=0.0)],
        model=Sloped(in_loss=False, dropout=0.5),
        dataset=TensorDataset(x.double(), y),
        max_duration="4ba",
        device_train_microbatch_size=3,
        loggers=[log],
    )
    run.fit()
    run.close()
    assert [gap for _, gap in log.data["sharpness/loss_gap"]] == [0.0] * 4


class Failing(ComposerClassifier):
    def forward(self, batch):
        if not torch.is_grad_enabled():
            raise RuntimeError("no such kernel")
        return super().forward(batch)


def test_an_error_at_the_displaced_weights_is_shown_as_it_is():
    run = trainer(sgd, [ESAM()], model=Failing(network().module, num_classes=3))
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.fit()
    run.close()


class Weighted(ComposerModel):
    """Takes dictionaries, in which every sample has a weight of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Linear(50, 3).double()

    def forward(self, batch):
        return self.net(batch["x"].flatten(1))

    def loss(self, outputs, batch, reduction="mean"):
        losses = nn.functional.cross_entropy(outputs, batch["y"], reduction="none") * batch["w"]
        return losses if reduction == "none" else losses.mean()


def test_a_selected_sample_keeps_all_that_the_batch_has_of_it():
    x, y = images(20).tensors
    x, w = x.double(), torch.linspace(0.1, 5.0, 20, dtype=torch.float64)
    samples = [{"x": x[i], "y": y[i], "w": w[i], "name": "digit"} for i in range(20)]
    # A DataSpec may count otherwise, and the Trainer weighs microbatches by that.
    for size, count in [(20, len), (6, len), (1, len), (6, lambda weights: weights.sum().item())]:
        model = Weighted()
        before = model.net.weight.detach().clone()
        run = trainer(
            lambda params: torch.optim.SGD(params, lr=0.1),
            [ESAM(rho=0.5, beta=1.0, gamma=0.25, input_key="x", target_key="y")],
            model=model,
            train_dataloader=DataSpec(
                DataLoader(samples, 20), get_num_samples_in_batch=lambda b, count=count: count(b["w"])
            ),
            max_duration="1ba",
            device_train_microbatch_size=size,
        )
        run.fit()
        run.close()

        def losses(weight, bias):
            return nn.functional.cross_entropy(x.flatten(1) @ weight.T + bias, y, reduction="none") * w

        fresh = Weighted().net
        params = [fresh.weight, fresh.bias]
        at_w = [
            count(part) * mean.mean()
            for part, mean in zip(w.split(size), losses(*params).split(size), strict=True)
        ]
        g = torch.autograd.grad(sum(at_w) / count(w), params)
        norm = sum((part**2).sum() for part in g).sqrt()
        displaced = [(p + 0.5 * part / norm).detach() for p, part in zip(params, g, strict=True)]
        chosen = (losses(*displaced) - losses(*params)).topk(5).indices
        displaced[0].requires_grad_()
        (update,) = torch.autograd.grad(losses(*displaced)[chosen].mean(), displaced[:1])
        assert (model.net.weight - (before - 0.1 * update)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"input_key": "x"}, "input_key='x' is not allowed; it must lead to a tensor in the batch, a "),
        ({"target_key": 5}, "target_key=5 is not allowed"),
        ({"input_key": None}, "input_key=None is not allowed"),
    ],
)
def test_keys_that_lead_nowhere_are_named(keys, message):
    run = trainer(sgd, [ESAM(**keys)])
    with pytest.raises(ValueError, match=message) as error:
        run.fit()
    assert "\n" not in str(error.value)
    run.close()


class Broken(ComposerClassifier):
    def loss(self, outputs, batch, *args, **kwargs):
        if kwargs:
            torch.cat(3)
        return super().loss(outputs, batch)


def test_an_error_inside_the_loss_is_shown_as_it_is():
    run = trainer(sgd, [ESAM()], model=Broken(network().module, num_classes=3))
    with pytest.raises(TypeError, match="cat"):
        run.fit()
    run.close()


def test_nothing_is_held_after_an_exception():
    def look(event, state, passes):
        if passes == 2 and event == Event.AFTER_BACKWARD:
            raise Injected

    algorithm = ESAM()
    run = trainer(sgd, [algorithm], callbacks=[Spy(look)])
    with pytest.raises(Injected):
        run.fit()
    assert not algorithm._selection.given and not algorithm._selection.before
    run.close()


def test_a_share_of_the_hessian_beside_a_selection_is_refused():
    with pytest.raises(ValueError, match=r"ESAM: batch_fraction=0.5 of LazyHessian .* set batch_fraction=1"):
        trainer(sassha, [ESAM(), LazyHessian(batch_fraction=0.5)])
    trainer(sassha, [ESAM(gamma=1.0), LazyHessian(batch_fraction=0.5)]).close()
