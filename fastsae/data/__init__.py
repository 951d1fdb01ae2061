"""Sources of activations, and what stands between them and a training step.

    source = Shuffle(Prefetch(Shards("acts", seed=1)), rows=1 << 18, batch_size=4096, seed=1)
"""

from .documents import open_dataset
from .language_model import Activations
from .models import LanguageModel
from .prefetch import Prefetch
from .saelens_cache import SAELensCache
from .shards import ShardError, Shards, write_shards
from .shuffle import Shuffle
from .source import Batch, NotResumable, Plain, Source, as_source
from .synthetic import Superposition
from .tokens import Tokens, special_token_ids

__all__ = [
    "Activations", "Batch", "LanguageModel", "NotResumable", "Plain", "Prefetch", "SAELensCache", "ShardError",
    "Shards", "Shuffle", "Source", "Superposition", "Tokens", "as_source", "open_dataset", "special_token_ids",
    "write_shards",
]  # fmt: skip
