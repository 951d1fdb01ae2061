"""What a training run is, as frozen dataclasses: from Python, from YAML and from flags, and back.

    TrainConfig(sae=SAEConfig(k=64), loss=LossConfig(prefixes=(512, 2048)))

A docstring under a field is its `--help`. None means off, or chosen as the docstring says. Every value is checked when the
object is made; nothing else happens then.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from .settings import above, at_least, check, read_text, unknown

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class SAEConfig:
    """The autoencoder."""

    activation: Literal["topk", "abstopk", "batchtopk", "jumprelu", "relu", "gated"] = "topk"
    """Which latents fire."""
    k: int = 32
    """How many fire in a row (topk, abstopk), or in a row on average (batchtopk)."""
    expansion: int = 64
    """Latents per input dimension."""
    d_sae: int | None = None
    """Latents; expansion times d_in unless given."""
    theta: float = 0.01
    """First threshold of jumprelu."""
    bandwidth: float = 0.05
    """Width of jumprelu's straight-through window around the threshold."""
    ste_to_input: bool = False
    """Whether jumprelu's straight-through gradient reaches the pre-activations too."""
    decoder_norm: float = 0.1
    """Norm of each decoder row at the start; the encoder starts as its transpose."""
    unit_norm: bool = False
    """Keep decoder rows at norm 1 and their gradient at right angles to them."""
    rescale_acts_by_decoder_norm: bool = True
    """Rank latents by pre-activation times decoder norm (topk, abstopk, batchtopk)."""
    apply_b_dec_to_input: bool | None = None
    """Subtract b_dec from the input; yes unless input and target differ."""
    b_dec: Literal["zero", "mean", "geometric_median"] = "zero"
    """What b_dec starts as; a statistic is of the first batches."""
    normalize: Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"] = "none"
    """Scale of the input: as it is, one factor for all (folded into the saved weights), or one for each row."""
    skip: bool = False
    """Add a linear map of the input to the output."""
    dtype: Dtype = "float32"
    """Of the weights."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, 1, "k", "expansion", "d_sae")
        at_least(self, 0, "theta")
        above(self, 0, "bandwidth", "decoder_norm")


@dataclass(frozen=True)
class LossConfig:
    """What is asked of a code: error + coefficient · sparsity + dead_coefficient · dead."""

    error: Literal["mse", "fvu"] = "mse"
    """Squared error, or its share of the variance."""
    sparsity: Literal["auto", "none", "lp", "l0", "l0_to_target", "l0_tanh"] = "auto"
    """Sparsity term; auto is lp for relu and gated, l0 for jumprelu, none for the rest."""
    coefficient: float = 1.0
    """Weight of the sparsity term."""
    warm_up: int = 0
    """Steps over which that weight rises from 0."""
    weigh_by_norm: bool = True
    """Whether lp counts an activation times its decoder norm."""
    p: float = 1.0
    """Power of lp at the start."""
    p_end: float | None = None
    """Power of lp at the end; as at the start unless given."""
    target_l0: float | None = None
    """What l0_to_target aims at."""
    tanh_scale: float = 4.0
    """Steepness of l0_tanh."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: widths that must reconstruct on their own; the whole is added."""
    ks: tuple[int, ...] = ()
    """Hierarchical: how many of a row's strongest latents must reconstruct on their own; the whole is added."""
    dead: Literal["auto", "none", "auxk", "auxk_normalised", "ghost", "pre_act", "resample"] = "auto"
    """What revives dead latents; auto is auxk for topk, abstopk and batchtopk, none for the rest."""
    dead_coefficient: float = 1.0
    """Weight of the term for dead latents."""
    dead_window: int | None = None
    """Tokens without firing after which a latent is dead; a tenth of the run, at most 10,000,000, unless given."""
    dead_cap: int = 16384
    """How many dead latents take part in a step."""
    auxk: int | None = None
    """How many of them fire in a row; half of the output dimensions unless given."""
    resample_every: int | None = None
    """Tokens between resamplings; the dead window unless given."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, 0, "coefficient", "warm_up", "dead_coefficient")
        at_least(self, 1, "dead_window", "dead_cap", "auxk", "resample_every")
        above(self, 0, "p", "p_end", "target_l0", "tanh_scale")
        for name in ("prefixes", "ks"):
            widths = getattr(self, name)
            if any(w < 1 for w in widths) or list(widths) != sorted(set(widths)):
                raise ValueError(f"{name}={list(widths)}: pass increasing whole numbers >= 1")
        if self.prefixes and self.ks:
            raise ValueError(f"prefixes={list(self.prefixes)} and ks={list(self.ks)}: pass one of them")
        if self.sparsity == "l0_to_target" and self.target_l0 is None:
            raise ValueError("sparsity='l0_to_target' without target_l0: pass target_l0, the L0 to aim at")


@dataclass(frozen=True)
class OptimConfig:
    """How weights move."""

    optimizer: str = "fused_adam"
    """fused_adam stores no gradient; or the name of an optimizer in torch.optim, e.g. Adam, AdamW, SGD."""
    lr: float | None = None
    """2e-3 / sqrt(d_sae / 16384) unless given."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    eps: float = 1e-8
    """Of Adam."""
    weight_decay: float = 0.0
    """As the optimizer means it."""
    max_norm: float | None = 1.0
    """Clip the norm of all gradients together."""
    lr_warm_up: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_decay: int = 0
    """Steps at the end over which it falls to 0."""
    k_first: int | None = None
    """k at the first step; falls to k over k_steps."""
    k_steps: int = 0
    """Steps over which it does."""
    micro_batch: int | None = None
    """Rows of one forward and backward pass; their gradients add up. Each is a batch of its own to batchtopk and to fvu."""
    compute_dtype: Dtype | None = None
    """Compute in this; the weights that are kept stay exact."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """How fused_adam keeps its moments; bf16 rounds stochastically."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What a loss or gradient that is not finite does; weights never see it."""
    spike: float | None = None
    """Skip a step whose loss is this many times the running mean."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, 0, "lr", "eps", "weight_decay", "lr_warm_up", "lr_decay", "k_steps")
        at_least(self, 1, "k_first", "micro_batch")
        above(self, 0, "max_norm")
        above(self, 1, "spike")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas={self.betas}: pass two numbers from 0 to below 1")


@dataclass(frozen=True)
class DataConfig:
    """Where activations come from."""

    source: Literal["model", "shards", "saelens_cache", "synthetic", "given"] = "model"
    """A live language model, shards that fastsae wrote, a folder that SAELens cached, features in superposition, or what is
    passed in Python."""
    path: str | None = None
    """Folder of the shards or of the cache."""
    model: str = "embedded"
    """Name or folder of a language model; embedded is the small one that comes with fastsae."""
    backend: Literal["auto", "transformer_lens", "huggingface"] = "auto"
    """What runs it; transformer_lens if installed, unless given."""
    hook: str = "blocks.2.hook_resid_post"
    """Where activations are read."""
    target_hook: str | None = None
    """Where the activations to predict are read (transcoder)."""
    dataset: str = "embedded"
    """Name or folder of a dataset of texts or tokens; embedded is the one the embedded model was trained on."""
    column: str | None = None
    """Its column; text, tokens or input_ids unless given."""
    split: str = "train"
    """Its split."""
    streaming: bool = False
    """Read it from the Hub while it is used."""
    context: int = 128
    """Tokens of a sequence."""
    sequences: int = 32
    """Sequences of a forward pass of the model."""
    max_norm_multiple: float | None = None
    """Drop rows whose norm is this many times the median."""
    keep_special_tokens: bool = False
    """Keep the activations of BOS, EOS and padding."""
    model_dtype: Dtype = "float32"
    """Of the model, and of its activations until they reach the SAE."""
    model_device: str | None = None
    """Device of the model; the SAE's unless given."""
    buffer: int = 65536
    """Rows of the shuffle buffer."""
    prefetch: int = 2
    """Chunks read ahead in the background; 0 for none."""
    features: int = 512
    """Ground-truth features of synthetic data."""
    d_in: int = 64
    """Dimensions of synthetic data."""
    active: float = 5.0
    """Expected number of synthetic features in a row."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, 1, "context", "sequences", "buffer", "features", "d_in")
        at_least(self, 0, "prefetch")
        above(self, 0, "active", "max_norm_multiple")
        if self.source in ("shards", "saelens_cache") and self.path is None:
            raise ValueError(f"source={self.source!r} without a path: pass path, the folder to read")


# one stream of activations serves all SAEs of a sweep; of the data only where an SAE reads and aims may differ
NOT_SWEPT = {f.name for f in dataclasses.fields(DataConfig)} - {"hook", "target_hook"} | {"prefixes", "ks", "betas"}


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    sae: SAEConfig = field(default_factory=SAEConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokens: int = 300_000
    """Rows of activations to train on."""
    batch_size: int = 1024
    """Rows of a step."""
    sweep: tuple[str, ...] = ()
    """Several SAEs on the same activations, e.g. k=16,32,64 lr=1e-3,5e-4,2e-4; lists run side by side."""
    seed: int = 0
    """Of the weights, the data's order and everything else."""
    device: str = "auto"
    """cuda if there is one, else cpu, unless given."""
    out: str = "runs/sae"
    """Folder of the run: config, metrics, checkpoints, the finished SAE."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the newest checkpoint in that folder, or refuse a folder that has one."""
    save_every: int | None = 1000
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """Checkpoints to keep."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    loggers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Send metrics there too."""
    wandb_project: str = "fastsae"
    """Project of wandb."""

    def __post_init__(self) -> None:
        check(self)
        at_least(self, 1, "tokens", "batch_size", "save_every", "keep", "log_every")
        micro = self.optim.micro_batch
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of micro_batch={micro}: pass one that is")
        if self.data.buffer < self.batch_size:
            raise ValueError(f"buffer={self.data.buffer} is below batch_size={self.batch_size}: pass a buffer >= batch_size")
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens={self.tokens} is below batch_size={self.batch_size}: pass tokens >= batch_size")
        if self.optim.k_first is not None and not 0 < self.optim.k_steps < self.steps:
            k_steps = self.optim.k_steps
            raise ValueError(f"k_first without an end: k_steps={k_steps}; pass k_steps from 1 to {self.steps - 1}")
        self.members()

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_size

    def members(self) -> dict[str, "TrainConfig"]:
        """The runs of one SAE each that a sweep stands for, by name; this one alone, named "", where there is none."""
        if not self.sweep:
            return {"": self}
        columns = [_sweep_column(text) for text in self.sweep]
        groups = [self.sae, self.loss, self.optim, self.data]
        hints: dict[str, Any] = {}
        for group in groups:
            hints |= get_type_hints(type(group))
        for name, _ in columns:
            if name not in hints or name in NOT_SWEPT:
                raise ValueError(unknown(f"sweep={name}", name, sorted(set(hints) - NOT_SWEPT)))
        lengths = {name: len(values) for name, values in columns}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"sweep has lists of different lengths {lengths}: pass as many values for each")
        members: dict[str, TrainConfig] = {}
        alone = dataclasses.replace(self, sweep=())
        for values in zip(*(v for _, v in columns), strict=True):
            changes = {name: read_text(hints[name], value) for (name, _), value in zip(columns, values, strict=True)}
            label = ",".join(f"{name}={value}" for name, value in changes.items()).replace("/", "-")
            members[label] = with_values(alone, changes)
        if len(members) != len(columns[0][1]):
            raise ValueError(f"sweep={list(self.sweep)} names the same SAE twice: pass different values")
        return members


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The config with these fields changed, wherever they live: {"k": 64, "lr": 1e-3}."""
    groups = ("sae", "loss", "optim", "data")
    homes = {f.name: group for group in groups for f in dataclasses.fields(getattr(config, group))}
    changed: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in homes:
            raise ValueError(unknown(name, name, list(homes)))
        changed.setdefault(homes[name], {})[name] = value
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **new) for group, new in changed.items()}
    )


def _sweep_column(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"sweep={text!r}: pass a setting and its values, e.g. k=16,32,64")
    return name, values.split(",")
