"""Package metadata; the tools' settings stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

SERVE = ["fastapi>=0.132", "uvicorn>=0.30", "pydantic>=2.6", "prometheus-client>=0.20", "h11>=0.14"]
TRACING = ["opentelemetry-sdk>=1.25", "opentelemetry-exporter-otlp-proto-http>=1.25"]
EXTRAS = {
    # Training a checkpoint: the tokenizer's model file is edited through its protocol buffer.
    "train": ["protobuf>=4"],
    # The picture of a training run.
    "plot": ["matplotlib>=3.8"],
    # Checkpoints in Hugging Face's format, and from its hub.
    "hf": ["safetensors>=0.4", "huggingface_hub>=0.23", "tokenizers>=0.19", "jinja2>=3.1", "protobuf>=4"],
    # GGUF files, and the tokenizers in them.
    "gguf": ["gguf>=0.10", "protobuf>=4", "tokenizers>=0.19", "jinja2>=3.1"],
    # 4-bit weights in the published ecosystem's own format.
    "bnb": ["bitsandbytes>=0.46"],
    # A server of OpenAI's, TGI's, llama.cpp's and Ollama's APIs, and its metrics.
    "serve": SERVE,
    # Answers of a given form: JSON by a schema, regular expressions, grammars.
    "grammar": ["llguidance>=1.9"],
    # A trace of each request.
    "tracing": TRACING,
    # Replicas of a server on several machines.
    "ray": [*SERVE, "ray[serve]>=2.49"],
    # Tests: independent implementations to compare with, and what .ci/run checks with.
    "test": [
        "protobuf>=4",
        "matplotlib>=3.8",
        "pytest>=8",
        "hypothesis>=6",
        "transformers>=5,<6",
        "safetensors>=0.4",
        "huggingface_hub>=0.23",
        "gguf>=0.10",
        "accelerate>=1",  # transformers reads GGUF files with it
        *SERVE,
        *TRACING,
        "llguidance>=1.9",
        "openai>=1.40",
        "ollama>=0.3",
        "httpx>=0.27",
        "schemathesis>=4",
        "selenium>=4.20",  # the page, in a real Chromium
        "ruff>=0.9",
        "mypy>=1.18",
    ],
}

FRONT_DOOR = Path(__file__).with_name("llama") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', FRONT_DOOR.read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION is not None

setup(
    name="codellama",
    version=VERSION[1],
    description="A Code Llama from scratch in PyTorch: to run, to study, and to experiment with",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    # With it `pip install -e .` writes a path, which type checkers and editors follow; without it, an import
    # hook, which none of them runs.
    package_dir={"": "."},
    package_data={
        "llama": [
            "py.typed",
            "assets/tiny/*",
            "*/README.md",
            "train/packages.tsv",
            "train/exercises/*.txt",
            "train/exercises/classics/*.txt",
            "kernels/*.[ch]*",
            "serve/page/*",
        ]
    },
    install_requires=[
        "torch>=2.6,<2.14",
        "sentencepiece>=0.2",
        "fairscale>=0.4.13",
        "fire>=0.6",
        "numpy>=1.26",
        "tqdm>=4.66",
        # The command line: options from annotated functions, and the terminal of `codellama chat`.
        "tyro>=1.0",
        "prompt_toolkit>=3.0.36",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["codellama=llama.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
