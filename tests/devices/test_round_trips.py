# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Does the host wait for the device inside a run?

With validation disabled, and the program read already, it does not where the law of the
micro state is a point or a normal law, and nothing is copied to the device. Whether the
program is the same as before is found out ahead of the run, with one question to the
device.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from placed_models import CASES, GAUSSIAN, OTHERS, PLATE, VECTOR, plate, vector
from pretend import Pretend

import pyro_macro as pm
from pyro_macro.handlers import _Prepared
from pyro_macro.intervention import Ahead
from pyro_macro.program import unchanged

# Where the host does wait, by realization: random numbers that need a size, or
# `torch.multinomial`, which looks at its weights
SUMS, TABLES = "laws/finite/sums.py", "laws/finite/law.py"
WAITING = {
    "inhibiting, finite": {"laws/finite/listed.py"},
    "even, finite": {SUMS, TABLES},
    "natural, binomial": {SUMS, "laws/families/binomial.py"},
    "natural, binomial, counts on the device": {SUMS, "laws/families/binomial.py"},
    "natural, binomial in a plate": {SUMS, "laws/families/binomial.py"},
    "natural, Bernoulli in a plate": {SUMS, "laws/families/binomial.py"},
    "natural, Bernoulli": {SUMS, TABLES},
    "natural, counts of several families": {SUMS, TABLES},
    "natural, categorical": {SUMS, TABLES},
    "natural, categorical in a plate": {SUMS, TABLES},
    "natural, count": {SUMS, TABLES},
    "natural, coarsen": {TABLES},
    "natural, largest of finite": {SUMS, TABLES},
    "natural, finite confounder": {SUMS, TABLES},
    "natural, largest": {"laws/extremes.py"},
    "natural, mixture": {"laws/mixture.py"},
}
# Models that wait themselves: torch factorizes a matrix when it makes the distribution
MODELS = {"natural, low rank"}
READ_AGAIN = {"natural, given"}  # what is given is executed ahead of each run


@pytest.fixture
def readings(monkeypatch):
    """One entry for each time that a program is read.

    A pretended device watches all operations, which a program is not kept under.
    """
    found, targets = [], Ahead.targets
    if torch._C._len_torch_dispatch_stack():
        monkeypatch.setattr(unchanged, "_is_watched", lambda: False)
    monkeypatch.setattr(
        Ahead, "targets", lambda self: (found.append(1), targets(self))[1]
    )
    with pyro.validation_enabled(False):
        yield found


@pytest.fixture
def in_run(monkeypatch):
    """From a context to one that is active in the runs alone, without what is ahead."""

    def enter(context):
        active = []

        def begin(self, enter=_Prepared.__enter__):
            active.append(context())
            active[-1].__enter__()
            return enter(self)

        def end(self, *exc, leave=_Prepared.__exit__):
            leave(self, *exc)
            active.pop().__exit__(*exc)

        monkeypatch.setattr(_Prepared, "__enter__", begin)
        monkeypatch.setattr(_Prepared, "__exit__", end)

    return enter


@pytest.mark.parametrize("name", sorted(set(GAUSSIAN) - MODELS))
def test_none_in_a_run(place, readings, in_run, name):
    model = pm.macro_do(*GAUSSIAN[name](place))
    model(), model()
    readings.clear()
    in_run(place.no_round_trip)
    model()
    assert not readings or name in READ_AGAIN


@pytest.mark.parametrize(
    "realization",
    [
        lambda t: pm.Natural(t(5.0)),
        lambda t: pm.Residual(t(5.0), absorb=2),
        lambda t: pm.Allocate(t(5.0), t(0.1, 0.2, 0.3, 0.4)),
    ],
)
@pytest.mark.parametrize(("made", "macro"), [(vector, VECTOR), (plate, PLATE)])
def test_none_with_plates_around(place, readings, in_run, made, macro, realization):
    model = pm.macro_do(made(place), {macro: realization(place)})

    def run():
        with pyro.plate("draws", 5, dim=-2):
            return model()

    run(), run()
    readings.clear()
    in_run(place.no_round_trip)
    assert place.holds(run()) and not readings


@pytest.mark.parametrize("name", ["natural", "residual", "allocate", "natural, sites"])
def test_one_question_ahead_of_a_run(place_of, readings, in_run, name):
    place = place_of(torch.float64)
    if not isinstance(place.device, torch.device) or place.device.type == "cuda":
        pytest.skip("waits are counted on the pretended device alone")
    model, pretend = pm.macro_do(*GAUSSIAN[name](place)), place.pretend
    model(), model()
    readings.clear()
    found = []

    class Noted:
        def __enter__(self):
            found.append((list(pretend.read), list(pretend.written)))

        def __exit__(self, *exc):
            pass

    in_run(Noted)
    with pretend.watched():
        model()
    ((read, written),) = found
    assert len(read) <= 1 and not written and not readings


def test_a_changed_parameter_is_noticed(place, readings):
    mean, ones = place(1.0, 2.0, 3.0), place(1.0, 1.0, 1.0)

    def model():
        return pyro.sample("x", dist.Normal(mean, ones).to_event(1))

    natural = pm.macro_do(model, {VECTOR: pm.Natural(6.0)})
    natural(), natural()
    readings.clear()
    natural()
    assert not readings
    mean[0] += 3.0
    with pyro.plate("draws", 2000):
        drawn = natural().mean(0)
    assert readings
    # E[X | sum] = mean + (6 - sum of the means) / 3, within five standard errors
    expected = mean.cpu() + (6.0 - mean.sum().item()) / 3
    assert (drawn.cpu() - expected).abs().max() < 5 * (2 / 3 / 2000) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OTHERS) - {"natural, smallest"}))
def test_where_the_others_wait(readings, in_run, name):
    torch.set_default_dtype(torch.float64)
    with Pretend() as pretend:
        pretended = unchanged._is_watched
        unchanged._is_watched = lambda: False
        try:
            found = _waits(pretend, name, in_run)
        finally:
            unchanged._is_watched = pretended
    assert {where.split(":")[0] for _, where in found} <= WAITING.get(name, set())


def _waits(pretend, name, in_run):
    found = []

    def t(*numbers):
        given = numbers if len(numbers) > 1 else numbers[0]
        return torch.tensor(given, device=pretend.device, dtype=torch.float64)

    class Noted:
        def __enter__(self):
            pretend.read.clear()
            pretend.written.clear()

        def __exit__(self, *exc):
            found.extend(pretend.read)
            assert not pretend.written

    model = pm.macro_do(*CASES[name](t))
    model()
    in_run(Noted)
    model()
    return found
