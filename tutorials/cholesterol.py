# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is the effect of total cholesterol? That depends on how it is changed.

442 diabetes patients: lipids in the blood, and the progression of the disease a year
later. Total cholesterol is a sum: LDL + HDL + the remainder. One Bayesian model of the
parts, and five ways to realize ``do(total := 240 mg/dl)``.

Run ``python tutorials/cholesterol.py``: a table, and a plot in ``cholesterol.png``.
The text at the end says how to read them.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

import pyro_macro as pm

try:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from sklearn.datasets import load_diabetes
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f'{error.name} is not installed: run `pip install "pyro_macro[demo]"`.'
    ) from None

COVARIATES = ("age", "sex", "bmi", "bp")
LIPIDS = ("LDL", "HDL", "remainder")
PARAMETERS = (
    "lipid_mean",
    "lipid_slopes",
    "lipid_sd",
    "lipid_correlation",
    "intercept",
    "lipid_effects",
    "covariate_effects",
    "progression_sd",
)
TOTAL = pm.MacroVariable("total", micro="lipids")  # the sum of the three parts
TARGET = 240.0

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {
    "natural": "#0072B2",
    "LDL alone": "#E69F00",
    "HDL alone": "#009E73",
    "remainder alone": "#D55E00",
    "in proportion": "#CC79A7",
}


@dataclass(frozen=True)
class Patients:
    """The data, as tensors of one row a patient.

    :ivar covariates: age, sex, BMI and blood pressure, standardised.
    :ivar lipids: LDL, HDL and the remainder, in mg/dl.
    :ivar progression: the progression score after a year.
    """

    covariates: Tensor
    lipids: Tensor
    progression: Tensor

    def __len__(self) -> int:
        return len(self.progression)

    @property
    def total(self) -> Tensor:
        """Total cholesterol, in mg/dl."""
        return self.lipids.sum(-1)


@dataclass(frozen=True)
class Response:
    """Posterior draws under one realization, averaged over the patients.

    :ivar totals: the grid of macro values, shape ``(grid,)``.
    :ivar progression: expected progression, shape ``(draws, grid)``.
    :ivar lipids: LDL, HDL and the remainder, shape ``(draws, grid, 3)``.
    """

    totals: Tensor
    progression: Tensor
    lipids: Tensor

    def slopes(self) -> Tensor:
        """Draws of the effect of a mg/dl on expected progression, shape ``(draws,)``.

        The curves are straight. A line through the whole of one averages out the
        randomness of the micro states, and leaves that of the posterior.
        """
        centred = self.totals - self.totals.mean()
        return self.progression @ centred / centred.square().sum()

    def lipids_at(self, total: float) -> Tensor:
        """The mean lipids under ``do(total)``, for a value of the grid."""
        nearest = (self.totals - total).abs().argmin()
        return self.lipids[:, nearest].mean(0)


def load_patients() -> Patients:
    """The diabetes data that comes with scikit-learn, with the remainder computed."""
    frame = load_diabetes(scaled=False, as_frame=True).frame
    frame = frame.rename(columns={"s2": "LDL", "s3": "HDL"})
    frame["remainder"] = frame["s1"] - frame["LDL"] - frame["HDL"]

    def tensor(names: Sequence[str]) -> Tensor:
        values = frame[list(names)].to_numpy(copy=True)
        return torch.as_tensor(values, dtype=torch.get_default_dtype())

    covariates = tensor(COVARIATES)
    return Patients(
        covariates=(covariates - covariates.mean(0)) / covariates.std(0),
        lipids=tensor(LIPIDS),
        progression=tensor(["target"]).squeeze(-1),
    )


