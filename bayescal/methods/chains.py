"""Whether Markov chains agree, and how much they know: split R-hat and effective sample size of what networks compute."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bayescal.methods.samples import Samples
from bayescal.predictive.mixture import float32_or_wider
from bayescal.sharding import run_members
from bayescal.types import Array, EnsembleState, Estimate, Model, State, Variables

LEAST = 4  # samples of a chain: two in each half


class ChainDiagnostics(NamedTuple):
    """Agreement of chains, value by value: arrays (value,), in the order of `chain_values`.

    r_hat: at least about 1, which means that chains and their halves agree; lower = better, above 1.01 they do not yet.
        Infinite where no half moves and they differ. NaN where nothing differs, or a value is not finite.
    ess: how many independent draws the mean of a value is worth; 0 where no chain moves. NaN as above. Higher = better.
    chains: how many were compared.
    samples: of each chain.
    """

    r_hat: np.ndarray
    ess: np.ndarray
    chains: int
    samples: int

    def worst(self) -> dict[str, Estimate]:
        """Largest `r_hat` and least `ess` over the values; NaN if any is NaN."""
        made = f"{self.chains} chains of {self.samples} samples"
        r_hat = f"largest of {len(self.r_hat)} values; rank-normalised split R-hat, bulk or folded; {made}"
        ess = f"least of {len(self.ess)} values; rank-normalised bulk ESS of split chains, Geyer's sequences; {made}"
        n = self.chains * self.samples
        return {
            "r_hat": Estimate(float(self.r_hat.max()), n=n, convention=r_hat),
            "ess": Estimate(float(self.ess.min()), n=n, convention=ess),
        }

    def json(self) -> dict[str, dict[str, Any]]:
        """`worst`, as written to our json files."""
        return {name: estimate.json() for name, estimate in self.worst().items()}


def chain_diagnostics(model: Model, state: State, inputs) -> ChainDiagnostics:
    """Split R-hat, sqrt((n - 1) / n + B / W) over half chains of n normalised ranks, and their ESS, of the network's outputs.

    B is the variance of the half chains' means, W the mean variance within them; ESS is Vehtari et al.'s bulk one.
    Weights of a network have symmetries (units swap) that make chains differ where the functions that they draw do not;
    outputs at given inputs have none. For classes, let the model give what predictions depend on:
    `model._replace(apply=lambda v, x, key: jax.nn.log_softmax(model.apply(v, x, key)))`. Ranks make heavy tails no
    trouble; R-hat is the larger of that of the ranks and that of the ranks of |x - median|, which sees other scales.
    One chain is compared with itself alone: what it has never visited cannot show.

    Args:
        model: the network the chains were made of.
        state: a chain, any state that has `samples`; or an ensemble of chains, those not alive left out.
        inputs: (rows, ...): a few dozen rows that matter, since chain * sample * value numbers are held at once.

    Raises:
        TypeError: for a state without samples.
        ValueError: for chains with different numbers of samples or fewer than 4, and where no chain is alive.
    Source: Vehtari et al. 2021, section 4; blackjax `diagnostics.rhat` and `ess_bulk`.
    """
    from blackjax.diagnostics import ess_bulk, rhat

    values = chain_values(model, state, inputs)
    # Both drop the last of an odd number, and a single value's axis.
    with_two = jnp.concatenate([values, values], -1)
    r_hat, ess = (np.array(f(with_two))[: values.shape[-1]] for f in (jax.jit(rhat), jax.jit(ess_bulk)))
    seen = np.asarray(values)[:, : values.shape[1] // 2 * 2]
    halves = seen.reshape(2 * seen.shape[0], -1, seen.shape[2])
    still = (halves == halves[:, :1]).all((0, 1))  # 0 / 0 is rounding, which is not what they should show
    same = (halves == halves[:1, :1]).all((0, 1))
    undefined = same | ~np.isfinite(np.asarray(values)).all((0, 1))
    r_hat[still], ess[still] = np.inf, 0
    r_hat[undefined], ess[undefined] = np.nan, np.nan
    return ChainDiagnostics(r_hat, ess, *values.shape[:2])


def chain_values(model: Model, state: State, inputs) -> Float[Array, "chain sample value"]:
    """Outputs at the inputs of every network held, oldest first; all leaves of outputs flattened, row by row.

    Args:
        model, state, inputs: as in `chain_diagnostics`.

    Raises:
        TypeError, ValueError: as in `chain_diagnostics`.
    """
    chains, places = _held(state)

    def outputs(params, stats, places, inputs):
        def one(place):
            network = Variables(jax.tree.map(lambda x: x[place], params), stats)
            leaves = jax.tree.leaves(model.apply(network, inputs, None))
            return jnp.concatenate([jnp.ravel(float32_or_wider(x)) for x in leaves])

        return jax.lax.map(one, places)

    every = chains.samples.params, chains.variables.stats, places
    return jax.jit(lambda every, inputs: run_members(outputs, *every, shared=(inputs,)))(every, inputs)


def _held(state: State) -> tuple[Any, np.ndarray]:
    """The chains that count, with a leading chain axis, and the places of their samples in order of time."""
    chains: Any = state.members if isinstance(state, EnsembleState) else state
    if not isinstance(getattr(chains, "samples", None), Samples):
        raise TypeError(
            f"`state` must be a chain's, or an ensemble's of chains, got {type(chains).__name__} without samples. Pass the "
            "state of a sampler such as `sgld`, or of `ensemble(sgld(...), 4)`."
        )
    if isinstance(state, EnsembleState):
        alive = np.asarray(state.alive)
        if alive.ndim != 1:
            raise ValueError(
                f"`state` must be of one experiment, got chains of shape {alive.shape}. Take one at a time: "
                "`jax.tree.map(lambda x: x[e], state)`."
            )
        if not alive.any():
            raise ValueError(
                f"`state` must have a chain that is alive, got {len(alive)} that diverged. Take smaller steps."
            )
        chains = jax.tree.map(lambda x: x[np.flatnonzero(alive)], chains)
    else:
        chains = jax.tree.map(lambda x: x[None], chains)
    counts = np.asarray(chains.samples.count)
    capacity = jax.tree.leaves(chains.samples.params)[0].shape[1]
    held = np.minimum(counts, capacity)
    if (held != held[0]).any():
        raise ValueError(
            f"`state` must hold as many samples in every chain, got {held.tolist()}. Run all chains for as many updates."
        )
    if held[0] < LEAST:
        raise ValueError(
            f"`state` must hold at least {LEAST} samples a chain, got {held[0]}. Run on after `burn_in`, or raise "
            "`num_samples`."
        )
    return chains, (counts[:, None] - held[:, None] + np.arange(held[0])) % capacity
