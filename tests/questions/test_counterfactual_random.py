# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Counterfactuals of random affine-Gaussian programs, against dense twin networks.

The program is one large system ``z = c + B z + S e`` of equations of single numbers.
Both worlds are affine functions of the same ``e`` (and of the noise of a micro state
that is drawn anew), and the law of the second given what is seen in the first is that
of conditioning one dense normal law.
"""

import numpy as np
import pytest
import torch
from test_random_gaussian import (
    DenseQuestion,
    close,
    draw_spec,
    is_regular,
    solved,
)

import pyro_macro as pm
from pyro_macro.laws.gaussian import twin

N_FAST, N_ALL = 10, 150


class TwinNetwork:
    """The two worlds as affine functions of all noise.

    :param micro: the mean of the new micro state, its factor, and what of its own value
        it keeps.
    """

    def __init__(self, question, mean, factor, kept):
        spec = self.spec = question.spec
        self.z = np.concatenate(
            [spec.factor, np.zeros((spec.size, factor.shape[1]))], 1
        )
        B, S, c = spec.B.copy(), np.zeros_like(self.z), spec.c.copy()
        S[:, : spec.S.shape[1]] = spec.S
        B[question.x], c[question.x] = 0, mean + kept * spec.mean[question.x]
        S[question.x] = kept * self.z[question.x]
        S[question.x, spec.S.shape[1] :] += factor
        self.mean, self.twin = solved(B, c), solved(B, S)

    def law(self, rows, seen, values):
        """Of rows in both worlds, given what is seen in the first."""
        both = np.concatenate([rows @ self.z, rows @ self.twin])
        mean = np.concatenate([rows @ self.spec.mean, rows @ self.mean])
        if len(seen):
            known = seen @ self.z
            # Directions that are left, by a basis of those that are seen
            u, s, v = np.linalg.svd(known, full_matrices=False)
            u, s, v = (part[..., s > 1e-9 * s[:1]] for part in (u, s, v.T))
            noise = v @ ((u.T @ (values - seen @ self.spec.mean)) / s)
            mean = mean + both @ noise
            both = both - both @ v @ v.T
        n = len(rows)
        cov = both @ both.T
        return (mean[:n], cov[:n, :n]), (mean[n:], cov[n:, n:])


def draw_unit(rng, spec):
    """What is seen of a unit: things, rows, and values."""
    z = spec.mean + spec.factor @ rng.normal(size=spec.factor.shape[1])
    share = rng.choice([0.0, 0.3, 0.7, 1.0])
    things = [n for n in spec.sites if rng.random() < share]
    if rng.random() < 0.3:
        things.append(spec.cause)
    if not isinstance(spec.effect, str) and rng.random() < 0.4:
        things.append(spec.effect)
    rows = [spec.rows(thing) for thing in things]
    seen = np.concatenate([np.zeros((0, spec.size)), *rows])
    observed = {}
    for thing, own in zip(things, rows, strict=True):
        shape = shape_of(spec, thing)
        observed[thing] = torch.tensor(own @ z, dtype=spec.dtype).reshape(shape)
    return observed, seen, seen @ z


def shape_of(spec, thing):
    over = () if isinstance(thing, str) else thing.over
    site = spec.sites[thing if isinstance(thing, str) else thing.micro[0]]
    kept = [k for k in site.plates if k not in over]
    shape = [(2 if k == "q" else 3) if k in kept else 1 for k in "qp"]
    while shape and shape[0] == 1:
        shape.pop(0)
    if isinstance(thing, str):
        return (*shape, *(() if site.event is None else (site.event,)))
    rows, slots = len(spec.rows(thing)), len(spec.elements(thing))
    return (*shape, *((rows // slots,) if thing.aggregation.event_dim else ()))


def allocation(rng, question):
    """Shares with macro value one, for each row of the aggregation."""
    slots, k = question.micro.shape
    rows = question.w[: len(question.w) // slots, :k]
    start = np.linalg.pinv(rows)  # (k, m)
    free = np.eye(k) - start @ rows
    return (start + free @ rng.normal(size=start.shape)).T  # (m, k)


def realized(kind, rng, question):
    """A realization, its new micro state by hand, and macro values."""
    spec = question.spec
    slots, k = question.micro.shape
    m = len(question.w) // slots
    value = np.round(question.cause_mean.reshape(slots, m).mean(0) + 1.3, 2)
    at = torch.tensor(value if m > 1 else value[0], dtype=torch.float64)
    vector = getattr(spec.cause.aggregation, "event_dim", 0)
    at = at.reshape(-1) if vector else at
    wide = np.tile(value, slots)
    none = np.zeros((len(question.x), 0))
    if kind == "shift":
        within = question.cause_cov
        gain = np.linalg.solve(within, question.w @ question.x_cov).T
        return pm.Shift(1.5), 1.5 * gain.sum(1), none, 1.0
    if kind == "natural":
        mean, cov = question.natural(wide)
    elif kind == "residual":
        absorb = [k - 1]
        mean, cov = question.residual(wide, absorb)
        values, vectors = np.linalg.eigh(cov)
        factor = vectors * np.sqrt(values.clip(0))
        return pm.Residual(at, absorb=k - 1), mean, factor, 0.0
    else:
        shares = allocation(rng, question)
        point = np.tile(value @ shares, slots)
        stated = torch.tensor(shares if vector else shares[0])
        return pm.Allocate(at, stated), point, none, 0.0
    values, vectors = np.linalg.eigh(cov)
    return pm.Natural(at), mean, vectors * np.sqrt(values.clip(0)), 0.0


def compare(seed, kind):
    spec = draw_spec(seed, torch.float32 if seed % 7 == 3 else torch.float64)
    question = DenseQuestion(spec)
    m = len(question.w) // len(question.micro)
    if kind in ("shift", "residual") and m > 1:
        return False
    if kind != "allocate" and not is_regular(question.x_cov, 1e5):
        return False
    if kind == "residual" and abs(question.w[0, question.micro.shape[1] - 1]) < 0.1:
        return False
    rng = np.random.default_rng(seed)
    observed, seen, values = draw_unit(rng, spec)
    realization, *micro = realized(kind, rng, question)
    network = TwinNetwork(question, *micro)
    rows = spec.rows(spec.effect)
    was, would = network.law(rows, seen, values)
    report = pm.counterfactual(
        spec.model, {spec.cause: realization}, observed, spec.effect
    )
    assert report.method == "exact: affine-Gaussian"
    unit = max(
        1, np.abs(was[0]).max(), np.abs(would[0]).max(), np.abs(values).max(initial=0)
    )
    what = f"{seed} {kind}"
    close(report.factual_mean.reshape(-1), was[0], unit, spec, what)
    close(report.factual_variance.reshape(-1), np.diag(was[1]), unit**2, spec, what)
    close(report.mean.reshape(-1), would[0], unit, spec, what)
    close(report.covariance[0], would[1], unit**2, spec, what)
    return True


KINDS = ("natural", "shift", "allocate", "residual")


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_dense_twin_network(kind):
    done = [compare(seed, kind) for seed in range(N_FAST)]
    assert sum(done) > N_FAST / 3


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_structure_of_what_was_seen(kind, monkeypatch):
    """As where so much was seen that its covariance is not written out."""
    monkeypatch.setattr(twin, "DENSE", 0)
    for seed in range(N_FAST, 2 * N_FAST):
        compare(seed, kind)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [0, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_many_programs_against_a_dense_twin_network(kind, dense, monkeypatch):
    monkeypatch.setattr(twin, "DENSE", dense)
    for seed in range(N_ALL):
        compare(seed, kind)
