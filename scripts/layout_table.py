"""The table of layouts in README.md: for each model and number of GPUs the least model parallelism that fits, by --dry-run's count.

    python scripts/layout_table.py --gpu-memory-gb 80 --configs tests/data/qwen2_5_configs >table.md

Nothing is started: every cell is one process on this machine. Recomputation is taken only where nothing fits without it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
GPUS = (1, 2, 4, 8, 16, 32, 64)
PAIRS = 128
"""A step's; any layout of up to 64 GPUs divides it."""


def cell(argv: list[str]) -> dict[str, object] | None:
    """The layout for WORLD_SIZE processes: TP, PP, recompute and the GiB of its fullest rank; None when none fits."""
    from megatron_patch import cpu_backend

    cpu_backend.install()
    from megatron_patch import dry_run
    from megatron_patch.entry import parse_arguments

    sys.argv[1:] = argv
    args = parse_arguments("cpu", plans=True)
    for again in (False, True):
        for tp, pp in dry_run.layouts(args):
            other = dry_run.with_layout(args, tp, pp)
            other = dry_run.recomputed(other) if again else other
            needed = dry_run.needs(other)
            if dry_run.fits(other, needed):
                return {"tp": tp, "pp": pp, "recompute": again, "gib": needed / dry_run.GIB}
    return None


def asked(config: Path, gpus: int, memory: float) -> dict[str, object] | None:
    """``cell`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        flags = f"--hf-path {folder} --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --dry-run".split()
        flags += ["--global-batch-size", str(PAIRS), "--gpu-memory-gb", str(memory)]
        environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}
        done = subprocess.run([sys.executable, __file__, "--cell", *flags], capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def shown(found: dict[str, object] | None) -> str:
    """A cell of the table."""
    if found is None:
        return "does not fit"
    return f"TP {found['tp']} PP {found['pp']}{' R' if found['recompute'] else ''}, {found['gib']:.0f}"


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--cell"]:
        print(json.dumps(cell(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-memory-gb", type=float, default=80)
    parser.add_argument("--configs", type=Path, required=True, help="folder with SIZE.json, the models' config.json")
    args = parser.parse_args()
    print("| model | " + " | ".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS) + " |")
    print("|---|" + "---|" * len(GPUS))
    for size in SIZES:
        cells = [shown(asked(args.configs / f"{size}.json", gpus, args.gpu_memory_gb)) for gpus in GPUS]
        print(f"| {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
