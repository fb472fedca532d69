# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a consolidated model keeps its promise, by means that it does not use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.consolidation.draws import Model, Unobserved, drawn
from pyro_macro.consolidation.fused import Fused
from pyro_macro.errors import PyroMacroError
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.laws.gaussian.derivatives import agree
from pyro_macro.program.inner import (
    Site,
    is_deterministic,
    preserved_params,
    preserved_random_state,
)
from pyro_macro.program.noise import NoiseRun, NoiseView
from pyro_macro.program.substitution import detached
from pyro_macro.questions.two_sample import compare
from pyro_macro.reports import Report, Row

JOINT = 1 << 12  # joint values that are run one by one, at most
PROJECTIONS = 8  # random combinations that samples are compared in
PAIRS = 6  # of interventions, by default
ROUNDING = 1e-5  # of float32; float64 stays far below


@dataclass(frozen=True)
class Check:
    """The comparison under one intervention.

    :ivar intervention: the values that were set.
    :ivar method: ``"exact: affine-Gaussian"``, ``"exact: finite"`` or
        ``"Monte Carlo"``.
    :ivar difference: the largest one between means, covariances or probabilities, in
        standard deviations where there are some; of Monte Carlo the largest
        Wasserstein-2 distance.
    :ivar p_value: of Monte Carlo, ``None`` otherwise.
    """

    intervention: dict[str, Any]
    method: str
    difference: float
    p_value: float | None

    def holds(self, level: float) -> bool:
        if self.p_value is None:
            return self.difference <= ROUNDING
        return self.p_value > level


@dataclass(frozen=True, repr=False)
class VerificationReport(Report):
    """Whether a consolidated model has the distributions of the original.

    It is true if none of the comparisons found a difference.
    """

    checks: list[Check]
    level: float

    def __bool__(self) -> bool:
        return all(check.holds(self.level) for check in self.checks)

    def summary(self) -> str:
        bad = [c for c in self.checks if not c.holds(self.level)]
        if bad:
            return f"{len(bad)} of {len(self.checks)} interventions differ."
        exact = all(c.p_value is None for c in self.checks)
        what = "agree" if exact else f"show no difference at level {self.level}"
        return f"All {len(self.checks)} interventions {what}."

    def rows(self) -> list[Row]:
        return [
            {
                "intervention": _named(c.intervention),
                "difference": c.difference,
                "p-value": "" if c.p_value is None else c.p_value,
                "agrees": c.holds(self.level),
                "method": c.method,
            }
            for c in self.checks
        ]


def verify_consolidation(
    model: Callable[..., Any],
    fused: Fused,
    interventions: Iterable[Mapping[str, Any]] | None = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    draws: int = 2000,
    level: float = 0.01,
    seed: int = 0,
) -> VerificationReport:
    """Compares a consolidated model with the original, intervention by intervention.

    The joint distributions of the sites that both have are compared: by mean and
    covariance where both programs are jointly affine-Gaussian, by all joint values
    where both are finite and these are few, and by draws and a two-sample test
    otherwise. The programs are run; nothing that consolidation found is used.

    :param model: the original.
    :param fused: what became of it.
    :param interventions: which to compare; by default none, each allowed one (free
        sites at a value that they may well have) and some pairs.
    :param draws: of each program where draws are compared.
    :param level: of the two-sample tests, each adjusted for all sites.
    :param seed: of draws and permutations.
    :raises InterventionNotAllowed: if one is not allowed.

    >>> import pyro.distributions as dist, pyro_macro as pm
    >>> def model():
    ...     a = pyro.sample("a", dist.Normal(0.0, 1.0))
    ...     b = pyro.sample("b", dist.Normal(2 * a, 1.0))
    ...     c = pyro.sample("c", dist.Normal(a - b, 1.0))
    >>> fused = pm.consolidate(model, keep=["a", "c"], allow=["b"])
    >>> print(pm.verify_consolidation(model, fused, [{}, {"b": 1.0}]))
    All 2 interventions agree.
    intervention  difference  p-value  agrees                  method
            none           0              yes  exact: affine-Gaussian
       do(b = 1)           0              yes  exact: affine-Gaussian
    """
    if not isinstance(fused, Fused):
        raise PyroMacroError(
            f"verify_consolidation: {fused!r} is no consolidated model. Expected "
            "verify_consolidation(model, consolidate(model, ...))."
        )
    kwargs = dict(model_kwargs or {})
    made = [dict(one) for one in interventions or ()]
    if interventions is None:
        made = _typical(fused)
    checks = []
    for one in tqdm(made, desc="Verifying", disable=len(made) < 20, leave=False):
        fused.allowed.check(one, fused.sites)
        names = [n for n in fused.kept if n not in one]
        settings = {n: torch.as_tensor(v).to(fused.typical(n)) for n, v in one.items()}
        programs: list[Model] = [(m, tuple(model_args), kwargs) for m in (model, fused)]
        checks.append(_checked(one, programs, names, settings, draws, seed))
    return VerificationReport(checks, level)


