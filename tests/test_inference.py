# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Inference under macro interventions, against conjugate closed forms.

Two problems. *Prices*: each day total sales were set to a value and realized
naturally, sales and revenue were seen; the posterior of the prices is Gaussian.
*Micro states*: prices are known, only revenue was seen; the posterior of the micro
state, a latent with K - 1 free coordinates, is Gaussian on the fibre.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.poutine import block, condition

import pyro_macro as pm

DAYS, NOISE = 12, 2.0
MU = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
SIGMA = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro="x", over="products")
TOTALS = torch.linspace(-2.0, 9.0, DAYS, dtype=torch.float64)
INTERVENTION = {SALES: pm.Natural(TOTALS.unsqueeze(-1))}


def shop(revenue=None):
    products = pyro.plate("products", 3, dim=-1)
    with products:
        alpha = pyro.sample("alpha", dist.Normal(2.0, 1.5))
    with pyro.plate("days", DAYS, dim=-2):
        with products:
            x = pyro.sample("x", dist.Normal(MU, SIGMA))
        mean = (alpha * x).sum(-1, keepdim=True)
        pyro.sample("revenue", dist.Normal(mean, NOISE), obs=revenue)


def data():
    """Sales and revenue of days on which total sales were set."""
    pyro.set_rng_seed(1)
    truth = condition(pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA})
    nodes = pyro.poutine.trace(truth).get_trace().nodes
    return nodes["sales__micro"]["value"], nodes["revenue"]["value"]


def posterior_of_prices(x, revenue):
    """Bayesian linear regression with known noise: mean and covariance."""
    x = x.reshape(DAYS, 3)
    precision = torch.eye(3) / 1.5**2 + x.mT @ x / NOISE**2
    shift = torch.full((3,), 2.0) / 1.5**2 + x.mT @ revenue.reshape(-1) / NOISE**2
    return torch.linalg.solve(precision, shift), torch.linalg.inv(precision)


def posterior_of_states(revenue):
    """P(x | total, revenue) a day: condition the Gaussian on two linear equations."""
    covariance = torch.diag(SIGMA**2)
    rows = torch.stack([torch.ones(3), ALPHA])
    crossed = covariance @ rows.mT
    seen = rows @ crossed + torch.diag(torch.tensor([0.0, NOISE**2]))
    gain = torch.linalg.solve(seen, crossed.mT).mT
    values = torch.stack([TOTALS, revenue.reshape(-1)], -1)
    mean = MU + (values - rows @ MU) @ gain.mT
    return mean, covariance - gain @ crossed.mT


def learn(model, guide, steps, elbo=None, lr=0.05):
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)})
    elbo = elbo or Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()


def nuts(model, samples=300, warmup=150):
    mcmc = MCMC(
        NUTS(model, jit_compile=False),
        num_samples=samples,
        warmup_steps=warmup,
        disable_progbar=True,
    )
    mcmc.run()
    return mcmc.get_samples(), mcmc.diagnostics()


def compare(samples, diagnostics, mean, variance):
    """Means within 5 Monte Carlo errors, variances within a third.

    The errors come from the effective sample sizes that the chain reports.
    """
    size = diagnostics["n_eff"].reshape(mean.shape).clamp(max=len(samples))
    error = (variance / size).sqrt()
    assert ((samples.mean(0).reshape(mean.shape) - mean).abs() < 5 * error).all()
    ratio = samples.var(0).reshape(mean.shape) / variance
    assert ((ratio - 1).abs() < 5 * (2 / size).sqrt()).all()


def test_nuts_learns_prices():
    x, revenue = data()
    model = condition(pm.macro_do(shop, INTERVENTION), {"sales__micro": x})
    seen = condition(model, {"revenue": revenue})
    samples, diagnostics = nuts(seen)
    mean, covariance = posterior_of_prices(x, revenue)
    compare(samples["alpha"], diagnostics["alpha"], mean, covariance.diagonal())


def test_nuts_infers_the_micro_state_from_revenue():
    _, revenue = data()
    known = condition(pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA})
    samples, diagnostics = nuts(condition(known, {"revenue": revenue}))
    states = samples["sales__micro"]
    assert states.shape[1:] == (DAYS, 1, 3)
    total = states.sum(-1) - TOTALS.unsqueeze(-1)
    assert total.abs().max() < 1e-10
    mean, covariance = posterior_of_states(revenue)
    variance = covariance.diagonal().expand(DAYS, 3)
    compare(states.reshape(-1, DAYS, 3), diagnostics["sales__micro"], mean, variance)


