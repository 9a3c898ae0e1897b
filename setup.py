"""Packaging. `kernels/` and `conf/` are top-level folders that install as `megapar.kernels` and `megapar.conf`."""

from setuptools import find_packages, setup

# Never ship `kernels` or `conf` as top-level packages: other projects own those names in site-packages.
KERNELS = {"megapar.kernels", *(f"megapar.kernels.{name}" for name in find_packages("kernels"))}
PACKAGES = {*find_packages(include=["megapar", "megapar.*"]), *KERNELS, "megapar.conf"}

setup(
    name="megapar",
    version="0.1.0",
    description="Research framework for 3D-parallel Transformer training",
    python_requires=">=3.11",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=sorted(PACKAGES),
    package_dir={"megapar": "megapar", "megapar.kernels": "kernels", "megapar.conf": "conf"},
    package_data={
        "megapar": ["py.typed"],
        "megapar.conf": ["*.yaml", "**/*.yaml"],
        "megapar.bench": ["pace.c"],
        "megapar.interpret": ["page.html"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy",
        "einops",
        "sentencepiece",
        "wandb",
        "hydra-core>=1.3.2,<1.4",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "sweep": ["hydra-joblib-launcher>=1.2"],
        "tensorboard": ["tensorboardX"],
        "hf": ["tokenizers", "jinja2"],
        "experiments": ["django", "espeakng-loader", "num2words", "pillow", "scikit-learn", "scipy", "soundfile"],
        "lm_eval": ["lm_eval"],  # megapar/library/harness.py
        "dev": [
            "tensorboardX",
            "tokenizers",
            "jinja2",
            "transformers",  # references, in tests alone
            "peft",
            "django",
            "espeakng-loader",
            "num2words",
            "pillow",
            "scikit-learn",
            "scipy",
            "soundfile",
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "pre-commit",
            "hydra-joblib-launcher>=1.2",
        ],
    },
    entry_points={"console_scripts": ["megapar=megapar.cli:main"]},
)
