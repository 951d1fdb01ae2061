"""The charts of docs/benchmarks.md: speed-up bars, scaling lines, memory against width, roofline. matplotlib is optional."""

from pathlib import Path
from typing import Any

Comparison = tuple[str, dict[str, Any]]
# one colour each, so that a library looks the same in every chart
COLOURS = {
    "fastsae": "#0b6e4f",
    "fastsae FusedAdam": "#08a045",
    "fastsae FusedAdam bf16 moments": "#6bbf59",
    "sae-lens": "#d1495b",
    "dictionary-learning": "#edae49",
    "sparsify": "#30638e",
    "dense torch": "#7d7d7d",
    "torch.compile": "#b0b0b0",
}


def draw(comparisons: list[Comparison], docs: Path) -> str:
    """Write docs/bench-<device>-<chart>.png; returns what was done."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: the charts in docs/ stay as they are (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = 0
    for stem, results in comparisons:
        rows = [row for row in results["rows"] if row["status"] == "ok"]
        swept = [row for row in results["rows"] if row["sweep"] and row["status"] in ("ok", "oom")]
        charts = {
            "speedup": _speedup([row for row in rows if not row["sweep"]], pyplot),
            "scaling": _scaling(swept, pyplot),
            "memory": _memory([row for row in swept if row["sweep"] == "F"], pyplot),
            "roofline": _roofline([row for row in rows if not row["sweep"]], results["ceilings"], pyplot),
        }
        for name, figure in charts.items():
            if figure is not None:
                figure.suptitle(results["environment"]["device"], fontsize=8)
                # without a date or version inside, the same numbers give the same file
                figure.savefig(docs / f"bench-{stem}-{name}.png", dpi=120, bbox_inches="tight", metadata={"Software": None})
                pyplot.close(figure)
                written += 1
    return f"drew {written} charts"


def _speedup(rows: list[dict], pyplot):
    """How many times as fast fastsae is, case by case."""
    from .report import best, groups

    found = [group for group in groups(rows) if best(group) and any(row["provider"] in COLOURS for row in group)]
    names = [name for name in COLOURS if not name.startswith("fastsae") and any(r["provider"] == name for r in rows)]
    if not found or not names:
        return None
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.45 * len(found)), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        at, wide = [], []
        for j, group in enumerate(found):
            row = next((r for r in group if r["provider"] == name), None)
            if row:
                at.append(j + (i - (len(names) - 1) / 2) * height)
                wide.append(row["median"] / best(group)["median"])
        axes.barh(at, wide, height, label=name, color=COLOURS[name])
    axes.axvline(1, color=COLOURS["fastsae"], linewidth=1.5)
    axes.set_yticks(range(len(found)), [f"{group[0]['case']} {group[0]['shape']}" for group in found])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times fastsae's time (right of the line: fastsae is faster)")
    axes.legend(fontsize=8)
    return figure


def _scaling(rows: list[dict], pyplot):
    letters = list(dict.fromkeys(row["sweep"] for row in rows))
    if not letters:
        return None
    figure, all_axes = pyplot.subplots(1, len(letters), figsize=(4 * len(letters), 3.6), squeeze=False, layout="constrained")
    for axes, letter in zip(all_axes[0], letters, strict=True):
        _lines(axes, [row for row in rows if row["sweep"] == letter], letter, "median")
        axes.set_xlabel(letter)
        axes.set_ylabel("ms a training step")
        if any(row["sweep"] == letter and row["status"] == "oom" for row in rows):
            axes.set_title(ENDS, fontsize=7)
    all_axes[0][0].legend(fontsize=7)
    return figure


def _memory(rows: list[dict], pyplot):
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    _lines(axes, rows, "F", "peak_mb")
    axes.set_xlabel("F, latents")
    axes.set_ylabel("peak MB of a training step")
    axes.legend(fontsize=7)
    if limit := rows[0].get("memory_gb"):
        axes.axhline(limit * 1e3, color="black", linewidth=1, linestyle=":")
        axes.set_title(f"{ENDS} of {limit:g} GB", fontsize=7)
    return figure


ENDS = "× is the last width that fits: the next one runs out of memory"


def _lines(axes, rows: list[dict], letter: str, value: str) -> None:
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["provider"] == name]
        points = sorted((row[letter], row[value]) for row in mine if row["status"] == "ok")
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=colour)
            if any(row["status"] == "oom" for row in mine):
                axes.plot(*points[-1], marker="x", markersize=9, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _roofline(rows: list[dict], ceilings: dict, pyplot):
    rows = [row for row in rows if row["provider"] in COLOURS and row["gbs"] > 0]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    intensities = [row["tflops"] * 1e3 / row["gbs"] for row in rows]
    span = [min(intensities) / 2, max(intensities) * 2]
    for precision, rate in ceilings["gemm_tflops"].items():
        steps = [span[0] * (span[1] / span[0]) ** (i / 100) for i in range(101)]
        axes.plot(steps, [min(rate, x * ceilings["copy_gbs"] / 1e3) for x in steps], color="black", linewidth=1)
        axes.annotate(precision, (steps[-1], rate), fontsize=7, ha="right", va="bottom")
    for name, colour in COLOURS.items():
        mine = [(row["tflops"] * 1e3 / row["gbs"], row["tflops"]) for row in rows if row["provider"] == name]
        if mine:
            axes.scatter(*zip(*mine, strict=True), s=14, label=name, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("needed FLOPs per needed byte")
    axes.set_ylabel("needed TFLOP/s")
    axes.legend(fontsize=7)
    return figure
