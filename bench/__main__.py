"""Compare throughput:  python -m bench [--smoke] [--only NAME ...] [--cases ...] [--shapes ...] [--out PATH] [--base REF]

Three parts into the same JSON: the works of pipeline/, the table of cases.py, and the host libraries with fastsae.patch and
without, of hosts.py.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from . import patched, pipeline
from .cases import plan
from .environment import ROOT, environment, slug
from .providers import PROVIDERS
from .run import Results, run

PARTS = ("pipeline", "table", "hosts")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare throughput with other libraries, here.")
    parser.add_argument("--smoke", action="store_true", help="every case at a tiny shape: under a minute on two cores")
    names = [*(p.name for p in PROVIDERS), *pipeline.PROVIDERS]
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these: {', '.join([*PARTS, *names])}")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only what begins so, e.g. step encode/TopK shards")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="only these shapes, or sweeps by their letter, e.g. C F")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the JSON (of a whole run: bench/results/<device>.json)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of rounds per group, three rounds at least (default 8)")
    parser.add_argument("--base", metavar="REF", help="compare fastsae with this commit of itself, in interleaved pairs")
    chosen = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    only = chosen.only or []
    if unknown := set(only) - set(names) - set(PARTS):
        parser.error(f"unknown names {sorted(unknown)}: pass some of {[*PARTS, *names]}")
    named = [name for name in only if name in names] or names
    parts = [part for part in PARTS if part in only] or list(PARTS)
    whole = not (chosen.smoke or chosen.only or chosen.cases or chosen.shapes)
    wanted = plan(device.type, chosen.smoke, chosen.shapes, chosen.cases) if "table" in parts else []
    around = "pipeline" in parts and (chosen.cases or not chosen.shapes)
    works = pipeline.chosen(chosen.cases, chosen.smoke) if around else []
    hosts = "hosts" in only or whole
    if not (wanted or works or hosts):
        parser.error("no case at no shape is left: see bench/cases.py for their names")
    if chosen.base:
        from .base import compare

        return compare(chosen.base, wanted, device, chosen.seconds)
    providers = [p for p in PROVIDERS if p.name in named]
    # part of a comparison never replaces a whole one
    elsewhere = Path(tempfile.gettempdir()) / "fastsae-bench.json"
    out = chosen.out or (ROOT / "bench" / "results" / f"{slug(device)}.json" if whole else elsewhere)

    results = Results(environment(device, command), out)
    print(f"{results.environment['device']}; {len(wanted)} groups and {len(works)} works, each written to {out} as it is done")
    seconds = 0.2 if chosen.smoke else chosen.seconds
    try:
        for rows in pipeline.run(works, named, device, seconds, chosen.smoke):
            results.pipeline += rows
            results.save()
            print("\n".join(map(pipeline.line, rows)), flush=True)
        if wanted:
            run(wanted, providers, device, results, seconds, chosen.smoke)
        for row in patched.run(device, seconds) if hosts else ():
            results.hosts.append(row)
            results.save()
            print(patched.line(row), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted: what was measured is in {out}")
        return 130
    results.complete = True
    results.save()
    return int(any(row["status"] in ("error", "wrong") for row in [*results.rows, *results.pipeline, *results.hosts]))


if __name__ == "__main__":
    sys.exit(main())
