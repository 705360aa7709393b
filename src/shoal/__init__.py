"""Shoal: LLM answers in less than a full forward pass."""

from importlib.metadata import version

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.decaying import DecayingDepth
from shoal.depth.early_termination import EarlyTermination
from shoal.depth.hierarchical import HierarchicalSkip
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.routers import load_router
from shoal.depth.skipdecode import SkipDecode
from shoal.depth.unified import UnifiedSkip
from shoal.draft.drafter import Drafter
from shoal.engine.engine import Engine
from shoal.engine.ledger import Ledger
from shoal.engine.request import Chunk, Generation
from shoal.engine.sampling import Sampling

__all__ = [
    "Chunk",
    "DecayingDepth",
    "Dense",
    "DepthPlan",
    "EarlyTermination",
    "Engine",
    "Generation",
    "HierarchicalSkip",
    "Ledger",
    "Sampling",
    "SkipDecode",
    "TunedDepth",
    "UnifiedSkip",
    "fit_horizon",
    "load_router",
]

Engine.make_drafter = Drafter  # the engine knows no proposers, and they know the engine: they meet here

__version__ = version("shoal")
