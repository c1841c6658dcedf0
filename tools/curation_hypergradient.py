"""Time and memory of the hypergradient by size of the reward model: `python tools/curation_hypergradient.py`.

Networks of 10^3 to 10^7 parameters in float32. They are not trained, as the cost of a product with the Hessian does not
depend on where it is taken; a damping of 1 keeps the system solvable there. Every size runs in a process of its own, so
that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from engine.methods.curation.attacks import curated_reward_objective
from engine.methods.curation.hypergradient import SolverOptions, hypergradient, objective_gradient
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import NetworkReward, training_loss

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
NUM_FEATURES = 512


def measure(num_parameters: int, num_records: int, num_products: int) -> dict[str, float]:
    """Seconds of a gradient of the loss and of a hypergradient, and peak memory."""
    generator = torch.Generator().manual_seed(0)
    features = min(NUM_FEATURES, max(2, num_parameters // 20))
    model = NetworkReward(features, max(1, num_parameters // (features + 2)), torch.float32)
    first, second = torch.randn(2, num_records, features, generator=generator)
    pairs = Pairs(first, second, (first[:, 0] > second[:, 0]).float())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = model.initial(generator)
    start = time.perf_counter()
    objective_gradient(lambda point: training_loss(model, point, pairs, 1e-2), parameters)
    middle = time.perf_counter()
    result = hypergradient(
        model, parameters, pairs, lambda point: curated_reward_objective(first[:, 0], model(point, first)),
        l2=1e-2, solver=SolverOptions(damping=1.0, max_steps=num_products, tolerance=1e-6),
    )  # fmt: skip
    end = time.perf_counter()
    return {
        "parameters": model.num_parameters,
        "products": result.solution.num_steps,
        "residual": float(result.solution.residual),
        "gradient_seconds": middle - start,
        "hypergradient_seconds": end - middle,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--products", type=int, default=20, help="products with the Hessian")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        # The first derivative of a process loads code, which is not to be measured.
        measure(SIZES[0], options.records, 1)
        print(json.dumps(measure(options.one, options.records, options.products)))
        return 0
    print(f"{options.records} records, {options.products} products at most; memory beyond the libraries'")
    print("parameters | gradient of the loss, s | hypergradient, s | products | peak, MiB | residual")
    for size in options.sizes:
        counts = ["--records", str(options.records), "--products", str(options.products)]
        command = [sys.executable, __file__, "--one", str(size), *counts]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        times = f"{row['gradient_seconds']:.3f} | {row['hypergradient_seconds']:.2f} | {row['products']}"
        print(f"{row['parameters']:,} | {times} | {row['memory_mib']:.0f} | {row['residual']:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
