"""The second hurdle on a GPU: what beats the dense layer must beat torch.compile of it too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from liveweight.compress.decide import Verdict, decide
from liveweight.compress.measure import Timings

# What reports call the dense layer as torch.compile(mode="max-autotune") makes it.
LABEL = "dense, compiled"

Call = Callable[[], object]


def compile_strongest(call: Call) -> Call:
    """Return a call as torch.compile makes it at its strongest.

    The kernels are those of mode="max-autotune"; graphs are left to whoever times it, because CUDA
    graphs do not nest. The call is compiled here, by running it once.
    """
    # Every layer is another version of the same function to the compiler, which gives up after 8.
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
        fast = torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)
        with torch.inference_mode():
            fast()
    return fast


def confirm(
    seen: Verdict,
    calls: dict[str, Call],
    measure: Callable[[dict[str, Call], float], Timings],
    min_speedup: float,
    density: float,
    make: Callable[[Call], Call] = compile_strongest,
) -> tuple[Verdict, str]:
    """Race what was faster than dense against the compiled dense layer.

    seen     what the race against the layer as it is showed
    calls    "dense" first, then the candidates
    measure  times calls, of which the first is called "dense", with a multiple of the budget
    make     compiles a call
    returns  the verdict that stands, its times with the compiled layer's among them and its
             speed-ups those against the layer as it is; and a note, "" where there is none
    """
    if seen.winner == "dense":
        return seen, ""
    try:
        fast = make(calls["dense"])
    except Exception as error:  # whatever a compiler may raise: then it is no rival
        text = (str(error).strip() or "unknown").splitlines()[0]
        return seen, f"torch.compile of a dense layer failed: {type(error).__name__}: {text}"
    rivals = {"dense": fast, **{name: calls[name] for name in seen.speedups}}
    found = decide(lambda budget: measure(rivals, budget), min_speedup, density)
    times = dict(seen.times_us) | {LABEL: found.times_us["dense"]}
    if found.winner == "dense":
        reason = f"with torch.compile {found.reason}"
        return Verdict("dense", 1.0, reason, times), ""
    speedups = {name: seen.speedups[name] for name in found.speedups}
    ratio = found.speedups[found.winner]
    reason = f"{found.winner} is {speedups[found.winner]:.2f}x as fast as dense and {ratio:.2f}x"
    reason += f" as fast as torch.compile of it at {density:.1%} density"
    return Verdict(found.winner, speedups[found.winner], reason, times, speedups), ""
