"""Training on the device: the only part of the agent that knows torch, transformers and peft."""

from services.client_agent.training.evaluation import Evaluation
from services.client_agent.training.trainer import Trainer

__all__ = ["Evaluation", "Trainer"]
