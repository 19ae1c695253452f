"""Requests of a server, batched step by step: what an engine that has a scheduler needs."""

from toma_fx.serving.batcher import StepBatcher, StepResult

__all__ = ["StepBatcher", "StepResult"]
