"""RMSNorm for the torch layer spec.

megatron-core's own torch norm refuses sequence parallelism (core/transformer/torch_norm.py:46), although all it needs is one
tag on the weight: with sequence parallelism every tensor-parallel rank sees other tokens, so the weight's gradient has to be
summed over the group, and ``finalize_model_grads`` does that for parameters tagged ``sequence_parallel``.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in float32 and cast back before the weight, as Qwen2 does.

    Source: arXiv 1910.07467; the order of cast and weight is transformers' ``Qwen2RMSNorm``. Shapes: x [..., hidden_size].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        # Where upstream's own layers make theirs (core/tensor_parallel/layers.py:972): weights are imported before the model moves.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        x32 = x.float()
        normalised = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)
