"""The papers' equations on plain tensors.

Gradients come from one backward over all microbatches, products with the Hessian from differentiating
forward over reverse. Nothing here comes from the package but what is drawn at random, which both sides have
to share.

A perturbation is a function of the loss, the weights and the moment; it returns the vector to update with,
the first pass (a loss and the point where it is evaluated) and the last. A rule is a function of the weights,
that vector, the Hessian's diagonal (None between refreshes) and the moment; it returns the new weights.
"""

import math
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy

from composer_sassha.curvature import rademacher
from composer_sassha.perturbations.esam import bernoulli


def plus(a, b, factor=1.0):
    return {n: a[n] + factor * b[n] for n in a}


def times(factor, a):
    return {n: factor * a[n] for n in a}


def dot(a, b):
    return sum((a[n] * b[n]).sum() for n in a)


def length(a):
    """One norm over all parameters."""
    return dot(a, a).sqrt()


class Loss:
    """The mean cross-entropy over a batch, whose microbatches BatchNorm sees one by one."""

    def __init__(self, model, microbatches):
        self.model = model
        self.microbatches = microbatches

    def of(self, w, x, y, reduction="mean"):
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return cross_entropy(functional_call(self.model, {**w, **buffers}, ((x, y),)), y, reduction=reduction)

    def gradient(self, w):
        leaves = {n: w[n].detach().requires_grad_() for n in w}
        loss = self._mean(lambda k, x, y: {"loss": self.of(leaves, x, y)})["loss"]
        return dict(zip(w, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def hessian_diagonal(self, w, seed, step):
        """Hutchinson's estimate z * (H z), with a probe of its own for every microbatch."""

        def estimate(k, x, y):
            z = dict(zip(w, rademacher(list(w.values()), (seed, step, 0, k, 0)), strict=True))
            _, product = jvp(lambda v: grad(self.of)(v, x, y), (w,), (z,))
            return {n: z[n] * product[n] for n in w}

        return self._mean(estimate)

    def of_samples(self, w):
        return torch.cat([self.of(w, x, y, reduction="none") for x, y in self.microbatches])

    def only(self, chosen):
        """The mean over some of the samples, those of each microbatch still forwarded together."""
        x, y = (torch.cat(parts) for parts in zip(*self.microbatches, strict=True))
        owner = torch.cat([torch.full_like(y, k) for k, (_, y) in enumerate(self.microbatches)])
        kept = [[i for i in chosen if owner[i] == k] for k in range(len(self.microbatches))]
        return Loss(self.model, [(x[indices], y[indices]) for indices in kept])

    def statistics(self, w, buffers):
        """BatchNorm's buffers after a pass at w."""
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        for x, y in self.microbatches:
            functional_call(self.model, {**w, **buffers}, ((x, y),))  # writes into them
        return buffers

    def _mean(self, function):
        total = sum(len(y) for _, y in self.microbatches)
        parts = [(len(y) / total, function(k, x, y)) for k, (x, y) in enumerate(self.microbatches) if len(y)]
        return {n: sum(share * part[n] for share, part in parts) for n in parts[0][1]}


@dataclass
class Moment:
    """The step, from 0; its learning rate; what perturbation and rule keep between steps."""

    step: int
    lr: float
    kept: dict

    def value(self, hyperparameter):
        """A hyperparameter with a schedule is a function of the moment."""
        return hyperparameter(self) if callable(hyperparameter) else hyperparameter


def trajectory(model, batches, microbatch, perturbation, rule, lr, refresh=None):
    """Yield weights and buffers after every step.

    Args:
        lr: the learning rate as a function of the step.
        refresh: interval and seed of the Hessian's diagonal, or None.
    """
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = {}
    for step, (x, y) in enumerate(batches):
        loss = Loss(model, list(zip(x.split(microbatch), y.split(microbatch), strict=True)))
        now = Moment(step, lr(step), kept)
        g, (first_loss, first_point), (last_loss, last_point) = perturbation(loss, w, now)
        h = None
        if refresh is not None and step % refresh[0] == 0:
            h = last_loss.hessian_diagonal(last_point, refresh[1], step)
        buffers = first_loss.statistics(first_point, buffers)
        w = rule(w, g, h, now)
        yield {**w, **buffers}


# --- Perturbations ---


def nothing(loss, w, now):
    return loss.gradient(w), (loss, w), (loss, w)


def every(interval, perturbation):
    """A perturbation on some steps, none on the others."""
    return lambda loss, w, now: (nothing if now.step % interval else perturbation)(loss, w, now)


def sam(loss, w, now, rho, p=2):
    """arXiv 2010.01412: e = rho g / ||g||; for the ball of the maximum norm, e = rho sign(g)."""
    g = loss.gradient(w)
    e = times(1 / length(g), g) if p == 2 else {n: g[n].sign() for n in g}
    there = plus(w, e, now.value(rho))
    return loss.gradient(there), (loss, w), (loss, there)


def partial_sam(loss, w, now, rho, fraction):
    """SAM whose e comes from the first samples of each microbatch, which weigh what all of them would."""
    total = sum(len(y) for _, y in loss.microbatches)
    g = times(0.0, w)
    for x, y in loss.microbatches:
        first = max(2, math.ceil(fraction * len(y)))
        g = plus(g, grad(loss.of)(w, x[:first], y[:first]), len(y) / total)
    there = plus(w, g, rho / length(g))
    return loss.gradient(there), (loss, there), (loss, there)


def asam(loss, w, now, rho, eta):
    """arXiv 2102.11600: e = rho T^2 g / ||T g||."""
    g = loss.gradient(w)
    t = {n: w[n].abs() + eta if "weight" in n else torch.ones_like(w[n]) for n in w}
    tg = {n: t[n] * g[n] for n in w}
    there = {n: w[n] + rho * t[n] ** 2 * g[n] / length(tg) for n in w}
    return loss.gradient(there), (loss, w), (loss, there)


def gsam(loss, w, now, rho_max, rho_min, alpha, lr_max, lr_min):
    """arXiv 2203.08065: g_p - alpha g_orth, g_orth the part of g that is orthogonal to g_p."""
    rho = rho_min + (rho_max - rho_min) * (now.lr - lr_min) / (lr_max - lr_min)
    g = loss.gradient(w)
    there = plus(w, g, rho / length(g))
    g_p = loss.gradient(there)
    g_parallel = times(dot(g, g_p) / length(g_p) ** 2, g_p)
    g_orth = plus(g, g_parallel, -1)
    return plus(g_p, g_orth, -alpha), (loss, w), (loss, there)


def ssam(loss, w, now, rho):
    """arXiv 2401.07250: (||g|| / ||g_p||) g_p."""
    g = loss.gradient(w)
    there = plus(w, g, rho / length(g))
    g_p = loss.gradient(there)
    return times(length(g) / length(g_p), g_p), (loss, w), (loss, there)


def usam(loss, w, now, rho, renormalize=False):
    """arXiv 2206.06232: e = rho g."""
    g = loss.gradient(w)
    there = plus(w, g, rho)
    g_p = loss.gradient(there)
    update = times(length(g) / length(g_p), g_p) if renormalize else g_p
    return update, (loss, w), (loss, there)


def looksam(loss, w, now, rho, alpha, interval):
    """arXiv 2203.02714: every `interval` steps g_s, on the others g + alpha ||g|| g_v / ||g_v||."""
    g = loss.gradient(w)
    if now.step % interval:
        g_v = now.kept["g_v"]
        return plus(g, g_v, alpha * length(g) / length(g_v)), (loss, w), (loss, w)
    there = plus(w, g, rho / length(g))
    g_s = loss.gradient(there)
    now.kept["g_v"] = plus(g_s, g, -dot(g, g_s) / length(g) ** 2)
    return g_s, (loss, w), (loss, there)


def esam(loss, w, now, rho, beta, gamma, seed):
    """arXiv 2110.03141: a fraction beta of e, on the ceil(gamma n) samples whose loss rises most."""
    g = loss.gradient(w)
    mask = dict(zip(w, bernoulli(list(w.values()), beta, (seed, now.step, 0)), strict=True))
    there = {n: w[n] + rho / beta * mask[n] * g[n] / length(g) for n in w}
    rises = (loss.of_samples(there) - loss.of_samples(w)).tolist()
    by_rise = sorted(range(len(rises)), key=lambda i: rises[i], reverse=True)
    selected = loss.only(sorted(by_rise[: math.ceil(gamma * len(rises))]))
    return selected.gradient(there), (loss, w), (selected, there)


def msam(loss, w, now, rho):
    """arXiv 2401.12033: the gradient at w - rho m / ||m||, m the momentum; the first step has none."""
    there = w
    if "m" in now.kept:
        there = plus(w, now.kept["m"], -now.value(rho) / length(now.kept["m"]))
    return loss.gradient(there), (loss, there), (loss, there)


# --- Update rules ---


def averaged(old, new, beta):
    """beta old + (1 - beta) new, from zero on."""
    return {n: (beta * old[n] if old else 0) + (1 - beta) * new[n] for n in new}


def sgd(w, g, h, now, momentum, decay):
    m = plus(g, w, decay)
    if "m" in now.kept:
        m = plus(m, now.kept["m"], momentum)
    now.kept["m"] = m
    return plus(w, m, -now.lr)


def adamw(w, g, h, now, betas, eps, decay):
    """arXiv 1711.05101."""
    (b1, b2), kept, t = betas, now.kept, now.step + 1
    m = kept["m"] = averaged(kept.get("m"), g, b1)
    v = kept["v"] = averaged(kept.get("v"), {n: g[n] ** 2 for n in g}, b2)
    step = {n: (m[n] / (1 - b1**t)) / ((v[n] / (1 - b2**t)).sqrt() + eps) for n in w}
    return {n: w[n] - now.lr * step[n] - now.lr * decay * w[n] for n in w}


def sassha(w, g, h, now, betas, eps, decay, power=0.5):
    """arXiv 2502.18153; the correction of D counts steps and is frozen between refreshes."""
    (b1, b2), kept, t = betas, now.kept, now.step + 1
    m = kept["m"] = averaged(kept.get("m"), g, b1)
    if h is not None:
        kept["d"] = averaged(kept.get("d"), {n: h[n].abs() for n in h}, b2)
        kept["correction"] = 1 - b2**t
    d = times(1 / kept["correction"], kept["d"])
    step = {n: (m[n] / (1 - b1**t)) / (d[n] ** now.value(power) + eps) for n in w}
    return {n: w[n] - now.lr * step[n] - now.lr * decay * w[n] for n in w}


def adahessian(w, g, h, now, betas, eps, decay, power=1.0, block=1):
    """arXiv 2006.00719, with the estimates counted where they do not come every step."""
    (b1, b2), kept, t = betas, now.kept, now.step + 1
    m = kept["m"] = averaged(kept.get("m"), g, b1)
    if h is not None:
        smooth = {n: spatial_average(h[n], block) for n in h}
        kept["v"] = averaged(kept.get("v"), {n: smooth[n] ** 2 for n in h}, b2)
        kept["estimates"] = kept.get("estimates", 0) + 1
    v = times(1 / (1 - b2 ** kept["estimates"]), kept["v"])
    step = {n: (m[n] / (1 - b1**t)) / (v[n].sqrt() ** power + eps) for n in w}
    return {n: w[n] - now.lr * step[n] - now.lr * decay * w[n] for n in w}


def spatial_average(h, block):
    """The mean over a convolution's kernel, or over blocks of a matrix, in every entry's place."""
    smooth = h.clone()
    if h.ndim == 4:
        for out in range(h.shape[0]):
            for channel in range(h.shape[1]):
                smooth[out, channel] = h[out, channel].mean()
    elif h.ndim == 2:
        for i in range(0, h.numel(), block):
            smooth.view(-1)[i : i + block] = h.reshape(-1)[i : i + block].mean()
    return smooth


def sophia(w, g, h, now, betas, eps, decay, gamma):
    """arXiv 2305.14342, algorithm 3."""
    (b1, b2), kept = betas, now.kept
    m = kept["m"] = averaged(kept.get("m"), g, b1)
    if h is not None:
        kept["h"] = averaged(kept.get("h"), h, b2)
    ratio = {n: m[n] / (gamma * kept["h"][n]).clamp(min=eps) for n in w}
    return {n: w[n] - now.lr * decay * w[n] - now.lr * ratio[n].clamp(-1, 1) for n in w}
