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
from shoal.engine.observing import Label
from shoal.engine.request import Chunk, Generation
from shoal.engine.sampling import Sampling
from shoal.signals.guard import Guard, make_observer
from shoal.signals.probe import Probe

__all__ = [
    "Chunk",
    "DecayingDepth",
    "Dense",
    "DepthPlan",
    "EarlyTermination",
    "Engine",
    "Generation",
    "Guard",
    "HierarchicalSkip",
    "Label",
    "Ledger",
    "Probe",
    "Sampling",
    "SkipDecode",
    "TunedDepth",
    "UnifiedSkip",
    "fit_horizon",
    "load_router",
]

# The engine knows neither proposers nor probes, and they know the engine: they meet here.
Engine.make_drafter = Drafter
Engine.make_observer = make_observer

__version__ = version("shoal")