def test_svi_learns_prices_with_a_full_covariance():
    x, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"sales__micro": x, "revenue": revenue}
    )
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    learn(model, guide, 1000)
    mean, covariance = posterior_of_prices(x, revenue)
    found = guide.get_posterior()
    scale = covariance.diagonal().sqrt()
    assert ((found.mean - mean).abs() < 0.3 * scale).all()
    error = (found.covariance_matrix - covariance) / (scale[:, None] * scale)
    assert error.abs().max() < 0.2


def test_svi_infers_the_micro_state_in_k_minus_1_coordinates():
    """The guide lives on free coordinates: 2 a day, the third solved for."""
    _, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA, "revenue": revenue}
    )
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    learn(model, guide, 1000)
    assert guide.latent_dim == 2 * DAYS
    mean, covariance = posterior_of_states(revenue)
    found = guide.median()["sales__micro"].reshape(DAYS, 3)
    scale = covariance.diagonal().sqrt()
    assert ((found - mean).abs() < 0.3 * scale).all()
    states = guide()["sales__micro"]
    assert (states.sum(-1).reshape(-1) - TOTALS).abs().max() < 1e-10


def test_svi_with_a_diagonal_guide_finds_the_mean():
    x, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"sales__micro": x, "revenue": revenue}
    )
    guide = AutoNormal(model, init_scale=0.1)
    learn(model, guide, 1000)
    mean, covariance = posterior_of_prices(x, revenue)
    found = guide.median()["alpha"].reshape(3)
    # A diagonal Gaussian has the right mean, and the conditional variances
    spread = covariance.diagonal().sqrt()
    assert ((found - mean).abs() < 0.3 * spread).all()
    scale = pyro.param("AutoNormal.scales.alpha").detach().reshape(3)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert ((scale / expected - 1).abs() < 0.2).all()


def test_svi_with_enumeration_learns_prices():
    """A site of two kinds of days is summed out exactly: a mixture of regressions."""
    x, revenue = data()
    bonus = torch.tensor([0.0, 4.0])

    @config_enumerate
    def model():
        products = pyro.plate("products", 3, dim=-1)
        with products:
            alpha = pyro.sample("alpha", dist.Normal(2.0, 1.5))
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        with pyro.plate("days", DAYS, dim=-2):
            with products:
                sold = pyro.sample("x", dist.Normal(MU, SIGMA))
            mean = (alpha * sold).sum(-1, keepdim=True) + bonus[kind.long()]
            pyro.sample("revenue", dist.Normal(mean, NOISE), obs=revenue)

    seen = condition(pm.macro_do(model, INTERVENTION), {"sales__micro": x})
    guide = AutoMultivariateNormal(block(seen, hide=["kind"]), init_scale=0.3)
    learn(seen, guide, 1000, TraceEnum_ELBO(num_particles=4, vectorize_particles=True))
    parts = [posterior_of_prices(x, revenue - b) for b in bonus]
    evidence = torch.stack(
        [
            dist.MultivariateNormal(
                2.0 * x.reshape(DAYS, 3).sum(-1) + b,
                1.5**2 * x.reshape(DAYS, 3) @ x.reshape(DAYS, 3).mT
                + NOISE**2 * torch.eye(DAYS),
            ).log_prob(revenue.reshape(-1))
            for b in bonus
        ]
    )
    weights = evidence.softmax(0)
    mean = sum(w * m for w, (m, _) in zip(weights, parts, strict=True))
    spread = parts[0][1].diagonal().sqrt()
    assert ((guide.get_posterior().mean - mean).abs() < 0.3 * spread).all()


