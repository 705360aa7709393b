"""Shoal: LLM answers in less than a full forward pass."""

from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.skipdecode import SkipDecode
from shoal.engine.engine import Engine
from shoal.engine.ledger import Ledger
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling

__all__ = ["Dense", "DepthPlan", "Engine", "Generation", "Ledger", "Sampling", "SkipDecode"]
