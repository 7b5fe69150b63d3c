"""What a trick has patched on a Trainer, found without knowing what that is."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.optim import Optimizer

ADD_PARAM_GROUP = Optimizer.add_param_group


def patched(trainer: Trainer) -> set[str]:
    """Names of instance attributes that hide a method of the class, and what was changed for every Trainer."""
    loop, module = trainer.fit_loop, trainer.lightning_module
    owners = {
        "trainer": [trainer],
        "strategy": [trainer.strategy],
        "precision": [trainer.precision_plugin],
        "loops": [loop, loop.epoch_loop, loop.epoch_loop.automatic_optimization, loop.epoch_loop.val_loop],
        "module": [] if module is None else module.modules(),
        "optimizers": [getattr(one, "_optimizer", one) for one in trainer.strategy.optimizers],
        "monitors": [callback for callback in trainer.callbacks if isinstance(callback, LearningRateMonitor)],
    }
    found = {
        f"{kind}.{name}"
        for kind, members in owners.items()
        for owner in members
        for name in vars(owner)
        if callable(getattr(type(owner), name, None)) and not hasattr(vars(owner)[name], "_wrapped_by_lr_sched")
    }
    if Optimizer.add_param_group is not ADD_PARAM_GROUP:
        found.add("Optimizer.add_param_group")
    return found
