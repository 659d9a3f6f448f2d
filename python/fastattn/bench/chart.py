# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: for each case, how much of the machine's limit each library reaches.

Called by the command (`__init__.py`) for --plot. Needs matplotlib, which the extra `bench` brings.
"""

from pathlib import Path
from typing import Any

from fastattn.bench.libraries import NEEDS
from fastattn.bench.measure import BASELINE, Result
from fastattn.bench.report import duration, percent, place, shown_libraries

COLORS = {
    "fastattn": "#d1495b",
    "baseline": "#e5a3ab",
    "torch": "#2e4057",
    "vllm": "#3a7d6b",
    "zentorch": "#6fa695",
    "pace": "#a9cbc0",
    "onnxruntime": "#5b7b9a",
    "openvino": "#8fa9bf",
    "jax": "#b9c9d6",
    "numpy": "#dcdcdc",
    "torch-flash": "#2e4057",
    "torch-cudnn": "#5b7b9a",
    "torch-efficient": "#8fa9bf",
    "triton": "#b9c9d6",
}
LIMITS = {
    "cpu": "multiply-adds in registers, for decoding the time to read memory, or the sum of both",
    "cuda": "a large matrix product in bfloat16, for decoding the bandwidth of a large copy",
}
BAR_INCHES, GAP = 0.19, 1.0  # height of a bar; space between cases, in bars
WIDTH_INCHES = 9.0
GRAY = "#666666"


def save(run: Result, file: Path) -> None:
    """Draw the run and write it to a file, whose ending says the format."""
    from matplotlib.figure import Figure

    results = run["results"]
    libraries = shown_libraries(run)
    bars = sum(len(result["libraries"]) + GAP for result in results)
    height = bars * BAR_INCHES + 1.9
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=150)
    axes = figure.add_axes((0.22, 0.75 / height, 0.75, 1 - 1.9 / height))
    centers = []
    y = 0.0
    for result in results:
        outcomes = result["libraries"]
        for library, outcome in outcomes.items():
            _bar(axes, y, library, outcome)
            y += 1
        centers.append(y - (len(outcomes) + 1) / 2)
        y += GAP
    axes.set_yticks(centers, [result["title"] for result in results])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - GAP / 2, -GAP)
    shares = [x.get("percent") or 0 for result in results for x in result["libraries"].values()]
    axes.set_xlim(0, max(100, 1.2 * max(shares)))  # above 100 only where the limit was disturbed
    axes.set_xlabel("% of the machine's limit (longer is better); beside it the time of one call")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    for library in libraries:
        axes.barh(0, 0, color=COLORS.get(library, GRAY), label=_named(run, library))
    left, device = 0.02, run.get("device", "cpu")
    title = f"Exact attention on {'a GPU' if device == 'cuda' else 'the CPU'}"
    figure.text(left, 1 - 0.3 / height, title, fontsize=14, weight="bold")
    figure.text(
        left,
        1 - 0.55 / height,
        f"{place(run)}; limit: {LIMITS[device]}",
        fontsize=8,
        color=GRAY,
    )
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(left - 0.01, 1 - 0.62 / height),
        ncols=len(libraries),
        frameon=False,
        fontsize=8,
        handlelength=1,
        columnspacing=1.2,
    )
    figure.savefig(file)


def _bar(axes: Any, y: float, library: str, outcome: Result) -> None:
    """Draw one bar with its label, or say why it is missing."""
    ours = library == "fastattn"
    if "failure" in outcome:
        length, text = 0.0, f"{library}: {_shortened(outcome['failure'])}"
    else:
        length = outcome["percent"] or 0.0
        text = f"{percent(outcome)}   {duration(outcome['seconds'])}"
        axes.barh(y, length, height=0.92, color=COLORS.get(library, GRAY))
    axes.text(
        length + 0.7,
        y,
        text,
        va="center",
        fontsize=7,
        weight="bold" if ours else "normal",
        style="italic" if "failure" in outcome else "normal",
        color=COLORS["fastattn"] if ours else GRAY,
    )


def _shortened(reason: str) -> str:
    return reason if len(reason) <= 70 else reason[:67] + "..."


def _named(run: Result, library: str) -> str:
    """Return the label of a library: its name and version."""
    if library == BASELINE:
        return "fastattn, another call"
    module = library if library in run["versions"] else NEEDS.get(library, (library,))[0]
    version = run["versions"].get(module, run["machine"]["version"])
    return f"{library} {version}"
