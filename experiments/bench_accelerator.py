"""Monte-Carlo dropout on a GPU: a hundred draws of 10,000 rows, `bc.predict` against PyTorch on the same device, in turn.

    python experiments/bench_accelerator.py

Median and range of seven rounds, in ms; PyTorch without TF32. Needs a PyTorch that sees the GPU.
"""

import importlib
import time
from typing import Any

import jax
import numpy as np
import optax

import bayescal as bc

ROWS, DRAWS, ROUNDS = 10_000, 100, 7


def torch_parts(torch: Any, params: dict, rate: float, mask_a_draw: bool) -> tuple[Any, Any]:
    """Our network on the GPU: what comes before the first dropout, and the rest."""
    nn = torch.nn

    class DrawDropout(nn.Dropout):
        def forward(self, x):
            return x * (torch.empty(x.shape[-1], device=x.device).bernoulli_(1 - self.p) / (1 - self.p))

    def dense(own):
        layer = nn.Linear(*own["kernel"].shape)
        layer.weight.data = torch.tensor(np.array(own["kernel"]).T.copy())
        layer.bias.data = torch.tensor(np.array(own["bias"]))
        return layer

    first, second = params["dense"].values()
    dropout = (DrawDropout if mask_a_draw else nn.Dropout)(rate)
    rest = nn.Sequential(dropout, dense(second), nn.ReLU(), dropout, dense(params["head"]))
    return nn.Sequential(dense(first), nn.ReLU()).cuda(), rest.cuda().train()


def forms_of(torch: Any, rate: float) -> dict[str, Any]:
    """Name -> what predicts all draws of all rows, and waits for it."""
    rows = np.random.default_rng(0).standard_normal((ROWS, 784)).astype(np.float32)
    model = bc.models.mlp(784, (200, 200), 10, dropout=rate)
    method = bc.mc_dropout(model, bc.Categorical, optax.sgd(0.1), num_draws=DRAWS)
    state, key, there = jax.jit(method.init)(jax.random.key(0), None), jax.random.key(1), jax.device_put(rows)
    forms: dict[str, Any] = {
        "ours, rows on the host": lambda: jax.block_until_ready(bc.predict(method, state, rows, key)),
        "ours, rows on the device": lambda: jax.block_until_ready(bc.predict(method, state, there, key)),
    }
    tensor = torch.tensor(rows).cuda()
    for name, mask_a_draw in (("torch, a mask a row", False), ("torch, a mask a draw", True)):
        before, after = torch_parts(torch, state.variables.params, rate, mask_a_draw)

        @torch.inference_mode()
        def predict(before=before, after=after):
            prefix = before(tensor)
            torch.stack([after(prefix) for _ in range(DRAWS)])
            torch.cuda.synchronize()

        forms[name] = predict
    return forms


def main() -> None:
    """Prints a line for every rate."""
    torch = importlib.import_module("torch")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(jax.devices()[0].device_kind, jax.__version__, torch.__version__)
    for rate in (0.1, 0.5):
        forms = forms_of(torch, rate)
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(ROUNDS + 2):  # the first two compile and settle
            for name, form in forms.items():
                start = time.perf_counter()
                form()
                if number >= 2:
                    seconds[name].append(1e3 * (time.perf_counter() - start))
        told = (f"{name} {np.median(s):.1f} [{min(s):.1f}, {max(s):.1f}]" for name, s in seconds.items())
        print(f"rate {rate}: {'; '.join(told)}")


if __name__ == "__main__":
    main()
