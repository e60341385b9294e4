"""Model families as data: from a Hugging Face config to one `ModelConfig`, its weights' names, and its program."""

from tensorwright.models.families import from_huggingface

__all__ = ["from_huggingface"]
