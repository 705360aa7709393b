"""Shoal: LLM answers in less than a full forward pass."""

from importlib.metadata import version

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.skipdecode import SkipDecode
from shoal.engine.engine import Engine
from shoal.engine.ledger import Ledger
from shoal.engine.request import Chunk, Generation
from shoal.engine.sampling import Sampling

__all__ = [
    "Chunk",
    "Dense",
    "DepthPlan",
    "Engine",
    "Generation",
    "Ledger",
    "Sampling",
    "SkipDecode",
    "TunedDepth",
    "fit_horizon",
]

__version__ = version("shoal")
