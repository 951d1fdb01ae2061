"""Find row offsets multiplied in int32, in the text of Triton's first intermediate language (TTIR).

A row offset is row · stride. As a product of two run-time int32 values it wraps at 2^31 elements, silently: F rows of D
reach that at d_sae 262,144 and d_in 8192, and N rows of F long before. The rule: no int32 product of two run-time values
may reach the offset of a tt.addptr. A product with a compile-time constant (program · BLOCK) is an index within a row.
"""

import itertools
import re
from collections import defaultdict

# what a value passes through unchanged in kind; a comparison, a quotient or a load ends the trail
_CARRIES = {f"arith.{op}" for op in "addi subi muli extsi extui trunci select minsi maxsi minui maxui index_cast".split()}
_CARRIES |= {f"tt.{op}" for op in "splat broadcast expand_dims reshape trans bitcast".split()}

_LINE = re.compile(r'(?:(%[\w$.-]+)(?::(\d+))? = )?"?([\w.]*)"?(.*)')  # result, how many, operation, the rest
_VALUE = r"%[\w$.-]+(?:#\d+)?"
_INT32 = re.compile(r" : (tensor<[\dx]+x)?i32( loc|$)")


def int32_row_offsets(ttir: str) -> list[str]:
    """The names of the offending products, as TTIR spells them: after the Python variable they were assigned to."""
    fresh = itertools.count()
    ids: dict[str, int] = defaultdict(fresh.__next__)  # two regions may use one name: each definition gets its own id
    flows: dict[int, set[int]] = defaultdict(set)
    constants: set[int] = set()
    offsets: set[int] = set()
    products: dict[int, str] = {}
    regions: list[dict[str, list]] = []  # for each open one: where the values go that its terminators hand on

    def define(names: list[str]) -> list[int]:
        ids.update((name, next(fresh)) for name in names)
        return [ids[name] for name in names]

    def flow(sources: list[int], sinks: list[int]) -> None:
        for source, sink in zip(sources, sinks, strict=False):
            flows[source].add(sink)

    for line in map(str.strip, ttir.splitlines()):
        result, count, op, rest = _LINE.match(line).groups()
        operands = [ids[name] for name in re.findall(_VALUE, rest.split(" : ")[0])]
        names = [] if result is None else [result] if count is None else [f"{result}#{i}" for i in range(int(count))]
        opens = re.search(r"\{( loc\(.*\))?$", line)
        if re.match(r"\} (else|do) \{", line):
            continue
        if line.startswith("}"):
            regions.pop()
        elif line.startswith("^"):
            arguments = define(re.findall(r"(%[\w$.-]+):", line))
            for condition in regions[-1].get("conditions", []):  # a while's body gets what its condition hands on
                flow(condition, arguments)
        elif op in ("scf.for", "scf.while", "scf.if"):
            # "%i = %low ... iter_args(%a = %x, ...)" or "(%a = %x, ...)": a for's first pair is its counter
            pairs = re.findall(rf"(%[\w$.-]+) = ({_VALUE})", rest)
            sources = [ids[source] for _, source in pairs]
            results = define(names)
            inner = define([name for name, _ in pairs])
            flow(sources, inner)
            if op == "scf.for":
                flow(sources[1:], results)
            regions.append({"yields": [results, inner[op == "scf.for" :]], "results": results, "conditions": []})
            if op == "scf.while":
                regions[-1]["yields"].pop(0)
        elif op == "scf.yield":
            for sinks in regions[-1].get("yields", []):
                flow(operands, sinks)
        elif op == "scf.condition":
            flow(operands[1:], regions[-1]["results"])
            regions[-1]["conditions"].append(operands[1:])
        else:
            results = define(names)
            if op == "arith.constant" or (op in _CARRIES and operands and constants.issuperset(operands)):
                constants.update(results)
            if op == "arith.muli" and _INT32.search(rest) and constants.isdisjoint(operands):
                products[results[0]] = names[0]
            if op in _CARRIES:
                for operand in operands:
                    flow([operand], results)
            if op == "tt.addptr":
                offsets.add(operands[1])
            if opens:
                regions.append({})
    return [name for product, name in products.items() if _reaches(flows, product, offsets)]


def _reaches(flows: dict[int, set[int]], start: int, goals: set[int]) -> bool:
    reached, todo = {start}, [start]
    while todo:
        new = flows[todo.pop()] - reached
        reached |= new
        todo += new
    return not reached.isdisjoint(goals)
