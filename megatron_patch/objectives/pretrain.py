"""``--train-mode pretrain``: cross-entropy of plain text, averaged over all predicted tokens of a global batch.

The same sum as fine-tuning's: what differs is the store. Of a text every token is scored but the first, which nothing predicts.
"""

from megatron_patch.objectives.finetune import finetune_objective

STORE_KIND = "text"
pretrain_objective = finetune_objective
