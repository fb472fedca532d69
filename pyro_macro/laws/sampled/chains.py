# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The law of a continuous micro state given its macro value, by NUTS on the fibre."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.base import MicroFibre, MicroLaw
from pyro_macro.laws.elements import Elements, elements_of
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.laws.finite.tables import Fibre
from pyro_macro.laws.sampled.coordinates import linear_coordinates, smooth_coordinates
from pyro_macro.laws.upstream import Evidence, Upstream
from pyro_macro.program.inner import (
    Site,
    ValuedRun,
    preserved_random_state,
    unwrapped,
)
from pyro_macro.program.substitution import Substituted, apart
from pyro_macro.program.tracking import tensors_in


class NotConverged(UserWarning):
    """Chains whose draws should not be trusted."""


@dataclass(frozen=True)
class Chains:
    """How :class:`~pyro_macro.Natural` samples where no exact law is known.

    :param num_samples: draws of each chain.
    :param warmup_steps: of each chain.
    :param num_chains: run one after the other.
    :param progress: whether to show a progress bar.
    """

    num_samples: int = 500
    warmup_steps: int = 300
    num_chains: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_samples", "warmup_steps", "num_chains"):
            number = getattr(self, name)
            least = 4 if name == "num_samples" else 1
            if not isinstance(number, int) or number < least:
                raise PyroMacroError(
                    f"Chains: {name}={number!r}. Expected a whole number, at least "
                    f"{least}."
                )


class SampledLaw(MicroLaw):
    """Draws of a micro state on its fibre.

    Each new draw is one of the stored ones. There is no density: the law is known up
    to a factor only.

    :param draws: shape ``(n,) + batch + (K,)``.
    :param fibre: the micro states with the macro value.
    :ivar r_hat: the largest split Gelman-Rubin statistic of an element.
    :ivar effective: the least effective sample size of an element.
    """

    def __init__(
        self, draws: Tensor, fibre: MicroFibre, r_hat: float, effective: float
    ) -> None:
        self.draws, self._fibre = draws, fibre
        self.r_hat, self.effective = r_hat, effective
        super().__init__(draws.shape[1:-1], draws.shape[-1:])
        self._own = draws.shape[1:-1]

    @property
    def method(self) -> str:  # type: ignore[override]
        return (
            f"Monte Carlo: NUTS on the fibre, {len(self.draws)} draws, R-hat "
            f"{self.r_hat:.3f}, effective sample size {self.effective:.0f}"
        )

    @property
    def cost(self) -> str:
        return "chains once for each value, then one stored state a draw"

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return self._fibre

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        own = Size([1] * (len(shape) - len(self._own))) + self._own
        # Slots of one draw belong together; others are draws of their own
        apart_shape = Size(n if m == 1 else 1 for n, m in zip(shape, own, strict=True))
        device = self.draws.device
        which = torch.randint(len(self.draws), apart_shape, device=device)
        which = which.expand(shape).flatten()
        stored = self.draws.reshape(len(self.draws), -1, *self.event_shape)
        drawn = stored[which, self._rows(self._own, shape, which)]
        return drawn.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        raise UnsupportedLaw(
            "the law of this micro state is known by draws of NUTS on the fibre, "
            "without a normalized density, and cannot be used where one is needed "
            "(SVI, NUTS, Importance, log_prob_sum). Use Predictive, or an amortized "
            "law, Natural(value, sampler=Flow(low, high)), which has one."
        )


class _ReferenceRun(ValuedRun):
    """The same draws in every run of the same program."""

    def otherwise(self, site: Site) -> Tensor:
        with preserved_random_state(), torch.no_grad():
            torch.manual_seed(len(self.sites))
            return site.fn.sample()


def _reference(upstream: Upstream) -> dict[str, Site]:
    """The sites of such a run."""
    run = _ReferenceRun(upstream.until, upstream.shared, upstream.held)
    run.run(*upstream.model)
    return run.sites


