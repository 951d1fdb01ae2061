from . import activations as activations
from . import functional as functional
from . import kernels as kernels
from . import losses as losses
from . import sae as sae
from . import schedules as schedules
from . import sparse_code as sparse_code
from .activations import AbsTopK as AbsTopK
from .activations import Activation as Activation
from .activations import BatchTopK as BatchTopK
from .activations import Gated as Gated
from .activations import JumpReLU as JumpReLU
from .activations import ReLU as ReLU
from .activations import TopK as TopK
from .sae import SAE as SAE
from .sparse_code import SparseCode as SparseCode

__version__: str
