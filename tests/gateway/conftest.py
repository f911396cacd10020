"""What the tests of the gateway share: a registry that each copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora2serve import Registry
from tests.support.gateways import add_versions
from tests.support.registries import add_trial
from tests.support.shared import once
from tests.support.trials import NAME


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry with three versions of `towns`, to which no alias points; ``started`` has a champion, 1."""

    def make(folder: Path) -> None:
        with Registry(folder / "registry") as registry:
            add_versions(registry, folder, 3)
        shutil.copytree(folder / "registry", folder / "started")
        with Registry(folder / "started", author="tester") as registry:
            registry.promote("towns@1")

    return once(tmp_path_factory, "gateway-registry", make)


@pytest.fixture(scope="session")
def trial_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a registry with a champion, 1, a challenger, 2, and a third version whose parity is not proven."""

    def make(folder: Path) -> None:
        with Registry(folder / "registry", author="tester") as registry:
            add_trial(registry, folder, NAME)

    return once(tmp_path_factory, "trial-registry", make)


@pytest.fixture
def place(tmp_path: Path, trial_seed: Path) -> Path:
    """A folder with a copy of it."""
    shutil.copytree(trial_seed / "registry", tmp_path / "registry")
    return tmp_path
