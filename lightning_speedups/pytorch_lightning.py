"""All that ``lightning_speedups`` exports, its LightningModules made of ``pytorch_lightning``'s.

Tricks go with either of Lightning's packages and are the same here; a LightningModule can be of one only.
"""

from pytorch_lightning import LightningModule

from lightning_speedups import *  # noqa: F403
from lightning_speedups import __all__ as __all__
from lightning_speedups.models.transfer_classifier import Transfer


class TransferClassifier(Transfer, LightningModule):  # type: ignore[misc, no-redef]  # noqa: D101
    __doc__ = Transfer.__doc__
