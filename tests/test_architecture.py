"""The house: who may import whom, and who may touch Lightning's private parts."""

import ast
import inspect
import sys
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

import lightning_speedups
from lightning_speedups.attach.trick import Grip, Trick

ROOT = Path(lightning_speedups.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
STOREYS = ["core", {"modules", "tensors"}, "attach", "tricks", "models", "recipes", "measure", "cli"]
LIBRARIES = {
    "core": {"torch"},
    "modules": {"torch", "timm"},
    "tensors": {"torch"},
    "cli": {"rich", "lightning_speedups_command"},
}
PUBLIC_PLACES = {"__init__", "__main__", "pytorch_lightning"}
BASES = [  # of attach/, each may be built on those before it
    "stations", "packages", "trick", "lasting", "randomness", "copies", "workers", "loaders", "run_length", "steps", "schedulers", "batches", "wrapping",
]  # fmt: skip


def storey(name):
    return next((i for i, rooms in enumerate(STOREYS) if name == rooms or name in rooms), None)


def imports(path):
    """All modules a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield node.module


def is_near(mine, theirs):
    """Whether one file of a room may import another of it."""
    if mine[0] == "tricks":  # a wing knows its own base; a trick of several files knows these
        same_wing, same_folder = mine[1] == theirs[1], len(mine) == 4 and mine[:3] == theirs[:3]
        return same_wing and (theirs[2:] == ("base",) or same_folder)
    if mine[0] == "attach":  # grips stand on their bases and on nothing else
        rank = [BASES.index(one) if one in BASES else len(BASES) for one in (mine[1], theirs[1])]
        return theirs[1] in BASES and rank[1] < rank[0]
    return mine[0] != "cli"


def forbidden(path):
    mine = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        top, *rest = name.split(".")
        if top != "lightning_speedups":
            allowed = top in sys.stdlib_module_names or top in LIBRARIES.get(mine[0], {top})
        elif len(mine) == 1 and mine[0] in PUBLIC_PLACES:
            allowed = True
        elif not rest:  # the package as a user sees it
            allowed = storey(mine[0]) >= storey("models")
        elif mine[0] == rest[0]:
            allowed = is_near(mine, tuple(rest))
        else:
            allowed = storey(rest[0]) is not None and storey(rest[0]) < storey(mine[0])
        if not allowed:
            yield f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_house_only(path):
    assert not list(forbidden(path))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/x.py", "import lightning.pytorch"),
        ("core/x.py", "from lightning_speedups.attach.trick import Trick"),
        ("core/x.py", "from lightning_speedups.modules.layers import Layer"),
        ("modules/x.py", "from lightning_speedups.tensors.unloaded import Unloaded"),
        ("tensors/x.py", "from lightning.pytorch import Trainer"),
        ("tricks/batches/x.py", "from lightning_speedups.tricks.batches.mixup_callback import MixupCallback"),
        ("tricks/batches/x.py", "from lightning_speedups.tricks.rates.base import ScheduleTrick"),
        ("tricks/batches/x/x.py", "from lightning_speedups.tricks.batches.y.parts import Part"),
        ("tricks/batches/x.py", "from lightning_speedups import MixupCallback"),
        ("tricks/rates/x.py", "def f():\n    from lightning_speedups.measure import compare"),
        ("attach/x.py", "from lightning_speedups.attach.range_test import run_range_test"),
        ("attach/trick.py", "from lightning_speedups.attach.steps import OptimizerTrick"),
        ("cli.py", "import torch"),
    ],
)
def test_the_check_itself_finds_a_forbidden_import(place, line, tmp_path, monkeypatch):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(forbidden(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lightnings_private_parts_are_touched_in_attach_only(path):
    if path.relative_to(ROOT).parts[0] == "attach":
        return
    tree = ast.parse(path.read_text())
    touched = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and any(word in ast.unparse(node.value).split(".") for word in ("trainer", "strategy", "pl_module"))
    ]
    touched += [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.")
        for alias in node.names
        if alias.name.startswith("_") or "._" in (node.module or "")
    ]
    assert not touched


OF_BOTH = {  # what may be imported from one of Lightning's two packages and be used with the other's objects, and why
    "they are of lightning_utilities, the same in both": {
        "rank_zero_info", "rank_zero_warn", "rank_zero_only", "rank_zero_module", "WarningCache",
    },
    "functions that ask for no class of Lightning's": {
        "is_param_in_hook_signature", "move_data_to_device", "sized_len", "garbage_collection_cuda",
        "prepare_for_backward", "_collect_rng_states", "_set_rng_states",
    },
    "no Trainer sees them": {"Tqdm", "_ResultCollection"},
}  # fmt: skip
OF_ONE = {  # where only one's objects are
    "attach/packages.py": {"lightning", "pytorch_lightning", "exceptions", "lightnings_exceptions"},
    "measure/training.py": {"LightningModule", "Trainer"},  # of its own
    "measure/language_model.py": {"LightningModule"},
    "measure/runner.py": {"MisconfigurationException"},
    "models/transfer_classifier.py": {"LightningModule"},  # and pytorch_lightning.py has the other
    "pytorch_lightning.py": {"LightningModule"},
    "tricks/transfer/base.py": {"LightningModule"},  # in the name of a type
    "tricks/hardware/trainer_defaults.py": {"Trainer"},  # its arguments' names
}


def used_of_one_package(path):
    """What a file imports from one of Lightning's packages and uses otherwise than in annotations."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            for alias in node.names:
                if (module or alias.name).split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
                    names.add(alias.asname or (alias.name if module else alias.name.split(".")[0]))
    marks = {
        mark for node in ast.walk(tree) for field in ("annotation", "returns") if (mark := getattr(node, field, 0))
    }
    told = {name for mark in marks for name in ast.walk(mark)}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in told}
    return (names & used) - set().union(*OF_BOTH.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_trainer_sees_is_asked_of_its_own_package(path):
    place = str(path.relative_to(ROOT))
    assert used_of_one_package(path) == OF_ONE.get(place, set())


@pytest.mark.parametrize(
    "line",
    [
        "from lightning.pytorch.strategies import DDPStrategy\nisinstance(strategy, (int, DDPStrategy))",
        "from lightning.pytorch import Callback\nclass Trick(Callback): ...",
        "from lightning.fabric.utilities.exceptions import MisconfigurationException\nraise MisconfigurationException",
        "import lightning.pytorch as pl\npl.Trainer()",
        "def f():\n    import pytorch_lightning.loggers\n    x: int = pytorch_lightning.loggers.Logger()",
    ],
)
def test_the_check_itself_finds_what_is_of_one_package(line, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert used_of_one_package(path)


def test_the_check_itself_lets_annotations_and_what_both_share_be(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "from lightning.pytorch import Trainer\nfrom lightning.pytorch.utilities.rank_zero import rank_zero_info\n"
        "def f(trainer: Trainer | None = None, *more: list[Trainer]) -> Trainer:\n"
        "    inner: Trainer = g(trainer)\n    rank_zero_info(inner)"
    )
    assert not used_of_one_package(path)


def test_the_command_line_needs_nothing_but_python_until_there_is_something_to_do():
    tree = ast.parse(ROOT.with_name("lightning_speedups_command.py").read_text())
    at_once = {node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
    for node in at_once:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    later = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in at_once]
    assert later == ["lightning_speedups.cli"]


def test_every_file_stands_in_a_room_of_the_house():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} - PUBLIC_PLACES
    assert all(storey(room) is not None for room in rooms)
    wings = {path.relative_to(ROOT).parts[1] for path in FILES if path.relative_to(ROOT).parts[0] == "tricks"}
    assert wings - {"__init__.py"} == {
        "rates",
        "batches",
        "labels",
        "transfer",
        "hardware",
        "optimizers",
        "steps",
        "sequences",
    }


IMPURE = {
    "warnings", "logging", "time", "datetime", "random", "pathlib", "os", "io", "shutil", "tempfile", "pickle", "sys",
    "threading", "subprocess", "weakref",
}  # fmt: skip
IMPURE_NAMES = {
    "open", "print", "setattr", "delattr", "currentframe", "_getframe", "stack", "warn", "manual_seed_all",
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "seed", "fork_rng",
    "set_rng_state", "get_rng_state", "save", "load", "from_file",
}  # fmt: skip
DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "multinomial",
    "bernoulli",
    "exponential_",
    "_sample_dirichlet",
}


