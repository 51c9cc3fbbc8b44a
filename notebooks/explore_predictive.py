# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A predictive distribution, taken apart
#
# A small deep ensemble on scikit-learn's digits; 8 and 9 are never seen in training. A predictive is a value: slice it,
# take it apart, look at the members behind a number.

# %%
import jax
import numpy as np
import optax

import bayescal as bc

split = bc.data.digits(seed=0)
method = bc.ensemble(bc.map_estimate(bc.models.mlp(64, (64,), 8), bc.Categorical, optax.adamw(3e-3)), 5)
fitted = bc.fit(method, split.train, jax.random.key(0), epochs=30, batch_size=64, progress=False)

# %% [markdown]
# The member axis comes first: 5 networks, 289 test images, 8 classes.

# %%
pred = bc.predict(method, fitted.state, split.test.inputs, jax.random.key(1))
pred.logits.shape

# %%
metrics = {"accuracy": bc.accuracy(), "nll": bc.nll(), "ece": bc.calibration_error(num_bins=15)}
bc.evaluate(pred, split.test.targets, metrics)

# %% [markdown]
# ## What the ensemble does not know
#
# Epistemic uncertainty is disagreement between members. On digits that training never showed it should be larger.

# %%
unseen = bc.predict(method, fitted.state, split.unseen.inputs, jax.random.key(1))
known_parts, unseen_parts = bc.decompose(pred), bc.decompose(unseen)
{
    name: (float(getattr(known_parts, name).mean()), float(getattr(unseen_parts, name).mean()))
    for name in known_parts._fields
}

# %%
scores = np.concatenate([known_parts.epistemic, unseen_parts.epistemic])
bc.auroc_estimate(scores, np.arange(len(scores)) >= len(known_parts.epistemic), "unseen digits")

# %% [markdown]
# ## The members behind the number
#
# The unseen images that the members disagree about most; each row below an image is one member.

# %%
worst = np.argsort(-np.asarray(unseen_parts.epistemic))[:9]
axes = bc.plots.members(bc.take(unseen, worst), split.unseen.inputs[worst])
