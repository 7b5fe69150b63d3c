"""Worker processes for the loaders, as many as it takes: what many trainings wait for is their data (Mohan et al.,
arXiv:2007.06775).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_speedups.attach.data_wait import DataWait
from lightning_speedups.attach.loaders import LoaderSwap
from lightning_speedups.attach.randomness import same_randomness
from lightning_speedups.attach.range_test import shows_progress
from lightning_speedups.attach.rehearsal import step_seconds
from lightning_speedups.attach.trick import Trick
from lightning_speedups.attach.workers import reason_against, try_workers, usable_cpus, with_workers
from lightning_speedups.core.arguments import check_choice, check_number
from lightning_speedups.core.batch import tensors_in
from lightning_speedups.core.counts import counted

Tune = Literal["cpus", "measure"]
HIDDEN = 0.05
"""Share of the time that training may wait for data without the loader being the bottleneck."""


def best_count(loads: Mapping[int, float], step: float) -> int:
    """Return the smallest number of workers with which training is as quick as with any.

    None at all, which load between the steps, are taken to load as fast as one.

    Args:
        loads: Seconds that a batch takes some numbers of workers, 1 among them.
        step: Seconds of a training step.

    Example:
        >>> [best_count({1: load, 2: load / 2, 4: load / 4}, step=0.1) for load in (0.004, 0.09, 0.2, 9.0)]
        [0, 1, 2, 4]
    """
    cycles = {0: loads[1] + step} | {count: max(load, step) for count, load in loads.items()}
    return min(count for count, seconds in cycles.items() if seconds <= (1 + HIDDEN) * min(cycles.values()))


def verdict(waited: float, seconds: float) -> str:
    """Say whether the loader is the bottleneck.

    Args:
        waited: Seconds that training has waited for its batches.
        seconds: In how many; 0: too few to tell.

    Example:
        >>> verdict(1.0, 4.0)
        'training waits for data 25% of the time: the loader is the bottleneck'
    """
    if not seconds:
        return "the run is too short to tell whether the loader is the bottleneck"
    rule = "is" if waited > HIDDEN * seconds else "is not"
    return f"training waits for data {waited / seconds:.0%} of the time: the loader {rule} the bottleneck"


def passed_by(batch: Any) -> set[str]:
    """Return the types in a batch that hold tensors and that ``pin_memory`` passes by.

    Args:
        batch: As a loader hands it out.

    Example:
        >>> class Pair: ...
        >>> pair = Pair()
        >>> pair.image = torch.ones(2)
        >>> passed_by({"images": [torch.ones(2)], "pair": pair, "name": "a"})
        {'Pair'}
    """
    others = (leaf for leaf in tree_leaves(batch) if not (hasattr(leaf, "pin_memory") or isinstance(leaf, Mapping)))
    return {type(leaf).__name__ for leaf in others if any(True for _ in tensors_in(leaf))}


@dataclass
class Run:
    """What belongs to a run.

    Attributes:
        facts: What was done to the training loader, in messages.
    """

    facts: str = ""


class LoaderTuning(Trick):
    """Gives loaders worker processes and pinned memory, and says whether training waits for its data.

    Loaders, DataModule and module stay untouched: the fit goes on with copies of the loaders, for training and
    validation, that have workers, and for CUDA devices pinned memory. Those of the training loader go on from epoch to
    epoch, as long as nobody changes the dataset or its transforms; what is changed in place in a large list or array
    does not reach them. A loader that has workers keeps them. A worker tries a batch first; where that fails, or where
    the dataset holds what processes cannot share, the loader stays as it is. One line, after 70 batches, says what was
    done or why not, and how long training waits for data: below 5 % of the time no faster loading will help.

    Samples and their order stay what they are, and all that is drawn in this process. What draws at random in the
    dataset draws other numbers in workers, as ever; if it used torch's own generator in this process, later epochs come
    in another order than before.

    ``tune="measure"`` tries 1, 2, 4 and more workers for a second each before the first step, until a batch takes them
    no longer than three forward passes take a copy of the module, and takes the smallest number with which training is
    as quick as with any, or none. With ``reload_dataloaders_every_n_epochs`` nothing is measured. Where random
    transforms are to come again in the next run, keep the default.

    When not to use it: training on a CPU whose threads take all of it (it leaves the loaders as they are); data in
    memory (``InMemoryLoader``); with iterable datasets, loaders that iterate in a way of
    their own or whose place checkpoints hold (it leaves these as they are); with several training loaders, each of
    which gets as many; batch samplers of your own that draw before they are asked for a batch; datasets that keep notes
    of what they hand out, since each worker has its own copy; where memory is scarce.

    Args:
        tune: ``"cpus"``: one worker less than there are CPUs for this process, by affinity and container; where the
            model computes on them too, as many less as torch has threads; ``"measure"``: as few of these as hide the
            loading.
        max_workers: Largest number of workers, 0 or more. 0: only say whether the loader is the bottleneck.

    Methods:
        tuned: The same for a DataLoader outside of a Trainer.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer is none of Lightning's.

    Source:
        Mohan et al., arXiv:2007.06775 (data stalls).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LoaderTuning(tune="measure")])
    """

    run_as = Run
    run: Run

    def __init__(self, tune: Tune = "cpus", max_workers: int = 8) -> None:
        super().__init__()
        check_choice("tune", tune, get_args(Tune))
        check_number("max_workers", max_workers, 0, whole=True)
        self.tune, self.max_workers, self.wait = tune, max_workers, DataWait(self, self._tell)
        self.grips = (LoaderSwap(self, self._swap, order=-2), self.wait)

    def tuned(self, loader: DataLoader[Any], step: float = 0.0) -> DataLoader[Any]:
        """Return a copy of a DataLoader, over the same data and sampler, with workers; for training without a Trainer.

        Args:
            loader: The loader; it stays as it is.
            step: Seconds of a training step, for ``tune="measure"``. 0: as many workers as load fastest.

        Example:
            >>> [*LoaderTuning().tuned(DataLoader(range(4), batch_size=2))]
            [tensor([0, 1]), tensor([2, 3])]
        """
        loader, facts = self._tune(loader, None, step)
        rank_zero_info(f"{self.name}: {facts}.")
        return loader

    def _tune(self, loader: Any, trainer: Trainer | None, step: float = 0.0) -> tuple[Any, str]:
        """Return the loader to go on with, and what was done."""
        device, processes, keep, show = "cuda" if torch.cuda.is_available() else "cpu", 1, True, True
        if trainer is not None:
            device, processes = trainer.strategy.root_device.type, max(1, trainer.num_devices)
            keep = trainer.training and not trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            show = shows_progress(trainer)
        own, cpus = getattr(loader, "num_workers", 0), usable_cpus(processes)
        busy = torch.get_num_threads() if device == "cpu" else 1  # workers there would only take turns with training
        count = own or max(0, min(self.max_workers, cpus - busy))
        reason = reason_against(loader) or ("it has workers" if own and device == "cpu" else "")
        if not (reason or count):
            reason = (
                f"{counted(cpus, 'CPU')}, {busy} at work, and `max_workers={self.max_workers}` leave none for workers"
            )
        if reason:
            return loader, f"a loader is left as it is, since {reason}"
        measures, loads = self.tune == "measure" and keep and not own, dict[int, float]()
        tries = [2**power for power in range(count.bit_length())] if measures else [1]
        try:
            with same_randomness(trainer):
                indices = cycle(copy.deepcopy(loader._index_sampler, {id(loader.dataset): loader.dataset}))
                for one in Tqdm(tries, "numbers of workers", leave=False, disable=not (measures and show)):
                    loads[one], batch = try_workers(loader, one, indices, seconds=float(measures))
                    if measures and trainer is not None:
                        step = step or step_seconds(trainer, batch)
                    if loads[one] <= step:
                        break
        except Exception as error:
            said = (str(error).strip() or repr(error)).splitlines()[-1]
            return loader, f"a loader is left as it is, since a trial failed ({said})"
        count = best_count(loads, step) if measures else count
        pin = device == "cuda" and all(tensor.layout == torch.strided for tensor in tensors_in(batch))
        others = ", ".join(sorted(passed_by(batch)))
        pinned = f", pinned memory{f' (which passes by {others})' if others else ''}" if pin else ""
        twin = with_workers(loader, count, pin, keep) if count else loader
        return twin, f"{counted(count, 'worker')} on {counted(cpus, 'CPU')}{pinned}"

    def _swap(self, trainer: Trainer, loader: Any) -> Any:
        loader, facts = self._tune(loader, trainer)
        if trainer.training:
            self.run.facts = facts
        return loader

    def _tell(self, waited: float, seconds: float) -> None:
        rank_zero_info(f"{self.name}: {self.run.facts}; {verdict(waited, seconds)}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is known by now."""
        super().on_train_end(trainer, pl_module)
        self.wait.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say why a worker may have ended: torch's error names a process, and perhaps a signal."""
        if "DataLoader worker (pid" in str(exception):  # and not in the errors of datasets
            cause = "What kills a worker is most often a lack of memory, of which each takes its own"
            exception.add_note(f"{self.name}: {self.run.facts}. {cause}: try a smaller `max_workers`.")
        super().on_exception(trainer, pl_module, exception)
