"""Who is measured. A provider turns a task into a job in its own classes; a peer's package is imported when asked for."""

from .base import Job, Provider, Task, Unsupported, Weights
from .dense import Compiled, Dense, EncoderGemm
from .dictionary_learning import DictionaryLearning
from .ours import Fastsae
from .sae_lens import SAELens
from .sparsify import Sparsify

PROVIDERS: tuple[Provider, ...] = (
    Fastsae(),
    Fastsae(fused_adam=True),
    Fastsae(fused_adam=True, bf16_moments=True),
    Fastsae(autograd_loss=True),
    Fastsae(dense=True),
    Fastsae(tile_maxima=True),
    SAELens(),
    DictionaryLearning(),
    Sparsify(),
    Dense(),
    Compiled(),
    EncoderGemm(),
)

__all__ = ["PROVIDERS", "Job", "Provider", "Task", "Unsupported", "Weights"]
