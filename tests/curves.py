"""What a trick makes of the values of a parameter group, said a second time by torch or in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo import Classifier

OWN = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
"""The values of `Classifier`'s own optimizer."""


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run.

    Args:
        planned: How many the epochs have.
        done: How many they really had: fewer where a scaler skipped some.
        limit: How many the run may have, if it ends before its last epoch does.
    """

    planned: Sequence[int] = (4, 4, 4)
    done: Sequence[int] | None = None
    limit: int | None = None

    @property
    def total(self) -> int:
        return self.limit or sum(self.planned)


@dataclass(frozen=True)
class Curve:
    """A trick and what it does.

    Args:
        make: Makes the trick; that of a schedule takes the arguments that all schedules have.
        values: From the run's steps and a group's own values, those that the trick sets in each step.
    """

    make: Callable[..., Any]
    values: Callable[[Steps, Mapping[str, float]], Sequence[Mapping[str, float]]]

    def check(
        self,
        values: Sequence[Sequence[Mapping[str, Any]]],
        steps: Steps,
        own: Mapping[str, float] = OWN,
        group: int = 0,
    ) -> None:
        """See that a group had these values in the steps that were done, and its own where the trick sets none.

        Args:
            values: All groups in each step, as `Classifier` notes them.
            steps: The run's steps.
            own: The group's own values.
            group: Its number.
        """
        expected = [{**own, **now} for now in self.values(steps, own)][: sum(steps.done) if steps.done else steps.total]
        assert len(values) == len(expected)
        for key in own:
            found = [value_of(step[group], key) for step in values]
            np.testing.assert_allclose(found, [now[key] for now in expected], rtol=1e-9, atol=1e-15, err_msg=key)


def value_of(group: Mapping[str, Any], key: str) -> float:
    """A value of a group; momentum is Adam's first beta."""
    return float(group["betas"][0] if key == "momentum" and "betas" in group else group[key])


def own_values(module: Classifier, group: int = 0) -> dict[str, float]:
    """What a module's optimizer has of its own, in a group that is there from the start."""
    made = module.configure_optimizers()
    return {key: value_of(made.param_groups[group], key) for key in OWN}
