"""The text of config.pbtxt. It knows Triton's model configuration, and nothing of folders.

Format: github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

from collections.abc import Mapping

from tensorwright.serve.triton.fields import INPUTS, OUTPUTS, Field
from tensorwright.serve.triton.settings import ServeSettings

MARK = "# Written by `tensorwright deploy`; it replaces this folder when it runs again."
_LOGITS = {"float16": "FP16", "float32": "FP32", "bfloat16": "FP32"}  # NumPy has no bfloat16 for the backend to take


def config_text(model_name: str, *, max_batch_size: int, logits_dtype: str, settings: ServeSettings,
                parameters: Mapping[str, str]) -> str:
    """The whole config.pbtxt. Scalars arrive as [1, 1], since `max_batch_size` adds the first dimension."""
    all_parameters = {**parameters, **settings.to_parameters()}
    inputs = [_tensor(field, logits_dtype) for field in INPUTS]
    outputs = [_tensor(field, logits_dtype) for field in OUTPUTS]
    lines = [
        MARK,
        f'name: "{model_name}"',
        'backend: "python"',
        f"max_batch_size: {max_batch_size}",
        f"model_transaction_policy {{ decoupled: {str(settings.decoupled).lower()} }}",
        "input [\n" + ",\n".join(inputs) + "\n]",
        "output [\n" + ",\n".join(outputs) + "\n]",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *(_parameter(key, value) for key, value in all_parameters.items()),
    ]
    return "\n".join(lines) + "\n"


def _tensor(field: Field, logits_dtype: str) -> str:
    kind = _LOGITS[logits_dtype] if field.type == "LOGITS" else field.type
    optional = "" if field.required or field in OUTPUTS else " optional: true"
    dims = ", ".join(str(size) for size in field.dims)
    return f'  {{ name: "{field.name}" data_type: TYPE_{kind} dims: [ {dims} ]{optional} }}'


def _parameter(key: str, value: str) -> str:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'parameters {{ key: "{key}" value {{ string_value: "{quoted}" }} }}'
