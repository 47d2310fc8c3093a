"""Trainers that call ``loss.backward()`` themselves: Hugging Face, Accelerate, Lightning. None of them is imported here."""

from .huggingface import HuggingFaceMixin
from .joint import joint_loss, metrics
from .lightning import LightningMixin

__all__ = ["HuggingFaceMixin", "LightningMixin", "joint_loss", "metrics"]