def model(patients: Patients, observed: bool = True) -> None:
    """Lipids given the covariates, and progression given both; all of it linear.

    The parameters are on standardised scales, where a standard normal is a weak prior.

    :param observed: whether lipids and progression are conditioned on.
    """
    centre, unit = patients.lipids.mean(0), patients.lipids.std(0)
    origin, spread = patients.progression.mean(), patients.progression.std()

    def normal(*shape: int) -> dist.TorchDistribution:
        return dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape))

    lipid_mean = pyro.sample("lipid_mean", normal(3))
    lipid_slopes = pyro.sample("lipid_slopes", normal(3, 4))
    lipid_sd = pyro.sample("lipid_sd", dist.HalfNormal(1.0).expand([3]).to_event(1))
    factor = pyro.sample("lipid_correlation", dist.LKJCholesky(3))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    lipid_effects = pyro.sample("lipid_effects", normal(3))
    covariate_effects = pyro.sample("covariate_effects", normal(4))
    progression_sd = pyro.sample("progression_sd", dist.HalfNormal(1.0))

    covariates = patients.covariates
    with pyro.plate("patients", len(patients)):
        usual = lipid_mean + (lipid_slopes * covariates.unsqueeze(-2)).sum(-1)
        lipids = pyro.sample(
            "lipids",
            dist.MultivariateNormal(
                centre + unit * usual,
                scale_tril=(unit * lipid_sd).unsqueeze(-1) * factor,
            ),
            obs=patients.lipids if observed else None,
        )
        expected = (
            intercept
            + ((lipids - centre) / unit * lipid_effects).sum(-1)
            + (covariates * covariate_effects).sum(-1)
        )
        pyro.sample(
            "progression",
            dist.Normal(origin + spread * expected, spread * progression_sd),
            obs=patients.progression if observed else None,
        )
    average = origin + spread * expected.mean(-1, keepdim=True)
    pyro.deterministic("mean_progression", average, event_dim=0)
    pyro.deterministic("mean_lipids", lipids.mean(-2, keepdim=True), event_dim=1)


