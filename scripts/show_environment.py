"""Print what this environment runs on: one line a component, "not there" where it is optional and missing."""

import importlib.metadata
import platform

import torch

COMPONENTS = ("torch", "megatron-core", "transformers", "safetensors", "numpy", "transformer-engine", "apex", "vllm", "wandb")


def version(package: str) -> str:
    """The installed version, or "not there"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not there"


def main() -> None:
    """Print the table."""
    rows = [("python", platform.python_version()), *((name, version(name)) for name in COMPONENTS)]
    rows.append(("GPUs", str(torch.cuda.device_count()) if torch.cuda.is_available() else "none"))
    for name, value in rows:
        print(f"  {name:20}{value}")


if __name__ == "__main__":
    main()
