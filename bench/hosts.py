"""Cases of the host libraries, timed with fastsae.patch and without by patched.py: .venv-hosts/bin/python -m bench --only hosts

A case is a function that builds something of the library and returns one call of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

N, D = 1024, 768


@dataclass(frozen=True)
class Built:
    call: Callable[[int], object]
    held: int
    """bytes that have to be there: parameters, and in training as much again for gradients and for each of two moments"""


def saelens_topk_step(device: torch.device) -> Built:
    """SAETrainer.step of TopK, F 24,576, k 32"""
    from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=24_576, k=32, device=str(device)))
    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=10**9, device=str(device),
        autocast=False, lr=3e-4, lr_end=3e-5, lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9,
        adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=N, dead_feature_window=1000,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    batches = torch.randn(4, N, D, device=device)
    held = 4 * sum(p.nbytes for p in sae.parameters())
    return Built(lambda i: trainer.step(batches[i % 4]), held + batches.nbytes)


def saelens_jumprelu_forward(device: torch.device) -> Built:
    """JumpReLUSAE, F 65,536, about 64 latents a row"""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=65_536, device=str(device)))
    with torch.no_grad():
        sae.W_enc.normal_().div_(D**0.5)  # pre-activations are standard normal, of which one in a thousand is over 3.1
        sae.threshold.fill_(3.1)
    batches = torch.randn(4, N, D, device=device)
    return Built(torch.no_grad()(lambda i: sae(batches[i % 4])), sum(p.nbytes for p in sae.parameters()) + batches.nbytes)


CASES = {"sae_lens": (saelens_topk_step, saelens_jumprelu_forward)}
