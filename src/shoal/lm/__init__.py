"""Language models behind one small contract: the local engine, any OpenAI-compatible server, a scripted fake."""

from shoal.lm.cache import AnswerCache
from shoal.lm.cached import CachedModel
from shoal.lm.contract import (
    ChatJob,
    Decoding,
    GenerateJob,
    LanguageModel,
    Message,
    Reply,
    ScoreJob,
    Scores,
    Tool,
    ToolCall,
    Usage,
)
from shoal.lm.local import LocalModel
from shoal.lm.resolve import load_model
from shoal.lm.scripted import ScriptedModel

__all__ = [
    "AnswerCache",
    "CachedModel",
    "ChatJob",
    "Decoding",
    "GenerateJob",
    "LanguageModel",
    "LocalModel",
    "Message",
    "Reply",
    "ScoreJob",
    "Scores",
    "ScriptedModel",
    "Tool",
    "ToolCall",
    "Usage",
    "load_model",
]