def test_jit_is_right_or_refused():
    """Compiled where the micro state has no random ancestors; said where it has."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("products", 3):
            x = pyro.sample("x", dist.Normal(z + MU, SIGMA))
        pyro.sample("y", dist.Normal((ALPHA * x).sum(-1), 1.0), obs=torch.tensor(20.0))

    def losses(model, elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoDelta(model, init_loc_fn=init_to_mean)  # no random numbers
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        return torch.tensor([svi.step() for _ in range(3)])

    held = pm.macro_do(model, {SALES: pm.Natural(9.0, given="z")})
    compiled = JitTrace_ELBO(ignore_jit_warnings=True)
    torch.testing.assert_close(losses(held, compiled), losses(held, Trace_ELBO()))
    free = pm.macro_do(model, {SALES: pm.Natural(9.0)})
    with pytest.raises(pm.UnsupportedLaw, match=r"jit cannot trace.*given=\['z'\]"):
        losses(free, JitTrace_ELBO(ignore_jit_warnings=True))


# Micro states that are not Gaussian


GAMMAS, SPENT = (2.0, 3.0), torch.tensor([3.0, 5.0, 4.0, 8.0], dtype=torch.float64)
EARNED = torch.tensor([6.0, 7.0, 10.0, 13.0], dtype=torch.float64)
SPENDING = pm.MacroVariable("spending", ["s1", "s2"])


def campaign():
    """Spending of two kinds, of which the first earns three times as much."""
    with pyro.plate("days", 4):
        s1 = pyro.sample("s1", dist.Gamma(GAMMAS[0], 0.7))
        s2 = pyro.sample("s2", dist.Gamma(GAMMAS[1], 0.7))
        pyro.sample("earned", dist.Normal(3 * s1 + s2, 1.5), obs=EARNED)


def campaign_by_hand():
    with pyro.plate("days", 4):
        share = pyro.sample("share", dist.Beta(*map(torch.tensor, GAMMAS)))
        s1 = SPENT * share
        pyro.sample("earned", dist.Normal(2 * s1 + SPENT, 1.5), obs=EARNED)


def posterior_of_spending():
    """Mean and variance of ``s1`` each day, by quadrature."""
    share = torch.linspace(0, 1, 20001)[1:-1].unsqueeze(-1)
    density = dist.Beta(*map(torch.tensor, GAMMAS)).log_prob(share)
    density = density + dist.Normal((2 * share + 1) * SPENT, 1.5).log_prob(EARNED)
    weight, s1 = density.softmax(0), share * SPENT
    mean = (weight * s1).sum(0)
    return mean, (weight * (s1 - mean).square()).sum(0)


def test_nuts_infers_gamma_micro_states():
    model = pm.macro_do(campaign, {SPENDING: pm.Natural(SPENT)})
    samples, diagnostics = nuts(model, samples=150, warmup=80)
    state = samples["spending__micro"]
    torch.testing.assert_close(state.sum(-1), SPENT.expand(150, 4))
    mean, variance = posterior_of_spending()
    size = diagnostics["spending__micro"]["n_eff"].reshape(4, 2)[:, 0].clamp(max=150)
    error = (variance / size).sqrt()
    assert ((state[..., 0].mean(0) - mean).abs() < 5 * error).all()
    ratio = state[..., 0].var(0) / variance
    assert ((ratio - 1).abs() < 5 * (2 / size).sqrt()).all()


def test_svi_infers_gamma_micro_states_as_in_the_model_by_hand():
    # Both guides are normal in the logit of the share, up to a shift
    model = pm.macro_do(campaign, {SPENDING: pm.Natural(SPENT)})
    guides = []
    for program in (model, campaign_by_hand):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guides.append(AutoNormal(program, init_scale=0.3))
        learn(program, guides[-1], 300)
    found, wanted = guides
    share = found.median()["spending__micro"][..., 0] / SPENT
    assert (torch.logit(share) - wanted.locs.share).abs().max() < 0.05
    scale = found.scales.spending__micro.squeeze(-1)
    assert (scale / wanted.scales.share - 1).abs().max() < 0.1
    mean, variance = posterior_of_spending()
    assert ((share * SPENT - mean).abs() < 0.5 * variance.sqrt()).all()


VISITS = pm.MacroVariable("visits", micro="n", over="shops")
SET = torch.tensor([6.0, 9.0, 12.0, 8.0, 10.0, 7.0], dtype=torch.float64)
PRIOR = torch.tensor([2.0, 4.0, 3.0], dtype=torch.float64)


def visits(rates=None, sold=None):
    """Counts in three shops, with rates of their own; what is sold in all of them."""
    shops = pyro.plate("shops", 3, dim=-1)
    with shops:
        rate = pyro.sample("rate", dist.Gamma(PRIOR, 1.0), obs=rates)
    price = pyro.sample("price", dist.Normal(1.0, 2.0))
    with pyro.plate("days", len(SET), dim=-2):
        with shops:
            n = pyro.sample("n", dist.Poisson(rate))
        worth = torch.stack([price, torch.tensor(1.0), torch.tensor(2.0)])
        mean = (worth * n).sum(-1, keepdim=True)
        pyro.sample("sold", dist.Normal(mean, 2.0), obs=sold)


def counted():
    """Counts of days on which the total was set, and what was sold."""
    pyro.set_rng_seed(3)
    truth = condition(visits, {"rate": PRIOR, "price": torch.tensor(3.0)})
    total = {VISITS: pm.Natural(SET.unsqueeze(-1))}
    nodes = pyro.poutine.trace(pm.macro_do(truth, total)).get_trace().nodes
    return nodes["visits__micro"]["value"], nodes["sold"]["value"]


@pytest.mark.slow
def test_nuts_learns_the_rates_of_counts_from_their_shares():
    # Given their totals, counts tell of the shares of the rates alone: a Dirichlet
    n, _ = counted()
    total = {VISITS: pm.Natural(SET.unsqueeze(-1), given=["rate"])}
    model = condition(pm.macro_do(visits, total), {"visits__micro": n})
    model = block(model, hide=["price", "sold"])
    samples, _ = nuts(model, samples=200, warmup=80)
    rate = samples["rate"].reshape(-1, 3)
    share = rate / rate.sum(-1, keepdim=True)
    wanted = dist.Dirichlet(PRIOR + n.reshape(-1, 3).sum(0))
    size = pyro.ops.stats.effective_sample_size(share.unsqueeze(0)).clamp(max=200)
    error = (wanted.variance / size).sqrt()
    assert ((share.mean(0) - wanted.mean).abs() < 5 * error).all()
    ratio = share.var(0) / wanted.variance
    assert ((ratio - 1).abs() < 5 * (2 / size).sqrt()).all()
    # Of their sum they tell nothing: it keeps its prior, Gamma(9, 1)
    whole = rate.sum(-1)
    size = pyro.ops.stats.effective_sample_size(whole[None, :, None]).clamp(max=200)
    assert (whole.mean() - PRIOR.sum()).abs() < 5 * (PRIOR.sum() / size).sqrt()


def test_density_of_the_rates_of_counts_is_that_of_their_shares():
    n, _ = counted()
    total = {VISITS: pm.Natural(SET.unsqueeze(-1), given=["rate"])}
    for rate in (PRIOR, torch.tensor([0.3, 5.0, 2.0])):
        data = {"visits__micro": n, "rate": rate}
        model = condition(pm.macro_do(visits, total), data)
        trace = pyro.poutine.trace(block(model, hide=["price", "sold"])).get_trace()
        own = dist.Gamma(PRIOR, 1.0).log_prob(rate).sum()
        counts = n.reshape(-1, 3)
        law = dist.Multinomial(probs=rate / rate.sum(), validate_args=False)
        wanted = own + law.log_prob(counts).sum()
        torch.testing.assert_close(trace.log_prob_sum(), wanted)


DAYS_SOLD = 3


def posterior_of_a_price(sold):
    """Mean and deviation, the counts of each day summed out over all splits."""
    grid = torch.linspace(-3.0, 9.0, 1201)
    density = dist.Normal(1.0, 2.0).log_prob(grid)
    for total, seen in zip(SET[:DAYS_SOLD].tolist(), sold.flatten(), strict=False):
        count = torch.arange(total + 1)
        splits = torch.cartesian_prod(count, count)
        splits = splits[splits.sum(-1) <= total]
        n = torch.cat([splits, total - splits.sum(-1, keepdim=True)], -1)
        own = dist.Multinomial(int(total), PRIOR / PRIOR.sum()).log_prob(n)
        mean = grid.unsqueeze(-1) * n[:, 0] + n[:, 1] + 2 * n[:, 2]
        density = density + (own + dist.Normal(mean, 2.0).log_prob(seen)).logsumexp(-1)
    weight = density.softmax(0)
    mean = (weight * grid).sum()
    return mean, (weight * (grid - mean).square()).sum().sqrt()


def priced(sold):
    """The counts latent, and summed out in each day: they are finite on the fibre."""

    def days():
        price = pyro.sample("price", dist.Normal(1.0, 2.0))
        worth = torch.stack([price, torch.tensor(1.0), torch.tensor(2.0)])
        for t in range(DAYS_SOLD):
            own = pm.MacroVariable(f"visits{t}", micro=f"n{t}", over=f"shops{t}")
            total = {own: pm.Natural(SET[t])}

            def day(t=t):
                with pyro.plate(f"shops{t}", 3, dim=-1):
                    return pyro.sample(f"n{t}", dist.Poisson(PRIOR))

            n = pm.macro_do(day, total)()
            mean = (worth * n).sum(-1, keepdim=True)
            pyro.sample(f"sold{t}", dist.Normal(mean, 2.0), obs=sold[t])

    return config_enumerate(days)


def test_svi_sums_counts_out_and_finds_the_posterior_of_a_price_by_hand():
    _, sold = counted()
    model = priced(sold.flatten())
    mean, deviation = posterior_of_a_price(sold)
    guide = AutoNormal(block(model, expose=["price"]), init_scale=0.3)
    elbo = TraceEnum_ELBO(num_particles=2, max_plate_nesting=1)
    learn(model, guide, 120, elbo, lr=0.1)
    assert (guide.median()["price"] - mean).abs() < 0.3 * deviation
    assert (guide.scales.price / deviation - 1).abs() < 0.25


@pytest.mark.slow
def test_nuts_sums_counts_out_and_finds_the_posterior_of_a_price_by_hand():
    _, sold = counted()
    mean, deviation = posterior_of_a_price(sold)
    samples, diagnostics = nuts(priced(sold.flatten()))
    size = diagnostics["price"]["n_eff"].clamp(max=300)
    assert (samples["price"].mean() - mean).abs() < 5 * deviation / size.sqrt()
    ratio = samples["price"].var() / deviation.square()
    assert (ratio - 1).abs() < 5 * (2 / size).sqrt()
