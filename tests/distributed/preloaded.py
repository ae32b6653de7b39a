"""Imported once by the fork server of ``harness``: everything that takes seconds to import, with the CPU backend installed.

Only that server and its children import this module; the pytest process never does.
"""

import warnings

warnings.simplefilter("ignore")

from megatron_patch import cpu_backend  # noqa: E402

cpu_backend.install()

import megatron.training.training  # noqa: E402, F401
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401

import megatron_patch.run  # noqa: E402, F401
