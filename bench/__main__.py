"""Compare throughput:  python -m bench [--smoke] [--only NAME ...] [--cases ...] [--shapes ...] [--out PATH] [--base REF]"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from .cases import plan
from .environment import ROOT, environment, slug
from .providers import PROVIDERS
from .run import Results, run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare throughput with other libraries, here.")
    parser.add_argument("--smoke", action="store_true", help="every case at a tiny shape: under a minute on two cores")
    names = [p.name for p in PROVIDERS]
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"only these providers: {', '.join(names)}")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only cases that begin so, e.g. step encode/TopK")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="only these shapes, or sweeps by their letter, e.g. C F")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the JSON (of a whole run: bench/results/<device>.json)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of rounds per group, three rounds at least (default 8)")
    parser.add_argument("--base", metavar="REF", help="compare fastsae with this commit of itself, in interleaved pairs")
    chosen = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    wanted = plan(device.type, chosen.smoke, chosen.shapes, chosen.cases)
    if not wanted:
        parser.error("no case at no shape is left: see bench/cases.py for their names")
    if chosen.base:
        from .base import compare

        return compare(chosen.base, wanted, device, chosen.seconds)
    if unknown := set(chosen.only or ()) - set(names):
        parser.error(f"unknown providers {sorted(unknown)}: pass some of {names}")
    providers = [p for p in PROVIDERS if chosen.only is None or p.name in chosen.only]
    whole = not (chosen.smoke or chosen.only or chosen.cases or chosen.shapes)
    # part of a comparison never replaces a whole one
    elsewhere = Path(tempfile.gettempdir()) / "fastsae-bench.json"
    out = chosen.out or (ROOT / "bench" / "results" / f"{slug(device)}.json" if whole else elsewhere)

    results = Results(environment(device, command), out)
    print(f"{results.environment['device']}; {len(wanted)} groups, each written to {out} as it is done")
    try:
        run(wanted, providers, device, results, 0.2 if chosen.smoke else chosen.seconds, chosen.smoke)
    except KeyboardInterrupt:
        print(f"interrupted: {len(results.rows)} rows are in {out}")
        return 130
    return int(any(row["status"] in ("error", "wrong") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
