"""The package as a whole: public names, and what importing a part brings along."""

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import composer_sassha


@pytest.mark.parametrize("part", ["common", "perturbations", "curvature", "optim", "sharpness"])
def test_the_plain_parts_import_no_composer(part):
    check = "assert not [name for name in sys.modules if name.split('.')[0] == 'composer']"
    subprocess.run([sys.executable, "-c", f"import sys, composer_sassha.{part}; {check}"], check=True)


@pytest.mark.parametrize(
    "part", ["algorithms", "callbacks", "perturbations", "curvature", "optim", "sharpness"]
)
def test_no_exported_name_hides_a_module(part):
    package = import_module(f"composer_sassha.{part}")
    assert not set(package.__all__) & {module.name for module in pkgutil.iter_modules(package.__path__)}


def test_public_names_are_there_and_unknown_ones_are_not():
    for name in composer_sassha.__all__:
        assert getattr(composer_sassha, name).__doc__
        assert name in dir(composer_sassha)
    with pytest.raises(AttributeError, match="Sasha"):
        composer_sassha.Sasha  # noqa: B018
