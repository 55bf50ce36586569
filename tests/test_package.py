"""The package as a whole: public names, and what importing a part brings along."""

import subprocess
import sys

import pytest

import composer_sassha


@pytest.mark.parametrize("part", ["optim", "perturbations", "curvature"])
def test_the_plain_parts_import_no_composer(part):
    code = f"import sys, composer_sassha.{part}; assert not any(m.split('.')[0] == 'composer' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_unknown_ones_are_not():
    for name in composer_sassha.__all__:
        assert getattr(composer_sassha, name).__doc__
        assert name in dir(composer_sassha)
    with pytest.raises(AttributeError, match="Sasha"):
        composer_sassha.Sasha  # noqa: B018
