"""An entry that plans a rank's memory and then measures it in one training step: ``memory_entry.py OUT [flags of training]``.

``OUT.<rank>.json`` holds both. Measured: bytes of the storages of weights, gradients and optimizer state after the step, and the most bytes
that autograd's saved tensors held at once on the way, weights left out.
"""

import json
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_patch.entry import parse_arguments


class Held:
    """Counts the storages that saved tensors hold; ``saved_tensors_hooks(held.pack, held.unpack)``."""

    def __init__(self, left_out: set[int]) -> None:
        self.left_out, self.holders, self.now, self.most = left_out, Counter[int](), 0, 0

    class Box:
        """What autograd gets instead of a tensor; gone when backward has used it."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: torch.Tensor) -> Any:
        box, storage = self.Box(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self.left_out:
            self._change(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(box, self._change, storage.data_ptr(), storage.nbytes(), -1)
        return box

    @staticmethod
    def unpack(box: Any) -> torch.Tensor:
        return box.tensor

    def _change(self, storage: int, size: int, by: int) -> None:
        held_before = self.holders[storage] > 0
        self.holders[storage] += by
        self.now += size * ((self.holders[storage] > 0) - held_before)
        self.most = max(self.most, self.now)


def storages(tensors: Any) -> dict[int, int]:
    """Address and bytes of each storage."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def main(out: str) -> None:
    """Plan, build, train one step, write."""
    args = parse_arguments("cpu")
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training as mt
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron

    from megatron_patch.built_model import model_config
    from megatron_patch.checkpoint import torch_adam
    from megatron_patch.forward_step import ForwardStep
    from megatron_patch.memory_plan import plan_stage
    from megatron_patch.streams import full_pass, sample_set

    planned = [plan_stage(args, model_config(args, []), stage, micro_batches=16) for stage in range(args.pipeline_model_parallel_size)]
    torch_adam.install()
    config = pretrain_cfg_container_from_args(args, model_config(args, []))
    initialize_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, _ = mt.setup_model_and_optimizer(ModelType.encoder_or_decoder, cfg_container=config, pg_collection=groups)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    weights = storages(parameters)
    stream = full_pass(args, sample_set(args, args.pair_data, with_reference=False)[0], args.vocab_size)
    slots = stream.plan.step(0)
    data = [(stream.batch(slot) for slot in slots) for _ in model]
    held = Held(set(weights))
    step = ForwardStep(lambda batch, logps: (logps.sum(), batch.lengths.sum(), {}), args.vocab_size, args.logps_chunk_tokens)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=data if len(model) > 1 else data[0], model=model, num_microbatches=len(slots),
            seq_length=args.seq_length, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
    optimizer.step()
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    state = [value for each in inner for of in each.state.values() for value in of.values() if torch.is_tensor(value) and value.numel() > 1]
    state += [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    measured = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": sum(weights.values()),
        "gradients": sum(storages(parameter.main_grad for parameter in parameters).values()),
        "optimizer": sum(size for address, size in storages(state).items() if address not in weights),
        "activations": held.most,
    }
    result = {"stage": groups.pp.rank(), "measured": measured, "planned": planned[groups.pp.rank()]._asdict(), "micro_batches": len(slots)}
    Path(f"{out}.{args.rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv.pop(1))
