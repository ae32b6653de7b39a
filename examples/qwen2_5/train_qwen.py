"""Fine-tune or preference-optimise a Qwen2.5-class model: the entry that torchrun starts on every rank.

    torchrun --nproc-per-node 2 examples/qwen2_5/train_qwen.py @examples/qwen2_5/presets/math.args \
        --hf-path Qwen2.5-7B-Instruct --pair-data data/train --save outputs/math --export-hf outputs/math/hf \
        --tensor-model-parallel-size 2 --sequence-parallel --train-iters 1000

It only wires: device, arguments, run, Megatron's ``pretrain``, export. Exit code 2 is a user's error, said in one line.
"""

import sys

from megatron_patch import cpu_backend
from megatron_patch.arguments import choose_device, requested_device
from megatron_patch.entry import end_when_torchrun_says, parse_arguments, user_errors


def main(argv: list[str]) -> None:
    """Train as the command line says."""
    end_when_torchrun_says()
    device = choose_device(requested_device(argv))
    if device == "cpu":
        cpu_backend.install()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_patch import loop_hooks
    from megatron_patch.run import TrainingRun

    args = parse_arguments(device, plans=True)
    if args.dry_run:
        from megatron_patch.dry_run import show_plan

        return show_plan(args, lambda line: loop_hooks.print_line(f"[plan] {line}"))
    run = TrainingRun(args, device)
    if run.args.check:
        return
    config = pretrain_cfg_container_from_args(run.args, run.model_config())
    with run.reported():
        pretrain(config, run.dataset_provider, ModelType.encoder_or_decoder, run.forward_step)
    run.export()


if __name__ == "__mp_main__":  # imported again by a process that writes an asynchronous save
    cpu_backend.install_in_helper()
if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
