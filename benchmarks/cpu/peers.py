"""The peers' results, which benchmarks/peers/run.py writes, as a section of the page."""

from __future__ import annotations

import json
import pathlib

FILE = "peers.json"
NAMES = ("deepsparse", "onnxruntime", "openvino", "torch.compile", "eager")
ABOUT = """\
The same nets, weights and inputs, exported to one ONNX file per case; each engine runs in a process
of its own and they take turns with ours. Times in ms; ratios are medians over the rounds, another
engine's time over ours (**bold: we are slower**). *Dense* is the fastest of PyTorch, onnxruntime
and OpenVINO; those two compute the zeros. DeepSparse was withdrawn in 2025; its licence allows
evaluation only, and nothing of it but these figures is kept."""
MISSING = """\
## Other engines

Not run: `python benchmarks/peers/run.py` installs DeepSparse, onnxruntime and OpenVINO in an
environment of their own and measures them in turns with ours."""


def load(out: pathlib.Path) -> dict | None:
    """Return the peers' result, None where there is none."""
    file = out / FILE
    return json.loads(file.read_text()) if file.exists() else None


def section(result: dict | None) -> str:
    """Return the page's section on other engines."""
    from cpu.page import markdown_table, number

    if result is None:
        return MISSING
    head = ["case", "threads", "batch", "ours", *NAMES, "x DeepSparse", "x dense"]
    body = []
    for row in result["rows"]:
        what = "kernels" if row["granularity"] == "kernel" else "weights"
        name = f"{row.get('net') or row['layer']}, {100 * row['sparsity']:.0f} % {what}"
        ms = [row["us"].get(n) for n in ("liveweight", *NAMES)]
        shown = ["-" if v is None else f"{v / 1e3:.3g}" for v in ms]
        ratios = [number(row.get("deepsparse")), number(row["dense"])]
        body.append([name, str(row["threads"]), str(row["batch"]), *shown, *ratios])
    versions: dict[str, str] = {}
    failed: dict[str, str] = {}
    for row in result["rows"]:
        versions |= row["versions"]
        failed |= row["failed"]
    parts = ["## Other engines", ABOUT, markdown_table(head, body)]
    parts += [f"{name} did not run everywhere: {why}" for name, why in failed.items()]
    parts += [f"Not complete: {text}" for text in result["problems"]]
    about = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts.append(f"`{FILE}`: {about}; {result['machine']['date']}, {result['machine']['commit']}.")
    return "\n\n".join(parts)