def fit(
    patients: Patients,
    num_samples: int = 500,
    warmup_steps: int = 250,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Posterior draws of the parameters, by NUTS."""
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        disable_progbar=not progress,
    )
    mcmc.run(patients)
    samples = mcmc.get_samples()
    return {name: samples[name] for name in PARAMETERS}


def check_mixing(posterior: Mapping[str, Tensor], limit: float = 1.05) -> float:
    """The largest split R-hat of all parameters; an error where it is above limit."""
    worst = 0.0
    for name, draws in posterior.items():
        rhat = split_gelman_rubin(draws.unsqueeze(0))
        found = float(rhat.nan_to_num(nan=1.0).max())  # constant elements have none
        if found > limit:
            raise RuntimeError(
                f"NUTS has not mixed: split R-hat of {name!r} is {found:.3f}. Expected "
                f"at most {limit}. Draw more samples (--samples)."
            )
        worst = max(worst, found)
    return worst


def realizations(total: float | Tensor) -> dict[str, pm.Realization]:
    """Five ways to realize ``do(total)``. Parameters are held, not integrated out."""
    alone = {
        f"{name} alone": pm.Residual(total, absorb=index, given=PARAMETERS)
        for index, name in enumerate(LIPIDS)
    }
    return {
        "natural": pm.Natural(total, given=PARAMETERS),
        **alone,
        "in proportion": pm.Proportional(total),
    }


def respond(
    patients: Patients,
    posterior: Mapping[str, Tensor],
    realization: pm.Realization,
    totals: Tensor,
    portion: int = 100,
) -> Response:
    """Runs the intervened model, vectorized over posterior draws, grid and patients.

    :param realization: its value has shape ``(grid, 1)``: along the plate "grid", and
        the same for all patients.
    :param portion: how many draws to run at a time, which bounds the memory.
    """
    intervened = pm.macro_do(model, {TOTAL: realization})

    def on_grid(patients: Patients) -> None:
        with pyro.plate("grid", len(totals), dim=-2):
            intervened(patients, observed=False)

    sites = ("mean_progression", "mean_lipids")
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(posterior["intercept"]), portion):
        # Room for the plates "grid" and "patients" between the draws and the events
        draws = {
            k: v[start : start + portion, None, None] for k, v in posterior.items()
        }
        predictive = Predictive(on_grid, draws, return_sites=sites, parallel=True)
        for site, values in predictive(patients).items():
            found[site].append(values)
    progression, lipids = (torch.cat(found[site]) for site in sites)
    return Response(totals, progression.squeeze(-1), lipids.squeeze(-2))


def respond_all(
    patients: Patients,
    posterior: Mapping[str, Tensor],
    totals: Tensor,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Response]:
    """The responses under all five realizations, with common random numbers."""
    found = {}
    todo = realizations(totals.unsqueeze(-1))
    for name, realization in tqdm(todo.items(), disable=not progress):
        pyro.set_rng_seed(seed)
        found[name] = respond(patients, posterior, realization, totals)
    return found


def least_squares(columns: Sequence[Tensor], outcome: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of a regression with intercept, and their standard errors."""
    design = torch.cat([torch.ones(len(outcome), 1), *columns], -1)
    solution = torch.linalg.lstsq(design, outcome.unsqueeze(-1)).solution.squeeze(-1)
    rest = outcome - design @ solution
    variance = rest.square().sum() / (len(outcome) - design.shape[1])
    errors = (variance * torch.linalg.inv(design.T @ design).diagonal()).sqrt()
    return solution[1:], errors[1:]


def regressions(patients: Patients) -> pd.DataFrame:
    """What least squares says about a mg/dl, given the covariates.

    One regression on the three parts, and one on their total. The first also gives the
    figure for a change in proportion: the slopes, times the mean mix of the patients.
    """
    lipids, covariates = patients.lipids, patients.covariates
    parts, part_errors = least_squares([lipids, covariates], patients.progression)
    whole, whole_errors = least_squares(
        [patients.total.unsqueeze(-1), covariates], patients.progression
    )
    mix = (lipids / lipids.sum(-1, keepdim=True)).mean(0)
    rows = {"natural": (float(whole[0]), float(whole_errors[0]))}
    for index, name in enumerate(LIPIDS):
        rows[f"{name} alone"] = (float(parts[index]), float(part_errors[index]))
    rows["in proportion"] = (float(parts[:3] @ mix), float("nan"))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["slope", "error"])


