"""The entries of a code latent by latent: one stable sort, and then what belongs to a latent is a contiguous segment.

    (order [E], starts [F+1]): entries order[starts[f]:starts[f+1]] belong to latent f, in their original order

Sums over segments need no atomics and have the same bits every run. Segments longer than SPLIT are cut into parts, which go to
several programs and are added up in order. On a CPU a sum of rows is torch's `embedding_bag`, with latents as bags.
"""

import torch
from torch import Tensor

from .backend import accumulator, op

SPLIT = 1024  # entries of one latent per program; untuned


def sort_by_latent(latents: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """(order [E], starts [F+1]): entries order[starts[f]:starts[f+1]] belong to latent f, in their original order."""
    ids, order = latents.sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(F + 1, dtype=ids.dtype, device=ids.device), out_int32=True)
    return order, starts


def bag_of_entries(offsets: Tensor, E: int) -> Tensor:
    """The bag each entry belongs to. [E] int32"""
    bags = torch.arange(offsets.shape[0] - 1, dtype=torch.int32, device=offsets.device)
    return bags.repeat_interleave(offsets.diff(), output_size=E)


def segment_rows(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """out[f] = Σ of weights[i] · table[rows[i]] over segment f. Entries are already in segment order. [F, D]"""
    # detached, or torch takes the slower operator that also keeps what its own backward pass would need
    table, weights = table.detach(), weights.detach()
    return torch.nn.functional.embedding_bag(
        rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def segment_sums_sorted(sorted_values: Tensor, starts: Tensor) -> Tensor:
    """out[f] = Σ of segment f. [F]"""
    if not sorted_values.numel():
        return sorted_values.new_zeros(starts.shape[0] - 1)
    return torch.segment_reduce(sorted_values, "sum", offsets=starts.long(), initial=0)


@op
def segment_sums(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    wide = accumulator(values.dtype)
    return segment_sums_sorted(values[order].to(wide), starts).to(values.dtype)


@segment_sums.register_fake
def _(values, order, starts):
    return values.new_empty(starts.shape[0] - 1)


def work_items(starts: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """How segments are cut into parts of at most SPLIT entries; every shape is known without reading a value.

    Returns, per item, its latent (F past the last) and which part of it; per latent, its first scratch slot and its
    number of parts; and the latents that may have more than one.
    """
    F = starts.shape[0] - 1
    counts = starts.diff()
    parts = ((counts + SPLIT - 1) // SPLIT).clamp(min=1)
    ends = parts.cumsum(0)
    items = torch.arange(F + E // SPLIT, device=starts.device)
    latent_of = torch.searchsorted(ends, items, right=True)
    part_of = items - (ends - parts)[latent_of.clamp(max=F - 1)]
    scratch = torch.where(parts > 1, parts, 0)
    slot_of = scratch.cumsum(0) - scratch
    longest = counts.topk(min(F, E // SPLIT)).indices
    return latent_of.int(), part_of.int(), slot_of.int(), parts.int(), longest.int()