def _checked(
    one: dict[str, Any],
    programs: Sequence[Model],
    names: list[str],
    settings: dict[str, Tensor],
    draws: int,
    seed: int,
) -> Check:
    if not names:
        return Check(one, "nothing else is kept", 0.0, None)
    with detached(), preserved_params():
        with preserved_random_state():
            torch.manual_seed(seed)
            moments = [_moments(p, names, settings) for p in programs]
            if moments[0] is not None and moments[1] is not None:
                difference = _far(moments[0], moments[1])
                return Check(one, "exact: affine-Gaussian", difference, None)
            tables = [_table(p, names, settings) for p in programs]
            if tables[0] is not None and tables[1] is not None:
                values = {*tables[0], *tables[1]}
                pairs = [(tables[0].get(v, 0.0), tables[1].get(v, 0.0)) for v in values]
                difference = max(abs(a - b) for a, b in pairs)
                return Check(one, "exact: finite", difference, None)
    wide = {n: v.expand((draws, *v.shape)) for n, v in settings.items()}
    samples = [
        drawn(p, names, draws, wide, seed + i).cpu() for i, p in enumerate(programs)
    ]
    spread = samples[0].std(0).clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    size = len(spread)
    mixed = torch.randn(
        PROJECTIONS, size, generator=generator, dtype=torch.float64, device="cpu"
    )
    mixed = (
        torch.cat([torch.eye(size, dtype=torch.float64, device="cpu"), mixed]) / spread
    )
    first, second = (mixed @ sample.T for sample in samples)
    found = compare(first, second, 0.05, seed=seed)
    distance, p_value = float(found.distance.max()), float(found.p_value.min())
    return Check(one, "Monte Carlo", distance, p_value)


def _intervened(program: Model, settings: Mapping[str, Tensor]) -> Model:
    model, args, kwargs = program
    return pyro.poutine.do(Unobserved()(model), dict(settings)), args, kwargs