def impure(path):
    """What in a file of core/ is more than numbers into numbers."""
    tree = ast.parse(path.read_text())
    yield from (name for name in imports(path) if name.split(".")[0] in IMPURE)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        draws = name in DRAWS and "generator" not in {keyword.arg for keyword in node.keywords}
        if name in IMPURE_NAMES or draws:
            yield ast.unparse(node)
    for node in ast.walk(tree):  # patches
        for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Attribute) and not ast.unparse(target).startswith("self."):
                yield ast.unparse(node)


CORE = [path for path in FILES if path.relative_to(ROOT).parts[0] == "core"]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_core_makes_numbers_of_numbers_and_does_nothing_else(path):
    assert not list(impure(path))


@pytest.mark.parametrize(
    "line",
    [
        "import warnings", "from pathlib import Path", "torch.rand(3)", "torch.randperm(3)", "module.forward = stand_in",
        "setattr(owner, name, stand_in)", "sys._getframe(2)", "module.register_forward_hook(hook)", "torch.manual_seed_all(3)",
    ],
)  # fmt: skip
def test_the_check_itself_finds_what_is_impure(line, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(line)
    assert list(impure(path))


HOOKS = {name for kind in (Callback, Trick, Grip) for name in vars(kind) if not name.startswith("_")} - {
    "state_key",
    "name",
}


def hooks_without_super(path):
    """Overrides of hooks, in classes made of ours, that leave out what the base does."""
    for kind in ast.walk(ast.parse(path.read_text())):
        bases = [ast.unparse(base).rpartition(".")[2] for base in getattr(kind, "bases", [])]
        if not isinstance(kind, ast.ClassDef) or not any(base.endswith("Trick") for base in bases):
            continue
        for function in kind.body:
            if isinstance(function, ast.FunctionDef) and function.name in HOOKS:
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if f"super().{function.name}" not in calls and not function.decorator_list:
                    yield f"{kind.name}.{function.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_override_of_a_hook_calls_the_base(path):
    assert not list(hooks_without_super(path))


def test_the_check_itself_finds_a_hook_without_super(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("class A(Trick):\n    def on_fit_start(self, trainer, pl_module):\n        self.x = 1\n")
    assert list(hooks_without_super(path)) == ["A.on_fit_start"]


PUBLIC = [getattr(lightning_speedups, name) for name in lightning_speedups.__all__]
TRICKS = [kind for kind in PUBLIC if isinstance(kind, type) and not is_dataclass(kind)]


@pytest.mark.parametrize("kind", TRICKS, ids=lambda kind: kind.__name__)
def test_no_constructor_calls_what_a_subclass_overrides(kind):
    """It would run before the subclass has its fields."""
    called = set()
    for base in kind.__mro__:
        if base.__module__.startswith("lightning_speedups.") and "__init__" in vars(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base.__init__)))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self."):
                    called.add((base, ast.unparse(node.func).removeprefix("self.")))
    below = {(base, name): kind.__mro__[: kind.__mro__.index(base)] for base, name in called}
    assert not [name for (base, name), heirs in below.items() if any(name in vars(heir) for heir in heirs)]


def test_the_tests_mirror_the_package():
    tests = Path(__file__).parent
    for path in FILES:
        if path.stem not in ("__init__", "__main__") and path.relative_to(ROOT).parts[0] != "measure":
            mirrored = tests / path.relative_to(ROOT).with_name(f"test_{path.name}")
            assert mirrored.exists(), f"{path.relative_to(ROOT)} has no {mirrored.relative_to(tests)}"
