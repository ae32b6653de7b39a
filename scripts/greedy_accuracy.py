"""Greedy accuracy of a Hugging Face checkpoint on problems with a known final number; transformers only.

    python scripts/greedy_accuracy.py --model outputs/quickstart/sft/hf --problems outputs/quickstart/problems/valid.jsonl

A problem counts as solved when the model ends its answer and the final number is exactly the reference's. Prints the fraction.
"""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from toolkits.loss_comparison.measure import fraction_solved, greedy_answers, load, read_problems


def main(argv: Sequence[str]) -> None:
    """Print the accuracy of ``--model`` on ``--problems``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--problems", required=True, help='JSONL of {"question", "answer"}')
    parser.add_argument("--limit", type=int, default=None, help="only the first N problems")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    problems = read_problems(args.problems)[: args.limit]
    print(f"{fraction_solved(greedy_answers(*load(args.model), problems), problems):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
