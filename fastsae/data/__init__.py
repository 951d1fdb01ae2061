"""Sources of activations, and what stands between them and a training step.

    source = Shuffle(Prefetch(Shards("acts", seed=1)), rows=1 << 18, batch_size=4096, seed=1)
"""

from .prefetch import Prefetch
from .saelens_cache import SAELensCache
from .shards import ShardError, Shards, write_shards
from .shuffle import Shuffle
from .source import Batch, NotResumable, Plain, Source, as_source
from .synthetic import Superposition

__all__ = [
    "Batch", "NotResumable", "Plain", "Prefetch", "SAELensCache", "ShardError", "Shards", "Shuffle", "Source", "Superposition",
    "as_source", "write_shards",
]  # fmt: skip