class OnFibre:
    """A program as a density on the coordinates of a fibre.

    :param upstream: the program.
    :param fibre: what its micro state is asked to meet.
    :param given: what is known besides.
    """

    def __init__(
        self, upstream: Upstream, fibre: Fibre, given: Sequence[Evidence]
    ) -> None:
        self.upstream, self.fibre = upstream, fibre
        names, what = fibre.layout.names, fibre.what
        relevant, known = upstream.relevant(names, given, what)
        self._refuse(known)
        sites = upstream.sites
        self.counted = [
            name for name in sites if name in relevant and not sites[name].deterministic
        ]
        self.known = [n for e in known for n in e.sites]
        self.counted += [n for n in self.known if n not in self.counted]
        self.reference = _reference(upstream)
        self.held = dict(upstream.held)
        self.worlds = self._worlds()
        self.event_dim = fibre.aggregation.event_dim

    def _refuse(self, known: Sequence[Evidence]) -> None:
        upstream, what = self.upstream, self.fibre.what
        for e in known:
            if e.macro is not None:
                raise UnsupportedLaw(
                    f"{what}: its law given {e.name!r} is not known in closed form. "
                    f"Hold the sites of {e.name!r} instead: given={list(e.sites)}."
                )
        names = self.fibre.layout.names
        for name in upstream.causes(names, known) or ():
            own = unwrapped(upstream.sites[name].fn)
            if own.support.is_discrete and finite_values(own) is None:
                raise UnsupportedLaw(
                    f"{what}: the micro state depends on {name!r}, which is "
                    f"{type(own).__name__}, with infinitely many values (or vectors of "
                    f"them) to sum over. Hold it at its value: given=[{name!r}]."
                )
        for name in names:
            own = unwrapped(upstream.sites[name].fn)
            if not own.support.is_discrete:
                continue
            above = sorted(upstream.causes([name], []) or ())
            if above:
                reason = f"depends on {above}, not all of finite support"
            elif own.event_shape:
                reason = "its values are vectors"
            elif finite_values(own) is None:
                reason = "has infinitely many values on the fibre"
            else:
                reason = "others of the same macro-variable are not finite"
            raise UnsupportedLaw(
                f"{what}: micro site {name!r} is {type(own).__name__}, and {reason}. "
                "Expected finite sites, counts whose sum is given, or continuous "
                f"sites. {f'Hold them: given={above}.' if above else 'Use Explicit.'}"
            )

    def _worlds(self) -> dict[int, int]:
        """Dimensions that are no plates of the program: worlds of their own."""
        layout, value = self.fibre.layout, self.fibre.value
        event_dim = self.fibre.aggregation.event_dim
        batch = value.shape[: value.dim() - event_dim]
        sizes = {d: batch[d] for d in range(-len(batch), 0)}
        for statement in self.upstream.shared.values():
            sizes |= {d: n for d, n in statement.outside.items()}
        return {d: n for d, n in sizes.items() if n > 1 and d not in layout.batch}

    def identity(
        self, with_value: bool = True, reference: Mapping[str, Site] | None = None
    ) -> str:
        """What the law depends on, in short: equal for equal laws.

        :param with_value: whether that includes the macro value.
        :param reference: the sites of another reference run than the own.
        """
        sites = self.reference if reference is None else reference
        digest = hashlib.sha256()
        if with_value:
            digest.update(self._bytes(self.fibre.value))
        for name in self.counted:
            site = sites[name]
            for tensor in tensors_in(site.fn):
                digest.update(self._bytes(tensor))
            if name in self.known:
                digest.update(self._bytes(site.value))
        return digest.hexdigest()

    @staticmethod
    def _bytes(tensor: Tensor) -> bytes:
        return tensor.detach().cpu().contiguous().numpy().tobytes()

    def refuse_chance(self) -> None:
        """An error if the program draws numbers that Pyro does not see."""
        before = self.identity()
        with preserved_random_state():
            torch.manual_seed(1)
            after = self.identity(reference=_reference(self.upstream))
        if before != after:
            raise UnsupportedLaw(
                f"{self.fibre.what}: two runs of the program at the same values "
                "differ: it draws numbers outside of Pyro (torch.randn, dropout). "
                "Make them sample sites."
            )

    def elements(self) -> Elements:
        """Where the elements of the micro state may be, and are likely to be."""
        return elements_of(self.reference, self.fibre.layout, self.fibre.what)

    def coordinates(self) -> Transform:
        """From unbounded coordinates to micro states on the fibre."""
        fibre, elements = self.fibre, self.elements()
        value = fibre.value.double()
        rows = fibre.aggregation.weights(
            elements.centre.reshape(-1, fibre.layout.size)[0]
        )
        if rows is not None:
            value = value if self.event_dim else value.unsqueeze(-1)
            return linear_coordinates(elements, rows, value, fibre.what)
        if self.event_dim:
            raise UnsupportedLaw(
                f"{fibre.what}: {fibre.aggregation!r} is a vector that is not linear. "
                "Expected a smooth function with a number as its value. Use Explicit."
            )
        generator = torch.Generator().manual_seed(0)
        shape = (64, *elements.centre.shape)
        noise = torch.randn(
            shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        noise = noise.to(elements.centre.device)
        states = elements.centre + elements.spread * noise
        low, high = elements.low, elements.high
        states = torch.where(
            states <= low, low + elements.spread * noise.abs() * 0.1, states
        )
        states = torch.where(
            states >= high, high - elements.spread * noise.abs() * 0.1, states
        )
        return smooth_coordinates(
            elements, fibre.aggregation, value, states, fibre.what
        )

    def shape(self, transform: Transform) -> Size:
        """That of the free coordinates."""
        layout = self.fibre.layout
        sizes = {**layout.batch, **self.worlds}
        depth = max((-d for d in sizes), default=0)
        batch = Size(sizes.get(d, 1) for d in range(-depth, 0))
        return transform.inverse_shape(batch + Size([layout.size]))

    def model(self, transform: Transform) -> Any:
        """A Pyro model of the free coordinates, and of all latent ancestors."""
        shape, layout = self.shape(transform), self.fibre.layout
        # Flat: what its draws are only matters for where chains start
        start = self.fibre.value.new_zeros(shape, dtype=torch.float64)
        free = dist.Normal(start, 0.5).to_event(len(shape)).mask(False)
        dtypes = {n: self.reference[n].value.dtype for n in layout.names}

        def on_fibre() -> Tensor:
            z = pyro.sample("fibre__free", free)
            state = transform(z)
            volume = transform.log_abs_det_jacobian(z, state)
            volume = volume + transform.log_coarea(state)  # type: ignore[attr-defined]
            pyro.factor("fibre__volume", volume.sum())
            micro = {
                name: value.to(dtypes[name])
                for name, value in layout.unstack(state).items()
            }
            self.run({**self.held, **micro}, self.worlds)
            return state

        return on_fibre

    def run(
        self, values: Mapping[str, Tensor], worlds: Mapping[int, int]
    ) -> dict[str, Tensor]:
        """Runs the program with some values, in plates for worlds of their own."""
        run = Substituted(
            self.upstream.model,
            self.counted,
            values,
            self.upstream.shared,
            self.reference,
        )
        with ExitStack() as plates:
            for dim, size in worlds.items():
                plates.enter_context(pyro.plate(f"fibre__world{dim}", size, dim=dim))
            return run.run()

    def constraint(self, coordinates: Transform | str) -> MicroFibre:
        """The fibre, with coordinates, or with the reason why there are none."""
        elements, aggregation = self.elements(), self.fibre.aggregation
        low, high = elements.low, elements.high
        return MicroFibre(
            lambda x: (x >= low.to(x)) & (x <= high.to(x)),
            aggregation,
            self.fibre.value,
            coordinates,
            event_dim=self.event_dim,
        )


def sampled_law(on_fibre: OnFibre, chains: Chains, dtype: torch.dtype) -> SampledLaw:
    """Runs the chains.

    The random state stays as it was; the seed of the chains is that of the global
    generator.

    :raises UnsupportedLaw: if the fibre has no coordinates.
    """
    what = on_fibre.fibre.what
    draws, diverged = [], 0
    with apart(torch.initial_seed() % (1 << 62)):
        on_fibre.refuse_chance()
        transform = on_fibre.coordinates()
        model = on_fibre.model(transform)
        for _ in range(chains.num_chains):
            kernel = NUTS(model, init_strategy=init_to_sample)
            mcmc = MCMC(
                kernel,
                num_samples=chains.num_samples,
                warmup_steps=chains.warmup_steps,
                disable_progbar=not chains.progress,
            )
            try:
                mcmc.run()
            except ValueError as error:
                if "valid initial params" not in str(error):
                    raise
                raise UnsupportedLaw(
                    f"{what}: no micro state of positive density was found on its "
                    "fibre, from which a chain could start. Expected a macro value "
                    "that the sites can have, and sites whose distribution knows its "
                    "support (a shifted one may call itself real). Use Explicit."
                ) from error
            diverged += sum(map(len, mcmc.diagnostics()["divergences"].values()))
            free = mcmc.get_samples()["fibre__free"]
            draws.append(transform(free).detach())
    states = torch.stack(draws)  # (chains, n, ..., K)
    r_hat, effective = _diagnose(states, diverged, what)
    constraint = on_fibre.constraint(
        f"{what}: its law is known by draws, without a density, so that NUTS, HMC and "
        "autoguides have no coordinates for it. Use Predictive, or an amortized law: "
        "Natural(value, sampler=Flow(low, high))."
    )
    return SampledLaw(states.flatten(0, 1).to(dtype), constraint, r_hat, effective)


def _diagnose(states: Tensor, diverged: int, what: str) -> tuple[float, float]:
    """Split R-hat and effective sample size; a warning if they, or the chains, are bad.

    :param states: shape ``(chains, draws, ..., K)``.
    :param diverged: how many draws came from trajectories that diverged.
    """
    count = states.shape[0] * states.shape[1]
    flat = states.flatten(2)
    flat = flat[..., flat.flatten(0, 1).std(0) > 0]
    r_hat, effective = float("inf"), 0.0
    if flat.shape[-1]:  # something moves
        r_hat = float(split_gelman_rubin(flat, chain_dim=0, sample_dim=1).max())
        effective = float(effective_sample_size(flat, chain_dim=0, sample_dim=1).min())
    if not (r_hat <= 1.05 and effective >= 100 and diverged <= 0.01 * count):
        warnings.warn(
            f"{what}: the chains on its fibre have not mixed: R-hat {r_hat:.3f} (at "
            f"most 1.05 expected), effective sample size {effective:.0f} (at least "
            f"100), {diverged} of {count} draws after a divergence (at most 1 %). Ask "
            "for more draws, Natural(value, sampler=Chains(num_samples="
            f"{4 * states.shape[1]})), or hold what makes scales vary: given=[...].",
            NotConverged,
            stacklevel=2,
        )
    return r_hat, effective
