"""Write what was measured:  python -m bench.report

From bench/results/*.json it generates docs/benchmarks.md, the table between README's bench markers, docs/gpu.md and, where
matplotlib is installed, the charts in docs/. The same files give the same text: nothing here is typed by hand.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .environment import ROOT
from .questions import page
from .table import markdown

Results = dict[str, Any]
Row = dict[str, Any]

MARKERS = ("<!-- bench:begin -->", "<!-- bench:end -->")
NO_GPU = "Not yet measured on a GPU: `bash bench/gpu.sh` does it in nine minutes on a machine that has one."


def load(folder: Path) -> tuple[list[tuple[str, Results]], list[Results]]:
    """(comparisons by file stem, answers to the GPU's questions), leaving out what was only tried at tiny sizes."""
    comparisons, answers = [], []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if "answers" in found and not found["tiny"]:
            answers.append(found)
        elif "rows" in found:
            found["rows"] = [row for row in found["rows"] if row["shape"] != "smoke"]
            found["pipeline"] = [row for row in found.get("pipeline", []) if not row["tiny"]]
            found.setdefault("hosts", [])
            if found["rows"]:
                comparisons.append((path.stem, found))
    return comparisons, answers


def on_gpu(results: Results) -> bool:
    return results["environment"]["driver"] is not None


def ours(row: Row) -> bool:
    return row["provider"].startswith("fastsae")


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case at one shape, side by side."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in ("case", "shape", "precision", "sweep")), []).append(row)
    return list(found.values())


def best(group: list[Row]) -> Row | None:
    """The fastest way of using fastsae."""
    return min((row for row in group if ours(row) and row["status"] == "ok"), key=lambda row: row["median"], default=None)


def ratio(row: Row, group: list[Row]) -> float | None:
    """How many times as long as fastsae at its fastest."""
    fastest = best(group)
    return row["median"] / fastest["median"] if fastest and row["status"] == "ok" else None


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def provenance(results: Results) -> str:
    e, limits = results["environment"], results["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    commit = f"commit `{e['commit'][:12]}`" if e["commit"] else "unknown commit"
    rates = ", ".join(f"{number(rate)} TFLOP/s in {name}" for name, rate in limits["gemm_tflops"].items())
    driver = f", driver {e['driver']}" if e["driver"] else ""
    changed = " with changes" if e["dirty"] else ""
    unfinished = "" if results["complete"] else " The run was interrupted: cases are missing."
    return (
        f"{e['device']}{driver}; {e['platform']}; {versions}; {commit}{changed}; {e['date']}; `{e['command']}`.{unfinished}\n\n"
        f"Ceilings in the same run: copies {number(limits['copy_gbs'])} GB/s, multiplies {rates}."
    )


def overview(rows: list[Row]) -> str:
    """Cases down, providers across: how many times as long as the fastest fastsae."""
    providers = list(dict.fromkeys(row["provider"] for row in rows if not ours(row)))
    lines = []
    for group in groups(rows):
        fastest = best(group)
        by_provider = {row["provider"]: row for row in group}
        cells = []
        for name in providers:
            row = by_provider.get(name)
            times = None if row is None else ratio(row, group)
            cells.append("" if row is None or row["status"] == "skipped" else f"{times:.2f}" if times else row["status"])
        head = [group[0]["case"], group[0]["shape"], group[0]["precision"]]
        lines.append([*head, number(fastest["median"]) if fastest else "", *cells])
    return markdown(["case", "shape", "", "fastsae ms", *providers], lines)


def behind(rows: list[Row]) -> str:
    """Where another library is faster, and by how much."""
    found = []
    for group in groups(rows):
        for row in group:
            times = ratio(row, group)
            if times is not None and times < 1 and not row["ceiling"] and not ours(row):
                where = f"{row['case']} at {row['shape']}, {row['precision']}" if "shape" in row else row["case"]
                found.append(f"- {where}: {row['provider']} takes {times:.2f} of its time{because(row)}")
    return "\n".join(found) if found else "Nowhere."


# (how a case's name begins, provider or "") -> why it is faster there
REASONS = {
    ("step/", "sparsify"): "its default optimizer, sign SGD, has no second moment to read and write",
    ("forward/TopK/N=1", "sparsify"): "one row's work does not hide the fixed costs of a call, input checks among them",
    ("save", ""): "W_enc lies latent by latent in memory and [D, F] in the file, so saving transposes it",
    ("load", "sae-lens"): "its weights stay in the mapped file; fastsae copies them, transposes W_enc and checks every value",
}


def because(row: Row) -> str:
    for (case, provider), reason in REASONS.items():
        if row["case"].startswith(case) and provider in ("", row["provider"]):
            return f": {reason}."
    return "."


def details(group: list[Row]) -> str:
    lines = []
    for row in group:
        if row["status"] == "skipped":
            continue
        times = ratio(row, group)
        if row["status"] != "ok":
            lines.append([row["provider"], f"{row['status']}: {row['reason']}", "", "", "", "", "", ""])
            continue
        name = f"*{row['provider']}*" if row["ceiling"] else row["provider"]
        quartiles = f"{number(row['low'])} to {number(row['high'])}"
        lines.append([
            name, number(row["median"]), quartiles, f"{times:.2f}" if times else "", f"{row['percent_of_floor']:.0f} %",
            number(row["tflops"]), number(row["gbs"]), number(row["peak_mb"]),
        ])  # fmt: skip
    head = ["provider", "median ms", "quartiles", "times fastsae", "of floor", "TFLOP/s", "GB/s", "peak MB"]
    first = group[0]
    shape = f"N {first['N']:,}, D {first['D']:,}, F {first['F']:,}, k {first['k']}"
    return f"#### {first['case']} at {first['shape']}, {first['precision']} ({shape})\n\n{markdown(head, lines)}"


def absent(rows: list[Row]) -> str:
    """Who was skipped, once each."""
    reasons = dict.fromkeys((row["provider"], row["reason"]) for row in rows if row["status"] == "skipped")
    return "\n".join(f"- {provider}: {reason}" for provider, reason in reasons)


HEAD = """# Benchmarks

Generated by `python -m bench.report` from `bench/results/`. To measure your own machine: `python -m bench`, in an
environment that has the libraries to compare with (`make .venv-hosts`; `.venv-hosts/bin/python -m bench`).

Every library gets the same weights and inputs and runs its own classes and, for a step, its own trainer and optimizer.
Before it is timed, its outputs and gradients are compared with a dense reference in fp64, and one that is wrong gets no time.
Times are medians of interleaved rounds over inputs that rotate through more than the last cache. "Floor" is the time in which
this machine's own copy and multiplication rates, measured in the same run, could do the arithmetic and the memory traffic that
the case cannot do without. "Peak" counts parameters, optimizer state and temporaries. *Encoder GEMM* is a bound, not a library.
"""


def benchmarks(comparisons: list[tuple[str, Results]], charts: list[str]) -> str:
    parts = [HEAD]
    if not any(on_gpu(results) for _, results in comparisons):
        parts.append(f"## On a GPU\n\n{NO_GPU}\n")
    for stem, results in comparisons:
        named = [row for row in results["rows"] if not row["sweep"]]
        swept = [row for row in results["rows"] if row["sweep"]]
        parts.append(f"## {results['environment']['device']}\n\n{provenance(results)}\n")
        pictures = "\n\n".join(f"![{name}]({name})" for name in charts if name.startswith(f"bench-{stem}-"))
        if pictures:
            parts.append(pictures + "\n")
        if named:
            parts.append(f"### How many times as long as fastsae\n\n{overview(named)}\n")
        if results["pipeline"]:
            parts.append(f"### Around training\n\n{PIPELINE}\n\n{pipeline(results['pipeline'])}\n")
        if results["hosts"]:
            parts.append(f"### The same libraries after `fastsae.patch`\n\n{HOSTS}\n\n{hosts(results['hosts'])}\n")
        if named:
            parts.append(f"### Where fastsae is behind\n\n{behind([*named, *results['pipeline']])}\n")
        if swept:
            parts.append(f"### Scaling of a TopK training step\n\n{scaling(swept)}\n")
        parts.append("### In full\n\n" + "\n\n".join(details(group) for group in groups(named)) + "\n")
        if skipped := absent(results["rows"]):
            parts.append(f"Skipped:\n\n{skipped}\n")
    return "\n".join(parts)


PIPELINE = """What comes out is compared with what has to, and then timed in interleaved rounds. Files are in the page cache.
In italics: a bound, not a library."""


def pipeline(rows: list[Row]) -> str:
    """A table per work."""
    parts = []
    for group in groups(rows):
        lines = []
        for row in group:
            if row["status"] != "ok":
                lines.append([row["provider"], f"{row['status']}: {row['reason']}", "", "", ""])
                continue
            name = f"*{row['provider']}*" if row["ceiling"] else row["provider"]
            times = ratio(row, group)
            rates = [number(row["units_per_s"]) if row["unit"] != "bytes" else "", number(row["gbs"])]
            lines.append([name, *rates, f"{times:.2f}" if times else "", row["note"]])
        unit = f"{group[0]['unit']}/s" if group[0]["unit"] != "bytes" else ""
        head = ["provider", unit, "GB/s", "times fastsae's time", ""]
        parts.append(f"#### {group[0]['case']}: {group[0]['what']}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


HOSTS = """A library's own code with `fastsae.patch` and without, in interleaved rounds. MB are what a call allocates above
parameters, gradients and optimizer state."""


def hosts(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        start = [row["host"], row["what"]]
        if row["status"] != "ok":
            lines.append([*start, f"{row['status']}: {row['reason']}", "", "", "", ""])
            continue
        times = f"{row['times']:.2f} ({row['times_low']:.2f} to {row['times_high']:.2f})"
        ms, mb = ([number(row[f"{which}_{unit}"]) for which in ("stock", "patched")] for unit in ("ms", "mb"))
        lines.append([*start, *ms, times, *mb])
    return markdown(["library", "", "ms", "patched", "times as fast (quartiles)", "MB", "patched"], lines)


def scaling(rows: list[Row]) -> str:
    """One table per swept letter: milliseconds and peak memory by provider."""
    parts = []
    for letter in dict.fromkeys(row["sweep"] for row in rows):
        swept = [row for row in rows if row["sweep"] == letter]
        providers = list(dict.fromkeys(row["provider"] for row in swept if row["status"] != "skipped"))
        lines = []
        for group in groups(swept):
            by_provider = {row["provider"]: row for row in group}
            cells = [_time_and_memory(by_provider.get(name)) for name in providers]
            lines.append([f"{group[0][letter]:,}", *cells])
        fixed = ", ".join(f"{name} {rows_value:,}" for name, rows_value in _fixed(swept, letter).items())
        said = f"{letter} at {fixed}, {swept[0]['precision']}: ms and (peak MB)"
        if limit := swept[0].get("memory_gb"):
            said += f"; each library may allocate {limit:g} GB, and *oom* is where that was too little"
        parts.append(f"{said}\n\n{markdown([letter, *providers], lines)}")
    return "\n\n".join(parts)


def _time_and_memory(row: Row | None) -> str:
    if row is None or row["status"] == "skipped":
        return ""
    return f"{number(row['median'])} ({number(row['peak_mb'])})" if row["status"] == "ok" else row["status"]


def _fixed(rows: list[Row], letter: str) -> dict[str, int]:
    return {name: rows[0][name] for name in "NDFk" if name != letter}


def readme_table(comparisons: list[tuple[str, Results]]) -> str:
    """The TopK training step on each machine, and where it comes from."""
    parts = []
    for _, results in sorted(comparisons, key=lambda pair: not on_gpu(pair[1])):
        for group in groups(row for row in results["rows"] if row["case"] == "step/TopK" and not row["sweep"]):
            first = group[0]
            lines = [
                [row["provider"], number(row["median"]), f"{ratio(row, group):.2f}", number(row["peak_mb"])]
                for row in sorted(group, key=lambda row: row.get("median", 0))
                if row["status"] == "ok" and not row["ceiling"]
            ]
            e = results["environment"]
            commit = f", commit `{e['commit'][:12]}`" if e["commit"] else ""
            where = f"{e['device']}, {e['date'][:10]}{commit}, `{e['command']}`"
            shape = f"N {first['N']:,}, D {first['D']:,}, F {first['F']:,}, k {first['k']}, {first['precision']}"
            said = f"A TopK training step, optimizer included ({shape}), on {where}:"
            parts.append(f"{said}\n\n{markdown(['', 'ms', 'times fastsae', 'peak MB'], lines)}")
    if not any(on_gpu(results) for _, results in comparisons):
        parts.append("Speed on a GPU: not yet measured.")
    return "\n\n".join([*parts, "All cases, machines and charts: [docs/benchmarks.md](docs/benchmarks.md)."])


def between_markers(text: str, content: str) -> str:
    begin, end = MARKERS
    if begin not in text or end not in text:
        raise SystemExit(f"README.md has no {begin} and {end}: add them where the table belongs")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Regenerate the pages of what was measured.")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="where README.md and docs/ are")
    parser.add_argument("--no-charts", action="store_true", help="leave the PNGs as they are")
    chosen = parser.parse_args(arguments)
    comparisons, answers = load(chosen.results)
    docs = chosen.root / "docs"
    if not chosen.no_charts:
        from .charts import draw

        print(draw(comparisons, docs))
    charts = sorted(path.name for path in docs.glob("bench-*.png"))
    (docs / "benchmarks.md").write_text(benchmarks(comparisons, charts))
    (docs / "gpu.md").write_text(page(answers))
    readme = chosen.root / "README.md"
    readme.write_text(between_markers(readme.read_text(), readme_table(comparisons)))
    print(f"wrote docs/benchmarks.md, docs/gpu.md and README.md's table from {len(comparisons)} comparisons")
    return 0


if __name__ == "__main__":
    sys.exit(main())