def summarize(
    responses: Mapping[str, Response], regression: pd.DataFrame, low: float, high: float
) -> pd.DataFrame:
    """One row a realization: what it does to the lipids, and to progression."""
    rows = {}
    for name, response in responses.items():
        slopes = response.slopes()
        effect = slopes * (high - low)
        lower, upper = effect.quantile(torch.tensor([0.025, 0.975])).tolist()
        rows[name] = {
            **dict(zip(LIPIDS, response.lipids_at(high).tolist(), strict=True)),
            "effect": float(effect.mean()),
            "sd": float(effect.std()),
            "lower": lower,
            "upper": upper,
            "per mg/dl": float(slopes.mean()),
            "sd per mg/dl": float(slopes.std()),
            "least squares": regression["slope"][name],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def check_against_least_squares(table: pd.DataFrame) -> None:
    """An error where the posterior and least squares tell different stories.

    The priors are weak and the model is linear and Gaussian, so that the two have to
    agree to within a posterior standard deviation.
    """
    for name, row in table.iterrows():
        gap = abs(row["per mg/dl"] - row["least squares"])
        if not gap <= row["sd per mg/dl"]:
            raise RuntimeError(
                f"{name}: the posterior says {row['per mg/dl']:+.3f} per mg/dl, least "
                f"squares says {row['least squares']:+.3f}. Expected a difference of "
                f"at most one posterior standard deviation, {row['sd per mg/dl']:.3f}. "
                "Look at the sampler and at the priors."
            )


def outside(lipids: Tensor, patients: Patients) -> Tensor:
    """Which mean lipids lie outside of what any of the patients has."""
    lowest, highest = patients.lipids.amin(0), patients.lipids.amax(0)
    return (lipids < lowest) | (lipids > highest)


def print_table(
    table: pd.DataFrame, regression: pd.DataFrame, patients: Patients, low: float
) -> None:
    """Prints what :func:`summarize` found, with the regressions beside it."""
    print(
        f"\nTotal cholesterol from {low:.1f} mg/dl, the observed mean, to {TARGET:g}, "
        "each realization on\nits own. Effect: E[progression | do(240)] - "
        "E[progression | do(mean)], averaged over\nthe patients, given age, sex, BMI "
        "and blood pressure.\n"
    )
    print(
        f"{'':15}  {'mean lipids at 240':^23}  {'effect on progression':^30}  "
        f"{'per mg/dl':^19}"
    )
    print(
        f"{'realization':15}  {'LDL':>6}  {'HDL':>6}  {'rest':>6}   "
        f"{'mean':>6} {'sd':>5}  {'95% interval':>16}  "
        f"{'mean':>6} {'sd':>5} {'OLS':>6}"
    )
    for name, row in table.iterrows():
        lipids = torch.tensor([row[part] for part in LIPIDS])
        marks = ["*" if far else " " for far in outside(lipids, patients)]
        levels = " ".join(
            f"{x:6.1f}{mark}" for x, mark in zip(lipids.tolist(), marks, strict=True)
        )
        interval = f"[{row['lower']:+.1f}, {row['upper']:+.1f}]"
        print(
            f"{name:15}  {levels}  {row['effect']:+6.1f} {row['sd']:5.1f}  "
            f"{interval:>16}  {row['per mg/dl']:+6.2f} {row['sd per mg/dl']:5.2f} "
            f"{row['least squares']:+6.2f}"
        )
    whole = regression.loc["natural"]
    print(
        "\n* beyond what any of the patients has: there the model extrapolates\n"
        "OLS: least squares on the same patients, given the covariates. For natural "
        "it is the\nobservational regression of progression on total cholesterol, "
        f"{whole['slope']:+.2f} per mg/dl (standard\nerror {whole['error']:.2f}); for "
        "the rows below, that on the three lipids. The posterior agrees with\nall "
        "five, to within one posterior standard deviation."
    )


def plot(
    responses: Mapping[str, Response], regression: pd.DataFrame, patients: Patients
) -> Figure:
    """Dose-response curves, one line a realization, with 95% bands."""
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    axes = figure.add_subplot()
    for name, response in responses.items():
        totals, colour = response.totals, COLOURS[name]
        centre = response.progression.mean(0)
        lower, upper = response.progression.quantile(torch.tensor([0.025, 0.975]), 0)
        far = outside(response.lipids.mean(0), patients).any(-1)
        within = centre.masked_fill(far, float("nan"))
        axes.fill_between(totals, lower, upper, color=colour, alpha=0.13, linewidth=0)
        axes.plot(totals, centre, color=colour, linewidth=1.3, linestyle=":")
        axes.plot(totals, within, color=colour, linewidth=2.6)

    mean, slope = float(patients.total.mean()), regression["slope"]["natural"]
    line = patients.progression.mean() + slope * (totals - mean)
    axes.plot(totals, line, color="black", linewidth=1.5, linestyle=(0, (4, 3)))
    axes.axvline(mean, color="0.6", linewidth=1.0, zorder=0)
    axes.set_xlim(float(totals[0]), float(totals[-1]))
    _annotate(axes, responses, mean)
    return figure


def _annotate(axes: Axes, responses: Mapping[str, Response], mean: float) -> None:
    """Labels at the right ends of the lines, and what the axes and lines are."""
    right = axes.get_xlim()[1]
    ends = {name: float(r.progression[:, -1].mean()) for name, r in responses.items()}
    bottom, top = axes.get_ylim()
    places = spread_out(list(ends.values()), gap=0.055 * (top - bottom))
    for (name, end), place in zip(ends.items(), places, strict=True):
        axes.annotate(
            name,
            xy=(right, end),
            xytext=(right + 9, place),
            color=COLOURS[name],
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": COLOURS[name], "shrinkB": 0},
        )
    axes.annotate(
        f"observed mean\n{mean:.0f} mg/dl",
        xy=(mean, top),
        xytext=(5, -5),
        textcoords="offset points",
        va="top",
        color="0.35",
    )
    styles: dict[str, dict[str, Any]] = {
        "within the range of the patients": {"color": "0.35", "lw": 2.6},
        "beyond it: extrapolation": {"color": "0.35", "lw": 1.3, "ls": ":"},
        "observational regression on the total": {
            "color": "black",
            "lw": 1.5,
            "ls": (0, (4, 3)),
        },
    }
    lines = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    axes.figure.legend(handles=lines, loc="outside lower left", ncols=3, frameon=False)
    axes.set_xlabel("do(total cholesterol), mg/dl")
    axes.set_ylabel("expected disease progression after a year, score")
    axes.set_title(
        "One intervention on total cholesterol, five realizations\n"
        "(442 patients; posterior mean and 95% interval)",
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)


def spread_out(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart, in their order, until no two are closer than ``gap``."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    for _ in range(100):
        for below, above in zip(order, order[1:], strict=False):
            missing = max(0.0, gap - (placed[above] - placed[below]))
            placed[below] -= missing / 2
            placed[above] += missing / 2
    return placed


def print_reading(table: pd.DataFrame, low: float) -> None:
    """What to read off the table and the plot."""
    rise = TARGET - low
    natural, ldl = table.loc["natural"], table.loc["LDL alone"]
    hdl, rest = table.loc["HDL alone"], table.loc["remainder alone"]
    paragraphs = [
        '"The effect of total cholesterol" is not defined until its realization is. '
        f"The same {rise:+.0f} mg/dl goes with {rest['effect']:+.0f} points of "
        f"progression if the remainder takes it up, {hdl['effect']:+.0f} if HDL does, "
        f"and about none ({ldl['effect']:+.0f}, with an interval on both sides of "
        "zero) if LDL does: harmful, protective or neutral, by what is in the sum.",
        f"The figure of the regression on the total, {natural['least squares']:+.2f} "
        "per mg/dl, is the effect of the natural realization, and of that alone: of a "
        "change in the mix that looks like the differences found among patients of "
        "the same age, sex, BMI and blood pressure. A treatment that acts on one of "
        "the lipids is another intervention and has another effect. So ask what a "
        "treatment does to the parts, not what it does to the total.",
        "All of this assumes the linear model and no unmeasured confounding of lipids "
        "and progression, which nobody has checked here. It is a demonstration, not "
        "medical advice.",
    ]
    for paragraph in paragraphs:
        print("\n" + textwrap.fill(paragraph, 86))


def main(arguments: Sequence[str] | None = None) -> None:
    """The whole job: fit, intervene, check, print and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="cholesterol.png", help="where to plot")
    parser.add_argument("--samples", type=int, default=500, help="posterior draws")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(options.seed)
    patients = load_patients()
    low = float(patients.total.mean())
    totals = torch.cat([torch.arange(120.0, 301.0, 10.0), torch.tensor([low])])

    print(f"Fitting the model to {len(patients)} patients by NUTS.")
    posterior = fit(patients, num_samples=options.samples)
    worst = check_mixing(posterior)
    print(f"{options.samples} draws, split R-hat at most {worst:.3f}. Intervening.")
    responses = respond_all(
        patients, posterior, totals.sort().values, seed=options.seed, progress=True
    )

    regression = regressions(patients)
    table = summarize(responses, regression, low, TARGET)
    check_against_least_squares(table)
    print_table(table, regression, patients, low)
    print_reading(table, low)
    plot(responses, regression, patients).savefig(options.output, dpi=150)
    print(f"\nThe curves over {totals[0]:g} to 300 mg/dl are in {options.output}.")


if __name__ == "__main__":
    main()
