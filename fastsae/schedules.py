"""What changes over training, as functions of the step: factors of a learning rate or coefficient, values of k or p.

    lr(step)          = lr · warm_up(step + 1, w) · decay(step, total - d, total)
    coefficient(step) = c · warm_up(step, w)
    k(step)           = round(anneal(step, 0, w, first=4 * k, last=k))        p(step) = anneal(step, a, total, 1.0, 0.2)

The first step is step 0.
"""

import math


def _share(step: int, start: int, end: int) -> float:
    """How much of start .. end has passed, from 0 to 1."""
    if end < start:
        raise ValueError(f"start={start} lies after end={end}: pass start <= end")
    return 1.0 if step >= end else max(0.0, (step - start) / (end - start))


def warm_up(step: int, steps: int) -> float:
    """min(step / steps, 1), and 1 where there are no steps."""
    return _share(step, 0, steps)


def decay(step: int, start: int, end: int) -> float:
    """1 until `start`, then linear to 0 at `end`; 1 throughout where start = end."""
    return 1.0 if start == end else 1.0 - _share(step, start, end)


def cosine(step: int, start: int, end: int, floor: float = 0.0) -> float:
    """1 until `start`, then floor + (1 - floor) · (1 + cos πs) / 2 for the share s of start .. end, then `floor`."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * _share(step, start, end))) / 2


def anneal(step: int, start: int, end: int, first: float, last: float) -> float:
    """`first` until `start`, then linear to `last` at `end`."""
    s = _share(step, start, end)
    return (1 - s) * first + s * last
