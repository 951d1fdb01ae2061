"""shards: activations on disk, read in shuffled batches. Rows carry their number, so that a wrong one is seen."""

from itertools import cycle
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastsae.data import SAELensCache, Shards, Shuffle, write_shards
from fastsae.data.source import Plain

from ..check import Wrong
from ..providers import Unsupported
from .batches import BUFFER, DRAWS, distinct, draw
from .work import Flow, Prepared, Work

CONTEXT = 64
HOOK = "blocks.0.hook_resid_post"


def prepare(device: torch.device, tiny: bool, folder: Path) -> Prepared:
    rows, D, batch = (2048, 64, 64) if tiny else (65_536, 768, 1024)
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(rows)
    write_shards(Plain(iter(x.split(rows // 4))), folder / "shards", shard_bytes=x.nbytes // 4)
    buffer = BUFFER * batch

    def flow(source: Shards | SAELensCache) -> Flow:
        shuffled = Shuffle(source, buffer, batch, device=device)  # type: ignore[arg-type]
        return Flow(lambda: draw(shuffled), lambda: draw(shuffled), "each row once an epoch")  # type: ignore[arg-type]

    def cache() -> Path:
        """What SAELens' CacheActivationsRunner writes."""
        from datasets import Array2D, Dataset, Features, disable_progress_bars

        disable_progress_bars()
        path = folder / "cache"
        if not path.exists():
            kind = Features({HOOK: Array2D((CONTEXT, D), "float32")})
            Dataset.from_dict({HOOK: x.view(-1, CONTEXT, D).numpy()}, features=kind).save_to_disk(path)
        return path

    def sae_lens() -> Flow:
        from sae_lens.training.activations_store import ActivationsStore

        store = ActivationsStore(
            None, None, streaming=False, hook_name=HOOK, hook_head_index=None, context_size=CONTEXT, d_in=D,
            n_batches_in_buffer=buffer // CONTEXT, total_training_tokens=rows, store_batch_size_prompts=batch // CONTEXT,
            train_batch_size_tokens=batch, prepend_bos=False, normalize_activations="none", device=device, dtype="float32",
            cached_activations_path=str(cache()),
        )  # fmt: skip
        return Flow(lambda: draw(store), lambda: draw(store), "ActivationsStore of cached activations, its mixing buffer")

    def alone() -> Flow:
        files = [safe_open(file, "pt") for file in sorted((folder / "shards").glob("*.safetensors"))]
        blocks = cycle([(f.get_slice("x"), i) for f in files for i in range(0, rows // 4, batch)])

        def read() -> list[Tensor]:
            return [at[i : i + batch].clone().to(device) for at, i in (next(blocks) for _ in range(DRAWS))]

        return Flow(read, read, "in the order of the file, not shuffled", ceiling=True)

    def none(name: str) -> Flow:
        raise Unsupported(f"{name} reads no activations from disk")

    def check(batches: list[Tensor]) -> None:
        found = torch.cat(batches).cpu()
        if len(batches) != DRAWS or found.shape != (DRAWS * batch, D) or found.dtype != x.dtype:
            raise Wrong(f"{len(batches)} batches of {list(found.shape)} {found.dtype} rows in all, not {DRAWS} of {batch}")
        at = found[:, 0].long().clamp(0, rows - 1)
        if not found.equal(x[at]):
            raise Wrong("a row is not what was written")
        if distinct(at) < 0.5:
            raise Wrong("rows come again and again")

    ways = {
        "fastsae": lambda: flow(Shards(folder / "shards", block_rows=batch)),
        "fastsae SAELens cache": lambda: flow(SAELensCache(cache(), sequences=batch // CONTEXT)),
        "sae-lens": sae_lens,
        "dictionary-learning": lambda: none("dictionary_learning"),
        "sparsify": lambda: none("sparsify"),
        "safetensors alone": alone,
    }
    said = f"{rows:,} rows of {D} in fp32 on disk, read in shuffled batches of {batch} through a buffer of {BUFFER} of them"
    return Prepared(DRAWS * batch, DRAWS * batch * D * 4, said, ways, check)


WORK = Work("shards", "rows", prepare)
