"""Networks from elsewhere and for elsewhere: torch.nn.utils.prune's masks, and the checkpoints of HYDRA."""

from certprune.exchange.hydra import load_hydra
from certprune.exchange.torch_prune import from_torch_prune, to_torch_prune

__all__ = ["from_torch_prune", "load_hydra", "to_torch_prune"]
