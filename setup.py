"""Packaging: what is installed, with which extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read as text: importing the package would import torch.
INIT = (ROOT / "composer_sassha/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)
README = (ROOT / "README.md").read_text(encoding="utf-8")

# The last three are for comparisons; they come with scikit-learn, torch and Composer.
demo = ["scikit-learn>=1.4", "matplotlib>=3.8", "scipy>=1.12", "jinja2>=3.1", "tabulate>=0.9"]
# What mosaicml 0.32 allows; transformers 4.53 is the last that it does.
nlp = ["transformers>=4.46,<4.54", "datasets>=2.20,<5"]
tools = ["ruff==0.17.5", "mypy==2.4.1", "types-PyYAML"]
dev = [*demo, *nlp, *tools, "pytest>=8,<9.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6"]

setup(
    name="composer_sassha",
    version=VERSION[1],
    description="Sharpness-aware and second-order training for MosaicML Composer",
    # Relative links lead nowhere on a package index: only their text is kept.
    long_description=re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", README),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    # The recipes live in yamls/ at the top level; an installed package carries them as composer_sassha/yamls.
    packages=[*find_packages(include=["composer_sassha", "composer_sassha.*"]), "composer_sassha.yamls"],
    package_dir={"composer_sassha.yamls": "yamls"},
    package_data={
        "composer_sassha": ["py.typed", "**/*.md", "**/*.html"],
        "composer_sassha.yamls": ["*.yaml", "*.md"],
    },
    install_requires=[
        "mosaicml>=0.32,<0.33",
        "torch>=2.6",
        "torchvision",
        "pyyaml",
        "omegaconf>=2.3",
        "filelock",
    ],
    entry_points={"console_scripts": ["composer-sassha = composer_sassha.commands:main"]},
    extras_require={"demo": demo, "nlp": nlp, "dev": dev, "all": sorted({*demo, *dev})},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
