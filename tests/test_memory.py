"""Nothing as large as a quarter of [N, F] exists at any time of a training step, inside operators too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsae import SAE, BatchTopK, JumpReLU, TopK, functional
from fastsae.kernels import backend, scores
from fastsae.optim import FusedAdam

N, D, F, L0 = 4096, 256, 16384, 64
LIMIT = N * F // 4


class Largest(TorchDispatchMode):
    """The most elements that any tensor made by any torch operation has.

    torch runs the inside of an operator with dispatch modes off; so an operator of ours is replaced by the Python behind it,
    run under this mode.
    """

    def __init__(self):
        super().__init__()
        self.elements, self.by, self.operators = 0, "", set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastsae":
            self.operators.add(func._opname)
            with self:
                return backend.IMPLEMENTATIONS[func._opname](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((result, kwargs)):
            if isinstance(t, torch.Tensor) and (held := self.held(t)) > self.elements:
                self.elements, self.by = held, str(func)
        return result

    @staticmethod
    def held(t: torch.Tensor) -> int:
        """Elements in memory: an expanded view holds as few as its storage, a sparse matrix as many as its values."""
        if t.layout != torch.strided:
            return t._nnz()
        return min(t.numel(), t.untyped_storage().nbytes() // t.element_size())


def largest_allocation(profile) -> int:
    """Bytes. Counted by torch's allocator, which also sees what a C++ kernel keeps to itself."""
    return max((e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), default=0)


def step(sae, x):
    y = sae(x)
    (y - x).square().sum(1).mean().backward()


def loss_step(sae, x):
    """The training step: error, squared error and L1 in the pass that decodes."""
    levels = functional.reconstruction_loss(
        sae.encode_sparse(x), sae.W_dec, sae.b_dec, x, sae.W_dec.norm(dim=1), prefixes=[F // 4]
    )
    (levels.sse.sum(1).mean() + levels.l1.mean()).backward()


def trained(activation) -> tuple[SAE, torch.Tensor]:
    """Past initialisation: about L0 of F latents fire in a row."""
    sae, x = SAE(D, F, activation, decoder_norm=1.0), torch.randn(N, D)  # pre-activations are standard normal
    assert 0.8 * L0 < float(sae.encode_sparse(x[:64]).l0().float().mean()) < 1.25 * L0
    return sae, x


@pytest.mark.parametrize(
    ("activation", "run"),
    [
        (lambda: TopK(L0), step),
        (lambda: TopK(L0), loss_step),
        (lambda: BatchTopK(L0), step),
        (lambda: BatchTopK(L0), loss_step),
        (lambda: JumpReLU(theta=2.7), step),  # L0 57, just sparse enough (1 / 256) for the sparse path
        (lambda: JumpReLU(theta=2.7), loss_step),
        (lambda: JumpReLU(theta=2.6), step),  # L0 76: the dense path takes over
    ],
    ids=["TopK", "TopK loss", "BatchTopK", "BatchTopK loss", "JumpReLU", "JumpReLU loss", "JumpReLU dense"],
)
def test_a_step_holds_less_than_a_quarter_of_the_code(activation, run, request):
    sae, x = trained(activation())
    with Largest() as seen, torch.profiler.profile(profile_memory=True) as profile:
        run(sae, x.clone().requires_grad_())
    assert all(p.grad is not None for p in sae.parameters())
    assert any("select" in name for name in seen.operators)
    sparse = {"encode_entries", "latent_backward_op"} <= seen.operators
    assert sparse != request.node.callspec.id.endswith("dense")
    assert seen.elements <= LIMIT, f"{seen.by} made {seen.elements} elements of {LIMIT} allowed"
    assert seen.elements >= F * D, "the guard does not even see the weights' gradient"
    # nor does C++ keep more to itself than 64-bit indices of a block would be
    assert 4 * F * D <= largest_allocation(profile) <= 8 * LIMIT


def test_the_guard_catches_a_dense_step():
    sae, x = trained(TopK(L0))
    rows = 1100  # a dense step of just over a quarter of the rows is already too much
    with Largest() as seen, torch.profiler.profile(profile_memory=True) as profile:
        sae.decode(((x[:rows] - sae.b_dec) @ sae.W_enc + sae.b_enc).relu())
    assert seen.elements == rows * F > LIMIT and largest_allocation(profile) == 4 * rows * F


def test_the_guard_looks_into_operators(monkeypatch):
    sae, x = trained(TopK(L0))
    real = backend.IMPLEMENTATIONS["select_topk_forward"]
    wasteful = lambda x, W, b, *rest: (x.new_empty(len(x), W.shape[1]), real(x, W, b, *rest))[1]  # noqa: E731
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "select_topk_forward", wasteful)
    with Largest() as seen, torch.no_grad():
        sae(x[:1100])
    assert seen.elements == 1100 * F > LIMIT


def test_the_guard_counts_what_is_held():
    assert Largest.held(torch.zeros(1).expand(1000, 1000)) == 1
    assert Largest.held(torch.zeros(1000)[:10]) == 10
    assert Largest.held(torch.zeros(30, 30).to_sparse_csr()) == 0


def test_a_fused_step_holds_little_beside_parameters_and_moments():
    """64x: the memory events of a step's operators peak within 12 % of what has to be there."""
    d_in, d_sae = 1024, 65536
    sae, x = SAE(d_in, d_sae, TopK(32)), torch.randn(2048, d_in)
    optimizer = FusedAdam(sae)

    def train() -> None:
        optimizer.zero_grad()
        step(sae, x)
        optimizer.step()

    train()  # makes the moments
    scores._spare.clear()  # the piece of scores counts
    with torch.profiler.profile(profile_memory=True) as profile:
        train()
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    held = torch.tensor(sizes).cumsum(0)
    kept = 3 * sum(p.nbytes for p in sae.parameters())
    assert sae.W_dec.grad is None and 0.01 * kept < held.max() < 0.12 * kept
