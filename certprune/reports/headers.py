"""What every kind of ledger says of itself in its header."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HeaderView:
    """A ledger's file and what its header says."""

    path: Path
    header: dict

    @property
    def norm(self) -> str:
        return str(self.header.get("norm", "linf"))

    @property
    def model(self) -> str:
        return str(self.header.get("model", ""))

    @property
    def method(self) -> str:
        """The methods that were tried, cheapest first, joined by ``+``."""
        method = self.header.get("method", "")
        return "+".join(map(str, method)) if isinstance(method, list) else str(method)

    @property
    def images(self) -> str:
        """Which images were certified, e.g. ``mnist-5k test``."""
        return " ".join(str(self.header[key]) for key in ("data", "split") if self.header.get(key))