def _moments(
    program: Model, names: Sequence[str], settings: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of some sites; ``None`` if they are not jointly Gaussian."""
    program = _intervened(program, settings)
    zero = NoiseRun(names, {}, {}, ())
    with torch.enable_grad():
        zero.run(*program)
        vector = _vector(zero.sites, names)
        view = NoiseView(vector, list(zero.noises.values()), False)
        rows = view.backward(torch.eye(len(vector)).to(vector))
    opaque = [n for n in zero.opaque if n in names or _matters(n, zero.sites, names)]
    if opaque or any(zero.sites[n].kinks for n in names):
        return None
    for sign in (1, -1):
        probe = NoiseRun(names, {}, {}, (), sign, zero.sites)
        with torch.no_grad():
            probe.run(*program)
        moves = [
            row.reshape(len(row), -1) @ probe.drawn[key].flatten().to(row)
            for key, row in rows.items()
        ]
        zeros = torch.zeros_like(vector)
        found = _vector(probe.sites, names)
        precision = torch.finfo(vector.dtype).eps
        if not agree(vector, moves or [zeros], found, precision):
            return None
    factor = vector.new_zeros(len(vector), 1, dtype=torch.float64)
    factor = torch.cat(
        [factor, *(r.reshape(len(r), -1).double() for r in rows.values())], -1
    )
    return vector.detach().double(), factor @ factor.mT


def _matters(name: str, sites: Mapping[str, Site], names: Sequence[str]) -> bool:
    """Whether some sites are computed from one."""
    reached = {name}
    for site in sites.values():
        if site.parents & reached:
            reached.add(site.name)
    return not reached.isdisjoint(names)


def _vector(sites: Mapping[str, Site], names: Sequence[str]) -> Tensor:
    parts = [sites[n].expanded(sites[n].value).reshape(-1) for n in names]
    floats = [p if p.is_floating_point() else p.float() for p in parts]
    return torch.cat(floats)


def _far(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The largest difference, in standard deviations where there are some."""
    spread = one[1].diagonal().sqrt()
    scale = torch.where(spread > 0, spread, one[0].abs().clamp(min=1.0))
    mean = ((one[0] - other[0]).abs() / scale).max()
    covariance = ((one[1] - other[1]).abs() / torch.outer(scale, scale)).max()
    # What float32 cannot tell from zero is none
    return float(torch.stack([mean, covariance]).max().round(decimals=7))


def _table(
    program: Model, names: Sequence[str], settings: Mapping[str, Tensor]
) -> dict[tuple[float, ...], float] | None:
    """Probabilities of all joint values; ``None`` if there are too many."""
    model, args, kwargs = _intervened(program, settings)
    trace = pyro.poutine.trace(model).get_trace(*args, **kwargs)
    supports: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if is_deterministic(node) or name in settings:
            continue
        if node["is_observed"]:
            continue  # of poutine.do
        values = finite_values(node["fn"])
        if values is None:
            return None
        value: Any = node["value"]
        supports[name], shapes[name] = values, value.shape
    counts = [len(v) ** shapes[n].numel() for n, v in supports.items()]
    if torch.tensor(counts, dtype=torch.float64, device="cpu").prod() > JOINT:
        return None
    each = [_states(v, shapes[n]) for n, v in supports.items()]
    found: dict[tuple[float, ...], float] = {}
    for states in itertools.product(*each):
        data = dict(zip(supports, states, strict=True))
        fixed = pyro.poutine.condition(model, data)
        run = pyro.poutine.trace(fixed).get_trace(*args, **kwargs)
        run.compute_log_prob(lambda name, site: name in supports)
        nodes: Any = run.nodes
        total = sum(float(nodes[n]["log_prob_sum"]) for n in supports)
        key = tuple(float(x) for n in names for x in nodes[n]["value"].flatten())
        found[key] = found.get(key, 0.0) + float(
            torch.tensor(total, device="cpu").double().exp()
        )
    return found


def _states(values: Tensor, shape: torch.Size) -> list[Tensor]:
    """All values of a site."""
    rows = itertools.product(values, repeat=shape.numel())
    return [torch.stack(row).reshape(shape) for row in rows]


def _typical(fused: Fused) -> list[dict[str, Any]]:
    """Allowed interventions, free sites at a value of another draw."""
    values = {n: fused.typical(n) for n in sorted(fused.allowed.free)}
    values = {n: v for n, v in values.items() if n not in fused.sites}
    singles: list[dict[str, Any]] = [{n: v} for n, v in values.items()]
    pairs = itertools.islice(itertools.combinations(values, 2), PAIRS)
    together = [{n: values[n] for n in pair} for pair in pairs]
    return [{}, *singles, *fused.allowed.explicit, *together]


def _named(intervention: Mapping[str, Any]) -> str:
    parts = []
    for name, value in intervention.items():
        tensor = torch.as_tensor(value)
        shown = f"{float(tensor):.4g}" if tensor.numel() == 1 else "..."
        parts.append(f"do({name} = {shown})")
    return ", ".join(parts) or "none"
