"""Complete verification: prove or break what incomplete bounds leave open, given time.

:mod:`reduced` takes everything out of a network that is decided on the region at hand; :mod:`bounding` bounds many
subdomains of what is left at once, with optimised slopes and split multipliers; :mod:`branching` chooses what to
split; :mod:`tree` searches; :mod:`decision` asks.
"""

from .decision import decide, decide_rows
from .tree import Outcome

__all__ = ["Outcome", "decide", "decide_rows"]
